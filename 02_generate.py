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
    """Rows with their prompt_ids, and what was dropped."""
    rows = common.read_jsonl(args.input, {"id": common.an_id, "prompt": common.a_prompt})
    counts = {"prompts read": len(rows), "too long": 0}
    for row in rows:
        row["prompt_ids"] = common.prompt_ids(tokenizer, row["prompt"], f"{args.input}, id {row['id']}")
    kept = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    counts["too long"] = len(rows) - len(kept)
    if not kept:
        raise common.InputError(f"{args.input}: all {len(rows)} prompts are longer than --max-prompt-length "
                                f"{args.max_prompt_length}: raise it")
    return kept, counts


def settle_cut(ids, finish, cut, eos):
    """The ids of a response that hit the limit, by --cut; None drops it."""
    if finish == "eos" or cut == "open":
        return ids
    return ids + [eos] if cut == "eos" else None


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "input")
    ranks = common.start_ranks()
    tokenizer = common.load_tokenizer(args)
    rows, counts = read_prompts(args, tokenizer)
    ends = common.end_ids(args.model, tokenizer)
    model = common.load_model(args.model, ranks.device, common.scoring_dtype(ranks.device))

    def generate(batch):
        u = np.array([[common.uniforms(args.seed, rows[i]["id"], k, args.max_new_tokens)
                       for k in range(args.samples)] for i in batch])
        return common.sample(model, [rows[i]["prompt_ids"] for i in batch], u, args.temperature,
                             args.max_new_tokens, ends)

    batches = common.length_batches([len(row["prompt_ids"]) for row in rows], args.micro_batch_size)
    sampled = common.map_batches(generate, batches, partial, ranks, "sampling")
    if ranks.rank == 0:
        kept = []
        counts |= {"responses": 0, "tokens": 0, "cut at the limit": 0, "dropped for a cut response": 0}
        for i, row in enumerate(rows):
            responses = []
            for ids, finish in sampled[i]:
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
                kept.append({key: row[key] for key in ("id", "prompt", "prompt_ids")} | {"responses": responses})
        if not kept:
            raise common.InputError(f"{args.model}: every response hit the limit of {args.max_new_tokens} tokens: "
                                    "raise --max-new-tokens or choose another --cut")
        counts["prompts kept"] = len(kept)
        common.write_jsonl(partial / "responses", kept)
        common.close_output(args, partial, partial / "responses", counts, started)
    common.barrier()


if __name__ == "__main__":
    common.run(main)
