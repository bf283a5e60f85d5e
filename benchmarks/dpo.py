"""The DPO step beside TRL's DPOTrainer and a plain loop: same model, pairs, order, dtype, batch, threads and losses.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/dpo.py --trl .venv-trl/bin/python               # on a CPU
    python benchmarks/dpo.py --trl .venv-trl/bin/python --steps 4     # quicker

Each competitor is a process of its own that takes one optimizer step at a time, in turn with the others, so that a busy
machine slows them alike; a ratio is of two steps that stand next to each other. Memory is the largest resident size of
the process, with Python and its libraries. The plain loop is what the reference implementation of DPO does: chosen and
rejected in one batch padded to the longest, whole logits of policy and reference.

    01            01_seed_dpo.py, reference log-probs stored (before the first step, and not timed)
    04 warm-up    04_refined_dpo.py before labels are refined
    04            04_refined_dpo.py with de-coupled noise detection, the reference live
    live          01's step with a live reference: what 04 is measured against
    prompt twice  01 that computes a prompt for each of its two responses
    logits twice  01 that makes the logits again on the way back, in chunks of 256 tokens
    TRL           DPOConfig() but for the settings above (its activation checkpointing is on)
    TRL best      precomputed reference log-probs, no activation checkpointing
    plain         the plain loop

A Llama of 23 M parameters with random weights (8 layers, width 256, 32,000 words), prompts of 20 to 600 tokens
(log-uniform), responses of 20 to 300.
"""

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPE = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
             vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
PAIRS, MICRO_BATCH, LR, BETA = 8, 2, 1e-5, 0.1  # of an optimizer step, of a forward pass
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}"


# ---------------------------------------------------------------------------------------------
# Inputs


def make_inputs(folder, pairs, longest=(600, 300)):
    """A model and preferences as texts and as token ids, in the order in which they are trained on -> its parameters.

    longest: tokens of a prompt, of a response
    """
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, SHAPE["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                            chat_template=TEMPLATE).save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(3, SHAPE["vocab_size"], int(count)).tolist()

    rows = [{"id": str(k), "prompt": ids(np.exp(rng.uniform(*np.log([20, longest[0]])))),
             "chosen": ids(rng.integers(20, longest[1])), "rejected": ids(rng.integers(20, longest[1]))}
            for k in range(pairs)]
    with open(folder / "seed.jsonl", "w") as texts, open(folder / "preferences.jsonl", "w") as tokens:
        for row in rows:
            said = {key: " ".join(f"w{i}" for i in row[key]) for key in ("prompt", "chosen", "rejected")}
            texts.write(json.dumps({"id": row["id"], **said}) + "\n")
            answers = {key: {"text": "", "ids": row[key] + [2], "finish": "eos"} for key in ("chosen", "rejected")}
            tokens.write(json.dumps({"id": row["id"], "prompt_ids": row["prompt"], **answers}) + "\n")
    return model.num_parameters()


# ---------------------------------------------------------------------------------------------
# Competitors: each calls `after_step(loss)` once a step, which waits until it is its turn again.


def wait():
    """Until the parent process asks for the next step."""
    if not sys.stdin.readline():
        os._exit(0)


class Turns:
    def __init__(self):
        self.started = None

    def before_first_step(self):
        print("ready", file=self.out, flush=True)
        wait()
        self.started = time.perf_counter()

    def after_step(self, loss):
        seconds = time.perf_counter() - self.started
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak / 2 ** 20}), file=self.out, flush=True)
        wait()
        self.started = time.perf_counter()

    out = sys.stdout


