"""Models of several families, of a few thousand random weights, with a vocabulary of 40."""

import torch
from transformers import (AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Phi3Config,
                          PhiConfig, Qwen2Config)

SHAPE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
             bos_token_id=None, eos_token_id=None)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),  # shorter than the sequences
    "phi": PhiConfig(**SHAPE),  # its head has a bias
    "phi3": Phi3Config(**SHAPE),
    "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    # a recurrence, which runs from one response into the next whatever a mask says
    "mamba": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)}


def make(config, seed=1):
    """config: a family's name, or a config of transformers"""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[config] if isinstance(config, str) else config).eval()
