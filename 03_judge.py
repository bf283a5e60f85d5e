"""Algorithm 1, line 3, second half: label the sampled pairs by direct preference judgment, giving D_t.

    r(x, y) = beta log[pi_{t-1}(y | x) / pi_init(y | x)]                                        (4, less its term in x)
    p_{t-1}(y_1 > y_2 | x) = sigmoid(  beta log[pi_{t-1}(y_1 | x) / pi_init(y_1 | x)]
                                     - beta log[pi_{t-1}(y_2 | x) / pi_init(y_2 | x)])          (7)
    (y_w, y_l) = (y_1, y_2) if p_{t-1}(y_1 > y_2 | x) > 0.5 else (y_2, y_1)                     (8)
    r_penalty(x, y) = r(x, y) - alpha |y|, |y| in tokens, with --length-penalty alpha           (13)

The reference is the fixed pi_init here, and pi_{t-1} in 04_refined_dpo.py: they are easily confused.
What the paper compares this with is another r(x, y), by --judge: the function judge_... of that name.

Reads  responses_t.jsonl    what 02_generate.py writes; of more than two responses the best and the worst are paired
Writes preferences_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...],
                             "chosen": {"text", "ids", "finish"}, "rejected": {...}, "p": 0.73,
                             "logps": {"policy": [-21.5, -30.2], "ref": [-24.1, -27.7]}, "judge": "init"}
                             p is of y_1 over y_2 in the order they were sampled in, as are the log-probs (of all);
                             other judges leave "scores" or "options" in the place of "logps"

    python 03_judge.py --model pi_0 --init-model pi_init --input responses_1.jsonl --output preferences_1.jsonl
    torchrun --nproc-per-node 4 03_judge.py --model pi_0 --init-model pi_init --input ... --output ...
    python 03_judge.py --judge llm --judge-model judge --input responses_1.jsonl --output preferences_1.jsonl

Departs from the paper: pairs that carry no preference (the same response twice, p = 0.5 exactly) are dropped. --judge
reward takes a pointwise reward model, one score per response: it stands in the place of PairRM, which scores pairs.
"""

import argparse
import itertools
import math
import time
from array import array

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common


def implicit_rewards(logps_policy, logps_ref, beta):
    """Eq. 4 of each response to one prompt, from its summed log-probs, less beta log Z(x): it is the same for all."""
    return [beta * (policy - ref) for policy, ref in zip(logps_policy, logps_ref)]


def preference(reward_1, reward_2):
    """Eq. 7 where the rewards are Eq. 4's, in general Eq. 1: p(y_1 > y_2 | x)"""
    return sigmoid(reward_1 - reward_2)


