"""Two pairs of D_1 as the model sees them: a picture from a finished run of the small world.

    python benchmarks/one_pair.py runs/world-seed41        # writes benchmarks/one_pair.svg

The color of a word is its share of the implicit reward,

    beta (log pi_0(y_t | x, y_<t) - log pi_init(y_t | x, y_<t)),

and the sum over the words is Eq. 4. Below are p (Eq. 7), the label (Eq. 8) and what gold says, then what
04_refined_dpo.py makes of the pair just before the pair's own step: 04 makes pi_1 once more, and each pair's values are
kept. Of the pairs that it meets when labels are refined (tau is not 0), those with the fewest tokens are shown: of the
labels that are not flagged and right by gold, and of those that are flagged and wrong.
"""

import html
import math
import tempfile
from pathlib import Path

import torch
from flags import gold_margin
from shared import follow, load
from transformers import AutoTokenizer

from extras.plain_spa import reward
from extras.small_world import gold_score, gold_values, read_gold
from support import records, runs

WIDTH, LEFT, LETTER, LINE = 830, 125, 7.5, 25  # pixels: the picture, left of the words, a letter, a line of words
ABOVE, BELOW = (88, 160, 240), (245, 140, 70)  # the colors of a share above 0 and of one below
BOLD, MONOSPACE = 'font-weight="bold"', 'font-family="monospace" font-size="12.5"'
SMALL = 'fill="#5c5c5c" font-size="11"'
HEAD = ("pi_0 has written two responses to each prompt and labels them: the one with the higher reward is chosen.",
        "The reward: beta (log pi_0 \u2212 log pi_init), summed over the words. Small: gold's value of a sentence.")


def follow_pairs(run):
    """(beta, {id: what 04 logs of the pair, with its step and tau}) of the run's pi_1, which 04 makes once more."""
    if not all((run / name).is_dir() for name in ("pi_init", "pi_0", "pi_1")):
        raise runs.InputError(f"{run}: has no pi_init, pi_0 or pi_1: give a finished run of the small world")
    made = runs.read_record(run / "pi_1")["made_from"]
    if made["stage"] != "04_refined_dpo.py" or made["args"]["refine"] == "none":
        raise runs.InputError(f"{run}/pi_1: was made without refined labels: give a run with them")
    options = {name: value for name, value in made["args"].items() if value is not None and value is not False}
    with tempfile.TemporaryDirectory() as folder:
        options |= {"model": run / "pi_0", "input": run / "preferences_1.jsonl", "output": f"{folder}/pi_1"}
        steps, _ = follow(**options)
    return options["beta"], {row["id"]: row for rows in steps for row in rows}


def choose(rows, followed, gold):
    """[(title, row)] of the two pairs that are shown, see above."""
    found = []
    for flagged, name, kind in ((0, "Not flagged", "right"), (1, "Flagged", "wrong")):
        met = [row for row in rows if followed[row["id"]]["tau"] and followed[row["id"]]["flagged"] == flagged]
        right, wrong = ([row for row in met if sign * gold_margin(gold, row) > 0] for sign in (1, -1))
        shown = wrong if flagged else right
        if not shown:
            raise runs.InputError(f"of D_1, no {kind} label is {name.lower()}: give a run with more pairs")
        found.append((f"{name}: {len(met)} labels, {len(wrong)} of them wrong by gold. The shortest {kind} one:",
                      min(shown, key=lambda row: len(row["chosen"]["ids"]) + len(row["rejected"]["ids"]))))
    return found


@torch.no_grad()
def shares(pi, pi_init, x, y, beta):
    """Each token's share of Eq. 4: the reward of this one token after x and the tokens before it."""
    return [reward(pi, pi_init, [*x, *y[:t]], [y[t]], beta).item() for t in range(len(y))]


# ---------------------------------------------------------------------------------------------
# The picture


def text(x, y, words, style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(words)}</text>'


def signed(value, digits):
    return f"{value:+.{digits}f}".replace("-", "\u2212") if value else "0"


def box(x, y, width, share, limit):
    """White for a share of 0, ABOVE for `limit`, BELOW for -limit."""
    fill = [round(255 + min(1.0, abs(share) / limit) * (end - 255)) for end in (ABOVE if share > 0 else BELOW)]
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="20" rx="3" fill="rgb{tuple(fill)}" '
            f'stroke="#d4d4d4"><title>{share:.4f}</title></rect>')


