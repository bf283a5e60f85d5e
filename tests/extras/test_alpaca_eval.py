"""AlpacaEval 2.0: the official metrics, answers and gold's annotations in its format; the report."""

import gzip
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

import common
import stages
from extras import alpaca_eval, report

OFFICIAL = stages.ROOT.parent / "shared" / "data" / "alpaca_eval"
MODELS = ["phi-2", "phi-2-sft", "vicuna-7b-v1.5", "gpt-3.5-turbo-1106_concise", "claude-2",
          "FuseChat-Llama-3.2-1B-Instruct", "FuseChat-Llama-3.2-3B-Instruct", "FuseChat-Qwen-2.5-7B-Instruct"]
PLAIN = ["win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "avg_length"]


def score(annotations, output, **options):
    """alpaca-score, which must succeed -> (what it wrote, its stdout)."""
    ran = stages.attempt("05_eval", "alpaca-score", annotations, output=output, **options)
    assert ran.status == 0, ran.err
    return read(output), ran.out


def read(path):
    return json.loads(path.read_text())


def row(preference, length_1=5, length_2=5, k=0, **more):
    return {"instruction": f"say {k}", "output_1": "a" * length_1, "output_2": "b" * length_2, "generator_1": "base",
            "generator_2": "ours", "preference": preference, **more}


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("model", MODELS)
def test_official_models(tmp_path, model):
    if not OFFICIAL.exists():
        pytest.skip("needs the official annotations in ../shared/data/alpaca_eval")
    found, out = score(OFFICIAL / "dev" / f"{model}.annotations.json.gz", tmp_path / "metrics.json",
                       df_gamed=OFFICIAL / "df_gamed.csv")
    expected = read(OFFICIAL / "dev" / "expected.json")[model]
    official, reference = expected["official"], expected["numpy_reference"]["gamed_C10"]
    for key in PLAIN:
        if (model, key) != ("phi-2", "avg_length"):  # the leaderboard divided the 803 rows' sum by 805
            assert found[key] == pytest.approx(official[key], abs=1e-6), key
    assert found["length_controlled_winrate"] == pytest.approx(official["length_controlled_winrate"], abs=0.08)
    assert found["length_controlled_winrate"] == pytest.approx(reference["lc"], abs=1e-4)
    assert found["lc_standard_error"] == pytest.approx(reference["lc_se"], abs=1e-4)
    assert ("rows 803 of 805" in out) == (model == "phi-2")


def test_length_control_by_hand():
    """Four rows, d = +9, +9, -9, -9: std(ddof=1) = 9 sqrt(4/3), so t = +-T with T = tanh(sqrt(3)/2).

    Two parameters and two groups of two rows: let s1, s2 be the fitted probabilities at +T, -T, and y1, y2 the means.
    The derivative by the intercept b: 2 (s1 - y1) + 2 (s2 - y2) + 0.1 sign(b) = 0, by the length weight w:
    T (2 (s1 - y1) - 2 (s2 - y2)) + 0.1 sign(w) = 0. With y1 = 0.9, y2 = 0.6 both signs are +, so
    s1 = 0.9 - 0.025 (1 + 1/T), s2 = 0.6 - 0.025 (1 - 1/T), and b = (logit s1 + logit s2) / 2.
    """
    y, d, T = np.array([0.9, 0.9, 0.5, 0.7]), np.array([9.0, 9, -9, -9]), math.tanh(math.sqrt(3) / 2)
    b = (logit(0.9 - 0.025 * (1 + 1 / T)) + logit(0.6 - 0.025 * (1 - 1 / T))) / 2
    assert alpaca_eval.length_controlled(y, d) == (pytest.approx(100 / (1 + math.exp(-b)), abs=1e-9), None)


def test_gamed_rows_have_a_tenth_of_the_weight_and_no_intercept():
    """Equal lengths leave t = 0. One gamed row with t = 0, difficulty 1, y = 0.8, and four rows with difficulty 0,
    y = 0.7: the first alone sets w_difficulty: 0.1 (s - 0.8) + 0.1 sign(w) = 0 has no root above 0, so w = 0; of 40
    such rows 4 (s - 0.8) + 0.1 = 0, s = 0.775. The intercept: 4 (s - 0.7) + 0.1 = 0, s = 0.675. A row of the benchmark
    with difficulty 0 is then worth 67.5; with difficulty 1 (its preference missing) sigmoid(logit 0.675 + logit 0.775).
    """
    y, d, difficulty = np.array([0.7] * 4 + [np.nan]), np.zeros(5), np.array([0.0, 0, 0, 0, 1])
    at_one = 100 / (1 + math.exp(-logit(0.675) - logit(0.775)))
    rates = [67.5] * 4 + [at_one]
    lc, error = alpaca_eval.length_controlled(y, d, difficulty, np.array([[0.8, 0.0, 1.0]] * 40))
    assert lc == pytest.approx(np.mean(rates), abs=1e-8)
    assert error == pytest.approx(np.std(rates, ddof=1) / math.sqrt(5), abs=1e-8)
    lc, _ = alpaca_eval.length_controlled(y, d, difficulty, np.array([[0.8, 0.0, 1.0]]))
    assert lc == pytest.approx(67.5, abs=1e-8)


@pytest.mark.parametrize("scale", [0.02, 1e5])  # of a column
def test_fit_is_at_the_minimum(scale):
    """Where w is not 0 the gradient of the loss is -l1 sign(w), where it is 0 it is within l1."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y, weight = rng.normal(size=(60, 3)) * [1, 3, scale], rng.random(60), rng.random(60)
        w = alpaca_eval.fit(x, y, weight)
        gradient = x.T @ (weight * (alpaca_eval.sigmoid(x @ w) - y))
        assert np.allclose(gradient[w != 0], -0.1 * np.sign(w[w != 0]), atol=1e-8 * max(1, scale))
        assert (abs(gradient[w == 0]) <= 0.1 + 1e-8).all()


def test_plain_metrics_by_hand():
    """y = 1, 0.25, 0.5 (a legacy 0), 0.5; one missing. Mean 0.5625; squared deviations 0.19140625 + 0.09765625 + 2 x
    0.00390625 = 0.296875, over 3, root: 0.31457643; over sqrt(4): 0.15728822. Wins 1, losses 1, ties 2: discrete 50."""
    rows = [row(p, 4, length, k) for k, (p, length) in enumerate([(2, 3), (1.25, 6), (0, 6), (1.5, 6), (None, 7)])]
    found = alpaca_eval.alpaca_eval_metrics(rows)
    assert found["win_rate"] == pytest.approx(56.25) and found["standard_error"] == pytest.approx(15.728822, abs=1e-6)
    assert [found[key] for key in PLAIN[2:]] == [1, 1, 2, 4, 50, 5]  # 28 characters / 5 = 5.6


SHAPES = {
    "all ties": [row(1.5, 3 + k, 9 - k, k) for k in range(6)],
    "all wins": [row(2, 3 + k, 9 - k, k) for k in range(6)],
    "one row": [row(1.75, 3, 9)],
    "separable by length": [row(1 + (k > 2), 10, 4 + 3 * k, k) for k in range(6)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_difficulty", [True, False])
def test_degenerate_annotations_have_an_answer(shape, with_difficulty):
    rows = SHAPES[shape]
    gamed = np.array([[0.6, 0.5, 0.3], [0.3, -0.5, -0.4]]) if with_difficulty else None
    found = alpaca_eval.alpaca_eval_metrics(rows, np.linspace(-1, 1, len(rows)) if with_difficulty else None, gamed)
    assert 0 < found["length_controlled_winrate"] < 100 and json.dumps(found, allow_nan=False)
    assert (found["standard_error"] is None) == (len(rows) == 1)


def test_the_baseline_itself_has_50_by_construction():
    rows = [row(1.5, k=k) | {"output_1": "same", "output_2": "same"} for k in range(4)]
    found = alpaca_eval.alpaca_eval_metrics(rows, np.arange(4.0), np.array([[0.9, 1.0, 2.0]] * 30))
    assert (found["win_rate"], found["length_controlled_winrate"], found["lc_standard_error"]) == (50, 50, 0)


def write_gamed(path, count):
    path.write_text("preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n" + "".join(
        f"0.6,{k},{k - 1.5},{k / 10},False,{model}\n" for model in ("verbose", "concise") for k in range(count)))
    return path


def test_annotations_file_to_metrics_file(tmp_path):
    rows, gamed = [row(1 + k / 7, 9 - k, 3 + 2 * k, k) for k in range(6)], write_gamed(tmp_path / "df_gamed.csv", 8)
    difficulty, table = alpaca_eval.read_gamed(gamed)
    assert difficulty.tolist() == [k / 10 for k in range(8)] and table.shape == (16, 3)
    assert table[9].tolist() == [0.6, math.tanh(-0.5), 0.1]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    stages.write_rows(tmp_path / "a.jsonl", rows)
    for name in ("a.json", "a.json.gz", "a.jsonl"):
        found, out = score(tmp_path / name, tmp_path / f"of_{name}", df_gamed=gamed, name="x", label_share="3 %")
        expected = alpaca_eval.alpaca_eval_metrics(rows, difficulty[:6], table)
        assert found == {"name": "x", "gold_labels": "3 %"} | expected
        assert "rows 6 of 8" in out
    plain, _ = score(tmp_path / "a.json", tmp_path / "plain.json", df_gamed="none")
    assert plain == {"name": "ours", "gold_labels": "-"} | alpaca_eval.alpaca_eval_metrics(rows)


BAD_ANNOTATIONS = {
    "[]": "", json.dumps([row(3)]): "row 0", json.dumps([row(1.5), row("2", k=1)]): "row 1",
    json.dumps([row(0.5)]): "[1, 2]", json.dumps([row(1.5)] * 2): "row 1", json.dumps([row(None)]): "1 rows",
    json.dumps([row(1.5, k=k) for k in range(4)]): "difficulties of 3"}


@pytest.mark.parametrize("content", BAD_ANNOTATIONS)
def test_bad_annotations_are_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    error = stages.refused("05_eval", "alpaca-score", tmp_path / "a.json", output=tmp_path / "m.json",
                           df_gamed=write_gamed(tmp_path / "df_gamed.csv", 3))
    assert "a.json" in error and BAD_ANNOTATIONS[content] in error


@pytest.mark.parametrize("row_1, bad", [("0.6,1,", "1.6,1,"), ("0.6,1,", "0.6,7,")])  # no preference; no index 1
def test_numbers_of_df_gamed_that_cannot_be_are_one_line(tmp_path, row_1, bad):
    (tmp_path / "a.json").write_text(json.dumps([row(1.5)]))
    gamed = write_gamed(tmp_path / "df_gamed.csv", 3)
    gamed.write_text(gamed.read_text().replace(row_1, bad))
    assert str(gamed) in stages.refused("05_eval", "alpaca-score", tmp_path / "a.json", df_gamed=gamed,
                                        output=tmp_path / "m.json")


@pytest.mark.parametrize("empty", [False, True])
def test_alpaca_sample_writes_model_outputs(tmp_path, pi_init, tokenizer, monkeypatch, empty):
    prompts, original = [], common.sample_responses

    def sample_responses(model, batch, *rest):
        prompts.extend(batch)
        return original(model, batch, *rest)
    monkeypatch.setattr(common, "sample_responses", sample_responses)
    asked = [{"dataset": "koala", "instruction": text, "output": "o", "generator": "base"}
             for text in ("the lid is wet .", "please wipe the lid", "a", "my tent", "the lid is wet")]
    del asked[4]["dataset"]
    benchmark, words = tmp_path / "baseline.json", ["alpaca-sample", *["--empty-system"] * empty]
    benchmark.write_text(json.dumps(asked))
    options = {"model": pi_init, "instructions": benchmark, "max_new_tokens": 8, "name": "tiny"}
    found = [read(stages.run("05_eval", *words, **options, micro_batch_size=size,
                             output=tmp_path / f"out_{size}.json")) for size in (2, 5)]
    for row in asked:
        messages = [{"role": "system", "content": ""}] * empty + [{"role": "user", "content": row["instruction"]}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) in prompts
    assert found[0] == found[1]
    assert [list(r) for r in found[0]] == [["dataset", "instruction", "output", "generator"]] * 5
    assert [r["instruction"] for r in found[0]] == [r["instruction"] for r in asked]
    assert [(r["generator"], r["dataset"]) for r in found[0]] == [("tiny", "koala")] * 4 + [("tiny", "")]
    assert len({r["output"] for r in found[0]}) > 1
    for bad in (asked[0], {"a": 1}):
        benchmark.write_text(json.dumps(asked + [bad]))
        assert "row 5" in stages.refused("05_eval", "alpaca-sample", **options, output=tmp_path / "bad.json")


def test_defaults():
    options = ["--output", "o", "--model", "m"]
    for words, limit in ((["alpaca-sample", "--instructions", "i"], 2048), (["mt-sample", "--questions", "q"], 1024),
                         (["sample", "--input", "i"], 300), (["sample", "--input", "i", "--max-new-tokens", "9"], 9)):
        assert stages.parsed("05_eval", words + options).max_new_tokens == limit


def scored(name, lc, rate, mt):
    """A model's metrics of AlpacaEval and of MT-Bench."""
    return [dict(name=name, gold_labels="3.3 %", length_controlled_winrate=lc, win_rate=rate, lc_standard_error=0.3,
                 standard_error=1.1),
            dict(name=name, gold_labels="-", mt_bench=mt, mt_bench_turn_1=mt, mt_bench_turn_2=mt,
                 mt_bench_categories={"writing": mt, "math": 1.0})]


SCORED = [*scored("SFT", 7.58, 4.72, 6.34), *scored("DPO", 9.03, 7.68, 6.81),
          *scored("SPA, iteration 1", 11.9, 12.9, 6.5), *scored("SPA, iteration 2", 16.2, 19.9, 6.9),
          *scored("PairRM, iteration 1", 11.0, 9.0, 6.6)]
TITLES = [("Win rate (%)", "Iteration"), ("LC win rate (%)", "Iteration")]  # of its picture


@pytest.fixture
def tables(tmp_path):
    """Report metrics, each in a file -> the cells of the tables in table.md."""
    def start(*metrics):
        paths = [tmp_path / f"{k}.json" for k in range(len(metrics))]
        for path, row in zip(paths, metrics):
            path.write_text(json.dumps(row))
        blocks = (stages.run("05_eval", "report", *paths, output=tmp_path / "report") / "table.md").read_text()
        return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
                for block in blocks.split("\n\n")]
    return start


