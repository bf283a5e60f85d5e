"""Algorithm 1's inputs: the seed preferences D_0 and the prompt sets X_1 ... X_T, disjoint from it and each other.

Sources
    ultrafeedback  argilla/ultrafeedback-binarized-preferences-cleaned, from the hub (Section 5.1)
    a file         JSON, JSON Lines or Parquet, with prompt, chosen, rejected as texts or as lists of messages
    world          a small synthetic world, with a base model to go with it: all that a run on a laptop needs

Writes a folder: seed.jsonl        {"id", "prompt", "chosen", "rejected"}: the only labels that SPA sees
                 prompts_t.jsonl   {"id", "prompt"}
                 eval.jsonl        {"id", "prompt", "reference"}: a response to compare with, where the source has one
                 all_gold.jsonl    with --all-gold: the labels of the seed and of all prompts, for the 100 % rows
       world also: base/ (a model with random weights), sft.jsonl {"id", "prompt", "response"}, gold.json (its judge),
                 sft_kind.jsonl   those of sft.jsonl by kind writers: what no preference taught, for Figure 4

    python 00_inputs.py --source ultrafeedback --output data
    python 00_inputs.py --source my.jsonl --seed-size 500 --prompt-sizes 1000 2000 --output data

Departs from the paper: rows that repeat a prompt are dropped, so that no X_i shares a prompt with another set, and so
are rows of UltraFeedback with an empty answer.
"""

import hashlib
import itertools
import json
import random
import re
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import common

# ---------------------------------------------------------------------------------------------
# The small world: a help desk. A customer writes about a thing, and an answer is an opening, one or two offers and a
# closing. One word of each sentence says in what spirit it is meant: helpful (1), vague (0) or rude (-1). The gold
# judge knows every sentence that can be said about a thing; a response is worth the mean of its sentences, and one that
# is none of them (malformed, or about a part of another thing), or is said twice, is worth -1.

PARTS = {
    "kettle": "lid cable spout handle", "bicycle": "chain saddle pedal brake", "lamp": "bulb shade switch socket",
    "radio": "dial aerial speaker battery", "guitar": "string neck bridge peg", "clock": "face spring bell pendulum",
    "camera": "lens strap shutter flash", "tent": "pole zip floor rope", "chair": "leg seat cushion armrest",
    "suitcase": "wheel lock pocket frame", "mixer": "bowl whisk gear cover", "heater": "coil fuse thermostat pipe",
    "printer": "roller cartridge drawer sensor", "vacuum": "hose filter bag brush", "fridge": "shelf door hinge seal",
    "piano": "key hammer bench soundboard"}
SPIRIT = {1: "gladly|kindly|happily|cheerfully", 0: "maybe|perhaps|possibly|somehow",
          -1: "never|hardly|grudgingly|angrily"}
OPENINGS = ["i SPIRIT {read|hear} about your THING .",
            "we SPIRIT help people with a THING ."]
OFFERS = ["we SPIRIT {clean|wipe|dry|oil} the PART {with a cloth|with warm water|once a week} .",
          "we SPIRIT fix the PART in {five|ten|twenty} minutes .",
          "we SPIRIT {send|bring|lend} you a new PART {today|tomorrow|this week} .",
          "i SPIRIT show you how to {clean|wipe|dry|oil} the PART .",
          "you can SPIRIT leave the PART with us {today|tomorrow|this week} ."]
CLOSINGS = ["i SPIRIT hope the THING works again {today|tomorrow|this week} .",
            "i SPIRIT wish you a good {day|week|year} with it ."]
WRITERS = {"grumpy": (0.1, 0.3, 0.6), "tired": (0.3, 0.4, 0.3), "kind": (0.6, 0.3, 0.1)}  # shares of 1, 0, -1
PROMPT = ("my {old|new|small|big|red|blue|green|cheap|heavy|lovely} THING from "
          "{the market|the corner shop|my uncle|my sister|a friend|the big store|my office|the museum} "
          "{is broken|does not work|makes a noise|smells of smoke|fell down|stopped today} . "
          "{can you help|what can i do|any idea} ?")
