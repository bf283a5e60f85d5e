"""benchmarks/gpu.py on a CPU: every part in little, parts that fail, and the arithmetic."""

import importlib.util
import itertools
import math
import sys
from types import SimpleNamespace

import pytest

import common
from support import models
import stages

sys.path.append(str(stages.ROOT / "benchmarks"))
import gpu


@pytest.fixture(scope="module")
def rows():
    """{part: its rows}"""
    *_, found = gpu.run_parts(gpu.PARTS, tiny=True)
    return {part: list(of_part) for part, of_part in itertools.groupby(found, lambda row: row["part"])}


def lacks_a_package(row):
    """TRL is not required; on a CPU continuous batching of transformers 5.17 needs psutil."""
    package = "trl" if row["part"] == "trl-1b" else "psutil" if "generate_batch" in row["setting"] else "torch"
    return "failed" in row and not importlib.util.find_spec(package)


def test_every_part_gives_rows_with_finite_values(rows):
    assert [*rows] == [*gpu.PARTS, "estimate"]
    if not importlib.util.find_spec("trl"):
        assert {row["failed"] for row in rows["trl-1b"]} == {"ModuleNotFoundError: No module named 'trl'"}
    for row in (row for found in rows.values() for row in found if not lacks_a_package(row)):
        assert "failed" not in row and math.isfinite(row["value"]) and row["value"] >= 0, row
        assert row["value"] > 0 or "itself" in row["setting"], row
        assert 0 < row.get("rate", 1) < math.inf, row
    counts = {part.split("-")[0]: len(found) for part, found in rows.items()}
    assert counts == {"peak": 1, "train": 8, "sample": 4, "judge": 3, "attention": 3, "trl": 2, "compile": 3,
                      "estimate": 1}
    everything = [row for found in rows.values() for row in found]
    assert gpu.table(everything).count("\n| ") == len(everything) + 1  # and the heading


def test_the_same_model_has_no_margin_and_the_same_attention_the_same_output(rows):
    assert all(row["setting"].endswith("; first margins at most 0") for row in rows["train-1b"] + rows["train-7b"])
    of_itself, by_dtype = rows["judge-7b"][1:]
    assert of_itself["value"] == 0 < by_dtype["value"] < 0.1  # bf16 differs
    assert all(float(row["setting"].split("at most ")[1].split()[0]) < 1e-5 for row in rows["attention"])


def test_the_settings_reach_the_stages(monkeypatch):
    """Activation checkpointing, whether a prompt is shared, the layers that fit; 04 counts 6 N + 2 N, 01 6 N."""
    real, seen = models.load_policy, []

    def load_policy(args, ranks):
        model, policy = real(args, ranks)
        seen.append((args.activation_checkpointing, model.max_shared_length > 0, args.micro_batch_size,
                     len(model.base_model.layers)))
        return model, policy

    monkeypatch.setattr(models, "load_policy", load_policy)
    monkeypatch.setattr(gpu, "layers_that_fit", lambda *_: 1)
    rows = list(gpu.measure("train-1b", tiny=True))
    assert all("1 of 2 layers" in row["setting"] for row in rows)
    assert seen == 2 * [(False, True, 2, 1), (False, False, 2, 1), (True, True, 4, 1), (True, False, 4, 1)]
    counted = {row["stage"]: row["rate"] / row["value"] for row in rows}  # operations of a token
    assert counted["04"] / counted["01"] == pytest.approx(8 / 6, rel=0.05)


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
    def partly(bench):
        yield "one", lambda: 1 / 0
        yield "two", lambda: gpu.run_timed("02_generate.py", model=bench.folder / "model")  # what a stage refuses
        yield "three", lambda: {"value": 3.0, "unit": "s", "note": ", measured"}

    monkeypatch.setattr(gpu, "PARTS", {"peak": gpu.PARTS["peak"], "a": (partly, "1b", 60)})
    *_, [peak, one, two, three] = gpu.run_parts(["a"], tiny=True)
    assert peak["value"] > 0
    assert one["failed"].startswith("ZeroDivisionError") and "required: --input" in two["failed"]
    assert three == {"part": "a", "shape": "1b", "setting": "three, measured", "value": 3.0, "unit": "s"}
    assert "| a | 1b | one | failed: ZeroDivisionError: division by zero | - | - |\n" in gpu.table([one])


