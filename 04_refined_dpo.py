"""Algorithm 1, the inner loop: train pi_theta on D_t, with the least confident labels smoothed, giving pi_t.

    h_theta~(x, y_1:t-1) = (1 + lambda) h_theta(x, y_1:t-1) - lambda h_ref(x, y_1:t-1)    token logits          (12)
    z = 1 if p_theta~(y_w > y_l | x) < tau else 0                                                               (11)
    L_rf = E[-((1 - alpha z) log p_theta(y_w > y_l | x) + alpha z log p_theta(y_l > y_w | x))]                  (10)

pi_theta starts as pi_{t-1}, and pi_ref is pi_{t-1}, not pi_init. tau is the K-th percentile of p_theta~ over the last
50 pairs (App. B.4) before the current step, over all ranks. No label is refined in the first 20 % of the steps, nor
before 50 pairs are known. With lambda = 0, theta~ is theta, and Eq. 11 is Eq. 9.
`diff 01_seed_dpo.py 04_refined_dpo.py` shows what SPA adds to DPO.

Reads  preferences_t.jsonl  what 03_judge.py writes; uses id, prompt_ids, chosen.ids, rejected.ids
       seed.jsonl           labelled texts too: beside D_t, or alone with --model pi_init, as 01 but with refined labels
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5
    torchrun --nproc-per-node 4 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5

Departs from the paper: nowhere. Choices that it leaves open: those of 01_seed_dpo.py, and how a percentile of 50 values
is taken (`threshold`). The authors' code leaves lambda at 0, so that Eq. 11 and 12 do nothing, and takes tau from means
of micro-batches, so that the flagged share depends on their size.
"""

import functools
import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

import common
from support import chat, data, models, records, runs


