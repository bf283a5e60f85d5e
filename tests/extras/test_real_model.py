"""benchmarks/real_model.py, in little: its stages in this process, another gold than VADER's."""

import statistics
import sys
from pathlib import Path

import real_model
import shared
from stages import attempt, rows

TINY = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


def gold(text):
    """The share of words with an even number, from -1 to 1."""
    return statistics.mean([1 - 2 * (int(word[1:]) % 2) for word in text.split()] or [0])


def start(command, *_):
    """A stage in this process."""
    ran = attempt(Path(command[1]).stem, *command[2:])
    assert ran.status == 0, ran.err


def test_every_arm_is_trained_on_its_labels_and_measured(monkeypatch, tmp_path, capsys):
    shared.make_inputs(tmp_path, 1, **TINY)
    for name, value in dict(lexicon=lambda: None, sentiment=gold, run_logged=start, BATCH_SIZE=4, MAX_NEW_TOKENS=5,
                            SIZES=dict(zip(real_model.SIZES, (9, 6, 7, 12))),
                            run_seeds=lambda run, args: list(map(run, args.seeds))).items():
        monkeypatch.setattr(real_model, name, value)
    monkeypatch.setattr(sys, "argv", ["real_model.py", *shared.command_line(dict(
        model=tmp_path / "model", seeds=7, runs=tmp_path, figure=tmp_path / "figure.svg"))])
    real_model.main()
    folder, printed = tmp_path / "real-seed7-lr2e-05-beta0.1", capsys.readouterr().out
    first, random_labels, gold_labels = (rows(folder / name) for name in ("preferences_1.jsonl", "random.jsonl",
                                                                          "gold.jsonl"))
    assert all(gold(pair["chosen"]) > gold(pair["rejected"]) for pair in rows(folder / "seed.jsonl"))
    assert all(real_model.margin(pair) >= 0 for pair in gold_labels) and any(real_model.margin(p) < 0 for p in first)
    for other in (random_labels, gold_labels):  # the same pairs
        assert [{p["chosen"]["text"], p["rejected"]["text"]} for p in other] == [
            {p["chosen"]["text"], p["rejected"]["text"]} for p in first]
    steps = {arm: len(rows(folder / arm / "metrics.jsonl")) for arm in real_model.ARMS if arm != "pi_init"}
    of_spa = steps["pi_0"] + steps["spa_1"] + steps["spa_2"]
    assert abs(steps["seed_longer"] - of_spa) <= steps["pi_0"] / 6  # half an epoch
    assert steps["random_1"] == steps["gold_1"] == steps["plain_1"] == steps["spa_1"]
    answers = {arm: [row["response"] for row in rows(folder / f"eval_{arm}" / "responses.jsonl")]
               for arm in real_model.ARMS}
    for arm, texts in answers.items():
        wins = [100 if gold(a) > gold(b) else 50 if gold(a) == gold(b) else 0
                for a, b in zip(texts, answers["pi_init"], strict=True)]
        cells = f"| {statistics.mean(map(gold, texts)):.2f} ± 0.00 | {statistics.mean(wins):.1f} ± 0.0 |"
        assert f"| {real_model.ARMS[arm]} {cells}" in printed
        assert f"  {real_model.ARMS[arm]:46}{statistics.mean(map(gold, texts)):6.2f}\n" in printed
    right = [real_model.margin(pair) > 0 for pair in first if real_model.margin(pair)]
    assert f"| {100 * statistics.mean(right):.1f} ± 0.0 |" in printed
    assert sum(line.startswith("> ") for line in printed.splitlines()) == 10
    assert "SPA" in (tmp_path / "figure.svg").read_text()


def test_differences_have_the_error_over_seeds_and_that_over_prompts():
    """Sentiments: gains of 1 and 3 in the first seed, 4 and 4 in the second: means 2 and 4."""
    found = [{"spa_1": {"sentiments": [2, 5], "wins": [100, 50]}, "pi_0": {"sentiments": [1, 2], "wins": [50, 50]}},
             {"spa_1": {"sentiments": [4, 4], "wins": [50, 50]}, "pi_0": {"sentiments": [0, 0], "wins": [50, 50]}}]
    *_, line = real_model.differences_table(found, [("spa_1", "pi_0")])
    # over seeds sqrt(2) / sqrt(2) = 1; over prompts the deviation of 1, 3, 4, 4, sqrt(2), by sqrt(4)
    assert line.endswith("| +3.00 ± 1.00 (0.71) | +12.5 ± 12.5 (12.5) |")
