"""--judge and --length-penalty of 03: each way of judging against an independent computation."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig,
                          LlamaConfig, PreTrainedTokenizerFast)

import common
import stages
from stages import attempt, rows, run, write_rows

judge = stages.load("03_judge")


@pytest.fixture(scope="module")
def responses(pi_0, world, tokenizer, tmp_path_factory):
    """Pairs of responses of different lengths: random words, and every second one two answers that gold knows."""
    folder = tmp_path_factory.mktemp("responses")
    sampled = rows(run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=12,
                       output=folder / "sampled.jsonl"))
    rng, known = random.Random(0), rows(world / "all_gold.jsonl")
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
def judged(responses, tmp_path):
    """Start 03 with a judge and its options -> the rows it writes."""
    def start(judge, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return rows(run("03_judge", **{"judge": judge, "input": responses} | options, output=folder / "out.jsonl"))
    return start


@torch.no_grad()
def logp(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    return -F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()


def check(sampled, labelled, rewards, name, abs=1e-3):
    """The labels, p and all else that is not the judge's own, from a reward for each response."""
    assert {0, 1} == {k for r in rewards for k in (0, 1) if r[k] == max(r)}  # both sides are preferred somewhere
    for row, judged, r in zip(rows(sampled), labelled, rewards, strict=True):
        one, two = row["responses"]
        assert (judged["chosen"], judged["rejected"]) == ((one, two) if r[0] > r[1] else (two, one))
        assert judged["p"] == pytest.approx(1 / (1 + math.exp(r[1] - r[0])), abs=abs)
        assert judged["judge"] == name and (judged["id"], judged["prompt"]) == (row["id"], row["prompt"])


def likelihoods(name, sampled):
    model = AutoModelForCausalLM.from_pretrained(name)
    return [[logp(model, row["prompt_ids"], y["ids"]) for y in row["responses"]] for row in rows(sampled)]


# ---------------------------------------------------------------------------------------------
# By likelihood


def test_equation_7_in_two_steps():
    # log-ratios -10 + 11 = 1 and -12 + 11 = -1: rewards 0.5 and -0.5; sigmoid(1) = 0.7310585786
    assert judge.implicit_rewards([-10, -12], [-11, -11], 0.5) == [0.5, -0.5]
    assert judge.preference(0.5, -0.5) == pytest.approx(0.7310585786)
    assert judge.preference(-0.5, 0.5) == pytest.approx(0.2689414214)
    assert judge.preference(3.25, 3.25) == 0.5
    assert judge.preference(0, -5000) == 1 and judge.preference(-5000, 0) == 0


def test_init_is_the_default(judged, pi_0, pi_init):
    assert judged("init", model=pi_0, init_model=pi_init) == judged("init", model=pi_0, init_model=pi_init, beta=0.1)
    words = ["--model", "a", "--init-model", "b", "--input", "c", "--output", "d"]
    assert stages.parsed("03_judge", words).judge == "init"


def test_previous_takes_the_model_that_the_policy_was_trained_from(judged, responses, pi_0, pi_init):
    labelled = judged("previous", model=pi_0, ref_model=pi_init, beta=0.3)
    policy, ref = likelihoods(pi_0, responses), likelihoods(pi_init, responses)
    check(responses, labelled, [[0.3 * (a - b) for a, b in zip(*pair)] for pair in zip(policy, ref)], "previous")
    assert [row["logps"]["ref"] for row in labelled] == [pytest.approx(logps, abs=1e-3) for logps in ref]


def test_none_is_the_likelihood_alone(judged, responses, pi_0):
    labelled = judged("none", model=pi_0, beta=0.3)
    policy = likelihoods(pi_0, responses)
    check(responses, labelled, [[0.3 * logp for logp in pair] for pair in policy], "none")
    assert all(list(row["logps"]) == ["policy"] for row in labelled)


# ---------------------------------------------------------------------------------------------
# By a reward model


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    """A tiny Llama with a score head, padding with the end token as the small world does."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.3, num_labels=1,
                         pad_token_id=tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def score_alone(model, ids):
    """The score of one text, its head applied by hand at the last token that is not the padding's."""
    last = max(k for k, i in enumerate(ids) if i != model.config.pad_token_id)
    return model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, last]).item()


