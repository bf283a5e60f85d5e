"""Algorithm 1, line 1: "Obtaining an initial weakly aligned model pi_0 using DPO with pi_init and D_0".

    p_theta(y_w > y_l | x) = sigmoid(  beta log[pi_theta(y_w | x) / pi_ref(y_w | x)]
                                     - beta log[pi_theta(y_l | x) / pi_ref(y_l | x)])       (5)
    L_DPO = E[-log p_theta(y_w > y_l | x)]                                                  (6)

pi_theta starts as pi_init, and pi_ref is pi_init. pi_ref does not change, so its log-probs are computed once.

Reads  seed.jsonl    {"id": "7", "prompt": "Name a fish.", "chosen": "The eel.", "rejected": "A whale."}
                     a prompt may be a list of messages, of any number of turns
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 01_seed_dpo.py --model pi_init --input seed.jsonl --output pi_0
    torchrun --nproc-per-node 4 01_seed_dpo.py --model pi_init --input seed.jsonl --output pi_0

Departs from the paper: nowhere. Choices that it leaves open: the gradient norm is clipped at 1.0, weight decay and
dropout are 0, responses are cut where prompt and response exceed 2,048 tokens, and pairs with a prompt of more than
1,024, or with equal responses, are dropped.
"""

import torch.nn.functional as F

import common
from support import chat, data, models, records, runs


def dpo_margin(logps_theta, logps_ref, beta):
    """The argument of the sigmoid in Eq. 5. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


def dpo_loss(margin):
    """Eq. 6 for each pair: -log p_theta(y_w > y_l | x). (b,) -> (b,)"""
    return -F.logsigmoid(margin)


def parse_args():
    parser = runs.Parser(description="DPO on the seed preferences D_0: pi_init -> pi_0.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_init: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 (default: --model)")
    add("--input", required=True, nargs="+", help="D_0: JSON Lines of id, prompt, chosen, rejected")
    add("--output", required=True, help="folder for pi_0")
    chat.add_options(add)
    # Section 5.1
    add("--beta", type=runs.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=runs.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=runs.positive, default=3)
    add("--batch-size", type=runs.positive, default=32, help="pairs per optimizer step, over all ranks")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the pairs")
    runs.add_training_options(add, "pairs", micro_batch_size=4)
    return parser.parse_args()


def pair_losses(policy, batch, logps_ref, args):
    """(Eq. 6 of each of b pairs, (b,); {metric: (b,)} to log). logps_ref: (b, 2), of y_w and y_l"""
    with common.autocast(batch.ids.device):
        logp_theta = policy(batch)  # (N,)
    logps_theta = common.response_logps(logp_theta, batch.lengths).view(-1, 2)  # of y_w and y_l in turn
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    losses = dpo_loss(margin)
    return losses, common.pair_metrics(losses, margin, logps_theta, logps_ref, args.beta)


def main():
    args = parse_args()
    # inputs
    work = runs.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    pairs, counts = data.read_pairs(args, tokenizer, records.LABELLED)  # "prompt", "chosen", "rejected": ids
    batches = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed, " ".join(args.input))
    # models
    if args.ref_model:
        models.check_same_vocabulary(args.model, args.ref_model)
    ref = models.load_reference(args.ref_model or args.model, pairs, args, ranks)
    common.store_logps(ref, pairs, args, work, ranks)
    del ref
    model, policy = models.load_policy(args, ranks)  # policy(batch): log-probs of the model, under DDP or FSDP
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(work, ranks, model, optimizer, scheduler)

    bar = runs.progress(range(state["step"], len(batches)), "seed DPO", ranks)
    for step in bar:
        step_pairs, logged_rows = [pairs[i] for i in batches[step]], []
        micros = common.micro_batches(step_pairs, args, ranks)  # [(pairs, weight)] of this rank
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch, logps_ref = common.collate_pairs(micro, model)
            with common.grad_sync(policy, last=(k == len(micros) - 1)):
                losses, logged = pair_losses(policy, batch, logps_ref, args)
                (weight * losses.sum() / len(step_pairs)).backward()  # over all micro-batches and ranks: the mean
            logged_rows += common.per_row(micro, logged, weight)

        grad_norm = common.clip_gradient(model)
        logged_rows = ranks.gather(logged_rows)
        runs.check_finite(step, logged_rows, grad_norm, work)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            runs.log_step(work, bar, step, logged_rows, grad_norm=grad_norm, learning_rate=lr)
        runs.save_if_due(args.save_every, len(batches), work, ranks, step + 1, model, optimizer, scheduler)

    counts["steps"] = len(batches)
    models.save_trained(args, work, ranks, model, tokenizer, counts)


if __name__ == "__main__":
    runs.run(main)
