"""Judging (03) beside extras/plain_spa.py: same models, responses and threads.

    python benchmarks/judging.py

Both label the same responses, two to a prompt, by Eq. 7 with pi_{t-1} and pi_init; the plain page takes one pair at a
time, every response with its prompt, and whole logits. They take turns, each in a process of its own, and a ratio is of
two runs that stand next to each other. Models, lengths and machine: as in benchmarks/dpo.py.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from shared import Turns, load, make_inputs, markdown, ratio, read_rows, run_stage, take_turns
from transformers import AutoTokenizer

from extras import plain_spa

PROMPTS, BATCH = 32, 4  # of a run, of a forward pass of 03


def make_responses(folder, *longest):
    """responses.jsonl from the preferences of `make_inputs`, and a second model near to the first."""
    make_inputs(folder, PROMPTS, *longest)
    rows = [{"id": row["id"], "prompt": "x", "prompt_ids": row["prompt_ids"],
             "responses": [row["chosen"], row["rejected"]]} for row in read_rows(folder / "preferences.jsonl")]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = load(folder / "model")
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
    turns.before_first_step()
    while True:
        pi, pi_init = load(folder / "pi"), load(folder / "model")
        turns.after_step(sum(plain_spa.preference(pi, pi_init, row["prompt_ids"], *(y["ids"] for y in row["responses"]),
                                                  beta=0.1) for row in rows))


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
    rows = [[name, f"{statistics.median(seconds[name]):.2f}", ratio(seconds[name], seconds["03"]),
             f"{steps[-1]['peak']:.2f}", f"{steps[-1]['loss']:.5f}"] for name, steps in done.items()]
    print("", *markdown(f"{PROMPTS} prompts, {args.threads} threads | Seconds | Times as long as 03 | Peak memory (GB) "
                        "| Sum of p", rows), sep="\n")


if __name__ == "__main__":
    main()
