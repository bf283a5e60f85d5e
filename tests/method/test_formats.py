"""00_inputs: other people's files: formats that are read, rows that are dropped, files that are refused."""

import datetime
import decimal
import gzip
import json
import os
import re

import pytest

import stages
from stages import ROOT, attempt, digest, refused, run, write_rows
from support import records, runs
from test_inputs import NAMES, TALK, assistant, made, sizes, user, write

MORE = {"prompt": "more"}  # a row without labels


def pair(k, **fields):
    return {"prompt": f"ask {k}", "chosen": f"yes {k}", "rejected": f"no {k}", **fields}


def seed_of(folder, source, size):
    """({id: row} of a seed of that size, the counts). source: rows or a file. One prompt more is taken."""
    if isinstance(source, list):
        source = write_rows(folder / "mine.jsonl", source)
    output = run("00_inputs", source=source, **sizes(size, 1, 0), output=folder / "out")
    seed = {row["id"]: row for row in records.read_jsonl(output / "seed.jsonl", records.LABELLED)}
    return seed, stages.counts(output)


def dropped(counts):
    """[(why rows are dropped, "COUNT, first PLACE")]"""
    return [item for item in counts.items() if "dropped (" in item[0]]


def talk(k, answer):
    return [user(f"ask {k}"), assistant(f"{answer} {k}")]


FORMATS = {
    "TRL, standard": pair,
    "TRL, standard, implicit": lambda k: {"chosen": f"ask {k} yes {k}", "rejected": f"ask {k} no {k}"},
    "TRL, implicit, the same letters": lambda k: {"chosen": f"ask {k} yes {k}", "rejected": f"ask {k} yesterday"},
    "TRL, conversational": lambda k: pair(k, prompt=[user(f"ask {k}")], chosen=[assistant(f"yes {k}")],
                                          rejected=[assistant(f"no {k}")]),
    "TRL, conversational, implicit": lambda k: {"chosen": talk(k, "yes"), "rejected": talk(k, "no")},
    "UltraFeedback-binarized": lambda k: pair(k, chosen=talk(k, "yes"), rejected=talk(k, "no"), prompt_id=f"hash {k}",
                                              messages=talk(k, "yes"), score_chosen=8.0, score_rejected=7.5),
    "hh-rlhf": lambda k: {"chosen": f"\n\nHuman: ask {k}\n\nAssistant: yes {k}",
                          "rejected": f"\n\nHuman: ask {k}\n\nAssistant: no {k}"},
    "hh-rlhf, prompt apart": lambda k: {"prompt": f"\n\nHuman: ask {k}\n\nAssistant:", "chosen": f" yes {k}",
                                        "rejected": f" no {k}"},
    "repeated prompts": lambda k: pair(k, chosen=f"ask {k}\nyes {k}", rejected=f"ask {k}\n no {k}"),
    "hh-rlhf, another column": lambda k: FORMATS["hh-rlhf"](k) | {"question": "How?"},
    "strings and messages": lambda k: FORMATS[["TRL, standard", "TRL, conversational", "TRL, conversational, implicit"]
                                              [k % 3]](k)}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read(tmp_path, name, kind):
    path = write(tmp_path / f"mine.{kind.removesuffix('.gz')}", [*map(FORMATS[name], range(8))])
    if kind == "jsonl.gz":
        path = path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress((tmp_path / "mine.jsonl").read_bytes()))
    seed, _ = seed_of(tmp_path, path, 7)
    assert len(seed) == 7
    for k, row in seed.items():
        assert row == {"id": k, "prompt": [user(f"ask {k}")], "chosen": f"yes {k}",
                       "rejected": "yesterday" if "letters" in name else f"no {k}"}


