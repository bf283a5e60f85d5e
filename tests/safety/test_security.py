"""No model, file or name gets in: none of their code runs, none of their paths is written. And what the code may do:
what it imports, reads and writes, and what it runs with when it is copied."""

import ast
import builtins
import json
import pickle
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

import stages
from children import content, good, succeeded, whole
from stages import ROOT, attempt, refused, write_rows

SCRIPTS = sorted(path for folder in ("", "support", "extras", "benchmarks") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_code_runs_and_unpickles_nothing_that_it_reads(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {name.name.split(".")[0] for name in node.names} | {getattr(node, "module", None) or ""}
            assert not names & {"pickle", "marshal", "shelve", "joblib", "dill", "yaml"}
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        assert options.get("shell", "False") == "False" and "allow_pickle" not in options
        if called == "torch.load":
            assert options["weights_only"] == "True"
        if called == "loader.from_pretrained" or called.startswith("Auto") and called.endswith(".from_pretrained"):
            assert options["trust_remote_code"] == "False"
        if called.endswith("from_pretrained") and "Model" in ast.unparse(node):
            assert options["use_safetensors"] == "True"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "somebody_was_here"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile(folder, model, marker, model_type):
    """A model that brings code of its own for everything."""
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    autos = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    own = {"auto_map": dict.fromkeys(autos, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    own |= {"tokenizer_class": "Evil"} if model_type == "evil" else {}
    for name, more in (("config.json", {"model_type": model_type}), ("tokenizer_config.json", {})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own | more))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_a_model_s_own_code_does_not_run(good, pi_init, tmp_path, marker, monkeypatch, model_type):
    """Even of a user who says yes where transformers asks whether it may. (That it is never let: above.)"""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    model = hostile(tmp_path / "model", pi_init, marker, model_type)
    ran = attempt("02_generate", output=tmp_path / "out", **good["02_generate"] | {"model": model})
    assert succeeded(ran) == (model_type == "llama")  # of a known kind, it is loaded by transformers' own code
    assert not marker.exists()


def test_pickled_weights_are_not_loaded(world, pi_init, tmp_path, marker):
    model = shutil.copytree(pi_init, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with open(model / "pytorch_model.bin", "wb") as file:
        pickle.dump(Touch(marker), file)
    assert str(model) in refused("02_generate", model=model, input=world / "prompts_1.jsonl", output=tmp_path / "out")
    assert not marker.exists()


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "changes its input": "{{ messages.clear() }}",
    "long loop": "{% for i in range(10 ** 9) %}{% endfor %}",
    "refuses": "{{ raise_exception('no\nnever\u2028' * 100) }}",
    "nothing": "{% set x = 1 %}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_refused_in_one_line(good, tmp_path, marker, name):
    template = tmp_path / "template"
    template.write_text(TEMPLATES[name].replace("MARKER", str(marker)))
    refused("02_generate", output=tmp_path / "out", **good["02_generate"], chat_template=template)
    assert not marker.exists()


NAMES = ["../../x", "/x", "a/b/c", "..", ".", "/", "~", "x" * 5000, "a\nb\rc", "\x1b[2J", "😀 \u202e", "-x",
         "$(touch x)", "a;b|c", "x.jsonl"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_makes_no_path_outside_of_the_output(pi_init, tmp_path, name):
    home = tmp_path / "deep" / "er" / "home"
    home.mkdir(parents=True)
    question = {"question_id": "../../q", "category": "../c", "turns": ["a", "b"]}
    questions = write_rows(home / "question.jsonl", [question])
    before = stages.files(tmp_path)
    ran = attempt("05_eval", "mt-sample", model=pi_init, questions=questions, max_new_tokens=2, output=home / "bench",
                  **{f"name={name}": True})
    new = {path for path, file in stages.files(tmp_path).items() if file and path not in before}
    assert all(path.startswith(str(home / "bench" / "model_answer") + "/") for path in new), new
    assert bool(new) == succeeded(ran)


def test_an_option_that_is_not_text_is_refused(tmp_path):
    for word in ("a\0b", "caf\udce9"):
        for option in ("source", "output", "seed_size"):
            refused("00_inputs", **{"source": "world", "output": tmp_path / "out", option: word})


def test_what_a_message_quotes_cannot_write_on_the_terminal(pi_init, tmp_path):
    given = write_rows(tmp_path / "in", [{"id": "a\nb\x1b[2J\u2028\u202e", "prompt": "x"}] * 2)
    assert r'"a\nb\x1b[2J\u2028\u202e"' in refused("02_generate", model=pi_init, input=given, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["out.partial", "out"])
def test_a_symlink_in_the_place_of_the_output_is_not_written_through(world, pi_init, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    if name == "out.partial":
        elsewhere.mkdir()
    (tmp_path / name).symlink_to(elsewhere)
    error = refused("02_generate", model=pi_init, input=world / "prompts_1.jsonl", output=tmp_path / "out")
    assert f"{tmp_path / name}: " in error and not list(elsewhere.rglob("*")) and elsewhere.exists() == (name != "out")


PAGE = {path.stem: path for folder in ("", "support", "extras") for path in (ROOT / folder).glob("[!_]*.py")}


@pytest.mark.parametrize("stage", ["01_seed_dpo", "02_generate", "03_judge", "04_refined_dpo"])
def test_a_copied_stage_makes_the_same(good, whole, tmp_path, stage):
    for name in (stage, "common"):
        shutil.copy(PAGE[name], tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    output = tmp_path / "made" / "out"
    done = subprocess.run([sys.executable, f"{stage}.py", *stages.command_line(good[stage] | {"output": output})],
                          cwd=tmp_path, env=stages.NO_RANKS, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert content(output) == whole(stage)


@pytest.mark.parametrize("script", ["generate_at_url", "plain_spa", "worst_case_dpo"])
def test_a_script_of_extras_starts_in_any_folder(tmp_path, script):
    done = subprocess.run([sys.executable, PAGE[script], "--help"], cwd=tmp_path, env=stages.NO_RANKS,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_text_is_read_and_written_in_utf_8_whatever_the_locale():
    for path in PAGE.values():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if (re.fullmatch(r"(?!runs\.).*\.(read|write)_text", name)
                    or name == "open" and "b" not in ast.unparse(call.args[1:2])):
                assert "encoding" in [word.arg for word in call.keywords], f"{path}:{call.lineno}"


def imports(path):
    """{module of this project that a file imports: the names that it takes from it}"""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2]: {"*"} for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("support", "extras"):
            found |= {alias.name: {"*"} for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module.rpartition(".")[2], set()).update(alias.name for alias in node.names)
    return {name: names for name, names in found.items() if name in PAGE}


def test_imports_go_one_way_and_common_knows_little_of_runs():
    imported = {name: imports(path) for name, path in PAGE.items()}
    assert imported["runs"] == {} and imported["common"].keys() == {"runs"}
    assert "*" not in imported["common"]["runs"] and len(imported["common"]["runs"]) <= 5
    assert imported["model_checks"].keys() == {"common", "runs"}
    assert imported["models"].keys() == {"common", "model_checks", "runs"}
    assert imported["chat"].keys() == {"models", "runs"} and imported["records"].keys() == {"runs"}
    assert imported["data"].keys() == {"chat", "records", "runs"}

    TopologicalSorter(imported).prepare()  # raises CycleError
    for path in PAGE.values():  # the name of a stage begins with a digit: only these could import one
        assert not re.search(r"import_module|runpy|__import__|spec_from", path.read_text()), path
