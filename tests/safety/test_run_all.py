"""run_all.sh: the loop of Algorithm 1 on the small world, the paper's settings, and what it does when a stage fails."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stages
from stages import ROOT, files, parsed, rows

SCRIPT = ("run_all.sh", "support/launch.sh")
CLEAN = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
LITTLE = {"SEED_SIZE": "20", "PROMPT_SIZES": "24", "ITERATIONS": "1", "EVAL_SIZE": "10", "SFT_SIZE": "64",
          "SFT_EPOCHS": "1", "MAX_NEW_TOKENS": "12", "ON_LENGTH_LIMIT": "eos", "BATCH_SIZE": "8"}


def bash(*words, root=ROOT, cwd=None, **environment):
    """Run run_all.sh, in its folder or in another, with nothing in its environment but this."""
    return subprocess.run(["bash", root / "run_all.sh", *words], capture_output=True, text=True, timeout=900,
                          cwd=cwd or root, env=CLEAN | {"NPROC": "1"} | environment)


def little_run(runs):
    done = bash(**LITTLE, PYTHON=sys.executable, RUNS=str(runs), RUN_NAME="little", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The folder of a whole run on a world of a few dozen rows, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    return runs / "little", little_run(runs)


def test_the_small_world_ends_with_a_table_and_samples_and_without_a_warning(little):
    folder, done = little
    table, samples = ((folder / "report" / name).read_text() for name in ("table.md", "samples.md"))
    assert table in done.stdout and samples in done.stdout
    names = [line.split("|")[1].strip() for line in table.split("\n\n")[0].splitlines()[2:]]
    assert names == ["SFT (pi_init)", "DPO on the seed (pi_0)", "SPA, iteration 1 (pi_1)", "DPO on all gold labels"]
    assert samples.count("\n> ") + samples.startswith("> ") == 3 and all(samples.count(name) == 3 for name in names)
    for printed in (done.stdout, done.stderr):
        assert not any(word in printed.lower() for word in ("warning", "deprecated", "traceback")), printed


def test_every_stage_of_the_small_world_leaves_its_output_and_metrics(little):
    folder, _ = little
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.tmp"))
    made = ("data/seed", "data/prompts_1", "responses_1", "preferences_1")
    *sizes, pairs = [len(rows(folder / f"{name}.jsonl")) for name in made]
    assert sizes == [20, 24, 24] and 0 < pairs <= 24
    of_trl = {"loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "rewards/chosen",
              "rewards/rejected", "logps/chosen", "logps/rejected"}
    for model, keys in (("pi_0", of_trl), ("pi_1", of_trl | {"confidence", "tau", "flagged"})):
        assert {"step"} | keys == set(stages.metrics(folder / model)[0])
    accuracy = json.loads((folder / "eval" / "spa_1" / "metrics.json").read_text())["judge_accuracy"]
    assert accuracy is None or 0 <= accuracy <= 100  # None: gold may find all the pairs of so small a model equal


def test_every_number_that_is_written_is_json(little):
    folder, _ = little
    for path in folder.rglob("*.json*"):  # Python also writes what others cannot read
        assert not re.search(r"\b(NaN|Infinity)\b", path.read_text(encoding="utf-8")), path


def test_a_second_run_does_nothing_again(little):
    folder, _ = little
    before = files(folder)
    assert little_run(folder.parent).stdout.count("already complete") == len(commands("world", **LITTLE))
    assert files(folder) == before


def on_machines(count, folder, **settings):
    """The commands that run_all.sh prints on each of `count` machines, as lists of words."""
    settings = LITTLE | dict(NNODES=str(count), RUNS=str(folder), RUN_NAME="nodes", PYTHON=sys.executable) | settings
    if count > 1:
        settings["RDZV_ENDPOINT"] = f"127.0.0.1:{stages.free_port()}"
    printed = [bash("--dry-run", **settings, NODE_RANK=str(rank)).stdout for rank in range(count)]
    return [[shlex.split(line) for line in lines.splitlines()] for lines in printed]


def start(words, log):
    return subprocess.Popen(words, cwd=ROOT, env=stages.NO_RANKS | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def statuses(processes, log):
    """Their exit statuses. Where one does not end, all are stopped and the test fails with what they printed."""
    try:
        return [process.wait(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.terminate()
        pytest.fail(Path(log.name).read_text())


@pytest.mark.parametrize("machines", [1, 2])
def test_a_process_that_dies_is_started_again_and_goes_on(tmp_path, machines):
    commands = on_machines(machines, tmp_path, NPROC=str(3 - machines), MAX_RESTARTS="1", SAVE_EVERY="4",
                           SFT_EPOCHS="10", SFT_BATCH_SIZE="8", SFT_LR="3e-3")
    of_one = [words[1:3] for words in commands[0] if words[1].endswith(".py")]
    assert of_one == [["00_inputs.py", "--source"], ["05_eval.py", "report"]]  # of the first machine alone
    assert all(len(commands[0]) == len(of_machine) + 2 for of_machine in commands[1:])
    with open(tmp_path / "log", "w") as log:
        agents = [start(of_machine[0], log) for of_machine in commands[1:]]  # too early
        assert statuses([start(commands[0].pop(0), log)], log) == [0]  # 00_inputs.py
        agents.insert(0, start(commands[0][0], log))
        folder = tmp_path / "nodes"
        while not list((folder / "pi_init.partial").glob("state-*.pt")) and agents[0].poll() is None:
            time.sleep(0.05)
        processes = f"/proc/{agents[-1].pid}/task/{agents[-1].pid}/children"
        with open(processes) as file:  # of the last machine; the first of one machine, at whose store the others meet
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
        ended = statuses(agents, log)
    printed = (tmp_path / "log").read_text()
    assert set(ended) == {0} and printed.count("resuming after step") == 1, printed
    alone = stages.run("00_sft", model=folder / "data/base", input=folder / "data/sft.jsonl", output=tmp_path / "alone",
                       lr=3e-3, epochs=10, batch_size=8, micro_batch_size=8)
    assert stages.farthest(folder / "pi_init", alone) < 1e-4
    assert [line["step"] for line in stages.metrics(folder / "pi_init")] == list(range(1, 81))


def commands(setting, **environment):
    """[(stage, its parsed arguments)] that --dry-run prints."""
    done = bash(setting, "--dry-run", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[1].endswith(".py") for words in lines)
    assert sum(words[1] == "05_eval.py" for words in lines) == 1  # one start for all models and the report
    return [(script.removesuffix(".py"), parsed(script.removesuffix(".py"), shlex.split(words)))
            for _, script, *rest in lines for words in shlex.join(rest).split(" --then ")]


def only(stage, commands):
    return [args for name, args in commands if name == stage]


def of_the_paper(seed_size=2000, seed_epochs=3, lr=5e-7, beta=0.1, empty_system=False):
    """{stage: values} of Section 5.1, with 300 tokens and a window of 50 pairs by App. B.4."""
    training = dict(lr=lr, beta=beta, batch_size=32)
    return {"00_inputs": dict(source="ultrafeedback", seed_size=seed_size, prompt_sizes=[8000, 20000, 30000],
                              seed_sample=0, empty_system=empty_system),
            "01_seed_dpo": training | dict(epochs=seed_epochs),
            "02_generate": dict(samples=2, temperature=0.7, max_new_tokens=300),
            "03_judge": dict(judge="init", beta=beta, length_penalty=None),
            "04_refined_dpo": training | dict(epochs=1, refine="decoupled", alpha=0.1, k_percent=10, refine_after=0.2,
                                              window=50)}


PHI_2 = of_the_paper(lr=5e-6, empty_system=True)  # App. B.3; the system message is of Zephyr's recipe
OTHERS = of_the_paper(lr=1e-5, beta=0.01, seed_epochs=1)  # App. B.3
PAPER = {  # pi_init, iterations, values
    "mistral-7b": ("alignment-handbook/zephyr-7b-sft-full", 3, of_the_paper(empty_system=True)),
    "mistral-7b-base": ("runs/mistral-7b-base-seed0/pi_init", 3, of_the_paper(empty_system=True) | {
        "00_sft": dict(model="mistralai/Mistral-7B-v0.1", batch_size=128, epochs=1, lr=2e-5, max_length=2048)}),
    "phi-2": ("lole25/phi-2-sft-ultrachat-full", 1, PHI_2),  # Section 5.3, App. B.3
    "phi-2-base": ("runs/phi-2-base-seed0/pi_init", 1, PHI_2 | {
        "00_sft": dict(model="microsoft/phi-2", batch_size=64, epochs=3, lr=2e-5)}),  # App. B.1
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", 2, OTHERS),
    "phi-3-medium": ("microsoft/Phi-3-medium-4k-instruct", 2, OTHERS),
    "mistral-7b-no-seed": ("mistralai/Mistral-7B-v0.1", 3, of_the_paper(seed_size=0))}  # Figure 4


@pytest.mark.parametrize("setting", PAPER)
def test_a_setting_is_algorithm_1_with_the_paper_s_values(setting):
    (init, iterations, values), printed = PAPER[setting], commands(setting)
    inputs = printed[0][1]
    for stage, args in printed:
        wanted = values.get(stage, {}) if getattr(args, "source", "") != "ultrachat" else {}
        assert {name: getattr(args, name) for name in wanted} == wanted, stage
    assert len(only("00_sft", printed)) == ("00_sft" in values)
    policy = only("02_generate", printed)[0].model
    if inputs.seed_size:  # pi_0 from pi_init and D_0
        [seed] = only("01_seed_dpo", printed)
        assert (seed.model, seed.input, seed.output) == (init, [f"{inputs.output}/seed.jsonl"], policy)
        assert seed.ref_model in (None, init)
    else:
        assert not only("01_seed_dpo", printed) and policy == "mistralai/Mistral-7B-Instruct-v0.1"
    order = [name for name, _ in printed if name[:2] in ("02", "03", "04")]
    assert order == ["02_generate", "03_judge", "04_refined_dpo"] * iterations
    loop = zip(*(only(stage, printed) for stage in order[:3]))
    for t, (generate, judge, train) in enumerate(loop, 1):
        assert (generate.model, generate.input) == (policy, f"{inputs.output}/prompts_{t}.jsonl")
        # the judge's reference is pi_init, the training's is pi_{t-1}
        assert (judge.model, judge.init_model, judge.input) == (policy, init, generate.output)
        assert (train.model, train.input) == (policy, [judge.output]) and train.ref_model in (None, policy)
        assert train.lam == [1 / 2, 1 / 4, 1 / 8][t - 1]
        policy = train.output
    evaluated = [args for args in only("05_eval", printed) if args.command == "sample"]
    assert [args.model for args in evaluated][::len(evaluated) - 1] == [init, policy]
    assert {(args.init_model, args.preferences) for args in evaluated} == {(init, None)}
    if not inputs.seed_size:  # pi_init is a base model, without a chat template
        assert evaluated[0].tokenizer or evaluated[0].chat_template


@pytest.mark.parametrize("setting, given, tokenizer", [  # App. B.1; a base model has no chat template
    ("phi-2-base", {}, "lole25/phi-2-sft-ultrachat-full"),
    ("mistral-7b-base", {}, "alignment-handbook/zephyr-7b-sft-full"), ("mistral-7b", {"BASE": "org/mine"}, None)])
def test_pi_init_is_made_from_a_base_model_and_ultrachat(setting, given, tokenizer):
    printed = commands(setting, **given)
    [sft], [_, chats] = only("00_sft", printed), only("00_inputs", printed)
    assert sft.tokenizer == tokenizer and sft.model == given.get("BASE", sft.model)
    assert (chats.source, chats.split, chats.empty_system) == ("ultrachat", None, True)
    assert sft.input == f"{chats.output}/sft.jsonl" and sft.all_turns
    assert sft.output == only("01_seed_dpo", printed)[0].model == only("03_judge", printed)[0].init_model


@pytest.mark.parametrize("variables, stage, values", [
    ("SEED_SAMPLE=2 EMPTY_SYSTEM=0", "00_inputs", dict(seed_sample=2, empty_system=False)),
    ("ON_LENGTH_LIMIT=open", "02_generate", dict(on_length_limit="open")),
    ("ITERATIONS=1 LAMBDAS=' .25  1e-1 ' PROMPT_SIZES='10  20' RUNS=elsewhere RUN_NAME=mine LR=1e-6 K_PERCENT=20",
     "04_refined_dpo", dict(output="elsewhere/mine/pi_1", lam=0.25, lr=1e-6, k_percent=20)),
    ("JUDGE=pairrm", "03_judge", dict(judge="pairrm", reward_model="llm-blender/PairRM-hf")),
    ("JUDGE=pairrm REWARD_MODEL=my/own", "03_judge", dict(judge="pairrm", reward_model="my/own")),
    ("JUDGE=llm", "00_inputs", dict(llm_judge="both")), ("JUDGE=llm", "03_judge", dict(llm_order="both")),
    ("JUDGE=llm LLM_ORDER=one", "00_inputs", dict(llm_judge="one")),  # App. B.2
    ("JUDGE=llm LLM_ORDER=one", "03_judge", dict(llm_order="one"))])
def test_variables_of_the_environment_come_first(variables, stage, values):
    printed = commands("mistral-7b", SEED="7", **dict(pair.split("=", 1) for pair in shlex.split(variables)))
    assert {args.seed for _, args in printed if hasattr(args, "seed")} == {7}
    found = only(stage, printed)
    assert found and all({name: getattr(args, name) for name in values} == values for args in found)


def test_every_row_s_command_is_one_that_run_all_takes():
    lines = (ROOT / "extras/README.md").read_text(encoding="utf-8").splitlines()
    heading = next(k for k, line in enumerate(lines) if line.startswith("| Table | Row | `bash run_all.sh` |"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[heading + 2:]))
    tried = 0
    for codes in ([shlex.split(code) for code in row.split("|")[3].split("`")[1::2]] for row in rows):
        given = dict(word.split("=", 1) for words in codes for word in words if "=" in word)
        for setting in [words[0] for words in codes if "=" not in words[0]] or ["mistral-7b"] * bool(given):
            tried += bool(commands(setting, **given))
    assert tried >= 20


def test_the_row_of_zephyr_has_its_recipe_s_values():  # App. B.2
    [row] = [line for line in (ROOT / "extras/README.md").read_text().splitlines() if "| Zephyr-7b-beta" in line]
    [words] = [shlex.split(code) for code in row.split("`")[1::2] if code.startswith("01_seed_dpo.py")]
    args = parsed("01_seed_dpo", words[1:] + ["--model", "x", "--output", "x"])
    assert (args.beta, args.batch_size, args.epochs, args.lr) == (0.01, 128, 1, 5e-7)
    assert (args.max_prompt_length, args.max_length) == (512, 1024)


@pytest.mark.parametrize("setting, environment, share", [
    ("mistral-7b", {"SEED_SIZE": "500"}, "0.8 %"), ("mistral-7b-no-seed", {}, "0 %"), ("world", {}, "3.3 %"),
    ("world", {"SEED_SIZE": "100"}, "1.7 %"),
    ("phi-2", {"GOLD_LABEL_SHARE": "some"}, "some"),
    ("phi-2", {"SOURCE": "README.md", "SEED_SIZE": "20", "PROMPT_SIZES": "100 180"}, "6.7 %")])
def test_the_table_says_the_share_of_gold_labels(setting, environment, share):
    evaluated = [args.label_share for args in only("05_eval", commands(setting, **environment))
                 if args.command == "sample"]
    gold = ["100 %"] if setting == "world" else []  # DPO on all gold labels
    assert evaluated == ["0 %", *[share] * (len(evaluated) - 1 - len(gold)), *gold]


@pytest.mark.parametrize("setting", ["world", "mistral-7b"])
def test_the_paper_s_models_are_trained_in_shards(setting):
    trained = [args for stage, args in commands(setting, JUDGE="llm") if hasattr(args, "fsdp")]
    assert len(trained) >= 5 and {args.save_every for args in trained} == {100}
    assert {(args.fsdp, args.gradient_checkpointing) for args in trained} == {(setting != "world",) * 2}


@pytest.fixture
def torch_with(tmp_path):
    """A function of a number of GPUs -> variables with which Python imports a torch that finds them, once it has
    initialised CUDA: until then it asks the driver, which counts a MIG slice that CUDA would not use."""
    def variables(gpus):
        folder = tmp_path / f"{gpus}" / "torch"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "cuda.py").write_text(
            f"found = [{gpus} + 1]\ndef is_available(): return {gpus} > 0\ndef init(): found[0] -= 1\n"
            f"def device_count(): return found[0] if {gpus} else 0\n")
        return dict(PYTHON=sys.executable, PYTHONPATH=str(folder.parent), NPROC="", CUDA_VISIBLE_DEVICES="0,-1,1")
    return variables


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_the_gpus_that_are_used_are_those_that_cuda_finds(torch_with, gpus):
    found = torch_with(gpus)
    done = bash("mistral-7b", "--dry-run", **found)
    assert done.returncode == 0 and done.stderr.count("\n") == done.stderr.count("on the CPU") == (gpus == 0)
    for line in done.stdout.splitlines():  # those share the stages that have work to share
        shared = gpus == 3 and "00_inputs.py" not in line and "05_eval.py report" not in line
        assert ("--nproc-per-node 3 --standalone" in line) == ("torch.distributed.run" in line) == shared, line
    assert "--nproc-per-node 2 " in bash("mistral-7b", "--dry-run", **torch_with(7) | {"NPROC": "2"}).stdout
    assert bash("--dry-run", **found).stderr == ""  # the small world is for a CPU


def test_a_plan_is_printed_without_python_and_a_run_without_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    nothing = dict(PYTHON=sys.executable, PYTHONPATH=str(tmp_path), NPROC="")
    for variables in (nothing, dict(PYTHON="/no/such/python", NPROC="")):
        printed, done = bash("phi-2", "--dry-run", **variables), bash("phi-2", RUNS=str(tmp_path / "runs"), **variables)
        assert (printed.returncode, printed.stderr, "torch.distributed" in printed.stdout) == (0, "", False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert variables["PYTHON"] in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("setting, variables", [*itertools.product(["world", "mistral-7b"], [  # the last one is named
    "LAMBDAS='1 1 1 1' ITERATIONS=4 PROMPT_SIZES=", "PROMPT_SIZES='8000 20000'", "PROMPT_SIZES='8000 2e4 30000'",
    "PROMPT_SIZES='1 2 3 4' ITERATIONS=4 LAMBDAS=", "LAMBDAS='0.5 0.25'", "LAMBDAS='1/2 1/4 1/8'", "ITERATIONS=three",
    "ITERATIONS='a[$(touch evil)]'", "SEED_SIZE=08", "NNODES=two", "NPROC=-1", "LR=1e-", "BETA=nan",
    "JUDGE_EPOCHS=many", "LENGTH_PENALTY=some", "NNODES=2 RDZV_ENDPOINT=", "NNODES=2 RDZV_ENDPOINT=host",
    "ON_LENGTH_LIMIT=cut", "REFINE=yes", "JUDGE=gpt-4", "JUDGE=reward REWARD_MODEL=", "INIT=/no/such/model",
    "JUDGE=llm JUDGE_MODEL=../no/such/model", "PI_0=./pi_0", "SOURCE=/no/such.jsonl", "BASE=/no/such/model",
    "EMPTY_SYSTEM=yes", "SEED_SAMPLE=1st", "SFT_LR=high", "MERGE_SEED=yes", "LLM_ORDER=first", "SEED_SIZE=0 PI_0=",
    "SEED_SIZE=0 PI_0=org/pi MERGE_SEED=1", "SEED_SIZE=0 PI_0=org/pi JUDGE=llm JUDGE_MODEL=", "NODE_RANK=1",
    "PI_0=org/pi SEED_REFINE=self", "REWARD_MODEL=org/rm JUDGE=llm", "JUDGE_MODEL=org/judge JUDGE=init",
    "NNODES=2 RDZV_ENDPOINT=host:1 NODE_RANK=2"]),
    # what a setting makes by itself cannot be given
    ("world", "SOURCE=org/data"), ("world", "BASE=org/pi"), ("world", "INIT=org/pi"), ("phi-2-base", "INIT=org/pi"),
    ("no-such-setting", ""), ("--no-such-option", ""), ("mistral-7b --no-such-option", "")])
def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything_is_installed(clone, setting, variables):
    bash, log = clone
    environment = dict(pair.split("=", 1) for pair in shlex.split(variables))
    done = bash(*setting.split(), **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    named = list(environment.items())[-1] if environment else setting.split()[-1:]
    assert all(word in done.stderr for word in named)
    assert not log.exists() and not list(log.parent.rglob("evil"))


@pytest.mark.parametrize("variable", """SEED SEED_SIZE SEED_SAMPLE PROMPT_SIZES EVAL_SIZE SFT_LR SFT_EPOCHS
    SFT_BATCH_SIZE BETA LR SEED_EPOCHS BATCH_SIZE MICRO_BATCH_SIZE TEMPERATURE MAX_NEW_TOKENS SAMPLING_BATCH_SIZE
    SAVE_EVERY ALPHA K_PERCENT LAMBDAS EPSILON RESOLVE_STEPS LENGTH_PENALTY JUDGE_LR JUDGE_EPOCHS
    JUDGE_BATCH_SIZE""".split())
def test_a_number_that_a_stage_would_refuse_is_refused_before_the_first(variable):
    every = dict(RESOLVE_STEPS="5", JUDGE="llm", LENGTH_PENALTY="1", BASE="org/base", SEED_REFINE="worst-case")
    for value in ("0", "1.5", "101", "1e999", "-1", "0 0 0"):
        done = bash("phi-3-medium", "--dry-run", **every | {variable: value})
        assert done.returncode == 2 and variable in done.stderr or commands("phi-3-medium", **every | {variable: value})


@pytest.fixture
def stub(tmp_path):
    """(a program to stand for Python, the file it logs to); it fails with $STATUS at what matches $FAILS."""
    log, program = tmp_path / "log", tmp_path / "python"
    program.write_text(f'#!/usr/bin/env bash\n(printf "%q " "$@"; echo) >> {log}\n'
                       'if [[ -n ${FAILS:-} && "$*" == *$FAILS* ]]; then exit "$STATUS"; fi\n')
    program.chmod(0o755)
    return program, log


@pytest.mark.parametrize("stage, status", [("00_sft", 2), ("03_judge", 7), ("pi_2 --", 137), ("report", 1)])
def test_a_failed_stage_stops_the_script_with_its_status(stub, stage, status):
    program, log = stub
    done = bash(PYTHON=str(program), FAILS=stage, STATUS=str(status))
    assert done.returncode == status
    lines = log.read_text().splitlines()
    assert stage in lines[-1] and not any(stage in line for line in lines[:-1])
    script = lines[-1].split()[0]
    assert done.stderr.count("\n") == 1 and f"{script} ended with status {status}" in done.stderr


@pytest.mark.parametrize("number, name, status", [(signal.SIGTERM, "TERM", 143), (signal.SIGHUP, "TERM", 143),
                                                  (signal.SIGINT, "INT", 130)])
def test_a_signal_goes_to_the_stage_and_its_end_ends_the_script(tmp_path, number, name, status):
    log, program = tmp_path / "log", tmp_path / "python"
    # a stage that saves for a while when it is asked to stop
    program.write_text(f"#!/usr/bin/env bash\ntrap 'sleep 0.3; echo {name} >> {log}; exit {status}' {name}\n"
                       f"echo \"$1\" >> {log}\nif [ \"$1\" = 00_sft.py ]; then while :; do sleep 0.05; done; fi\n")
    program.chmod(0o755)
    with subprocess.Popen(["bash", ROOT / "run_all.sh"], env=CLEAN | {"NPROC": "1", "PYTHON": str(program)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # under nohup, say, it would be ignored
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as script:
        try:
            while script.poll() is None and "00_sft.py" not in (log.read_text() if log.exists() else ""):
                time.sleep(0.05)
            script.send_signal(number)
            out, err = script.communicate(timeout=60)
        finally:
            script.kill()
    assert script.returncode == status
    assert log.read_text().splitlines() == ["00_inputs.py", "00_sft.py", name]
    assert out == "" and err.count("\n") == 1 and f"00_sft.py ended with status {status}" in err


@pytest.mark.parametrize("strange", ["a b", "it's \"quoted\"", "$(touch evil)", "`touch evil`", "-n", "--output", "*",
                                     "a;touch evil", "$HOME"])
def test_strange_paths_reach_the_stages_as_they_are(clone, stub, strange):
    bash, log = clone
    folder = f"./{strange}" if strange.startswith("-") else strange  # which is not read as an option
    (log.parent / "clone" / strange).mkdir()
    strangely = dict(RUNS=strange, RUN_NAME=strange, INIT=strange, SOURCE=strange, PYTHON=str(stub[0]))
    printed, done = bash("phi-2", "--dry-run", **strangely), bash("phi-2", **strangely)
    assert (printed.returncode, printed.stderr, done.returncode, done.stderr) == (0, "", 0, "")
    assert [line.split(" ", 1)[1] for line in printed.stdout.splitlines()] == log.read_text().splitlines()  # as it ran
    [inputs, seed, *_] = [shlex.split(line) for line in log.read_text().splitlines()]
    inputs, seed = parsed("00_inputs", inputs[1:]), parsed("01_seed_dpo", seed[1:])
    assert (inputs.source, inputs.output) == (folder, f"{folder}/{strange}/data")
    assert (seed.model, seed.output) == (folder, f"{folder}/{strange}/pi_0")
    assert seed.input == [f"{inputs.output}/seed.jsonl"]
    assert not list(log.parent.rglob("evil"))


def test_paths_are_the_caller_s_wherever_the_script_is_called_from(stub, tmp_path):
    program, log = stub
    there = tmp_path / "there"
    (there / "org" / "pi").mkdir(parents=True)  # a folder comes before a name on the Hub
    (there / "my.jsonl").touch()
    paths = dict(SOURCE="my.jsonl", INIT="org/pi", PI_0="../there/org/pi", INIT_TOKENIZER="./org", RUNS="out")
    assert bash("phi-2", cwd=there, PYTHON="../python", SPLIT="test", **paths).returncode == 0
    inputs, generate, *_, evaluation = map(shlex.split, log.read_text().splitlines())
    inputs, generate = parsed("00_inputs", inputs[1:]), parsed("02_generate", generate[1:])
    sample = parsed("05_eval", evaluation[1:evaluation.index("--then")])
    report = parsed("05_eval", evaluation[evaluation.index("report"):])
    assert (inputs.source, inputs.output) == (f"{there}/my.jsonl", f"{there}/out/phi-2-seed0/data")
    assert inputs.split == "test"
    assert (generate.model, sample.model, sample.tokenizer) == (f"{there}/../there/org/pi", f"{there}/org/pi",
                                                                f"{there}/./org")
    assert report.output == f"{there}/out/phi-2-seed0/report"
    # the project's own are not taken for the caller's; its default folder is one, from wherever
    for name in ("SOURCE", "INIT", "PI_0", "INIT_TOKENIZER"):
        refused = bash("phi-2", cwd=there, PYTHON=str(program), **{name: "README.md"})
        assert refused.returncode == 2 and name in refused.stderr and f"{there}/README.md" in refused.stderr
    assert bash("--dry-run", cwd=there).stdout == bash("--dry-run").stdout
    assert bash("--dry-run", cwd=ROOT.parent, RUNS=f"{ROOT.name}/runs").stdout == bash("--dry-run").stdout


def copy_script(folder):
    for name in SCRIPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def test_cdpath_sends_it_to_no_other_folder(stub, tmp_path):
    program, log = stub
    (tmp_path / "other" / "spa").mkdir(parents=True)
    copy_script(tmp_path / "here" / "spa")
    program.write_text(program.read_text() + f'echo "$PWD ${{PYTHONSAFEPATH-none}}" >> {log}\n')
    done = subprocess.run(["bash", "spa/run_all.sh", "test"], cwd=tmp_path / "here", env=CLEAN | {
        "CDPATH": f"{tmp_path}/other:.", "PYTHON": str(program), "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert log.read_text() == f"-m pytest tests \n{tmp_path}/here/spa none\n"


def test_a_checkout_on_windows_has_the_line_ends_that_bash_reads(tmp_path):
    if not shutil.which("git"):
        pytest.skip("takes git")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    attribute = subprocess.run(["git", "-C", tmp_path, "check-attr", "eol", "run_all.sh"], capture_output=True)
    assert attribute.stdout == b"run_all.sh: eol: lf\n"


# what bash 3.2, which macOS has, takes for an error or for something else, and since when it is there
LATER = {"4.0": r"(declare|local|typeset) +-\w*A|\$\{!?\w+(\[\S\])?(\^|,)|\b(mapfile|readarray|coproc|globstar)\b|&>>"
                r"|\|&|;;?&|BASHPID|read +-\w*[iN]", "4.1": r"\{\w+\}[<>]",
         "4.2": r"\[ -v |(declare|local|typeset) +-\w*g|\$\{\w+:[^}:]+: *-\d|\\[uU][0-9a-f]|printf +\S?%\(|lastpipe",
         "4.3": r"\bwait +-|(declare|local|typeset) +-\w*n|\w\[-\d",
         "4.4": r"\$\{\w+(\[\S\])?@[A-Z]", "5.0": "EPOCH[SR]E"}


def test_bash_3_2_can_run_it():
    code = [re.sub(r"(^|\s)#.*", "", line) for name in SCRIPT for line in (ROOT / name).read_text().splitlines()]
    assert {since: line for line in code for since in LATER if re.search(LATER[since], line)} == {}
    # before 4.4 "${a[@]}" of an empty array is an error under set -u: these two are not empty where they are expanded
    assert set(re.findall(r"(\w+)=\(\)", "\n".join(code))) == {"samples", "evaluated"}


def test_the_seed_joins_each_round_and_has_its_own_refinement():
    plain = [options.input for stage, options in commands("mistral-7b") if stage == "04_refined_dpo"]
    merged, separate = ([options.input for options in only("04_refined_dpo", commands("mistral-7b", MERGE_SEED=merge))]
                        for merge in "10")
    assert separate == plain
    seed = plain[0][0].replace("preferences_1", "data/seed")
    assert len(plain) == 3 and merged == [[*paths, seed] for paths in plain]
    (_, _), (stage, first), *_ = commands("mistral-7b", SEED_REFINE="self", K_PERCENT="30")
    assert stage == "04_refined_dpo" and (first.refine, first.k_percent, first.input, first.epochs) == (
        "self", 30, [seed], 3)
    worst = commands("mistral-7b", SEED_REFINE="worst-case", REFINE="worst-case", EPSILON="0.3", RESOLVE_STEPS="7")
    worst = [options for stage, options in worst if stage == "extras/worst_case_dpo"]
    assert [(options.epsilon, options.resolve_steps, options.epochs) for options in worst] == [(0.3, 7, 3)] + [
        (0.3, 7, 1)] * 3
    assert [options.input for options in worst] == [[seed], *plain]
    assert bash("--dry-run", SEED_REFINE="none").returncode == 2


def test_a_tokenizer_beside_pi_init_reaches_what_reads_texts_with_pi_init():
    given = [(stage, options.model) for stage, options in commands(
        "mistral-7b", INIT="org/mine", INIT_TOKENIZER="org/theirs", JUDGE="llm")
        if getattr(options, "tokenizer", None) == "org/theirs"]
    assert given == [("01_seed_dpo", "org/mine"), ("00_sft", "org/mine"), ("05_eval", "org/mine")]


@pytest.fixture
def clone(stub, tmp_path):
    """run_all.sh in a folder without .venv, where python3 puts the program above there; and the log."""
    program, log = stub
    root = tmp_path / "clone"
    (root / "bin").mkdir(parents=True)
    copy_script(root)
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "bin" / "python3").write_text(
        '#!/usr/bin/env bash\nif [ "$1 $2" = "-m venv" ]; then\n'
        f'  echo "venv" >> {log}; mkdir -p .venv/bin; cp {program} .venv/bin/python\nfi\n')
    (root / "bin" / "python3").chmod(0o755)
    path = f"{root / 'bin'}:{CLEAN['PATH']}"
    return lambda *words, **environment: bash(*words, root=root, PATH=path, **environment), log


def test_a_virtual_environment_is_made_once_and_the_script_says_so(clone, tmp_path):
    bash, log = clone
    assert bash("test", FAILS="pip install", STATUS="1").returncode == 1 and "pytest" not in log.read_text()
    log.unlink()
    first = bash("test")
    assert first.returncode == 0 and ".venv" in first.stdout + first.stderr
    venv, install, tests = log.read_text().splitlines()
    assert (venv, tests) == ("venv", "-m pytest tests ") and "pip install" in install and "requirements.txt" in install
    log.unlink()
    assert bash("test", "-k", "ranks").returncode == 0 and log.read_text() == "-m pytest tests -k ranks \n"
    (tmp_path / "clone" / "requirements.txt").write_text("torch\n")  # of a later version
    assert bash("test").returncode == 0 and "pip install" in log.read_text()
