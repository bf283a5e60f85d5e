"""What the stages share and what has one right answer.

    errors and records   InputError, run, stream_jsonl, Rows, write_jsonl
    outputs              open_output, close_output: written aside, renamed when whole, args.json beside them
    ranks                start_ranks, on_first_rank, gather, map_batches, map_rows
    models and text      load_tokenizer, load_model, save_model, chat_ids, prompt_ids, response_ids
    log-probs            collate, ResponseLogps, response_logps, shared_span
    sampling             uniforms, pick, sample
    LLM-as-judge         judging_prompt, LETTERS
    the small world      read_gold, gold_values, gold_score
    training             load_policy, load_reference, store_logps, make_optimizer, epoch_batches, micro_batches,
                         load_state, save_due, save_state, save_trained

"Eq. N" is the SPA paper's. Shapes: B sequences of T tokens, N response tokens in all of them, V words.
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
import zlib
from array import array
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before the ranks meet: its default arguments would keep their group, and its threads, alive
import torch.nn.functional as F
import transformers
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import get_cosine_schedule_with_warmup

huggingface_hub.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# ---------------------------------------------------------------------------------------------
# Errors and records


class InputError(Exception):
    """What the user has to mend. Its text is the one line they see: where, what was found, what to do."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, by its number: no Exception, so that nothing on its way to `run` takes it for an error."""


# the folder and the lock of `open_output`; which signal has asked to stop, and on which all ranks have agreed;
# whether a model is being trained
this_run = SimpleNamespace(partial=None, lock=None, asked=None, agreed=None, training=False)


def run(main):
    """Run a stage's main(). What ends it early becomes one line, told by one rank, and an exit status.

    An InputError or an error of the system (no space left): 2. Ctrl-C: 130. SIGTERM: 143. What is kept by then is
    what the same command goes on from.
    """
    signals = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            main()
        finally:  # what is told now is told to the end: torchrun stops all ranks as soon as one has ended
            for number in signals:
                signal.signal(number, signal.SIG_IGN)
    except InputError as error:
        one_line(error)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if not first_rank() and not dist.is_initialized():  # torchrun has passed it on to the first rank too
            sys.exit(128 + number)
        one_line(f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: {kept()}", 128 + number)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # no space left, no permission
            one_line(f"{error.filename or this_run.partial or 'writing'}: {error.strerror}: {kept()}")
        if rank_was_lost(error):
            one_line(f"another rank has ended, torchrun says below how: {kept()}")
        if not first_to_speak():
            sys.exit(1)
        raise
    else:
        if dist.is_initialized():  # not after an error: it may wait for ranks that are gone
            dist.destroy_process_group()  # and gloo's threads: one that wants the GIL when Python ends aborts it
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        if this_run.lock:
            this_run.lock.close()
        vars(this_run).update(partial=None, lock=None, asked=None, agreed=None, training=False)


def on_signal(number, frame):
    """Stop at once; where a model is trained, once the step is done and saved, unless it is a second Ctrl-C."""
    if not this_run.training or this_run.asked and number == signal.SIGINT:
        raise Stopped(number)
    this_run.asked = number
    if number == signal.SIGINT and first_rank():
        os.write(2, b"\nstops when this step is done and saved; Ctrl-C again stops at once\n")


def kept():
    """What a stage that is stopped leaves to go on from, in words."""
    partial = this_run.partial
    states = saved_states(partial) if partial else []
    if states:
        return f"{partial} holds the state after step {state_step(states[-1])}: the same command goes on from there"
    if partial and holds_work(partial) and not this_run.training:
        return f"what is finished is kept in {partial}: the same command goes on from there"
    return "nothing is kept yet: the same command starts anew"


def first_rank():
    return os.environ.get("RANK", "0") == "0"


def one_line(message, status=2):
    """Tell how it ended, on one rank, and exit. What a terminal would act on is spelled out."""
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)[:4000])
    if first_to_speak():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def first_to_speak():
    """Whether no other rank has told an error yet: most errors are met by all of them, or end the others too."""
    if dist.is_initialized():
        try:
            return dist.distributed_c10d._get_default_store().add("errors told", 1) == 1
        except RuntimeError:  # the rank that kept the count is gone
            return False
    if not first_rank():  # before the ranks have met: torchrun stops this one if the first rank fails as well
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    return True


def rank_was_lost(error):
    """Whether it says that the connection to another rank has broken: gloo's errors have no class of their own."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line as everywhere else."""

    def parse_args(self):
        for word in sys.argv[1:]:
            if "\0" in word or any("\ud800" <= c <= "\udfff" for c in word):  # the latter are bytes of no UTF-8
                self.error(f"{word!r} is no text in UTF-8")
        return super().parse_args()

    def error(self, message):
        one_line(f"{message}: --help lists the options")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):  # NaN too
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} in [{low}, {high}]"  # what argparse calls it
    return parse


positive, natural = number(int, 1, 2**63 - 1), number(int, 0, 2**63 - 1)
nonnegative, share = number(float, 0), number(float, 0, 1)


# A check's docstring is how the error message names what the field must be.


def an_id(value):
    "a text of 1 to 1000 characters, or an integer"
    return isinstance(value, str) and 0 < len(value) <= 1000 or type(value) is int


def a_text(value):
    "a text that is not empty"
    return isinstance(value, str) and value.strip() != ""


def a_prompt(value):
    "a text, or a list of messages {role: system|user|assistant, content: text} that ends with the user's"
    if not isinstance(value, list):
        return a_text(value)
    messages = all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
                   and isinstance(m.get("content"), str) for m in value)
    return bool(value) and messages and value[-1]["role"] == "user" and a_text(value[-1]["content"])


def token_ids(value):
    "a list of token ids that is not empty"
    return isinstance(value, list) and value != [] and all(type(i) is int and 0 <= i < 2**31 for i in value)


def a_response(value):
    "an object {text, ids: token ids, finish: eos|length}"
    return (isinstance(value, dict) and isinstance(value.get("text"), str) and token_ids(value.get("ids"))
            and value.get("finish") in ("eos", "length"))


def responses(value):
    "a list of at least two responses {text, ids: token ids, finish: eos|length}"
    return isinstance(value, list) and len(value) >= 2 and all(map(a_response, value))


