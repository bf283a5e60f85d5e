"""The paper's comparisons in the small world, with controls, over several seeds: benchmarks/TABLES.md.

    python benchmarks/tables.py                     # all of them, into benchmarks/TABLES.md and figure_*.svg
    python benchmarks/tables.py --table 6 6b        # some of them (a figure is F3, F4 or F5b), printed
    python benchmarks/tables.py --dry-run           # print the commands without running them

A row's commands are those that `bash run_all.sh world --dry-run` prints, with the row's own models, files and options.
Variables of the environment count as they do there. What rows and tables share is made once, in runs/tables/seedN. Each
seed runs its stages one after another, on one core; run again, it skips those that are complete and resumes.

Rows are compared by the mean over the seeds of the difference within a seed, with its standard error. It counts as seen
where it is more than two standard errors from 0.
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
import subprocess
import sys
import time
import traceback
from collections import defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import torch
from shared import ROOT, cell, command_line, difference, markdown, mean_row, read_metrics

from extras.report import figure
from support import runs

METRICS = {"length_controlled_winrate": "LC win rate", "win_rate": "win rate", "avg_length": "length"}

# ---------------------------------------------------------------------------------------------
# The tables. A model is VARIANT/t: pi_t of a variant of SPA (t = 0: its DPO on the seed), its SFT or its base model.

# paper: LC win rate, win rate, length, as far as the paper has them; minus: the row that this one is compared with.
# The order of two rows is compared with the paper's within a family; None: with no other row.
Row = namedtuple("Row", "label paper model minus family", defaults=(None, ""))
TABLES = {  # title, remark, rows
    "1": ("Main results", "", [
        Row("Base model", (0.17, 0.50), "spa/base", family=None),
        Row("SFT", (7.58, 4.72), "spa/sft", "spa/0"), Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"),
        Row("DPO, 100 % (Zephyr)", (11.75, 10.03), "all_gold/0", "spa/0"),
        Row("SPA, 3.3 %", (15.39, 21.13), "spa/3", "spa/0")]),
    "C": ("Controls (not in the paper)",
          "SPA's updates see 6,400 pairs: the 200 of the seed three times, each of D_1 to D_3 once. DPO on the seed "
          "for 30 epochs sees 6,000, as does DPO on all gold labels for one. The last three rows have labels of D_1 to "
          "D_3 by a coin, by Eq. 7 and by gold, none of them refined.", [
              Row("SPA, 3.3 %", (), "spa/3"),
              *(Row(f"DPO, 3.3 %, {n} epochs", (), f"{name}/0", "spa/3")
                for n, name in ((3, "spa"), (10, "epochs_10"), (30, "epochs_30"))),
              *(Row(f"DPO, 100 %, {n}", (), f"{name}/0", "spa/3")
                for n, name in (("1 epoch", "all_gold"), ("3 epochs", "all_gold_3"))),
              Row("Labels at random", (), "random/3", "spa/0"), Row("Labels by Eq. 7", (), "spa_none/3", "spa/0"),
              Row("Labels by gold", (), "gold/3", "spa_none/3")]),
    "2": ("Ways to judge",
          "PairRM learnt from far more preferences than SPA's seed has, so the first row stands for it: its reward "
          "model learnt from the gold labels of all prompts, 30 times the seed. The second one learnt from the seed.", [
              Row("Iterative DPO, reward model of all labels (PairRM)", (11.87, 9.46), "reward/3", "spa/3"),
              Row("Iterative DPO, reward model of the seed's labels", (), "reward_seed/3", "spa/3"),
              Row("Iterative DPO, LLM-as-judge", (9.28, 9.18), "llm/3", "spa/3"),
              Row("SPA", (15.39, 21.13), "spa/3")]),
    "3": ("Seed sizes (two iterations)", "", [
        Row("DPO, 0.8 %", (7.85, 5.53), "seed_0.8/0"), Row("DPO, 1.7 %", (7.68, 5.49), "seed_1.7/0"),
        Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"), Row("DPO, 10 %", (11.37, 9.32), "seed_10/0"),
        Row("SPA, 0.8 %", (10.36, 11.34), "seed_0.8/2", "seed_0.8/0"),
        Row("SPA, 1.7 %", (12.36, 13.72), "seed_1.7/2", "seed_1.7/0"),
        Row("SPA, 3.3 %", (16.23, 19.94), "spa/2", "spa/0"),
        Row("SPA, 10 %", (18.52, 23.79), "seed_10/2", "seed_10/0")]),
    "4": ("Three samples of the seed (two iterations)",
          "Base model, SFT, prompts and evaluation are the same for the three samples of a world.", [
              Row(f"{name}, {k} sample", paper, f"{variant}/{t}", f"{variant}/0" if t else None, k)
              for name, t, papers in (
                  ("DPO", 0, [(9.03, 7.68), (8.74, 7.17), (9.54, 7.59)]),
                  ("SPA", 2, [(16.23, 19.94), (13.77, 20.06), (16.38, 19.74)]))
              for k, variant, paper in zip(("1st", "2nd", "3rd"), ("spa", "sample_1", "sample_2"), papers)]),
    "5": ("Kinds of model (two iterations; Phi one, App. B.3)", "", [
        Row(f"{kind}: {name}", numbers, f"{variant}/{t}", None if name == "DPO" else f"{variant}/0", kind)
        for kind, variant, last, *paper in (
            ("Phi (for Phi-2)", "phi", 1, (5.88, 3.78), (7.02, 5.67), (9.10, 9.43)),
            ("Llama (for LLaMA-3-8B)", "spa", 2, (21.40, 21.71), (24.17, 25.39), (25.03, 34.84)),
            ("Mistral (for Phi-3-14B)", "mistral", 2, (26.51, 21.41), (27.70, 22.12), (28.77, 24.14)))
        for name, t, numbers in zip(("SFT", "DPO", "SPA"), ("sft", 0, last), paper)]),
    "6": ("Ablation", "", [
        Row("SFT", (7.58, 4.72), "spa/sft"), Row("DPO, 3.3 %", (9.03, 7.68), "spa/0"),
        Row("SPA, data expansion only", (14.41, 19.91), "spa_none/3", "spa/0"),
        Row("SPA, and self-refinement", (14.70, 19.94), "spa_self/3", "spa_none/3"),
        Row("SPA, and de-coupled detection", (15.39, 21.13), "spa/3", "spa_self/3"),
        Row("Worst-case reweighting (not in the paper)", (), "worst_case/3", "spa_none/3")]),
    "7": ("Judging iteration 2", "The reward models are Table 2's.", [
        Row("SPA after iteration 1", (10.57, 11.89), "spa_none/1", "spa_none/2"),
        Row("Eq. 7 with initial SFT model", (15.08, 19.56), "spa_none/2"),
        Row("Eq. 7 with previous model", (13.73, 17.66), "previous/2", "spa_none/2"),
        Row("Judgment with reward model of all labels (PairRM)", (13.57, 13.72), "then_reward/2", "spa_none/2"),
        Row("Judgment with reward model of the seed's labels", (), "then_reward_seed/2", "spa_none/2"),
        Row("Judgment without reference model", (12.83, 12.35), "no_reference/2", "spa_none/2")]),
    "10": ("Length penalty", "In this world gold likes length a little (`00_inputs.py --gold-length`).", [
        Row("Base model", (0.17, 0.50, 5692), "long/base", family=None), Row("SFT", (7.58, 4.72, 901), "long/sft"),
        Row("DPO, 3.3 %", (9.03, 7.68, 1802), "long/0"),
        Row("DPO, 100 % (Zephyr)", (11.75, 10.03, 1552), "long_gold/0"),
        Row("SPA (original, iteration 1)", (11.88, 12.95, 2150), "long/1"),
        Row("SPA (modified, iteration 1)", (11.39, 12.31, 2013), "long_penalty/1", "long/1"),
        Row("SPA (original, iteration 2)", (16.23, 19.94, 2749), "long/2"),
        Row("SPA (modified, iteration 2)", (14.46, 18.23, 2448), "long_penalty/2", "long/2")]),
    "11": ("LLM-as-judge from the previous model", '"Previous model": pi_1 of a twin of iteration 1 whose vocabulary '
           "has the words of the judging prompt, which the policy's lacks.", [
               Row("LLM-as-judge (iteration 1)", (8.88, 8.01), "llm/1", "spa/2"),
               Row("LLM-as-judge (iteration 2, original)", (9.49, 8.46), "llm/2", "spa/2"),
               Row("LLM-as-judge (iteration 2, previous model)", (9.74, 10.09), "llm_again/2", "llm/2"),
               Row("SPA (iteration 2)", (15.46, 19.91), "spa/2")]),
    # the paper's text has some of the figure's numbers; SPA's first two are those of Table 10
    "F3": ("Iterations", "", [
        Row(f"{name}, iteration {t}", paper.get(t, ()), f"{variant}/{t}", None if name == "SPA" else f"spa/{t}", t)
        for name, variant, paper in (
            ("Reward model of all labels", "reward", {3: (11.87, 9.46)}),
            ("Reward model of the seed's labels", "reward_seed", {}),
            ("LLM-as-judge", "llm", {1: (8.88, 8.01), 2: (9.49, 8.46), 3: (9.28, 9.18)}),
            ("SPA", "spa", {1: (11.88, 12.95), 2: (16.23, 19.94), 3: (15.39, 21.13)})) for t in (1, 2, 3)]),
    "F4": ("No seed data", "", [
        Row("Instruction-tuned model", (10.14, 6.31), "no_seed/0"),
        *(Row(f"SPA without a seed, iteration {t}", (11.59, 9.79) if t == 3 else (), f"no_seed/{t}", f"no_seed/{t - 1}")
          for t in (1, 2, 3))]),
    "F5b": ("Iterations, without de-coupled detection",
            "The paper's figure has MT-Bench's score, which asks a second question after the answer. The small world's "
            "tokenizer and base model know one turn, and a second one would need a gold judge of conversations: Tables "
            "8 and 9 and Figure 5a are left out, and this figure has the win rate.", [
                Row(f"{name}, iteration {t}", (), f"{variant}/{t}", None if variant == "spa_self" else f"spa_self/{t}")
                for name, variant in (("Reward model of all labels", "reward"), ("SPA without DND", "spa_self"))
                for t in (1, 2, 3)])}

FIGURES = ("F3", "F4", "F5b")

# Table 6b: 04 alone, from one model and its labels. ARMS: options of 04; LABELS: of VARIANTS, and the arms that are run
ARMS = {"none": {}, "self, alpha 0.1, K 10 (the paper's)": dict(refine="self"),
        "de-coupled (Eq. 11, 12)": dict(refine="decoupled"), "self, alpha 1, K 10": dict(refine="self", alpha="1"),
        "self, alpha 1, K 30": dict(refine="self", alpha="1", k_percent="30"),
        **{f"worst case, epsilon {e}": dict(refine="worst-case", epsilon=e) for e in ("0.01", "0.05", "0.2")}}
LABELS = {"D_2 by Eq. 7": ({}, list(ARMS)),
          **{f"{share} % turned": (dict(flip=share / 100), [a for a in ARMS if a != "self, alpha 1, K 10"])
             for share in (10, 20, 30)},
          "D_2 by gold": (dict(judge="gold"), [a for a in ARMS if "alpha 1" not in a]),
          "the seed": (None, [a for a in ARMS if "alpha 1" not in a and "de-coupled" not in a])}
CELLS = [(labels, arm) for labels, (_, arms) in LABELS.items() for arm in arms]

# ---------------------------------------------------------------------------------------------
# The stages

Task = namedtuple("Task", "output stage options")  # stage: a script, with the command that it takes before its options
NONE = dict(refine="none")
SEED_PARTS = {"seed_0.8": 1 / 4, "seed_1.7": 1 / 2, "seed_10": 3}  # of the seed
GOLD_LENGTH = "0.03"  # a word: the longer of two writers' answers is the better one in 61 % of pairs
WORLDS = {"phi": dict(shape="phi"), "mistral": dict(shape="mistral"), "llm_words": dict(llm_judge=True),
          "long": dict(gold_length=GOLD_LENGTH), "sample_1": dict(seed_sample="1"), "sample_2": dict(seed_sample="2")}
# data: which world; labels: of the seed stage, epochs: its epochs; from the iteration after `after` on (default: all),
# judge: of 03_judge.py, flip: the share of its labels that is turned round; everything else is an option of 04
VARIANTS = {
    "spa": {}, "spa_none": NONE, "spa_self": dict(refine="self"),
    "worst_case": dict(refine="worst-case", epsilon="0.01"),
    "epochs_10": dict(epochs="10"), "epochs_30": dict(epochs="30"),
    "all_gold": dict(labels="all_gold.jsonl", epochs="1"), "all_gold_3": dict(labels="all_gold.jsonl", epochs="3"),
    "random": NONE | dict(flip=0.5), "gold": NONE | dict(judge="gold"),
    "reward": NONE | dict(judge="reward"), "reward_seed": NONE | dict(judge="reward_seed"),
    "then_reward": NONE | dict(judge="reward", after=1), "then_reward_seed": NONE | dict(judge="reward_seed", after=1),
    "previous": NONE | dict(judge="previous", after=1), "no_reference": NONE | dict(judge="none", after=1),
    "llm": NONE | dict(judge="llm"), "llm_again": NONE | dict(judge="llm_again"),
    "llm_words": NONE | dict(judge="llm", data="llm_words"), "no_seed": {},
    "long": dict(data="long"), "long_penalty": dict(data="long", judge="penalty"),
    "long_gold": dict(data="long", labels="all_gold.jsonl", epochs="1"),
    **{name: dict(data=name) for name in (*SEED_PARTS, "sample_1", "sample_2", "phi", "mistral")},
    **{f"{labels}, {arm}": dict(seed_options=NONE | ARMS[arm] | dict(lam="0")) if LABELS[labels][0] is None else
       NONE | LABELS[labels][0] | ARMS[arm] | dict(after=1) for labels, arm in CELLS}}


OWN_OPTIONS = "name", "label-share", "judge", "llm-judge", "llm-order", "refine"  # a row decides these


def world_options(seed):
    """{script: [the options of each of its commands]} in run_all.sh, without those that name models or files."""
    # with an LLM as judge: that has all the commands of the default, and trains the judge
    fixed = dict(SEED=str(seed), JUDGE="llm", JUDGE_MODEL="", PI_0="", LENGTH_PENALTY="", NPROC="1", NNODES="1",
                 MAX_RESTARTS="0", PYTHON="python", RUNS="", RUN_NAME="")
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), "world", "--dry-run"], env=os.environ | fixed,
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        _, script, command = line.split(" --then ")[0].split(" ", 2)  # the other models are evaluated like the first
        found[script].append({})
        for name, values in re.findall(r"--(\S+)((?: (?!--)\S+)*)", command):
            values = shlex.split(values)
            if name not in OWN_OPTIONS and not any(value.startswith("runs/") for value in values):
                found[script][-1][name.replace("-", "_")] = values[0] if len(values) == 1 else values or True
    return found


class Plan:
    """The stages of one seed. tasks: {output: Task}, in an order in which they can run"""

    def __init__(self, folder, seed):
        self.folder, self.tasks, self.outputs, self.of = folder, {}, {}, world_options(seed)
        # {table: outputs of its rows}. All of them, whichever are wanted: who asks for an output first, names it.
        self.evaluated = {key: [self.evaluate(row.model) for row in rows] for key, (_, _, rows) in TABLES.items()}
        self.flags = [self.find_flags(t, **lam) for lam in ({}, dict(lam="2")) for t in (1, 2, 3)]
        self.evaluated["6b"] = [self.evaluate(f"{labels}, {arm}/{0 if labels == 'the seed' else 2}")
                                for labels, arm in CELLS]

    def needed(self, keys):
        """The tasks that these tables need, in order."""
        wanted, left = set(), [output for key in keys for output in self.evaluated[key] + self.flags * (key == "6b")]
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
            output = self.outputs[key] = self.folder / name.replace(" %", "").replace(", ", "_").replace(" ", "_")
            assert output not in self.tasks, output
            self.tasks[output] = Task(output, stage, options)
        return self.outputs[key]

    def evaluate(self, model):
        """The folder of a model's evaluation. model: as in TABLES"""
        variant, t = model.rsplit("/", 1)
        folder = (self.data(variant) / "base" if t == "base" else self.pi_init(variant) if t == "sft"
                  else self.spa(variant, min(int(t), len(self.of["04_refined_dpo.py"]))))
        world = self.data("long" if VARIANTS[variant].get("data") == "long" else "spa")
        name = "_long" * (world != self.data()) + f"/{folder.relative_to(self.folder)}"
        return self.run(f"eval{name}", "05_eval.py sample", model=folder, input=world / "eval.jsonl",
                        gold=world / "gold.json", **self.of["05_eval.py"][0])

    def find_flags(self, t, **lam):
        """What flags.py finds in D_t of SPA without refinement; with the lambda of the iteration, or another one."""
        options = {key: self.of["04_refined_dpo.py"][t - 1][key]
                   for key in ("lam", "beta", "lr", "batch_size", "micro_batch_size", "seed")}
        return self.run(f"flags_{t}{'_lambda_2' * bool(lam)}.json", "benchmarks/flags.py",
                        model=self.spa("spa_none", t - 1), input=self.preferences("spa_none", t),
                        gold=self.data() / "gold.json", **options | lam)

    def data(self, variant="spa"):
        [world], kind = self.of["00_inputs.py"], VARIANTS[variant].get("data", "spa")
        own = dict(WORLDS.get(kind, {}))
        if kind in SEED_PARTS:
            own["seed_size"] = round(int(world["seed_size"]) * SEED_PARTS[kind])
        return self.run(f"data_{kind}", "00_inputs.py", **world | own)

    def pi_init(self, variant="spa"):
        kind = VARIANTS[variant].get("data")  # other seeds and another gold change neither the base model nor SFT
        kind = kind if kind in ("phi", "mistral", "llm_words") else "spa"
        return self.sft(f"pi_init_{kind}", self.data(kind) / "base", self.data(kind) / "sft.jsonl")

    def sft(self, name, model, data, **options):
        return self.run(name, "00_sft.py", model=model, input=data, **self.of["00_sft.py"][0] | options)

    def reward_model(self, labels, **options):
        return self.run(f"reward_model_{labels}", "benchmarks/reward_model.py", model=self.pi_init(),
                        input=self.data() / f"{labels}.jsonl", seed=self.of["00_inputs.py"][0]["seed"], **options)

    def llm_judge(self, name, model):
        """LLM-as-judge (App. B.2), from a model whose vocabulary has the words of Listing 1."""
        return self.run(name, "00_sft.py", model=model, input=self.data("llm_words") / "judge_sft.jsonl",
                        **self.of["00_sft.py"][1])

    def spa(self, variant, t):
        """pi_t of a variant of SPA."""
        own = VARIANTS[variant]
        if t == 0 and variant == "no_seed":
            return self.sft("pi_instruct", self.pi_init(), self.data() / "sft_kind.jsonl", epochs="1")
        if t == 0:
            stage, options = "01_seed_dpo.py", self.of["01_seed_dpo.py"][0] | {k: own[k] for k in own if k == "epochs"}
            if "seed_options" in own:
                stage, options = self.update(options | own["seed_options"])
            return self.run(f"pi_0_{variant}", stage, model=self.pi_init(variant),
                            input=self.data(variant) / own.get("labels", "seed.jsonl"), **options)
        if t <= own.get("after", 0):
            return self.spa("spa_none", t)
        options = {key: own[key] for key in ("refine", "alpha", "k_percent", "epsilon") if key in own}
        stage, options = self.update(dict(refine="decoupled") | self.of["04_refined_dpo.py"][t - 1] | options)
        return self.run(f"{variant}/pi_{t}", stage, model=self.spa(variant, t - 1),
                        input=self.preferences(variant, t), **options)

    def update(self, options):
        """(the script that trains so, its options). options: 04's, of which refine may be worst-case"""
        if options["refine"] != "worst-case":
            return "04_refined_dpo.py", options
        return "extras/worst_case_dpo.py", {key: value for key, value in options.items()
                                            if key not in ("refine", "alpha", "k_percent", "lam")}

    def preferences(self, variant, t):
        """D_t of a variant of SPA."""
        own, policy = VARIANTS[variant], self.spa(variant, t - 1)
        if t <= own.get("after", 0):
            return self.preferences("spa_none", t)
        responses = self.run(f"{variant}/responses_{t}.jsonl", "02_generate.py", model=policy,
                             input=self.data(variant) / f"prompts_{t}.jsonl", **self.of["02_generate.py"][t - 1])
        labelled = self.run(f"{variant}/preferences_{t}.jsonl", "03_judge.py", input=responses,
                            **self.judge(own.get("judge"), variant, t, policy), **self.of["03_judge.py"][t - 1])
        if "flip" not in own:
            return labelled
        return self.run(f"{variant}/turned_{t}.jsonl", "benchmarks/relabel.py", input=labelled, flip=own["flip"],
                        seed=self.of["00_inputs.py"][0]["seed"])

    def judge(self, name, variant, t, policy):
        """The options of 03_judge.py."""
        beta = self.of["04_refined_dpo.py"][0]["beta"]
        by_eq_7 = dict(model=policy, init_model=self.pi_init(variant), beta=beta)
        if name == "llm_again" and t == 1:
            name = "llm"
        judges = {  # functions: only the one that is wanted may ask for models
            None: lambda: by_eq_7,
            "penalty": lambda: by_eq_7 | dict(length_penalty="auto"),
            "previous": lambda: dict(judge="previous", model=policy, ref_model=self.spa(variant, t - 2), beta=beta),
            "none": lambda: dict(judge="none", model=policy, beta=beta),
            "gold": lambda: dict(judge="gold", gold=self.data() / "gold.json"),
            "reward": lambda: dict(judge="reward", reward_model=self.reward_model("all_gold")),
            # as many epochs as make its steps those of the other one, in order of magnitude
            "reward_seed": lambda: dict(judge="reward", reward_model=self.reward_model("seed", epochs="20")),
            "llm": lambda: dict(judge="llm", judge_model=self.llm_judge("judge", self.pi_init("llm_words"))),
            "llm_again": lambda: dict(judge="llm", judge_model=self.llm_judge("judge_again", self.spa("llm_words", 1)))}
        return judges[name]()


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


