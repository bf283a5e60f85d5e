"""Two processes give what one gives, for every stage."""

import pytest

import stages
from stages import digest, farthest, metrics, rows, run


@pytest.fixture(scope="module")
def runs(world, pi_init, pi_0, preferences, tmp_path_factory):
    """(stage, options) of each stage; 04's last step and 02's last batches leave one of two ranks without work."""
    responses = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=8,
                    output=tmp_path_factory.mktemp("in") / "responses.jsonl")
    training = dict(model=pi_init, lr=1e-3, micro_batch_size=4)
    return {
        "03": ("03_judge", dict(model=pi_0, init_model=pi_init, input=responses, micro_batch_size=5)),
        "02": ("02_generate", dict(model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=8, micro_batch_size=5)),
        "sft": ("00_sft", dict(input=world / "sft.jsonl", batch_size=9, activation_checkpointing=True, **training)),
        "01": ("01_seed_dpo", dict(input=world / "seed.jsonl", batch_size=8, **training)),
        "04": ("04_refined_dpo", dict(input=preferences, ref_model=pi_0, batch_size=8, epochs=2, window=16, k_percent=25,
                                      alpha=0.3, beta=0.3, **training)),
        "04 odd": ("04_refined_dpo", dict(input=preferences, ref_model=pi_0, batch_size=20, epochs=2, window=16,
                                          activation_checkpointing=True, k_percent=25, **training)),
        "05": ("05_eval", dict(model=pi_0, input=world / "eval.jsonl", gold=world / "gold.json", max_new_tokens=8,
                               micro_batch_size=5))}


@pytest.fixture(scope="module")
def outputs(runs, tmp_path_factory):
    """{name: (the output of one process, that of two)}"""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    ran = stages.run_ranks(two, *((stage, options | {"output": two / name}) for name, (stage, options) in runs.items()))
    for ranks in ran:
        assert [rank.status for rank in ranks] == [0, 0], ranks
        assert ranks[1].out == ""  # one of them speaks
    return {name: (run(stage, output=one / name, **options), two / name) for name, (stage, options) in runs.items()}


@pytest.mark.parametrize("name", ["02", "03"])
def test_two_processes_write_the_same_bytes(outputs, name):
    one, two = outputs[name]
    assert digest(one) == digest(two)


def test_two_processes_evaluate_alike(outputs):
    one, two = outputs["05"]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("responses.jsonl", "metrics.json"):
        assert digest(one / name) == digest(two / name)


@pytest.mark.parametrize("name", ["sft", "01", "04", "04 odd"])
def test_two_processes_train_the_same_weights(outputs, runs, name):
    one, two = outputs[name]
    assert farthest(one, two) < 2e-5 < farthest(one, runs[name][1]["model"])
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_two_processes_flag_the_same_pairs(outputs):
    one, two = map(metrics, outputs["04"])
    assert [line["flagged"] for line in one] == [line["flagged"] for line in two]
    assert sum(line["flagged"] for line in one) > 0


def test_an_error_of_two_processes_is_one_line(runs, world, pi_0, tmp_path):
    missing = ("02_generate", dict(model=pi_0, input=tmp_path / "no.jsonl", output=tmp_path / "1"))
    # known to the process that writes only: every pair is a tie, every response hit the limit
    ties = ("03_judge", runs["03"][1] | dict(model=pi_0, init_model=pi_0, output=tmp_path / "2"))
    cut = ("02_generate", runs["02"][1] | dict(cut="drop", output=tmp_path / "3"))
    for ranks in stages.run_ranks(tmp_path, missing, ties, cut):
        assert [rank.status for rank in ranks] == [2, 2], ranks
        assert "".join(rank.err for rank in ranks).count("\n") == 1
        assert "Traceback" not in ranks[0].err + ranks[1].err
