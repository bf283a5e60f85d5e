"""Memory that a training stage holds, in bytes a parameter: measured on a CPU, and as README.md (here) computes it.

    python benchmarks/memory.py

A Llama of 120 M parameters with random weights takes three steps of two short pairs, so that activations weigh little.
Held is what a process has grown by since before it loaded a model, at the end of the last step, the gradients still
there, after what the C library had kept of freed memory is given back. On a CPU pi_ref is float32 with --fsdp too, so
04 has to hold 20 bytes a parameter, shared by the processes, not the table's 18.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import make_inputs, run_stage

# bytes a parameter, options
STAGES = {"01_seed_dpo.py": (16, dict(input="seed.jsonl")),
          "04_refined_dpo.py": (20, dict(input="preferences.jsonl"))}
STEPS, PAIRS = 3, 2


def resident():
    """Bytes of memory of this process."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def be_a_process(stage, folder, output, *options):
    """A stage as it is, except that it prints at its last step what it holds."""
    from support import models, runs
    real_load, real_log, before = models.load_reference, runs.log_step, []

    def load_reference(*args):
        before.append(resident())
        return real_load(*args)

    def log_step(work, bar, step, rows, **more):
        real_log(work, bar, step, rows, **more)
        if step == STEPS - 1:
            print("held", resident() - before[0], flush=True)

    models.load_reference, runs.log_step = load_reference, log_step
    os.chdir(folder)
    run_stage(stage, model="model", output=output, batch_size=PAIRS, micro_batch_size=1, epochs=1, **STAGES[stage][1],
              **dict.fromkeys(options, True))


def measure(stage, folder, processes, fsdp):
    """Bytes that rank 0 holds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
               "--nproc-per-node", str(processes), __file__, "--work", stage, folder, f"{stage}-{processes}-{fsdp}",
               *["fsdp"] * fsdp]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if "held" not in done.stdout:
        sys.exit(f"{stage}: {done.stderr[-2000:]}")
    return int(re.search(r"held (\d+)", done.stdout).group(1))


def main():
    if sys.argv[1:2] == ["--work"]:  # started by `measure`
        return be_a_process(*sys.argv[2:])

    with tempfile.TemporaryDirectory() as folder:
        parameters = make_inputs(Path(folder), PAIRS * STEPS, longest=(40, 40), hidden_size=768, intermediate_size=2048,
                                 num_hidden_layers=10, num_attention_heads=12, num_key_value_heads=12)
        print("| Stage | Processes | Bytes a parameter, computed | Held |\n" + "|---" * 4 + "|")
        for stage, (size, _) in STAGES.items():
            for processes, fsdp in ((1, False), (2, False), (2, True), (4, True)):
                held = measure(stage, folder, processes, fsdp) / parameters
                how, share = (f"{processes}, `--fsdp`", size / processes) if fsdp else (processes, size)
                print(f"| {stage} | {how} | {share:.0f} | {held:.1f} |", flush=True)


if __name__ == "__main__":
    main()
