"""benchmarks/tables.py: what it would run, and what it reports; and the small world's reward model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import common
import runs
import stages
from conftest import WORLD
from extras import judges, small_world
from stages import rows, run

sys.path.append(str(stages.ROOT / "benchmarks"))
import reward_model
import tables
from tables import Row


@pytest.fixture(scope="module")
def plan():
    return tables.Plan(Path("runs"), 1)


def row_tasks(plan, key):
    """The tasks that made the models of a table's rows."""
    models = [plan.tasks[output].options["model"] for output in plan.evaluated[key]]
    return [plan.tasks.get(model) or plan.tasks[model.parent] for model in models]


# ---------------------------------------------------------------------------------------------
# What is run


def test_there_is_every_table():
    assert list(tables.TABLES) == ["1", "2", "3", "4", "5", "6", "7", "10", "11", "F3", "F4"]
    assert [row.label for row in tables.TABLES["6"][2]][:5] == [
        "SFT", "DPO, 3.3 %", "SPA, data expansion only", "SPA, and self-refinement", "SPA, and de-coupled detection"]


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


def test_what_tables_share_is_made_once(plan):
    commands = [json.dumps([task.stage, task.options], default=str, sort_keys=True) for task in plan.tasks.values()]
    assert len(set(commands)) == len(commands)
    first = [task for task in plan.tasks.values() if task.stage == "03_judge.py"
             and task.options.get("model") == plan.spa("spa", 0) and "length_penalty" not in task.options]
    assert len(first) == 1  # one iteration 1 for Tables 1, 2, 6, 7, 10, 11 and Figure 3, whatever refines it
    assert set(plan.evaluated["1"]) & set(plan.evaluated["2"]) & set(plan.evaluated["6"]) & set(plan.evaluated["F3"])


def test_a_table_runs_only_what_it_needs(plan):
    def names(key):
        return " ".join(str(task.output) for task in plan.needed([key]))
    assert "llm" not in names("6") and "worst_case" in names("6") and "spa/" not in names("F4")
    assert len(plan.needed(["1"])) < len(plan.needed(["2"])) < len(plan.tasks) == len(plan.needed(tables.TABLES))


def test_the_judges_of_table_7(plan):
    one, ours, previous, reward, none = [plan.tasks[task.options["input"]].options for task in row_tasks(plan, "7")]
    assert ours["model"] == previous["model"] == none["model"] and one["model"] == plan.spa("spa", 0)
    assert ours["init_model"] == plan.pi_init() and "judge" not in ours
    assert (previous["judge"], previous["ref_model"]) == ("previous", plan.spa("spa", 0))
    assert (reward["judge"], none["judge"]) == ("reward", "none")
    assert ours["input"] == previous["input"] == reward["input"] == none["input"]  # the same responses


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
    other = dpo._replace(options=dpo.options | {"lr": "1e-3"})  # in the same place
    missing = dpo._replace(output=tmp_path / "bad", options=dpo.options | {"input": tmp_path / "nothing.jsonl"})
    for task, found in ((other, "--lr"), (missing, "nothing.jsonl")):
        line = tables.run_tasks([task])
        assert "01_seed_dpo.py ended with status 2" in line and found in line


# ---------------------------------------------------------------------------------------------
# What it reports


def results(*win_rates):
    return [{"length_controlled_winrate": [1.0, 1.0], "win_rate": rates, "avg_length": [5.0, 5.0]}
            for rates in win_rates]


@pytest.mark.parametrize("found, sentence", [
    (results([10.0, 20.0], [30.0, 30.0], [16.0, 16.0]), "By win rate, 3 of 3 pairs of rows are in the paper's order."),
    # a 15, b 12, c 16: b is below a by 3 and below c by 4
    (results([14.0, 16.0], [12.0, 12.0], [16.0, 16.0]),
     'By win rate, 1 of 3 pairs of rows are in the paper\'s order (not: "b" is not above "c" (-4.0 ± 0.0); '
     '"b" is not above "a" (-3.0 ± 1.4)).')])
def test_the_order_of_rows(found, sentence):
    rows = [Row(label, (0, value), None) for label, value in (("a", 1), ("b", 3), ("c", 2))]
    assert tables.order(rows, found) == sentence


