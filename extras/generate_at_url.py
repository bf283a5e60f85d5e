"""02_generate.py at a running server of pi_{t-1}, vLLM or SGLang (with return_token_ids). No GPU is needed here.

    vllm serve pi_0 --dtype bfloat16
    python extras/generate_at_url.py --model pi_0 --url http://localhost:8000/v1 --input prompts_1.jsonl \\
        --output responses_1.jsonl

Reads and writes what 02_generate.py does. --model needs its configs and tokenizer here, not its weights.

The server is sent token ids and, for each response, a seed of (seed, prompt id, sample), so a resumed run asks for what
is missing as the first would have. But how a server rounds depends on its load, and SGLang takes seeds only with
--enable-deterministic-inference: two runs may differ. Only the model's name identifies the weights.

Departs from the paper: as 02_generate.py. A prompt of which the server refuses a response for ever is dropped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from extras.endpoint import Endpoint, NoAnswer, ask_all, endpoint_url, read_reply
from support import chat, data, models, runs

FREE = ("output", "url", "url_requests")  # options that change no response
TIMEOUT, RETRIES = 600.0, 5  # seconds until a request has failed, and how often it is sent again


def parse_args():
    parser = runs.Parser(description="Sample responses from pi_{t-1} for the prompts X_t, at a server.")
    add = parser.add_argument
    # the server
    add("--url", type=endpoint_url, required=True,
        help="a server of --model, http://host:8000/v1; its key is read from OPENAI_API_KEY")
    add("--url-model", help="the model's name there (default: --model)")
    add("--url-requests", type=runs.positive, default=64, help="requests at a time")
    # as in 02_generate.py
    add("--model", required=True, help="pi_{t-1}")
    add("--input", required=True, help="X_t: JSON Lines of id, prompt")
    add("--output", required=True, help="JSON Lines of id, prompt, prompt_ids, responses")
    chat.add_options(add)
    add("--samples", type=runs.number(int, 2), default=2, help="responses to each prompt")
    add("--temperature", type=runs.nonnegative, default=0.7, help="0: greedy")
    add("--max-new-tokens", type=runs.positive, default=300)
    add("--on-length-limit", choices=("eos", "open", "drop"), default="eos",
        help="what to do with a response without an EOS: append one, keep it so, drop it")
    add("--seed", type=runs.natural, default=0, help="random seed")
    add("--max-prompt-length", type=runs.positive, default=1024, help="longer prompts are dropped")
    args = parser.parse_args()
    runs.in_one_process("--url: the server samples, so this")
    args.url_model = args.url_model or args.model
    return args


class SamplingEndpoint(Endpoint):
    """Asked for a response's token ids, given the prompt's: vLLM from 0.10.2 on, or SGLang, which has its fields too.

    Raises InputError where the server does not list the model --url-model.
    """

    def __init__(self, args, eos):
        super().__init__("--url", args.url, "/completions", TIMEOUT, RETRIES, args.url_requests)
        self.eos, self.vocabulary = eos, models.load_config(args.model).get_text_config().vocab_size
        # what is left open is the server's to decide: vLLM takes it from the model's generation config
        self.fixed = {"model": args.url_model, "max_tokens": args.max_new_tokens, "temperature": args.temperature,
                      "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
                      "frequency_penalty": 0, "stop_token_ids": eos, "return_token_ids": True}
        try:
            names = [model["id"] for model in read_reply(self.send("GET", "/models"), "data")]
        except Exception as error:  # as in `ask`
            why = error.args[1] if isinstance(error, NoAnswer) else f"{type(error).__name__}: {error}"
            raise runs.InputError(f"--url: cannot list its models ({self.shown(why)}): give the address of a running "
                                  "server, .../v1, and its key in OPENAI_API_KEY")
        if args.url_model not in names:  # SGLang answers to any name
            raise runs.InputError(f"--url: serves {self.shown(str(names))}, not {args.url_model}: serve --model there, "
                                  "or give its name there with --url-model")

    def body(self, job):
        prompt, seed = job
        return self.fixed | {"prompt": list(prompt), "seed": seed}

    def read_choice(self, choice, body):
        """The answer is [token ids, "eos" or "length"], as `common.sample_responses` has it: with the EOS."""
        ids, finish = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise NoAnswer("failed" if self.works else "fault", "no token_ids: it takes a server that knows "
                           "return_token_ids, vLLM from 0.10.2 on or a recent SGLang")
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise NoAnswer("fault", "the server has put another prompt in place of the one sent")
        if foreign := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise NoAnswer("fault", f"token id {foreign[0]} is not in the vocabulary of --model, {self.vocabulary}")
        if finish not in ("stop", "length"):
            raise NoAnswer("failed", f"finish_reason {finish}")
        stop = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's name, SGLang's
        if finish == "stop" and stop in self.eos:  # a server may keep it to itself; these two do not
            ids = [*ids, stop]
        if end := next((k for k, i in enumerate(ids, 1) if i in self.eos), None):
            return [ids[:end], "eos"]
        if finish == "stop":
            raise NoAnswer("fault", f"the server stops at token {ids[-1:]}, which is no EOS of --model, {self.eos}")
        if len(ids) != body["max_tokens"]:
            raise NoAnswer("refused", f"{len(ids)} tokens, not --max-new-tokens: the server's context is too short")
        return [ids, "length"]


def main():
    args = parse_args()
    work = runs.open_output(args, "model", "input", free=FREE)
    tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
    rows, counts = data.read_prompts(args.input, tokenizer, args.max_prompt_length)
    eos = chat.eos_ids(args.model, tokenizer)
    jobs = [(row["prompt_ids"], int(2 ** 31 * common.uniforms(args.seed, row["id"], k, 1)[0]))
            for k in range(args.samples) for row in rows]  # so the first requests are about different prompts
    answers = ask_all(SamplingEndpoint(args, eos), dict(enumerate(jobs)), work)
    sampled = [[answers[k] for k in range(i, len(jobs), len(rows))] for i in range(len(rows))]
    kept = [i for i, samples in enumerate(sampled) if None not in samples]  # none refused for ever
    counts["prompts refused by the server"] = len(rows) - len(kept)
    made = data.make_records(args, [rows[i] for i in kept], [sampled[i] for i in kept], tokenizer, eos, counts)
    runs.write_jsonl(work / "responses", made)
    runs.close_output(args, work, work / "responses", counts)


if __name__ == "__main__":
    runs.run(main)