def sigmoid(x):
    """Without overflow at either end."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def best_and_worst(scores):
    """Indices (first, second), in the order of sampling, of the highest and the lowest score. For two: (0, 1)."""
    best = max(range(len(scores)), key=scores.__getitem__)
    worst = min(range(len(scores)), key=scores.__getitem__)
    return min(best, worst), max(best, worst)


def penalised(rewards, lengths, alpha):
    """Eq. 13 for the responses to one prompt."""
    return [reward - alpha * length for reward, length in zip(rewards, lengths)]


def balancing_penalty(rewards, lengths):
    """The alpha of Eq. 13 at which chosen and rejected are equally long on average, or as nearly as any makes them.

    rewards, lengths: (n, 2). Pair i prefers its longer response as long as alpha < (r_1 - r_2) / (|y_1| - |y_2|), so
    the mean of |y_w| - |y_l| falls in steps at these n thresholds; alpha is 0 or the middle between two of them.
    Negative where the chosen ones would be the shorter ones without it.
    """
    (d_reward, d_length) = (np.asarray(values, float) @ [1, -1] for values in (rewards, lengths))
    d_reward, d_length = d_reward[d_length != 0], d_length[d_length != 0]
    if not len(d_length):
        return 0.0
    order = np.argsort(d_reward / d_length)
    threshold, size = (d_reward / d_length)[order], abs(d_length)[order]
    gap = size.sum() - 2 * np.concatenate([[0], size.cumsum()])  # of the sums of lengths, with k thresholds below alpha
    low, high = np.append(threshold[0] - 1, threshold), np.append(threshold, threshold[-1] + 1)
    alpha = np.where((low < 0) & (0 < high), 0.0, (low + high) / 2)
    inside = (low < alpha) & (alpha < high)
    return float(min(zip(abs(gap[inside]), abs(alpha[inside]), alpha[inside]))[2])


# ---------------------------------------------------------------------------------------------
# Ways to judge: for each row the reward of each of its responses, and what the record keeps of it. The rows, and what
# is returned, are read from the disk each time they are gone through.


def judge_init(rows, args, partial, ranks):
    """Direct preference judgment: pi_{t-1} against the fixed pi_init (Eq. 7)."""
    return judge_against(args.init_model, "scoring with pi_init", rows, args, partial, ranks)


def judge_previous(rows, args, partial, ranks):
    """pi_{t-1} against the model it was trained from, pi_{t-2} (Table 7)."""
    return judge_against(args.ref_model, "scoring with pi_{t-2}", rows, args, partial, ranks)


def judge_against(name, label, rows, args, partial, ranks):
    common.check_same_vocabulary(args.model, name)
    logps_policy = score(args.model, rows, "scoring with pi_{t-1}", args, partial, ranks)
    logps_ref = score(name, rows, label, args, partial, ranks)
    return common.Again(lambda: ((implicit_rewards(policy, ref, args.beta), {"logps": {"policy": policy, "ref": ref}})
                                 for policy, ref in zip(logps_policy, logps_ref, strict=True)))


def judge_none(rows, args, partial, ranks):
    """The likelihood under pi_{t-1} alone, without a reference (Table 7)."""
    logps_policy = score(args.model, rows, "scoring with pi_{t-1}", args, partial, ranks)
    return common.Again(lambda: (([args.beta * logp for logp in policy], {"logps": {"policy": policy}})
                                 for policy in logps_policy))


def judge_reward(rows, args, partial, ranks):
    """An external reward model: its one output for (x, y), each response by itself (in Tables 2 and 7 it is PairRM)."""
    model, tokenizer = load_reward_model(args.reward_model, ranks.device)

    @torch.no_grad()
    def compute(batch_rows):
        encoded = [encode(tokenizer, row["prompt"], y["text"]) for row in batch_rows for y in row["responses"]]
        scores = iter(reward_scores(model, encoded))
        return [[next(scores) for _ in row["responses"]] for row in batch_rows]

    scored = map_rows(compute, rows, "scoring with the reward model", args, partial, ranks)
    return common.Again(lambda: ((scores, {"scores": scores}) for scores in scored))


def judge_llm(rows, args, partial, ranks):
    """LLM-as-judge (App. B.2): the log-prob of the letter of each response as the answer to Listing 1.

    A response's reward is the mean over both orders of the pair, so that a liking for the first place drops out, or,
    with --llm-order first, its value in the order of sampling alone. Of more than two, over all pairs it is in.
    """
    tokenizer = common.load_tokenizer(argparse.Namespace(tokenizer=None, chat_template=None, model=args.judge_model))
    model = common.load_model(args.judge_model, ranks.device, common.scoring_dtype(ranks.device))
    letters = option_ids(args.judge_model, tokenizer)
    orders = itertools.permutations if args.llm_order == "both" else itertools.combinations
    judge = common.ResponseLogps(model)

    def ask(row, one, two):
        question = common.judging_prompt(row["prompt"], row["responses"][one]["text"], row["responses"][two]["text"])
        return common.prompt_ids(tokenizer, question, f"{args.input}, id {row['id']}")

    @torch.no_grad()
    def compute(batch_rows):
        pairs = [list(orders(range(len(row["responses"])), 2)) for row in batch_rows]
        asked = [(ask(row, one, two), [[letter] for letter in letters])
                 for row, of_row in zip(batch_rows, pairs) for one, two in of_row]
        batch = common.collate(asked, ranks.device, model.shared_span)
        options = iter(judge(batch).view(-1, 2).tolist())  # (questions, 2)
        return [[[one, two, *next(options)] for one, two in of_row] for of_row in pairs]

    asked = map_rows(compute, rows, f"asking the judge in {args.llm_order}", args, partial, ranks)
    return common.Again(lambda: ((llm_rewards(len(row["responses"]), options), {"options": options})
                                 for row, options in zip(rows, asked, strict=True)))


def llm_rewards(count, options):
    """The mean log-prob of each response's letter. options: [[first, second, log-prob of A, of B], ...] by order"""
    logps = [[a if k == one else b for one, two, a, b in options if k in (one, two)] for k in range(count)]
    return [sum(values) / len(values) for values in logps]


