"""Algorithm 1, the inner loop: train pi_theta on D_t, with the least confident labels smoothed, giving pi_t.

    h_theta~(x, y_1:t-1) = (1 + lambda) h_theta(x, y_1:t-1) - lambda h_ref(x, y_1:t-1)    token logits          (12)
    z = 1 if p_theta~(y_w > y_l | x) < tau else 0                                                               (11)
    L_rf = E[-((1 - alpha z) log p_theta(y_w > y_l | x) + alpha z log p_theta(y_l > y_w | x))]                  (10)

pi_theta starts as pi_{t-1}, and pi_ref is pi_{t-1}, not pi_init. tau is the K-th percentile of p_theta~ over the last
50 pairs (App. B.4) before the current step, over all ranks. No label is refined in the first 20 % of the steps.
With lambda = 0, theta~ is theta, and Eq. 11 is Eq. 9. `diff 01_seed_dpo.py 04_refined_dpo.py` is what SPA adds to DPO.

--refine worst-case is another way to treat doubtful labels, from a proposal that builds on SPA: train on the worst
distribution within Wasserstein distance epsilon of the confidences xi_i = p_theta(y_w > y_l | x_i) of D_t, the loss
l(xi) = -log xi in its place a maximum of K affine pieces (`worst_distribution`, `worst_case_loss`). It is solved when
refinement sets in, and again at every epoch's start or every --resolve-steps.

Reads  preferences_t.jsonl  what 03_judge.py writes; of it id, prompt_ids, chosen.ids, rejected.ids
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5
    torchrun --nproc-per-node 4 04_refined_dpo.py --model pi_0 --input preferences_1.jsonl --output pi_1 --lam 0.5

Departs from the paper: none. From the authors' release: that leaves lambda at 0, so that Eq. 11 and 12 do nothing, and
takes tau from the means of micro-batches, so that the flagged share depends on their size. From the proposal: its loss
puts the weights inside the logarithm, sum_ik -log[alpha_ik (xi_i - q_ik / alpha_ik)], where they are constants that no
gradient sees; here it is what its text means, the expectation sum_ik alpha_ik l(xi_i - q_ik / alpha_ik).
"""

import contextlib
import math
import time
from array import array
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

import common


