"""Algorithm 1, the inner loop: train pi_theta on D_t, with the least confident labels smoothed, giving pi_t.

    h_theta~(x, y_1:t-1) = (1 + lambda) h_theta(x, y_1:t-1) - lambda h_ref(x, y_1:t-1)    token logits          (12)
    z = 1 if p_theta~(y_w > y_l | x) < tau else 0                                                               (11)
    L_rf = E[-((1 - alpha z) log p_theta(y_w > y_l | x) + alpha z log p_theta(y_l > y_w | x))]                  (10)

pi_theta starts as pi_{t-1}, and pi_ref is pi_{t-1}, not pi_init. tau is the K-th percentile of p_theta~ over the last
50 pairs (App. B.4) before the current step, over all ranks. No label is refined in the first 20 % of the steps, nor
before 50 pairs are known. With lambda = 0, theta~ is theta, and Eq. 11 is Eq. 9.
`diff 01_seed_dpo.py 04_refined_dpo.py` shows what SPA adds to DPO; lines with worst_case are not SPA's but those of
--refine worst-case (extras/worst_case.py).

Reads  preferences_t.jsonl  what 03_judge.py writes; uses id, prompt_ids, chosen.ids, rejected.ids
       seed.jsonl           labelled texts too: beside D_t, or alone (then pi_theta and pi_ref start as pi_init)
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5
    torchrun --nproc-per-node 4 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5

Departs from the paper: none. Not in the paper: what 01_seed_dpo.py lists. The authors' code leaves lambda at 0, so that
Eq. 11 and 12 do nothing, and takes tau from means of micro-batches, so that the flagged share depends on their size.
"""

import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

import common
from support import chat, models, runs


