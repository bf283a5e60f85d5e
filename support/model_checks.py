"""What could be wrong with other people's models: each is refused before hours are spent.

    check_weights     files that transformers misreads: float8 and int8 without their scales; values that are not finite
    try_model         what a model can do, which its architecture's name does not say
    check_limits      token ids without an embedding, texts longer than the model's positions
"""

import contextlib
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import cached_file

import common
from support.runs import InputError


def check_weights(name, model, unknown):
    """Raises InputError where a loaded model's weights are not those that its files mean, or are not finite.

    unknown: the names in its files that transformers has not used
    """
    if fault := find_misread(name, model, unknown):
        raise InputError(f"{name}: {fault}: give the model as transformers saves it, in float32, bfloat16 or float16")
    for key, weight in model.state_dict().items():
        # the least and the largest are NaN where a value is; a tenth of the time of isfinite, which makes a copy
        if weight.numel() and not all(map(math.isfinite, torch.aminmax(weight))):
            raise InputError(f"{name}: {key} has values that are not finite: give another copy of the model")


def find_misread(name, model, unknown):
    """What was read as if it were plain, in words; None where nothing was found. unknown: as for `check_weights`.

    In a format that it does not know, transformers takes float8 and int8 for the weights and ignores their scales.
    """
    if hasattr(model, "is_quantized"):  # it knew the format; False: and has made plain weights of it
        return "its weights are quantised" if model.is_quantized else None
    weights, stored = model.state_dict(), stored_dtypes(name)
    for key, dtype in stored.items():
        is_mask = dtype in ("BOOL", "U8", "I32", "I64") and not (key in weights and weights[key].is_floating_point())
        if dtype not in ("F64", "F32", "BF16", "F16") and key not in unknown and not is_mask:
            return f"{key} is stored as {dtype}"
    parts = tuple(key.removesuffix("weight") for key in (weights.keys() | stored.keys()) - {*unknown})
    for key in unknown:
        if key.startswith(parts):  # q_proj.weight_scale, q_proj.bias, q_proj.lora_A.weight beside q_proj.weight
            return f"{key} is not used, but is a part of a weight that is"


def stored_dtypes(name):
    """{name of a weight: its dtype in the model's safetensors files, such as "BF16"}"""
    try:  # of a model on the Hub the files are in the cache by now
        folder = Path(cached_file(name, "config.json")).parent
        files = huggingface_hub.get_local_safetensors_metadata(folder).files_metadata.values()
    except (OSError, huggingface_hub.errors.NotASafetensorsRepoError):
        return {}  # the Hub has converted them, from torch's own format, which it keeps in another branch
    return {key: tensor.dtype for file in files for key, tensor in file.tensors.items()}


def try_model(name, model):
    """Do on a few tokens what the stages do with a model, and set model.max_shared_length. Raises InputError where it
    fails: what a model can do cannot be inferred from its architecture's name.

    max_shared_length: the longest prompt + response for which one pass over the prompt is exact for all its responses;
    0 where the model ignores custom masks or positions. At most its sliding window or attention chunk, which a custom
    mask would override.
    """
    exact = 1e-4 if model.dtype == torch.float32 else 0.5  # float32, or bf16
    try:
        found = find_fault(model, exact)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = f"a pass over a few tokens fails ({type(error).__name__}: {str(error)[:100]})"
    if found:
        raise InputError(f"{name}: not supported: {found}: give another model")

    rows = [(x, [[3, 4], [4, 3]]) for x in ([1], [2, 0])]  # no longer than the shortest window
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    model.max_shared_length = 0
    with contextlib.suppress(Exception):  # a model that takes no such mask
        if torch.allclose(logps(model, rows, 4), logps(model, rows), rtol=0, atol=min(exact, 0.1)):
            model.max_shared_length = min((limit for limit in limits if limit), default=math.inf)


@torch.no_grad()
def logps(model, rows, max_shared=0):
    return common.ResponseLogps(model)(common.collate(rows, model.device, max_shared))


@torch.no_grad()
def find_fault(model, exact):
    """What the model computes otherwise than the stages assume, in words; None where nothing was found.

    Two prompts are sampled from, four responses of at most four tokens to each; then these are scored.
    """
    def differ(one, two):
        return not torch.allclose(one, two, rtol=1e-3, atol=exact)

    u = np.random.default_rng(0).random((2, 4, 4))
    eos = list(range(0, model.config.get_text_config().vocab_size, 4))
    sampled = common.sample_responses(model, [[1], [2, 0]], u, 2.0, 4, eos)
    rows = [(x, [y for y, _ in ys]) for x, ys in zip([[1], [2, 0]], sampled)]
    batch, alone = common.collate(rows, model.device), logps(model, rows)
    logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.logit_positions].float()
    model.train()
    trained = torch.stack([logps(model, rows), logps(model, rows)])
    model.eval()
    # where sample_token has found each token: below the cumulative probability and not below that of the one before
    p = (logits / 2.0).softmax(-1).double()
    p, end = (values.gather(1, batch.labels[:, None])[:, 0].cpu().numpy() for values in (p, p.cumsum(-1)))
    drawn = np.concatenate([u[b, k, :len(y)] for b, (_, ys) in enumerate(rows) for k, y in enumerate(ys)])
    if differ(alone, -F.cross_entropy(logits, batch.labels, reduction="none")):
        return "its logits are not lm_head(hidden), e.g. soft-capped or scaled"
    if differ(trained, alone):
        return "in train mode it computes something else, e.g. a random routing"
    if max(*(drawn - end), *(end - p - drawn)) > (1e-3 if model.dtype == torch.float32 else 0.1):
        return "with its cache and padding on the left it predicts other tokens"


def count_positions(model):
    """The most tokens of a text that the model was made for, and that leave the other texts of its batch as they are.

    Where one is longer than the original positions, longrope (Phi-3 128k; the paper's is a 4k) rotates all of its batch
    by other factors, so p would depend on the batch. "dynamic" does so beyond max_position_embeddings.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = [part["original_max_position_embeddings"] for part in (rope, *rope.values())  # of a type of layers
                if isinstance(part, dict) and part.get("rope_type") == "longrope"]
    return min([getattr(config, "max_position_embeddings", None) or math.inf, *original])


def check_limits(path, rows, model, options, new_tokens=0):
    """Raises InputError where a row has a token id that the model has no embedding for, or more tokens than positions.

    rows: (id, prompt ids, [ids of each response]); new_tokens: to be sampled after each; options: those that bound both
    """
    vocabulary = min(model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features)
    positions = count_positions(model)
    for row_id, prompt, responses in rows:
        largest = max(max(ids) for ids in (prompt, *responses))
        length = len(prompt) + max(map(len, responses), default=0) + new_tokens
        if largest >= vocabulary:
            raise InputError(f"{path}, id {row_id}: token id {largest} is not in the model's vocabulary of "
                             f"{vocabulary}: give the tokenizer and the model that belong together")
        if length > positions:
            raise InputError(f"{path}, id {row_id}: {length} tokens, and the model has {positions} positions: "
                             f"lower {options}")