SYSTEM, *ASKED = TALK
TURNS = {  # a conversation before the answer
    "system, history in pairs": dict(system="be brief", history=[["name a fish", "eel"]], prompt="another"),
    "system_prompt": dict(system="", system_prompt="be brief", prompt=ASKED),
    "system_message, twice": dict(system_message="be brief", system="be brief", prompt=ASKED),
    "system, history in messages": dict(system="be brief", history=ASKED[:2], prompt=ASKED[2:]),
    "whole conversations": dict(prompt="name a fish", chosen=[*TALK, assistant("yes 0")],
                                rejected=[*TALK, assistant("no 0")]),
    "the end of the prompt again": dict(prompt=TALK, chosen=[ASKED[2], assistant("yes 0")],
                                        rejected=[ASKED[2], assistant("no 0")]),
    "turns of the answer": dict(prompt=TALK[:2], chosen=[*ASKED[1:], assistant("yes 0")],
                                rejected=[*ASKED[1:], assistant("no 0")]),
    "transcripts": dict(system="be brief", **{
        key: f"\n\nHuman: name a fish\n\nAssistant: eel\n\nHuman: another\n\nAssistant: {answer}"
        for key, answer in (("chosen", "yes 0"), ("rejected", "no 0"))})}


@pytest.mark.parametrize("name", TURNS)
def test_earlier_turns_and_the_system_message_are_part_of_the_prompt(tmp_path, name):
    row = {key: value for key, value in pair(0).items() if key != "prompt" or "prompt" in TURNS[name]} | TURNS[name]
    seed, _ = seed_of(tmp_path, [row, MORE], 1)
    assert list(seed.values()) == [{"id": "0", "prompt": TALK, "chosen": "yes 0", "rejected": "no 0"}]


def test_prompts_alone_may_be_transcripts(tmp_path):
    given = [{"prompt": f"\n\nHuman: {k}\n\nAssistant: eel\n\nHuman: another{end}", "answers": ["a"]}
             for k, end in enumerate(["", "\n\nAssistant:", "\n\nAssistant: "])]
    output = run("00_inputs", source=write_rows(tmp_path / "nectar.jsonl", given), **sizes(0, 3, 0),
                 output=tmp_path / "out")
    prompts = [row["prompt"] for row in made(output, "prompts_1")]
    assert sorted(prompt[0]["content"] for prompt in prompts) == ["0", "1", "2"]
    assert all(prompt[1:] == [assistant("eel"), user("another")] for prompt in prompts)


@pytest.fixture
def on_the_hub(monkeypatch):
    """(rows that every data set on the Hub is to have, the name and split of those that were asked for)"""
    import datasets
    given, asked = [], []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(given)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return given, asked


@pytest.mark.parametrize("source, split", [("ultrafeedback", "train"), ("some-one/pairs_v1.1", "train"),
                                           ("some-one/pairs_v1.1", "test_prefs")])
def test_the_hub_gives_what_a_parquet_file_gives(tmp_path, on_the_hub, source, split):
    given, asked = on_the_hub
    given += map(FORMATS["UltraFeedback-binarized"], range(40))
    given[4]["rejected"][1]["content"] = " "
    given[5] |= {"chosen": None, "rejected": None}  # Parquet's missing fields: no labels
    hub, file = (attempt("00_inputs", source=source, split=split, **sizes(2, 3, 20, 4), output=tmp_path / name)
                 for name, source in (("hub", source), ("file", write(tmp_path / "mine.parquet", given))))
    assert asked == [(source.replace("ultrafeedback", "argilla/ultrafeedback-binarized-preferences-cleaned"), split)]
    assert hub.status == file.status == 0
    for ran, path in ((hub, source), (file, tmp_path / "mine.parquet")):
        assert ran.out.count("dropped (") == 1 and f"1, first {path}, row 4" in ran.out
    assert all(digest(tmp_path / "hub" / f"{name}.jsonl") == digest(tmp_path / "file" / f"{name}.jsonl")
               for name in NAMES)


def test_ultrachat_gives_conversations_for_sft(tmp_path, on_the_hub):
    talks = [[*TALK, assistant("roach")] if k % 2 else talk(k, "yes") for k in range(40)]
    talks += [[user("ask"), assistant(" ")], talk(41, "yes")[:1]]
    given, asked = on_the_hub
    given += [{"prompt": "a", "prompt_id": f"hash {k}", "messages": talks[k]} for k in range(42)]
    output = run("00_inputs", source="ultrachat", empty_system=True, output=tmp_path / "out")
    assert asked == [("HuggingFaceH4/ultrachat_200k", "train_sft")]
    assert {path.name for path in output.iterdir()} == {"sft.jsonl", "args.json"}
    assert made(output, "sft") == [
        {"id": str(k), "prompt": TALK if k % 2 else [{"role": "system", "content": ""}, user(f"ask {k}")],
         "response": "roach" if k % 2 else f"yes {k}"} for k in range(40)]
    counts = stages.counts(output)
    assert counts["columns not read"] == ["prompt_id"] and counts["rows read"] == 42
    assert counts['dropped (no answer in "messages")'] == "2, first ultrachat, row 40"
    given[:2] = [{"prompt": "a", "messages": None}] * 2
    line = refused("00_inputs", source="ultrachat", split="test_sft", output=tmp_path / "other")
    assert asked[1:] == [("HuggingFaceH4/ultrachat_200k", "test_sft")] and "4 of 42" in line and "messages" in line


