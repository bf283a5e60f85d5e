"""Evaluated models side by side: python 05_eval.py report pi_*.json mt_bench/model_score/*.json --output report

Each path is a metrics file (*.args.json is passed over) or a folder that `sample` wrote, in the order of the table's
rows. AlpacaEval's and MT-Bench's metrics of one --name share a row. Writes
    table.md    Table 1 with its columns in the paper's order; agreement with held-out labels and its calibration;
                Figure 3, by iteration, of names like "SPA, iteration 2"; Figure 5a, MT-Bench by category
    samples.md  the first prompts with each model's response, where the folders have responses
    report.svg  Figure 3: win rates by iteration with their standard errors; the judge's accuracy by iteration; the win
                rate against the KL from pi_init
"""

import html
import itertools
import math
import re
from pathlib import Path

from extras.answers import is_string
from extras.mt_bench import category_order
from support import runs

COLUMNS = {"gold_labels": "Gold labels", "length_controlled_winrate": "LC win rate (%)", "win_rate": "Win rate (%)",
           "mt_bench": "MT-Bench (1-10)", "mt_bench_turn_1": "First turn", "mt_bench_turn_2": "Second turn",
           "avg_length": "Mean length (chars)", "judge_accuracy": "Judge accuracy (%)", "malformed": "Malformed (%)",
           "eos_rate": "EOS (%)", "agreement": "Held-out agreement (%)", "kl_per_token": "KL per token",
           "improbable": "Improbable tokens (%)"}  # the first four in the order of Table 1
ERRORS = {"length_controlled_winrate": "lc_standard_error", "win_rate": "standard_error"}
PANELS = [("length_controlled_winrate", None), ("win_rate", None), ("judge_accuracy", None),
          ("win_rate", "kl_per_token")]  # (a metric, the horizontal axis: None for the iteration)
COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]


def report(args):
    """Write table.md, samples.md and report.svg."""
    args.evaluated = [path for path in args.evaluated if not path.endswith(".args.json")] or args.evaluated
    work = runs.open_output(args, "evaluated")
    evaluated, rows = [read_metrics(path) for path in args.evaluated], []
    for metrics, _ in evaluated:
        # the same name and other metrics: AlpacaEval's and MT-Bench's of one model
        row = next((row for row in rows if row["name"] == metrics["name"]
                    and row.keys() & metrics.keys() <= {"name", "gold_labels"}), {})
        if not row:
            rows.append(row)
        row |= metrics
    texts = {"table.md": tables(rows)}
    if any(responses for _, responses in evaluated):
        texts["samples.md"] = samples([(metrics, responses) for metrics, responses in evaluated if responses])
    print(*texts.values(), sep="\n")
    made = work / "report"
    made.mkdir(exist_ok=True)
    for name, text in [*texts.items(), ("report.svg", figure(rows))]:
        (made / name).write_text(text, encoding="utf-8")
    runs.close_output(args, work, made, {"models": len(rows)})


