"""02 samples and 03 labels: the files they write, against what they read."""

import json
import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from conftest import save_tiny
from extras import plain_spa
from stages import counts, load, rows, run, write_rows
from support import chat


@pytest.fixture(scope="module")
def sampler(tokenizer, tmp_path_factory):
    """A model whose generation config names many end tokens, so that a few responses end before the limit."""
    folder = save_tiny(tmp_path_factory.mktemp("sampler") / "model", tokenizer, noise=0.02)
    config = {"eos_token_id": [tokenizer.eos_token_id, *range(40, 60)]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def generate(sampler, world, tmp_path_factory):
    def start(**options):
        return run("02_generate", **dict(model=sampler, input=world / "prompts_1.jsonl", max_new_tokens=10,
                                         output=tmp_path_factory.mktemp("out") / "responses.jsonl") | options)
    return start


@pytest.fixture(scope="module")
def responses(generate):
    return generate()


def test_02_writes_two_different_responses_per_prompt_in_the_order_of_the_prompts(responses, world, tokenizer):
    prompts = rows(world / "prompts_1.jsonl")
    for prompt, row in zip(prompts, rows(responses), strict=True):
        assert list(row) == ["id", "prompt", "prompt_ids", "responses"]
        assert (row["id"], row["prompt"]) == (prompt["id"], prompt["prompt"])
        assert row["prompt_ids"] == chat.prompt_ids(tokenizer, row["prompt"], "")
        one, two = row["responses"]
        assert one["ids"] != two["ids"]
        for y in (one, two):
            assert y["text"] == tokenizer.decode(y["ids"], skip_special_tokens=True).strip()
            assert y["finish"] in ("eos", "length")


def test_02_samples_a_prompt_alike_in_another_file_and_beside_more_samples(responses, generate, world, tmp_path):
    some = write_rows(tmp_path / "some.jsonl", rows(world / "prompts_1.jsonl")[::-3])
    again = {row["id"]: row["responses"] for row in rows(generate(input=some, samples=3))}
    assert len(again) == len(rows(some)) and all(len(of_prompt) == 3 for of_prompt in again.values())
    assert all(row["responses"] == again[row["id"]][:2] for row in rows(responses) if row["id"] in again)
    one, two = rows(responses), rows(generate(seed=1))
    assert sum(a["responses"] != b["responses"] for a, b in zip(one, two)) > len(one) / 2


def test_02_counts_what_it_does_with_responses_that_hit_the_limit(responses, generate, tokenizer):
    opened, dropped = rows(generate(on_length_limit="open")), generate(on_length_limit="drop")
    ours, theirs = ([y for row in prompts for y in row["responses"]] for prompts in (rows(responses), opened))
    cut = [y for y in theirs if y["finish"] == "length"]
    assert 0 < len(cut) < len(theirs) and all(len(y["ids"]) == 10 for y in cut)
    # eos: an EOS is added to those only; open: they stay as they are
    for one, other in zip(ours, theirs, strict=True):
        added = [tokenizer.eos_token_id] if other["finish"] == "length" else []
        assert one == {**other, "ids": other["ids"] + added}
    # drop: only prompts with both responses finished are left
    whole = [row for row in opened if all(y["finish"] == "eos" for y in row["responses"])]
    assert rows(dropped) == whole and 0 < len(whole) < len(opened)
    counted = counts(dropped)
    assert (counted["prompts read"], counted["responses at the length limit"]) == (len(opened), len(cut))
    assert (counted["prompts kept"], counted["prompts dropped for them"]) == (len(whole), len(opened) - len(whole))


def test_02_drops_and_counts_long_prompts(generate, responses):
    lengths = sorted(len(row["prompt_ids"]) for row in rows(responses))
    output = generate(max_prompt_length=lengths[5])
    left = [row for row in rows(responses) if len(row["prompt_ids"]) <= lengths[5]]
    assert rows(output) == left and 0 < len(left) < len(lengths)
    assert counts(output)["dropped as too long"] == len(lengths) - len(left)


@pytest.fixture
def judged(responses, sampler, pi_init, tmp_path):
    """Start 03 with these options -> its output."""
    def start(**options):
        options = dict(model=sampler, init_model=pi_init, input=responses) | options
        return run("03_judge", **options, output=tmp_path / "out")
    return start


@pytest.mark.parametrize("judge, ref", [("init", "init_model"), ("previous", "ref_model"), ("none", None)])
def test_03_labels_by_equations_7_and_8(responses, sampler, pi_init, tmp_path, judge, ref):
    models = {"policy": AutoModelForCausalLM.from_pretrained(sampler)}
    if ref:
        models["ref"] = AutoModelForCausalLM.from_pretrained(pi_init)
    output = run("03_judge", judge=judge, model=sampler, input=responses, beta=0.3, output=tmp_path / "out",
                 **{ref: pi_init} if ref else {})
    first = longer = 0
    for row, labelled in zip(rows(responses), rows(output), strict=True):
        y = row["responses"]
        logps = {name: [plain_spa.log_prob(model, row["prompt_ids"], y[k]["ids"]).item() for k in (0, 1)]
                 for name, model in models.items()}
        assert labelled["logps"] == {name: pytest.approx(values, abs=1e-3) for name, values in logps.items()}
        ratios = [a - b for a, b in zip(logps["policy"], logps.get("ref", [0, 0]))]
        p = 1 / (1 + math.exp(-0.3 * (ratios[0] - ratios[1])))
        assert labelled["p"] == pytest.approx(p, abs=1e-3)
        w, l = (0, 1) if p > 0.5 else (1, 0)
        assert (labelled["chosen"], labelled["rejected"]) == (y[w], y[l])
        assert labelled["judge"] == judge and all(labelled[key] == row[key] for key in ("id", "prompt", "prompt_ids"))
        first, longer = first + (w == 0), longer + len(y[w]["ids"]) - len(y[l]["ids"])
    assert 0 < first < len(rows(output))
    counted = counts(output)
    assert counted["pairs with the first response chosen"] == first
    assert counted["mean extra tokens of the chosen response"] == pytest.approx(longer / counted["pairs"], abs=1e-3)


def test_03_reports_how_far_the_policy_is_from_pi_init(responses, judged, sampler, tokenizer, tmp_path):
    sure = save_tiny(tmp_path / "sure", tokenizer, initializer_range=1.0)
    policy, init = (AutoModelForCausalLM.from_pretrained(name) for name in (sampler, sure))
    difference, lengths, improbable = [], [], []
    for row in rows(responses):
        for y in row["responses"]:
            x, ids = row["prompt_ids"], y["ids"]
            difference.append((plain_spa.log_prob(policy, x, ids) - plain_spa.log_prob(init, x, ids)).item())
            improbable.append(sum(plain_spa.log_prob(init, x + ids[:t], ids[t:t + 1]).item() < math.log(1e-4)
                                  for t in range(len(ids))))
            lengths.append(len(ids))
    assert 0 < sum(improbable) < sum(lengths)
    output = judged(init_model=sure)
    counted = counts(output)
    assert [k for row in rows(output) for k in row["improbable"]] == improbable
    assert counted["log-ratio per response"] == pytest.approx(np.mean(difference), abs=1e-3)
    assert counted["log-ratio per token"] == pytest.approx(sum(difference) / sum(lengths), abs=1e-3)
    assert counted["improbable tokens (%)"] == pytest.approx(100 * sum(improbable) / sum(lengths), abs=1e-3)


def test_03_drops_and_counts_identical_responses(responses, judged, tmp_path):
    sampled = rows(responses)
    sampled[0]["responses"][1] = sampled[0]["responses"][0]
    sampled[2]["responses"] = [sampled[2]["responses"][1]] * 3
    path = write_rows(tmp_path / "in.jsonl", sampled)
    output = judged(input=path)
    assert [row["id"] for row in rows(output)] == [row["id"] for k, row in enumerate(sampled) if k not in (0, 2)]
    counted = counts(output)
    assert counted["dropped for identical responses"] == 2 and counted["pairs"] == len(sampled) - 2


@pytest.mark.parametrize("samples", [3, 4])
def test_03_pairs_the_best_with_the_worst(generate, judged, samples):
    sampled = generate(samples=samples)
    middle = 0
    for row, labelled in zip(rows(sampled), rows(judged(input=sampled)), strict=True):
        ratios = [a - b for a, b in zip(labelled["logps"]["policy"], labelled["logps"]["ref"], strict=True)]
        assert len(ratios) == samples
        best, worst = ratios.index(max(ratios)), ratios.index(min(ratios))
        assert (labelled["chosen"], labelled["rejected"]) == (row["responses"][best], row["responses"][worst])
        assert (labelled["p"] > 0.5) == (best < worst)
        margin = 0.1 * (ratios[best] - ratios[worst])
        assert abs(2 * labelled["p"] - 1) == pytest.approx(math.tanh(margin / 2), abs=1e-6)
        middle += {best, worst} != {0, 1}
    assert middle > 0


@pytest.mark.parametrize("rewards, p", [((5000, 0), 1), ((0, 5000), 0)])
def test_equation_7_overflows_nowhere(rewards, p):
    assert load("03_judge").preference(*rewards) == p
