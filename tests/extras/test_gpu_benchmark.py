"""benchmarks/gpu.py on a CPU: every part in little, what fails, and the arithmetic."""

import sys
from types import SimpleNamespace

import pytest

import gpu
from support import chat, models, runs


def test_every_part_runs_the_stages_with_its_settings_on_what_is_counted(monkeypatch, tmp_path):
    load, seen = models.load_policy, []
    monkeypatch.setattr(models, "load_policy", lambda args, ranks: [seen.append(args), load(args, ranks)][1])
    rows = [row for part in gpu.PARTS for row in gpu.measure(part, tmp_path, gpu.TINY)]
    assert [row["value"] > 0 and row.get("rate", 1) > 0 for row in rows + gpu.estimate(rows)] == 10 * [True]
    assert [(args.micro_batch_size, args.gradient_checkpointing) for args in seen] == 2 * [(1, False), (8, True)]
    bench = gpu.make_bench(tmp_path / "bench", **gpu.TINY)
    tokenizer = chat.load_tokenizer(seen[0].model)
    assert set(chat.eos_ids(seen[0].model, tokenizer)) == set(gpu.EOS)  # what ends 02's responses
    for args in seen[::2]:  # of 01, of 04
        pairs, _ = chat.read_pairs(args, tokenizer, runs.PREFERENCES, runs.LABELLED)
        lengths = [len(pair[key]) for key in ("prompt", "chosen", "rejected") for pair in pairs]
        assert sum(lengths) == bench.tokens and sum(lengths[len(pairs):]) == bench.response_tokens


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(gpu.PARTS, "a", (9, {
        "one": lambda bench: 1 / 0, "two": lambda bench: gpu.run_timed("02_generate.py", bench, input="no such file"),
        "three": lambda bench: {"value": 3.0, "unit": "s", "note": ", measured"}}))
    one, two, three = gpu.measure("a", tmp_path, gpu.TINY)
    assert "ZeroDivisionError" in one["failed"] and "no such file" in two["failed"]
    assert list(gpu.table([three]))[-1] == "| a | three, measured | 3 s | - | - |"
    [peak, a] = gpu.run_parts(["a"], tiny=True)  # in processes, which do not know the part
    assert peak["value"] > 0 and a["failed"] == "exit status 1" and "KeyError: 'a'" in capfd.readouterr().err
    assert "stopped after" in gpu.in_a_process("peak", 0.1, tiny=True)[0]["failed"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "peak"])
    with pytest.raises(SystemExit) as stop:  # there is no GPU
        gpu.main()
    assert stop.value.code == 2 and capfd.readouterr().err.count("\n") == 1


def test_rates_share_of_the_peak_and_hours(monkeypatch, tmp_path):
    """An epoch of 2 s with one layer of two: 8 (50 * 20 + 7 * 10) = 8,560 operations; with both 16,560."""
    monkeypatch.setattr(gpu, "count_weights", lambda config: (50 * config.num_hidden_layers, 7))
    monkeypatch.setattr(gpu, "layers_that_fit", lambda *_: 1)
    monkeypatch.setattr(gpu, "run_timed", lambda *_, **__: ([[9], [9, 9, 1, 1]], None))
    bench = SimpleNamespace(config=gpu.MistralConfig(**gpu.TINY["shape"]), tokens=20, response_tokens=10, prompts=["x"],
                            folder=tmp_path, device=SimpleNamespace(type="cpu"))
    row = gpu.train("04", bench) | {"part": "train-7b", "setting": ""}
    assert row["note"] == ", 1 of 2 layers" and row["hours"] == pytest.approx(10_000 / 3600 * 2 * 16_560 / 8_560)
    assert list(gpu.table([row | {"part": "peak", "rate": 8560}, row]))[-1] == "| train-7b |  | 10 tokens/s | 50% | - |"
    rows = [{"stage": stage, "hours": hours} for stage, hours in zip(("01", "02", "02", "03", "04"), (9, 3, 2, 4, 1))]
    assert gpu.estimate(rows)[0]["value"] == 2 + 4 + 1 and gpu.estimate(rows[:4]) == []


def test_weights_and_the_layers_that_fit():
    # a layer: q, o 16 x 16; k, v 16 x 8; three of 16 x 24; two norms; after the last a norm. The head: 32,000 x 16
    tiny, full = (gpu.MistralConfig(**gpu.SHAPE | sizes["shape"]) for sizes in (gpu.TINY, gpu.FULL))
    assert gpu.count_weights(tiny) == (2 * (512 + 256 + 1152 + 32) + 16, 512_000)
    # Mistral-7B: 218 M a layer, 131 M each for embedding and head; (80 - 3 - 18 * 0.262) / (18 * 0.218 + 0.5) = 16.3
    assert [gpu.layers_that_fit(full, *room) for room in ((18, 80e9), (22, 80e9), (18, 200e9))] == [16, 13, 32]
    with pytest.raises(RuntimeError):
        gpu.layers_that_fit(full, 18, 10e9)
