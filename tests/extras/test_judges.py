"""--judge and --length-penalty of 03: each judge against an independent computation.

PairRM against the llm-blender package on a tiny model, whose numbers are quoted here.
"""

import json
import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, DebertaV2Config,
                          DebertaV2Model, PreTrainedTokenizerFast)

import common
import stages
from children import no_child_outlives_its_test, two_ranks
from conftest import save_tiny
from extras import judges, pairrm, small_world
from support import chat, records
from stages import attempt, counts, refused, rows, run, write_rows

stage = stages.load("03_judge")


@pytest.fixture(scope="module")
def responses(pi_0, world, tokenizer, tmp_path_factory):
    """Pairs of responses of different lengths: random words, and every second one two answers that gold knows."""
    folder = tmp_path_factory.mktemp("responses")
    sampled = rows(run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=12,
                       output=folder / "sampled.jsonl"))
    rng, known = random.Random(0), records.read_jsonl(world / "all_gold.jsonl", records.LABELLED)
    for k, row in enumerate(sampled):
        for y in row["responses"]:
            y["ids"] = [rng.randrange(6, 90) for _ in range(rng.randint(2, 12))]
            y["text"] = tokenizer.decode(y["ids"])
        if k % 2:
            [pair] = [pair for pair in known if pair["id"] == row["id"]]
            for y, key in zip(row["responses"], rng.sample(("chosen", "rejected"), 2)):
                y |= {"text": pair[key], "ids": tokenizer(pair[key]).input_ids + [tokenizer.eos_token_id]}
    return write_rows(folder / "responses.jsonl", sampled)


@pytest.fixture
def judged(responses, tmp_path_factory):
    """Start 03 with a judge and its options -> the rows it writes."""
    def start(judge, **options):
        output = tmp_path_factory.mktemp("judged") / "out.jsonl"
        return rows(run("03_judge", **{"judge": judge, "input": responses} | options, output=output))
    return start


def check(sampled, labelled, rewards, name, abs=1e-3):
    """The labels, p and all else that is not the judge's own, from a reward for each response."""
    assert {0, 1} == {k for r in rewards for k in (0, 1) if r[k] == max(r)}  # both sides are preferred somewhere
    for row, judged, r in zip(rows(sampled), labelled, rewards, strict=True):
        one, two = row["responses"]
        assert (judged["chosen"], judged["rejected"]) == ((one, two) if r[0] > r[1] else (two, one))
        assert judged["p"] == pytest.approx(1 / (1 + math.exp(r[1] - r[0])), abs=abs)
        assert judged["judge"] == name and (judged["id"], judged["prompt"]) == (row["id"], row["prompt"])


def save_llama(folder, tokenizer, **changes):
    """A tiny Llama with a score head, padding with the EOS as the small world does."""
    return save_tiny(folder, tokenizer, **{"kind": AutoModelForSequenceClassification, "num_labels": 1,
                                           "pad_token_id": tokenizer.pad_token_id} | changes)


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("reward") / "model", tokenizer)


@torch.no_grad()
def score_alone(model, ids):
    """The score of one text, its head applied by hand at the last token that is not the padding's."""
    last = max(k for k, i in enumerate(ids) if i != model.config.pad_token_id)
    return model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, last]).item()


@pytest.mark.parametrize("pads", [True, False])
def test_a_reward_model_scores_each_response_by_itself(judged, responses, reward_model, tokenizer, tmp_path, pads):
    name = reward_model
    if not pads:  # then transformers takes one text at a time, and its last token
        name = save_llama(tmp_path / "model", tokenizer, pad_token_id=None)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    expected = [[score_alone(model, tokenizer.apply_chat_template(
        row["prompt"] + [{"role": "assistant", "content": y["text"]}], return_dict=False))
        for y in row["responses"]] for row in rows(responses)]
    labelled = judged("reward", reward_model=name, micro_batch_size=5)
    check(responses, labelled, expected, "reward", abs=1e-5)
    assert [row["scores"] for row in labelled] == [pytest.approx(scores, abs=1e-5) for scores in expected]