def order(rows, found):
    """Sentences on the pairs of rows whose order the paper gives: is it seen here?

    found: for each row {metric: [its value of each seed]}
    """
    text = []
    for m, (metric, name) in enumerate(METRICS.items()):
        seen, contrary, unseen = 0, [], []
        listed = [of_row for of_row in zip(rows, found) if len(of_row[0].paper) > m and of_row[0].family is not None]
        for pair in itertools.combinations(listed, 2):
            (low, a), (high, b) = sorted(pair, key=lambda of_row: of_row[0].paper[m])
            if low.family != high.family or low.paper[m] == high.paper[m]:
                continue
            mean, error = difference(b[metric], a[metric])
            if abs(mean) <= 2 * error:
                unseen.append(f'"{high.label}" minus "{low.label}" is {mean:+.1f} ± {error:.1f}')
            elif mean < 0:
                contrary.append(f'"{low.label}" is above "{high.label}" by {-mean:.1f} ± {error:.1f}')
            else:
                seen += 1
        pairs = seen + len(contrary) + len(unseen)
        if pairs:
            text.append(f"By {name}, {seen} of the paper's {pairs} orders are seen here."
                        + f" Contrary: {'; '.join(contrary)}." * bool(contrary)
                        + f" No difference seen: {'; '.join(unseen)}." * bool(unseen))
    return "\n\n".join(text)