def test_report_has_the_papers_tables(tmp_path, tables):
    other = {"name": "SFT", "win_rate": 1.0}  # another model of that name
    main, lc, rate, mt, categories = tables(*SCORED, other)
    assert main[0] == ["Model", "Gold labels", "LC win rate (%)", "Win rate (%)", "MT-Bench (1-10)", "First turn",
                       "Second turn"]
    assert [line[0] for line in main[2:]] == ["SFT", "DPO", "SPA, iteration 1", "SPA, iteration 2",
                                              "PairRM, iteration 1", "SFT"]
    assert main[2] == ["SFT", "3.3 %", "7.58", "4.72", "6.34", "6.34", "6.34"] and main[7][1:4] == ["-", "-", "1.00"]
    assert lc[0][1:] == ["1", "2"] and lc[2:] == [["SPA", "11.90", "16.20"], ["PairRM", "11.00", "-"]]
    assert rate[2] == ["SPA", "12.90", "19.90"] and mt[2] == ["SPA", "6.50", "6.90"]
    assert categories[0][1:] == ["writing", "math"] and categories[2] == ["SFT", "6.34", "1.00"]
    assert list(panels((tmp_path / "report/report.svg").read_text())) == TITLES


def test_report_shows_agreement_with_held_out_labels(tables):
    labels = {"agreement_n": 40, "longer_agreement": 52.5, "init_agreement": 45.0}
    main, agreement = tables({"name": "SFT", **labels}, *(  # pi_init itself has none
        {"name": f"SPA, iteration {t}", **labels, "agreement": 60.0 + t, "agreement_error": 7.746, "improbable": 0.5,
         "kl_per_token": 0.0123 * t} for t in (1, 2)))
    assert main[0] == ["Model", "KL per token", "Improbable tokens (%)"]
    assert main[2:] == [["SFT", "-", "-"], ["SPA, iteration 1", "0.0123", "0.50"],
                        ["SPA, iteration 2", "0.0246", "0.50"]]
    assert agreement[0][1:] == ["Eq. 7", "Standard error", "The longer response", "Likelihood under pi_init", "Pairs"]
    assert agreement[2:] == [["SFT", "-", "-", "52.50", "45.00", "40"],
                             ["SPA, iteration 1", "61.00", "7.75", "52.50", "45.00", "40"],
                             ["SPA, iteration 2", "62.00", "7.75", "52.50", "45.00", "40"]]


