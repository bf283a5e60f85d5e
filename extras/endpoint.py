"""Who is asked to judge: an OpenAI-compatible endpoint, or a model on this machine."""

import argparse
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub

import common
import runs
from extras.answers import Sampler

FREE = ("output", "judge_requests", "judge_timeout", "judge_retries", "max_requests")  # options that change no answer
TOP_LOGPROBS = 5  # as many as AlpacaEval 2.0 asks for
MAX_TOKENS = 2048  # of an answer that is a text, as in FastChat
LIMITS = ("max_tokens", "max_completion_tokens")  # its name, and its name for OpenAI's newer models
RETRIED = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may be temporary
REFUSED = {400, 413, 422}  # those that may be about one request; any other is about all
PROBES = 5  # requests without an answer before the first that has one: then the rest is not sent
PAUSE = 1.0  # seconds before the first retry, doubled for each further one; Retry-After takes precedence


def ask_judge(args, partial, jobs, logprobs):
    """{k: answer} to jobs {k: messages}: a text; with logprobs, [(token, log-prob)] of the most likely first tokens.

    The answer is None where the endpoint refuses for ever, as a content filter does; of more than one in five none is
    recorded, since the fault is elsewhere. Answers are recorded in `partial` as they come, so that a resumed run asks
    only for what is missing. Raises InputError where requests have failed, and before most are sent where none would be
    answered: they are sent one at a time until one is.
    """
    if not args.judge_url:
        return ask_local_model(args, partial, jobs, logprobs)
    answers = dict(runs.read_journal(partial, "judged"))
    waiting, unanswered = [k for k in jobs if k not in answers], {}  # unanswered: {k: (how it ended, why)}
    endpoint, pool = Endpoint(args, logprobs), ThreadPoolExecutor(args.judge_requests)
    with runs.journal(partial, "judged") as record:
        def keep(k, answer):
            answers[k] = answer
            record([k, answer])

        def work(k):
            how, found = endpoint.ask(jobs[k])
            with endpoint.lock:
                if how == "answered":
                    keep(k, found)
                else:
                    unanswered[k] = how, found

        try:
            while waiting and not endpoint.works and len(unanswered) < PROBES:
                pool.submit(work, waiting.pop(0)).result()
            if answers:
                futures = [pool.submit(work, k) for k in waiting]
                for future in common.progress(futures, "judging", common.Ranks(0, 1, None)):
                    future.result()
        finally:  # on Ctrl-C too: what the requests that were sent have led to is still recorded
            endpoint.stop.set()
            pool.shutdown(cancel_futures=True)
            refused = [k for k, (how, _) in unanswered.items() if how == "refused"]
            for k in refused if answers and len(refused) <= max(PROBES, len(jobs) // 5) else ():
                keep(k, None)
    # the reason that matters most
    how, why = min(unanswered.values(), key=lambda end: ("fault", "failed", "refused").index(end[0]), default=("", ""))
    if missing := len(jobs.keys() - answers.keys()):
        check = "check --judge-url, --judge-model, OPENAI_API_KEY; " if how != "failed" else ""
        raise runs.InputError(f"{args.output}: {missing} of {len(jobs)} have no answer ({why}): {check}the others are "
                              f"kept in {partial}: rerun the command to ask only for the missing ones")
    if unanswered:
        print(f"{args.output}: {len(unanswered)} of {len(jobs)} refused by the judge, so missing: {why}", flush=True)
    return answers


def ask_local_model(args, partial, jobs, logprobs):
    """As `ask_judge`, of the model --judge-model on this machine."""
    greedy = {"temperature": 0, "max_new_tokens": MAX_TOKENS, "seed": 0}  # the seed then decides nothing
    sampler = Sampler(argparse.Namespace(**vars(args) | greedy), args.judge_model)
    prompts = sampler.prompt_ids(jobs.values(), "the judging prompts")
    if logprobs:
        return dict(zip(jobs, sampler.most_likely(partial, prompts, TOP_LOGPROBS)))
    answers = sampler.generate_answers(partial, prompts, list(jobs), label="judging")
    return {k: text for k, (text, _) in zip(jobs, answers)}


class Endpoint:
    """An OpenAI-compatible endpoint, Azure's with ?api-version=. The key is in memory only."""

    def __init__(self, args, logprobs):
        if huggingface_hub.is_offline_mode():
            raise runs.InputError("HF_HUB_OFFLINE: keeps the client from sending requests to --judge-url: unset it")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", self.key):  # the client's own error would show it
            raise runs.InputError("OPENAI_API_KEY: has a blank or a character outside ASCII: set it to the key alone")
        base, mark, version = args.judge_url.partition("?")
        self.url = base.rstrip("/").removesuffix("/chat/completions") + "/chat/completions" + mark + version
        self.headers = {"api-key": self.key} if version else {"Authorization": f"Bearer {self.key}"}
        if version and huggingface_hub.constants.HF_DEBUG:
            raise runs.InputError("HF_DEBUG: makes the client print the header api-key: unset it")
        self.args, self.logprobs, self.limit = args, logprobs, LIMITS[0]
        self.works = False  # whether it has answered a request of this run
        self.requests, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def ask(self, messages):
        """("answered", the answer), or (how it ended, why there is none): "failed", may be answered another time;
        "refused", never will; "fault", nor will any other. What may be temporary is tried again; where there is
        always a reply, but without an answer, it is refused."""
        retries = 0
        while True:
            with self.lock:
                if self.stop.is_set() or self.requests == self.args.max_requests:
                    return "failed", f"--max-requests {self.args.max_requests} is reached"
                self.requests += 1
            limit, pause, replied = self.limit, min(60, PAUSE * 2 ** retries), False
            try:
                response = self.post(messages, limit)
                if response.status_code == 400 and limit == LIMITS[0] and LIMITS[1] in response.text:
                    self.limit = LIMITS[1]
                    continue
                if re.fullmatch(r"\d+(\.\d+)?", wait := response.headers.get("retry-after", "")):
                    pause = min(600, float(wait))
                replied = response.status_code == 200 and self.works
                how, found = self.read(response)
            except Exception as error:  # many kinds: a timeout, a broken connection, a reply without an answer
                how, found = "failed", f"{type(error).__name__}: {error}"
            if how == "answered":
                self.works = True
                return how, found
            if how == "fault":
                self.stop.set()
            if how != "failed" or retries == self.args.judge_retries:
                how = "refused" if replied else how
                return how, " ".join(found.replace(self.key, "***").split())[:160]  # a server may repeat the key
            retries += 1
            self.stop.wait(pause)

    def post(self, messages, limit):
        """The response to a request. A redirect is not followed: it could carry the key to another host."""
        options = dict(temperature=1, logprobs=True, top_logprobs=TOP_LOGPROBS) if self.logprobs else {"temperature": 0}
        body = {"model": self.args.judge_model, "messages": messages, limit: 1 if self.logprobs else MAX_TOKENS}
        return huggingface_hub.get_session().post(self.url, json=body | options, headers=self.headers,
                                                  timeout=self.args.judge_timeout, follow_redirects=False)

    def read(self, response):
        """As `ask`. Raises an Exception of any kind at a reply without an answer, which another try may have."""
        status = response.status_code
        if status != 200:
            how = "failed" if status in RETRIED else "refused" if status in REFUSED else "fault"
            return how, f"HTTP {status} {response.text}"
        choice = response.json()["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if text is None or finish == "content_filter":
            return "refused", f"no content, finish_reason {finish}"
        if not self.logprobs:
            text.encode()  # a ValueError for a lone surrogate, which cannot be written
            return "answered", text.replace(self.key, "***")
        tokens = (choice.get("logprobs") or {}).get("content")
        if not tokens:
            return "failed" if self.works else "fault", "the endpoint gave no log-probs"
        answer = [(top["token"].replace(self.key, "***"), float(top["logprob"])) for top in tokens[0]["top_logprobs"]]
        if not all(logp < 0.1 for _, logp in answer):  # NaN too; 0.1 for an endpoint that rounds
            raise ValueError("the endpoint gave log-probs that are not log-probs")
        return "answered", answer
