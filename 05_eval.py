"""Evaluation (Section 5.1): answers to held-out prompts, and their win rate by the small world's gold judge.

    python 05_eval.py sample --model pi_1 --input eval.jsonl --gold gold.json --name "SPA, iteration 1" --output eval/1
    torchrun --nproc-per-node 4 05_eval.py sample --model ...
    python 05_eval.py report eval/sft eval/dpo eval/1 --output report      # tables, samples, a figure
    python 05_eval.py sample ... --then sample ... --then report ...       # one after the other, in one start

Reads  eval.jsonl        {"id": "7", "prompt": [{"role": "user", "content": "Name a fish."}], "reference": "An eel."}
Writes responses.jsonl   {"id", "prompt", "reference", "finish": "eos"|"length", "response", "preference": 1 where the
                         response is better than the reference, 0.5 for a tie, 0 otherwise}
       metrics.json      {"name", "win_rate": the mean preference in percent, ...} (others: extras/alpaca_eval.py), with
                         --init-model also "kl_per_token", "agreement" and others (extras/held_out.py)
       annotations.json  the preferences in AlpacaEval's format

The other commands give the paper's two scores, in the benchmarks' own file formats: alpaca-sample, alpaca-judge and
alpaca-score for AlpacaEval 2.0 (extras/alpaca_eval.py), mt-sample and mt-judge for MT-Bench (extras/mt_bench.py). Those
that sample run under torchrun too. `python 05_eval.py COMMAND --help` lists the options of a command.

Departs from the paper: see extras/alpaca_eval.py.
"""

import sys

import numpy as np

from extras import alpaca_eval, held_out, mt_bench, report
from extras.answers import Sampler
from extras.endpoint import endpoint_url
from extras.small_world import gold_score, gold_values, read_gold
from support import chat, data, records, runs


def sample(args):
    """Write the folder of a model's responses to --input and of the scores that the options allow."""
    work = runs.open_output(args, "model", "input", "gold", "init_model", "preferences")
    gold = read_gold(args.gold) if args.gold else None
    rows = records.read_jsonl(args.input, records.PROMPTS | ({"reference": records.is_text} if gold else {}))
    sampler = Sampler(args)
    kept, counts = data.short_prompts(args.input, rows, sampler.tokenizer, args.max_prompt_length)
    rows, prompts = zip(*kept)
    sampler.check_room(prompts)
    answers = sampler.generate_answers(work, prompts, [row["id"] for row in rows])
    counts |= sampler.counts
    beside_init = {}
    if args.init_model:
        beside_init = held_out.evaluate(args, sampler, rows, prompts, [ids for *_, ids in answers], work)

    def write():
        for row, (text, finish, _) in zip(rows, answers):
            row |= {"finish": finish, "response": text}
        made, name = work / "eval", args.name or args.model
        made.mkdir(exist_ok=True)
        metrics = {"name": name, "gold_labels": args.label_share, "n": len(rows)} | beside_init
        if "agreement" in metrics:
            counts["agreement with held-out labels"] = f"{metrics['agreement']:.1f} of {metrics['agreement_n']}"
        if gold:
            scores, annotations = score(rows, gold, name)
            metrics |= scores
            runs.write_json(made / "annotations.json", annotations)
            if args.preferences:
                metrics["judge_accuracy"] = judge_accuracy(args.preferences, gold)
            counts["win rate"] = f"{metrics['win_rate']:.1f} +- {metrics['standard_error'] or 0:.1f}"
        metrics |= {"avg_length": float(np.mean([len(row["response"]) for row in rows])),
                    "eos_rate": 100 * float(np.mean([row["finish"] == "eos" for row in rows]))}
        runs.write_jsonl(made / "responses.jsonl", rows)
        runs.write_json(made / "metrics.json", metrics)
        runs.close_output(args, work, made, counts)

    sampler.ranks.on_first(write)


def score(rows, gold, name):
    """(metrics in percent, the rows in AlpacaEval's format) by gold, which also gives each row its preference."""
    annotations, values = [], []
    for row in rows:
        theirs, ours = (gold_score(gold, row["prompt"], row[key]) for key in ("reference", "response"))
        row["preference"] = 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
        pair = ({"instruction": row["prompt"][-1]["content"], "output": row["reference"]},
                {"output": row["response"], "generator": name})
        annotations.append(alpaca_eval.annotation(*pair, "gold", 1 + row["preference"]))
        values += gold_values(gold, row["prompt"], row["response"])
    malformed = 100 * sum(value is None for value in values) / max(1, len(values))
    return alpaca_eval.alpaca_eval_metrics(annotations) | {"malformed": malformed}, annotations


def judge_accuracy(path, gold):
    """Percent of the pairs in which gold agrees with the label. Pairs that gold finds equal do not count."""
    scores = [[gold_score(gold, row["prompt"], row[y]["text"]) for y in ("chosen", "rejected")]
              for row in records.read_jsonl(path, records.PROMPTS | records.PREFERENCES)]
    agrees = [chosen > rejected for chosen, rejected in scores if chosen != rejected]
    return 100 * sum(agrees) / len(agrees) if agrees else None


