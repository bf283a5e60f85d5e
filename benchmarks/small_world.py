"""The small world on several seeds: mean and standard deviation of every row of its table.

    python benchmarks/small_world.py --jobs 2             # seeds 41 to 60, half an hour on two free cores
    python benchmarks/small_world.py --seeds 1 2 --jobs 2

Runs `bash run_all.sh world` once a seed (what is complete is not run again), then prints the table and what it claims,
and draws the means and their standard errors: benchmarks/small_world.svg.
Data, base model, order of the pairs and samples all follow the seed.
"""

import argparse
import sys
from pathlib import Path

from shared import ROOT, cell, markdown, mean_row, read_metrics, run_logged, run_seeds

from extras.report import figure
from support import runs

ROWS = ["sft", "dpo", "spa_1", "spa_2", "spa_3", "dpo_all_gold"]
SPA = ROWS[2:5]
COLUMNS = {"win_rate": "Win rate (%)", "judge_accuracy": "Judge accuracy (%)", "agreement": "Held-out agreement (%)",
           "kl_per_token": "KL per token", "malformed": "Malformed (%)", "avg_length": "Mean length (chars)"}


def run(seed, args):
    """{row: metrics} of one seed."""
    args.runs.mkdir(parents=True, exist_ok=True)
    run_logged(["bash", ROOT / "run_all.sh", "world"], args.runs / f"world-seed{seed}.log", args.jobs, SEED=str(seed),
               RUNS=str(args.runs), PYTHON=sys.executable)
    evaluated = args.runs / f"world-seed{seed}" / "eval"
    return {row: read_metrics(evaluated / row) for row in ROWS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=range(41, 61), help="(41 to 60 tuned nothing)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    args = parser.parse_args()
    seeds = run_seeds(lambda seed: run(seed, args), args)

    print(f"Seeds {' '.join(map(str, args.seeds))}: mean ± standard deviation\n")
    rows = [[seeds[0][row]["name"], seeds[0][row]["gold_labels"],
             *(cell([seed[row].get(key) for seed in seeds], 3 if key == "kl_per_token" else 1) for key in COLUMNS)]
            for row in ROWS]
    print(*markdown(" | ".join(["Model", "Gold labels", *COLUMNS.values()]), rows), sep="\n")
    drawn = figure([mean_row([seed[row] for seed in seeds]) for row in ROWS])
    (ROOT / "benchmarks" / "small_world.svg").write_text(drawn, encoding="utf-8")
    print()
    for key, name, shown in (("win_rate", "Win rate", ROWS), ("judge_accuracy", "Judge accuracy", SPA),
                             ("malformed", "Malformed sentences", SPA)):
        print(f"{name} by seed")
        for row in shown:
            print(f"  {row:13}", *(f"{seed[row][key]:5.1f}" for seed in seeds))
    wins = {row: [seed[row]["win_rate"] for seed in seeds] for row in ROWS}
    gains = [last - seed for last, seed in zip(wins["spa_3"], wins["dpo"])]
    growth = [after - before for one, two in zip(ROWS[:5], ROWS[1:5]) for before, after in zip(wins[one], wins[two])]
    accuracy, malformed = ([seed[row][key] for seed in seeds for row in SPA] for key in ("judge_accuracy", "malformed"))
    above = sum(spa > gold for spa, gold in zip(wins["spa_3"], wins["dpo_all_gold"]))
    print(f"SPA's last iteration above seed DPO by {cell(gains)} points, at least {min(gains):.1f}")
    print(f"the least growth from one stage to the next, of all seeds: {min(growth):.1f} points")
    print(f"judge accuracy {min(accuracy):.1f} to {max(accuracy):.1f} %, malformed at most {max(malformed):.1f} %")
    print(f"SPA's last iteration above DPO on all gold labels, one epoch, on {above} of {len(seeds)} seeds")


if __name__ == "__main__":
    runs.escape_output()
    main()
