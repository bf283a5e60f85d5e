"""What pi_T is worth: by the small world's gold judge, by AlpacaEval 2.0, by MT-Bench (Section 5.1).

    win rate      mean over the prompts of y = preference - 1: 1 where the model's response is better than the
                  reference's, 0.5 for a tie, 0 else; with a judge's log-probs anything between
    LC win rate   the same had both been equally long: a logistic regression of y on the difference in length, the
                  instruction's difficulty and an intercept, read without its length term (Dubois et al., 2024)
    MT-Bench      mean rating, 1 to 10, of the two turns of 80 dialogues; ratings that could not be read are left out

Small world  reads   eval.jsonl {"id", "prompt", "reference"} and gold.json, its judge: without it nothing is scored
             writes  a folder: responses.jsonl {"id", "prompt", "response", "finish", "reference", "preference"},
                     metrics.json, and with --gold annotations.json as AlpacaEval has them
AlpacaEval   model_outputs.json [{"dataset", "instruction", "output", "generator"}], annotations.json [{"dataset",
             "instruction", "output_1", "generator_1" (the reference's), "output_2", "generator_2" (the model's),
             "annotator", "preference": 1 the reference, 2 the model, null missing}], metrics.json
MT-Bench     FOLDER/model_answer/MODEL.jsonl {"question_id", "answer_id", "model_id", "choices", "tstamp"},
             FOLDER/model_judgment/JUDGE_single.jsonl {"question_id", "model", "judge", "user_prompt", "judgment",
             "score", "turn", "tstamp"} of all models, FOLDER/model_score/MODEL_JUDGE.json

    python 05_eval.py --model pi_1 --input eval.jsonl --gold gold.json --name "SPA, iteration 1" --output eval/spa_1
    python 05_eval.py --model pi_1 --alpaca-eval --name spa_1 --output spa_1/model_outputs.json
    python 05_eval.py --judge hub spa_1/model_outputs.json --judge-url https://api.openai.com/v1 \\
        --judge-model gpt-4-1106-preview --output spa_1/annotations.json            # the key: OPENAI_API_KEY
    python 05_eval.py --annotations spa_1/annotations.json --name "SPA, iteration 1" --output spa_1/metrics.json
    python 05_eval.py --model pi_1 --mt-bench question.jsonl --name spa_1 --output mt_bench
    python 05_eval.py --mt-bench question.jsonl --judge mt_bench/model_answer/spa_1.jsonl --judge-prompts \\
        judge_prompts.jsonl --reference-answers gpt-4.jsonl --judge-url ... --judge-model gpt-4 --output mt_bench
    python 05_eval.py --report eval/sft spa_1/metrics.json --output report       # tables, samples, a picture
    torchrun --nproc-per-node 4 05_eval.py --model ...                           # what samples; the rest runs alone

Departs from the paper: the judging prompt is the project's own unless --judge-template names the official file; the
order of the two answers is drawn by this project's seed; the L1 penalty is fixed, not chosen by cross-validation.
"""

import concurrent.futures
import contextlib
import csv
import gzip
import hashlib
import json
import math
import os
import re
import threading
import time
import zlib
from argparse import Namespace
from collections import Counter, namedtuple
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled

import common

# ---------------------------------------------------------------------------------------------
# The figures of AlpacaEval 2.0


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def win_rate(y):
    """(win rate, its standard error or None for one row) in percent. y: (n,) of 1 win, 0.5 tie, 0 loss"""
    error = 100 * float(y.std(ddof=1)) / len(y) ** 0.5 if len(y) > 1 else None
    return 100 * float(y.mean()), error


def fit(features, target, weight, l1=0.1):
    """argmin_w  sum_i weight_i CE(target_i, sigmoid(features_i w)) + l1 |w|_1   by proximal Newton, to convergence.

    features (n, k), target (n,) in [0, 1], weight (n,) -> w (k,). The penalty keeps w finite where all y are 1.
    """
    def loss(w):
        z = features @ w
        return weight @ (np.logaddexp(0, z) - target * z) + l1 * abs(w).sum()

    w = np.zeros(features.shape[1])
    for _ in range(100):
        p = sigmoid(features @ w)
        gradient = features.T @ (weight * (p - target))
        hessian = (features * (weight * p * (1 - p))[:, None]).T @ features + 1e-9 * np.eye(len(w))
        v = w.copy()
        for j in list(range(len(w))) * 100:  # coordinate descent on the quadratic model with its penalty
            rest = gradient[j] + hessian[j] @ (v - w) - hessian[j, j] * v[j]
            v[j] = -np.sign(rest) * max(abs(rest) - l1, 0) / hessian[j, j]
        step, before = v - w, loss(w)
        while loss(w + step) > before + 1e-10 and abs(step).max() > 1e-12:
            step /= 2
        w = w + step
        if abs(step).max() < 1e-11:
            break
    return w


def length_controlled(y, d, difficulty=None, gamed=None):
    """(LC win rate, its standard error) in percent: 100 mean_i sigmoid(w_difficulty difficulty_i + w_intercept).

    y (n,) in [0, 1], NaN where missing: left out of the fit, kept in the mean; d (n,) characters of output_1 minus
    output_2; difficulty (n,) of the instructions, by row position as in the official tool; gamed (m, 3) of y, t,
    difficulty: the baseline against its own verbose and concise variants, fitted with weight 0.1 and no intercept.
    Without difficulty the mean is over equal numbers, and there is no standard error.
    """
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    t = np.tanh(d / spread) if spread > 0 else np.zeros(len(d))
    known, gamed = ~np.isnan(y), np.zeros((0, 3)) if gamed is None else gamed
    level = np.zeros(len(d)) if difficulty is None else difficulty
    features = np.concatenate([np.stack([t, level, np.ones(len(d))], 1)[known],
                               np.stack([gamed[:, 1], gamed[:, 2], np.zeros(len(gamed))], 1)])
    weight = np.concatenate([np.ones(known.sum()), np.full(len(gamed), 0.1)])
    _, w_difficulty, w_intercept = fit(features, np.concatenate([y[known], gamed[:, 0]]), weight)
    rate, error = win_rate(sigmoid(w_difficulty * level + w_intercept))
    return rate, None if difficulty is None else error


