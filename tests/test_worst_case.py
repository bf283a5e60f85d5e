"""--refine worst-case of 04: the worst distribution against a linear program, its loss, and the training."""

import math

import numpy as np
import pytest
import torch

import stages
from stages import attempt, farthest, metrics, run

refined_dpo = stages.load("04_refined_dpo")
WORST = dict(lr=1e-3, beta=0.3, batch_size=8, epochs=3, refine="worst-case", epsilon=0.05)

# (pieces, epsilon, optimum of `linear_program` for the eight confidences of the test that uses them, by SciPy 1.17.1)
OPTIMA = [
    (1, 0, -5.129268), (1, 0.02, -4.729268), (1, 0.1, -3.129268), (1, 0.25, -0.129268), (1, 0.6, 2.995732),
    (2, 0, 0.799467), (2, 0.02, 1.02404), (2, 0.1, 1.723442), (2, 0.25, 2.437642), (2, 0.6, 2.995732),
    (3, 0, 0.992252), (3, 0.02, 1.153842), (3, 0.1, 1.723442), (3, 0.25, 2.437642), (3, 0.6, 2.995732),
    (5, 0, 1.035727), (5, 0.02, 1.197317), (5, 0.1, 1.752077), (5, 0.25, 2.437642), (5, 0.6, 2.995732),
    (10, 0, 1.048938), (10, 0.02, 1.210029), (10, 0.1, 1.759038), (10, 0.25, 2.44026), (10, 0.6, 2.995732),
    (20, 0, 1.051025), (20, 0.02, 1.212023), (20, 0.1, 1.760957), (20, 0.25, 2.440802), (20, 0.6, 2.995732),
]


def instance(seed, count):
    """Confidences in the support, one at its lower end, one near the upper, two the same."""
    xi = np.random.default_rng(seed).uniform(0.05, 1, count)
    xi[:3] = [0.05, 0.999, xi[3]]
    return xi


def tangents(pieces, xi_min):
    """Slopes a_k and intercepts b_k of the lines that touch -log xi at K points between xi_min and 1."""
    at = xi_min ** (1 - np.arange(pieces) / max(1, pieces - 1))
    return -1 / at, 1 - np.log(at)


def value(xi, moved, shift, pieces, xi_min):
    """The mean loss of the atoms xi_i and xi_i - shift_i, with the maximum of the affine pieces as the loss."""
    a, b = tangents(pieces, xi_min)
    stays, goes = ((np.outer(x, a) + b).max(1) for x in (xi, xi - shift))
    return np.mean((1 - moved) * stays + moved * goes)


def linear_program(xi, epsilon, pieces, xi_min):
    """The proposal's Eq. 2-4 as it stands, over alpha_ik, q_ik and the |q_ik|."""
    optimize = pytest.importorskip("scipy.optimize")
    a, b = tangents(pieces, xi_min)
    n, size = len(xi), len(xi) * pieces
    eye, zero = np.eye(size), np.zeros((size, size))
    each, x = np.repeat(np.eye(n), pieces, 1), np.repeat(xi, pieces)  # sum over k; xi_i for every (i, k)
    gain = np.concatenate([(np.outer(xi, a) + b).ravel(), -np.tile(a, n), np.zeros(size)]) / n
    at_most = np.vstack([np.hstack([zero, eye, -eye]), np.hstack([zero, -eye, -eye]),  # |q_ik|
                         np.concatenate([np.zeros(2 * size), np.ones(size)])[None] / n,  # the budget
                         np.hstack([np.diag(xi_min - x), eye, zero]),  # alpha xi - q >= alpha xi_min
                         np.hstack([np.diag(x - 1), -eye, zero])])  # alpha xi - q <= alpha
    limits = np.concatenate([np.zeros(2 * size), [epsilon], np.zeros(2 * size)])
    solved = optimize.linprog(-gain, at_most, limits, np.hstack([each, np.zeros((n, 2 * size))]), np.ones(n),
                              [(0, None)] * size + [(None, None)] * size + [(0, None)] * size)
    assert solved.status == 0, solved.message
    return -solved.fun


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.1, 0.3, 0.9])
def test_the_optimum_is_that_of_a_linear_program(pieces, epsilon):
    for seed, count in ((0, 7), (1, 12)):
        xi = instance(seed, count)
        moved, shift = refined_dpo.worst_distribution(xi, epsilon, pieces, 0.05)
        optimum = linear_program(xi, epsilon, pieces, 0.05)
        assert value(xi, moved, shift, pieces, 0.05) == pytest.approx(optimum, abs=1e-7)