def test_report_passes_over_the_records_beside_metrics_files(tmp_path):
    record, metrics = tmp_path / "0.json.args.json", tmp_path / "0.json"
    record.write_text('{"made_from": {}}')
    metrics.write_text('{"name": "SFT"}')
    assert "models 1" in stages.attempt("05_eval", "report", metrics, record, output=tmp_path / "report").out
    assert record.name in stages.refused("05_eval", "report", record, output=tmp_path / "none")


@pytest.mark.parametrize("metrics", [{"name": None}, [], {"name": "SFT", "judge_accuracy": "x"},
                                     {"name": "SFT", "agreement_n": [3]}])
def test_a_file_without_metrics_is_named(tmp_path, metrics):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(metrics))
    assert str(path) in stages.refused("05_eval", "report", path, output=tmp_path / "report")


def test_samples_show_whole_conversations_and_no_role_of_a_single_turn(tmp_path):
    talk = [("system", "Be brief."), ("user", "Name a fish."), ("assistant", "An eel."), ("user", "Now\na bird.")]
    prompts = [[{"role": role, "content": content} for role, content in talk],
               [{"role": "system", "content": ""}, {"role": "user", "content": "Name a fish."}], "Name a bird."]
    folders = [tmp_path / "SFT", tmp_path / "DPO"]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"name": folder.name}))
        stages.write_rows(folder / "responses.jsonl", [{"id": k, "prompt": prompt, "response": f"{folder.name} {k}"}
                                                       for k, prompt in enumerate(prompts)])
    stages.run("05_eval", "report", *folders, output=tmp_path / "report")
    quoted = ["> **system**: Be brief.\n>\n> **user**: Name a fish.\n>\n> **assistant**: An eel.\n>\n"
              "> **user**: Now\n> a bird.", "> Name a fish.", "> Name a bird."]
    assert (tmp_path / "report" / "samples.md").read_text() == "\n".join(
        f"{prompt}\n\n- **SFT**: SFT {k}\n- **DPO**: DPO {k}\n" for k, prompt in enumerate(quoted))


