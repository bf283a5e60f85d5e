"""What makes a run safe: errors in one line, checks of options, files and outputs that are whole or absent, resuming.

Every stage uses it; SPA can be understood without reading it. Of models it knows only the state of their training.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from array import array
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
import torch.distributed as dist
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Errors


class InputError(Exception):
    """Something that the user has to fix. Its text is the one line they see: where, what was found, what to do."""


@dataclass
class ThisRun:
    """What `run` and the signal handler need to know about the stage that is running."""
    started: float = 0.0
    work: Path | None = None     # the folder that open_output made
    lock: IO | None = None       # the locked file in it
    training: bool = False       # a signal waits until the step is done and saved
    asked: int | None = None     # the signal that asked this rank to stop


this_run = ThisRun()


def run(main):
    """Run a stage's main(). Turns any early exit into one stderr line and an exit status.

    InputError, or an error of the system such as a full disk: 2. Ctrl-C: 130. SIGTERM: 143.
    """
    global this_run
    escape_output()
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            torchrun_ranks()
            main()
        finally:  # finish printing: torchrun stops the other ranks as soon as one exits
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)
    except InputError as error:
        exit_with(error)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if not first_rank() and not dist.is_initialized():  # torchrun has passed the signal to the first rank too
            sys.exit(128 + number)
        exit_with(f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: {resume_hint()}", 128 + number)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # no space left, no permission
            exit_with(f"{error.filename or this_run.work or 'writing'}: {error.strerror}: {resume_hint()}")
        if isinstance(error, torch.OutOfMemoryError):
            exit_with("the GPU has too little memory: lower --micro-batch-size, or when training --micro-batch-tokens, "
                      f"or add --gradient-checkpointing: {resume_hint()}")
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo has no class
            exit_with(f"another rank has ended (see torchrun's report below): {resume_hint()}")
        if not should_report():
            sys.exit(1)
        raise
    else:
        if dist.is_initialized():  # not after an error: it could wait for ranks that are gone
            dist.destroy_process_group()  # a gloo thread that needs the GIL at shutdown would abort Python
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if this_run.lock:
            this_run.lock.close()
        this_run = ThisRun()


def escape_output():
    """From now on print what stdout and stderr cannot encode, say a path outside ASCII, as escapes: it is no error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # no stream of Python's own
            stream.reconfigure(errors="backslashreplace")


def on_signal(number, frame):
    """Stop at once. In training: after the step is done and saved, unless it is the second Ctrl-C."""
    if not this_run.training or this_run.asked and number == signal.SIGINT:
        raise KeyboardInterrupt(number)  # for SIGTERM too: `except Exception` must not swallow it
    this_run.asked = number
    if number == signal.SIGINT and first_rank():
        os.write(2, b"\nstopping after this step is done and saved; press Ctrl-C again to stop at once\n")


def resume_hint():
    """What a stopped stage has saved, for its last line."""
    work = this_run.work
    states = saved_states(work) if work else []
    if states:
        return f"{work} has the state after step {states[-1][0]}: rerun the command to resume from it"
    if work and has_work(work) and not this_run.training:
        return f"finished work is kept in {work}: rerun the command to resume"
    return "nothing was saved yet: rerun the command to start again"


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def torchrun_ranks():
    """(rank, number of ranks, rank on this machine), which torchrun sets; (0, 1, 0) without it.

    Raises InputError where there is more than one rank and a part of it is missing.
    """
    found = {name: os.environ.get(name, "") for name in TORCHRUN}
    if found["WORLD_SIZE"] in ("", "1"):
        return 0, 1, 0
    rank, world, local_rank = (int(found[name]) if found[name].isdecimal() else -1 for name in TORCHRUN[:3])
    if min(rank, local_rank) < 0 or rank >= world or not (found["MASTER_ADDR"] and found["MASTER_PORT"].isdecimal()):
        given = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise InputError(f"{given}: torchrun sets all of them: start the stage with it, or unset WORLD_SIZE")
    return rank, world, local_rank


