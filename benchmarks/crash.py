"""Nothing lost: the small world, killed at random moments in every stage, ends with the files of an undisturbed run.

    python benchmarks/crash.py                                                # 50 kills
    SFT_SIZE=64 PROMPT_SIZES=24 ITERATIONS=1 python benchmarks/crash.py --kills 11   # settings of run_all.sh

Runs `bash run_all.sh world` twice in the same place: once undisturbed, which also tells how long each stage takes, then
over and over, until it has been killed often enough: SIGKILL to all its processes, or, one time in five, SIGTERM to the
script. The moment is drawn from the time that a stage takes, so it may fall into its start, its work, its saving, its
renaming. Compared are all files: args.json without "seconds", every other file, weights as well, byte for byte.
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


def start(environment, log):
    return subprocess.Popen(SCRIPT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def outputs(environment):
    """What each stage makes, in order."""
    listed = subprocess.run([*SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in listed.splitlines()]
    return [words[words.index("--output") + 1] for words in commands]


def wait_for(process, output):
    """Read what run_all.sh prints until a stage says that its output is there, made now or before; False at the end."""
    return any(line.startswith(f"{output}: ") and "begun before" not in line for line in process.stdout)


def kill_all(process):
    """SIGKILL the script and all that it has started."""
    process.send_signal(signal.SIGSTOP)  # it starts nothing more
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = collections.defaultdict(list)
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children[parent].append(child)
    found = [process.pid]
    for pid in found:  # grows as it goes
        found += children[pid]
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # has just ended
            pass


def content(folder):
    """{file: digest, or what args.json says}"""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.endswith("args.json"):
            record = json.loads(path.read_text())
            del record["seconds"]
            found[name] = record
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def undisturbed(environment, stages, log):
    """Seconds of each stage."""
    seconds = []
    with start(environment, log) as process:
        for output in stages:
            began = time.time()
            wait_for(process, output)
            seconds.append(time.time() - began)
        process.stdout.read()
    if process.returncode != 0:
        sys.exit(f"crash.py: run_all.sh ended with status {process.returncode}: see {log.name}")
    return seconds


def disturbed(environment, stages, seconds, kills, rng, log):
    """{stage: number of kills in it}, in each stage about equally many."""
    hit = collections.Counter()
    while hit.total() < kills:
        target = hit.total() * len(stages) // kills  # or a later one, where that is done already
        target = next((k for k in range(target, len(stages)) if not Path(stages[k]).exists()), None)
        if target is None:
            break
        with start(environment, log) as process:
            if target > 0 and not wait_for(process, stages[target - 1]):
                sys.exit(f"crash.py: run_all.sh ended with status {process.wait()}: see {log.name}")
            time.sleep(rng.uniform(0, 0.95 * seconds[target]))
            stage = next((output for output in stages if not Path(output).exists()), "the end")
            gently = rng.random() < 0.2
            process.terminate() if gently else kill_all(process)
            process.stdout.read()
        hit[stage] += 1
        name = "SIGTERM" if gently else "SIGKILL"
        print(f"{hit.total():3} {name} in {stage}: status {process.returncode}", flush=True)
    return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the world's is SEED in the environment")
    parser.add_argument("--runs", help="folder to work in and to keep (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(args.runs or temporary).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", "SAVE_EVERY": "10", "NPROC": "1"} | os.environ | {
            "PYTHON": sys.executable, "RUNS": str(runs), "NAME": "crash"}
        stages = outputs(environment)
        with open(runs / "crash.log", "a") as log:
            seconds = undisturbed(environment, stages, log)
            plain = content(runs / "crash")
            (runs / "crash").rename(runs / "undisturbed")
            print(f"seed {args.seed}; undisturbed {sum(seconds):.0f} s, {len(stages)} stages", flush=True)
            hit = disturbed(environment, stages, seconds, args.kills, random.Random(args.seed), log)
            undisturbed(environment, stages, log)
        found = content(runs / "crash")
    differing = [name for name in plain | found if plain.get(name) != found.get(name)]
    print(f"kills: {hit.total()}; in the stage with the fewest: {min(hit[stage] for stage in stages)}")
    print(f"files: {len(plain)}; differences: {len(differing)} {' '.join(differing)}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
