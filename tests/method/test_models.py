"""Other people's models: what is in their files, what they can do, their limits. Each is found when it is loaded."""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, BertConfig, CohereConfig, Gemma3TextConfig, GPTNeoXConfig,
                          LlamaConfig, MambaConfig, MixtralConfig, Olmo3Config, Phi3Config, PhiConfig,
                          Qwen3MoeConfig)

from conftest import save_tiny
from families import FAMILIES, SHAPE, make, with_images
from stages import attempt, metrics, refused, run, write_rows
from support import model_checks, models, runs

CPU = torch.device("cpu")


def load(path):
    return models.load_model(str(path), CPU)


def unchanged(weights):
    return weights


def saved(folder, config, change=unchanged):
    """The folder of a tiny model, its weights changed in the file."""
    make(config).save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tied_head_may_be_absent_and_weights_without_a_use_are_told(tmp_path, capsys):
    folder = saved(tmp_path / "model", "qwen2, tied", lambda weights: weights | {"value_head.weight": torch.ones(3)})
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    assert capsys.readouterr().err == f"{folder}: 1 weights in its files are not used (the first: value_head.weight)\n"


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(runs.InputError, match=f"{folder}: has an adapter"):
        load(folder)


def quantised(weights, dtype, largest, of="proj.weight"):
    """Each matrix of these names as whole or 8-bit numbers up to `largest`, and beside it the scale that it needs."""
    out = dict(weights)
    for key in [key for key in weights if key.endswith(of)]:
        factor = weights[key].abs().max() / largest
        out |= {key: (weights[key] / factor).to(dtype), f"{key}_scale": factor}
    return out


def float8(weights, **names):
    return quantised(weights, torch.float8_e4m3fn, 448, **names)


Q, SMALL = "model.layers.1.self_attn.q_proj", dict(vocab_size=40, hidden_size=32, num_hidden_layers=2)
WRONG = {  # what transformers would make up, or read as if it were what its values say; what the stages cannot use
    "names of torch.compile": ("llama", lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
                               "lm_head.weight"),
    "a layer is missing": ("llama", lambda weights: {key: value for key, value in weights.items() if ".1." not in key},
                           "model.layers.1.input_layernorm.weight"),
    "float8": ("llama", float8, "down_proj.weight .*F8_E4M3"),
    "float8 in a format that is not known": (LlamaConfig(**SHAPE, quantization_config={"quant_method": "modelopt"}),
                                             float8, "down_proj.weight .*F8_E4M3"),
    "float8 experts": ("mixtral", lambda weights: float8(weights, of=".w1.weight"), "experts.0.w1.weight .*F8"),
    "uint8": ("llama", lambda weights: quantised(weights, torch.uint8, 127), "down_proj.weight .*U8"),
    "scales of float weights": ("llama", lambda weights: quantised(weights, torch.float32, 448), "weight_scale"),
    "scales of float experts": (Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16), lambda weights:
                                quantised(weights, torch.float32, 448, of="0.mlp.experts.3.up_proj.weight"),
                                "up_proj.*_scale"),
    "a bias": ("llama", lambda weights: weights | {f"{Q}.bias": torch.ones(32)}, "q_proj.bias"),
    "a random routing": (MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5), unchanged,
                         "not supported: .*in train mode"),
    "scaled logits": (CohereConfig(**SHAPE, logit_scale=0.1), unchanged, r"not supported: .*not lm_head\(hidden\)"),
    "padding on the left": (MambaConfig(**SMALL, state_size=4, initializer_range=0.3), unchanged,
                            "not supported: .*padding on the left"),
    "no cache": (BertConfig(**SMALL, num_attention_heads=2, intermediate_size=48, is_decoder=False), unchanged,
                 "not supported: .*no cache")}
WRONG |= {f"a value is {value}": ("llama", lambda weights, value=value: weights | {
    f"{Q}.weight": weights[f"{Q}.weight"].index_fill(0, torch.tensor(31), value)}, f"{Q}.weight .*not finite")
    for value in (math.nan, math.inf, -math.inf)}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_missing_misread_not_finite_or_not_supported_is_named(tmp_path, kind):
    config, change, found = WRONG[kind]
    folder = saved(tmp_path / "model", config, change)
    with pytest.raises(runs.InputError, match=rf"^{folder}: .*{found}.*\Z"):  # in one line: `.` matches no line end
        load(folder)