def as_messages(prompt):
    """A plain text means one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def check_row(row, fields, where):
    """Raises InputError unless each field is there and passes its check. fields: {name: check}"""
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object: {shown(row)}: write one object a line")
    for name, check in fields.items():
        if name not in row:
            raise InputError(f'{where}: the field "{name}" is missing: it must be {check.__doc__}')
        if not check(row[name]):
            raise InputError(f'{where}: "{name}" is {shown(row[name])}: it must be {check.__doc__}')


def shown(value):
    """The beginning of a value, for a message. Of Parquet it may be one that JSON does not have."""
    return json.dumps(value, default=str)[:60]


NESTED = 100  # how deep lists and objects may be nested: what is read can be written without a RecursionError


def parse_json(text, where, nan=False):
    """What the text says, if it can be written again: no 1e999, no half of a surrogate pair, no NaN but with nan."""
    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite if nan else int)  # int("NaN") is an error
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > NESTED and depth(value) > NESTED:
            raise ValueError
        return value
    except (ValueError, RecursionError):
        raise InputError(f"{where}: cannot be read as a JSON object: {text[:60]!r}: write one object a line")


def finite(text):
    """A number of JSON that is no integer. Raises ValueError for an infinite one."""
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError
    return value


def depth(value):
    """How deep lists and objects are nested in each other."""
    levels, inner = 0, [value]
    while inner := [item for outer in inner if isinstance(outer, (list, dict))
                    for item in (outer.values() if isinstance(outer, dict) else outer)]:
        levels += 1
    return levels


def json_lines(path):
    """Yields (line number, value) of the lines of a file that are not blank. Raises InputError with file and line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_json(line.rstrip("\n"), f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}): give a JSON Lines file in UTF-8")


def stream_jsonl(path, fields):
    """Yields the rows of a JSON Lines file, each with the fields {name: check} and an id of its own.

    Of a row that has been yielded 8 bytes are kept, the hash of its id. Raises InputError with file and line, of an id
    that stands twice after the last row.
    """
    hashes = array("q")
    for number, row in json_lines(path):
        check_row(row, fields, f"{path}:{number}")
        row["id"] = str(row["id"])
        hashes.append(hash(row["id"]))
        if "prompt" in row:
            row["prompt"] = as_messages(row["prompt"])
        yield row
    if not hashes:
        raise InputError(f"{path}: holds no rows")
    if len(np.unique(hashes)) < len(hashes):
        check_ids_differ(path)


def check_ids_differ(path):
    """Raises InputError for the first id that stands twice. Holds all ids: for a file of which the hashes agree."""
    line_of = {}
    for number, row in json_lines(path):
        first = line_of.setdefault(str(row["id"]), number)
        if first != number:
            raise InputError(f'{path}:{number}: the id "{row["id"]}" stands in line {first} too: ids must differ')


class Rows:
    """The rows of a JSON Lines file, each as prepare(row) makes it, less those of which it makes None.

    They are read anew each time they are gone through, so that a file of any length fits in memory. The first time is
    here: a bad line is known before the work begins. read: rows in the file; len(): those that are left.
    """

    def __init__(self, path, fields, prepare):
        self.path, self.fields, self.prepare, self.read, self.left = path, fields, prepare, 0, 0
        for row in stream_jsonl(path, fields):
            self.read += 1
            self.left += prepare(row) is not None

    def __len__(self):
        return self.left

    def __iter__(self):
        return filter(None, map(self.prepare, stream_jsonl(self.path, self.fields)))


class Again:
    """What make() yields, made anew each time it is gone through."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


def reason(error):
    """The system's words for an OSError, without its path."""
    return getattr(error, "strerror", None) or type(error).__name__


