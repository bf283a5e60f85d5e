"""00_inputs: the seed and the prompt sets, from a person's file, from UltraFeedback and from the small world."""

import json

import pytest

import common
import stages
from conftest import WORLD
from stages import attempt, digest, rows, run

inputs = stages.load("00_inputs")
NAMES = ["seed", "prompts_1", "prompts_2", "eval"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [{"role": "system", "content": "be brief"}, user("name a fish"), assistant("eel"), user("another")]
PERSON = [  # the same kinds of rows that people have
    {"prompt": "text 0", "chosen": "good 0", "rejected": "bad 0"},
    {"prompt": [user("text 1")], "chosen": [user("text 1"), assistant("good 1")],
     "rejected": [user("text 1"), assistant("bad 1")]},
    {"chosen": [user("text 2"), assistant("good 2")], "rejected": [user("text 2"), assistant("bad 2")]},
    {"prompt": TALK, "chosen": [assistant("good 3")], "rejected": "bad 3"},
    {"chosen": TALK + [assistant("good 4"), user("and 4"), assistant("good 4")],
     "rejected": TALK + [assistant("good 4"), user("and 4"), assistant("bad 4")]},
    {"prompt": "text 5\n", "chosen": "text 5\ngood 5", "rejected": "text 5\n bad 5"}]
PROMPTS = [[user("text 0")], [user("text 1")], [user("text 2")], TALK,
           TALK + [assistant("good 4"), user("and 4")], [user("text 5\n")]]


def write(path, rows):
    """As JSON Lines, JSON or Parquet, by the name's end."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        from datasets import Dataset
        Dataset.from_list(rows).to_parquet(path)
    return path


def made(folder, name):
    return rows(folder / f"{name}.jsonl")


def by_prompt(folder, name):
    return {json.dumps(row["prompt"]): row for row in made(folder, name)}


# ---------------------------------------------------------------------------------------------
# A person's file


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_prompt_is_read_from_texts_and_messages_and_split_off_the_answers(tmp_path, kind):
    source = write(tmp_path / f"mine.{kind}", PERSON + [{"prompt": "a prompt without labels"}])
    output = run("00_inputs", source=source, seed_size=6, prompt_sizes=[1], eval_size=0, output=tmp_path / "out")
    seed = {row["chosen"]: row for row in made(output, "seed")}
    assert sorted(seed) == [f"good {k}" for k in range(6)]
    for k, prompt in enumerate(PROMPTS):
        assert seed[f"good {k}"]["prompt"] == prompt and seed[f"good {k}"]["rejected"] == f"bad {k}"
    assert [row["prompt"] for row in made(output, "prompts_1")] == [[user("a prompt without labels")]]


def test_parquet_is_read_as_well(tmp_path):
    pairs = [{"prompt": f"text {k}", "chosen": [user(f"text {k}"), assistant("yes")],
              "rejected": [user(f"text {k}"), assistant("no")], "rating": 5} for k in range(8)]
    source = write(tmp_path / "mine.parquet", pairs)
    output = run("00_inputs", source=source, seed_size=3, prompt_sizes=[2, 2], eval_size=1, output=tmp_path / "out")
    assert [len(made(output, name)) for name in NAMES] == [3, 2, 2, 1]
    assert all((row["chosen"], row["rejected"]) == ("yes", "no") for row in made(output, "seed"))


def test_ultrafeedback_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets
    pairs = [{"source": "flan", "prompt": f"text {k}", "chosen": [user(f"text {k}"), assistant("yes")], "chosen-rating": 5.0,
              "chosen-model": "a", "rejected": [user(f"text {k}"), assistant("no")], "rejected-rating": 1.0,
              "rejected-model": "b"} for k in range(9)]
    pairs.insert(4, pairs[0] | {"prompt": "mute", "chosen": [user("mute"), assistant("yes")],
                                "rejected": [user("mute"), assistant(" ")]})
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(pairs)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    output = run("00_inputs", source="ultrafeedback", seed_size=2, prompt_sizes=[3, 4], eval_size=0, output=tmp_path / "out")
    assert asked == [("argilla/ultrafeedback-binarized-preferences-cleaned", "train")]
    assert [len(made(output, name)) for name in NAMES] == [2, 3, 4, 0]
    assert all(row["chosen"] == "yes" and row["prompt"][0]["content"].startswith("text") for row in made(output, "seed"))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "many.jsonl", [{"id": k, "prompt": f"text {k}", "chosen": f"yes {k}", "rejected": f"no {k}"}
                                           for k in range(40)])


def sizes(**more):
    return dict(seed_size=6, prompt_sizes=[10, 12], eval_size=4) | more


def test_the_sets_are_disjoint_and_only_the_seed_has_labels(source, tmp_path):
    output = run("00_inputs", source=source, **sizes(), output=tmp_path / "out")
    assert [len(made(output, name)) for name in NAMES] == [6, 10, 12, 4]
    prompts = [prompt for name in NAMES for prompt in by_prompt(output, name)]
    assert len(set(prompts)) == len(prompts) == 32
    assert all(list(row) == ["id", "prompt", "chosen", "rejected"] for row in made(output, "seed"))
    assert all(list(row) == ["id", "prompt"] for name in NAMES[1:3] for row in made(output, name))
    assert all(row["reference"] == f"yes {row['id']}" for row in made(output, "eval"))
    ids = [row["id"] for name in NAMES for row in made(output, name)]
    assert len(set(ids)) == len(ids)
    assert not (output / "all_gold.jsonl").exists()


def test_repeated_prompts_are_dropped_and_counted(tmp_path):
    pairs = [{"prompt": f"text {k % 9}", "chosen": f"yes {k}", "rejected": "no"} for k in range(12)]
    pairs += [{"prompt": [user(" text 3 ")], "chosen": "again", "rejected": "no"}]  # as messages, with blanks
    output = run("00_inputs", source=write(tmp_path / "mine.jsonl", pairs), seed_size=3, prompt_sizes=[4, 2], eval_size=0,
                 output=tmp_path / "out")
    counts = json.loads((output / "args.json").read_text())["counts"]
    assert (counts["rows read"], counts["repeated prompts dropped"]) == (13, 4)
    contents = [row["prompt"][0]["content"] for name in NAMES[:3] for row in made(output, name)]
    assert sorted(contents) == [f"text {k}" for k in range(9)]


def test_a_prompt_of_another_system_message_is_another_prompt():
    others = [{"role": "system", "content": "be long"}, *TALK[1:]]
    rows = [{"id": "1", "prompt": TALK}, {"id": "2", "prompt": others, "chosen": ""}, {"id": "3", "prompt": list(TALK)}]
    different, labelled = inputs.drop_repeats(rows)
    assert different.tolist() == [0, 1] and labelled.tolist() == [False, True, False]


def test_a_larger_seed_leaves_the_prompt_sets_as_they_are(source, tmp_path):
    small, large = (run("00_inputs", source=source, **sizes(seed_size=size), output=tmp_path / f"out_{size}")
                    for size in (2, 12))
    for name in NAMES[1:]:
        assert made(small, name) == made(large, name)
    assert by_prompt(small, "seed").items() <= by_prompt(large, "seed").items()


def test_the_sets_follow_the_seed(source, tmp_path):
    one, again, other = (run("00_inputs", source=source, **sizes(seed=seed), output=tmp_path / name)
                         for name, seed in (("one", 0), ("again", 0), ("other", 1)))
    for name in NAMES:
        assert made(one, name) == made(again, name)
    assert made(one, "seed") != made(other, "seed")


def test_all_gold_holds_the_labels_of_the_seed_and_of_all_prompts(source, tmp_path):
    output = run("00_inputs", source=source, **sizes(), all_gold=True, output=tmp_path / "out")
    expected = [prompt for name in NAMES[:3] for prompt in by_prompt(output, name)]
    assert sorted(by_prompt(output, "all_gold")) == sorted(expected)
    assert all(row["chosen"] == f"yes {row['id']}" for row in made(output, "all_gold"))


def test_no_seed_data_needs_no_labels(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"prompt": f"text {k}"} for k in range(9)])
    output = run("00_inputs", source=source, seed_size=0, prompt_sizes=[3, 4], eval_size=2, output=tmp_path / "out")
    assert [len(made(output, name)) for name in NAMES] == [0, 3, 4, 2]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_change_nothing(source, tmp_path):
    lines = source.read_text().splitlines()
    (tmp_path / "other.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    one, two = (run("00_inputs", source=path, **sizes(), output=tmp_path / path.stem)
                for path in (source, tmp_path / "other.jsonl"))
    for name in NAMES:
        assert digest(one / f"{name}.jsonl") == digest(two / f"{name}.jsonl")


def test_an_id_that_stands_twice_is_named_with_both_lines(tmp_path):
    pairs = [{"id": k % 7, "prompt": f"text {k}"} for k in range(9)]
    source = write(tmp_path / "mine.jsonl", pairs)
    ran = attempt("00_inputs", source=source, seed_size=0, prompt_sizes=[1], eval_size=0, output=tmp_path / "out")
    assert ran.status == 2 and f"{source}:8: {source}:1 has the id '0' too" in ran.err


# ---------------------------------------------------------------------------------------------
# The small world


def test_the_world_is_decided_by_its_seed(world, tmp_path):
    again, other = (run("00_inputs", **WORLD | {"seed": seed}, output=tmp_path / f"world_{seed}") for seed in (0, 1))
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file() and path.name != "args.json")
    assert {path.name for path in files} >= {"seed.jsonl", "prompts_1.jsonl", "prompts_2.jsonl", "eval.jsonl", "sft.jsonl",
                                             "all_gold.jsonl", "gold.json", "model.safetensors"}
    for file in files:
        assert digest(again / file) == digest(world / file), file
    for name in NAMES:
        assert made(other, name) != made(world, name)


def test_the_world_s_sets_are_disjoint_and_labelled_by_gold(world):
    gold = json.loads((world / "gold.json").read_text())
    names = NAMES + ["sft"]
    assert [len(made(world, name)) for name in names] == [20, 14, 10, 12, 48]
    prompts = [json.dumps(common.as_messages(row["prompt"])) for name in names for row in made(world, name)]
    assert len(set(prompts)) == len(prompts)
    for row in made(world, "all_gold"):
        chosen, rejected = (common.gold_score(gold, row["prompt"], row[y]) for y in ("chosen", "rejected"))
        assert chosen > rejected
    for row in made(world, "sft"):
        assert None not in common.gold_values(gold, common.as_messages(row["prompt"]), row["response"])
    assert all(set(row) == {"id", "prompt"} for name in NAMES[1:3] for row in made(world, name))


def test_a_larger_seed_leaves_the_world_s_prompt_sets_as_they_are(world, tmp_path):
    larger = run("00_inputs", **WORLD | {"seed_size": 30}, output=tmp_path / "larger")
    for name in NAMES[1:]:
        assert made(larger, name) == made(world, name)


def test_the_world_s_words_are_all_in_its_vocabulary(world, tokenizer):
    for name, key in (("sft", "response"), ("seed", "chosen"), ("eval", "reference")):
        for row in made(world, name):
            assert tokenizer.unk_token_id not in tokenizer(row[key]).input_ids
            assert tokenizer.decode(tokenizer(row[key]).input_ids) == row[key]
            prompt = common.prompt_ids(tokenizer, common.as_messages(row["prompt"]), "")
            assert tokenizer.unk_token_id not in prompt and prompt.count(tokenizer.bos_token_id) == 1


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("row, words", [
    ({"prompt": "x", "chosen": "y"}, ["mine.jsonl:2", '"rejected"']),
    ({"chosen": "y", "rejected": "z"}, ["mine.jsonl:2", "prompt"]),
    ({"prompt": "x", "chosen": "", "rejected": "z"}, ["mine.jsonl:2", '"chosen"']),
    ({"prompt": "x", "chosen": 3, "rejected": "z"}, ["mine.jsonl:2", '"chosen"', "3"]),
    ({"prompt": "", "chosen": "y", "rejected": "z"}, ["mine.jsonl:2", '"prompt"']),
    ({"prompt": "x", "chosen": [user("x")], "rejected": "z"}, ["mine.jsonl:2", '"chosen"', "assistant"]),
    ({"chosen": [user("a"), assistant("y")], "rejected": [user("b"), assistant("z")]}, ["mine.jsonl:2", "different prompts"]),
    ([1], ["mine.jsonl:2"]), (3, ["mine.jsonl:2", "not a JSON object"])])
def test_a_bad_row_is_named(tmp_path, row, words):
    source = write(tmp_path / "mine.jsonl", [PERSON[0], row])
    ran = attempt("00_inputs", source=source, seed_size=1, prompt_sizes=[1], eval_size=0, output=tmp_path / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert all(word in ran.err for word in words), ran.err


def test_too_few_rows_are_counted_out(source, tmp_path):
    ran = attempt("00_inputs", source=source, **sizes(seed_size=20), output=tmp_path / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1 and "40 different prompts" in ran.err
    ran = attempt("00_inputs", **WORLD | {"sft_size": 10 ** 6}, output=tmp_path / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1 and "--sft-size" in ran.err


@pytest.mark.parametrize("name, text", [
    ("no.jsonl", None), ("bad.jsonl", '{"prompt": "x"}\n{"prompt": '), ("bad.json", "[1, "),
    ("bad.parquet", "PAR1")])
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    ran = attempt("00_inputs", source=tmp_path / name, seed_size=0, prompt_sizes=[1], eval_size=0, output=tmp_path / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1 and name in ran.err, ran.err
    assert name != "bad.jsonl" or f"{name}:2" in ran.err