def panels(svg):
    """{(title, horizontal axis): the elements} of a picture, in its order."""
    groups = [group for group in ElementTree.fromstring(svg).iter() if group.tag.endswith("}g")]
    return {(group[0].text, group[1].text): list(group) for group in groups}


def points(elements):
    """Where the points are, as (x, y)."""
    return [(float(e.get("cx")), float(e.get("cy"))) for e in elements if e.tag.endswith("circle")]


def paths(elements):
    """[(path, color, whether it is dashed)] but for the grid."""
    return [(e.get("d"), e.get("stroke"), "stroke-dasharray" in e.attrib) for e in elements
            if e.tag.endswith("path") and e.get("stroke") != "#ddd"]


def texts(elements):
    """[(text, x, y)] but for the title and the name of the axis."""
    return [(e.text, float(e.get("x")), float(e.get("y"))) for e in elements if e.tag.endswith("text")][2:]


def test_the_figure_has_the_judge_and_the_kl_where_they_are_known():
    """Iterations from 0 at x = 60 to 2 at 260, as a KL of 0 to 0.04; the lowest tick at y = 295, the highest at 35."""
    spa = [dict(name=f"SPA, iteration {t}", win_rate=10.0 * t, judge_accuracy=80.0 + t, kl_per_token=0.02 * t,
                length_controlled_winrate=10.0 * t + 0.9) for t in (1, 2)]
    found = panels(report.figure([*spa, dict(name="DPO on the seed (pi_0)", win_rate=5.0, kl_per_token=0.01),
                                  dict(name="DPO", win_rate=15.0, kl_per_token=0.04)]))
    # LC win rates less than a point from the win rates are not drawn again
    assert list(found) == [("Win rate (%)", "Iteration (0: pi_0)"), ("Win rate (%)", "KL per token"),
                           ("Judge accuracy (%)", "Iteration")]
    rate, kl, judge = found.values()
    # win rates from 5 to 20: SPA's curve from pi_0, with 5 %; the judge's accuracy from 80 to 85
    assert points(rate) == [(60, 295), (160, 208.3), (260, 35)]
    assert points(kl) == [(110, 295), (160, 208.3), (260, 35), (260, 121.7)]
    assert points(judge) == [(60, 243), (260, 191)]  # without pi_0 the axis begins with iteration 1
    assert paths(rate)[0] == ("M60.0,295.0 L160.0,208.3 L260.0,35.0", "#1f77b4", False)
    assert paths(kl)[0] == ("M110.0,295.0 L160.0,208.3 L260.0,35.0", "#1f77b4", False)
    assert ("M50.0,121.7 L270.0,121.7", "#d62728", True) in paths(rate)
    assert [(text, x) for text, x, y in texts(kl) if y == 315] == [
        ("0", 60), ("0.01", 110), ("0.02", 160), ("0.03", 210), ("0.04", 260)]
    assert [(text, y) for text, x, y in texts(judge) if x == 42] == [("80", 299), ("85", 39)]


