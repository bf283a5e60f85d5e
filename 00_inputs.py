"""Algorithm 1's inputs: the seed preferences D_0 and the prompt sets X_1 ... X_T, disjoint from it and each other.

--source  ultrafeedback  argilla/ultrafeedback-binarized-preferences-cleaned, from the Hub (Section 5.1)
          ultrachat      HuggingFaceH4/ultrachat_200k, from the Hub (App. B.1): writes sft.jsonl and nothing else
          org/name       any other data set on the Hub; --split, if not train
          a file         JSON, JSON Lines or Parquet; the first two also with gzip (formats: extras/formats.py)
          world          the small world of extras/small_world.py, with a base model: all that a laptop needs

Writes a folder: seed.jsonl        {"id", "prompt", "chosen", "rejected"}, messages (as TRL's): all labels SPA sees
                 prompts_t.jsonl   {"id", "prompt"}
                 eval.jsonl        {"id", "prompt", "chosen", "rejected", "reference"}: held out; where the source has
                                   them, the labels and a response to compare with
                 all_gold.jsonl    with --all-gold: labelled pairs of the seed and of all prompt sets (100 % rows)
                 judge_sft.jsonl   with --llm-judge: {"id", "prompt", "response"} for LLM-as-judge (App. B.2)
       world also: base/ (a model with random weights), gold.json (its judge), sft.jsonl {"id", "prompt", "response"},
                 sft_kind.jsonl    the part of sft.jsonl by kind writers, in place of an instruct model (Figure 4)

    python 00_inputs.py --source ultrafeedback --output data
    python 00_inputs.py --source my.jsonl --seed-size 500 --prompt-sizes 1000 2000 --output data

Departs from the paper: rows that repeat a prompt are dropped, so that no two sets share one, and so are rows with an
empty answer or equal ones. The last prompt set takes what is left, down to 95 %, where different prompts run short, and
then has fewer rows the larger the seed is. judge_sft.jsonl asks about each seed pair in both orders, so that neither
letter is the likelier one. The paper does not give the order: --llm-judge one takes one order of each pair.
"""

import json
import random

from support import records, runs


def split(rows, args):
    """(D_0, held-out rows, [X_1, ..., X_T]): lists that share no row. rows: shuffled, each prompt once.

    The prompt sets are taken from the front and the seed from the back: if every row is labelled, a larger seed leaves
    the prompt sets as they are (Table 3); only one that runs short loses its last rows to the seed. Another sample of
    the seed, the next block from the back, changes no prompt set (Table 4). Raises InputError where there are too few
    rows.
    """
    pairs = [row for row in rows if "chosen" in row]
    sizes = [args.eval_size, *args.prompt_sizes]
    short = max(0, args.seed_size + sum(sizes) - len(rows))
    if len(pairs) < args.seed_size or 20 * short > sizes[-1]:
        raise runs.InputError(
            f"{args.source}: {len(rows)} different prompts, {len(pairs)} of them labelled, are not enough for "
            f"{args.seed_size} seed pairs, {args.eval_size} held-out prompts and sets of {args.prompt_sizes}: "
            "lower --seed-size, --eval-size or --prompt-sizes")
    sizes[-1] -= short
    in_first = {row["id"] for row in pairs[len(pairs) - args.seed_size:]}
    rest = (row for row in rows if row["id"] not in in_first)  # each set takes the next rows of this iterator
    held_out, *sets = [[next(rest) for _ in range(size)] for size in sizes]
    skipped = args.seed_sample * args.seed_size
    seed = pairs[::-1][skipped:skipped + args.seed_size][::-1]
    taken = {row["id"] for row in sum(sets, held_out)}
    if len(seed) < args.seed_size or any(row["id"] in taken for row in seed):
        raise runs.InputError(
            f"{args.source}: seed sample {args.seed_sample} would take rows of the prompt sets: lower --seed-sample, "
            "--seed-size or --prompt-sizes (Table 4 needs the first two)")
    return seed, held_out, sets


def drop_repeats(rows):
    """The rows whose prompt no earlier row has. Roles and contents are compared, ignoring outer white space."""
    first = {}  # a dict keeps the order of the rows
    for row in rows:
        first.setdefault(json.dumps([[m["role"], m["content"].strip()] for m in row["prompt"]]), row)
    return list(first.values())


