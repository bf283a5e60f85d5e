"""Prompts and responses as token ids, and their batches as tensors."""

import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import common

TURN = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {  # name: (template, the token that ends a turn, BOS in a prompt)
    "small world": ("{{ bos_token }}" + TURN + "<|{{ m.role }}|> {{ m.content }}{% if m.role == 'assistant' %}"
                    "{{ eos_token }}{% endif %}" + ASK + "<|assistant|>{% endif %}", "</s>", 1),
    "mistral": ("{{ bos_token }}" + TURN + "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
                "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}", "</s>", 1),
    "llama-3": ("{{ bos_token }}" + TURN + "<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>" + ASK +
                "<|assistant|>\n\n{% endif %}", "<|eot|>", 1),
    "chatml": (TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|eot|>\n" + ASK +
               "<|im_start|>assistant\n{% endif %}", "<|eot|>", 0),
    "no end": (TURN + "{{ m.role }}:{{ m.content }}\n" + ASK + "assistant:{% endif %}", "</s>", 0)}
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name a fish"},
        {"role": "assistant", "content": "the eel"}, {"role": "user", "content": "and another one"}]
TEXT = "the grey whale is no fish ."


def make_tokenizer(template, adds_bos=False):
    """Byte-level BPE, trained on next to nothing; its EOS is </s>, whatever ends the template's turns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|eot|>", "<|im_start|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(["system user assistant: the eel the grey whale is no fish a::b a::b a::b"] * 3,
                            trainers.BpeTrainer(special_tokens=special, show_progress=False, min_frequency=2,
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   additional_special_tokens=special[2:], chat_template=template)


@pytest.fixture(params=TEMPLATES)
def case(request, tmp_path):
    """A tokenizer, the ids that end its model's responses, and what is expected of it."""
    template, end, bos = TEMPLATES[request.param]
    tokenizer = make_tokenizer(template)
    named = [1, 2] if end == "<|eot|>" else 1  # as in the generation config of Llama 3 and Phi 3
    GenerationConfig(eos_token_id=named).save_pretrained(tmp_path)
    return types.SimpleNamespace(tokenizer=tokenizer, ends=common.end_ids(str(tmp_path), tokenizer),
                                 end=tokenizer.convert_tokens_to_ids(end), bos=bos)


def test_the_first_end_is_the_one_that_the_template_writes(case):
    assert case.ends[0] == case.end
    assert case.tokenizer.eos_token_id in case.ends


@pytest.mark.parametrize("messages", [TALK, TALK[1:2], TALK[1:]], ids=["system and turns", "one turn", "turns"])
def test_a_prompt_has_the_template_s_bos_once_and_all_of_its_messages(case, messages):
    ids = common.prompt_ids(case.tokenizer, messages, "here")
    assert ids.count(0) == case.bos and (ids[:1] == [0]) == bool(case.bos)
    text = case.tokenizer.decode(ids)
    at = [text.index(m["content"]) for m in messages]
    assert at == sorted(at)
    assert ids == case.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_bos_where_the_tokenizer_adds_one_itself(adds_bos):
    # tokenised as text, a rendering that starts with BOS would get a second one
    tokenizer = make_tokenizer(TEMPLATES["small world"][0], adds_bos)
    assert common.prompt_ids(tokenizer, TALK, "here")[:2] == [0, tokenizer.convert_tokens_to_ids("<|system|>")]


def test_one_bos_where_the_template_leaves_it_to_the_tokenizer():
    # Zephyr's template writes no BOS, its tokenizer does, and so its model was trained with one
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0], adds_bos=True)
    prompt = common.prompt_ids(tokenizer, TALK, "here")
    assert prompt[0] == 0 and prompt.count(0) == 1
    response = common.response_ids(tokenizer, TALK, prompt, TEXT, [2, 1])
    assert 0 not in response and tokenizer.decode(response) == TEXT + "<|eot|>"


def test_a_response_has_one_end_token_the_last(case):
    prompt = common.prompt_ids(case.tokenizer, TALK, "here")
    ids = common.response_ids(case.tokenizer, TALK, prompt, TEXT, case.ends)
    assert ids[-1] == case.end
    assert sum(i in case.ends for i in ids) == 1 and 0 not in ids
    assert case.tokenizer.decode(ids[:-1]).strip() == TEXT


