"""benchmarks/tables.py: what it would run, and what it reports; and the small world's reward model."""

from pathlib import Path

import numpy as np
import pytest
import torch

import flags
import reward_model
import stages
import tables
from conftest import WORLD
from extras import judges, small_world
from stages import rows, run, write_rows
from support import models, records
from tables import Row


@pytest.fixture(scope="module")
def plan():
    return tables.Plan(Path("runs"), 1)


def test_the_settings_are_those_of_run_all(plan, monkeypatch):
    train = plan.tasks[plan.spa("spa", 2)].options
    assert [train[key] for key in ("beta", "lr", "batch_size", "lam", "seed")] == ["10", "2e-4", "16", "0.25", "1"]
    monkeypatch.setenv("LR", "0.5")
    assert tables.Plan(Path("runs"), 1).of["04_refined_dpo.py"][0]["lr"] == "0.5"
    monkeypatch.setenv("LR", "half")
    with pytest.raises(SystemExit) as stop:
        tables.Plan(Path("runs"), 1)
    assert "LR" in str(stop.value)


def test_every_command_is_one_that_its_stage_takes_and_reads_what_one_before_it_made(plan):
    made = set()
    for task in plan.tasks.values():
        if "/" not in task.stage:
            script, *words = tables.words(task)
            assert stages.parsed(script.removesuffix(".py"), words).output == str(task.output)
        for value in task.options.values():
            assert not isinstance(value, Path) or value in made or value.parent in made
        made.add(task.output)


def test_what_tables_share_is_made_once_and_a_table_runs_only_what_it_needs(plan):
    first = [task for task in plan.tasks.values() if task.stage == "03_judge.py"
             and task.options.get("model") == plan.spa("spa", 0) and "length_penalty" not in task.options]
    assert len(first) == 1  # one iteration 1 for Tables 1, 2, 6, 7, 10, 11 and Figure 3, whatever refines it
    assert plan.preferences("llm_again", 1) == plan.preferences("llm", 1)
    names = {key: " ".join(str(task.output) for task in plan.needed([key])) for key in ("6", "F4")}
    assert "llm" not in names["6"] and "worst_case" in names["6"] and "spa/" not in names["F4"]
    assert len(plan.tasks) == len(plan.needed(plan.evaluated))


def test_the_judges_of_table_7(plan):
    policies = [plan.tasks[plan.tasks[output].options["model"]] for output in plan.evaluated["7"]]
    one, ours, previous, reward, seed, none = [plan.tasks[task.options["input"]].options for task in policies]
    assert ours["model"] == previous["model"] == none["model"] and one["model"] == plan.spa("spa", 0)
    assert ours["init_model"] == plan.pi_init() and "judge" not in ours
    assert (previous["judge"], previous["ref_model"]) == ("previous", plan.spa("spa", 0))
    assert (reward["judge"], seed["judge"], none["judge"]) == ("reward", "reward", "none")
    assert [plan.tasks[options["reward_model"]].options["input"].name for options in (reward, seed)] == [
        "all_gold.jsonl", "seed.jsonl"]
    assert len({options["input"] for options in (ours, previous, reward, seed, none)}) == 1  # the same responses


def test_the_arms_of_table_6b_share_what_they_start_from(plan):
    pi_1, responses = plan.spa("spa_none", 1), plan.tasks[plan.preferences("spa_none", 2)].options["input"]
    assert plan.tasks[responses].options["model"] == pi_1
    for labels, arm in tables.CELLS:
        task = plan.tasks[plan.spa(f"{labels}, {arm}", 0 if labels == "the seed" else 2)]
        assert (task.stage == "extras/worst_case_dpo.py") == ("worst case" in arm)
        lam = None if "worst case" in arm else "0" if labels == "the seed" else "0.25"
        assert task.options.get("lam") == lam
        if labels == "the seed":
            assert [task.options[key] for key in ("model", "input", "epochs")] == [
                plan.pi_init(), plan.data() / "seed.jsonl", "3"]
            continue
        judged = plan.tasks[task.options["input"]]
        if "turned" in labels:
            assert judged.options["flip"] == float(labels.split()[0]) / 100
            judged = plan.tasks[judged.options["input"]]
        assert (task.options["model"], judged.options["input"]) == (pi_1, responses)


