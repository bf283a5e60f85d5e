"""The paper's comparisons in the small world: Tables 1 to 7, 10, 11 and Figures 3, 4, over several seeds.

    python benchmarks/tables.py                     # all of them, into benchmarks/TABLES.md
    python benchmarks/tables.py --table 6           # one of them (a figure is F3 or F4), printed
    python benchmarks/tables.py --dry-run           # what would be run

Every row is a run of the stages with the options that the README names, at the settings of `bash run_all.sh world`
(the environment overrides them, as there). A model or a file that rows or tables share is made once. The runs lie in
runs/tables/seedN; what is there is not made again, what was broken off goes on. A stage has one core, so several run at
a time.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import statistics
import sys
import time
import traceback
from collections import namedtuple
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

Task = namedtuple("Task", "output stage options needs")
# label: as in the paper; paper: its LC win rate, win rate and length, None where it has none; output: of 05_eval.py;
# rows of different families (Table 5: models) are not compared, nor are rows of one group (Table 4: samples)
Row = namedtuple("Row", "label paper output family group")
NOTES = {"2": "The reward model learnt from the gold labels of all prompts, 30 times the seed.",
         "4": "Another sample of the seed here leaves other prompts for the iterations.",
         "11": '"Previous model": pi_1 of a twin of iteration 1 whose vocabulary has the words of the judging prompt, which '
               "the policy's lacks."}
METRICS = {"length_controlled_winrate": "LC win rate", "win_rate": "win rate", "avg_length": "length"}


def row(label, paper, output, family="", group=None):
    return Row(label, (*paper, *[None] * (3 - len(paper))), output, family, group)


def world_settings():
    """The block "Settings" of run_all.sh as it is for the small world, as texts."""
    text = (ROOT / "run_all.sh").read_text()
    world = re.search(r"^  world\).*?;;", text, re.S | re.M).group(0)
    settings = dict(re.findall(r"\$\{(\w+):=([^}]*)\}", text.replace(world, "")))
    settings |= dict(re.findall(r"\$\{(\w+):=([^}]*)\}", world))
    return {key: os.environ.get(key) or value for key, value in settings.items()}


# ---------------------------------------------------------------------------------------------
# What is run


class Plan:
    """The runs of one seed: {output: Task}. A run that is asked for twice, under whatever names, is one."""

    def __init__(self, folder, seed):
        self.folder, self.seed, self.tasks, self.same = folder, seed, {}, {}
        self.set = world_settings()
        sizes = self.set["PROMPT_SIZES"].split()
        self.sampling = dict(temperature=self.set["TEMPERATURE"], max_new_tokens=self.set["MAX_NEW_TOKENS"], seed=seed,
                             micro_batch_size=self.set["SAMPLING_BATCH_SIZE"])
        self.training = dict(beta=self.set["BETA"], lr=self.set["LR"], batch_size=self.set["BATCH_SIZE"],
                             micro_batch_size=self.set["MICRO_BATCH_SIZE"], seed=seed)
        self.world = dict(source="world", all_gold=True, seed_size=self.set["SEED_SIZE"], prompt_sizes=sizes,
                          eval_size=self.set["EVAL_SIZE"], sft_size=self.set["SFT_SIZE"], seed=seed)
        # what the tables share
        self.data = self.run("data", "00_inputs", **self.world)
        self.pi_init = self.sft("pi_init", self.data / "base")
        self.pi_0 = self.dpo("pi_0", self.pi_init, self.data / "seed.jsonl")
        self.all_gold = self.dpo("dpo_all_gold", self.pi_init, self.data / "all_gold.jsonl", epochs=1)

    def run(self, name, stage, **options):
        """The output of a stage, a path named in this call or, for the same stage and options, in an earlier one."""
        key = json.dumps([stage, options], sort_keys=True, default=str)
        if key not in self.same:
            output = self.same[key] = self.folder / name
            assert output not in self.tasks, output
            paths = [value for value in options.values() if isinstance(value, Path)]
            needs = [made for path in paths for made in (path, path.parent) if made in self.tasks]
            self.tasks[output] = Task(output, stage, options, needs)
        return self.same[key]

    def sft(self, name, model, data=None, **options):
        return self.run(name, "00_sft", model=model, input=data or self.data / "sft.jsonl", **dict(
            lr=self.set["SFT_LR"], epochs=self.set["SFT_EPOCHS"], batch_size=self.set["SFT_BATCH_SIZE"],
            micro_batch_size=self.set["SFT_BATCH_SIZE"], seed=self.seed) | options)

    def dpo(self, name, model, data, **options):
        return self.run(name, "01_seed_dpo", model=model, input=data,
                        **dict(epochs=self.set["SEED_EPOCHS"]) | self.training | options)

    def eval(self, model):
        name = model.relative_to(self.folder)
        return self.run(f"eval/{name}", "05_eval", model=model, input=self.data / "eval.jsonl",
                        gold=self.data / "gold.json", **self.sampling)

    def iterate(self, name, t, policy, judge, refine="none", data=None):
        """pi_t from pi_{t-1}: sample, judge, train. judge: options of 03_judge.py"""
        responses = self.run(f"{name}/responses_{t}.jsonl", "02_generate", model=policy, cut=self.set["CUT"],
                             input=(data or self.data) / f"prompts_{t}.jsonl", **self.sampling)
        preferences = self.run(f"{name}/preferences_{t}.jsonl", "03_judge", input=responses, **judge,
                               micro_batch_size=self.set["SAMPLING_BATCH_SIZE"])
        refining = {}
        if refine in ("self", "decoupled"):
            refining |= dict(alpha=self.set["ALPHA"], k_percent=self.set["K_PERCENT"])
        if refine == "decoupled":
            refining |= dict(lam=self.set["LAMBDAS"].split()[t - 1])
        return self.run(f"{name}/pi_{t}", "04_refined_dpo", model=policy, input=preferences, refine=refine, **refining,
                        **self.training)

    def init(self, policy, pi_init=None):
        """Eq. 7"""
        return dict(model=policy, init_model=pi_init or self.pi_init, beta=self.set["BETA"])

    def spa(self, name, iterations, pi_0=None, refine="decoupled", judge=None, data=None):
        """[pi_0, ..., pi_T]. judge: policy -> options of 03_judge.py, Eq. 7 without it"""
        models = [pi_0 or self.pi_0]
        for t in range(1, iterations + 1):
            models.append(self.iterate(name, t, models[-1], (judge or self.init)(models[-1]), refine, data))
        return models

    def judge_of_seed(self, name, model):
        """LLM-as-judge (App. B.2): a language model that learnt the seed's preferences as questions and answers."""
        return self.sft(name, model, self.data / "judge_sft.jsonl", lr=self.set["JUDGE_LR"],
                        epochs=self.set["JUDGE_EPOCHS"], batch_size=self.set["JUDGE_BATCH_SIZE"])

    def tables(self):
        """{number: (title, [Row])}. The numbers are the paper's: LC win rate, win rate, mean length."""
        data, gold, last = self.data, self.all_gold, len(self.set["PROMPT_SIZES"].split())
        spa = self.spa("spa", last)
        plain = self.spa("spa_none", last, refine="none")
        smooth = self.spa("spa_self", last, refine="self")
        worst = self.spa("worst_case", last, refine="worst-case")
        reward_model = self.run("reward_model", "benchmarks/reward_model", model=self.pi_init, seed=self.seed,
                                input=data / "all_gold.jsonl")
        reward = self.spa("reward", last, refine="none",
                          judge=lambda _: dict(judge="reward", reward_model=reward_model))
        # the judge is a model of its own, whose vocabulary has the words of Listing 1; it reads texts, not token ids
        words = self.run("data_words", "00_inputs", **self.world, judge_words=True)
        pi_init_words = self.sft("pi_init_words", words / "base")
        judge = self.judge_of_seed("judge", pi_init_words)
        llm = self.spa("llm", last, refine="none", judge=lambda _: dict(judge="llm", judge_model=judge))
        e = self.eval
        base, sft, dpo = row("Base model", (0.17, 0.50, 5692), e(data / "base")), row(
            "SFT", (7.58, 4.72, 901), e(self.pi_init)), row("DPO, 3.3 %", (9.03, 7.68, 1802), e(self.pi_0))
        zephyr = row("DPO, 100 % (Zephyr)", (11.75, 10.03, 1552), e(gold))

        def short(*rows):  # without the lengths, which only Table 10 has
            return [r._replace(paper=(*r.paper[:2], None)) for r in rows]

        tables = {}
        tables["1"] = "Main results", [*short(base, zephyr, sft, dpo), row("SPA, 3.3 %", (15.39, 21.13), e(spa[-1]))]
        tables["2"] = "Ways to judge", [
            row("Iterative DPO, reward model (PairRM)", (11.87, 9.46), e(reward[-1])),
            row("Iterative DPO, LLM-as-judge", (9.28, 9.18), e(llm[-1])), row("SPA", (15.39, 21.13), e(spa[-1]))]

        sizes = {"0.8 %": 4, "1.7 %": 2, "3.3 %": 1, "10 %": 1 / 3}
        paper = {"0.8 %": (7.85, 5.53, 10.36, 11.34), "1.7 %": (7.68, 5.49, 12.36, 13.72),
                 "3.3 %": (9.03, 7.68, 16.23, 19.94), "10 %": (11.37, 9.32, 18.52, 23.79)}
        rows, pools = [], {}
        for name, part in sizes.items():
            seed_size = str(round(int(self.set["SEED_SIZE"]) / part))
            pools[name] = self.run(f"data_{name.split()[0]}", "00_inputs", **self.world | {"seed_size": seed_size})
            start = self.dpo(f"pi_0_{name.split()[0]}", self.pi_init, pools[name] / "seed.jsonl")
            two = self.spa(f"spa_{name.split()[0]}", min(2, last), start, data=pools[name])
            rows += [row(f"DPO, {name}", paper[name][:2], e(start)), row(f"SPA, {name}", paper[name][2:], e(two[-1]))]
        tables["3"] = "Seed sizes (two iterations)", [*rows[::2], *rows[1::2]]

        rows = [row("DPO, 1st seed sample", (9.03, 7.68), e(self.pi_0), group="DPO"),
                row("SPA, 1st seed sample", (16.23, 19.94), e(spa[:3][-1]), group="SPA")]
        for k, nth, dpo_paper, spa_paper in ((1, "2nd", (8.74, 7.17), (13.77, 20.06)),
                                             (2, "3rd", (9.54, 7.59), (16.38, 19.74))):
            sample = self.run(f"data_sample_{k}", "00_inputs", source=pools["10 %"] / "all_gold.jsonl", eval_size=0,
                              seed_size=self.set["SEED_SIZE"], prompt_sizes=self.world["prompt_sizes"], seed=k)
            start = self.dpo(f"pi_0_sample_{k}", self.pi_init, sample / "seed.jsonl")
            two = self.spa(f"spa_sample_{k}", min(2, last), start, data=sample)
            rows += [row(f"DPO, {nth} seed sample", dpo_paper, e(start), group="DPO"),
                     row(f"SPA, {nth} seed sample", spa_paper, e(two[-1]), group="SPA")]
        tables["4"] = "Three samples of the seed (two iterations)", [*rows[::2], *rows[1::2]]

        paper = {"phi": ("Phi (for Phi-2)", (5.88, 3.78), (7.02, 5.67), (9.10, 9.43)),
                 "llama": ("Llama (for LLaMA-3-8B)", (21.40, 21.71), (24.17, 25.39), (25.03, 34.84)),
                 "mistral": ("Mistral (for Phi-3-14B)", (26.51, 21.41), (27.70, 22.12), (28.77, 24.14))}
        rows = []
        for shape, (label, *numbers) in paper.items():
            pi_init, start, two = self.pi_init, self.pi_0, spa[:3]
            if shape != "llama":
                kind = self.run(f"data_{shape}", "00_inputs", **self.world | {"shape": shape})
                pi_init = self.sft(f"pi_init_{shape}", kind / "base")
                start = self.dpo(f"pi_0_{shape}", pi_init, data / "seed.jsonl")
                two = self.spa(f"spa_{shape}", min(2, last), start,
                               judge=lambda policy, pi_init=pi_init: self.init(policy, pi_init))
            rows += [row(f"{label}: {name}", numbers[k], e(model), shape)
                     for k, (name, model) in enumerate({"SFT": pi_init, "DPO": start, "SPA": two[-1]}.items())]
        tables["5"] = "Kinds of model (two iterations)", rows

        tables["6"] = "Ablation", [
            *short(sft, dpo), row("SPA, data expansion only", (14.41, 19.91), e(plain[-1])),
            row("SPA, and self-refinement", (14.70, 19.94), e(smooth[-1])),
            row("SPA, and de-coupled detection", (15.39, 21.13), e(spa[-1])),
            row("Worst-case reweighting (not in the paper)", (), e(worst[-1]))]

        def second(name, **judge):  # iteration 2 from the first one of SPA without refinement
            return e(self.iterate(name, 2, plain[1], judge)) if last > 1 else e(plain[1])
        tables["7"] = "Judging iteration 2", [
            row("SPA after iteration 1", (10.57, 11.89), e(plain[1])),
            row("Eq. 7 with initial SFT model", (15.08, 19.56), e(plain[:3][-1])),
            row("Eq. 7 with previous model", (13.73, 17.66), second(
                "previous", judge="previous", model=plain[1], ref_model=self.pi_0, beta=self.set["BETA"])),
            row("Judgment with reward model (PairRM)", (13.57, 13.72), second(
                "then_reward", judge="reward", reward_model=reward_model)),
            row("Judgment without reference model", (12.83, 12.35), second(
                "no_reference", judge="none", model=plain[1], beta=self.set["BETA"]))]

        balanced = self.spa("length_penalty", min(2, last),
                            judge=lambda policy: self.init(policy) | dict(length_penalty="auto"))
        tables["10"] = "Length penalty", [
            base, sft, dpo, zephyr, row("SPA (original, iteration 1)", (11.88, 12.95, 2150), e(spa[1])),
            row("SPA (modified, iteration 1)", (11.39, 12.31, 2013), e(balanced[1])),
            row("SPA (original, iteration 2)", (16.23, 19.94, 2749), e(spa[:3][-1])),
            row("SPA (modified, iteration 2)", (14.46, 18.23, 2448), e(balanced[-1]))]

        # the previous model, had its vocabulary the words of Listing 1
        previous = self.iterate("llm_words", 1, self.dpo("pi_0_words", pi_init_words, data / "seed.jsonl"),
                                dict(judge="llm", judge_model=judge))
        again = self.judge_of_seed("judge_again", previous)
        tables["11"] = "LLM-as-judge from the previous model", [
            row("LLM-as-judge (iteration 1)", (8.88, 8.01), e(llm[1])),
            row("LLM-as-judge (iteration 2, original)", (9.49, 8.46), e(llm[:3][-1])),
            row("LLM-as-judge (iteration 2, previous model)", (9.74, 10.09), e(self.iterate(
                "llm_again", 2, llm[1], dict(judge="llm", judge_model=again)) if last > 1 else llm[1])),
            row("SPA (iteration 2)", (15.46, 19.91), e(spa[:3][-1]))]

        # of the figures the text has some numbers; SPA's first two are those of Table 10
        paper = {"reward model": (reward, {3: (11.87, 9.46)}), "LLM-as-judge": (llm, {
            1: (8.88, 8.01), 2: (9.49, 8.46), 3: (9.28, 9.18)}), "SPA": (spa, {
                1: (11.88, 12.95), 2: (16.23, 19.94), 3: (15.39, 21.13)})}
        tables["F3"] = "Iterations", [row(f"{name}, iteration {t}", numbers.get(t, ()), e(models[t]), f"iteration {t}")
                                      for name, (models, numbers) in paper.items() for t in range(1, last + 1)]

        instruct = self.sft("pi_instruct", self.pi_init, data / "sft_kind.jsonl", epochs=1)
        no_seed = self.spa("no_seed", last, instruct)
        numbers = {0: (10.14, 6.31), last: (11.59, 9.79)}
        tables["F4"] = "No seed data", [
            row(f"SPA without a seed, iteration {t}" if t else "Instruction-tuned model", numbers.get(t, ()), e(model))
            for t, model in enumerate(no_seed)]
        return tables


