"""The least that stages 01 to 04 need of runs.py, for a project with its own error handling and checkpoints.

    cp extras/bare_runs.py my_project/runs.py

Errors are exceptions, rows are not checked, a stopped run starts from scratch. The modules in extras/ need runs.py.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
from pathlib import Path

from tqdm import tqdm

SEED = PROMPTS = EXAMPLES = RESPONSES = PREFERENCES = None  # the fields that read_jsonl would check
InputError = RuntimeError
Parser = argparse.ArgumentParser
positive = natural = int
nonnegative = share = float
number = lambda kind, low, high=None: kind
run = lambda main: main()
begun = datetime.datetime.now  # the date, for chat templates that write it
load_state = lambda partial, ranks, model, optimizer, scheduler: {"step": 0}
save_due = lambda step, steps, every, ranks: False  # if this is ever true, save_state is called
progress = lambda steps, label, ranks: tqdm(steps, desc=label, disable=ranks.rank != 0, delay=2)


def read_jsonl(path, fields):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    for row in rows:
        row["id"] = str(row["id"])
        if isinstance(row.get("prompt"), str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row |= {key: row[key][0]["content"] for key in ("chosen", "rejected") if isinstance(row.get(key), list)}
    return rows


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False, default=list) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")


def open_output(args, *inputs, free=()):  # the folder to work in
    partial = Path(f"{args.output}.partial")
    if Path(args.output).exists():
        raise InputError(f"{args.output} exists: choose another --output")
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def close_output(args, partial, made, counts):
    made.rename(args.output)
    shutil.rmtree(partial)
    print(args.output, counts)


@contextlib.contextmanager
def journal(partial, label, rank):  # the results of one rank's batches
    with open(partial / f"{label}.{rank}.jsonl", "w") as file:
        yield lambda value: file.write(json.dumps(value) + "\n")


def read_journal(partial, label):  # those of all ranks
    return [json.loads(line) for path in partial.glob(f"{label}.*.jsonl") for line in open(path)]
