"""Killed anywhere, a stage goes on and gives what it would have given: every stage, signals, ranks, broken storage.

A stage runs in a child that is forked, so that torch is imported once, and that is stopped at an exact point: before an
operation on the output's files (Python's audit events), a batch or a step.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import stages
from stages import Ran, attempt, digest, farthest, metrics, rows, run

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the package warns of every fork
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}  # audit events to be killed before
children = []  # not waited for yet


@pytest.fixture(autouse=True)
def no_child_outlives_its_test():
    yield
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    children.clear()


def fork(stage, options, prepare=lambda: None, **environment):
    """Start a stage in a child, after prepare() -> a function that waits for its end and gives its Ran.

    The status is the exit status, or -N where signal N killed it.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            prepare()
            ran = attempt(stage, **options)
            os.write(write, json.dumps([ran.out, ran.err]).encode())
            status = ran.status
        os._exit(status)
    os.close(write)
    children.append(child)

    def join():
        with os.fdopen(read) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        children.remove(child)
        return Ran(os.waitstatus_to_exitcode(status), *json.loads(told or '["", ""]'))
    join.pid = child
    return join


def at_event(n, act, folder):
    """Call act() before the n-th time that the stage touches a file in `folder` or computes a batch."""
    count = 0

    def tick():
        nonlocal count
        count += 1
        if count == n:
            act()

    def hook(event, values):
        if event in CHANGES and str(values[0]).startswith(str(folder)):
            tick()

    def ticking(function):
        def call(*args, **options):
            tick()
            return function(*args, **options)
        return call

    sys.addaudithook(hook)  # of the child: there is no way to remove it
    common.collate, common.sample = ticking(common.collate), ticking(common.sample)


def stop_with(number):
    return lambda: os.kill(os.getpid(), number)


def content(output):
    """{file: digest}, with the record's seconds left out."""
    found = {}
    for path in sorted(output.parent.rglob("*")):
        if path.name.endswith("args.json"):
            found[path.name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        elif path.is_file():
            found[str(path.relative_to(output.parent))] = digest(path)
    return found


TRAINING = dict(lr=1e-3, save_every=2, micro_batch_size=8)


@pytest.fixture(scope="module")
def good(world, pi_init, pi_0, preferences, tmp_path_factory):
    """{stage: options of a short run}"""
    folder = tmp_path_factory.mktemp("good")
    seven = stages.write_rows(folder / "preferences.jsonl", rows(preferences)[:21])
    responses = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6,
                    output=folder / "responses")
    return {"00_inputs": dict(source="world", seed_size=4, prompt_sizes=[3, 2], eval_size=2, sft_size=4, all_gold=True),
            "00_sft": dict(model=pi_init, input=world / "sft.jsonl", batch_size=7, **TRAINING),
            "01_seed_dpo": dict(model=pi_init, input=world / "seed.jsonl", batch_size=3, epochs=1, **TRAINING),
            "02_generate": dict(model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6, micro_batch_size=5),
            "03_judge": dict(model=pi_0, init_model=pi_init, input=responses, micro_batch_size=5),
            "04_refined_dpo": dict(model=pi_0, input=seven, batch_size=3, window=4, k_percent=25, **TRAINING),
            "05_eval": dict(model=pi_0, input=world / "eval.jsonl", gold=world / "gold.json", max_new_tokens=6,
                            micro_batch_size=5)}


STAGES = ["00_inputs", "00_sft", "01_seed_dpo", "02_generate", "03_judge", "04_refined_dpo", "05_eval"]
TRAINED = ["00_sft", "01_seed_dpo", "04_refined_dpo"]  # of seven steps each


@pytest.fixture(scope="module")
def whole(good, tmp_path_factory):
    """{stage: what an undisturbed run leaves}"""
    return {stage: content(run(stage, output=tmp_path_factory.mktemp("whole") / "out", **options))
            for stage, options in good.items()}


# ---------------------------------------------------------------------------------------------
# Killed anywhere