def draw_words(response, limit, y):
    """(SVG elements, the next line's y): a response's words, and after each sentence its value by gold."""
    x, parts, words = LEFT, [], response["words"]
    values = iter([-1 if value is None else value for value in response["values"]])
    for word, share, following in zip(words, response["shares"], [*words[1:], ""], strict=True):
        width = LETTER * len(word) + 7
        if x + width + 38 * (following == ".") > WIDTH - 10:  # a period stays with its word
            x, y = LEFT, y + LINE
        parts += [box(x, y, width, share, limit), text(x + 3.5, y + 14.5, word, MONOSPACE)]
        x += width + 3
        if word == ".":
            value = signed(next(values), 0)
            parts.append(text(x + 1, y + 14, value, SMALL))
            x += 8 * len(value) + 6
    return parts, y + LINE


def draw_pair(pair, limit, y):
    """(SVG elements, the y of the last)"""
    parts = [text(18, y, pair["title"], BOLD), text(18, y + 23, "prompt x"),
             text(LEFT, y + 23, pair["prompt"], MONOSPACE)]
    y += 36
    for name, response in zip(("y_1", "y_2"), pair["responses"]):
        parts += [text(18, y + 14, f"{name} {response['label']}", BOLD * (response["label"] == "chosen")),
                  text(18, y + 31, f"reward {signed(sum(response['shares']), 3)}"),
                  text(18, y + 47, f"gold {signed(response['gold'], 2)}", SMALL)]
        words, below = draw_words(response, limit, y)
        parts, y = parts + words, max(below + 6, y + 58)
    (r_1, gold_1), (r_2, gold_2) = ((sum(y["shares"]), y["gold"]) for y in pair["responses"])
    label, better = ("y_1" if is_first else "y_2" for is_first in (pair["p"] > 0.5, gold_1 > gold_2))
    judged = (f"03_judge.py: p(y_1 > y_2 | x) = sigmoid({signed(r_1 - r_2, 3)}) = {pair['p']:.3f} (Eq. 7), so {label} "
              f"is chosen (Eq. 8). Gold prefers {better}.")
    verdict = "z = 1: flagged" if pair["flagged"] else "z = 0: not flagged"
    refined = (f"04_refined_dpo.py, step {pair['step']}: p_theta~(y_w > y_l | x) = {pair['confidence']:.3f} (Eq. 12), "
               f"tau = {pair['tau']:.3f}, so {verdict} (Eq. 11).")
    return parts + [text(18, y + 13, judged), text(18, y + 32, refined)], y + 32


def draw(pairs):
    """The picture as SVG, on a white ground of its own. pairs: of `main`"""
    limit = math.ceil(max(abs(share) for pair in pairs for y in pair["responses"] for share in y["shares"]))
    parts = [text(18, 30, "Two pairs as the model sees them", 'font-weight="bold" font-size="17"'),
             text(445, 29, f"share of the reward  {signed(-limit, 0)}"), text(WIDTH - 35, 29, signed(limit, 0)),
             *(box(WIDTH - 212 + 10 * k, 15, 10, (k - 8) / 8 * limit, limit) for k in range(17))]
    parts += [text(18, 54, HEAD[0]), text(18, 72, HEAD[1])]
    y = 104
    for pair in pairs:
        elements, below = draw_pair(pair, limit, y)
        parts, y = parts + elements, below + 36
    size = f'width="{WIDTH}" height="{y - 20}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {y - 20}" fill="#1a1a1a" '
            f'font-family="sans-serif" font-size="13">\n<rect {size} rx="8" fill="white"/>\n' + "\n".join(parts)
            + "\n</svg>\n")


def main():
    parser = runs.Parser(description="Two pairs of D_1 as the model sees them.")
    parser.add_argument("run", type=Path, help="folder of a finished run of the small world: runs/world-seed41")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".svg"), help="the picture, SVG")
    args = parser.parse_args()
    gold = read_gold(args.run / "data/gold.json")
    rows = records.read_jsonl(args.run / "preferences_1.jsonl", records.PROMPTS | records.PREFERENCES)
    beta, followed = follow_pairs(args.run)
    models = [load(args.run / name) for name in ("pi_0", "pi_init")]
    tokenizer, pairs = AutoTokenizer.from_pretrained(args.run / "pi_init", trust_remote_code=False), []
    for title, row in choose(rows, followed, gold):
        responses = [{"label": y, "words": tokenizer.convert_ids_to_tokens(row[y]["ids"].tolist()),
                      "shares": shares(*models, row["prompt_ids"], row[y]["ids"], beta),
                      "gold": gold_score(gold, row["prompt"], row[y]["text"]),
                      "values": gold_values(gold, row["prompt"], row[y]["text"])}
                     for y in (("chosen", "rejected") if row["p"] > 0.5 else ("rejected", "chosen"))]
        pairs.append({"title": title, "prompt": row["prompt"][-1]["content"], "responses": responses, "p": row["p"],
                      **followed[row["id"]]})
    args.output.write_text(draw(pairs), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    runs.run(main)
