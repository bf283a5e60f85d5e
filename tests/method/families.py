"""Models of several families, of a few thousand random weights, with a vocabulary of 40."""

import torch
from transformers import (AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, GPT2Config, GraniteMoeHybridConfig,
                          Lfm2Config, LlamaConfig, Mamba2Config, MistralConfig, MixtralConfig, Phi3Config, PhiConfig,
                          Qwen2Config, Qwen3Config, Qwen3NextConfig)

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
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=4, tie_word_embeddings=False,
                               layer_types=["sliding_attention", "full_attention"]),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4)}
HYBRIDS = {  # with a recurrence or a convolution, which runs from one response into the next whatever a mask says
    "mamba2": Mamba2Config(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16,
                           n_groups=1, initializer_range=0.3),
    "lfm2": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen3-next": Qwen3NextConfig(
        **SHAPE, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"]),
    "granite-4-h": GraniteMoeHybridConfig(
        **SHAPE, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4,
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16)}
FAMILIES |= HYBRIDS


def with_images(vocab_size):
    """The config of a model that reads images too, of whose weights a text reaches a part."""
    return Gemma3Config(
        text_config=SHAPE | dict(vocab_size=vocab_size, head_dim=16, sliding_window=4, max_position_embeddings=256,
                                 layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28, patch_size=14), mm_tokens_per_image=4, tie_word_embeddings=False)


def make(config, seed=1):
    """config: a family's name, or a config of transformers"""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[config] if isinstance(config, str) else config).eval()
