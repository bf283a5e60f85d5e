"""The stages at Mistral-7B's size on one GPU, an H100 or H200: speed, share of the card's peak, memory, hours.

    python benchmarks/gpu.py > gpu.md
    python benchmarks/gpu.py --tiny      # on a CPU, to see that it works

Prints a Markdown table; what fails is a row that says why. Not run on a GPU yet. The rows:

    peak    a product of two bf16 matrices: what 100 % means below
    02, 03  sampled tokens and judged pairs a second
    04      the refined step with checkpointing: tokens a second, a prompt counted once for both responses

A model gets random weights on the GPU instead of 29 GB from the disk, and a trained one is not saved. Loading is not
timed; of 04 the second epoch is, of 03 the second run. 64 prompts have 20 to 600 random tokens (log-uniform) and two
responses of 20 to 300 (uniform). What is sampled ends with one token in 200: after some 156 on average, 300 at most.

The share of the peak counts 6 N operations of the policy for each token, and 2 N of each further forward pass; N is the
number of weights of the layers, without embedding and head. 04 trains 12 of the 32 layers, which fit into 80 GB: 22
bytes a weight (AdamW 16, autocast's copy 2, the reference 4) are 63 GB. The hours are those of 32/12 of its time.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from shared import SHAPE, make_inputs, read_rows, run_stage
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

import common
from support import models, runs

# longest: tokens of a prompt, of a response; layers: that 04 trains; product: width of the matrices of `peak`
FULL = dict(prompts=64, longest=(600, 300), layers=12, product=8192, shape=dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8))
TINY = dict(prompts=4, longest=(24, 24), layers=1, product=64, shape=dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
EOS = list(range(2, SHAPE["vocab_size"], 200))  # what ends a sampled response


def count_weights(config):
    """The weights of the layers, which each token passes."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).model.layers.parameters())


# ---------------------------------------------------------------------------------------------
# Running a stage


class Clock:
    """In the place of a stage's progress bar. Appends to `bars` the list of the seconds of its rounds."""

    def __init__(self, bars, rounds, **_):
        self.rounds, self.seconds = rounds, []
        bars.append(self.seconds)

    def __iter__(self):
        for value in self.rounds:
            started = self.now()
            yield value
            self.seconds.append(self.now() - started)

    def now(self):
        """Seconds, when the GPU has done what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def set_postfix(self, *_, **__):
        """A bar would show the loss."""


def random_weights(loader, name, what, config, dtype):
    """In the place of models.load_weights: a model made on the GPU. Those of "model" are the same each time."""
    torch.manual_seed(Path(name).name == "init")
    with torch.device(common.start_ranks().device):
        return loader.from_config(config, dtype=dtype)


def run_timed(script, bench, **options):
    """Run a stage -> ([the seconds of each round] of each of its progress bars, the output's path)."""
    bars, output = [], Path(tempfile.mkdtemp(dir=bench.folder)) / "out"
    with (mock.patch.multiple(models, load_weights=random_weights, save_trained=lambda *_: None),
          mock.patch.object(runs, "tqdm", partial(Clock, bars)), contextlib.redirect_stdout(sys.stderr)):
        run_stage(script, model=bench.folder / "model", output=output, **options)
    return bars, output


def make_bench(folder, prompts, longest, shape, **sizes):
    """What a row is measured with. 02 reads seed.jsonl (texts), 03 and 04 read rows.jsonl (the same as token ids)."""
    make_inputs(folder, prompts, longest, hidden_size=8, num_hidden_layers=1)  # this model's weights are not used
    config = MistralConfig(**SHAPE | shape)
    config.save_pretrained(folder / "model")
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder / "model")
    (folder / "init").symlink_to("model")
    rows = [row | {"prompt": "x", "responses": [row["chosen"], row["rejected"]]}
            for row in read_rows(folder / "preferences.jsonl")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = sum(len(ids) for row in rows for ids in (row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]))
    return SimpleNamespace(folder=folder, config=config, prompts=prompts, tokens=tokens, limit=longest[1], **sizes)


