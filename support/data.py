"""What the stages compute on: the rows of their files as token ids, and sampled token ids as rows.

    read_prompts, short_prompts    prompts, for 02_generate.py and 05_eval.py
    make_records                   what 02_generate.py writes
    read_pairs, tokenize_pair      preferences, for 01_seed_dpo.py and 04_refined_dpo.py
"""

from array import array

from support import chat, records
from support.runs import InputError


def short_prompts(path, rows, tokenizer, max_prompt_length):
    """([(row, its prompt's token ids)] up to that many, counts of what was read and dropped). path: for errors"""
    prompts = [array("i", chat.prompt_ids(tokenizer, row["prompt"], f"{path}, id {row['id']}")) for row in rows]
    kept = [(row, ids) for row, ids in zip(rows, prompts) if len(ids) <= max_prompt_length]
    if not kept:
        raise InputError(f"{path}: all {len(rows)} prompts are longer than --max-prompt-length "
                         f"{max_prompt_length}: raise it")
    return kept, {"prompts read": len(rows), "dropped as too long": len(rows) - len(kept)}


def read_prompts(path, tokenizer, max_prompt_length):
    """([{"id", "prompt", "prompt_ids"}] up to that many tokens, counts of what was read and dropped)"""
    kept, counts = short_prompts(path, records.read_jsonl(path, records.PROMPTS), tokenizer, max_prompt_length)
    return [{"id": row["id"], "prompt": row["prompt"], "prompt_ids": ids} for row, ids in kept], counts


def make_records(args, rows, sampled, tokenizer, eos, counts):
    """The rows of `read_prompts` that have at least two responses, with their "responses"; updates the counts.

    sampled: [[(token ids, "eos" or "length") of each response] of each row]. Of one that hit the length limit,
    --on-length-limit decides: eos appends eos[0], open keeps it, drop drops it. Raises InputError where no row has two.
    """
    responses = [response for of_row in sampled for response in of_row]
    counts |= {"responses": len(responses), "tokens": sum(len(ids) for ids, _ in responses),
               "responses at the length limit": sum(finish == "length" for _, finish in responses)}
    end, made = [eos[0]] if args.on_length_limit == "eos" else [], []
    for row, of_row in zip(rows, sampled, strict=True):
        kept = [(ids if finish == "eos" else [*ids, *end], finish) for ids, finish in of_row
                if finish == "eos" or args.on_length_limit != "drop"]
        if len(kept) >= 2:
            made.append(row | {"responses": [
                {"text": chat.response_text(tokenizer, row["prompt_ids"], ids), "ids": ids, "finish": finish}
                for ids, finish in kept]})
    counts |= {"prompts dropped for them": len(rows) - len(made), "prompts kept": len(made)}
    if not made:
        raise InputError(f"{args.input}: no prompt has two responses that end within {args.max_new_tokens} tokens: "
                         "raise --max-new-tokens or choose another --on-length-limit")
    return made


def read_pairs(args, tokenizer, *kinds):
    """({"id", "prompt", "chosen", "rejected"} with token ids of each pair of --input, counts of what was read).

    kinds: records.LABELLED, texts, which are tokenised; records.PREFERENCES, the ids that were sampled and judged.
    Responses are cut to fit --max-length; pairs with a longer prompt than --max-prompt-length, or equal after cutting,
    are dropped and counted. Raises InputError where two files have the same id, or no pair is left.
    """
    pairs, ids, counts = [], set(), {"pairs read": 0, "dropped as too long": 0, "dropped as equal after cutting": 0}
    eos, paths = chat.eos_ids(args.model, tokenizer), " ".join(args.input)
    for path, row in ((path, row) for path in args.input for row in records.read_jsonl(path, [*kinds])):
        if row["id"] in ids:
            raise InputError(f"{paths}: two files have the id {row['id']}: ids must differ")
        ids.add(row["id"])
        counts["pairs read"] += 1
        if "prompt_ids" in row:
            prompt, chosen, rejected = row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]
        else:
            prompt, chosen, rejected = tokenize_pair(path, row, tokenizer, eos)
        room = args.max_length - len(prompt)  # arrays: 4 bytes a token
        prompt, chosen, rejected = array("i", prompt), array("i", chosen[:room]), array("i", rejected[:room])
        if len(prompt) > args.max_prompt_length or room < 1:
            counts["dropped as too long"] += 1
        elif chosen == rejected:
            counts["dropped as equal after cutting"] += 1
        else:
            pairs.append({"id": row["id"], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise InputError(f"{paths}: no pair is left ({counts}): raise --max-prompt-length or --max-length")
    return pairs, counts


def tokenize_pair(path, row, tokenizer, eos):
    """(token ids of the prompt, of the chosen response, of the rejected one) of a labelled row of texts."""
    prompt = chat.prompt_ids(tokenizer, row["prompt"], f"{path}, id {row['id']}")
    texts = row["chosen"], row["rejected"]
    return prompt, *(chat.response_ids(tokenizer, row["prompt"], prompt, text, eos) for text in texts)
