"""The stages on one GPU, an H100 or H200: speed, share of the card's peak, memory. Takes at most nine minutes.

    python benchmarks/gpu.py > gpu.md
    python benchmarks/gpu.py --only train-7b judge-7b    # some parts
    python benchmarks/gpu.py --tiny                      # on a CPU, to see that it works

Prints a Markdown table. Each part is a process of its own with a time limit; what fails is a row that says why.

    peak        a product of two bf16 matrices: what 100 % means below
    train-7b    01 and 04, with and without checkpointing: tokens a second, a prompt counted once for both responses
    sample-7b   02, and transformers' generate on the same prompts: sampled tokens a second
    judge-7b    03: pairs a second
    estimate    one iteration of SPA on 10,000 prompts, from the fastest row of each of 02, 03 and 04

The stages are run as they are, but a model gets random weights on the GPU instead of 29 GB from the disk, and a trained
model is not saved. Loading is not timed; of 01 and 04 the second epoch is, of 03 the second run. The model has
Mistral-7B's shape. 64 prompts have 20 to 600 random tokens (log-uniform) and two responses of 20 to 300 each (uniform).
What is sampled ends with about one token in 200, or at 300 tokens: after some 156 on average.

The share of the peak counts 6 N operations of the policy for each token, and 2 N of each further forward pass. N is the
number of weights without the embedding; those of the head count only where a response token is predicted. Attention and
recomputation are not counted, so that settings compare.

AdamW takes 16 bytes a weight, autocast's copy 2, 04's reference 4. Where the model does not fit, as many layers as do
are trained ("13 of 32 layers"), and the estimate scales their time by the operations. Memory is of the whole stage.
"""

import argparse
import gc
import json
import os
import subprocess
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

# longest: tokens of a prompt, of a response; product: width of the matrices of `peak`
FULL = dict(prompts=64, longest=(600, 300), product=8192, shape=dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8))
TINY = dict(prompts=4, longest=(24, 24), product=64, shape=dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
EOS = list(range(2, SHAPE["vocab_size"], 200))  # what ends a sampled response
HOURS = 10_000 / 3600  # that 10,000 prompts take, for each second that one takes


# ---------------------------------------------------------------------------------------------
# What is counted


def count_weights(config):
    """(weights of the layers, of the head): what each token passes, and each token that is predicted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = (layer.weight.numel() for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return model.num_parameters() - embedding - head, head


def operations(config, bench, passes):
    """Of all pairs. passes: 6 for the policy, forward and backward, and 2 for each further forward pass"""
    body, head = count_weights(config)
    return passes * (body * bench.tokens + head * bench.response_tokens)


def layers_that_fit(config, bytes_a_weight, free):
    """How many layers of the config can be trained in `free` bytes. Raises RuntimeError where not one can.

    3 GB are set aside for logits and CUDA, and 0.5 GB a layer for activations.
    """
    body, head = count_weights(config)
    room = free - 3e9 - bytes_a_weight * 2 * head  # the embedding is as large as the head
    fit = int(room // (bytes_a_weight * body / config.num_hidden_layers + 0.5e9))
    if fit < 1:
        raise RuntimeError(f"not one layer fits into {free / 2 ** 30:.0f} GiB")
    return min(fit, config.num_hidden_layers)


def estimate(rows):
    """[the row of 02, 03 and 04 in turn, each as in its fastest row], [] where one of them has no row."""
    hours = [min((row["hours"] for row in rows if row.get("stage") == k), default=0) for k in ("02", "03", "04")]
    if not all(hours):
        return []
    setting = "10,000 prompts: 02 {:.2f} h, 03 {:.2f} h, 04 {:.2f} h; the paper: 5 to 6 h on four A6000".format(*hours)
    return [{"part": "estimate", "setting": setting, "value": sum(hours), "unit": "hours"}]


# ---------------------------------------------------------------------------------------------
# Running a stage


def now():
    """Seconds, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """In the place of a stage's progress bar. Appends to `bars` the list of the seconds of its rounds."""

    def __init__(self, bars, rounds, **_):
        self.rounds, self.seconds = rounds, []
        bars.append(self.seconds)

    def __iter__(self):
        for value in self.rounds:
            started = now()
            yield value
            self.seconds.append(now() - started)

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
          mock.patch.object(runs, "tqdm", partial(Clock, bars))):
        run_stage(script, model=bench.folder / "model", output=output, **options)
    return bars, output