def write_jsonl(path, rows):
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_lines(path, lines):
    """Write the lines to a temporary name beside `path`, then rename: the file is the old or the new one, never half."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
    to_disk(temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------
# Outputs: made in OUTPUT.partial, renamed to OUTPUT when whole. args.json says what it was made with,
# so that a stage started again goes on, is done already, or refuses to overwrite.


def args_path(output):
    """Where the record of an output lies: in a model folder, or beside a file as NAME.args.json."""
    output = Path(output)
    return output / "args.json" if output.is_dir() else output.with_name(output.name + ".args.json")


def fingerprint(path):
    """A short hash of a file's content; of a folder, what its args.json says it was made from, else its config, tokenizer
    and weights: their sizes and how they begin, since hashing tens of gigabytes takes minutes.
    """
    if isinstance(path, list):
        return [fingerprint(p) for p in path]
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if (path / "args.json").is_file():
        try:
            made = json.loads((path / "args.json").read_text())["made_from"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path / 'args.json'}: does not say how {path} was made: delete it, or make {path} again")
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    if path.is_dir():
        found = [fingerprint(file) for file in sorted([*path.glob("*.json"), *path.glob("*.jinja")])]
        for weights in sorted(path.glob("*.safetensors")):
            with open(weights, "rb") as file:
                found += [weights.name, weights.stat().st_size, hashlib.sha256(file.read(2 ** 24)).hexdigest()]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    return str(path)  # a name on the hub


def open_output(args, *inputs, free=("output", "save_every")):
    """Folder to work in. inputs: names of the options that are files or models this stage reads.

    Exits with 0 where the output is there, made with these arguments from these inputs. Raises InputError
    where it, or the unfinished one, was made with others, or another run is at it. Options in `free` do not change
    what comes out.
    """
    output = Path(args.output)
    partial = Path(f"{output}.partial")
    for link in (output, partial):
        if link.is_symlink() and (link == partial or not link.exists()):  # what is written would land somewhere else
            raise InputError(f"{link}: is a link: remove it or name another --output")
    options = {k: v for k, v in vars(args).items() if k not in free}
    made_from = {"stage": Path(sys.argv[0]).name, "args": options,
                 "inputs": {k: fingerprint(options[k]) for k in (*inputs, "tokenizer", "chat_template") if options.get(k)}}
    made_from = json.loads(json.dumps(made_from))
    exit_if_there(output, partial, made_from)
    this_run.partial = partial
    if first_rank():
        partial.mkdir(parents=True, exist_ok=True)
        lock(output, partial)
        exit_if_there(output, partial, made_from)  # what held the lock until now may have made it
    if holds_work(partial):
        check_made_from(partial, partial / "args.json", made_from)
        if first_rank():
            print(f"{output}: begun before, goes on", flush=True)
    if first_rank():
        write_json(partial / "args.json", {"made_from": made_from})
    return partial


def exit_if_there(output, partial, made_from):
    """Exit with 0 where the output is there. Raises InputError where it was made from something else."""
    if not output.exists():
        return
    check_made_from(output, args_path(output), made_from)
    if first_rank():
        shutil.rmtree(partial, ignore_errors=True)  # a kill just after the rename leaves it
        print(f"{output}: already there, made with these arguments")
    sys.exit(0)


def check_made_from(there, record, made_from):
    """Raises InputError unless the record, an args.json, says that `there` was made from the same."""
    try:
        old = json.loads(record.read_text())["made_from"]
        if not isinstance(old, dict) or not all(isinstance(old.get(key), dict) for key in ("args", "inputs")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{there}: exists and does not say how it was made: move it or name another --output")
    if old != made_from:
        raise InputError(f"{there}: was made with {differences(old, made_from)}: "
                         "delete it or name another --output")


def lock(output, partial):
    """Hold partial/lock until this process ends, however it ends. Raises InputError where another process does."""
    this_run.lock = open(partial / "lock", "a")
    try:
        fcntl.flock(this_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output}: another run is making it: let that end, or name another --output")
    except OSError:  # a file system without locks
        pass


def holds_work(partial):
    """Whether a stage got as far as writing anything but its arguments."""
    return any(path.name not in ("args.json", "lock") and path.suffix != ".tmp" and path.is_file()
               and path.stat().st_size > 1 for path in partial.rglob("*"))


def differences(old, new):
    """'--lr 0.1 (now 0.2)' for the options, stages and inputs in which two records differ."""
    if old.get("stage") != new["stage"]:
        return f"another stage, {old.get('stage')}"
    changed = [f"--{k.replace('_', '-')} {old['args'].get(k)} (now {new['args'].get(k)})"
               for k in {**old["args"], **new["args"]} if old["args"].get(k) != new["args"].get(k)]
    changed += [f"another content of --{k.replace('_', '-')}" for k in {**old["inputs"], **new["inputs"]}
                if old["inputs"].get(k) != new["inputs"].get(k)]
    return ", ".join(changed)


def close_output(args, partial, made, counts, started):
    """Rename `made`, a file or folder in `partial`, to the output; write its args.json; print the summary.

    All of it is on the disk before the rename: after a power cut the output is whole or not there.
    """
    record = json.loads((partial / "args.json").read_text())
    record |= {"counts": counts, "seconds": round(time.time() - started, 1),
               "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                            "transformers": transformers.__version__}}
    write_json(made / "args.json" if made.is_dir() else args_path(args.output), record)
    to_disk(made, *made.rglob("*"))
    os.replace(made, args.output)
    to_disk(Path(args.output).parent)
    this_run.lock.close()  # an open file may keep a network's file system from removing its folder
    shutil.rmtree(partial, ignore_errors=True)
    told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items())
    print(f"{args.output}: {told} ({record['seconds']:.0f} s)")


def write_json(path, value):
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False) + "\n"])


def to_disk(*paths):
    """Have the system write files and folders through to the disk, where a rename could else come before its file."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# Ranks

Ranks = namedtuple("Ranks", "rank world device")


def start_ranks():
    """This process's place among torchrun's (0 of 1 without it), and its device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:  # torchrun sees a rank that dies; the ranks wait long for one that saves a large model
        on_gpu = dict(device_id=device) if device.type == "cuda" else {}
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1), **on_gpu)
    return Ranks(rank, world, device)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def on_first_rank(finish, ranks):
    """Rank 0 calls finish(), the others wait; what stops it stops them all."""
    stopped = [None]
    if ranks.rank == 0:
        try:
            finish()
        except (InputError, OSError) as error:
            stopped = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(stopped)
    if stopped[0]:
        raise stopped[0]


def gather(rows):
    """The lists of all ranks as one list, in the order of the ranks."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


