"""Algorithm 1, line 3, first half: for each x in X_t sample y_1, y_2 ~ pi_{t-1}(.|x).

Two responses, temperature 0.7 (Section 5.1), at most 300 new tokens (App. B.4).

Reads  prompts_t.jsonl    {"id": "12", "prompt": [{"role": "user", "content": "Name a fish."}]}
Writes responses_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...], "responses":
                           [{"text": "The eel.", "ids": [415, 317, 301, 28723, 2], "finish": "eos"}, {...}]}

    python 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl
    torchrun --nproc-per-node 4 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl

Every token is decided by one uniform number, drawn from (seed, prompt id, sample, step), so a response is the same on
any number of ranks and after resuming. Its ids, not its text, are judged and trained on.

Departs from the paper: nowhere. Choices that it leaves open: prompts of more than 1,024 tokens are dropped
(--max-prompt-length), and a response that hits the length limit gets an EOS (--on-length-limit).
"""

import numpy as np

import common
from support import chat, data, model_checks, models, runs

ON_LENGTH_LIMIT = """what to do with a response of --max-new-tokens tokens without an EOS.
eos: append one, as in the authors' release (it was not sampled, so its log-ratio is noise).
open: keep it without an EOS (nothing then teaches the model to end it).
drop: drop it, and its prompt where fewer than two are left (set the limit well above a normal answer)."""


def parse_args():
    parser = runs.Parser(description="Sample responses from pi_{t-1} for the prompts X_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}")
    add("--input", required=True, help="X_t: JSON Lines of id, prompt")
    add("--output", required=True, help="JSON Lines of id, prompt, prompt_ids, responses")
    chat.add_options(add)
    # Section 5.1, App. B.4
    add("--samples", type=runs.number(int, 2), default=2, help="responses to each prompt")
    add("--temperature", type=runs.nonnegative, default=0.7, help="0: greedy")
    add("--max-new-tokens", type=runs.positive, default=300)
    add("--on-length-limit", choices=("eos", "open", "drop"), default="eos", help=ON_LENGTH_LIMIT)
    add("--seed", type=runs.natural, default=0, help="random seed")
    # lengths, memory
    add("--max-prompt-length", type=runs.positive, default=1024, help="longer prompts are dropped")
    add("--micro-batch-size", type=runs.positive, default=16, help="prompts sampled at a time by one rank")
    return parser.parse_args()


def sample(args, work, ranks, rows, eos):
    """y_1, y_2 ~ pi_{t-1}(.|x) for the prompt of each row: [[([415, 2], "eos"), ([9, 7], "length")], ...]"""
    model = models.load_model(args.model, ranks.device, common.scoring_dtype(ranks.device))
    model_checks.check_limits(args.input, ((row["id"], row["prompt_ids"], []) for row in rows), model,
                              "--max-prompt-length or --max-new-tokens", args.max_new_tokens)

    def generate(batch):
        u = np.array([[common.uniforms(args.seed, row["id"], k, args.max_new_tokens)
                       for k in range(args.samples)] for row in batch])
        return common.sample_responses(model, [row["prompt_ids"] for row in batch], u, args.temperature,
                                       args.max_new_tokens, eos)

    return common.map_rows(generate, rows, args.micro_batch_size, work, ranks, "sampling")


def main():
    args = parse_args()
    work = runs.open_output(args, "model", "input")
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    rows, counts = data.read_prompts(args.input, tokenizer, args.max_prompt_length)
    eos = chat.eos_ids(args.model, tokenizer)
    sampled = sample(args, work, ranks, rows, eos)

    def write():
        runs.write_jsonl(work / "responses", data.make_records(args, rows, sampled, tokenizer, eos, counts))
        runs.close_output(args, work, work / "responses", counts)

    ranks.on_first(write)


if __name__ == "__main__":
    runs.run(main)
