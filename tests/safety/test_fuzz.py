"""Thousands of damaged files: whatever a reader is given, it succeeds, or says in one line which file, and where.

    FUZZ=5000 python -m pytest tests/safety/test_fuzz.py -q      # so many files of each of 16 kinds

A damaged file is decided by (kind, number): a failure shows both, and `damaged(good, number)` makes it again.
"""

import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
from argparse import Namespace

import pytest

import stages
from children import at_end, fork, good, kill, no_child_outlives_its_test, succeeded
from extras import alpaca_eval, mt_bench
from extras.small_world import gold_score, read_gold
from support import chat, data, records, runs

FILES = int(os.environ.get("FUZZ", 150))  # damaged files of each kind
KINDS = ["seed.jsonl", "sft.jsonl", "preferences.jsonl", "responses.jsonl", "gold.json", "mine.jsonl", "base.json",
         "annotations.json", "df_gamed.csv", "judge.txt", "questions.jsonl", "model.jsonl", "judge_prompts.jsonl",
         "metrics.json", "chat.jinja"]
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "my lid is broken ."}]
DEEP, HUGE = "[" * 5000 + "]" * 5000, "9" * 400
LONG = "x" * 3_000_000
# what a value, as it stands in JSON, is replaced by
VALUES = [
    "null", "true", "0", "-1", "1", "1.5", HUGE, "-" + HUGE, "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "",
    "garbage", '""', '" "', '"a"', '"3"', r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"\\u2028"', '"\u2028"',
    '"\ufeff"', '"😀🏳️‍🌈"', '"\u202eשלום"', '"<eos>"', r'"a\nb\rc\u001b[2J"', "[]", "{}", "[[]]",
    '[""]', "[null]", "[-1]", "[1e999]", '[{"role": "user"}]',
    '[{"role": "robot", "content": "a"}]', '[{"role": "user", "content": "a"}]',
    '[{"role": "user", "content": 3}]', '{"text": "a", "ids": [7], "finish": "eos"}', '{"a": ' * 90 + "1" + "}" * 90,
    "[" * 400 + "]" * 400, DEEP]