def judge_gold(rows, args, partial, ranks):
    """The small world's gold judge, or a file of labels: 1 for the better response, 0 for the other."""
    if not args.gold.endswith(".jsonl"):
        gold = common.read_gold(args.gold)

        def scores_of(row):
            return [common.gold_score(gold, row["prompt"], y["text"]) for y in row["responses"]]
    else:
        labelled = common.stream_jsonl(args.gold, {"id": common.an_id, "label": a_label})
        labels = {row["id"]: row["label"] for row in labelled}
        for row in rows:
            if row["id"] not in labels or len(row["responses"]) != 2:
                raise common.InputError(f"{args.gold}: no label for id {row['id']} of {args.input} and its "
                                        f"{len(row['responses'])} responses: give each prompt of two a label")

        def scores_of(row):
            return [float(labels[row["id"]] == k) for k in (1, 2)]
    return common.Again(lambda: ((scores, {"scores": scores}) for scores in map(scores_of, rows)))


JUDGES = {"init": judge_init, "previous": judge_previous, "none": judge_none, "reward": judge_reward, "llm": judge_llm,
          "gold": judge_gold}
NEEDS = {"init": ["model", "init_model"], "previous": ["model", "ref_model"], "none": ["model"],
         "reward": ["reward_model"], "llm": ["judge_model"], "gold": ["gold"]}
TAKES = {"init": {"beta": 0.1}, "previous": {"beta": 0.1}, "none": {"beta": 0.1}, "llm": {"llm_order": "both"}}


# ---------------------------------------------------------------------------------------------
# What they score with


def map_rows(compute, rows, label, args, partial, ranks):
    """compute's result for each row; compute takes a list of rows of like length."""
    def length(row):
        return len(row["prompt_ids"]) + sum(lengths_of(row))

    return common.map_rows(compute, rows, length, args.micro_batch_size, partial, ranks, label)


def score(name, rows, label, args, partial, ranks):
    """log pi(y | x) of every response of every row, by the model in the folder `name`: a list for each row."""
    model = common.load_model(name, ranks.device, common.scoring_dtype(ranks.device))
    for row in rows:
        for ids in [row["prompt_ids"]] + [y["ids"] for y in row["responses"]]:
            common.check_ids(args.input, row["id"], ids, model)
    logps = common.ResponseLogps(model)

    @torch.no_grad()
    def compute(batch_rows):
        answered = [(row["prompt_ids"], [y["ids"] for y in row["responses"]]) for row in batch_rows]
        batch = common.collate(answered, ranks.device, model.shared_span)
        scores = iter(common.response_logps(logps(batch), batch.lengths).tolist())
        return [[next(scores) for _ in responses] for _, responses in answered]

    return map_rows(compute, rows, label, args, partial, ranks)


def load_reward_model(name, device):
    """A sequence classifier with one output, and its tokenizer. In float32 everywhere: bf16 would make ties."""
    config = common.load_config(name)
    if config.num_labels != 1:
        raise common.InputError(f"{name}: gives a response {config.num_labels} scores, not one: give a reward model "
                                "whose config has one label")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as error:
        raise common.InputError(f"{name}: holds no sequence classifier in safetensors, with a tokenizer, that can be "
                                f"loaded ({type(error).__name__}: {str(error)[:100]})")
    if info["missing_keys"]:
        raise common.InputError(f"{name}: has no weights for {sorted(info['missing_keys'])[0]}: it is no reward model")
    return model.to(device).eval(), tokenizer