@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory):
    """A reward model of 64 positions whose tokenizer has no chat template, and pairs with their own special tokens."""
    folder = tmp_path_factory.mktemp("reward") / "bert"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    reader = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path, model_input_names=names)
    reader.chat_template = None
    reader.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <bos>:1", special_tokens=[("<eos>", 0), ("<bos>", 1)])
    torch.manual_seed(2)
    config = BertConfig(vocab_size=len(reader), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=2, initializer_range=0.3, num_labels=1, pad_token_id=0,
                        max_position_embeddings=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def test_a_reward_model_without_a_chat_template_reads_a_pair_of_texts(judged, responses, bert, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(bert)

    @torch.no_grad()
    def score_pair(prompt, text):
        prompt, text = tokenizer(prompt).input_ids + [0], tokenizer(text).input_ids + [1]
        return model(input_ids=torch.tensor([prompt + text]),
                     token_type_ids=torch.tensor([[0] * len(prompt) + [1] * len(text)])).logits.item()

    expected = [[score_pair(row["prompt"][0]["content"], y["text"]) for y in row["responses"]]
                for row in rows(responses)]
    check(responses, judged("reward", reward_model=bert), expected, "reward", abs=1e-4)


def test_a_text_that_is_longer_than_a_judge_reads(bert, pi_0, tmp_path):
    y = [{"text": "my lid " * n, "ids": [7, n], "finish": "eos"} for n in (30, 31)]
    path = write_rows(tmp_path / "in.jsonl", [{"id": 7, "prompt": "my lid", "prompt_ids": [5, 6], "responses": y}])
    line = refused("03_judge", judge="reward", reward_model=bert, input=path, output=tmp_path / "out")
    assert f"{path}, id 7: " in line and "66 tokens" in line and "reads 64" in line and "--reward-model" in line
    y[0]["text"] *= 9
    write_rows(path, [{"id": 7, "prompt": "my lid", "prompt_ids": [5, 6], "responses": y}])
    line = refused("03_judge", judge="llm", judge_model=pi_0, input=path, output=tmp_path / "out")
    assert f"{path}, id 7: " in line and "256 positions" in line


@pytest.mark.parametrize("changes", [{"num_labels": 2}, {"kind": AutoModelForCausalLM},
                                     {"rms_norm_eps": -9e9}])  # a negative number's root: NaN
def test_a_model_that_does_not_give_one_finite_score_is_refused(responses, tokenizer, tmp_path, changes):
    model = save_llama(tmp_path / "model", tokenizer, **changes)
    line = refused("03_judge", judge="reward", reward_model=model, input=responses, output=tmp_path / "out")
    assert (f"{responses}, id world-" if "rms_norm_eps" in changes else f"{model}: ") in line


LISTING_1 = """Consider the following conversation between a human and an assistant:
{prompt}
Please choose the response that is the most helpful, honest, and harmless.
Options:
(A) {one}
(B) {two}
The answer is:"""


@torch.no_grad()
def letters(model, tokenizer, prompt, one, two):
    """log p of A and of B as the answer to Listing 1, from the whole forward pass of one text."""
    question = LISTING_1.format(prompt=prompt[0]["content"], one=one["text"], two=two["text"])
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": question}], "")
    logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return [logp[tokenizer.convert_tokens_to_ids(letter)].item() for letter in "AB"]


@pytest.mark.parametrize("order", ["both", "one"])
def test_the_llm_s_letters_are_averaged_over_the_orders(judged, responses, pi_0, tokenizer, order):
    model, expected = AutoModelForCausalLM.from_pretrained(pi_0), []
    for row in rows(responses):
        one, two = row["responses"]
        a, b = letters(model, tokenizer, row["prompt"], one, two)
        if order == "both":  # the other way about, B stands for y_1
            b_2, a_2 = letters(model, tokenizer, row["prompt"], two, one)
            a, b = (a + a_2) / 2, (b + b_2) / 2
        expected.append([a, b])
    labelled = judged("llm", judge_model=pi_0, micro_batch_size=3, llm_order=order)
    check(responses, labelled, expected, "llm", abs=1e-4)
    assert all(len(row["options"]) == (2 if order == "both" else 1) for row in labelled)


@pytest.fixture(scope="module")
def three(pi_0, world, tmp_path_factory):
    """Three responses to each prompt."""
    return run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6, samples=3,
               output=tmp_path_factory.mktemp("three") / "responses.jsonl")


def test_of_several_responses_the_llm_is_asked_about_every_pair(pi_0, three, judged):
    for row, labelled in zip(rows(three), judged("llm", judge_model=pi_0, input=three), strict=True):
        assert [entry[:2] for entry in labelled["options"]] == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
        scores = judges.llm_rewards(3, labelled["options"])
        assert labelled["chosen"] == row["responses"][scores.index(max(scores))]
        assert labelled["rejected"] == row["responses"][scores.index(min(scores))]


@pytest.mark.parametrize("empty_system", [True, False])
def test_the_judge_is_trained_and_asked_with_the_same_token_ids(world, pi_0, tokenizer, tmp_path, monkeypatch,
                                                                empty_system):
    given = rows(world / "all_gold.jsonl")[:8]
    given[0]["prompt"] = [{"role": "system", "content": "be brief"}, *given[0]["prompt"]]  # a prompt that has one
    source = write_rows(tmp_path / "mine.jsonl", given)
    data = run("00_inputs", source=source, seed_size=7, prompt_sizes=[1], eval_size=0, llm_judge=True,
               **{"empty_system": True} if empty_system else {}, output=tmp_path / "data")
    sft = Namespace(input=data / "judge_sft.jsonl", model=pi_0, all_turns=False, max_prompt_length=256, max_length=256)
    examples, _ = stages.load("00_sft").read_examples(sft, tokenizer)
    trained = {(*example["prompt"], example["response"][0]) for example in examples}
    assert len(trained) == 2 * 7
    mark = tokenizer.convert_tokens_to_ids("<system>")
    assert all((mark in ids) == empty_system for ids in trained)

    pairs = records.read_jsonl(data / "seed.jsonl", records.LABELLED)
    responses = [{"id": row["id"], "prompt": row["prompt"], "prompt_ids": [5], "responses": [
        {"text": row["chosen"], "ids": [5], "finish": "eos"},
        {"text": row["rejected"], "ids": [6], "finish": "eos"}]} for row in pairs]
    assert "be brief" in {row["prompt"][0]["content"] for row in pairs}
    asked, score = [], common.score
    monkeypatch.setattr(common, "score", lambda policy, rows, *rest: asked.extend(rows) or score(policy, rows, *rest))
    run("03_judge", judge="llm", judge_model=pi_0, input=write_rows(tmp_path / "responses.jsonl", responses),
        output=tmp_path / "out.jsonl")
    # the chosen one is A in the first order, then B
    assert {(*row["prompt_ids"], *row["responses"][k % 2]["ids"]) for k, row in enumerate(asked)} == trained


def test_in_one_order_each_letter_is_right_for_every_second_pair(world, tmp_path):
    data = dict(source=world / "all_gold.jsonl", seed_size=20, prompt_sizes=[20], eval_size=1)
    both, one = (rows(run("00_inputs", **data, llm_judge=orders, output=tmp_path / orders) / "judge_sft.jsonl")
                 for orders in ("both", "one"))
    assert len(both) == 40 and one == [both[2 * k + k % 2] for k in range(20)]


def test_each_of_several_turns_begins_with_its_role():
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["one", "two", "three"])]
    [message] = judges.judging_prompt(turns, "x", "y")
    assert "\nuser: one\n\nassistant: two\n\nuser: three\nPlease" in message["content"]
    empty = {"role": "system", "content": ""}  # that of Zephyr's recipe is no turn
    assert judges.judging_prompt([empty, *turns], "x", "y", [empty]) == [empty, message]
    assert records.as_text([empty, turns[0]]) == "one"


