"""Judging (03) beside a plain loop that scores with full logits: same models, responses, batch and threads.

    python benchmarks/judging.py

Both label the same responses, two to a prompt, by Eq. 7 with pi_{t-1} and pi_init. The plain loop scores a batch as the
reference implementation of DPO does: every sequence with its prompt, padded to the longest of the batch, in the order
of the file, full logits (B, T, V) and their log-softmax. They take turns, each in a process of its own, and a ratio is
of two runs that stand next to each other. Models, lengths and machine: as in benchmarks/dpo.py.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from shared import Turns, full_logps, load_plain, make_inputs, read_rows, run_stage, spread, take_turns
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS, BATCH = 32, 4  # of a run, of a forward pass


def make_responses(folder, *longest):
    """responses.jsonl from the preferences of `make_inputs`, and a second model near to the first."""
    make_inputs(folder, PROMPTS, *longest)
    rows = [{"id": row["id"], "prompt": "x", "prompt_ids": row["prompt_ids"],
             "responses": [row["chosen"], row["rejected"]]} for row in read_rows(folder / "preferences.jsonl")]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = LlamaForCausalLM.from_pretrained(folder / "model", trust_remote_code=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.002 * torch.randn_like(weight)
    model.save_pretrained(folder / "pi")
    AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False).save_pretrained(folder / "pi")


def run_03(folder, turns):
    import common  # noqa: F401, so that the first run is not longer by an import
    turns.before_first_step()
    while True:
        output = Path(tempfile.mkdtemp()) / "preferences.jsonl"
        run_stage("03_judge.py", model=folder / "pi", init_model=folder / "model", input=folder / "responses.jsonl",
                  output=output, micro_batch_size=BATCH)
        turns.after_step(sum(row["p"] for row in read_rows(output)))


def run_plain(folder, turns):
    rows = read_rows(folder / "responses.jsonl")

    @torch.no_grad()
    def score(name):
        model = load_plain(folder / name)
        batches = [[(row["prompt_ids"], y["ids"]) for row in rows[first:first + BATCH] for y in row["responses"]]
                   for first in range(0, len(rows), BATCH)]
        return torch.cat([full_logps(model, answers) for answers in batches]).view(-1, 2)

    turns.before_first_step()
    while True:
        reward = 0.1 * (score("pi") - score("model"))
        turns.after_step(torch.sigmoid(reward[:, 0] - reward[:, 1]).sum().item())


COMPETITORS = {"03": run_03, "plain": run_plain}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="runs that are counted, after two that are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return COMPETITORS[args.worker[0]](Path(args.worker[1]), Turns())

    with tempfile.TemporaryDirectory() as folder:
        make_responses(Path(folder))
        done = take_turns(__file__, list(COMPETITORS), Path(folder), args)
    seconds = {name: [run["seconds"] for run in steps[2:]] for name, steps in done.items()}
    print(f"\n| {PROMPTS} prompts, {args.threads} threads | Seconds | Times as long as 03 | Peak memory (GB) "
          "| Sum of p |\n|---|---|---|---|---|")
    for name, steps in done.items():
        ratio = spread([theirs / ours for theirs, ours in zip(seconds[name], seconds["03"])])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio} | {steps[-1]['peak']:.2f} | "
              f"{steps[-1]['loss']:.5f} |")


if __name__ == "__main__":
    main()