def run_stage(name, folder, turns, **options):
    """A stage as it is, but that it waits at the end of each step, and takes the pairs in the order of the file."""
    import common
    real_steps, real_log = common.progress, common.log_step

    def progress(steps, label, ranks):
        if isinstance(steps, range):
            turns.before_first_step()
        return real_steps(steps, label, ranks)

    def log_step(partial, bar, step, rows, **more):
        real_log(partial, bar, step, rows, **more)
        turns.after_step(sum(row["loss"] for row in rows) / len(rows))

    common.progress, common.log_step = progress, log_step
    common.epoch_batches = lambda count, size, epochs, seed: [list(range(i, i + size)) for i in range(0, count, size)]
    options |= dict(model=folder / "model", output=tempfile.mkdtemp() + "/out", lr=LR, beta=BETA, batch_size=PAIRS,
                    micro_batch_size=MICRO_BATCH, epochs=1)
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


def run_live(folder, turns):
    """01's step that also runs pi_ref, as 04 has to."""
    import torch

    import common
    real = common.load_policy

    def load_policy(args, ranks):
        model, policy = real(args, ranks)
        ref = common.load_reference(args.model, args, ranks)

        def with_reference(batch):
            with torch.no_grad():
                ref(batch)
            return policy(batch)
        return model, with_reference
    common.load_policy = load_policy
    run_stage("01_seed_dpo", folder, turns, input=folder / "seed.jsonl")


def run_without(folder, turns, **replaced):
    """01 with something of common.py replaced."""
    import common
    vars(common).update(replaced)
    run_stage("01_seed_dpo", folder, turns, input=folder / "seed.jsonl")


def run_trl(folder, turns, **options):
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    rows = load_dataset("json", data_files=str(folder / "seed.jsonl"), split="train").remove_columns("id")
    # its tokenizer joins prompt and response as they are
    rows = rows.map(lambda row: {key: " " + row[key] for key in ("chosen", "rejected")})
    steps = len(rows) // PAIRS
    config = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=MICRO_BATCH, max_length=2048,
                       gradient_accumulation_steps=PAIRS // MICRO_BATCH, learning_rate=LR, beta=BETA, num_train_epochs=1,
                       lr_scheduler_type="cosine", warmup_steps=-(-steps // 10), weight_decay=0.0, max_grad_norm=1.0,
                       bf16=False, use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential",
                       logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options)

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.before_first_step()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                turns.after_step(float(logs["loss"]))

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, trust_remote_code=False)
    DPOTrainer(model, args=config, train_dataset=rows, callbacks=[Steps()],
               processing_class=AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)).train()


def load_plain(folder):
    import torch
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()  # no dropout


def whole_logps(model, answers):
    """log pi of each of [(prompt ids, response ids)], padded to the longest, through whole logits and their log-softmax."""
    import torch
    width = max(len(x) + len(y) for x, y in answers)
    ids, mask, labels = (torch.full((len(answers), width), fill) for fill in (0, 0, -100))
    for k, (x, y) in enumerate(answers):
        ids[k, :len(x) + len(y)], mask[k, :len(x) + len(y)] = torch.tensor(x + y), 1
        labels[k, len(x):len(x) + len(y)] = torch.tensor(y)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (logp * (labels[:, 1:] >= 0)).sum(-1)


