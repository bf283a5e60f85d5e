"""benchmarks/tables.py: what it would run, and what it says of the results; and the small world's reward model."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import stages
from conftest import WORLD
from stages import rows, run

sys.path.append(str(stages.ROOT / "benchmarks"))
import reward_model
import tables

KEYS = ["1", "2", "3", "4", "5", "6", "7", "10", "11", "F3", "F4"]


@pytest.fixture(scope="module")
def plan():
    return tables.Plan(Path("runs"), 1)


@pytest.fixture(scope="module")
def found(plan):
    return plan.tables()


# ---------------------------------------------------------------------------------------------
# What is run


def test_the_settings_are_those_of_run_all(monkeypatch):
    for name in ("LR", "BETA"):
        monkeypatch.delenv(name, raising=False)
    printed = subprocess.run(["bash", stages.ROOT / "run_all.sh", "--dry-run"], capture_output=True, text=True,
                             check=True).stdout
    line = next(line for line in printed.splitlines() if "04_refined_dpo.py" in line)
    args = stages.parsed("04_refined_dpo", shlex.split(line.split("04_refined_dpo.py")[1]))
    settings = tables.world_settings()
    assert (args.beta, args.lr, args.batch_size) == (float(settings["BETA"]), float(settings["LR"]),
                                                     int(settings["BATCH_SIZE"]))
    monkeypatch.setenv("LR", "0.5")
    assert tables.world_settings()["LR"] == "0.5"


def test_there_is_every_table(found):
    assert list(found) == KEYS
    labels = [row.label for row in found["6"][1]]
    assert labels[:5] == ["SFT", "DPO, 3.3 %", "SPA, data expansion only", "SPA, and self-refinement",
                          "SPA, and de-coupled detection"]


def test_every_command_is_one_that_its_stage_takes(plan, found):
    for task in plan.tasks.values():
        if "/" not in task.stage:
            args = stages.parsed(task.stage, tables.words(task))
            assert args.output == str(task.output)
        made = set(plan.tasks)
        for value in task.options.values():
            if isinstance(value, Path):
                assert value in made or value.parent in made  # nothing is read that nothing makes
        assert made >= set(task.needs)


def test_what_tables_share_is_made_once(plan, found):
    commands = [json.dumps([task.stage, task.options], default=str, sort_keys=True) for task in plan.tasks.values()]
    assert len(set(commands)) == len(commands)
    judged = [task for task in plan.tasks.values() if task.stage == "03_judge" and task.options.get("judge") is None]
    first = [task for task in judged if task.options["model"] == plan.pi_0 and "length_penalty" not in task.options]
    assert len(first) == 1  # one iteration 1 for Tables 1, 2, 6, 7, 10, 11 and Figure 3, whatever refines it
    in_table = {key: {row.output for row in rows} for key, (_, rows) in found.items()}
    assert in_table["1"] & in_table["2"] & in_table["6"] & in_table["F3"]


def test_a_table_runs_only_what_it_needs(plan, found):
    def runs(key):
        return tables.needed(plan, [row.output for row in found[key][1]])
    assert not any("llm" in str(output) for output in runs("6"))
    assert any("worst_case" in str(output) for output in runs("6"))
    assert len(runs("1")) < len(runs("2")) < len(plan.tasks)
    for task in runs("5").values():
        assert set(task.needs) <= set(runs("5"))


def test_the_judges_of_table_7(plan, found):
    def judge_of(row):
        task = plan.tasks[plan.tasks[row.output].options["model"]]
        return plan.tasks[task.options["input"]].options
    one, ours, previous, reward, none = map(judge_of, found["7"][1])
    assert ours["model"] == previous["model"] == none["model"] and one["model"] == plan.pi_0
    assert ours["init_model"] == plan.pi_init and "judge" not in ours
    assert (previous["judge"], previous["ref_model"]) == ("previous", plan.pi_0)
    assert reward["judge"] == "reward" and none["judge"] == "none"
    assert ours["input"] == previous["input"] == reward["input"] == none["input"]  # the same responses


def test_a_task_is_done_only_with_its_own_options_and_inputs(world, pi_init, tmp_path):
    options = dict(model=pi_init, input=world / "seed.jsonl", lr="1e-3", epochs=1, batch_size="8")
    task = tables.Task(tmp_path / "pi_0", "01_seed_dpo", options, [])
    assert not tables.is_done(task)
    run("01_seed_dpo", **options, output=task.output)
    assert tables.is_done(task)
    assert not tables.is_done(task._replace(options=options | {"lr": "2e-3"}))
    assert not tables.is_done(task._replace(options=options | {"input": world / "sft.jsonl"}))


def test_tasks_run_in_the_order_of_their_needs_and_are_not_run_again(tmp_path, capsys):
    data = tables.Task(tmp_path / "data", "00_inputs", WORLD, [])
    base = tmp_path / "data" / "base"
    model = tables.Task(tmp_path / "pi_0", "01_seed_dpo", dict(model=base, input=tmp_path / "data" / "seed.jsonl"),
                        [data.output])
    tables.perform_all({model.output: model, data.output: data}, 2)
    out = capsys.readouterr().out
    assert out.index("[1/2]") < out.index("[2/2]") and out.index("/data:") < out.index("/pi_0:")
    tables.perform_all({model.output: model, data.output: data}, 2)
    assert capsys.readouterr().out == ""
    bad = tables.Task(tmp_path / "bad", "01_seed_dpo", dict(model=base, input=tmp_path / "nothing.jsonl"), [])
    with pytest.raises(SystemExit) as stop:
        tables.perform_all({bad.output: bad}, 1)
    assert "nothing.jsonl" in str(stop.value) and "status 2" in str(stop.value)


# ---------------------------------------------------------------------------------------------
# What it says


def results(*win_rates):
    return [{"length_controlled_winrate": [1.0, 1.0], "win_rate": rates, "avg_length": [5.0, 5.0]}
            for rates in win_rates]


def test_the_order_that_agrees():
    rows = [tables.row(label, (None, value), None) for label, value in (("a", 1), ("b", 3), ("c", 2))]
    said = tables.order(rows, results([10.0, 20.0], [30.0, 30.0], [16.0, 16.0]))
    assert said == "By win rate, 3 of 3 pairs of rows are in the paper's order."


def test_the_order_that_does_not():
    rows = [tables.row(label, (None, value), None) for label, value in (("a", 1), ("b", 3), ("c", 2))]
    # a 15, b 12, c 16: b is below a by 3 and below c by 4
    said = tables.order(rows, results([14.0, 16.0], [12.0, 12.0], [16.0, 16.0]))
    assert said == ("By win rate, 1 of 3 pairs of rows are in the paper's order "
                    '(not: "b" is not above "c" (-4.0 ± 0.0); "b" is not above "a" (-3.0 ± 1.4)).')


def test_only_rows_that_the_paper_compares_are_compared():
    rows = [tables.row("a", (None, 1), None, family="x"), tables.row("b", (None, 2), None, family="y"),
            tables.row("c", (), None, family="x")]
    assert tables.order(rows, results([1.0], [2.0], [3.0])) == "The paper has no numbers to compare with."
    rows = [tables.row("a", (None, 1), None, group="DPO"), tables.row("b", (None, 2), None, group="DPO"),
            tables.row("c", (None, 3), None, group="SPA")]
    assert "2 of 2 pairs" in tables.order(rows, results([9.0], [2.0], [10.0]))


def test_a_table_shows_means_deviations_and_the_paper_s_numbers():
    rows = [tables.row("SFT", (7.58, 4.72, 901), None), tables.row("more", (), None)]
    lines = tables.markdown("10", "Length", rows, results([1.0, 3.0], [4.0, 4.0])).splitlines()
    assert lines[0] == "## Table 10: Length"
    assert lines[4] == "| SFT | 1.0 ± 0.0 | 2.0 ± 1.4 | 5.0 ± 0.0 | 7.58 | 4.72 | 901 |"
    assert lines[5] == "| more | 1.0 ± 0.0 | 4.0 ± 0.0 | 5.0 ± 0.0 | - | - | - |"
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")


# ---------------------------------------------------------------------------------------------
# What it is made of


def test_equation_2(world, tokenizer, tmp_path, monkeypatch):
    """The reward model learns its pairs, and 03 scores with it as it was trained."""
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *stages.command_line(dict(
        model=world / "base", input=world / "all_gold.jsonl", output=tmp_path / "model", lr=3e-3, epochs=20,
        batch_size=8))])
    runpy.run_path(str(stages.ROOT / "benchmarks" / "reward_model.py"), run_name="__main__")
    counts = json.loads((tmp_path / "model" / "args.json").read_text())["counts"]
    assert counts["pairs"] == len(rows(world / "all_gold.jsonl")) * 9 // 10 + 1 and counts["last loss"] < 0.3
    judge = stages.load("03_judge")
    model, reader = judge.load_reward_model(str(tmp_path / "model"), torch.device("cpu"))
    right = []
    for row in rows(world / "all_gold.jsonl")[:30]:
        with torch.no_grad():
            chosen, rejected = judge.reward_scores(model, [judge.encode(reader, row["prompt"], row[key])
                                                           for key in ("chosen", "rejected")])
        right.append(chosen > rejected)
    assert sum(right) > 24


def test_the_margin_of_a_pair_does_not_depend_on_its_batch(world, pi_init, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(pi_init, num_labels=1,
                                                               pad_token_id=tokenizer.pad_token_id)
    args = type("Args", (), {"input": world / "seed.jsonl"})
    pairs = reward_model.read_pairs(args, tokenizer)
    with torch.no_grad():
        together = reward_model.margins(model, pairs, "cpu")
        alone = torch.cat([reward_model.margins(model, [pair], "cpu") for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama", "phi", "mistral"])
def test_a_world_of_another_kind_of_model(shape, world, tmp_path):
    folder = run("00_inputs", **WORLD, shape=shape, output=tmp_path / "data")
    for name in ("seed", "sft", "prompts_1", "eval"):
        assert (folder / f"{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()
    model, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == shape
    # sampling, with its cache, takes the likeliest tokens of the whole forward pass
    prompts = [common.prompt_ids(tokenizer, row["prompt"], "") for row in rows(folder / "prompts_1.jsonl")[:3]]
    u = torch.zeros(3, 1, 8, dtype=torch.float64).numpy()
    for prompt, [(ids, _)] in zip(prompts, common.sample(model.eval(), prompts, u, 0, 8, [])):
        for k, token in enumerate(ids):
            logits = model(input_ids=torch.tensor([prompt + ids[:k]])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4


def test_kind_writers_answers_are_those_of_all(world):
    examples = {row["id"]: row for row in rows(world / "sft.jsonl")}
    kind = rows(world / "sft_kind.jsonl")
    assert 0 < len(kind) < len(examples) and all(examples[row["id"]] == row for row in kind)
    gold = common.read_gold(world / "gold.json")

    def mean(examples):
        scores = [common.gold_score(gold, common.as_messages(row["prompt"]), row["response"]) for row in examples]
        return sum(scores) / len(scores)
    assert mean(kind) > mean(examples.values()) + 0.2


def test_only_the_llm_that_judges_knows_the_words_of_listing_1(plan, found):
    assert "judge_words" not in plan.tasks[plan.data].options
    for task in plan.tasks.values():
        if task.options.get("judge") == "llm":
            start = plan.tasks[task.options["judge_model"]]
            while start.stage != "00_inputs":  # back to the base model
                start = plan.tasks.get(start.options["model"]) or plan.tasks[start.options["model"].parent]
            assert start.options["judge_words"] is True
