"""Asking an OpenAI-compatible endpoint, so that no answer is lost, made up or paid for twice, and no key is shown."""

import json
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
LIMITS = ("max_tokens", "max_completion_tokens")  # its name, and its name for OpenAI's newer models
RETRIED = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may be temporary
REFUSED = {400, 413, 422}  # those that may be about one request; any other is about all
PROBES = 5  # requests without an answer, or one with a letter, before the first that has it: then the rest is not sent
PAUSE = 1.0  # seconds before the first retry, doubled for each further one; Retry-After takes precedence


def check_url(option, url):
    """Raises InputError where the URL given with `option` does not look like an endpoint's. It may have a key in it."""
    if not re.fullmatch(r"https?://[^\s@?#]+(\?api-version=(\d{4}-\d\d-\d\d(-preview)?|preview))?", url):
        raise runs.InputError(f"{option}: must look like http://host:8000/v1, or for Azure https://host/openai/"
                              "deployments/NAME?api-version=2024-10-21; the key belongs in OPENAI_API_KEY")


def ask_judge(args, work, jobs, letters=()):
    """{k: answer} to jobs {k: messages}: [text, finish_reason], "length" where it is cut at MAX_TOKENS; with letters,
    one of which is to be the answer, [(token, log-prob)] of the most likely first tokens.

    None where the endpoint refuses for ever, as a content filter does; see `ask_all`. Raises InputError where the first
    answers hold no letter.
    """
    return ask_all(JudgeEndpoint(args, letters), jobs, args.judge_requests, work, "judged")


def letter(token):
    """A token without the space before it, which some servers give as the tokenizer writes it: "Ġm", "▁m"."""
    return token.strip().lstrip("Ġ▁")