@pytest.mark.parametrize("pieces, epsilon, optimum", OPTIMA)
def test_the_optimum_is_the_number_that_scipy_s_linprog_gave(pieces, epsilon, optimum):
    xi = np.array([0.05, 0.9, 0.25, 0.6, 0.25, 0.5, 0.75, 0.35])
    moved, shift = refined_dpo.worst_distribution(xi, epsilon, pieces, 0.05)
    assert value(xi, moved, shift, pieces, 0.05) == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_and_the_weights(seed):
    rng = np.random.default_rng(seed)
    xi, epsilon, pieces = rng.random(rng.integers(1, 200)), rng.random() ** 2, int(rng.integers(1, 21))
    moved, shift = refined_dpo.worst_distribution(xi, epsilon, pieces, 0.05)
    inside = xi > 0.05
    assert ((0 <= moved) & (moved <= 1)).all()  # and the other atom has 1 - moved
    assert (moved * shift).mean() <= epsilon * (1 + 1e-12)
    np.testing.assert_allclose(xi[inside] - shift[inside], 0.05)
    assert (moved[~inside] == 0).all()
    assert ((0 < moved) & (moved < 1)).sum() <= 1  # at most one is split
    # either the budget is spent or all that can move has moved
    assert (moved * shift).mean() == pytest.approx(min(epsilon, shift.mean()))


def test_by_hand():
    # N = 4, xi_min = 0.1, budget 4 * 0.2 = 0.8: the least confident first, 0.2 for the third and 0.4 for the first;
    # 0.2 is left for the second, which needs 0.5, so 2/5 of it go
    moved, shift = refined_dpo.worst_distribution(np.array([0.5, 0.6, 0.3, 0.9]), 0.2, 10, 0.1)
    assert shift.tolist() == pytest.approx([0.4, 0.5, 0.2, 0.8]) and moved.tolist() == pytest.approx([1, 0.4, 1, 0])


def test_epsilon_0_is_plain_dpo():
    margin = torch.linspace(-30, 30, 61)
    moved, shift = map(torch.tensor, refined_dpo.worst_distribution(margin.sigmoid().numpy(), 0.0, 10, 0.05))
    loss = refined_dpo.worst_case_loss(margin, moved.float(), shift.float(), 0.05)
    assert torch.equal(loss, refined_dpo.refined_loss(margin, torch.zeros(61), 0.1))


def test_the_loss_by_hand():
    # margin 0, xi = 1/2. Stays: ln 2. Goes by 0.3 to 0.2: ln 5. A quarter goes: 3/4 ln 2 + 1/4 ln 5
    # Goes by 0.48 to 0.02, below 0.05: the tangent at 0.05, ln 20 + (0.05 - 0.02) / 0.05 = ln 20 + 0.6
    loss = refined_dpo.worst_case_loss(torch.zeros(3), torch.tensor([1, 0.25, 1]), torch.tensor([0.3, 0.3, 0.48]), 0.05)
    assert loss.tolist() == pytest.approx([math.log(5), 0.75 * math.log(2) + 0.25 * math.log(5), math.log(20) + 0.6])


def test_the_gradient_of_the_loss():
    # d xi / d margin = xi (1 - xi) = 1/4 at margin 0. Stays: -1/2. Goes to 0.2: -(1/4) / 0.2 = -1.25.
    # Goes below 0.05: -(1/4) / 0.05 = -5, the tangent's, not 0
    margin = torch.zeros(3, requires_grad=True)
    moved, shift = torch.tensor([0.0, 1, 1]), torch.tensor([0.3, 0.3, 0.48])
    refined_dpo.worst_case_loss(margin, moved, shift, 0.05).sum().backward()
    assert margin.grad.tolist() == pytest.approx([-0.5, -1.25, -5.0])


def test_the_loss_is_finite_wherever_theta_goes():
    xi = np.random.default_rng(0).random(101)
    moved, shift = (torch.tensor(x).float() for x in refined_dpo.worst_distribution(xi, 0.2, 10, 0.05))
    for low in (-2000, -50, -5):
        margin = torch.linspace(low, -low, 101).requires_grad_()
        loss = refined_dpo.worst_case_loss(margin, moved, shift, 0.05)
        loss.sum().backward()
        assert loss.isfinite().all() and margin.grad.isfinite().all() and (margin.grad <= 0).all()


