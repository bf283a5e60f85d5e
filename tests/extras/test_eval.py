"""05_eval.py sample: what a run writes, several commands in one start, and --init-model: agreement, distance."""

import json
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import stages
from children import no_child_outlives_its_test, two_ranks
from conftest import save_tiny
from extras import plain_spa
from extras.small_world import gold_score
from support import chat, models, records
from stages import attempt, command_line, digest, files, refused, rows, run, write_rows

evaluation = stages.load("05_eval")
GOLD = {"lamp": {"the bulb is new .": 1, "a lamp is a lamp .": 0, "throw the lamp away .": -1}, "tent": {"yes .": 1}}
LAMP = [{"role": "user", "content": "my tent is fine ."}, {"role": "assistant", "content": "good ."},
        {"role": "user", "content": "my red lamp is broken . can you help ?"}]


def test_the_judge_accuracy_by_hand(tmp_path):
    def response(text):
        return {"text": text, "ids": [1], "finish": "eos"}

    good, fair, bad = map(response, ("the bulb is new .", "a lamp is a lamp .", "throw the lamp away ."))
    pairs = [(good, bad), (fair, bad), (bad, fair), (good, good)]  # right, right, wrong, equal
    path = write_rows(tmp_path / "preferences.jsonl", [
        {"id": k, "prompt": LAMP, "prompt_ids": [1], "chosen": w, "rejected": l} for k, (w, l) in enumerate(pairs)])
    assert evaluation.judge_accuracy(path, GOLD) == pytest.approx(200 / 3)
    assert evaluation.judge_accuracy(write_rows(path, rows(path)[3:]), GOLD) is None  # no pair to judge by


@pytest.fixture(scope="module")
def evaluated(world, pi_0, tmp_path_factory):
    return run("05_eval", "sample", model=pi_0, input=world / "eval.jsonl", gold=world / "gold.json", name="a model",
               label_share="3 %", max_new_tokens=12, output=tmp_path_factory.mktemp("eval") / "out")


def test_05_scores_its_responses_against_the_references(evaluated, world):
    gold, written = json.loads((world / "gold.json").read_text()), rows(evaluated / "responses.jsonl")
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for row, given in zip(written, rows(world / "eval.jsonl"), strict=True):
        assert (row["id"], row["prompt"], row["reference"]) == (given["id"], given["prompt"], given["reference"])
        ours, theirs = (gold_score(gold, row["prompt"], row[key]) for key in ("response", "reference"))
        assert row["preference"] == (1 if ours > theirs else 0.5 if ours == theirs else 0)
    assert metrics["n"] == len(written)
    assert metrics["win_rate"] == pytest.approx(100 * np.mean([row["preference"] for row in written]))
    assert metrics["avg_length"] == pytest.approx(np.mean([len(row["response"]) for row in written]))
    assert metrics["eos_rate"] == pytest.approx(100 * np.mean([row["finish"] == "eos" for row in written]))
    assert metrics["malformed"] == 100  # of a model that knows nothing


def test_05_finds_the_references_as_good_as_themselves(world):
    gold = json.loads((world / "gold.json").read_text())
    given = [{**row, "response": row["reference"]} for row in rows(world / "eval.jsonl")]
    metrics, _ = evaluation.score(given, gold, "model")
    assert (metrics["win_rate"], metrics["malformed"]) == (50, 0)
    assert metrics["length_controlled_winrate"] == pytest.approx(50)


def test_the_annotations_have_the_same_metrics_in_alpaca_evals_format(evaluated, tmp_path):
    metrics, responses = json.loads((evaluated / "metrics.json").read_text()), rows(evaluated / "responses.jsonl")
    found = json.loads(run("05_eval", "alpaca-score", evaluated / "annotations.json", df_gamed="none",
                           output=tmp_path / "metrics.json").read_text())
    same = metrics.keys() & found.keys() - {"gold_labels", "avg_length"}  # the official tool rounds the length
    assert len(same) == 10 and all(found[key] == metrics[key] for key in same)
    annotations = json.loads((evaluated / "annotations.json").read_text())
    assert [(a["output_2"], a["preference"] - 1) for a in annotations] == [
        (row["response"], row["preference"]) for row in responses]


