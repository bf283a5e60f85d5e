"""Judging (03) beside a plain loop that scores with whole logits: same models, responses, batch and threads.

    python benchmarks/judging.py

Both label the same responses, two to a prompt, by Eq. 7 with pi_{t-1} and pi_init; the plain loop does so as the
reference implementation of DPO scores a batch: every sequence with its prompt, padded to the longest of the batch in the
order of the file, logits (B, T, V) and their log-softmax whole. They take turns, each in a process of its own, and a
ratio is of two runs that stand next to each other. Models, lengths and machine: as in benchmarks/dpo.py.
"""

import argparse
import json
import os
import runpy
import statistics
import sys
import tempfile
from pathlib import Path

import dpo

PROMPTS, BATCH = 32, 4  # of a run, of a forward pass


def make_responses(folder):
    """responses.jsonl from the preferences that benchmarks/dpo.py makes, and a second model near to the first."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    dpo.make_inputs(folder, PROMPTS)
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    (folder / "responses.jsonl").write_text("".join(json.dumps(
        {"id": row["id"], "prompt": [{"role": "user", "content": "x"}], "prompt_ids": row["prompt_ids"],
         "responses": [row["chosen"], row["rejected"]]}) + "\n" for row in rows))
    model = LlamaForCausalLM.from_pretrained(folder / "model", trust_remote_code=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.002 * torch.randn_like(weight)
    model.save_pretrained(folder / "pi")
    AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False).save_pretrained(folder / "pi")


def run_03(folder, turns):
    import common
    sys.argv = ["03_judge.py"]  # imported once, as the plain loop is
    judge = runpy.run_path(str(dpo.ROOT / "03_judge.py"))
    turns.before_first_step()
    while True:
        output = tempfile.mkdtemp() + "/preferences.jsonl"
        sys.argv = ["03_judge.py", "--model", str(folder / "pi"), "--init-model", str(folder / "model"), "--input",
                    str(folder / "responses.jsonl"), "--output", output, "--micro-batch-size", str(BATCH)]
        common.run(judge["main"])
        turns.after_step(sum(json.loads(line)["p"] for line in open(output)))


def run_plain(folder, turns):
    import torch
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def score(name):
        model = dpo.load_plain(folder / name)
        batches = [[(row["prompt_ids"], y["ids"]) for row in rows[at:at + BATCH] for y in row["responses"]]
                   for at in range(0, len(rows), BATCH)]
        return torch.cat([dpo.whole_logps(model, answers) for answers in batches]).view(-1, 2)

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
        turns = dpo.Turns()
        turns.out, sys.stdout = sys.stdout, sys.stderr
        return COMPETITORS[args.worker[0]](Path(args.worker[1]), turns)

    with tempfile.TemporaryDirectory() as folder:
        make_responses(Path(folder))
        done = dpo.run_in_turn(list(COMPETITORS), Path(folder), args, __file__)
    seconds = {name: [run["seconds"] for run in runs[2:]] for name, runs in done.items()}
    print(f"\n| {PROMPTS} prompts, {args.threads} threads | Seconds | Times as long as 03 | Peak memory (GB) | Sum of p |\n"
          "|---|---|---|---|---|")
    for name, runs in done.items():
        ratio = dpo.spread([theirs / ours for theirs, ours in zip(seconds[name], seconds["03"])])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio} | {runs[-1]['peak']:.2f} | "
              f"{runs[-1]['loss']:.5f} |")


if __name__ == "__main__":
    main()