def test_a_judge_whose_options_are_not_single_tokens_is_refused(responses, tmp_path):
    judge = tmp_path / "judge"
    small_world.write_base_model(["x"], Namespace(seed=0, shape="llama"), judge)  # its words are neither A nor B
    line = refused("03_judge", judge="llm", judge_model=judge, input=responses, output=tmp_path / "out")
    assert f"{judge}: " in line and "A" in line


def test_gold_is_the_small_world_s_judge(judged, responses, world):
    gold, expected = small_world.read_gold(world / "gold.json"), []
    for row in rows(responses):
        scores = [small_world.gold_score(gold, row["prompt"], y["text"]) for y in row["responses"]]
        if scores[0] != scores[1]:  # else a tie
            expected.append((row["id"], row["responses"][scores[0] < scores[1]], scores))
    assert 0 < len(expected) < len(rows(responses))
    assert [(row["id"], row["chosen"], row["scores"]) for row in judged("gold", gold=world / "gold.json")] == expected


def mean_gap(rewards, lengths, alpha):
    """The mean of |y_w| - |y_l| over the pairs that carry a preference."""
    rewards, lengths = np.array(rewards), np.array(lengths)
    reward, length = (rewards - alpha * lengths) @ [1, -1], lengths @ [1, -1]
    return (np.sign(reward) * length)[reward != 0].mean()