# ---------------------------------------------------------------------------------------------
# The stage


def test_training_with_epsilon_0_is_plain_dpo(pi_0, preferences, tmp_path):
    options = dict(WORST, model=pi_0, input=preferences)
    worst = run("04_refined_dpo", **options | {"epsilon": 0}, output=tmp_path / "worst")
    del options["epsilon"]
    plain = run("04_refined_dpo", **options | {"refine": "none"}, output=tmp_path / "plain")
    assert farthest(worst, plain) == 0


def test_the_atoms_follow_the_model(pi_0, preferences, tmp_path):
    """18 steps, refinement from step ceil(3.6) on: solved before the fifth step, then at the epochs, or as asked."""
    lines = {}
    for name, more in {"epochs": {}, "asked": {"resolve_steps": 5}, "once": {"resolve_steps": 100}}.items():
        lines[name] = metrics(run("04_refined_dpo", **WORST, **more, model=pi_0, input=preferences,
                                  output=tmp_path / name))
        assert all(line["flagged"] == 0 for line in lines[name][:4])
        assert any(line["flagged"] > 0 for line in lines[name][4:6]) and all(line["tau"] == 0 for line in lines[name])
    parts = [line["loss"] for line in lines["epochs"]], [line["loss"] for line in lines["once"]]
    assert parts[0][:6] == parts[1][:6] and parts[0][6:] != parts[1][6:]


def test_every_pair_s_atoms_are_those_of_its_own_confidence(pi_0, pi_init, preferences, tmp_path, monkeypatch):
    seen = []

    def worst_distribution(xi, *rest, real=refined_dpo.worst_distribution):
        seen.append(xi)
        return real(xi, *rest)
    monkeypatch.setattr(refined_dpo, "worst_distribution", worst_distribution)
    for size in (1, 4):
        run("04_refined_dpo", **WORST | {"lr": 0}, refine_after=0, resolve_steps=100, micro_batch_size=size, model=pi_0,
            ref_model=pi_init, input=preferences, output=tmp_path / f"out_{size}")
    assert [len(xi) for xi in seen] == [41, 41]
    np.testing.assert_allclose(*seen, atol=1e-5)
    plain = metrics(run("04_refined_dpo", model=pi_0, ref_model=pi_init, input=preferences, refine="self", lr=0, beta=0.3,
                        batch_size=41, output=tmp_path / "plain"))
    assert seen[0].mean() == pytest.approx(plain[0]["confidence"], abs=1e-5) and seen[0].std() > 0.1


def test_it_goes_on_where_it_stopped(pi_0, preferences, tmp_path, monkeypatch):
    options = dict(WORST, model=pi_0, input=preferences, save_every=2)
    whole = run("04_refined_dpo", **options, output=tmp_path / "whole")
    calls = []

    def clip(*args, real=torch.nn.utils.clip_grad_norm_):
        calls.append(1)
        if len(calls) == 10:  # after the atoms were placed, and between two solutions
            raise MemoryError
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        run("04_refined_dpo", **options, output=tmp_path / "stopped")
    again = attempt("04_refined_dpo", **options, output=tmp_path / "stopped")
    assert again.status == 0 and "going on after step 8" in again.out
    assert farthest(tmp_path / "stopped", whole) == 0 and metrics(tmp_path / "stopped") == metrics(whole)


def test_two_processes_train_the_same(pi_0, pi_init, preferences, tmp_path):
    options = dict(WORST, model=pi_0, ref_model=pi_init, input=preferences)
    [ranks] = stages.run_ranks(tmp_path, ("04_refined_dpo", options | {"output": tmp_path / "two"}))
    assert [rank.status for rank in ranks] == [0, 0], ranks
    one = run("04_refined_dpo", **options, output=tmp_path / "one")
    assert farthest(one, tmp_path / "two") < 2e-5 < farthest(one, pi_0)


@pytest.mark.parametrize("option", ["epsilon", "pieces", "xi_min", "resolve_steps"])
@pytest.mark.parametrize("refine", ["none", "self", "decoupled"])
def test_its_options_go_with_nothing_else(pi_0, preferences, tmp_path, option, refine):
    ran = attempt("04_refined_dpo", model=pi_0, input=preferences, output=tmp_path / "out", refine=refine,
                  **{option: 0.1 if option in ("epsilon", "xi_min") else 3})
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert "--" + option.replace("_", "-") in ran.err and "worst-case" in ran.err
    assert not list(tmp_path.iterdir())