@pytest.mark.parametrize("pads", [True, False])
def test_a_reward_model_scores_each_response_by_itself(judged, responses, reward_model, tokenizer, tmp_path, pads):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    if not pads:  # then transformers takes one text at a time, and its last token
        model.config.pad_token_id = None
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    name = reward_model if pads else tmp_path / "model"
    expected = [[score_alone(model, tokenizer.apply_chat_template(
        row["prompt"] + [{"role": "assistant", "content": y["text"]}], return_dict=False))
        for y in row["responses"]] for row in rows(responses)]
    labelled = judged("reward", reward_model=name, micro_batch_size=5)
    check(responses, labelled, expected, "reward", abs=1e-5)
    assert [row["scores"] for row in labelled] == [pytest.approx(scores, abs=1e-5) for scores in expected]


def test_a_reward_model_without_a_chat_template_reads_a_pair_of_texts(judged, responses, tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing
    names = ["input_ids", "token_type_ids", "attention_mask"]
    reader = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path, model_input_names=names)
    reader.chat_template = None
    reader.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <bos>:1", special_tokens=[("<eos>", 0), ("<bos>", 1)])
    torch.manual_seed(2)
    config = BertConfig(vocab_size=len(reader), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=2, initializer_range=0.3, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "bert")
    reader.save_pretrained(tmp_path / "bert")
    expected = []
    for row in rows(responses):
        expected.append([])
        for y in row["responses"]:
            prompt, text = tokenizer(row["prompt"][0]["content"]).input_ids, tokenizer(y["text"]).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + [0] + text + [1]]), token_type_ids=torch.tensor(
                    [[0] * (len(prompt) + 1) + [1] * (len(text) + 1)])).logits
            expected[-1].append(logits.item())
    check(responses, judged("reward", reward_model=tmp_path / "bert"), expected, "reward", abs=1e-4)


@pytest.mark.parametrize("labels, kind, words", [(2, AutoModelForSequenceClassification, "2 scores"),
                                                 (1, AutoModelForCausalLM, "no reward model")])
def test_what_is_no_reward_model_is_refused(responses, tokenizer, tmp_path, labels, kind, words):
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=labels)
    kind.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    refused(tmp_path, "model", words, judge="reward", reward_model=tmp_path / "model", input=responses)


# ---------------------------------------------------------------------------------------------
# By an LLM


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
    ids = common.prompt_ids(tokenizer, [{"role": "user", "content": question}], "")
    logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return [logp[tokenizer.convert_tokens_to_ids(letter)].item() for letter in "AB"]


@pytest.mark.parametrize("order", ["both", "first"])
def test_the_llm_s_letters_are_averaged_over_the_orders(judged, responses, pi_0, tokenizer, order):
    model, expected = AutoModelForCausalLM.from_pretrained(pi_0), []
    for row in rows(responses):
        one, two = row["responses"]
        a, b = letters(model, tokenizer, row["prompt"], one, two)
        if order == "both":  # the other way about, B stands for y_1
            b_2, a_2 = letters(model, tokenizer, row["prompt"], two, one)
            a, b = (a + a_2) / 2, (b + b_2) / 2
        expected.append([a, b])
    labelled = judged("llm", judge_model=pi_0, micro_batch_size=3, **{} if order == "both" else {"llm_order": "first"})
    check(responses, labelled, expected, "llm", abs=1e-4)
    assert all(len(row["options"]) == (2 if order == "both" else 1) for row in labelled)


def test_a_liking_for_the_first_place_drops_out_of_both_orders():
    # A is likelier than B by 2 nats wherever it stands; y_2 is better by 0.5
    options = [[0, 1, -0.5, -2.0], [1, 0, -0.4, -2.9]]
    one, two = judge.llm_rewards(2, options)
    assert (one, two) == pytest.approx(((-0.5 - 2.9) / 2, (-2.0 - 0.4) / 2)) and two > one
    assert judge.llm_rewards(2, options[:1])[0] > judge.llm_rewards(2, options[:1])[1]


def test_of_several_responses_the_llm_is_asked_about_every_pair(pi_0, world, tmp_path, judged):
    sampled = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6, samples=3,
                  output=tmp_path / "three.jsonl")
    for row, labelled in zip(rows(sampled), judged("llm", judge_model=pi_0, input=sampled), strict=True):
        assert [entry[:2] for entry in labelled["options"]] == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
        scores = judge.llm_rewards(3, labelled["options"])
        assert labelled["chosen"] == row["responses"][scores.index(max(scores))]
        assert labelled["rejected"] == row["responses"][scores.index(min(scores))]


