"""The stages on one GPU, an H100 or H200: speed, share of the card's peak, memory, in at most nine minutes.

    python benchmarks/gpu.py --output gpu.md
    python benchmarks/gpu.py --minutes 4 --only train-7b sample-7b judge-7b    # some parts
    python benchmarks/gpu.py --tiny                                            # on a CPU, to see that it works

Prints one Markdown table. Each part is a process of its own with a time limit: where one fails, its rows say why and
the others go on. What is timed are the stages themselves, run as they are on random tokens, but that models.load_model
makes random weights on the GPU from a config instead of reading 28 GB, and that a trained model is not saved. Loading
is not timed.

    peak        a product of two bf16 matrices: what 100 % means below
    train-*     01's and 04's step: tokens a second, a prompt counted once for both of its responses
    sample-*    02, transformers' generate and its continuous batching: sampled tokens a second
    compile-*   generate with a static cache, as it is and compiled; 02 with compiled norms and MLPs
    judge-*     03: pairs a second; the margins of a model against itself, and how far bf16 takes them from float32
    attention   one layer of the 7 B shape, forward and backward: sdpa with the mask of shared prompts, sdpa without
                sharing, flex_attention with a block mask
    trl-1b      TRL's DPO step, where TRL is installed
    estimate    one iteration of SPA on 10,000 prompts, from the rows of train-7b, sample-7b and judge-7b

1b is TinyLlama's shape and 7b Mistral-7B's. Prompts have 20 to 600 tokens (log-uniform), responses 20 to 300, 39 % of
them 300. The share of the peak counts for each token 6 N operations of the policy (N: its weights without the
embedding; the head's only where a response token is predicted) and 2 N of each further forward pass; attention,
recomputation and a prompt's second pass are not counted, so that settings compare. AdamW takes 16 bytes a parameter,
autocast's copy 2, 04's reference 4: where the 7 B shape does not fit, it has as many of its layers as do, which the row
says, and the estimate scales its seconds by the operations.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from shared import ROOT, SHAPE, make_inputs, read_rows, run_stage
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import common
from support import models, runs
import dpo
import sampling

TOKENS = dict(vocab_size=32000, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "1b": LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                      num_key_value_heads=4, max_position_embeddings=2048, **TOKENS),
    "7b": MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096, **TOKENS)}
TINY_CONFIG = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, sliding_window=64, **TOKENS | {"vocab_size": 100})
# tokens: longest prompt, responses are drawn up to and cut at; pairs of a step; steps, of which the first is not
# counted; most pairs of a forward pass {shape: (without, with activation checkpointing)}; prompts sampled at a time
FULL = SimpleNamespace(prompt=600, drawn=480, response=300, pairs=16, steps=4, micro={"1b": (8, 16), "7b": (1, 8)},
                       few=16, many=64, end_every=320, repeats=10, product=8192)
TINY = SimpleNamespace(prompt=24, drawn=24, response=6, pairs=4, steps=4, micro={"1b": (2, 4), "7b": (1, 4)},
                       few=2, many=4, end_every=20, repeats=2, product=64)


# ---------------------------------------------------------------------------------------------
# What is counted


def count_weights(config):
    """(weights of the layers, of the head): what multiplies each token, and each token that is predicted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = (layer.weight.numel() for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return model.num_parameters() - embedding - head, head


def operations(weights, pairs, passes):
    """Of a step on these pairs. passes: 6 for the policy, forward and backward, and 2 for each further forward pass"""
    (body, head), answers = weights, sum(len(pair[y]) for pair in pairs for y in ("chosen", "rejected"))
    return passes * (body * count_tokens(pairs) + head * answers)


def count_tokens(pairs):
    return sum(len(pair[key]) for pair in pairs for key in ("prompt", "chosen", "rejected"))


def layers_that_fit(config, bytes_a_weight, free):
    """How many of the config's layers can be trained in `free` bytes.

    Beside the weights 3 GB are set aside for logits and CUDA, and 0.5 GB a layer for the activations of a 7 B shape.
    """
    body, head = count_weights(config)
    room = free - 3e9 - bytes_a_weight * 2 * head  # the embedding is as large as the head
    fit = int(room // (bytes_a_weight * body / config.num_hidden_layers + 0.5e9))
    if fit < 1:
        raise RuntimeError(f"not one layer fits into {free / 2 ** 30:.0f} GiB")
    return min(fit, config.num_hidden_layers)


def estimate(rows):
    """[the row of one iteration on 10,000 prompts: 02, 03, 04 in turn, each at its best rate], [] without all."""
    best = defaultdict(float)
    for row in rows:
        if row["part"] in ("train-7b", "sample-7b", "judge-7b") and row.get("stage") in ("02", "03", "04"):
            best[row["stage"]] = max(best[row["stage"]], row["prompts_a_second"])
    if len(best) < 3:
        return []
    hours = {stage: 10_000 / best[stage] / 3600 for stage in sorted(best)}
    parts = ", ".join(f"{stage} {count:.2f} h" for stage, count in hours.items())
    return [{"part": "estimate", "shape": "7b", "value": sum(hours.values()), "unit": "hours",
             "setting": f"one iteration on 10,000 prompts: {parts}; the paper's: 5 to 6 hours on four A6000"}]


# ---------------------------------------------------------------------------------------------
# Running a stage


class Clock:
    """Seconds of each round, until the GPU is done, and its peak memory in GiB. dpo.run_trl takes it as turns."""

    def __init__(self):
        self.seconds, self.memory = [], 0.0

    def start(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def tick(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated() / 2 ** 30
        self.seconds.append(time.perf_counter() - self.last)
        self.last = time.perf_counter()

    def rounds(self, steps):
        self.start()
        for step in steps:
            yield step
            self.tick()

    before_first_step, after_step = start, tick

    def time_reference(self, store):  # not part of a step
        return store()


def repeat(run, repeats):
    """(median of the seconds, peak memory), after three runs that do not count."""
    clock = Clock()
    for _ in range(3):
        run()
    for _ in clock.rounds(range(repeats)):
        run()
    return statistics.median(clock.seconds), clock.memory


def random_model(name, device, dtype=torch.float32):
    """models.load_model with random weights, the same for a name each time; those of "pi" are near to "model"'s."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(models.load_config(name), dtype=torch.float32)
    for weight in model.requires_grad_(False).parameters():  # not model.to: it would round RoPE's frequencies too
        if Path(name).name == "pi":
            weight.add_(torch.randn_like(weight), alpha=1e-3)
        weight.data = weight.data.to(dtype)
    model = model.requires_grad_(True).eval()
    models.try_model(name, model)
    return model


def run_timed(script, change=lambda model: None, **options):
    """Run a stage. Returns {label of a progress bar: its Clock}, the rows of each training step, the output's path.

    change: called with each model that is loaded
    """
    clocks, logged, output = defaultdict(Clock), [], Path(tempfile.mkdtemp()) / "out"

    def load_model(*args):
        model = random_model(*args)
        change(model)
        return model

    def progress(steps, label, ranks):
        return clocks[label].rounds(steps)

    with (contextlib.redirect_stdout(sys.stderr), mock.patch.object(sys, "argv", []),
          mock.patch.multiple(runs, exit_with=lambda message, status=2: sys.exit(str(message)), progress=progress),
          mock.patch.multiple(common, load_model=load_model, save_trained=lambda *_: None, progress=progress,
                              log_step=lambda partial, bar, step, rows, **_: logged.append(rows))):
        run_stage(script, output=output, **options)
    return clocks, logged, output


class Bench:
    """What a part measures with: a shape, its size of everything, and the files of the stages in a folder."""

    def __init__(self, shape, tiny, folder):
        self.shape, self.folder, self.size = shape, Path(folder), TINY if tiny else FULL
        self.config = type(CONFIGS[shape])(**TINY_CONFIG) if tiny else CONFIGS[shape]
        self.device = common.start_ranks().device
        self.compiler = "inductor" if self.device.type == "cuda" else "eager"  # the second only traces
        count = max(self.size.pairs * self.size.steps, self.size.many)
        with mock.patch.dict(SHAPE, vocab_size=self.config.vocab_size):  # of this model only the tokenizer is used
            make_inputs(self.folder, count, (self.size.prompt, self.size.drawn), hidden_size=8, num_hidden_layers=1)
        self.ends = range(2, self.config.vocab_size, self.size.end_every)
        GenerationConfig(eos_token_id=list(self.ends)).save_pretrained(self.folder / "model")
        self.config.save_pretrained(self.folder / "model")
        (self.folder / "pi").symlink_to("model")
        self.pairs = [{"id": row["id"], "prompt": row["prompt_ids"],
                       **{y: row[y]["ids"][:self.size.response] for y in ("chosen", "rejected")}}
                      for row in read_rows(self.folder / "preferences.jsonl")]

    def write(self, name, count):
        """The path of the first `count` pairs: "seed" with texts, for 01 and TRL, or "rows" with ids, for 02 to 04."""
        def text(ids):
            return " ".join(f"w{i}" for i in ids)

        path = self.folder / f"{name}.jsonl"
        with open(path, "w") as file:
            for pair in self.pairs[:count]:
                if name == "seed":
                    fields = {y: text(pair[y][:-1]) for y in ("chosen", "rejected")}
                else:
                    one, two = ({"text": "", "ids": pair[y], "finish": "eos"} for y in ("chosen", "rejected"))
                    fields = {"prompt_ids": pair["prompt"], "responses": [one, two], "chosen": one, "rejected": two}
                print(json.dumps({"id": pair["id"], "prompt": text(pair["prompt"]), **fields}), file=file)
        return path


# ---------------------------------------------------------------------------------------------
# The parts. Each yields (setting, function that returns the fields of its row), to be called before the next.


def peak(bench):
    n = bench.size.product
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"

    def product():
        a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16)
        seconds, _ = repeat(lambda: a @ b, 30)
        rate = 2 * n ** 3 / seconds
        return {"shape": "-", "value": rate / 1e12, "unit": "TFLOP/s", "rate": rate}

    yield f"bf16 product of {n:,} x {n:,} on {name}", product


def train(bench):
    for stage in ("01", "04"):
        for checkpointing in (False, True):
            for shared in (True, False):
                micro = bench.size.micro[bench.shape][checkpointing]
                yield (f"{stage}, {'shared prompt' if shared else 'one sequence each'}, "
                       f"{'' if checkpointing else 'no '}activation checkpointing, micro-batch {micro}",
                       lambda: train_stage(bench, stage, checkpointing, shared, micro))


def train_stage(bench, stage, checkpointing, shared, micro):
    script, label, file, passes, bytes_a_weight, options = {
        "01": ("01_seed_dpo.py", "seed DPO", "seed", 6, 18, dict(epochs=1)),
        "04": ("04_refined_dpo.py", "refined DPO", "rows", 8, 22, dict(refine_after=0, window=bench.size.pairs))}[stage]
    if checkpointing:
        options["activation_checkpointing"] = True
    free = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 1e12
    full, layers = bench.config.num_hidden_layers, layers_that_fit(bench.config, bytes_a_weight, free)
    config = type(bench.config).from_dict(bench.config.to_dict() | {"num_hidden_layers": layers})
    config.save_pretrained(bench.folder / "model")

    def change(model):
        if not shared:
            model.max_shared_length = 0

    clocks, logged, _ = run_timed(script, change, model=bench.folder / "model", micro_batch_size=micro,
                                  input=bench.write(file, bench.size.pairs * bench.size.steps),
                                  batch_size=bench.size.pairs, **options)
    first = max(abs(row["margin"]) for row in logged[0])  # of a model and itself
    steps = [[bench.pairs[int(row["id"])] for row in rows] for rows in logged]
    note = f", {layers} of {full} layers" if layers < full else ""
    return {"note": f"{note}; first margins at most {first:.2g}", "stage": stage,
            **step_rates(bench, clocks[label], steps, config, passes)}


def step_rates(bench, clock, steps, config, passes):
    """The fields of a row. steps: the pairs of each step; config: with the layers that were measured"""
    weights, full = count_weights(config), count_weights(bench.config)
    counted = list(zip(steps, clock.seconds, strict=True))[1:]
    rate = statistics.median(operations(weights, pairs, passes) / seconds for pairs, seconds in counted)
    work = statistics.mean(operations(full, pairs, passes) for pairs, _ in counted) / bench.size.pairs  # of a prompt
    return {"value": statistics.median(count_tokens(pairs) / seconds for pairs, seconds in counted), "unit": "tokens/s",
            "rate": rate, "memory": clock.memory, "prompts_a_second": rate / work}


def trl(bench):
    yield ("TRL: DPOConfig() but for dtype and batch, which checkpoints activations",
           lambda: trl_steps(bench, True, 8))
    yield ("TRL: precomputed reference log-probs, no activation checkpointing",
           lambda: trl_steps(bench, False, 6, precompute_ref_log_probs=True, gradient_checkpointing=False))


def trl_steps(bench, checkpointing, passes, **options):
    import trl
    pairs, count, clock, config = bench.size.pairs, bench.size.pairs * bench.size.steps, Clock(), trl.DPOConfig
    micro = bench.size.micro[bench.shape][checkpointing]
    load = SimpleNamespace(from_pretrained=lambda name, **_: random_model(str(name), bench.device))
    bench.write("seed", count)

    class Trainer(trl.DPOTrainer):
        def __init__(self, model, **given):
            super().__init__(model, load.from_pretrained(bench.folder / "model"), **given)

    with (contextlib.redirect_stdout(sys.stderr),
          mock.patch.multiple(dpo, LlamaForCausalLM=load, PAIRS=pairs, MICRO_BATCH=micro),
          mock.patch.object(trl, "DPOConfig", lambda **given: config(**given | {"bf16": bench.device.type == "cuda"})),
          mock.patch.object(trl, "DPOTrainer", Trainer)):
        dpo.run_trl(bench.folder, clock, **options)
    steps = [bench.pairs[k:k + pairs] for k in range(0, count, pairs)]
    return {"note": f", micro-batch {micro}", **step_rates(bench, clock, steps, bench.config, passes)}


def sample(bench):
    few, many = bench.size.few, bench.size.many
    yield f"02_generate.py, {few} prompts at a time", lambda: sample_stage(bench, 2 * few, few)
    yield f"02_generate.py, {many} prompts at a time", lambda: sample_stage(bench, many, many)
    yield f"generate, {many} at a time", lambda: sample_with(bench, generate)
    yield f"generate_batch (continuous batching), {many} at a time", lambda: sample_with(
        bench, lambda model, prompts: sampling.by_generate_batch(model, prompts, sampling.drawn()))


def compiled(bench):
    many = bench.size.many

    def compile_parts(model):  # which the cache has no part in: else they would be compiled anew as it grows
        for layer in model.base_model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile(dynamic=True, backend=bench.compiler)
        sampling.by_common(model, [pair["prompt"] for pair in bench.pairs[:many]], [range(many)], 0, limit=3)

    yield f"generate, {many} at a time, static cache", lambda: sample_with(
        bench, generate, cache_implementation="static", disable_compile=True)
    yield (f"02_generate.py, {many} prompts at a time, norms and MLPs compiled",
           lambda: sample_stage(bench, many, many, compile_parts))
    yield f"generate, {many} at a time, static cache, compiled", lambda: sample_with(
        bench, generate, warm_up=True, cache_implementation="static")


def sample_stage(bench, prompts, at_a_time, change=lambda model: None):
    clocks, _, output = run_timed("02_generate.py", change, model=bench.folder / "model", micro_batch_size=at_a_time,
                                  input=bench.write("rows", prompts), max_new_tokens=bench.size.response)
    tokens = json.loads(runs.args_path(output).read_text())["counts"]["tokens"]
    return {"stage": "02", **sampling_rates(clocks["sampling"], prompts, tokens)}


def sampling_rates(clock, prompts, tokens):
    seconds = sum(clock.seconds)
    return {"value": tokens / seconds, "unit": "tokens/s", "memory": clock.memory,
            "note": f", {tokens / prompts / sampling.SAMPLES:.0f} tokens a response",
            "prompts_a_second": prompts / seconds}


def generate(model, prompts, **options):
    def on_device(ids, attention_mask, **config):  # by_generate makes them on the CPU
        return model.generate(ids.to(model.device), attention_mask=attention_mask.to(model.device), **config)

    return sampling.by_generate(SimpleNamespace(generate=on_device), prompts, [range(len(prompts))],
                                sampling.drawn(**options))


def sample_with(bench, run, warm_up=False, **options):
    """run: function of the model, the prompts and the options, {index of a prompt: its responses}"""
    model = random_model(str(bench.folder / "model"), bench.device, common.scoring_dtype(bench.device))
    prompts, clock = [pair["prompt"] for pair in bench.pairs[:bench.size.many]], Clock()
    with mock.patch.multiple(sampling, EOS=bench.ends, LIMIT=bench.size.response, BATCH=bench.size.many):
        if warm_up:
            run(model, prompts, **options)
        clock.start()
        responses = run(model, prompts, **options)
        clock.tick()
    return sampling_rates(clock, len(prompts), sum(len(ids) for of_prompt in responses.values() for ids in of_prompt))


def judge(bench):
    yield f"03_judge.py, {bench.size.few} prompts at a time", lambda: judge_stage(bench)
    yield "largest margin of a model against itself, bf16", lambda: {
        "value": max(map(abs, margins(bench, torch.bfloat16, "pi"))), "unit": "nats"}
    yield "largest difference of a margin, bf16 to float32", lambda: margin_by_dtype(bench)


def judge_stage(bench):
    count, seconds = bench.size.many, []
    for _ in range(3):
        clocks, *_ = run_timed("03_judge.py", model=bench.folder / "pi", init_model=bench.folder / "model",
                               input=bench.write("rows", count), micro_batch_size=bench.size.few)
        seconds.append(sum(sum(clock.seconds) for clock in clocks.values()))
    rate = count / statistics.median(seconds[1:])
    work = operations(count_weights(bench.config), bench.pairs[:count], 4) / count  # two models' forward passes
    return {"stage": "03", "value": rate, "unit": "pairs/s", "rate": rate * work, "prompts_a_second": rate,
            "memory": max(clock.memory for clock in clocks.values())}


def margins(bench, dtype, init_model):
    """The argument of the sigmoid in Eq. 7 of some pairs, by the functions of 03."""
    path = bench.write("rows", bench.size.few)
    args = SimpleNamespace(model=str(bench.folder / "pi"), init_model=str(bench.folder / init_model), beta=0.1,
                           input=path, micro_batch_size=bench.size.few)
    stage = runpy.run_path(str(ROOT / "03_judge.py"))
    with mock.patch.multiple(common, load_model=random_model, scoring_dtype=lambda device: dtype):
        rewards, _ = stage["judge_by_likelihood"](read_rows(path), args, Path(tempfile.mkdtemp()), common.start_ranks())
    return [one - two for one, two in rewards]


def margin_by_dtype(bench):
    bf16, exact = (margins(bench, dtype, "model") for dtype in (torch.bfloat16, torch.float32))
    flipped = sum(a * b < 0 for a, b in zip(bf16, exact))
    return {"value": max(abs(a - b) for a, b in zip(bf16, exact, strict=True)), "unit": "nats",
            "note": f" (median margin {statistics.median(map(abs, exact)):.2g}; {flipped} of {len(exact)} labels flip)"}


def attention(bench):
    """One layer's attention on the same random states. On a CPU flex_attention has no backward pass: forward alone."""
    config, device, on_gpu = bench.config, bench.device, bench.device.type == "cuda"
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    rows = [(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in bench.pairs[:8]]
    shared, alone = common.collate(rows, device, math.inf), common.collate(rows, device)
    batch, length = shared.ids.shape
    # of each token who sees it: 0 all, k the k-th response; index: where those of a sequence of its own stand
    segments = [[0] * len(x) + [k for k, y in enumerate(ys, 1) for _ in y[:-1]] for x, ys in rows]
    index = common.padded([[b * length + j for j, k in enumerate(segment) if k in (0, own)]
                           for b, segment in enumerate(segments) for own in (1, 2)]).to(device)
    segments = common.padded(segments, fill=-1).to(device)
    torch.manual_seed(0)
    states = [torch.randn(batch, n, length, config.hidden_size // heads, device=device,
                          dtype=common.scoring_dtype(device)) for n in (heads, heads // groups, heads // groups)]
    layer = SimpleNamespace(num_key_value_groups=groups, is_causal=True)  # what transformers asks of the module

    def seen(b, _, q, k):
        return (k <= q) & ((segments[b, k] == 0) | (segments[b, k] == segments[b, q]))

    blocks = create_block_mask(seen, batch, None, length, length, device=device.type)
    flex = torch.compile(flex_attention, dynamic=False, backend=bench.compiler)

    def by_sdpa(of, *states):
        return sdpa_attention_forward(layer, *states, of.mask)[0]  # (B, T, heads, d)

    def by_flex(of, *states):
        return flex(*states, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    def answers(attend, of, states):
        return attend(of, *states).flatten(0, 1)[of.logit_positions].float()

    expected = answers(by_sdpa, shared, [s.float() for s in states])

    def time_layer(attend, of):
        values = states if of is shared else [s.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2) for s in states]
        values = [s.detach().contiguous().requires_grad_(on_gpu) for s in values]

        def step():
            out = attend(of, *values)
            if on_gpu:
                out.backward(out.detach())

        kernel = KernelName()
        with contextlib.nullcontext() if attend is by_flex else kernel:
            error = (answers(attend, of, values) - expected).abs().max().item()
        seconds, memory = repeat(step, bench.size.repeats)
        name = "" if attend is by_flex else f", kernel: {kernel.name}"
        return {"value": 1000 * seconds, "unit": "ms a layer", "memory": memory,
                "note": f"{name}; at most {error:.1g} from float32"}

    direction = "forward and backward" if on_gpu else "forward"
    for name, attend, of in (("shared prompts, sdpa with their mask", by_sdpa, shared),
                             ("one sequence each, sdpa", by_sdpa, alone),
                             ("shared prompts, flex_attention with a block mask", by_flex, shared)):
        yield f"{name}, {len(rows)} pairs, {direction}", lambda: time_layer(attend, of)


class KernelName(TorchDispatchMode):
    """Which of sdpa's kernels is called in this context; "math" is many operations."""
    name = "math"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in function.__name__:
            self.name = function.__name__.strip("_").removeprefix("scaled_dot_product_").split(".")[0]
        return function(*args, **kwargs or {})


PARTS = {  # function, shape, most seconds; what matters most comes first
    "peak": (peak, "7b", 45),
    "train-7b": (train, "7b", 150),
    "sample-7b": (sample, "7b", 110),
    "judge-7b": (judge, "7b", 70),
    "train-1b": (train, "1b", 90),
    "judge-1b": (judge, "1b", 45),
    "attention": (attention, "7b", 60),
    "sample-1b": (sample, "1b", 80),
    "trl-1b": (trl, "1b", 70),
    "compile-1b": (compiled, "1b", 90),
    "compile-7b": (compiled, "7b", 120)}


# ---------------------------------------------------------------------------------------------
# Running the parts


def failed(part, message, setting=""):
    line, *_ = message.strip().split("\n")
    return {"part": part, "shape": PARTS[part][1], "setting": setting, "failed": line[:200].replace("|", "/")}


def measure(part, tiny):
    """Yields the rows of a part: where one fails, it says why."""
    function, shape, _ = PARTS[part]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        for setting, run in function(Bench(shape, tiny, folder)):
            try:
                fields = run()
                row = {"part": part, "shape": shape, "setting": setting + fields.pop("note", ""), **fields}
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                no_room = isinstance(error, torch.OutOfMemoryError)
                row = failed(part, "out of memory" if no_room else f"{type(error).__name__}: {error}", setting)
            gc.collect()
            torch.cuda.empty_cache()
            yield row


def in_a_process(part, seconds, tiny=False):
    """The rows of a part, by a process that is stopped after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, log, message = Path(folder) / "rows.jsonl", Path(folder) / "log", None
        out.touch()
        with open(log, "w") as file:
            process = subprocess.Popen([sys.executable, __file__, "--worker", part, out, *["--tiny"] * tiny],
                                       stdout=file, stderr=file, start_new_session=True,
                                       env=os.environ | {"TMPDIR": folder, "HF_HUB_OFFLINE": "1"})
        try:
            if process.wait(seconds):
                message = log.read_text().strip().split("\n")[-1] or f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            message = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the processes that compile for it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows = read_rows(out) + ([failed(part, message)] if message else [])
        if any("failed" in row for row in rows):
            print(log.read_text()[-5000:], file=sys.stderr)
        return rows


def run_parts(names, tiny=False, minutes=9):
    """Yields all rows so far after each part: first those of peak, which the table needs, at last the estimate too."""
    deadline, rows = time.monotonic() + 60 * minutes, []
    for part in [name for name in PARTS if name == "peak" or name in names]:
        seconds = min(PARTS[part][2], deadline - time.monotonic())
        print(f"{part} ...", file=sys.stderr)
        if seconds < 5:
            rows.append(failed(part, f"no time is left: --only {part}"))
        else:
            rows += measure(part, tiny) if tiny else in_a_process(part, seconds)
        yield rows
    yield rows + estimate(rows)


def table(rows):
    """Markdown, with the versions above."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")
                         if importlib.util.find_spec(name))
    lines = [f"{time.strftime('%Y-%m-%d')}, {versions}", "",
             "| Part | Shape | Setting | Value | Share of the peak | Peak memory (GiB) |", "|---|---|---|---|---|---|"]
    full = next((row["rate"] for row in rows if row["part"] == "peak" and "rate" in row), math.inf)
    for row in rows:
        if "failed" in row:
            value = f"failed: {row['failed']}"
        else:
            value = f"{row['value']:{',.0f' if row['value'] >= 100 else '.3g'}} {row['unit']}"
        share = f"{row['rate'] / full:.0%}" if "rate" in row and full < math.inf else "-"
        memory = f"{row['memory']:.1f}" if row.get("memory") else "-"
        lines.append(f"| {row['part']} | {row['shape']} | {row['setting']} | {value} | {share} | {memory} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, help="write the table there too, after each part")
    parser.add_argument("--minutes", type=float, default=9, help="of all parts; those left over are not run")
    parser.add_argument("--tiny", action="store_true", help="shapes of some thousand weights on a CPU, in one process")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU: --tiny tries everything on a CPU")
    logging.disable()  # of continuous batching, which misses psutil
    if args.worker:
        part, path = args.worker
        with open(path, "w") as file:
            for row in measure(part, args.tiny):
                print(json.dumps(row), file=file, flush=True)
        return
    for rows in run_parts(args.only, args.tiny, args.minutes):
        if args.output:
            args.output.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