def test_the_same_path_size_and_time_may_be_another_parquet_file(tmp_path):
    path, seeds, stats = tmp_path / "mine.parquet", [], []
    for k, answer in enumerate(("fin", "eel")):
        write(path, [pair(0, chosen=answer), MORE | {"chosen": None, "rejected": None}])
        os.utime(path, (1, 1))
        stats.append((path.stat().st_size, path.stat().st_mtime))
        seeds.append(seed_of(tmp_path / str(k), path, 1)[0]["0"]["chosen"])
    assert seeds == ["fin", "eel"] and stats[0] == stats[1]


def test_parquet_s_types_that_json_lacks(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def columns(**more):
        table = {key: pyarrow.array([f"{key} {k}" for k in range(4)]) for key in ("prompt", "chosen", "rejected")}
        parquet.write_table(pyarrow.table(table | more), tmp_path / "mine.parquet")
        return tmp_path / "mine.parquet"

    days = pyarrow.array([datetime.datetime(2024, 1, 1 + k) for k in range(4)])
    others = {"when": days, "day": days.cast("date32"), "for": pyarrow.array([datetime.timedelta(k) for k in range(4)]),
              "price": pyarrow.array([decimal.Decimal(k) for k in range(4)]), "file": pyarrow.array([b"\xff"] * 4)}
    seed, counts = seed_of(tmp_path, columns(**others), 3)
    assert len(seed) == 3 and counts["columns not read"] == list(others)
    # datasets writes fields of several types as JSON
    messages = pyarrow.array([json.dumps([user(f"ask {k}")]) for k in range(4)], pyarrow.json_())
    seed, _ = seed_of(tmp_path / "json", columns(prompt=messages), 3)
    assert all(row["prompt"] == [user(f"ask {k}")] for k, row in seed.items())
    for key, values in (("id", days), ("prompt", others["file"]), ("chosen", others["price"]), ("rejected", days)):
        line = refused("00_inputs", source=columns(**{key: values}), **sizes(2, 1, 0), output=tmp_path / "other")
        assert f"{tmp_path}/mine.parquet, row 0: " in line and f'"{key}"' in line


def test_a_path_comes_before_a_name_on_the_hub_which_is_named_where_it_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "some-one/pairs: " in refused("00_inputs", source="some-one/pairs", output="out")  # the tests are offline
    (tmp_path / "some-one").mkdir()
    write_rows(tmp_path / "some-one" / "pairs", [*map(pair, range(3)), MORE])
    assert len(seed_of(tmp_path, "some-one/pairs", 3)[0]) == 3


def test_an_answer_that_begins_like_its_prompt_is_left_whole(tmp_path):
    given = [pair(0, prompt="Hello", chosen="Hello! How can I help?", rejected="Hello there"),
             pair(1, prompt="Hi", chosen="Hi you", rejected="Hi there"),  # both repeat it, as no other row does
             pair(2, prompt="Human", chosen="Human: a person", rejected="A robot"),
             *map(pair, range(3, 8)), MORE]
    seed, counts = seed_of(tmp_path, given, 8)
    assert [(seed[str(k)]["chosen"], seed[str(k)]["rejected"]) for k in range(3)] == [
        ("Hello! How can I help?", "Hello there"), ("Hi you", "Hi there"), ("Human: a person", "A robot")]
    assert counts["format"] == "strings or messages"


def code(k, **columns):
    """Answers that begin alike without repeating their prompt, which is in another column."""
    return {"chosen": f"def add(a, b):\n    return a + b  # {k}", "rejected": "def add(a, b):\n    return a", **columns}


@pytest.mark.parametrize("columns", [
    {"question": "How?"}, {"instruction": "How?", "input": ""}, {"source": "a forum", "score": 1.5},
    {"trajectory": [{"from": "user", "value": "How?"}]}, {"context": {"messages": [user("How?")]}}])
@pytest.mark.parametrize("shared", [40, 20, 10])  # rows that have the columns, of 40
def test_a_common_beginning_is_no_prompt_where_it_may_be_in_another_column(tmp_path, columns, shared):
    source = write_rows(tmp_path / "mine.jsonl", [code(k, **columns if k < shared else {}) for k in range(40)])
    line = refused("00_inputs", source=source, **sizes(20, 10, 0), output=tmp_path / "out")
    assert f"{source}:1: " in line and f"{shared} of 40" in line and repr(next(iter(columns))) in line


def test_the_few_rows_whose_prompt_may_be_in_another_column_are_dropped(tmp_path):
    given = [FORMATS["TRL, standard, implicit"](k) | {"question": " ", "score": k, "tags": [], "prompt": None}
             for k in range(19)] + [code(0, question="How?"), MORE]
    source = write_rows(tmp_path / "mine.jsonl", given)  # what says nothing is no prompt
    write(source.with_suffix(".parquet"), [{key: None for key in given[0]} | {"question": None} | row for row in given])
    for source, place in ((source, f"{source}:20"), (tmp_path / "mine.parquet", f"{tmp_path}/mine.parquet, row 19")):
        seed, counts = seed_of(tmp_path / source.suffix, source, 19)
        assert sorted(row["prompt"][0]["content"] for row in seed.values()) == sorted(f"ask {k}" for k in range(19))
        assert [said for name, said in counts.items() if "'question'" in name] == [f"1, first {place}"]


@pytest.mark.parametrize("name, more, unread", [
    ("TRL, standard", {"system_prompt": "be brief", "history": [], "id": None}, []),
    ("TRL, standard", {"model": "eel", "score": 1}, ["model", "score"]), ("hh-rlhf", {"question": None}, []),
    ("UltraFeedback-binarized", {}, ["prompt_id", "messages", "score_chosen", "score_rejected"])])
def test_the_summary_names_the_columns_that_are_not_read(tmp_path, name, more, unread):
    _, counts = seed_of(tmp_path, [FORMATS[name](k) | {"id": k} | (more if k % 2 else {}) for k in range(8)], 7)
    assert counts.get("columns not read", []) == unread


HUMAN = "\n\nHuman: ask 0\n\nAssistant:"
UNUSABLE = [
    (pair(0, rejected=" "), '"rejected"'), (pair(0, chosen=None), '"chosen"'), (pair(0, chosen=[]), '"chosen"'),
    (pair(0, chosen=[user("ask 0")]), '"chosen"'), (pair(0, rejected="yes 0\n"), "equal"),
    (pair(0, chosen=talk(0, "yes"), rejected=talk(1, "no")), "different prompts"),
    (pair(0, prompt=""), '"prompt"'), (pair(0, prompt=3), '"prompt"'), (pair(0, prompt=["ask"]), '"prompt"'),
    (pair(0, prompt=talk(0, "eel")), '"prompt"'), (pair(0, prompt=[user("ask 0"), SYSTEM, user("ask")]), "system"),
    (pair(0, system="a", prompt=TALK), "system"), (pair(0, system="a", system_prompt="b"), "system_prompt"),
    (pair(0, history="ask 1"), '"history"'),
    (pair(0, history=[["ask"]]), '"history"'), (pair(0, id=1.5), '"id"'), ({"text": "yes"}, '"prompt"'),
    ({"chosen": "a yes", "rejected": "a no"}, '"prompt"'),
    (pair(0, prompt=[user([{"type": "text", "text": "ask 0"}])]), '"content"'),
    (pair(0, chosen=[assistant(None)]), '"content"'),
    (pair(0, history=[assistant(["a", "b"]), user("ask")]), '"content"'),
    (pair(0, tools=[{"name": "search"}]), '"tools"'), (pair(0, images=["0.png"]), '"images"'),
    (pair(0, prompt=[{"role": "tool", "content": "found"}, user("ask 0")]), '"prompt"')]
SEARCH = [{"type": "function", "function": {"name": "search", "arguments": "{}"}}]
MORE_THAN_TEXT = {"tool_calls": SEARCH, "function_call": {"name": "search", "arguments": ""}, "name": "Ann",
                  "reasoning_content": "so", "thinking": "so", "refusal": "no", "images": ["0.png"],
                  "audio": {"id": "1"}, "tool_call_id": "call 1"}
NOTHING_MORE = {"tool_calls": None, "function_call": {"name": None, "arguments": ""}, "reasoning_content": "\n\n",
                "images": [], "audio": {"id": None}, "weight": 0.5, "masked": False,
                "id": "message 1"}


@pytest.mark.parametrize("name, row, cause", [("TRL, standard", *case) for case in UNUSABLE] + [
    ("hh-rlhf", {"chosen": f"{HUMAN} yes", "rejected": "\n\nHuman: ask 1\n\nAssistant: no"}, "different prompts"),
    ("hh-rlhf", {"chosen": f"{HUMAN} yes", "rejected": HUMAN}, '"rejected"'),
    ("hh-rlhf", {"chosen": f"{HUMAN} yes\n\nHuman: thanks", "rejected": f"{HUMAN} no"}, '"chosen"'),
    ("hh-rlhf", {"chosen": f"{HUMAN} no", "rejected": f"{HUMAN} no"}, "equal"),
    ("hh-rlhf", {"chosen": f"{HUMAN} yes", "rejected": f"{HUMAN} no\n\nHuman: why?\n\nAssistant: so"}, "different"),
    # of another format than most
    ("hh-rlhf", pair(40), "not transcripts"),
    ("hh-rlhf", {"chosen": talk(40, "yes"), "rejected": talk(40, "no")}, "not transcripts"),
    ("repeated prompts", pair(40, chosen="say 40 yes", rejected="say 40 no"), "not strings that"),
    ("repeated prompts", pair(40, chosen="ask 40 yes"), "not strings that"),
    ("repeated prompts", pair(40, chosen="ask 40 yes", rejected="ask 400"), "not strings that")])
def test_a_row_that_cannot_be_used_is_dropped_counted_and_named(tmp_path, name, row, cause):
    seed, counts = seed_of(tmp_path, [*map(FORMATS[name], range(1, 19)), MORE, row], 18)
    assert len(seed) == 18 and counts["rows read"] == 20
    [(found, said)] = dropped(counts)
    assert cause in found and said == f"1, first {tmp_path}/mine.jsonl:20"


def turns_with(fields):
    """Each place of a row for a message with more fields."""
    ask, yes, no = user("ask 0") | fields, assistant("yes 0") | fields, assistant("no 0") | fields
    return [pair(0, prompt=[ask]), pair(0, chosen=[yes]), pair(0, rejected=[no]), pair(0, history=[ask, yes]),
            {"chosen": [ask, yes], "rejected": [ask, no]}, {"prompt": [ask]}]


@pytest.mark.parametrize("name", MORE_THAN_TEXT)
def test_a_message_that_is_more_than_text_is_dropped_counted_and_named(tmp_path, name):
    rows = turns_with({name: MORE_THAN_TEXT[name]})
    rows += [pair(0, chosen=[{"role": "assistant", "content": None, name: MORE_THAN_TEXT[name]}])]
    _, counts = seed_of(tmp_path, [*rows, *map(pair, range(1, 150)), MORE], 149)
    [(cause, said)] = dropped(counts)
    assert f'"{name}"' in cause and said == f"{len(rows)}, first {tmp_path}/mine.jsonl:1"


@pytest.mark.parametrize("name", MORE_THAN_TEXT)
def test_the_stages_refuse_a_message_that_is_more_than_text(tmp_path, name):
    path, more = tmp_path / "rows.jsonl", {name: MORE_THAN_TEXT[name]}
    for row, field in ((pair(1, prompt=[user("ask") | more]), "prompt"),
                       (pair(1, prompt=[user("ask"), assistant("yes") | more, user("ask")]), "prompt"),
                       (pair(1, chosen=[assistant("yes") | more]), "chosen"),
                       (pair(1, rejected=[assistant("no") | more]), "rejected")):
        write_rows(path, [pair(0, id=0), row | {"id": 1}])
        with pytest.raises(runs.InputError, match=f'{re.escape(str(path))}:2: "{field}" is '):
            records.read_jsonl(path, records.LABELLED)


def test_the_stages_read_messages_with_fields_that_say_nothing(tmp_path):
    row = {"id": 0} | pair(0, prompt=[user("ask") | NOTHING_MORE], chosen=[assistant("yes") | NOTHING_MORE])
    [read] = records.read_jsonl(write_rows(tmp_path / "rows.jsonl", [row]), records.LABELLED)
    assert read["prompt"][0]["content"] == "ask" and read["chosen"] == "yes"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_that_say_nothing_are_left_out(tmp_path, kind):
    given = [{"prompt": None} | turns_with(NOTHING_MORE)[4], {"prompt": [user("more") | NOTHING_MORE]}]
    seed, counts = seed_of(tmp_path, write(tmp_path / f"mine.{kind}", given), 1)
    assert seed == {"0": {"id": "0", "prompt": [user("ask 0")], "chosen": "yes 0", "rejected": "no 0"}}
    assert made(tmp_path / "out", "prompts_1") == [{"id": "1", "prompt": [user("more")]}]
    assert not dropped(counts)


def test_more_than_one_row_in_twenty_that_cannot_be_used_stop(tmp_path):
    given = [*map(pair, range(37)), pair(37, chosen=""), pair(38, rejected="yes 38"), MORE]
    source = write_rows(tmp_path / "mine.jsonl", given)
    assert len(seed_of(tmp_path, source, 37)[0]) == 37
    write_rows(source, [pair(39, chosen=""), *given])
    line = refused("00_inputs", source=source, **sizes(20, 1, 0), output=tmp_path / "other")
    assert f"{source}:1: " in line and "3 of 41" in line and '"chosen": 2' in line and "equal: 1" in line


@pytest.mark.parametrize("row", [dict(prompt="a", response="b", helpfulness=3),  # HelpSteer's, orca_dpo_pairs'
                                 dict(system="s", question="a", chosen="b", rejected="c")])
def test_another_file_is_refused_with_the_columns_found_and_wanted(tmp_path, row):
    source = write_rows(tmp_path / "other.jsonl", [row] * 30)
    line = refused("00_inputs", source=source, **sizes(2, 2, 0), output=tmp_path / "out")
    found, wanted = line.split("columns found: ")[1].split("wanted: ")
    assert str(source) in line and all(column in found for column in row)
    assert all(column in wanted for column in ("prompt", "chosen", "rejected"))


def test_the_last_prompt_set_may_be_short_by_one_in_twenty(tmp_path):
    source = write_rows(tmp_path / "mine.jsonl", map(pair, range(40)))
    options = dict(source=source, seed_size=6, eval_size=4)
    output = run("00_inputs", **options, prompt_sizes=[9, 22], output=tmp_path / "out")
    assert [len(made(output, name)) for name in NAMES] == [6, 9, 21, 4]
    assert stages.counts(output)["missing from the last prompt set"] == 1
    refused("00_inputs", **options, prompt_sizes=[8, 24], output=tmp_path / "other")
    # with a smaller seed it is the same set and one row more, which was the seed's
    smaller = run("00_inputs", **options | {"seed_size": 5}, prompt_sizes=[9, 22], output=tmp_path / "smaller")
    short, more = made(output, "prompts_2"), {key: made(output, "seed")[0][key] for key in ("id", "prompt")}
    assert [made(smaller, name) for name in NAMES[1:]] == [made(output, "prompts_1"), [*short, more],
                                                           made(output, "eval")]


def test_the_readme_s_line_for_trl_is_the_one_that_is_tried_with_trl():
    [line] = re.findall(r"^ +(lambda row: .*)\)$", (ROOT / "extras/README.md").read_text(), re.MULTILINE)
    assert line in (ROOT / "benchmarks" / "trl_reads.py").read_text()
    answers = {key: {"text": key, "ids": [1, 2], "finish": "eos"} for key in ("chosen", "rejected")}
    assert eval(line)({"id": "0", **answers}) == {key: [assistant(key)] for key in answers}
