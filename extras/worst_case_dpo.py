"""DPO under the worst distribution of confidences nearby: a proposal that builds on SPA, in the place of 04.

    min_theta sup_Q E_Q[l(xi)]   over all Q within Wasserstein-1 distance epsilon of the empirical distribution of
                                 xi_i = p_theta(y_w > y_l | x_i), the confidences of the pairs of D_t   (2-1 to 2-6)

For the inner problem, l(xi) = -log xi is replaced by a maximum of K affine pieces. It is solved where 04 would start to
refine labels, and again at the start of every epoch or every --resolve-steps. `diff 04_refined_dpo.py
extras/worst_case_dpo.py` shows the proposal.

Reads and writes what 04_refined_dpo.py does; in metrics.jsonl, flagged is the mean weight that was moved.

    python extras/worst_case_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --epsilon 0.2

Departs from the proposal: its printed loss, sum_ik -log[alpha_ik (xi_i - q_ik / alpha_ik)], has the weights alpha
inside the logarithm, where they get no gradient. Here the loss is the expectation that its text describes,
sum_ik alpha_ik l(xi_i - q_ik / alpha_ik).
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from support import chat, data, models, records, runs


def dpo_margin(logps_theta, logps_ref, beta):
    """The argument of the sigmoid in Eq. 5. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


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
    inside, tangent = -torch.log(atom.clamp(min=xi_min)), -math.log(xi_min) + (xi_min - atom) / xi_min
    # of the two exactly one has a gradient: where they meet, at xi_min, both clamps of a sum of two would let it pass
    of_atom = torch.where(atom > xi_min, inside, tangent)
    return -(1 - moved) * F.logsigmoid(margin) + moved * of_atom


def parse_args():
    parser = runs.Parser(description="DPO under the worst distribution of confidences nearby: pi_{t-1} -> pi_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 (default: --model)")
    add("--input", required=True, nargs="+", help="D_t: preferences of 03_judge.py, and files like 01's")
    add("--output", required=True, help="folder for pi_t")
    chat.add_options(add)
    # Section 5.1
    add("--beta", type=runs.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=runs.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=runs.positive, default=1)
    add("--batch-size", type=runs.positive, default=32, help="pairs per optimizer step, over all ranks")
    # the proposal
    add("--epsilon", type=runs.nonnegative, default=0.2, help="Wasserstein radius: largest mean shift of confidences "
        "(the best of 0.01, 0.05 and 0.2 in benchmarks/TABLES.md)")
    add("--pieces", type=runs.positive, default=10, help="affine pieces of the loss, K")
    add("--xi-min", type=runs.number(float, 1e-6, 0.5), default=0.05, help="lower end of the support")
    add("--refine-after", type=runs.share, default=0.2, help="fraction of the steps before it is first solved")
    add("--resolve-steps", type=runs.positive, help="solve again every N steps (default: each epoch)")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the pairs")
    runs.add_training_options(add, "pairs", micro_batch_size=4)
    return parser.parse_args()


def pair_losses(policy, batch, logps_ref, atoms, args):
    """(the worst-case loss of each of b pairs, (b,); {metric: (b,)} to log). logps_ref, atoms: (b, 2)"""
    with common.autocast(batch.ids.device):
        logp_theta = policy(batch)  # (N,)
    logps_theta = common.response_logps(logp_theta, batch.lengths).view(-1, 2)  # of y_w and y_l in turn
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    moved, shift = atoms.unbind(1)
    losses = worst_case_loss(margin, moved, shift, args.xi_min)
    metrics = common.pair_metrics(losses, margin, logps_theta, logps_ref, args.beta)
    return losses, metrics | {"confidence": torch.sigmoid(margin.detach()), "flagged": moved}


@torch.no_grad()
def solve(policy, model, pairs, args, ranks):
    """{id: (moved, shift)} of all pairs, by the model as it is now. The ranks share the pairs."""
    rows = []
    for micro, weight in common.micro_batches(pairs, args, ranks):
        batch, logps_ref = common.collate_pairs(micro, model)
        _, logged = pair_losses(policy, batch, logps_ref, torch.zeros_like(logps_ref), args)
        rows += common.per_row(micro, logged, weight)
    confidence = {row["id"]: row["confidence"] for row in ranks.gather(rows)}
    xi = np.array([confidence[pair["id"]] for pair in pairs])  # (N,)
    moved, shift = worst_distribution(xi, args.epsilon, args.pieces, args.xi_min)
    return {pair["id"]: atoms for pair, *atoms in zip(pairs, moved.tolist(), shift.tolist())}


def main():
    args = parse_args()
    # inputs
    work = runs.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    pairs, counts = data.read_pairs(args, tokenizer, records.PREFERENCES, records.LABELLED)
    batches = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed, " ".join(args.input))
    refine_from = math.ceil(args.refine_after * len(batches))
    resolve_every = args.resolve_steps or len(batches) // args.epochs
    # models
    if args.ref_model:
        models.check_same_vocabulary(args.model, args.ref_model)
    ref = models.load_reference(args.ref_model or args.model, pairs, args, ranks)
    common.store_logps(ref, pairs, args, work, ranks)
    del ref
    model, policy = models.load_policy(args, ranks)  # policy(batch): log-probs of the model, under DDP or FSDP
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(work, ranks, model, optimizer, scheduler)
    atoms = state.get("atoms") or {pair["id"]: [0.0, 0.0] for pair in pairs}  # until it is solved nothing is moved

    bar = runs.progress(range(state["step"], len(batches)), "worst-case DPO", ranks)
    for step in bar:
        step_pairs, logged_rows = [pairs[i] for i in batches[step]], []
        micros = common.micro_batches(step_pairs, args, ranks)  # [(pairs, weight)] of this rank
        if step == refine_from or step > refine_from and step % resolve_every == 0:
            atoms = solve(policy, model, pairs, args, ranks)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch, logps_ref = common.collate_pairs(micro, model)
            with common.grad_sync(policy, last=(k == len(micros) - 1)):
                of_micro = torch.tensor([atoms[pair["id"]] for pair in micro], device=model.device)  # (b, 2)
                losses, logged = pair_losses(policy, batch, logps_ref, of_micro, args)
                (weight * losses.sum() / len(step_pairs)).backward()  # over all micro-batches and ranks: the mean
            logged_rows += common.per_row(micro, logged, weight)

        grad_norm = common.clip_gradient(model)
        position = {pair["id"]: k for k, pair in enumerate(step_pairs)}  # the same order on any number of ranks
        logged_rows = sorted(ranks.gather(logged_rows), key=lambda row: position[row["id"]])
        runs.check_finite(step, logged_rows, grad_norm, work)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            runs.log_step(work, bar, step, logged_rows, grad_norm=grad_norm, learning_rate=lr)
        runs.save_if_due(args.save_every, len(batches), work, ranks, step + 1, model, optimizer, scheduler,
                         atoms=atoms)

    counts["steps"] = len(batches)
    models.save_trained(args, work, ranks, model, tokenizer, counts)


if __name__ == "__main__":
    runs.run(main)
