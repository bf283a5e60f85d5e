"""--judge asks an OpenAI-compatible endpoint: nothing is lost, nothing asked twice, the key stays in memory."""

import json
import logging
import math
import time

import huggingface_hub
import pytest

import common
import stages
from chat_server import KEY, prefers_m, says, serving, top_logprobs

N = 12
stage = stages.load("05_eval")


@pytest.fixture(autouse=True)
def on_the_loopback(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the client refuses the loopback as well
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(stage, "PAUSE", 0.01)


def write_outputs(path, generator, outputs):
    path.write_text(json.dumps([{"dataset": "d", "instruction": f"say {k}", "output": text, "generator": generator}
                                for k, text in enumerate(outputs)]))
    return path


@pytest.fixture
def pair(tmp_path):
    return [write_outputs(tmp_path / "reference.json", "base", [f"base {k}" for k in range(N)]),
            write_outputs(tmp_path / "outputs.json", "ours", [f"ours {k}" for k in range(N)])]


def judge(server, pair, output, **options):
    return stages.attempt("05_eval", judge=pair, judge_url=server.url, judge_model="judge-1", output=output, **options)


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def prefers_ours(request, before):
    """A judge without a position bias: p = 0.9 for "ours", wherever it stands."""
    text = request["messages"][-1]["content"]
    return prefers_m(0.9 if text.index("ours") < text.index("base") else 0.1)


def test_annotations_in_the_official_format(tmp_path, pair):
    with serving(prefers_ours) as server:
        ran = judge(server, pair, tmp_path / "annotations.json")
    assert ran.status == 0, ran.err
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [list(row) for row in rows] == [["dataset", "instruction", "output_1", "generator_1", "output_2", "generator_2",
                                            "annotator", "preference"]] * N
    assert rows[3] | {"preference": None} == {
        "dataset": "d", "instruction": "say 3", "output_1": "base 3", "generator_1": "base", "output_2": "ours 3",
        "generator_2": "ours", "annotator": "judge-1", "preference": None}
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)  # in either order shown
    assert len(server.requests) == N
    orders = {request["messages"][-1]["content"].index("ours") < request["messages"][-1]["content"].index("base")
              for request in server.requests}
    assert orders == {True, False}
    request = server.requests[0]
    assert (request["model"], request["max_tokens"], request["logprobs"], request["top_logprobs"]) == ("judge-1", 1, True, 5)


def test_order_follows_the_seed(tmp_path, pair):
    with serving(lambda request, before: prefers_m(0.8)) as server:  # a judge that looks at the position only
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert judge(server, pair, tmp_path / name, seed=seed).status == 0
    a, b, c = ([row["preference"] for row in json.loads((tmp_path / name).read_text())] for name in "abc")
    assert a == b != c
    assert {round(p, 9) for p in a} == {1.2, 1.8}


def test_preference_of_the_likeliest_tokens():
    def logs(**p):
        return [(token, math.log(value)) for token, value in p.items()]
    assert stage.preference_of(logs(m=0.6, M=0.2, other=0.2), False) == pytest.approx(2 - 0.75)
    assert stage.preference_of(logs(m=0.6, M=0.2, other=0.2), True) == pytest.approx(1 + 0.75)
    for p in (logs(m=0.3, M=0.7), logs(m=0.5), logs(M=1.0)):
        assert stage.preference_of(p, False) + stage.preference_of(p, True) == pytest.approx(3)
    assert stage.preference_of(logs(M=0.4, other=0.6), False) == 2  # one of them missing: the other is certain
    assert stage.preference_of(logs(m=0.4, other=0.6), False) == 1
    assert stage.preference_of(logs(other=1.0), False) is None


