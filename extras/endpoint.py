"""Asking an OpenAI-compatible endpoint, so that no answer is lost, made up or paid for twice, and no key is shown."""

import argparse
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub

import common
from support import runs

FREE = ("output", "judge_requests", "judge_timeout", "judge_retries", "max_requests")  # options that change no answer
TOP_LOGPROBS = 5  # as many as AlpacaEval 2.0 asks for
MAX_TOKENS = 2048  # of an answer that is a text, as in FastChat
RETRIED = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may be temporary
REFUSED = {400, 413, 422}  # those that may be about one request; any other is about all
PROBES = 5  # requests without an answer before the first that has one: then the rest is not sent
PAUSE = 1.0  # seconds before the first retry, doubled for each further one; Retry-After takes precedence
ENDS = ("fault",  # how a request ends without an answer, what matters most first: no other would have one either
        "failed",  # it may have one another time
        "refused",  # the endpoint never will answer it
        "no letter")  # the judge answers it, but with neither of the letters


class NoAnswer(Exception):
    """Raised with (one of ENDS, why)."""


def endpoint_url(text):
    """An argparse type, whose errors do not repeat the text: it may have a key in it."""
    if not re.fullmatch(r"https?://[^\s@?#]+", text):
        raise argparse.ArgumentTypeError("must look like http://host:8000/v1; the key belongs in OPENAI_API_KEY")
    return text