def test_the_figure():
    """Each method a curve with points at their win rates and bars of their errors, each other model a dashed line."""
    care = {"name": "<b>&\x1b", "length_controlled_winrate": 7.0}  # no win rate, and a name that needs care
    found = panels(report.figure([care, *SCORED[2::2]]))
    assert list(found) == TITLES
    rate, lc = found.values()
    # win rates from 5 at y = 295 to 25 at y = 35, 13 pixels a point: SPA's first is 12.9 +- 1.1
    assert points(rate) == [(60, 192.3), (260, 101.3), (60, 243)]
    names = [[text for text, x, _ in texts(elements) if x == 278] for elements in (rate, lc)]  # from the top, once
    assert names == [["SPA", "PairRM", "DPO"], ["<b>&"]]
    assert [[dashed for *_, dashed in paths(elements)].count(True) for elements in (rate, lc)] == [1, 2]
    assert ("M60.0,206.6 V178.0", "#1f77b4", False) in paths(rate)
    # DPO's, 7.68 +- 1.1, once, at the right
    assert [d for d, *_ in paths(rate) if d.endswith("245.9")] == ["M270.0,274.5 V245.9"]
    assert ("M60.0,192.3 L260.0,101.3", "#1f77b4", False) in paths(rate)


@pytest.mark.parametrize("rows, curves, dashed", [  # rows: (name, win rate, LC win rate); in each panel: points, lines
    ([("SPA, iteration 1", 40.0, None), ("DPO (pi_0)", 30.0, 20.0)], [2, 0], [0, 1]),
    ([("A (pi_0)", 30.0, None), ("B (pi_0, another)", 20.0, None), ("SPA, iteration 2", 40.0, None)], [1], [2]),
    ([("SPA, iteration 1", 40.0, None), ("X, iteration 1", 30.0, None), ("A (pi_0)", 20.0, None)], [4], [0]),
    ([("SFT", 40.0, None), ("SFT", 30.0, None), ("SFT, iteration 1", 30.0, None)], [1], [2]),
    ([("A (pi_0)", 0.0, None)], [0], [1]), ([("", 0.0, 0.0), ("pi_0", 0.0, 0.5)], [0], [2]),
    ([("A", None, None)], [], [])])