def figures(rows, difficulty=None, gamed=None, length_control=True):
    """The official figures of annotations. A legacy preference 0 is a tie; missing ones leave the win rate."""
    y = np.array([np.nan if row["preference"] is None else row["preference"] or 1.5 for row in rows], float) - 1
    known = y[~np.isnan(y)]
    rate, error = win_rate(known)
    wins, losses, ties = (int(n) for n in ((known > 0.5).sum(), (known < 0.5).sum(), (known == 0.5).sum()))
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in rows], float)
    lc, lc_error = None, None
    if all(row["output_1"] == row["output_2"] for row in rows):  # the baseline itself: by construction
        lc, lc_error = 50.0, 0.0
    elif length_control:
        lc, lc_error = length_controlled(y, lengths[:, 0] - lengths[:, 1], difficulty, gamed)
    return {"win_rate": rate, "standard_error": error, "n_wins": wins, "n_wins_base": losses, "n_draws": ties,
            "n_total": len(known), "discrete_win_rate": 100 * (wins + 0.5 * ties) / len(known),
            "avg_length": int(lengths[:, 1].mean()), "length_controlled_winrate": lc, "lc_standard_error": lc_error}


# ---------------------------------------------------------------------------------------------
# The figures of MT-Bench

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # the other categories: 0
CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
WITH_REFERENCE = ("math", "reasoning", "coding")  # judged against a reference answer


def rating(judgment):
    """The first [[rating]] of a judgment, else the first [rating] as FastChat does, else -1."""
    found = re.search(r"\[\[(\d{1,9}(\.\d*)?)\]\]", judgment) or re.search(r"\[(\d{1,9}(\.\d*)?)\]", judgment)
    return float(found[1]) if found else -1


def mt_bench_figures(rows, category):
    """Means over the judgments with a rating, those of both turns pooled. category: {question_id: category}"""
    rated = [row for row in rows if row["score"] != -1]

    def mean(chosen):
        return float(np.mean([row["score"] for row in chosen])) if chosen else None

    return {"mt_bench": mean(rated), "mt_bench_turn_1": mean([row for row in rated if row["turn"] == 1]),
            "mt_bench_turn_2": mean([row for row in rated if row["turn"] == 2]),
            "mt_bench_categories": {name: mean([row for row in rated if category[row["question_id"]] == name])
                                    for name in sorted(set(category.values()), key=place)},
            "n_judged": len(rows), "n_without_rating": len(rows) - len(rated)}


def place(category):
    return CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES), category


# ---------------------------------------------------------------------------------------------
# Options and files


