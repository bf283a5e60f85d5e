"""AlpacaEval 2.0 (Section 5.1), in the official tool's own files: each can come from that tool and go to it.

The commands alpaca-sample, -judge and -score of 05_eval.py, and the official tool's, are in extras/README.md (Scores).

outputs.json      [{"dataset", "instruction", "output", "generator"}]
annotations.json  [{"dataset", "instruction", "output_1", "generator_1" (the baseline's), "output_2", "generator_2"
                  (the model's), "annotator", "preference": 1 the baseline, 2 the model, null missing}]; also gzipped

The judge is an OpenAI-compatible endpoint that gives log-probs. Answers are kept as they come: after a stop, failed
requests or --max-requests the same command resumes. A pair that the judge would always refuse (HTTP 400, no content, a
content filter) has the preference null, and so has one of which neither m nor M is likely, but where this is so of the
first five, the command ends.

Departs from the official tool: the L1 penalty of the LC win rate is fixed at 1/10, not cross-validated (on eight models
of the leaderboard it differs by up to 0.08 points, all else by 1e-6); the order of the two outputs comes from other
random numbers; mean lengths are over the file's own rows, not 805.
"""

import csv
import re

import numpy as np

import common
from extras.answers import Sampler, file_name, fill, is_string, write_output
from extras.endpoint import FREE, JudgeEndpoint, ask_all
from support import records, runs

LETTERS = ("m", "M")  # of the first and the second output, as the judge sees them


def is_preference(value):
    "a number in [1, 2], 0 for a tie, or null"
    return value is None or type(value) in (int, float) and (value != value or value == 0 or 1 <= value <= 2)


OUTPUTS = {"instruction": is_string, "output": is_string}
ANNOTATIONS = {"instruction": is_string, "output_1": is_string, "output_2": is_string, "preference": is_preference}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def win_rate(y):
    """(win rate, its standard error or None for one row) in percent. y: (n,), 1 win, 0.5 tie, 0 loss"""
    error = 100 * float(y.std(ddof=1)) / len(y) ** 0.5 if len(y) > 1 else None
    return 100 * float(y.mean()), error


def fit(features, target, weight, l1=0.1):
    """argmin_w  sum_i weight_i CE(target_i, sigmoid(features_i w)) + l1 |w|_1   by accelerated proximal gradient steps.

    features (n, k), target (n,) in [0, 1], weight (n,) -> w (k,). The penalty keeps w finite where all targets are 1.
    FISTA (Beck and Teboulle, 2009), whose momentum starts anew where it points uphill (O'Donoghue and Candes, 2015).
    """
    scale = np.linalg.norm(features, axis=0)  # badly scaled columns would take too many steps
    scale[scale == 0] = 1
    features, l1 = features / scale, l1 / scale
    step = 4 / np.linalg.norm((features.T * weight) @ features, 2)  # the cross-entropy curves by at most 1 / step
    w = ahead = np.zeros(features.shape[1])
    t = 0  # steps since the momentum started
    for _ in range(100_000):
        before, w = w, ahead - step * features.T @ (weight * (sigmoid(features @ ahead) - target))
        w = np.sign(w) * np.maximum(abs(w) - step * l1, 0)
        if abs(w - ahead).max() < 1e-12:
            break
        t = t + 1 if (ahead - w) @ (w - before) <= 0 else 0
        ahead = w + t / (t + 3) * (w - before)
    return w / scale


def length_controlled(y, d, difficulty=None, gamed=None):
    """(LC win rate, its standard error) in percent: 100 mean_i sigmoid(w_difficulty difficulty_i + w_intercept).

    The win rate as if both outputs were equally long: a logistic regression of y on the difference in length t, the
    instruction's difficulty and an intercept, evaluated without its length term (Dubois et al., 2024).
    y (n,) in [0, 1], NaN where missing: not in the fit, but in the mean; d (n,) characters of output_1 minus output_2;
    difficulty (n,) of the instructions, by row position as in the official tool; gamed (m, 3) of y, t, difficulty: the
    baseline against its own verbose and concise variants, fitted with weight 0.1 and without an intercept. Without
    difficulty all terms of the mean are equal, and there is no standard error.
    """
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    t = np.tanh(d / spread) if spread > 0 else np.zeros(len(d))
    known, gamed = ~np.isnan(y), np.zeros((0, 3)) if gamed is None else gamed
    level = np.zeros(len(d)) if difficulty is None else difficulty
    features = np.concatenate([np.stack([t, level, np.ones(len(d))], 1)[known],
                               np.stack([gamed[:, 1], gamed[:, 2], np.zeros(len(gamed))], 1)])
    weight = np.concatenate([np.ones(known.sum()), np.full(len(gamed), 0.1)])
    _, w_difficulty, w_intercept = fit(features, np.concatenate([y[known], gamed[:, 0]]), weight)
    rate, error = win_rate(sigmoid(w_difficulty * level + w_intercept))
    return rate, None if difficulty is None else error


