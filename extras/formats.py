"""Other people's data, as 00_inputs.py uses it: --source ultrafeedback, ultrachat, org/name or a file.

The format of preferences is decided once for a source: it is the one that more than half of its (labelled) rows have.

    Format                          prompt               chosen, rejected
    TRL, standard                   string               strings
    TRL, standard, implicit         -                    strings: what both begin with, to a word's end, is the prompt;
                                                         no other column has text, which could be the prompt
    TRL, conversational             messages             messages
    TRL, conversational, implicit   -                    messages: all but the last are the prompt
    UltraFeedback-binarized         string               messages, the prompt's among them
    Anthropic hh-rlhf               - (or transcript)    transcripts: "\\n\\nHuman: ... \\n\\nAssistant: ..."
    repeated prompts                string               strings that begin with the prompt, which is cut off
    prompts                         any of these         - (for X_t; labelled rows may be among them)

UltraChat, for SFT, has "messages" that end with the response.

Messages are [{"role": "user", "content": ...}, ...], of text alone: a row with tools or images, or with a message of
which another field says something (tool calls, a thought, a name), cannot be used. A row may have "id" (default: its
number), and what comes before its prompt: "system", "system_prompt" or "system_message", a string, and "history",
messages or [[user, assistant], ...]. The summary names the columns that are not read. Rows that cannot be used are
dropped and counted; more than one in twenty is an error. The stages with a tokenizer drop prompts that are too long.
"""

import os
import re

from support import records, runs

HUB = {"ultrafeedback": ("argilla/ultrafeedback-binarized-preferences-cleaned", "train"),  # name, split
       "ultrachat": ("HuggingFaceH4/ultrachat_200k", "train_sft")}
SYSTEM = ("system", "system_prompt", "system_message")
READ = {"id", "prompt", "chosen", "rejected", "history", *SYSTEM}  # the columns; UltraChat has one more, "messages"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.json)(?<!\.jsonl)(?<!\.gz)(?<!\.parquet)")
SOURCES = ("ultrafeedback, ultrachat or org/name (from the Hub: go online), world, or a JSON, JSON Lines or Parquet "
           "file (--source)")


def read_source(args):
    """(the rows that can be used, with "id" and what `read_row` finds; counts of what was read and dropped).

    Raises InputError where an id repeats, too many rows cannot be used, or there are no labels for the seed.
    """
    table = [(where, {key: value for key, value in row.items() if value is not None})  # Parquet's "missing" is None
             for where, row in read_table(args)]
    chats, rows, where_of, dropped = args.source == "ultrachat", [], {}, {}
    name = "chats" if chats else choose_format([row for _, row in table])
    for k, (where, row) in enumerate(table):
        row_id = row.get("id", k)
        try:
            if not records.is_id(row_id):
                raise runs.InputError(f'"id" is not {records.is_id.__doc__}')
            rows.append({"id": str(row_id), **read_row(row, name)})
        except runs.InputError as cause:
            dropped.setdefault(str(cause), []).append(where)
        else:
            if where_of.setdefault(str(row_id), where) != where:
                raise runs.InputError(f"{where}: has the id {row_id!r} of {where_of[str(row_id)]}: ids must differ")

    counts = {f"dropped ({cause})": f"{len(places)}, first {places[0]}" for cause, places in dropped.items()}
    found = list(dict.fromkeys(key for _, row in table for key in row))
    columns = (f"columns found: {', '.join(found)}; wanted: " + (
        "messages" if chats else "prompt, chosen and rejected, or the last two alone, in one of the formats that "
        "extras/formats.py lists"))
    lost = len(table) - len(rows)
    if 20 * lost > len(table):
        cause, places = next(iter(dropped.items()))
        causes = "; ".join(f"{cause}: {len(places)}" for cause, places in dropped.items())
        raise runs.InputError(f"{places[0]}: {cause}: {lost} of {len(table)} rows, more than one in twenty, cannot be "
                              f"used ({causes}): {columns}")
    if args.seed_size and not chats and not any(map(is_labelled, rows)):
        raise runs.InputError(f"{args.source}: no row is labelled, for --seed-size {args.seed_size}: {columns}")
    if unread := [key for key in found if key not in READ and not (chats and key == "messages")]:
        counts["columns not read"] = unread
    return rows, {"rows read": len(table), "format": name, **counts}


def read_table(args):
    """[(where, row)] of a file or of a data set on the Hub, rows as they are. where: names the row in messages"""
    source = args.source
    on_hub = source in HUB or HUB_NAME.fullmatch(source) and not os.path.exists(source)
    if not on_hub and not source.endswith(".parquet"):
        table = list(records.json_rows(source, SOURCES))
    else:
        try:
            from datasets import Dataset, load_dataset  # slow to import
            from pyarrow.parquet import ParquetFile
            name, split = HUB.get(source, (source, "train"))
            # not Dataset.from_parquet: to its cache a file of the same path, size and time is the same file
            rows = load_dataset(name, split=args.split or split) if on_hub else Dataset(ParquetFile(source).read())
            table = [(f"{source}, row {k}", row) for k, row in enumerate(rows)]
        except Exception as error:  # datasets raises many kinds; it may be the Hub's cache that cannot be written
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise runs.InputError(f"{source}: cannot be read ({reason}): give {SOURCES}")
    for where, row in table:
        records.check_row(row, {}, where)
    return table


# ---------------------------------------------------------------------------------------------
# Formats: a function turns a row into one of strings or messages, or returns None where it has another format


def is_labelled(row):
    return "chosen" in row or "rejected" in row


def are_strings(row, *keys):
    return all(isinstance(row.get(key), str) for key in keys)