def dpo_margin(logps_theta, logps_ref, beta):
    """The argument of the sigmoid in Eq. 5. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


def extrapolate(logits_theta, logits_ref, lam):
    """Eq. 12, of token logits: log-probs mixed after the softmax would not sum to one. (N, V), (N, V) -> (N, V)"""
    return (1 + lam) * logits_theta - lam * logits_ref


def threshold(window, k_percent):
    """tau in Eq. 9 and 11: the confidence that K % of the pairs stay below, estimated from the window.

    A new value falls below the k-th smallest of n with probability k / (n + 1), so numpy's "weibull" flags K % on
    average; its default, linear, flags 11.6 % for K = 10 and n = 50. Between 0 and 100 / (n + 1), K flags that many.
    """
    return float(np.percentile(window, k_percent, method="weibull")) if k_percent else 0.0


def refined_loss(margin, z, alpha):
    """Eq. 10 for each pair; log p_theta(y_l > y_w | x) is the log-sigmoid of -margin. (b,), z (b,) in {0, 1} -> (b,)"""
    return -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))


def parse_args():
    parser = runs.Parser(description="DPO on the self-labelled D_t with refined labels: pi_{t-1} -> pi_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 and 12 (default: --model)")
    add("--input", required=True, nargs="+", help="D_t: preferences of 03_judge.py, and files like 01's")
    add("--output", required=True, help="folder for pi_t")
    add("--tokenizer", help="tokenizer folder or Hub name (default: --model's)")
    add("--chat-template", help="Jinja chat template file (default: the tokenizer's)")
    # Section 5.1
    add("--beta", type=runs.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=runs.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=runs.positive, default=1)
    add("--batch-size", type=runs.positive, default=32, help="pairs per optimizer step, over all ranks")
    add("--refine", choices=("none", "self", "decoupled", "worst-case"), default="decoupled",
        help="Table 6: none: plain DPO (Eq. 6); self: Eq. 9, 10; decoupled: Eq. 10 to 12; worst-case: not the paper's")
    add("--alpha", type=runs.share, default=0.1, help="label smoothing of low-confidence pairs, alpha in Eq. 10")
    add("--k-percent", type=runs.number(float, 0, 100), default=10, help="K: tau is the K-th percentile of confidences")
    add("--lam", type=runs.nonnegative, default=0.5, help="lambda in Eq. 12: 1/2, 1/4, 1/8 for t = 1, 2, 3")
    add("--refine-after", type=runs.share, default=0.2, help="fraction of the steps before labels are refined")
    add("--window", type=runs.positive, default=50, help="latest pairs tau is taken from (App. B.4)")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the pairs")
    # --refine worst-case
    add("--epsilon", type=runs.nonnegative, default=0.01, help="Wasserstein radius: largest mean shift of confidences")
    add("--pieces", type=runs.positive, default=10, help="affine pieces of the loss")
    add("--xi-min", type=runs.number(float, 1e-6, 0.5), default=0.05, help="lower end of the support")
    add("--resolve-steps", type=runs.positive, help="solve again every N steps (default: each epoch)")
    # lengths, memory, safety
    add("--max-prompt-length", type=runs.positive, default=1024, help="pairs with a longer prompt are dropped")
    add("--max-length", type=runs.number(int, 2), default=2048, help="prompt + response; responses are cut to fit")
    add("--micro-batch-size", type=runs.positive, default=4, help="most pairs per forward pass on a rank")
    add("--micro-batch-tokens", type=runs.positive, help="most tokens of one (a single pair may exceed it)")
    add("--activation-checkpointing", action="store_true", help="less memory for more compute")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the ranks, for less memory")
    add("--save-every", type=runs.positive, default=100, help="save a state to resume from every N steps")
    args = parser.parse_args()
    if args.refine != "decoupled":
        args.lam = 0.0  # theta~ is theta
    return args


def read_pairs(args, tokenizer):
    """Yields {"id", "prompt", "chosen", "rejected"}: of D_t the token ids that were sampled and judged."""
    eos = chat.eos_ids(args.model, tokenizer)
    for path in args.input:
        for row in runs.read_jsonl(path, [runs.PREFERENCES, runs.SEED]):
            if "prompt_ids" in row:
                yield {"id": row["id"], "prompt": row["prompt_ids"], "chosen": row["chosen"]["ids"],
                       "rejected": row["rejected"]["ids"]}
            else:
                yield chat.tokenize_pair(path, row, tokenizer, eos)


def prepare_reference(pairs, args, partial, ranks):
    """pi_ref if lambda > 0: Eq. 12 needs its logits. Else None: its log-probs are stored in the pairs, as in 01."""
    ref = models.load_reference(args.ref_model or args.model, pairs, args, ranks)
    if args.lam == 0:
        common.store_logps(ref, pairs, args, partial, ranks)
        return None
    return common.shard(ref, ranks, "hidden") if common.is_sharded(args, ranks) else ref


def pair_losses(policy, ref, batch, logps_ref, tau, args):
    """(Eq. 10 of each of b pairs, (b,); {metric: (b,)} to log).

    ref: pi_ref, or None if lambda = 0: then its stored log-probs are enough, logps_ref (b, 2), of y_w and y_l
    """
    def summed(logp):
        return common.response_logps(logp, batch.lengths).view(-1, 2)  # of y_w and y_l in turn

    with common.autocast(batch.ids.device):
        if ref:
            logps_theta, logps_ref, logps_tilde = map(summed, policy(
                batch, ref, lambda logits_theta, logits_ref: extrapolate(logits_theta, logits_ref, args.lam)))
        else:
            logps_theta = logps_tilde = summed(policy(batch))  # theta~ is theta
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    with torch.no_grad():
        confidence = torch.sigmoid(dpo_margin(logps_tilde, logps_ref, args.beta))  # p_theta~(y_w > y_l | x), (b,)
        z = (confidence < tau).float()  # Eq. 11; Eq. 9 where lambda = 0
    losses = refined_loss(margin, z, args.alpha)
    chosen, rejected = logps_theta.unbind(1)
    return losses, {"loss": losses, "margin": margin, "accuracy": (margin > 0).float(),
                    "logp_chosen": chosen, "logp_rejected": rejected, "confidence": confidence, "flagged": z}


def main():
    args = parse_args()
    partial = runs.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    pairs, counts = common.cut_pairs(read_pairs(args, tokenizer), args)
    if args.ref_model:
        models.check_same_vocabulary(args.model, args.ref_model)

    batches = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed, " ".join(args.input))
    refine_from = math.ceil(args.refine_after * len(batches))
    ref = prepare_reference(pairs, args, partial, ranks)
    model, policy = models.load_policy(args, ranks)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(partial, ranks, model, optimizer, scheduler)
    window = deque(state.get("window", []), maxlen=args.window)  # p_theta~ of the latest pairs of all ranks
    worst_case = None
    if args.refine == "worst-case":
        from extras.worst_case import WorstCase

        def confidences(micro):
            return pair_losses(policy, ref, *common.collate_pairs(micro, model), 0.0, args)[1]["confidence"]

        worst_case = WorstCase(confidences, pairs, refine_from, len(batches), args, ranks, state)

    bar = runs.progress(range(state["step"], len(batches)), "refined DPO", ranks)
    for step in bar:
        step_pairs, logged_rows = [pairs[i] for i in batches[step]], []
        micros = common.micro_batches(step_pairs, args, ranks)
        tau = 0.0  # p_theta~ is never below it: no label is refined
        if args.refine in ("self", "decoupled") and step >= refine_from and len(window) == args.window:
            tau = threshold(window, args.k_percent)
        if worst_case:
            worst_case.solve_if_due(step)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch, logps_ref = common.collate_pairs(micro, model)
            with common.grad_sync(policy, last=k == len(micros) - 1):
                losses, logged = pair_losses(policy, ref, batch, logps_ref, tau, args)
                if worst_case:
                    losses, logged = worst_case.losses(micro, logged)
                # these add up to the mean over the step's pairs; DDP and FSDP average over the ranks
                (weight * losses.sum() / len(step_pairs) * ranks.world).backward()
            logged_rows += common.per_row(micro, logged, weight)

        grad_norm = common.clip_gradient(model)
        position = {pair["id"]: k for k, pair in enumerate(step_pairs)}  # the same order on any number of ranks
        logged_rows = sorted(ranks.gather(logged_rows), key=lambda row: position[row["id"]])
        window.extend(row["confidence"] for row in logged_rows)
        common.check_finite(step, logged_rows, grad_norm, partial)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            common.log_step(partial, bar, step, logged_rows, tau=tau, grad_norm=grad_norm, lr=lr)
        if runs.save_due(step + 1, len(batches), args.save_every, ranks):
            runs.save_state(partial, ranks, step + 1, model, optimizer, scheduler, window=list(window),
                            atoms=worst_case and worst_case.atoms)

    counts["steps"] = len(batches)
    models.save_trained(args, partial, ranks, model, tokenizer, counts)


if __name__ == "__main__":
    runs.run(main)