def dpo_margin(logps_theta, logps_ref, beta):
    """The argument of the sigmoid in Eq. 5. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


def extrapolate(logits_theta, logits_ref, lam):
    """Eq. 12, of token logits, before the softmax. (n, V), (n, V) -> (n, V)

    Extrapolating the summed log-probs instead would only multiply every margin by 1 + lambda: the same order of pairs,
    and so practically the flags of Eq. 9. What de-coupled detection adds comes from each token's softmax alone.
    """
    return (1 + lam) * logits_theta - lam * logits_ref


def threshold(window, k_percent):
    """tau in Eq. 9 and 11: the K-th percentile of the window's confidences, below which K % of new pairs fall.

    A new value is below the r-th smallest of n with probability r / (n + 1), so numpy's "weibull" flags K % on average;
    its default, "linear", would flag 11.6 % for K = 10, n = 50. With K below 100 / (n + 1) tau is the smallest value.
    K = 0 flags nothing.
    """
    return float(np.percentile(window, k_percent, method="weibull")) if k_percent else 0.0


def refined_loss(margin, z, alpha):
    """Eq. 10 for each pair; log p_theta(y_l > y_w | x) is the log-sigmoid of -margin. (b,), z (b,) in {0, 1} -> (b,)

    For z = 1 this is conservative DPO (cDPO): TRL's label_smoothing = alpha.
    """
    return -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))


def parse_args():
    parser = runs.Parser(description="DPO on the self-labelled D_t with refined labels: pi_{t-1} -> pi_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 and 12 (default: --model)")
    add("--input", required=True, nargs="+", help="D_t: preferences of 03_judge.py, and files like 01's")
    add("--output", required=True, help="folder for pi_t")
    chat.add_options(add)
    # Section 5.1, App. B.4
    add("--beta", type=runs.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=runs.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=runs.positive, default=1)
    add("--batch-size", type=runs.positive, default=32, help="pairs per optimizer step, over all ranks")
    add("--refine", choices=("none", "self", "decoupled"), default="decoupled",
        help="Table 6: none: plain DPO (Eq. 6); self: Eq. 9, 10; decoupled: Eq. 10 to 12")
    add("--alpha", type=runs.share, default=0.1, help="label smoothing of low-confidence pairs, alpha in Eq. 10")
    add("--k-percent", type=runs.number(float, 0, 100), default=10, help="K: tau is the K-th percentile of confidences")
    add("--lam", type=runs.nonnegative, default=0.5, help="lambda in Eq. 12: 1/2, 1/4, 1/8 for t = 1, 2, 3")
    add("--refine-after", type=runs.share, default=0.2, help="fraction of the steps before labels are refined")
    add("--window", type=runs.positive, default=50, help="latest pairs tau is taken from (App. B.4)")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the pairs")
    runs.add_training_options(add, "pairs", micro_batch_size=4)
    args = parser.parse_args()
    if args.refine != "decoupled":
        args.lam = 0.0  # theta~ is theta
    return args


def prepare_reference(pairs, args, work, ranks):
    """pi_ref if lambda > 0: Eq. 12 needs its logits. Else None: its log-probs are stored in the pairs, as in 01."""
    ref = models.load_reference(args.ref_model or args.model, pairs, args, ranks)
    if args.lam == 0:
        common.store_logps(ref, pairs, args, work, ranks)
        return None
    return common.shard(ref, ranks, "hidden") if common.is_sharded(args, ranks) else ref  # Eq. 12 calls ref.hidden


def pair_losses(policy, ref, batch, stored_logps_ref, tau, args):
    """(Eq. 10 of each of b pairs, (b,); {metric: (b,)} to log).

    ref: pi_ref, or None if lambda = 0: then its stored log-probs are enough, (b, 2), of y_w and y_l
    """
    def summed(logp):  # of tokens (N,) -> of y_w and y_l of each pair (b, 2)
        return common.response_logps(logp, batch.lengths).view(-1, 2)

    with common.autocast(batch.ids.device):
        if ref is None:  # theta~ is theta
            logps_theta = logps_tilde = summed(policy(batch))
            logps_ref = stored_logps_ref
        else:
            logp_theta, logp_ref, logp_tilde = policy(batch, ref, functools.partial(extrapolate, lam=args.lam))
            logps_theta, logps_ref, logps_tilde = summed(logp_theta), summed(logp_ref), summed(logp_tilde)
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    with torch.no_grad():
        confidence = torch.sigmoid(dpo_margin(logps_tilde, logps_ref, args.beta))  # p_theta~(y_w > y_l | x), (b,)
        z = (confidence < tau).float()  # Eq. 11; Eq. 9 where lambda = 0
    losses = refined_loss(margin, z, args.alpha)
    metrics = common.pair_metrics(losses, margin, logps_theta, logps_ref, args.beta)
    return losses, metrics | {"confidence": confidence, "flagged": z}


def main():
    args = parse_args()
    # inputs
    work = runs.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    pairs, counts = data.read_pairs(args, tokenizer, records.PREFERENCES, records.LABELLED)
    batches = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed, " ".join(args.input))
    refine_from = math.ceil(args.refine_after * len(batches))
    # models
    if args.ref_model:
        models.check_same_vocabulary(args.model, args.ref_model)
    ref = prepare_reference(pairs, args, work, ranks)
    model, policy = models.load_policy(args, ranks)  # policy(batch): log-probs of the model, under DDP or FSDP
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(work, ranks, model, optimizer, scheduler)
    window = deque(state.get("window", []), maxlen=args.window)  # p_theta~ of the latest pairs of all ranks

    bar = runs.progress(range(state["step"], len(batches)), "refined DPO", ranks)
    for step in bar:
        step_pairs, logged_rows = [pairs[i] for i in batches[step]], []
        micros = common.micro_batches(step_pairs, args, ranks)  # [(pairs, weight)] of this rank
        tau = 0.0  # p_theta~ is never below it: no label is refined
        if args.refine != "none" and step >= refine_from and len(window) == args.window:
            tau = threshold(window, args.k_percent)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch, stored_logps_ref = common.collate_pairs(micro, model)
            with common.grad_sync(policy, last=(k == len(micros) - 1)):
                losses, logged = pair_losses(policy, ref, batch, stored_logps_ref, tau, args)
                (weight * losses.sum() / len(step_pairs)).backward()  # over all micro-batches and ranks: the mean
            logged_rows += common.per_row(micro, logged, weight)

        grad_norm = common.clip_gradient(model)
        position = {pair["id"]: k for k, pair in enumerate(step_pairs)}  # the same order on any number of ranks
        logged_rows = sorted(ranks.gather(logged_rows), key=lambda row: position[row["id"]])
        window.extend(row["confidence"] for row in logged_rows)
        runs.check_finite(step, logged_rows, grad_norm, work)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            runs.log_step(work, bar, step, logged_rows, tau=tau, grad_norm=grad_norm, learning_rate=lr)
        runs.save_if_due(args.save_every, len(batches), work, ranks, step + 1, model, optimizer, scheduler,
                         window=list(window))

    counts["steps"] = len(batches)
    models.save_trained(args, work, ranks, model, tokenizer, counts)


if __name__ == "__main__":
    runs.run(main)