SHAPE = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False)
SHAPES = {"llama": {}, "phi": {"intermediate_size": 512},  # what tells these kinds apart in large tells them here
          "mistral": {"intermediate_size": 448, "num_key_value_heads": 1}}
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
                 "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def expand(template):
    """"a {b|c} d" -> ["a b d", "a c d"]"""
    parts = [part.split("|") if k % 2 else [part] for k, part in enumerate(re.split(r"\{(.*?)\}", template))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def known_sentences(thing, value):
    """[for each kind of sentence [for each template [all it can say about the thing in that spirit]]]"""
    def fill(template):
        template = template.replace("THING", thing).replace("PART", "{%s}" % PARTS[thing].replace(" ", "|"))
        return expand(template.replace("SPIRIT", "{%s}" % SPIRIT[value]))
    return [[fill(template) for template in templates] for templates in (OPENINGS, OFFERS, CLOSINGS)]


def write_answer(rng, sentences, writer):
    """An opening, one or two offers and a closing, all different. sentences: {value: known_sentences}"""
    said = []
    for kind in [0] + [1] * rng.randint(1, 2) + [2]:
        sentence = None
        while sentence is None or sentence in said:
            [value] = rng.choices(list(sentences), WRITERS[writer])
            sentence = rng.choice(rng.choice(sentences[value][kind]))
        said.append(sentence)
    return " ".join(said)


def read_world(args, folder):
    """Rows as of a preference data set, shuffled, each prompt answered by two random writers and labelled by gold.

    Also writes gold.json, sft.jsonl and base/ into the folder.
    """
    sentences = {thing: {value: known_sentences(thing, value) for value in SPIRIT} for thing in PARTS}
    gold = {thing: {sentence: value for value, kinds in by_value.items() for kind in kinds for filled in kind
                    for sentence in filled} for thing, by_value in sentences.items()}
    common.write_json(folder / "gold.json", gold)
    prompts = [(thing, text.replace("THING", thing)) for thing in PARTS for text in expand(PROMPT)]
    needed = args.seed_size + sum(args.prompt_sizes) + args.eval_size
    if needed + args.sft_size > len(prompts):
        raise common.InputError(f"the world has {len(prompts)} prompts, {needed + args.sft_size} are asked for: "
                                "lower --seed-size, --prompt-sizes, --eval-size or --sft-size")
    random.Random(args.seed).shuffle(prompts)

    def answer(rng, thing, writer=None):
        return write_answer(rng, sentences[thing], writer or rng.choice(list(WRITERS)))

    def label(rng, thing, prompt):
        one = two = answer(rng, thing)
        while common.gold_score(gold, prompt, one) == common.gold_score(gold, prompt, two):
            one, two = answer(rng, thing), answer(rng, thing)
        better = common.gold_score(gold, prompt, one) > common.gold_score(gold, prompt, two)
        return (one, two) if better else (two, one)

    rows = []
    for k, (thing, text) in enumerate(prompts[:needed]):
        rng, prompt = random.Random(f"{args.seed} {text}"), common.as_messages(text)  # whatever the sizes of the sets
        chosen, rejected = label(rng, thing, prompt)
        rows.append({"id": f"world-{k}", "prompt": prompt, "chosen": chosen, "rejected": rejected,
                     "reference": answer(rng, thing, "kind")})
    examples = []
    for k, (thing, text) in enumerate(reversed(prompts[needed:][-args.sft_size:] if args.sft_size else [])):
        rng = random.Random(f"{args.seed} sft {text}")
        writer = rng.choice(list(WRITERS))
        examples.append((writer, {"id": f"sft-{k}", "prompt": text, "response": answer(rng, thing, writer)}))
    common.write_jsonl(folder / "sft.jsonl", (example for _, example in examples))
    common.write_jsonl(folder / "sft_kind.jsonl", (example for writer, example in examples if writer == "kind"))
    texts = [text for _, text in prompts] + [sentence for known in gold.values() for sentence in known]
    if args.judge_words:
        texts += [common.judging_prompt(common.as_messages(""), "", "")[0]["content"], *common.LETTERS]
    write_base_model(sorted({word for text in texts for word in text.split()}), args, folder / "base")
    return rows


def write_base_model(words, args, folder):
    """A model with random weights and a tokenizer of whole words, as an ordinary Hugging Face folder."""
    special = ["<eos>", "<bos>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(special + words)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                        pad_token="<eos>", additional_special_tokens=special[3:],
                                        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE)
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(args.shape, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                                  **SHAPE | SHAPES[args.shape])
    common.save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder)


# ---------------------------------------------------------------------------------------------
# Preference data sets


def read_table(source):
    """The rows of UltraFeedback or of a file by number, read when asked for, and where(k): where the k-th stands.

    Only a JSON array is held in memory.
    """
    if source == "ultrafeedback":
        from datasets import load_dataset  # slow to import, and only needed here
        name = "argilla/ultrafeedback-binarized-preferences-cleaned"
        try:
            rows = load_dataset(name, split="train").filter(
                lambda row: all(a_preference_text(row[key]) for key in ("chosen", "rejected")))
            return rows, lambda k: f"{name}, row {k} of those with two answers"
        except Exception as error:
            raise common.InputError(f"{name}: cannot be loaded ({type(error).__name__}): get online, or download it "
                                    "and give its Parquet file as --source")
    try:
        if source.endswith(".parquet"):
            from datasets import Dataset
            return Dataset.from_parquet(source), lambda k: f"{source}, row {k}"
        lines = Lines(source)
        if lines.is_array():
            rows = common.parse_json(Path(source).read_text(encoding="utf-8-sig"), source)
            return rows, lambda k: f"{source}, row {k}"
    except common.InputError:
        raise
    except Exception as error:
        raise common.InputError(f"{source}: cannot be read ({type(error).__name__}): --source is ultrafeedback, world, "
                                "or a JSON, JSON Lines or Parquet file")
    return lines, lines.where


