"""00_sft, 01 and 04 on small models: against extras/plain_spa.py, against each other, and on odd input."""

import math
import re
import types
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import common
from extras import plain_spa
from support import chat, models, records
import stages
from children import good
from conftest import save_tiny
from stages import counts, digest, farthest, metrics, refused, rows, run, weights, write_rows

REFINED = dict(lr=1e-3, beta=0.3, batch_size=8, epochs=3, window=16, k_percent=25, alpha=0.3)


def train_plainly(pi, pi_ref, pairs, refine, lam=0.0):
    """What the page's `train` logs, and the weights."""
    model, ref = (AutoModelForCausalLM.from_pretrained(name) for name in (pi, pi_ref))
    triples = [(row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]) for row in pairs]
    logged = []
    plain_spa.train(model, ref, triples, refine, lam=lam, **REFINED, log=logged.append)
    return logged, model.state_dict()


def check_equal(output, logged, state):
    for ours, theirs in zip(metrics(output), logged, strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), f"{key} of step {theirs['step']}"
    for name, weight in weights(output).items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def decoupled(pi_0, pi_init, preferences):
    return train_plainly(pi_0, pi_init, rows(preferences), refine=True, lam=0.5)


@pytest.fixture(scope="module")
def train_04(pi_0, pi_init, preferences, tmp_path_factory):
    """Run 04, with a reference other than theta, so that confidences are spread from the first step on."""
    def train(**options):
        return run("04_refined_dpo", **dict(model=pi_0, ref_model=pi_init, input=preferences,
                                            output=tmp_path_factory.mktemp("out") / "pi", **REFINED) | options)
    return train


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_04_is_equations_10_to_12_at_any_micro_batch_size(decoupled, train_04, micro_batch_size):
    check_equal(train_04(micro_batch_size=micro_batch_size, lam=0.5), *decoupled)


@pytest.mark.parametrize("refine", ["self", "none"])
def test_04_is_equation_9_with_self_and_equation_6_with_none(pi_0, pi_init, preferences, train_04, refine):
    expected = train_plainly(pi_0, pi_init, rows(preferences), refine=refine == "self")
    check_equal(train_04(refine=refine, lam=0.5), *expected)


def test_the_oracle_tells_the_modes_of_refinement_apart(decoupled):
    logged = decoupled[0]
    # 20 % of 18 steps (41 pairs, 8 a step, 3 epochs) are 3.6: the first 4 flag nothing, though the window of 16 is full
    # after 2
    assert [line["tau"] > 0 for line in logged] == [False] * 4 + [True] * 14
    assert 0.1 < np.mean([line["flagged"] for line in logged[4:]]) < 0.4  # K = 25 %