# what bytes are put in
BYTES = [
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\n\n \n", b"\x85", b"\x1b[2J", b'"', b"\\", b"{", b"}",
    b"[", b"]", b",", b":", b"NaN", b"1e999", rb"\ud800", rb"\u0000", "\u2028".encode(), "😀".encode(),
    "\u202e".encode(), "א".encode(), b"\xf0\x9f", b"<eos>", b"{{", b"{%", b"9" * 400]


def replaced(rng, row):
    """A row as JSON, with one of its values, at any depth, replaced, dropped or there twice."""
    holes = list(places(row))
    holder, key = rng.choice(holes)
    mark = f"mark{rng.random()}"
    if rng.random() < 0.2 and isinstance(holder, dict):
        if rng.random() < 0.5:
            del holder[key]
            return json.dumps(row)
        holder[mark] = 0  # the same field again
        return json.dumps(row).replace(json.dumps(mark) + ": 0", f"{json.dumps(key)}: {rng.choice(VALUES)}")
    holder[key] = mark
    return json.dumps(row).replace(json.dumps(mark), f'"{LONG}"' if rng.random() < 0.01 else rng.choice(VALUES))


def places(value):
    """(holder, key) of everything inside a value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from places(value[key])


def structure(rng, text):
    """(a JSON or JSON Lines file with another structure, the number of the line that is another or None)"""
    lines = text.splitlines()
    if text[0] == "[" or len(lines) == 1:
        return replaced(rng, json.loads(text)), None
    k, choice = rng.randrange(len(lines)), rng.random()
    if choice < 0.9:
        lines[k] = replaced(rng, json.loads(lines[k]))
    elif choice < 0.95:
        lines[k] = rng.choice([f"[{lines[k]}]", *VALUES])
    else:
        return text + lines[k] + "\n", None
    return "\n".join(lines) + "\n", None if lines[0][:1] == "[" else k + 1  # [: now a list to some readers


def damaged(good, number):
    """(the bytes of a file, damaged; the number of the line, where it is one). good: bytes; number: decides how."""
    rng = random.Random(number)
    if rng.random() < 0.6 and re.match(rb'\[?\{"', good):
        text, line = structure(rng, good.decode())
        return text.encode(), line
    at, until = sorted(rng.randrange(len(good) + 1) for _ in "12")
    return rng.choice([
        lambda: good[:at],  # cut
        lambda: good[:at] + rng.choice(BYTES) + good[at:],
        lambda: good[:at] + rng.choice(BYTES) + good[until:],
        lambda: good[:at] + bytes([good[at - 1] ^ 1 << rng.randrange(8)]) + good[at + 1:] if at else good,
        lambda: good[:until] + good[at:],  # a part of it twice
        lambda: b"\xef\xbb\xbf" + good,
        lambda: good.replace(b"\n", b"\r\n"),
        lambda: good.replace(b"\n", b"\r"),
        lambda: good.replace(b" ", b"\xc2\xa0"),
        lambda: good.replace(b"\n", b""),
        lambda: gzip.compress(good)[:rng.choice([None, 10, 40])],
        lambda: good.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1"]), "replace"),
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: good[:at] + bytes(rng.randrange(5000)) + good[at:]])(), None


@pytest.fixture(scope="module")
def files(world, good, tokenizer, tmp_path_factory):
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")

    def lines(name, *rows):
        stages.write_rows(folder / f"{name}.jsonl", rows)

    def as_json(name, value):
        (folder / f"{name}.json").write_text(json.dumps(value))

    for name, path in (("seed", world / "seed.jsonl"), ("sft", world / "sft.jsonl"),
                       ("preferences", good["04_refined_dpo"]["input"])):
        lines(name, *stages.rows(path)[:3])
    one, two = {"text": "we fix it .", "ids": [7, 0], "finish": "eos"}, {"text": "no .", "ids": [9], "finish": "length"}
    lines("responses", *({"id": k, "prompt": TALK, "prompt_ids": [5, 6], "responses": [one, two]} for k in range(3)))
    as_json("gold", {"lid": {"we fix it .": 1, "no .": -1}})
    lines("mine", {"id": "a", "prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "q"},
          {"prompt": TALK, "chosen": TALK + [{"role": "assistant", "content": "y"}], "rejected": "z"})
    for name in ("base", "ours"):
        as_json(name, [{"instruction": f"say {k}", "output": f"{name} {k}", "generator": name} for k in range(3)])
    as_json("annotations", [{"instruction": f"say {k}", "output_1": "a", "output_2": "bb", "preference": value}
                            for k, value in enumerate([1, 1.5, 2, None])])
    (folder / "df_gamed.csv").write_text("index,preference,std_delta_len,instruction_difficulty\n" + "".join(
        f"{k},{k % 3 / 2},{k / 9},{k / 7}\n" for k in range(6)))
    (folder / "judge.txt").write_text("<|im_start|>user\n{instruction} {output_1} {output_2}<|im_end|>")
    (folder / "chat.jinja").write_text(tokenizer.chat_template)
    lines("questions", *({"question_id": k, "category": category, "turns": ["a b", "c d"]}
                         for k, category in enumerate(["writing", "math", "stem"])))
    lines("model", *({"question_id": k, "choices": [{"index": 0, "turns": ["a", "b"]}]} for k in range(3)))
    lines("judge_prompts", *({"name": f"single{math}-v1{turn}", "system_prompt": "s", "prompt_template": "{answer_2}"}
                             for math in ("", "-math") for turn in ("", "-multi-turn")))
    as_json("metrics", {"name": "SPA, iteration 1", "gold_labels": "3 %", "win_rate": 50.0, "standard_error": 2.0,
                        "mt_bench_categories": {"math": 3.0}, "avg_length": 12})
    return folder


def to_judge(folder, **changes):
    """(rows to be judged, the messages that ask for it), of MT-Bench's files."""
    given = dict(questions="questions", answers="model", reference_answers="model", judge_prompts="judge_prompts")
    args = Namespace(judge_model="j", **{key: folder / f"{name}.jsonl" for key, name in given.items()} | changes)
    questions = records.read_rows(args.questions, mt_bench.QUESTIONS, "question_id")
    return mt_bench.prepare_judgments(args, questions, "model")


def reader(function, model, *more, several=False):
    """A function that reads --input; 01 and 04 take several files."""
    def read(path):
        function(Namespace(input=[str(path)] if several else str(path), model=str(model), max_prompt_length=64,
                           max_length=128, all_turns=True), *more)
    return read


def stage(name, option, folder, **options):
    """The whole stage, where it needs no model. The file is that option, or where it is None the last word."""
    def read(path):
        words, given = ([path], {}) if option is None else ([], {option: path})
        ran = stages.attempt(*name.split(), *words, output=folder / f"out_{random.random()}", **options | given)
        if not succeeded(ran, folder, path):
            raise runs.InputError(ran.err)
    return read


@pytest.fixture(scope="module")
def readers(files, tokenizer, pi_0):
    """{kind: read}; read(path) is what a stage does with such a file."""
    def chat_template(path):
        with_it = chat.load_tokenizer(str(pi_0), chat_template=str(path))
        return chat.prompt_ids(with_it, TALK, path), chat.eos_ids(str(pi_0), with_it)

    readers = {
        "seed.jsonl": reader(data.read_pairs, pi_0, tokenizer, records.LABELLED, several=True),
        "sft.jsonl": reader(stages.load("00_sft").read_examples, pi_0, tokenizer),
        "preferences.jsonl": reader(data.read_pairs, pi_0, tokenizer, records.PREFERENCES, records.LABELLED,
                                    several=True),
        "responses.jsonl": stage("03_judge", "input", files, judge="gold", gold=files / "gold.json"),
        "gold.json": lambda path: gold_score(read_gold(path), TALK, "we fix it . no ."),
        "mine.jsonl": stage("00_inputs", "source", files, seed_size=1, prompt_sizes=[1], eval_size=0),
        "base.json": lambda path: alpaca_eval.read_pairs(path, files / "ours.json"),
        "annotations.json": stage("05_eval alpaca-score", None, files, df_gamed="none"),
        "df_gamed.csv": stage(f"05_eval alpaca-score {files / 'annotations.json'}", "df_gamed", files),
        "judge.txt": alpaca_eval.read_template, "questions.jsonl": lambda path: to_judge(files, questions=path),
        "model.jsonl": lambda path: to_judge(files, answers=path, reference_answers=path),
        "judge_prompts.jsonl": lambda path: to_judge(files, judge_prompts=path),
        "metrics.json": stage("05_eval report", None, files),
        "chat.jinja": chat_template}
    assert list(readers) == KINDS
    return readers


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(files, readers, tmp_path, kind):
    good, read = files / kind, readers[kind]
    read(good)
    path, refused = tmp_path / f"damaged{good.suffix}", 0
    for number in range(FILES):
        content, line = damaged(good.read_bytes(), number)
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read(path)
        except runs.InputError as error:
            refused += 1
            assert str(path) in str(error), (number, error)
            # its line, or the id, question, key or prompt that another file has or lacks
            named = rf":{line}: |row {line}[ :]|line {line}\b| id |question |duplicate|prompt single"
            assert line is None or re.search(named, str(error)), (number, error)
        except Exception as error:
            raise AssertionError(f"{number}: {type(error).__name__}: {str(error)[:300]}") from error
    assert refused > FILES / 20  # else nothing was damaged


@pytest.mark.parametrize("stage", ["02_generate", "03_judge"])
def test_what_a_killed_run_left_and_was_damaged_changes_no_result(good, tmp_path, stage):
    whole = stages.run(stage, output=tmp_path / "whole", **good[stage])
    left, output, partial = tmp_path / "left", tmp_path / "out", tmp_path / "out.partial"
    assert fork(stage, good[stage] | {"output": output}, lambda: at_end(kill, output))().status == -signal.SIGKILL
    partial.rename(left)
    names = sorted(path.name for path in left.iterdir() if path.suffix in (".json", ".jsonl"))
    assert len(names) > 1
    for number in range(max(1, FILES // 10)):
        shutil.copytree(left, partial)
        file = partial / names[number % len(names)]
        content, _ = damaged(file.read_bytes(), number)
        file.write_bytes(content)
        ran = stages.attempt(stage, output=output, **good[stage])
        if succeeded(ran, partial):
            assert stages.digest(output) == stages.digest(whole), (stage, number)
            output.unlink()
        shutil.rmtree(partial, ignore_errors=True)


def test_a_damaged_record_of_an_output_or_a_model(good, tmp_path):
    options = good["02_generate"]
    output = stages.run("02_generate", output=tmp_path / "out", **options)
    record, made = runs.args_path(output), stages.digest(output)
    content, model = record.read_bytes(), shutil.copytree(options["model"], tmp_path / "model")
    fingerprint = runs.fingerprint(model)
    for number in range(max(1, FILES // 4)):
        damage, _ = damaged(content, number)
        record.write_bytes(damage)
        succeeded(stages.attempt("02_generate", output=output, **options), output)
        assert stages.digest(output) == made and record.read_bytes() == damage
        (model / "args.json").write_bytes(damage)
        assert runs.fingerprint(model) == fingerprint