def dpo_margin(logps_theta, logps_ref, beta):
    """What the sigmoid of Eq. 5 is taken of. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


def extrapolate(logits_theta, logits_ref, lam):
    """Eq. 12, of token logits: log-probs mixed after the softmax would not sum to one. (N, V), (N, V) -> (N, V)"""
    return (1 + lam) * logits_theta - lam * logits_ref


def threshold(window, k_percent):
    """tau in Eq. 9 and 11: the confidence that K % of the pairs stay below, judging by those in the window.

    A new value falls below the k-th smallest of n with probability k / (n + 1), so numpy's "weibull" flags K % on
    average; its default, linear, flags 11.6 % for K = 10 and n = 50.
    """
    return float(np.percentile(window, k_percent, method="weibull"))


def refined_loss(margin, z, alpha):
    """Eq. 10 for each pair; log p_theta(y_l > y_w | x) is the log-sigmoid of -margin. (b,), z (b,) in {0, 1} -> (b,)"""
    return -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))


def worst_distribution(xi, epsilon, pieces, xi_min):
    """The distribution of confidences within Wasserstein-1 distance epsilon of xi's that has the largest mean loss.

    The loss is max_k a_k xi + b_k, the tangents of -log xi at K points of the support [xi_min, 1]. It is convex and
    falls, so mass gains most by going all the way down to xi_min, (l(xi_min) - l(xi_i)) / (xi_i - xi_min) a unit of
    distance: the budget N epsilon is spent in falling order of that rate, which is the least confident pairs first, up
    to ties that pieces make. At most one pair is moved in part.
    xi (N,) in [0, 1] -> moved (N,): alpha of the part at xi_min, 1 - moved staying; shift (N,): q / alpha, how far
    """
    at = np.geomspace(xi_min, 1, pieces)
    slopes, intercepts = -1 / at, 1 - np.log(at)

    def loss(x):
        return (slopes * np.reshape(x, (-1, 1)) + intercepts).max(1)

    xi = np.clip(xi, xi_min, 1)  # who is below the support has nowhere worse to go
    shift = xi - xi_min
    distance = np.where(shift > 0, shift, 1)
    rate = np.where(shift > 0, (loss(xi_min) - loss(xi)) / distance, 0)
    order = np.lexsort((xi, -rate.round(9)))
    left = len(xi) * epsilon - (np.cumsum(shift[order]) - shift[order])  # of the budget, when a pair's turn comes
    moved = np.zeros(len(xi))
    moved[order] = np.where(shift[order] > 0, np.clip(left / distance[order], 0, 1), 0)
    return moved, shift


def worst_case_loss(margin, moved, shift, xi_min):
    """The expectation of -log xi over each pair's atoms, xi_i and, in proportion moved, xi_i - shift. (b,) -> (b,)

    moved and shift are held while theta moves, so an atom may fall below xi_min: there the loss goes on as its tangent
    at xi_min, finite, and still pushing the pair up.
    """
    atom = torch.sigmoid(margin) - shift
    lowest = -torch.log(atom.clamp(min=xi_min)) + (xi_min - atom).clamp(min=0) / xi_min
    return -(1 - moved) * F.logsigmoid(margin) + moved * lowest


def parse_args():
    parser = common.Parser(description="DPO on the self-labelled D_t with refined labels: pi_{t-1} -> pi_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 and 12 (default: --model)")
    add("--input", required=True, help="D_t: preferences of 03_judge.py")
    add("--output", required=True, help="folder for pi_t")
    add("--tokenizer", help="folder or name of a tokenizer, where --model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    # Section 5.1
    add("--beta", type=common.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=common.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=common.positive, default=1)
    add("--batch-size", type=common.positive, default=32, help="pairs of one optimizer step, over all ranks")
    add("--refine", choices=("none", "self", "decoupled", "worst-case"), default="decoupled",
        help="the rows of Table 6: plain DPO (Eq. 6), Eq. 9 and 10, Eq. 10 to 12; or the worst distribution nearby")
    add("--alpha", type=common.share, default=0.1, help="label smoothing of doubtful pairs, alpha in Eq. 10")
    add("--k-percent", type=common.number(float, 0, 100), default=10, help="share held doubtful, K")
    add("--lam", type=common.nonnegative, default=0.5, help="lambda in Eq. 12: 1/2, 1/4, 1/8 for t = 1, 2, 3")
    add("--refine-after", type=common.share, default=0.2, help="share of the steps before it begins")
    add("--window", type=common.positive, default=50, help="latest pairs tau is taken from (App. B.4)")
    add("--seed", type=common.natural, default=0, help="decides the order of the pairs")
    # --refine worst-case
    add("--epsilon", type=common.nonnegative, help="radius in confidence, mean over the pairs (default 0.01)")
    add("--pieces", type=common.positive, help="affine pieces of the loss, K (default 10)")
    add("--xi-min", type=common.number(float, 1e-6, 0.5), help="the least confidence it may suppose (default 0.05)")
    add("--resolve-steps", type=common.positive, help="steps between solutions (default: those of an epoch)")
    # lengths, memory, safety
    add("--max-prompt-length", type=common.positive, default=1024, help="pairs with a longer prompt are dropped")
    add("--max-length", type=common.number(int, 2), default=2048, help="prompt and response; responses are cut to fit")
    add("--micro-batch-size", type=common.positive, default=4, help="pairs of one forward pass of a rank, at most")
    add("--micro-batch-tokens", type=common.positive, help="tokens of one, at most, if it has several pairs")
    add("--activation-checkpointing", action="store_true", help="less memory for more compute")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the ranks, for less memory")
    add("--save-every", type=common.positive, default=100, help="steps between states to go on from")
    return settle(parser.parse_args())


def settle(args):
    """Raises InputError for an option of the worst case without it; fills in their defaults with it."""
    for name, default in {"epsilon": 0.01, "pieces": 10, "xi_min": 0.05, "resolve_steps": None}.items():
        if args.refine != "worst-case" and getattr(args, name) is not None:
            raise common.InputError(f"--{name.replace('_', '-')} does not go with --refine {args.refine}: "
                                    "leave it out, or give --refine worst-case")
        if args.refine == "worst-case" and getattr(args, name) is None:
            setattr(args, name, default)
    return args


def read_pairs(args):
    """[{"id", "prompt", "chosen", "rejected"}], the sampled token ids as they were judged, and what was dropped."""
    rows = common.stream_jsonl(args.input, {"id": common.an_id, "prompt_ids": common.token_ids,
                                            "chosen": common.a_response, "rejected": common.a_response})
    pairs, counts = [], {"pairs read": 0, "prompt too long": 0, "same after cutting": 0}
    for row in rows:
        counts["pairs read"] += 1
        prompt = row["prompt_ids"]
        if len(prompt) > min(args.max_prompt_length, args.max_length - 1):
            counts["prompt too long"] += 1
            continue
        chosen, rejected = (row[key]["ids"][:args.max_length - len(prompt)] for key in ("chosen", "rejected"))
        if chosen == rejected:
            counts["same after cutting"] += 1
            continue
        uncut = len(chosen) + len(rejected) == len(row["chosen"]["ids"]) + len(row["rejected"]["ids"])
        # 4 bytes a token; in a list a token is an object, and takes 40
        pairs.append({"id": row["id"], "prompt": array("i", prompt), "chosen": array("i", chosen),
                      "rejected": array("i", rejected), "logps_ref": recorded_logps(row) if uncut else None})
    if not pairs:
        raise common.InputError(f"{args.input}: no pair is left ({counts}): raise --max-prompt-length or --max-length")
    return pairs, counts


def recorded_logps(row):
    """[log pi_{t-1}(y_w | x), log pi_{t-1}(y_l | x)] where 03 recorded those of both responses, else None."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        first, second = map(float, row["logps"]["policy"])
        return [first, second] if row["p"] > 0.5 else [second, first]


