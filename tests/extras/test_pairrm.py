"""--judge pairrm: against the llm-blender package on a tiny model, whose numbers are quoted here."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

from extras import pairrm
from stages import attempt, refused, rows, write_rows

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
FIELDS = ["source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"]


def save_pairrm(folder):
    """A tiny PairRM in its published form. Its weights are a formula, so that every library makes the same."""
    pieces = [*SPECIAL, *"▁abcdefghijklmnopqrstuvwxyz.,<>|[]012", "▁the", "ing", "▁a"]
    reader = Tokenizer(models.Unigram([(piece, -float(k)) for k, piece in enumerate(pieces)], unk_id=3))
    reader.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    reader.pre_tokenizer = pre_tokenizers.Metaspace()
    reader.add_special_tokens(SPECIAL)
    reader.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
                                                          special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    reader.add_tokens(PREFIXES)
    names = dict(zip(["pad", "cls", "sep", "unk", "mask", "bos", "eos"], [*SPECIAL, "[CLS]", "[SEP]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, **{f"{k}_token": v for k, v in names.items()})
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="DebertaV2Tokenizer")
    config = DebertaV2Config(
        vocab_size=len(tokenizer) + 3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        relative_attention=True, position_buckets=8, max_position_embeddings=32, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, pad_token_id=0,
        n_tasks=2, drop_out=0.05, sep_token_id=2, **dict(zip(FIELDS, tokenizer.convert_tokens_to_ids(PREFIXES))))
    config.save_pretrained(folder)
    shapes = {f"pretrained_model.{name}": tuple(w.shape) for name, w in DebertaV2Model(config).state_dict().items()}
    shapes |= {"head_layer.1.weight": (16, 32), "head_layer.1.bias": (16,), "head_layer.4.weight": (2, 16),
               "head_layer.4.bias": (2,)}
    weights = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        values = 0.5 * np.sin(np.arange(1, math.prod(shape) + 1) ** 2.0 + k) + name.endswith("LayerNorm.weight")
        weights[name] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_json(path, **changes):
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.fixture
def model(tmp_path):
    return save_pairrm(tmp_path / "pairrm")


# (prompt, y_1, y_2, logit in this order, logit in the other), the logits by llm-blender 0.0.2 with transformers 4.44.2
# and torch 2.13, of what save_pairrm(folder) writes:
#   tokenizer, model = AutoTokenizer.from_pretrained(folder), DebertaV2PairRM.from_pretrained(folder).eval()
#   model(**tokenize_pair(tokenizer, [prompt], [y_1], [y_2])).logits
# The second prompt is cut, and both responses to the fourth.
ORACLE = [
    ("name a fish.", "an eel is a fish.", "the whale", 0.26215678453445435, -0.05874605476856232),
    ("a  long\nrow: " + "the fish is in the sea. " * 200, "it is", "so is a whale, and the eel. " * 60,
     0.022030889987945557, -0.2289956510066986),
    ("is it?", "yes.", "", 0.1350577473640442, 0.02367357909679413),
    ("say it twice.", "say it twice. " * 200, "twice " * 300, 0.159787118434906, -0.030795633792877197)]


def answers(*responses):
    """Rows of 02: (prompt, texts of the responses)."""
    return [{"id": f"{k}", "prompt": prompt, "prompt_ids": [1],
             "responses": [{"text": text, "ids": [2 + j], "finish": "eos"} for j, text in enumerate(texts)]}
            for k, (prompt, texts) in enumerate(responses)]


@pytest.fixture
def judged(model, tmp_path):
    """Judge responses by PairRM -> the rows that 03 writes."""
    def start(*responses, **options):
        path, output = write_rows(tmp_path / "responses.jsonl", answers(*responses)), tmp_path / "out.jsonl"
        ran = attempt("03_judge", judge="pairrm", reward_model=model, input=path, output=output, **options)
        assert (ran.status, ran.err) == (0, "")  # not a warning either
        return rows(output)
    return start


@pytest.mark.parametrize("batch", [1, 4])
def test_the_logits_are_those_of_the_package(judged, batch):
    labelled = judged(*((prompt, [one, two]) for prompt, one, two, *_ in ORACLE), micro_batch_size=batch)
    for row, (_, one, two, there, back) in zip(labelled, ORACLE, strict=True):
        assert [k for *pair, _ in row["logits"] for k in pair] == [0, 1, 1, 0]
        assert [logit for *_, logit in row["logits"]] == pytest.approx([there, back], abs=1e-5)
        p = 1 / (1 + math.exp(-(there - back) / 2))
        assert row["p"] == pytest.approx(p, abs=1e-5) and row["judge"] == "pairrm"
        assert row["chosen"]["text"] == (one if p > 0.5 else two)


def test_of_several_responses_each_is_compared_with_every_other(judged):
    texts = ["an eel is a fish.", "the whale", "no thing", "the"]
    [row] = judged(("name a fish.", texts))
    logit = {(one, two): value for one, two, value in row["logits"]}
    assert len(logit) == len(row["logits"]) == 12
    assert [logit[0, 1], logit[1, 0]] == pytest.approx(ORACLE[0][3:], abs=1e-5)
    mean = [sum((logit[k, j] - logit[j, k]) / 2 for j in range(4) if j != k) / 4 for k in range(4)]
    assert (row["chosen"]["text"], row["rejected"]["text"]) == (texts[np.argmax(mean)], texts[np.argmin(mean)])
    sign = 1 if np.argmax(mean) < np.argmin(mean) else -1
    assert row["p"] == pytest.approx(1 / (1 + math.exp(-sign * (max(mean) - min(mean)))), abs=1e-9)


def test_a_token_that_a_text_spells_is_text(model):
    _, read = pairrm.load_pairrm(str(model), "cpu")
    ids = read("<|source|> a[SEP]", "<|candidate2|>", "[CLS]<|candidate|>")
    assert [i for i in ids if i in (1, 2, 45, 46, 47, 48)] == [1, 45, 2, 1, 46, 2, 1, 47, 2] and len(ids) > 40


def test_of_several_turns_the_conversation_is_the_source(judged):
    turns = [("user", "name a fish."), ("assistant", "the eel."), ("user", "a thing")]
    as_messages = [{"role": role, "content": content} for role, content in turns]
    as_one = "user: name a fish.\n\nassistant: the eel.\n\nuser: a thing"
    one, two = judged((as_messages, ["yes.", "no"]), (as_one, ["yes.", "no"]))
    assert one["logits"] == two["logits"]


@pytest.mark.parametrize("change, named", [
    (dict(cand1_prefix_id=None), "cand1_prefix_id"), (dict(source_prefix_id=9), "source_prefix_id"),
    (dict(vocab_size=48), "vocabulary"), (dict(n_tasks=None), "n_tasks"), ("head_layer.4.bias", "head_layer.4.bias"),
    ("tokenizer.json", "tokenizer")])
def test_what_is_not_pairrm_is_refused(model, tmp_path, change, named):
    if isinstance(change, dict):
        edit_json(model / "config.json", **change)
    elif change == "tokenizer.json":
        (model / change).unlink()
    else:
        weights = load_file(model / "model.safetensors")
        del weights[change]
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    path = write_rows(tmp_path / "responses.jsonl", answers(("a", ["the", "a"])))
    line = refused("03_judge", judge="pairrm", reward_model=model, input=path, output=tmp_path / "out")
    assert f"{model}: " in line and named in line
