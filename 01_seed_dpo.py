"""Algorithm 1, line 1: "Obtaining an initial weakly aligned model pi_0 using DPO with pi_init and D_0".

    p_theta(y_w > y_l | x) = sigmoid(  beta log[pi_theta(y_w | x) / pi_ref(y_w | x)]
                                     - beta log[pi_theta(y_l | x) / pi_ref(y_l | x)])       (5)
    L_DPO = E[-log p_theta(y_w > y_l | x)]                                                  (6)

pi_theta starts as pi_init, and pi_ref is pi_init.

Reads  seed.jsonl    {"id": "7", "prompt": "Name a fish.", "chosen": "The eel.", "rejected": "A whale."}
                     a prompt may be a list of messages, of any number of turns
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 01_seed_dpo.py --model pi_init --input seed.jsonl --output pi_0
    torchrun --nproc-per-node 4 01_seed_dpo.py --model pi_init --input seed.jsonl --output pi_0

Departs from the paper: none.
"""

import time
from array import array

import torch
import torch.nn.functional as F

import common


def dpo_margin(logps_theta, logps_ref, beta):
    """What the sigmoid of Eq. 5 is taken of. Summed log-probs (b, 2) of y_w and y_l -> (b,)"""
    chosen, rejected = (logps_theta - logps_ref).unbind(1)
    return beta * chosen - beta * rejected


def dpo_loss(margin):
    """Eq. 6 for each pair: -log p_theta(y_w > y_l | x). (b,) -> (b,)"""
    return -F.logsigmoid(margin)


def parse_args():
    parser = common.Parser(description="DPO on the seed preferences D_0: pi_init -> pi_0.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_init: where pi_theta starts")
    add("--ref-model", help="pi_ref in Eq. 5 (default: --model)")
    add("--input", required=True, help="D_0: JSON Lines of id, prompt, chosen, rejected")
    add("--output", required=True, help="folder for pi_0")
    add("--tokenizer", help="folder or name of a tokenizer, where --model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    # Section 5.1
    add("--beta", type=common.nonnegative, default=0.1, help="KL strength, beta in Eq. 5")
    add("--lr", type=common.nonnegative, default=5e-7, help="peak learning rate, eta")
    add("--epochs", type=common.positive, default=3)
    add("--batch-size", type=common.positive, default=32, help="pairs of one optimizer step, over all ranks")
    add("--seed", type=common.natural, default=0, help="decides the order of the pairs")
    # lengths, memory, safety
    add("--max-prompt-length", type=common.positive, default=1024, help="pairs with a longer prompt are dropped")
    add("--max-length", type=common.number(int, 2), default=2048, help="prompt and response; responses are cut to fit")
    add("--micro-batch-size", type=common.positive, default=4, help="pairs of one forward pass of a rank, at most")
    add("--micro-batch-tokens", type=common.positive, help="tokens of one, at most, if it has several pairs")
    add("--activation-checkpointing", action="store_true", help="less memory for more compute")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the ranks, for less memory")
    add("--save-every", type=common.positive, default=100, help="steps between states to go on from")
    return parser.parse_args()


def read_pairs(args, tokenizer):
    """[{"id", "prompt", "chosen", "rejected"}] with token ids in the place of texts, and what was dropped."""
    rows = common.stream_jsonl(args.input, {"id": common.an_id, "prompt": common.a_prompt,
                                            "chosen": common.a_text, "rejected": common.a_text})
    ends, pairs = common.end_ids(args.model, tokenizer), []
    counts = {"pairs read": 0, "prompt too long": 0, "same after cutting": 0}
    for row in rows:
        counts["pairs read"] += 1
        prompt = common.prompt_ids(tokenizer, row["prompt"], f"{args.input}, id {row['id']}")
        if len(prompt) > min(args.max_prompt_length, args.max_length - 1):
            counts["prompt too long"] += 1
            continue
        chosen, rejected = (common.response_ids(tokenizer, row["prompt"], prompt, row[key], ends)
                            [:args.max_length - len(prompt)] for key in ("chosen", "rejected"))
        if chosen == rejected:
            counts["same after cutting"] += 1
            continue
        # 4 bytes a token; in a list a token is an object, and takes 40
        pairs.append({"id": row["id"], "prompt": array("i", prompt), "chosen": array("i", chosen),
                      "rejected": array("i", rejected)})
    if not pairs:
        raise common.InputError(f"{args.input}: no pair is left ({counts}): raise --max-prompt-length or --max-length")
    return pairs, counts


def pair_length(pair):
    return len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"])


def pair_losses(policy, batch, logps_ref, args):
    """Eq. 6 of the b pairs in a batch: losses (b,), what is logged {name: (b,)}. logps_ref: (b, 2), y_w and y_l"""
    with common.autocast(batch.ids.device):
        logp_theta = policy(batch)  # (N,)
    logps_theta = common.response_logps(logp_theta, batch.lengths).view(-1, 2)
    margin = dpo_margin(logps_theta, logps_ref, args.beta)  # (b,)
    losses = dpo_loss(margin)
    chosen, rejected = logps_theta.unbind(1)
    return losses, {"loss": losses, "margin": margin, "accuracy": (margin > 0).float(),
                    "logp_chosen": chosen, "logp_rejected": rejected}


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "ref_model", "input")
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(args)
    pairs, counts = read_pairs(args, tokenizer)
    if args.ref_model:
        common.check_same_vocabulary(args.model, args.ref_model)

    ref = common.load_reference(args.ref_model or args.model, args, ranks)
    common.store_logps(ref, pairs, args, partial, ranks)  # pi_ref does not change: once is enough
    del ref
    model, policy = common.load_policy(args, ranks)
    steps = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(steps))
    state = common.load_state(partial, ranks, model, optimizer, scheduler)

    progress = common.progress(range(state["step"], len(steps)), "seed DPO", ranks)
    for step in progress:
        batch_pairs, rows = [pairs[i] for i in steps[step]], []
        micros = common.micro_batches(batch_pairs, args, ranks, pair_length)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch = common.collate([(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in micro],
                                   ranks.device, model.shared_span)
            logps_ref = torch.tensor([pair["logps_ref"] for pair in micro], device=ranks.device)  # (b, 2)
            with common.sync(policy, last=k == len(micros) - 1):
                losses, logged = pair_losses(policy, batch, logps_ref, args)
                # the mean over the step's pairs, whatever the micro-batches; DDP divides by the ranks
                (weight * losses.sum() / len(batch_pairs) * ranks.world).backward()
            rows += weight * common.pair_rows(micro, logged)

        grad_norm = common.clip_gradient(model)
        rows = common.gather(rows)
        common.check_finite(step, rows, grad_norm, partial)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            common.log_step(partial, progress, step, rows, grad_norm=grad_norm, lr=lr)
        if common.save_due(step + 1, len(steps), args.save_every):
            common.save_state(partial, ranks, step + 1, model, optimizer, scheduler)

    counts["steps"] = len(steps)
    common.save_trained(args, partial, ranks, model, tokenizer, counts, started)


if __name__ == "__main__":
    common.run(main)
