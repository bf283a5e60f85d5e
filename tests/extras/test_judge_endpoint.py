"""alpaca-judge asks an OpenAI-compatible endpoint: nothing is lost or asked twice, and the key stays in memory."""

import json
import logging
import os
import re
import time

import pytest

import stages
from chat_server import KEY, on_the_loopback, prefers_m, says, serving, top_logprobs
from extras import alpaca_eval
from support import runs

N = 12
TEMPLATE = "Who answered {instruction} better, m: {output_1} or M: {output_2} ?"
JUDGED = pytest.approx([1.9] * N)  # what prefers_ours makes of the pairs


def write_outputs(path, generator, outputs):
    path.write_text(json.dumps([{"dataset": "d", "instruction": f"say {k}", "output": text, "generator": generator}
                                for k, text in enumerate(outputs)]))
    return path


@pytest.fixture
def outputs(tmp_path):
    write_outputs(tmp_path / "reference.json", "base", [f"base {k}" for k in range(N)])
    (tmp_path / "judge.txt").write_text(TEMPLATE)
    return write_outputs(tmp_path / "outputs.json", "ours", [f"ours {k}" for k in range(N)])


@pytest.fixture
def alpaca_judge(tmp_path, outputs):
    """Starts alpaca-judge on a pair of files by stages.run, stages.refused or stages.attempt."""
    given = {"baseline": tmp_path / "reference.json", "judge_template": tmp_path / "judge.txt",
             "judge_model": "judge-1", "output": tmp_path / "a.json"}
    return lambda start, server, **options: start(
        "05_eval", "alpaca-judge", options.pop("outputs", outputs),
        **given | {"judge_url": getattr(server, "url", server)} | options)


@pytest.fixture
def judge(alpaca_judge):
    """The annotations."""
    return lambda server, **options: json.loads(alpaca_judge(stages.run, server, **options).read_text())


@pytest.fixture
def preferences(judge):
    return lambda server, **options: [row["preference"] for row in judge(server, **options)]


@pytest.fixture
def fails(alpaca_judge):
    """The one line."""
    return lambda server, **options: alpaca_judge(stages.refused, server, **options)


def prefers_ours(request, before):
    """A judge without a position bias: p = 0.9 for "ours", wherever it is."""
    text = request["messages"][-1]["content"]
    return prefers_m(0.9 if text.index("ours") < text.index("base") else 0.1)


def ours_but(rows, choice, times=1000):
    """Of the rows that match, this is answered so many times."""
    return lambda request, before: choice if before < times and re.search(
        f"answered say ({rows}) better", request["messages"][-1]["content"]) else prefers_ours(request, before)


def judged_but(k):
    """Preferences of which that of row k is missing."""
    return [None if row == k else pytest.approx(1.9) for row in range(N)]


