"""The paper's comparisons in the small world: Tables 1 to 7, 10, 11 and Figures 3, 4, over several seeds.

    python benchmarks/tables.py                     # all of them, into benchmarks/TABLES.md
    python benchmarks/tables.py --table 6           # one of them (a figure is F3 or F4), printed
    python benchmarks/tables.py --dry-run           # print the commands without running them

A row's commands are those that `bash run_all.sh world --dry-run` prints, with the row's own models, files and options.
Variables of the environment count as they do there. What rows and tables share is made once, in runs/tables/seedN. Each
seed runs its stages one after another, on one core; run again, it skips those that are complete and resumes.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict, namedtuple
from datetime import date
from pathlib import Path

import torch
from shared import ROOT, command_line

import runs

METRICS = {"length_controlled_winrate": "LC win rate", "win_rate": "win rate", "avg_length": "length"}

# ---------------------------------------------------------------------------------------------
# The tables. A model is VARIANT/t: pi_t of a variant of SPA (t = 0: its DPO on the seed), its SFT or its base model.

# paper: LC win rate, win rate, length, as far as the paper has them. Rows of different families (Table 5: kinds of
# model) are not compared, nor are rows of one group (Table 4: samples of the seed).
Row = namedtuple("Row", "label paper model family group", defaults=("", None))
TABLES = {  # title, remark, rows
    "1": ("Main results", "", [
        Row("Base model", (0.17, 0.50), "spa/base"), Row("DPO, 100 % (Zephyr)", (11.75, 10.03), "all_gold/0"),
        Row("SFT", (7.58, 4.72), "spa/sft"), Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"),
        Row("SPA, 3.3 %", (15.39, 21.13), "spa/3")]),
    "2": ("Ways to judge", "The reward model learnt from the gold labels of all prompts, 30 times the seed.", [
        Row("Iterative DPO, reward model (PairRM)", (11.87, 9.46), "reward/3"),
        Row("Iterative DPO, LLM-as-judge", (9.28, 9.18), "llm/3"), Row("SPA", (15.39, 21.13), "spa/3")]),
    "3": ("Seed sizes (two iterations)", "", [
        Row("DPO, 0.8 %", (7.85, 5.53), "seed_0.8/0"), Row("DPO, 1.7 %", (7.68, 5.49), "seed_1.7/0"),
        Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"), Row("DPO, 10 %", (11.37, 9.32), "seed_10/0"),
        Row("SPA, 0.8 %", (10.36, 11.34), "seed_0.8/2"), Row("SPA, 1.7 %", (12.36, 13.72), "seed_1.7/2"),
        Row("SPA, 3.3 %", (16.23, 19.94), "spa/2"), Row("SPA, 10 %", (18.52, 23.79), "seed_10/2")]),
    "4": ("Three samples of the seed (two iterations)",
          "Another sample of the seed here leaves other prompts for the iterations.", [
              Row("DPO, 1st seed sample", (9.03, 7.68), "spa/0", group="DPO"),
              Row("DPO, 2nd seed sample", (8.74, 7.17), "sample_1/0", group="DPO"),
              Row("DPO, 3rd seed sample", (9.54, 7.59), "sample_2/0", group="DPO"),
              Row("SPA, 1st seed sample", (16.23, 19.94), "spa/2", group="SPA"),
              Row("SPA, 2nd seed sample", (13.77, 20.06), "sample_1/2", group="SPA"),
              Row("SPA, 3rd seed sample", (16.38, 19.74), "sample_2/2", group="SPA")]),
    "5": ("Kinds of model (two iterations)", "", [
        Row(f"{kind}: {name}", numbers, f"{variant}/{t}", family=kind) for kind, variant, *paper in (
            ("Phi (for Phi-2)", "phi", (5.88, 3.78), (7.02, 5.67), (9.10, 9.43)),
            ("Llama (for LLaMA-3-8B)", "spa", (21.40, 21.71), (24.17, 25.39), (25.03, 34.84)),
            ("Mistral (for Phi-3-14B)", "mistral", (26.51, 21.41), (27.70, 22.12), (28.77, 24.14)))
        for name, t, numbers in zip(("SFT", "DPO", "SPA"), ("sft", 0, 2), paper)]),
    "6": ("Ablation", "", [
        Row("SFT", (7.58, 4.72), "spa/sft"), Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"),
        Row("SPA, data expansion only", (14.41, 19.91), "spa_none/3"),
        Row("SPA, and self-refinement", (14.70, 19.94), "spa_self/3"),
        Row("SPA, and de-coupled detection", (15.39, 21.13), "spa/3"),
        Row("Worst-case reweighting (not in the paper)", (), "worst_case/3")]),
    "7": ("Judging iteration 2", "", [
        Row("SPA after iteration 1", (10.57, 11.89), "spa_none/1"),
        Row("Eq. 7 with initial SFT model", (15.08, 19.56), "spa_none/2"),
        Row("Eq. 7 with previous model", (13.73, 17.66), "previous/2"),
        Row("Judgment with reward model (PairRM)", (13.57, 13.72), "then_reward/2"),
        Row("Judgment without reference model", (12.83, 12.35), "no_reference/2")]),
    "10": ("Length penalty", "", [
        Row("Base model", (0.17, 0.50, 5692), "spa/base"), Row("SFT", (7.58, 4.72, 901), "spa/sft"),
        Row("DPO, 3.3 %", (9.03, 7.68, 1802), "spa/0"), Row("DPO, 100 % (Zephyr)", (11.75, 10.03, 1552), "all_gold/0"),
        Row("SPA (original, iteration 1)", (11.88, 12.95, 2150), "spa/1"),
        Row("SPA (modified, iteration 1)", (11.39, 12.31, 2013), "length_penalty/1"),
        Row("SPA (original, iteration 2)", (16.23, 19.94, 2749), "spa/2"),
        Row("SPA (modified, iteration 2)", (14.46, 18.23, 2448), "length_penalty/2")]),
    "11": ("LLM-as-judge from the previous model", '"Previous model": pi_1 of a twin of iteration 1 whose vocabulary '
           "has the words of the judging prompt, which the policy's lacks.", [
               Row("LLM-as-judge (iteration 1)", (8.88, 8.01), "llm/1"),
               Row("LLM-as-judge (iteration 2, original)", (9.49, 8.46), "llm/2"),
               Row("LLM-as-judge (iteration 2, previous model)", (9.74, 10.09), "llm_again/2"),
               Row("SPA (iteration 2)", (15.46, 19.91), "spa/2")]),
    # the paper's text has some of the figure's numbers; SPA's first two are those of Table 10
    "F3": ("Iterations", "", [
        Row(f"{name}, iteration {t}", paper.get(t, ()), f"{variant}/{t}", family=t) for name, variant, paper in (
            ("reward model", "reward", {3: (11.87, 9.46)}),
            ("LLM-as-judge", "llm", {1: (8.88, 8.01), 2: (9.49, 8.46), 3: (9.28, 9.18)}),
            ("SPA", "spa", {1: (11.88, 12.95), 2: (16.23, 19.94), 3: (15.39, 21.13)})) for t in (1, 2, 3)]),
    "F4": ("No seed data", "", [
        Row("Instruction-tuned model", (10.14, 6.31), "no_seed/0"),
        Row("SPA without a seed, iteration 1", (), "no_seed/1"),
        Row("SPA without a seed, iteration 2", (), "no_seed/2"),
        Row("SPA without a seed, iteration 3", (11.59, 9.79), "no_seed/3")])}

# ---------------------------------------------------------------------------------------------
# The stages

Task = namedtuple("Task", "output stage options")  # stage: a script, with the command that it takes before its options
SEED_PARTS = {"seed_0.8": 4, "seed_1.7": 2, "seed_10": 1 / 3}  # the seed is divided by it
REFINE = {"spa_self": "self", "worst_case": "worst-case"} | dict.fromkeys(
    ("spa_none", "reward", "then_reward", "previous", "no_reference", "llm", "llm_again", "llm_words"), "none")


def world_options(seed):
    """{script: [the options of each of its commands]} in run_all.sh, without those that name models or files."""
    # with an LLM as judge: that has all the commands of the default, and trains the judge
    fixed = dict(SEED=str(seed), JUDGE="llm", JUDGE_MODEL="", PI_0="", LENGTH_PENALTY="", NPROC="1", NNODES="1",
                 MAX_RESTARTS="0", PYTHON="python", RUNS="", NAME="")
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), "world", "--dry-run"], env=os.environ | fixed,
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        _, script, *words = shlex.split(line)
        options = {}
        for word in words:
            if word.startswith("--"):
                values = options[word[2:].replace("-", "_")] = []
            elif options:  # before the first option: the command of 05_eval.py
                values.append(word)
        for key in ("name", "label_share", "judge", "llm_judge", "refine"):
            options.pop(key, None)
        found[script].append({key: True if values == [] else values[0] if len(values) == 1 else values
                              for key, values in options.items() if not any(v.startswith("runs/") for v in values)})
    return found


class Plan:
    """The stages of one seed. tasks: {output: Task}, in an order in which they can run"""

    def __init__(self, folder, seed):
        self.folder, self.tasks, self.outputs, self.of = folder, {}, {}, world_options(seed)
        # {table: outputs of its rows}. All of them, whichever are wanted: who asks for an output first, names it.
        self.evaluated = {key: [self.evaluate(row.model) for row in rows] for key, (_, _, rows) in TABLES.items()}

    def needed(self, keys):
        """The tasks that these tables need, in order."""
        wanted, left = set(), [output for key in keys for output in self.evaluated[key]]
        while left:
            path = left.pop()
            output = path if path in self.tasks else path.parent
            if output not in wanted:
                wanted.add(output)
                left += [value for value in self.tasks[output].options.values() if isinstance(value, Path)]
        return [task for output, task in self.tasks.items() if output in wanted]

    def run(self, name, stage, **options):
        """The output of a stage: the path named here, or in an earlier call with the same options."""
        key = json.dumps([stage, options], sort_keys=True, default=str)
        if key not in self.outputs:
            output = self.outputs[key] = self.folder / name
            assert output not in self.tasks, output
            self.tasks[output] = Task(output, stage, options)
        return self.outputs[key]

    def evaluate(self, model):
        """The folder of a model's evaluation. model: as in TABLES"""
        variant, t = model.split("/")
        folder = (self.data(variant) / "base" if t == "base" else self.pi_init(variant) if t == "sft"
                  else self.spa(variant, min(int(t), len(self.of["04_refined_dpo.py"]))))
        return self.run(f"eval/{folder.relative_to(self.folder)}", "05_eval.py sample", model=folder,
                        input=self.data() / "eval.jsonl", gold=self.data() / "gold.json", **self.of["05_eval.py"][0])

    def data(self, variant="spa"):
        [world] = self.of["00_inputs.py"]
        if variant in SEED_PARTS:
            size = str(round(int(world["seed_size"]) / SEED_PARTS[variant]))
            return self.run(f"data_{variant}", "00_inputs.py", **world | {"seed_size": size})
        if variant in ("sample_1", "sample_2"):
            return self.run(f"data_{variant}", "00_inputs.py", source=self.data("seed_10") / "all_gold.jsonl",
                            seed=variant[-1], eval_size=0, **{key: world[key] for key in ("seed_size", "prompt_sizes")})
        own = {"phi": dict(shape="phi"), "mistral": dict(shape="mistral"), "llm_words": dict(llm_judge=True)}
        return self.run(f"data_{variant}", "00_inputs.py", **world, **own.get(variant, {}))

    def pi_init(self, variant="spa"):
        if variant not in ("phi", "mistral", "llm_words"):
            variant = "spa"
        return self.sft(f"pi_init_{variant}", self.data(variant) / "base", self.data(variant) / "sft.jsonl")

    def sft(self, name, model, data, **options):
        return self.run(name, "00_sft.py", model=model, input=data, **self.of["00_sft.py"][0] | options)

    def reward_model(self):
        return self.run("reward_model", "benchmarks/reward_model.py", model=self.pi_init(),
                        input=self.data() / "all_gold.jsonl", seed=self.of["00_inputs.py"][0]["seed"])

    def llm_judge(self, name, model):
        """LLM-as-judge (App. B.2), from a model whose vocabulary has the words of Listing 1."""
        return self.run(name, "00_sft.py", model=model, input=self.data("llm_words") / "judge_sft.jsonl",
                        **self.of["00_sft.py"][1])

    def spa(self, variant, t):
        """pi_t of a variant of SPA."""
        if t == 0:
            if variant == "no_seed":
                return self.sft("pi_instruct", self.pi_init(), self.data() / "sft_kind.jsonl", epochs="1")
            name, epochs = ("all_gold.jsonl", {"epochs": "1"}) if variant == "all_gold" else ("seed.jsonl", {})
            return self.run(f"pi_0_{variant}", "01_seed_dpo.py", model=self.pi_init(variant),
                            input=self.data(variant) / name, **self.of["01_seed_dpo.py"][0] | epochs)
        policy = self.spa(variant, t - 1)
        responses = self.run(f"{variant}/responses_{t}.jsonl", "02_generate.py", model=policy,
                             input=self.data(variant) / f"prompts_{t}.jsonl", **self.of["02_generate.py"][t - 1])
        preferences = self.run(f"{variant}/preferences_{t}.jsonl", "03_judge.py", input=responses,
                               **self.judge(variant, t, policy), **self.of["03_judge.py"][t - 1])
        return self.run(f"{variant}/pi_{t}", "04_refined_dpo.py", model=policy, input=preferences,
                        refine=REFINE.get(variant, "decoupled"), **self.of["04_refined_dpo.py"][t - 1])

    def judge(self, variant, t, policy):
        """The options of 03_judge.py. Table 7's variants differ from the second iteration on."""
        beta = self.of["04_refined_dpo.py"][0]["beta"]
        if variant == "reward" or variant == "then_reward" and t > 1:
            return dict(judge="reward", reward_model=self.reward_model())
        if variant == "llm_again" and t > 1:
            return dict(judge="llm", judge_model=self.llm_judge("judge_again", self.spa("llm_words", 1)))
        if variant in ("llm", "llm_again", "llm_words"):
            return dict(judge="llm", judge_model=self.llm_judge("judge", self.pi_init("llm_words")))
        if variant == "previous" and t > 1:
            return dict(judge="previous", model=policy, ref_model=self.spa(variant, t - 2), beta=beta)
        if variant == "no_reference" and t > 1:
            return dict(judge="none", model=policy, beta=beta)
        penalty = dict(length_penalty="auto") if variant == "length_penalty" else {}
        return dict(model=policy, init_model=self.pi_init(variant), beta=beta, **penalty)  # Eq. 7


