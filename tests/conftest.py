"""What the tests share: the small world in little, and models of a few thousand weights with its tokenizer."""

import os
import tempfile

# before torch and datasets are imported: no network, no GPU, nothing left behind, one thread as each rank has
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
cache = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = cache.name

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import stages

torch.set_num_threads(1)
WORLD = dict(source="world", seed_size=20, prompt_sizes=[14, 10], eval_size=12, sft_size=48, all_gold=True,
             llm_judge=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder that 00_inputs.py writes for the small world."""
    return stages.run("00_inputs", **WORLD, output=tmp_path_factory.mktemp("world") / "data")


def save_tiny(folder, tokenizer, noise=0.0, kind=AutoModelForCausalLM, **changes):
    """A Llama whose random weights are large enough for peaked predictions; with noise, one that is near to it."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
                 bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = kind.from_config(LlamaConfig(**shape | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "base")


@pytest.fixture(scope="session")
def pi_init(tokenizer, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "pi_init", tokenizer)


@pytest.fixture(scope="session")
def pi_0(tokenizer, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "pi_0", tokenizer, noise=0.02)


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """D_t of 41 pairs: at batch 8 the last step has one pair, fewer micro-batches than two ranks."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(6, 90, rng.integers(low, high)).tolist()

    pairs = [{"id": f"p{k}", "prompt": "hello", "prompt_ids": ids(2, 9),
              "chosen": {"text": "", "ids": ids(1, 12), "finish": "eos"},
              "rejected": {"text": "", "ids": ids(1, 12), "finish": "eos"}} for k in range(41)]
    return stages.write_rows(tmp_path_factory.mktemp("preferences") / "preferences.jsonl", pairs)