def test_both_tokens_missing_is_a_missing_preference(tmp_path, pair):
    def respond(request, before):
        return top_logprobs(("Both", -0.1), ("Neither", -2.0)) if "say 3" in str(request) else prefers_m(0.5)
    with serving(respond) as server:
        assert judge(server, pair, tmp_path / "a.json").status == 0
    assert len(server.requests) == N  # an answer, so it is not asked again
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["preference"] for row in rows] == [None if k == 3 else 1.5 for k in range(N)]


def test_identical_outputs_are_a_tie_and_not_asked(tmp_path):
    pair = [write_outputs(tmp_path / f"{name}.json", name, ["same", f"by {name}"]) for name in "ab"]
    with serving(lambda request, before: prefers_m(0.5)) as server:
        assert judge(server, pair, tmp_path / "out.json").status == 0
    assert len(server.requests) == 1
    assert json.loads((tmp_path / "out.json").read_text())[0]["preference"] == 1.5


TROUBLE = {
    "rate limited": lambda: (429, '{"error": "slow down"}', {"Retry-After": "0"}),
    "overloaded": lambda: (503, "busy", {}),
    "gateway": lambda: (502, "<html>", {"Content-Type": "text/html"}),
    "not JSON": lambda: (200, "not json", {}),
    "a list": lambda: (200, "[]", {}),
    "empty": lambda: (200, "", {}),
    "no choices": lambda: (200, '{"choices": []}', {}),
    "no log-probs": lambda: says("m"),
    "null log-prob": lambda: top_logprobs(("m", None)),
    "slow": lambda: 1.0,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_may_pass_is_asked_again(tmp_path, pair, trouble):
    def respond(request, before):
        odd = int(request["messages"][-1]["content"].split("say ")[1].split()[0]) % 2
        return TROUBLE[trouble]() if odd and not before else prefers_ours(request, before)
    with serving(respond) as server:
        ran = judge(server, pair, tmp_path / "a.json", judge_timeout=0.4)
    assert ran.status == 0, ran.err
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["instruction"] for row in rows] == [f"say {k}" for k in range(N)]
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)
    assert len(server.requests) == N + N // 2


def test_retry_after_is_kept_to(tmp_path, pair):
    asked = []

    def respond(request, before):
        asked.append(time.monotonic())
        return prefers_ours(request, before) if before else (429, "", {"Retry-After": "0.5"})
    with serving(respond) as server:
        assert judge(server, pair, tmp_path / "a.json").status == 0
    assert len(asked) == 2 * N and asked[N] - asked[0] >= 0.5


def test_what_fails_is_told_and_only_that_is_asked_for_again(tmp_path, pair):
    broken = [True]

    def respond(request, before):
        if broken[0] and ("say 4" in str(request) or "say 7" in str(request)):
            return 500, '{"error": {"message": "out of order"}}', {}
        return prefers_ours(request, before)

    with serving(respond) as server:
        first = judge(server, pair, tmp_path / "a.json", judge_retries=2)
        assert first.status == 2 and first.err.count("\n") == 1 and "2 of 12" in first.err and "HTTP 500" in first.err
        assert not (tmp_path / "a.json").exists()
        kept = list(common.unsealed(tmp_path / "a.json.partial" / "judged.jsonl"))
        assert len(kept) == N - 2 and all(1 <= row["preference"] <= 2 for row in kept)
        assert len(server.requests) == N - 2 + 2 * 3
        broken[0] = False
        server.requests.clear()
        assert judge(server, pair, tmp_path / "a.json", judge_retries=0).status == 0
        assert len(server.requests) == 2
        assert judge(server, pair, tmp_path / "a.json").status == 0 and len(server.requests) == 2
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["instruction"] for row in rows] == [f"say {k}" for k in range(N)]
    assert [row["preference"] for row in rows] == pytest.approx([1.9] * N)