@pytest.mark.parametrize("stage", STAGES)
def test_killed_ever_later_a_stage_ends_with_the_same_files(good, whole, tmp_path, stage):
    output, kills = tmp_path / "out", 0
    for n in range(1, 200, 3):
        ran = fork(stage, good[stage] | {"output": output}, lambda: at_event(n, stop_with(signal.SIGKILL), output))()
        if ran.status == 0:
            break
        assert ran.status == -signal.SIGKILL, ran
        kills += 1
    assert ran.status == 0 and kills >= 6
    assert content(output) == whole[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_is_one_line_and_a_stage_ends_with_the_same_files(good, whole, tmp_path, stage):
    output, stops = tmp_path / "out", 0
    for n in range(2, 200, 7):
        ran = fork(stage, good[stage] | {"output": output}, lambda: at_event(n, stop_with(signal.SIGTERM), output))()
        if ran.status == 0:
            break
        assert ran.status == 143 and ran.err.count("\n") == 1, ran
        assert ran.err.startswith(f"{stage}.py: stopped by SIGTERM: ") and "the same command" in ran.err
        stops += 1
    assert ran.status == 0 and stops >= 2
    assert content(output) == whole[stage]


def in_step(step, act):
    """Call act() within a step of training, counted from 1."""
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args, **options):
        calls.append(1)
        if len(calls) == step:
            act()
        return real(*args, **options)
    torch.nn.utils.clip_grad_norm_ = clip


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("number, status, name", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_in_training_loses_no_step(good, whole, tmp_path, stage, number, status, name):
    options = good[stage] | {"output": tmp_path / "out", "save_every": 100}
    ran = fork(stage, options, lambda: in_step(5, stop_with(number)))()
    assert ran.status == status
    assert ran.err == (f"{stage}.py: stopped by {name}: {tmp_path / 'out.partial'} holds the state after step 5: "
                       "the same command goes on from there\n")
    again = attempt(stage, **options)
    assert again.status == 0 and "going on after step 5" in again.out
    assert content(tmp_path / "out") == whole[stage]


def test_a_second_ctrl_c_stops_at_once(good, whole, tmp_path):
    def twice():
        stop_with(signal.SIGINT)()
        stop_with(signal.SIGINT)()

    options = good["01_seed_dpo"] | {"output": tmp_path / "out"}
    ran = fork("01_seed_dpo", options, lambda: in_step(6, twice))()
    assert ran.status == 130 and ran.err.count("\n") == 1 and "holds the state after step 4" in ran.err
    assert attempt("01_seed_dpo", **options).status == 0
    assert content(tmp_path / "out") == whole["01_seed_dpo"]


def test_real_signals_from_another_process(good, whole, tmp_path):
    ready, tell = os.pipe()

    def tell_and_wait():
        os.write(tell, b"x")
        while common.this_run.asked is None:
            time.sleep(0.01)

    options = good["04_refined_dpo"] | {"output": tmp_path / "out", "save_every": 100}
    join = fork("04_refined_dpo", options, lambda: in_step(2, tell_and_wait))
    os.read(ready, 1)
    os.kill(join.pid, signal.SIGTERM)
    assert join().status == 143
    join = fork("04_refined_dpo", options, lambda: in_step(2, tell_and_wait))
    os.read(ready, 1)
    os.kill(join.pid, signal.SIGKILL)
    assert join().status == -signal.SIGKILL
    again = attempt("04_refined_dpo", **options)
    assert again.status == 0 and "going on after step 2" in again.out
    assert content(tmp_path / "out") == whole["04_refined_dpo"]


# ---------------------------------------------------------------------------------------------
# States


@pytest.fixture(params=TRAINED)
def stopped(request, good, tmp_path):
    """A stage that was killed in its seventh and last step, and its options."""
    options = good[request.param] | {"output": tmp_path / "out"}
    ran = fork(request.param, options, lambda: in_step(7, stop_with(signal.SIGKILL)))()
    assert ran.status == -signal.SIGKILL
    return request.param, options


@pytest.mark.parametrize("spoil, step", [
    (lambda newest, before: None, 6),
    (lambda newest, before: newest.unlink(), 4),
    (lambda newest, before: newest.write_bytes(newest.read_bytes()[:-1000]), 4),
    (lambda newest, before: newest.write_bytes(b""), 4),
    (lambda newest, before: [path.write_bytes(b"\0" * 99) for path in (newest, before)], 0)])
def test_of_two_states_the_newest_whole_one_is_taken(stopped, whole, tmp_path, spoil, step):
    stage, options = stopped
    partial = tmp_path / "out.partial"
    assert {path.name for path in partial.glob("state*")} == {"state-4.pt", "state-6.pt"}
    newest, before = partial / "state-6.pt", partial / "state-4.pt"
    spoil(newest, before)
    damaged = [path for path in (newest, before) if path.exists() and int(path.stem[-1]) > step]
    ran = attempt(stage, **options)
    assert ran.status == 0 and ran.err == ""
    assert [line for line in ran.out.splitlines() if "passed over" in line] == [
        line for path in damaged for line in ran.out.splitlines() if line.startswith(f"{path}: cannot be read")]
    assert ran.out.count("passed over") == len(damaged)
    assert (f"going on after step {step}\n" in ran.out) == (step > 0)
    assert content(tmp_path / "out") == whole[stage]


def test_metrics_follow_the_state(stopped, whole, tmp_path):
    stage, options = stopped
    path = tmp_path / "out.partial" / "metrics.jsonl"
    assert [line["step"] for line in rows(path)] == [1, 2, 3, 4, 5, 6]
    path.write_text(path.read_text()[:100])  # as a power cut may leave it
    assert attempt(stage, **options).status == 0
    assert content(tmp_path / "out") == whole[stage]


# ---------------------------------------------------------------------------------------------
# Two runs on one output


@pytest.mark.parametrize("stage", ["02_generate", "04_refined_dpo"])
def test_a_second_run_on_an_output_stops_and_a_stale_lock_does_not(good, whole, tmp_path, stage):
    ready, tell = os.pipe()

    def tell_and_wait():
        os.write(tell, b"x")
        signal.pause()

    options = good[stage] | {"output": tmp_path / "out"}
    join = fork(stage, options, lambda: at_event(10, tell_and_wait, tmp_path))
    os.read(ready, 1)
    before = stages.files(tmp_path)
    ran = attempt(stage, **options)
    assert ran.status == 2 and ran.out == "" and ran.err.count("\n") == 1
    assert f"{tmp_path / 'out'}: another run is making it" in ran.err
    assert stages.files(tmp_path) == before
    os.kill(join.pid, signal.SIGKILL)
    join()
    assert (tmp_path / "out.partial" / "lock").exists()
    assert attempt(stage, **options).status == 0
    assert content(tmp_path / "out") == whole[stage]


# ---------------------------------------------------------------------------------------------
# Broken storage


def refused(ran, stage, *words):
    assert ran.status == 2 and ran.err.count("\n") == 1 and ran.err.startswith(f"{stage}.py: "), ran
    for word in words:
        assert word in ran.err, ran.err


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [100, 1500, 12_000, 60_000])
def test_a_limit_on_the_size_of_files(good, whole, tmp_path, stage, size):
    options = good[stage] | {"output": tmp_path / "out"}
    limited = fork(stage, options, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))()
    if limited.status != 0 or size == 100:  # under the larger limits some stages have room enough
        refused(limited, stage, "File too large")
        assert not (tmp_path / "out").exists()
    assert attempt(stage, **options).status == 0
    assert content(tmp_path / "out") == whole[stage]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system takes root's rights")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("room, words", [  # for a record, for a state, for the model
    (1, "out.partial: No space"), (100_000, "state-2.pt: cannot be written"),
    (1_000_000, "holds the state after step 4")])
