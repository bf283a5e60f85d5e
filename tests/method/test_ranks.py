"""Two processes give what one gives, for every stage."""

import re
import subprocess
import sys

import pytest
import torch

import stages
from families import make, with_images
from stages import digest, farthest, metrics, run, weights


@pytest.fixture(scope="module")
def reads_images(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make(with_images(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def jobs(world, pi_init, pi_0, preferences, reads_images, tmp_path_factory):
    """{name: (stage, options)}; 04's last step and 02's last batches leave one of two ranks without work."""
    sampling = dict(model=pi_0, max_new_tokens=8)
    responses = run("02_generate", **sampling, input=world / "prompts_1.jsonl",
                    output=tmp_path_factory.mktemp("in") / "responses.jsonl")
    training = dict(model=pi_init, lr=1e-3, micro_batch_size=4)
    sft = dict(training, input=world / "sft.jsonl", batch_size=9, gradient_checkpointing=True)
    # with another reference: else rounding decides the sign of the first step's margins, and so its accuracy
    seed = dict(training, input=world / "seed.jsonl", ref_model=pi_0, batch_size=8)
    refined = dict(training, input=preferences, ref_model=pi_0, batch_size=8, epochs=2, window=16, k_percent=25,
                   alpha=0.3, beta=0.3)
    worst = dict(training, input=preferences, ref_model=pi_0, batch_size=8, epochs=2, beta=0.3, epsilon=0.05)
    return {
        "03": ("03_judge", dict(model=pi_0, init_model=pi_init, input=responses, micro_batch_size=5)),
        "02": ("02_generate", dict(sampling, input=world / "prompts_1.jsonl", micro_batch_size=5)),
        "sft": ("00_sft", sft), "sft fsdp": ("00_sft", dict(sft, fsdp=True)),
        "01": ("01_seed_dpo", seed), "01 fsdp": ("01_seed_dpo", dict(seed, fsdp=True)),
        "images": ("01_seed_dpo", dict(seed, model=reads_images)),
        "images fsdp": ("01_seed_dpo", dict(seed, model=reads_images, fsdp=True)),
        "04": ("04_refined_dpo", refined), "04 fsdp": ("04_refined_dpo", dict(refined, fsdp=True)),
        "04 odd": ("04_refined_dpo", dict(refined, batch_size=20, lr=1e-4, gradient_checkpointing=True)),
        "worst case": ("extras/worst_case_dpo", worst),
        "worst case fsdp": ("extras/worst_case_dpo", dict(worst, fsdp=True))}


@pytest.fixture(scope="module")
def outputs(jobs, tmp_path_factory):
    """{name: (the output of one process, that of two)}"""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for ranks in stages.run_ranks(two, *((*job, options | {"output": two / name})
                                         for name, (*job, options) in jobs.items())):
        assert [rank.status for rank in ranks] == [0, 0], ranks
        assert ranks[1].out == ""  # one of them speaks
        assert "Warning" not in ranks[0].err + ranks[1].err, ranks
    return {name: (run(*job, output=one / name, **options), two / name) for name, (*job, options) in jobs.items()}


@pytest.mark.parametrize("name", ["02", "03"])  # 05: test_eval.py
def test_two_processes_write_the_same_bytes(outputs, name):
    one, two = outputs[name]
    assert digest(one) == digest(two)


@pytest.mark.parametrize("name", ["sft", "sft fsdp", "01", "01 fsdp", "images", "images fsdp", "04", "04 fsdp",
                                  "04 odd", "worst case", "worst case fsdp"])
def test_two_processes_train_the_same_weights(outputs, jobs, name):
    one, two = outputs[name]
    assert farthest(one, two) < 2e-5 < farthest(one, jobs[name][-1]["model"])
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
        assert ours.get("flagged") == theirs.get("flagged") or "worst" in name
    assert "04" not in name or sum(line["flagged"] for line in metrics(one)) > 0


@pytest.mark.parametrize("name", ["images", "images fsdp"])
def test_of_a_model_that_reads_images_the_text_part_is_trained(outputs, reads_images, name):
    before = weights(reads_images)
    for after in map(weights, outputs[name]):
        assert after.keys() == before.keys()
        trained = {key for key in before if not torch.equal(before[key], after[key])}
        assert trained == {key for key in before if key.startswith("language_model.")}


def test_of_two_ranks_one_is_stopped_and_both_save_and_resume_exactly(outputs, jobs, tmp_path):
    names, both = ["sft", "01", "04", "04 fsdp", "images", "images fsdp"], []
    for name in names:
        stage, options = jobs[name]
        options = options | {"output": tmp_path / name, "save_every": 100}
        both += [(stage, options | {"stop_after": 3}), (stage, options)]
    ran = stages.run_ranks(tmp_path, *both)
    for name, stopped, resumed in zip(names, ran[::2], ran[1::2]):
        assert [rank.status for rank in stopped] == [143, 143], stopped
        assert (stopped[0].err + stopped[1].err).count("after step 3: ") == 1, stopped
        assert [rank.status for rank in resumed] == [0, 0] and resumed[1].out == ""
        assert resumed[0].out.count("after step 3\n") == 1
        assert farthest(tmp_path / name, outputs[name][1]) == 0
        assert metrics(tmp_path / name) == metrics(outputs[name][1])


def test_each_rank_has_its_part_of_the_weights(pi_init, tmp_path):
    code = f"""
import os, sys, types; sys.path.insert(0, {str(stages.ROOT)!r})
import common
from support import models
from torch.distributed.tensor import DTensor
args = types.SimpleNamespace(model={str(pi_init)!r}, gradient_checkpointing=False, fsdp=True)
weights = list(models.load_policy(args, common.start_ranks())[0].parameters())
part = sum(p.to_local().numel() for p in weights if isinstance(p, DTensor))
os.write(1, b"%d of %d\\n" % (part, sum(p.numel() for p in weights)))  # at once: two processes share it
"""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(stages.free_port()), "--no-python", sys.executable, "-c", code], capture_output=True,
                          text=True, env=stages.NO_RANKS | {"OMP_NUM_THREADS": "1"})
    parts = [[*map(int, pair)] for pair in re.findall(r"(\d+) of (\d+)", done.stdout)]
    assert len(parts) == 2 and parts[0][1] == parts[1][1] == sum(part for part, _ in parts), done
    assert max(part for part, _ in parts) < 0.52 * parts[0][1]


def test_an_error_of_two_processes_is_one_line(jobs, pi_0, tmp_path):
    missing = ("02_generate", dict(model=pi_0, input=tmp_path / "no.jsonl", output=tmp_path / "1"))
    # known only to the process that writes: every pair is a tie, every response hit the limit
    ties = ("03_judge", jobs["03"][1] | dict(init_model=pi_0, output=tmp_path / "2"))
    limit = ("02_generate", jobs["02"][1] | dict(on_length_limit="drop", output=tmp_path / "3"))
    for ranks in stages.run_ranks(tmp_path, missing, ties, limit):
        assert [rank.status for rank in ranks] == [2, 2], ranks
        err = ranks[0].err + ranks[1].err
        assert err.count("\n") == 1 and "Traceback" not in err, ranks
