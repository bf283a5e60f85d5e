"""No model, file, name or server gets in: none of their code runs, none of their paths is written, no key is shown."""

import ast
import builtins
import json
import os
import pickle
import shutil
import signal

import huggingface_hub
import pytest
import torch

import stages
from chat_server import KEY, prefers_m, says, serving, top_logprobs
from children import at_end, fork, kill, no_child_outlives_its_test, succeeded
from stages import attempt, refused, write_rows

SCRIPTS = sorted(path for folder in ("", "extras", "benchmarks") for path in (stages.ROOT / folder).glob("*.py"))


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


# ---------------------------------------------------------------------------------------------
# Models


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
@pytest.mark.parametrize("stage, option", [("00_sft", "model"), ("02_generate", "model"), ("03_judge", "init_model"),
                                           ("03_judge", "reward_model")])
def test_a_model_s_own_code_does_not_run(world, pi_init, tmp_path, marker, monkeypatch, stage, option, model_type):
    """Even of a user who says yes where transformers asks whether it may."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    model = hostile(tmp_path / "model", pi_init, marker, model_type)
    answer = {"text": "a", "ids": [7, 0], "finish": "eos"}
    responses = write_rows(tmp_path / "responses", [{"id": 1, "prompt": "a", "prompt_ids": [5, 6],
                                                     "responses": [answer, answer | {"ids": [8, 0]}]}])
    options = {"00_sft": dict(input=world / "sft.jsonl", epochs=1), "03_judge": dict(input=responses),
               "02_generate": dict(input=world / "prompts_1.jsonl", max_new_tokens=2)}[stage]
    options |= {"judge": "reward"} if option == "reward_model" else {"model": pi_init} if option == "init_model" else {}
    ran = attempt(stage, output=tmp_path / "out", **options | {option: model})
    assert not succeeded(ran) or model_type == "llama"  # of a known kind, it is loaded by transformers' own code
    assert not marker.exists()


def test_pickled_weights_are_not_loaded(world, pi_init, tmp_path, marker):
    model = shutil.copytree(pi_init, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with open(model / "pytorch_model.bin", "wb") as file:
        pickle.dump(Touch(marker), file)
    assert str(model) in refused("02_generate", model=model, input=world / "prompts_1.jsonl", output=tmp_path / "out")
    assert not marker.exists()


def test_a_pickle_in_the_place_of_a_saved_state_does_not_run(world, pi_init, tmp_path, marker):
    options = dict(model=pi_init, input=world / "sft.jsonl", epochs=2, output=tmp_path / "out")
    assert fork("00_sft", options, lambda: at_end(kill, tmp_path / "out"))().status == -signal.SIGKILL
    state = tmp_path / "out.partial" / "state-1.pt"
    torch.save({"step": Touch(marker)}, state)
    ran = attempt("00_sft", **options)
    assert ran.status == 0 and f"{state}: " in ran.out
    assert not marker.exists()
    torch.save({"step": Touch(marker)}, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert marker.exists()  # so it would have been run


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__()[0]('MARKER') }}",
    "function": "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "method": "{{ messages.append.__self__.__class__.__base__.__subclasses__() | length }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "changes its input": "{{ messages.clear() }}",
    "long loop": "{% for i in range(10 ** 9) %}{% endfor %}",
    "refuses": "{{ raise_exception('no\nnever\u2028' * 100) }}",
    "not a template": "{% if %}{{",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nothing": "{% set x = 1 %}"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("stage, file", [("00_sft", "sft"), ("02_generate", "prompts_1")])
def test_a_hostile_chat_template_is_refused_in_one_line(world, pi_init, tmp_path, marker, stage, file, name):
    template = tmp_path / "template"
    template.write_text(TEMPLATES[name].replace("MARKER", str(marker)))
    refused(stage, model=pi_init, input=world / f"{file}.jsonl", chat_template=template, output=tmp_path / "out")
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------
# Names


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
    new = {path for path in stages.files(tmp_path) if path not in before}
    assert all(path.startswith(str(home / "bench" / "model_answer") + "/") for path in new), new
    assert bool(new) == succeeded(ran)


def test_an_id_is_not_a_path(pi_init, tmp_path):
    rows = [{"id": name, "prompt": "hello"} for name in NAMES if len(name) < 1000]
    given = write_rows(tmp_path / "prompts", rows)
    output = stages.run("02_generate", model=pi_init, input=given, max_new_tokens=2, output=tmp_path / "out")
    assert [row["id"] for row in stages.rows(output)] == [row["id"] for row in rows]
    assert {path.name for path in tmp_path.iterdir()} == {"prompts", "out", "out.args.json"}


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


# ---------------------------------------------------------------------------------------------
# The judge's endpoint


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Have outputs judged at a URL -> the Ran. The key is neither printed nor written."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("base", "ours"):
        rows = [{"instruction": f"say {k}", "output": f"{name} {k}"} for k in range(3)]
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "template").write_text("{instruction} {output_1} {output_2}")

    def judge(url):
        ran = attempt("05_eval", "alpaca-judge", tmp_path / "ours", baseline=tmp_path / "base", judge_url=url,
                      judge_model="j", judge_template=tmp_path / "template", judge_retries=0, output=tmp_path / "out")
        assert (tmp_path / "out").exists() == succeeded(ran)
        assert KEY not in ran.err + ran.out
        assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        return ran
    return judge


@pytest.mark.parametrize("key", ["sk-secret\nX-Evil: 1", "sk-secret\r\n\r\n", "sk-sécret", "sk secret",
                                 "sk-secret\x00"])
def test_a_key_that_is_not_a_key_is_refused_and_not_shown(ask, monkeypatch, key):
    # as the environment has it, so also where no system would take a NUL
    monkeypatch.setattr(os, "environ", os.environ | {"OPENAI_API_KEY": key})
    with serving(lambda request, before: prefers_m(0.5)) as server:
        ran = ask(server.url)
    if key.strip() == "sk-secret":  # only blanks around it
        assert ran.status == 0
    else:
        assert ran.status == 2 and "OPENAI_API_KEY" in ran.err and not server.requests
    assert "cret" not in ran.err + ran.out


@pytest.mark.parametrize("version", ["", "?api-version=2024-10-21"])  # Azure's key is in a header of its own
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect_to_another_host(ask, status, version):
    with serving(lambda request, before: prefers_m(0.5)) as other:
        with serving(lambda request, before: (status, "", {"Location": other.url + "/chat/completions"})) as server:
            ask(server.url + version)
    assert server.requests and KEY not in json.dumps(other.headers)


def test_netrc_does_not_replace_the_key(tmp_path, ask, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogin me\npassword of-another-service\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(lambda request, before: prefers_m(0.5)) as server:
        assert ask(server.url).status == 0
    sent = {headers.get("Authorization", headers.get("authorization")) for headers in server.headers}
    assert sent == {f"Bearer {KEY}"}


@pytest.mark.parametrize("url", [
    "http://me:KEY@host/v1", "https://host/v1?api_key=KEY", "https://host/v1?api-version=KEY",
    "https://host/v1?api-version=2024-10-21&api_key=KEY", "https://host/v1#KEY", "ftp://host/KEY", "KEY",
    "file:///etc/passwd", "https://host/v1 KEY", "http://KEY@host"])
def test_a_key_in_the_url_is_refused_and_not_shown(tmp_path, ask, url):
    ran = ask(url.replace("KEY", KEY))
    assert ran.status == 2 and "--judge-url" in ran.err and not list(tmp_path.glob("out*"))


ANSWERS = {"a log-prob that is NaN": top_logprobs(("m", float("nan"))),
           "one that is infinite": top_logprobs(("m", float("inf"))),
           "one too large": top_logprobs(("m", 1e4)), "a string as one": top_logprobs(("m", "high")),
           "a list as choice": (200, '{"choices": [[]]}', {}), "numbers": (200, '{"choices": 3}', {}),
           "deep": (200, "[" * 100_000, {}), "text": says("m"),
           "the key in an error": (500, f'{{"error": "{KEY}"}}', {}),
           "the key in HTML": (502, f"<b>{KEY}</b>\n<p>", {}), "the key in a header": (429, KEY, {"Retry-After": KEY}),
           "a redirect to itself": (307, "", {"Location": "/v1/chat/completions"}),
           "a redirect to a file": (307, "", {"Location": "file:///etc/passwd"})}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_endpoint_gets_one_line(ask, name):
    with serving(lambda request, before: ANSWERS[name]) as server:
        ran = ask(server.url)
    assert ran.status == 2 and "3 of 3" in ran.err


def test_a_rating_is_a_number_and_read_without_delay():
    from extras.mt_bench import read_rating
    assert [read_rating(text) for text in ("x [[8.5]] [[3]]", "Rating: [7]", "[[7.]]")] == [8.5, 7, 7]
    for text in ("[[" + "1" * 400 + "]]", "[[" + "1" * 200_000, "[" * 200_000, "[[1" * 50_000, "none"):
        assert read_rating(text) == -1


def test_a_judgment_that_cannot_be_written_is_not_an_answer(tmp_path, ask):
    questions = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "category": "writing", "turns": ["a", "b"]}])
    answers = write_rows(tmp_path / "m.jsonl", [{"question_id": 1, "choices": [{"index": 0, "turns": ["a", "b"]}]}])
    prompts = write_rows(tmp_path / "p.jsonl", [
        {"name": f"single-v1{turn}", "system_prompt": "s", "prompt_template": "{answer_1}"}
        for turn in ("", "-multi-turn")])
    half = r'{"choices": [{"message": {"content": "\ud800 [[7]]"}}]}'  # of a surrogate pair
    with serving(lambda request, before: (200, half, {})) as server:
        ran = attempt("05_eval", "mt-judge", answers, questions=questions, judge_prompts=prompts,
                      reference_answers=answers, judge_url=server.url, judge_model="j", judge_retries=0,
                      output=tmp_path / "bench")
    assert ran.status == 2 and "2 of 2" in ran.err and ran.err.count("\n") == 1, ran