def test_what_belongs_to_no_weight_of_the_model_is_told_alone(tmp_path, capsys):
    tower = float8({"vision_tower.q_proj.weight": torch.ones(4, 4)})
    others = {"model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.bool), "position_ids": torch.arange(4),
              "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # which transformers does not even report
    folder = saved(tmp_path / "model", "llama", lambda weights: tower | others | {
        key: value.double() for key, value in weights.items()})
    exact = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    assert all(torch.equal(weight, exact[key]) for key, weight in load(folder).state_dict().items())
    assert "4 weights in its files are not used" in capsys.readouterr().err


def test_a_mask_among_the_weights_is_no_weight(tmp_path, capsys):
    mask = {f"transformer.h.{k}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril() for k in range(2)}
    load(saved(tmp_path / "model", "gpt2", lambda weights: weights | mask))  # as in old files of GPT-2 and Pythia
    assert capsys.readouterr().err == ""


def test_weights_that_transformers_has_dequantised_are_used():
    model, unknown = make("llama"), [f"{Q}.input_scale"]  # of the activations, which are not quantised any more
    model.is_quantized = False  # as its quantizers do
    model_checks.check_weights("it", model, unknown)
    model.is_quantized = True
    with pytest.raises(runs.InputError, match="it: .*quantised"):
        model_checks.check_weights("it", model, unknown)


@pytest.fixture(scope="module")
def short(tokenizer, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("short"), tokenizer, max_position_embeddings=40)


LONG = {"prompt": "my lid " * 20, "response": "my lid " * 20, "chosen": "my lid " * 20, "rejected": "my lid"}
Y = [{"text": "", "ids": [7] * 30 + [k], "finish": "eos"} for k in (8, 9)]
LONG_IDS = {"prompt": "a", "prompt_ids": [5] * 10, "responses": Y, "chosen": Y[0], "rejected": Y[1]}  # 41 tokens


@pytest.mark.parametrize("name, row, option", [
    ("00_sft", LONG, "--max-length"), ("01_seed_dpo", LONG, "--max-length"), ("02_generate", LONG, "--max-new-tokens"),
    ("03_judge", LONG_IDS, "--max-new-tokens"), ("04_refined_dpo", LONG_IDS, "--max-length"),
    ("05_eval sample", LONG, "--max-prompt-length")])
def test_more_tokens_than_the_model_has_positions(short, tmp_path, name, row, option):
    path = write_rows(tmp_path / "in.jsonl", [{**row, "id": 7}, {**row, "id": 8}])
    more = {"batch_size": 1} if option == "--max-length" else {"max_new_tokens": 8}
    if name == "03_judge":
        more = {"init_model": short}
    line = refused(*name.split(), model=short, input=path, output=tmp_path / "out", **more)
    assert "id 7: " in line or "the prompts, id 0: " in line and name.startswith("05")
    assert "40 positions" in line and option in line


def test_00_drops_and_counts_the_conversations_for_which_the_model_has_no_positions(short, tmp_path):
    """As of LLM-as-judge with Phi-2, whose examples have up to 4,100 tokens."""
    fitting = [{"id": k, "prompt": "my lid", "response": "my lid"} for k in range(4)]
    options = dict(model=short, batch_size=2, max_length=4100, max_prompt_length=4096)
    mixed = write_rows(tmp_path / "in.jsonl", [fitting[0], {**LONG, "id": 7}, *fitting[1:], {**LONG, "id": 8}])
    ran = attempt("00_sft", **options, input=mixed, output=tmp_path / "out")
    assert ran.status == 0 and "rows read 6, dropped as too long 2, steps 2" in ran.out, ran
    alone = run("00_sft", **options, input=write_rows(tmp_path / "in.jsonl", fitting), output=tmp_path / "alone")
    assert metrics(tmp_path / "out") == metrics(alone)


LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0 + k for k in range(8)],
                original_max_position_embeddings=32)
BY_LAYER = dict(full_attention=LONGROPE, sliding_attention=dict(rope_type="default", rope_theta=1e4))
SCALED = {  # with 64 positions
    "longrope": (Phi3Config(**SHAPE, original_max_position_embeddings=32, rope_parameters=dict(LONGROPE)), 32, True),
    "longrope by layer": (Gemma3TextConfig(**SHAPE, head_dim=16, layer_types=[*BY_LAYER], rope_parameters=BY_LAYER),
                          32, True),
    "dynamic": (LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), 64, True),
    "linear": (LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), 64, False)}