def keep_recorded(pairs, ref, device):
    """Log-probs that 03 recorded are those of pi_ref, unless it is another model or computes in another dtype.

    Seen on a few pairs. Where they are not, they are dropped, to be computed here.
    """
    known = [pair for pair in pairs if pair["logps_ref"]][:8]
    logps = common.pair_logps(ref, known, device) if known else []
    same = np.allclose(logps, [pair["logps_ref"] for pair in known], rtol=1e-4, atol=1e-3)
    if not all(common.gather([same])):  # on every rank, or they would not share the same batches
        for pair in pairs:
            pair["logps_ref"] = None


def pair_length(pair):
    return len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"])


def pair_losses(policy, ref, batch, logps_ref, tau, atoms, args):
    """Eq. 10 of the b pairs in a batch: losses (b,), what is logged {name: (b,)}

    logps_ref: (b, 2), y_w and y_l, all that is needed of pi_ref where ref is None; else Eq. 12 is taken of its logits.
    atoms: (2, b), moved and shift of each pair, of which only --refine worst-case makes use.
    """
    def logps(logp):
        return common.response_logps(logp, batch.lengths).view(-1, 2)

    with common.autocast(batch.ids.device):
        if ref is None:
            logps_theta = logps_tilde = logps(policy(batch))  # (b, 2)
        else:
            logp_theta, logp_ref, logp_tilde = policy(
                batch, ref, lambda logits_theta, logits_ref: extrapolate(logits_theta, logits_ref, args.lam))  # (N,)
            logps_theta, logps_ref, logps_tilde = logps(logp_theta), logps(logp_ref), logps(logp_tilde)
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    with torch.no_grad():
        confidence = torch.sigmoid(dpo_margin(logps_tilde, logps_ref, args.beta))  # p_theta~(y_w > y_l | x), (b,)
        z = (confidence < tau).float()  # Eq. 9 with --refine self, Eq. 11 with decoupled
    losses = refined_loss(margin, z, args.alpha)
    if args.refine == "worst-case":
        losses, z = worst_case_loss(margin, *atoms, args.xi_min), atoms[0]
    chosen, rejected = logps_theta.unbind(1)
    return losses, {"loss": losses, "margin": margin, "accuracy": (margin > 0).float(),
                    "logp_chosen": chosen, "logp_rejected": rejected, "confidence": confidence, "flagged": z}


def solve_now(step, steps, args):
    """Whether the worst distribution is due: when refinement sets in, then at every epoch's start or as asked."""
    first, every = math.ceil(args.refine_after * steps), args.resolve_steps or steps // args.epochs
    return args.refine == "worst-case" and (step == first or step > first and step % every == 0)


@torch.no_grad()
def place_atoms(policy, span, pairs, args, ranks):
    """Give every pair of D_t its [moved, shift] of the worst distribution near the current model's confidences."""
    lengths, known = [pair_length(pair) for pair in pairs], []
    batches = common.length_batches(lengths, args.micro_batch_size, args.micro_batch_tokens)
    for indices, weight in common.in_turn(batches, ranks):
        batch, logps_ref, atoms = on_device([pairs[i] for i in indices], span, ranks.device)
        _, logged = pair_losses(policy, None, batch, logps_ref, 0.0, atoms, args)
        known += weight * list(zip(indices, logged["confidence"].tolist()))
    xi = np.array([confidence for _, confidence in sorted(common.gather(known))])  # (N,), p_theta(y_w > y_l | x_i)
    for pair, *atoms in zip(pairs, *worst_distribution(xi, args.epsilon, args.pieces, args.xi_min)):
        pair["atoms"] = [float(value) for value in atoms]


