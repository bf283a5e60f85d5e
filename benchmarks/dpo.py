"""The DPO step beside TRL's DPOTrainer and the plain page: same model, pairs, order, dtype, batch, threads and losses.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/dpo.py --trl .venv-trl/bin/python               # on a CPU
    python benchmarks/dpo.py --trl .venv-trl/bin/python --steps 4     # quicker

Each competitor is a process of its own that takes one optimizer step at a time, in turn with the others, so that a busy
machine slows them alike. Who stores the log-probs of pi_ref before the first step pays for that once in a run: a step's
share of it, of E epochs one E-th, is added in two columns. Memory is the largest resident size of the process.

    01             01_seed_dpo.py, which stores them
    04             04_refined_dpo.py with de-coupled noise detection; it refines labels from its second step on
    live           01's step with a live reference: what 04 is compared with
    prompt twice   01 that computes a prompt for each of its two responses
    logits twice   01 that recomputes the logits in the backward pass, in chunks of 256 tokens
    cross_entropy  01 with F.cross_entropy of the logits instead of common.LabelLogps, which works in place
    torch's loss   01 with F.linear_cross_entropy; "in chunks": with LinearCrossEntropyOptions()
    plain          extras/plain_spa.py: one pair at a time, whole logits of policy and live reference
    TRL            DPOConfig() but for the settings above: with activation checkpointing and a live reference
    TRL best       stored reference log-probs, no activation checkpointing
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from shared import SHAPE, Turns, load, make_inputs, markdown, ratio, read_rows, run_stage, take_turns
from transformers import AutoTokenizer

PAIRS, MICRO_BATCH, LR, BETA = 8, 2, 1e-5, 0.1  # pairs of an optimizer step, of a forward pass


# ---------------------------------------------------------------------------------------------
# Competitors. What only some have is imported in them: common.py is not for TRL's Python.


def run_training(script, folder, turns, **options):
    """A stage as it is, except that it waits for its turn after each step and takes the pairs in the file's order."""
    import common
    from support import runs
    real_progress, real_log, real_store = runs.progress, runs.log_step, common.store_logps

    def progress(steps, label, ranks):  # of the training loop
        turns.before_first_step()
        return real_progress(steps, label, ranks)

    def log_step(partial, bar, step, rows, **more):
        real_log(partial, bar, step, rows, **more)
        turns.after_step(sum(row["loss"] for row in rows) / len(rows))

    def store_logps(*parameters):
        turns.time_reference(lambda: real_store(*parameters))

    runs.progress, runs.log_step, common.store_logps = progress, log_step, store_logps
    common.epoch_batches = lambda count, size, *_: [list(range(i, i + size)) for i in range(0, count, size)]
    run_stage(script, model=folder / "model", output=tempfile.mkdtemp() + "/out", lr=LR, beta=BETA, batch_size=PAIRS,
              micro_batch_size=MICRO_BATCH, epochs=1, **options)


def run_01(folder, turns, **replaced):
    """01, with parts of common.py replaced by what a function makes of them."""
    import common
    for name, change in replaced.items():
        setattr(common, name, change(getattr(common, name)))
    run_training("01_seed_dpo.py", folder, turns, input=folder / "seed.jsonl")


def run_04(folder, turns):
    run_training("04_refined_dpo.py", folder, turns, input=folder / "preferences.jsonl", refine_after=0, window=PAIRS)


def run_live(folder, turns):
    """01's step that also runs pi_ref, as 04's does."""
    import common
    ref = common.ResponseLogps(load(folder / "model").requires_grad_(False))

    def with_reference(real):
        class Both(real):
            def forward(self, batch):
                turns.reference = 0.0  # the stored log-probs would not be needed
                with torch.no_grad():
                    ref(batch)
                return super().forward(batch)
        return Both

    run_01(folder, turns, ResponseLogps=with_reference)


def with_cross_entropy(real):
    return SimpleNamespace(apply=lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none"))


def run_torch_loss(folder, turns, options=None):
    """01 with torch's own loss of the head's input."""
    def with_torch_loss(real):
        class TorchLoss(real):
            def forward(self, batch):
                hidden, weight, bias = self.hidden(batch)
                return -F.linear_cross_entropy(hidden, weight, batch.labels, linear_bias=bias, reduction="none",
                                               options=options and options())
        return TorchLoss

    run_01(folder, turns, ResponseLogps=with_torch_loss)


def run_trl(folder, turns, **options):
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    rows = load_dataset("json", data_files=str(folder / "seed.jsonl"), split="train").remove_columns("id")
    # its tokenizer joins prompt and response as they are
    rows = rows.map(lambda row: {key: " " + row[key] for key in ("chosen", "rejected")})
    steps = len(rows) // PAIRS
    config = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=MICRO_BATCH,
                       gradient_accumulation_steps=PAIRS // MICRO_BATCH, max_length=2048, num_train_epochs=1,
                       learning_rate=LR, beta=BETA, lr_scheduler_type="cosine", warmup_steps=-(-steps // 10),
                       weight_decay=0.0, max_grad_norm=1.0, bf16=False, use_cpu=not torch.cuda.is_available(),
                       train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none",
                       disable_tqdm=True, **options)

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.before_first_step()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                turns.after_step(float(logs["loss"]))

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, *parameters):
            return turns.time_reference(lambda: super(Trainer, self)._precompute_ref_logps(*parameters))

    Trainer(load(folder / "model"), args=config, train_dataset=rows, callbacks=[Steps()],
            processing_class=AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)).train()


