"""alpaca-judge asks an OpenAI-compatible endpoint: nothing is lost or asked twice, and the key stays in memory."""

import json
import logging
import math
import os
import re
import time
from pathlib import Path

import huggingface_hub
import pytest

import stages
from chat_server import KEY, on_the_loopback, prefers_m, says, serving, top_logprobs
from extras import alpaca_eval
from support import runs

N = 12
TEMPLATE = "Who answered {instruction} better, m: {output_1} or M: {output_2} ?"


def write_outputs(path, generator, outputs):
    path.write_text(json.dumps([{"dataset": "d", "instruction": f"say {k}", "output": text, "generator": generator}
                                for k, text in enumerate(outputs)]))
    return path


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "judge.txt").write_text(TEMPLATE)
    return [write_outputs(tmp_path / "reference.json", "base", [f"base {k}" for k in range(N)]),
            write_outputs(tmp_path / "outputs.json", "ours", [f"ours {k}" for k in range(N)])]


def alpaca_judge(start, pair, **options):
    """Start alpaca-judge on a pair of files, the baseline's first, by stages.run, stages.refused or stages.attempt."""
    given = {"baseline": pair[0], "judge_template": Path(pair[0]).parent / "judge.txt", "judge_model": "judge-1"}
    return start("05_eval", "alpaca-judge", pair[1], **given | options)


def judge(server, pair, output, **options):
    """The annotations."""
    return json.loads(alpaca_judge(stages.run, pair, judge_url=server.url, output=output, **options).read_text())


def fails(server, pair, output, **options):
    """The one line."""
    return alpaca_judge(stages.refused, pair, output=output, **{"judge_url": server.url} | options)


def keys_sent(server):
    return {headers.get("Authorization", headers.get("authorization")) for headers in server.headers}


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def prefers_ours(request, before):
    """A judge without a position bias: p = 0.9 for "ours", wherever it is."""
    text = request["messages"][-1]["content"]
    return prefers_m(0.9 if text.index("ours") < text.index("base") else 0.1)


def test_annotations_in_the_official_format(tmp_path, pair):
    with serving(prefers_ours) as server:
        rows = judge(server, pair, tmp_path / "annotations.json")
        assert len(server.requests) == N
        judge(server, pair, tmp_path / "others.json", seed=1)
    for k, row in enumerate(rows):
        assert list((row | {"preference": None}).items()) == list({
            "dataset": "d", "instruction": f"say {k}", "output_1": f"base {k}", "generator_1": "base",
            "output_2": f"ours {k}", "generator_2": "ours", "annotator": "judge-1", "preference": None}.items())
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)  # in either order shown
    shown = [request["messages"][-1]["content"] for request in server.requests]
    assert {text.index("ours") < text.index("base") for text in shown[:N]} == {True, False}
    assert set(shown[:N]) != set(shown[N:])  # the order follows the seed
    assert server.requests[0] | {"model": "judge-1", "max_tokens": 1, "logprobs": True,
                                 "top_logprobs": 5} == server.requests[0]


def test_preference_of_the_most_likely_tokens():
    def logs(**p):
        return [(token, math.log(value)) for token, value in p.items()]
    assert alpaca_eval.preference_of(logs(m=0.6, M=0.2, other=0.2), False) == pytest.approx(2 - 0.75)
    assert alpaca_eval.preference_of(logs(m=0.6, M=0.2, other=0.2), True) == pytest.approx(1 + 0.75)
    for p in (logs(m=0.3, M=0.7), logs(m=0.5), logs(M=1.0)):
        assert alpaca_eval.preference_of(p, False) + alpaca_eval.preference_of(p, True) == pytest.approx(3)
    assert alpaca_eval.preference_of(logs(M=0.4, other=0.6), False) == 2  # one of them missing: the other is certain
    assert alpaca_eval.preference_of(logs(m=0.4, other=0.6), False) == 1
    assert alpaca_eval.preference_of(logs(other=1.0), False) is None
    # a space before the letter, as text or as tokenizers write it
    for raw in (logs(**{" m": 0.6, "M": 0.2}), logs(Ġm=0.6, ĠM=0.2), logs(**{"▁m": 0.3, "m": 0.3, "▁M": 0.2})):
        assert alpaca_eval.preference_of(raw, False) == pytest.approx(2 - 0.75)


