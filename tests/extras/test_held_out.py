"""05_eval.py sample --init-model: agreement with held-out labels, against plain log-probs and by hand."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from extras import held_out, plain_spa
from support import chat, runs
from stages import rows, run, write_rows


def logp(model, tokenizer, prompt, text):
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    return plain_spa.log_prob(model, chat.prompt_ids(tokenizer, prompt, ""), ids).item()


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    """Rows with both answers; the last without, and one whose chosen answer is the shorter one."""
    seed = runs.read_jsonl(world / "seed.jsonl", runs.LABELLED)[:9]
    seed[0]["chosen"] = seed[0]["chosen"].split()[0]
    seed.append({"id": "x", "prompt": seed[0]["prompt"]})
    return write_rows(tmp_path_factory.mktemp("held_out") / "eval.jsonl", seed)


def evaluated(folder, **options):
    output = run("05_eval", "sample", max_new_tokens=4, **options, output=folder / "out")
    return json.loads((output / "metrics.json").read_text())


def test_agreement_is_that_of_equation_7(labelled, pi_0, pi_init, tokenizer, tmp_path):
    policy, init = (AutoModelForCausalLM.from_pretrained(name) for name in (pi_0, pi_init))
    margins, likelihoods, longer = [], [], []
    for row in rows(labelled)[:9]:
        ours, theirs = ({y: logp(model, tokenizer, row["prompt"], row[y]) for y in ("chosen", "rejected")}
                        for model in (policy, init))
        margins.append(0.3 * (ours["chosen"] - theirs["chosen"] - ours["rejected"] + theirs["rejected"]))
        likelihoods.append(theirs["chosen"] - theirs["rejected"])
        longer.append(len(row["chosen"]) - len(row["rejected"]))
    metrics = evaluated(tmp_path, model=pi_0, init_model=pi_init, input=labelled, beta=0.3, micro_batch_size=4)
    right = [margin > 0 for margin in margins]
    assert 0 < sum(right) < 9 and metrics["agreement_n"] == 9
    assert metrics["agreement"] == pytest.approx(100 * sum(right) / 9)
    assert metrics["agreement_error"] == pytest.approx(100 * np.std(right, ddof=1) / 3)
    assert metrics["init_agreement"] == pytest.approx(100 * sum(x > 0 for x in likelihoods) / 9)
    assert metrics["longer_agreement"] == pytest.approx(100 * sum((np.sign(longer) + 1) / 2) / 9)
    assert sum(n for _, _, n in metrics["calibration"]) == 9
    confidence = [1 / (1 + math.exp(-abs(margin))) for margin in margins]
    mean = sum(c * n for c, _, n in metrics["calibration"] if n) / 9
    assert mean == pytest.approx(np.mean(confidence), abs=1e-4)


def test_pi_init_itself_has_no_implicit_reward(labelled, pi_init, tmp_path):
    metrics = evaluated(tmp_path, model=pi_init, init_model=pi_init, input=labelled)
    assert "agreement" not in metrics and "calibration" not in metrics and metrics["agreement_n"] == 9
    assert metrics["kl_per_token"] == 0


def test_prompts_alone_are_answered_as_before(world, pi_0, pi_init, tmp_path):
    metrics = evaluated(tmp_path, model=pi_0, init_model=pi_init, input=world / "prompts_1.jsonl")
    assert "agreement_n" not in metrics and metrics["n"] == 14


def test_agreement_and_calibration_by_hand():
    # right, tie, wrong, right: 2.5 of 4; the standard deviation of 1, 1/2, 0, 1 is sqrt(11 / 48)
    rate, error = held_out.agreement(np.array([2.0, 0.0, -1.0, 0.1]))
    assert rate == 62.5 and error == pytest.approx(100 * (11 / 48) ** 0.5 / 2)
    assert held_out.agreement(np.array([-3.0])) == (0.0, None)
    # confidences 0.52 (right), 0.97 (wrong), 0.99 (right), 1 (right)
    bins = held_out.calibration(np.array([0.52, 0.03, 0.99, 1.0]))
    assert bins[0] == [pytest.approx(0.52), 100, 1] and bins[1:9] == [[None, None, 0]] * 8
    assert bins[9] == [pytest.approx((0.97 + 0.99 + 1) / 3), pytest.approx(200 / 3), 3]


def test_the_distance_from_pi_init_is_the_mean_kl_of_a_token(world, pi_0, pi_init, tokenizer, tmp_path, monkeypatch):
    """By torch.distributions, one sequence at a time; the responses are those of 02 with the same seed."""
    responses = run("02_generate", model=pi_0, input=world / "eval.jsonl", max_new_tokens=4, temperature=3,
                    on_length_limit="open", output=tmp_path / "responses.jsonl")
    policy, init = (AutoModelForCausalLM.from_pretrained(name) for name in (pi_0, pi_init))
    divergences, improbable = [], 0
    for row in rows(responses):
        x, y = row["prompt_ids"], row["responses"][0]["ids"]
        p, q = (torch.distributions.Categorical(logits=model(torch.tensor([x + y])).logits[0, len(x) - 1:-1].double())
                for model in (policy, init))
        divergences += torch.distributions.kl_divergence(p, q).tolist()
        improbable += (q.log_prob(torch.tensor(y)).exp() < 1e-4).sum().item()
    assert 0 < improbable < len(divergences)
    for chunk in (10 ** 6, 3):
        monkeypatch.setattr("common.chunk_rows", lambda weight: chunk)
        metrics = evaluated(tmp_path / str(chunk), model=pi_0, init_model=pi_init, input=world / "eval.jsonl",
                            temperature=3)
        assert metrics["kl_per_token"] == pytest.approx(np.mean(divergences), rel=1e-4) and metrics["kl_per_token"] > 0
        assert metrics["improbable"] == pytest.approx(100 * improbable / len(divergences))