@pytest.mark.parametrize("size", [2, 16])
def test_an_answer_is_as_long_as_the_model_has_positions_for(tmp_path, tokenizer, size, monkeypatch):
    """As the same model's with twice the positions, cut where there is no room."""
    monkeypatch.setattr(chat, "response_text", lambda tokenizer, prompt, ids: " ".join(map(str, ids)))
    lengths = [1, 2, 13, 14, 20, 20, 20, 21, 35, 36]
    path = write_rows(tmp_path / "in.jsonl", [{"id": k, "prompt": "lid " * n} for k, n in enumerate(lengths)])
    found, lines = [], []
    for positions in (80, 40):  # by the same random weights
        model = save_tiny(tmp_path / f"{positions}", tokenizer, max_position_embeddings=positions)
        ran = attempt("05_eval", "sample", model=model, input=path, max_new_tokens=24, micro_batch_size=size,
                      output=model / "eval")
        assert ran.status == 0, ran
        found.append([row["response"].split() for row in rows(model / "eval/responses.jsonl")])
        lines.append(ran.out)
    used = [len(chat.prompt_ids(tokenizer, records.as_messages("lid " * n), "")) for n in lengths]
    room = [min(24, 40 - n) for n in used]
    assert min(room) == 1 and room.count(24) == 3
    assert sum(len(ids) > n for ids, n in zip(found[0], room)) > 3
    assert [ids[:n] for ids, n in zip(found[0], room)] == found[1]
    assert "less room" not in lines[0] and "answers with less room than --max-new-tokens 7" in lines[1]


@pytest.fixture
def commands(world, pi_init, pi_0, tmp_path):
    """The words of a `sample` for each of two models, which write tmp_path/FOLDER/0 and 1."""
    return lambda folder: [["sample", *command_line(dict(
        model=model, init_model=pi_init, input=world / "eval.jsonl", gold=world / "gold.json", max_new_tokens=8,
        micro_batch_size=5, output=tmp_path / folder / str(k)))] for k, model in enumerate((pi_init, pi_0))]


def same(one, two):
    return all(digest(one / f"{k}/{name}") == digest(two / f"{k}/{name}") for k in range(2)
               for name in ("responses.jsonl", "metrics.json", "annotations.json"))