class Lines:
    """What tqdm writes, as lines of their own: for a log, where a bar cannot be drawn over the one before."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(steps, label, ranks):
    """A bar with rate and time left, on rank 0; where the output is no terminal, a line every half minute."""
    look = dict(mininterval=0.2, dynamic_ncols=True) if sys.stderr.isatty() else dict(
        mininterval=30, file=Lines(), bar_format="{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, "
        "{rate_fmt}{postfix}")
    return tqdm(steps, desc=label, disable=ranks.rank != 0, leave=False, miniters=1, delay=2, **look)


def autocast(device):
    """Compute in bf16 on a GPU, in float32 on a CPU. Weights are float32 on both."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def length_batches(lengths, size, tokens=None):
    """Indices in order of length, at most `size` at a time, and at most so many that they have `tokens`, padded.

    They depend on the input alone, not on the ranks.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not batches or len(batches[-1]) == size
        if full or tokens and (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def map_batches(compute, batches, partial, ranks, label):
    """{i: compute's result for i}, with batches (lists of i) shared among the ranks, in turn.

    compute: list of i -> list of results (JSON). A finished batch is a line of partial/LABEL.RANK.jsonl; when
    the stage is started again, on any number of ranks, such batches are read instead of computed.
    """
    done = read_finished(partial, label)
    mine = [k for k in range(ranks.rank, len(batches), ranks.world) if k not in done]
    with open(partial / f"{label}.{ranks.rank}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill left half-written
        for k in progress(mine, label, ranks):
            file.write(sealed([k, compute(batches[k])]))
            file.flush()
    barrier()
    done = read_finished(partial, label)
    barrier()  # before any rank may remove the folder
    return {i: result for k, batch in enumerate(batches) for i, result in zip(batch, done[k], strict=True)}


def read_finished(partial, label):
    return dict(pair for path in sorted(partial.glob(f"{glob.escape(label)}.*.jsonl")) for pair in unsealed(path))


def sealed(value):
    """A line of a journal: a checksum and the value."""
    return json.dumps([zlib.crc32(json.dumps(value).encode()), value]) + "\n"


def unsealed(path):
    """The values of a journal's lines, but for those that a kill left half-written or something else has changed."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            checksum, value = json.loads(line)
            if checksum == zlib.crc32(json.dumps(value).encode()):
                yield value


WINDOW = 10_000  # rows that are in memory at a time


def map_rows(compute, rows, length, size, partial, ranks, label):
    """compute's result for each of `rows` (a Rows), in their order: an iterable that reads them from the disk.

    compute: list of rows -> list of results (JSON). Batches are made as in `length_batches`, by length(row) and of
    `size` rows, among WINDOW consecutive rows at a time. When the stage is started again, on any number of ranks,
    finished windows and batches are not computed again.
    """
    count, stream = -(-len(rows) // WINDOW), iter(rows)
    names = [f"{label} {k + 1} of {count}" for k in range(count)] if count > 1 else [label]
    for name in names:
        map_window(compute, list(itertools.islice(stream, WINDOW)), length, size, partial, ranks, name)
    return Again(lambda: (result for name in names for result in unsealed(partial / f"{name}.jsonl")))


def map_window(compute, window, length, size, partial, ranks, name):
    """Write the results of a list of rows to partial/NAME.jsonl, whole or not at all; nothing if they are there."""
    path = partial / f"{name}.jsonl"
    if path.exists() and len(list(unsealed(path))) == len(window):
        return
    batches = length_batches([length(row) for row in window], size)
    results = map_batches(lambda batch: compute([window[i] for i in batch]), batches, partial, ranks, name)

    def write():
        write_lines(path, (sealed(results[i]) for i in range(len(window))))
        for log in partial.glob(f"{glob.escape(name)}.*.jsonl"):  # its batches, one by one
            log.unlink()

    on_first_rank(write, ranks)


# ---------------------------------------------------------------------------------------------
# Models and text


def check_name(name):
    """A model is a folder here or a name on the hub."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"{name}: no such folder: give the folder of a model, or its name on the hub")


def load_tokenizer(args):
    """The tokenizer of --tokenizer, else of --model, with the chat template of --chat-template, else its own."""
    name = args.tokenizer or args.model
    check_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, most of them pages long
        if not Path(name).is_dir():
            raise InputError(f"{name}: no such folder, and not to be had from the hub ({type(error).__name__})")
        raise InputError(f"{name}: holds no tokenizer that can be loaded ({type(error).__name__}): "
                         "--tokenizer names a folder or a model that has one")
    if not tokenizer.is_fast:
        raise InputError(f"{name}: its tokenizer is not of the tokenizers library (tokenizer.json): "
                         "--tokenizer names one that is")
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.chat_template}: cannot be read ({reason(error)}): --chat-template names a "
                             "file with a Jinja chat template")
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    size = load_config(args.model).get_text_config().vocab_size
    if max(words, default=0) >= size:
        raise InputError(f"{name}: its tokenizer has {max(words) + 1} words, the model {args.model} has {size}: "
                         "give both of the same model")
    if not tokenizer.chat_template:
        raise InputError(f"{name}: its tokenizer has no chat template: --chat-template names a file with one")
    return tokenizer


def load_config(name):
    """The model's config with every dropout at 0: policy and reference must agree in train mode too."""
    check_name(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{name}: holds no model config that can be loaded ({type(error).__name__}): "
                         "give the folder of a model, or its name on the hub")
    for part in (config, config.get_text_config()):  # the second is the first, but for a multimodal model
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def load_model(name, device, dtype=torch.float32):
    """A causal language model in eval mode. Raises InputError where the log-probs could not be taken from it."""
    config = load_config(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, use_safetensors=True,
                                                     trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{name}: holds no causal language model in safetensors that can be loaded "
                         f"({type(error).__name__}: {str(error)[:100]})")
    model = model.to(device).eval()
    model.shared_span = shared_span(model)
    probe = torch.arange(5) % config.get_text_config().vocab_size
    with torch.no_grad():
        ours = ResponseLogps(model)(collate([(probe[:1].tolist(), [probe[1:].tolist()])], device))
        logits = model(input_ids=probe[None, :-1].to(device)).logits[0].float()
        theirs = -F.cross_entropy(logits, probe[1:].to(device), reduction="none")
    rounding = 1e-3 if dtype == torch.float32 else 0.5  # neighbours in bf16 are 0.125 apart from 16 on
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=rounding):  # a model that caps or scales its logits
        raise InputError(f"{name}: its logits are not its head applied to its last hidden state: not supported")
    return model


def check_ids(path, row_id, ids, model):
    """Raises InputError where a token id is not in the model's vocabulary: the file is another tokenizer's."""
    size = model.get_input_embeddings().num_embeddings
    if max(ids) >= size:
        raise InputError(f"{path}, id {row_id}: token id {max(ids)} is not in the model's vocabulary of {size}: "
                         "give the model that the file was made with")


def scoring_dtype(device):
    """What only scores or samples is held in the dtype the policy computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_same_vocabulary(name, other):
    """A log-ratio of two models needs that a token id means the same to both; that one has more does no harm."""
    sizes = [load_config(n).get_text_config().vocab_size for n in (name, other)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{name} has a vocabulary of {sizes[0]} tokens, {other} one of {sizes[1]}: "
                         "give two models with the same tokenizer")
    try:
        tokenizers = [AutoTokenizer.from_pretrained(n, trust_remote_code=False) for n in (name, other)]
        one, two = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers)
    except Exception:  # a model without a tokenizer of its own is used with the other's
        return
    if any(one[i] != two[i] for i in one.keys() & two.keys()):
        raise InputError(f"{name} and {other} give different tokens the same id: "
                         "give two models with the same tokenizer")


def save_model(model, tokenizer, folder, weights=None):
    """An ordinary Hugging Face folder, float32: bf16 would round away small updates, on which the next model is trained."""
    try:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers do not raise OSError where the disk is full
        if "os error" not in str(error):
            raise
        raise InputError(f"{folder}: cannot be written ({error}): {kept()}")
    for file in folder.glob("*.safetensors"):  # made for the owner alone; config.json has the user's umask
        file.chmod((folder / "config.json").stat().st_mode)


def end_ids(name, tokenizer):
    """Ids that end a response; the first is the one with which the chat template ends a turn.

    They are the tokenizer's EOS and those of the model's generation config, which may differ: Phi-3 ends a turn with
    <|end|>, its tokenizer's EOS is <|endoftext|>.
    """
    named = None
    with contextlib.suppress(OSError):
        named = GenerationConfig.from_pretrained(name).eos_token_id
    named = named if isinstance(named, list) else [named]
    if named != [None] and not token_ids(named):
        raise InputError(f"{name}: its generation config has the end token {shown(named)}: "
                         "it must be an id, or a list of ids")
    ends = {tokenizer.eos_token_id, *named} - {None}
    if not ends:
        raise InputError(f"{name}: neither its tokenizer nor its generation config names an end token: "
                         "--tokenizer names a tokenizer that has one")
    turn = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = next((i for i in reversed(turn) if i in ends), tokenizer.eos_token_id)
    return sorted(ends, key=lambda i: (i != last, i))


@functools.cache
def special_tokens(tokenizer):
    """What keeps a text from spelling a special token: (pattern, names, encoder).

    pattern: matches the special tokens in a text; names: {token: a name for it that no text can guess}; encoder: the
    same tokenizer, to which each has this name and no other, so that "</s>" is a text to it like any other.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, secret = parts["model"], secrets.token_hex(8)
    pieces = {piece for merge in model.get("merges", []) for piece in merge}  # of words: no text could do without them
    special = [token for token in parts["added_tokens"] if token["content"] not in pieces
               and (token["special"] or token["content"] in tokenizer.all_special_tokens)]
    names = {token["content"]: f"<{secret}:{k}>" for k, token in enumerate(special)}
    for token in special:
        token["content"] = names[token["content"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:  # of a Unigram model, with scores
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    encoder = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts | {"truncation": None, "padding": None}))
    pattern = "|".join(re.escape(token) for token in sorted(names, key=len, reverse=True))
    return re.compile(pattern or "(?!)"), names, encoder


def chat_ids(tokenizer, messages, **options):
    """Token ids of a conversation. A special token that a content spells is text: only the template writes tokens.

    Such texts are rendered as stand-ins, which no text can hold (halves of surrogate pairs), and the tokens that the
    rendering then has are the template's: they get their secret names. Other conversations are left to transformers.
    """
    pattern, names, encoder = special_tokens(tokenizer)
    if not any(pattern.search(message["content"]) for message in messages):
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)
    stand_ins = {token: f"\ud800{k}\udfff" for k, token in enumerate(names)}
    hidden = [message | {"content": pattern.sub(lambda found: stand_ins[found[0]], message["content"])}
              for message in messages]
    text = tokenizer.apply_chat_template(hidden, tokenize=False, **options)
    text = pattern.sub(lambda found: names[found[0]], text)
    for token, stand_in in stand_ins.items():
        text = text.replace(stand_in, token)
    return encoder.encode(text, add_special_tokens=False).ids


