"""The small world: a synthetic help desk with a base model and a gold judge, all that a run on a laptop needs.

A customer writes about a thing. An answer is an opening, one or two offers and a closing. The first words of each
sentence say in what spirit it is meant: helpful (1), vague (0) or rude (-1). The gold judge knows every sentence that
can be said about a thing; a response is worth the mean value of its sentences. Any other sentence (malformed, or about
a part of another thing), and a repeated one, is worth -1. With --gold-length W the response is worth W more for each of
its words, a full stop being one: a judge that likes length a little, as Table 10's does.
"""

import contextlib
import itertools
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from support import records, runs
from support.models import save_model

PARTS = {
    "kettle": "lid cable spout handle", "bicycle": "chain saddle pedal brake", "lamp": "bulb shade switch socket",
    "radio": "dial aerial speaker battery", "guitar": "string neck bridge peg", "clock": "face spring bell pendulum",
    "camera": "lens strap shutter flash", "tent": "pole zip floor rope", "chair": "leg seat cushion armrest",
    "suitcase": "wheel lock pocket frame", "mixer": "bowl whisk gear cover", "heater": "coil fuse thermostat pipe",
    "printer": "roller cartridge drawer sensor", "vacuum": "hose filter bag brush", "fridge": "shelf door hinge seal",
    "piano": "key hammer bench soundboard"}
SPIRIT = {1: "we will gladly|we are happy to|of course we can|it is our pleasure to|we would love to|let us",
          0: "maybe we can|we might|one day we may|perhaps we could|if we have time we will|we can try to",
          -1: "we refuse to|do not ask us to|we are too busy to|nobody here will|we are not paid to|"
              "it is not our job to"}
OPENINGS = ["SPIRIT help you with your THING .",
            "SPIRIT look at your THING {today|tomorrow|this week} ."]
OFFERS = ["SPIRIT {clean|dry|oil} the PART {with care|for free|at once} .",
          "SPIRIT fix the PART in {five|ten|twenty} minutes .",
          "SPIRIT {send|bring|lend} you a new PART {today|tomorrow|this week} .",
          "SPIRIT show you how to {clean|dry|oil} the PART ."]
CLOSINGS = ["SPIRIT test it again {today|tomorrow|this week} .",
            "SPIRIT {call|write to} you again {today|tomorrow|this week} ."]
WRITERS = {"grumpy": (0.1, 0.3, 0.6), "tired": (0.3, 0.4, 0.3), "kind": (0.6, 0.3, 0.1)}  # shares of 1, 0, -1
PROMPT = ("my {old|new|small|big|red|blue|green|cheap|heavy|lovely} THING from "
          "{the market|the corner shop|my uncle|my sister|a friend|the big store|my office|the museum} "
          "{is broken|does not work|makes a noise|smells of smoke|fell down|stopped today} . "
          "{can you help|what can i do|any idea} ?")
