"""Whether TRL's DPOTrainer reads what the stages write: seed.jsonl as it is, preferences_t.jsonl by README.md's line.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0
    bash run_all.sh
    .venv-trl/bin/python benchmarks/trl_reads.py runs/world-seed0

Takes one DPO step of pi_init on each file, and compares TRL's token ids with those of the chat template. Exits with
status 1 where they differ. TRL reads the texts of preferences, not the ids that 02 sampled.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = ("chosen", "rejected")


def read(path):
    return load_dataset("json", data_files=str(path), split="train")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run of the small world")
    run = parser.parse_args().run
    seed, preferences = run / "data" / "seed.jsonl", run / "preferences_1.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(run / "pi_init", trust_remote_code=False)

    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    differ = 0
    mapped = read(preferences).map(  # as README.md has it
        lambda row: {y: [{"role": "assistant", "content": row[y]["text"]}] for y in ("chosen", "rejected")})
    for path, pairs in ((seed, read(seed)), (preferences, mapped)):
        model = AutoModelForCausalLM.from_pretrained(run / "pi_init", trust_remote_code=False, use_safetensors=True)
        config = trl.DPOConfig(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=4, bf16=False,
                               use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = trl.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
        same, rows = 0, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row, made in zip(rows, trainer.train_dataset, strict=True):
            texts = [row[y]["text"] if path == preferences else row[y][0]["content"] for y in ANSWERS]
            prompt = ids(row["prompt"], add_generation_prompt=True)
            answers = [ids(row["prompt"] + [{"role": "assistant", "content": text}])[len(prompt):] for text in texts]
            same += [made["prompt_ids"], made["chosen_ids"], made["rejected_ids"]] == [prompt, *answers]
        loss = trainer.train().training_loss
        print(f"TRL {trl.__version__}, {path.name}: {len(rows)} rows, {same} with the template's ids, loss {loss:.4f}")
        differ += len(rows) - same
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
