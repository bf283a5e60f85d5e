"""What pi_T is worth: a response of the model to each evaluation prompt, scored against the reference response.

    win rate      mean over the prompts of 1 where the model's response is better, 0.5 for a tie, 0 else
    LC win rate   the same had both been equally long: sigmoid(b) of the logistic regression of the preference on
                  b + w tanh(d / std(d)), d = characters of the model's response minus the reference's
                  (AlpacaEval 2.0's, less its terms for each instruction)

Reads  eval.jsonl  {"id": "3", "prompt": [...], "reference": "The eel."}
       gold.json   the small world's gold judge, of 00_inputs.py: without it responses are sampled and not scored
Writes a folder with responses.jsonl {"id", "prompt", "response", "finish", "reference", "preference"} and metrics.json

    python 05_eval.py --model pi_1 --input eval.jsonl --gold gold.json --name "SPA, iteration 1" --output eval/spa_1
    python 05_eval.py --report eval/sft eval/dpo eval/spa_1 --output report      # a table and samples side by side

Departs from the paper: AlpacaEval 2.0 and MT-Bench ask GPT-4; here the gold judge of the small world decides.
"""

import json
import time
from pathlib import Path

import numpy as np

import common


def win_rate(preference):
    """(win rate, its standard error) in percent. preference: (n,) of 1 win, 0.5 tie, 0 loss"""
    error = preference.std(ddof=1) / len(preference) ** 0.5 if len(preference) > 1 else float("nan")
    return 100 * preference.mean(), 100 * error