@pytest.mark.parametrize("name", SCALED)
def test_a_row_that_changes_the_others_of_its_batch_is_refused(name):
    config, limit, changes = SCALED[name]
    model, row = make(config), ([5, 6, 7], [[8, 9, 10, 11, 2]])
    assert model_checks.count_positions(model) == limit

    def beside(length):  # log p of the row's tokens in a batch with one that is so long
        return model_checks.logps(model, [row, ([5] * 20, [[6] * (length - 20)])])[:5]

    # a row's last token is no input: it is predicted at the one before
    torch.testing.assert_close(beside(limit + 1), beside(21), rtol=1e-5, atol=1e-5)
    assert changes == ((beside(limit + 2) - beside(21)).abs().max() > 0.01)
    model_checks.check_limits("in.jsonl", [(7, [5] * 20, [[6] * (limit - 20)])], model, "--max-length")
    with pytest.raises(runs.InputError, match=f"in.jsonl, id 7: .*{limit} positions.*--max-length"):
        model_checks.check_limits("in.jsonl", [(7, [5] * 20, [[6] * (limit - 19)])], model, "--max-length")
    model_checks.check_limits("in.jsonl", [(7, [5], [[39]])], model, "--max-length")
    with pytest.raises(runs.InputError, match="in.jsonl, id 7: token id 40 .*vocabulary of 40"):  # as of an added token
        model_checks.check_limits("in.jsonl", [(7, [5], [[40]])], model, "--max-length")


# ---------------------------------------------------------------------------------------------
# A saved model, as transformers 4 and the engines built on it read its config.json. These keys are what transformers
# 4.57 makes its configs from, and what the files of these models on the Hub have


OLDER = {  # name: (class of a config, what else it is given, the older keys)
    "default": (LlamaConfig, {}, dict(rope_theta=5e5)),
    "llama3": (LlamaConfig, {}, dict(rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32))),
    "gemma3": (Gemma3TextConfig, dict(head_dim=16), dict(rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling=dict(
        rope_type="linear", factor=8.0))),
    "olmo3": (Olmo3Config, {}, dict(rope_theta=5e5, rope_scaling=dict(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=32))),
    "phi3": (Phi3Config, dict(original_max_position_embeddings=32), dict(rope_theta=2e4, rope_scaling=dict(
        type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8))),
    "phi": (PhiConfig, {}, dict(rope_theta=2e4, partial_rotary_factor=0.25)),
    "gpt_neox": (GPTNeoXConfig, {}, dict(rotary_emb_base=20000, rotary_pct=0.5))}
OLD_KEYS = {"torch_dtype"}.union(*(older for _, _, older in OLDER.values()))


def older_keys(config, tokenizer, folder):
    """The older keys in the config.json that the stages save, and in its text part; transformers 5 must read the same
    config as without."""
    model = make(config)
    model.save_pretrained(folder / "theirs")
    models.save_model(model, tokenizer, folder / "ours")
    ours, theirs = (AutoConfig.from_pretrained(folder / name).to_dict() for name in ("ours", "theirs"))
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}
    saved = json.loads((folder / "ours" / "config.json").read_text())
    return [{key: part[key] for key in part if key in OLD_KEYS} for part in (saved, saved.get("text_config", {}))]


@pytest.mark.parametrize("name", OLDER)
def test_a_saved_config_has_the_keys_of_older_versions_too(tmp_path, tokenizer, name):
    config, more, older = OLDER[name]
    config = config(**SHAPE, **more, **copy.deepcopy(older))  # transformers adds to a dict that it is given
    assert older_keys(config, tokenizer, tmp_path) == [older | {"torch_dtype": "float32"}, {}]


def test_older_keys_of_a_model_that_reads_images_stand_in_its_text_part(tmp_path, tokenizer):
    text = dict(rope_theta=1e6, rope_local_base_freq=1e4)
    assert older_keys(with_images(40), tokenizer, tmp_path) == [{"torch_dtype": "float32"}, text]


@pytest.mark.parametrize("name", FAMILIES)
def test_older_keys_change_nothing_for_any_family(tmp_path, tokenizer, name):
    found, _ = older_keys(FAMILIES[name], tokenizer, tmp_path)
    assert ("rope_theta" in found) == (name not in ("gpt2", "mamba2"))


def test_a_change_anywhere_in_large_weights_is_another_model(tmp_path):
    folder = saved(tmp_path / "model", LlamaConfig(**SHAPE | dict(hidden_size=256, intermediate_size=8192,
                                                                  num_hidden_layers=4)))
    file = folder / "model.safetensors"
    assert file.stat().st_size > 2 * 2 ** 24
    before, weights = runs.fingerprint(folder), load_file(file)
    assert runs.fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before
    for k in range(4):  # as a merged LoRA changes them: embeddings, and with them the file's first part, are as before
        changed = {key: value + 1e-3 if f"layers.{k}.mlp.up_proj" in key else value for key, value in weights.items()}
        save_file(changed, file, {"format": "pt"})
        assert runs.fingerprint(folder) != before
    save_file(weights, file, {"format": "pt"})
    assert runs.fingerprint(folder) == before
