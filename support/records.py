"""Records: what a row of a file must be, and the rows of a file, read and checked.

    is_prompt, is_answer, ...    checks of a field; PROMPTS, LABELLED, ...: the fields of a record
    read_jsonl, read_rows        the rows of a file, each with the fields that it must have
"""

import json
from array import array

from support.runs import InputError, open_text, parse_json

# ---------------------------------------------------------------------------------------------
# Fields. A check's docstring completes the error message "it must be ...".


def is_id(value):
    "a string of 1 to 1000 characters, or an integer"
    return isinstance(value, str) and 0 < len(value) <= 1000 or type(value) is int


def is_text(value):
    "a string that is not empty"
    return isinstance(value, str) and value.strip() != ""


def has_content(value):
    """Whether a field says anything: it does not where it is blank or empty, or a number such as a weight."""
    if isinstance(value, (dict, list)):
        return any(map(has_content, value.values() if isinstance(value, dict) else value))
    return is_text(value) or not isinstance(value, (str, int, float, array, type(None)))


def more_than_text(message):
    """The fields of a message, besides role and content, that say something: tool calls, thoughts, images, a name."""
    return [key for key, value in message.items() if key not in ("role", "content", "id") and has_content(value)]


def is_prompt(value):
    "a string, or a list of messages of only {role: system|user|assistant, content: string} that ends with the user's"
    if not isinstance(value, list):
        return is_text(value)
    messages = all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
                   and isinstance(m.get("content"), str) and not more_than_text(m) for m in value)
    return bool(value) and messages and value[-1]["role"] == "user" and is_text(value[-1]["content"])


def is_answer(value):
    "a string that is not empty, or a list of one message of only {role: assistant, content: such a string}"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        [m] = value
        return m.get("role") == "assistant" and is_text(m.get("content")) and not more_than_text(m)
    return is_text(value)


def is_token_ids(value):
    "a list of token ids that is not empty"
    return isinstance(value, array) and min(value) >= 0


def is_response(value):
    "an object {text, ids: token ids, finish: eos|length}"
    return (isinstance(value, dict) and isinstance(value.get("text"), str) and is_token_ids(value.get("ids"))
            and value.get("finish") in ("eos", "length"))


def is_responses(value):
    "a list of at least two responses {text, ids: token ids, finish: eos|length}"
    return isinstance(value, list) and len(value) >= 2 and all(map(is_response, value))


PROMPTS = {"id": is_id, "prompt": is_prompt}
EXAMPLES = {**PROMPTS, "response": is_text}
LABELLED = {**PROMPTS, "chosen": is_answer, "rejected": is_answer}
RESPONSES = {**PROMPTS, "prompt_ids": is_token_ids, "responses": is_responses}
PREFERENCES = {"id": is_id, "prompt_ids": is_token_ids, "chosen": is_response, "rejected": is_response}
EMPTY_SYSTEM = {"role": "system", "content": ""}  # the message that Zephyr's recipe puts before every conversation


def as_messages(prompt):
    """A plain string means one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(messages):
    """A conversation as plain text: one user turn is its content; of more turns each begins with its role.

    An empty system message, as Zephyr's recipe has it, is none.
    """
    messages = [message for message in messages if message != EMPTY_SYSTEM]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


# ---------------------------------------------------------------------------------------------
# Rows


def check_row(row, fields, where):
    """Raises InputError unless each field is there and passes its check. fields: {name: check}"""
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object: {shown(row)}: write one object a line")
    for name, check in fields.items():
        if name not in row or not check(row[name]):
            found = shown(row[name]) if name in row else "missing"
            raise InputError(f'{where}: "{name}" is {found}: it must be {check.__doc__}')


def shown(value):
    """The beginning of a value, for a message. One from Parquet may be of a type that JSON lacks."""
    return json.dumps(value, default=str)[:60]


def json_rows(path, expected, nan=False):
    """Yields (where, row) of each row of a JSON Lines file or a JSON list, plain or gzip.

    where: the file and the number of the line, or in a list of the row, from 0; expected: as for `open_text`
    """
    with open_text(path, expected, errors="surrogateescape") as file:  # parse_json names the line that is not in UTF-8
        is_list = file.read(1000).lstrip().startswith("[")
        file.seek(0)
        if is_list:
            for number, row in enumerate(parse_json(file.read(), path, nan)):
                yield f"{path}, row {number}", row
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, parse_json(line.rstrip("\n"), where, nan)


def read_rows(path, fields, *key, nan=True):
    """The rows of a JSON Lines file or a JSON list, plain or gzip: objects with the fields {name: check}.

    fields may be a list of alternatives: the first one whose names the file's first row has is used, else the last.
    No two rows may have the same `key` (names of fields). nan: as for `parse_json`; AlpacaEval's tool writes NaN for a
    missing preference. Raises InputError that says in which row.
    """
    rows, first = [], {}
    for where, row in json_rows(path, "JSON Lines or a JSON list, in UTF-8", nan):
        if isinstance(fields, list):
            fields = next((each for each in fields if isinstance(row, dict) and each.keys() <= row.keys()), fields[-1])
        check_row(row, fields, where)
        values = tuple(str(row[name]) for name in key)
        if key and first.setdefault(values, where) != where:
            raise InputError(f'{where}: duplicate {key[0]} "{values[0][:60]}" (first in {first[values]}): '
                             "they must differ")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


def read_jsonl(path, fields):
    """`read_rows` with ids that differ. Prompts become messages, labelled answers and ids strings, token ids arrays."""
    rows = read_rows(path, fields, "id", nan=False)
    for row in rows:
        row["id"] = str(row["id"])
        if "prompt" in row:
            row["prompt"] = as_messages(row["prompt"])
        for name in ("chosen", "rejected"):
            if isinstance(row.get(name), list) and is_answer(row[name]):
                row[name] = row[name][0]["content"]
    return rows
