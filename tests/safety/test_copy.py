"""A stage is copied with common.py and support/."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

import stages
from children import content, good, whole
from stages import ROOT

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
    assert imported["models"].keys() == {"common", "checkpoints", "runs"} and imported["checkpoints"].keys() == {"runs"}
    assert imported["chat"].keys() == {"models", "runs"}

    def below(name, *above):
        assert name not in above, (*above, name)
        for other in imported[name]:
            below(other, *above, name)

    for name, path in PAGE.items():
        below(name)
        # the name of a stage begins with a digit: only these could import one
        assert not re.search(r"import_module|runpy|__import__|spec_from", path.read_text()), path