def parse_args(words=None):
    label_share = {"default": "-", "help": "share of gold labels that the model has seen, for tables"}
    empty_system = {"action": "store_true", "help": "an empty system message first, as Zephyr's recipe has it"}
    parser = runs.Parser(description="Evaluate a model, or put evaluated models side by side.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = add_command(commands, "sample", "answer held-out prompts; with --gold, score the answers")
    add_sampling(add, max_new_tokens=300)
    add("--input", required=True, help="JSON Lines of id, prompt and, for --gold, reference")
    add("--max-prompt-length", type=runs.positive, default=1024, help="longer prompts are dropped")
    add("--gold", help="gold.json of the small world, its judge; without it nothing is scored")
    add("--init-model", help="pi_init: how far the model is from it, and how often the implicit reward (Eq. 7) agrees "
        "with labels of --input")
    add("--preferences", help="D_t that the model was trained on: how often its labels agree with --gold")
    add("--label-share", **label_share)

    add = add_command(commands, "alpaca-sample", "answer AlpacaEval's instructions")
    add_sampling(add, max_new_tokens=2048)
    add("--instructions", required=True, help="AlpacaEval's baseline outputs, which have the instructions")
    add("--empty-system", **empty_system)
    add = add_command(commands, "alpaca-judge", "compare a model's outputs with the baseline's")
    add("outputs", help="model_outputs.json")
    add("--baseline", required=True, help="AlpacaEval's baseline outputs")
    add("--judge-template", required=True, help="AlpacaEval's judging prompt")
    add("--seed", type=runs.natural, default=0, help="decides which of two outputs the judge sees first")
    add_judge(add)
    add = add_command(commands, "alpaca-score", "compute the win rates of annotations")
    add("annotations", help="annotations.json, plain or gzip")
    add("--df-gamed", required=True, help="AlpacaEval's df_gamed.csv; none: LC win rate without difficulties")
    add("--name", help="the model in tables (default: its generator)")
    add("--label-share", **label_share)

    add = add_command(commands, "mt-sample", "answer MT-Bench's questions")
    add_sampling(add, max_new_tokens=1024, temperature=False)  # each category has its own
    add("--questions", required=True, help="MT-Bench's question.jsonl")
    add("--empty-system", **empty_system)
    add = add_command(commands, "mt-judge", "rate a model's answers to MT-Bench's questions")
    add("answers", help="model_answer/MODEL.jsonl")
    add("--questions", required=True, help="MT-Bench's question.jsonl")
    add("--judge-prompts", required=True, help="MT-Bench's judge_prompts.jsonl")
    add("--reference-answers", required=True, help="MT-Bench's reference_answer/gpt-4.jsonl")
    add("--name", help="the model in tables (default: MODEL)")
    add("--label-share", **label_share)
    add_judge(add)
    add = add_command(commands, "report", "put evaluated models side by side: tables, samples, a figure")
    add("evaluated", nargs="+", help="folders and metrics files, in the order of the rows; a name has one row")
    args = parser.parse_args(words)
    if not args.command.endswith("sample"):
        runs.in_one_process(args.command)
    return args


def add_command(commands, name, help):
    """Returns the function that adds an option to this command."""
    add = commands.add_parser(name, help=help, description=help).add_argument
    add("--output", required=True, help="file or folder to write")
    return add


def add_sampling(add, max_new_tokens, temperature=True):
    add("--model", required=True, help="the model to evaluate")
    chat.add_options(add)
    add("--micro-batch-size", type=runs.positive, default=16, help="prompts in a batch of one rank")
    add("--name", help='the model in tables and files (default: --model); "METHOD, iteration T" for Figure 3')
    if temperature:
        add("--temperature", type=runs.nonnegative, default=0.7, help="0: greedy")
    add("--max-new-tokens", type=runs.positive, default=max_new_tokens, help="fewer where the positions end before")
    add("--seed", type=runs.natural, default=0, help="random seed")


def add_judge(add):
    add("--judge-model", required=True, help="name at --judge-url")
    add("--judge-url", type=endpoint_url, required=True,
        help="OpenAI-compatible endpoint, .../v1, as Azure's v1 API is; its key is read from OPENAI_API_KEY")
    add("--judge-requests", type=runs.positive, default=16, help="requests at a time")
    add("--judge-timeout", type=runs.number(float, 0.01), default=120.0, help="seconds until a request has failed")
    add("--judge-retries", type=runs.natural, default=5, help="after 429, 5xx, timeouts, broken answers")
    add("--max-requests", type=runs.natural, help="requests of this run, retries included; the next run resumes")


def main():
    functions = {"sample": sample, "alpaca-sample": alpaca_eval.sample, "alpaca-judge": alpaca_eval.judge,
                 "alpaca-score": alpaca_eval.score, "mt-sample": mt_bench.sample, "mt-judge": mt_bench.judge,
                 "report": report.report}
    words, commands = sys.argv[1:], []
    while "--then" in words:
        end = words.index("--then")
        commands.append(parse_args(words[:end]))
        words = words[end + 1:]
    commands.append(parse_args(words))
    for args in commands:
        try:
            functions[args.command](args)
        except SystemExit as stop:  # 0: its output is complete already
            if stop.code:
                raise


if __name__ == "__main__":
    runs.run(main)