def test_a_full_disk(good, whole, small_disk, stage, room, words):
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "other").write_bytes(b"x" * (free - room))
    options = good[stage] | {"output": small_disk / "a" / "out"}
    refused(attempt(stage, **options), stage, "No space left on device", words)
    (small_disk / "other").unlink()
    assert not list(small_disk.rglob("state.tmp"))
    assert attempt(stage, **options).status == 0
    assert content(small_disk / "a" / "out") == whole[stage]


def test_a_folder_that_may_not_be_written(good, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("root may write everywhere")
    refused(attempt("01_seed_dpo", output=folder / "out", **good["01_seed_dpo"]), "01_seed_dpo", "Permission denied")
    assert list(folder.iterdir()) == []


def test_a_file_system_without_locks_is_used_without(good, whole, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(common.fcntl, "flock", flock)
    assert content(run("03_judge", output=tmp_path / "out", **good["03_judge"])) == whole["03_judge"]


@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("stage", ["00_inputs", "01_seed_dpo", "02_generate"])
def test_files_are_made_with_the_umask(good, tmp_path, stage, umask):
    assert fork(stage, good[stage] | {"output": tmp_path / "a" / "out"}, lambda: os.umask(umask))().status == 0
    for path in (tmp_path / "a").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# ---------------------------------------------------------------------------------------------
# Two ranks


def two_ranks(stage, options, *prepare):
    """Run a stage as two ranks, each after its prepare() -> their Rans."""
    meet = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(stages.free_port()))
    joins = [fork(stage, options, prepare[rank], RANK=str(rank), LOCAL_RANK=str(rank), **meet) for rank in range(2)]
    return [join() for join in joins]


def nothing():
    pass


def refuse():
    raise common.InputError("a.jsonl:3: is known to one rank alone")


@pytest.mark.parametrize("act, status, words", [
    (refuse, 2, "01_seed_dpo.py: a.jsonl:3: is known to one rank alone\n"),
    (stop_with(signal.SIGKILL), -signal.SIGKILL, "01_seed_dpo.py: another rank has ended")])
def test_a_rank_that_fails_alone_stops_both_and_one_line_says_why(good, tmp_path, act, status, words):
    options = good["01_seed_dpo"] | {"output": tmp_path / "out"}
    one, two = two_ranks("01_seed_dpo", options, nothing, lambda: in_step(5, act))
    assert (one.status, two.status) == (2, status)
    assert (one.err + two.err).startswith(words) and (one.err + two.err).count("\n") == 1
    assert {path.name for path in (tmp_path / "out.partial").glob("state*")} == {"state-2.pt", "state-4.pt"}


@pytest.mark.parametrize("stage", TRAINED)
def test_two_ranks_of_which_one_is_stopped_both_save_and_go_on_exactly(good, tmp_path, stage):
    options = good[stage] | {"micro_batch_size": 1, "save_every": 100}
    plain = two_ranks(stage, options | {"output": tmp_path / "plain"}, nothing, nothing)
    assert [ran.status for ran in plain] == [0, 0]
    options |= {"output": tmp_path / "stopped"}
    ran = two_ranks(stage, options, nothing, lambda: in_step(3, stop_with(signal.SIGTERM)))
    assert [rank.status for rank in ran] == [143, 143]
    assert (ran[0].err + ran[1].err).count("\n") == 1 and "holds the state after step 3" in ran[0].err + ran[1].err
    again = two_ranks(stage, options, nothing, nothing)
    assert [rank.status for rank in again] == [0, 0] and again[1].out == ""
    assert again[0].out.count("going on after step 3\n") == 1
    assert farthest(tmp_path / "plain", tmp_path / "stopped") == 0
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "stopped")


# ---------------------------------------------------------------------------------------------
# Visible


def test_a_log_has_a_line_each_half_minute_with_rate_and_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in common.progress(range(12), "SFT", common.Ranks(0, 1, None)):
        clock[0] += 10
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.splitlines() == [f"SFT: {n} of 12 in {at}, {left} left, 10.00s/it"
                                for n, at, left in [(3, "00:30", "01:30"), (6, "01:00", "01:00"), (9, "01:30", "00:30"),
                                                    (12, "02:00", "00:00")]]
    for _ in common.progress(range(12), "SFT", common.Ranks(1, 2, None)):
        clock[0] += 10
    assert capsys.readouterr().err == ""
