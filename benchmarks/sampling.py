"""How fast 02_generate.py samples, beside transformers, on prompts and responses of mixed lengths.

    python benchmarks/sampling.py

Prompts have a log-normal number of tokens, median 120. One token in a hundred ends a response, the same ones for all;
with random weights all tokens are about equally likely, so a response has 95 tokens in the mean.

    sample_responses              that of common.py; batches of 16 prompts in order of length, as in 02_generate.py
    generate                      the same batches, padded on the left; num_return_sequences=2
    generate, static cache        the same, with cache_implementation="static"
    generate_batch                continuous batching: all prompts in one call, 32 sequences at a time (where
                                  transformers is as old as 5.17 it needs psutil)

First the greedy responses of sample_responses and generate are compared token for token. Then the four run in turn,
five times, on two threads. Tokens are counted to the end of each response; a ratio is of two runs of the same turn.
"""

import logging
import statistics
import sys
import time

import numpy as np
import torch
from shared import markdown
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import common

VOCABULARY, PROMPTS, BATCH, SAMPLES, TEMPERATURE, LIMIT, GREEDY_LIMIT = 32_000, 32, 16, 2, 0.7, 300, 100
REPEATS, THREADS = 5, 2
EOS = range(0, VOCABULARY, 100)


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=None)
    return LlamaForCausalLM(config).eval()  # attention is sdpa


def make_prompts(count):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(120), 0.9, count).clip(20, 600).astype(int)
    return [rng.integers(VOCABULARY, size=length).tolist() for length in lengths]


def generation(limit, **options):
    return GenerationConfig(max_new_tokens=limit, eos_token_id=list(EOS), pad_token_id=0, use_cache=True, **options)


def drawn(**options):
    """Nothing is left to a default: top_k would be 50."""
    return generation(LIMIT, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, num_return_sequences=SAMPLES,
                      **options)


def by_common(model, prompts, batches, seed, temperature=TEMPERATURE, limit=LIMIT):
    """{index of a prompt: its responses} by common.sample_responses, called as 02_generate.py does."""
    done = {}
    for batch in batches:
        u = np.array([[common.uniforms(seed, str(i), k, limit) for k in range(SAMPLES)] for i in batch])
        sampled = common.sample_responses(model, [prompts[i] for i in batch], u, temperature, limit, list(EOS))
        done |= {i: [ids for ids, _ in of_prompt] for i, of_prompt in zip(batch, sampled, strict=True)}
    return done


def without_padding(ids):
    """generate pads a response to the batch's longest."""
    last = next((k for k, i in enumerate(ids) if i in EOS), len(ids))
    return ids[:last + 1]


def by_generate(model, prompts, batches, config):
    """{index of a prompt: its responses} by generate."""
    done = {}
    for batch in batches:
        ids = common.padded([prompts[i] for i in batch], side="left")
        mask = common.padded([[1] * len(prompts[i]) for i in batch], side="left")
        out = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1]:].tolist()
        n = config.num_return_sequences or 1
        done |= {i: [without_padding(ids) for ids in out[k * n:(k + 1) * n]] for k, i in enumerate(batch)}
    return done


def by_generate_batch(model, prompts, config):
    """{index of a prompt: its responses} by continuous batching. It swallows errors, hence the assertion.

    Left to itself it takes most of the machine's memory, and is slower for it. A prompt of 600 tokens and its response
    fit into 4 blocks of 256.
    """
    requests = ContinuousBatchingConfig(max_requests_per_batch=BATCH * SAMPLES, num_blocks=4 * BATCH * SAMPLES,
                                        max_batch_tokens=1024)
    out = list(model.generate_batch(prompts, generation_config=config, continuous_batching_config=requests).values())
    assert len(out) == len(prompts) * SAMPLES and all(result.is_finished() and not result.error for result in out)
    return {i: [result.generated_tokens for result in out[i * SAMPLES:(i + 1) * SAMPLES]] for i in range(len(prompts))}


@torch.no_grad()
def compare_greedy(model, prompts, one, two):
    """How many tokens of the greedy responses `one` and `two` are identical, and how many responses part at a tie.

    one, two: {index of a prompt: its responses}; of two's only the first is used. Tokens whose logits lie within 1e-4
    are a tie, which float32 may break either way in batches of different shapes; what follows cannot be compared.
    Raises SystemExit where two responses part at anything else.
    """
    tokens = ties = 0
    for i, (y, *_) in two.items():
        for x in one[i]:
            shorter = min(len(x), len(y))
            k = next((k for k in range(shorter) if x[k] != y[k]), shorter)
            tokens += k
            if x == y:
                continue
            logits = model(torch.tensor([prompts[i] + y[:k]])).logits[0, -1]
            if k == shorter or abs(logits[x[k]] - logits[y[k]]) > 1e-4:
                sys.exit(f"prompt {i}: the greedy responses differ from token {k} on")
            ties += 1
    return tokens, ties


def main():
    torch.set_num_threads(THREADS)
    logging.disable()  # of continuous batching, which misses psutil
    model, prompts = make_model(), make_prompts(PROMPTS)
    batches = common.length_batches([len(prompt) for prompt in prompts], BATCH)

    tokens, ties = compare_greedy(model, prompts, by_common(model, prompts, batches, 0, 0, GREEDY_LIMIT),
                                  by_generate(model, prompts, batches, generation(GREEDY_LIMIT, do_sample=False)))
    print(f"greedy: {tokens} tokens of {PROMPTS * SAMPLES} responses are identical; {ties} responses part at a tie\n")

    competitors = {
        "sample_responses": lambda turn: by_common(model, prompts, batches, turn),
        "generate": lambda turn: by_generate(model, prompts, batches, drawn()),
        "generate, static cache": lambda turn: by_generate(model, prompts, batches,
                                                           drawn(cache_implementation="static")),
        "generate_batch": lambda turn: by_generate_batch(model, prompts, drawn())}
    speeds = {name: [] for name in competitors}
    for turn in range(REPEATS):
        for name in list(competitors)[::(-1) ** turn]:
            torch.manual_seed(turn)
            started = time.perf_counter()
            done = competitors[name](turn)
            seconds = time.perf_counter() - started
            speeds[name].append(sum(len(ids) for responses in done.values() for ids in responses) / seconds)

    head, rows = "| Tokens per second, median | sample_responses is faster by, median (least to most)", []
    for name, speed in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds["sample_responses"], speed)]
        rows.append([name, f"{statistics.median(speed):.0f}",
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"])
    print(*markdown(head, rows), sep="\n")


if __name__ == "__main__":
    main()