def run_plain(folder, turns):
    """The plain page, which gets the pairs in such an order that its permutation of them is the file's."""
    from extras import plain_spa
    rows = read_rows(folder / "preferences.jsonl")
    pairs = [None] * len(rows)
    for place, row in zip(np.random.default_rng(0).permutation(len(rows)), rows):
        pairs[place] = row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]
    policy, ref = load(folder / "model"), load(folder / "model").requires_grad_(False)
    turns.before_first_step()
    plain_spa.train(policy, ref, pairs, refine=False, beta=BETA, lr=LR, batch_size=PAIRS,
                    log=lambda step: turns.after_step(step["loss"]))


def run_products(folder, turns):
    """The rate of matrix products, in GFLOP/s: the two largest of the step, the head's and the MLP's, by the clock."""
    hidden, head = torch.randn(320, SHAPE["hidden_size"]), torch.randn(SHAPE["vocab_size"], SHAPE["hidden_size"])
    states, mlp = torch.randn(640, SHAPE["hidden_size"]), torch.randn(SHAPE["intermediate_size"], SHAPE["hidden_size"])
    flops = 5 * 2 * (hidden.numel() * len(head) + 24 * states.numel() * len(mlp))
    turns.before_first_step()
    while True:
        for _ in range(5):
            hidden @ head.T
            for _ in range(24):
                states @ mlp.T
        turns.after_step(flops / (time.perf_counter() - turns.started) / 1e9)


COMPETITORS = {  # function, its options
    "01": (run_01, {}),
    "04": (run_04, {}),
    "live": (run_live, {}),
    "prompt twice": (run_01, dict(collate=lambda real: lambda rows, device, *_: real(rows, device))),
    "logits twice": (run_01, dict(chunk_rows=lambda real: lambda weight: 256)),
    "cross_entropy": (run_01, dict(LabelLogps=with_cross_entropy)),
    "torch's loss": (run_torch_loss, {}),
    "torch's loss, in chunks": (run_torch_loss, dict(options=getattr(torch.nn, "LinearCrossEntropyOptions", None))),
    "plain": (run_plain, {}),
    "products": (run_products, {}),
    "TRL": (run_trl, {}),
    "TRL best": (run_trl, dict(precompute_ref_log_probs=True, gradient_checkpointing=False))}


# ---------------------------------------------------------------------------------------------


def step_flops(rows):
    """What a step has to compute at the least: 6 N for each token (a prompt once for both responses), and as many of
    the head where a response token is predicted; attention, the softmax and the optimizer not counted.
    """
    width = SHAPE["hidden_size"]
    body = SHAPE["num_hidden_layers"] * (4 * width ** 2 + 3 * width * SHAPE["intermediate_size"])
    head = width * SHAPE["vocab_size"]
    answers = sum(len(row[y]["ids"]) for row in rows for y in ("chosen", "rejected"))
    return 6 * body * (answers + sum(len(row["prompt_ids"]) for row in rows)) + 6 * head * answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python that has TRL (default: TRL is left out)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted, after two that are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run, options = COMPETITORS[args.worker[0]]
        return run(Path(args.worker[1]), Turns(), **options)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, PAIRS * (args.steps + 3))  # one more step than is taken, so that no competitor ends
        names = [name for name in COMPETITORS if (args.trl or "TRL" not in name)
                 and ("torch" not in name or hasattr(F, "linear_cross_entropy"))]
        done = take_turns(__file__, names, folder, args, {"TRL": args.trl, "TRL best": args.trl})
        report(done, read_rows(folder / "preferences.jsonl"), args)


def report(done, rows, args):
    losses = {name: [step["loss"] for step in steps] for name, steps in done.items() if name != "products"}
    seconds = {name: [step["seconds"] for step in steps[2:]] for name, steps in done.items()}
    stored = {name: steps[0]["reference"] / (args.steps + 3) for name, steps in done.items()}  # for a step's pairs
    head, lines = (f"{PAIRS} pairs a step, {args.threads} threads | Seconds | Reference pass | Times as long as 01 "
                   "| with the pass, 3 epochs | 1 epoch | Peak memory (GB) | Losses differ by at most"), []
    for name in losses:
        theirs, ours = ([[time + stored[key] * share for time in seconds[key]] for share in (0, 1 / 3, 1)]
                        for key in (name, "01"))
        lines.append([name, f"{statistics.median(seconds[name]):.2f}", f"{stored[name]:.2f}", *map(ratio, theirs, ours),
                      f"{done[name][-1]['peak']:.2f}",
                      f"{max(abs(a - b) for a, b in zip(losses[name], losses['01'])):.0e}"])
    print(*markdown(head, lines), sep="\n")
    flops = [step_flops(rows[k:k + PAIRS]) for k in range(2 * PAIRS, len(rows) - PAIRS, PAIRS)]
    rates = [step["loss"] for step in done["products"][2:]]
    share = ratio([count / time / 1e9 for count, time in zip(flops, seconds["01"])], rates)
    print(f"\n04 takes {ratio(seconds['04'], seconds['live'])} times as long as live")
    print(f"\n01 reaches {share} of the rate of matrix products, {statistics.median(rates):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