def test_neither_token_is_a_missing_preference_and_identical_outputs_are_a_tie(tmp_path, pair):
    def respond(request, before):
        return top_logprobs(("Both", -0.1), ("Neither", -2.0)) if "say 3" in str(request) else prefers_m(0.9)
    write_outputs(pair[1], "ours", ["base 0"] + [f"ours {k}" for k in range(1, N)])
    with serving(respond) as server:
        rows = judge(server, pair, tmp_path / "a.json")
    assert len(server.requests) == N - 1  # an answer without m and M is one, so it is not asked again
    assert (rows[0]["preference"], rows[3]["preference"]) == (1.5, None)
    assert {round(row["preference"], 9) for row in rows[1:3] + rows[4:]} == {1.1, 1.9}


def no_letter(*tokens):
    return top_logprobs(*((token, -1.0 - k) for k, token in enumerate(tokens)))


NO_LETTERS = {"a thought": (no_letter("<think>", "Okay"), "<think>"), "ids": (no_letter("token_id:76"), "token_id:76"),
              "none": (says("m") | {"logprobs": {"content": [{"token": "m", "top_logprobs": []}]}}, "[]"),
              "null": (says("m") | {"logprobs": {"content": [{"token": "m", "top_logprobs": None}]}}, "[]")}


@pytest.mark.parametrize("tokens", NO_LETTERS)
def test_a_judge_whose_first_answers_hold_neither_letter_is_asked_a_few_times(tmp_path, pair, tokens):
    choice, named = NO_LETTERS[tokens]
    with serving(lambda request, before: choice) as server:
        for asked in (5, 10):  # nothing is recorded of it
            line = fails(server, pair, tmp_path / "a.json")
            assert named in line and "m and M" in line and len(server.requests) == asked
        server.respond = prefers_ours
        assert [row["preference"] for row in judge(server, pair, tmp_path / "a.json")] == pytest.approx([1.9] * N)
    write_outputs(pair[0], "base", ["base 0", "base 1"] + [f"ours {k}" for k in range(2, N)])  # two to ask about
    with serving(lambda request, before: choice) as server:
        assert named in fails(server, pair, tmp_path / "b.json") and len(server.requests) == 2


def test_answers_without_a_letter_before_and_after_the_first_with_one_are_kept(tmp_path, pair):
    def respond(request, before):
        return prefers_ours(request, before) if "say 4 " in str(request) else no_letter("Both")
    with serving(respond) as server:  # and of the run that resumes it, whose answers all are without one
        fails(server, pair, tmp_path / "a.json", max_requests=6)
        rows = judge(server, pair, tmp_path / "a.json")
    assert [k for k, row in enumerate(rows) if row["preference"] is not None] == [4] and len(server.requests) == N


def with_200(error):
    """As proxies and gateways send it."""
    return 200, json.dumps({"error": error}), {}


TROUBLE = {
    "overloaded": lambda: (503, "busy", {"Retry-After": KEY}),
    "deep": lambda: (200, "[" * 100_000, {}),
    "no choices": lambda: (200, '{"choices": []}', {}),
    "no log-probs": lambda: says("m"),
    "NaN for a log-prob": lambda: top_logprobs(("m", float("nan"))),
    "slow": lambda: 1.0,
    "a status in the body": lambda: with_200({"code": 429, "message": "too fast"}),
    "one as a string": lambda: with_200({"code": "503", "message": "busy"}),
    "no code": lambda: with_200({"message": "overloaded"}),
    "an error that is a string": lambda: with_200("overloaded"),
    "an error that is no error object": lambda: (200, '{"code": 429, "message": "too fast"}', {}),
    "a choice with an error": lambda: prefers_m(0.5) | {"error": {"code": 502, "message": "the provider is down"}},
    "a choice that is cut by an error": lambda: prefers_m(0.5) | {"finish_reason": "error"},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_may_pass_is_asked_again(tmp_path, pair, trouble):
    def respond(request, before):
        odd = int(request["messages"][-1]["content"].split("say ")[1].split()[0]) % 2
        return TROUBLE[trouble]() if odd and not before else prefers_ours(request, before)
    with serving(respond) as server:
        rows = judge(server, pair, tmp_path / "a.json", judge_timeout=0.4)
    assert [row["instruction"] for row in rows] == [f"say {k}" for k in range(N)]
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)
    assert len(server.requests) == N + N // 2