# ---------------------------------------------------------------------------------------------
# Running it


def words(task):
    """The command line of a task, after its stage."""
    line = ["--output", str(task.output)]
    for key, value in task.options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        line += ["--" + key.replace("_", "-"), *map(str, values)]
    return line


def is_done(task):
    """Whether the output is there, made with these options from these inputs."""
    try:
        made = json.loads(common.args_path(task.output).read_text())["made_from"]
    except (OSError, ValueError, KeyError):
        return False
    same = all(str(made["args"].get(key)) == str(value) or made["args"].get(key) == number(value)
               for key, value in task.options.items())
    return same and all(made["inputs"].get(key, found) == found for key, found in (
        (key, common.fingerprint(value)) for key, value in task.options.items() if isinstance(value, Path)))


def number(value):
    with contextlib.suppress(ValueError, TypeError):
        return float(value)
    return [number(one) for one in value] if isinstance(value, list) else value


def perform(task):
    """Run a stage in this process, which has torch imported already. -> (status, seconds)"""
    import torch
    torch.set_num_threads(1)
    log, started = Path(f"{task.output}.log"), time.time()
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = [str(ROOT / f"{task.stage}.py"), *words(task)]
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except Exception as error:
            traceback.print_exception(error)
            status = 1
    return status, time.time() - started


