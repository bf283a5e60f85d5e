"""Files longer than memory: 02 and 03 go through them in windows, 00 by number, and what comes out is the same."""

import json
import math
import random
import shutil

import pytest

import common
import stages
from stages import attempt, digest, rows, run, write_rows


@pytest.fixture
def small(monkeypatch):
    """Windows of 4 rows: the 14 prompts are four of them, the last with two rows."""
    monkeypatch.setattr(common, "WINDOW", 4)


@pytest.fixture(scope="module")
def sampling(world, pi_0):
    return dict(model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=8, micro_batch_size=3)


@pytest.fixture(scope="module")
def responses(sampling, tmp_path_factory):
    return run("02_generate", **sampling, output=tmp_path_factory.mktemp("in") / "responses.jsonl")


@pytest.fixture(scope="module")
def judging(responses, pi_0, pi_init):
    """One row a batch, so that a row's log-probs are the same bits whatever the windows."""
    return dict(model=pi_0, init_model=pi_init, input=responses, micro_batch_size=1)


# ---------------------------------------------------------------------------------------------
# The rows


def lettered(path, count):
    rng = random.Random(0)
    return write_rows(path, [{"id": f"p{k}", "prompt": "x" * rng.randint(1, 9)} for k in range(count)])


def test_results_are_in_the_order_of_the_rows_and_batches_of_like_length_within_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WINDOW", 7)
    path = lettered(tmp_path / "in.jsonl", 24)
    kept = common.Rows(path, {"id": common.an_id}, lambda row: None if row["id"] in ("p0", "p13") else row)
    assert (kept.read, len(kept)) == (24, 22)
    ids, batches = [row["id"] for row in kept], []
    assert ids == [f"p{k}" for k in range(24) if k not in (0, 13)]

    def compute(batch):
        batches.append([(ids.index(row["id"]), len(row["prompt"][0]["content"])) for row in batch])
        return [[float("nan"), {"é": row["id"]}] for row in batch]

    def length(row):
        return len(row["prompt"][0]["content"])

    results = common.map_rows(compute, kept, length, 3, tmp_path, common.Ranks(0, 1, None), "work of {t-1} [1]")
    for _ in range(2):  # they can be gone through again
        found = list(results)
        assert [value["é"] for _, value in found] == ids and all(math.isnan(number) for number, _ in found)
    assert [len(batch) for batch in batches] == [3, 3, 1] * 3 + [1]
    for k, batch in enumerate(batches):
        assert all(number // 7 == k // 3 for number, _ in batch)
        assert [n for _, n in batch] == sorted(n for _, n in batch)
        if k % 3:
            assert batches[k - 1][-1][1] <= batch[0][1]


def test_ids_of_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "hash", lambda text: 7, raising=False)
    path = lettered(tmp_path / "in.jsonl", 5)
    assert [row["id"] for row in common.stream_jsonl(path, {"id": common.an_id})] == [f"p{k}" for k in range(5)]


@pytest.mark.parametrize("stage", ["02_generate", "03_judge"])
@pytest.mark.parametrize("last", ["no object", "an id of the first window"])
def test_a_bad_last_row_is_named_before_a_model_works(sampling, judging, small, tmp_path, monkeypatch, stage, last):
    options = sampling if stage == "02_generate" else judging
    lines = options["input"].read_text().splitlines()
    bad = '{"id": 1' if last == "no object" else lines[1]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*lines, bad]))
    monkeypatch.setattr(common, "load_model", None)
    ran = attempt(stage, **options | {"input": path}, output=tmp_path / "out")
    assert ran.status == 2 and f"{path}:{len(lines) + 1}: " in ran.err and ran.err.count("\n") == 1


class Row(dict):
    """A row that counts how many of its kind are in memory."""
    alive = most = 0

    def __init__(self, *values):
        super().__init__(*values)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1


@pytest.mark.parametrize("stage, limit", [("02_generate", 4), ("03_judge", 4), ("01_seed_dpo", 1), ("00_inputs", 1)])
def test_no_more_rows_are_in_memory_than_a_window_has(world, sampling, judging, small, tmp_path, monkeypatch, stage, limit):
    options = {"02_generate": sampling, "03_judge": judging | {"length_penalty": "auto"},
               "01_seed_dpo": dict(model=sampling["model"], input=world / "seed.jsonl"),
               "00_inputs": dict(source=world / "all_gold.jsonl", seed_size=9, prompt_sizes=[9, 9], eval_size=4)}[stage]
    assert Row.alive == 0
    Row.most = 0
    monkeypatch.setattr(common, "parse_json", lambda text, where, real=common.parse_json: Row(real(text, where)))
    run(stage, **options, output=tmp_path / "out")
    assert Row.alive == 0 and limit <= Row.most <= limit + 1  # and the one that is being read


# ---------------------------------------------------------------------------------------------
# The stages


def test_windows_change_no_response(sampling, responses, small, tmp_path):
    assert digest(run("02_generate", **sampling, output=tmp_path / "out")) == digest(responses)


