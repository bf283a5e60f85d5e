"""Algorithm 1's inputs: the seed preferences D_0 and the prompt sets X_1 ... X_T, disjoint from it and each other.

Sources
    ultrafeedback  argilla/ultrafeedback-binarized-preferences-cleaned, from the Hub (Section 5.1)
    a file         JSON, JSON Lines or Parquet, with prompt, chosen, rejected as strings or as lists of messages
    world          the small world of extras/small_world.py, with a base model: all that a run on a laptop needs

Writes a folder: seed.jsonl        {"id", "prompt", "chosen", "rejected"}: the only labels that SPA sees
                 prompts_t.jsonl   {"id", "prompt"}
                 eval.jsonl        {"id", "prompt", "reference"}: a response to compare with, where the source has one
                 all_gold.jsonl    with --all-gold: labelled pairs of the seed and of all prompt sets (100 % rows)
                 judge_sft.jsonl   with --llm-judge: {"id", "prompt", "response"} for LLM-as-judge (App. B.2)
       world also: base/ (a model with random weights), gold.json (its judge), sft.jsonl {"id", "prompt", "response"},
                 sft_kind.jsonl    the part of sft.jsonl by kind writers, in place of an instruct model (Figure 4)

    python 00_inputs.py --source ultrafeedback --output data
    python 00_inputs.py --source my.jsonl --seed-size 500 --prompt-sizes 1000 2000 --output data

Departs from the paper: rows that repeat a prompt are dropped, so that no two sets share one, and so are rows of
UltraFeedback with an empty answer.
"""

import json
import random
from pathlib import Path

import runs

ULTRAFEEDBACK = "argilla/ultrafeedback-binarized-preferences-cleaned"


def split(rows, args):
    """(D_0, held-out rows, [X_1, ..., X_T]): lists that share no row. rows: shuffled, each prompt once.

    The prompt sets are taken from the front and the seed from the back: if every row is labelled, a larger seed leaves
    the prompt sets as they are, as in Table 3. Raises InputError where there are too few rows.
    """
    pairs = [row for row in rows if "chosen" in row]
    if len(pairs) < args.seed_size or len(rows) < args.seed_size + args.eval_size + sum(args.prompt_sizes):
        raise runs.InputError(
            f"{args.source}: {len(rows)} different prompts, {len(pairs)} of them labelled, are not enough for "
            f"{args.seed_size} seed pairs, {args.eval_size} held-out prompts and sets of {args.prompt_sizes}: "
            "lower --seed-size, --eval-size or --prompt-sizes")
    seed = pairs[len(pairs) - args.seed_size:]
    in_seed = {row["id"] for row in seed}
    rest = (row for row in rows if row["id"] not in in_seed)  # each set takes the next rows of this iterator
    held_out, *sets = [[next(rest) for _ in range(size)] for size in (args.eval_size, *args.prompt_sizes)]
    return seed, held_out, sets


def drop_repeats(rows):
    """The rows whose prompt no earlier row has. Roles and contents are compared, ignoring outer white space."""
    first = {}  # a dict keeps the order of the rows
    for row in rows:
        first.setdefault(json.dumps([[m["role"], m["content"].strip()] for m in row["prompt"]]), row)
    return list(first.values())


def read_preferences(source):
    """All rows of UltraFeedback or of a file, as `as_preference` makes them. Raises InputError for ids that repeat."""
    rows, where_of = [], {}
    for where, row in read_table(source):
        if source == "ultrafeedback" and not (is_answer(row["chosen"]) and is_answer(row["rejected"])):
            continue
        row = as_preference(row, len(rows), where)
        if where_of.setdefault(row["id"], where) != where:
            raise runs.InputError(f"{where}: has the id {row['id']!r} of {where_of[row['id']]}: ids must differ")
        rows.append(row)
    return rows