def test_the_judge_s_training_data_ask_what_03_asks(world, tokenizer):
    seed = {row["id"]: row for row in rows(world / "seed.jsonl")}
    examples = rows(world / "judge_sft.jsonl")
    assert len(examples) == 2 * len(seed)
    for example in examples:
        row_id, letter = example["id"].rsplit("-", 1)
        row = seed[row_id]
        one, two = (row["chosen"], row["rejected"]) if letter == "A" else (row["rejected"], row["chosen"])
        question = LISTING_1.format(prompt=row["prompt"][0]["content"], one=one, two=two)
        assert example["prompt"] == [{"role": "user", "content": question}] and example["response"] == letter
        ids = common.prompt_ids(tokenizer, example["prompt"], "")
        assert tokenizer.unk_token_id not in ids and len(ids) + 2 <= 256  # the model's positions


def test_several_turns_are_told_apart_by_their_roles():
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
             {"role": "user", "content": "three"}]
    [message] = common.judging_prompt(turns, "x", "y")
    assert "\nuser: one\n\nassistant: two\n\nuser: three\nPlease" in message["content"]


def test_a_judge_learns_from_the_seed(world, pi_init, tmp_path):
    """00_sft.py trains it: after many epochs on the seed it knows the seed's labels, in both orders."""
    trained = run("00_sft", model=pi_init, input=world / "judge_sft.jsonl", output=tmp_path / "judge", lr=1e-2,
                  epochs=30, batch_size=8)
    tokenizer, model = AutoTokenizer.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(trained)
    right = 0
    for row in rows(world / "seed.jsonl"):
        one, two = {"text": row["chosen"]}, {"text": row["rejected"]}
        prompt = common.as_messages(row["prompt"])
        a, b = letters(model, tokenizer, prompt, one, two)
        right += a > b
        b, a = letters(model, tokenizer, prompt, two, one)
        right += a > b
    assert right > 0.9 * 40


def test_a_judge_whose_options_are_no_single_tokens_is_refused(responses, pi_0, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    vocabulary = {"<eos>": 0, "<unk>": 1, "x": 2}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # knows neither A nor B
    words.pre_tokenizer = WhitespaceSplit()
    AutoModelForCausalLM.from_pretrained(pi_0).save_pretrained(tmp_path / "judge")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", chat_template=(
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}")
        ).save_pretrained(tmp_path / "judge")
    refused(tmp_path, "judge", "A", judge="llm", judge_model=tmp_path / "judge", input=responses)


# ---------------------------------------------------------------------------------------------
# By gold


def test_gold_is_the_small_world_s_judge(judged, responses, world):
    gold = json.loads((world / "gold.json").read_text())
    scores = [[common.gold_score(gold, row["prompt"], y["text"]) for y in row["responses"]] for row in rows(responses)]
    labelled = {row["id"]: row for row in judged("gold", gold=world / "gold.json")}
    for row, (one, two) in zip(rows(responses), scores):
        if one == two:
            assert row["id"] not in labelled  # a tie
        else:
            assert labelled[row["id"]]["chosen"] == row["responses"][one < two]
            assert labelled[row["id"]]["scores"] == [one, two]
    known = {row["id"]: row["chosen"] for row in rows(world / "all_gold.jsonl")}
    assert sum(row["chosen"]["text"] == known[row["id"]] for row in labelled.values()) >= len(scores) // 2


def test_gold_is_a_file_of_labels(judged, responses, tmp_path):
    labels = [{"id": row["id"], "label": 1 + k % 2} for k, row in enumerate(rows(responses))]
    write_rows(tmp_path / "labels.jsonl", labels[::-1] + [{"id": "another", "label": 1}])
    labelled = judged("gold", gold=tmp_path / "labels.jsonl")
    for row, label, one in zip(rows(responses), labels, labelled, strict=True):
        assert one["chosen"] == row["responses"][label["label"] - 1]


@pytest.mark.parametrize("label, words", [({"id": "world-0"}, '"label"'), ({"id": "x", "label": 3}, "1 or 2"),
                                          ({"id": "x", "label": True}, "1 or 2"),
                                          ({"id": "x", "label": 1}, "no label")])
def test_bad_labels_are_refused(responses, tmp_path, label, words):
    write_rows(tmp_path / "labels.jsonl", [label])
    refused(tmp_path, "labels.jsonl", words, judge="gold", gold=tmp_path / "labels.jsonl", input=responses)


# ---------------------------------------------------------------------------------------------
# Eq. 13


def test_equation_13():
    assert judge.penalised([1.5, -2.0], [10, 20], 0.1) == [0.5, -4.0]


