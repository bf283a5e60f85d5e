"""extras/worst_case_dpo.py: the worst distribution, its loss, and the training."""

import math

import numpy as np
import pytest
import torch

import stages
from stages import farthest, metrics, run

SCRIPT = "extras/worst_case_dpo"
worst_case = stages.load(SCRIPT)
WORST = dict(lr=1e-3, beta=0.3, batch_size=8, epochs=3, epsilon=0.05)


def value(xi, pieces):
    """The loss of each confidence: the greatest of the tangents of -log xi at K points between 0.05 and 1."""
    at = 0.05 ** (1 - np.arange(pieces) / max(1, pieces - 1))
    return (1 - np.log(at) - np.divide.outer(xi, at)).max(-1)


@pytest.mark.parametrize("pieces, optima", [
    (1, [-5.129268, -4.729268, -3.129268, -0.129268]), (2, [0.799467, 1.02404, 1.723442, 2.437642]),
    (3, [0.992252, 1.153842, 1.723442, 2.437642]), (5, [1.035727, 1.197317, 1.752077, 2.437642]),
    (10, [1.048938, 1.210029, 1.759038, 2.44026]), (20, [1.051025, 1.212023, 1.760957, 2.440802])])
def test_the_optimum_is_the_number_that_scipy_gave_for_the_linear_program(pieces, optima):
    """The proposal's Eq. 2-4 over alpha_ik, q_ik and the |q_ik|, by scipy.optimize.linprog of SciPy 1.17.1."""
    xi = np.array([0.05, 0.9, 0.25, 0.6, 0.25, 0.5, 0.75, 0.35])
    for epsilon, optimum in zip((0, 0.02, 0.1, 0.25, 0.6), [*optima, 2.995732], strict=True):
        moved, shift = worst_case.worst_distribution(xi, epsilon, pieces, 0.05)
        worst = (1 - moved) * value(xi, pieces) + moved * value(xi - shift, pieces)
        assert worst.mean() == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_and_the_weights(seed):
    rng = np.random.default_rng(seed)
    xi, epsilon, pieces = rng.random(rng.integers(1, 200)), rng.random() ** 2, int(rng.integers(1, 21))
    moved, shift = worst_case.worst_distribution(xi, epsilon, pieces, 0.05)
    inside = xi > 0.05
    assert ((0 <= moved) & (moved <= 1)).all() and ((0 < moved) & (moved < 1)).sum() <= 1  # at most one is split
    np.testing.assert_allclose(xi[inside] - shift[inside], 0.05)
    assert (moved[~inside] == 0).all()
    # either the budget is spent or all that can move has moved
    assert (moved * shift).mean() == pytest.approx(min(epsilon, shift.mean()), rel=1e-12)


def test_the_distribution_by_hand():
    # N = 4, xi_min = 0.1, budget 4 * 0.2 = 0.8: the least confident first, 0.2 for the third and 0.4 for the first;
    # 0.2 is left for the second, which needs 0.5, so 2/5 of it go
    moved, shift = worst_case.worst_distribution(np.array([0.5, 0.6, 0.3, 0.9]), 0.2, 10, 0.1)
    assert shift.tolist() == pytest.approx([0.4, 0.5, 0.2, 0.8]) and moved.tolist() == pytest.approx([1, 0.4, 1, 0])


def test_the_loss_and_its_gradient_by_hand():
    # margin 0, xi = 1/2, d xi / d margin = xi (1 - xi) = 1/4. Stays: ln 2, and -1/2 its gradient.
    # Goes by 0.3 to 0.2: ln 5, and -(1/4) / 0.2 = -5/4. A quarter goes: 3/4 and 1/4 of these.
    # Goes by 0.48 to 0.02, below 0.05: the tangent at 0.05, ln 20 + (0.05 - 0.02) / 0.05, and -(1/4) / 0.05 = -5
    margin, moved, shift = torch.zeros(4, requires_grad=True), torch.tensor([0, 1, 0.25, 1]), [0.3, 0.3, 0.3, 0.48]
    loss = worst_case.worst_case_loss(margin, moved, torch.tensor(shift), 0.05)
    two, five = math.log(2), math.log(5)
    assert loss.tolist() == pytest.approx([two, five, 0.75 * two + 0.25 * five, math.log(20) + 0.6])
    loss.sum().backward()
    assert margin.grad.tolist() == pytest.approx([-0.5, -1.25, -0.6875, -5])


