"""The benchmarks in little, on a CPU: each competitor computes the same, gpu.py's parts, and the tables' arithmetic."""

import json
import logging
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch.nn.functional as F
from packaging.version import Version

import common
import dpo
import gpu
import judging
import one_pair
import sampling
import shared
import stages
from extras.small_world import gold_score, read_gold
from support import chat, data, models, records, runs

OURS = [name for name in dpo.COMPETITORS if "TRL" not in name]


class Ended(BaseException):
    """Not an error of the stage's."""


class OneProcess(shared.Turns):
    """The turns of a competitor in this process, which ends after so many."""

    def __init__(self, steps):
        self.started, self.reference, self.steps, self.done = None, 0.0, steps, []

    def report(self, line):
        self.done += [json.loads(line)] if line != "ready" else []
        if len(self.done) == self.steps:
            raise Ended
        self.started = 0.0


def take_steps(run, folder, steps, **options):
    turns = OneProcess(steps)
    with pytest.raises(Ended):
        run(folder, turns, **options)
    return turns.done


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder for inputs of a tiny model; what a benchmark replaces in a module is put back."""
    for key, value in dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=320).items():
        monkeypatch.setitem(shared.SHAPE, key, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(runs, "progress", runs.progress)
    for module in (common, models):
        for name, value in list(vars(module).items()):
            monkeypatch.setattr(module, name, value)
    return tmp_path


@pytest.mark.parametrize("name", OURS)
def test_a_competitor_takes_the_steps_of_01(name, small):
    if "torch" in name and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    shared.make_inputs(small, 4 * dpo.PAIRS, (40, 30))
    expected = [step["loss"] for step in take_steps(dpo.run_plain, small, 3)]
    run, options = dpo.COMPETITORS[name]
    steps = take_steps(run, small, 3, **options)
    assert all(step["seconds"] > 0 and step["peak"] > 0 for step in steps)
    stores = name in ("01", "prompt twice", "logits twice", "cross_entropy") or "torch" in name
    assert (steps[0]["reference"] > 0) == stores
    if name != "products":  # 04 refines labels from its second step on, by less than 1e-3 where nothing is learnt yet
        assert [step["loss"] for step in steps] == pytest.approx(expected, abs=1e-3 if name == "04" else 1e-6)


def test_the_reference_pass_is_shared_by_the_epochs(capsys):
    """A pass of 15 s for 5 steps: 3 s a step. (4 + 0) / 2 = 2; 4 / (2 + 3 / 3) = 1.33; 4 / (2 + 3) = 0.8"""
    def steps(seconds, reference=0, loss=0.5):
        return [{"seconds": seconds, "reference": reference, "loss": loss, "peak": 1.0}] * 4

    # a pair has 10 + 3 + 2 tokens: 8 pairs of 6 (8 (4 * 256 ** 2 + 3 * 256 * 688) * 15 + 256 * 32,000 * 5) = 6.52e9
    answers = {"chosen": {"ids": [5] * 3}, "rejected": {"ids": [5] * 2}}
    dpo.report({"01": steps(2, 15), "04": steps(6), "live": steps(4), "products": steps(1, loss=6.52)},
               [{"prompt_ids": [4] * 10, **answers}] * 8 * 5, SimpleNamespace(steps=2, threads=2))
    *_, live, _, refined, _, share = capsys.readouterr().out.splitlines()
    assert live == ("| live | 4.00 | 0.00 | 2.00 (2.00 to 2.00) | 1.33 (1.33 to 1.33) | 0.80 (0.80 to 0.80) "
                    "| 1.00 | 0e+00 |")
    assert refined == "04 takes 1.50 (1.50 to 1.50) times as long as live"
    assert share == "01 reaches 0.50 (0.50 to 0.50) of the rate of matrix products, 7 GFLOP/s"


def test_judging_beside_the_plain_page(small, monkeypatch):
    monkeypatch.setattr(judging, "PROMPTS", 4)
    judging.make_responses(small, (40, 30))
    ours, plain = (take_steps(run, small, 2) for run in judging.COMPETITORS.values())
    assert ours[0]["loss"] == ours[1]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-5)


@pytest.mark.skipif(not find_spec("psutil") and Version(version("transformers")) < Version("5.24"),
                    reason="continuous batching of this transformers needs psutil")
def test_sampling_beside_generate(monkeypatch, capsys):
    for name, value in dict(VOCABULARY=300, PROMPTS=4, BATCH=2, LIMIT=10, GREEDY_LIMIT=10, REPEATS=1,
                            THREADS=1).items():
        monkeypatch.setattr(sampling, name, value)
    try:
        sampling.main()
    finally:
        logging.disable(logging.NOTSET)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("greedy: ") and "of 8 responses are identical" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "sample_responses", "generate", "generate, static cache", "generate_batch"]


def test_competitors_take_turns(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(stages.ROOT / 'benchmarks')!r})\nimport shared\n"
                      "name, turns = sys.argv[2], shared.Turns()\nprint('of the competitor')\n"
                      "turns.before_first_step()\nfor step in range(3):\n"
                      "    open(sys.argv[3] + '/order', 'a').write(name)\n    turns.after_step(float(step))\n")
    args = SimpleNamespace(steps=1, threads=1)
    done = shared.take_turns(str(script), "ab", tmp_path, args)
    assert (tmp_path / "order").read_text() == "ababab"
    assert {name: [step["loss"] for step in steps] for name, steps in done.items()} == {
        "a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}
    script.write_text("raise SystemExit('it broke')\n")
    with pytest.raises(SystemExit, match="it broke"):
        shared.take_turns(str(script), "a", tmp_path, args)


# ---------------------------------------------------------------------------------------------
# The picture of two pairs


@pytest.fixture(scope="module")
def little_run(tmp_path_factory, world, tokenizer, pi_init, pi_0):
    """What one_pair.py reads of a run: writers' answers, the better one first, judged by 03, and 04's model."""
    folder, responses = tmp_path_factory.mktemp("run"), []
    for row in stages.rows(world / "all_gold.jsonl"):
        answers = [{"text": row[y][0]["content"], "finish": "eos",
                    "ids": tokenizer(row[y][0]["content"])["input_ids"] + [tokenizer.eos_token_id]}
                   for y in ("chosen", "rejected")]
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        responses.append({"id": f"r{len(responses)}", "prompt": row["prompt"], "prompt_ids": ids, "responses": answers})
    stages.write_rows(folder / "responses_1.jsonl", responses)
    (folder / "data").mkdir()
    shutil.copy(world / "gold.json", folder / "data")
    for name, model in (("pi_init", pi_init), ("pi_0", pi_0)):
        shutil.copytree(model, folder / name)
    stages.run("03_judge", model=folder / "pi_0", init_model=folder / "pi_init", beta=2,
               input=folder / "responses_1.jsonl", output=folder / "preferences_1.jsonl")
    stages.run("04_refined_dpo", model=folder / "pi_0", input=folder / "preferences_1.jsonl", output=folder / "pi_1",
               beta=2, lr=1e-3, batch_size=4, window=8, k_percent=40)
    return folder


def test_what_04_logs_of_each_pair(little_run):
    beta, followed = one_pair.follow_pairs(little_run)
    assert beta == 2 and len(followed) == len(stages.rows(little_run / "preferences_1.jsonl"))
    for line in stages.metrics(little_run / "pi_1"):
        of_step = [row for row in followed.values() if row["step"] == line["step"]]
        assert {row["tau"] for row in of_step} == {line["tau"]}
        assert [row["flagged"] for row in of_step] == [row["confidence"] < line["tau"] for row in of_step]
        for name in ("confidence", "flagged", "rewards/margins"):
            assert sum(row[name] for row in of_step) / len(of_step) == pytest.approx(line[name])


def test_two_pairs_as_the_model_sees_them(little_run, tmp_path, monkeypatch):
    """The numbers drawn are those that 03 and 04 have stored. y_1 is the better one: a wrong label has p < 0.5."""
    monkeypatch.setattr(sys, "argv", ["one_pair.py", str(little_run), "--output", str(tmp_path / "pairs.svg")])
    one_pair.main()
    elements = list(ElementTree.parse(tmp_path / "pairs.svg").iter())
    texts = [e.text for e in elements if e.tag.endswith("text")]
    drawn = [float(e.text) for e in elements if e.tag.endswith("title")][17:]  # the first are the scale's
    followed, gold = one_pair.follow_pairs(little_run)[1], read_gold(little_run / "data/gold.json")
    rows = {row["prompt"][0]["content"]: row for row in stages.rows(little_run / "preferences_1.jsonl")}
    judged, refined = ([text for text in texts if text.startswith(name)] for name in ("03_judge", "04_refined_dpo"))
    rewards = iter([float(text[7:].replace("\u2212", "-")) for text in texts if text.startswith("reward ")])
    shown = [rows[text] for text in texts if text in rows]
    for k, (row, of_03, of_04) in enumerate(zip(shown, judged, refined, strict=True)):
        y_1, y_2 = ("chosen", "rejected") if row["p"] > 0.5 else ("rejected", "chosen")
        for y, policy, ref in zip((y_1, y_2), row["logps"]["policy"], row["logps"]["ref"], strict=True):
            words, drawn = drawn[:len(row[y]["ids"])], drawn[len(row[y]["ids"]):]
            assert sum(words) == pytest.approx(2 * (policy - ref), abs=0.01)
            assert next(rewards) == pytest.approx(2 * (policy - ref), abs=0.001)
        scores = [gold_score(gold, row["prompt"], row[y]["text"]) for y in (y_1, y_2)]
        label, better = "y_1" if row["p"] > 0.5 else "y_2", "y_1" if scores[0] > scores[1] else "y_2"
        assert (label == better) == (k == 0)  # a right label, then a wrong one
        assert f"= {row['p']:.3f} (Eq. 7), so {label} is chosen" in of_03 and of_03.endswith(f"Gold prefers {better}.")
        pair = followed[row["id"]]
        assert (f"step {pair['step']}: p_theta~(y_w > y_l | x) = {pair['confidence']:.3f} (Eq. 12), tau = "
                f"{pair['tau']:.3f}, so z = {k}: ") in of_04 and pair["tau"] > 0
    assert not drawn
    met = [pair["flagged"] for pair in followed.values() if pair["tau"] > 0]
    for title in (f"Not flagged: {met.count(0)} labels, ", f"Flagged: {met.count(1)} labels, "):
        assert any(text.startswith(title) for text in texts)


# ---------------------------------------------------------------------------------------------
# gpu.py on a CPU


def test_gpu_py_measures_the_stages_on_what_it_counts(monkeypatch, tmp_path, capfd):
    load, seen = models.load_policy, []
    monkeypatch.setattr(models, "load_policy", lambda args, ranks: [seen.append(args), load(args, ranks)][1])
    monkeypatch.setattr(gpu, "peak", lambda bench: 1 / 0)  # what fails is a row, and the rest goes on
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    gpu.main()
    peak, *rows, _, last = [line.split("|") for line in capfd.readouterr().out.splitlines()[4:]]
    assert peak[3] == " failed: ZeroDivisionError('division by zero') "
    hours = [float(row[6]) for row in rows]
    assert [row[1] for row in rows] == [" 02 ", " 03 ", " 04 "] and min(hours) > 0
    assert float(last[0].split()[5]) == pytest.approx(sum(hours), abs=0.021)  # each has two digits

    bench, [args] = gpu.make_bench(tmp_path, **gpu.TINY), seen
    args.model, args.input = bench.folder / "model", [str(bench.folder / "rows.jsonl")]  # what 04 read
    tokenizer = chat.load_tokenizer(args.model)
    assert set(chat.eos_ids(args.model, tokenizer)) == set(gpu.EOS)  # what ends 02's responses
    pairs, _ = data.read_pairs(args, tokenizer, records.PREFERENCES)
    assert sum(len(pair[key]) for key in ("prompt", "chosen", "rejected") for pair in pairs) == bench.tokens
    assert len(pairs) == bench.prompts and args.gradient_checkpointing

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stop:  # there is no GPU
        gpu.main()
    assert stop.value.code == 2 and capfd.readouterr().err.count("\n") == 1


def test_rates_share_of_the_peak_and_hours(monkeypatch):
    """An epoch of 2 s with one layer of two: 8 * 50 * 20 = 8,000 operations."""
    # a layer: q, o 16 x 16; k, v 16 x 8; three of 16 x 24; two norms
    config = gpu.MistralConfig(**gpu.SHAPE | gpu.TINY["shape"])
    assert gpu.count_weights(config) == 2 * (512 + 256 + 1152 + 32)
    monkeypatch.setattr(gpu, "count_weights", lambda config: 50 * config.num_hidden_layers)
    monkeypatch.setattr(gpu, "run_timed", lambda *_, **__: ([[9], [9, 9, 1, 1]], None))
    monkeypatch.setattr(gpu, "make_bench", lambda folder, **sizes: SimpleNamespace(
        config=config, tokens=20, layers=1, folder=folder))
    line, rate, hours = gpu.measure("04", gpu.train, gpu.TINY, full=8000)
    assert line.startswith("| 04 | 1 of 2 layers, micro-batches of 8, 1.00 s a step | 10 tokens/s | 50% |")
    assert rate == 4000 and hours == pytest.approx(10_000 / 3600 * 2 / 4 * 2)  # of four prompts, with two layers