def alpaca_eval_metrics(rows, difficulty=None, gamed=None):
    """The official metrics of annotations. A legacy preference 0 is a tie; missing ones are not in the win rate."""
    y = np.array([np.nan if row["preference"] is None else row["preference"] or 1.5 for row in rows], float) - 1
    known = y[~np.isnan(y)]
    rate, error = win_rate(known)
    wins, losses, ties = (int(n) for n in ((known > 0.5).sum(), (known < 0.5).sum(), (known == 0.5).sum()))
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in rows], float)
    lc, lc_error = length_controlled(y, lengths[:, 0] - lengths[:, 1], difficulty, gamed)
    if all(row["output_1"] == row["output_2"] for row in rows):  # the baseline itself: by construction
        lc, lc_error = 50.0, 0.0
    return {"win_rate": rate, "standard_error": error, "n_wins": wins, "n_wins_base": losses, "n_draws": ties,
            "n_total": len(known), "discrete_win_rate": 100 * (wins + 0.5 * ties) / len(known),
            "avg_length": int(lengths[:, 1].mean()), "length_controlled_winrate": lc, "lc_standard_error": lc_error}


def read_gamed(path):
    """(difficulty of each instruction by position, rows (m, 3) of y, t, difficulty) of df_gamed.csv."""
    names = ("index", "preference", "std_delta_len", "instruction_difficulty")
    try:
        table = csv.DictReader(runs.read_text(path, "df_gamed.csv").splitlines())
        rows = np.array([[float(row[name]) for name in names] for row in table])
        index, y, delta, level = rows.T
        level_at = dict(zip(index, level))
        difficulty = np.array([level_at[i] for i in range(len(level_at))])
        if not np.isfinite(rows).all() or y.min() < 0 or y.max() > 1:
            raise ValueError("a number is out of range")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise runs.InputError(f"{path}: cannot be used ({type(error).__name__}: {error}): --df-gamed takes a CSV file "
                              f"of {', '.join(names)}, index counting from 0, preference in [0, 1]")
    return difficulty, np.stack([y, np.tanh(delta), level], 1)


def read_template(path):
    """The messages of a judging prompt: the blocks of a ChatML file, as AlpacaEval's is, else one of the user."""
    text = runs.read_text(path, "AlpacaEval's judging prompt")
    for name in ("{instruction}", "{output_1}", "{output_2}"):
        if name not in text:
            raise runs.InputError(f"{path}: has no {name}: give AlpacaEval's prompt, which asks for m or M")
    blocks = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return [{"role": role, "content": content.strip()} for role, content in blocks or [("user", text)]]


def read_pairs(baseline, outputs):
    """[(row of the baseline's outputs, row of the model's)], joined by instruction, in the baseline's order."""
    first, second = (records.read_rows(path, OUTPUTS, "instruction") for path in (baseline, outputs))
    answered = {row["instruction"]: row for row in second}
    differing = sorted(answered.keys() ^ {row["instruction"] for row in first})
    if differing:
        raise runs.InputError(f"{outputs}: has other instructions than {baseline}: only one of them has "
                              f"{differing[0][:60]!r} ({len(differing)} in all): both must answer the same")
    return [(row, answered[row["instruction"]]) for row in first]


def annotation(base, ours, annotator, preference):
    """A row in AlpacaEval's format of two rows of outputs, the baseline's and the model's."""
    return {"dataset": base.get("dataset", ""), "instruction": base["instruction"],
            "output_1": base["output"], "generator_1": base.get("generator", "reference"),
            "output_2": ours["output"], "generator_2": ours.get("generator", "model"),
            "annotator": annotator, "preference": preference}