# ---------------------------------------------------------------------------------------------
# The rows: functions of the bench -> (what it was measured with, value, its unit, operations a second or None, the
# seconds of the whole model for all prompts or None)


def peak(bench):
    n, bars, device = bench.product, [], common.start_ranks().device
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    for _ in Clock(bars, range(33)):
        a @ b
    rate = 2 * n ** 3 * 30 / sum(bars[0][3:])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{n:,} x {n:,}, bf16, on {name}", rate / 1e12, "TFLOP/s", rate, None


def sample(bench):
    [batches], output = run_timed("02_generate.py", bench, input=bench.folder / "seed.jsonl", micro_batch_size=64,
                                  max_new_tokens=bench.limit)
    tokens, seconds = runs.read_record(output)["counts"]["tokens"], sum(batches)
    setting = f"64 prompts at a time, {tokens / bench.prompts / 2:.0f} tokens a response"
    return setting, tokens / seconds, "tokens/s", None, seconds


def judge(bench):
    for _ in range(2):
        bars, _ = run_timed("03_judge.py", bench, init_model=bench.folder / "init", input=bench.folder / "rows.jsonl",
                            micro_batch_size=16)
    seconds = sum(map(sum, bars))  # pi_{t-1}'s passes, and pi_init's
    rate = 4 * count_weights(bench.config) * bench.tokens / seconds
    return "16 prompts at a time", bench.prompts / seconds, "pairs/s", rate, seconds


def train(bench):
    config = MistralConfig(**bench.config.to_dict() | {"num_hidden_layers": bench.layers})
    config.save_pretrained(bench.folder / "model")
    (*_, steps), _ = run_timed("04_refined_dpo.py", bench, input=bench.folder / "rows.jsonl", epochs=2,
                               micro_batch_size=8, gradient_checkpointing=True)
    timed, layers = steps[len(steps) // 2:], bench.config.num_hidden_layers  # the second epoch has each pair once
    seconds = sum(timed)
    setting = f"{bench.layers} of {layers} layers, micro-batches of 8, {seconds / len(timed):.2f} s a step"
    rate = 8 * count_weights(config) * bench.tokens / seconds
    return setting, bench.tokens / seconds, "tokens/s", rate, seconds * layers / bench.layers


def measure(part, run, sizes, full=None):
    """(a line of the table, operations a second, hours for 10,000 prompts); None for what is not known.

    full: operations a second that are 100 %. Where the part fails, its line says why.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rate = hours = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            setting, value, unit, rate, seconds = run(make_bench(Path(folder), **sizes))
            value = f"{value:{',.0f' if value >= 100 else '.3g'}} {unit}"
            hours = seconds and seconds / sizes["prompts"] * 10_000 / 3600
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            cause = error.__context__ if isinstance(error, SystemExit) else error  # a stage exits with it
            setting, value = "", f"failed: {cause!r}"[:200].replace("|", "/")
    memory = torch.cuda.max_memory_allocated() / 2 ** 30  # 0 without a GPU
    gc.collect()
    torch.cuda.empty_cache()
    share, time_of_many = f"{rate / full:.0%}" if rate and full else "-", f"{hours:.2f}" if hours else "-"
    return f"| {part} | {setting} | {value} | {share} | {memory:.1f} | {time_of_many} |", rate, hours


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, on a CPU")
    args = parser.parse_args()
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        runs.exit_with("there is no GPU: --tiny tries everything on a CPU")
    sizes = TINY if args.tiny else FULL
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, transformers {transformers.__version__}\n\n"
          "| | Setting | Value | Share of the peak | Peak memory (GiB) | Hours for 10,000 prompts |")
    line, full, _ = measure("peak", peak, sizes)
    print(f"|---|---|---|---|---|---|\n{line}", flush=True)
    together = []
    for part, run in (("02", sample), ("03", judge), ("04", train)):
        line, _, hours = measure(part, run, sizes, full)
        print(line, flush=True)
        together.append(hours)
    if None not in together:
        print(f"\nAn iteration on 10,000 prompts: {sum(together):.2f} hours; the paper, on four A6000: 5 to 6")


if __name__ == "__main__":
    main()