def read_metrics(path):
    """(metrics, responses or None) of a folder that the command sample wrote, or of a metrics file."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    metrics = runs.parse_json(runs.read_text(file, "what 05_eval.py wrote"), file)
    try:  # a file that can be shown by itself can be shown beside others
        figure([metrics])
        tables([metrics])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, IndexError):
        raise runs.InputError(f"{file}: is not a metrics file of 05_eval.py: {runs.shown(metrics)}: evaluate again")
    if metrics.get("gold_labels") == "-":
        del metrics["gold_labels"]
    responses, fields = Path(path) / "responses.jsonl", {**runs.PROMPTS, "response": is_string}
    return metrics, (runs.read_jsonl(responses, fields) if responses.exists() else None)


def table(head, rows):
    """Markdown, with a dash for None, and without the columns in which every row has None."""
    def cell(value):
        if isinstance(value, float):  # a KL may be small
            return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
        return "-" if value is None else str(value)
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] is not None for row in rows)]
    lines = [[head[k] for k in kept], ["---"] * len(kept)] + [[cell(row[k]) for k in kept] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def iteration_of(name):
    """("SPA", 2) of "SPA, iteration 2 (pi_2)"; (name, None) of a name without an iteration."""
    found = re.fullmatch(r"(.+?),? iteration (\d{1,9})\b.*", name)
    return (found[1], int(found[2])) if found else (name, None)


def curves(metrics, key):
    """({method: {iteration: metrics}}, iterations) of models with the metric `key` and an iteration in their name."""
    lines = {}
    for row in metrics:
        method, t = iteration_of(row["name"])
        if t is not None and row.get(key) is not None:
            lines.setdefault(method, {})[t] = row
    return lines, sorted({t for line in lines.values() for t in line})


def tables(metrics):
    """Table 1, agreement, Figure 3 by iteration and Figure 5a by category, each where there are metrics for it."""
    found = [(["Model", *COLUMNS.values()], [[row["name"], *map(row.get, COLUMNS)] for row in metrics])]
    found += agreement_tables(metrics)
    for key in ("length_controlled_winrate", "win_rate", "mt_bench"):
        lines, iterations = curves(metrics, key)
        rows = [[method, *(line.get(t, {}).get(key) for t in iterations)] for method, line in lines.items()]
        found.append(([f"{COLUMNS[key]} by iteration", *map(str, iterations)], rows))
    rated = [row for row in metrics if "mt_bench_categories" in row]
    categories = sorted({name for row in rated for name in row["mt_bench_categories"]}, key=category_order)
    rows = [[row["name"], *map(row["mt_bench_categories"].get, categories)] for row in rated]
    found.append((["MT-Bench by category", *categories], rows))
    return "\n".join(table(head, rows) for head, rows in found if rows)


def agreement_tables(metrics):
    """[(head, rows)] of agreement with held-out labels and of its calibration, see extras/held_out.py."""
    labelled = [row for row in metrics if "agreement_n" in row]
    rates = [[row["name"], f"{row['agreement']:.2f} ± {row['agreement_error'] or 0:.2f}", row["agreement_n"]]
             for row in labelled if "agreement" in row]
    for name, key in (("the longer response", "longer_agreement"), ("likelihood under pi_init", "init_agreement")):
        rates += dict.fromkeys((name, f"{row[key]:.2f}", row["agreement_n"]) for row in labelled)
    bins = [f"{50 + 5 * k}-{55 + 5 * k} %" for k in range(10)]
    calibrated = [[row["name"], *(f"{right:.0f} at {100 * confidence:.0f} ({n})" if n else None
                                  for confidence, right, n in row["calibration"])]
                  for row in labelled if "calibration" in row]
    return [(["Agreement with held-out labels", "%", "Pairs"], rates),
            (["Percent right (pairs) at a confidence of", *bins], calibrated)]


def samples(with_responses, count=3):
    """The first prompts, whole conversations, with every model's answer. with_responses: [(metrics, responses)]"""
    blocks = []
    for k in range(min(count, *(len(responses) for _, responses in with_responses))):
        turns = [m for m in with_responses[0][1][k]["prompt"] if m["content"]]  # a system message may be empty
        texts = [f"**{m['role']}**: {m['content']}" for m in turns] if len(turns) > 1 else [turns[0]["content"]]
        lines = [f"> {line}".rstrip() for line in "\n\n".join(texts).split("\n")] + [""]
        lines += [f"- **{metrics['name']}**: {responses[k]['response']}" for metrics, responses in with_responses]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def figure(metrics):
    """Figure 3 and the panels that explain it, as SVG: PANELS, two in a row, as far as there are metrics."""
    metrics = [row for row in metrics if any(row.get(key) is not None for key, _ in PANELS)]
    names = dict.fromkeys(iteration_of(row["name"])[0] for row in metrics)
    colors, parts, count = dict(zip(names, itertools.cycle(COLORS))), [], 0
    for key, against in PANELS:
        rows = [row for row in metrics if all(row.get(name) is not None for name in (key, against or key))]
        if rows:
            elements = "\n".join(panel(rows, key, against, colors))
            parts.append(f'<g transform="translate({50 + 460 * (count % 2)} {360 * (count // 2)})">\n{elements}\n</g>')
            count += 1
    bottom = 360 * ((count + 1) // 2)
    for k, (name, color) in enumerate(colors.items()):
        parts += [f'<rect x="50" y="{bottom + 20 * k}" width="12" height="12" fill="{color}"/>',
                  label(70, bottom + 11 + 20 * k, name, "start")]
    size = f'width="930" height="{bottom + 10 + 20 * len(colors)}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
            f'<rect {size} fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def panel(rows, key, against, colors):
    """SVG elements, 400 x 280 pixels: the metric `key` against another one; None: the iteration.

    A method has a curve through its iterations; a model without an iteration in its name has a dashed line, and a point
    against another metric.
    """
    (lines, iterations), others = curves(rows, key), [row for row in rows if iteration_of(row["name"])[1] is None]
    ends = [row[key] + sign * (row.get(ERRORS.get(key)) or 0) for row in rows for sign in (-1, 1)]
    low = 10 * math.floor(min(ends) / 10)
    high = max(low + 10, 10 * math.ceil(max(ends) / 10))
    ticks = iterations
    if against:
        values = [row[against] for row in rows]
        first, last = min(0, *values), max(0, *values)
        ticks = [first + k * (last - first) / 4 for k in range(5)]
        lines, others = lines | {row["name"]: {0: row} for row in others}, []

    def x(value):
        return 40 + 320 * (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1)

    def y(value):
        return 310 - 280 * (value - low) / (high - low)  # counted from the top

    def path(points, color, style=""):  # points: [(pixels from the left, value)]
        d = " L".join(f"{at:.1f},{y(value):.1f}" for at, value in points)
        return f'<path d="M{d}" stroke="{color}" stroke-width="2" fill="none" {style}/>'

    parts = [label(0, 20, COLUMNS[key], "start"), label(200, 346, COLUMNS[against] if against else "Iteration")]
    parts += [label(x(tick), 328, f"{tick:.2g}" if against else tick) for tick in ticks]
    for value in range(low, high + 1, (high - low) // 5):  # both are multiples of 10
        parts += [path([(0, value), (400, value)], "#e0e0e0"), label(-8, y(value) + 4, value, "end")]
    for method, line in lines.items():
        points = [(x(row[against] if against else t), row) for t, row in sorted(line.items())]
        parts.append(path([(at, row[key]) for at, row in points], colors[method]))
        for at, row in points:
            value, error = row[key], row.get(ERRORS.get(key)) or 0
            parts += [path([(at, value - error), (at, value + error)], colors[method]),
                      f'<circle cx="{at:.1f}" cy="{y(value):.1f}" r="4" fill="{colors[method]}"/>']
    parts += [path([(0, row[key]), (400, row[key])], colors[row["name"]], 'stroke-dasharray="7 5"')
              for row in others]
    return parts


def label(x, y, words, anchor="middle"):
    words = html.escape("".join(c for c in str(words) if c.isprintable()))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
