"""Algorithm 1, line 3, first half: for each x in X_t sample y_1, y_2 ~ pi_{t-1}(.|x).

Two responses, temperature 0.7 (Section 5.1), at most 300 new tokens (App. B.4).

Reads  prompts_t.jsonl    {"id": "12", "prompt": [{"role": "user", "content": "Name a fish."}]}
Writes responses_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...], "responses":
                           [{"text": "The eel.", "ids": [415, 317, 301, 28723, 2], "finish": "eos"}, {...}]}

    python 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl
    torchrun --nproc-per-node 4 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl

Every token is decided by one number, drawn from (seed, prompt id, sample, step), so a response is the same on any
number of ranks and after a restart. Its ids, not its text, are what is judged and trained on.

Departs from the paper: the paper does not say what becomes of a response that hit the limit (--cut).
"""

import time

import numpy as np

import common

CUT = """what becomes of a response that hit the limit.
eos: it is kept as if finished, with an end token after it, as in the authors' release (the log-ratio of that end
token then speaks of the limit, not of the response). open: it is kept without one; trained on, nothing teaches it to
end. drop: it is dropped, and its prompt with it where fewer than two are left; unbiased labels, but only if the limit
lies well above a normal answer"""


def parse_args():
    parser = common.Parser(description="Sample responses from pi_{t-1} for the prompts X_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}")
    add("--input", required=True, help="X_t: JSON Lines of id, prompt")
    add("--output", required=True, help="JSON Lines of id, prompt, prompt_ids, responses")
    add("--tokenizer", help="folder or name of a tokenizer, where --model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    # Section 5.1, App. B.4
    add("--samples", type=common.number(int, 2), default=2, help="responses per prompt")
    add("--temperature", type=common.nonnegative, default=0.7, help="0 takes the likeliest token")
    add("--max-new-tokens", type=common.positive, default=300)
    add("--cut", choices=("eos", "open", "drop"), default="eos", help=CUT)
    add("--seed", type=common.natural, default=0, help="another seed, other samples")
    # lengths, memory
    add("--max-prompt-length", type=common.positive, default=1024, help="longer prompts are dropped")
    add("--micro-batch-size", type=common.positive, default=16, help="prompts sampled at a time by one rank")
    return parser.parse_args()


def read_prompts(args, tokenizer):
    """The rows with their prompt_ids, less those that are too long, and how many there are."""
    def prepare(row):
        row["prompt_ids"] = common.prompt_ids(tokenizer, row["prompt"], f"{args.input}, id {row['id']}")
        return row if len(row["prompt_ids"]) <= args.max_prompt_length else None

    rows = common.Rows(args.input, {"id": common.an_id, "prompt": common.a_prompt}, prepare)
    if not len(rows):
        raise common.InputError(f"{args.input}: all {rows.read} prompts are longer than --max-prompt-length "
                                f"{args.max_prompt_length}: raise it")
    return rows, {"prompts read": rows.read, "too long": rows.read - len(rows)}


def settle_cut(ids, finish, cut, eos):
    """The ids of a response that hit the limit, by --cut; None drops it."""
    if finish == "eos" or cut == "open":
        return ids
    return ids + [eos] if cut == "eos" else None


def records(args, rows, sampled, tokenizer, ends, counts):
    """Yields the records, with the responses that hit the limit settled, and counts what becomes of them."""
    counts |= {"responses": 0, "tokens": 0, "cut at the limit": 0, "dropped for a cut response": 0, "prompts kept": 0}
    for row, samples in zip(rows, sampled, strict=True):
        responses = []
        for ids, finish in samples:
            counts["responses"] += 1
            counts["tokens"] += len(ids)
            counts["cut at the limit"] += finish == "length"
            ids = settle_cut(ids, finish, args.cut, ends[0])
            if ids is not None:
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                responses.append({"text": text, "ids": ids, "finish": finish})
        if len(responses) < 2:
            counts["dropped for a cut response"] += 1
        else:
            counts["prompts kept"] += 1
            yield {key: row[key] for key in ("id", "prompt", "prompt_ids")} | {"responses": responses}


def write(args, partial, rows, sampled, tokenizer, ends, counts, started):
    common.write_jsonl(partial / "responses", records(args, rows, sampled, tokenizer, ends, counts))
    if not counts["prompts kept"]:
        raise common.InputError(f"{args.model}: every response hit the limit of {args.max_new_tokens} tokens: "
                                "raise --max-new-tokens or choose another --cut")
    common.close_output(args, partial, partial / "responses", counts, started)


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "input")
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(args)
    rows, counts = read_prompts(args, tokenizer)
    ends = common.end_ids(args.model, tokenizer)
    model = common.load_model(args.model, ranks.device, common.scoring_dtype(ranks.device))

    def generate(batch):
        u = np.array([[common.uniforms(args.seed, row["id"], k, args.max_new_tokens)
                       for k in range(args.samples)] for row in batch])
        return common.sample(model, [row["prompt_ids"] for row in batch], u, args.temperature,
                             args.max_new_tokens, ends)

    def length(row):
        return len(row["prompt_ids"])

    sampled = common.map_rows(generate, rows, length, args.micro_batch_size, partial, ranks, "sampling")
    common.on_first_rank(lambda: write(args, partial, rows, sampled, tokenizer, ends, counts, started), ranks)


if __name__ == "__main__":
    common.run(main)