def perform_all(tasks, jobs):
    """Run what is not done, each as soon as what it needs is there. Exits with status 1 where one fails."""
    todo, done, running, seconds = dict(tasks), set(), {}, 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        while todo or running:
            for output in [output for output, task in todo.items() if done.issuperset(task.needs)]:
                if is_done(todo[output]):
                    done.add(output), todo.pop(output)
                elif len(running) < jobs:
                    task = todo.pop(output)
                    running[pool.submit(perform, task)] = task
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, (status, took) = running.pop(future), future.result()
                if status != 0:
                    pool.shutdown(cancel_futures=True)
                    tail = Path(f"{task.output}.log").read_text().strip().splitlines()[-1:]
                    sys.exit(f"tables.py: {task.stage} stopped with status {status}: {' '.join(tail)}\n"
                             f"its log is {task.output}.log; started again, the tables go on from there")
                done.add(task.output)
                seconds += took
                print(f"[{len(done)}/{len(tasks)}] {task.output}: {took:.0f} s, {seconds / 60:.1f} min in all",
                      flush=True)


def needed(plan, outputs):
    """The tasks that make these outputs, with all that they need, in the plan's order."""
    wanted, left = set(), list(outputs)
    while left:
        output = left.pop()
        if output not in wanted:
            wanted.add(output)
            left += plan.tasks[output].needs
    return {output: task for output, task in plan.tasks.items() if output in wanted}