def parse_args():
    parser = common.Parser(description="Evaluate a model, judge its answers, or put evaluated models side by side.")
    add = parser.add_argument
    # what is done, and what is read for it
    add("--model", help="the model to evaluate, on --input, --alpaca-eval or --mt-bench")
    add("--input", help="JSON Lines of id, prompt, reference")
    add("--alpaca-eval", nargs="?", const="hub", help="AlpacaEval's outputs of its baseline, whose "
        "instructions are answered (default: from the hub)")
    add("--mt-bench", help="MT-Bench's question.jsonl")
    add("--judge", nargs="+", help="what is judged: the outputs of the baseline (or the word hub) and of "
        "the model; with --mt-bench model_answer/MODEL.jsonl")
    add("--annotations", help="annotations of AlpacaEval, plain or gzip: writes their win rates")
    add("--report", nargs="+", help="folders or metrics files of evaluated models, in the order of the "
        "table's rows; those of the same name make one row")
    # what is written
    add("--output", required=True, help="file, or folder for --input, --mt-bench and --report")
    add("--name", help='the model in tables (default: --model); "METHOD, iteration T" for Figure 3')
    add("--gold-labels", default="-", help="share of gold labels it has seen, for the table")
    # more about what is read
    add("--gold", help="gold.json of the small world: its judge")
    add("--preferences", help="D_t the model was trained on: how often its labels agree with gold")
    add("--df-gamed", help="AlpacaEval's df_gamed.csv (default: from the hub), or the word none: LC "
        "without difficulties, for other instructions than AlpacaEval's")
    add("--rows", type=common.natural, default=805, help="rows that --alpaca-eval must have; 0: any")
    add("--tokenizer", help="folder or name of a tokenizer, where the model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    # sampling
    add("--temperature", type=common.nonnegative, default=0.7,
        help="0 takes the likeliest token; MT-Bench has its own for each category")
    add("--max-new-tokens", type=common.positive, help="default: 300, AlpacaEval 2048, MT-Bench 1024")
    add("--max-prompt-length", type=common.positive, default=1024, help="longer ones of --input are dropped")
    add("--micro-batch-size", type=common.positive, default=16, help="prompts sampled at a time by one rank")
    add("--seed", type=common.natural, default=0, help="of the samples; of the order of two answers")
    # the judge
    add("--judge-model", help="name at --judge-url; without it a model's folder or name on the hub")
    add("--judge-url", help="OpenAI-compatible endpoint, .../v1; its key is read from OPENAI_API_KEY")
    add("--judge-template", help="file with AlpacaEval's judging prompt (default: the project's own)")
    add("--judge-prompts", help="MT-Bench's judge_prompts.jsonl")
    add("--reference-answers", help="MT-Bench's reference_answer/gpt-4.jsonl")
    add("--judge-requests", type=common.positive, default=16, help="requests at a time")
    add("--judge-timeout", type=common.number(float, 0.01), default=120.0, help="seconds until a request has failed")
    add("--judge-retries", type=common.natural, default=5, help="after 429, 5xx, timeouts, broken answers")
    add("--budget", type=common.natural, help="requests of this run at most; the next one goes on")
    args = parser.parse_args()
    args.max_new_tokens = args.max_new_tokens or (2048 if args.alpaca_eval else 1024 if args.mt_bench else 300)
    if args.judge_url and not re.fullmatch(r"https?://[^\s@?#]+", args.judge_url):  # before it is written anywhere
        parser.error("--judge-url must look like https://host/v1, without a key in it, which OPENAI_API_KEY holds")
    return args


FREE = ("output", "save_every", "judge_requests", "judge_timeout", "judge_retries", "budget")  # change no annotation


def any_text(value):
    "a text"
    return isinstance(value, str)


def a_preference(value):
    "a number in [1, 2], 0 for a tie, or null"
    return value is None or type(value) in (int, float) and (value != value or value == 0 or 1 <= value <= 2)


def a_number(value):
    "a number"
    return type(value) in (int, float) and abs(value) < 1e100  # not NaN, nor an integer that no float can hold


def two_texts(value):
    "a list of two texts"
    return isinstance(value, list) and len(value) == 2 and all(map(any_text, value))


def a_list(value):
    "a list"
    return isinstance(value, list)


def choices(value):
    "a list [{index, turns: two texts}]"
    return isinstance(value, list) and value != [] and isinstance(value[0], dict) and two_texts(value[0].get("turns"))


OUTPUTS = {"instruction": any_text, "output": any_text}
ANNOTATIONS = {"instruction": any_text, "output_1": any_text, "output_2": any_text, "preference": a_preference}
QUESTIONS = {"question_id": common.an_id, "category": common.a_text, "turns": two_texts}
ANSWERS = {"question_id": common.an_id, "choices": choices}
JUDGMENTS = {"question_id": common.an_id, "model": any_text, "turn": common.an_id, "judge": a_list, "user_prompt": any_text,
             "score": a_number}
PROMPTS = {"name": common.a_text, "system_prompt": any_text, "prompt_template": common.a_text}


def read_rows(path, fields, *key):
    """Rows of a JSON list or of JSON Lines, plain or gzip, no two with the same `key`. Raises InputError with the row."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise common.InputError(f"{path}: cannot be read ({common.reason(error)}): give a JSON list or JSON Lines")
    if text.lstrip()[:1] == "[":
        rows = common.parse_json(text, path, nan=True)
    else:
        rows = [common.parse_json(line, f"{path}:{number}", nan=True)
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    seen = set()
    for k, row in enumerate(rows, 1):
        common.check_row(row, fields, f"{path}, row {k}")
        if key and identity(row, key) in seen:
            raise common.InputError(f"{path}, row {k}: repeats the {key[0]} {str(row[key[0]])[:60]!r}: each must be there once")
        seen.add(identity(row, key))
    if not rows:
        raise common.InputError(f"{path}: holds no rows")
    return rows


def identity(row, key=("instruction", "question_id", "turn")):
    return json.dumps([row.get(name) for name in key])


def from_hub(name):
    """Path of a file of AlpacaEval's in the hub's cache, downloaded if it is not there; None where that fails."""
    where = {"repo_id": "tatsu-lab/alpaca_eval", "filename": name, "repo_type": "dataset"}
    with contextlib.suppress(Exception):
        return huggingface_hub.hf_hub_download(**where, local_files_only=True)
    with contextlib.suppress(Exception):  # the head fails at once where the download would try again for half a minute
        huggingface_hub.utils.get_session().head(huggingface_hub.hf_hub_url(**where), timeout=10)
        return huggingface_hub.hf_hub_download(**where)


def baseline_outputs(path):
    """Path of the outputs that AlpacaEval 2.0 compares with; their instructions are the benchmark's."""
    found = from_hub("alpaca_eval_gpt4_baseline.json") if path == "hub" else path
    if not found:
        raise common.InputError("alpaca_eval_gpt4_baseline.json is not to be had from the hub: get online, or download it "
                                "from the dataset tatsu-lab/alpaca_eval and give its path")
    return found


def read_gamed(path):
    """(difficulty of each instruction by position, rows (m, 3) of y, t, difficulty) of df_gamed.csv."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = np.array([[float(row[key]) for key in ("index", "preference", "std_delta_len", "instruction_difficulty")]
                             for row in csv.DictReader(file)])
        index, y, delta, level = rows.T
        difficulty = dict(zip(index, level))
        if sorted(difficulty) != list(range(len(difficulty))) or not np.isfinite(rows).all() or y.min() < 0 or y.max() > 1:
            raise ValueError("its index does not count from 0, or a number is out of range")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise common.InputError(f"{path}: cannot be used ({error}): --df-gamed names AlpacaEval's df_gamed.csv with index, "
                                "preference in [0, 1], std_delta_len, instruction_difficulty")
    return np.array([difficulty[i] for i in range(len(difficulty))]), np.stack([y, np.tanh(delta), level], 1)


def rounded(figures):
    """For the line on the terminal."""
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items() if not isinstance(v, dict)}


def file_name(name):
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.-]+", "_", Path(name).name)


# ---------------------------------------------------------------------------------------------
# Answers of a model

Speaker = namedtuple("Speaker", "model tokenizer ends ranks")


def load_speaker(args, name):
    """The model, its tokenizer, the ids that end its responses."""
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(Namespace(model=name, tokenizer=args.tokenizer, chat_template=args.chat_template))
    ends = common.end_ids(name, tokenizer)
    return Speaker(common.load_model(name, ranks.device, common.scoring_dtype(ranks.device)), tokenizer, ends, ranks)


def answer(speaker, args, partial, prompts, keys, temperatures, label="sampling"):
    """[(text, "eos" or "length")] for prompts (lists of ids), each at its temperature; keys decide the samples."""
    def generate(batch):
        u = np.array([[common.uniforms(args.seed, keys[i], 0, args.max_new_tokens)] for i in batch])
        return common.sample(speaker.model, [prompts[i] for i in batch], u, temperatures[batch[0]],
                             args.max_new_tokens, speaker.ends)

    batches = []
    for temperature in sorted(set(temperatures)):
        rows = [i for i in range(len(prompts)) if temperatures[i] == temperature]
        sorted_rows = common.length_batches([len(prompts[i]) for i in rows], args.micro_batch_size)
        batches += [[rows[j] for j in batch] for batch in sorted_rows]
    sampled = common.map_batches(generate, batches, partial, speaker.ranks, label)
    return [(speaker.tokenizer.decode(ids, skip_special_tokens=True).strip(), finish)
            for [[ids, finish]] in (sampled[i] for i in range(len(prompts)))]


def prompts_of(speaker, conversations, where):
    return [common.prompt_ids(speaker.tokenizer, messages, f"{where}, row {k}")
            for k, messages in enumerate(conversations, 1)]


def answer_alpaca_eval(args, started):
    """model_outputs.json: the benchmark's instructions in its order, each answered once."""
    args.alpaca_eval = baseline_outputs(args.alpaca_eval)
    reference = read_rows(args.alpaca_eval, {"instruction": common.a_text}, "instruction")
    if args.rows not in (0, len(reference)):
        raise common.InputError(f"{args.alpaca_eval}: has {len(reference)} rows, AlpacaEval 2.0 has {args.rows}: "
                                "give the whole file, or --rows 0 for another one")
    partial = common.open_output(args, "model", "alpaca_eval")
    speaker = load_speaker(args, args.model)
    prompts = prompts_of(speaker, [common.as_messages(row["instruction"]) for row in reference], args.alpaca_eval)
    answers = answer(speaker, args, partial, prompts, [row["instruction"] for row in reference],
                     [args.temperature] * len(reference))

    def write():
        rows = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": text,
                 "generator": args.name or file_name(args.model)} for row, (text, _) in zip(reference, answers)]
        common.write_json(partial / "outputs.json", rows)
        counts = {"answers": len(rows), "cut at the limit": sum(finish == "length" for _, finish in answers)}
        common.close_output(args, partial, partial / "outputs.json", counts, started)

    common.on_first_rank(write, speaker.ranks)