def test_prompt_and_response_are_the_joint_rendering(case):
    prompt = common.prompt_ids(case.tokenizer, TALK, "here")
    ids = common.response_ids(case.tokenizer, TALK, prompt, TEXT, case.ends)
    joint = case.tokenizer.apply_chat_template(TALK + [{"role": "assistant", "content": TEXT}], return_dict=False)
    shared = len(prompt) + len(ids) - (case.end not in joint)  # an end token that the template does not write
    assert (prompt + ids)[:shared] == joint[:shared]


def test_a_response_that_merges_with_the_prompt_is_tokenised_alone():
    tokenizer = make_tokenizer(TEMPLATES["no end"][0])
    prompt = common.prompt_ids(tokenizer, TALK, "here")
    text = ": so"  # after "assistant:" the two colons are one token
    joint = tokenizer.apply_chat_template(TALK + [{"role": "assistant", "content": text}], return_dict=False)
    assert joint[:len(prompt)] != prompt
    ids = common.response_ids(tokenizer, TALK, prompt, text, [1])
    assert ids == tokenizer(text, add_special_tokens=False).input_ids + [1]


def test_an_end_token_within_the_text_is_not_the_end():
    # only what follows the last end token may be cut off, and only where it is blank
    tokenizer = make_tokenizer(TEMPLATES["small world"][0])
    prompt = common.prompt_ids(tokenizer, TALK, "here")
    ids = common.response_ids(tokenizer, TALK, prompt, "the eel</s> is no fish", [1])
    assert tokenizer.decode(ids).endswith("is no fish</s>")


def test_a_template_s_refusal_is_an_input_error():
    tokenizer = make_tokenizer("{{ raise_exception('no system message here') }}")
    with pytest.raises(common.InputError, match="seed.jsonl, id 7: .*no system message here"):
        common.prompt_ids(tokenizer, TALK, "seed.jsonl, id 7")


def test_collate_gives_the_tensors_of_its_docstring():
    batch = common.collate([([5, 6], [[7, 8, 9], [4, 3]])], "cpu", span=5)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.mask.int().tolist() == [[[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0],
                                           [1, 1, 0, 0, 1]]]]
    assert batch.at.tolist() == [1, 2, 3, 1, 4]
    assert batch.labels.tolist() == [7, 8, 9, 4, 3]
    assert batch.lengths == [3, 2]


def test_collate_repeats_a_prompt_that_is_too_long_to_share():
    # 2 + 3 tokens are more than 4; responses keep their order, and the second row's place in the flat ids is 4 on
    batch = common.collate([([5, 6], [[7, 8, 9], [4, 3]])], "cpu", span=4)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 6, 4, 0]]
    assert batch.positions is None and batch.mask is None
    assert batch.at.tolist() == [1, 2, 3, 5, 6]
    assert (batch.labels.tolist(), batch.lengths) == ([7, 8, 9, 4, 3], [3, 2])


def test_collate_pads_rows_of_different_lengths():
    batch = common.collate([([5, 6], [[7, 8], [4]]), ([3], [[2, 2, 2], [9, 8]])], "cpu", span=9)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [3, 2, 2, 9]]
    assert batch.at.tolist() == [1, 2, 1, 4, 5, 6, 4, 7]
    assert batch.labels.tolist() == [7, 8, 4, 2, 2, 2, 9, 8]
    assert not batch.mask[0, 0, :3, 3].any()  # nobody sees the padding
    assert batch.mask.any(-1).all()  # and the padding sees something: a softmax of nothing is NaN


@pytest.mark.parametrize("eos", [0, 3])
def test_an_eos_that_is_also_the_padding_keeps_its_label(eos):
    batch = common.collate([([5, eos], [[7, eos]]), ([5], [[eos]])], "cpu")  # an EOS within the prompt is no label
    assert batch.labels.tolist() == [7, eos, eos]
    assert batch.at.tolist() == [1, 2, 3]
