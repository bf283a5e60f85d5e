"""What a user has to mend is one line on stderr that says where, exit status 2, and nothing is overwritten."""

import json
import shutil

import pytest

import stages
from conftest import save_tiny
from stages import attempt, command_line, digest, rows, run, write_rows

TRAINING = ("00_sft", "01_seed_dpo", "04_refined_dpo")
STAGES = (*TRAINING, "02_generate", "03_judge", "05_eval")


@pytest.fixture(scope="module")
def good(world, pi_init, pi_0, tmp_path_factory):
    """{stage: options that work, without --output}"""
    folder = tmp_path_factory.mktemp("good")
    responses = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6,
                    output=folder / "responses.jsonl")
    judged = run("03_judge", model=pi_0, init_model=pi_init, input=responses, output=folder / "preferences.jsonl")
    return {"00_sft": dict(model=pi_init, input=world / "sft.jsonl"),
            "01_seed_dpo": dict(model=pi_init, input=world / "seed.jsonl"),
            "02_generate": dict(model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6),
            "03_judge": dict(model=pi_0, init_model=pi_init, input=responses),
            "04_refined_dpo": dict(model=pi_0, input=judged),
            "05_eval": dict(model=pi_0, input=world / "eval.jsonl", gold=world / "gold.json", max_new_tokens=6)}


def refused(stage, *words, output, **options):
    """Run a stage that must refuse: the line on stderr holds the words, and the output is as it was."""
    def content():
        return digest(output) if output.is_file() else stages.files(output)

    before = content()
    ran = attempt(stage, output=output, **options)
    assert ran.status == 2, ran
    assert ran.err.count("\n") == 1 and ran.err.startswith(f"{stage}.py: "), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert str(word) in ran.err, ran.err
    assert content() == before
    return ran.err


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_file(good, tmp_path, stage):
    refused(stage, "no.jsonl", output=tmp_path / "out", **good[stage] | {"input": tmp_path / "no.jsonl"})
    (tmp_path / "folder").mkdir()
    refused(stage, "folder", output=tmp_path / "out", **good[stage] | {"input": tmp_path / "folder"})