def make_bench(folder, prompts, longest, product, shape):
    """What a part measures with. 01 and 02 read seed.jsonl (texts), 03 and 04 rows.jsonl (the same as token ids)."""
    make_inputs(folder, prompts, longest, hidden_size=8, num_hidden_layers=1)  # this model's weights are not used
    config = MistralConfig(**SHAPE | shape)
    config.save_pretrained(folder / "model")
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder / "model")
    (folder / "init").symlink_to("model")
    rows = [row | {"prompt": "x", "responses": [row["chosen"], row["rejected"]]}
            for row in read_rows(folder / "preferences.jsonl")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, responses = [row["prompt_ids"] for row in rows], [y["ids"] for row in rows for y in row["responses"]]
    return SimpleNamespace(folder=folder, config=config, prompts=prompts, response_tokens=sum(map(len, responses)),
                           tokens=sum(map(len, prompts + responses)), limit=longest[1], product=product,
                           device=common.start_ranks().device)


# ---------------------------------------------------------------------------------------------
# The parts: functions of the bench that return the fields of a row. "note" is added to the row's setting.


def peak(bench):
    n, bars = bench.product, []
    a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16)
    for _ in Clock(bars, range(33)):
        a @ b
    rate = 2 * n ** 3 * 30 / sum(bars[0][3:])
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    return {"value": rate / 1e12, "unit": "TFLOP/s", "rate": rate, "note": f" of {n:,} x {n:,} on {name}"}