def answer_mt_bench(args, started):
    """model_answer/MODEL.jsonl: two turns, the second asked after the model's own first answer."""
    name = file_name(args.name or args.model)
    args.output = str(Path(args.output) / "model_answer" / f"{name}.jsonl")
    questions = read_rows(args.mt_bench, QUESTIONS, "question_id")
    partial = common.open_output(args, "model", "mt_bench")
    speaker = load_speaker(args, args.model)
    temperatures = [TEMPERATURES.get(row["category"], 0) for row in questions]
    conversations, finishes = [[] for _ in questions], []
    for turn in (0, 1):
        for talk, row in zip(conversations, questions):
            talk.append({"role": "user", "content": row["turns"][turn]})
        answers = answer(speaker, args, partial, prompts_of(speaker, conversations, args.mt_bench),
                         [[row["question_id"], turn] for row in questions], temperatures, f"turn_{turn + 1}")
        for talk, (text, finish) in zip(conversations, answers):
            talk.append({"role": "assistant", "content": text})
            finishes.append(finish)

    def write():
        common.write_jsonl(partial / "answers.jsonl", ({
            "question_id": row["question_id"],
            "answer_id": hashlib.sha256(json.dumps([name, row["question_id"], talk]).encode()).hexdigest()[:22],
            "model_id": name, "choices": [{"index": 0, "turns": [talk[1]["content"], talk[3]["content"]]}],
            "tstamp": time.time()}
            for row, talk in zip(questions, conversations)))
        counts = {"questions": len(questions), "turns cut at the limit": finishes.count("length")}
        common.close_output(args, partial, partial / "answers.jsonl", counts, started)

    common.on_first_rank(write, speaker.ranks)


# ---------------------------------------------------------------------------------------------
# Judges: each is asked for the answers to {k: messages}, hands them to record(k, answer) as they come, and
# returns {k: why there is none}. An answer is [(token, log-prob)] of the likeliest first tokens, or a text.

LIKELIEST = 5  # log-probs that AlpacaEval 2.0 asks for
PAUSE = 1.0  # seconds before the first retry; doubled each time, where the endpoint names none
TEMPLATE = """Two assistants, called m and M, were given the same instruction. Decide whose answer a careful person would
rather have received: weigh how correct, complete and useful it is, and give nothing for mere length.

# Instruction
{instruction}

# Answer of m
{output_1}

# Answer of M
{output_2}

# Verdict
Reply with the name of the assistant that answered better, m or M, and with nothing else."""


def read_template(path):
    """Messages of a judging prompt: in ChatML, as AlpacaEval's file is, each of its blocks; else one of the user."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else TEMPLATE
    except (OSError, UnicodeDecodeError) as error:
        raise common.InputError(f"{path}: cannot be read ({common.reason(error)}): --judge-template names a text file")
    for name in ("{instruction}", "{output_1}", "{output_2}"):
        if name not in text:
            raise common.InputError(f"{path}: has no place for {name}: give a prompt that shows {{instruction}}, {{output_1}} "
                                    "and {output_2} and asks for m or M")
    blocks = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return [{"role": role, "content": content.strip()} for role, content in blocks or [("user", text)]]


def fill(text, fields):
    """Put the fields in place of {name}, in one pass: what an answer holds in braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), text)


def preference_of(likeliest, swapped):
    """2 - p, p the probability of m, that output_1 is better; 3 minus that where m was output_2. In [1, 2].

    likeliest: [(token, log-prob)]. None where neither m nor M is among them.
    """
    m, big_m = (sum(math.exp(logp) for token, logp in likeliest if token.strip() == name) for name in "mM")
    if m + big_m == 0:
        return None
    preference = 2 - m / (m + big_m)
    return 3 - preference if swapped else preference


class Unanswered(Exception):
    """A request that stays without a usable answer, and why."""


