"""A model's answers to a benchmark, and what AlpacaEval 2.0 and MT-Bench share besides."""

import re
from pathlib import Path

import numpy as np

import common
from support import chat, model_checks, models, runs


class Sampler:
    """The model --model and what sampling from it takes: its tokenizer, the ids that end a response, the ranks."""

    def __init__(self, args):
        self.args, self.ranks = args, common.start_ranks()
        self.tokenizer = chat.load_tokenizer(args.model, args.tokenizer, args.chat_template)
        self.eos = chat.eos_ids(args.model, self.tokenizer)
        self.model = models.load_model(args.model, self.ranks.device, common.scoring_dtype(self.ranks.device))
        self.counts = {}  # for the summary

    def prompt_ids(self, conversations, where):
        """The token ids of each conversation (a list of messages). where: the file, for errors"""
        return [chat.prompt_ids(self.tokenizer, messages, f"{where}, row {k}")
                for k, messages in enumerate(conversations)]

    def check_room(self, prompts):
        """Raises InputError where a prompt (a list of ids) leaves none of the model's positions for an answer."""
        model_checks.check_limits("the prompts", ((k, ids, []) for k, ids in enumerate(prompts)), self.model,
                                  "--max-prompt-length (of sample), or shorten that prompt", 1)

    def generate_answers(self, work, prompts, keys, temperatures=None, label="sampling"):
        """[(text, "eos" or "length", token ids)] for prompts (lists of ids).

        An answer has at most --max-new-tokens, and no more than its prompt leaves of the model's positions.
        keys: decide the samples, with --seed; temperatures: of each prompt, else --temperature; label: of the journal
        """
        args, batches = self.args, []
        positions = model_checks.count_positions(self.model)
        limits = [max(0, min(args.max_new_tokens, positions - len(prompt))) for prompt in prompts]
        if short := sum(limit < args.max_new_tokens for limit in limits):
            name = "answers with less room than --max-new-tokens"
            self.counts[name] = self.counts.get(name, 0) + short
        kinds = list(zip(temperatures or [args.temperature] * len(prompts), limits))
        for kind in sorted(set(kinds)):  # a batch has one temperature and one limit
            rows = [i for i in range(len(prompts)) if kinds[i] == kind]
            lengths = [len(prompts[i]) for i in rows]
            batches += [[rows[j] for j in batch] for batch in common.length_batches(lengths, args.micro_batch_size)]

        def generate(batch):
            temperature, limit = kinds[batch[0]]
            if limit == 0:
                return [("", "length", [])] * len(batch)
            u = np.array([[common.uniforms(args.seed, keys[i], 0, limit)] for i in batch])
            sampled = common.sample_responses(self.model, [prompts[i] for i in batch], u, temperature, limit, self.eos)
            return [(chat.response_text(self.tokenizer, prompts[i], ids), finish, ids)
                    for i, [(ids, finish)] in zip(batch, sampled)]

        answers = common.map_batches(generate, batches, work, self.ranks, label)
        return [answers[i] for i in range(len(prompts))]


def is_string(value):
    "a string"
    return isinstance(value, str)


def write_output(args, work, value, counts, write=runs.write_json):
    """Make --output, a file of this value."""
    write(work / "made", value)
    runs.close_output(args, work, work / "made", counts)


def fill(text, fields):
    """Replace each {name} by that field, in one pass: braces inside an answer stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), text)


def file_name(name):
    """A model's name as a file name."""
    return re.sub(r"[^\w.-]+", "_", Path(name).name)
