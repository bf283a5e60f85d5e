"""Algorithm 1's input pi_init: supervised fine-tuning (App. B.1), cross-entropy on the response's tokens.

    L_SFT = E[-log pi_theta(y | x)], a mean over the response tokens of a step, with --all-turns also over those of the
    assistant's earlier turns

Reads  sft.jsonl    {"id": "7", "prompt": "Name a fish.", "response": "The eel."}
                    a prompt may be a list of messages, of any number of turns
Writes a model folder with metrics.jsonl (one line a step) and args.json

    python 00_sft.py --model base --input sft.jsonl --output pi_init
    torchrun --nproc-per-node 4 00_sft.py --model base --input sft.jsonl --output pi_init --all-turns

Departs from the paper: App. B.1 does not say which tokens are trained. The recipe it follows (the alignment handbook's)
packs conversations into blocks of 2048 tokens and trains on every token, the user's too.
"""

from array import array

import torch

import common
from support import chat, model_checks, models, records, runs


def parse_args():
    parser = runs.Parser(description="Supervised fine-tuning of a base model: the initial LLM pi_init.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="the base model")
    add("--input", required=True, help="JSON Lines of id, prompt, response")
    add("--output", required=True, help="folder for pi_init")
    chat.add_options(add)
    # App. B.1
    add("--lr", type=runs.nonnegative, default=2e-5, help="peak learning rate")
    add("--epochs", type=runs.positive, default=1)
    add("--batch-size", type=runs.positive, default=128, help="responses per optimizer step, over all ranks")
    add("--seed", type=runs.natural, default=0, help="random seed for the order of the rows")
    add("--all-turns", action="store_true", help="also train on the assistant's turns within the prompt")
    runs.add_training_options(add, "conversations", micro_batch_size=8)
    return parser.parse_args()


def tokenize(args, row, tokenizer, eos):
    """(token ids of a conversation, 1 for each of them that is trained and 0 for the others, earlier turns left out)"""
    def turn(messages, text):
        prompt = chat.prompt_ids(tokenizer, messages, f"{args.input}, id {row['id']}")
        return prompt, chat.response_ids(tokenizer, messages, prompt, text, eos)

    messages, left_out = row["prompt"], 0
    prompt, response = turn(messages, row["response"])
    ids, trained = prompt + response, [0] * len(prompt) + [1] * len(response)
    for k in range(1, len(messages)) if args.all_turns else ():
        if [m["role"] for m in messages[k - 1:k + 1]] == ["user", "assistant"]:
            prompt, response = turn(messages[:k], messages[k]["content"])
            end = len(prompt) + len(response)
            if ids[:end] == prompt + response and records.is_text(messages[k]["content"]):
                trained[len(prompt):end] = [1] * len(response)
            else:  # within a conversation the template writes it in another way, say without its thoughts
                left_out += 1
    return ids, trained, left_out


def read_examples(args, tokenizer):
    """([{"id", "prompt", "response", "trained"}], counts of what was read and dropped)

    prompt: the token ids before the first that is trained; response: the others; trained: 1 or 0 for each of these
    """
    rows = records.read_jsonl(args.input, records.EXAMPLES)
    eos, examples, all_left_out = chat.eos_ids(args.model, tokenizer), [], 0
    for row in rows:
        ids, trained, left_out = tokenize(args, row, tokenizer, eos)
        start = trained.index(1)
        if start <= min(args.max_prompt_length, args.max_length - 1):
            examples.append({"id": row["id"], "prompt": array("i", ids[:start]),
                             "response": array("i", ids[start:args.max_length]),
                             "trained": array("b", trained[start:args.max_length])})
            all_left_out += left_out
    if not examples:
        raise runs.InputError(f"{args.input}: all {len(rows)} prompts are too long: raise --max-prompt-length or "
                              "--max-length")
    counts = {"rows read": len(rows), "dropped as too long": len(rows) - len(examples)}
    return examples, counts | ({"earlier turns left out": all_left_out} if args.all_turns else {})


def main():
    args = parse_args()
    work = runs.open_output(args, "model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    examples, counts = read_examples(args, tokenizer)

    model, policy = models.load_policy(args, ranks)  # policy(batch): log-probs of the model, under DDP or FSDP
    fits = [row for row in examples if common.row_length(row) <= model_checks.count_positions(model)]
    counts["dropped as too long"] += len(examples) - len(fits)
    examples = fits or examples  # where none fits, the first is named
    model_checks.check_limits(args.input, ((row["id"], row["prompt"], [row["response"]]) for row in examples), model,
                              "--max-length")
    batches = common.epoch_batches(len(examples), args.batch_size, args.epochs, args.seed, args.input)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    state = runs.load_state(work, ranks, model, optimizer, scheduler)

    bar = runs.progress(range(state["step"], len(batches)), "SFT", ranks)
    for step in bar:
        step_examples, logged_rows = [examples[i] for i in batches[step]], []
        tokens = sum(sum(example["trained"]) for example in step_examples)
        micros = common.micro_batches(step_examples, args, ranks)
        optimizer.zero_grad()
        for k, (micro, weight) in enumerate(micros):
            batch = common.collate([(example["prompt"], [example["response"]]) for example in micro], ranks.device)
            trained = torch.tensor([z for example in micro for z in example["trained"]], device=ranks.device)  # (N,)
            with common.grad_sync(policy, last=(k == len(micros) - 1)):
                with common.autocast(ranks.device):
                    logp_theta = policy(batch)  # (N,)
                losses = -common.response_logps(trained * logp_theta, batch.lengths)  # (b,)
                (weight * losses.sum() / tokens).backward()  # over all micro-batches and ranks: the mean over tokens
            # scaled so that the mean over the step's rows, which log_step takes, is the mean over its tokens
            logged_rows += common.per_row(micro, {"loss": losses / tokens * len(step_examples)}, weight)

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