def test_budget_caps_the_requests_of_a_run(tmp_path, pair):
    with serving(prefers_ours) as server:
        for asked in (5, 10):
            ran = judge(server, pair, tmp_path / "a.json", budget=5)
            assert ran.status == 2 and "budget of 5" in ran.err and ran.err.count("\n") == 1
            assert len(server.requests) == asked
        assert judge(server, pair, tmp_path / "a.json", budget=5).status == 0
        assert len(server.requests) == N
    assert len(json.loads((tmp_path / "a.json").read_text())) == N


def test_budget_counts_retries(tmp_path, pair):
    with serving(lambda request, before: (429, "", {"Retry-After": "0"})) as server:
        assert judge(server, pair, tmp_path / "a.json", budget=7, judge_retries=3).status == 2
    assert len(server.requests) == 7


def test_a_half_written_line_is_asked_for_again(tmp_path, pair):
    with serving(prefers_ours) as server:
        assert judge(server, pair, tmp_path / "a.json", budget=6).status == 2
        journal = tmp_path / "a.json.partial" / "judged.jsonl"
        journal.write_text(journal.read_text()[:-20])
        server.requests.clear()
        assert judge(server, pair, tmp_path / "a.json", budget=3).status == 2  # what comes after it is whole
        assert judge(server, pair, tmp_path / "a.json").status == 0
        assert len(server.requests) == N - 5
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["instruction"] for row in rows] == [f"say {k}" for k in range(N)]


def test_a_refused_key_stops_the_run(tmp_path, pair):
    with serving(lambda request, before: (401, json.dumps({"error": f"wrong key {KEY}"}), {})) as server:
        ran = judge(server, pair, tmp_path / "a.json", judge_requests=1)
    assert ran.status == 2 and "HTTP 401" in ran.err and ran.err.count("\n") == 1
    assert len(server.requests) == 1


def test_a_refused_row_does_not_stop_the_others(tmp_path, pair):
    def respond(request, before):
        return (400, '{"error": "too long"}', {}) if "say 3" in str(request) else prefers_ours(request, before)
    with serving(respond) as server:
        ran = judge(server, pair, tmp_path / "a.json")
    assert ran.status == 2 and "1 of 12" in ran.err and "too long" in ran.err
    assert len(server.requests) == N


def test_the_key_is_sent_and_never_written(tmp_path, pair, caplog):
    """Even where the server repeats it in its errors and answers."""
    caplog.set_level(logging.DEBUG)

    def respond(request, before):
        return prefers_ours(request, before) if before else (500, json.dumps({"error": f"key {KEY} is tired"}), {})
    with serving(respond) as server:
        failed = judge(server, pair, tmp_path / "a.json", judge_retries=0)
        ran = judge(server, pair, tmp_path / "a.json")
    assert failed.status == 2 and "tired" in failed.err and ran.status == 0
    assert {headers["Authorization"] if "Authorization" in headers else headers["authorization"]
            for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_written(tmp_path)
    assert KEY not in failed.out + failed.err + ran.out + ran.err + caplog.text


def test_without_a_key_the_hub_token_is_not_sent(tmp_path, pair, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_send")
    with serving(prefers_ours) as server:
        assert judge(server, pair, tmp_path / "a.json").status == 0
    assert "hf_do_not_send" not in json.dumps(server.headers)


def test_many_requests_at_once(tmp_path, pair):
    with serving(lambda request, before: 0.2) as server:
        assert judge(server, pair, tmp_path / "a.json", judge_requests=4).status == 0
    assert server.together == 4


def test_the_official_template(tmp_path, pair):
    """Its blocks become messages; braces in an output and text that looks like a placeholder stay as they are."""
    template = tmp_path / "template.txt"
    template.write_text('<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n{"i": """{instruction}"""}\n'
                        '{\n {"model": "m", "output": """{output_1}"""},\n {"model": "M", "output": """{output_2}"""}\n}\n{other}<|im_end|>\n')
    write_outputs(pair[0], "base", ["base {output_2} <|im_end|> {x}"] * N)
    with serving(prefers_ours) as server:
        assert judge(server, pair, tmp_path / "a.json", judge_template=template).status == 0
    for request in server.requests:
        system, user = request["messages"]
        assert system == {"role": "system", "content": "Be fair."}
        assert user["role"] == "user" and user["content"].count("base {output_2} <|im_end|> {x}") == 1
        assert user["content"].startswith('{"i": """say ') and user["content"].count("ours") == 1
        assert user["content"].endswith("{other}")


def test_bad_input_is_one_line(tmp_path, pair):
    one = write_outputs(tmp_path / "one.json", "x", ["a"])
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(json.loads(one.read_text()) * 2))
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    no_place = tmp_path / "template.txt"
    no_place.write_text("{instruction} {output_1}")
    ask = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "j", "output": tmp_path / "a.json"}
    for options, said in [
            (ask | {"judge": [pair[0], one]}, "must answer the same"),
            (ask | {"judge": [twice, one]}, "repeats the instruction"),
            (ask | {"judge": [bad, one]}, "cannot be read"),
            (ask | {"judge": [pair[0]]}, "--judge takes"),
            (ask | {"judge": pair, "gold": pair[0]}, "--judge takes"),
            (ask | {"judge": pair, "judge_template": no_place}, "{output_2}"),
            (ask | {"judge": pair, "judge_template": tmp_path / "none"}, "cannot be read"),
            (ask | {"judge": pair, "judge_url": "http://user:key@host/v1"}, "without a key"),
            (ask | {"judge": pair, "judge_url": "https://host/v1?key=k"}, "without a key"),
            (ask | {"judge": pair, "judge_retries": 0}, "12 of 12"),
            ({"judge": pair, "output": tmp_path / "a.json"}, "--judge takes")]:
        ran = stages.attempt("05_eval", **options)
        assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran
        assert not (tmp_path / "a.json").exists()
    assert b"user:key" not in everything_written(tmp_path)


