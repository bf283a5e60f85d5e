"""Algorithm 1's input pi_init: supervised fine-tuning (App. B.1), cross-entropy on the response's tokens only.

    L_SFT = E[-log pi_theta(y | x)], a mean over the response tokens of a step

Reads  sft.jsonl    {"id": "7", "prompt": "Name a fish.", "response": "The eel."}
                    a prompt may be a list of messages, of any number of turns
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 00_sft.py --model base --input sft.jsonl --output pi_init
    torchrun --nproc-per-node 4 00_sft.py --model base --input sft.jsonl --output pi_init

Departs from the paper: none.
"""

from array import array

import common
import runs


def parse_args():
    parser = runs.Parser(description="Supervised fine-tuning of a base model: the initial LLM pi_init.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="the base model")
    add("--input", required=True, help="JSON Lines of id, prompt, response")
    add("--output", required=True, help="folder for pi_init")
    add("--tokenizer", help="tokenizer folder or Hub name (default: --model's)")
    add("--chat-template", help="Jinja chat template file (default: the tokenizer's)")
    # App. B.1
    add("--lr", type=runs.nonnegative, default=2e-5, help="peak learning rate")
    add("--epochs", type=runs.positive, default=1)
    add("--batch-size", type=runs.positive, default=128, help="responses per optimizer step, over all ranks")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the rows")
    # lengths, memory, safety
    add("--max-prompt-length", type=runs.positive, default=1024, help="rows with a longer prompt are dropped")
    add("--max-length", type=runs.number(int, 2), default=2048, help="prompt + response; responses are cut to fit")
    add("--micro-batch-size", type=runs.positive, default=8, help="most responses per forward pass on a rank")
    add("--micro-batch-tokens", type=runs.positive, help="most tokens of one (a single response may exceed it)")
    add("--activation-checkpointing", action="store_true", help="less memory for more compute")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the ranks, for less memory")
    add("--save-every", type=runs.positive, default=100, help="save a state to resume from every N steps")
    return parser.parse_args()


def read_examples(args, tokenizer):
    """([{"id", "prompt", "response"}] with token ids, counts of what was read and dropped)"""
    rows = runs.read_jsonl(args.input, runs.EXAMPLES)
    eos, examples = common.eos_ids(args.model, tokenizer), []
    for row in rows:
        prompt = common.prompt_ids(tokenizer, row["prompt"], f"{args.input}, id {row['id']}")
        if len(prompt) <= min(args.max_prompt_length, args.max_length - 1):
            response = common.response_ids(tokenizer, row["prompt"], prompt, row["response"], eos)
            response = response[:args.max_length - len(prompt)]
            examples.append({"id": row["id"], "prompt": array("i", prompt), "response": array("i", response)})
    if not examples:
        raise runs.InputError(f"{args.input}: all {len(rows)} prompts are too long: raise --max-prompt-length or "
                              "--max-length")
    return examples, {"rows read": len(rows), "dropped as too long": len(rows) - len(examples)}


def main():
    args = parse_args()
    partial = runs.open_output(args, "model", "input")
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    examples, counts = read_examples(args, tokenizer)

    model, policy = common.load_policy(args, ranks)
    common.check_limits(args.input, ((row["id"], row["prompt"], [row["response"]]) for row in examples), model,
                        "--max-length")
    batches = common.epoch_batches(len(examples), args.batch_size, args.epochs, args.seed, args.input)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(partial, ranks, model, optimizer, scheduler)

    bar = common.progress(range(state["step"], len(batches)), "SFT", ranks)
    for step in bar:
        step_examples, logged_rows = [examples[i] for i in batches[step]], []
        tokens = sum(len(example["response"]) for example in step_examples)
        micros = common.micro_batches(step_examples, args, ranks)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch = common.collate([(example["prompt"], [example["response"]]) for example in micro], ranks.device)
            with common.grad_sync(policy, last=k == len(micros) - 1):
                with common.autocast(ranks.device):
                    logp_theta = policy(batch)  # (N,)
                losses = -common.response_logps(logp_theta, batch.lengths)  # (b,)
                # these add up to the mean over the step's response tokens; DDP and FSDP average over the ranks
                (weight * losses.sum() / tokens * ranks.world).backward()
            # scaled so that the mean over the step's rows, which log_step takes, is the mean over its tokens
            logged_rows += common.per_row(micro, {"loss": losses / tokens * len(step_examples)}, weight)

        grad_norm = common.clip_gradient(model)
        logged_rows = ranks.gather(logged_rows)
        common.check_finite(step, logged_rows, grad_norm, partial)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        if ranks.rank == 0:
            common.log_step(partial, bar, step, logged_rows, grad_norm=grad_norm, lr=lr)
        if runs.save_due(step + 1, len(batches), args.save_every, ranks):
            runs.save_state(partial, ranks, step + 1, model, optimizer, scheduler)

    counts["steps"] = len(batches)
    common.save_trained(args, partial, ranks, model, tokenizer, counts)


if __name__ == "__main__":
    runs.run(main)
