"""Chat templates as models of these names have them: how a turn ends, what is left out, dates, thoughts, channels."""

import json
from array import array
from datetime import datetime, timedelta

import pytest
from transformers import GenerationConfig, LlamaConfig

import test_tokens
from conftest import save_tiny
from extras import judges
from support import chat, runs
from stages import refused, rows, run, write_rows
from test_tokens import make_tokenizer

SPECIAL = test_tokens.SPECIAL + ["<|end|>", "<|endoftext|>", "<end_of_turn>", "<start_of_turn>", "<|start|>",
                                 "<|channel|>", "<|message|>", "<|return|>"]
ID = {token: k for k, token in enumerate(SPECIAL)}
CHAT = {
    "phi-4-mini": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                  "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}",
    "phi-3-medium": "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
                    "<|assistant|>\n"
                    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
    "gemma": "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
             "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
             "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    # opens a thought in the prompt, and strips thoughts from all turns
    "deepseek-r1": "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
                   "{{ m.content.split('</think>')[-1] }}</s>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
                   "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    # writes an empty thought where the last answer has none, and strips those of earlier turns
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
             "{% if not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
             "{% elif '</think>' in m.content %}{{ m.content }}{% else %}<think>\n\n</think>\n\n{{ m.content }}"
             "{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gpt-oss": "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
               "<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}"
               "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "llama-2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
               "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"}
CHAT["qwen3-not-thinking"] = CHAT["qwen3"].replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n"
                                                   "{% endif %}")
CHAT["qwen3-thinking"] = CHAT["qwen3"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CHAT |= {name: template.replace("\n\n", "\n")  # of two the last would merge with a response
         for name, template in {**test_tokens.CHAT, "no eos": test_tokens.NO_EOS}.items()}
ASKED, ANSWER = [{"role": "user", "content": "name a fish"}], "the eel"
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture
def made(tmp_path):
    """A tokenizer with a template, and the EOS ids of a model whose configs have those that are given."""
    def make(name, config=None, generation=None):
        tokenizer = make_tokenizer(special=SPECIAL, template=CHAT[name])
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.eos_token = "</s>"
        LlamaConfig(eos_token_id=config).save_pretrained(tmp_path)
        if generation:
            GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
        return tokenizer, chat.eos_ids(str(tmp_path), tokenizer)
    return make


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name, config, generation, end, others", [
    ("phi-4-mini", None, ["<|endoftext|>", "<|end|>"], "<|end|>", ["</s>", "<|endoftext|>"]),  # it writes both
    ("phi-4-mini", "<|endoftext|>", None, "<|end|>", ["</s>", "<|endoftext|>"]),
    ("gemma", None, None, "<end_of_turn>", ["</s>"]),  # only the template has it
    ("gemma", ["<|eot_id|>"], ["<end_of_turn>"], "<end_of_turn>", ["</s>", "<|eot_id|>"]),
    ("gpt-oss", None, ["<|return|>", "<|endoftext|>"], "<|return|>", ["</s>", "<|endoftext|>"]),
    ("llama-2", None, ["<|eot_id|>"], "</s>", ["<|eot_id|>"]),
    ("llama-2", 50, None, "</s>", []),  # the default of a config's class, here an ordinary token
    ("phi-3-medium", None, None, "<|end|>", ["</s>"]),
    ("chatml", "<|im_end|>", None, "<|im_end|>", ["</s>"]), ("zephyr", None, None, "</s>", []),
    ("llama-3", "<|eot_id|>", None, "<|eot_id|>", ["</s>"]), ("mistral", None, None, "</s>", []),
    ("no eos", None, None, "</s>", [])])  # it is appended
def test_an_answer_ends_with_the_first_end_that_the_template_writes(made, name, config, generation, end, others):
    def as_ids(names):
        return [ID[name] for name in names] if isinstance(names, list) else ID.get(names, names)

    tokenizer, eos = made(name, as_ids(config), as_ids(generation))
    assert eos[0] == ID[end] and sorted(eos[1:]) == sorted(as_ids(others))
    prompt = chat.prompt_ids(tokenizer, ASKED, "here")
    ids = chat.response_ids(tokenizer, ASKED, prompt, ANSWER, eos)
    assert ids[-1] == ID[end] and not {*ids[:-1]} & {*eos}
    assert tokenizer.decode(ids[:-1], skip_special_tokens=True).removeprefix("final").strip() == ANSWER
    joint = tokenizer.apply_chat_template(ASKED + [{"role": "assistant", "content": ANSWER}], return_dict=False)
    written = prompt + ids[:None if ID[end] in joint else -1]
    assert written == joint[:len(written)]