def block(key, rows, found):
    """A table with its title and what is said of it. found: as of `order`"""
    title, remark, _ = TABLES[key]
    kind = f"Figure {key[1:]}" if key[0] == "F" else f"Table {key}"
    of_paper = ["LC", "win rate", "length"][:max(len(row.paper) for row in rows)]
    of_model = {row.model: (row.label, values["win_rate"]) for row, values in zip(rows, found)}
    lines = []
    for row, values in zip(rows, found):
        label, others = of_model.get(row.minus, ("", None))
        above = signed(values["win_rate"], others) + f" ({label})" if label else "-"
        numbers = [f"{row.paper[m]:g}" if m < len(row.paper) else "-" for m in range(len(of_paper))]
        lines.append([row.label, *(cell(values[metric]) for metric in METRICS), above, *numbers])
    head = " | ".join(["", "LC win rate (%)", "Win rate (%)", "Length (chars)", "Win rate above",
                       *(f"paper: {name}" for name in of_paper)])
    parts = [f"## {kind}: {title}", "\n".join(markdown(head, lines)), over_samples(rows, found) if key == "4" else "",
             f"![{title}](figure_{key[1:]}.svg)" if key in FIGURES else "", remark, order(rows, found)]
    return "\n\n".join(filter(None, parts)) + "\n"