def train(stage, bench, **options):
    """Two epochs of a stage, with as many layers as fit."""
    script, file, passes, bytes_a_weight = {"01": ("01_seed_dpo.py", "seed.jsonl", 6, 18),
                                            "04": ("04_refined_dpo.py", "rows.jsonl", 8, 22)}[stage]
    free = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 1e12
    full, layers = bench.config, layers_that_fit(bench.config, bytes_a_weight, free)
    config = MistralConfig(**full.to_dict() | {"num_hidden_layers": layers})
    config.save_pretrained(bench.folder / "model")
    (*_, steps), _ = run_timed(script, bench, input=bench.folder / file, epochs=2, **options)
    seconds = sum(steps[len(steps) // 2:])  # the second epoch has each pair once
    work, full_work = (operations(of_layers, bench, passes) for of_layers in (config, full))
    return {"stage": stage, "value": bench.tokens / seconds, "unit": "tokens/s", "rate": work / seconds,
            "hours": HOURS * seconds / len(bench.prompts) * full_work / work,
            "note": f", {layers} of {full.num_hidden_layers} layers"}


def sample(micro_batch_size, bench):
    [batches], output = run_timed("02_generate.py", bench, input=bench.folder / "seed.jsonl",
                                  micro_batch_size=micro_batch_size, max_new_tokens=bench.limit)
    tokens, seconds = json.loads(runs.args_path(output).read_text())["counts"]["tokens"], sum(batches)
    return {"stage": "02", "value": tokens / seconds, "unit": "tokens/s", "hours": HOURS * seconds / len(bench.prompts),
            "note": f", {tokens / len(bench.prompts) / 2:.0f} tokens a response"}


def generate(bench):
    """Two responses to each prompt, with the weights and options of 02."""
    model = random_weights(AutoModelForCausalLM, "model", "", bench.config, common.scoring_dtype(bench.device)).eval()
    ids = common.padded(bench.prompts, side="left").to(bench.device)  # no prompt has a 0
    started = now()
    out = model.generate(ids, attention_mask=(ids != 0).long(), do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
                         num_return_sequences=2, max_new_tokens=bench.limit, eos_token_id=EOS, pad_token_id=0)
    seconds = now() - started
    ends = torch.isin(out[:, ids.shape[1]:], torch.tensor(EOS, device=bench.device)).int()
    tokens = (ends.cumsum(1) - ends == 0).sum().item()  # up to the first end of a response, with it
    return {"value": tokens / seconds, "unit": "tokens/s",
            "note": f", {tokens / len(bench.prompts) / 2:.0f} tokens a response"}


def judge(bench):
    for _ in range(2):
        bars, _ = run_timed("03_judge.py", bench, init_model=bench.folder / "init", input=bench.folder / "rows.jsonl",
                            micro_batch_size=16)
    seconds, count = sum(map(sum, bars)), len(bench.prompts)  # pi_{t-1}'s passes, and pi_init's
    return {"stage": "03", "value": count / seconds, "unit": "pairs/s", "hours": HOURS * seconds / count,
            "rate": operations(bench.config, bench, 4) / seconds}


PARTS = {  # most seconds; {setting: function}
    "peak": (45, {"product of bf16 matrices": peak}),
    "train-7b": (240, {
        "01, no checkpointing, micro-batch 1": partial(train, "01", micro_batch_size=1),
        "01, checkpointing, micro-batch 8": partial(train, "01", micro_batch_size=8, gradient_checkpointing=True),
        "04, no checkpointing, micro-batch 1": partial(train, "04", micro_batch_size=1),
        "04, checkpointing, micro-batch 8": partial(train, "04", micro_batch_size=8, gradient_checkpointing=True)}),
    "sample-7b": (150, {
        "02, 16 prompts at a time": partial(sample, 16),
        "02, 64 prompts at a time": partial(sample, 64),
        "transformers' generate, 64 prompts at a time": generate}),
    "judge-7b": (100, {"03, 16 prompts at a time": judge})}


# ---------------------------------------------------------------------------------------------
# Running the parts


def measure(part, folder, sizes):
    """Yields the rows of a part. Where a setting fails, its row says why."""
    for setting, run in PARTS[part][1].items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        row = {"part": part, "setting": setting}
        try:
            fields = run(make_bench(Path(tempfile.mkdtemp(dir=folder)), **sizes))
            row |= fields | {"setting": setting + fields.get("note", "")}
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row["failed"] = repr(error.__context__ if isinstance(error, SystemExit) else error)  # a stage exits with it
        yield row | {"memory": torch.cuda.max_memory_allocated() / 2 ** 30}  # 0 without a GPU
        gc.collect()
        torch.cuda.empty_cache()


def in_a_process(part, seconds, tiny):
    """The rows of a part, by a process that is stopped after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", part, folder, *["--tiny"] * tiny]
        env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=seconds, env=env)
            failed = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"stopped after {seconds} s"
        out = Path(folder) / "out.jsonl"
        rows = read_rows(out) if out.exists() else []
        return rows + ([{"part": part, "setting": "", "failed": failed}] if failed else [])


def run_parts(names, tiny=False):
    """Yields the rows: first those of peak, which the table needs, at last the estimate's."""
    rows = []
    for part in [part for part in PARTS if part == "peak" or part in names]:
        print(f"{part} ...", file=sys.stderr)
        rows += (of_part := in_a_process(part, 600 if tiny else PARTS[part][0], tiny))
        yield from of_part
    yield from estimate(rows)


def table(rows):
    """Yields the lines of a Markdown table, with the versions above it."""
    yield f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, transformers {transformers.__version__}"
    yield "\n| Part | Setting | Value | Share of the peak | Peak memory (GiB) |\n|---|---|---|---|---|"
    full = None
    for row in rows:
        full = row.get("rate") if row["part"] == "peak" else full
        value = (f"failed: {row['failed'][:200].replace('|', '/')}" if "failed" in row else
                 f"{row['value']:{',.0f' if row['value'] >= 100 else '.3g'}} {row['unit']}")
        share = f"{row['rate'] / full:.0%}" if full and "rate" in row else "-"
        memory = f"{row['memory']:.1f}" if row.get("memory") else "-"
        yield f"| {row['part']} | {row['setting']} | {value} | {share} | {memory} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, on a CPU")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with open(f"{args.worker[1]}/out.jsonl", "w", buffering=1) as out:  # a line at a time
            for row in measure(*args.worker, TINY if args.tiny else FULL):
                print(json.dumps(row), file=out)
    elif not args.tiny and not torch.cuda.is_available():
        runs.exit_with("there is no GPU: --tiny tries everything on a CPU")
    else:
        for line in table(run_parts(args.only, args.tiny)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
