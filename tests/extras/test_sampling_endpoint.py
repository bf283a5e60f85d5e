"""extras/generate_at_url.py: a server samples, by its token ids; nothing is lost, made up, or asked for twice."""

import json
import os
import shutil
import signal

import huggingface_hub
import numpy as np
import pytest

import common
from chat_server import KEY, on_the_loopback, serving
from support import chat
from stages import attempt, counts, digest, parsed, refused, rows, run

AT_URL, LIMIT = "extras/generate_at_url", 12


@pytest.fixture
def model(pi_0, tmp_path):
    """A model that cannot be sampled from here: it has no weights."""
    return shutil.copytree(pi_0, tmp_path / "pi", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def options(model, world):
    return dict(model=model, input=world / "prompts_1.jsonl", max_new_tokens=LIMIT)


@pytest.fixture
def sampler(tokenizer):
    """A server as vLLM is one: its ids are decided by prompt and seed, and half of the responses end with an EOS."""
    def respond(request, before):
        rng = np.random.default_rng([request["seed"], *request["prompt"]])
        ids, ends = rng.integers(10, 60, LIMIT).tolist(), rng.random() < 0.5
        ids = [*ids[:rng.integers(4, LIMIT)], tokenizer.eos_token_id] if ends else ids
        return {"text": "its own", "token_ids": ids, "prompt_token_ids": request["prompt"], "stop_reason": None,
                "finish_reason": "stop" if ends else "length"}
    return respond


def asked(server):
    return sorted((request["prompt"], request["seed"]) for request in server.requests)


def test_requests_and_records(tmp_path, options, sampler, tokenizer):
    with serving(sampler, [options["model"]]) as server:
        output = run(AT_URL, **options, url=server.url, on_length_limit="open", seed=3, output=tmp_path / "out")
    records, prompts = rows(output), rows(options["input"])
    assert [(row["id"], row["prompt"]) for row in records] == [(str(row["id"]), row["prompt"]) for row in prompts]
    assert len(server.requests) == 2 * len(prompts) and set(server.paths) == {"/v1/completions"}
    assert len({request["seed"] for request in server.requests}) == 2 * len(prompts)
    by_ids = {tuple(sampler(request, 0)["token_ids"]): request for request in server.requests}
    for row in records:
        assert row["prompt_ids"] == chat.prompt_ids(tokenizer, row["prompt"], "")
        for response in row["responses"]:
            request = by_ids.pop(tuple(response["ids"]))
            assert request == {
                "model": str(options["model"]), "prompt": row["prompt_ids"], "max_tokens": LIMIT, "temperature": 0.7,
                "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
                "frequency_penalty": 0, "stop_token_ids": [tokenizer.eos_token_id], "return_token_ids": True,
                "seed": request["seed"]}


def test_the_responses_follow_the_seed_and_not_the_requests_at_a_time(tmp_path, options, sampler):
    def aborts(request, before):  # what may pass is asked for again
        return sampler(request, 0) if before else {"finish_reason": "abort", "token_ids": [20]}
    outputs = []
    for n, seed, end, respond in ((1, 0, "", sampler), (8, 0, "/", aborts), (9, 1, "/completions", sampler)):
        with serving(respond, ["other name"]) as server:
            outputs.append(digest(run(AT_URL, **options, url=server.url + end, url_model="other name", url_requests=n,
                                      seed=seed, output=tmp_path / f"{n}")))
        assert set(server.paths) == {"/v1/completions"}
    assert outputs[0] == outputs[1] != outputs[2]


KINDS = {  # the server's choice -> the ids and the finish that are recorded; -1 stands for the EOS
    "the EOS is kept, SGLang": (([20, 21, -1], "stop", {"matched_stop": -1}), ([20, 21, -1], "eos")),
    "the EOS is taken off": (([20, 21], "stop", {"stop_reason": -1}), ([20, 21, -1], "eos")),
    "nothing but the EOS": (([], "stop", {"matched_stop": -1}), ([-1], "eos")),
    "the EOS at the limit": (([20] * (LIMIT - 1) + [-1], "length", {}), ([20] * (LIMIT - 1) + [-1], "eos")),
    "no stop at the EOS": (([20, -1, 21], "length", {}), ([20, -1], "eos")),
    "the limit": (([20] * LIMIT, "length", {}), ([20] * LIMIT + [-1], "length"))}  # --on-length-limit eos


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_response_ends(tmp_path, options, tokenizer, kind):
    (ids, finish, more), recorded = json.loads(json.dumps(KINDS[kind]).replace("-1", f"{tokenizer.eos_token_id}"))
    choice = {"token_ids": ids, "finish_reason": finish} | more
    with serving(lambda request, before: choice, [options["model"]]) as server:
        records = rows(run(AT_URL, **options, url=server.url, output=tmp_path / "out"))
    assert all([y["ids"], y["finish"]] == recorded for row in records for y in row["responses"])


REFUSALS = {  # which prompt is refused, and how; where it is the first, nothing has been answered yet
    "HTTP 400": (0, (400, "'max_tokens' or 'max_completion_tokens' is too large", {})),
    "cut": (0, {"token_ids": [20], "finish_reason": "length"}),
    "abort": (1, {"token_ids": [20], "finish_reason": "abort"}),
    "content_filter": (1, {"token_ids": [20], "finish_reason": "content_filter"})}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_prompt_that_is_refused_for_ever_is_dropped_and_counted(tmp_path, options, sampler, tokenizer, refusal):
    (k, refused), prompts = REFUSALS[refusal], rows(options["input"])
    ids = chat.prompt_ids(tokenizer, prompts.pop(k)["prompt"], "")
    with serving(lambda request, before: refused if request["prompt"] == ids else sampler(request, before),
                 [options["model"]]) as server:
        ran = attempt(AT_URL, **options, url=server.url, samples=6, output=tmp_path / "out")
    assert ran.status == 0 and "prompts refused by the server 1," in ran.out, ran
    assert [row["id"] for row in rows(tmp_path / "out")] == [str(row["id"]) for row in prompts]


def stops(request, **change):
    return {"token_ids": [20], "prompt_token_ids": request["prompt"], "finish_reason": "stop"} | change


FAULTS = {"no ids": ({"token_ids": None}, "return_token_ids"), "texts for ids": ({"token_ids": ["a"]}, "token_ids"),
          "another vocabulary": ({"token_ids": [10 ** 6] * LIMIT, "finish_reason": "length"}, "1000000"),
          "another prompt": ({"prompt_token_ids": [1]}, "prompt"), "another EOS": ({"token_ids": [20]}, "20")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_cannot_be_used_is_asked_once(tmp_path, options, fault):
    change, said = FAULTS[fault]
    with serving(lambda request, before: stops(request, **change), [options["model"]]) as server:
        error = refused(AT_URL, **options, url=server.url, output=tmp_path / "out")
    assert said in error and "--url" in error and len(server.requests) == 1


def test_a_killed_run_asks_only_for_what_is_missing_also_at_another_address(tmp_path, options, sampler):
    def killed(request, before):
        if len(server.requests) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return sampler(request, before)
    with serving(sampler, [options["model"]]) as server:
        whole = run(AT_URL, **options, url=server.url, output=tmp_path / "whole")
        everything = asked(server)
    with serving(killed, [options["model"]]) as server:
        command = dict(options, url_requests=2, output=tmp_path / "out")
        assert attempt(AT_URL, **command, url=server.url).status == 130
        before = asked(server)
    with serving(sampler, [options["model"]]) as server:
        assert digest(run(AT_URL, **command, url=server.url)) == digest(whole)
        assert sorted(before + asked(server)) == everything and 9 <= len(before) < len(everything)
        assert "nothing to do" in attempt(AT_URL, **command, url=server.url).out
        assert "--url-model" in refused(AT_URL, **command, url=server.url, url_model="other name")


def test_the_options_are_those_of_02_and_have_its_defaults():
    words = ["--model", "m", "--input", "i", "--output", "o"]
    ours, theirs = vars(parsed("02_generate", words)), vars(parsed(AT_URL, [*words, "--url", "http://host/v1"]))
    assert theirs == {name: ours[name] for name in ours.keys() - {"micro_batch_size"}} | {
        "url": "http://host/v1", "url_model": "m", "url_requests": 64}


@pytest.mark.parametrize("on_length_limit", ["eos", "open", "drop"])
def test_the_same_responses_make_the_same_file_as_in_02(tmp_path, options, pi_0, tokenizer, on_length_limit):
    model = shutil.copytree(pi_0, tmp_path / "pi_with_weights")
    eos = [tokenizer.eos_token_id, *range(40, 60)]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    prompts = [chat.prompt_ids(tokenizer, row["prompt"], "") for row in rows(options["input"])]
    options |= dict(model=model, max_prompt_length=int(np.median([len(ids) for ids in prompts])))
    ours = run("02_generate", **options, on_length_limit=on_length_limit, output=tmp_path / "ours")
    sampled = rows(run("02_generate", **options, on_length_limit="open", output=tmp_path / "open"))
    answers = {(*row["prompt_ids"], int(2 ** 31 * common.uniforms(0, row["id"], k, 1)[0])): response
               for row in sampled for k, response in enumerate(row["responses"])}

    def respond(request, before):
        response = answers[(*request["prompt"], request["seed"])]
        return {"token_ids": response["ids"], "finish_reason": response["finish"].replace("eos", "stop")}
    with serving(respond, [model]) as server:
        theirs = run(AT_URL, **options, on_length_limit=on_length_limit, url=server.url, output=tmp_path / "theirs")
    assert digest(ours) == digest(theirs)
    counted = counts(ours)
    assert counts(theirs) == counted | {"prompts refused by the server": 0}
    assert counted["dropped as too long"] > 0 and 0 < counted["responses at the length limit"] < counted["responses"]


@pytest.mark.parametrize("case", ["another model", "no server", "a key", "no URL", "offline", "an error"])
def test_bad_options_are_one_line_and_nothing_is_asked(tmp_path, options, sampler, case, monkeypatch):
    said = {"another model": "pi_7", "a key": "OPENAI_API_KEY", "offline": "HF_HUB_OFFLINE: ", "an error": "no one is"}
    listed = {"error": {"code": 503, "message": "no one is up"}} if case == "an error" else ["pi_7"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", case == "offline")
    with serving(sampler, listed) as server:
        url = {"no server": "http://127.0.0.1:9/v1", "a key": f"http://user:{KEY}@host/v1"}.get(case, server.url)
        words = dict(options, url_model="pi_8") if case == "no URL" else dict(options, url=url)
        error = refused(AT_URL, **words, output=tmp_path / "out")
    assert said.get(case, "--url") in error and KEY not in error and not server.requests