def signed(a, b):
    """The paired difference a - b of the seeds that have both: its mean, and the standard error of that."""
    pairs = [pair for pair in zip(a, b, strict=True) if None not in pair]
    if not pairs:
        return "-"
    mean, error = difference(*zip(*pairs))
    return f"{mean:+.1f} ± {error:.1f}"


def over_samples(rows, found):
    """Table 4's last two columns: of each seed the average and the variance over the samples, then their means."""
    lines = []
    for name in ("DPO", "SPA"):
        samples = [values for row, values in zip(rows, found) if row.label.startswith(name)]
        for metric in ("length_controlled_winrate", "win_rate"):
            of_seed = list(zip(*(values[metric] for values in samples)))
            average, variance = (statistics.mean(map(f, of_seed)) for f in (statistics.mean, statistics.variance))
            lines.append(f"{name}, {METRICS[metric]}: average {average:.1f}, variance over the samples {variance:.1f} "
                         f"(standard deviation {variance ** 0.5:.1f}).")
    return " ".join(lines)


def detectors_table(flags):
    """flags: for the detectors of t = 1, 2, 3, then for those with lambda = 2, what flags.py found in each seed"""
    detectors = [("self", 0, "self (Eq. 9)"), ("decoupled", 0, "de-coupled (Eq. 11, 12), lambda 1/2, 1/4, 1/8"),
                 ("decoupled", 3, "de-coupled, lambda 2"), ("judge", 0, "the judge's certainty")]
    rows = []
    for t, (key, other, name) in itertools.product(range(3), detectors):
        values, of_self = ({metric: [seed[detector][metric] for seed in flags[t + other]]
                            for metric in ("precision", "unflagged", "auc", "as_self")} for detector in (key, "self"))
        above = {metric: "-" if key == "self" else signed(values[metric], of_self[metric]) for metric in values}
        rows.append([t + 1, name, cell(values["precision"]), above["precision"], cell(values["unflagged"]),
                     cell(values["auc"]), above["auc"], cell(values["as_self"])])
    return markdown("t | Detector | Wrong among the flagged (%) | above self's | among the others (%) | AUC (%) | "
                    "above self's | Flagged by self, too (%)", rows)