def test_what_is_compared_shares_its_prompts_and_its_gold(plan):
    assert plan.tasks[plan.data("long")].options["gold_length"] == tables.GOLD_LENGTH
    for key, (_, _, table) in tables.TABLES.items():
        world = plan.data("long" if key == "10" else "spa")
        assert {(plan.tasks[output].options["gold"], plan.tasks[output].options["input"])
                for output in plan.evaluated[key]} == {(world / "gold.json", world / "eval.jsonl")}
        assert {row.minus for row in table} - {None} <= {row.model for row in table}


def test_only_the_llm_that_judges_knows_the_words_of_listing_1(plan):
    assert "llm_judge" not in plan.tasks[plan.data()].options
    for task in plan.tasks.values():
        if task.options.get("judge") == "llm":
            start = plan.tasks[task.options["judge_model"]]
            while start.stage != "00_inputs.py":  # back to the base model
                start = plan.tasks.get(start.options["model"]) or plan.tasks[start.options["model"].parent]
            assert start.options["llm_judge"] is True


def test_stages_run_in_turn_are_not_run_again_and_the_one_that_fails_is_named(tmp_path):
    data = tables.Task(tmp_path / "data", "00_inputs.py", WORLD)
    dpo = tables.Task(tmp_path / "pi_0", "01_seed_dpo.py",
                      dict(model=data.output / "base", input=data.output / "seed.jsonl"))
    for _ in range(2):
        assert tables.run_tasks([data, dpo]) is None
    assert Path(f"{dpo.output}.log").read_text().count("already complete") == 1
    line = tables.run_tasks([dpo._replace(options=dpo.options | {"lr": "1e-3"})])  # in the same place
    assert "01_seed_dpo.py ended with status 2" in line and "--lr" in line


def results(*win_rates):
    return [{"length_controlled_winrate": [1.0, 1.0], "win_rate": rates, "avg_length": [5.0, 5.0]}
            for rates in win_rates]


@pytest.mark.parametrize("found, sentence", [
    (results([10.0, 20.0], [30.0, 30.0], [20.0, 20.0]),  # b - a: 20, 10; c - a: 10, 0; b - c: 10, 10
     'By win rate, 2 of the paper\'s 3 orders are seen here. No difference seen: "c" minus "a" is +5.0 ± 5.0.'),
    # b - a: -2, -4, 3 standard errors of 1 below 0; c - a: 2, 0; b - c: -4, -4
    (results([14.0, 16.0], [12.0, 12.0], [16.0, 16.0]),
     'By win rate, 0 of the paper\'s 3 orders are seen here. Contrary: "a" is above "b" by 3.0 ± 1.0; '
     '"c" is above "b" by 4.0 ± 0.0. No difference seen: "c" minus "a" is +1.0 ± 1.0.')])
def test_the_order_of_rows(found, sentence):
    rows = [Row(label, (0, value), None) for label, value in (("a", 1), ("b", 3), ("c", 2))]
    assert tables.order(rows, found) == sentence


def test_only_rows_that_the_paper_compares_are_compared():
    rows = [Row("a", (0, 1), None, family="x"), Row("b", (0, 2), None, family="y"), Row("c", (), None, family="x"),
            Row("d", (0, 1), None, family=None), Row("e", (0, 2), None, family=None)]
    assert tables.order(rows, results([1.0], [2.0], [3.0], [4.0], [5.0])) == ""


def test_a_row_is_compared_within_its_seeds():
    rows = [Row("a", (0, 1), "a/0"), Row("b", (0, 2), "b/0", "a/0")]
    last = tables.block("1", rows, results([10.0, 30.0], [13.0, 31.0])).split("\n")[5]
    # 3 and 1: mean 2, standard deviation 2 ** 0.5, standard error 1
    assert last == "| b | 1.0 ± 0.0 | 22.0 ± 12.7 | 5.0 ± 0.0 | +2.0 ± 1.0 (a) | 0 | 2 |"


def test_the_variance_over_the_samples_of_the_seed():
    rows = [Row(f"{name}, {k}", (), None) for name in ("DPO", "SPA") for k in "123"]
    line = tables.over_samples(rows, results(*([value, 10.0] for value in (1.0, 2.0, 3.0)), *[[5.0, 7.0]] * 3))
    # DPO: averages 2 and 10, variances 1 and 0; SPA: averages 5 and 7
    assert "DPO, win rate: average 6.0, variance over the samples 0.5 (standard deviation 0.7)." in line
    assert "SPA, win rate: average 6.0, variance over the samples 0.0" in line