def render(tokenizer, messages, **options):
    """Token ids of a conversation, with one BOS where the tokenizer begins a text with one.

    Some templates write it, others (Zephyr's) leave it to the tokenizer, and the model was trained with it either way.
    """
    try:
        ids = chat_ids(tokenizer, messages, **options)
    except Exception as error:  # templates refuse some role orders with an exception of their own
        raise InputError(f"the chat template refuses {shown(messages)} ({str(error)[:100]}): "
                         "mend it, or name another template with --chat-template")
    bos = [tokenizer.bos_token_id]
    return bos + ids if tokenizer("").input_ids[:1] == bos and ids[:1] != bos else ids


def prompt_ids(tokenizer, messages, where):
    """The prompt as the model sees it, up to where its answer begins."""
    try:
        ids = render(tokenizer, messages, add_generation_prompt=True)
    except InputError as error:
        raise InputError(f"{where}: {error}")
    if not ids:
        raise InputError(f"{where}: the chat template makes no tokens of this prompt: "
                         "name another template with --chat-template")
    return ids


def response_ids(tokenizer, messages, prompt, text, ends):
    """The response as the chat template writes it after `prompt` (ids), with one end token, the last.

    The ids are sliced from the joint rendering, which is what the model was trained on. Where the text merges
    with the prompt's last token there is no such slice, and the response is tokenised alone, as it is sampled.
    """
    joint = render(tokenizer, messages + [{"role": "assistant", "content": text}])
    if joint[:len(prompt)] == prompt:
        ids = joint[len(prompt):]
    else:
        ids = special_tokens(tokenizer)[2].encode(text, add_special_tokens=False).ids
    last = max((k for k, i in enumerate(ids) if i in ends), default=None)
    if last is not None and not tokenizer.decode(ids[last + 1:]).strip():  # "<|im_end|>\n" ends with the former
        return ids[:last + 1]
    return ids + [ends[0]]


# ---------------------------------------------------------------------------------------------
# Log-probs

Batch = namedtuple("Batch", "ids positions mask at labels lengths")


def collate(rows, device, span=0):
    """[(prompt ids, [response ids, ...]), ...] -> Batch, padded on the right. For ([5, 6], [[7, 8, 9], [4, 3]]):

        ids        (B, T) int64      [[5, 6, 7, 8, 4]]    the last token of a response predicts nothing and is left out
        positions  (B, T) int64      [[0, 1, 2, 3, 2]]    None where no prompt is shared
        mask       (B, 1, T, T) bool                      who sees whom: neither response the other; None likewise
        at         (N,) int64        [1, 2, 3, 1, 4]      where in ids, flat, a response token is predicted
        labels     (N,) int64        [7, 8, 9, 4, 3]      what is predicted there
        lengths    list              [3, 2]               tokens of each response, in the order of the rows

    A prompt is computed once for all its responses where it has at most `span` tokens with any of them (`shared_span`),
    else once for each. Built from lengths, never from `ids == pad`, so an EOS that is also the padding keeps its label.
    """
    lengths = [len(y) for _, ys in rows for y in ys]
    labels = torch.tensor([i for _, ys in rows for y in ys for i in y])
    if any(len(x) + len(y) > span for x, ys in rows for y in ys):
        rows = [(x, [y]) for x, ys in rows for y in ys]
    ids, at = padded([[*x, *(i for y in ys for i in y[:-1])] for x, ys in rows]), []
    for b, (x, ys) in enumerate(rows):
        last, end = b * ids.shape[1] + len(x) - 1, b * ids.shape[1] + len(x)
        for y in ys:
            start, end = end, end + len(y) - 1
            at += [last, *range(start, end)]
    positions = mask = None  # causal attention is enough for one response: none of its tokens sees the padding
    if any(len(ys) > 1 for _, ys in rows):
        positions = padded([[*range(len(x)), *(len(x) + i for y in ys for i in range(len(y) - 1))] for x, ys in rows])
        # 0 for the prompt, k for its k-th response, -1 for the padding
        part = padded([[0] * len(x) + [k for k, y in enumerate(ys, 1) for _ in y[:-1]] for x, ys in rows], fill=-1)
        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        mask = (seen & (positions[:, None, :] <= positions[:, :, None]))[:, None].to(device)
        positions = positions.to(device)
    return Batch(ids.to(device), positions, mask, torch.tensor(at).to(device), labels.to(device), lengths)