def test_the_figure_of_whatever_there_is(rows, curves, dashed):
    names = ("name", "win_rate", "length_controlled_winrate")
    svg = report.figure([dict(zip(names, row)) for row in rows])
    found = panels(svg).values()
    assert int(ElementTree.fromstring(svg).get("width")) > 0
    assert [len(points(elements)) for elements in found] == curves
    assert [[line[2] for line in paths(elements)].count(True) for elements in found] == dashed


@pytest.mark.parametrize("values, least, ticks", [
    ([17.4, 79.6], 5, [0, 20, 40, 60, 80]), ([50], 5, [50, 55]), ([80, 90], 5, [80, 85, 90]), ([0, 3], 1, [0, 1, 2, 3]),
    ([0, 12], 1, [0, 5, 10, 15]), ([0, 0.061], 0.001, [0, 0.02, 0.04, 0.06, 0.08]), ([0, 0], 0.001, [0, 0.001]),
    ([-0.3, 0.9], 0.001, [-0.5, 0, 0.5, 1]), ([0, 5000], 1, [0, 1000, 2000, 3000, 4000, 5000])])
def test_ticks_are_round_and_enclose_the_values(values, least, ticks):
    assert report.axis(values, least, 0, 1)[0] == pytest.approx(ticks)


def test_names_beside_lines_are_apart():
    """15 pixels a line of text, from 35 to 135: three names at the bottom, two at the top, one where it belongs."""
    ends = [(130, "b", "red"), (132, "c, which fills more than one line", "red"), (129, "a", "red"),
            (66.5, "at its line", "red"), (30, "y", "red"), (36, "z", "red")]
    found = [ElementTree.fromstring(element) for element in report.beside(sorted(ends)[:3], 100)]
    assert [(e.text, float(e.get("y")) - 12) for e in found] == [("y", 35), ("z", 50), ("at its line", 65)]
    found = [ElementTree.fromstring(element) for element in report.beside(ends[:4], 100)]
    assert [(e.text, float(e.get("y")) - 12) for e in found] == [("at its line", 59), ("a", 75), ("b", 90),
                                                                 ("c, which fills more than", 105), ("one line", 120)]
