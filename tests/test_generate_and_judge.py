"""02 samples and 03 labels: the files they write, against what they read."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import common
from conftest import save_tiny
from stages import attempt, digest, rows, run, write_rows


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


def record(output):
    return json.loads(output.with_name(output.name + ".args.json").read_text())


# ---------------------------------------------------------------------------------------------
# 02


def test_02_writes_two_different_responses_per_prompt_in_the_order_of_the_prompts(responses, world, tokenizer):
    prompts = rows(world / "prompts_1.jsonl")
    for prompt, row in zip(prompts, rows(responses), strict=True):
        assert list(row) == ["id", "prompt", "prompt_ids", "responses"]
        assert (row["id"], row["prompt"]) == (prompt["id"], prompt["prompt"])
        assert row["prompt_ids"] == common.prompt_ids(tokenizer, row["prompt"], "")
        one, two = row["responses"]
        assert one["ids"] != two["ids"]
        for y in (one, two):
            assert y["text"] == tokenizer.decode(y["ids"], skip_special_tokens=True).strip()
            assert y["finish"] in ("eos", "length")


def test_02_gives_the_same_whatever_the_batches_and_another_with_another_seed(responses, generate):
    assert digest(generate(micro_batch_size=3)) == digest(responses)
    one, two = rows(responses), rows(generate(seed=1))
    assert sum(a["responses"] != b["responses"] for a, b in zip(one, two)) > len(one) / 2


def test_02_samples_a_prompt_alike_in_another_file(responses, generate, world, tmp_path):
    some = rows(world / "prompts_1.jsonl")[::-3]
    again = {row["id"]: row for row in rows(generate(input=write_rows(tmp_path / "some.jsonl", some)))}
    assert len(again) == len(some)
    assert all(row == again[row["id"]] for row in rows(responses) if row["id"] in again)


def test_02_counts_what_it_does_with_responses_that_hit_the_limit(responses, generate, tokenizer):
    kept, opened, dropped = rows(responses), rows(generate(cut="open")), generate(cut="drop")
    pairs = [(row, y) for row in opened for y in row["responses"]]
    cut = [y for _, y in pairs if y["finish"] == "length"]
    assert 0 < len(cut) < len(pairs) and all(len(y["ids"]) == 10 for y in cut)
    # eos: an end token is added to those only; open: they stay as they are
    for (_, ours), (_, theirs) in zip(((row, y) for row in kept for y in row["responses"]), pairs, strict=True):
        added = [tokenizer.eos_token_id] if theirs["finish"] == "length" else []
        assert ours == {**theirs, "ids": theirs["ids"] + added}
    # drop: only prompts with both responses finished are left
    whole = [row for row in opened if all(y["finish"] == "eos" for y in row["responses"])]
    assert rows(dropped) == whole and 0 < len(whole) < len(opened)
    counts = record(dropped)["counts"]
    assert (counts["prompts read"], counts["cut at the limit"]) == (len(opened), len(cut))
    assert (counts["prompts kept"], counts["dropped for a cut response"]) == (len(whole), len(opened) - len(whole))


def test_02_drops_and_counts_long_prompts(generate, responses):
    lengths = sorted(len(row["prompt_ids"]) for row in rows(responses))
    output = generate(max_prompt_length=lengths[5])
    left = [row for row in rows(responses) if len(row["prompt_ids"]) <= lengths[5]]
    assert rows(output) == left and 0 < len(left) < len(lengths)
    assert record(output)["counts"]["too long"] == len(lengths) - len(left)


@pytest.mark.parametrize("ranks", [1, 2])
def test_02_goes_on_after_a_kill_with_half_a_line_written(responses, sampler, world, tmp_path, monkeypatch, ranks):
    options = dict(model=sampler, input=world / "prompts_1.jsonl", max_new_tokens=10, micro_batch_size=4,
                   output=tmp_path / "responses.jsonl")  # 14 prompts: 4 batches
    calls = []

    def counting(*args, sample=common.sample):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return sample(*args)
    monkeypatch.setattr(common, "sample", counting)
    with pytest.raises(MemoryError):
        run("02_generate", **options)
    [partial] = (tmp_path / "responses.jsonl.partial").glob("*.jsonl")
    one, two = filter(None, partial.read_text().splitlines())
    half = '[2, [[[[7, 8'
    if ranks == 1:
        partial.write_text(f"{one}\n{two}\n{half}")
    else:  # as two processes leave them
        partial.write_text(f"{one}\n")
        partial.with_name(partial.name.replace(".0.", ".1.")).write_text(f"{two}\n{half}")
    assert not (tmp_path / "responses.jsonl").exists()
    assert digest(run("02_generate", **options)) == digest(responses)
    assert len(calls) == 3 + 2  # the two batches that were finished are not sampled again


def test_02_takes_more_than_two_samples(generate, responses):
    for three, two in zip(rows(generate(samples=3)), rows(responses), strict=True):
        assert three["responses"][:2] == two["responses"] and len(three["responses"]) == 3


# ---------------------------------------------------------------------------------------------
# 03


@torch.no_grad()
def logp(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return -F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()


def test_03_labels_by_equations_7_and_8(responses, sampler, pi_init, tmp_path):
    output = run("03_judge", model=sampler, init_model=pi_init, input=responses, output=tmp_path / "out", beta=0.3)
    policy, init = map(AutoModelForCausalLM.from_pretrained, (sampler, pi_init))
    sampled, first = rows(responses), 0
    for row, judged in zip(sampled, rows(output), strict=True):
        y = row["responses"]
        logps = {name: [logp(model, row["prompt_ids"], y[k]["ids"]) for k in (0, 1)]
                 for name, model in (("policy", policy), ("ref", init))}
        assert judged["logps"]["policy"] == pytest.approx(logps["policy"], abs=1e-3)
        assert judged["logps"]["ref"] == pytest.approx(logps["ref"], abs=1e-3)
        ratios = [a - b for a, b in zip(logps["policy"], logps["ref"])]
        p = 1 / (1 + math.exp(-0.3 * (ratios[0] - ratios[1])))
        assert judged["p"] == pytest.approx(p, abs=1e-3)
        w, l = (0, 1) if p > 0.5 else (1, 0)
        assert (judged["chosen"], judged["rejected"]) == (y[w], y[l])
        assert {key: judged[key] for key in ("id", "prompt", "prompt_ids")} == {key: row[key] for key in
                                                                                ("id", "prompt", "prompt_ids")}
        first += w == 0
    assert 0 < first < len(sampled)
    assert record(output)["counts"]["first chosen"] == first


def test_03_scores_a_model_against_itself_with_p_one_half(responses, sampler, tmp_path):
    # every pair is a tie then, which is said, and nothing is written
    ran = attempt("03_judge", model=sampler, init_model=sampler, input=responses, output=tmp_path / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert f"'ties': {len(rows(responses))}" in ran.err and "--init-model" in ran.err
    assert not (tmp_path / "out").exists()


def test_03_drops_and_counts_identical_responses_and_ties(responses, sampler, pi_init, tmp_path):
    sampled = rows(responses)
    sampled[0]["responses"][1] = sampled[0]["responses"][0]
    sampled[2]["responses"] = [sampled[2]["responses"][1]] * 3
    path = write_rows(tmp_path / "in.jsonl", sampled)
    output = run("03_judge", model=sampler, init_model=pi_init, input=path, output=tmp_path / "out")
    assert [row["id"] for row in rows(output)] == [row["id"] for k, row in enumerate(sampled) if k not in (0, 2)]
    counts = record(output)["counts"]
    assert counts["all responses the same"] == 2 and counts["pairs"] == len(sampled) - 2
    # beta 0 makes all p one half
    ran = attempt("03_judge", model=sampler, init_model=pi_init, input=path, output=tmp_path / "other", beta=0)
    assert ran.status == 2 and f"'ties': {len(sampled) - 2}" in ran.err


@pytest.mark.parametrize("samples", [3, 4])
def test_03_pairs_the_best_with_the_worst(generate, sampler, pi_init, tmp_path, samples):
    sampled = generate(samples=samples)
    output = run("03_judge", model=sampler, init_model=pi_init, input=sampled, output=tmp_path / "out")
    middle = 0
    for row, judged in zip(rows(sampled), rows(output), strict=True):
        ratios = [a - b for a, b in zip(judged["logps"]["policy"], judged["logps"]["ref"], strict=True)]
        assert len(ratios) == samples
        best, worst = ratios.index(max(ratios)), ratios.index(min(ratios))
        assert (judged["chosen"], judged["rejected"]) == (row["responses"][best], row["responses"][worst])
        assert (judged["p"] > 0.5) == (best < worst)
        margin = 0.1 * (ratios[best] - ratios[worst])
        assert abs(2 * judged["p"] - 1) == pytest.approx(math.tanh(margin / 2), abs=1e-6)
        middle += {best, worst} != {0, 1}
    assert middle > 0


def test_03_gives_the_same_labels_whatever_the_batches(responses, sampler, pi_init, tmp_path):
    one, two = (rows(run("03_judge", model=sampler, init_model=pi_init, input=responses, output=tmp_path / f"out_{size}",
                         micro_batch_size=size)) for size in (1, 16))
    assert [row["chosen"] for row in one] == [row["chosen"] for row in two]
    assert [row["p"] for row in one] == pytest.approx([row["p"] for row in two], abs=1e-5)


def test_what_03_writes_04_reads(responses, sampler, pi_init, tmp_path):
    judged = run("03_judge", model=sampler, init_model=pi_init, input=responses, output=tmp_path / "judged")
    trained = run("04_refined_dpo", model=sampler, input=judged, output=tmp_path / "pi_1")
    assert json.loads((trained / "args.json").read_text())["counts"]["pairs read"] == len(rows(judged))
