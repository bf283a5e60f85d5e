"""Who is asked to judge: an OpenAI-compatible endpoint, or a model on this machine."""

import argparse
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

import common
import runs
from extras.answers import Sampler

FREE = ("output", "judge_requests", "judge_timeout", "judge_retries", "max_requests")  # options that change no answer
TOP_LOGPROBS = 5  # as many as AlpacaEval 2.0 asks for
MAX_TOKENS = 2048  # of an answer that is a text, as in FastChat
RETRIED = {None, 408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may be temporary; None: another failure
PAUSE = 1.0  # seconds before the first retry, doubled for each further one; Retry-After takes precedence


def ask_judge(args, partial, jobs, logprobs):
    """{k: answer} to jobs {k: messages}: a text; with logprobs, [(token, log-prob)] of the most likely first tokens.

    Answers are recorded in `partial` as they come, so that a resumed run asks only for what is missing. Raises
    InputError where requests have failed.
    """
    if not args.judge_url:
        return ask_local_model(args, partial, jobs, logprobs)
    answers = dict(runs.read_journal(partial, "judged"))
    endpoint, pool = Endpoint(args, logprobs), ThreadPoolExecutor(args.judge_requests)
    with runs.journal(partial, "judged") as record:
        def work(k):
            answer, why_not = endpoint.ask(jobs[k])
            if not why_not:
                with endpoint.lock:
                    answers[k] = answer
                    record([k, answer])
            return why_not

        try:
            futures = [pool.submit(work, k) for k in jobs if k not in answers]
            ended = [future.result() for future in common.progress(futures, "judging", common.Ranks(0, 1, None))]
        finally:  # on Ctrl-C too: answers to requests that were sent are still recorded
            endpoint.stop.set()
            pool.shutdown(cancel_futures=True)
    failed = [why_not for why_not in ended if why_not]
    if failed:
        raise runs.InputError(f"{args.output}: {len(failed)} of {len(jobs)} have no answer ({failed[0]}): the others "
                              f"are kept in {partial}: rerun the command to ask only for the missing ones")
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
    """An OpenAI-compatible endpoint. The key is in memory only."""

    def __init__(self, args, logprobs):
        if huggingface_hub.is_offline_mode():
            raise runs.InputError("HF_HUB_OFFLINE: keeps the client from sending requests to --judge-url: unset it")
        # a placeholder where there is no key: the client would send the Hub's token instead
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", self.key):  # the client's own error would show it
            raise runs.InputError("OPENAI_API_KEY: has a blank or a character outside ASCII: set it to the key alone")
        self.client = huggingface_hub.InferenceClient(base_url=args.judge_url, api_key=self.key,
                                                      timeout=args.judge_timeout)
        self.args, self.logprobs = args, logprobs
        self.requests, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def ask(self, messages):
        """(answer, None), or (None, why there is none). What may be temporary is tried again."""
        options = (dict(max_tokens=1, temperature=1, logprobs=True, top_logprobs=TOP_LOGPROBS) if self.logprobs else
                   dict(max_tokens=MAX_TOKENS, temperature=0))
        for attempt in range(self.args.judge_retries + 1):
            with self.lock:
                if self.stop.is_set() or self.requests == self.args.max_requests:
                    return None, f"--max-requests {self.args.max_requests} is reached"
                self.requests += 1
            status, pause = None, min(60, PAUSE * 2 ** attempt)
            try:
                return self.read(self.client.chat_completion(messages, model=self.args.judge_model, **options)), None
            except HfHubHTTPError as error:
                status, wait = error.response.status_code, error.response.headers.get("retry-after", "")
                why_not = f"HTTP {status} {error.server_message or ''}"
                if re.fullmatch(r"\d+(\.\d+)?", wait):
                    pause = min(600, float(wait))
            except Exception as error:  # many kinds: a timeout, a broken connection, a reply without an answer
                why_not = f"{type(error).__name__}: {error}"
            if status not in RETRIED:
                break
            if attempt < self.args.judge_retries:
                self.stop.wait(pause)
        return None, " ".join(why_not.replace(self.key, "***").split())[:160]  # a server may repeat the key

    def read(self, reply):
        """The answer in a chat completion. Raises an Exception of any kind where it has none."""
        choice = reply.choices[0]
        if not self.logprobs:
            choice.message.content.encode()  # a ValueError for a lone surrogate, which cannot be written
            return choice.message.content.replace(self.key, "***")
        if choice.logprobs is None:
            raise ValueError("the endpoint gave no log-probs")
        answer = [(top.token.replace(self.key, "***"), float(top.logprob))
                  for top in choice.logprobs.content[0].top_logprobs]
        if not all(logp < 0.1 for _, logp in answer):  # NaN too; 0.1 for an endpoint that rounds
            raise ValueError("the endpoint gave log-probs that are not log-probs")
        return answer