def encode(tokenizer, messages, text):
    """A prompt and a response as the reward model reads them: by its chat template, else as a pair of texts."""
    if tokenizer.chat_template:
        ids = common.chat_ids(tokenizer, messages + [{"role": "assistant", "content": text}])
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
    return dict(tokenizer(common.as_text(messages), text, truncation=True, split_special_tokens=True))


def reward_scores(model, encoded):
    """The model's output for each encoded text, padded on the right; one by one where it names no padding token."""
    pad = {"input_ids": model.config.pad_token_id}
    scores = []
    for batch in [encoded] if pad["input_ids"] is not None else [[one] for one in encoded]:
        width = max(len(one["input_ids"]) for one in batch)
        inputs = {key: torch.tensor([one[key] + [pad.get(key, 0)] * (width - len(one[key])) for one in batch],
                                    device=model.device) for key in batch[0]}
        scores += model(**inputs).logits[:, 0].tolist()
    return scores


def option_ids(name, tokenizer):
    """The ids of the letters A and B as answers, tokenised as 00_sft.py does."""
    question = common.judging_prompt(common.as_messages("x"), "y", "z")
    prompt, ends = common.prompt_ids(tokenizer, question, name), common.end_ids(name, tokenizer)
    answers = [common.response_ids(tokenizer, question, prompt, letter, ends)[:-1] for letter in common.LETTERS]
    if any(len(ids) != 1 for ids in answers) or answers[0] == answers[1]:
        raise common.InputError(f"{name}: its tokenizer makes {answers} of the options {common.LETTERS}: "
                                "give a judge to which each is a token of its own")
    return [ids[0] for ids in answers]


def a_label(value):
    "1 or 2: which of the two responses is the better one"
    return value in (1, 2) and type(value) is int


# ---------------------------------------------------------------------------------------------


def penalty(text):
    """An argparse type: a number, or auto."""
    return text if text == "auto" else common.number(float, -1e9, 1e9)(text)


def parse_args():
    parser = common.Parser(description="Label pairs of responses by the model's own implicit reward.")
    add = parser.add_argument
    # what is read and written
    add("--model", help="pi_{t-1}, which sampled the responses")
    add("--init-model", help="pi_init, the reference in Eq. 7")
    add("--input", required=True, help="responses of 02_generate.py")
    add("--output", required=True, help="D_t: JSON Lines of labelled pairs")
    # Section 5.1
    add("--beta", type=common.nonnegative, help="beta in Eq. 7 (default 0.1): scales p, never the label")
    # what it is compared with
    add("--judge", choices=JUDGES, default="init", help="init: Eq. 7; previous, none: Table 7; reward, llm: Table 2; "
        "gold: labels from outside, the 100 %% rows")
    add("--ref-model", help="--judge previous: pi_{t-2}, at t = 1 pi_init")
    add("--reward-model", help="--judge reward: a sequence classifier with one label")
    add("--judge-model", help="--judge llm: what 00_sft.py trained on judge_sft.jsonl of 00_inputs.py")
    add("--llm-order", choices=("both", "first"),
        help="--judge llm: both orders of a pair (default), or the order of sampling alone")
    add("--gold", help="--judge gold: gold.json of the small world, or JSON Lines (.jsonl) of id, label: "
        "1 or 2, the better response")
    add("--length-penalty", type=penalty, help="alpha in Eq. 13 for each token of a response, or auto: the one that "
        "makes chosen and rejected equally long on average")
    # memory
    add("--micro-batch-size", type=common.positive, default=16, help="prompts scored at a time by one rank")
    return settle(parser.parse_args())


def settle(args):
    """Raises InputError where an option and --judge do not go together; fills in the defaults of the others."""
    needs, takes = NEEDS[args.judge], TAKES.get(args.judge, {})
    for name in sorted({name for table in (NEEDS, TAKES) for names in table.values() for name in names}):
        option, value = "--" + name.replace("_", "-"), getattr(args, name)
        if name in needs and value is None:
            raise common.InputError(f"--judge {args.judge} needs {option}: --help says what it is")
        if value is not None and name not in needs and name not in takes:
            raise common.InputError(f"{option} does not go with --judge {args.judge}: leave it out")
        if name in takes and value is None:
            setattr(args, name, takes[name])
    return args


