"""Start stages as a person would, but in this process, where torch is imported already."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import socket
import sys
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch.distributed as dist

from shared import command_line
from support import runs

Ran = namedtuple("Ran", "status out err")
AS_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
NO_RANKS = {key: value for key, value in os.environ.items() if key not in AS_TORCHRUN}


@functools.cache
def load(name):
    """The module of a stage or of "extras/SCRIPT": "01_seed_dpo" is no name that `import` takes."""
    spec = importlib.util.spec_from_file_location("stage_" + Path(name).name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attempt(name, /, *words, **options):
    """Run a stage -> its exit status and what it wrote to stdout and stderr."""
    main, out, err, status = load(name).main, io.StringIO(), io.StringIO(), 1
    words = [f"{name}.py", *map(str, words), *command_line(options)]
    try:
        with patch("sys.argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runs.run(main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        if status != 0 and dist.is_initialized():  # `run` leaves the group as it is after an error
            dist.destroy_process_group()
    return Ran(status, out.getvalue(), err.getvalue())


def run(name, /, *words, **options):
    """Run a stage that must succeed -> its output, as a path."""
    ran = attempt(name, *words, **options)
    assert ran.status == 0, ran.err
    return Path(options["output"])


def refused(name, /, *words, **options):
    """Run a stage that must reject its input -> the one line it prints: status 2, and the output left as it was."""
    before = files(options["output"])
    ran = attempt(name, *words, **options)
    assert ran.status == 2 and ran.err.count("\n") == 1 and "Traceback" not in ran.err, ran
    assert files(options["output"]) == before
    return ran.err


def as_torchrun(monkeypatch, **changes):
    """The environment of one of two processes that torchrun has started, with these changes; None: not set."""
    for name, value in (AS_TORCHRUN | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


def parsed(name, words):
    """What a stage makes of the words of its command line, defaults included."""
    with patch("sys.argv", [name, *words]):
        return load(name).parse_args()


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counts(output):
    """What a stage has counted: rows read, kept, dropped and why."""
    return runs.read_record(output)["counts"]


def metrics(model):
    return rows(Path(model) / "metrics.jsonl")


def weights(model):
    from safetensors.torch import load_file
    return load_file(Path(model) / "model.safetensors")


def farthest(one, two):
    """The largest difference between two models' weights."""
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def digest(path):
    """For comparing files: where it fails, pytest would take minutes to explain how megabytes differ."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files(output):
    """{path of an output or in it: what the file holds and when it was written; False of a folder}"""
    paths = [Path(output), *Path(output).rglob("*")] if Path(output).exists() else []
    return {str(path): path.is_file() and (path.stat().st_mtime_ns, digest(path)) for path in paths}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