def test_what_the_detectors_flag():
    """K = 50, a window of 3: numpy's weibull percentile is the middle of three values."""
    threshold = stages.load("04_refined_dpo").threshold
    steps = [[0.2, 0.9], [0.6, 0.1], [0.5, 0.7], [0.55, 0.8]]
    # tau is of the last three values before a step: none, none (two known), 0.6 of 0.9 0.6 0.1, 0.5 of 0.1 0.5 0.7
    flagged = flags.flags(steps, threshold, window=3, k_percent=50, refine_after=0)
    assert [of_step.tolist() for of_step in flagged] == [[False, False], [False, False], [True, False], [False, False]]
    late = flags.flags(steps, threshold, window=3, k_percent=50, refine_after=0.75)
    assert not np.concatenate(late).any()  # 0.5 was below tau in the third step of four, which is too early now


def test_how_often_flagged_labels_are_wrong():
    confidence, flagged = [np.array([0.1, 0.4, 0.6, 0.6, 0.9, 0.2])], [np.array([1, 1, 0, 0, 0, 1], dtype=bool)]
    wrong, known = [np.array([1, 0, 1, 0, 0, 0], dtype=bool)], [np.array([1, 1, 1, 1, 1, 0], dtype=bool)]
    # the last one, flagged, is a tie of gold. Of 2 flagged 1 is wrong, of 3 others 1; of the 6 pairs of a wrong label
    # (0.1, 0.6) and a right one (0.4, 0.6, 0.9) the wrong one is lower in 3 + 1, and equal in 1
    assert flags.measure(confidence, flagged, wrong, known) == pytest.approx(
        {"precision": 50, "unflagged": 100 / 3, "auc": 75})


def test_labels_turned_round(tmp_path):
    answer = {"text": "a", "ids": [5], "finish": "eos"}
    write_rows(tmp_path / "d.jsonl", [{"id": str(k), "prompt": "x", "prompt_ids": [4], "chosen": answer, "p": 0.7,
                                       "rejected": answer | {"text": "b"}} for k in range(1000)])
    turned = {}
    for share in (0.1, 0.3):
        made = run("benchmarks/relabel", input=tmp_path / "d.jsonl", output=tmp_path / f"{share}", flip=share)
        turned[share] = {row["id"] for row in rows(made) if row["chosen"]["text"] == "b"}
        assert abs(len(turned[share]) - 1000 * share) < 3 * (1000 * share * (1 - share)) ** 0.5
    assert turned[0.1] < turned[0.3]


def test_equation_2(world, tokenizer, tmp_path):
    """The reward model learns its pairs, and 03 scores with it as it was trained, whatever the batch."""
    folder = run("benchmarks/reward_model", model=world / "base", input=world / "all_gold.jsonl", lr=3e-3, epochs=20,
                 batch_size=8, output=tmp_path / "model")
    counts, preferences = stages.counts(folder), records.read_jsonl(world / "all_gold.jsonl", records.LABELLED)[:30]
    assert counts["pairs"] == len(rows(world / "all_gold.jsonl")) * 9 // 10 + 1 and counts["last loss"] < 0.3
    model, reader = judges.load_reward_model(str(folder), torch.device("cpu"))
    with torch.no_grad():
        margins = reward_model.margins(model, reward_model.read_pairs(world / "all_gold.jsonl", tokenizer)[:30])
        of_03 = [judges.reward_scores(model, [judges.encode(reader, row["prompt"], row[key])
                                              for key in ("chosen", "rejected")]) for row in preferences]
    assert margins.tolist() == pytest.approx([chosen - rejected for chosen, rejected in of_03], abs=1e-5)
    assert sum(margins > 0) > 24


@pytest.mark.parametrize("shape", ["phi", "mistral"])
def test_a_world_of_another_kind_of_model(shape, world, tmp_path):
    folder = run("00_inputs", **WORLD, shape=shape, output=tmp_path / "data")
    for name in ("seed", "sft", "prompts_1", "eval"):
        assert (folder / f"{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()
    model = models.load_model(str(folder / "base"), torch.device("cpu"))  # which tries what the stages do with it
    assert model.config.model_type == shape


def test_kind_writers_answer_a_third_of_the_prompts(world):
    examples, gold = {row["id"]: row for row in rows(world / "sft.jsonl")}, small_world.read_gold(world / "gold.json")
    kind = rows(world / "sft_kind.jsonl")
    assert 0 < len(kind) < len(examples)
    assert all(examples[row["id"]]["prompt"] == row["prompt"] for row in kind)
    of_kind, of_all = (np.mean([small_world.gold_score(gold, records.as_messages(row["prompt"]), row["response"])
                                for row in written]) for written in (kind, examples.values()))
    assert of_kind > of_all + 0.2
