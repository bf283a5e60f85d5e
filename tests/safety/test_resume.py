"""Stopped anywhere, by a kill or a signal, a stage resumes and gives what an undisturbed run gives, on any ranks.

And what else can go wrong around a run: another run on its output, storage that breaks, a rank that fails alone.
"""

import os
import re
import resource
import signal

import pytest
import torch

import common
from support import runs
import stages
from children import (ALL, STAGES, TRAINED, after_batch, at_end, at_event, content, fork, good, in_step, kill,
                      no_child_outlives_its_test, stop_with, two_ranks, whole)
from stages import attempt, farthest, metrics, rows, run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number, status, every, at_least", [
    (signal.SIGKILL, -signal.SIGKILL, 3, 6), (signal.SIGTERM, 143, 7, 2)], ids=["SIGKILL", "SIGTERM"])
def test_stopped_ever_later_a_stage_ends_the_same(good, whole, tmp_path, stage, number, status, every, at_least):
    output, stops = tmp_path / "out", 0
    for n in range(1, 300, every):
        ran = fork(stage, good[stage] | {"output": output}, lambda: at_event(n, stop_with(number), output))()
        if ran.status == 0:
            break
        assert ran.status == status and ran.err.count("\n") == (number == signal.SIGTERM), ran
        assert number == signal.SIGKILL or ran.err.startswith(f"{stage.split()[0]}.py: ") and "SIGTERM" in ran.err
        stops += 1
    assert ran.status == 0 and stops >= at_least
    assert content(output) == whole(stage)


def test_a_second_ctrl_c_stops_at_once(good, whole, tmp_path):
    options = good["01_seed_dpo"] | {"output": tmp_path / "out"}
    ran = fork("01_seed_dpo", options, lambda: in_step(6, lambda: [stop_with(signal.SIGINT)() for _ in "12"]))()
    assert ran.status == 130 and ran.err.count("\n") == 1 and "after step 4: " in ran.err
    assert attempt("01_seed_dpo", **options).status == 0
    assert content(tmp_path / "out") == whole("01_seed_dpo")


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("spoil, step", [
    (lambda newest, before: None, 6),
    (lambda newest, before: newest.unlink(), 4),
    (lambda newest, before: newest.write_bytes(newest.read_bytes()[:-1000]), 4),
    (lambda newest, before: [path.write_bytes(b"\0" * 99) for path in (newest, before)], 0)])