def on_device(micro, span, device):
    """The Batch of the b pairs of a micro-batch, and what is known of them: logps_ref (b, 2), atoms (2, b)"""
    batch = common.collate([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in micro], device, span)
    logps_ref = torch.tensor([pair["logps_ref"] or [0.0, 0.0] for pair in micro], device=device)  # where none is needed
    return batch, logps_ref, torch.tensor([pair["atoms"] for pair in micro], device=device).T


def logits_from(steps, args):
    """The step from which Eq. 12 needs logits of pi_ref, not log-probs alone: tau is taken of a window before it."""
    if args.refine != "decoupled" or args.lam == 0:
        return len(steps)
    first = start = math.ceil(args.refine_after * len(steps))
    while first > 0 and sum(map(len, steps[first:start])) < args.window:
        first -= 1
    return first


def load_reference(pairs, steps, args, partial, ranks):
    """(pi_ref, the step from which its logits are needed). Before that its log-probs are enough: pair["logps_ref"]."""
    ref = common.load_reference(args.ref_model or args.model, args, ranks)
    for pair in pairs:
        common.check_ids(args.input, pair["id"], pair["prompt"] + pair["chosen"] + pair["rejected"], ref.model)
    keep_recorded(pairs, ref, ranks.device)
    live_from = logits_from(steps, args)
    before = sorted({i for step in steps[:live_from] for i in step})
    common.store_logps(ref, [pairs[i] for i in before if not pairs[i]["logps_ref"]], args, partial, ranks)
    if live_from == len(steps):
        return None, live_from
    if common.is_sharded(args, ranks):
        common.shard(ref, ranks, "hidden")  # which the policy's forward calls
    return ref, live_from


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(args)
    pairs, counts = read_pairs(args)
    if args.ref_model:
        common.check_same_vocabulary(args.model, args.ref_model)

    steps = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed)
    ref, live_from = load_reference(pairs, steps, args, partial, ranks)
    model, policy = common.load_policy(args, ranks)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(steps))
    state = common.load_state(partial, ranks, model, optimizer, scheduler)
    window = deque(state.get("window", []), maxlen=args.window)  # p_theta~ of the latest pairs of all ranks
    refine_from = args.refine_after * len(steps) if args.refine in ("self", "decoupled") else math.inf
    for pair, atoms in zip(pairs, state.get("atoms", [[0.0, 0.0]] * len(pairs))):
        pair["atoms"] = atoms  # of the worst distribution: nothing is moved yet

    progress = common.progress(range(state["step"], len(steps)), "refined DPO", ranks)
    for step in progress:
        batch_pairs, rows = [pairs[i] for i in steps[step]], []
        micros = common.micro_batches(batch_pairs, args, ranks, pair_length)
        ready = step >= refine_from and len(window) == args.window
        tau = threshold(window, args.k_percent) if ready else 0.0  # p_theta~ < 0 never holds: nothing is flagged
        if solve_now(step, len(steps), args):
            place_atoms(policy, model.shared_span, pairs, args, ranks)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch, logps_ref, atoms = on_device(micro, model.shared_span, ranks.device)
            live = ref if step >= live_from else None
            with common.sync(policy, last=k == len(micros) - 1):
                losses, logged = pair_losses(policy, live, batch, logps_ref, tau, atoms, args)
                # the mean over the step's pairs, whatever the micro-batches; DDP divides by the ranks
                (weight * losses.sum() / len(batch_pairs) * ranks.world).backward()
            if step < live_from < len(steps):
                del logged["confidence"]  # theta's, where theta~'s is wanted later
            rows += weight * common.pair_rows(micro, logged)

        grad_norm = common.clip_gradient(model)
        position = {pair["id"]: k for k, pair in enumerate(batch_pairs)}  # the window's order, whatever the ranks
        rows = sorted(common.gather(rows), key=lambda row: position[row["id"]])
        window.extend(row["confidence"] for row in rows if "confidence" in row)
        common.check_finite(step, rows, grad_norm, partial)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            common.log_step(partial, progress, step, rows, tau=tau, grad_norm=grad_norm, lr=lr)
        if common.save_due(step + 1, len(steps), args.save_every):
            common.save_state(partial, ranks, step + 1, model, optimizer, scheduler, window=list(window),
                              atoms=[pair["atoms"] for pair in pairs])

    counts["steps"] = len(steps)
    common.save_trained(args, partial, ranks, model, tokenizer, counts, started)


if __name__ == "__main__":
    common.run(main)