def ask_all(endpoint, jobs, requests, work, label):
    """{k: answer} to jobs {k: job}, asked with so many requests at a time.

    The answer is None where the endpoint refuses for ever; of more than one in five none is recorded, since the fault
    is elsewhere. Answers are recorded in the journal `label` of `work` as they come, so that a resumed run asks only
    for what is missing. Raises InputError where requests have failed, and before most are sent where none would be
    answered: they are sent one at a time until one is.
    """
    answers = dict(runs.read_journal(work, label))
    waiting, unanswered = [k for k in jobs if k not in answers], {}  # unanswered: {k: (how it ended, why)}
    pool = ThreadPoolExecutor(requests)

    def keep(k, answer):
        answers[k] = runs.pack(answer)
        runs.record([k, answer], work, label)

    def ask_one(k):
        how, found = endpoint.ask(jobs[k])
        with endpoint.lock:
            if how == "answered" or how == "no letter" and answers:  # a missing preference, as in the official tool
                keep(k, found)
            else:
                unanswered[k] = how, found

    try:
        while waiting and not endpoint.works and len(unanswered) < PROBES:
            pool.submit(ask_one, waiting.pop(0)).result()
        # of a resumed run: not where none was answered yet for another reason than that it is refused
        if endpoint.works or answers and all(how == "refused" for how, _ in unanswered.values()):
            futures = [pool.submit(ask_one, k) for k in waiting]
            for future in runs.progress(futures, "asking", common.Ranks(0, 1, None)):
                future.result()
    finally:  # on Ctrl-C too: what the requests that were sent have led to is still recorded
        endpoint.stop.set()
        pool.shutdown(cancel_futures=True)
        refused = [k for k, (how, _) in unanswered.items() if how == "refused"]
        for k in refused if answers and len(refused) <= max(PROBES, len(jobs) // 5) else ():
            keep(k, None)
        for k in [k for k, (how, _) in unanswered.items() if how == "no letter" and answers]:
            keep(k, unanswered.pop(k)[1])
    report_unanswered(endpoint, unanswered, len(jobs), len(jobs.keys() - answers.keys()), work)
    return answers


def report_unanswered(endpoint, unanswered, count, missing, work):
    """Raises InputError where `missing` of `count` jobs have no answer, else says how many were refused for ever."""
    output = str(work).removesuffix(".partial")
    if unanswered and all(how == "no letter" for how, _ in unanswered.values()):
        tokens = json.dumps([token for token, _ in next(iter(unanswered.values()))[1]], ensure_ascii=False)[:160]
        raise runs.InputError(f"{output}: {' and '.join(endpoint.letters)} are not among the most likely tokens of the "
                              f"first {len(unanswered)} answers, such as {tokens}: give a judge that begins with the "
                              "letter, without a thought, at a server that gives tokens as text")
    # the reason that matters most
    order = ("fault", "failed", "refused", "no letter")
    how, why = min(unanswered.values(), key=lambda end: order.index(end[0]), default=("", ""))
    if missing:
        check = f"check {endpoint.options}, OPENAI_API_KEY; " if how != "failed" else ""
        raise runs.InputError(f"{output}: {missing} of {count} have no answer ({why}): {check}the others are "
                              f"kept in {work}: rerun the command to ask only for the missing ones")
    if unanswered:
        print(f"{output}: {len(unanswered)} of {count} refused by the endpoint, so missing: {why}", flush=True)


class Endpoint:
    """An OpenAI-compatible endpoint, Azure's with ?api-version=. The key is in memory only.

    options: their names for errors, the URL's first. Subclasses define `body` and `read_choice`.
    """

    def __init__(self, options, url, path, timeout, retries, max_requests=None):
        self.options, option = options, options.split(",")[0]
        if huggingface_hub.is_offline_mode():
            raise runs.InputError(f"HF_HUB_OFFLINE: keeps the client from sending requests to {option}: unset it")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", self.key):  # the client's own error would show it
            raise runs.InputError("OPENAI_API_KEY: has a blank or a character outside ASCII: set it to the key alone")
        base, mark, version = url.partition("?")
        self.url = base.rstrip("/").removesuffix(path) + path + mark + version
        self.headers = {"api-key": self.key} if version else {"Authorization": f"Bearer {self.key}"}
        if version and huggingface_hub.constants.HF_DEBUG:
            raise runs.InputError("HF_DEBUG: makes the client print the header api-key: unset it")
        self.timeout, self.retries, self.max_requests = timeout, retries, max_requests
        self.works = False  # whether it has answered a request of this run
        self.limit = None  # which of LIMITS it takes, where it may ask for the other
        self.requests, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def ask(self, job):
        """("answered", the answer), ("no letter", an answer that holds none), or (how it ended, why there is none):
        "failed", may be answered another time; "refused", never will; "fault", nor will any other. What may be
        temporary is tried again; where each reply has a choice, but none an answer, it is refused."""
        retries, replied = 0, True
        while True:
            with self.lock:
                if self.stop.is_set() or self.requests == self.max_requests:
                    return "failed", f"--max-requests {self.max_requests} is reached"
                self.requests += 1
            body, pause, choice = self.body(job), min(60, PAUSE * 2 ** retries), None
            try:
                response = self.send("POST", self.url, json=body)
                if re.fullmatch(r"\d+(\.\d+)?", wait := response.headers.get("retry-after", "")):
                    pause = min(600, float(wait))
                status, found = read_reply(response, "choices")
                if status == 200:
                    choice = found[0]
                    how, found = self.read_choice(choice, body)
                elif self.limit and status == 400 and LIMITS[0] in body and LIMITS[1] in found:
                    self.limit = LIMITS[1]
                    continue
                else:
                    how = "failed" if status in RETRIED else "refused" if status in REFUSED else "fault"
            except Exception as error:  # many kinds: a timeout, a broken connection, a reply without an answer
                how, found = "failed", f"{type(error).__name__}: {error}"
            replied = replied and choice is not None
            if how in ("answered", "no letter"):
                self.works = self.works or how == "answered"
                return how, found
            if how == "fault":
                self.stop.set()
            if how != "failed" or retries == self.retries:
                return "refused" if replied and how == "failed" else how, self.shown(found)
            retries += 1
            self.stop.wait(pause)

    def send(self, method, url, **options):
        """The response to a request. A redirect is not followed: it could carry the key to another host."""
        return huggingface_hub.get_session().request(method, url, headers=self.headers, timeout=self.timeout,
                                                     follow_redirects=False, **options)

    def shown(self, text):
        """The beginning of what a server says, in one line. It may repeat the key."""
        return " ".join(text.replace(self.key, "***").split())[:160]

    def without_key(self, text):
        """An answer. A short key is a word such as EMPTY, which vLLM's users set, and may stand in any answer."""
        return text.replace(self.key, "***") if len(self.key) >= 16 else text


def read_reply(response, field):
    """(200, the reply's list `field`), or (an HTTP status, what is said), where the body has an error its own code.

    Proxies send such errors with HTTP 200; one without a code may be temporary, like a 500. Raises an Exception of any
    kind at a reply of another form.
    """
    if response.status_code != 200:
        return response.status_code, f"HTTP {response.status_code} {response.text}"
    reply = response.json()
    found = reply.get(field)
    error = reply.get("error") or (found[0].get("error") if found else reply)
    if found and not error:
        return 200, found
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if re.fullmatch(r"[45]\d\d", code) else 500, f"HTTP 200, error {error}"


class JudgeEndpoint(Endpoint):
    """Asked for a chat completion to messages."""

    def __init__(self, args, letters):
        super().__init__("--judge-url, --judge-model", args.judge_url, "/chat/completions", args.judge_timeout,
                         args.judge_retries, args.max_requests)
        self.model, self.letters, self.limit = args.judge_model, letters, LIMITS[0]

    def body(self, messages):
        options = dict(temperature=1, logprobs=True, top_logprobs=TOP_LOGPROBS) if self.letters else {"temperature": 0}
        return {"model": self.model, "messages": messages, self.limit: 1 if self.letters else MAX_TOKENS} | options

    def read_choice(self, choice, body):
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if finish in ("error", "abort"):
            return "failed", f"finish_reason {finish}"
        if text is None or finish == "content_filter":
            return "refused", f"no content, finish_reason {finish}"
        if not self.letters:
            text.encode()  # a ValueError for a lone surrogate, which cannot be written
            return "answered", [self.without_key(text), finish]
        tokens = (choice.get("logprobs") or {}).get("content")
        if not tokens:
            return "failed" if self.works else "fault", "the endpoint gave no log-probs"
        likely = tokens[0].get("top_logprobs") or []
        answer = [(self.without_key(top["token"]), float(top["logprob"])) for top in likely]
        if not all(logp < 0.1 for _, logp in answer):  # NaN too; 0.1 for an endpoint that rounds
            raise ValueError("the endpoint gave log-probs that are not log-probs")
        found = any(letter(token) in self.letters for token, _ in answer)
        return "answered" if found else "no letter", answer