def sample(args):
    """Write model_outputs.json: one answer to each of the benchmark's instructions, in their order."""
    asked = records.read_rows(args.instructions, {"instruction": records.is_text}, "instruction")
    work = runs.open_output(args, "model", "instructions")
    sampler = Sampler(args)
    start = [records.EMPTY_SYSTEM] if args.empty_system else []
    prompts = sampler.prompt_ids([start + records.as_messages(row["instruction"]) for row in asked], args.instructions)
    sampler.check_room(prompts)
    answers = sampler.generate_answers(work, prompts, [row["instruction"] for row in asked])
    rows = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": text,
             "generator": args.name or file_name(args.model)} for row, (text, *_) in zip(asked, answers)]
    counts = {"answers": len(rows), "cut at the limit": sum(finish == "length" for _, finish, _ in answers)}
    counts |= sampler.counts
    sampler.ranks.on_first(lambda: write_output(args, work, rows, counts))


def judge(args):
    """Write annotations.json: the judge's preference for each pair of outputs, in the baseline's order."""
    pairs, template = read_pairs(args.baseline, args.outputs), read_template(args.judge_template)
    work = runs.open_output(args, "outputs", "baseline", "judge_template", free=FREE)
    # which pairs the judge sees in the other order, the model's output first: drawn for each instruction
    swapped = [common.uniforms(args.seed, base["instruction"], 0, 1)[0] < 0.5 for base, _ in pairs]
    rows, jobs = [], {}
    for k, (base, ours) in enumerate(pairs):
        rows.append(annotation(base, ours, args.judge_model, preference=1.5))
        if base["output"] != ours["output"]:  # equal outputs are a tie: the judge is not asked
            m, big_m = (ours, base) if swapped[k] else (base, ours)
            fields = {"instruction": base["instruction"], "output_1": m["output"], "output_2": big_m["output"]}
            jobs[k] = [part | {"content": fill(part["content"], fields)} for part in template]
    for k, p in ask_all(JudgeEndpoint(args, LETTERS), jobs, work).items():
        rows[k]["preference"] = p and preference_of(p, swapped[k])  # None is a missing preference, not a guess
    missing = sum(row["preference"] is None for row in rows)
    write_output(args, work, rows, {"annotations": len(rows), "missing preferences": missing})


def preference_of(p, swapped):
    """2 - p(m), in [1, 2], where m says that output_1 is better; swapped: 1 + p(m), as m was output_2.

    p: the probabilities of the two LETTERS among the most likely tokens, which are made to sum to 1
    """
    p_m = p[0] / sum(p)
    return 1 + p_m if swapped else 2 - p_m


def score(args):
    """Write metrics.json of annotations, the official tool's or ours."""
    rows = records.read_rows(args.annotations, ANNOTATIONS, "instruction", "output_1", "output_2")
    if all(row["preference"] is None or row["preference"] != row["preference"] for row in rows):  # null or NaN
        raise runs.InputError(f"{args.annotations}: none of its {len(rows)} rows has a preference: judge them again")
    difficulty, gamed = read_gamed(args.df_gamed) if args.df_gamed != "none" else (None, None)
    counts = {"rows": len(rows)}
    if difficulty is not None:
        if len(rows) > len(difficulty):
            raise runs.InputError(f"{args.annotations}: has {len(rows)} rows, {args.df_gamed} the difficulties of "
                                  f"{len(difficulty)}: --df-gamed none leaves them out of the fit")
        counts["rows"] = f"{len(rows)} of {len(difficulty)}"
        difficulty = difficulty[:len(rows)]  # by position, as in the official tool
    work = runs.open_output(args, "annotations", "df_gamed")
    metrics = alpaca_eval_metrics(rows, difficulty, gamed)
    name = args.name or str(rows[0].get("generator_2") or args.annotations)
    counts |= {"win rate": round(metrics["win_rate"], 2), "LC win rate": round(metrics["length_controlled_winrate"], 2)}
    write_output(args, work, {"name": name, "gold_labels": args.label_share} | metrics, counts)