def test_retry_after_is_kept_to(tmp_path, pair):
    asked = []

    def respond(request, before):
        asked.append(time.monotonic())
        return prefers_ours(request, before) if before else (429, "", {"Retry-After": "0.5"})
    with serving(respond) as server:
        judge(server, pair, tmp_path / "a.json")
    assert len(asked) == 2 * N and asked[N] - asked[0] >= 0.5


@pytest.mark.parametrize("failure", [(500, "out of order", {}), with_200({"code": 429, "message": "out of order"}),
                                     with_200("out of order")])
def test_what_fails_is_named_and_only_that_is_asked_for_again(tmp_path, pair, failure):
    def respond(request, before):
        return failure if re.search("say [47] ", str(request)) else prefers_ours(request, before)
    with serving(respond) as server:
        error = fails(server, pair, tmp_path / "a.json", judge_retries=2)
        assert "2 of 12" in error and f"HTTP {failure[0]}" in error and "out of order" in error
        assert len(runs.read_journal(tmp_path / "a.json.partial", "judged")) == N - 2
        assert len(server.requests) == N - 2 + 2 * 3
        server.respond = prefers_ours
        server.requests.clear()
        rows = judge(server, pair, tmp_path / "a.json", judge_retries=0)
        assert len(server.requests) == 2
        assert judge(server, pair, tmp_path / "a.json") == rows and len(server.requests) == 2
    assert [row["instruction"] for row in rows] == [f"say {k}" for k in range(N)]
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)


def test_max_requests_of_a_run(tmp_path, pair):
    with serving(prefers_ours) as server:
        for asked in (5, 10):
            assert "--max-requests 5" in fails(server, pair, tmp_path / "a.json", max_requests=5)
            assert len(server.requests) == asked
        assert len(judge(server, pair, tmp_path / "a.json", max_requests=5)) == N
        assert len(server.requests) == N
    with serving(lambda request, before: (429, "", {"Retry-After": "0"})) as server:
        fails(server, pair, tmp_path / "b.json", max_requests=7, judge_retries=3)  # retries count
    assert len(server.requests) == 7


FILTERED = {"finish_reason": "content_filter", "logprobs": {"content": []}}
REFUSALS = {"HTTP 400": (400, '{"error": {"code": "content_filter"}}', {}), "HTTP 422": (422, "too long", {}),
            "400 in the body": with_200({"code": 400, "message": "flagged"}),
            "null content": says(None), "a content filter": says("") | FILTERED}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_is_refused_for_ever_is_missing_and_not_asked_for_again(tmp_path, pair, refusal):
    def respond(request, before):  # the first row is one of them
        return REFUSALS[refusal] if re.search("say [03] ", str(request)) else prefers_ours(request, before)
    with serving(respond) as server:
        fails(server, pair, tmp_path / "a.json", max_requests=6)
        ran = alpaca_judge(stages.attempt, pair, judge_url=server.url, output=tmp_path / "a.json")
    assert ran.status == 0 and "missing preferences 2" in ran.out and len(server.requests) == N
    found = [row["preference"] for row in json.loads((tmp_path / "a.json").read_text())]
    assert found == [None, *[pytest.approx(1.9)] * 2, None, *[pytest.approx(1.9)] * 8]


def test_a_run_of_which_only_a_row_without_an_answer_is_left_ends(tmp_path, pair):
    def respond(request, before):
        return (500, "busy", {}) if "say 4 " in str(request) else prefers_ours(request, before)
    with serving(respond) as server:
        fails(server, pair, tmp_path / "a.json", judge_retries=0)
        server.respond = lambda request, before: top_logprobs(("m", float("nan")))
        found = [row["preference"] for row in judge(server, pair, tmp_path / "a.json", judge_retries=2)]
    assert found == [*[pytest.approx(1.9)] * 4, None, *[pytest.approx(1.9)] * 7] and len(server.requests) == N + 3