def test_only_rows_that_the_paper_compares_are_compared():
    rows = [Row("a", (0, 1), None, family="x"), Row("b", (0, 2), None, family="y"), Row("c", (), None, family="x")]
    assert tables.order(rows, results([1.0], [2.0], [3.0])) == "The paper has no numbers to compare with."
    rows = [Row(label, (0, value), None, group=group) for label, value, group in (
        ("a", 1, "DPO"), ("b", 2, "DPO"), ("c", 3, "SPA"))]
    assert "2 of 2 pairs" in tables.order(rows, results([9.0], [2.0], [10.0]))


def test_a_table_shows_means_deviations_and_the_paper_s_numbers():
    rows = [Row("SFT", (7.58, 4.72, 901), None), Row("more", (), None)]
    lines = tables.markdown("10", rows, results([1.0, 3.0], [4.0, 4.0])).splitlines()
    assert lines[0] == "## Table 10: Length penalty"
    assert lines[4] == "| SFT | 1.0 ± 0.0 | 2.0 ± 1.4 | 5.0 ± 0.0 | 7.58 | 4.72 | 901 |"
    assert lines[5] == "| more | 1.0 ± 0.0 | 4.0 ± 0.0 | 5.0 ± 0.0 | - | - | - |"
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")


# ---------------------------------------------------------------------------------------------
# What it is made of


def test_equation_2(world, tmp_path, monkeypatch):
    """The reward model learns its pairs, and 03 scores with it as it was trained."""
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *stages.command_line(dict(
        model=world / "base", input=world / "all_gold.jsonl", output=tmp_path / "model", lr=3e-3, epochs=20,
        batch_size=8))])
    runpy.run_path(str(stages.ROOT / "benchmarks" / "reward_model.py"), run_name="__main__")
    counts = json.loads((tmp_path / "model" / "args.json").read_text())["counts"]
    assert counts["pairs"] == len(rows(world / "all_gold.jsonl")) * 9 // 10 + 1 and counts["last loss"] < 0.3
    model, reader = judges.load_reward_model(str(tmp_path / "model"), torch.device("cpu"))
    right = 0
    for row in runs.read_jsonl(world / "all_gold.jsonl", runs.SEED)[:30]:
        with torch.no_grad():
            chosen, rejected = judges.reward_scores(model, [judges.encode(reader, row["prompt"], row[key])
                                                            for key in ("chosen", "rejected")])
        right += chosen > rejected
    assert right > 24


def test_the_margin_of_a_pair_does_not_depend_on_its_batch(world, pi_init, tokenizer):
    model = reward_model.load_classifier(pi_init, tokenizer, seed=0)
    pairs = reward_model.read_pairs(world / "seed.jsonl", tokenizer)
    with torch.no_grad():
        together = reward_model.margins(model, pairs)
        alone = torch.cat([reward_model.margins(model, [pair]) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama", "phi", "mistral"])
def test_a_world_of_another_kind_of_model(shape, world, tmp_path):
    folder = run("00_inputs", **WORLD, shape=shape, output=tmp_path / "data")
    for name in ("seed", "sft", "prompts_1", "eval"):
        assert (folder / f"{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()
    model, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == shape
    # greedy sampling, with its cache, takes the most likely tokens of the whole forward pass
    prompts = [chat.prompt_ids(tokenizer, row["prompt"], "") for row in rows(folder / "prompts_1.jsonl")[:3]]
    u = torch.zeros(3, 1, 8, dtype=torch.float64).numpy()
    for prompt, [(ids, _)] in zip(prompts, common.sample_responses(model.eval(), prompts, u, 0, 8, [])):
        for k, token in enumerate(ids):
            logits = model(input_ids=torch.tensor([prompt + list(ids[:k])])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4


def test_kind_writers_answer_a_third_of_the_prompts(world):
    examples = {row["id"]: row for row in rows(world / "sft.jsonl")}
    kind = rows(world / "sft_kind.jsonl")
    assert 0 < len(kind) < len(examples)
    assert all(examples[row["id"]]["prompt"] == row["prompt"] for row in kind)
    gold = small_world.read_gold(world / "gold.json")

    def mean(examples):
        scores = [small_world.gold_score(gold, runs.as_messages(row["prompt"]), row["response"]) for row in examples]
        return sum(scores) / len(scores)
    assert mean(kind) > mean(examples.values()) + 0.2