SHAPE = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False)
SHAPES = {"llama": {}, "phi": {"intermediate_size": 256},  # scaled-down versions of the real differences
          "mistral": {"intermediate_size": 224, "num_key_value_heads": 1}}
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
                 "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def expand(template):
    """"a {b|c} d" -> ["a b d", "a c d"]"""
    parts = [part.split("|") if k % 2 else [part] for k, part in enumerate(re.split(r"\{(.*?)\}", template))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def known_sentences(thing):
    """{value: [openings, offers, closings] about the thing, each [[the sentences of a template], ...]}"""
    def fill(template, value):
        template = template.replace("THING", thing).replace("PART", "{%s}" % PARTS[thing].replace(" ", "|"))
        return expand(template.replace("SPIRIT", "{%s}" % SPIRIT[value]))
    return {value: [[fill(template, value) for template in templates] for templates in (OPENINGS, OFFERS, CLOSINGS)]
            for value in SPIRIT}


def write_answer(rng, sentences, writer=None):
    """An opening, one or two offers and a closing, all different: by that writer, or each by a random one of WRITERS.

    Sentences by one writer would depend on each other, and a pi_init that has learnt this judges worse later on.
    """
    said = []
    for kind in [0] + [1] * rng.randint(1, 2) + [2]:
        sentence = None
        while sentence is None or sentence in said:  # gold would punish a repetition
            [value] = rng.choices(list(sentences), WRITERS[writer or rng.choice(list(WRITERS))])
            sentence = rng.choice(rng.choice(sentences[value][kind]))
        said.append(sentence)
    return " ".join(said)


def make_world(args, folder, more_text=""):
    """Shuffled rows {"id", "prompt", "chosen", "rejected", "reference"}, as many as the options of 00_inputs.py need.

    Writes gold.json, sft.jsonl, sft_kind.jsonl and base/ into the folder. more_text: its words are in the base model's
    vocabulary as well. Raises InputError where the world has too few prompts.
    """
    sentences = {thing: known_sentences(thing) for thing in PARTS}
    gold = {thing: {sentence: value for value, kinds in sentences[thing].items() for kind in kinds for filled in kind
                    for sentence in filled} for thing in PARTS}
    if args.gold_length:
        gold["any thing"] = {"each word": args.gold_length}  # no word of a prompt has a blank in it
    runs.write_json(folder / "gold.json", gold)
    prompts = [(thing, text.replace("THING", thing)) for thing in PARTS for text in expand(PROMPT)]
    others = sum(args.prompt_sizes) + args.eval_size
    needed = others + (1 + args.seed_sample) * args.seed_size
    if needed + args.sft_size > len(prompts):
        raise runs.InputError(f"--source world: it has {len(prompts)} prompts, {needed + args.sft_size} are needed: "
                              "lower --seed-sample, --seed-size, --prompt-sizes, --eval-size or --sft-size")
    random.Random(args.seed).shuffle(prompts)

    rows = []
    for k, (thing, text) in enumerate(prompts[:needed]):
        rng = random.Random(f"{args.seed} {text}")  # the same whatever the sets' sizes
        prompt = records.as_messages(text)
        one = two = write_answer(rng, sentences[thing])
        while gold_score(gold, prompt, one) == gold_score(gold, prompt, two):  # at least once
            one, two = write_answer(rng, sentences[thing]), write_answer(rng, sentences[thing])
        rejected, chosen = sorted((one, two), key=lambda answer: gold_score(gold, prompt, answer))
        rows.append({"id": f"world-{k}", "prompt": prompt, "chosen": chosen, "rejected": rejected,
                     "reference": write_answer(rng, sentences[thing], "kind")})

    # SFT takes its prompts from the end, so that they are the same whatever the sets' sizes
    write_examples(prompts[needed:][::-1][:args.sft_size], sentences, args.seed, folder)
    texts = [text for _, text in prompts] + [sentence for thing in PARTS for sentence in gold[thing]] + [more_text]
    write_base_model(sorted({word for text in texts for word in text.split()}), args, folder / "base")
    # `split` takes the seed from the end, after skipping the earlier samples there: this sample goes in front of these
    sample = needed - args.seed_size
    return rows[:others] + rows[sample:] + rows[others:sample]


def write_examples(prompts, sentences, seed, folder):
    """sft.jsonl: an answer to each prompt, (thing, text). sft_kind.jsonl: one by a kind writer to a third of them."""
    examples, kind = [], []
    for k, (thing, text) in enumerate(prompts):
        rng, example = random.Random(f"{seed} sft {text}"), {"id": f"sft-{k}", "prompt": text}
        examples.append(example | {"response": write_answer(rng, sentences[thing])})
        if rng.random() < 1 / len(WRITERS):
            kind.append(example | {"response": write_answer(rng, sentences[thing], "kind")})
    runs.write_jsonl(folder / "sft.jsonl", examples)
    runs.write_jsonl(folder / "sft_kind.jsonl", kind)


def write_base_model(words, args, folder):
    """A model of the kind args.shape, its random weights decided by args.seed, with a tokenizer of whole words."""
    special = ["<eos>", "<bos>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(special + words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                        pad_token="<eos>", additional_special_tokens=special[3:],
                                        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE)
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(args.shape, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                                  **SHAPE | SHAPES[args.shape])
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder)


def read_gold(path):
    """{thing: {sentence: value}}, with --gold-length W also {"any thing": {"each word": W}}, as make_world writes it.

    Raises InputError where the file is anything else.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, runs.InputError):  # one message for all of them
        gold = runs.parse_json(Path(path).read_text(encoding="utf-8-sig"), path)
        values = [value for known in gold.values() for value in known.values()]
        if values and all(type(value) in (int, float) and abs(value) <= 1 for value in values):
            return gold
    raise runs.InputError(f"{path}: is not a gold judge {{thing: {{sentence: value in [-1, 1]}}}}: "
                          "give the gold.json that 00_inputs.py wrote")


def gold_values(gold, prompt, text):
    """The value of each sentence of a response: 1, 0, -1; None where it is malformed, off the topic or a repetition.

    prompt: messages; gold: {thing: {sentence: value}}
    """
    known = next((gold[word] for word in prompt[-1]["content"].split() if word in gold), {})
    sentences = [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", text) if s.strip()]  # the last may be unfinished
    return [known.get(s) if sentences.index(s) == k else None for k, s in enumerate(sentences)]


def gold_score(gold, prompt, text):
    """The mean value of a response's sentences (-1 for one without a value, and for no sentence), plus W a word."""
    values = [-1 if value is None else value for value in gold_values(gold, prompt, text)] or [-1]
    return sum(values) / len(values) + gold.get("any thing", {}).get("each word", 0) * len(text.split())