@pytest.mark.parametrize("more", [{}, {"length_penalty": "auto"}, {"judge": "llm"}, {"judge": "gold"}],
                         ids=["init", "auto", "llm", "gold"])
def test_windows_change_no_label(judging, pi_0, tmp_path, monkeypatch, more):
    options = judging | more
    if "judge" in more:
        labels = [{"id": row["id"], "label": 1 + k % 2} for k, row in enumerate(rows(judging["input"]))]
        options |= {"llm": {"judge_model": pi_0},
                    "gold": {"gold": write_rows(tmp_path / "labels.jsonl", labels)}}[more["judge"]]
        del options["model"], options["init_model"]
    whole = run("03_judge", **options, output=tmp_path / "whole")
    monkeypatch.setattr(common, "WINDOW", 4)
    windows = run("03_judge", **options, output=tmp_path / "windows")
    assert digest(windows) == digest(whole)
    counts = [json.loads(common.args_path(path).read_text())["counts"] for path in (whole, windows)]
    assert counts[0] == counts[1] and counts[0]["pairs"] == len(rows(whole))


def stop(monkeypatch, place, name, calls, after):
    """Let place.name work `after` times, then raise MemoryError once."""
    def stopping(*args, real=getattr(place, name)):
        calls.append(1)
        if len(calls) == after + 1:
            raise MemoryError
        return real(*args)
    monkeypatch.setattr(place, name, stopping)


# 02: windows of 4, 4, 4, 2 prompts in batches of 3: 2 + 2 + 2 + 1. Stopped before the first batch of the third window,
# before the second, in the last window
@pytest.mark.parametrize("after", [4, 5, 6])
def test_02_goes_on_in_a_window_and_between_two(sampling, responses, small, tmp_path, monkeypatch, after):
    calls = []
    stop(monkeypatch, common, "sample", calls, after)
    with pytest.raises(MemoryError):
        run("02_generate", **sampling, output=tmp_path / "one")
    partial = tmp_path / "one.partial"
    finished = sorted(path.name for path in partial.glob("sampling ? of 4.jsonl"))
    assert finished == [f"sampling {k + 1} of 4.jsonl" for k in range(after // 2)]
    logs = [path for path in partial.glob("*.jsonl") if path.name not in finished]
    assert [path.name for path in logs] == [f"sampling {after // 2 + 1} of 4.0.jsonl"]
    with open(logs[0], "a") as file:
        file.write('[1, [[[[7, 8')  # killed while it wrote
    other = shutil.copytree(partial, tmp_path / "two.partial")
    (other / logs[0].name).rename(other / logs[0].name.replace(".0.", ".1."))  # as another rank may have left it

    assert digest(run("02_generate", **sampling, output=tmp_path / "one")) == digest(responses)
    assert len(calls) == 7 + 1  # each batch once, and the one that was stopped
    [ranks] = stages.run_ranks(tmp_path, ("02_generate", sampling | {"output": tmp_path / "two"}))
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert digest(tmp_path / "two") == digest(responses)
    counts = [json.loads(common.args_path(path).read_text())["counts"]
              for path in (responses, tmp_path / "one", tmp_path / "two")]
    assert counts[0] == counts[1] == counts[2]


def test_a_finished_window_that_was_changed_is_done_again(sampling, responses, small, tmp_path, monkeypatch):
    calls = []
    stop(monkeypatch, common, "sample", calls, 4)
    with pytest.raises(MemoryError):
        run("02_generate", **sampling, output=tmp_path / "out")
    path = tmp_path / "out.partial" / "sampling 1 of 4.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + [lines[2].replace(", ", ", 1", 3)] + lines[3:]))
    assert digest(run("02_generate", **sampling, output=tmp_path / "out")) == digest(responses)
    assert len(calls) == 7 + 1 + 2  # the two batches of the first window once more


# 03: 14 batches of one row for each of two models
@pytest.mark.parametrize("after", [8, 10, 14, 19])
def test_03_goes_on_in_a_window_and_between_two(judging, small, tmp_path, monkeypatch, after):
    options = judging | {"length_penalty": "auto"}
    whole, calls = run("03_judge", **options, output=tmp_path / "whole"), []
    with monkeypatch.context() as patch:
        stop(patch, common, "response_logps", calls, after)
        with pytest.raises(MemoryError):
            run("03_judge", **options, output=tmp_path / "one")
        shutil.copytree(tmp_path / "one.partial", tmp_path / "two.partial")
        assert digest(run("03_judge", **options, output=tmp_path / "one")) == digest(whole)
        assert len(calls) == 2 * 14 + 1
    if after == 10:
        [ranks] = stages.run_ranks(tmp_path, ("03_judge", options | {"output": tmp_path / "two"}))
        assert [rank.status for rank in ranks] == [0, 0], ranks
        assert digest(tmp_path / "two") == digest(whole)
