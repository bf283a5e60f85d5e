"""The paper's equations in closed form, with numbers derived by hand."""

import math
from collections import deque

import numpy as np
import pytest
import torch

import stages

seed_dpo, judge, refined_dpo = map(stages.load, ("01_seed_dpo", "03_judge", "04_refined_dpo"))
tensor = torch.tensor


@pytest.mark.parametrize("stage", [seed_dpo, refined_dpo])
def test_equation_5(stage):
    # pair 1: log-ratios -10 + 11 = 1 of y_w and -12 + 11 = -1 of y_l: 0.5 * 1 - 0.5 * (-1) = 1
    # pair 2: log-ratios -20 + 18 = -2 of y_w and -7 + 7 = 0 of y_l: 0.5 * (-2) - 0 = -1
    logps_theta, logps_ref = tensor([[-10.0, -12.0], [-20.0, -7.0]]), tensor([[-11.0, -11.0], [-18.0, -7.0]])
    margin = stage.dpo_margin(logps_theta, logps_ref, 0.5)
    assert margin.tolist() == [1.0, -1.0]
    # sigmoid(1) = 1 / (1 + e^-1) = 1 / 1.3678794412 = 0.7310585786
    assert margin.sigmoid().tolist() == pytest.approx([0.7310585786, 0.2689414214])


def test_equation_6():
    # -ln sigmoid(1) = ln(1 + e^-1) = ln 1.3678794412 = 0.3132616875; -ln sigmoid(-1) = 1 + 0.3132616875
    losses = seed_dpo.dpo_loss(tensor([1.0, -1.0, 0.0])).tolist()
    assert losses == pytest.approx([0.3132616875, 1.3132616875, math.log(2)])


@pytest.mark.parametrize("logps_policy, logps_ref, beta, p", [
    ([-10, -12], [-11, -11], 0.5, 0.7310585786),  # the first pair of Eq. 5 above, with y_1 in the place of y_w
    ([-12, -10], [-11, -11], 0.5, 0.2689414214),
    ([-31.7, -205.3], [-31.7, -205.3], 0.1, 0.5),  # a model judged against itself
    ([0, -5000], [0, 0], 1, 1), ([-5000, 0], [0, 0], 1, 0)])  # log-ratios of thousands of nats overflow nothing
def test_equation_7(logps_policy, logps_ref, beta, p):
    found = judge.preference(*judge.implicit_rewards(logps_policy, logps_ref, beta))
    assert found == (p if p in (0, 0.5, 1) else pytest.approx(p))


def test_equation_10_and_its_gradient():
    # margin 1, z = 0: ln(1 + e^-1)                       = 0.3132616875
    # margin 1, z = 1: 0.9 * 0.3132616875 + 0.1 * 1.3132616875 = 0.4132616875
    # margin -2, z = 1: ln(1 + e^2) = 2.1269280110, ln(1 + e^-2) = 0.1269280110:
    #                   0.9 * 2.1269280110 + 0.1 * 0.1269280110 = 1.9269280110
    losses = refined_dpo.refined_loss(tensor([1.0, 1.0, -2.0]), tensor([0.0, 1.0, 1.0]), 0.1)
    assert losses.tolist() == pytest.approx([0.3132616875, 0.4132616875, 1.9269280110])
    # d/dm = -(1 - alpha z) sigmoid(-m) + alpha z sigmoid(m); at m = 0: -1/2 for z = 0, -0.45 + 0.05 = -0.4 for z = 1;
    # it vanishes where sigmoid(m) = 1 - alpha: m = ln 9, the target of a smoothed label
    margin = tensor([0.0, 0.0, math.log(9)], requires_grad=True)
    refined_dpo.refined_loss(margin, tensor([0.0, 1.0, 1.0]), 0.1).sum().backward()
    assert margin.grad.tolist() == pytest.approx([-0.5, -0.4, 0.0], abs=1e-6)


def test_tau_by_hand():
    # 50 confidences 0.01 ... 0.50, K = 10: position 10 % of 51 = 5.1, a tenth of the way from the 5th to the 6th
    window = np.random.default_rng(0).permutation([k / 100 for k in range(1, 51)]).tolist()
    assert refined_dpo.threshold(window, 10) == pytest.approx(0.051)
    # K = 50: the median, between the 25th and the 26th
    assert refined_dpo.threshold(window, 50) == pytest.approx(0.255)
    assert refined_dpo.threshold(window, 0) == 0  # nothing is below it


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_k_percent_of_the_pairs_are_flagged_on_average(batch_size):
    # Independent confidences, tau from the last 50 before the step. The k-th smallest of 50 has k / 51 of the next
    # ones below it, so 5.1 / 51 = 10 %. About 1,200 independent windows: a standard error of 4.2 % / sqrt(1200) =
    # 0.12 %. numpy's default percentile would flag 11.6 %, the authors' sorted[5], sorted[6] 12.7 %.
    rng, window, flagged, count = np.random.default_rng(0), deque(maxlen=50), 0, 0
    for _ in range(60_000 // batch_size):
        confidence = rng.random(batch_size)
        if len(window) == 50:
            flagged += (confidence < refined_dpo.threshold(window, 10)).sum()
            count += batch_size
        window.extend(confidence)
    assert flagged / count == pytest.approx(0.10, abs=0.005)
