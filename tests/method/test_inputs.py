"""00_inputs: the seed and the prompt sets, from a person's file, from UltraFeedback and from the small world."""

import json

import pytest

import stages
from conftest import WORLD
from extras import small_world
from support import chat, records
from stages import counts, digest, refused, rows, run

NAMES = ["seed", "prompts_1", "prompts_2", "eval"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [{"role": "system", "content": "be brief"}, user("name a fish"), assistant("eel"), user("another")]


def write(path, rows):
    """As JSON Lines, JSON or Parquet, by the name's end."""
    if path.suffix == ".jsonl":
        return stages.write_rows(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        from datasets import Dataset
        Dataset.from_list(rows).to_parquet(path)
    return path


def made(folder, name):
    return rows(folder / f"{name}.jsonl")


def digests(folder, *without):
    """{file: digest} of all files of a folder but those of these names."""
    return {path.relative_to(folder): digest(path) for path in folder.rglob("*")
            if path.is_file() and path.name not in without}


def sizes(*values, **more):
    seed_size, *prompt_sizes, eval_size = values
    return dict(seed_size=seed_size, prompt_sizes=prompt_sizes, eval_size=eval_size) | more


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "many.jsonl", [{"id": k, "prompt": f"text {k}", "chosen": f"yes {k}", "rejected": f"no {k}"}
                                           for k in range(40)])


def test_the_sets_are_disjoint_and_the_prompt_sets_have_no_labels(source, tmp_path):
    output = run("00_inputs", source=source, **sizes(6, 10, 12, 4), all_gold=True, output=tmp_path / "out")
    labels = ("chosen", "rejected")
    fields = dict(seed=labels, prompts_1=(), prompts_2=(), eval=(*labels, "reference"), all_gold=labels)
    for name in fields:
        for row in made(output, name):
            k = row["id"]
            whole = {"id": k, "prompt": [user(f"text {k}")], "reference": f"yes {k}",
                     "chosen": [assistant(f"yes {k}")], "rejected": [assistant(f"no {k}")]}  # messages, as TRL reads
            assert list(row.items()) == [(key, whole[key]) for key in ("id", "prompt", *fields[name])]
    assert [len(made(output, name)) for name in NAMES] == [6, 10, 12, 4]
    ids = [row["id"] for name in NAMES for row in made(output, name)]
    assert len(set(ids)) == 32
    # all_gold: the labels of the seed and of all prompts
    assert sorted(row["id"] for row in made(output, "all_gold")) == sorted(ids[:28])
    assert not (output / "judge_sft.jsonl").exists()


def test_repeated_prompts_are_dropped_and_counted(tmp_path):
    pairs = [{"prompt": f"text {k % 9}", "chosen": f"yes {k}", "rejected": "no"} for k in range(12)]
    pairs += [{"prompt": [user(" text 3 ")], "chosen": "again", "rejected": "no"}]  # as messages, with blanks
    others = [{"role": "system", "content": "be long"}, *TALK[1:]]  # another system message: another prompt
    source = write(tmp_path / "mine.jsonl", [*pairs, *({"prompt": prompt} for prompt in (TALK, others, TALK))])
    output = run("00_inputs", source=source, **sizes(3, 5, 3, 0), output=tmp_path / "out")
    assert (counts(output)["rows read"], counts(output)["repeated prompts dropped"]) == (16, 5)
    contents = [row["prompt"][0]["content"] for name in NAMES[:3] for row in made(output, name)]
    assert sorted(contents) == ["be brief", "be long", *(f"text {k}" for k in range(9))]


def test_a_sample_of_the_seed_is_the_next_block_with_the_same_prompt_sets(source, tmp_path):
    options = dict(source=source, **sizes(6, 10, 8, 4))
    outputs = [run("00_inputs", **options, seed_sample=k, output=tmp_path / f"out_{k}") for k in range(3)]
    large = run("00_inputs", **options | {"seed_size": 12}, output=tmp_path / "large")
    for output in [*outputs[1:], large]:
        assert digests(output, "seed.jsonl", "args.json") == digests(outputs[0], "seed.jsonl", "args.json")
    # of 40, so that three samples of 6 are what is left
    assert [len(made(outputs[0], name)) for name in NAMES] == [6, 10, 8, 4]
    assert len({row["id"] for output in outputs for name in NAMES for row in made(output, name)}) == 40
    # a larger seed is that of several samples
    assert made(large, "seed") == made(outputs[1], "seed") + made(outputs[0], "seed")
    line = refused("00_inputs", **options, seed_sample=3, output=tmp_path / "out")
    assert str(source) in line and "--prompt-sizes" in line and "--seed-sample" in line
    refused("00_inputs", **options | {"prompt_sizes": [10, 13]}, seed_sample=2, output=tmp_path / "out")


def test_an_empty_system_message_is_put_before_prompts_that_have_none(world, tmp_path):
    empty = {"role": "system", "content": ""}
    given = made(world, "all_gold")[:12] + [{"id": "talk", "prompt": TALK, "chosen": "a", "rejected": "b"}]
    given.append(given[0] | {"id": "again", "prompt": [empty, *given[0]["prompt"]]})  # now it is the same prompt
    options = dict(source=write(tmp_path / "mine.jsonl", given), **sizes(6, 3, 2, 2), all_gold=True)
    output = run("00_inputs", **options, empty_system=True, output=tmp_path / "out")
    kept = [row["prompt"] for name in NAMES for row in made(output, name)]
    assert len(kept) == 13 and TALK in kept and all(prompt[:1] in ([empty], TALK[:1]) for prompt in kept)
    assert {json.dumps(row["prompt"]) for row in made(output, "all_gold")} <= set(map(json.dumps, kept))
    assert "--empty-system" in refused("00_inputs", **WORLD, empty_system=True, output=tmp_path / "world")


def test_the_sets_follow_the_seed_not_blank_lines_windows_line_ends_or_a_byte_order_mark(source, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(source.read_text().splitlines()).encode())
    one, two, three = (run("00_inputs", source=path, seed=seed, **sizes(6, 10, 12, 4), output=tmp_path / f"out_{k}")
                       for k, (path, seed) in enumerate([(source, 0), (other, 0), (other, 1)]))
    assert all(digest(one / f"{name}.jsonl") == digest(two / f"{name}.jsonl") for name in NAMES)
    assert made(one, "seed") != made(three, "seed") and not (one / "all_gold.jsonl").exists()


def test_the_world_is_decided_by_its_seed(world, tmp_path):
    again, other = (run("00_inputs", **WORLD | {"seed": seed}, output=tmp_path / f"world_{seed}") for seed in (0, 1))
    assert digests(again, "args.json") == digests(world, "args.json")
    assert all(made(other, name) != made(world, name) for name in NAMES)


def test_another_sample_or_size_of_the_world_s_seed_changes_nothing_else(world, tmp_path):
    samples = [world, *(run("00_inputs", **WORLD, seed_sample=k, output=tmp_path / f"world_{k}") for k in (1, 2))]
    its_own = "args.json", "seed.jsonl", "all_gold.jsonl", "judge_sft.jsonl"
    assert digests(samples[1], *its_own) == digests(samples[2], *its_own) == digests(world, *its_own)
    seeds, others = [made(sample, "seed") for sample in samples], [made(world, name) for name in NAMES[1:] + ["sft"]]
    assert [len(seed) for seed in seeds] == [20, 20, 20]
    prompts = [json.dumps(records.as_messages(row["prompt"])) for rows in seeds + others for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert len({row["id"] for rows in seeds + others for row in rows}) == len(prompts)
    for sample, seed in zip(samples, seeds):
        assert made(sample, "all_gold") == seed + made(world, "all_gold")[20:]
    larger = run("00_inputs", **WORLD | {"seed_size": 30}, output=tmp_path / "larger")
    assert all(made(world, name) == made(larger, name) for name in NAMES[1:])
    # 23,040 prompts: what sample 1 leaves for SFT, and one more
    assert "--seed-sample" in refused("00_inputs", **WORLD | {"sft_size": 23040 - 56 - 20 + 1}, seed_sample=1,
                                      output=tmp_path / "out")


def test_the_world_s_sets_have_their_sizes_and_the_labels_of_gold(world):
    gold = small_world.read_gold(world / "gold.json")
    assert [len(made(world, name)) for name in NAMES + ["sft"]] == [20, 14, 10, 12, 48]
    for row in records.read_jsonl(world / "all_gold.jsonl", records.LABELLED):
        chosen, rejected = (small_world.gold_score(gold, row["prompt"], row[y]) for y in ("chosen", "rejected"))
        assert chosen > rejected
    for row in made(world, "sft"):
        assert None not in small_world.gold_values(gold, records.as_messages(row["prompt"]), row["response"])


@pytest.mark.parametrize("name, fields, key", [
    ("sft", records.EXAMPLES, "response"), ("seed", records.LABELLED, "chosen"), ("eval", records.PROMPTS, "reference"),
    ("judge_sft", records.EXAMPLES, "response")])
def test_the_world_s_words_are_all_in_its_vocabulary(world, tokenizer, name, fields, key):
    for row in records.read_jsonl(world / f"{name}.jsonl", fields):
        assert tokenizer.unk_token_id not in tokenizer(row[key]).input_ids
        assert tokenizer.decode(tokenizer(row[key]).input_ids) == row[key]
        prompt = chat.prompt_ids(tokenizer, row["prompt"], "")
        assert tokenizer.unk_token_id not in prompt and prompt.count(tokenizer.bos_token_id) == 1
        assert len(prompt) + 60 < 256  # the model's positions; no response has more tokens


def test_an_id_that_is_there_twice_is_named(tmp_path):
    source = write(tmp_path / "mine.jsonl", [{"prompt": "text 0"}, {"id": "0", "prompt": "x"}])
    line = refused("00_inputs", source=source, **sizes(0, 2, 0), output=tmp_path / "out")
    assert f"{source}:2: " in line and f"{source}:1" in line


def test_too_few_rows_are_counted_out(source, tmp_path):
    line = refused("00_inputs", source=source, **sizes(20, 10, 12, 4), output=tmp_path / "out")
    assert str(source) in line and "40" in line and "--seed-size" in line
    assert "--sft-size" in refused("00_inputs", **WORLD | {"sft_size": 10 ** 6}, output=tmp_path / "out")


def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path):
    source = tmp_path / "bad.parquet"
    source.write_bytes(b"PAR1")
    assert f"{source}: " in refused("00_inputs", source=source, **sizes(0, 1, 0), output=tmp_path / "out")