def test_a_system_message_that_the_template_leaves_out_is_an_error(made):
    tokenizer, _ = made("phi-3-medium")
    with pytest.raises(runs.InputError, match=r"in.jsonl, id 7: .*system's .*be brief.*--chat-template"):
        chat.prompt_ids(tokenizer, [SYSTEM, *ASKED], "in.jsonl, id 7")
    spelled = SYSTEM | {"content": "be </s> brief"}  # also one that spells a special token
    with pytest.raises(runs.InputError, match="system's"):
        chat.prompt_ids(tokenizer, [spelled, *ASKED], "here")
    chat.prompt_ids(made("gemma")[0], [spelled, *ASKED], "here")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('\n\n', '\n') }}{% endfor %}"  # Falcon's
    chat.prompt_ids(tokenizer, [SYSTEM | {"content": "be\n\nbrief"}, *ASKED], "here")


@pytest.mark.parametrize("name", ["02_generate", "01_seed_dpo", "05_eval sample"])
def test_a_stage_says_where_a_message_is_left_out(world, pi_0, tmp_path, name):
    (tmp_path / "template").write_text("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}"
                                       "{% endfor %}")
    row = {"id": 7, "prompt": [SYSTEM, *ASKED], "chosen": "a", "rejected": "b"}
    path = write_rows(tmp_path / "in.jsonl", [row | {"id": 6, "prompt": ASKED}, row])
    line = refused(*name.split(), model=pi_0, input=path, chat_template=tmp_path / "template", output=tmp_path / "out")
    assert "id 7: " in line and "system" in line and "--chat-template" in line


def test_a_date_in_the_prompts_is_that_of_the_output_in_all_runs_that_make_it(world, pi_0, tokenizer, tmp_path,
                                                                              monkeypatch):
    """A run stops and is resumed two days later: its prompts are those of the first day, and recorded."""
    (tmp_path / "template").write_text("{% if strftime_now('%Y-%m-%d') == '2026-01-30' %}my{% else %}the{% endif %} "
                                       + tokenizer.chat_template)
    options = dict(model=pi_0, input=world / "prompts_1.jsonl", chat_template=tmp_path / "template", max_new_tokens=4,
                   micro_batch_size=4)

    class Day(datetime):
        day = datetime(2026, 1, 30, 23, 59)

        @classmethod
        def now(cls):
            return cls.day

    monkeypatch.setattr(runs, "datetime", Day)
    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):  # stopped at the end
        context.setattr(runs, "close_output", lambda *_: 1 / 0)
        run("02_generate", **options, output=tmp_path / "parts")
    Day.day += timedelta(days=2)
    parts = run("02_generate", **options, output=tmp_path / "parts")
    later = run("02_generate", **options, output=tmp_path / "later")
    for path, of_first_day in ((parts, True), (later, False)):
        begins = [tokenizer.convert_ids_to_tokens(row["prompt_ids"])[:2] for row in rows(path)]
        assert ["my" in words for words in begins] == [of_first_day] * len(begins)
    assert json.loads(runs.args_path(parts).read_text())["begun"] == "2026-01-30T23:59:00"


THOUGHT = "<think>\nan eel is a fish\n</think>\n\nthe eel"


@pytest.mark.parametrize("name, text, prompt, response", [
    ("qwen3", ANSWER, "", "<think>\n\n</think>\n\nthe eel<|im_end|>"),
    ("qwen3", THOUGHT, "", THOUGHT + "<|im_end|>"),
    # "\n\n" may be one token, so that the joint rendering does not begin with the prompt's ids
    ("qwen3-thinking", ANSWER, "<think>\n", "\n</think>\n\nthe eel<|im_end|>"),
    ("qwen3-thinking", THOUGHT, "<think>\n", THOUGHT.removeprefix("<think>\n") + "<|im_end|>"),
    # the joint rendering has no thought: what was opened is closed, and not opened twice
    ("deepseek-r1", ANSWER, "<think>\n", "\n</think>\n\nthe eel</s>"),
    ("deepseek-r1", THOUGHT, "<think>\n", THOUGHT.removeprefix("<think>\n") + "</s>"),
    ("gpt-oss", ANSWER, "<|start|>assistant", "<|channel|>final<|message|>the eel<|return|>")])