def ask_all(endpoint, jobs, work):
    """{k: answer} to jobs {k: job}. The answer is None where there never will be one, as with a content filter.

    Answers are recorded in `work` as they come, so that a resumed run asks only for what is missing. Until one is
    answered, requests are sent one at a time, and no more than PROBES. Raises InputError where requests have failed, or
    none is answered, or more than one in five is refused: these are not recorded, since the fault is elsewhere.
    """
    answers = dict(runs.read_journal(work, "answers"))
    waiting, unanswered = [k for k in jobs if k not in answers], {}  # unanswered: {k: (one of ENDS, why)}
    pool = ThreadPoolExecutor(endpoint.at_a_time)

    def keep(k, answer):
        with endpoint.lock:
            answers[k] = runs.pack(answer)
            runs.append_journal([k, answer], work, "answers")

    def ask_one(k):
        try:
            keep(k, endpoint.ask(jobs[k]))
        except NoAnswer as error:
            unanswered[k] = error.args
            if error.args[0] == "no letter" and answers:  # the judge works: this preference is missing
                keep(k, None)

    try:
        while waiting and not endpoint.works and len(unanswered) < PROBES:
            pool.submit(ask_one, waiting.pop(0)).result()
        # a resumed run may begin with those that never will be answered
        if endpoint.works or answers and {end for end, _ in unanswered.values()} <= {"refused", "no letter"}:
            futures = [pool.submit(ask_one, k) for k in waiting]
            for future in runs.progress(futures, "asking", common.Ranks(0, 1, None)):
                future.result()
    finally:  # on Ctrl-C too: what the requests that were sent have led to is still recorded, and no other is sent
        endpoint.stop.set()
        pool.shutdown()
        refused = [k for k, (end, _) in unanswered.items() if end == "refused"]
        early = [k for k, (end, _) in unanswered.items() if end == "no letter" and k not in answers]
        for k in [*early, *refused * (len(refused) <= max(PROBES, len(jobs) // 5))] if answers else ():
            keep(k, None)
    report_unanswered(endpoint, list(unanswered.values()), len(jobs), len(jobs.keys() - answers.keys()), work)
    return answers


def report_unanswered(endpoint, unanswered, count, missing, work):
    """Raises InputError where `missing` of `count` jobs have no answer, else says how many never will have one."""
    output = str(work).removesuffix(".partial")
    end, why = min(unanswered, key=lambda found: ENDS.index(found[0]), default=("", ""))
    if missing:
        check = f"check {endpoint.option}, the model's name, OPENAI_API_KEY; " if end != "failed" else ""
        raise runs.InputError(f"{output}: {missing} of {count} have no answer ({why}): {check}the others are "
                              f"kept in {work}: rerun the command to ask only for the missing ones")
    if unanswered:
        print(f"{output}: {len(unanswered)} of {count} are missing: {why}", flush=True)


class Endpoint:
    """An OpenAI-compatible endpoint. The key is in memory only.

    option: the URL's, for errors. Subclasses define `body`, a job's request, and `read_choice`, the answer in a reply's
    choice: it raises NoAnswer, or where another try may help an Exception of any kind.
    """

    def __init__(self, option, url, path, timeout, retries, at_a_time, max_requests=None):
        if huggingface_hub.is_offline_mode():
            raise runs.InputError(f"HF_HUB_OFFLINE: keeps the client from sending requests to {option}: unset it")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", self.key):  # the client's own error would show it
            raise runs.InputError("OPENAI_API_KEY: has a blank or a character outside ASCII: set it to the key alone")
        self.option, self.url, self.path = option, url.rstrip("/").removesuffix(path), path
        self.timeout, self.retries, self.at_a_time, self.max_requests = timeout, retries, at_a_time, max_requests
        self.works = False  # whether it has answered a request of this run
        self.limit = None  # the name of the limit on new tokens, where OpenAI's newer models have another
        self.requests, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def ask(self, job):
        """The answer to a job. Raises NoAnswer.

        What may be temporary is tried again; where each reply had a choice, but none an answer, it is refused.
        """
        retries, choices = 0, 0
        while True:
            with self.lock:
                if self.stop.is_set() or self.requests == self.max_requests:
                    raise NoAnswer("failed", f"--max-requests {self.max_requests} is reached")
                self.requests += 1
            body, pause = self.body(job), min(60, PAUSE * 2 ** retries)
            try:
                response = self.send("POST", self.path, json=body)
                if re.fullmatch(r"\d+(\.\d+)?", wait := response.headers.get("retry-after", "")):
                    pause = min(600, float(wait))
                choice = read_reply(response, "choices")[0]
                choices += 1
                answer = self.read_choice(choice, body)
                self.works = True
                return answer
            except NoAnswer as error:
                end, why = error.args
            except Exception as error:  # many kinds: a timeout, a broken connection, a reply without an answer
                end, why = "failed", f"{type(error).__name__}: {error}"
            if end == "refused" and self.limit and "max_tokens" in body and "max_completion_tokens" in why:
                self.limit = "max_completion_tokens"
                continue
            if end == "fault":
                self.stop.set()
            if end != "failed" or retries == self.retries:
                raise NoAnswer("refused" if end == "failed" and choices > retries else end, self.shown(why))
            retries += 1
            self.stop.wait(pause)

    def send(self, method, path, **options):
        """The response to a request. A redirect is not followed: it could carry the key to another host."""
        return huggingface_hub.get_session().request(
            method, self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=self.timeout,
            follow_redirects=False, **options)

    def shown(self, text):
        """The beginning of what a server says, in one line. It may repeat the key."""
        return " ".join(text.replace(self.key, "***").split())[:240]


def read_reply(response, field):
    """The reply's list `field`, which is not empty. Raises NoAnswer, or an Exception at a reply of another form.

    Where the body of a HTTP 200 has an error, as proxies send it, its code is the status; one without a code may be
    temporary, like a 500.
    """
    status, said = response.status_code, response.text
    if status == 200:
        reply = response.json()
        found = reply.get(field)
        said = reply.get("error") or (found[0].get("error") if found else reply)
        if found and not said:
            return found
        code = str(said.get("code")) if isinstance(said, dict) else ""
        status = int(code) if re.fullmatch(r"[45]\d\d", code) else 500
    end = "failed" if status in RETRIED else "refused" if status in REFUSED else "fault"
    raise NoAnswer(end, f"HTTP {response.status_code} {said}")


class JudgeEndpoint(Endpoint):
    """Asked for a chat completion to messages. The answer is [text, finish_reason], "length" where it is cut at
    MAX_TOKENS; given two letters, with one of which the text is to begin, [probability of each].
    """

    def __init__(self, args, letters=()):
        super().__init__("--judge-url", args.judge_url, "/chat/completions", args.judge_timeout,
                         args.judge_retries, args.judge_requests, args.max_requests)
        self.model, self.letters, self.limit = args.judge_model, letters, "max_tokens"

    def body(self, messages):
        options = dict(temperature=1, logprobs=True, top_logprobs=TOP_LOGPROBS) if self.letters else {"temperature": 0}
        return {"model": self.model, "messages": messages, self.limit: 1 if self.letters else MAX_TOKENS} | options

    def read_choice(self, choice, body):
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if finish in ("error", "abort"):
            raise NoAnswer("failed", f"finish_reason {finish}")
        if text is None or finish == "content_filter":
            raise NoAnswer("refused", f"no content, finish_reason {finish}")
        if not self.letters:
            text.encode()  # a ValueError for a lone surrogate, which cannot be written
            # a short key is a word such as EMPTY, which vLLM's users set, and may stand in any answer
            return [text.replace(self.key, "***") if len(self.key) >= 16 else text, finish]
        tokens = (choice.get("logprobs") or {}).get("content")
        if not tokens:
            raise NoAnswer("failed" if self.works else "fault", "the endpoint gave no log-probs")
        likely, p = tokens[0].get("top_logprobs") or [], dict.fromkeys(self.letters, 0.0)
        for top in likely:
            if not float(top["logprob"]) < 0.1:  # NaN too; 0.1 for an endpoint that rounds
                raise ValueError("the endpoint gave log-probs that are not log-probs")
            token = top["token"].strip().lstrip("Ġ▁")  # some servers give the space before it as tokenizers write it
            if token in p:
                p[token] += math.exp(float(top["logprob"]))
        if not any(p.values()):
            tokens = json.dumps([top["token"] for top in likely], ensure_ascii=False)[:80]
            raise NoAnswer("no letter", f"{' and '.join(p)} are not among the most likely tokens, {tokens}: the judge "
                           "must begin with the letter, without a thought, at a server that gives tokens as text")
        return [*p.values()]