class Endpoint:
    """An OpenAI-compatible endpoint, asked many times at once. The key never leaves memory."""

    def __init__(self, args):
        # without a key a placeholder: the client would send the token of the hub instead
        self.args, self.key = args, os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", self.key):  # the client's own error would show it
            raise common.InputError("OPENAI_API_KEY: holds a blank, or what is no ASCII: it must be the key alone")
        self.client = huggingface_hub.InferenceClient(base_url=args.judge_url, api_key=self.key,
                                                      timeout=args.judge_timeout)
        self.lock, self.asked, self.stop = threading.Lock(), 0, threading.Event()

    def __call__(self, jobs, record, logprobs, max_tokens):
        failed, pool = {}, concurrent.futures.ThreadPoolExecutor(self.args.judge_requests)

        def work(k, messages):
            try:
                record(k, self.ask(messages, logprobs, max_tokens))
            except Unanswered as error:
                failed[k] = str(error)

        try:
            futures = [pool.submit(work, k, messages) for k, messages in jobs.items()]
            for future in common.progress(futures, "judging", common.Ranks(0, 1, None)):
                future.result()
        finally:  # Ctrl-C too: what has been asked is still recorded
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return failed

    def ask(self, messages, logprobs, max_tokens):
        """One answer; asks again, ever later, after what may pass. Raises Unanswered."""
        options = {"logprobs": True, "top_logprobs": LIKELIEST} if logprobs else {}
        for attempt in range(self.args.judge_retries + 1):
            self.count()
            pause = min(60, PAUSE * 2 ** attempt)
            try:
                reply = self.client.chat_completion(messages, model=self.args.judge_model, max_tokens=max_tokens,
                                                    temperature=1 if logprobs else 0, **options)
                return self.read(reply, logprobs)
            except OfflineModeIsEnabled:
                self.stop.set()
                raise Unanswered("HF_HUB_OFFLINE keeps the client from every request: unset it")
            except HfHubHTTPError as error:
                status = error.response.status_code
                why = self.told(f"HTTP {status} {error.server_message or ''}")
                if status in (401, 403, 404):  # no request will fare better
                    self.stop.set()
                if status not in (408, 409, 425, 429) and status < 500:
                    raise Unanswered(why)
                wait = error.response.headers.get("retry-after", "")
                pause = min(600, float(wait)) if re.fullmatch(r"\d+(\.\d+)?", wait) else pause
            except InferenceTimeoutError:
                why = f"no answer within {self.args.judge_timeout:g} seconds"
            except Exception as error:  # a broken connection, an answer that is no chat completion: of many kinds
                why = self.told(f"{type(error).__name__}: {error}")
            if attempt < self.args.judge_retries:
                self.stop.wait(pause)
        raise Unanswered(why)

    def read(self, reply, logprobs):
        """The answer of a chat completion. Raises an Exception of any kind where it holds none."""
        choice = reply.choices[0]
        if not logprobs:
            choice.message.content.encode()  # a ValueError for half a surrogate pair, which cannot be written
            return choice.message.content.replace(self.key, "***")
        if choice.logprobs is None:
            raise ValueError("the endpoint gave no log-probs")
        likeliest = [(str(top.token), float(top.logprob)) for top in choice.logprobs.content[0].top_logprobs]
        if not all(logp < 0.1 for _, logp in likeliest):  # NaN too; 0.1 for an endpoint that rounds
            raise ValueError("the endpoint gave log-probs that are none")
        return likeliest

    def count(self):
        """One more request, unless the run is to stop or its budget is spent."""
        with self.lock:
            if self.stop.is_set():
                raise Unanswered("not asked any more")
            if self.args.budget is not None and self.asked >= self.args.budget:
                raise Unanswered(f"the budget of {self.args.budget} requests is spent")
            self.asked += 1

    def told(self, text):
        """A server's words in one line, without the key, should it repeat it."""
        return " ".join(text.replace(self.key, "***").split())[:160]


class LocalJudge:
    """A model on this machine, by the same log-probs."""

    def __init__(self, args):
        self.args, self.speaker = args, load_speaker(args, args.judge_model)

    @torch.no_grad()
    def __call__(self, jobs, record, logprobs, max_tokens):
        speaker, rows = self.speaker, list(jobs)
        prompts = prompts_of(speaker, jobs.values(), "the judging prompts")
        batches = common.length_batches([len(ids) for ids in prompts], self.args.micro_batch_size)
        for batch in common.progress(batches, "judging", speaker.ranks):
            for i, found in zip(batch, self.ask([prompts[i] for i in batch], logprobs, max_tokens)):
                record(rows[i], found)
        return {}

    def ask(self, prompts, logprobs, max_tokens):
        model, tokenizer = self.speaker.model, self.speaker.tokenizer
        if not logprobs:
            u = np.zeros((len(prompts), 1, max_tokens))
            sampled = common.sample(model, prompts, u, 0, max_tokens, self.speaker.ends)
            return [tokenizer.decode(ids, skip_special_tokens=True).strip() for [(ids, _)] in sampled]
        batch = common.collate([(ids, [[0]]) for ids in prompts], model.device)
        hidden, *head = common.ResponseLogps(model).hidden(batch)
        logits = F.linear(hidden, *head).float()  # (B, V): of the first token of the answer
        logps, tokens = logits.log_softmax(-1).topk(LIKELIEST)
        return [[(tokenizer.decode([i]), logp) for i, logp in zip(*row)] for row in zip(tokens.tolist(), logps.tolist())]


def judge_missing(args, partial, rows, messages, complete, logprobs, max_tokens):
    """Complete the rows that have messages: rows[k] becomes complete(rows[k], the judge's answer).

    Each goes to partial/judged.jsonl as it comes, where a second run finds it. Raises InputError where rows stay
    without an answer.
    """
    path, done, lock = partial / "judged.jsonl", {}, threading.Lock()
    for row in common.unsealed(path) if path.exists() else ():
        done[identity(row)] = row
    jobs = {}
    for k, row in enumerate(rows):
        if identity(row) in done:
            rows[k] = done[identity(row)]
        elif messages[k]:
            jobs[k] = messages[k]
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill left half-written

        def record(k, found):
            with lock:
                rows[k] = complete(rows[k], found)
                file.write(common.sealed(rows[k]))
                file.flush()

        judge = (Endpoint if args.judge_url else LocalJudge)(args) if jobs else None
        failed = judge(jobs, record, logprobs, max_tokens) if jobs else {}
    if failed:
        reasons = [why for why in failed.values() if why != "not asked any more"] or ["stopped"]
        [(reason, _)] = Counter(reasons).most_common(1)
        raise common.InputError(f"{args.output}: {len(failed)} of {len(rows)} have no answer ({reason}): the others are kept "
                                f"in {partial}: run this again to ask only for what is missing")
    return {"judged now": len(jobs), "requests": getattr(judge, "asked", 0)}


def read_pair(paths):
    """[(row of the baseline's outputs, row of the model's)], joined by instruction, in the baseline's order."""
    first, second = (read_rows(path, OUTPUTS, "instruction") for path in paths)
    answered = {row["instruction"]: row for row in second}
    missing = [row["instruction"] for row in first if row["instruction"] not in answered]
    if missing or len(first) != len(second):
        raise common.InputError(f"{paths[1]}: answers {len(second)} instructions, {paths[0]} {len(first)}, of which the former "
                                f"lacks {len(missing)} {str(missing[:1])[:80]}: both must answer the same")
    return [(row, answered[row["instruction"]]) for row in first]