# ---------------------------------------------------------------------------------------------
# Running the stages


def words(task):
    """A task as the words of a command line, from the script on."""
    return [*task.stage.split(), *command_line({"output": task.output} | task.options)]


def run_tasks(tasks):
    """Run stages in turn, in this process: torch is imported once. Returns None, or a line on the stage that failed."""
    torch.set_num_threads(1)
    for task in tasks:
        started, log = time.time(), Path(f"{task.output}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.argv = words(task)
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except Exception as error:
                traceback.print_exception(error)
                status = 1
        if status != 0:
            last = log.read_text().strip().splitlines()[-1:]
            return f"{task.stage} ended with status {status}: {' '.join(last)} (log: {log}; run again to resume)"
        print(f"{task.output}: {time.time() - started:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------
# The report


def cell(values):
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def order(rows, found):
    """A sentence on the pairs of rows in the paper's order. found: for each row {metric: [its value of each seed]}"""
    said = []
    for m, (metric, name) in enumerate(METRICS.items()):
        pairs, against = 0, []
        for (one, a), (two, b) in itertools.combinations(zip(rows, found), 2):
            apart = one.family != two.family or one.group is not None and one.group == two.group
            if apart or m >= min(len(one.paper), len(two.paper)) or one.paper[m] == two.paper[m]:
                continue
            pairs += 1
            low, high = (one, two) if one.paper[m] < two.paper[m] else (two, one)
            a, b = (a, b) if low is one else (b, a)
            gains = [y - x for x, y in zip(a[metric], b[metric])]
            if statistics.mean(gains) <= 0:
                against.append((statistics.mean(gains),
                                f"\"{high.label}\" is not above \"{low.label}\" ({cell(gains)})"))
        if pairs:
            worst = [text for _, text in sorted(against)[:3]]
            more = f", and {len(against) - 3} more" if len(against) > 3 else ""
            said.append(f"by {name}, {pairs - len(against)} of {pairs} pairs of rows are in the paper's order"
                        + (f" (not: {'; '.join(worst)}{more})" if against else ""))
    sentence = "; ".join(said) or "the paper has no numbers to compare with"
    return sentence[0].upper() + sentence[1:] + "."


def markdown(key, rows, found):
    title, remark, _ = TABLES[key]
    kind = f"Figure {key[1:]}" if key[0] == "F" else f"Table {key}"
    lengths = any(len(r.paper) > 2 for r in rows)
    head = ["", "LC win rate (%)", "Win rate (%)", "Length (chars)", "paper: LC", "paper: win rate"]
    lines = [f"## {kind}: {title}", "", "| " + " | ".join(head + ["paper: length"] * lengths) + " |",
             "|---" * (len(head) + lengths) + "|"]
    for r, values in zip(rows, found):
        numbers = [f"{r.paper[k]:g}" if k < len(r.paper) else "-" for k in range(2 + lengths)]
        lines.append("| " + " | ".join([r.label, *(cell(values[metric]) for metric in METRICS), *numbers]) + " |")
    return "\n".join([*lines, "", *([remark, ""] if remark else []), order(rows, found), ""])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, default=list(TABLES), help="a table, or a figure (default: all)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--runs", type=Path, default=ROOT / "runs" / "tables", help="folder of the runs")
    add("--output", type=Path, help="Markdown file (default, for all tables: benchmarks/TABLES.md)")
    add("--jobs", type=int, default=os.cpu_count(), help="seeds at a time, each on one core")
    add("--dry-run", action="store_true", help="print the commands without running them")
    args = parser.parse_args()
    if args.output is None and args.table == list(TABLES):
        args.output = ROOT / "benchmarks" / "TABLES.md"
    return args


def main():
    args, started = parse_args(), time.time()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    plans = [Plan(args.runs / f"seed{seed}", seed) for seed in args.seeds]
    tasks = [plan.needed(args.table) for plan in plans]
    if args.dry_run:
        for task in itertools.chain(*tasks):
            print(shlex.join(["python", *words(task)]))
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:  # leaving it ends the other seeds
        for failed in pool.imap_unordered(run_tasks, tasks):
            if failed:
                sys.exit(f"tables.py: {failed}")
        pool.close()
        pool.join()

    blocks = []
    for key in args.table:
        metrics = [[json.loads((output / "metrics.json").read_text()) for output in plan.evaluated[key]]
                   for plan in plans]
        values = [{metric: [of_row[metric] for of_row in seeds] for metric in METRICS} for seeds in zip(*metrics)]
        blocks.append(markdown(key, TABLES[key][2], values))
    tasks = list(itertools.chain(*tasks))
    seconds = sum(json.loads(runs.args_path(task.output).read_text())["seconds"] for task in tasks)
    command = shlex.join(["python", "benchmarks/tables.py", *sys.argv[1:]])
    text = (f"# The paper's tables in the small world\n\n`{command}`, {date.today()}: seeds "
            f"{', '.join(map(str, args.seeds))}, mean ± standard deviation over them; {len(tasks)} runs of a stage, "
            f"{seconds / 60:.0f} minutes of one core. Win rates are against a skilled writer's answers, by the gold "
            "judge; the paper's are against GPT-4's, by GPT-4, so only the order of the rows can be compared.\n\n"
            + "\n".join(blocks))
    print("\n" + text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        print(f"{args.output} ({(time.time() - started) / 60:.1f} min)")


if __name__ == "__main__":
    main()
