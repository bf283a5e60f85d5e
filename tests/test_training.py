"""00_sft, 01 and 04 on small models: against a plain loop written here, against each other, and after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import types
from array import array

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import stages
from conftest import save_tiny
from stages import farthest, metrics, other_steps, rows, run, weights

STEPS = 18  # 41 pairs, 8 a step, 3 epochs
REFINED = dict(lr=1e-3, beta=0.3, batch_size=8, epochs=3, window=16, k_percent=25, alpha=0.3)


# ---------------------------------------------------------------------------------------------
# The oracle: one pair at a time, whole logits, everything spelt out


def rate(step, steps, lr):
    """Linear over the first tenth of the steps, from 0, then a cosine to 0."""
    warm_up = math.ceil(0.1 * steps)
    if step < warm_up:
        return lr * step / warm_up
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def response_logits(model, prompt, response):
    return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]


def logp(logits, response):
    return -F.cross_entropy(logits, torch.tensor(response), reduction="sum")


def percentile(values, k_percent):
    """The k-th smallest of n values, k = K % of n + 1, between two of them in proportion."""
    position = k_percent / 100 * (len(values) + 1)
    below, part = int(position), position % 1
    values = sorted(values)
    return values[below - 1] + part * (values[below] - values[below - 1])


def train_plainly(pi, pi_ref, pairs, options, lam=0.0, refine=True):
    """Eq. 5 and 9 to 12 as in the paper -> the metrics that 04 logs, and the weights."""
    model, ref = (AutoModelForCausalLM.from_pretrained(name) for name in (pi, pi_ref))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    steps = common.epoch_batches(len(pairs), options["batch_size"], options["epochs"], 0)
    known, logged = [], []  # p_theta~ of every pair so far
    for step, batch in enumerate(steps):
        ready = refine and step >= 0.2 * len(steps) and len(known) >= options["window"]
        tau = percentile(known[-options["window"]:], options["k_percent"]) if ready else 0.0
        losses, flagged = [], 0
        for i in batch:
            theta, extrapolated, reference = {}, {}, {}
            for y in ("chosen", "rejected"):
                ids = pairs[i][y]["ids"]
                with torch.no_grad():
                    h_ref = response_logits(ref, pairs[i]["prompt_ids"], ids)
                h = response_logits(model, pairs[i]["prompt_ids"], ids)
                theta[y], reference[y] = logp(h, ids), logp(h_ref, ids)
                extrapolated[y] = logp((1 + lam) * h.detach() - lam * h_ref, ids)

            def p(policy):  # Eq. 5
                ratio = {y: policy[y] - reference[y] for y in policy}
                return torch.sigmoid(options["beta"] * (ratio["chosen"] - ratio["rejected"]))

            z = float(p(extrapolated) < tau)
            alpha = options["alpha"]
            losses.append(-((1 - alpha * z) * p(theta).log() + alpha * z * (1 - p(theta)).log()))
            known.append(p(extrapolated).item())
            flagged += z
        optimizer.zero_grad()
        loss = sum(losses) / len(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.param_groups[0]["lr"] = rate(step, len(steps), options["lr"])
        optimizer.step()
        logged.append({"step": step + 1, "loss": loss.item(), "tau": tau, "flagged": flagged / len(batch),
                       "confidence": np.mean(known[-len(batch):]), "grad_norm": norm,
                       "lr": rate(step, len(steps), options["lr"])})
    return logged, model.state_dict()


def check_equal(output, logged, state, unknown=0):
    """unknown: steps at the start in which p_theta~ is not needed yet, nor known."""
    assert [ours["step"] for ours in metrics(output) if "confidence" not in ours] == list(range(1, unknown + 1))
    for ours, theirs in zip(metrics(output), logged, strict=True):
        for key in theirs.keys() - ({"confidence"} if theirs["step"] <= unknown else {}):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), f"{key} of step {theirs['step']}"
    for name, weight in weights(output).items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# 04


@pytest.fixture(scope="module")
def decoupled(pi_0, pi_init, preferences):
    return train_plainly(pi_0, pi_init, rows(preferences), REFINED, lam=0.5)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_04_is_equations_10_to_12_at_any_micro_batch_size(decoupled, pi_0, pi_init, preferences, tmp_path,
                                                          micro_batch_size):
    # a reference other than theta, so that confidences are spread from the first step on
    output = run("04_refined_dpo", model=pi_0, ref_model=pi_init, input=preferences, output=tmp_path / "out",
                 micro_batch_size=micro_batch_size, lam=0.5, **REFINED)
    check_equal(output, *decoupled, unknown=2)  # 16 pairs, the window, before the fifth step, the first that flags


def test_the_oracle_tells_the_modes_of_refinement_apart(decoupled):
    logged = decoupled[0]
    assert len(logged) == STEPS
    # 20 % of 18 steps are 3.6: the first 4 steps flag nothing, though the window of 16 is full after 2
    assert [line["tau"] > 0 for line in logged] == [False] * 4 + [True] * 14
    assert 0.1 < np.mean([line["flagged"] for line in logged[4:]]) < 0.4  # K = 25 %


@pytest.mark.parametrize("refine, lam", [("self", 0.5), ("none", 0.5)])
def test_04_is_equation_9_with_self_and_equation_6_with_none(pi_0, pi_init, preferences, tmp_path, refine, lam):
    output = run("04_refined_dpo", model=pi_0, ref_model=pi_init, input=preferences, output=tmp_path / "out",
                 refine=refine, lam=lam, **REFINED)
    check_equal(output, *train_plainly(pi_0, pi_init, rows(preferences), REFINED, refine=refine == "self"))


@pytest.fixture(scope="module")
def train_04(pi_0, pi_init, preferences, tmp_path_factory):
    def train(**options):
        return run("04_refined_dpo", **dict(model=pi_0, ref_model=pi_init, input=preferences,
                                            output=tmp_path_factory.mktemp("out") / "pi", **REFINED) | options)
    return train


def test_lambda_0_is_equation_9(train_04):
    one, two = train_04(refine="decoupled", lam=0), train_04(refine="self")
    assert farthest(one, two) == 0 and other_steps(one, two) == []
    assert farthest(two, train_04(refine="decoupled", lam=1)) > 1e-4


def test_alpha_0_is_equation_6(train_04, pi_0, pi_init, preferences, tmp_path):
    one, two = train_04(alpha=0), train_04(refine="none")
    assert farthest(one, two) < 1e-5  # the reference's log-probs come from other batches
    assert any(line["flagged"] for line in metrics(one)) and not any(line["flagged"] for line in metrics(two))
    assert farthest(one, train_04(alpha=0.3)) > 1e-4


def test_04_without_refinement_is_01(pi_init, tokenizer, world, tmp_path):
    # the same pairs as token ids and as texts
    common_options = dict(model=pi_init, lr=1e-3, beta=0.3, batch_size=8, epochs=2)
    one = run("01_seed_dpo", input=world / "seed.jsonl", output=tmp_path / "01", **common_options)
    pairs = []
    for row in rows(world / "seed.jsonl"):
        prompt = common.prompt_ids(tokenizer, row["prompt"], "")
        ids = {y: common.response_ids(tokenizer, row["prompt"], prompt, row[y], [tokenizer.eos_token_id])
               for y in ("chosen", "rejected")}
        pairs.append({**row, "prompt_ids": prompt,
                      **{y: {"text": row[y], "ids": ids[y], "finish": "eos"} for y in ids}})
    two = run("04_refined_dpo", input=stages.write_rows(tmp_path / "pairs.jsonl", pairs), output=tmp_path / "04",
              refine="none", **common_options)
    assert farthest(one, two) == 0
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours == {key: theirs[key] for key in ours}


def test_nothing_is_flagged_before_50_pairs_are_known(train_04):
    # 41 pairs: with the default window, a single epoch never knows 50 of them
    logged = metrics(train_04(epochs=1, window=50))
    assert all(line["flagged"] == 0 and line["tau"] == 0 for line in logged)
    # three epochs do: after 8 + 8 + 8 + 8 + 8 + 1 pairs of the first and 8 + 8 of the second, that is from step 9 on
    logged = metrics(train_04(window=50))
    assert [line["tau"] > 0 for line in logged] == [False] * 8 + [True] * 10


def test_the_defaults_are_the_paper_s():
    args = stages.parsed("04_refined_dpo", ["--model", "m", "--input", "i", "--output", "o"])
    assert (args.beta, args.alpha, args.k_percent, args.lam, args.window, args.refine_after) == (0.1, 0.1, 10, 0.5, 50, 0.2)
    assert (args.lr, args.batch_size, args.epochs, args.refine) == (5e-7, 32, 1, "decoupled")
    args = stages.parsed("01_seed_dpo", ["--model", "m", "--input", "i", "--output", "o"])
    assert (args.beta, args.lr, args.batch_size, args.epochs) == (0.1, 5e-7, 32, 3)
    args = stages.parsed("00_sft", ["--model", "m", "--input", "i", "--output", "o"])
    assert (args.lr, args.batch_size, args.epochs) == (2e-5, 128, 1)
    args = stages.parsed("02_generate", ["--model", "m", "--input", "i", "--output", "o"])
    assert (args.samples, args.temperature, args.max_new_tokens) == (2, 0.7, 300)
    args = stages.parsed("00_inputs", ["--source", "ultrafeedback", "--output", "o"])
    assert (args.seed_size, args.prompt_sizes) == (2000, [8000, 20000, 30000])


# ---------------------------------------------------------------------------------------------
# What 01, 04 and 00_sft share


@pytest.fixture(params=["00_sft", "01_seed_dpo", "04_refined_dpo"])
def stage(request, world, pi_init, preferences, tmp_path):
    """Run one of the training stages with given options, in a new folder."""
    inputs = {"00_sft": world / "sft.jsonl", "01_seed_dpo": world / "seed.jsonl", "04_refined_dpo": preferences}
    options = dict(model=pi_init, input=inputs[request.param], lr=1e-3, batch_size=7, epochs=2)
    if request.param == "04_refined_dpo":
        options |= dict(window=16, k_percent=25)

    def start(output, attempt=False, **more):
        return (stages.attempt if attempt else run)(request.param, **options | {"output": tmp_path / output} | more)
    start.name = request.param
    return start


@pytest.mark.parametrize("stage", ["01_seed_dpo", "04_refined_dpo"], indirect=True)
def test_on_the_first_step_policy_and_reference_agree_exactly(stage, tokenizer, tmp_path):
    # also with a model that has dropout, in train mode under activation checkpointing
    model = save_tiny(tmp_path / "model", tokenizer, attention_dropout=0.5)
    first = metrics(stage("out", model=model, activation_checkpointing=True))[0]
    assert first["margin"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    if stage.name == "04_refined_dpo":
        assert first["confidence"] == pytest.approx(0.5, abs=1e-6)


def test_micro_batches_equal_one_large_batch(stage):
    large = stage("large", micro_batch_size=7)
    for size in (1, 3):
        small = stage(f"small_{size}", micro_batch_size=size)
        assert farthest(small, large) < 2e-5
        for one, two in zip(metrics(small), metrics(large), strict=True):
            assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_activation_checkpointing_changes_nothing(stage):
    on, off = stage("on", activation_checkpointing=True), stage("off")
    assert farthest(on, off) < 1e-6
    assert [line["loss"] for line in metrics(on)] == pytest.approx([line["loss"] for line in metrics(off)], abs=1e-6)


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_computes_each_layer_twice(pi_init, on):
    args, calls = types.SimpleNamespace(model=str(pi_init), activation_checkpointing=on, fsdp=False), []
    model, policy = common.load_policy(args, common.Ranks(0, 1, torch.device("cpu")))
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(common.collate([([5, 6], [[7, 8]])], "cpu")).sum().backward()
    assert len(calls) == 1 + on


def test_the_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_as_a_cosine(stage):
    logged = metrics(stage("out", batch_size=2))
    n, lr = len(logged), [line["lr"] for line in logged]
    assert lr == pytest.approx([rate(step, n, 1e-3) for step in range(n)], rel=1e-6)
    warm_up = math.ceil(n / 10)
    assert lr[0] == 0 and lr[warm_up] == 1e-3 == max(lr)  # the first step, the first after the warm-up
    assert 0 < lr[-1] < 1e-3 * (math.pi / (n - warm_up)) ** 2 / 4 * 1.01  # the last: cos x = 1 - x^2 / 2


def test_every_row_is_visited_once_an_epoch_and_counted(stage):
    output = stage("out")
    record = json.loads((output / "args.json").read_text())
    count = len(rows(record["made_from"]["args"]["input"]))
    assert record["counts"]["steps"] == len(metrics(output)) == 2 * math.ceil(count / 7)
    batches = common.epoch_batches(count, 7, 2, 0)
    one, two = batches[:len(batches) // 2], batches[len(batches) // 2:]
    assert sorted(sum(one, [])) == sorted(sum(two, [])) == list(range(count)) and one != two


class Stopped(Exception):
    """Stands for a machine that fails."""


def before_step(monkeypatch, step, act):
    """Call `act` when the gradient of a step, counted from 1, is there and its update is not."""
    calls = []

    def clip(*args, real=torch.nn.utils.clip_grad_norm_, **options):
        calls.append(1)
        if len(calls) == step:
            act()
        return real(*args, **options)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def stop():
    raise Stopped


@pytest.mark.parametrize("step", [2, 3, 6])  # before the first state, just after one, later
def test_a_stage_that_was_stopped_goes_on_and_gives_the_same(stage, monkeypatch, step):
    whole = stage("whole", save_every=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_step(patch, step, stop)
        stage("stopped", save_every=2)
    stopped = stage("stopped", attempt=True, save_every=2)
    assert stopped.status == 0
    assert ("going on after step" in stopped.out) == (step > 2)
    path = whole.parent / "stopped"
    assert farthest(path, whole) == 0 and other_steps(path, whole) == []
    assert not path.with_name("stopped.partial").exists()


def test_a_killed_process_leaves_what_is_needed_to_go_on(pi_init, preferences, tmp_path):
    options = dict(model=pi_init, input=preferences, lr=1e-3, batch_size=8, epochs=3, window=16, save_every=3)
    code = ("import os, signal, sys, common, stages, torch\n"
            "clip, calls = torch.nn.utils.clip_grad_norm_, []\n"
            "def killing(*args):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return clip(*args)\n"
            "torch.nn.utils.clip_grad_norm_ = killing\n"
            "torch.set_num_threads(1)\n"
            "sys.argv = sys.argv[1:]; common.run(stages.load('04_refined_dpo').main)\n")
    words = stages.command_line(options | {"output": tmp_path / "killed"})
    path = os.pathsep.join([str(stages.ROOT), str(stages.ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", code, "04_refined_dpo.py", *words], capture_output=True,
                          env=stages.NO_RANKS | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed").exists() and len(rows(tmp_path / "killed.partial" / "metrics.jsonl")) == 8
    again = stages.attempt("04_refined_dpo", output=tmp_path / "killed", **options)
    assert again.status == 0 and "going on after step 6" in again.out
    whole = run("04_refined_dpo", output=tmp_path / "whole", **options)
    assert farthest(tmp_path / "killed", whole) == 0 and other_steps(tmp_path / "killed", whole) == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(stage, monkeypatch, tmp_path):
    whole = stage("whole", save_every=2)
    factor = {"logp": 1.0}

    def response_logps(logp, lengths, real=common.response_logps):
        return real(logp, lengths) * factor["logp"]

    with monkeypatch.context() as patch:
        patch.setattr(common, "response_logps", response_logps)
        before_step(patch, 3, lambda: factor.update(logp=math.nan))  # from step 4 on
        ran = stage("out", attempt=True, save_every=2, micro_batch_size=7)
    assert ran.status == 2 and ran.err.count("\n") == 1 and "Traceback" not in ran.err
    assert "step 4" in ran.err and "not finite" in ran.err
    state = torch.load(tmp_path / "out.partial" / "state-2.pt", weights_only=True)
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["model"].values())
    assert not (tmp_path / "out").exists()
    # the rows that it names are those of the fourth batch
    row_ids = [row["id"] for row in rows(json.loads((whole / "args.json").read_text())["made_from"]["args"]["input"])]
    expected = {row_ids[i] for i in common.epoch_batches(len(row_ids), 7, 2, 0)[3]}
    named = ran.err.split("(ids ")[1].split(")")[0].split(", ")
    assert named and set(named) <= expected
    stage("out", save_every=2, micro_batch_size=7)  # the fault gone, it goes on
    assert farthest(tmp_path / "out", whole) < 2e-5


# ---------------------------------------------------------------------------------------------
# 00_sft


def test_00_sft_is_the_cross_entropy_on_response_tokens_only(world, pi_init, tokenizer, tmp_path):
    output = run("00_sft", model=pi_init, input=world / "sft.jsonl", output=tmp_path / "out", lr=0, batch_size=20,
                 micro_batch_size=3)
    model, examples = AutoModelForCausalLM.from_pretrained(pi_init), rows(world / "sft.jsonl")
    order = common.epoch_batches(len(examples), 20, 1, 0)
    for line, batch in zip(metrics(output), order, strict=True):
        loss, tokens = 0.0, 0
        for i in batch:
            prompt = common.prompt_ids(tokenizer, common.as_messages(examples[i]["prompt"]), "")
            response = tokenizer(examples[i]["response"]).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                loss -= logp(response_logits(model, prompt, response), response).item()
            tokens += len(response)
        assert line["loss"] == pytest.approx(loss / tokens, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# What is read


def test_01_and_sft_cut_responses_and_drop_long_prompts(world, pi_init, tokenizer, tmp_path):
    seed = rows(world / "seed.jsonl")
    lengths = sorted(len(common.prompt_ids(tokenizer, row["prompt"], "")) for row in seed)
    limit = lengths[len(lengths) // 2]
    run("01_seed_dpo", model=pi_init, input=world / "seed.jsonl", output=tmp_path / "out", max_prompt_length=limit)
    counts = json.loads((tmp_path / "out" / "args.json").read_text())["counts"]
    assert counts["pairs read"] == len(seed)
    assert counts["prompt too long"] == sum(length > limit for length in lengths) > 0

    # two tokens of room: where both responses begin with the same two words, no preference is left
    args = stages.parsed("01_seed_dpo", ["--model", str(pi_init), "--input", str(world / "seed.jsonl"), "--output", "o",
                                         "--max-length", str(lengths[-1] + 2)])
    pairs, counts = stages.load("01_seed_dpo").read_pairs(args, AutoTokenizer.from_pretrained(pi_init))
    assert all(len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"])) <= lengths[-1] + 2 for pair in pairs)
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert counts["same after cutting"] == len(seed) - len(pairs)


def test_04_trains_on_the_sampled_ids_as_they_are(pi_init, tmp_path):
    # ids that no tokenizer would give for the text: decoding and tokenising again would lose them
    row = {"id": 1, "prompt": "x", "prompt_ids": [9, 8], "chosen": {"text": "a", "ids": [7, 7, 7], "finish": "length"},
           "rejected": {"text": "b", "ids": [10], "finish": "eos"}}
    path = stages.write_rows(tmp_path / "in.jsonl", [row])
    args = stages.parsed("04_refined_dpo", ["--model", str(pi_init), "--input", str(path), "--output", "o"])
    [pair], _ = stages.load("04_refined_dpo").read_pairs(args)
    ids = {"prompt": array("i", [9, 8]), "chosen": array("i", [7, 7, 7]), "rejected": array("i", [10])}
    assert pair == {"id": "1", **ids, "logps_ref": None}
    args.max_length = 4  # cut to fit, as text would be
    [pair], _ = stages.load("04_refined_dpo").read_pairs(args)
    assert pair == {"id": "1", **ids, "chosen": array("i", [7, 7]), "logps_ref": None}


@pytest.fixture(scope="module")
def labelled(pi_0, pi_init, world, tmp_path_factory):
    """Preferences with the log-probs that 03 judged by, under pi_0 and pi_init."""
    folder = tmp_path_factory.mktemp("labelled")
    responses = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=8,
                    output=folder / "responses.jsonl")
    return run("03_judge", model=pi_0, init_model=pi_init, input=responses, output=folder / "preferences.jsonl")


def scored_by_04(monkeypatch, labelled, **options):
    """Run 04 -> (its output, ids of the pairs whose log-probs under pi_ref it computed to store them)"""
    scored = []

    def store_logps(ref, pairs, *rest, real=common.store_logps):
        scored.extend(pair["id"] for pair in pairs)
        return real(ref, pairs, *rest)
    monkeypatch.setattr(common, "store_logps", store_logps)
    return run("04_refined_dpo", input=labelled, lr=1e-3, batch_size=4, refine="none", **options), scored


def test_04_takes_the_log_probs_that_03_recorded_where_they_are_its_references(labelled, pi_0, pi_init, tmp_path,
                                                                               monkeypatch):
    everything = [row["id"] for row in rows(labelled)]
    bare = stages.write_rows(tmp_path / "bare.jsonl", [{k: v for k, v in row.items() if k != "logps"}
                                                       for row in rows(labelled)])
    recorded, scored = scored_by_04(monkeypatch, labelled, model=pi_0, output=tmp_path / "recorded")
    assert scored == []
    computed, scored = scored_by_04(monkeypatch, bare, model=pi_0, output=tmp_path / "computed")
    assert sorted(scored) == sorted(everything)
    assert farthest(recorded, computed) < 1e-5
    assert metrics(recorded)[0]["margin"] == pytest.approx(0, abs=1e-4)
    # another reference than the model that 03 judged with, and responses that are cut: nothing recorded fits
    other, scored = scored_by_04(monkeypatch, labelled, model=pi_0, ref_model=pi_init, output=tmp_path / "other")
    assert sorted(scored) == sorted(everything)
    assert farthest(other, run("04_refined_dpo", input=bare, lr=1e-3, batch_size=4, refine="none", model=pi_0,
                               ref_model=pi_init, output=tmp_path / "other bare")) < 1e-5
    cut = max(len(row["prompt_ids"]) for row in rows(labelled)) + 3
    _, scored = scored_by_04(monkeypatch, labelled, model=pi_0, max_length=cut, output=tmp_path / "cut")
    assert scored != []


@pytest.mark.parametrize("logps", [None, 3, {}, {"policy": [1.0]}, {"policy": ["a", 1]}, {"policy": {"a": 1, "b": 2}}])
def test_log_probs_that_are_none_are_computed(logps):
    refined = stages.load("04_refined_dpo")
    assert refined.recorded_logps({"p": 0.7, "logps": logps}) is None
    assert refined.recorded_logps({"p": 0.7, "logps": {"policy": [-1.0, -2.0]}}) == [-1.0, -2.0]
    assert refined.recorded_logps({"p": 0.3, "logps": {"policy": [-1.0, -2.0]}}) == [-2.0, -1.0]  # y_2 is chosen


def test_micro_batches_hold_their_budget_of_tokens():
    lengths = [5, 30, 2, 9, 9, 40, 3]
    batches = common.length_batches(lengths, 3, tokens=30)
    assert batches == [[2, 6, 0], [3, 4], [1], [5]]  # 40 tokens alone: a pair is never left out
    assert common.length_batches(lengths, 3) == [[2, 6, 0], [3, 4, 1], [5]]


@pytest.mark.parametrize("world, size, shares", [
    (1, 16, [[16]]),
    (4, 16, [[4], [4], [4], [4]]),  # one micro-batch of 16 would leave three ranks idle
    (2, 6, [[4, 4], [4, 4]]),  # 6, 6, 4 would be 12 rows on one rank and 6, twice, on the other
    (3, 2, [[2, 2, 2], [2, 2, 2], [2, 2, 0]])])
def test_micro_batches_give_every_rank_its_share(world, size, shares):
    args, rows = types.SimpleNamespace(micro_batch_size=size, micro_batch_tokens=None), list(range(16))
    ranks = [common.Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    taken = [common.micro_batches(rows, args, rank, length=lambda row: row) for rank in ranks]
    assert [[weight * len(micro) for micro, weight in mine] for mine in taken] == shares
    assert sorted(row for mine in taken for micro, weight in mine for row in weight * micro) == rows
