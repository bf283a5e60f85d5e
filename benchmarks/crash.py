"""Nothing lost: the small world, killed at random moments in every stage, ends with the files of an undisturbed run.

    python benchmarks/crash.py                                                # 50 kills
    SFT_SIZE=64 PROMPT_SIZES=24 ITERATIONS=1 python benchmarks/crash.py --kills 11   # settings of run_all.sh

Runs the commands that `bash run_all.sh world --dry-run` prints in the same place twice: undisturbed, which also shows
how long each takes, and with kills, which hit a command until its stage is complete or has had its share: SIGKILL, or,
one time in five, SIGTERM. The moment is drawn from the time that the stage takes, so it may fall into its start, its
work, its saving, its renaming. All files are compared: args.json without "begun" and "seconds", every other file,
weights too, byte for byte.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ["bash", str(ROOT / "run_all.sh"), "world"]


def commands(environment):
    """{what a stage makes: its command}, in order."""
    listed = subprocess.run([*SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in listed.splitlines()]
    return {words[words.index("--output") + 1]: words for words in lines}


def content(folder):
    """{file: digest, or what args.json says}"""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.name.endswith("args.json"):
            record = json.loads(path.read_text())
            del record["begun"], record["seconds"]
        else:
            record = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = record
    return found


def complete(command, environment, log):
    """Run a stage to its end -> its seconds."""
    began = time.time()
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode != 0:
        sys.exit(f"crash.py: {shlex.join(command)}: {Path(log.name).read_text()[-2000:]}")
    return time.time() - began


def disturbed(environment, stages, seconds, kills, rng, log):
    """{stage: number of kills in it}, about equally many in each stage that is not complete."""
    hit = collections.Counter()
    for k, (output, command) in enumerate(stages.items()):
        while hit.total() < kills * (k + 1) // len(stages):
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
                time.sleep(rng.uniform(0, 0.95 * seconds[k]))
                number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
                process.send_signal(number)
            if process.returncode == 0:  # it was quicker, and is complete
                break
            hit[output] += 1
            print(f"{hit.total():3} {number.name} in {output}: status {process.returncode}", flush=True)
        complete(command, environment, log)
    return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the world's is SEED, a variable")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/crash.log", "a") as log:
        environment = {"SAVE_EVERY": "10", "NPROC": "1"} | os.environ | {
            "PYTHON": sys.executable, "RUNS": folder, "RUN_NAME": "crash"}
        stages, run = commands(environment), Path(folder) / "crash"
        seconds = [complete(command, environment, log) for command in stages.values()]
        plain = content(run)
        shutil.rmtree(run)
        print(f"seed {args.seed}; undisturbed {sum(seconds):.0f} s, {len(stages)} stages", flush=True)
        hit = disturbed(environment, stages, seconds, args.kills, random.Random(args.seed), log)
        found = content(run)
    differing = [name for name in plain | found if plain.get(name) != found.get(name)]
    print(f"kills: {hit.total()}, in {len(hit)} of {len(stages)} stages")
    print(f"files: {len(plain)}; differences: {len(differing)} {' '.join(differing)}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