def padded(rows, fill=0, side="right"):
    """Lists of integers as a tensor (B, T), padded on that side."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill,
                                     padding_side=side)


class ResponseLogps(nn.Module):
    """A causal language model as what the stages ask of it. DDP and FSDP wrap this."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def hidden(self, batch):
        """[hidden states (N, d) from which the response tokens are predicted, the head's weight (V, d), its bias or None]"""
        states = self.model.base_model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask,
                                       use_cache=False).last_hidden_state  # (B, T, d)
        head = self.model.get_output_embeddings()
        values = [states.flatten(0, 1)[batch.at], head.weight, head.bias]
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            values = [value if value is None else value.to(dtype) for value in values]
        return values

    def forward(self, batch, other=None, mix=None):
        """log pi(y_t | x, y_<t) of each response token, (N,).

        With another ResponseLogps, and mix, a function of both models' logits: also the other's, and those of
        mix(logits, other logits), from the same chunks of logits. No gradient flows through these two.
        """
        with torch.no_grad():
            others = None if other is None else other.hidden(batch)
        return HeadLogps.apply(*self.hidden(batch), batch.labels, others, mix)


def chunk_rows(weight):
    """Tokens whose logits are held at a time: 1 GB on a GPU, 128 MB on a CPU, of each model and of their mix. weight: (V, d)"""
    return max(1, (2 ** 28 if weight.is_cuda else 2 ** 25) // len(weight))


class HeadLogps(torch.autograd.Function):
    """Log-probs of labels from hidden states, through the head in chunks: its logits (N, V) are never whole.

    The backward pass makes them again, unless one chunk held them all. Log-probs are taken in float32 whatever the head's
    dtype: those of a response in bf16 err by nats.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, other, mix):
        """hidden (N, d), weight (V, d), bias (V,) or None, labels (N,), other: as the first three, of another model"""
        rows = chunk_rows(weight)
        ctx.chunks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
        ctx.kept, logps = None, []
        for chunk in ctx.chunks:
            logits = [F.linear(hidden[chunk], weight, bias).float()]
            if other is not None:
                logits.append(F.linear(other[0][chunk], *other[1:]).float())
                logits.append(mix(*logits))
            found = [token_logps_in_place(values, labels[chunk]) for values in logits]
            logps.append([logp for logp, _ in found])
            if len(ctx.chunks) == 1 and any(ctx.needs_input_grad):
                ctx.kept = logits[0], found[0][1]
        logps = [torch.cat(parts) for parts in zip(*logps)]
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.mark_non_differentiable(*logps[1:])
        return tuple(logps) if other is not None else logps[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, bias, labels = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for chunk in ctx.chunks:
            if ctx.kept is None:
                logits = F.linear(hidden[chunk], weight, bias).float()
                total = token_logps_in_place(logits, labels[chunk])[1]
            else:
                logits, total = ctx.kept
            # the gradient of a log-prob by the logits is the one-hot label less the softmax
            logits.mul_(-grad[chunk, None] / total).scatter_add_(1, labels[chunk, None], grad[chunk, None])
            grad_logits = logits.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[chunk]
            if bias is not None:
                grad_bias += logits.sum(0)
        ctx.kept = None
        return grad_hidden, grad_weight, grad_bias, None, None, None


def token_logps_in_place(logits, labels):
    """log pi(y_t | x, y_<t) of N response tokens (N,), and the sums (N, 1) of exp(logits - their maximum).

    logits (N, V), which become that exp: the softmax, but for the sums; labels (N,). To fill a second (N, V) takes longer
    than the arithmetic.
    """
    label_logits = logits.gather(1, labels[:, None])
    highest = logits.amax(1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    return (label_logits - highest - total.log())[:, 0], total


def response_logps(logp, lengths):
    """log pi(y | x): the sum over each response's tokens, not their mean. logp (N,), lengths of B responses -> (B,)"""
    return torch.stack([tokens.sum() for tokens in logp.split(lengths)])


@torch.no_grad()
def shared_span(model):
    """Tokens of a prompt and a response up to which the prompt may be computed once for several responses.

    0 where the model's layers do not follow a mask and positions of our own: seen by trying. Beyond a layer's window or
    chunk of attention, which such a mask would override, it is not exact.
    """
    config = model.config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rows = [([1, 2], [[3, 4], [2, 1], [1]])]
    try:
        shared, alone = (ResponseLogps(model)(collate(rows, model.device, span)) for span in (4, 0))
    except Exception:  # a model that takes no such mask
        return 0
    exact = torch.allclose(shared, alone, rtol=0, atol=1e-4 if model.dtype == torch.float32 else 0.1)
    return min((span for span in spans if span), default=math.inf) if exact else 0


# ---------------------------------------------------------------------------------------------
# Sampling


def uniforms(seed, key, sample, steps):
    """The numbers in [0, 1) that decide a sample, one a token: by (seed, prompt id, sample), not by rank or batch."""
    digest = hashlib.blake2b(json.dumps([seed, key, sample]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest))).random(steps)


