"""Noise for Table 6b: D_t with a share of its labels turned round at random; half of them leaves random labels.

    python benchmarks/relabel.py --input preferences_2.jsonl --flip 0.3 --output noisy_2.jsonl

A row's fate is decided by its id and the seed, so that the labels turned at 0.1 are among those turned at 0.2.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import records, runs


def main():
    parser = runs.Parser(description="Turn a share of the labels of D_t round.")
    parser.add_argument("--input", required=True, help="preferences of 03_judge.py")
    parser.add_argument("--output", required=True, help="JSON Lines of the same rows")
    parser.add_argument("--flip", type=runs.share, required=True, help="the share")
    parser.add_argument("--seed", type=runs.natural, default=0)
    args = parser.parse_args()
    work = runs.open_output(args, "input")
    rows, flipped = records.read_jsonl(args.input, records.PROMPTS | records.PREFERENCES), 0
    for row in rows:
        if random.Random(f"{args.seed} flip {row['id']}").random() < args.flip:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            flipped += 1
    runs.write_jsonl(work / "made", rows)
    runs.close_output(args, work, work / "made", {"pairs": len(rows), "turned round": flipped})


if __name__ == "__main__":
    runs.run(main)