@pytest.fixture(scope="module")
def seed_as_ids(world, tokenizer):
    """The pairs of the seed as 03 would have written them."""
    pairs = []
    for row in records.read_jsonl(world / "seed.jsonl", records.LABELLED):
        prompt, responses = cut_text(tokenizer, row, ["chosen", "rejected"])
        chosen, rejected = ({"text": "", "ids": ids, "finish": "eos"} for ids in responses)
        pairs.append(row | {"prompt_ids": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def test_04_without_refinement_is_01(pi_init, seed_as_ids, world, tmp_path):
    options = dict(model=pi_init, lr=1e-3, beta=0.3, batch_size=8, epochs=2)
    one = run("01_seed_dpo", input=world / "seed.jsonl", output=tmp_path / "01", **options)
    two = run("04_refined_dpo", input=write_rows(tmp_path / "pairs.jsonl", seed_as_ids), output=tmp_path / "04",
              refine="none", **options)
    assert farthest(one, two) == 0
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert ours == {key: theirs[key] for key in ours}


def test_04_merges_d_t_with_the_labelled_texts_of_the_seed(pi_0, preferences, seed_as_ids, world, tmp_path):
    # the same as one file in which the texts are token ids already
    options = dict(model=pi_0, beta=0.3, lr=1e-2, epochs=1, batch_size=8, window=20)
    merged = run("04_refined_dpo", **options, input=[preferences, world / "seed.jsonl"], output=tmp_path / "merged")
    pairs = rows(preferences) + seed_as_ids
    one = run("04_refined_dpo", **options, input=write_rows(tmp_path / "one.jsonl", pairs), output=tmp_path / "one")
    assert counts(merged)["pairs read"] == len(pairs) == 41 + 20 and digest(merged / "model.safetensors") == digest(
        one / "model.safetensors")
    line = refused("04_refined_dpo", **options, input=[preferences, preferences], output=tmp_path / "twice")
    assert f"{preferences} {preferences}: " in line and "id p0" in line


def test_nothing_is_flagged_before_50_pairs_are_known(train_04):
    # after 8 + 8 + 8 + 8 + 8 + 1 pairs of the first epoch and 8 + 8 of the second, that is from step 9 on
    logged = metrics(train_04(window=50))
    assert [line["tau"] > 0 for line in logged] == [False] * 8 + [True] * 10


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_k_percent_of_the_pairs_are_flagged_on_average(batch_size):
    # Independent confidences, tau from the last 50 before the step. The k-th smallest of 50 has k / 51 of the next
    # ones below it, so 5.1 / 51 = 10 %. About 1,200 independent windows: a standard error of 4.2 % / sqrt(1200) =
    # 0.12 %. numpy's default percentile would flag 11.6 %, the authors' sorted[5], sorted[6] 12.7 %.
    threshold = stages.load("04_refined_dpo").threshold
    rng, window, flagged, count = np.random.default_rng(0), deque(maxlen=50), 0, 0
    for _ in range(60_000 // batch_size):
        confidence = rng.random(batch_size)
        if len(window) == 50:
            flagged += (confidence < threshold(window, 10)).sum()
            count += batch_size
        window.extend(confidence)
    assert flagged / count == pytest.approx(0.10, abs=0.005)
    assert threshold(window, 0) == 0  # nothing is below it


@pytest.mark.parametrize("stage, words, defaults", [
    ("00_inputs", ["--source", "world"], dict(seed_size=2000, seed_sample=0, prompt_sizes=[8000, 20000, 30000])),
    ("00_sft", [], dict(lr=2e-5, batch_size=128, epochs=1)),
    ("01_seed_dpo", [], dict(beta=0.1, lr=5e-7, batch_size=32, epochs=3)),
    ("02_generate", [], dict(samples=2, temperature=0.7, max_new_tokens=300)),
    ("03_judge", ["--init-model", "m"], dict(beta=0.1, judge="init")),
    ("04_refined_dpo", [], dict(beta=0.1, alpha=0.1, k_percent=10, lam=0.5, window=50, refine_after=0.2, lr=5e-7,
                                batch_size=32, epochs=1, refine="decoupled"))])
def test_the_defaults_are_the_paper_s(stage, words, defaults):
    required = ["--output", "o"] + ["--model", "m", "--input", "i"] * (stage != "00_inputs")
    args = stages.parsed(stage, words + required)
    assert {name: getattr(args, name) for name in defaults} == defaults


@pytest.fixture(params=["00_sft", "01_seed_dpo", "04_refined_dpo"])
def stage(request, good, pi_init, tmp_path):
    """Run one of the training stages with given options, in a new folder; its input is stage.input."""
    options = good[request.param] | dict(model=pi_init, batch_size=7, epochs=2)

    def start(output, run=run, **more):
        return run(request.param, **options | {"output": tmp_path / output} | more)
    start.name, start.input = request.param, options["input"]
    return start


@pytest.mark.parametrize("stage", ["01_seed_dpo", "04_refined_dpo"], indirect=True)
def test_on_the_first_step_policy_and_reference_agree_exactly(stage, tokenizer, tmp_path):
    # also with a model that has dropout, in train mode under gradient checkpointing
    model = save_tiny(tmp_path / "model", tokenizer, attention_dropout=0.5)
    first = metrics(stage("out", model=model, gradient_checkpointing=True))[0]
    # 04 computes both in one batch, 01 has stored those of pi_ref, whose batches were others
    assert abs(first["rewards/margins"]) <= (1e-6 if stage.name == "01_seed_dpo" else 0)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if "confidence" in first:
        assert first["confidence"] == pytest.approx(0.5, abs=1e-6)


def test_micro_batches_equal_one_large_batch(stage, pi_0):
    # another reference than theta: else the margins of the first step are 0, and rounding decides their sign, accuracy
    other = {} if stage.name == "00_sft" else {"ref_model": pi_0}
    large = stage("large", micro_batch_size=7, **other)
    for size in (1, 3):
        small = stage(f"small_{size}", micro_batch_size=size, **other)
        assert farthest(small, large) < 2e-5
        for one, two in zip(metrics(small), metrics(large), strict=True):
            assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_each_layer_twice(pi_init, on):
    args, calls = types.SimpleNamespace(model=str(pi_init), gradient_checkpointing=on, fsdp=False), []
    model, policy = models.load_policy(args, common.Ranks(0, 1, torch.device("cpu")))
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(common.collate([([5, 6], [[7, 8]])], "cpu")).sum().backward()
    assert len(calls) == 1 + on


def test_the_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_as_a_cosine(stage):
    output = stage("out", batch_size=2)
    lr = [line["learning_rate"] for line in metrics(output)]
    n = counts(output)["steps"]
    assert len(lr) == n == 2 * math.ceil(len(rows(stage.input)) / 2)
    warm_up = math.ceil(n / 10)
    falling = [5e-4 * (1 + math.cos(math.pi * (step - warm_up) / (n - warm_up))) for step in range(warm_up, n)]
    assert lr == pytest.approx([1e-3 * step / warm_up for step in range(warm_up)] + falling, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(stage, tmp_path):
    # the first step's rate is 0; after the second, which is far too large, attention is NaN
    line = stage("out", stages.refused, lr=1e15, save_every=2, micro_batch_size=7)
    assert "step 3" in line and "--lr" in line and str(tmp_path / "out.partial") in line
    row_ids = [row["id"] for row in rows(stage.input)]
    named = set(re.search(r"ids ([^)]*)", line)[1].split(", "))
    assert named <= {row_ids[i] for i in common.epoch_batches(len(row_ids), 7, 2, 0)[2]}
    [path] = (tmp_path / "out.partial").glob("state-*")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["model"].values())


def cut_text(tokenizer, row, keys, max_prompt_length=99, max_length=99):
    """(prompt ids, [ids of each response]), or None where the prompt is too long."""
    prompt = chat.prompt_ids(tokenizer, records.as_messages(row["prompt"]), "")
    responses = [tokenizer(row[key]).input_ids + [tokenizer.eos_token_id] for key in keys]
    return (prompt, [ids[:max_length - len(prompt)] for ids in responses]) if len(prompt) <= max_prompt_length else None


@pytest.fixture(scope="module")
def talks(world, tmp_path_factory):
    """Conversations of one to three turns, and "<think> words </think>" before every answer but the first."""
    given, talks = rows(world / "sft.jsonl"), []
    for k in range(20):
        messages = [{"role": "system", "content": "my"}] * (k % 2)
        for turn in given[2 * k:2 * k + k % 3]:
            messages += [{"role": "user", "content": turn["prompt"]},
                         {"role": "assistant", "content": f"<think> we </think> {turn['response']}"}]
        messages.append({"role": "user", "content": given[k]["prompt"]})
        talks.append({"id": k, "prompt": messages, "response": given[k]["response"]})
    return write_rows(tmp_path_factory.mktemp("talks") / "talks.jsonl", talks)


@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize("cut", [{}, dict(max_prompt_length=24), dict(max_length=60)])
def test_00_sft_is_the_cross_entropy_of_the_last_turn_or_of_all_turns(talks, pi_init, tokenizer, tmp_path, all_turns,
                                                                      cut):
    output = run("00_sft", model=pi_init, input=talks, micro_batch_size=3, output=tmp_path / "out", lr=1e-12,
                 batch_size=7, epochs=2, **cut, **{"all_turns": True} if all_turns else {})
    kept, assistant = [], tokenizer.convert_tokens_to_ids("<assistant>")
    for row in rows(talks):
        messages = row["prompt"] + [{"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        trained, answer = [], False
        for i in ids:  # an answer is what follows <assistant>, to the next <eos>
            trained.append(answer)
            answer = i == assistant or answer and i != tokenizer.eos_token_id
        if not all_turns:
            last = len(ids) - ids[::-1].index(assistant)
            trained = [k >= last for k in range(len(ids))]
        if trained.index(True) <= cut.get("max_prompt_length", 999) and any(trained[:cut.get("max_length")]):
            kept.append((ids[:cut.get("max_length")], trained[:cut.get("max_length")]))
    model = AutoModelForCausalLM.from_pretrained(pi_init)  # at this rate it stays what it was
    for line, batch in zip(metrics(output), common.epoch_batches(len(kept), 7, 2, 0), strict=True):
        losses = [F.cross_entropy(model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]),
                                  reduction="none")[torch.tensor(trained[1:])]
                  for ids, trained in (kept[i] for i in batch)]
        loss = torch.cat(losses).mean()
        model.zero_grad()
        loss.backward()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert counts(output)["rows read"] == 20 == counts(output)["dropped as too long"] + len(kept)
    assert (len(kept) == 20) == (not cut or all_turns)
    assert counts(output).get("earlier turns left out") == (0 if all_turns else None)


def test_a_turn_that_the_template_writes_in_another_way_later_is_not_trained(talks, pi_init, tokenizer, tmp_path):
    template = tmp_path / "template"  # it leaves out the thoughts of earlier turns
    template.write_text(tokenizer.chat_template.replace(
        "m.content", "m.content if loop.last else m.content.split('</think>')[-1]"))
    given = rows(talks)
    question = given[0]["prompt"][-1:]
    given[0]["prompt"] = question + [{"role": "assistant", "content": ""}] + question  # nor is one without a text
    options = dict(model=pi_init, input=write_rows(tmp_path / "in.jsonl", given), chat_template=template, batch_size=7)
    one = run("00_sft", **options, lr=1e-3, output=tmp_path / "one")
    two = run("00_sft", **options, lr=1e-3, output=tmp_path / "two", all_turns=True)
    assert digest(one / "model.safetensors") == digest(two / "model.safetensors")
    assert counts(two)["earlier turns left out"] == sum((len(row["prompt"]) - 1) // 2 for row in given)


@pytest.mark.parametrize("cut", [  # prompts have 15 to 19 tokens, responses 26 to 40
    {}, dict(max_prompt_length=17), dict(max_length=20)])
def test_01_cuts_responses_and_drops_long_prompts_and_then_equal_pairs(world, pi_init, tokenizer, tmp_path, cut):
    seed = records.read_jsonl(world / "seed.jsonl", records.LABELLED)
    seed[0]["rejected"] = seed[0]["chosen"] + " my"  # they differ at the end alone
    output = run("01_seed_dpo", model=pi_init, input=write_rows(tmp_path / "seed.jsonl", seed), batch_size=20, epochs=2,
                 output=tmp_path / "out", **cut)
    model, found = AutoModelForCausalLM.from_pretrained(pi_init), counts(output)
    pairs = [cut_text(tokenizer, row, ["chosen", "rejected"], **cut) for row in seed]
    kept = [(prompt, pair) for prompt, pair in filter(None, pairs) if pair[0] != pair[1]]
    long, equal = pairs.count(None), len(pairs) - pairs.count(None) - len(kept)
    assert [found[f"dropped as {name}"] for name in ("too long", "equal after cutting")] == [long, equal]
    assert found["pairs read"] == len(pairs)
    assert (long > 0, equal > 0) == ("max_prompt_length" in cut, "max_length" in cut)
    for k, name in enumerate(("logps/chosen", "logps/rejected")):
        expected = np.mean([plain_spa.log_prob(model, prompt, pair[k]).item() for prompt, pair in kept])
        assert metrics(output)[0][name] == pytest.approx(expected, rel=1e-5)


def test_a_run_of_one_step_which_would_change_nothing_is_refused(stage):
    assert "--batch-size" in stage("out", stages.refused, epochs=1, batch_size=64)
    assert len(metrics(stage("out", epochs=2, batch_size=64))) == 2


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
    args = types.SimpleNamespace(micro_batch_size=size, micro_batch_tokens=None)
    rows = [{"prompt": [0] * k} for k in range(16)]
    ranks = [common.Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    taken = [common.micro_batches(rows, args, rank) for rank in ranks]
    assert {weight for mine in taken for _, weight in mine} <= {0, world}
    assert [[(weight > 0) * len(micro) for micro, weight in mine] for mine in taken] == shares
    trained = [row for mine in taken for micro, weight in mine if weight for row in micro]
    assert sorted(trained, key=common.row_length) == rows