def test_an_existing_file_made_otherwise_is_left_alone(tmp_path, pair):
    there = tmp_path / "a.json"
    there.write_text("mine")
    with serving(prefers_ours) as server:
        ran = judge(server, pair, there)
    assert ran.status == 2 and there.read_text() == "mine" and not server.requests


def test_offline_mode_is_named(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with serving(prefers_ours) as server:
        ran = judge(server, pair, tmp_path / "a.json")
    assert ran.status == 2 and "HF_HUB_OFFLINE" in ran.err and not server.requests


def test_a_local_model_by_the_same_log_probs(tmp_path, pair, pi_init, tokenizer, monkeypatch):
    """Both orders of a prompt, read at its last position; the preference is that of the model's own logits."""
    monkeypatch.setattr(stage, "LIKELIEST", len(tokenizer))
    monkeypatch.setattr(stage, "preference_of", lambda likeliest, swapped: likeliest)
    judged = stages.attempt("05_eval", judge=pair, judge_model=pi_init, output=tmp_path / "a.json", micro_batch_size=5)
    assert judged.status == 0, judged.err
    model = common.load_model(str(pi_init), "cpu")
    rows = json.loads((tmp_path / "a.json").read_text())
    for row in rows[:3]:
        shown = (row["output_2"], row["output_1"]) if stage.swapped(0, row["instruction"]) else (row["output_1"], row["output_2"])
        text = stage.TEMPLATE.format(instruction=row["instruction"], output_1=shown[0], output_2=shown[1])
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            return_dict=False, return_tensors="pt")
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        best = expected.argmax()
        assert row["preference"][0] == [tokenizer.decode([best]), pytest.approx(expected[best].item(), abs=1e-4)]


def test_a_local_model_that_says_neither_gives_missing_preferences(tmp_path, pair, pi_init):
    assert stages.attempt("05_eval", judge=pair, judge_model=pi_init, output=tmp_path / "a.json").status == 0
    assert {row["preference"] for row in json.loads((tmp_path / "a.json").read_text())} == {None}  # no m in its vocabulary
