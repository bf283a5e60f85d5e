"""Evaluated models side by side: python 05_eval.py report pi_*.json mt_bench/model_score/*.json --output report

Each path is a metrics file (*.args.json is passed over) or a folder that `sample` wrote, in the order of the table's
rows. AlpacaEval's and MT-Bench's metrics of one --name share a row. Writes
    table.md    Table 1 with its columns in the paper's order; agreement with held-out labels;
                Figure 3, by iteration, of names like "SPA, iteration 2"; Figure 5a, MT-Bench by category
    samples.md  the first prompts with each model's response, where the folders have responses
    report.svg  Figure 3: win rates by iteration with their standard errors; the win rate against the KL from pi_init;
                the judge's accuracy by iteration. A method's curve begins at pi_0: at the model whose name has "(pi_0)"
"""

import html
import math
import re
import textwrap
from pathlib import Path

from extras.answers import is_string
from extras.mt_bench import category_order
from support import records, runs

COLUMNS = {"gold_labels": "Gold labels", "length_controlled_winrate": "LC win rate (%)", "win_rate": "Win rate (%)",
           "mt_bench": "MT-Bench (1-10)", "mt_bench_turn_1": "First turn", "mt_bench_turn_2": "Second turn",
           "avg_length": "Mean length (chars)", "judge_accuracy": "Judge accuracy (%)", "malformed": "Malformed (%)",
           "eos_rate": "EOS (%)", "kl_per_token": "KL per token",
           "improbable": "Improbable tokens (%)"}  # the first four in the order of Table 1
AGREEMENT = {"agreement": "Eq. 7", "agreement_error": "Standard error", "longer_agreement": "The longer response",
             "init_agreement": "Likelihood under pi_init", "agreement_n": "Pairs"}  # see extras/held_out.py
ERRORS = {"length_controlled_winrate": "lc_standard_error", "win_rate": "standard_error"}
PANELS = [("win_rate", None), ("win_rate", "kl_per_token"), ("length_controlled_winrate", None),
          ("judge_accuracy", None)]  # (a metric, the horizontal axis: None for the iteration)
COLORS = ["#1f77b4", "#d62728", "#1b7f3b", "#b35900", "#7b4fa8", "#8c564b", "#b8449a", "#666666"]
DASHES = ' stroke-dasharray="7 5"'
PLOT = 220  # pixels: the width of a panel's plot


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
        raise runs.InputError(f"{file}: is not a metrics file of 05_eval.py: {records.shown(metrics)}: evaluate again")
    if metrics.get("gold_labels") == "-":
        del metrics["gold_labels"]
    responses, fields = Path(path) / "responses.jsonl", {**records.PROMPTS, "response": is_string}
    return metrics, (records.read_jsonl(responses, fields) if responses.exists() else None)


def table(head, rows):
    """Markdown, with a dash for None, and without the columns in which every row has None."""
    def column(name, values):
        digits = 4 if name == COLUMNS["kl_per_token"] else 2  # a KL is small
        cells = [f"{value:.{digits}f}" if isinstance(value, float) else value for value in values]
        return [name, "---", *("-" if value is None else str(value) for value in cells)]
    columns = [column(name, values) for name, *values in zip(head, *rows, strict=True) if set(values) != {None}]
    return "".join("| " + " | ".join(line) + " |\n" for line in zip(*columns))


def curves(rows):
    """[(method, {iteration: row}), ..., (name, {None: row}), ...]: methods, then the rows without an iteration.

    "SPA, iteration 2 (pi_2)" is one of SPA. One row with "(pi_0)" in its name is every method's iteration 0.
    """
    methods, others = {}, []
    for row in rows:
        found = re.fullmatch(r"(.+?),? iteration (\d{1,9})\b.*", row["name"])
        if found:
            methods.setdefault(found[1], {})[int(found[2])] = row
        else:
            others.append((row["name"], {None: row}))
    starts = [other for other in others if re.search(r"\([^()]*\bpi_0\b[^()]*\)", other[0])]
    if methods and len(starts) == 1:
        methods = {method: {0: starts[0][1][None]} | line for method, line in methods.items()}
        others.remove(starts[0])
    return [*methods.items(), *others]


