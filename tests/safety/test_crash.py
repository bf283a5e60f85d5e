"""What can go wrong around a run: another run on its output, storage that breaks, a rank that fails alone."""

import os
import resource
import signal
import subprocess

import pytest

import common
from support import runs
import stages
from children import (STAGES, TRAINED, at_event, content, fork, good, in_step, kill, no_child_outlives_its_test,
                      two_ranks, whole)
from stages import attempt, run


@pytest.mark.parametrize("stage", ["02_generate", "04_refined_dpo"])
def test_a_second_run_on_an_output_is_refused_and_a_stale_lock_is_none(good, whole, tmp_path, stage):
    ready, tell = os.pipe()

    def tell_and_wait():
        os.write(tell, b"x")
        signal.pause()

    options = good[stage] | {"output": tmp_path / "out"}
    join = fork(stage, options, lambda: at_event(10, tell_and_wait, tmp_path))
    os.read(ready, 1)
    before = stages.files(tmp_path)
    assert f"{tmp_path / 'out'}: " in stages.refused(stage, **options)
    assert stages.files(tmp_path) == before
    os.kill(join.pid, signal.SIGKILL)
    join()
    assert (tmp_path / "out.partial" / "lock").exists()
    assert attempt(stage, **options).status == 0
    assert content(tmp_path / "out") == whole(stage)


# ---------------------------------------------------------------------------------------------
# Storage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [100, 1500, 12_000, 60_000])
def test_a_limit_on_the_size_of_files(good, whole, tmp_path, stage, size):
    options = good[stage] | {"output": tmp_path / "out"}
    limited = fork(stage, options, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))()
    if limited.status != 0 or size == 100:  # under the larger limits some stages have room enough
        assert limited.status == 2 and limited.err.count("\n") == 1 and os.strerror(27) in limited.err, limited
        assert not (tmp_path / "out").exists()
    assert attempt(*stage.split(), **options).status == 0
    assert content(tmp_path / "out") == whole(stage)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    runs.write_json(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        runs.write_jsonl(tmp_path / "file", (1 / k for k in (1, 0)))
    assert (tmp_path / "file").read_text() == '"old"\n'


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("room, words", [  # for a record, for a state, for the model
    (1, "out.partial: "), (100_000, "state-2.pt: "), (1_000_000, "after step 4: ")])
def test_a_full_disk(good, whole, small_disk, stage, room, words):
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "other").write_bytes(b"x" * (free - room))
    options = good[stage] | {"output": small_disk / "a" / "out"}
    error = stages.refused(stage, **options)
    assert os.strerror(28) in error and words in error
    (small_disk / "other").unlink()
    assert not list(small_disk.rglob("state*.tmp"))
    assert attempt(stage, **options).status == 0
    assert content(small_disk / "a" / "out") == whole(stage)


def test_a_file_system_without_locks_is_used_without(good, whole, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    assert content(run("03_judge", output=tmp_path / "out", **good["03_judge"])) == whole("03_judge")


@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("stage", ["00_inputs", "01_seed_dpo", "02_generate"])
def test_files_are_made_with_the_umask(good, tmp_path, stage, umask):
    assert fork(stage, good[stage] | {"output": tmp_path / "a" / "out"}, lambda: os.umask(umask))().status == 0
    for path in (tmp_path / "a").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# ---------------------------------------------------------------------------------------------
# Ranks


def refuse():
    raise runs.InputError("a.jsonl:3: is known to one rank alone")


@pytest.mark.parametrize("act, status, where", [(refuse, 2, "a.jsonl:3: "), (kill, -signal.SIGKILL, "")])
def test_a_rank_that_fails_alone_stops_both_and_one_line_says_why(good, tmp_path, act, status, where):
    options = good["01_seed_dpo"] | {"output": tmp_path / "out"}
    one, two = two_ranks("01_seed_dpo", options, lambda: in_step(5, act))
    assert (one.status, two.status) == (2, status)
    assert (one.err + two.err).startswith("01_seed_dpo.py: " + where) and (one.err + two.err).count("\n") == 1
    assert {path.name for path in (tmp_path / "out.partial").glob("state*")} == {"state-2.pt", "state-4.pt"}


def test_a_log_has_a_line_each_half_minute_with_rate_and_time_left_and_none_of_other_ranks(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for rank in (0, 1):
        for _ in runs.progress(range(12), "SFT", common.Ranks(rank, 2, None)):
            clock[0] += 10
    assert capsys.readouterr().err == "".join(
        f"SFT: {n} of 12 in {at}, {left} left, 10.00s/it\n" for n, at, left in [
            (3, "00:30", "01:30"), (6, "01:00", "01:00"), (9, "01:30", "00:30"), (12, "02:00", "00:00")])