def parse_transcripts(row):
    """Answers, or in some copies of hh-rlhf their prompt, begin with "Human:"."""
    prompt, parsed = row.get("prompt", ""), {"prompt": []}
    keys = ("chosen", "rejected") if is_labelled(row) else ("prompt",)
    if not isinstance(prompt, str) or not are_strings(row, *keys):
        return None
    for key in keys:
        text = row[key] if row[key].lstrip().startswith("Human:") else prompt + row[key]
        first, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)  # then speakers and what they say, in turn
        if first or parts[:1] != ["Human"]:
            return None
        parsed[key] = [{"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
                       for speaker, said in zip(parts[::2], parts[1::2])]
        if not parsed[key][-1]["content"]:  # a prompt that ends with "Assistant:"
            parsed[key].pop()
    return row | parsed


def cut_prompt(row):
    """Cut off the prompt and white space with which both answers begin."""
    if are_strings(row, "prompt", "chosen", "rejected") and row["prompt"].strip():
        prompt = row["prompt"].rstrip()
        if all(row[key].startswith(prompt) and row[key][len(prompt):][:1].isspace() for key in ("chosen", "rejected")):
            return row | {key: row[key][len(prompt):].strip() for key in ("chosen", "rejected")}


def share_prompt(row):
    """The prompt is what both answers begin with, to the end of a word (TRL's `extract_prompt` also cuts words)."""
    if "prompt" not in row and are_strings(row, "chosen", "rejected"):
        answers = [row[key].rstrip() for key in ("chosen", "rejected")]
        prompt = re.match(r"(.*\s)?", os.path.commonprefix(answers), re.DOTALL)[0]
        chosen, rejected = (answer[len(prompt):].strip() for answer in answers)
        return row | {"prompt": prompt.rstrip(), "chosen": chosen, "rejected": rejected}


IMPLICIT = "strings without a prompt"
FORMATS = {"transcripts": parse_transcripts, "strings that repeat the prompt": cut_prompt, IMPLICIT: share_prompt,
           "strings or messages": lambda row: row}


def choose_format(rows):
    """The name of the first format that more than half of the rows have; of the labelled rows, if there are any."""
    rows = list(filter(is_labelled, rows)) or rows
    names = (name for name, read in FORMATS.items() if sum(read(row) is not None for row in rows) > len(rows) / 2)
    return next(names, "strings or messages")


def read_row(row, name):
    """{"prompt": messages}, if labelled with "chosen", "rejected", "reference", of chats with "response", all strings.

    name: the source's format. Raises InputError that says why the row cannot be used.
    """
    for key in ("tools", "image", "images"):  # TRL's columns
        if records.has_content(row.get(key)):
            raise runs.InputError(f'"{key}", and only text is read')
    if name == "chats":
        prompt, response = split_answer(row, "messages")
        return {"prompt": prompt, "response": response}
    read = FORMATS[name](row)
    if read is None and is_labelled(row):
        raise runs.InputError(f"not {name}, as most rows are")
    others = [key for key, value in row.items() if key not in READ and records.has_content(value)]
    if others and read and name == IMPLICIT:
        raise runs.InputError(f'no column "prompt", but text in {", ".join(map(repr, others))}: rename the one that is '
                              "the prompt to prompt, and remove the others")
    row = read or row
    if not is_labelled(row):
        return {"prompt": find_prompt(row, [])}
    (prompt_1, chosen), (prompt_2, rejected) = (split_answer(row, key) for key in ("chosen", "rejected"))
    if prompt_1 != prompt_2:
        raise runs.InputError("chosen and rejected answer different prompts")
    if chosen.strip() == rejected.strip():
        raise runs.InputError("chosen and rejected are equal")
    return {"prompt": prompt_1, "chosen": chosen, "rejected": rejected, "reference": chosen}


def split_answer(row, key):
    """(messages before the answer, the answer as a string)"""
    before, answer = [], row.get(key)
    if isinstance(answer, list):
        *before, last = clean(answer) or [{"role": None}]
        answer = last["content"] if last["role"] == "assistant" else None
    if not records.is_text(answer):
        raise runs.InputError(f'no answer in "{key}"')
    return find_prompt(row, before), answer


def find_prompt(row, before):
    """The messages that the answer replies to. before: those in front of the answer in its own list"""
    prompt = clean(records.as_messages(row.get("prompt") or []))
    if before and before[0]["role"] == "assistant":
        prompt = prompt + before
    elif before and prompt[-len(before):] != before:  # else the answer repeats the end of the prompt
        prompt = before
    given = [row[key] for key in SYSTEM if row.get(key)]
    if given != given[:1] * len(given):
        raise runs.InputError(f"{' and '.join(key for key in SYSTEM if row.get(key))} differ")
    system = [{"role": "system", "content": text} for text in given[:1]]
    prompt = (system if prompt[:1] != system else []) + clean(row.get("history") or []) + prompt
    if not records.is_prompt(prompt):
        raise runs.InputError('no "prompt" of system, user and assistant that ends with a text of the user')
    if any(message["role"] == "system" for message in prompt[1:]):
        raise runs.InputError("a system message that is not the first")
    return prompt


def clean(messages):
    """Messages, or [user, assistant] pairs of strings, as messages without other fields. Raises InputError."""
    found = []
    for item in messages if isinstance(messages, list) else [None]:
        if isinstance(item, list) and len(item) == 2:
            found += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        elif isinstance(item, dict):
            if more := records.more_than_text(item):
                raise runs.InputError(f'a message with "{more[0]}", and only role and content are read')
            if not isinstance(item.get("content"), str):
                raise runs.InputError('a message whose "content" is no string')
            found.append({"role": item.get("role"), "content": item.get("content")})
        else:
            raise runs.InputError('"prompt", "history", "chosen" or "rejected" is no string and no list of messages')
    return found
