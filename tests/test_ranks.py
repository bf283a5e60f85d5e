"""Two processes give what one gives, for every stage."""

import re
import subprocess
import sys

import pytest

import stages
from stages import digest, farthest, metrics, run


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
        "sft fsdp": ("00_sft", dict(input=world / "sft.jsonl", batch_size=9, activation_checkpointing=True, fsdp=True,
                                    **training)),
        "01 fsdp": ("01_seed_dpo", dict(input=world / "seed.jsonl", batch_size=8, fsdp=True, **training)),
        "04 fsdp": ("04_refined_dpo", dict(input=preferences, ref_model=pi_0, batch_size=8, epochs=2, window=16, alpha=0.3,
                                           k_percent=25, beta=0.3, fsdp=True, **training)),
        "04 worst fsdp": ("04_refined_dpo", dict(input=preferences, ref_model=pi_0, batch_size=8, epochs=2, epsilon=0.05,
                                                 refine="worst-case", fsdp=True, **training)),
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


@pytest.mark.parametrize("name", ["sft", "01", "04", "04 odd", "sft fsdp", "01 fsdp", "04 fsdp", "04 worst fsdp"])
def test_two_processes_train_the_same_weights(outputs, runs, name):
    one, two = outputs[name]
    assert farthest(one, two) < 2e-5 < farthest(one, runs[name][1]["model"])
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_sharded_training_goes_on_where_it_stopped(outputs, runs, tmp_path):
    stage, options = runs["04 fsdp"]
    stopped, went_on = stages.run_ranks(tmp_path, (stage, options | dict(output=tmp_path / "out", stop_after=5)),
                                        (stage, options | dict(output=tmp_path / "out")))
    assert [rank.status for rank in stopped] == [143, 143], stopped
    assert [rank.status for rank in went_on] == [0, 0] and "going on after step 5" in went_on[0].out, went_on
    assert farthest(tmp_path / "out", outputs["04 fsdp"][1]) == 0
    assert metrics(tmp_path / "out") == metrics(outputs["04 fsdp"][1])


def test_each_rank_holds_its_part_of_the_weights(pi_init, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(stages.ROOT)!r})
import os, torch, types, common
from torch.distributed.tensor import DTensor
ranks = common.start_ranks()
args = types.SimpleNamespace(model={str(pi_init)!r}, activation_checkpointing=False, fsdp=True)
model, policy = common.load_policy(args, ranks)
local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
os.write(1, b"held %d of %d\\n" % (local, sum(p.numel() for p in model.parameters())))  # at once: the two share it
"""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(stages.free_port()), "--no-python", sys.executable, "-c", code], capture_output=True,
                          text=True, env=stages.NO_RANKS | {"OMP_NUM_THREADS": "1"})
    held = [list(map(int, pair)) for pair in re.findall(r"held (\d+) of (\d+)", done.stdout)]
    assert len(held) == 2 and held[0][1] == held[1][1] == sum(part for part, _ in held), done
    assert max(part for part, _ in held) < 0.52 * held[0][1]


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