def arms_table(arms):
    """arms: {(labels, arm): [win rate of each seed]}"""
    def shown(labels, arm):
        if arm == "none" or (labels, arm) not in arms:
            return cell(arms[labels, arm]) if arm == "none" else ""
        mean, error = difference(arms[labels, arm], arms[labels, "none"])
        return f"{mean:+.2f} ± {error:.2f}" + "*" * (abs(mean) > 2 * error)

    return markdown("| " + " | ".join(LABELS), [[arm, *(shown(labels, arm) for labels in LABELS)] for arm in ARMS])


def table_6b(arms, flags):
    """What refinement does."""
    return "\n".join([
        "## Table 6b: What the refined labels do (not in the paper)", "",
        "Are the labels that a detector flags in D_t the wrong ones (`benchmarks/flags.py`; K = 10, alpha = 0)? The "
        "judge's certainty is the size of Eq. 7's margin. AUC: how often, of a wrong and a right label, the wrong one "
        "has the lower confidence.", "", *detectors_table(flags), "",
        "04 alone, from one pi_1 and one D_2: its labels by Eq. 7, with a share of them turned round at random, or by "
        "gold; in the last column pi_0, from the seed. Win rates of the first row, then paired differences from it ± "
        "standard error; * more than two standard errors.", "", *arms_table(arms), ""])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, every = parser.add_argument, [*TABLES, "6b"]
    add("--table", nargs="+", choices=every, default=every, help="a table, or a figure (default: all)")
    add("--seeds", type=int, nargs="+", default=range(61, 67), help="(no setting was tuned on 61 to 66)")
    add("--runs", type=Path, default=ROOT / "runs" / "tables", help="folder of the runs")
    add("--output", type=Path, help="Markdown file (default, for all tables: benchmarks/TABLES.md)")
    add("--jobs", type=int, default=os.cpu_count(), help="seeds at a time, each on one core")
    add("--dry-run", action="store_true", help="print the commands without running them")
    args = parser.parse_args()
    if args.output is None and args.table == every:
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
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        failed = list(filter(None, pool.map(run_tasks, tasks)))
    if failed:
        sys.exit("\n".join(f"tables.py: {line}" for line in failed))

    blocks = []
    for key in args.table:
        metrics = [list(map(read_metrics, outputs)) for outputs in zip(*(plan.evaluated[key] for plan in plans))]
        values = [{metric: [of_seed[metric] for of_seed in of_row] for metric in METRICS} for of_row in metrics]
        if key == "6b":
            flags = [[json.loads(path.read_text()) for path in paths] for paths in zip(*(plan.flags for plan in plans))]
            blocks.append(table_6b({cell: of_cell["win_rate"] for cell, of_cell in zip(CELLS, values)}, flags))
            continue
        rows = TABLES[key][2]
        blocks.append(block(key, rows, values))
        if key in FIGURES and args.output:
            drawn = [mean_row(of_row) | {"name": row.label} for row, of_row in zip(rows, metrics)]
            (args.output.parent / f"figure_{key[1:]}.svg").write_text(figure(drawn), encoding="utf-8")
    tasks = list(itertools.chain(*tasks))
    records = [runs.read_record(task.output) for task in tasks]
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    command = shlex.join(["python", "benchmarks/tables.py", *sys.argv[1:]])
    text = (f"# The paper's tables in the small world\n\n`{command}` at commit {commit.stdout.strip()}, "
            f"{date.today()}, {versions}: {len(tasks)} runs of a stage, "
            f"{sum(record['seconds'] for record in records) / 60:.0f} minutes of one core. Seeds "
            f"{', '.join(map(str, args.seeds))}: mean ± standard deviation; \"win rate above\" is the mean of the "
            "differences within a seed ± its standard error. Win rates are against a skilled writer's answers, by the "
            "gold judge; the paper's are against GPT-4's, by GPT-4, so only the order of the rows can be compared: an "
            "order is seen where the difference is more than two standard errors.\n\n" + "\n".join(blocks))
    print("\n" + text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        print(f"{args.output} ({(time.time() - started) / 60:.1f} min)")


if __name__ == "__main__":
    runs.escape_output()
    main()
