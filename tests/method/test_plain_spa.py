"""extras/plain_spa.py, the oracle of the other tests: the numbers of its docstring, closed forms, and the stages.

Two words, a and b, have the ids 0 and 1; here a model gives them the same probabilities everywhere.
"""

import copy
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import stages
from children import good
from extras import plain_spa
from stages import rows, run, weights, write_rows

X, A_A, B = [0, 1, 1], [0, 0], [1]


class Words(torch.nn.Module):
    """A model with the given probabilities everywhere."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log() + 3.0)  # logits are log-probs up to a shift

    def forward(self, ids):
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def after_each(table):
    """A model whose logits after token i are the i-th row of a table (V, V)."""
    return lambda ids: SimpleNamespace(logits=torch.tensor(table)[ids])


def near(value):
    """As the docstring rounds it."""
    return pytest.approx(value, abs=5.1e-4)


def margin(pi, pi_ref):
    return (plain_spa.reward(pi, pi_ref, X, A_A, 1.0) - plain_spa.reward(pi, pi_ref, X, B, 1.0)).item()


PI_INIT, PI_PREVIOUS, PI_THETA = Words(1 / 2, 1 / 2), Words(3 / 4, 1 / 4), Words(0.8, 0.2)


def test_judging():
    assert plain_spa.reward(PI_PREVIOUS, PI_INIT, X, A_A, 1.0).item() == near(0.811)
    assert plain_spa.reward(PI_PREVIOUS, PI_INIT, X, B, 1.0).item() == near(-0.693)
    assert plain_spa.preference(PI_PREVIOUS, PI_INIT, X, A_A, B, 1.0) == near(0.818)
    assert plain_spa.preference(PI_PREVIOUS, PI_INIT, X, B, A_A, 1.0) == near(1 - 0.818)


def test_training():
    assert margin(PI_THETA, PI_PREVIOUS) == near(0.352)
    assert plain_spa.preference(PI_THETA, PI_PREVIOUS, X, A_A, B, 1.0) == near(0.587)


def test_refining():
    pi_tilde = plain_spa.extrapolate(PI_THETA, PI_PREVIOUS, 0.5)
    a, b = pi_tilde(torch.tensor([[0]])).logits[0, 0].tolist()
    assert a - b == near(1.530)
    assert [math.exp(plain_spa.log_prob(pi_tilde, X, word).item()) for word in ([0], [1])] == near([0.822, 0.178])
    assert margin(pi_tilde, PI_PREVIOUS) == near(0.523)
    assert plain_spa.preference(pi_tilde, PI_PREVIOUS, X, A_A, B, 1.0) == near(0.628)

    def mixed(y):  # the log-ratio of 1.5 log pi_theta(y | x) - 0.5 log pi_ref(y | x)
        logps = [plain_spa.log_prob(pi, X, y).item() for pi in (PI_THETA, PI_PREVIOUS)]
        return 1.5 * logps[0] - 0.5 * logps[1] - logps[1]
    assert mixed(A_A) - mixed(B) == near(0.528)
    assert mixed(A_A) - mixed(B) == pytest.approx(1.5 * margin(PI_THETA, PI_PREVIOUS), abs=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_loss_and_derivative_without_and_with_refining():
    # Beside the pair of the docstring one that is more certain, "a a a a" over "b". Its margin is 0.481 and that of
    # theta~ 0.707, p_theta~ = 0.670. tau lies between the two p_theta~, at 0.65 for this K: the k-th smallest of n = 2
    # is the percentile 100 k / 3.
    pairs, certain = [(X, A_A, B), (X, [0] * 4, B)], 4 * math.log(0.8 / 0.75) - math.log(0.2 / 0.25)
    a = sigmoid(1.5 * math.log(4) - 0.5 * math.log(3))  # 0.822
    p_tilde = [sigmoid(count * math.log(a / 0.75) - math.log((1 - a) / 0.25)) for count in (2, 4)]
    k_percent = 100 / 3 * (1 + (0.65 - p_tilde[0]) / (p_tilde[1] - p_tilde[0]))
    logged = []  # the rate is 0, so pi_theta stays at (0.8, 0.2)
    plain_spa.train(copy.deepcopy(PI_THETA), PI_PREVIOUS, pairs, refine=True, beta=1.0, lr=0.0, batch_size=2, epochs=3,
                    window=2, k_percent=k_percent, log=logged.append)
    first, second, third = logged
    # the gradient of log pi(a) by the logits is (0.2, -0.2), that of log pi(b) (-0.8, 0.8), so that of the margins
    # (1.2, -1.2) and (1.6, -1.6)
    for line, z, loss, derivative in ((first, 0, 0.532, -0.413), (second, 1, 0.568, -0.313)):
        assert 2 * line["loss"] + math.log(sigmoid(certain)) == near(loss)
        gradient = (1.2 * derivative + 1.6 * (sigmoid(certain) - 1)) / 2
        assert line["grad_norm"] == pytest.approx(-math.sqrt(2) * gradient, abs=5e-4)
        assert (line["flagged"], line["tau"]) == (z / 2, pytest.approx(0.65 * z, abs=1e-6))
        assert line["confidence"] == pytest.approx(sum(p_tilde) / 2, abs=1e-6)
        assert line["rewards/margins"] == pytest.approx((margin(PI_THETA, PI_PREVIOUS) + certain) / 2, abs=1e-6)
    assert third == second | {"step": 3, "learning_rate": 0.0}


def test_every_number_of_the_docstring_is_checked_here():
    here = open(__file__, encoding="utf-8").read()
    numbers = set(re.findall(r"\b\d\.\d{3}\b", plain_spa.__doc__))
    assert len(numbers) == 15 and all(number in here for number in numbers)


def test_the_log_prob_of_a_response_is_the_sum_over_its_tokens():
    # after 0: 1/4, 3/4; after 1: 1/2, 1/2. y = (1, 0) after x = (.., 0): ln 3/4 + ln 1/2; what precedes counts nothing
    pi = after_each([[0.0, math.log(3)], [7.0, 7.0]])
    for x in ([0], [1, 1, 0]):
        assert plain_spa.log_prob(pi, x, [1, 0]).item() == pytest.approx(math.log(3 / 8))
    assert plain_spa.log_prob(pi, [1], [1]).item() == pytest.approx(math.log(1 / 2))


def test_a_sample_is_drawn_token_by_token_and_ends_with_eos_or_at_the_limit():
    successor = after_each([[100.0 * (j == i + 1) for j in range(20)] for i in range(20)])
    generator = torch.Generator().manual_seed(0)
    assert plain_spa.sample(successor, [9, 3], [7, 12], generator) == [4, 5, 6, 7]
    assert plain_spa.sample(successor, [9, 3], [], generator, max_new_tokens=2) == [4, 5]
    # (3/4, 1/4) at T = 0.7: the ratio of 3 becomes 3 ** (1 / 0.7). The standard error of 4,000 draws is 0.006.
    drawn = [plain_spa.sample(PI_PREVIOUS, X, [], generator, max_new_tokens=1)[0] for _ in range(4000)]
    odds = 3 ** (1 / 0.7)
    assert drawn.count(0) / 4000 == pytest.approx(odds / (1 + odds), abs=0.02)


def test_algorithm_1_is_the_stages_one_after_the_other(pi_init, preferences, tokenizer, tmp_path, monkeypatch):
    # refined from the third step on: in the first two, the rate of the first being 0, every p is 0.5 to rounding
    options = dict(beta=0.3, lr=1e-3, batch_size=4, alpha=0.3, window=4, k_percent=25, refine_after=0.5)
    sample, extrapolate = plain_spa.sample, plain_spa.extrapolate
    drawn, lams, given = [], [], rows(preferences)
    monkeypatch.setattr(plain_spa, "sample", lambda *args: drawn.append(sample(*args, max_new_tokens=6)) or drawn[-1])
    monkeypatch.setattr(plain_spa, "extrapolate", lambda *args: lams.append(args[2]) or extrapolate(*args))
    seed, *prompts = given[:5], given[5:17], given[17:29], given[29:]
    d_0 = [(row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]) for row in seed]
    pi_t = plain_spa.spa(AutoModelForCausalLM.from_pretrained(pi_init), d_0,
                         [[row["prompt_ids"] for row in part] for part in prompts], [tokenizer.eos_token_id], **options)

    policy = run("04_refined_dpo", model=pi_init, input=write_rows(tmp_path / "seed.jsonl", seed), refine="none",
                 epochs=3, output=tmp_path / "pi_0", **options)  # as 01 does it, but of token ids
    sampled = iter(drawn)
    for t, lam in ((1, 0.5), (2, 0.25), (3, 0.125)):
        answered = [row | {"responses": [{"text": "", "ids": next(sampled), "finish": "eos"} for _ in range(2)]}
                    for row in prompts[t - 1]]
        pairs = run("03_judge", model=policy, init_model=pi_init, output=tmp_path / f"preferences_{t}.jsonl",
                    input=write_rows(tmp_path / f"responses_{t}.jsonl", answered))
        assert len(rows(pairs)) == 12  # none was dropped
        policy = run("04_refined_dpo", model=policy, input=pairs, lam=lam, output=tmp_path / f"pi_{t}", **options)
    for name, weight in weights(policy).items():
        torch.testing.assert_close(pi_t.state_dict()[name], weight, rtol=0, atol=2e-5)
    assert lams[1:] == [0.5, 0.25, 0.125] and sum(line["flagged"] for line in stages.metrics(policy)) > 0


@pytest.fixture(scope="module")
def finished(good, pi_init, pi_0, tmp_path_factory):
    """A run's folder, as far as the page reads it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pi_init").symlink_to(pi_init)
    (folder / "pi_0").symlink_to(pi_0)
    run("03_judge", **good["03_judge"], output=folder / "preferences_1.jsonl")
    return folder