class Lines:
    """The rows of a JSON Lines file by number. Held of each are its line's number and where in the file it begins."""

    def __init__(self, path):
        self.path, self.file, self.numbers, self.starts = path, open(path, "rb"), array("q"), array("q")
        start = 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                self.numbers.append(number)
                self.starts.append(start)
            start += len(line)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, k):
        self.file.seek(self.starts[k])
        try:
            return common.parse_json(self.file.readline().decode("utf-8-sig").strip(), self.where(k))
        except UnicodeDecodeError:
            raise common.InputError(f"{self.where(k)}: not in UTF-8: give JSON Lines in UTF-8")

    def where(self, k):
        return f"{self.path}:{self.numbers[k]}"

    def is_array(self):
        """Whether the file is one JSON array, not lines."""
        self.file.seek(self.starts[0] if self.starts else 0)
        return self.file.readline().decode("utf-8-sig", errors="replace").lstrip().startswith("[")


def a_preference_text(value):
    "a text, or a list of messages that ends with the assistant's"
    if not isinstance(value, list):
        return common.a_text(value)
    return (bool(value) and all(isinstance(m, dict) for m in value) and value[-1].get("role") == "assistant"
            and common.a_text(value[-1].get("content")) and (len(value) == 1 or common.a_prompt(value[:-1])))


def split_prompt(prompt, answer, where):
    """(messages before the answer, the answer's text): an answer may repeat the prompt that it answers."""
    if isinstance(answer, list):
        before, answer = answer[:-1], answer[-1]["content"]
        prompt = before or prompt
    elif isinstance(prompt, str) and answer.startswith(prompt) and answer[len(prompt):].strip():
        answer = answer[len(prompt):].strip()
    if prompt is None:
        raise common.InputError(f"{where}: no prompt: give a field prompt, or messages before the answer")
    return [{"role": m["role"], "content": m["content"]} for m in common.as_messages(prompt)], answer


class Preferences:
    """The rows of a source by number, as {"id", "prompt": messages} and, where labelled, "chosen", "rejected" as texts.

    Each is read from the source whenever it is asked for.
    """

    def __init__(self, source):
        self.table, self.where = read_table(source)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, k):
        row, where = self.table[k], self.where(k)
        checks = {"id": common.an_id, "prompt": common.a_prompt, "chosen": a_preference_text,
                  "rejected": a_preference_text}
        common.check_row(row, {}, where)
        row = {key: value for key, value in row.items() if value is not None}  # Parquet has None for "not there"
        labelled = "chosen" in row or "rejected" in row
        needed = ("chosen", "rejected") if labelled else ("prompt",)
        common.check_row(row, {key: check for key, check in checks.items() if key in row or key in needed}, where)
        new = {"id": str(row.get("id", k)), "prompt": common.as_messages(row.get("prompt"))}
        if labelled:
            new["prompt"], new["chosen"] = split_prompt(row.get("prompt"), row["chosen"], where)
            prompt, new["rejected"] = split_prompt(row.get("prompt"), row["rejected"], where)
            if prompt != new["prompt"]:
                raise common.InputError(f"{where}: chosen and rejected answer different prompts: mend the row")
        return new


def check_ids_differ(rows):
    """Raises InputError for the first id that is there twice. Holds all ids: for rows of which the hashes agree."""
    first = {}
    for k in range(len(rows)):
        row_id = rows[k]["id"]
        if first.setdefault(row_id, k) != k:
            raise common.InputError(f"{rows.where(k)}: {rows.where(first[row_id])} has the id {row_id!r} too: "
                                    "ids must differ")


def drop_repeats(rows):
    """(numbers of the rows whose prompt, compared by content, was not there before; of all rows, whether labelled)

    The first time through all rows. 25 bytes of each are held: hashes of the prompt and the id, and the label's mark.
    """
    prompts, ids, labelled = bytearray(), array("q"), array("b")
    for k in range(len(rows)):
        row = rows[k]
        content = json.dumps([[m["role"], m["content"].strip()] for m in row["prompt"]])
        prompts += hashlib.blake2b(content.encode(), digest_size=16).digest()
        ids.append(hash(row["id"]))
        labelled.append("chosen" in row)
    if len(np.unique(ids)) < len(ids):
        check_ids_differ(rows)
    _, first = np.unique(np.frombuffer(prompts, "S16"), return_index=True)
    return np.sort(first), np.array(labelled, bool)


