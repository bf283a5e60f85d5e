"""Nothing lost: the small world, killed at random moments in every stage, ends with the files of an undisturbed run.

    python benchmarks/crash.py                                                # 50 kills
    SFT_SIZE=64 PROMPT_SIZES=24 ITERATIONS=1 python benchmarks/crash.py --kills 11   # settings of run_all.sh

Runs `bash run_all.sh world` in the same place twice: undisturbed, which also shows how long each stage takes, and once
more to complete what kills have left. The kills hit each stage's command, as run_all.sh --dry-run prints it, until the
stage is complete or has had its share: SIGKILL, or, one time in five, SIGTERM. The moment is drawn from the time that
the stage takes, so it may fall into its start, its work, its saving, its renaming. All files are compared: args.json
without "begun" and "seconds", every other file, weights too, byte for byte.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPT = ["bash", str(HERE.parent / "run_all.sh"), "world"]


def commands(environment):
    """{what a stage makes: its command}, in order."""
    listed = subprocess.run([*SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in listed.splitlines()]
    return {words[words.index("--output") + 1]: words for words in lines}


def content(folder):
    """{file: digest, or what args.json says}"""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.endswith("args.json"):
            record = json.loads(path.read_text())
            del record["begun"], record["seconds"]
            found[name] = record
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def undisturbed(environment, stages, log):
    """Run run_all.sh to its end -> seconds of each stage."""
    seconds = []
    with subprocess.Popen(SCRIPT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        for output in stages:
            began = time.time()
            # until the stage prints that its output is complete
            any(line.startswith(f"{output}: ") and "resuming" not in line for line in process.stdout)
            seconds.append(time.time() - began)
        process.stdout.read()
        seconds[-1] = time.time() - began  # the last command makes several outputs
    if process.returncode != 0:
        sys.exit(f"crash.py: run_all.sh ended with status {process.returncode}: see {log.name}")
    return seconds


def disturbed(environment, stages, seconds, kills, rng, log):
    """{stage: number of kills in it}, about equally many in each stage that is not complete."""
    hit = collections.Counter()
    for k, (output, command) in enumerate(stages.items()):
        while hit.total() < kills * (k + 1) // len(stages):
            with subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=log, stderr=log) as process:
                time.sleep(rng.uniform(0, 0.95 * seconds[k]))
                number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
                process.send_signal(number)
            if process.returncode == 0:  # it was quicker, and is complete
                break
            hit[output] += 1
            print(f"{hit.total():3} {number.name} in {output}: status {process.returncode}", flush=True)
        if not Path(output).exists():
            subprocess.run(command, cwd=HERE.parent, env=environment, stdout=log, stderr=log, check=True)
    return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the world's is SEED, a variable")
    parser.add_argument("--runs", help="folder to work in and to keep (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(args.runs or temporary).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        environment = {"SAVE_EVERY": "10", "NPROC": "1"} | os.environ | {
            "PYTHON": sys.executable, "RUNS": str(runs), "RUN_NAME": "crash"}
        stages = commands(environment)
        with open(runs / "crash.log", "a") as log:
            seconds = undisturbed(environment, stages, log)
            plain = content(runs / "crash")
            (runs / "crash").rename(runs / "undisturbed")
            print(f"seed {args.seed}; undisturbed {sum(seconds):.0f} s, {len(stages)} stages", flush=True)
            hit = disturbed(environment, stages, seconds, args.kills, random.Random(args.seed), log)
            undisturbed(environment, stages, log)
        found = content(runs / "crash")
    differing = [name for name in plain | found if plain.get(name) != found.get(name)]
    print(f"kills: {hit.total()}, in {len(hit)} of {len(stages)} stages")
    print(f"files: {len(plain)}; differences: {len(differing)} {' '.join(differing)}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