def test_the_page_prints_its_numbers_beside_the_stages(finished):
    ran = stages.attempt("extras/plain_spa", finished)
    assert ran.status == 0, ran.err
    number = r"(-?\d+\.\d+)"
    pairs = [(float(one), float(two)) for one, two in re.findall(rf"{number} \| {number}", ran.out)]
    labels = re.findall(r"(True|False) \| (True|False)", ran.out)
    assert len(pairs) == 14 * 4 + 3 * 4 and len(labels) == 14  # 14 pairs of D_1, 3 steps of 6, 6 and 2
    assert all(one == pytest.approx(two, abs=2e-3) for one, two in pairs)
    assert all(one == two for one, two in labels) and len(set(labels)) == 2
    assert pairs[-1][0] > 0  # a label was refined
    differ, moved = map(float, re.findall(r"\d\.\de-\d+", ran.out))
    assert differ < 2e-5 < moved


@pytest.mark.parametrize("change", [
    lambda run: (run / "preferences_1.jsonl").unlink(), lambda run: (run / "pi_init").unlink(),
    lambda run: write_rows(run / "preferences_1.jsonl", [row | {"judge": "pairrm"}
                                                         for row in rows(run / "preferences_1.jsonl")])])
def test_what_is_no_finished_run_is_refused_in_one_line(finished, tmp_path, change):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    change(folder)
    ran = stages.attempt("extras/plain_spa", folder)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1) and str(folder) in ran.err, ran