def test_the_gradient_where_the_loss_becomes_its_tangent():
    # at xi_min itself, where every atom is when it has just been placed: ln 4, and -(1/4) / (1/4) = -1 on both sides
    margin = torch.zeros(1, requires_grad=True)
    loss = worst_case.worst_case_loss(margin, torch.ones(1), torch.tensor([0.25]), 0.25)
    assert loss.item() == pytest.approx(math.log(4))
    loss.backward()
    assert margin.grad.item() == pytest.approx(-1)


def test_the_loss_is_finite_wherever_theta_goes():
    xi = np.random.default_rng(0).random(101)
    moved, shift = (torch.tensor(x).float() for x in worst_case.worst_distribution(xi, 0.2, 10, 0.05))
    for low in (-2000, -50, -5):
        margin = torch.linspace(low, -low, 101).requires_grad_()
        loss = worst_case.worst_case_loss(margin, moved, shift, 0.05)
        loss.sum().backward()
        assert loss.isfinite().all() and margin.grad.isfinite().all() and (margin.grad <= 0).all()


def test_training_with_epsilon_0_is_plain_dpo(pi_0, preferences, tmp_path):
    options = dict(WORST, model=pi_0, input=preferences)
    one = run(SCRIPT, **options | {"epsilon": 0}, output=tmp_path / "one")
    del options["epsilon"]
    assert farthest(one, run("04_refined_dpo", **options, refine="none", output=tmp_path / "two")) == 0


def test_the_atoms_follow_the_model(pi_0, preferences, tmp_path):
    """18 steps, refinement from step ceil(3.6) on: solved before the fifth step, then at the epochs, or as asked."""
    lines = [metrics(run(SCRIPT, **WORST, **more, model=pi_0, input=preferences, output=tmp_path / str(k)))
             for k, more in enumerate(({}, {"resolve_steps": 5}, {"resolve_steps": 100}))]
    for of_run in lines:
        assert all(line["flagged"] == 0 for line in of_run[:4])
        assert any(line["flagged"] > 0 for line in of_run[4:6])
    epochs, asked, once = ([line["loss"] for line in of_run] for of_run in lines)
    assert epochs[:6] == once[:6] and epochs[6] != once[6]
    assert asked[:5] == once[:5] and asked[5] != once[5]


def test_every_pair_s_atoms_are_those_of_its_own_confidence(pi_0, pi_init, preferences, tmp_path):
    options = dict(WORST, model=pi_0, ref_model=pi_init, input=preferences, refine_after=0)
    alone = metrics(run(SCRIPT, **options | dict(epsilon=0, lr=1e-12, batch_size=1, epochs=1),
                        output=tmp_path / "alone"))
    margin = np.array([line["rewards/margins"] for line in alone])
    xi = 1 / (1 + np.exp(-margin))
    assert len(xi) == 41 and xi.std() > 0.1
    moved, shift = worst_case.worst_distribution(xi, 0.05, 10, 0.05)
    loss = worst_case.worst_case_loss(*map(torch.tensor, (margin, moved, shift)), 0.05)
    for size in (1, 4, 50):  # in one step over all pairs, before any update
        line = metrics(run(SCRIPT, **options | dict(batch_size=50), micro_batch_size=size,
                           output=tmp_path / f"all {size}"))[0]
        assert line["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)
        assert line["flagged"] == pytest.approx(moved.mean(), rel=1e-4)
