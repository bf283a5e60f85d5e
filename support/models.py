"""Other people's models: loaded, tried on a few tokens, held against the input's limits, saved.

    from_pretrained, load_config, load_weights, load_model    with all their weights, without dropout and foreign code
    try_model                                       what a model can do, which its architecture's name does not say
    check_limits, check_same_vocabulary             before hours are spent
    load_policy, load_reference, save_trained       what 00_sft, 01 and 04 train, train against, and leave
"""

import contextlib
import errno
import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from support import checkpoints
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
    where they are no part of its own (`checkpoints.check_weights`), and adapters, which are refused.
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
    checkpoints.check_weights(name, model, unknown)
    if unknown and first_rank():
        print(f"{name}: {len(unknown)} weights in its files are not used (the first: {unknown[0]})", file=sys.stderr)
    return model


def load_model(name, device, dtype=torch.float32):
    """A causal language model in eval mode, with its `max_shared_length`. Raises InputError where `try_model` does."""
    model = load_weights(AutoModelForCausalLM, name, "a causal language model", config=load_config(name), dtype=dtype)
    model = model.to(device).eval()
    try_model(name, model)
    return model


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
    """Weights that a text does not reach, such as those for images, require no gradient: DDP would wait for theirs."""
    def note(weight):
        used.add(weight)
        weight.grad = None  # at once: the gradients of all weights may not fit

    used = set()
    hooks = [weight.register_post_accumulate_grad_hook(note) for weight in model.parameters()]
    common.ResponseLogps(model)(common.collate([([1], [[3, 4]])], model.device)).sum().backward()
    for hook in hooks:
        hook.remove()
    for weight in model.parameters():
        weight.requires_grad_(weight in used)


def load_reference(name, pairs, args, ranks):
    """pi_ref, computed as the policy is: from float32 weights, with --fsdp from weights in the dtype that FSDP gathers.

    Its weights require no gradient: else autocast caches a bf16 copy. Checks the pairs against its limits.
    """
    dtype = common.scoring_dtype(ranks.device) if common.is_sharded(args, ranks) else torch.float32
    model = load_model(name, ranks.device, dtype).requires_grad_(False)
    check_limits(" ".join(args.input), ((pair["id"], pair["prompt"], [pair["chosen"], pair["rejected"]])
                                        for pair in pairs), model, "--max-length")
    return common.ResponseLogps(model)


def save_model(model, tokenizer, folder, weights=None):
    """An ordinary Hugging Face folder, float32: bf16 would round away small updates, on which the next model builds."""
    path = folder / "config.json"
    try:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        config = json.loads(path.read_text(encoding="utf-8"))
        checkpoints.add_older_keys(config)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors and tokenizers raise no OSError where the disk is full
        if "os error" not in str(error):
            raise
        raise OSError(errno.EIO, f"cannot be written ({error})", str(folder))
    for file in folder.glob("*.safetensors"):  # safetensors lets only the owner read them
        file.chmod(path.stat().st_mode)


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