FAULTS = {"a wrong key": (401, f"wrong key {KEY}", {}), "not allowed": (403, "", {}), "no such model": (404, "", {}),
          "a redirect": (307, "", {"Location": "/v1/chat/completions"}), "no log-probs": says("m"),
          "401 in the body": with_200({"code": 401, "message": f"wrong key {KEY}"})}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_all_requests_would_meet_stops_at_the_first(tmp_path, pair, fault):
    with serving(lambda request, before: FAULTS[fault]) as server:
        error = fails(server, pair, tmp_path / "a.json")
    assert "--judge-url" in error and KEY not in error and len(server.requests) == 1


@pytest.mark.parametrize("refused, requests", [("[13579]|11", N), (".+", 5)])  # six of twelve, all
def test_refusals_of_more_than_one_row_in_five_are_not_taken_for_missing_rows(tmp_path, pair, refused, requests):
    def respond(request, before):
        found = re.search(f"answered say ({refused}) better", str(request))
        return (400, "credit balance too low", {}) if found else prefers_ours(request, before)
    with serving(respond) as server:
        assert "credit balance too low" in fails(server, pair, tmp_path / "a.json")
        assert len(server.requests) == requests
        server.respond = prefers_ours
        assert [row["preference"] for row in judge(server, pair, tmp_path / "a.json")] == pytest.approx([1.9] * N)


def test_a_resumed_run_too_asks_an_endpoint_that_is_down_only_a_few_times(tmp_path, pair):
    def respond(request, before):
        return (500, "down", {}) if len(server.requests) > 4 else prefers_ours(request, before)
    with serving(respond) as server:
        once = dict(judge_requests=1, judge_retries=0)
        assert "8 of 12" in fails(server, pair, tmp_path / "a.json", **once) and len(server.requests) == N
        assert "8 of 12" in fails(server, pair, tmp_path / "a.json", **once) and len(server.requests) == N + 5


def test_a_key_that_is_a_word_is_not_hidden_in_answers(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "m")
    with serving(prefers_ours) as server:
        assert [row["preference"] for row in judge(server, pair, tmp_path / "a.json")] == pytest.approx([1.9] * N)


def test_max_completion_tokens_where_the_endpoint_asks_for_it(tmp_path, pair):
    def respond(request, before):
        unsupported = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return (400, unsupported, {}) if "max_tokens" in request else prefers_ours(request, before)
    with serving(respond) as server:
        rows = judge(server, pair, tmp_path / "a.json", judge_retries=0)
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N) and len(server.requests) == N + 1
    assert {request["max_completion_tokens"] for request in server.requests[1:]} == {1}


@pytest.mark.parametrize("url", ["/openai/deployments/gpt?api-version=2024-10-21",
                                 "/openai/deployments/gpt/chat/completions?api-version=2024-08-01-preview"])
def test_azure(tmp_path, pair, url, monkeypatch):
    with serving(prefers_ours) as server:
        options = {"judge_url": server.url.removesuffix("/v1") + url}
        monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)  # the client would print the header
        assert "HF_DEBUG" in fails(server, pair, tmp_path / "a.json", **options) and not server.requests
        monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", False)
        alpaca_judge(stages.run, pair, output=tmp_path / "a.json", **options)
    assert set(server.paths) == {"/openai/deployments/gpt/chat/completions?" + url.partition("?")[2]}
    headers = [{name.lower(): value for name, value in sent.items()} for sent in server.headers]
    assert len(headers) == N and all(sent["api-key"] == KEY and "authorization" not in sent for sent in headers)
    assert KEY.encode() not in everything_written(tmp_path)


def test_the_key_is_sent_and_never_written(tmp_path, pair, caplog):
    """Even where the server repeats it in its errors. (In its answers: test_mt_bench.py.)"""
    caplog.set_level(logging.DEBUG)

    def respond(request, before):
        return prefers_ours(request, before) if before else (500, json.dumps({"error": f"key {KEY} is tired"}), {})
    with serving(respond) as server:
        options = dict(judge_url=server.url, output=tmp_path / "a.json")
        failed = alpaca_judge(stages.attempt, pair, **options, judge_retries=0)
        ran = alpaca_judge(stages.attempt, pair, **options)
    assert failed.status == 2 and "tired" in failed.err and ran.status == 0
    assert keys_sent(server) == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_written(tmp_path)
    assert KEY not in failed.out + failed.err + ran.out + ran.err + caplog.text