# ---------------------------------------------------------------------------------------------
# Telling it


def cell(values):
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def order(rows, found):
    """One sentence on the order of the rows. rows: [Row]; found: [{metric: [its value of each seed]}]"""
    told = []
    for m, (metric, name) in enumerate(METRICS.items()):
        pairs, against = 0, []
        for (one, a), (two, b) in itertools.combinations(zip(rows, found), 2):
            apart = one.family != two.family or one.group is not None and one.group == two.group
            if apart or None in (one.paper[m], two.paper[m]) or one.paper[m] == two.paper[m]:
                continue
            pairs += 1
            low, high = (one, two) if one.paper[m] < two.paper[m] else (two, one)
            a, b = (a, b) if low is one else (b, a)
            gains = [y - x for x, y in zip(a[metric], b[metric])]
            gain = statistics.mean(gains)
            if gain <= 0:
                against.append((gain, f"\"{high.label}\" is not above \"{low.label}\" ({cell(gains)})"))
        if pairs:
            worst = [text for _, text in sorted(against)[:3]]
            more = f", and {len(against) - 3} more" if len(against) > 3 else ""
            told.append(f"by {name}, {pairs - len(against)} of {pairs} pairs of rows are in the paper's order"
                        + (f" (not: {'; '.join(worst)}{more})" if against else ""))
    sentence = "; ".join(told) or "the paper has no numbers to compare with"
    return sentence[0].upper() + sentence[1:] + "."


