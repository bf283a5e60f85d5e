"""What the files of a model hold, which transformers may read as something else.

    check_weights     float8 and int8 without their scales, and values that are not finite, are refused
    add_older_keys    config.json as transformers 4 reads it, and the engines built on that
"""

import math
from pathlib import Path

import huggingface_hub
import torch
from transformers.utils import cached_file

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


# types of models with rope_parameters for each type of layer, and the older key of the local layers' rope_theta
BY_LAYER = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": None}


def add_older_keys(config):
    """Add to a config.json the keys that transformers 4 reads, and engines built on it, where 5 has renamed them.

    They do not know rope_parameters: without rope_theta it is 10,000 to them. What has no older key is left out.
    config: the file's dict, or a part of it
    """
    for part in config.values():
        if isinstance(part, dict):  # text_config of a model that reads images
            add_older_keys(part)
    if config.get("dtype"):
        config["torch_dtype"] = config["dtype"]
    model_type, rope = config.get("model_type", ""), config.get("rope_parameters") or {}
    if rope and BY_LAYER.get(model_type):
        config[BY_LAYER[model_type]] = rope["sliding_attention"]["rope_theta"]
    if rope and model_type in BY_LAYER:
        rope = rope["full_attention"]
    if rope.get("rope_theta") is None:
        return
    is_neox = model_type.startswith("gpt_neox")
    config["rotary_emb_base" if is_neox else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope and model_type != "phi3":  # in phi3 it still is where it was
        config["rotary_pct" if is_neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", *config)}
    if scaling.get("type") == scaling.get("rope_type"):
        scaling.pop("rope_type", None)  # transformers 5 adds it, and 4 refuses a fourth key in phi3
    if scaling not in ({}, {"rope_type": "default"}):
        config["rope_scaling"] = scaling