def test_a_part_in_a_process_of_its_own(monkeypatch):
    [row] = gpu.in_a_process("peak", 120, tiny=True)
    assert row["value"] > 0
    [row] = gpu.in_a_process("train-7b", 0.1, tiny=True)
    assert row["failed"].startswith("stopped after") and row["part"] == "train-7b"
    monkeypatch.setitem(gpu.PARTS, "a", (None, "7b", 60))  # which the process does not know
    assert gpu.in_a_process("a", 120, tiny=True) == [{"part": "a", "shape": "7b", "setting": "",
                                                      "failed": "KeyError: 'a'"}]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    [row] = gpu.in_a_process("peak", 60)
    assert row["failed"] == "exit status 1"
    *_, found = gpu.run_parts(["attention"], minutes=0)
    assert len(found) == 2 and all("no time" in row["failed"] for row in found)


def test_share_of_the_peak(monkeypatch):
    """A prompt of 10 tokens, responses of 4 and 6: the layers are passed by 20 tokens, the head by 10."""
    pair = {"id": "0", "prompt": [3] * 10, "chosen": [3] * 4, "rejected": [3] * 6}
    assert gpu.operations((100, 7), [pair], 6) == 6 * (100 * 20 + 7 * 10)
    assert gpu.operations((100, 7), [pair], 6 + 2) == 16_560
    # half of the layers in 2 s, after a step that does not count: 8 (50 * 20 + 70) / 2 = 4,280 a second
    monkeypatch.setattr(gpu, "count_weights", lambda config: config)
    bench = SimpleNamespace(config=(100, 7), size=SimpleNamespace(pairs=1))
    rates = gpu.step_rates(bench, SimpleNamespace(seconds=[9, 2], memory=0), [[pair], [pair]], (50, 7), 8)
    assert rates["value"] == 10 and rates["rate"] == 4280  # tokens and operations a second
    assert rates["prompts_a_second"] == pytest.approx(4280 / 16_560)  # with all layers
    peak = {"part": "peak", "shape": "-", "setting": "", "value": 8560, "unit": "", "rate": 8560}
    assert "| 10 tokens/s | 50% | - |\n" in gpu.table([peak, {"part": "a", "shape": "7b", "setting": "", **rates}])


def test_weights_and_the_layers_that_fit():
    # a layer: q, o 16 x 16; k, v 16 x 8; three of 16 x 24; two norms; after the last a norm. The head: 100 x 16
    assert gpu.count_weights(gpu.LlamaConfig(**gpu.TINY_CONFIG)) == (2 * (512 + 256 + 1152 + 32) + 16, 1600)
    # Mistral-7B: 218 M a layer, 131 M each for the embedding and the head
    # (80 - 3 - 18 * 0.262) / (18 * 0.218 + 0.5) = 16.3; (80 - 3 - 22 * 0.262) / (22 * 0.218 + 0.5) = 13.4
    config = gpu.CONFIGS["7b"]
    assert [gpu.layers_that_fit(config, size, free) for size, free in ((18, 80e9), (22, 80e9), (18, 150e9))] == [
        16, 13, 32]
    with pytest.raises(RuntimeError):
        gpu.layers_that_fit(config, 18, 10e9)


def test_hours_of_an_iteration():
    """Each stage at its best rate: 10,000 (1 / 4 + 1 / 20 + 1 / 2) s = 8,000 s. 01 and other shapes do not count."""
    def row(part, stage, rate):
        return {"part": part, "stage": stage, "prompts_a_second": rate}

    found = [row("sample-7b", "02", 4), row("sample-7b", "02", 3), row("judge-7b", "03", 20), row("train-7b", "04", 2),
             row("train-7b", "01", 9), row("train-1b", "04", 9), row("compile-7b", "02", 9), {"part": "peak"}]
    assert gpu.estimate(found)[0]["value"] == pytest.approx(8000 / 3600)
    assert gpu.estimate(found[:3]) == []