def judge_outputs(args, started):
    """annotations.json of a pair of outputs files, in the order of the baseline's."""
    if len(args.judge) != 2 or bool(args.gold) == bool(args.judge_model):
        raise common.InputError("--judge takes the baseline's outputs and the model's, and one of --judge-model and --gold")
    args.judge[0] = baseline_outputs(args.judge[0])
    pairs, template = read_pair(args.judge), read_template(args.judge_template)
    gold = common.read_gold(args.gold) if args.gold else None
    partial = common.open_output(args, "judge", "judge_template", "gold", free=FREE)
    rows, messages = [], []
    for one, two in pairs:
        instruction, outputs = one["instruction"], [one["output"], two["output"]]
        row = annotation(one, outputs, [one.get("generator", "reference"), two.get("generator", "model")],
                         args.judge_model or "gold")
        if gold:
            row["preference"] = gold_preference(gold, common.as_messages(instruction), *outputs)
        elif outputs[0] == outputs[1]:  # a tie that need not be asked for
            row["preference"] = 1.5
        m, big_m = outputs[::-1] if swapped(args.seed, instruction) else outputs
        fields = {"instruction": instruction, "output_1": m, "output_2": big_m}
        rows.append(row)
        messages.append(None if row["preference"] else [part | {"content": fill(part["content"], fields)} for part in template])

    def complete(row, likeliest):
        return row | {"preference": preference_of(likeliest, swapped(args.seed, row["instruction"]))}

    counts = judge_missing(args, partial, rows, messages, complete, logprobs=True, max_tokens=1)
    common.write_json(partial / "annotations.json", rows)
    counts = {"annotations": len(rows), "missing preferences": sum(row["preference"] is None for row in rows)} | counts
    common.close_output(args, partial, partial / "annotations.json", counts, started)


def swapped(seed, instruction):
    """Whether the judge is shown the model's output first: drawn for each instruction."""
    return bool(common.uniforms(seed, instruction, 0, 1)[0] < 0.5)


def annotation(row, outputs, generators, annotator, preference=None):
    """A row in AlpacaEval's format."""
    return {"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output_1": outputs[0],
            "generator_1": generators[0], "output_2": outputs[1], "generator_2": generators[1],
            "annotator": annotator, "preference": preference}


def gold_preference(gold, prompt, output_1, output_2):
    one, two = (common.gold_score(gold, prompt, text) for text in (output_1, output_2))
    return float(1.5 + np.sign(two - one) / 2)


def judge_mt_bench(args, started):
    """model_judgment/JUDGE_single.jsonl, which may hold other models already, and this model's scores."""
    if len(args.judge) != 1 or not args.judge_model or not args.judge_prompts:
        raise common.InputError("--judge with --mt-bench takes one model_answer/MODEL.jsonl, --judge-model and --judge-prompts")
    questions = read_rows(args.mt_bench, QUESTIONS, "question_id")
    model, judge, folder = Path(args.judge[0]).name.removesuffix(".jsonl"), file_name(args.judge_model), Path(args.output)
    rows, messages = judgments(args, questions, model)
    there = folder / "model_judgment" / f"{judge}_single.jsonl"
    others = reuse(there, model, rows, messages)
    args.output = str(folder / "model_score" / f"{model}_{judge}.json")
    partial = common.open_output(args, "mt_bench", "judge", "judge_prompts", "reference_answers", free=FREE)

    def complete(row, text):
        return row | {"judgment": text, "score": rating(text), "tstamp": time.time()}

    counts = judge_missing(args, partial, rows, messages, complete, logprobs=False, max_tokens=2048)
    there.parent.mkdir(parents=True, exist_ok=True)
    common.write_jsonl(there, others + rows)
    scores = mt_bench_figures(rows, {row["question_id"]: row["category"] for row in questions})
    common.write_json(partial / "scores.json", {"name": args.name or model, "gold_labels": args.gold_labels} | scores)
    print(f"{there}: {len(rows)} judgments of {model}, {len(others)} others")
    common.close_output(args, partial, partial / "scores.json", counts | rounded(scores), started)


def judgments(args, questions, model):
    """(rows of FastChat's single-answer judgments that lack the judgment, the messages that ask for it)."""
    answers = {row["question_id"]: row for row in read_rows(args.judge[0], ANSWERS, "question_id")}
    prompts = {row["name"]: row for row in read_rows(args.judge_prompts, PROMPTS, "name")}
    references = {row["question_id"]: row["reference"] for row in questions if two_texts(row.get("reference"))}
    if args.reference_answers:
        references |= {row["question_id"]: row["choices"][0]["turns"]
                       for row in read_rows(args.reference_answers, ANSWERS, "question_id")}
    rows, messages = [], []
    for question in questions:
        k, with_reference = question["question_id"], question["category"] in WITH_REFERENCE
        if k not in answers:
            raise common.InputError(f"{args.judge[0]}: does not answer question {k} of {args.mt_bench}: it must answer all")
        if with_reference and k not in references:
            raise common.InputError(f"{args.mt_bench}: question {k} is judged by a reference answer and has none: "
                                    "--reference-answers names FastChat's reference_answer/gpt-4.jsonl")
        asked, answered, right = question["turns"], answers[k]["choices"][0]["turns"], references.get(k, ["", ""])
        fields = {"question": asked[0], "answer": answered[0]}
        for n in (1, 2):
            fields |= {f"question_{n}": asked[n - 1], f"answer_{n}": answered[n - 1], f"ref_answer_{n}": right[n - 1]}
        for turn in (1, 2):
            name = "single" + "-math" * with_reference + "-v1" + "-multi-turn" * (turn == 2)
            if name not in prompts:
                raise common.InputError(f"{args.judge_prompts}: has no prompt {name}: give FastChat's judge_prompts.jsonl")
            user = fill(prompts[name]["prompt_template"], fields)
            rows.append({"question_id": k, "model": model, "judge": [args.judge_model, name], "user_prompt": user,
                         "judgment": None, "score": None, "turn": turn, "tstamp": None})
            messages.append([{"role": "system", "content": prompts[name]["system_prompt"]}, {"role": "user", "content": user}])
    return rows, messages