def pick(logits, u, temperature):
    """The token at which the cumulative distribution passes u. logits (B, V), u (B,) float64 -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, u, temperature, max_new_tokens, ends):
    """Sampled responses: (token ids, "eos" or "length") for each of the n samples of each of the B prompts.

    model: in eval mode; prompts: B lists of ids; u: (B, n, max_new_tokens), see `uniforms`; ends: ids that end a
    response. One prefill serves the n samples, and rows that have ended leave the batch.
    """
    device, n = model.device, u.shape[1]
    ids = padded(prompts, side="left").to(device)  # every row's next token is in the last column
    mask = padded([[1] * len(prompt) for prompt in prompts], side="left").to(device)
    u = torch.as_tensor(u, device=device).flatten(0, 1)
    ends = torch.tensor(ends, device=device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True, logits_to_keep=1)
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, logits = out[cache_name], out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = mask.repeat_interleave(n, 0)
    tokens = torch.full((len(u), max_new_tokens), -1, device=device)
    rows = torch.arange(len(u), device=device)  # those still going on
    for step in range(max_new_tokens):
        token = pick(logits, u[rows, step], temperature)
        tokens[rows, step] = token
        going = ~torch.isin(token, ends)
        if step + 1 == max_new_tokens or not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, token, mask = rows[going], token[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
                       use_cache=True, **{cache_name: cache}).logits[:, -1]
    sampled = [[i for i in row if i >= 0] for row in tokens.tolist()]
    finished = [(ids, "eos" if ids[-1] in ends.tolist() else "length") for ids in sampled]
    return [finished[b:b + n] for b in range(0, len(finished), n)]


# ---------------------------------------------------------------------------------------------
# LLM-as-judge

LETTERS = ("A", "B")


def as_text(messages):
    """A conversation as plain text: one user turn is its content, more turns are told apart by their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def judging_prompt(messages, one, two):
    """Listing 1, as messages. The answer is the letter of the better response."""
    return as_messages("Consider the following conversation between a human and an assistant:\n"
                       f"{as_text(messages)}\n"
                       "Please choose the response that is the most helpful, honest, and harmless.\n"
                       f"Options:\n(A) {one}\n(B) {two}\n"
                       "The answer is:")


# ---------------------------------------------------------------------------------------------
# The small world's gold judge


def read_gold(path):
    """{thing: {sentence: value}}, as 00_inputs.py writes it."""
    with contextlib.suppress(OSError, ValueError, AttributeError, InputError):
        gold = parse_json(Path(path).read_text(encoding="utf-8-sig"), path)
        values = [value for known in gold.values() for value in known.values()]
        if values and all(type(value) in (int, float) and abs(value) <= 1 for value in values):
            return gold
    raise InputError(f"{path}: is no gold judge {{thing: {{sentence: value}}}}: give 00_inputs.py's gold.json")