def test_without_a_key_neither_the_hub_s_token_nor_that_of_netrc_is_sent(tmp_path, pair, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogin me\npassword of-another-service\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_send")
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(prefers_ours) as server:
        judge(server, pair, tmp_path / "a.json")
    assert keys_sent(server) == {"Bearer no-key"} and "hf_do_not_send" not in json.dumps(server.headers)


@pytest.mark.parametrize("key", ["sk-secret\nX-Evil: 1", "sk-secret\r\n\r\n", "sk-sécret", "sk secret",
                                 "sk-secret\x00"])
def test_a_key_that_is_not_a_key_is_refused_and_not_shown(tmp_path, pair, monkeypatch, key):
    # as the environment has it, so also where no system would take a NUL
    monkeypatch.setattr(os, "environ", os.environ | {"OPENAI_API_KEY": key})
    with serving(prefers_ours) as server:
        ran = alpaca_judge(stages.attempt, pair, judge_url=server.url, output=tmp_path / "a.json")
    if key.strip() == "sk-secret":  # only blanks around it
        assert ran.status == 0
    else:
        assert ran.status == 2 and "OPENAI_API_KEY" in ran.err and not server.requests
    assert "cret" not in ran.err + ran.out and b"cret" not in everything_written(tmp_path)


@pytest.mark.parametrize("version", ["", "?api-version=2024-10-21"])  # Azure's key is in a header of its own
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect_to_another_host(tmp_path, pair, status, version):
    with serving(prefers_ours) as other:
        with serving(lambda request, before: (status, "", {"Location": other.url + "/chat/completions"})) as server:
            fails(server, pair, tmp_path / "a.json", judge_url=server.url + version)
    assert server.requests and not other.requests


@pytest.mark.parametrize("url", [
    "http://me:KEY@host/v1", "https://host/v1?api_key=KEY", "https://host/v1?api-version=KEY",
    "https://host/v1?api-version=2024-10-21&api_key=KEY", "https://host/v1#KEY", "ftp://host/KEY", "KEY",
    "file:///etc/passwd", "https://host/v1 KEY", "http://KEY@host"])
def test_a_key_in_the_url_is_refused_and_not_shown(tmp_path, pair, url):
    error = alpaca_judge(stages.refused, pair, judge_url=url.replace("KEY", KEY), output=tmp_path / "a.json")
    assert "--judge-url" in error and KEY not in error and not list(tmp_path.glob("a.json*"))


def test_many_requests_at_once(tmp_path, pair):
    with serving(lambda request, before: 0.2) as server:
        judge(server, pair, tmp_path / "a.json", judge_requests=4)
    assert server.together == 4


def test_the_official_template(tmp_path, pair):
    """Its blocks become messages; braces in an output and text that looks like a placeholder stay as they are."""
    template = tmp_path / "template.txt"
    template.write_text('<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n{"i": """{instruction}"""}\n'
                        '{\n {"model": "m", "output": """{output_1}"""},\n {"model": "M", "output": """{output_2}"""}\n'
                        '}\n{other}<|im_end|>\n')
    write_outputs(pair[0], "base", ["base {output_2} <|im_end|> {x}"] * N)
    with serving(prefers_ours) as server:
        judge(server, pair, tmp_path / "a.json", judge_template=template)
    for request in server.requests:
        system, user = request["messages"]
        assert system == {"role": "system", "content": "Be fair."}
        assert user["role"] == "user" and user["content"].count("base {output_2} <|im_end|> {x}") == 1
        assert user["content"].startswith('{"i": """say ') and user["content"].count("ours") == 1
        assert user["content"].endswith("{other}")


BAD = {"another instruction": ("one", {}, "reference.json"), "the same twice": ("twice", {}, "row 1"),
       "no place": ("outputs.json", {"judge_template": "template"}, "{output_2}"),
       "no answer": ("outputs.json", {"judge_retries": 0}, "12 of 12")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, pair, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write_outputs(tmp_path / "one", "x", ["a"])
    (tmp_path / "twice").write_text(json.dumps(json.loads(one.read_text()) * 2))
    (tmp_path / "template").write_text("{instruction} {output_1}")
    ours, options, said = BAD[name]
    options = {"judge_url": "http://127.0.0.1:9/v1", "output": "a.json"} | options
    assert said in alpaca_judge(stages.refused, ["reference.json", ours], **options)