def first_rank():
    try:
        return torchrun_ranks()[0] == 0
    except InputError:  # every process says so
        return True


def in_one_process(what):
    """Raises InputError where torchrun has started several processes: `what` is no work to share."""
    if torchrun_ranks()[1] > 1:
        raise InputError(f"{what} runs in one process: start it without torchrun")


def exit_with(message, status=2):
    """Print one line, on one rank, and exit. Control characters are escaped."""
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)[:4000])
    if should_report():
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def should_report():
    """Whether this rank is the first to report an error: most errors occur on all ranks, or stop the others too."""
    if dist.is_initialized():
        try:
            return dist.distributed_c10d._get_default_store().add("errors reported", 1) == 1
        except RuntimeError:  # the rank that holds the store is gone
            return False
    if not first_rank():  # no process group yet: if the first rank fails as well, torchrun stops this one meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    return True


# ---------------------------------------------------------------------------------------------
# Options


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line as everywhere else, and no abbreviated options: 03 looks for --judge itself."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, words=None):
        for word in sys.argv[1:]:
            if "\0" in word or any("\ud800" <= c <= "\udfff" for c in word):  # a surrogate stands for a bad byte
                self.error(f"{word!r} is not UTF-8 text")
        return super().parse_args(words)

    def error(self, message):
        exit_with(f"{message}: --help lists the options")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):  # NaN too
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} in [{low}, {high}]"  # argparse's name for it in errors
    return parse


positive, natural = number(int, 1, 2**63 - 1), number(int, 0, 2**63 - 1)
nonnegative, share = number(float, 0), number(float, 0, 1)


def add_training_options(add, rows, micro_batch_size):
    """The options of 00_sft, 01 and 04 on lengths, memory and safety. rows: what they train on, for help"""
    add("--max-prompt-length", type=positive, default=1024, help=f"{rows} with a longer prompt are dropped")
    add("--max-length", type=number(int, 2), default=2048, help="prompt + response; responses are cut to fit")
    add("--micro-batch-size", type=positive, default=micro_batch_size, help=f"most {rows} per forward pass on a rank")
    add("--micro-batch-tokens", type=positive, help="maximum padded tokens per forward pass (one row may exceed it)")
    add("--gradient-checkpointing", action="store_true", help="less memory for more compute")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer over the ranks, for less memory")
    add("--save-every", type=positive, default=100, help="save a state to resume from every N steps")


# ---------------------------------------------------------------------------------------------
# Files