def gold_values(gold, prompt, text):
    """The value of each sentence of a response: 1, 0, -1; None where it is malformed, off the topic or said before.

    prompt: messages; gold: {thing: {sentence: value}}, as 00_inputs.py writes it.
    """
    known = next((gold[word] for word in prompt[-1]["content"].split() if word in gold), {})
    sentences = [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", text) if s.strip()]  # the last may be unfinished
    return [known.get(s) if sentences.index(s) == k else None for k, s in enumerate(sentences)]


def gold_score(gold, prompt, text):
    """What a response is worth, in [-1, 1]: the mean over its sentences, so that length alone gains nothing.

    A malformed or repeated sentence is worth -1, and so is a response without any.
    """
    values = [-1 if value is None else value for value in gold_values(gold, prompt, text)] or [-1]
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------
# Training


def load_policy(args, ranks):
    """(the model of --model in train mode, its dropout 0; what the loop calls: the model under DDP or FSDP)"""
    device = torch.device("cpu") if is_sharded(args, ranks) else ranks.device  # whole, it may not fit on a GPU
    model = load_model(args.model, device)
    model.train()
    if args.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    policy = ResponseLogps(model)
    if is_sharded(args, ranks):
        policy = shard(policy, ranks)
    elif ranks.world > 1:
        policy = nn.parallel.DistributedDataParallel(policy, gradient_as_bucket_view=True)
    return model, policy


def load_reference(name, args, ranks):
    """pi_ref, as the policy is computed: from float32 weights, with --fsdp from the dtype in which that is sent.

    Its weights require no gradient: autocast keeps a bf16 copy of those that do.
    """
    dtype = scoring_dtype(ranks.device) if is_sharded(args, ranks) else torch.float32
    return ResponseLogps(load_model(name, ranks.device, dtype).requires_grad_(False))


def is_sharded(args, ranks):
    return args.fsdp and ranks.world > 1


def shard(module, ranks, method="forward"):
    """FSDP2: each rank holds its part of every weight, and gathers a layer when it is computed, in bf16 on a GPU.

    method: what is called of the module from outside
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # takes seconds
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,))
    dtypes = MixedPrecisionPolicy(param_dtype=scoring_dtype(ranks.device), reduce_dtype=torch.float32)
    for layer in list(module.modules()):
        if type(layer).__name__ in module.model._no_split_modules:
            fully_shard(layer, mesh=mesh, mp_policy=dtypes)
    fully_shard(module, mesh=mesh, mp_policy=dtypes, reshard_after_forward=False)
    if method != "forward":
        register_fsdp_forward_method(module, method)
    return module


def store_logps(ref, pairs, args, partial, ranks):
    """pair["logps_ref"]: [log pi_ref(y_w | x), log pi_ref(y_l | x)] of each of the pairs. They stay what they are."""
    lengths = [len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs]
    batches = length_batches(lengths, args.micro_batch_size, args.micro_batch_tokens)

    def compute(indices):
        return pair_logps(ref, [pairs[i] for i in indices], ranks.device)

    for i, logps in map_batches(compute, batches, partial, ranks, "scoring with pi_ref").items():
        pairs[i]["logps_ref"] = logps


@torch.no_grad()
def pair_logps(model, pairs, device):
    """[[log pi(y_w | x), log pi(y_l | x)]] of the pairs, in one batch. model: a ResponseLogps"""
    rows = [(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs]
    batch = collate(rows, device, model.model.shared_span)
    with autocast(device):
        logp = model(batch)
    return response_logps(logp, batch.lengths).view(-1, 2).tolist()


def clip_gradient(model):
    """The norm of the gradient, which is scaled down to 1.0 where it is larger."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # a DTensor where it is sharded


def make_optimizer(model, lr, steps):
    """AdamW without weight decay; the rate rises over the first 10 % of the steps, then falls as a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, -(-steps // 10), steps)


def epoch_batches(count, batch_size, epochs, seed):
    """Indices of each optimizer step: every epoch visits each of `count` rows once, in an order of its own."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(count).tolist() for _ in range(epochs)]
    return [order[i:i + batch_size] for order in orders for i in range(0, count, batch_size)]


def micro_batches(rows, args, ranks, length):
    """This rank's (rows, weight) of one optimizer step, rows of like length together (see `length_batches`).

    They are as many on every rank: of 32 rows, 4 ranks have 8 each, also where a micro-batch could hold all 32.
    """
    share = math.ceil(len(rows) / ranks.world)
    size = math.ceil(share / math.ceil(share / args.micro_batch_size))
    batches = length_batches([length(row) for row in rows], size, args.micro_batch_tokens)
    return [([rows[i] for i in batch], weight) for batch, weight in in_turn(batches, ranks)]


def in_turn(batches, ranks):
    """This rank's (batch, weight). Where there are not enough for all ranks, some get the first one with weight 0:

    DDP and FSDP need every rank to take part in every forward pass.
    """
    weighted = [(batch, 1) for batch in batches] + [(batches[0], 0)] * (-len(batches) % ranks.world)
    return weighted[ranks.rank::ranks.world]


def sync(policy, last):
    """DDP sums the gradients over the ranks in the last micro-batch of a step only, FSDP in each."""
    return policy.no_sync() if hasattr(policy, "no_sync") and not last else contextlib.nullcontext()


def pair_rows(rows, logged):
    """[{"id", name: value}] of the b rows of a micro-batch. logged: {name: (b,)}"""
    columns = [values.detach().tolist() for values in logged.values()]
    return [{"id": row["id"], **dict(zip(logged, values))} for row, *values in zip(rows, *columns)]


def check_finite(step, rows, grad_norm, partial):
    """Raises InputError before a step that would put NaN into the weights, naming the rows it comes from."""
    bad = [row["id"] for row in rows if not np.isfinite(row["loss"])]
    if bad or not np.isfinite(grad_norm):
        ids = ", ".join((bad or [row["id"] for row in rows])[:5])
        raise InputError(f"step {step + 1}: the loss or its gradient is not finite (ids {ids}): lower --lr, or look at "
                         f"these rows; what was saved before is kept in {partial}")


def save_trained(args, partial, ranks, model, tokenizer, counts, started):
    """The trained model and the metrics of its steps, as the output."""
    weights = model.state_dict()
    if is_sharded(args, ranks):
        states, whole = whole_states()
        weights = states.get_model_state_dict(model, options=whole)
    on_first_rank(lambda: write_trained(args, partial, model, weights, tokenizer, counts, started), ranks)


def write_trained(args, partial, model, weights, tokenizer, counts, started):
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise InputError("the last step left weights that are not finite: lower --lr; what was saved before is kept in "
                         f"{partial}")
    shutil.rmtree(partial / "model", ignore_errors=True)  # a kill may have left half of it
    save_model(model, tokenizer, partial / "model", weights)
    shutil.copyfile(partial / "metrics.jsonl", partial / "model" / "metrics.jsonl")
    close_output(args, partial, partial / "model", counts, started)


def whole_states():
    """(torch's functions for states, their options for one as a single process has it, on the CPU of rank 0)

    Imported where they are needed: it takes seconds, which most stages spare.
    """
    from torch.distributed.checkpoint import state_dict
    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def load_state(partial, ranks, model, optimizer, scheduler):
    """What save_state saved last, already put into model, optimizer and scheduler; {"step": 0} where there is nothing.

    metrics.jsonl becomes what it was then: the steps taken since will be taken again.
    """
    state = newest_state(partial)
    if len(set(gather([state["step"]]))) > 1:
        raise InputError(f"{partial}: the ranks find different states in it: put --output where all of them see it")
    if state["step"] > 0:
        states, whole = whole_states()
        states.set_state_dict(model, optimizer, model_state_dict=state.pop("model"),  # put onto the device: not to stay
                              optim_state_dict=state.pop("optimizer"), options=whole)
        scheduler.load_state_dict(state["scheduler"])
    if ranks.rank == 0:
        if state["step"] > 0:
            print(f"going on after step {state['step']}", flush=True)
        (partial / "metrics.jsonl").write_text(state.get("metrics", ""))
    this_run.training = True
    return state


def newest_state(partial):
    """The newest state that can be read; one that is damaged is passed over, and rank 0 says so."""
    for path in reversed(saved_states(partial)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds
            if first_rank():
                print(f"{path}: cannot be read ({type(error).__name__}): passed over for the one before", flush=True)
    return {"step": 0}


def saved_states(partial):
    """Paths of the states in a folder, the newest last."""
    return sorted(partial.glob("state-*.pt"), key=state_step)


def state_step(path):
    return int(path.stem.removeprefix("state-"))


def save_due(step, steps, every):
    """Whether to save after this step: it is one of `every`, or some rank was asked to stop. Not after the last."""
    asked = [number for number in gather([this_run.asked]) if number]
    this_run.agreed = asked[0] if asked else None
    return step < steps and bool(asked or step % every == 0)


def save_state(partial, ranks, step, model, optimizer, scheduler, **state):
    """All that `load_state` needs to go on after `step` steps. There is no random state: dropout is 0, and the order
    of the rows follows from --seed. Raises Stopped where that is what it was saved for.
    """
    states, whole = whole_states()
    weights, moments = states.get_state_dict(model, optimizer, options=whole)
    state |= {"step": step, "model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    on_first_rank(lambda: write_state(partial, state), ranks)
    if this_run.agreed:
        raise Stopped(this_run.agreed)


def write_state(partial, state):
    """state-STEP.pt, of which the newest two are kept: flushed to disk under a temporary name, then renamed."""
    path, temporary = partial / f"state-{state['step']}.pt", partial / "state.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state | {"metrics": (partial / "metrics.jsonl").read_text()}, file)
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(partial)
    except (OSError, RuntimeError) as error:  # the system's, or torch's with the system's behind it
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path}: cannot be written ({cause}): {kept()}")
    finally:
        temporary.unlink(missing_ok=True)  # half of it would only fill the disk
    for old in saved_states(partial)[:-2]:
        old.unlink()


def log_step(partial, progress, step, rows, **more):
    """A line of metrics.jsonl: the means over the step's rows, and what else is known of the step."""
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "id"}
    with open(partial / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step + 1, **mean, **more}) + "\n")
    progress.set_postfix({name: f"{mean[name]:.3f}" for name in ("loss", "accuracy") if name in mean}, refresh=False)