def reuse(path, model, rows, messages):
    """Take from the file of judgments what it has of the rows already; returns its other rows."""
    there = read_rows(path, JUDGMENTS) if path.exists() else []
    known = {identity(row): row for row in there if row["model"] == model}
    for k, row in enumerate(rows):
        old = known.get(identity(row), row)
        if (old["user_prompt"], old["judge"]) != (row["user_prompt"], row["judge"]):
            raise common.InputError(f"{path}: judges another answer of {model} to question {row['question_id']}: move that "
                                    "file, or name the model otherwise")
        if old is not row:
            rows[k], messages[k] = old, None
    ours = {identity(row) for row in rows}
    return [row for row in there if row["model"] != model or identity(row) not in ours]


# ---------------------------------------------------------------------------------------------
# Scores


def score_annotations(args, started):
    """metrics.json of AlpacaEval annotations, the official tool's or ours."""
    rows = read_rows(args.annotations, ANNOTATIONS, "instruction", "output_1", "output_2")
    if all(row["preference"] is None or row["preference"] != row["preference"] for row in rows):
        raise common.InputError(f"{args.annotations}: none of its {len(rows)} rows has a preference: judge them again")
    plain = args.df_gamed == "none"
    args.df_gamed = args.df_gamed or from_hub("df_gamed.csv")
    difficulty, gamed = (None, None) if plain or not args.df_gamed else read_gamed(args.df_gamed)
    if difficulty is not None and len(rows) > len(difficulty):
        raise common.InputError(f"{args.annotations}: has {len(rows)} rows, {args.df_gamed} the difficulties of "
                                f"{len(difficulty)}: --df-gamed none leaves them out of the fit")
    partial = common.open_output(args, *["annotations"] + ["df_gamed"] * (difficulty is not None))
    if difficulty is not None:
        if len(rows) != len(difficulty):
            print(f"{args.annotations}: {len(rows)} rows, not {len(difficulty)}: as in the official tool the k-th row gets "
                  "the difficulty of the benchmark's k-th instruction")
        difficulty = difficulty[:len(rows)]
    found = figures(rows, difficulty, gamed, length_control=bool(args.df_gamed))
    if found["length_controlled_winrate"] is None:
        print("no length-controlled win rate: df_gamed.csv is not to be had from the hub: download it from the dataset "
              "tatsu-lab/alpaca_eval and give it as --df-gamed")
    name = args.name or str(rows[0].get("generator_2") or args.annotations)
    common.write_json(partial / "metrics.json", {"name": name, "gold_labels": args.gold_labels} | found)
    common.close_output(args, partial, partial / "metrics.json", rounded(found), started)


def judge_accuracy(path, gold):
    """Percent of the pairs that gold does not hold equal in which it agrees with the label."""
    rows = common.stream_jsonl(path, {"id": common.an_id, "prompt": common.a_prompt, "chosen": common.a_response,
                                      "rejected": common.a_response})
    scores = ([common.gold_score(gold, row["prompt"], row[y]["text"]) for y in ("chosen", "rejected")] for row in rows)
    agrees = [chosen > rejected for chosen, rejected in scores if chosen != rejected]
    return 100 * sum(agrees) / len(agrees) if agrees else None


def gold_annotations(rows, gold, name="model"):
    """The responses of the small world in AlpacaEval's format, against the references."""
    return [annotation({"instruction": row["prompt"][-1]["content"]}, [row["reference"], row["response"]],
                       ["reference", name], "gold", gold_preference(gold, row["prompt"], row["reference"], row["response"]))
            for row in rows]


def score(rows, gold):
    """The metrics of the small world, in percent; each row gets its preference: 1 win, 0.5 tie, 0 loss."""
    annotations = gold_annotations(rows, gold)
    for row, judged in zip(rows, annotations):
        row["preference"] = judged["preference"] - 1
    values = [value for row in rows for value in common.gold_values(gold, row["prompt"], row["response"])]
    return figures(annotations) | {"malformed": 100 * sum(value is None for value in values) / max(1, len(values))}


def evaluate(args, started):
    """The folder of one model's responses to --input and, with --gold, their scores."""
    partial = common.open_output(args, "model", "input", "gold", "preferences")
    gold = common.read_gold(args.gold) if args.gold else None
    fields = {"id": common.an_id, "prompt": common.a_prompt} | ({"reference": common.a_text} if gold else {})
    rows = list(common.stream_jsonl(args.input, fields))
    speaker = load_speaker(args, args.model)
    prompts = [common.prompt_ids(speaker.tokenizer, row["prompt"], f"{args.input}, id {row['id']}") for row in rows]
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= args.max_prompt_length]
    if not kept:
        raise common.InputError(f"{args.input}: all {len(rows)} prompts are longer than --max-prompt-length "
                                f"{args.max_prompt_length}: raise it")
    counts = {"prompts read": len(rows), "too long": len(rows) - len(kept)}
    rows = [rows[i] for i in kept]
    answers = answer(speaker, args, partial, [prompts[i] for i in kept], [row["id"] for row in rows],
                     [args.temperature] * len(rows))

    def write():
        for row, (text, finish) in zip(rows, answers):
            row |= {"finish": finish, "response": text}
        name, made = args.name or args.model, partial / "eval"
        made.mkdir(exist_ok=True)
        metrics = {"name": name, "gold_labels": args.gold_labels, "n": len(rows)}
        if gold:
            metrics |= score(rows, gold)
            common.write_json(made / "annotations.json", gold_annotations(rows, gold, name))
            if args.preferences:
                metrics["judge_accuracy"] = judge_accuracy(args.preferences, gold)
            counts["win rate"] = f"{metrics['win_rate']:.1f} +- {metrics['standard_error'] or 0:.1f}"
        metrics |= {"avg_length": float(np.mean([len(row["response"]) for row in rows])),
                    "eos_rate": 100 * float(np.mean([row["finish"] == "eos" for row in rows]))}
        common.write_jsonl(made / "responses.jsonl", rows)
        common.write_json(made / "metrics.json", metrics)
        common.close_output(args, partial, made, counts, started)

    common.on_first_rank(write, speaker.ranks)


# ---------------------------------------------------------------------------------------------
# The report

COLUMNS = {"gold_labels": "Gold labels", "length_controlled_winrate": "LC win rate (%)", "win_rate": "Win rate (%)",
           "mt_bench": "MT-Bench (1-10)", "mt_bench_turn_1": "First turn", "mt_bench_turn_2": "Second turn",
           "avg_length": "Mean length (chars)", "judge_accuracy": "Judge accuracy (%)", "malformed": "Malformed (%)",
           "eos_rate": "EOS (%)"}  # the first four in the order of Table 1