def test_the_newest_whole_state_is_taken_and_metrics_follow_it(good, whole, tmp_path, stage, spoil, step):
    options, partial = good[stage] | {"output": tmp_path / "out"}, tmp_path / "out.partial"
    assert fork(stage, options, lambda: in_step(7, kill))().status == -signal.SIGKILL
    newest, before = partial / "state-6.pt", partial / "state-4.pt"
    assert {*partial.glob("state*")} == {newest, before}
    assert [line["step"] for line in rows(partial / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    spoil(newest, before)
    (partial / "metrics.jsonl").write_text((partial / "metrics.jsonl").read_text()[:100])  # as a power cut may leave it
    damaged = [path for path in (newest, before) if path.exists() and int(path.stem[-1]) > step]
    assert fork(stage, options, lambda: in_step(1, kill))().status == -signal.SIGKILL  # again, which loses no state
    ran = attempt(stage, **options)
    assert ran.status == 0 and ran.err == ""
    assert [line.split(":")[0] for line in ran.out.splitlines() if ".pt: " in line] == [str(path) for path in damaged]
    assert (f"after step {step}\n" in ran.out) == (step > 0)
    assert content(tmp_path / "out") == whole(stage)


def recorded(partial):
    """{journal: its batches, as lists of rows}, those of all ranks."""
    labels = {path.name.rsplit(".", 2)[0] for path in partial.glob("*.*.jsonl")}
    return {label: sorted(list(batch) for batch, _ in runs.read_journal(partial, label)) for label in sorted(labels)}


# {stage: batches of each journal}
JOURNALS = {"01_seed_dpo": [3], "02_generate": [3], "03_judge": [3, 3], "05_eval sample": [3]}


@pytest.mark.parametrize("stage", JOURNALS)
@pytest.mark.parametrize("left_by", ["one rank", "another rank", "two, to two ranks"])
def test_finished_batches_are_not_computed_again_and_damaged_ones_are_none(good, whole, tmp_path, stage, left_by):
    batches = JOURNALS[stage]
    options, partial = good[stage] | {"output": tmp_path / "out"}, tmp_path / "out.partial"
    assert fork(stage, options, lambda: after_batch(sum(batches) - 1, kill))().status == -signal.SIGKILL
    before = recorded(partial)
    [*_, journal] = sorted(partial.glob("*.0.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert 0 < sum(map(len, before.values())) < sum(batches)
    first = journal.read_text().split("\n")[1]
    damaged = re.sub(r"(?<=\[\[)\d", lambda digit: str(int(digit[0]) + 1), first, count=1)
    with open(journal, "a") as file:
        file.write(damaged + '\n[1234, [1, [[[7, 8')  # a line that does not fit its checksum; killed while it wrote
    if left_by != "one rank":
        journal.rename(str(journal).replace(".0.", ".1."))
    assert recorded(partial) == before
    if left_by == "two, to two ranks":
        assert [rank.status for rank in two_ranks(stage, options)] == [0, 0]
    else:
        assert fork(stage, options, lambda: at_end(kill, tmp_path / "out"))().status == -signal.SIGKILL
        after = recorded(partial)
        assert list(map(len, after.values())) == batches
        for label, rows_of_batches in after.items():  # each row once
            assert sorted(sum(rows_of_batches, [])) == list(range(sum(map(len, rows_of_batches))))
            assert all(batch in rows_of_batches for batch in before.get(label, []))
        assert attempt(*stage.split(), **options).status == 0
    if stage != "01_seed_dpo" or left_by != "two, to two ranks":  # gradients are summed in another order
        assert content(tmp_path / "out") == whole(stage)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("stage", TRAINED)
def test_training_that_ran_out_of_memory_resumes_with_less(good, tmp_path, stage):
    whole = run(stage, output=tmp_path / "whole", **good[stage])
    options, partial = good[stage] | {"output": tmp_path / "out"}, tmp_path / "out.partial"
    ran = fork(stage, options, lambda: in_step(6, out_of_memory))()
    assert ran.status == 2 and ran.err.count("\n") == 1 and "--micro-batch-size" in ran.err, ran
    assert f"{partial} has the state after step 4: " in ran.err
    less = dict(micro_batch_size=2, micro_batch_tokens=50, gradient_checkpointing=True)
    again = attempt(stage, **options | less)
    assert again.status == 0 and "after step 4\n" in again.out and "--micro-batch-size 8 (now 2)" in again.out
    assert farthest(whole, tmp_path / "out") < 2e-5
    for ours, theirs in zip(metrics(tmp_path / "out"), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    record = runs.read_record(tmp_path / "out")
    assert {name: record["made_from"]["args"][name] for name in less} == less


@pytest.mark.parametrize("stage", JOURNALS)
def test_batches_of_another_size_are_taken_by_their_rows(good, tmp_path, stage):
    whole = run(*stage.split(), output=tmp_path / "whole", **good[stage])
    options, partial = good[stage] | {"output": tmp_path / "out"}, tmp_path / "out.partial"
    assert fork(stage, options, lambda: after_batch(sum(JOURNALS[stage]) - 2, kill))().status == -signal.SIGKILL
    before = recorded(partial)
    assert fork(stage, options | {"micro_batch_size": 2}, lambda: at_end(kill, tmp_path / "out"))().status < 0
    after = recorded(partial)
    for label, batches in after.items():
        kept = [batch for batch in batches if batch in before.get(label, [])]
        assert kept == before.get(label, []) and all(len(batch) <= 2 for batch in batches if batch not in kept)
        assert sorted(sum(batches, [])) == list(range(len(sum(batches, []))))  # each row once
    assert attempt(*stage.split(), **options | {"micro_batch_size": 3}).status == 0
    if stage == "01_seed_dpo":
        assert farthest(whole, tmp_path / "out") < 2e-5
        return
    for ours, theirs in zip(*(rows(path / "responses.jsonl" if path.is_dir() else path)
                              for path in (tmp_path / "out", whole)), strict=True):
        logps, expected = (row.pop("logps", {}) for row in (ours, theirs))
        assert logps == {model: pytest.approx(expected[model], abs=1e-4) for model in expected}
        assert ours.pop("p", 0) == pytest.approx(theirs.pop("p", 0), abs=1e-4)
        assert ours == theirs


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


# (bytes that a file may have, where the stage fails then); the states are the largest files, unless none is saved
LIMITS = [(100, ": "), (1500, ": "), (12_000, ": "), (60_000, "out.partial/state-2.pt: "),
          (60_000, "out.partial/model")]


@pytest.mark.parametrize("stage, size, where", [
    (stage, *limit) for stage in ALL for limit in (LIMITS if stage in TRAINED else LIMITS[:3])])
def test_a_limit_on_the_size_of_files(good, whole, tmp_path, stage, size, where):
    options = good[stage] | {"output": tmp_path / "out"} | ({"save_every": 100} if where.endswith("model") else {})
    limited = fork(stage, options, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))()
    if limited.status != 0 or size in (100, 60_000):  # under the others some stages have room enough
        assert limited.status == 2 and limited.err.count("\n") == 1 and os.strerror(27) in limited.err, limited
        assert where in limited.err and not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("state*.tmp"))
    assert attempt(*stage.split(), **options).status == 0
    assert content(tmp_path / "out") == whole(stage)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    runs.write_json(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        runs.write_jsonl(tmp_path / "file", (1 / k for k in (1, 0)))
    assert (tmp_path / "file").read_text() == '"old"\n'


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