def split(numbers, labelled, args):
    """Numbers of the rows of (D_0, held-out rows, [X_1, ..., X_T]), disjoint. labelled: of all rows, whether they are

    The prompt sets are taken from the front and the seed from the back of the shuffled rows, so that a larger seed
    leaves the prompt sets as they are, as in Table 3.
    """
    pairs = numbers[labelled[numbers]]
    seed = pairs[len(pairs) - args.seed_size:] if 0 < args.seed_size <= len(pairs) else pairs[:0]
    rest = numbers[~np.isin(numbers, seed)]
    held_out, *sets, _ = np.split(rest, np.cumsum([args.eval_size, *args.prompt_sizes]))
    if [len(seed), len(held_out), *map(len, sets)] != [args.seed_size, args.eval_size, *args.prompt_sizes]:
        raise common.InputError(
            f"{args.source}: {len(numbers)} different prompts, {len(pairs)} of them labelled, are not enough for "
            f"{args.seed_size} seed pairs, {args.eval_size} held-out prompts and sets of {args.prompt_sizes}: "
            "lower --seed-size, --eval-size or --prompt-sizes")
    return seed, held_out, sets


def with_reference(row):
    """A held-out row with a response to compare with: its own in the world, else the chosen one, if it is labelled."""
    return {"reference": row["chosen"]} | row if "chosen" in row else row


def judging_examples(seed):
    """Listing 2: the question of Listing 1 about a seed pair, answered by the chosen one's letter; in both orders."""
    for row in seed:
        for letter, one, two in zip(common.LETTERS, ("chosen", "rejected"), ("rejected", "chosen")):
            yield {"id": f"{row['id']}-{letter}", "prompt": common.judging_prompt(row["prompt"], row[one], row[two]),
                   "response": letter}


def parse_args():
    parser = common.Parser(description="Make the seed preferences D_0 and the prompt sets X_t.")
    add = parser.add_argument
    add("--source", required=True, help="ultrafeedback, world, or a JSON, JSON Lines or Parquet file")
    add("--output", required=True, help="folder for the files")
    # Section 5.1
    add("--seed-size", type=common.natural, default=2000,
        help="|D_0|: of UltraFeedback 500, 1000, 2000, 6000 are the 0.8, 1.7, 3.3, 10 %% of Table 3")
    add("--prompt-sizes", type=common.positive, nargs="+", default=[8000, 20000, 30000],
        help="|X_1| ... |X_T|; they stay the same sets when --seed-size changes")
    add("--eval-size", type=common.natural, default=200, help="prompts held out for 05_eval.py")
    add("--all-gold", action="store_true", help="write all_gold.jsonl as well")
    add("--sft-size", type=common.natural, default=12000, help="answers for SFT, of the world only")
    add("--judge-words", action="store_true", help="the world's base model knows the words of Listing 1 too, which "
        "LLM-as-judge asks with and SFT never uses")
    add("--shape", choices=SHAPES, default="llama", help="kind of base model, of the world only")
    add("--seed", type=common.natural, default=0, help="shuffles; three of them are the three seeds of Table 4")
    return parser.parse_args()


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, *(["source"] if Path(args.source).exists() else []))
    folder = partial / "data"
    folder.mkdir(exist_ok=True)

    rows = read_world(args, folder) if args.source == "world" else Preferences(args.source)
    different, labelled = drop_repeats(rows)
    if args.source != "world":
        random.Random(args.seed).shuffle(different)
    seed, held_out, sets = split(different, labelled, args)

    def at(numbers):
        return (rows[k] for k in numbers.tolist())

    def write(name, rows, *keys):
        keys = ("id", "prompt", *keys)
        common.write_jsonl(folder / name, ({key: row[key] for key in keys if key in row} for row in rows))

    write("seed.jsonl", at(seed), "chosen", "rejected")
    common.write_jsonl(folder / "judge_sft.jsonl", judging_examples(at(seed)))
    for t, prompts in enumerate(sets, 1):
        write(f"prompts_{t}.jsonl", at(prompts))
    write("eval.jsonl", map(with_reference, at(held_out)), "reference")
    if args.all_gold:
        known = np.concatenate([seed, *sets])
        write("all_gold.jsonl", at(known[labelled[known]]), "chosen", "rejected")
    counts = {"rows read": len(rows), "repeated prompts dropped": len(rows) - len(different), "seed pairs": len(seed),
              "prompts": "+".join(str(len(prompts)) for prompts in sets), "held out": len(held_out)}
    common.close_output(args, partial, folder, counts, started)


if __name__ == "__main__":
    common.run(main)