def mean_gap(rewards, lengths, alpha):
    """The mean of |y_w| - |y_l| over the pairs that carry a preference."""
    gaps = []
    for r, n in zip(rewards, lengths):
        one, two = (a - alpha * b for a, b in zip(r, n))
        if one != two:
            gaps.append(n[0] - n[1] if one > two else n[1] - n[0])
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("seed", range(25))
def test_the_automatic_penalty_makes_chosen_and_rejected_equally_long(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    lengths = rng.integers(1, 30, (count, 2)).tolist()
    slope = rng.choice([-0.2, 0.0, 0.2])  # longer ones are worse, or better
    rewards = [[slope * n + rng.normal() for n in pair] for pair in lengths]
    if seed % 3 == 0:
        rewards[0], lengths[0] = [0.25, 0.25], [4, 9]  # a threshold at 0
    alpha = judge.balancing_penalty(rewards, lengths)
    best = min(abs(mean_gap(rewards, lengths, a)) for a in [*rng.normal(0, 0.5, 4000), *rng.normal(0, 5, 2000)])
    assert abs(mean_gap(rewards, lengths, alpha)) <= best + 1e-12


def test_the_automatic_penalty_by_hand():
    # thresholds (r_1 - r_2) / (|y_1| - |y_2|): 1 / 2 = 0.5; 3 / 1 = 3; -1 / -4 = 0.25, of sizes 2, 1, 4
    # gap below 0.25: 7; to 0.5: 2 + 1 - 4 = -1; to 3: 1 - 6 = -5; above: -7. So between 0.25 and 0.5.
    assert judge.balancing_penalty([[1, 0], [3, 0], [0, 1]], [[3, 1], [2, 1], [1, 5]]) == 0.375
    # without need of one it is 0: thresholds -1 and 2, of the same size
    assert judge.balancing_penalty([[-1, 0], [2, 0]], [[2, 1], [2, 1]]) == 0.0
    assert judge.balancing_penalty([[-1, 0], [2, 0]], [[3, 3], [1, 1]]) == 0.0


@pytest.mark.parametrize("penalty", [0.05, -0.02, "auto"])
def test_the_penalty_goes_with_every_judge(judged, responses, pi_0, pi_init, reward_model, world, penalty):
    labels = {}
    for name, options in {"init": {"model": pi_0, "init_model": pi_init}, "llm": {"judge_model": pi_0},
                          "reward": {"reward_model": reward_model}, "none": {"model": pi_0}}.items():
        labels[name] = judged(name, **options, length_penalty=penalty)
        for row, labelled in zip(rows(responses), labels[name], strict=True):
            rewards = {"init": lambda: judge.implicit_rewards(*labelled["logps"].values(), 0.1),
                       "none": lambda: [0.1 * logp for logp in labelled["logps"]["policy"]],
                       "llm": lambda: judge.llm_rewards(2, labelled["options"]),
                       "reward": lambda: labelled["scores"]}[name]()
            labelled |= {"rewards": rewards, "lengths": [len(y["ids"]) for y in row["responses"]], "row": row}
        rewards, lengths = ([row[key] for row in labels[name]] for key in ("rewards", "lengths"))
        alpha = judge.balancing_penalty(rewards, lengths) if penalty == "auto" else penalty
        for labelled, r, n in zip(labels[name], rewards, lengths):
            one, two = (a - alpha * b for a, b in zip(r, n))
            assert labelled["chosen"] == labelled["row"]["responses"][one < two]
            assert labelled["p"] == pytest.approx(1 / (1 + math.exp(two - one)))


def test_the_penalty_that_was_chosen_is_told(responses, pi_0, tmp_path):
    output, counts = tmp_path / "out.jsonl", {}
    for penalty in ("auto", 0):
        ran = attempt("03_judge", judge="none", model=pi_0, input=responses, length_penalty=penalty, output=output)
        counts[penalty] = json.loads((tmp_path / "out.jsonl.args.json").read_text())["counts"]
        assert f"length penalty {counts[penalty]['length penalty']}" in ran.out
        output.unlink(), (tmp_path / "out.jsonl.args.json").unlink()
    assert abs(counts["auto"]["chosen longer by"]) < abs(counts[0]["chosen longer by"])


def test_auto_takes_two_responses(pi_0, pi_init, world, tmp_path):
    sampled = run("02_generate", model=pi_0, input=world / "prompts_1.jsonl", max_new_tokens=6, samples=3,
                  output=tmp_path / "three.jsonl")
    refused(tmp_path, "three.jsonl", "two responses", model=pi_0, init_model=pi_init, length_penalty="auto",
            input=sampled)


# ---------------------------------------------------------------------------------------------
# All of them


def refused(folder, *words, **options):
    """03 stops with one line that holds the words, and leaves nothing."""
    ran = attempt("03_judge", **options, output=folder / "out")
    assert ran.status == 2 and ran.err.count("\n") == 1, ran
    assert all(word in ran.err for word in words), ran.err
    assert not (folder / "out").exists()


EVERY = {"model": "a", "init_model": "b", "ref_model": "c", "reward_model": "d", "judge_model": "e", "gold": "f",
         "beta": 0.1, "llm_order": "both"}
FIT = {"init": ["model", "init_model", "beta"], "previous": ["model", "ref_model", "beta"], "none": ["model", "beta"],
       "reward": ["reward_model"], "llm": ["judge_model", "llm_order"], "gold": ["gold"]}


@pytest.mark.parametrize("name, option", [(name, option) for name in FIT for option in EVERY
                                          if option not in FIT[name]])
def test_an_option_of_another_judge_is_refused(tmp_path, name, option):
    options = {key: EVERY[key] for key in [*FIT[name], option]}
    refused(tmp_path, "--" + option.replace("_", "-"), f"--judge {name}", judge=name, input="x", **options)


@pytest.mark.parametrize("name, option", [(name, option) for name in FIT for option in FIT[name]
                                          if option not in ("beta", "llm_order")])
def test_what_a_judge_needs_is_asked_for(tmp_path, name, option):
    options = {key: EVERY[key] for key in FIT[name] if key != option}
    refused(tmp_path, "--" + option.replace("_", "-"), f"--judge {name}", judge=name, input="x", **options)


@pytest.mark.parametrize("penalty", ["nan", "inf", "much"])
def test_a_penalty_is_a_number_or_auto(tmp_path, penalty):
    refused(tmp_path, "--length-penalty", length_penalty=penalty, input="x", model="a", init_model="b")


def options_of(name, pi_0, pi_init, reward_model, world):
    values = {"model": pi_0, "init_model": pi_init, "ref_model": pi_init, "reward_model": reward_model,
              "judge_model": pi_0, "gold": world / "gold.json"}
    return {"judge": name} | {key: values[key] for key in FIT[name] if key in values}


def test_two_processes_write_the_same_bytes(responses, pi_0, pi_init, reward_model, world, tmp_path):
    runs = {name: options_of(name, pi_0, pi_init, reward_model, world) | {"input": responses, "micro_batch_size": 3}
            for name in FIT if name != "init"}
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    ran = stages.run_ranks(tmp_path / "two", *(("03_judge", options | {"output": tmp_path / "two" / name})
                                               for name, options in runs.items()))
    assert all(rank.status == 0 for ranks in ran for rank in ranks), ran
    for name, options in runs.items():
        one = run("03_judge", **options, output=tmp_path / "one" / name)
        assert one.read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("name, scorer", [("previous", "response_logps"), ("none", "response_logps"),
                                          ("reward", "reward_scores"), ("llm", "collate")])
def test_it_goes_on_where_it_stopped(responses, pi_0, pi_init, reward_model, world, tmp_path, monkeypatch, name,
                                     scorer):
    options = options_of(name, pi_0, pi_init, reward_model, world) | {"input": responses, "micro_batch_size": 4}
    whole = run("03_judge", **options, output=tmp_path / "whole")
    calls, place = [], judge if scorer == "reward_scores" else common

    def stopping(*args, real=getattr(place, scorer)):
        if scorer != "collate" or len(args[0]) > 1:  # not what a model is probed with
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
        return real(*args)
    monkeypatch.setattr(place, scorer, stopping)
    with pytest.raises(MemoryError):
        run("03_judge", **options, output=tmp_path / "stopped")
    assert run("03_judge", **options, output=tmp_path / "stopped").read_bytes() == whole.read_bytes()
    batches = math.ceil(len(rows(responses)) / 4) * (2 if name == "previous" else 1)
    assert len(calls) == 3 + batches - 2  # the two that were finished are not computed again


@pytest.mark.parametrize("name", FIT)
def test_04_reads_what_every_judge_writes(responses, pi_0, pi_init, reward_model, world, tmp_path, name):
    labelled = run("03_judge", **options_of(name, pi_0, pi_init, reward_model, world), input=responses,
                   output=tmp_path / "labelled")
    for refine in ("decoupled", "worst-case"):
        run("04_refined_dpo", model=pi_0, input=labelled, refine=refine, output=tmp_path / refine)