def parse_args():
    parser = runs.Parser(description="Make the seed preferences D_0 and the prompt sets X_t.")
    add = parser.add_argument
    add("--source", required=True, help="ultrafeedback, ultrachat, world, org/name, or a JSON, JSONL or Parquet file")
    add("--split", help="of a data set on the Hub (default: train, of ultrachat train_sft)")
    add("--output", required=True, help="folder for the files")
    # Section 5.1
    add("--seed-size", type=runs.natural, default=2000,
        help="|D_0|: of UltraFeedback 500, 1000, 2000, 6000 are the 0.8, 1.7, 3.3, 10 %% of Table 3")
    add("--prompt-sizes", type=runs.positive, nargs="+", default=[8000, 20000, 30000],
        help="|X_1| ... |X_T|; --seed-size does not change them, if every row is labelled and the last is not short")
    add("--eval-size", type=runs.natural, default=200, help="prompts held out for 05_eval.py")
    add("--seed", type=runs.natural, default=0, help="decides how the rows are shuffled")
    add("--seed-sample", type=runs.natural, default=0, help="another seed set of that size: Table 4 has 0, 1, 2")
    add("--empty-system", action="store_true", help="an empty system message before every prompt that has none, as in "
        "Zephyr's recipe (not for world)")
    # what SPA is compared with
    add("--all-gold", action="store_true", help="also write all_gold.jsonl, for training on all gold labels")
    add("--llm-judge", nargs="?", choices=("both", "one"), const="both", default=False, help="also write "
        "judge_sft.jsonl: each seed pair in both orders (default), or in one, the better one being A and B in turn; "
        "the world's base model then knows the words of the judging prompt (Listing 1)")
    # --source world only
    add("--sft-size", type=runs.natural, default=12000, help="--source world: examples for SFT")
    add("--gold-length", type=runs.share, default=0.0, help="--source world: what each word adds to gold's score of a "
        "response, between -1 and 1 without it: for Table 10, a judge that likes length (0.03: a little)")
    add("--shape", choices=("llama", "phi", "mistral"), default="llama", help="--source world: base model")
    return parser.parse_args()


def main():
    args = parse_args()
    runs.in_one_process("this stage")
    work = runs.open_output(args, "source")
    folder = work / "data"
    folder.mkdir(exist_ok=True)

    if args.source == "world":
        from extras import judges, small_world
        if args.empty_system:
            raise runs.InputError("--empty-system: the small world has no system messages: leave it out")
        rows = small_world.make_world(args, folder, judges.JUDGING_WORDS if args.llm_judge else "")
        unique, counts = rows, {"rows read": len(rows)}  # shuffled already, each prompt once
    else:
        from extras.formats import read_source
        rows, counts = read_source(args)
        for row in rows:
            if args.empty_system and row["prompt"][0]["role"] != "system":
                row["prompt"].insert(0, dict(records.EMPTY_SYSTEM))
        if args.source == "ultrachat":
            runs.write_jsonl(folder / "sft.jsonl", rows)
            return runs.close_output(args, work, folder, counts)
        unique = drop_repeats(rows)
        random.Random(args.seed).shuffle(unique)
    seed, held_out, sets = split(unique, args)

    def write(name, rows, *keys):  # labels in TRL's conversational format
        rows = [row | {key: [{"role": "assistant", "content": row[key]}] for key in labels if key in row}
                for row in rows]
        runs.write_jsonl(folder / name, [{key: row[key] for key in ("id", "prompt", *keys) if key in row}
                                         for row in rows])

    labels = ("chosen", "rejected")
    write("seed.jsonl", seed, *labels)
    for t, prompts in enumerate(sets, 1):
        write(f"prompts_{t}.jsonl", prompts)
    write("eval.jsonl", held_out, *labels, "reference")
    if args.all_gold:
        write("all_gold.jsonl", [row for row in sum(sets, seed) if "chosen" in row], *labels)
    if args.llm_judge:
        from extras.judges import judging_examples
        runs.write_jsonl(folder / "judge_sft.jsonl", judging_examples(seed, args.llm_judge))
    counts |= {"repeated prompts dropped": len(rows) - len(unique), "seed pairs": len(seed),
               "prompts": " + ".join(str(len(prompts)) for prompts in sets), "held-out prompts": len(held_out)}
    if missing := args.prompt_sizes[-1] - len(sets[-1]):
        counts["missing from the last prompt set"] = missing
    runs.close_output(args, work, folder, counts)


if __name__ == "__main__":
    runs.run(main)
