"""DPO under the worst distribution of confidences nearby: a proposal that builds on SPA (04's --refine worst-case).

    min_theta sup_Q E_Q[l(xi)]   over all Q within Wasserstein-1 distance epsilon of the empirical distribution of
                                 xi_i = p_theta(y_w > y_l | x_i), the confidences of the pairs of D_t   (2-1 to 2-6)

For the inner problem, l(xi) = -log xi is replaced by a maximum of K affine pieces. It is solved when 04 would start to
refine labels, and again at the start of every epoch or every --resolve-steps.

Departs from the proposal: its printed loss, sum_ik -log[alpha_ik (xi_i - q_ik / alpha_ik)], has the weights alpha
inside the logarithm, where they get no gradient. Here the loss is the expectation that its text describes,
sum_ik alpha_ik l(xi_i - q_ik / alpha_ik).
"""

import numpy as np
import torch
import torch.nn.functional as F

import common


def worst_distribution(xi, epsilon, pieces, xi_min):
    """The distribution of confidences within Wasserstein-1 distance epsilon of xi's that has the largest mean loss.

    The loss is max_k a_k xi + b_k, the tangents of -log xi at K points of the support [xi_min, 1]. It is convex and
    decreasing, so mass gains most by going all the way to xi_min: (l(xi_min) - l(xi_i)) / (xi_i - xi_min) per unit of
    distance. The budget N epsilon is therefore spent in falling order of that rate, which is the least confident pairs
    first, up to ties that the pieces make. At most one pair is moved in part.
    xi (N,) in [0, 1] -> moved (N,): alpha, the weight at xi_min (1 - moved stays); shift (N,): q / alpha, how far
    """
    tangent_points = np.geomspace(xi_min, 1, pieces)
    slopes, intercepts = -1 / tangent_points, 1 - np.log(tangent_points)

    def loss(x):
        return (slopes * np.reshape(x, (-1, 1)) + intercepts).max(1)

    xi = np.clip(xi, xi_min, 1)  # already below the support: cannot get worse
    shift = xi - xi_min
    distance = np.where(shift > 0, shift, 1)
    rate = np.where(shift > 0, (loss(xi_min) - loss(xi)) / distance, 0)
    order = np.lexsort((xi, -rate.round(9)))
    budget_left = len(xi) * epsilon - (np.cumsum(shift[order]) - shift[order])  # when a pair's turn comes
    moved = np.zeros(len(xi))
    moved[order] = np.where(shift[order] > 0, np.clip(budget_left / distance[order], 0, 1), 0)
    return moved, shift


def worst_case_loss(margin, moved, shift, xi_min):
    """The expectation of -log xi over each pair's atoms: xi_i and, in proportion moved, xi_i - shift. (b,) -> (b,)

    moved and shift are held fixed while theta moves, so an atom may fall below xi_min: there the loss continues as its
    tangent at xi_min, finite, and still raising the pair's confidence.
    """
    atom = torch.sigmoid(margin) - shift
    lowest = -torch.log(atom.clamp(min=xi_min)) + (xi_min - atom).clamp(min=0) / xi_min
    return -(1 - moved) * F.logsigmoid(margin) + moved * lowest


class WorstCase:
    """The worst distribution during training: when it is solved, and the loss under it."""

    def __init__(self, confidences, pairs, refine_from, steps, args, ranks, state):
        """confidences: a list of b pairs -> p_theta (b,); pairs: those of D_t; state: what 04 resumes from"""
        self.confidences, self.pairs, self.refine_from = confidences, pairs, refine_from
        self.args, self.ranks = args, ranks
        self.every = args.resolve_steps or steps // args.epochs
        self.atoms = state.get("atoms") or {pair["id"]: [0.0, 0.0] for pair in pairs}  # {id: [moved, shift]}

    @torch.no_grad()
    def solve_if_due(self, step):
        """Find the atoms at step refine_from, and then at every multiple of `every`."""
        if step != self.refine_from and (step < self.refine_from or step % self.every):
            return
        args, known = self.args, []
        lengths = [common.row_length(pair) for pair in self.pairs]
        batches = common.length_batches(lengths, args.micro_batch_size, args.micro_batch_tokens)
        for indices, weight in common.split_over_ranks(batches, self.ranks):
            found = self.confidences([self.pairs[i] for i in indices]).tolist()
            if weight:
                known += zip(indices, found)
        xi = np.array([confidence for _, confidence in sorted(self.ranks.gather(known))])  # (N,)
        moved, shift = worst_distribution(xi, args.epsilon, args.pieces, args.xi_min)
        self.atoms = {pair["id"]: list(atoms) for pair, *atoms in zip(self.pairs, moved.tolist(), shift.tolist())}

    def losses(self, micro, logged):
        """(losses (b,), logged) with the worst case in the place of Eq. 10. micro: b pairs; logged: as 04 logs them"""
        margin = logged["margin"]
        moved, shift = torch.tensor([self.atoms[pair["id"]] for pair in micro], device=margin.device).T
        losses = worst_case_loss(margin, moved, shift, self.args.xi_min)
        return losses, logged | {"loss": losses, "flagged": moved}