def markdown(key, title, rows, found):
    kind = f"Figure {key[1:]}" if key[0] == "F" else f"Table {key}"
    lengths = any(r.paper[2] is not None for r in rows)
    head = ["", "LC win rate (%)", "Win rate (%)", "Length (chars)", "paper: LC", "paper: win rate"]
    lines = [f"## {kind}: {title}", "", "| " + " | ".join(head + ["paper: length"] * lengths) + " |",
             "|---" * (len(head) + lengths) + "|"]
    for r, values in zip(rows, found):
        numbers = ["-" if value is None else f"{value:g}" for value in r.paper[:2 + lengths]]
        lines.append("| " + " | ".join([r.label, *(cell(values[metric]) for metric in METRICS), *numbers]) + " |")
    return "\n".join([*lines, "", *([NOTES[key], ""] if key in NOTES else []), order(rows, found), ""])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    keys = ["1", "2", "3", "4", "5", "6", "7", "10", "11", "F3", "F4"]
    parser.add_argument("--table", nargs="+", choices=keys, default=keys, help="a table, or a figure (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="folder of the runs")
    parser.add_argument("--output", type=Path, help="Markdown file (default, for all tables: benchmarks/TABLES.md)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="stages at a time, each on one core")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    if args.output is None and args.table == keys:
        args.output = ROOT / "benchmarks" / "TABLES.md"
    return args


def main():
    args, started = parse_args(), time.time()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    plans = [Plan(args.runs / f"seed{seed}", seed) for seed in args.seeds]
    tables = [plan.tables() for plan in plans]
    tasks = {}
    for plan, found in zip(plans, tables):
        tasks |= needed(plan, [r.output for key in args.table for r in found[key][1]])
    if args.dry_run:
        for task in tasks.values():
            print(shlex.join(["python", f"{task.stage}.py", *words(task)]))
        return
    perform_all(tasks, args.jobs)

    blocks = []
    for key in args.table:
        title, rows = tables[0][key]
        metrics = [[json.loads((r.output / "metrics.json").read_text()) for r in found[key][1]] for found in tables]
        values = [{metric: [seed[k][metric] for seed in metrics] for metric in METRICS} for k in range(len(rows))]
        blocks.append(markdown(key, title, rows, values))
    seconds = sum(json.loads(common.args_path(task.output).read_text())["seconds"] for task in tasks.values())
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