def tables(metrics):
    """Table 1, agreement, Figure 3 by iteration and Figure 5a by category, each where there are metrics for it."""
    found = [(["Model", *COLUMNS.values()], [[row["name"], *map(row.get, COLUMNS)] for row in metrics]),
             (["Agreement with held-out labels (%)", *AGREEMENT.values()],
              [[row["name"], *map(row.get, AGREEMENT)] for row in metrics if "agreement_n" in row])]
    for key in ("length_controlled_winrate", "win_rate", "mt_bench"):
        known = curves([row for row in metrics if row.get(key) is not None])
        lines = [(method, line) for method, line in known if None not in line]
        iterations = sorted({t for _, line in lines for t in line})
        rows = [[method, *(line.get(t, {}).get(key) for t in iterations)] for method, line in lines]
        found.append(([f"{COLUMNS[key]} by iteration", *map(str, iterations)], rows))
    rated = [row for row in metrics if "mt_bench_categories" in row]
    categories = sorted({name for row in rated for name in row["mt_bench_categories"]}, key=category_order)
    rows = [[row["name"], *map(row["mt_bench_categories"].get, categories)] for row in rated]
    found.append((["MT-Bench by category", *categories], rows))
    return "\n".join(table(head, rows) for head, rows in found if rows)


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
    """Figure 3 and what explains it, as SVG: PANELS, side by side, as far as there are metrics for them."""
    parts, left, height, colors = [], 0, max(260, 30 * len(curves(metrics))), {}
    for key, against in PANELS:
        rows = [row for row in metrics if all(row.get(name) is not None for name in (key, against or key))]
        # where length does not matter, the LC win rate is the win rate once more
        if any(key != "length_controlled_winrate" or abs(row[key] - row.get("win_rate", -1)) >= 1 for row in rows):
            elements, width = panel(rows, key, against, colors, height)
            parts += [f'<g transform="translate({left} 0)">', *elements, "</g>"]
            left += width
    left = max(left, PLOT)  # without a panel too
    size = f'width="{left}" height="{height + 90}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {left} {height + 90}" '
                      f'font-family="sans-serif" font-size="13">\n<rect {size} fill="white"/>', *parts, "</svg>\n"])


def panel(rows, key, against, colors, height):
    """(SVG elements, width): `key` by iteration, or against another metric.

    A method has a curve through its iterations; another model has a dashed line, and a point against another metric.
    colors: {name: color} of the panels before. A name that is not among them is added, and written beside the plot.
    """
    def bar(row):  # the ends of its error bar
        error = row.get(ERRORS.get(key)) or 0
        return row[key] - error, row[key] + error

    lines, names = curves(rows), []
    values = [row[against] for row in rows] if against else [t for _, line in lines for t in line if t is not None]
    ticks, x = axis([0, *values] if against or not values else values, 0.001 if against else 1, 60, 40 + PLOT)
    levels, y = axis([end for row in rows for end in bar(row)], 5, 35 + height, 35)  # counted from the top
    across = COLUMNS[against] if against else "Iteration (0: pi_0)" if 0 in values else "Iteration"
    parts = [label(50, 20, COLUMNS[key], "start", 'font-weight="bold"'), label(50 + PLOT / 2, height + 78, across)]
    parts += [label(x(tick), height + 55, f"{tick:.9g}") for tick in ticks]
    for level in levels:
        parts += [f'<path d="M50,{y(level):.1f} H{50 + PLOT}" stroke="#ddd"/>',
                  label(42, y(level) + 4, f"{level:.9g}", "end")]
    for name, line in lines:
        is_dashed, is_new = None in line and not against, name not in colors
        color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
        style = f'stroke="{color}" fill="none" stroke-width="2"'
        if is_dashed:
            points = [(50, line[None]), (50 + PLOT, line[None])]
        else:
            points = [(x(row[against] if against else t), row) for t, row in sorted(line.items())]
        d = " L".join(f"{at:.1f},{y(row[key]):.1f}" for at, row in points)
        parts.append(f'<path d="M{d}" {style}{DASHES * is_dashed}/>')
        for at, row in points[is_dashed:]:
            low, high = map(y, bar(row))
            parts.append(f'<path d="M{at:.1f},{low:.1f} V{high:.1f}" {style}/>')
            if not is_dashed:
                parts.append(f'<circle cx="{at:.1f}" cy="{y(row[key]):.1f}" r="4" fill="{color}"/>')
        if is_new:
            names.append((y(points[-1][1][key]), name, color))
    return parts + beside(names, height), PLOT + 70 + 170 * bool(names)


def beside(names, height):
    """Labels at the right ends of lines, moved where they would overlap. names: [(y, name, color)]"""
    wrapped = [(y, textwrap.wrap(name, 25, max_lines=2, placeholder=" ..."), color) for y, name, color in sorted(names)]
    parts, top, left = [], 35, 15 * sum(len(words) for _, words, _ in wrapped)
    for y, words, color in wrapped:
        top = min(max(top, y - 7.5 * len(words)), 35 + height - left)
        for line in words:
            top, left = top + 15, left - 15
            parts.append(label(PLOT + 58, top - 3, line, "start", f'fill="{color}"'))
    return parts


def axis(values, least, start, end):
    """(ticks that enclose the values, a function of a value: its pixels between start and end).

    Some five ticks, at multiples of 1, 2 or 5 times a power of ten, `least` apart or more.
    """
    low, high = min(values), max(values)
    wanted = max(least, high / 5 - low / 5)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= wanted)
    first = math.floor(low / step)
    ticks = [k * step for k in range(first, max(first + 1, math.ceil(high / step)) + 1)]
    return ticks, lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def label(x, y, words, anchor="middle", style=""):
    words = html.escape("".join(c for c in str(words) if c.isprintable()))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{words}</text>'