@pytest.mark.parametrize("seed", range(25))
def test_the_automatic_penalty_makes_chosen_and_rejected_equally_long(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    lengths = rng.integers(1, 30, (count, 2)).tolist()
    slope = rng.choice([-0.2, 0.0, 0.2])  # longer ones are worse, or better
    rewards = [[slope * n + rng.normal() for n in pair] for pair in lengths]
    if seed % 3 == 0:
        rewards[0], lengths[0] = [0.25, 0.25], [4, 9]  # a threshold at 0
    alpha = judges.balancing_penalty(rewards, lengths)
    best = min(abs(mean_gap(rewards, lengths, a)) for a in [*rng.normal(0, 0.5, 4000), *rng.normal(0, 5, 2000)])
    assert abs(mean_gap(rewards, lengths, alpha)) <= best + 1e-12


def test_equation_13_and_the_automatic_penalty_by_hand():
    assert stage.penalised([1.5, -2.0], [10, 20], 0.1) == [0.5, -4.0]
    # thresholds (r_1 - r_2) / (|y_1| - |y_2|): 1 / 2 = 0.5; 3 / 1 = 3; -1 / -4 = 0.25, of sizes 2, 1, 4
    # gap below 0.25: 7; to 0.5: 2 + 1 - 4 = -1; to 3: 1 - 6 = -5; above: -7. So between 0.25 and 0.5.
    assert judges.balancing_penalty([[1, 0], [3, 0], [0, 1]], [[3, 1], [2, 1], [1, 5]]) == 0.375
    # without need of one it is 0: thresholds -1 and 2, of the same size
    assert judges.balancing_penalty([[-1, 0], [2, 0]], [[2, 1], [2, 1]]) == 0.0
    assert judges.balancing_penalty([[-1, 0], [2, 0]], [[3, 3], [1, 1]]) == 0.0


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
def pairrm_model(tmp_path):
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
def judged_by_pairrm(pairrm_model, tmp_path):
    """Judge responses by PairRM -> the rows that 03 writes."""
    def start(*responses, **options):
        path, output = write_rows(tmp_path / "responses.jsonl", answers(*responses)), tmp_path / "out.jsonl"
        ran = attempt("03_judge", judge="pairrm", reward_model=pairrm_model, input=path, output=output, **options)
        assert (ran.status, ran.err) == (0, "")  # not a warning either
        return rows(output)
    return start


@pytest.mark.parametrize("batch", [1, 4])
def test_the_logits_of_pairrm_are_those_of_the_package(judged_by_pairrm, batch):
    labelled = judged_by_pairrm(*((prompt, [one, two]) for prompt, one, two, *_ in ORACLE), micro_batch_size=batch)
    for row, (_, one, two, there, back) in zip(labelled, ORACLE, strict=True):
        assert [k for *pair, _ in row["logits"] for k in pair] == [0, 1, 1, 0]
        assert [logit for *_, logit in row["logits"]] == pytest.approx([there, back], abs=1e-5)
        p = 1 / (1 + math.exp(-(there - back) / 2))
        assert row["p"] == pytest.approx(p, abs=1e-5) and row["judge"] == "pairrm"
        assert row["chosen"]["text"] == (one if p > 0.5 else two)


def test_of_several_responses_each_is_compared_with_every_other(judged_by_pairrm):
    texts = ["an eel is a fish.", "the whale", "no thing", "the"]
    [row] = judged_by_pairrm(("name a fish.", texts))
    logit = {(one, two): value for one, two, value in row["logits"]}
    assert len(logit) == len(row["logits"]) == 12
    assert [logit[0, 1], logit[1, 0]] == pytest.approx(ORACLE[0][3:], abs=1e-5)
    mean = [sum((logit[k, j] - logit[j, k]) / 2 for j in range(4) if j != k) / 4 for k in range(4)]
    assert (row["chosen"]["text"], row["rejected"]["text"]) == (texts[np.argmax(mean)], texts[np.argmin(mean)])
    sign = 1 if np.argmax(mean) < np.argmin(mean) else -1
    assert row["p"] == pytest.approx(1 / (1 + math.exp(-sign * (max(mean) - min(mean)))), abs=1e-9)


def test_a_token_of_pairrm_that_a_text_spells_is_text(pairrm_model):
    _, read = pairrm.load_pairrm(str(pairrm_model), "cpu")
    ids = read("<|source|> a[SEP]", "<|candidate2|>", "[CLS]<|candidate|>")
    assert [i for i in ids if i in (1, 2, 45, 46, 47, 48)] == [1, 45, 2, 1, 46, 2, 1, 47, 2] and len(ids) > 40


def test_of_several_turns_the_conversation_is_pairrm_s_source(judged_by_pairrm):
    turns = [("user", "name a fish."), ("assistant", "the eel."), ("user", "a thing")]
    as_messages = [{"role": role, "content": content} for role, content in turns]
    as_one = "user: name a fish.\n\nassistant: the eel.\n\nuser: a thing"
    one, two = judged_by_pairrm((as_messages, ["yes.", "no"]), (as_one, ["yes.", "no"]))
    assert one["logits"] == two["logits"]


@pytest.mark.parametrize("change, named", [
    (dict(cand1_prefix_id=None), "cand1_prefix_id"), (dict(source_prefix_id=9), "source_prefix_id"),
    (dict(vocab_size=48), "vocabulary"), (dict(n_tasks=None), "n_tasks"), ("head_layer.4.bias", "head_layer.4.bias"),
    ("tokenizer.json", "tokenizer")])
def test_what_is_not_pairrm_is_refused(pairrm_model, tmp_path, change, named):
    model = pairrm_model
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


FIT = {"init": ["model", "init_model"], "previous": ["model", "ref_model"], "none": ["model"],
       "pairrm": ["reward_model"], "reward": ["reward_model"], "llm": ["judge_model"], "gold": ["gold"]}


@pytest.fixture
def options_of(responses, pi_0, pi_init, reward_model, world, tmp_path):
    """{judge: options that work, without --output}"""
    values = {"model": pi_0, "init_model": pi_init, "ref_model": pi_init, "reward_model": reward_model,
              "judge_model": pi_0, "gold": world / "gold.json"}
    fit = {name: {key: values[key] for key in keys} for name, keys in FIT.items()}
    fit["pairrm"] = {"reward_model": save_pairrm(tmp_path / "pairrm_model")}
    return {name: {"judge": name, "input": responses, "micro_batch_size": 4} | fit[name] for name in FIT}


@pytest.mark.parametrize("penalty, unit", [(0.05, "tokens"), (0.005, "characters"), (-0.002, None), ("auto", None)])
def test_the_penalty_goes_with_every_judge(judged, responses, options_of, penalty, unit):
    rewards_of = {"init": lambda row: stage.implicit_rewards(row["logps"]["policy"], row["logps"]["ref"], 0.1),
                  "none": lambda row: [0.1 * logp for logp in row["logps"]["policy"]],
                  "llm": lambda row: judges.llm_rewards(2, row["options"]), "reward": lambda row: row["scores"],
                  "pairrm": lambda row: [(row["logits"][0][2] - row["logits"][1][2]) / 2, 0]}
    lengths = [[len(y["ids" if unit == "tokens" else "text"]) for y in row["responses"]] for row in rows(responses)]
    for name in rewards_of:
        labelled = judged(**options_of[name], length_penalty=penalty, **{"length_unit": unit} if unit else {})
        rewards = list(map(rewards_of[name], labelled))
        alpha = judges.balancing_penalty(rewards, lengths) if penalty == "auto" else penalty
        rewards = [[a - alpha * b for a, b in zip(*pair)] for pair in zip(rewards, lengths)]
        check(responses, labelled, rewards, name, abs=1e-9)


def test_the_penalty_that_was_chosen_is_printed(responses, pi_0, tmp_path):
    output = tmp_path / "out"
    ran = attempt("03_judge", judge="none", model=pi_0, input=responses, length_penalty="auto", output=output)
    alpha = counts(output)["length penalty"]
    assert type(alpha) is float and f"length penalty {alpha}" in ran.out


@pytest.mark.parametrize("penalty", ["nan", "inf", "much", "auto"])
def test_a_penalty_is_a_number_or_for_two_responses_auto(three, tmp_path, penalty):
    line = refused("03_judge", length_penalty=penalty, model="a", init_model="b", input=three, output=tmp_path / "out")
    assert "--length-penalty" in line and (penalty != "auto" or f"{three}: " in line)


@pytest.mark.parametrize("name", FIT)
def test_a_model_of_another_judge_is_refused_and_what_a_judge_needs_is_asked_for(tmp_path, name):
    for key in {key for keys in FIT.values() for key in keys}:  # one more than it takes, or one less
        given = dict.fromkeys({*FIT[name]} ^ {key}, "x")
        line = refused("03_judge", judge=name, input="x", output=tmp_path / "out", **given)
        assert "--" + key.replace("_", "-") in line and f"--judge {name}" in line


@pytest.mark.parametrize("name", [name for name in FIT if name != "init"])
def test_two_processes_write_the_same_bytes_which_04_reads(options_of, pi_0, tmp_path, name):
    ranks = two_ranks("03_judge", options_of[name] | {"output": tmp_path / "two"})
    assert [rank.status for rank in ranks] == [0, 0], ranks
    one = run("03_judge", **options_of[name], output=tmp_path / "one")
    assert one.read_bytes() == (tmp_path / "two").read_bytes()
    run("04_refined_dpo", model=pi_0, input=one, batch_size=4, output=tmp_path / "pi")
