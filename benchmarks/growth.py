"""How time and memory grow with the number of records: 1 K, 10 K, 100 K, 1 M.

    python benchmarks/growth.py                          # 100 K records and fewer: ten minutes
    python benchmarks/growth.py --sizes 1000 1000000     # a million: an hour, 9 GB of disk while it runs

What is measured is all that the stages do beside the models: reading and checking, tokenising, batches, what is kept for
a restart, writing. The models' time is left out: where 02 samples, random token ids stand in (100 to 250 a response),
and where 03 takes log-probs, random numbers. Prompts have about 300 characters. Seconds are of CPU time, on one thread.
Memory is the largest resident set of a process of its own; Python, torch and transformers are part of it, and the first
line of the table.
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

WORDS = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)][:9000]
PARTS = {"imports": "(Python and its packages)", "00": "00_inputs.py, JSON Lines", "02": "02_generate.py",
         "03": "03_judge.py --length-penalty auto", "04": "04_refined_dpo.py, reading its pairs",
         "05": "05_eval.py, win rates and their fit"}


def write_source(path, size):
    """Preference rows as a person has them."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for k in range(size):
            texts = [" ".join(rng.choices(WORDS, k=75)) for _ in range(3)]
            file.write(json.dumps({"id": k, **dict(zip(("prompt", "chosen", "rejected"), texts))}) + "\n")


def write_model(folder):
    """A tokenizer of 9,000 words, with a model that is never run."""
    import stages
    stages.load("00_inputs").write_base_model(WORDS, Namespace(seed=0, shape="llama"), folder)


def without_models():
    """Put random numbers in the place of what the models compute: the same ones in every run."""
    import common
    import torch

    def sample(model, prompts, u, temperature, max_new_tokens, ends):
        def response(numbers):
            length = 100 + int(150 * numbers[0])
            return (6 + (8990 * numbers[:length - 1]).astype(int)).tolist() + [ends[0]], "eos"
        return [[response(numbers) for numbers in of_prompt] for of_prompt in u]

    def load_model(*args):
        model = torch.nn.Embedding(len(WORDS) + 6, 1)
        model.get_input_embeddings, model.shared_span, model.factor = lambda: model, 0, next(factors)
        return model

    def logps(model, batch):
        return torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(sum(batch.lengths))) - model.factor

    factors = itertools.count()
    common.load_model, common.sample = load_model, sample
    common.ResponseLogps = lambda model: lambda batch: logps(model, batch)


def work(part, folder, size):
    """One part on `size` records, in this process."""
    import stages
    if part == "files":
        write_model(folder / "model")
        return write_source(folder / "source.jsonl", size)
    without_models()
    model = dict(model=folder / "model", micro_batch_size=32)
    if part == "00":
        stages.run("00_inputs", source=folder / "source.jsonl", seed_size=size // 30, prompt_sizes=[size - size // 30],
                   eval_size=0, output=folder / "00")
    elif part == "02":
        stages.run("02_generate", **model, input=folder / "prompts.jsonl", output=folder / "02")
    elif part == "03":
        stages.run("03_judge", **model, init_model=folder / "model", input=folder / "02", output=folder / "03",
                   length_penalty="auto")
    elif part == "04":
        stages.load("04_refined_dpo").read_pairs(Namespace(input=folder / "03", max_prompt_length=1024, max_length=2048))
    elif part == "05":
        fits(size)


def fits(size):
    """The figures of AlpacaEval's kind of annotations, with difficulties: the texts of a row are one character."""
    import numpy as np
    import stages
    rng = np.random.default_rng(0)
    rows = [{"preference": 1 + u, "output_1": "x", "output_2": "xy"} for u in rng.random(size)]
    lengths = rng.integers(1, 3000, size)
    evaluation = stages.load("05_eval")
    evaluation.figures(rows, rng.normal(size=size))
    evaluation.length_controlled(rng.random(size), lengths - 1500.0, rng.normal(size=size))


def measure(part, folder, size):
    """(seconds of CPU time without the imports', peak resident MB) of a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--work", part, str(folder), str(size)], check=True,
                          stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def be_a_process(part, folder, size):
    import stages  # the imports are not what is timed
    stages.load("05_eval"), stages.load("03_judge"), stages.load("00_inputs")
    started = time.process_time()
    work(part, Path(folder), int(size))
    seconds = time.process_time() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="numbers of records")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)  # what measure() starts
    args = parser.parse_args()
    if args.work:
        return be_a_process(*args.work)

    print("| Part | Records | CPU seconds | Peak memory (MB) | ms a record | relative to the fewest |\n" + "|---" * 6 + "|")
    first = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            measure("files", folder, size)  # in a process of its own too: a child's peak is at least its parent's
            for part, name in PARTS.items():
                seconds, memory = measure(part, folder, size)
                each = 1000 * seconds / size
                ratio = each / first.setdefault(part, each)
                print(f"| {name} | {size:,} | {seconds:.1f} | {memory:.0f} | {each:.2f} | {ratio:.2f} |", flush=True)
                if part == "00":
                    (folder / "source.jsonl").unlink()
                    (folder / "00" / "prompts_1.jsonl").rename(folder / "prompts.jsonl")


if __name__ == "__main__":
    main()