def keys_sent(server):
    return {headers.get("Authorization", headers.get("authorization")) for headers in server.headers}


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_annotations_in_the_official_format(tmp_path, judge):
    with serving(prefers_ours) as server:
        rows = judge(server)
        assert len(server.requests) == N
        judge(server, seed=1, output=tmp_path / "others.json")
    for k, row in enumerate(rows):
        assert list((row | {"preference": None}).items()) == list({
            "dataset": "d", "instruction": f"say {k}", "output_1": f"base {k}", "generator_1": "base",
            "output_2": f"ours {k}", "generator_2": "ours", "annotator": "judge-1", "preference": None}.items())
    assert [row["preference"] for row in rows] == JUDGED  # in either order shown
    shown = [request["messages"][-1]["content"] for request in server.requests]
    assert {text.index("ours") < text.index("base") for text in shown[:N]} == {True, False}
    assert set(shown[:N]) != set(shown[N:])  # the order follows the seed
    assert server.requests[0] | {"model": "judge-1", "max_tokens": 1, "logprobs": True,
                                 "top_logprobs": 5} == server.requests[0]
    assert set(server.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize("p, preference", [([0.6, 0.2], 1.25), ([0.3, 0.7], 1.7), ([0, 0.4], 2), ([0.4, 0], 1)])
def test_preference_of_the_probabilities(p, preference):
    assert alpaca_eval.preference_of(p, swapped=False) == pytest.approx(preference)
    assert alpaca_eval.preference_of(p, swapped=True) == pytest.approx(3 - preference)


def no_letter(*tokens):
    return top_logprobs(*((token, -1.0 - k) for k, token in enumerate(tokens)))


def test_neither_token_is_a_missing_preference_and_identical_outputs_are_a_tie(outputs, preferences):
    write_outputs(outputs, "ours", ["base 0"] + [f"ours {k}" for k in range(1, N)])
    with serving(ours_but("3", no_letter("Both", "Neither"))) as server:
        found = preferences(server)
    assert len(server.requests) == N - 1  # an answer without m and M is one, so it is not asked again
    assert found[0] == 1.5 and [1.9, *found[1:]] == judged_but(3)


NO_LETTERS = {"a thought": (no_letter("<think>", "Okay"), "<think>"), "ids": (no_letter("token_id:76"), "token_id:76"),
              "none": (no_letter(), "[]"),
              "null": (says("m") | {"logprobs": {"content": [{"token": "m", "top_logprobs": None}]}}, "[]")}


@pytest.mark.parametrize("tokens", NO_LETTERS)
def test_a_judge_whose_first_answers_hold_neither_letter_is_asked_a_few_times(tmp_path, fails, preferences, tokens):
    choice, named = NO_LETTERS[tokens]
    with serving(lambda request, before: choice) as server:
        for asked in (5, 10):  # nothing is recorded of it
            line = fails(server)
            assert named in line and "m and M" in line and len(server.requests) == asked
        server.respond = prefers_ours
        assert preferences(server) == JUDGED
    with serving(lambda request, before: choice) as server:  # two to ask about
        write_outputs(tmp_path / "reference.json", "base", ["base 0", "base 1"] + [f"ours {k}" for k in range(2, N)])
        assert named in fails(server, output=tmp_path / "b.json") and len(server.requests) == 2


def test_answers_without_a_letter_before_and_after_the_first_with_one_are_kept(fails, preferences):
    with serving(ours_but("[^4]|11|10", no_letter("Both"))) as server:
        fails(server, max_requests=6)  # and of the run that resumes it, whose answers all are without one
        found = preferences(server)
    assert [k for k, preference in enumerate(found) if preference] == [4] and len(server.requests) == N


def with_200(error):
    """As proxies and gateways send it."""
    return 200, json.dumps({"error": error}), {}


TROUBLE = {
    "overloaded": (503, "busy", {"Retry-After": KEY}),
    "deep": (200, "[" * 100_000, {}),
    "no choices": (200, '{"choices": []}', {}),
    "no log-probs": says("m"),
    "slow": 1.0,
    "NaN for a log-prob": top_logprobs(("m", float("nan"))),
    "a status in the body": with_200({"code": 429, "message": "too fast"}),
    "one as a string": with_200({"code": "503", "message": "busy"}),
    "no code": with_200({"message": "overloaded"}),
    "an error that is a string": with_200("overloaded"),
    "an error that is no error object": (200, '{"code": 429, "message": "too fast"}', {}),
    "a choice with an error": prefers_m(0.5) | {"error": {"code": 502, "message": "the provider is down"}},
    "a choice that is cut by an error": prefers_m(0.5) | {"finish_reason": "error"},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_may_pass_is_asked_again(preferences, trouble):
    with serving(ours_but("[13579]|11", TROUBLE[trouble], times=1)) as server:
        assert preferences(server, judge_timeout=0.4) == JUDGED
    assert len(server.requests) == N + N // 2


def test_retry_after_is_kept_to(preferences):
    asked = []

    def respond(request, before):
        asked.append(time.monotonic())
        return prefers_ours(request, before) if before else (429, "", {"Retry-After": "0.5"})
    with serving(respond) as server:
        preferences(server)
    assert len(asked) == 2 * N and asked[N] - asked[0] >= 0.5


def test_many_requests_at_once(preferences):
    busy, most = [], []

    def respond(request, before):
        busy.append(request)
        most.append(len(busy))
        time.sleep(0.2)
        busy.pop()
        return prefers_ours(request, before)
    with serving(respond) as server:
        preferences(server, judge_requests=4)
    assert max(most) == 4


@pytest.mark.parametrize("failure", [(500, "out of order", {}), with_200({"code": 429, "message": "out of order"}),
                                     with_200("out of order")])
def test_what_fails_is_named_and_only_that_is_asked_for_again(tmp_path, fails, preferences, failure):
    with serving(ours_but("[47]", failure)) as server:
        error = fails(server, judge_retries=2)
        assert "2 of 12" in error and f"HTTP {failure[0]}" in error and "out of order" in error
        assert len(runs.read_journal(tmp_path / "a.json.partial", "answers")) == N - 2
        assert len(server.requests) == N - 2 + 2 * 3
        server.respond = prefers_ours
        for _ in range(2):  # the second time it is complete
            assert preferences(server, judge_retries=0) == JUDGED and len(server.requests) == N + 2 * 3


def test_max_requests_of_a_run(tmp_path, fails, preferences):
    with serving(prefers_ours) as server:
        for asked in (5, 10):
            assert "--max-requests 5" in fails(server, max_requests=5) and len(server.requests) == asked
        assert preferences(server, max_requests=5) == JUDGED and len(server.requests) == N
        server.respond = lambda request, before: (429, "", {"Retry-After": "0"})
        fails(server, output=tmp_path / "b.json", max_requests=7, judge_retries=3)  # retries count
    assert len(server.requests) == N + 7


FILTERED = {"finish_reason": "content_filter", "logprobs": {"content": []}}
REFUSALS = {"HTTP 400": (400, '{"error": {"code": "content_filter"}}', {}), "HTTP 422": (422, "too long", {}),
            "400 in the body": with_200({"code": 400, "message": "flagged"}),
            "null content": says(None), "a content filter": says("") | FILTERED}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_is_refused_for_ever_is_missing_and_not_asked_for_again(alpaca_judge, fails, refusal):
    with serving(ours_but("[03]", REFUSALS[refusal])) as server:  # the first row is one of them
        fails(server, max_requests=6)
        ran = alpaca_judge(stages.attempt, server)
        assert ran.status == 0 and "missing preferences 2" in ran.out and len(server.requests) == N


def test_a_run_of_which_only_a_row_without_an_answer_is_left_ends(fails, preferences):
    nan = top_logprobs(("m", float("nan")))
    with serving(lambda *asked: ours_but("4", (500, "busy", {}) if asked[1] else nan)(*asked)) as server:
        fails(server, judge_retries=1)  # not each reply had a choice
        server.respond = lambda request, before: nan
        found = preferences(server, judge_retries=2)
    assert found == judged_but(4) and len(server.requests) == N + 1 + 3


FAULTS = {"a wrong key": (401, f"wrong key {KEY}", {}), "not allowed": (403, "", {}), "no such model": (404, "", {}),
          "no log-probs": says("m"), "401 in the body": with_200({"code": 401, "message": f"wrong key {KEY}"})} | {
    f"a redirect, {status}": (status, "", {"Location": "/v1/chat/completions"}) for status in (301, 302, 303, 307, 308)}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_all_requests_would_meet_stops_at_the_first(fails, fault):
    with serving(lambda request, before: FAULTS[fault]) as server:
        error = fails(server)
    assert "--judge-url" in error and KEY not in error and len(server.requests) == 1


@pytest.mark.parametrize("refused, requests", [("[13579]|11", N), (".+", 5)])  # six of twelve, all
def test_refusals_of_more_than_one_row_in_five_are_not_taken_for_missing_rows(fails, preferences, refused, requests):
    with serving(ours_but(refused, (400, "credit balance too low", {}))) as server:
        assert "credit balance too low" in fails(server) and len(server.requests) == requests
        server.respond = prefers_ours
        assert preferences(server) == JUDGED


def test_a_resumed_run_too_asks_an_endpoint_that_is_down_only_a_few_times(fails):
    def respond(request, before):
        return (500, "down", {}) if len(server.requests) > 4 else prefers_ours(request, before)
    with serving(respond) as server:
        for requests in (N, N + 5):
            assert "8 of 12" in fails(server, judge_requests=1, judge_retries=0) and len(server.requests) == requests


def test_max_completion_tokens_where_the_endpoint_asks_for_it(preferences):
    def respond(request, before):
        unsupported = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        refuses = "max_tokens" in request or "say 3 " in str(request)  # it goes on to refuse one
        return (400, unsupported, {}) if refuses else prefers_ours(request, before)
    with serving(respond) as server:
        found = preferences(server, judge_retries=0, max_requests=50)
    assert found == judged_but(3) and len(server.requests) == N + 1
    assert {request["max_completion_tokens"] for request in server.requests[1:]} == {1}


def test_several_requests_at_once_may_be_told_to_use_max_completion_tokens(preferences):
    def respond(request, before):
        if "max_tokens" not in request or "say 0 " in str(request):  # the first one, by another server, is answered
            return prefers_ours(request, before)
        time.sleep(0.3)  # until several are under way
        return 400, "use max_completion_tokens", {}
    with serving(respond) as server:
        assert preferences(server, judge_requests=4) == JUDGED


def test_an_answer_without_a_letter_is_kept_at_once(tmp_path, judge):
    kept = []

    def respond(request, before):
        kept.append(len(runs.read_journal(tmp_path / "a.json.partial", "answers")))
        return prefers_ours(request, before) if len(kept) == 1 else top_logprobs(("x", -0.1))
    with serving(respond) as server:
        assert [row["preference"] is None for row in judge(server, judge_requests=1)].count(True) == N - 1
    assert kept == list(range(N))


def test_the_key_is_sent_and_never_written(tmp_path, alpaca_judge, caplog):
    """Even where the server repeats it in its errors. (In its answers: test_mt_bench.py.)"""
    caplog.set_level(logging.DEBUG)
    with serving(ours_but(".+", (500, json.dumps({"error": f"key {KEY} is tired"}), {}), times=1)) as server:
        failed = alpaca_judge(stages.attempt, server, judge_retries=0)
        ran = alpaca_judge(stages.attempt, server)
    assert failed.status == 2 and "tired" in failed.err and ran.status == 0
    assert keys_sent(server) == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_written(tmp_path)
    assert KEY not in failed.out + failed.err + ran.out + ran.err + caplog.text


def test_without_a_key_neither_the_hub_s_token_nor_that_of_netrc_is_sent(tmp_path, preferences, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogin me\npassword of-another-service\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_send")
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(prefers_ours) as server:
        preferences(server)
    assert keys_sent(server) == {"Bearer no-key"} and "hf_do_not_send" not in json.dumps(server.headers)


@pytest.mark.parametrize("key", ["sk-secret\nX-Evil: 1", "sk-secret\r\n\r\n", "sk-sécret", "sk secret",
                                 "sk-secret\x00"])
def test_a_key_that_is_not_a_key_is_refused_and_not_shown(tmp_path, alpaca_judge, monkeypatch, key):
    # as the environment has it, so also where no system would take a NUL
    monkeypatch.setattr(os, "environ", os.environ | {"OPENAI_API_KEY": key})
    with serving(prefers_ours) as server:
        ran = alpaca_judge(stages.attempt, server)
    if key.strip() == "sk-secret":  # only blanks around it
        assert ran.status == 0
    else:
        assert ran.status == 2 and "OPENAI_API_KEY" in ran.err and not server.requests
    assert "cret" not in ran.err + ran.out and b"cret" not in everything_written(tmp_path)


@pytest.mark.parametrize("url", ["http://me:KEY@host/v1", "https://host/v1?api_key=KEY", "https://host/v1#KEY",
                                 "ftp://host/KEY", "KEY", "file:///etc/passwd", "https://host/v1 KEY"])
def test_a_key_in_the_url_is_refused_and_not_shown(tmp_path, fails, url):
    error = fails(url.replace("KEY", KEY))
    assert "--judge-url" in error and KEY not in error and not list(tmp_path.glob("a.json*"))


def test_the_official_template(tmp_path, preferences):
    """Its blocks become messages; braces in an output and text that looks like a placeholder stay as they are."""
    (tmp_path / "judge.txt").write_text(
        '<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n{"i": """{instruction}"""}\n'
        '{\n {"model": "m", "output": """{output_1}"""},\n {"model": "M", "output": """{output_2}"""}\n'
        '}\n{other}<|im_end|>\n')
    write_outputs(tmp_path / "reference.json", "base", ["base {output_2} <|im_end|> {x}"] * N)
    with serving(prefers_ours) as server:
        preferences(server)
    for request in server.requests:
        system, user = request["messages"]
        assert system == {"role": "system", "content": "Be fair."}
        assert user["role"] == "user" and user["content"].count("base {output_2} <|im_end|> {x}") == 1
        assert user["content"].startswith('{"i": """say ') and user["content"].count("ours") == 1
        assert user["content"].endswith("{other}")


BAD = {"another instruction": ({"outputs": "one"}, "reference.json"), "the same twice": ({"outputs": "twice"}, "row 1"),
       "no place": ({"judge_template": "template"}, "{output_2}"), "no answer": ({"judge_retries": 0}, "12 of 12")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, fails, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write_outputs(tmp_path / "one", "x", ["a"])
    (tmp_path / "twice").write_text(json.dumps(json.loads(one.read_text()) * 2))
    (tmp_path / "template").write_text("{instruction} {output_1}")
    options, said = BAD[name]
    assert said in fails("http://127.0.0.1:9/v1", **options)