@pytest.mark.parametrize("line", ["{'id': 1}", '{"id": 1', "no", "[1, 2]", "3", '"text"', "null", "[" * 100_000])
def test_a_line_that_is_no_json_object(good, world, tmp_path, line):
    lines = (world / "prompts_1.jsonl").read_text().splitlines()
    lines[2:2] = ["", line]  # after a blank line, which is none, comes line 4
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    refused("02_generate", "in.jsonl:4", output=tmp_path / "out",
            **good["02_generate"] | {"input": tmp_path / "in.jsonl"})


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00\x01", b'{"id": 1, "prompt": "\xff"}\n'])
def test_a_file_without_rows_or_not_in_utf_8(good, tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    refused("02_generate", "in.jsonl", output=tmp_path / "out",
            **good["02_generate"] | {"input": tmp_path / "in.jsonl"})


@pytest.mark.parametrize("stage", ["00_inputs", "01_seed_dpo", "02_generate", "03_judge"])
def test_half_a_surrogate_is_no_text(good, tmp_path, stage):
    # JSON can write one, as cut emojis leave it; UTF-8 cannot
    given = rows(good[stage]["input"]) if stage in good else [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    given[1]["prompt"] = "hello \ud800"
    path = write_rows(tmp_path / "in.jsonl", given)
    if stage == "00_inputs":
        refused(stage, path, output=tmp_path / "out", source=path, seed_size=1, prompt_sizes=[1], eval_size=0)
    else:
        refused(stage, path, output=tmp_path / "out", **good[stage] | {"input": path})


GOOD_RESPONSE = {"text": "a", "ids": [7, 8], "finish": "eos"}
BAD_FIELDS = {
    "id": (None, "", 1.5, [1], True),
    "prompt": (None, "", "  ", 3, [], {}, ["hello"], [{"role": "user"}], [{"role": "user", "content": ""}],
               [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               [{"role": "robot", "content": "a"}]),
    "response": (None, "", " \n", 3, ["a"]),
    "chosen text": (None, "", 3, {"text": "a"}),
    "prompt_ids": (None, [], "12", [1.5], [-1], [True], [10 ** 6]),
    "chosen": (None, "a", {}, {**GOOD_RESPONSE, "ids": []}, {**GOOD_RESPONSE, "ids": ["a"]},
               {**GOOD_RESPONSE, "finish": "stop"}, {**GOOD_RESPONSE, "text": None}, {**GOOD_RESPONSE, "ids": [10 ** 6]}),
    "responses": (None, [], [GOOD_RESPONSE], [GOOD_RESPONSE, {"text": "b"}], [GOOD_RESPONSE, "b"]),
    "reference": (None, "", 3)}
FIELDS = {"00_sft": ("id", "prompt", "response"), "01_seed_dpo": ("id", "prompt", "chosen text", "rejected text"),
          "02_generate": ("id", "prompt"), "03_judge": ("id", "prompt", "prompt_ids", "responses"),
          "04_refined_dpo": ("id", "prompt_ids", "chosen", "rejected"), "05_eval": ("id", "prompt", "reference")}


@pytest.mark.parametrize("stage, field", [(stage, field) for stage in STAGES for field in FIELDS[stage]])
def test_a_missing_field_or_one_of_a_wrong_kind(good, tmp_path, stage, field):
    name, given = field.removesuffix(" text"), rows(good[stage]["input"])
    values = BAD_FIELDS[field.replace("rejected", "chosen")]
    path = tmp_path / "in.jsonl"
    for value in values:
        bad = given[:1] + [{**given[1], name: value}]
        error = refused(stage, path, output=tmp_path / "out", **good[stage] | {"input": write_rows(path, bad)})
        # a token id that is too large is known after the model is loaded, and named by the row's id
        assert f"{path}:2: " in error and f'"{name}"' in error or f"id {given[1]['id']}: token id 1000000" in error
    missing = {key: value for key, value in given[1].items() if key != name}
    refused(stage, f'{path}:2: the field "{name}" is missing', output=tmp_path / "out",
            **good[stage] | {"input": write_rows(path, given[:1] + [missing])})


@pytest.mark.parametrize("stage", STAGES)
def test_an_id_that_stands_twice(good, tmp_path, stage):
    given = rows(good[stage]["input"])
    given[0]["id"], given[2]["id"] = 7, "7"  # as a number and as a text
    path = write_rows(tmp_path / "in.jsonl", given)
    refused(stage, f"{path}:3", '"7"', "line 1", output=tmp_path / "out", **good[stage] | {"input": path})


@pytest.mark.parametrize("stage", ["00_sft", "01_seed_dpo", "02_generate", "04_refined_dpo", "05_eval"])
def test_nothing_is_left_after_dropping_long_prompts(good, tmp_path, stage):
    refused(stage, good[stage]["input"], "--max-prompt-length", output=tmp_path / "out",
            **good[stage] | {"max_prompt_length": 2})


def test_nothing_is_left_after_dropping_cut_and_identical_responses(good, tmp_path):
    refused("02_generate", "limit", "--max-new-tokens", output=tmp_path / "out_02",
            **good["02_generate"] | {"cut": "drop"})
    same = [{**row, "responses": [row["responses"][0]] * 2} for row in rows(good["03_judge"]["input"])]
    path = write_rows(tmp_path / "in.jsonl", same)
    refused("03_judge", path, "no pair", output=tmp_path / "out_03", **good["03_judge"] | {"input": path})
    same = [{**row, "rejected": row["chosen"]} for row in rows(good["04_refined_dpo"]["input"])]
    path = write_rows(tmp_path / "in.jsonl", same)
    refused("04_refined_dpo", path, "no pair", output=tmp_path / "out_04", **good["04_refined_dpo"] | {"input": path})


# ---------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("stage", ["00_sft", "01_seed_dpo", "02_generate", "04_refined_dpo", "05_eval"])
def test_a_model_without_a_tokenizer_or_a_chat_template(good, world, tmp_path, stage):
    model = tmp_path / "model"
    shutil.copytree(good[stage]["model"], model)
    (model / "chat_template.jinja").unlink()
    options = good[stage] | {"model": model}
    refused(stage, model, "--chat-template", output=tmp_path / "out", **options)
    for path in model.glob("*token*"):
        path.unlink()
    refused(stage, model, "--tokenizer", output=tmp_path / "out", **options)
    # and the options that it names help
    (tmp_path / "template").write_text((world / "base" / "chat_template.jinja").read_text())
    run(stage, output=tmp_path / "out", tokenizer=world / "base", chat_template=tmp_path / "template", **options)


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_not_there(good, tmp_path, stage):
    for name in ("no_such_folder/at/all", "./here", tmp_path / "no"):
        refused(stage, name, output=tmp_path / "out", **good[stage] | {"model": name})
    (tmp_path / "empty").mkdir()
    refused(stage, tmp_path / "empty", output=tmp_path / "out", **good[stage] | {"model": tmp_path / "empty"})


def test_a_model_folder_without_weights_or_with_half_of_them(good, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(good["02_generate"]["model"], model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    refused("02_generate", model, output=tmp_path / "out", **good["02_generate"] | {"model": model})
    (model / "model.safetensors").unlink()
    refused("02_generate", model, output=tmp_path / "out", **good["02_generate"] | {"model": model})


@pytest.mark.parametrize("stage, option", [
    ("01_seed_dpo", "ref_model"), ("03_judge", "init_model"), ("04_refined_dpo", "ref_model")])
def test_two_models_of_different_vocabularies(good, world, tokenizer, tmp_path, stage, option):
    larger = save_tiny(tmp_path / "larger", tokenizer, vocab_size=len(tokenizer) + 64)
    refused(stage, larger, "vocabular", output=tmp_path / "out", **good[stage] | {option: larger})
    # as many tokens, in another order
    other = tmp_path / "other"
    shutil.copytree(good[stage]["model"], other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    refused(stage, other, output=tmp_path / "out", **good[stage] | {option: other})


@pytest.mark.parametrize("stage", ["00_sft", "01_seed_dpo", "02_generate", "04_refined_dpo", "05_eval"])
def test_a_tokenizer_with_more_words_than_the_model(good, tokenizer, tmp_path, stage):
    small = save_tiny(tmp_path / "small", tokenizer, vocab_size=100)
    refused(stage, small, f"{len(tokenizer)} words", "100", output=tmp_path / "out", **good[stage] | {"model": small})


@pytest.mark.parametrize("named", ["</s>", [1, "a"], {"a": 1}, -5, 10 ** 30, True, [[1]], 1.5])
def test_an_end_token_that_is_none(good, tmp_path, named):
    model = tmp_path / "model"
    shutil.copytree(good["02_generate"]["model"], model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    refused("02_generate", model, "end token", output=tmp_path / "out", **good["02_generate"] | {"model": model})


# ---------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_made_with_other_arguments_or_from_other_input(good, tmp_path, stage):
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    given = rows(good[stage]["input"])
    options = good[stage] | {"input": write_rows(path, given)}
    run(stage, output=output, **options)
    refused(stage, output, "--micro-batch-size", output=output, **options | {"micro_batch_size": 3})
    write_rows(path, given[:-1])
    refused(stage, output, "--input", output=output, **options)


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_made_with_the_same_arguments_is_left_alone(good, tmp_path, stage):
    output = run(stage, output=tmp_path / "out", **good[stage])
    before = stages.files(tmp_path)
    again = attempt(stage, output=output, **good[stage])
    assert again.status == 0 and again.err == "" and "already there" in again.out
    assert stages.files(tmp_path) == before


def test_an_output_of_another_stage_or_of_nobody(good, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    refused("01_seed_dpo", output, output=output, **good["01_seed_dpo"])
    (tmp_path / "file").write_text("precious")
    refused("02_generate", tmp_path / "file", output=tmp_path / "file", **good["02_generate"])
    made = run("00_sft", output=tmp_path / "pi", **good["00_sft"])
    refused("01_seed_dpo", made, output=made, **good["01_seed_dpo"])


def test_an_unfinished_output_made_with_other_arguments(good, tmp_path, monkeypatch):
    import common
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(common, "close_output", lambda *args: 1 / 0)
        run("00_sft", output=output, **good["00_sft"])
    refused("00_sft", "--lr", output=output, **good["00_sft"] | {"lr": 1.0})
    run("00_sft", output=output, **good["00_sft"])


def test_an_output_made_with_another_content_of_a_template(good, world, tmp_path):
    model, template, output = tmp_path / "model", tmp_path / "template", tmp_path / "out"
    shutil.copytree(good["02_generate"]["model"], model)
    shutil.copyfile(world / "base" / "chat_template.jinja", template)
    options = good["02_generate"] | {"model": model, "chat_template": template}
    run("02_generate", output=output, **options)
    for path, option in ((template, "--chat-template"), (model / "chat_template.jinja", "--model")):
        text = path.read_text()
        path.write_text(text + " ")
        refused("02_generate", f"another content of {option}", output=output, **options)
        path.write_text(text)
    assert attempt("02_generate", output=output, **options).status == 0


@pytest.mark.parametrize("name", ["", "."])
def test_an_output_without_a_name(good, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    ran = attempt("02_generate", output=name, **good["02_generate"])
    assert ran.status == 2 and ran.err.count("\n") == 1 and not list(tmp_path.iterdir()), ran


def test_an_output_that_cannot_be_written(good, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for stage in ("00_sft", "02_generate"):
        refused(stage, "file", output=tmp_path / "file" / "out", **good[stage])


# ---------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("stage, option, value", [
    ("01_seed_dpo", "beta", "-1"), ("01_seed_dpo", "beta", "nan"), ("01_seed_dpo", "lr", "big"), ("01_seed_dpo", "epochs", 0),
    ("01_seed_dpo", "batch_size", 0), ("01_seed_dpo", "micro_batch_size", 1.5), ("01_seed_dpo", "no_such_option", 1),
    ("02_generate", "samples", 1), ("02_generate", "temperature", -0.1), ("02_generate", "max_new_tokens", 0),
    ("02_generate", "cut", "off"), ("04_refined_dpo", "alpha", 1.5), ("04_refined_dpo", "k_percent", 101),
    ("04_refined_dpo", "lam", -1), ("04_refined_dpo", "window", 0), ("04_refined_dpo", "lr", "inf"),
    ("04_refined_dpo", "refine", "some"), ("00_sft", "save_every", 0)])
def test_an_option_out_of_its_range(good, tmp_path, stage, option, value):
    refused(stage, "--" + option.replace("_", "-"), output=tmp_path / "out", **good[stage] | {option: value})


@pytest.mark.parametrize("stage", ["00_inputs", *STAGES])
def test_an_option_that_is_needed(stage, tmp_path):
    assert attempt(stage, output=tmp_path / "out").status == 2
    assert attempt(stage, output=tmp_path / "out").err.count("\n") == 1


def test_gold_that_is_no_gold_judge(good, world, tmp_path):
    (tmp_path / "gold.json").write_text('{"lamp": ["a"]}')
    for path in (tmp_path / "gold.json", tmp_path / "no.json", world / "seed.jsonl"):
        refused("05_eval", path, output=tmp_path / "out", **good["05_eval"] | {"gold": path})
    refused("05_eval", tmp_path, "metrics.json", output=tmp_path / "report", report=[tmp_path])


def test_a_process_of_its_own_says_no_more_than_one_line(good, tmp_path):
    # as above, with whatever Python and its packages say at their start and end
    import subprocess
    import sys
    words = command_line(good["02_generate"] | {"input": tmp_path / "no.jsonl", "output": tmp_path / "out"})
    done = subprocess.run([sys.executable, stages.ROOT / "02_generate.py", *words], capture_output=True, text=True,
                          env=stages.NO_RANKS)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("02_generate.py: ") and "no.jsonl" in done.stderr
