"""Text and token ids: the model's chat template, and how a turn ends. Every stage that reads texts uses it.

Text that spells a special token is tokenised as plain text. A fault of a template is an error in one line.
"""

import contextlib
import functools
import json
import re
import secrets

from transformers import AutoTokenizer, GenerationConfig

from support import models
from support.runs import InputError, begun, read_text


def add_options(add):
    add("--tokenizer", help="tokenizer folder or Hub name (default: the model's)")
    add("--chat-template", help="Jinja chat template file (default: the tokenizer's)")


def load_tokenizer(model, tokenizer=None, chat_template=None):
    """The tokenizer named `tokenizer` (default: the model's), with the chat template of a file (default: its own)."""
    name = tokenizer or model
    loaded = models.from_pretrained(AutoTokenizer, name, "a tokenizer (--tokenizer)")
    if not loaded.is_fast:
        raise InputError(f"{name}: its tokenizer is not a fast one: name one that is with --tokenizer")
    if chat_template:
        loaded.chat_template = read_text(chat_template, "a file with a Jinja chat template (--chat-template)")
    largest = max(loaded.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    size = models.load_config(model).get_text_config().vocab_size
    if largest >= size:
        raise InputError(f"{name}: its vocabulary ({largest + 1}) is larger than that of the model {model} ({size}): "
                         "give the tokenizer that the model was trained with")
    if not loaded.chat_template:
        raise InputError(f"{name}: its tokenizer has no chat template: --chat-template names a file with one")
    return loaded


@functools.cache
def special_tokens(tokenizer):
    """What keeps text from spelling a special token: (pattern, names, encoder).

    pattern: finds special tokens in text; names: {token: a secret name that no text can guess}; encoder: the same
    tokenizer, in which each special token has only its secret name, so that "</s>" is text like any other.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, secret = parts["model"], secrets.token_hex(8)
    pieces = {piece for merge in model.get("merges", []) for piece in merge}  # these are also parts of ordinary words
    special = [token for token in parts["added_tokens"] if token["content"] not in pieces
               and (token["special"] or token["content"] in tokenizer.all_special_tokens)]
    names = {token["content"]: f"<{secret}:{k}>" for k, token in enumerate(special)}
    for token in special:
        token["content"] = names[token["content"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # a Unigram model has scores
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    encoder = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts | {"truncation": None, "padding": None}))
    pattern = "|".join(re.escape(token) for token in sorted(names, key=len, reverse=True))
    return re.compile(pattern or "(?!)"), names, encoder


def render(tokenizer, messages, where="", **options):
    """A conversation as the chat template writes it, with special tokens under their secret names, for `encode`.

    Where a message spells a special token, the template is given a stand-in that no text can contain (halves of
    surrogate pairs). The special tokens of the rendering are then the template's own, and stand-ins become text again.
    Raises InputError where the template rejects the conversation, or leaves out a message.
    """
    pattern, names, _ = special_tokens(tokenizer)
    tokens = list(names)
    stand_ins = {token: f"\ud800{k}\udfff" for k, token in enumerate(tokens)}
    hidden = [message | {"content": pattern.sub(lambda found: stand_ins[found[0]], message["content"])}
              for message in messages]
    try:
        # one date for the whole output, even if it is resumed on another day
        template = re.sub(r"""strftime_now\((["'])(.*?)\1\)""", lambda call: json.dumps(begun().strftime(call[2])),
                          tokenizer.get_chat_template())
        text = tokenizer.apply_chat_template(hidden, tokenize=False, chat_template=template, **options)
        for message in hidden:
            content = message["content"].split("</think>")[-1]  # earlier thoughts may be left out
            if "".join(content.split()) not in "".join(text.split()):
                raise ValueError(f"it leaves out the {message['role']}'s {json.dumps(content)[:40]}")
    except Exception as error:  # templates reject some role orders with an exception of their own
        raise InputError(f"{where}the chat template rejects {json.dumps(messages)[:60]} ({str(error)[:100]}): "
                         "fix it, or name another template with --chat-template")
    text = pattern.sub(lambda found: names[found[0]], text)
    return re.sub("\ud800(\\d+)\udfff", lambda found: tokens[int(found[1])], text)


def encode(tokenizer, text):
    """Token ids of what `render` returns."""
    return special_tokens(tokenizer)[2].encode(text, add_special_tokens=False).ids


def chat_ids(tokenizer, messages, where="", **options):
    """Token ids of a conversation, with exactly one BOS where the tokenizer begins a text with one.

    Some templates write it, others (Zephyr's) leave it to the tokenizer, and the model was trained with it either way.
    """
    ids, bos = encode(tokenizer, render(tokenizer, messages, where, **options)), [tokenizer.bos_token_id]
    return bos + ids if tokenizer("").input_ids[:1] == bos and ids[:1] != bos else ids


def prompt_ids(tokenizer, messages, where):
    """The prompt's token ids, with the template's generation prompt."""
    ids = chat_ids(tokenizer, messages, f"{where}: ", add_generation_prompt=True)
    if not ids:
        raise InputError(f"{where}: the chat template renders this prompt to no tokens: "
                         "name another template with --chat-template")
    return ids


def response_ids(tokenizer, messages, prompt, text, eos):
    """The response as the chat template writes it after `prompt` (ids), ending with exactly one EOS.

    Its ids are sliced from the joint rendering, which is what the model was trained on. Where the text merges with the
    prompt's last token, the rest of the rendering is tokenised alone, as it is sampled. Where the rendering does not
    begin with the prompt (a template may open a thought in the prompt, and leave it out afterwards), the text is
    tokenised alone.
    """
    answered = messages + [{"role": "assistant", "content": text}]
    ids = chat_ids(tokenizer, answered)
    if ids[:len(prompt)] == prompt:
        ids = ids[len(prompt):]
    else:
        before, joint = render(tokenizer, messages, add_generation_prompt=True), render(tokenizer, answered)
        if not joint.startswith(before):
            if before.rstrip().endswith("<think>"):
                text = text.strip().removeprefix("<think>\n") if "</think>" in text else f"\n</think>\n\n{text}"
            joint = before + text
        ids = encode(tokenizer, joint.removeprefix(before))
    end = len(ids)  # of the text: only ends of a turn and white space follow
    while end and (ids[end - 1] in eos or not tokenizer.decode(ids[end - 1]).strip()):
        end -= 1
    first = next((k for k in range(end, len(ids)) if ids[k] in eos), None)
    return ids + [eos[0]] if first is None else ids[:first + 1]


def response_text(tokenizer, prompt, ids):
    """What judges and benchmarks read of a response (ids): no special tokens, no thought before the answer.

    prompt: its ids; a template may open a thought at its end.
    """
    ids, tokens = list(ids), tokenizer.added_tokens_encoder
    # gpt-oss; DeepSeek-R1, Qwen3 and others
    for opening, closing in (("<|channel|>", "<|channel|>final<|message|>"), ("<think>", "</think>")):
        if opening in tokens:  # the model has such a token
            mark = tokenizer.encode(closing, add_special_tokens=False)
            ends = [k + len(mark) for k in range(len(ids)) if ids[k:k + len(mark)] == mark]
            opened = tokenizer.decode([*prompt[-4:]]).rstrip().endswith(opening)  # white space may follow
            if ends or opened or tokens[opening] in ids:  # a thought, which without an end has no answer after it
                ids = ids[ends[-1]:] if ends else []
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def eos_ids(name, tokenizer):
    """Ids that end a response; the first is the one with which the chat template ends a turn.

    They are those of the tokenizer, the model's config and its generation config, and the first special token that the
    template writes after an answer. The others may not have that one (Gemma), or more may follow it (Phi-4-mini).
    """
    def listed(ids):
        return ids if isinstance(ids, list) else [ids] if ids is not None else []

    config, added = models.load_config(name), tokenizer.added_tokens_decoder
    # a config without an EOS has its class's default, which may be any token of this vocabulary
    named = [i for part in (config, config.get_text_config()) for i in listed(getattr(part, "eos_token_id", None))
             if type(i) is not int or i in added] + listed(tokenizer.eos_token_id)
    with contextlib.suppress(OSError):
        named += listed(GenerationConfig.from_pretrained(name).eos_token_id)
    if not all(type(i) is int and 0 <= i < 2**31 for i in named):
        raise InputError(f"{name}: its config or generation config has the EOS {str(named)[:60]}: "
                         "it must be a token id, or a list of them")
    answer = "zyzyz"
    turn = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], f"{name}: ")
    after = encode(tokenizer, turn.rpartition(answer)[2])
    first = next((i for i in after if i in named or i in added and added[i].content.strip()), tokenizer.eos_token_id)
    eos = {first, *named} - {None}
    if not eos:
        raise InputError(f"{name}: neither its tokenizer nor its configs nor its chat template has an EOS: "
                         "--tokenizer names a tokenizer that has one")
    return sorted(eos, key=lambda i: (i != first, i))
