"""What several benchmarks share: running stages, the inputs, taking turns, several seeds, tables."""

import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import runs

SHAPE = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
             vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}"


def command_line(options):
    """{"lr": 1, "all_gold": True, "prompt_sizes": [2, 3]} -> --lr 1 --all-gold --prompt-sizes 2 3"""
    words = []
    for key, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += ["--" + key.replace("_", "-"), *map(str, values)]
    return words


def run_stage(script, **options):
    """Run a stage in this process, where parts of common.py may be replaced. Returns the names in its module."""
    sys.argv = [script, *command_line(options)]
    return runpy.run_path(str(ROOT / script), run_name="__main__")


def follow(**options):
    """Run 04_refined_dpo.py in this process: (what it logs of each pair, by step: [[{"id", "rewards/margins",
    "confidence", "flagged", "tau", "step", ...}]], the names in its module)."""
    steps, log_step, outer = [], runs.log_step, runs.this_run

    def record(work, bar, step, rows, **more):
        steps.append([row | {"tau": more["tau"], "step": step + 1} for row in rows])
        log_step(work, bar, step, rows, **more)

    runs.log_step = record
    try:
        return steps, run_stage("04_refined_dpo.py", **options)
    finally:
        runs.log_step, runs.this_run = log_step, outer


# ---------------------------------------------------------------------------------------------
# A model and preferences with random weights and tokens


def make_inputs(folder, pairs, longest=(600, 300), **shape):
    """Write model, seed.jsonl (strings) and preferences.jsonl (the same as token ids). Returns the model's parameters.

    longest: tokens of a prompt, of a response
    """
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, SHAPE["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                            chat_template=TEMPLATE).save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape))
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(3, SHAPE["vocab_size"], int(count)).tolist()

    rows = [{"id": str(k), "prompt": ids(np.exp(rng.uniform(*np.log([20, longest[0]])))),
             "chosen": ids(rng.integers(20, longest[1])), "rejected": ids(rng.integers(20, longest[1]))}
            for k in range(pairs)]
    with open(folder / "seed.jsonl", "w") as strings, open(folder / "preferences.jsonl", "w") as tokens:
        for row in rows:
            texts = {key: " ".join(f"w{i}" for i in row[key]) for key in ("prompt", "chosen", "rejected")}
            strings.write(json.dumps({"id": row["id"], **texts}) + "\n")
            answers = {key: {"text": "", "ids": row[key] + [2], "finish": "eos"} for key in ("chosen", "rejected")}
            tokens.write(json.dumps({"id": row["id"], "prompt_ids": row["prompt"], **answers}) + "\n")
    return model.num_parameters()


def load(folder):
    """The model, for a competitor that is no stage."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_metrics(folder):
    """What 05_eval.py says of a model."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# Taking turns


class Turns:
    """What a competitor, a process of its own, calls so that it takes one step when the parent asks for it."""

    def __init__(self):
        self.out, sys.stdout = sys.stdout, sys.stderr  # what a competitor prints must not reach the parent
        self.started, self.reference = None, 0.0

    def before_first_step(self):
        self.report("ready")

    def time_reference(self, store):
        """store(), the pass that stores the log-probs of pi_ref, before the first step."""
        started = time.perf_counter()
        stored = store()
        self.reference = time.perf_counter() - started
        return stored

    def after_step(self, loss):
        seconds = time.perf_counter() - self.started
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
        self.report(json.dumps({"seconds": seconds, "reference": self.reference, "loss": loss, "peak": peak / 2 ** 20}))

    def report(self, line):
        print(line, file=self.out, flush=True)
        if not sys.stdin.readline():  # the parent is gone
            os._exit(0)
        self.started = time.perf_counter()


def take_turns(script, names, folder, args, pythons={}):
    """{name: [what each step reported]}: args.steps + 2 steps, of which the first two are warm-up.

    Each competitor is `script --worker NAME FOLDER`, run by the Python of that name in `pythons`, else by this one.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                        "TMPDIR": str(folder)}
    workers = {}
    for name in names:
        command = [pythons.get(name, sys.executable), script, "--worker", name, str(folder)]
        workers[name] = subprocess.Popen(command, text=True, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=open(folder / f"{name}.log", "w"))
        read_report(workers[name], folder / f"{name}.log")
    done = {name: [] for name in names}
    for step in range(args.steps + 2):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            done[name].append(json.loads(read_report(worker, folder / f"{name}.log")))
            print(f"step {step + 1}, {name}: {done[name][-1]['seconds']:.2f} s", file=sys.stderr)
    for worker in workers.values():
        worker.kill()
        worker.wait()
    return done


def read_report(worker, log):
    line = worker.stdout.readline()
    return line or sys.exit(f"{log}: {log.read_text()[-2000:]}")  # nothing where it has ended


def ratio(theirs, ours):
    """Median and quartiles of what two competitors needed in turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(theirs, ours)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# ---------------------------------------------------------------------------------------------
# Several seeds


def run_seeds(run, args):
    """[run(seed) of each of args.seeds], args.jobs of them at a time. `run` waits for processes of its own."""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(run, args.seeds))


def run_logged(command, log, jobs, **variables):
    """Run a command with its share of the cores, of `jobs` commands at a time; what it prints is added to a file."""
    threads = str(max(1, os.cpu_count() // jobs))
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True, env=os.environ | variables | {
            "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"})


def markdown(head, rows):
    """The lines of a table. head: its first line without the outer bars; rows: lists of what stands in the cells"""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def cell(values, digits=1):
    """Mean ± standard deviation of those that are not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"


def difference(a, b):
    """(mean, its standard error) of a - b, values of the same seeds."""
    gains = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0


def mean_row(rows):
    """The metrics of one row of a table, over the seeds, as the report draws them."""
    mean = {"name": rows[0]["name"]}
    for key, error in (("win_rate", "standard_error"), ("length_controlled_winrate", "lc_standard_error")):
        if key in rows[0]:
            mean[key], mean[error] = difference([row[key] for row in rows], [0] * len(rows))
    return mean | {key: statistics.mean(row[key] for row in rows) for key in ("judge_accuracy", "kl_per_token")
                   if all(row.get(key) is not None for row in rows)}
