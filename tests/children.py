"""Stages in forked children: as two ranks, stopped at an exact point. Options that work, for every stage."""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import common
import stages
from stages import Ran, attempt, digest, rows, run

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the package warns of every fork
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}  # audit events of files
STAGES = ["00_inputs", "00_sft", "01_seed_dpo", "02_generate", "03_judge", "04_refined_dpo", "05_eval sample"]
TRAINED = ["00_sft", "01_seed_dpo", "04_refined_dpo", "extras/worst_case_dpo"]  # of seven steps each, with `good`
ALL = list(dict.fromkeys(STAGES + TRAINED))
alive = []  # children that were not waited for


@pytest.fixture(scope="module")
def good(world, pi_init, pi_0, preferences, tmp_path_factory):
    """{stage: options of a short run, without --output}"""
    folder = tmp_path_factory.mktemp("good")
    training = dict(lr=1e-3, save_every=2, micro_batch_size=8)
    sampling = dict(model=pi_0, max_new_tokens=6, micro_batch_size=5)
    responses = run("02_generate", **sampling, input=world / "prompts_1.jsonl", output=folder / "responses")
    pairs = stages.write_rows(folder / "preferences", rows(preferences)[:21])
    return {"00_inputs": dict(source="world", seed_size=4, prompt_sizes=[3, 2], eval_size=2, sft_size=4, all_gold=True),
            "00_sft": dict(model=pi_init, input=world / "sft.jsonl", batch_size=7, **training),
            "01_seed_dpo": dict(model=pi_init, input=world / "seed.jsonl", batch_size=3, epochs=1, **training),
            "02_generate": dict(input=world / "prompts_1.jsonl", **sampling),
            "03_judge": dict(model=pi_0, init_model=pi_init, input=responses, micro_batch_size=5),
            "04_refined_dpo": dict(model=pi_0, input=pairs, batch_size=3, window=4, k_percent=25, **training),
            "extras/worst_case_dpo": dict(model=pi_0, input=world / "seed.jsonl", batch_size=3, epochs=1, epsilon=0.1,
                                          resolve_steps=3, **training),
            "05_eval sample": dict(input=world / "eval.jsonl", gold=world / "gold.json", **sampling)}


@pytest.fixture(scope="module")
def whole(good, tmp_path_factory):
    """A function of a stage -> what an undisturbed run leaves."""
    @functools.cache
    def of(stage):
        return content(run(*stage.split(), output=tmp_path_factory.mktemp("whole") / "out", **good[stage]))
    return of


def content(output):
    """{file: digest} of an output and what is beside it, without when it was made."""
    found = {}
    for path in sorted(output.parent.rglob("*")):
        if path.name.endswith("args.json"):
            record = json.loads(path.read_text())
            found[path.name] = {key: record[key] for key in record.keys() - {"begun", "seconds"}}
        elif path.is_file():
            found[str(path.relative_to(output.parent))] = digest(path)
    return found


@pytest.fixture(autouse=True)
def no_child_outlives_its_test():
    yield
    for child in alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    alive.clear()


def fork(stage, options, prepare=lambda: None, **environment):
    """Start a stage in a child, after prepare() -> a function that waits for its end and gives its Ran.

    stage: a string, or a list of words. The status is the exit status, or -N where signal N killed it.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            prepare()
            ran = attempt(*(stage.split() if isinstance(stage, str) else stage), **options)
            os.write(write, json.dumps([ran.out, ran.err]).encode())
            # a thread of gloo that is left may want the GIL when Python ends, which aborts the process
            assert ran.status != 0 or "fsdp" in options or not gloo_threads()  # torch keeps FSDP's mesh
            status = ran.status
        os._exit(status)
    os.close(write)
    alive.append(child)

    def join():
        with os.fdopen(read) as pipe:
            printed = pipe.read()
        _, status = os.waitpid(child, 0)
        alive.remove(child)
        return Ran(os.waitstatus_to_exitcode(status), *json.loads(printed or '["", ""]'))
    join.pid = child
    return join


def gloo_threads():
    return [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]


def two_ranks(stage, options, prepare=lambda: None):
    """Run a stage as two ranks, the second after prepare() -> their Rans."""
    meet = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(stages.free_port()))
    joins = [fork(stage, options, act, RANK=str(rank), LOCAL_RANK=str(rank), **meet)
             for rank, act in enumerate([lambda: None, prepare])]
    return [join() for join in joins]


def succeeded(ran, *paths):
    """Whether a stage succeeded; otherwise it was refused in one line, with one of the paths in it."""
    assert ran.status in (0, 2) and ran.err.count("\n") == (ran.status == 2), ran
    assert ran.status == 0 or not paths or any(str(path) in ran.err for path in paths), ran
    return ran.status == 0


# ---------------------------------------------------------------------------------------------
# For prepare(): what happens in the child, and when


def stop_with(number):
    return lambda: os.kill(os.getpid(), number)


kill = stop_with(signal.SIGKILL)


def nth(n, act):
    """A function that calls act() when it is called for the n-th time."""
    count = itertools.count(1)

    def tick():
        if next(count) == n:
            act()
    return tick


def at_event(n, act, folder=None):
    """Call act() before the n-th time that the stage touches a file in `folder` or computes with a model."""
    tick = nth(n, act)

    def on_audit(event, values):
        if folder and event in CHANGES and str(values[0]).startswith(str(folder)):
            tick()

    def on_forward(module, _):
        if isinstance(module, torch.nn.Embedding):
            tick()

    sys.addaudithook(on_audit)
    torch.nn.modules.module.register_module_forward_pre_hook(on_forward)


def after_batch(n, act):
    """Call act() when n batches are recorded, by all models together."""
    real, tick = common.append_journal, nth(n, act)

    def append(*args):
        real(*args)
        tick()
    common.append_journal = append


def at_end(act, output):
    """Call act() before the output appears."""
    sys.addaudithook(lambda event, values: event == "os.rename" and Path(values[1]) == output and act())


def in_step(step, act):
    """Call act() within a step of training, counted from 1."""
    real, tick = torch.nn.utils.clip_grad_norm_, nth(step, act)

    def clip(*args, **options):
        tick()
        return real(*args, **options)
    torch.nn.utils.clip_grad_norm_ = clip