def read_table(source):
    """[(where, row)] of UltraFeedback or of a file, rows as they are. where: names the row in error messages"""
    def numbered(rows):
        return [(f"{source}, row {k}", row) for k, row in enumerate(rows)]

    try:
        if source == "ultrafeedback":
            from datasets import load_dataset  # slow to import
            return numbered(load_dataset(ULTRAFEEDBACK, split="train"))
        if source.endswith(".parquet"):
            from datasets import Dataset
            return numbered(Dataset.from_parquet(source))
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = error.object.count(b"\n", 0, error.start) + 1
        raise runs.InputError(f"{source}:{line_number}: is not in UTF-8: give a JSON, JSON Lines or Parquet file")
    except Exception as error:  # datasets raises many kinds
        raise runs.InputError(f"{source}: cannot be read ({runs.reason(error)}): --source is ultrafeedback (from the "
                              "Hub: go online), world, or a JSON, JSON Lines or Parquet file")
    if text.lstrip().startswith("["):  # one JSON array, not lines
        return numbered(runs.parse_json(text, source))
    # not splitlines(): JSON strings may contain U+2028 and others that it takes for the end of a line
    lines = ((f"{source}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(where, runs.parse_json(line, where)) for where, line in lines if line]


def is_answer(value):
    "a string that is not empty, or a list of messages that ends with the assistant's"
    if not isinstance(value, list):
        return runs.is_text(value)
    *before, last = value or [None]
    return (isinstance(last, dict) and last.get("role") == "assistant" and runs.is_text(last.get("content"))
            and (not before or runs.is_prompt(before)))


CHECKS = {"id": runs.is_id, "prompt": runs.is_prompt, "chosen": is_answer, "rejected": is_answer}


def as_preference(row, k, where):
    """The k-th row of a source as {"id", "prompt": messages} and, if labelled, "chosen", "rejected", "reference".

    Its id is k if it has none of its own. where: begins the text of an InputError
    """
    runs.check_row(row, {}, where)
    row = {key: value for key, value in row.items() if value is not None}  # Parquet's "missing" is None
    labelled = "chosen" in row or "rejected" in row
    needed = ("chosen", "rejected") if labelled else ("prompt",)
    runs.check_row(row, {key: check for key, check in CHECKS.items() if key in row or key in needed}, where)
    row_id, prompt = str(row.get("id", k)), row.get("prompt")
    if not labelled:
        return {"id": row_id, "prompt": runs.as_messages(prompt)}
    (prompt_1, chosen), (prompt_2, rejected) = (split_prompt(prompt, row[key], where) for key in ("chosen", "rejected"))
    if prompt_1 != prompt_2:
        raise runs.InputError(f"{where}: chosen and rejected answer different prompts: fix the row")
    return {"id": row_id, "prompt": prompt_1, "chosen": chosen, "rejected": rejected, "reference": chosen}


def split_prompt(prompt, answer, where):
    """(messages before the answer, the answer as a string). An answer may begin with the prompt that it answers."""
    if isinstance(answer, list):
        before, answer = answer[:-1], answer[-1]["content"]
        prompt = before or prompt  # the answer's own conversation comes first
    elif isinstance(prompt, str) and answer.startswith(prompt) and answer[len(prompt):].strip():
        answer = answer[len(prompt):].strip()
    if prompt is None:
        raise runs.InputError(f"{where}: no prompt: give a field prompt, or messages before the answer")
    return [{"role": m["role"], "content": m["content"]} for m in runs.as_messages(prompt)], answer


def parse_args():
    parser = runs.Parser(description="Make the seed preferences D_0 and the prompt sets X_t.")
    add = parser.add_argument
    add("--source", required=True, help="ultrafeedback, world, or a JSON, JSON Lines or Parquet file")
    add("--output", required=True, help="folder for the files")
    # Section 5.1
    add("--seed-size", type=runs.natural, default=2000,
        help="|D_0|: of UltraFeedback 500, 1000, 2000, 6000 are the 0.8, 1.7, 3.3, 10 %% of Table 3")
    add("--prompt-sizes", type=runs.positive, nargs="+", default=[8000, 20000, 30000],
        help="|X_1| ... |X_T|; they stay the same sets when --seed-size changes")
    add("--eval-size", type=runs.natural, default=200, help="prompts held out for 05_eval.py")
    add("--seed", type=runs.natural, default=0, help="decides how the rows are shuffled: Table 4 has three")
    # what SPA is compared with
    add("--all-gold", action="store_true", help="also write all_gold.jsonl, for training on all gold labels")
    add("--llm-judge", action="store_true", help="also write judge_sft.jsonl, for LLM-as-judge; the world's base model "
        "then knows the words of the judging prompt (Listing 1)")
    # --source world only
    add("--sft-size", type=runs.natural, default=12000, help="--source world: examples for SFT")
    add("--shape", choices=("llama", "phi", "mistral"), default="llama", help="--source world: base model")
    return parser.parse_args()


def main():
    args = parse_args()
    partial = runs.open_output(args, "source")
    folder = partial / "data"
    folder.mkdir(exist_ok=True)

    if args.source == "world":
        from extras import judges, small_world
        rows = small_world.make_world(args, folder, judges.JUDGING_WORDS if args.llm_judge else "")
        unique = rows  # shuffled already, each prompt once
    else:
        rows = read_preferences(args.source)
        unique = drop_repeats(rows)
        random.Random(args.seed).shuffle(unique)
    seed, held_out, sets = split(unique, args)

    def write(name, rows, *keys):
        runs.write_jsonl(folder / name, [{key: row[key] for key in ("id", "prompt", *keys) if key in row}
                                         for row in rows])

    write("seed.jsonl", seed, "chosen", "rejected")
    for t, prompts in enumerate(sets, 1):
        write(f"prompts_{t}.jsonl", prompts)
    write("eval.jsonl", held_out, "reference")
    if args.all_gold:
        write("all_gold.jsonl", [row for row in sum(sets, seed) if "chosen" in row], "chosen", "rejected")
    if args.llm_judge:
        from extras.judges import judging_examples
        runs.write_jsonl(folder / "judge_sft.jsonl", judging_examples(seed))
    counts = {"rows read": len(rows), "repeated prompts dropped": len(rows) - len(unique),
              "seed pairs": len(seed), "prompts": " + ".join(str(len(prompts)) for prompts in sets),
              "held-out prompts": len(held_out)}
    runs.close_output(args, partial, folder, counts)


if __name__ == "__main__":
    runs.run(main)
