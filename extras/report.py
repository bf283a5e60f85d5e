"""Evaluated models side by side: python 05_eval.py report pi_*.json mt_bench/model_score/*.json --output report

Each path is a metrics file (*.args.json is passed over) or a folder that `sample` wrote, in the order of the table's
rows. AlpacaEval's and MT-Bench's metrics of one --name share a row. Writes
    table.md    Table 1 with its columns in the paper's order; Figure 3, by iteration, of names like "SPA, iteration 2";
                Figure 5a, MT-Bench by category
    samples.md  the first prompts with each model's response, where the folders have responses
    report.svg  Figure 3: win rates by iteration with their standard errors
"""

import html
import itertools
import math
import re
from pathlib import Path

import runs
from extras.answers import is_string, read_text
from extras.mt_bench import category_order

COLUMNS = {"gold_labels": "Gold labels", "length_controlled_winrate": "LC win rate (%)", "win_rate": "Win rate (%)",
           "mt_bench": "MT-Bench (1-10)", "mt_bench_turn_1": "First turn", "mt_bench_turn_2": "Second turn",
           "avg_length": "Mean length (chars)", "judge_accuracy": "Judge accuracy (%)", "malformed": "Malformed (%)",
           "eos_rate": "EOS (%)"}  # the first four in the order of Table 1
ERRORS = {"length_controlled_winrate": "lc_standard_error", "win_rate": "standard_error"}
COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]


def report(args):
    """Write table.md, samples.md and report.svg."""
    args.evaluated = [path for path in args.evaluated if not path.endswith(".args.json")] or args.evaluated
    partial = runs.open_output(args, "evaluated")
    evaluated, rows = [read_metrics(path) for path in args.evaluated], []
    for metrics, _ in evaluated:
        # the same name and other metrics: AlpacaEval's and MT-Bench's of one model
        row = next((row for row in rows if row["name"] == metrics["name"]
                    and row.keys() & metrics.keys() <= {"name", "gold_labels"}), None)
        if row is None:
            rows.append(metrics)
        else:
            row |= metrics
    texts = {"table.md": tables(rows)}
    if any(responses for _, responses in evaluated):
        texts["samples.md"] = samples([(metrics, responses) for metrics, responses in evaluated if responses])
    print(*texts.values(), sep="\n")
    made = partial / "report"
    made.mkdir(exist_ok=True)
    for name, text in [*texts.items(), ("report.svg", figure(rows))]:
        (made / name).write_text(text, encoding="utf-8")
    runs.close_output(args, partial, made, {"models": len(rows)})


def read_metrics(path):
    """(metrics, responses or None) of a folder that the command sample wrote, or of a metrics file."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    metrics = runs.parse_json(read_text(file, "what 05_eval.py wrote"), file)
    try:  # what can be shown alone can be shown beside others
        figure([metrics])
        tables([metrics])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise runs.InputError(f"{file}: is not a metrics file of 05_eval.py: {runs.shown(metrics)}: evaluate again")
    if metrics.get("gold_labels") == "-":
        del metrics["gold_labels"]
    responses, fields = Path(path) / "responses.jsonl", {**runs.PROMPTS, "response": is_string}
    return metrics, (runs.read_jsonl(responses, fields) if responses.exists() else None)


def table(head, rows):
    """Markdown, with a dash for None, and without the columns in which every row has None."""
    def cell(value):
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
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
    """Table 1, Figure 3 by iteration and Figure 5a by category, as far as there are metrics."""
    text = table(["Model", *COLUMNS.values()], [[row["name"], *map(row.get, COLUMNS)] for row in metrics])
    for key in ("length_controlled_winrate", "win_rate", "mt_bench"):
        lines, iterations = curves(metrics, key)
        if iterations:
            text += "\n" + table([f"{COLUMNS[key]} by iteration", *map(str, iterations)], [
                [method, *(line.get(t, {}).get(key) for t in iterations)] for method, line in lines.items()])
    categories = sorted({name for row in metrics for name in row.get("mt_bench_categories", {})}, key=category_order)
    if categories:
        text += "\n" + table(["MT-Bench by category", *categories], [
            [row["name"], *map(row["mt_bench_categories"].get, categories)]
            for row in metrics if "mt_bench_categories" in row])
    return text


def samples(with_responses, count=3):
    """The first prompts, whole conversations, with every model's answer. with_responses: [(metrics, responses)]"""
    blocks = []
    for k in range(min(count, *(len(responses) for _, responses in with_responses))):
        prompt = "\n\n".join(f"**{m['role']}**: {m['content']}" for m in with_responses[0][1][k]["prompt"])
        lines = ["> " + line for line in prompt.split("\n")] + [""]
        lines += [f"- **{metrics['name']}**: {responses[k]['response']}" for metrics, responses in with_responses]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def figure(metrics):
    """Figure 3 as SVG. A method has a curve, a model without an iteration in its name a dashed line."""
    metrics = [row for row in metrics if any(row.get(key) is not None for key in ERRORS)]
    names = dict.fromkeys(iteration_of(row["name"])[0] for row in metrics)
    colors = dict(zip(names, itertools.cycle(COLORS)))
    parts = [part for left, key in zip((50, 510), ERRORS) for part in panel(metrics, key, left, colors)]
    for k, (name, color) in enumerate(colors.items()):
        parts += [f'<rect x="50" y="{360 + 20 * k}" width="12" height="12" fill="{color}"/>',
                  label(70, 371 + 20 * k, name, "start")]
    size = f'width="930" height="{370 + 20 * len(colors)}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
            f'<rect {size} fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def panel(metrics, key, left, colors):
    """SVG elements: the metric `key` by iteration, in 400 x 280 pixels that begin `left` pixels from the left."""
    rows = [row for row in metrics if row.get(key) is not None]
    lines, iterations = curves(metrics, key)
    ends = [row[key] + sign * (row.get(ERRORS[key]) or 0) for row in rows for sign in (-1, 1)] or [0]
    low = 10 * math.floor(min(ends) / 10)
    high = max(low + 10, 10 * math.ceil(max(ends) / 10))

    def x(t):
        return left + 40 + 320 * (t - iterations[0]) / max(1, iterations[-1] - iterations[0])

    def y(value):
        return 310 - 280 * (value - low) / (high - low)  # counted from the top

    def path(points, color, style=""):  # points: [(pixels from the left, value)]
        d = " L".join(f"{at:.1f},{y(value):.1f}" for at, value in points)
        return f'<path d="M{d}" stroke="{color}" stroke-width="2" fill="none" {style}/>'

    parts = [label(left, 20, COLUMNS[key], "start"), label(left + 200, 346, "Iteration")]
    parts += [label(x(t), 328, t) for t in iterations]
    for value in range(low, high + 1, (high - low) // 5):  # both are multiples of 10
        parts += [path([(left, value), (left + 400, value)], "#e0e0e0"), label(left - 8, y(value) + 4, value, "end")]
    parts += [path([(x(t), line[t][key]) for t in sorted(line)], colors[method]) for method, line in lines.items()]
    for row in rows:
        (method, t), value, error = iteration_of(row["name"]), row[key], row.get(ERRORS[key]) or 0
        if t is None:
            parts.append(path([(left, value), (left + 400, value)], colors[method], 'stroke-dasharray="7 5"'))
        else:
            parts += [path([(x(t), value - error), (x(t), value + error)], colors[method]),
                      f'<circle cx="{x(t):.1f}" cy="{y(value):.1f}" r="4" fill="{colors[method]}"/>']
    return parts


def label(x, y, words, anchor="middle"):
    words = html.escape("".join(c for c in str(words) if c.isprintable()))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