def test_two_commands_in_one_start_make_what_two_starts_make_also_as_two_ranks(commands, tmp_path, monkeypatch):
    for words in commands("alone"):
        assert attempt("05_eval", *words).status == 0
    first, second = commands("two ranks")
    ranks = two_ranks(["05_eval", *first, "--then", *second], {})
    assert [rank.status for rank in ranks] == [0, 0] and ranks[1].out == "", ranks
    assert same(tmp_path / "alone", tmp_path / "two ranks")
    loaded, load_model = [], models.load_model

    def load(*args):
        if len(loaded) == 2:  # the second command begins: the models of the first are gone
            assert [model() for model in loaded] == [None, None]
        model = load_model(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", load)
    first, second = commands("together")
    folders = [tmp_path / "together" / str(k) for k in range(2)]
    ran = attempt("05_eval", *first, "--then", *second, "--then", "report", *folders, output=tmp_path / "report")
    assert ran.status == 0 and len(loaded) == 4, ran
    assert same(tmp_path / "alone", tmp_path / "together")
    assert (tmp_path / "report/table.md").read_text() in ran.out


def test_an_error_ends_the_start_and_what_was_made_before_stays(commands, world, tmp_path):
    first, second = commands("out")
    done, other = tmp_path / "out/0", tmp_path / "none.jsonl"
    error = refused("05_eval", *first, "--then", *second, "--input", other, "--then", *first, output=tmp_path / "never")
    assert str(other) in error and (done / "metrics.json").is_file()
    assert not (tmp_path / "out/1").exists() and not (tmp_path / "never.partial").exists()
    before = files(done)
    ran = attempt("05_eval", *first, "--then", *second)
    assert ran.status == 0 and ran.out.count("already complete") == 1 and files(done) == before
    assert (tmp_path / "out/1/metrics.json").is_file()


@pytest.mark.parametrize("last", [["sample", "--no-such-option"], ["report"], ["ranks"], []])
def test_a_mistake_in_the_last_command_is_told_before_the_first_begins(commands, tmp_path, last):
    first, _ = commands("out")
    ran = attempt("05_eval", *first, "--then", *last)
    assert ran.status == 2 and ran.err.count("\n") == 1 and not (tmp_path / "out").exists(), ran


def logp(model, tokenizer, prompt, text):
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    return plain_spa.log_prob(model, chat.prompt_ids(tokenizer, prompt, ""), ids).item()


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    """Rows with both answers, the chosen one the shorter in one, as long in another; the last row without answers."""
    seed = records.read_jsonl(world / "seed.jsonl", records.LABELLED)[:9]
    seed[0]["chosen"] = seed[0]["chosen"].split()[0]
    seed[1]["rejected"] = " ".join(reversed(seed[1]["chosen"].split()))
    seed.append({"id": "x", "prompt": seed[0]["prompt"]})
    return write_rows(tmp_path_factory.mktemp("held_out") / "eval.jsonl", seed)


def metrics_of(folder, **options):
    output = run("05_eval", "sample", max_new_tokens=4, **options, output=folder / "out")
    return json.loads((output / "metrics.json").read_text())


def test_agreement_is_that_of_equation_7(labelled, pi_0, pi_init, tokenizer, tmp_path):
    policy, init = (AutoModelForCausalLM.from_pretrained(name) for name in (pi_0, pi_init))
    margins, likelihoods, longer = [], [], []
    for row in rows(labelled)[:9]:
        ours, theirs = ({y: logp(model, tokenizer, row["prompt"], row[y]) for y in ("chosen", "rejected")}
                        for model in (policy, init))
        margins.append(ours["chosen"] - theirs["chosen"] - ours["rejected"] + theirs["rejected"])
        likelihoods.append(theirs["chosen"] - theirs["rejected"])
        longer.append(len(row["chosen"]) - len(row["rejected"]))
    metrics = metrics_of(tmp_path, model=pi_0, init_model=pi_init, input=labelled, micro_batch_size=4)
    right = [margin > 0 for margin in margins]
    assert 0 < sum(right) < 9 and metrics["agreement_n"] == 9
    assert metrics["agreement"] == pytest.approx(100 * sum(right) / 9)
    assert metrics["agreement_error"] == pytest.approx(100 * np.std(right, ddof=1) / 3)
    assert metrics["init_agreement"] == pytest.approx(100 * sum(x > 0 for x in likelihoods) / 9)
    assert metrics["longer_agreement"] == pytest.approx(100 * sum((np.sign(longer) + 1) / 2) / 9)


def test_pi_init_itself_has_no_implicit_reward(labelled, pi_init, tmp_path):
    metrics = metrics_of(tmp_path, model=pi_init, init_model=pi_init, input=labelled)
    assert "agreement" not in metrics and metrics["agreement_n"] == 9
    assert metrics["kl_per_token"] == 0


def test_prompts_alone_are_answered_as_before(world, pi_0, pi_init, tmp_path):
    metrics = metrics_of(tmp_path, model=pi_0, init_model=pi_init, input=world / "prompts_1.jsonl")
    assert "agreement_n" not in metrics and metrics["n"] == 14


def test_the_distance_from_pi_init_is_the_mean_kl_of_a_token(world, pi_0, pi_init, tokenizer, tmp_path, monkeypatch):
    """By torch.distributions, one sequence at a time; the responses are those of 02 with the same seed."""
    responses = run("02_generate", model=pi_0, input=world / "eval.jsonl", max_new_tokens=4, temperature=3,
                    on_length_limit="open", output=tmp_path / "responses.jsonl")
    policy, init = (AutoModelForCausalLM.from_pretrained(name) for name in (pi_0, pi_init))
    divergences, improbable = [], 0
    for row in rows(responses):
        x, y = row["prompt_ids"], row["responses"][0]["ids"]
        p, q = (torch.distributions.Categorical(logits=model(torch.tensor([x + y])).logits[0, len(x) - 1:-1].double())
                for model in (policy, init))
        divergences += torch.distributions.kl_divergence(p, q).tolist()
        improbable += (q.log_prob(torch.tensor(y)).exp() < 1e-4).sum().item()
    assert 0 < improbable < len(divergences)
    for chunk in (10 ** 6, 3):
        monkeypatch.setattr("common.chunk_rows", lambda weight: chunk)
        metrics = metrics_of(tmp_path / str(chunk), model=pi_0, init_model=pi_init, input=world / "eval.jsonl",
                            temperature=3)
        assert metrics["kl_per_token"] == pytest.approx(np.mean(divergences), rel=1e-4) and metrics["kl_per_token"] > 0
        assert metrics["improbable"] == pytest.approx(100 * improbable / len(divergences))