def length_controlled_win_rate(preference, lengths, reference_lengths, ridge=0.01, iterations=50):
    """Percent. preference (n,) in [0, 1]; lengths (n,) in characters. Newton; the ridge keeps all-wins finite."""
    d = np.asarray(lengths, float) - np.asarray(reference_lengths, float)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    x = np.stack([np.ones_like(d), np.tanh(d / spread) if spread > 0 else np.zeros_like(d)], 1)  # (n, 2)
    w = np.zeros(2)
    for _ in range(iterations):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - preference) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(2)
        w -= np.linalg.solve(hessian, gradient)
    return 100 * sigmoid(w[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def parse_args():
    parser = common.Parser(description="Evaluate a model, or put evaluated models side by side.")
    add = parser.add_argument
    # what is read and written
    add("--model", help="the model to evaluate")
    add("--input", help="JSON Lines of id, prompt, reference")
    add("--gold", help="gold.json of the small world")
    add("--preferences", help="D_t the model was trained on: how often its labels agree with gold")
    add("--report", nargs="+", help="folders of evaluated models, in the order of the table's rows")
    add("--output", required=True, help="folder")
    add("--tokenizer", help="folder or name of a tokenizer, where --model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    add("--name", help="the model's name in the table (default: --model)")
    add("--gold-labels", default="-", help="share of gold labels it has seen, for the table")
    # sampling
    add("--temperature", type=common.nonnegative, default=0.7, help="0 takes the likeliest token")
    add("--max-new-tokens", type=common.positive, default=300)
    add("--max-prompt-length", type=common.positive, default=1024, help="longer prompts are dropped")
    add("--micro-batch-size", type=common.positive, default=16, help="prompts sampled at a time by one rank")
    add("--seed", type=common.natural, default=0, help="another seed, other samples")
    return parser.parse_args()


def read_gold(path):
    try:
        gold = json.loads(Path(path).read_text(encoding="utf-8"))
        if all(isinstance(value, (int, float)) for known in gold.values() for value in known.values()):
            return gold
    except (OSError, ValueError, AttributeError):
        pass
    raise common.InputError(f"{path}: is no gold judge {{thing: {{sentence: value}}}}: give 00_inputs.py's gold.json")


def read_prompts(args, tokenizer):
    """Rows with their prompt_ids, and what was dropped."""
    fields = {"id": common.an_id, "prompt": common.a_prompt} | ({"reference": common.a_text} if args.gold else {})
    rows = common.read_jsonl(args.input, fields)
    for row in rows:
        row["prompt_ids"] = common.prompt_ids(tokenizer, row["prompt"], f"{args.input}, id {row['id']}")
    kept = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    if not kept:
        raise common.InputError(f"{args.input}: all {len(rows)} prompts are longer than --max-prompt-length "
                                f"{args.max_prompt_length}: raise it")
    return kept, {"prompts read": len(rows), "too long": len(rows) - len(kept)}


def score(rows, gold):
    """The metrics of the small world; each row gets its preference. Values are percent, lengths characters."""
    for row in rows:
        ours, theirs = (common.gold_score(gold, row["prompt"], row[key]) for key in ("response", "reference"))
        row["preference"] = (1 + np.sign(ours - theirs)) / 2
    preference = np.array([row["preference"] for row in rows])
    lengths, reference_lengths = ([len(row[key]) for row in rows] for key in ("response", "reference"))
    rate, error = win_rate(preference)
    values = [value for row in rows for value in common.gold_values(gold, row["prompt"], row["response"])]
    return {"win_rate": rate, "standard_error": error,
            "length_controlled_winrate": length_controlled_win_rate(preference, lengths, reference_lengths),
            "malformed": 100 * sum(value is None for value in values) / max(1, len(values))}


def judge_accuracy(path, gold):
    """Percent of the pairs that gold does not hold equal in which it agrees with the label."""
    rows = common.read_jsonl(path, {"id": common.an_id, "prompt": common.a_prompt, "chosen": common.a_response,
                                    "rejected": common.a_response})
    scores = [[common.gold_score(gold, row["prompt"], row[y]["text"]) for y in ("chosen", "rejected")] for row in rows]
    agrees = [chosen > rejected for chosen, rejected in scores if chosen != rejected]
    return 100 * sum(agrees) / len(agrees) if agrees else None


COLUMNS = {"gold_labels": "Gold labels", "win_rate": "Win rate (%)", "length_controlled_winrate": "LC win rate (%)",
           "avg_length": "Mean length (chars)", "judge_accuracy": "Judge accuracy (%)", "malformed": "Malformed (%)",
           "eos_rate": "EOS (%)"}


def table(metrics):
    """A Markdown table, one model a row; a dash where a model has no such figure."""
    def cell(value):
        return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)
    lines = ["| Model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += ["| " + " | ".join([row["name"]] + [cell(row.get(key)) for key in COLUMNS]) + " |" for row in metrics]
    return "\n".join(lines) + "\n"


def samples(metrics, responses, count=3):
    """The same prompts answered by every model, as text."""
    blocks = []
    for k in range(min(count, len(responses[0]))):
        lines = ["> " + responses[0][k]["prompt"][-1]["content"], ""]
        lines += [f"- **{row['name']}**: {rows[k]['response']}" for row, rows in zip(metrics, responses)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def report(args, partial, started):
    metrics, responses = [], []
    for folder in map(Path, args.report):
        try:
            metrics.append(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise common.InputError(f"{folder}: holds no metrics.json: --report takes folders that 05_eval.py wrote")
        responses.append(common.read_jsonl(folder / "responses.jsonl", {"id": common.an_id, "prompt": common.a_prompt}))
    made = partial / "report"
    made.mkdir(exist_ok=True)
    (made / "table.md").write_text(table(metrics), encoding="utf-8")
    (made / "samples.md").write_text(samples(metrics, responses), encoding="utf-8")
    print(table(metrics) + "\n" + samples(metrics, responses))
    common.close_output(args, partial, made, {"models": len(metrics)}, started)


def main():
    args, started = parse_args(), time.time()
    if args.report:
        return report(args, common.open_output(args, "report"), started)
    if not args.model or not args.input:
        raise common.InputError("give --model and --input, or --report")
    partial = common.open_output(args, "model", "input", "gold", "preferences")
    ranks = common.start_ranks()
    gold = read_gold(args.gold) if args.gold else None
    tokenizer = common.load_tokenizer(args)
    rows, counts = read_prompts(args, tokenizer)
    ends = common.end_ids(args.model, tokenizer)
    model = common.load_model(args.model, ranks.device, common.scoring_dtype(ranks.device))

    def generate(batch):
        u = np.array([[common.uniforms(args.seed, rows[i]["id"], 0, args.max_new_tokens)] for i in batch])
        return common.sample(model, [rows[i]["prompt_ids"] for i in batch], u, args.temperature,
                             args.max_new_tokens, ends)

    batches = common.length_batches([len(row["prompt_ids"]) for row in rows], args.micro_batch_size)
    sampled = common.map_batches(generate, batches, partial, ranks, "sampling")
    if ranks.rank == 0:
        for i, row in enumerate(rows):
            [[ids, row["finish"]]] = sampled[i]
            row["response"] = tokenizer.decode(ids, skip_special_tokens=True).strip()
            del row["prompt_ids"]
        metrics = {"name": args.name or args.model, "gold_labels": args.gold_labels, "n": len(rows),
                   "avg_length": float(np.mean([len(row["response"]) for row in rows])),
                   "eos_rate": 100 * float(np.mean([row["finish"] == "eos" for row in rows]))}
        if gold:
            metrics |= score(rows, gold)
            if args.preferences:
                metrics["judge_accuracy"] = judge_accuracy(args.preferences, gold)
            counts["win rate"] = f"{metrics['win_rate']:.1f} +- {metrics['standard_error']:.1f}"
        made = partial / "eval"
        made.mkdir(exist_ok=True)
        common.write_jsonl(made / "responses.jsonl", rows)
        common.write_json(made / "metrics.json", metrics)
        common.close_output(args, partial, made, counts, started)
    common.barrier()


if __name__ == "__main__":
    common.run(main)
