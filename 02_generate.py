"""Algorithm 1, line 3, first half: for each x in X_t sample y_1, y_2 ~ pi_{t-1}(.|x).

Two responses, temperature 0.7 (Section 5.1), at most 300 new tokens (App. B.4).

Reads  prompts_t.jsonl    {"id": "12", "prompt": [{"role": "user", "content": "Name a fish."}]}
Writes responses_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...], "responses":
                           [{"text": "The eel.", "ids": [415, 317, 301, 28723, 2], "finish": "eos"}, {...}]}

    python 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl
    torchrun --nproc-per-node 4 02_generate.py --model pi_0 --input prompts_1.jsonl --output responses_1.jsonl

Every token is decided by one uniform number, drawn from (seed, prompt id, sample, step), so a response is the same on
any number of ranks and after resuming. Its ids, not its text, are judged and trained on.

With --url a running server of pi_{t-1} samples (vLLM, or SGLang with return_token_ids), and no GPU is needed here:

    vllm serve pi_0 --dtype bfloat16
    python 02_generate.py --model pi_0 --url http://localhost:8000/v1 --input prompts_1.jsonl --output responses_1.jsonl

It is sent token ids and, for each response, a seed of (seed, prompt id, sample), so a resumed run asks for what is
missing as the first would have. But how a server rounds depends on its load, and SGLang takes seeds only with
--enable-deterministic-inference: two runs may differ. That it serves the weights of --model is told by the name alone.

Departs from the paper: none. It does not say how it treats a response that hits the length limit (--on-length-limit).
"""

import os
import re

import numpy as np

import common
from support import chat, models, runs

ON_LENGTH_LIMIT = """what to do with a response of --max-new-tokens tokens without an EOS.
eos: append one, as in the authors' release (it was not sampled, so its log-ratio is noise).
open: keep it without an EOS (nothing then teaches the model to end it).
drop: drop it, and its prompt where fewer than two are left (set the limit well above a normal answer)."""
FREE = ("output", "url", "url_requests")  # options that change no response


def parse_args():
    parser = runs.Parser(description="Sample responses from pi_{t-1} for the prompts X_t.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}")
    add("--input", required=True, help="X_t: JSON Lines of id, prompt")
    add("--output", required=True, help="JSON Lines of id, prompt, prompt_ids, responses")
    add("--tokenizer", help="tokenizer folder or Hub name (default: --model's)")
    add("--chat-template", help="Jinja chat template file (default: the tokenizer's)")
    # Section 5.1, App. B.4
    add("--samples", type=runs.number(int, 2), default=2, help="responses to each prompt")
    add("--temperature", type=runs.nonnegative, default=0.7, help="0: greedy")
    add("--max-new-tokens", type=runs.positive, default=300)
    add("--on-length-limit", choices=("eos", "open", "drop"), default="eos", help=ON_LENGTH_LIMIT)
    add("--seed", type=runs.natural, default=0, help="random seed")
    # lengths, memory
    add("--max-prompt-length", type=runs.positive, default=1024, help="longer prompts are dropped")
    add("--micro-batch-size", type=runs.positive, default=16, help="prompts sampled at a time by one rank")
    # sampling at a server
    add("--url", help="a server of --model, http://host:8000/v1; its key is read from OPENAI_API_KEY")
    add("--url-model", help="the model's name there (default: --model)")
    add("--url-requests", type=runs.positive, default=64, help="requests at a time")
    args = parser.parse_args()
    if not args.url:
        if args.url_model:
            parser.error("--url-model goes with --url")
        del args.url_model
        return args
    if not re.fullmatch(r"https?://[^\s@?#]+", args.url):  # it may have a key in it, which nobody must see
        raise runs.InputError("--url: must look like http://host:8000/v1; the key belongs in OPENAI_API_KEY")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise runs.InputError("--url: the server samples, so one process is enough: start it without torchrun")
    args.url_model = args.url_model or args.model  # in args.json it tells a server's responses from our own
    return args


def read_prompts(args, tokenizer):
    """(the rows with their "prompt_ids", without those that are too long; counts of what was read and dropped)"""
    kept, counts = chat.short_prompts(runs.read_jsonl(args.input, runs.PROMPTS), tokenizer, args)
    return [{"id": row["id"], "prompt": row["prompt"], "prompt_ids": ids} for row, ids in kept], counts


def make_records(args, rows, sampled, tokenizer, eos, counts):
    """The rows with their "responses"; counts what became of them. sampled: [(ids, finish), ...] for each row"""
    records = []
    for row, samples in zip(rows, sampled, strict=True):
        responses = []
        for ids, finish in samples:
            if finish == "length" and args.on_length_limit == "drop":
                continue
            if finish == "length" and args.on_length_limit == "eos":
                ids = [*ids, eos[0]]
            responses.append({"text": chat.response_text(tokenizer, ids), "ids": ids, "finish": finish})
        if len(responses) >= 2:
            records.append(row | {"responses": responses})
    samples = [sample for samples in sampled for sample in samples]
    counts |= {"responses": len(samples), "tokens": sum(len(ids) for ids, _ in samples),
               "responses at the length limit": sum(finish == "length" for _, finish in samples),
               "prompts dropped for them": len(rows) - len(records), "prompts kept": len(records)}
    if not records:
        raise runs.InputError(f"{args.input}: no prompt has two responses that end within {args.max_new_tokens} tokens"
                              ": raise --max-new-tokens or choose another --on-length-limit")
    return records


def sample(args, partial, ranks, rows, eos):
    """[(token ids, "eos" or "length") of each sample] of each row."""
    model = models.load_model(args.model, ranks.device, common.scoring_dtype(ranks.device))
    models.check_limits(args.input, ((row["id"], row["prompt_ids"], []) for row in rows), model,
                        "--max-prompt-length or --max-new-tokens", args.max_new_tokens)

    def generate(batch):
        u = np.array([[common.uniforms(args.seed, row["id"], k, args.max_new_tokens)
                       for k in range(args.samples)] for row in batch])
        return common.sample_responses(model, [row["prompt_ids"] for row in batch], u, args.temperature,
                                       args.max_new_tokens, eos)

    return common.map_rows(generate, rows, args.micro_batch_size, partial, ranks, "sampling")


def main():
    args = parse_args()
    partial = runs.open_output(args, "model", "input", free=FREE)
    ranks = common.start_ranks()
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    rows, counts = read_prompts(args, tokenizer)
    eos = chat.eos_ids(args.model, tokenizer)
    if args.url:
        from extras.endpoint import sample_at_url
        rows, sampled = sample_at_url(args, partial, rows, eos, counts)
    else:
        sampled = sample(args, partial, ranks, rows, eos)

    def write():
        runs.write_jsonl(partial / "responses", make_records(args, rows, sampled, tokenizer, eos, counts))
        runs.close_output(args, partial, partial / "responses", counts)

    ranks.on_first(write)


if __name__ == "__main__":
    runs.run(main)