def table(head, rows):
    """Markdown; a dash where there is no figure, and no column where no row has one."""
    def cell(value):
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] is not None for row in rows)]
    lines = [[head[k] for k in kept], ["---"] * len(kept)] + [[cell(row[k]) for k in kept] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def iteration_of(name):
    """("SPA", 2) of "SPA, iteration 2 (pi_2)"; (name, None) of a name without an iteration."""
    found = re.fullmatch(r"(.+?),? iteration (\d{1,9})\b.*", name)
    return (found[1], int(found[2])) if found else (name, None)


def curves(metrics, key):
    """{method: {iteration: metrics}} of the models that have the figure and an iteration in their name."""
    lines = {}
    for row in metrics:
        method, t = iteration_of(row["name"])
        if t is not None and row.get(key) is not None:
            lines.setdefault(method, {})[t] = row
    return lines


def tables(metrics):
    """Table 1 with its columns' order, Figure 3 by iteration, Figure 5a by category, as far as there are figures."""
    text = table(["Model", *COLUMNS.values()], [[row["name"], *map(row.get, COLUMNS)] for row in metrics])
    for key in ("length_controlled_winrate", "win_rate", "mt_bench"):
        lines = curves(metrics, key)
        steps = sorted({t for line in lines.values() for t in line})
        if steps:
            text += "\n" + table([f"{COLUMNS[key]} by iteration", *map(str, steps)],
                                 [[method, *(line.get(t, {}).get(key) for t in steps)] for method, line in lines.items()])
    categories = sorted({name for row in metrics for name in row.get("mt_bench_categories", {})}, key=place)
    if categories:
        text += "\n" + table(["MT-Bench by category", *categories], [
            [row["name"], *map(row["mt_bench_categories"].get, categories)] for row in metrics if "mt_bench_categories" in row])
    return text


def picture(metrics, path, output):
    """Win rates by iteration with their standard errors; a dashed line for a model without an iteration."""
    try:
        import matplotlib
    except ImportError:
        return print(f"no picture: pip install matplotlib, delete {output} and run this again")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, error in zip(axes, ("length_controlled_winrate", "win_rate"), ("lc_standard_error", "standard_error")):
        for method, line in curves(metrics, key).items():
            steps = sorted(line)
            axis.errorbar(steps, [line[t][key] for t in steps], [line[t].get(error) or 0 for t in steps], marker="o",
                          capsize=3, label=method)
        others = [row for row in metrics if iteration_of(row["name"])[1] is None and row.get(key) is not None]
        for k, row in enumerate(others):
            axis.axhline(row[key], linestyle="--", color=f"C{9 - k % 10}", label=row["name"])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="Iteration", ylabel=COLUMNS[key])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def samples(metrics, responses, count=3):
    """The same prompts answered by every model, as text."""
    blocks = []
    for k in range(min(count, *map(len, responses))):
        lines = ["> " + responses[0][k]["prompt"][-1]["content"], ""]
        lines += [f"- **{row['name']}**: {rows[k]['response']}" for row, rows in zip(metrics, responses)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def read_metrics(path):
    """(metrics, responses or None) of a folder that --input wrote, or of a metrics file."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    try:
        metrics = common.parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError, common.InputError):
        metrics = None
    if not is_metrics(metrics):
        raise common.InputError(f"{file}: holds no metrics: --report takes folders and metrics files that 05_eval.py wrote")
    responses = file.parent / "responses.jsonl"
    if file == Path(path) or not responses.exists():
        return metrics, None
    return metrics, list(common.stream_jsonl(
        responses, {"id": common.an_id, "prompt": common.a_prompt, "response": any_text}))


def is_metrics(value):
    """Whether the report can be made of it: a name, and numbers or null where it has them."""
    if not isinstance(value, dict) or not common.a_text(value.get("name")):
        return False
    categories = value.get("mt_bench_categories", {})
    if not isinstance(categories, dict) or not isinstance(value.get("gold_labels", "-"), str):
        return False
    errors = [value.get(key) for key in ("standard_error", "lc_standard_error")]
    known = [value.get(key) for key in COLUMNS if key != "gold_labels"]
    return (all(number is None or a_number(number) for number in [*known, *categories.values(), *errors])
            and all(error is None or error >= 0 for error in errors))


def report(args, started):
    """table.md, samples.md where there are responses, and report.png where there is matplotlib."""
    partial = common.open_output(args, "report")
    rows, spoken = [], []
    for path in args.report:
        metrics, responses = read_metrics(path)
        spoken += [(metrics, responses)] if responses else []
        if metrics.get("gold_labels") == "-":
            del metrics["gold_labels"]
        # of the same name and with other figures: AlpacaEval's and MT-Bench's of one model
        row = next((row for row in rows if row["name"] == metrics["name"]
                    and row.keys() & metrics.keys() <= {"name", "gold_labels"}), None)
        if row is None:
            rows.append(metrics)
        else:
            row |= metrics
    made = partial / "report"
    made.mkdir(exist_ok=True)
    (made / "table.md").write_text(tables(rows), encoding="utf-8")
    print(tables(rows))
    if spoken:
        (made / "samples.md").write_text(samples(*zip(*spoken)), encoding="utf-8")
        print(samples(*zip(*spoken)))
    picture(rows, made / "report.png", args.output)
    common.close_output(args, partial, made, {"models": len(rows)}, started)


def main():
    args, started = parse_args(), time.time()
    alone = args.report or args.judge or args.annotations
    if alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise common.InputError("--report, --judge and --annotations work alone: start them without torchrun")
    if args.report:
        return report(args, started)
    if args.judge:
        return judge_mt_bench(args, started) if args.mt_bench else judge_outputs(args, started)
    if args.annotations:
        return score_annotations(args, started)
    if args.model and args.alpaca_eval:
        return answer_alpaca_eval(args, started)
    if args.model and args.mt_bench:
        return answer_mt_bench(args, started)
    if args.model and args.input:
        return evaluate(args, started)
    raise common.InputError("give --model with --input, --alpaca-eval or --mt-bench, or --judge, --annotations or --report")


if __name__ == "__main__":
    common.run(main)
