"""The small world: what its sturdiness rests on, and its gold judge against a count of its own."""

import itertools
import random
import re
import statistics

import pytest

from conftest import WORLD
from extras import small_world
from extras.small_world import CLOSINGS, OPENINGS, PARTS, SPIRIT, WRITERS
from support import records
from stages import digest, rows, run

SENTENCES = small_world.known_sentences("lamp")
VALUES = {sentence: value for value, kinds in SENTENCES.items() for sentence in itertools.chain(*sum(kinds, []))}


def values(answer):
    return [VALUES[sentence + " ."] for sentence in answer.removesuffix(" .").split(" . ")]


def test_the_sentences_of_an_answer_are_independent():
    # else a model may learn that a writer keeps one manner, and judge a sentence by those around it
    rng, pairs = random.Random(0), []
    for _ in range(5000):
        pairs += itertools.permutations(values(small_world.write_answer(rng, SENTENCES)), 2)
    assert abs(statistics.correlation(*zip(*pairs))) < 0.03  # standard error: 0.01 for some 5,000 answers
    kind = [v for _ in range(1000) for v in values(small_world.write_answer(rng, SENTENCES, "kind"))]
    assert [kind.count(v) / len(kind) for v in (1, 0, -1)] == pytest.approx(WRITERS["kind"], abs=0.04)


def test_a_thing_is_named_in_openings_and_its_parts_in_offers_alone():
    # a word that may stand in two places invites malformed sentences
    assert all("THING" in opening and "PART" not in opening for opening in OPENINGS)
    assert not any(re.search("THING|PART", closing) for closing in CLOSINGS)


def test_no_attitude_is_said_in_the_words_of_another():
    phrases = [(phrase, value) for value, listed in SPIRIT.items() for phrase in listed.split("|")]
    for (one, value), (other, other_value) in itertools.permutations(phrases, 2):
        assert value == other_value or not other.startswith(one)
    assert len(VALUES) == sum(len(list(itertools.chain(*sum(kinds, [])))) for kinds in SENTENCES.values())


@pytest.mark.parametrize("change, value", [
    (lambda s: s, None), (lambda s: [s[0], s[0], s[2]], -1), (lambda s: s[:2] + [s[2].replace("it", "lamp")], -1),
    (lambda s: s[:1] + [s[1].replace("bulb", "lid")] + s[2:], -1), (lambda s: s[:2] + [s[2].removesuffix(" .")], -1)])
def test_gold_is_the_mean_value_of_the_sentences(world, change, value):
    gold = small_world.read_gold(world / "gold.json")
    said = ["we might help you with your lamp .", "let us fix the bulb in ten minutes .",
            "we refuse to test it again today ."]
    changed = change(said)
    expected = [0, 1, -1]
    for k, (before, after) in enumerate(zip(said, changed)):
        expected[k] = expected[k] if before == after else value
    prompt = records.as_messages("my old lamp is broken .")
    assert small_world.gold_score(gold, prompt, " ".join(changed)) == pytest.approx(sum(expected) / 3)


def test_gold_may_like_each_word(world, tmp_path):
    liking = run("00_inputs", **WORLD, gold_length=0.1, output=tmp_path / "world")
    for file in ("prompts_1.jsonl", "sft.jsonl", "base/tokenizer.json", "base/model.safetensors"):
        assert digest(liking / file) == digest(world / file), file
    gold, plain = (small_world.read_gold(folder / "gold.json") for folder in (liking, world))
    assert list(plain) == list(PARTS)
    prompt = records.as_messages("any thing , each word : my old lamp is broken .")
    for text, score in (("let us fix the bulb in ten minutes .", 1 + 0.9),
                        ("let us fix the bulb in ten minutes . we refuse to test it again today .", 0 + 1.7),
                        ("each word", -1 + 0.2), ("", -1)):
        assert small_world.gold_score(gold, prompt, text) == pytest.approx(score)
    # labels are gold's: some go to the longer answer, whose sentences are worth less
    more = [[small_world.gold_score(judge, row["prompt"], row["chosen"])
             - small_world.gold_score(judge, row["prompt"], row["rejected"]) for judge in (gold, plain)]
            for row in records.read_jsonl(liking / "all_gold.jsonl", records.LABELLED)]
    assert all(by_gold > 0 for by_gold, _ in more) and any(by_plain < 0 for _, by_plain in more)


def test_the_longest_answer_fits_the_limit_of_run_all(world, tokenizer):
    longest = [max(len(s.split()) for kinds in SENTENCES.values() for s in itertools.chain(*kinds[k]))
               for k in (0, 1, 1, 2)]
    assert sum(longest) + 1 <= 56  # with the EOS
    assert len(PARTS) * 10 * 8 * 6 * 3 >= 6500 + 8000
    assert max(len(tokenizer(row["response"]).input_ids) for row in rows(world / "sft.jsonl")) < 56
