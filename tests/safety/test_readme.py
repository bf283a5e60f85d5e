"""The pages: every command is one that the project takes, every link leads somewhere, numbers are their source's."""

import re
import shlex
import sys

import pytest

import hours
from stages import ROOT, load, parsed
from test_run_all import bash

PAGES = ["README.md", "extras/README.md", "benchmarks/README.md"]
COMMAND = re.compile(r"""(?:[A-Z_]+=(?:"[^"]*"|\S+) +)*(?:bash run_all\.sh|python [a-z0-9/_]+\.py)\b""")


def commands(page):
    """Yields ({variable: value}, words) of each command: of the indented lines, joined at a backslash, and of code."""
    text = re.sub(r"```.*?```|\\\n *", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall("`([^`]+)`", text)
    for words in (shlex.split(line, comments=True) for line in lines if COMMAND.match(" ".join(line.split()))):
        variables = [word for word in words if re.match("[A-Z_]+=", word)]
        yield dict(word.split("=", 1) for word in variables), words[len(variables):]


ALL = [(page, variables, words) for page in PAGES for variables, words in commands(page)]
OF_RUN_ALL = [(page, variables, words[2:]) for page, variables, words in ALL if words[0] == "bash"]
OF_PYTHON = [(page, words[1:]) for page, _, words in ALL if words[0] == "python"]


def test_the_pages_have_commands():
    assert len(OF_RUN_ALL) > 15 and len(OF_PYTHON) > 25


@pytest.mark.parametrize("page, variables, words", OF_RUN_ALL)
def test_run_all_takes_it(page, variables, words, tmp_path):
    (tmp_path / "path/to/model").mkdir(parents=True)
    (tmp_path / "my.jsonl").touch()
    if words[:1] == ["test"]:
        tested = bash(*words, **variables | {"PYTHON": "/bin/echo"})
        assert tested.stdout.split()[:3] == ["-m", "pytest", "tests"]
    else:
        words = [word for word in words if word != "--dry-run"] + ["--dry-run"]
        done = bash(*words, cwd=tmp_path, **variables | {"PYTHON": sys.executable})
        assert done.returncode == 0 and "02_generate.py" in done.stdout, done.stderr


@pytest.mark.parametrize("page, words", OF_PYTHON)
def test_the_script_has_its_options(page, words):
    script, *rest = words
    source = (ROOT / script).read_text(encoding="utf-8")
    if re.match(r"0\d_|extras/generate", script):
        assert parsed(script.removesuffix(".py"), rest)
    else:
        assert all(f'"{word}"' in source for word in rest if word.startswith("--")), (script, rest)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        headings = re.findall("^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}


def test_the_pair_by_hand_is_that_of_the_plain_page():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("## One pair by hand")[1].split("![")[0]
    numbers = re.findall(r"\d\.\d{3}", section)
    assert len(numbers) > 10 and set(numbers) <= set(re.findall(r"\d\.\d{3}", load("extras/plain_spa").__doc__))


def test_computed_hours(capsys):
    """On four cards of 1 FLOP/s and a byte/s each: 10,000 x 800 tokens of 7.24e9 weights, 4 and 10 operations a weight.

    A step of 64 answers reads 2 x 7.24e9 bytes and 64 x 350 tokens of 2 x 32 x 2,048 bytes; there are 78.125 x 300."""
    seconds = [part * 3600 for part in hours.hours(4, 1, 1)]
    work = 10_000 * 800 * 7.24e9 / (4 * 0.4)
    assert seconds == pytest.approx([78.125 * 300 * (2 * 7.24e9 + 64 * 350 * 2 * 32 * 2048), 4 * work, 10 * work])
    hours.main()
    assert capsys.readouterr().out in (ROOT / "extras/README.md").read_text(encoding="utf-8")
