"""What a user has to fix is one line on stderr that says where, exit status 2, and nothing is overwritten."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import common
import stages
from children import STAGES, at_end, fork, good, kill, no_child_outlives_its_test
from conftest import save_tiny
from support import runs
from stages import attempt, rows, run, write_rows

STAGES = STAGES[1:]
WITH_TOKENIZER = [stage for stage in STAGES if stage != "03_judge"]


def refused(stage, *words, output, **options):
    """The one line of a stage that must reject its input; it has the words in it."""
    error = stages.refused(*stage.split(), output=output, **options)
    assert all(str(word) in error for word in words), error
    return error


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_file(good, tmp_path, stage):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no.jsonl", tmp_path / "folder"):
        refused(stage, path, output=tmp_path / "out", **good[stage] | {"input": path})


NOT_OBJECTS = ["{'id': 1}", '{"id": 1', "no", "[1, 2]", "3", '"text"', "null", "[" * 100_000,
               *('{"id": 1, "prompt": "a", "more": %s}' % value for value in (  # what could not be written again
                   r'"half a surrogate pair \ud800"', "NaN", "-Infinity", "1e999", "[" * 900 + "]" * 900))]


@pytest.mark.parametrize("stage", ["00_inputs", "02_generate"])
@pytest.mark.parametrize("content, line", [
    (b"", ""), (b"\n\n", ""), (b"\xff\xfe\x00\x01", ""), (b'{"id": 1, "prompt": "\xff"}\n', ""),
    *((b'{"id": 0, "prompt": "a"}\n\n' + line.encode(), ":3") for line in NOT_OBJECTS)], ids=lambda value: value[-30:])
def test_a_file_that_is_empty_or_not_utf_8_or_a_line_that_is_not_an_object(good, tmp_path, stage, content, line):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    options = (dict(source=path, seed_size=1, prompt_sizes=[1], eval_size=0) if stage == "00_inputs" else
               good[stage] | {"input": path})
    refused(stage, f"{path}{line}", output=tmp_path / "out", **options)


@pytest.mark.parametrize("stage", ["02_generate", "03_judge"])
def test_a_bad_last_line_is_known_before_a_model_is_loaded(good, tmp_path, stage):
    lines = good[stage]["input"].read_text().splitlines()
    shutil.copytree(good[stage]["model"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "in.jsonl"
    for bad in ('{"id": 1', lines[1]):
        path.write_text("\n".join([*lines, bad]))
        refused(stage, f"{path}:{len(lines) + 1}: ", output=tmp_path / "out",
                **good[stage] | {"input": path, "model": tmp_path / "model"})


RESPONSE = {"text": "a", "ids": [7, 8], "finish": "eos"}
BAD_FIELDS = {
    "id": (None, "", 1.5, [1], True),
    "prompt": (None, "", "  ", 3, [], {}, ["hello"], [{"role": "user"}], [{"role": "user", "content": ""}],
               [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               [{"role": "robot", "content": "a"}]),
    "response": (None, "", " \n", 3, ["a"]),
    "chosen text": (None, "", 3, {"text": "a"}),
    "prompt_ids": (None, [], "12", [1.5], [-1], [True], [10 ** 6]),
    "chosen": (None, "a", {}, {**RESPONSE, "ids": []}, {**RESPONSE, "ids": ["a"]},
               {**RESPONSE, "finish": "stop"}, {**RESPONSE, "text": None}, {**RESPONSE, "ids": [10 ** 6]}),
    "responses": (None, [], [RESPONSE], [RESPONSE, {"text": "b"}], [RESPONSE, "b"]),
    "reference": (None, "", 3)}
FIELDS = {"00_sft": ("id", "prompt", "response"), "01_seed_dpo": ("id", "prompt", "chosen text", "rejected text"),
          "02_generate": ("id", "prompt"), "03_judge": ("id", "prompt", "prompt_ids", "responses"),
          "04_refined_dpo": ("id", "prompt_ids", "chosen", "rejected"), "05_eval sample": ("id", "prompt", "reference")}


@pytest.mark.parametrize("stage, field", [(stage, field) for stage in STAGES for field in FIELDS[stage]])
def test_a_missing_field_or_one_of_a_wrong_kind(good, tmp_path, stage, field):
    name, given, path = field.removesuffix(" text"), rows(good[stage]["input"]), tmp_path / "in.jsonl"
    missing = {key: value for key, value in given[1].items() if key != name}
    for bad in [missing, *({**given[1], name: value} for value in BAD_FIELDS[field.replace("rejected", "chosen")])]:
        write_rows(path, [given[0], bad])
        options = good[stage] | {"input": path} | ({"epochs": 3} if "batch_size" in good[stage] else {})
        error = refused(stage, path, output=tmp_path / "out", **options)
        # a token id that is too large is known after the model is loaded, and named by the row's id
        assert f"{path}:2: " in error and f'"{name}"' in error or f"id {given[1]['id']}: token id 1000000" in error


@pytest.mark.parametrize("stage", STAGES)
def test_a_duplicate_id(good, tmp_path, stage):
    given = rows(good[stage]["input"])
    given[0]["id"], given[2]["id"] = 7, "7"  # as a number and as a string
    path = write_rows(tmp_path / "in.jsonl", given)
    refused(stage, f"{path}:3", '"7"', f"{path}:1", output=tmp_path / "out", **good[stage] | {"input": path})


@pytest.mark.parametrize("stage, change, row_change, words", [
    *((stage, {"max_prompt_length": 1}, {}, ["--max-prompt-length", "in.jsonl"]) for stage in WITH_TOKENIZER),
    ("02_generate", {"on_length_limit": "drop", "max_new_tokens": 2}, {}, ["--max-new-tokens", "--on-length-limit"]),
    ("03_judge", {}, {"responses": [RESPONSE] * 2}, ["--temperature", "in.jsonl"]),
    ("04_refined_dpo", {}, {"chosen": RESPONSE, "rejected": RESPONSE}, ["in.jsonl"])])
def test_nothing_is_left_after_dropping(good, tmp_path, stage, change, row_change, words):
    path = write_rows(tmp_path / "in.jsonl", [row | row_change for row in rows(good[stage]["input"])])
    refused(stage, *words, output=tmp_path / "out", **good[stage] | change | {"input": path})


@pytest.mark.parametrize("stage", WITH_TOKENIZER)
def test_a_model_without_a_tokenizer_or_a_chat_template(good, world, tmp_path, stage):
    model = shutil.copytree(good[stage]["model"], tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    options = good[stage] | {"model": model}
    refused(stage, model, "--chat-template", output=tmp_path / "out", **options)
    for path in model.glob("*token*"):
        path.unlink()
    refused(stage, model, "--tokenizer", output=tmp_path / "out", **options)
    # and the options that it names help
    (tmp_path / "template").write_text((world / "base" / "chat_template.jinja").read_text())
    options |= {"tokenizer": world / "base", "chat_template": tmp_path / "template"}
    run(*stage.split(), output=tmp_path / "out", **options)


SECOND_MODELS = [("01_seed_dpo", "ref_model"), ("03_judge", "init_model"), ("04_refined_dpo", "ref_model")]


@pytest.mark.parametrize("stage, option", [*((stage, "model") for stage in STAGES), *SECOND_MODELS])
def test_a_model_that_is_not_there_or_in_part(good, tmp_path, stage, option):
    empty, half = tmp_path / "empty", shutil.copytree(good[stage]["model"], tmp_path / "half")
    empty.mkdir()
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:weights.stat().st_size // 2])
    for name in ("no_such_folder/at/all", "./here", tmp_path / "no", empty, half):
        refused(stage, name, output=tmp_path / "out", **good[stage] | {option: name})
    weights.unlink()
    refused(stage, half, output=tmp_path / "out_2", **good[stage] | {option: half})


@pytest.mark.parametrize("stage, option", SECOND_MODELS)
def test_two_models_of_different_vocabularies(good, tokenizer, tmp_path, stage, option):
    larger = save_tiny(tmp_path / "larger", tokenizer, vocab_size=len(tokenizer) + 64)
    # as many tokens, in another order
    other = shutil.copytree(good[stage]["model"], tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    for model in (larger, other):
        refused(stage, model, good[stage]["model"], output=tmp_path / "out", **good[stage] | {option: model})


@pytest.mark.parametrize("stage", WITH_TOKENIZER)
def test_a_tokenizer_with_more_tokens_than_the_model(good, tokenizer, tmp_path, stage):
    small = save_tiny(tmp_path / "small", tokenizer, vocab_size=100)
    refused(stage, small, f"({len(tokenizer)})", "(100)", output=tmp_path / "out", **good[stage] | {"model": small})


@pytest.mark.parametrize("named", ["</s>", [1, "a"], {"a": 1}, -5, 10 ** 30, True, [[1]], 1.5])
def test_an_eos_that_is_not_a_token_id(good, tmp_path, named):
    model = shutil.copytree(good["02_generate"]["model"], tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    refused("02_generate", model, "EOS", output=tmp_path / "out", **good["02_generate"] | {"model": model})


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_is_left_alone_and_refused_where_arguments_or_input_differ(good, tmp_path, stage):
    path, output, given = tmp_path / "in.jsonl", tmp_path / "out", rows(good[stage]["input"])
    options = good[stage] | {"input": write_rows(path, given)}
    run(*stage.split(), output=output, **options)
    before = stages.files(tmp_path)
    again = attempt(*stage.split(), output=output, **options)
    assert again.status == 0 and again.err == "" and again.out.startswith(f"{output}: ")
    assert stages.files(tmp_path) == before
    other = {"micro_batch_size": options["micro_batch_size"] + 1}  # changes rounding alone
    again = attempt(*stage.split(), output=output, **options | other)
    assert again.status == 0 and "--micro-batch-size" in again.out and stages.files(tmp_path) == before
    option = "beta" if stage == "03_judge" else "seed"
    refused(stage, output, f"--{option}", output=output, **options | {option: 7} | other)
    write_rows(path, given[:-1])
    refused(stage, output, "--input", output=output, **options)


def test_an_output_of_another_stage_or_of_nobody(good, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    for path in (folder / "mine.txt", file):
        path.write_text("precious")
    refused("01_seed_dpo", folder, output=folder, **good["01_seed_dpo"])
    refused("02_generate", file, output=file, **good["02_generate"])
    made = run("00_sft", output=tmp_path / "pi", **good["00_sft"])
    refused("01_seed_dpo", made, output=made, **good["01_seed_dpo"])


def test_an_unfinished_output_made_with_other_arguments(good, tmp_path):
    output, options = tmp_path / "out", good["00_sft"]
    fork("00_sft", options | {"output": output}, lambda: at_end(kill, output))()
    before = stages.files(tmp_path)
    refused("00_sft", tmp_path / "out.partial", "--lr", output=output, **options | {"lr": 1.0})
    assert stages.files(tmp_path) == before
    run("00_sft", output=output, **options)


def test_an_output_made_with_another_content_of_a_template(good, world, tmp_path):
    model = shutil.copytree(good["02_generate"]["model"], tmp_path / "model")
    template = shutil.copy(world / "base" / "chat_template.jinja", tmp_path / "template")
    options = good["02_generate"] | {"model": model, "chat_template": template, "output": tmp_path / "out"}
    run("02_generate", **options)
    for path, option in ((template, "--chat-template"), (model / "chat_template.jinja", "--model")):
        text = path.read_text()
        path.write_text(text + " ")
        refused("02_generate", option, **options)
        path.write_text(text)
    assert attempt("02_generate", **options).status == 0


@pytest.mark.parametrize("name", ["", ".", "file/out"])
def test_an_output_without_a_name_or_that_cannot_be_written(good, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    for stage in ("00_sft", "02_generate"):
        refused(stage, name, output=name, **good[stage])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("stage, option, value", [
    ("01_seed_dpo", "beta", "-1"), ("01_seed_dpo", "beta", "nan"), ("01_seed_dpo", "lr", "big"),
    ("01_seed_dpo", "epochs", 0), ("01_seed_dpo", "batch_size", 0), ("01_seed_dpo", "micro_batch_size", 1.5),
    ("01_seed_dpo", "no_such_option", 1), ("02_generate", "samples", 1), ("02_generate", "temperature", -0.1),
    ("02_generate", "max_new_tokens", 0), ("02_generate", "on_length_limit", "off"), ("04_refined_dpo", "alpha", 1.5),
    ("04_refined_dpo", "k_percent", 101), ("04_refined_dpo", "lam", -1), ("04_refined_dpo", "window", 0),
    ("04_refined_dpo", "lr", "inf"), ("04_refined_dpo", "refine", "some"), ("00_sft", "save_every", 0)])
def test_an_option_out_of_its_range(good, tmp_path, stage, option, value):
    refused(stage, "--" + option.replace("_", "-"), output=tmp_path / "out", **good[stage] | {option: value})


@pytest.mark.parametrize("stage", ["00_inputs", "05_eval", *STAGES])
def test_an_option_that_is_needed(stage, tmp_path):
    refused(stage, output=tmp_path / "out")


def test_gold_that_is_not_a_gold_judge_and_a_folder_without_metrics(good, world, tmp_path):
    (tmp_path / "gold.json").write_text('{"lamp": ["a"]}')
    for path in (tmp_path / "gold.json", tmp_path / "no.json", world / "seed.jsonl"):
        refused("05_eval sample", path, output=tmp_path / "out", **good["05_eval sample"] | {"gold": path})
    refused(f"05_eval report {tmp_path}", tmp_path / "metrics.json", output=tmp_path / "report")


def test_a_process_of_its_own_prints_one_line_in_which_what_cannot_be_encoded_is_escaped(good, tmp_path):
    options = good["00_inputs"] | {"output": tmp_path / "ö"}
    for more, status, line in (({}, 0, f"{tmp_path}/\\xf6: "), ({"seed_size": 5}, 2, "00_inputs.py: ")):
        words = stages.command_line(options | more)
        done = subprocess.run([sys.executable, stages.ROOT / "00_inputs.py", *words], capture_output=True, text=True,
                              env=stages.NO_RANKS | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        assert (done.returncode, (done.stdout + done.stderr).count("\n")) == (status, 1)
        assert (done.stderr if status else done.stdout).startswith(line)
    assert (tmp_path / "ö" / "seed.jsonl").exists()


@pytest.mark.parametrize("environment", [{"RANK": ""}, dict.fromkeys(stages.AS_TORCHRUN, ""), {"RANK": "1"},
                                         {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3", "LOCAL_RANK": "3"}])
def test_a_process_that_torchrun_did_not_start_is_alone(good, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = attempt("00_inputs", **good["00_inputs"], output=tmp_path / "out")
    assert ran.status == 0 and ran.out.startswith(f"{tmp_path / 'out'}: ")
    assert common.start_ranks() == common.Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("environment", [
    {"RANK": None}, {"RANK": ""}, {"RANK": "first"}, {"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"},
    {"WORLD_SIZE": "0"}, {"LOCAL_RANK": None}, {"MASTER_ADDR": ""}, {"MASTER_ADDR": None}, {"MASTER_PORT": None},
    dict.fromkeys(["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])])
@pytest.mark.parametrize("stage", ["00_inputs", "02_generate"])
def test_half_of_what_torchrun_sets_is_refused(good, tmp_path, monkeypatch, stage, environment):
    stages.as_torchrun(monkeypatch, **environment)
    refused(stage, "torchrun", *environment, output=tmp_path / "out", **good[stage])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage, options", [
    ("00_inputs", dict(source="world")), ("05_eval report x", {}),
    ("extras/generate_at_url", dict(model="m", input="i", url="http://host/v1"))])
def test_what_runs_in_one_process_refuses_torchrun(tmp_path, monkeypatch, stage, options):
    stages.as_torchrun(monkeypatch)
    refused(stage, "without torchrun", output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environment", [{"LOCAL_WORLD_SIZE": "4"}, {"LOCAL_RANK": "2", "RANK": "2"}])
def test_more_processes_than_gpus(monkeypatch, environment):
    stages.as_torchrun(monkeypatch, WORLD_SIZE="4", **environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(runs.InputError, match="2 GPUs"):
        common.start_ranks()
