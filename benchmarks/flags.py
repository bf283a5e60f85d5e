"""Table 6b: are the labels that Eq. 9 and 11 flag more often wrong than the others?

    python benchmarks/flags.py --model pi_1 --input preferences_2.jsonl --gold gold.json --lam 0.25 --output flags.json

04_refined_dpo.py trains on D_t with alpha = 0, so all detectors see one trajectory, and each pair just before its own
step. They flag as 04 does, what is below the K-th percentile of the latest confidences:
    self       p_theta(y_w > y_l | x) (Eq. 9)
    decoupled  p_theta~(y_w > y_l | x) (Eq. 11, 12)
    judge      max(p, 1 - p) of Eq. 7, which 03 has stored: the size of |r(x, y_1) - r(x, y_2)| (not the paper's)
A label is wrong where gold prefers the rejected response; pairs that gold finds equal are left out.
Writes {detector: {"precision": percent wrong of the flagged labels, "unflagged": of the others, "auc": how often, of a
wrong and a right label in the same ten steps, the wrong one has the lower confidence, "as_self": percent of the flagged
labels that Eq. 9 flags as well}}
"""

import math
from collections import deque

import numpy as np
from shared import follow

from extras.small_world import gold_score, read_gold
from support import records, runs

K_PERCENT, WINDOW, REFINE_AFTER = 10, 50, 0.2  # as of 04_refined_dpo.py


def parse_args():
    parser = runs.Parser(description="What the detectors of Eq. 9 and 11 flag in D_t.")
    add = parser.add_argument
    add("--model", required=True, help="pi_{t-1}")
    add("--input", required=True, help="D_t")
    add("--gold", required=True, help="gold.json of the small world")
    add("--output", required=True, help="JSON")
    add("--lam", type=runs.nonnegative, required=True, help="lambda in Eq. 12")
    for option in ("--beta", "--lr", "--batch-size", "--micro-batch-size", "--seed"):
        add(option, required=True, help="as of 04_refined_dpo.py")
    return parser.parse_args()


def gold_margin(gold, pair):
    """How much more gold likes the chosen response of a row of D_t: below 0 its label is wrong."""
    chosen, rejected = (gold_score(gold, pair["prompt"], pair[y]["text"]) for y in ("chosen", "rejected"))
    return chosen - rejected


def flags(steps, threshold, window, k_percent, refine_after):
    """Which confidences are below tau, for each step, of whose pairs tau knows nothing yet. steps: [(b,), ...]"""
    latest, flagged = deque(maxlen=window), []
    for k, confidence in enumerate(steps):
        ready = k >= math.ceil(refine_after * len(steps)) and len(latest) == window
        flagged.append(np.array(confidence) < (threshold(latest, k_percent) if ready else -math.inf))
        latest.extend(confidence)
    return flagged


def auc(confidence, wrong):
    """How often a wrong label's confidence is below a right one's, a tie counting half; None without both kinds."""
    above = np.subtract.outer(confidence[~wrong], confidence[wrong])
    return float(((above > 0) + (above == 0) / 2).mean()) if above.size else None


def measure(steps, flagged, wrong, known):
    """{"precision", "unflagged", "auc"} of the pairs in these steps, in percent. All: [(b,), ...]"""
    on, bad, kept = (np.concatenate(values) for values in (flagged, wrong, known))
    areas = []
    for k in range(0, len(steps), 10):
        of_ten, bad_of_ten, kept_of_ten = (np.concatenate(values[k:k + 10]) for values in (steps, wrong, known))
        areas.append((auc(of_ten[kept_of_ten], bad_of_ten[kept_of_ten]), kept_of_ten.sum()))
    areas = [(area, size) for area, size in areas if area is not None]
    auc_of_all = sum(area * size for area, size in areas) / sum(size for _, size in areas) if areas else None
    return {"precision": percent(bad[kept & on]), "unflagged": percent(bad[kept & ~on]),
            "auc": auc_of_all and 100 * float(auc_of_all)}


def percent(true):
    """None where there is none to count."""
    return 100 * float(true.mean()) if len(true) else None


def main():
    args = parse_args()
    work = runs.open_output(args, "model", "input", "gold")
    gold, worth, certainty = read_gold(args.gold), {}, {}
    for row in records.read_jsonl(args.input, records.PROMPTS | records.PREFERENCES):
        worth[row["id"]], certainty[row["id"]] = gold_margin(gold, row), max(row["p"], 1 - row["p"])
    options = {key: value for key, value in vars(args).items() if key not in ("gold", "output")}
    steps, refined = follow(alpha=0, output=work / "pi", k_percent=K_PERCENT, window=WINDOW, refine_after=REFINE_AFTER,
                            **options)
    detectors = {"self": lambda row: row["rewards/margins"], "decoupled": lambda row: row["confidence"],
                 "judge": lambda row: certainty[row["id"]]}
    wrong = [np.array([worth[row["id"]] < 0 for row in rows]) for rows in steps]
    known = [np.array([worth[row["id"]] != 0 for row in rows]) for rows in steps]
    first, found, by_self = math.ceil(REFINE_AFTER * len(steps)), {}, None
    for name, detector in detectors.items():
        values = [np.array([detector(row) for row in rows]) for rows in steps]
        flagged = flags(values, refined["threshold"], WINDOW, K_PERCENT, REFINE_AFTER)
        found[name] = measure(*(of_step[first:] for of_step in (values, flagged, wrong, known)))
        on = np.concatenate(flagged)
        by_self = on if by_self is None else by_self
        found[name] |= {"flagged": int(on.sum()), "as_self": percent(by_self[on])}
    runs.write_json(work / "made", found)
    runs.close_output(args, work, work / "made", {"steps": len(steps)})


if __name__ == "__main__":
    runs.run(main)
