"""Other people's models, loaded and saved. What could be wrong with one: model_checks.py.

    from_pretrained, load_config, load_weights, load_model    with all their weights, without dropout and foreign code
    check_same_vocabulary                      of two models
    load_policy, load_reference                what 00_sft, 01 and 04 train, and train against
    save_model, save_trained                   what they leave
"""

import contextlib
import errno
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from support import model_checks
from support.runs import InputError, close_output, first_rank

huggingface_hub.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def from_pretrained(loader, name, what, **options):
    """loader.from_pretrained(name), a folder here or a name on the Hub. Never runs a model's own code."""
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds, most of them pages long
        raise InputError(f"{name}: cannot load {what} from this folder or from the Hub "
                         f"({type(error).__name__}: {str(error)[:100]}): check the name")


def load_config(name):
    """The model's config with every dropout at 0: policy and reference must agree in train mode too."""
    config = from_pretrained(AutoConfig, name, "a model's config")
    for part in (config, config.get_text_config()):  # the second is the first, but for a multimodal model
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def load_weights(loader, name, what, **options):
    """loader's model of this name, from safetensors. Raises InputError where the files lack a weight of the model.

    transformers would give it random values. It ignores weights that it does not know, which are reported on stderr
    where they are no part of its own (`model_checks.check_weights`), and adapters, which are refused.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise InputError(f"{name}: has an adapter (adapter_config.json): merge it into the weights, or remove it")
    model, info = from_pretrained(loader, name, f"{what} in safetensors", use_safetensors=True,
                                  output_loading_info=True, **options)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise InputError(f"{name}: {len(missing)} weights of the model are not in its files (the first: {missing[0]})"
                         + (f", which have {unknown[0]} instead" if unknown else "")
                         + f": save {what} with all its weights, under transformers' names")
    model_checks.check_weights(name, model, unknown)
    if unknown and first_rank():
        print(f"{name}: {len(unknown)} weights in its files are not used (the first: {unknown[0]})", file=sys.stderr)
    return model


def load_model(name, device, dtype=torch.float32):
    """A causal language model in eval mode, with its `max_shared_length`. Raises what `model_checks.try_model` does."""
    model = load_weights(AutoModelForCausalLM, name, "a causal language model", config=load_config(name), dtype=dtype)
    model = model.to(device).eval()
    model_checks.try_model(name, model)
    return model


def check_same_vocabulary(name, other):
    """Raises InputError where a token id means different tokens to two models."""
    differ = len({load_config(n).get_text_config().vocab_size for n in (name, other)}) > 1
    with contextlib.suppress(Exception):  # a model without a tokenizer is used with the other's
        one, two = (AutoTokenizer.from_pretrained(n, trust_remote_code=False).get_vocab() for n in (name, other))
        one, two = ({i: token for token, i in vocabulary.items()} for vocabulary in (one, two))
        differ = differ or any(one[i] != two[i] for i in one.keys() & two.keys())
    if differ:
        raise InputError(f"{name} and {other} have different vocabularies: give two models with the same tokenizer")


def load_policy(args, ranks):
    """(the model of --model in train mode, its dropout 0; what the training loop calls, see `common.make_policy`)"""
    # unsharded it may not fit on a GPU
    model = load_model(args.model, torch.device("cpu") if common.is_sharded(args, ranks) else ranks.device)
    freeze_unused(model)
    return model, common.make_policy(model, args, ranks)


def freeze_unused(model):
    """Weights that no text reaches, for images or for a balance of experts, get no gradient: DDP would wait for it."""
    def note(weight):
        reached.add(weight)
        weight.grad = None  # at once: the gradients of all weights may not fit

    reached = set()
    hooks = [weight.register_post_accumulate_grad_hook(note) for weight in model.parameters()]
    response = [3, 4] * int(min(64, model_checks.count_positions(model) // 2))  # some need more than a few tokens
    common.ResponseLogps(model)(common.collate([([1], [response])], model.device)).sum().backward()
    for hook in hooks:
        hook.remove()
    for weight in model.parameters():
        weight.requires_grad_(weight in reached)


def load_reference(name, pairs, args, ranks):
    """pi_ref, computed as the policy is: from float32 weights, with --fsdp from weights in the dtype that FSDP gathers.

    Its weights require no gradient: else autocast caches a bf16 copy. Checks the pairs against its limits.
    """
    dtype = common.scoring_dtype(ranks.device) if common.is_sharded(args, ranks) else torch.float32
    model = load_model(name, ranks.device, dtype).requires_grad_(False)
    rows = ((pair["id"], pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs)
    model_checks.check_limits(" ".join(args.input), rows, model, "--max-length")
    return common.ResponseLogps(model)


def save_model(model, tokenizer, folder, weights=None):
    """An ordinary Hugging Face folder, float32: bf16 would round away small updates, on which the next model builds."""
    path = folder / "config.json"
    try:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        config = json.loads(path.read_text(encoding="utf-8"))
        add_older_keys(config)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors and tokenizers raise no OSError where the disk is full
        if "os error" not in str(error):
            raise
        raise OSError(errno.EIO, f"cannot be written ({error})", str(folder))
    for file in folder.glob("*.safetensors"):  # safetensors lets only the owner read them
        file.chmod(path.stat().st_mode)


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


def save_trained(args, work, ranks, model, tokenizer, counts):
    """The trained model, with the metrics of its steps, as the output."""
    weights = model.state_dict()
    if common.is_sharded(args, ranks):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        shutil.rmtree(work / "model", ignore_errors=True)  # a kill may have left half of it
        save_model(model, tokenizer, work / "model", weights)
        shutil.copyfile(work / "metrics.jsonl", work / "model" / "metrics.jsonl")
        close_output(args, work, work / "model", counts)

    ranks.on_first(write)