def parse_json(text, where, nan=False):
    """json.loads that rejects what cannot be written back: lone surrogates; NaN and infinities unless nan=True.

    Token ids become arrays. Raises InputError, also where lists are nested too deep (RecursionError).
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=nan).encode()
        return pack(value)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: cannot be read as JSON: {text[:60]!r}: write one object a line, in UTF-8")


def pack(value):
    """Lists of integers, which are token ids, as arrays: 4 bytes a token, where a list takes about 40."""
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    if all(type(item) is int and -2**31 <= item < 2**31 for item in value):
        return array("i", value)
    return [pack(item) for item in value]


@contextlib.contextmanager
def open_text(path, expected, errors="strict"):
    """A text file in UTF-8, plain or gzip, opened for reading. expected: what the user should give, for errors"""
    try:
        with open(path, "rb") as file:
            opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
        with opened(path, "rt", encoding="utf-8-sig", errors=errors) as file:
            yield file
    except (OSError, EOFError, zlib.error, ValueError) as error:
        cause = getattr(error, "strerror", None) or type(error).__name__  # the system's message is without the path
        raise InputError(f"{path}: cannot be read ({cause}): give {expected}")


def read_text(path, expected):
    with open_text(path, expected) as file:
        return file.read()


def write_jsonl(path, rows, indent=None):
    texts = (json.dumps(row, indent=indent, ensure_ascii=False, default=list) for row in rows)  # list: for arrays
    write_file(path, lambda file: file.writelines(f"{text}\n".encode() for text in texts))


def write_json(path, value):
    write_jsonl(path, [value], indent=2)


def write_file(path, write):
    """Write, by write(file), to a temporary name beside `path`, then rename: the file is the old or the new one.

    Where that fails, nothing is left of the new one: half of it would only fill the disk.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(*paths):
    """Flush files and folders to the disk: otherwise a rename could reach it before the file's content."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# Outputs: made in OUTPUT.partial and renamed to OUTPUT when complete. args.json says what an output was made with, so
# that a stage that is started again resumes, finds its work done, or refuses to overwrite.


def args_path(output):
    """The record of an output: args.json in a folder, NAME.args.json beside a file."""
    output = Path(output)
    return output / "args.json" if output.is_dir() else output.with_name(output.name + ".args.json")


def read_record(output):
    return json.loads(args_path(output).read_text(encoding="utf-8"))


def fingerprint(path):
    """A short hash of a file, or of a model's or an evaluation's folder. A name on the Hub is returned as it is.

    Of large weights it reads 1,024 blocks of 16 KB, spread evenly over the file.
    """
    if isinstance(path, list):
        return [fingerprint(p) for p in path]
    path, found, block = Path(path), hashlib.sha256(), 2 ** 14
    if not path.exists():
        return str(path)
    files = {"": path}
    if not path.is_file():
        files = {file.name: file for file in sorted(path.iterdir())
                 if file.suffix in (".json", ".jsonl", ".jinja", ".safetensors") and file.name != "args.json"}
    for name, file in files.items():
        size = file.stat().st_size
        step = max(block, size // 1024) if file.suffix == ".safetensors" else block
        found.update(f"{name}{size}".encode())
        with open(file, "rb") as content:
            for start in range(0, size, step):
                content.seek(start)
                found.update(content.read(block))
    return found.hexdigest()[:16]


def begun():
    """The time at which the output was begun, the same in a run that resumes it: a chat template may write the date."""
    return datetime.fromisoformat(read_record(this_run.work)["begun"]) if this_run.work else datetime.now()


# options that change rounding alone
ROUNDING = ("--micro-batch-size", "--micro-batch-tokens", "--gradient-checkpointing")


def open_output(args, *inputs, free=("output", "save_every")):
    """The folder to work in, OUTPUT.partial. inputs: names of the options that are files or models to read.

    Exits with status 0 where the output is complete. Raises InputError where the output, or what there is of it, was
    made with other arguments or from other inputs, or where another run is making it. Options in `free` do not change
    the output. Those in ROUNDING may differ too, as after an out-of-memory error; args.json has the last ones.
    """
    global this_run
    output = Path(args.output)
    work = Path(f"{output}.partial")
    for path in (output, work):
        if path.is_symlink() and (path == work or not path.exists()):  # the output would be written elsewhere
            raise InputError(f"{path}: is a symlink: remove it or choose another --output")
    options = {k: v for k, v in vars(args).items() if k not in free}
    read = [k for k in (*inputs, "tokenizer", "chat_template") if options.get(k)]
    made_from = {"stage": Path(sys.argv[0]).name, "args": options, "inputs": {k: fingerprint(options[k]) for k in read}}
    made_from = json.loads(json.dumps(made_from))
    exit_if_complete(output, work, made_from)
    this_run = ThisRun(started=time.time(), work=work)
    if first_rank():
        work.mkdir(parents=True, exist_ok=True)
        lock(output, work)
        exit_if_complete(output, work, made_from)  # the run that held the lock until now may have completed it
    start = datetime.now().isoformat()
    if has_work(work):
        other = check_made_from(work, made_from)
        start = read_record(work)["begun"]
        if first_rank():
            print(f"{output}: resuming{other and ' what was made with ' + other}", flush=True)
    if first_rank():
        write_json(work / "args.json", {"made_from": made_from, "begun": start})
    return work


def exit_if_complete(output, work, made_from):
    """Exit with status 0 where the output exists. Raises InputError where it was made from something else."""
    if not output.exists():
        return
    other = check_made_from(output, made_from)
    if first_rank():
        shutil.rmtree(work, ignore_errors=True)  # left by a kill just after the rename
        print(f"{output}: already complete ({other and 'with ' + other or 'same arguments'}); nothing to do")
    sys.exit(0)


def check_made_from(path, new):
    """Raises InputError unless the args.json of `path` says that it was made from the same.

    Returns in which options of ROUNDING it was not, in words: "--micro-batch-size 4 (now 2)".
    """
    def differences(part):
        return {f"--{k.replace('_', '-')}": f"{old[part].get(k)} (now {new[part].get(k)})"
                for k in old[part] | new[part] if old[part].get(k) != new[part].get(k)}

    try:
        record = read_record(path)
        old, _ = record["made_from"], datetime.fromisoformat(record["begun"])
        stage, options, contents = old["stage"], differences("args"), differences("inputs")
    except Exception:  # there is no such record, or it is damaged
        raise InputError(f"{path}: exists and does not say how it was made: move it or choose another --output")
    rounding = [f"{k} {options.pop(k)}" for k in ROUNDING if k in options]
    others = [f"{k} {values}" for k, values in options.items()] + [f"another content of {k}" for k in contents]
    if stage != new["stage"]:
        others = [f"another stage, {stage}"]
    if others:
        raise InputError(f"{path}: was made with {', '.join(others)}: delete it or choose another --output")
    return ", ".join(rounding)


def lock(output, work):
    """Lock work/lock until this process ends, however it ends. Raises InputError where another process holds it."""
    this_run.lock = open(work / "lock", "ab")
    try:
        fcntl.flock(this_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output}: another run is making it: wait for it, or choose another --output")
    except OSError:  # a file system without locks
        pass


def has_work(work):
    """Whether a stage has written anything but its arguments."""
    return any(path.name not in ("args.json", "lock") and path.suffix != ".tmp" and path.is_file()
               and path.stat().st_size > 0 for path in work.rglob("*"))


def close_output(args, work, made, counts):
    """Rename `made`, a file or folder in `work`, to the output; write its args.json; print the counts.

    Everything is flushed to the disk before the rename: after a power cut the output is complete or absent.
    """
    record = read_record(work)
    versions = {"python": sys.version.split()[0], "torch": version("torch"), "transformers": version("transformers")}
    record |= {"counts": counts, "seconds": round(time.time() - this_run.started, 1), "versions": versions}
    write_json(made / "args.json" if made.is_dir() else args_path(args.output), record)
    to_disk(made, *made.rglob("*"))
    os.replace(made, args.output)
    to_disk(Path(args.output).parent)
    this_run.lock.close()  # an open file can keep a network file system from removing its folder
    shutil.rmtree(work, ignore_errors=True)
    summary = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{args.output}: {summary} ({record['seconds']:.0f} s)")


# ---------------------------------------------------------------------------------------------
# Progress of a stage, and of its training


def progress(steps, label, ranks):
    """A bar with rate and time left, on rank 0; in a log, a line every half minute."""
    options = dict(mininterval=0.2, dynamic_ncols=True)
    if not sys.stderr.isatty():  # a bar cannot be redrawn there
        lines = SimpleNamespace(write=lambda text: text.strip() and sys.stderr.write(text.strip() + "\n"))
        options = dict(mininterval=30, file=lines, bar_format="{desc}: {n_fmt} of {total_fmt} in {elapsed}, "
                       "{remaining} left, {rate_fmt}{postfix}")
    return tqdm(steps, desc=label, disable=ranks.rank != 0, leave=False, miniters=1, delay=2, **options)


def log_step(work, bar, step, rows, **more):
    """A line of metrics.jsonl: the means over the step's rows, and `more`, the step's other values."""
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "id"}
    with open(work / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step + 1, **mean, **more}) + "\n")
    shown = {"loss": "loss", "rewards/accuracies": "accuracy"}
    bar.set_postfix({shown[name]: f"{mean[name]:.3f}" for name in shown if name in mean}, refresh=False)


def check_finite(step, rows, grad_norm, work):
    """Raises InputError before a step that would put NaN into the weights, naming the rows it comes from."""
    bad = [row["id"] for row in rows if not math.isfinite(row["loss"])]
    if bad or not math.isfinite(grad_norm):
        ids = ", ".join((bad or [row["id"] for row in rows])[:5])
        raise InputError(f"step {step + 1}: the loss or its gradient is not finite (ids {ids}): lower --lr, or look at "
                         f"these rows; what was saved before is kept in {work}")


# ---------------------------------------------------------------------------------------------
# Resuming: finished batches


def append_journal(value, work, label, rank=0):
    """Append a line with a checksum to work/LABEL.RANK.jsonl, below one that a kill may have left half-written."""
    text = json.dumps(value)
    with open(work / f"{label}.{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(f"\n[{zlib.crc32(text.encode())}, {text}]\n")


def read_journal(work, label):
    """The values that all ranks have recorded. Skips lines that are half-written or damaged."""
    values = []
    for path in sorted(work.glob(f"{label}.*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                checksum, value = json.loads(line)
                if checksum == zlib.crc32(json.dumps(value).encode()):
                    values.append(pack(value))
    return values


# ---------------------------------------------------------------------------------------------
# Resuming: states of training


def load_state(work, ranks, model, optimizer, scheduler):
    """Restore the newest saved state; returns it without the weights and moments, {"step": 0} where there is none.

    metrics.jsonl is set back to that step: the steps taken since will be taken again.
    """
    state = newest_state(work)
    if len(set(ranks.gather([state["step"]]))) > 1:
        raise InputError(f"{work}: the ranks find different states in it: put --output where all of them see it")
    if state["step"] > 0:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict  # slow to import
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_state_dict(model, optimizer, model_state_dict=state.pop("model"),  # pop: free the device's copy
                       optim_state_dict=state.pop("optimizer"), options=whole)
        scheduler.load_state_dict(state["scheduler"])
    if ranks.rank == 0:
        if state["step"] > 0:
            print(f"resuming after step {state['step']}", flush=True)
        (work / "metrics.jsonl").write_text(state.get("metrics", ""), encoding="utf-8")
    this_run.training = True
    return state


def newest_state(work):
    """The newest state that can be read; rank 0 reports damaged ones."""
    for _, path in reversed(saved_states(work)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds
            if first_rank():
                print(f"{path}: cannot be read ({type(error).__name__}): trying the one before", flush=True)
    return {"step": 0}


def saved_states(work):
    """[(step, path)] of the states in a folder, the newest last."""
    return sorted((int(path.stem.removeprefix("state-")), path) for path in work.glob("state-*.pt"))


def save_if_due(every, steps, work, ranks, step, model, optimizer, scheduler, **state):
    """Every `every` steps, and where a rank was asked to stop, save what `load_state` needs to resume after `step`.

    Not after the last of `steps`. state: further fields that `load_state` returns. No RNG state is saved: dropout is 0,
    and the order of the rows follows from --seed. Every rank calls this. Raises KeyboardInterrupt if one is to stop.
    """
    asked = [number for number in ranks.gather([this_run.asked]) if number]
    if step == steps or not asked and step % every:
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # slow to import
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the CPU of rank 0
    weights, moments = get_state_dict(model, optimizer, options=whole)
    state |= {"step": step, "model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    ranks.on_first(lambda: write_state(work, state))
    if asked:
        raise KeyboardInterrupt(asked[0])


def write_state(work, state):
    """state-STEP.pt, with metrics.jsonl so far. The newest two are kept."""
    path = work / f"state-{state['step']}.pt"
    state["metrics"] = (work / "metrics.jsonl").read_text(encoding="utf-8")
    try:
        write_file(path, lambda file: torch.save(state, file))
        to_disk(work)
    except (OSError, RuntimeError) as error:  # the system's error, or torch's caused by one
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path}: cannot be written ({cause}): {resume_hint()}")
    for _, old in saved_states(work)[:-2]:
        old.unlink()