def test_an_answer_with_or_without_a_thought_continues_its_prompt(made, name, text, prompt, response):
    tokenizer, eos = made(name)
    ids = chat.prompt_ids(tokenizer, ASKED, "here")
    before = tokenizer.decode(ids)
    after = tokenizer.decode(chat.response_ids(tokenizer, ASKED, ids, text, eos))
    assert before.endswith(prompt) and after == response
    assert (before + after).count("<think>") == (before + after).count("</think>") == ("think" in after)


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_thoughts_of_earlier_turns_may_be_left_out_of_a_prompt(made, name):
    tokenizer, _ = made(name)
    talk = [*ASKED, {"role": "assistant", "content": THOUGHT}, *ASKED]
    text = tokenizer.decode(chat.prompt_ids(tokenizer, talk, "here"))
    assert "an eel is" not in text and "the eel" in text
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content.split('</think>')[-1]", "'no'")
    with pytest.raises(runs.InputError, match="assistant's"):  # but not their answers
        chat.prompt_ids(tokenizer, talk, "here")


@pytest.mark.parametrize("name, sampled, text", [
    ("gpt-oss", "<|channel|>analysis<|message|>a fish<|end|><|start|>assistant<|channel|>final<|message|>the eel "
                "<|return|>", ANSWER),
    ("gpt-oss", "<|channel|>final<|message|>the eel<|return|>", ANSWER),
    ("gpt-oss", "<|channel|>analysis<|message|>a fish", ""),  # cut at the limit: it has not answered
    ("deepseek-r1", "an eel is a fish\n</think>\n\nthe eel</s>", ANSWER),
    ("deepseek-r1", "an eel is a fish", ""), ("qwen3-thinking", "an eel is a fish", ""),  # the prompt has opened it
    ("qwen3", THOUGHT + "<|im_end|>", ANSWER), ("qwen3", "<think>\na fish", ""), ("qwen3", "the eel<|im_end|>", ANSWER),
    ("qwen3-not-thinking", "the eel<|im_end|>", ANSWER), ("gemma", "the eel<end_of_turn>", ANSWER)])
def test_what_judges_and_benchmarks_read_is_the_answer_after_the_thought(made, name, sampled, text):
    tokenizer, _ = made(name)
    prompt = array("i", chat.prompt_ids(tokenizer, ASKED, "here"))
    assert chat.response_text(tokenizer, prompt, ids_of(tokenizer, sampled)) == text


def test_a_thought_that_a_message_spells_is_not_opened_by_the_prompt(made):
    tokenizer, _ = made("qwen3")
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": "what is <think>"}], "here")
    assert tokenizer.convert_tokens_to_ids("<think>") in prompt
    assert chat.response_text(tokenizer, prompt, ids_of(tokenizer, "the eel<|im_end|>")) == ANSWER


def test_a_tokenizer_without_thoughts_keeps_a_text_that_spells_their_end():
    tokenizer = make_tokenizer()
    assert chat.response_text(tokenizer, [5], ids_of(tokenizer, "a </think> b</s>")) == "a </think> b"
    words = make_tokenizer("whole words")  # to it the end of a thought is an unknown word like others
    assert chat.response_text(words, [5], ids_of(words, "the whale eel")) == "the eel"


def test_responses_cut_within_a_thought_that_the_prompt_opened_are_empty(tmp_path, tokenizer, world):
    thinking = type(tokenizer).from_pretrained(world / "base")
    thinking.add_tokens(["<think>", "</think>"])
    thinking.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    options = dict(model=save_tiny(tmp_path / "model", thinking, vocab_size=len(thinking) - 1),  # it cannot end it
                   max_new_tokens=9)
    sampled = rows(run("02_generate", **options, input=world / "prompts_1.jsonl", output=tmp_path / "out"))
    assert {y["text"] for row in sampled for y in row["responses"]} == {""}
    evaluated = run("05_eval", "sample", **options, input=world / "eval.jsonl", output=tmp_path / "eval")
    assert {row["response"] for row in rows(evaluated / "responses.jsonl")} == {""}


@pytest.mark.parametrize("name, before", [
    ("qwen3", "<think>\n\n</think>\n\n"), ("phi-4-mini", ""), ("gemma", ""),
    ("gpt-oss", "<|channel|>final<|message|>")])
def test_the_letter_is_the_token_in_which_the_two_answers_differ(made, tmp_path, name, before):
    tokenizer, _ = made(name)
    ids, letters = judges.letter_ids(str(tmp_path), tokenizer)
    assert tokenizer.decode(ids) == before
    assert letters == [ids_of(tokenizer, "A"), ids_of(tokenizer, "B")]


def test_a_letter_after_a_space_is_another_token(tmp_path):
    tokenizer = make_tokenizer("Metaspace, BPE", SPECIAL, CHAT["llama-2"])
    LlamaConfig().save_pretrained(tmp_path)
    ids, letters = judges.letter_ids(str(tmp_path), tokenizer)
    assert [tokenizer.decode(ids + letter).strip() for letter in letters] == ["A", "B"]
    assert all(len(letter) == 1 for letter in letters)