def differing(row):
    """The row, unless all its responses are the same."""
    return row if any(y["ids"] != row["responses"][0]["ids"] for y in row["responses"]) else None


def scored(args, rows, judged):
    """Yields (row, reward of each response, what the record keeps of it). Raises InputError for a NaN."""
    for row, (rewards, evidence) in zip(rows, judged, strict=True):
        if not all(map(math.isfinite, rewards)):
            raise common.InputError(f"{args.input}, id {row['id']}: a score is not finite ({rewards}): "
                                    "remove the row, or look at the models")
        yield row, rewards, evidence


def lengths_of(row):
    return [len(y["ids"]) for y in row["responses"]]


def automatic_penalty(args, rows, judged):
    """balancing_penalty of all pairs, from four numbers of each: no row is held."""
    numbers = array("d")
    for row, rewards, _ in scored(args, rows, judged):
        if len(rewards) != 2:
            raise common.InputError(f"{args.input}: --length-penalty auto takes two responses to each prompt: "
                                    "give the penalty as a number")
        numbers.extend([*rewards, *lengths_of(row)])
    numbers = np.reshape(numbers, (-1, 2, 2))
    return balancing_penalty(numbers[:, 0], numbers[:, 1])


def preferences(args, rows, judged, alpha, counts):
    """Yields the records: of each row the pair that Eq. 8 makes of it. Counts them."""
    counts |= {"pairs": 0, "first chosen": 0, "chosen longer by": 0}
    for row, rewards, evidence in scored(args, rows, judged):
        length = lengths_of(row)
        rewards = penalised(rewards, length, alpha)
        one, two = best_and_worst(rewards)
        p = preference(rewards[one], rewards[two])  # Eq. 7
        if p == 0.5:
            counts["ties"] += 1
            continue
        chosen, rejected = (one, two) if p > 0.5 else (two, one)  # Eq. 8
        counts["pairs"] += 1
        counts["first chosen"] += p > 0.5
        counts["chosen longer by"] += length[chosen] - length[rejected]
        yield {"id": row["id"], "prompt": row["prompt"], "prompt_ids": row["prompt_ids"],
               "chosen": row["responses"][chosen], "rejected": row["responses"][rejected], "p": p,
               **evidence, "judge": args.judge}


def write(args, partial, rows, judged, counts, started):
    """D_t. judged: (reward of each response, what the record keeps of it) for each row"""
    alpha = args.length_penalty or 0.0
    if alpha == "auto":
        alpha = automatic_penalty(args, rows, judged)
    if args.length_penalty is not None:
        counts["length penalty"] = alpha
    common.write_jsonl(partial / "preferences", preferences(args, rows, judged, alpha, counts))
    if not counts["pairs"]:
        judges = " and ".join("--" + name.replace("_", "-") for name in NEEDS[args.judge])
        told = {name: count for name, count in counts.items() if count}
        raise common.InputError(f"{args.input}: no pair carries a preference ({told}): {judges} cannot tell the "
                                "responses apart")
    counts["chosen longer by"] = round(counts["chosen longer by"] / counts["pairs"], 3)
    common.close_output(args, partial, partial / "preferences", counts, started)


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "init_model", "input", "ref_model", "reward_model", "judge_model",
                                 "gold")
    ranks = common.start_ranks()
    fields = {"id": common.an_id, "prompt": common.a_prompt, "prompt_ids": common.token_ids,
              "responses": common.responses}
    rows = common.Rows(args.input, fields, differing)
    counts = {"prompts read": rows.read, "all responses the same": rows.read - len(rows), "ties": 0}

    judged = JUDGES[args.judge](rows, args, partial, ranks)
    common.on_first_rank(lambda: write(args, partial, rows, judged, counts, started), ranks)


if __name__ == "__main__":
    common.run(main)
