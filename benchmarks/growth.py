"""How time and memory grow with the number of records: 1 K, 10 K, 100 K, 1 M.

    python benchmarks/growth.py                          # 100 K records and fewer: ten minutes
    python benchmarks/growth.py --sizes 1000 1000000     # a million: an hour, 9 GB of disk while it runs

Measured is all that the stages do beside the models: reading and checking, tokenising, batches, what is recorded for a
restart, writing. The models' time is left out: where 02 samples, random token ids are returned (100 to 250 a response),
and where 03 takes log-probs, random numbers. Prompts have about 300 characters. Seconds are of CPU time, on one thread.
Memory is the largest resident set of a process of its own; that of Python, torch and transformers is the first line of
the table, and is subtracted in bytes a record.
"""

import argparse
import itertools
import json
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from shared import run_stage

import common
from extras.alpaca_eval import alpaca_eval_metrics, length_controlled
from extras.small_world import write_base_model
from support import chat, model_checks, models, records

WORDS = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)][:9000]
PARTS = {"imports": "(Python and its packages)", "00": "00_inputs.py, JSON Lines", "02": "02_generate.py",
         "03": "03_judge.py --length-penalty auto", "04": "04_refined_dpo.py, reading its pairs",
         "05": "05_eval.py, win rates and their fit"}


def write_files(folder, size):
    """Preference rows as a person has them, and a tokenizer of 9,000 words with a model that is never run."""
    (folder / "model").mkdir()
    write_base_model(WORDS, Namespace(seed=0, shape="llama"), folder / "model")
    rng = random.Random(0)
    with open(folder / "source.jsonl", "w") as file:
        for k in range(size):
            texts = [" ".join(rng.choices(WORDS, k=75)) for _ in range(3)]
            file.write(json.dumps({"id": k, **dict(zip(("prompt", "chosen", "rejected"), texts))}) + "\n")


def replace_models():
    """Random numbers in place of what the models compute: the same ones in every run."""
    def sample_responses(model, prompts, u, temperature, max_new_tokens, eos):
        def response(numbers):
            length = 100 + int(150 * numbers[0])
            return (6 + (8990 * numbers[:length - 1]).astype(int)).tolist() + [eos[0]], "eos"
        return [[response(numbers) for numbers in of_prompt] for of_prompt in u]

    def load_model(*args):
        model = torch.nn.Embedding(len(WORDS) + 6, 1)
        model.get_input_embeddings, model.max_shared_length, model.number = lambda: model, 0, next(numbers)
        return model

    class ResponseLogps:
        def __init__(self, model):
            self.model = model

        def __call__(self, batch):
            seed = 1_000_000 * self.model.number + sum(batch.lengths)
            return -torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(seed))

    numbers = itertools.count()
    models.load_model, model_checks.check_limits = load_model, lambda *args: None
    common.sample_responses, common.ResponseLogps = sample_responses, ResponseLogps


def fit_win_rates(size):
    """The metrics of AlpacaEval's kind of annotations, with difficulties: the texts of a row are one character."""
    rng = np.random.default_rng(0)
    rows = [{"preference": 1 + u, "output_1": "x", "output_2": "xy"} for u in rng.random(size)]
    lengths = rng.integers(1, 3000, size)
    alpaca_eval_metrics(rows, rng.normal(size=size))
    length_controlled(rng.random(size), lengths - 1500.0, rng.normal(size=size))


def work(part, folder, size):
    """One part on `size` records, in this process."""
    replace_models()
    model = dict(model=folder / "model", micro_batch_size=32)
    if part == "files":
        write_files(folder, size)
    elif part == "00":
        run_stage("00_inputs.py", source=folder / "source.jsonl", seed_size=size // 30, eval_size=0,
                  prompt_sizes=size - size // 30, output=folder / "00")
    elif part == "02":
        run_stage("02_generate.py", **model, input=folder / "prompts.jsonl", output=folder / "02")
    elif part == "03":
        run_stage("03_judge.py", **model, init_model=folder / "model", input=folder / "02", output=folder / "03",
                  length_penalty="auto")
    elif part == "04":
        args = Namespace(model=folder / "model", input=[str(folder / "03")], max_prompt_length=1024, max_length=2048)
        records.read_pairs(args, chat.load_tokenizer(args.model), records.PREFERENCES)
    elif part == "05":
        fit_win_rates(size)


def measure(part, folder, size):
    """(seconds of CPU time without the imports', peak resident bytes) of a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--work", part, str(folder), str(size)], check=True,
                          stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def be_a_process(part, folder, size):
    started = time.process_time()
    work(part, Path(folder), int(size))
    seconds = time.process_time() - started
    print(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="numbers of records")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)  # what measure() starts
    args = parser.parse_args()
    if args.work:
        return be_a_process(*args.work)

    print("| Part | Records | CPU seconds | ms a record | Peak memory (MB) | bytes a record |\n" + "|---" * 6 + "|")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            measure("files", folder, size)
            for part, name in PARTS.items():
                seconds, memory = measure(part, folder, size)
                if part == "imports":
                    without = memory
                print(f"| {name} | {size:,} | {seconds:.1f} | {1000 * seconds / size:.2f} | {memory / 1e6:.0f} "
                      f"| {max(0, memory - without) / size:.0f} |", flush=True)
                if part == "00":
                    (folder / "source.jsonl").unlink()
                    (folder / "00" / "prompts_1.jsonl").rename(folder / "prompts.jsonl")


if __name__ == "__main__":
    main()