def run_plain(folder, turns):
    import torch
    import torch.nn.functional as F
    from transformers import get_cosine_schedule_with_warmup
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    policy, ref = load_plain(folder / "model"), load_plain(folder / "model")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    steps = len(rows) // PAIRS
    scheduler = get_cosine_schedule_with_warmup(optimizer, -(-steps // 10), steps)

    turns.before_first_step()
    for step in range(steps):
        total = 0
        for at in range(step * PAIRS, (step + 1) * PAIRS, MICRO_BATCH):
            micro = rows[at:at + MICRO_BATCH]
            answers = [(row["prompt_ids"], row[y]["ids"]) for y in ("chosen", "rejected") for row in micro]
            with torch.no_grad():
                fixed = whole_logps(ref, answers)
            chosen, rejected = (whole_logps(policy, answers) - fixed).chunk(2)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).sum() / PAIRS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        turns.after_step(total)


def run_products(turns):
    """The rate of matrix products, in GFLOP/s: the two largest of the step, the head's and the MLP's, by the clock."""
    import torch
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


COMPETITORS = {
    "01": run_without,
    "04 warm-up": lambda folder, turns: run_stage("04_refined_dpo", folder, turns, input=folder / "preferences.jsonl",
                                                  refine_after=1, window=1),
    "04": lambda folder, turns: run_stage("04_refined_dpo", folder, turns, input=folder / "preferences.jsonl",
                                          refine_after=0, window=PAIRS),
    "live": run_live,
    "prompt twice": lambda folder, turns: run_without(folder, turns, shared_span=lambda model: 0),
    "logits twice": lambda folder, turns: run_without(folder, turns, chunk_rows=lambda weight: 256),
    "plain": run_plain,
    "products": lambda folder, turns: run_products(turns),
    "TRL": run_trl,
    "TRL best": lambda folder, turns: run_trl(folder, turns, precompute_ref_log_probs=True, gradient_checkpointing=False)}


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


def spread(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python that has TRL (default: TRL is left out)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted, after two that are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=COMPETITORS, help="some of them")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        turns = Turns()
        turns.out, sys.stdout = sys.stdout, sys.stderr
        return COMPETITORS[args.worker[0]](Path(args.worker[1]), turns)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, PAIRS * (args.steps + 3))  # the last step, not taken, is what 04's window is filled in
        wanted = {"01", *(args.only or COMPETITORS)}  # 01 is what the others are compared with
        names = [name for name in COMPETITORS if name in wanted and (args.trl or "TRL" not in name)]
        done = run_in_turn(names, folder, args)
        rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    report(done, rows, args)


def run_in_turn(names, folder, args, script=__file__):
    """{name: [what each of its steps reported]}, the first two left out."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                        "TMPDIR": str(folder)}
    workers = {}
    for name in names:
        python = args.trl if "TRL" in name else sys.executable
        workers[name] = subprocess.Popen([python, script, "--worker", name, str(folder)], text=True, env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=open(folder / f"{name}.log", "w"))
        if workers[name].stdout.readline() != "ready\n":
            sys.exit(f"{name}: " + (folder / f"{name}.log").read_text()[-2000:])
    done = {name: [] for name in names}
    for step in range(args.steps + 2):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            done[name].append(json.loads(worker.stdout.readline()))
            print(f"step {step + 1}, {name}: {done[name][-1]['seconds']:.2f} s", file=sys.stderr)
    for worker in workers.values():
        worker.kill()
        worker.wait()
    return done


def report(done, rows, args):
    losses = {name: [step["loss"] for step in steps] for name, steps in done.items() if name != "products"}
    seconds = {name: [step["seconds"] for step in steps[2:]] for name, steps in done.items()}
    print(f"| {PAIRS} pairs a step, {args.threads} threads | Seconds | Times as long as 01 | Peak memory (GB) | "
          "Losses differ by at most |\n|---|---|---|---|---|")
    for name in losses:
        ratio = spread([theirs / ours for theirs, ours in zip(seconds[name], seconds["01"])])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio} | {done[name][-1]['peak']:.2f} "
              f"| {max(abs(a - b) for a, b in zip(losses[name], losses['01'])):.0e} |")
    for one, other in (("04", "live"), ("04 warm-up", "01")):
        if one in seconds and other in seconds:
            ratio = spread([a / b for a, b in zip(seconds[one], seconds[other])])
            print(f"\n{one} takes {ratio} times as long as {other}")
    if "products" in done:
        flops = [step_flops(rows[k:k + PAIRS]) for k in range(2 * PAIRS, len(rows) - PAIRS, PAIRS)]
        rates = [step["loss"] for step in done["products"][2:]]
        share = [count / time / rate / 1e9 for count, time, rate in zip(flops, seconds["01"], rates)]
        print(f"\n01 reaches {spread(share)} of the rate of matrix products, {statistics.median(rates):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
