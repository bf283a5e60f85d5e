"""MT-Bench: FastChat's files, read back by field; ratings; the summary."""

import json
import re

import huggingface_hub
import pytest

import common
import stages
from chat_server import KEY, says, serving

stage = stages.load("05_eval")
REFERENCE_ANSWERS = {103: ["103 first right", "103 second right"]}
QUESTIONS = [(101, "writing"), (102, "stem"), (103, "math"), (104, "extraction")]


write_lines, lines = stages.write_rows, stages.rows


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "question.jsonl", [
        {"question_id": k, "category": category, "turns": ["the lid is wet .", "and now ?"]} for k, category in QUESTIONS])


@pytest.fixture
def judge_options(tmp_path, questions, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(stage, "PAUSE", 0.01)
    prompts = write_lines(tmp_path / "judge_prompts.jsonl", [
        {"name": "single-v1", "system_prompt": "s1", "prompt_template": "one {question} | {answer}"},
        {"name": "single-math-v1", "system_prompt": "s2", "prompt_template": "math {question} | {ref_answer_1} | {answer}"},
        {"name": "single-v1-multi-turn", "system_prompt": "s3",
         "prompt_template": "two {question_1} | {answer_1} | {question_2} | {answer_2}"},
        {"name": "single-math-v1-multi-turn", "system_prompt": "s4",
         "prompt_template": "math two {ref_answer_1} | {ref_answer_2} | {question_1} | {answer_1} | {question_2} | {answer_2}"}])
    references = write_lines(tmp_path / "gpt-4.jsonl", [
        {"question_id": k, "choices": [{"index": 0, "turns": turns}]} for k, turns in REFERENCE_ANSWERS.items()])
    return {"mt_bench": questions, "judge_prompts": prompts, "reference_answers": references, "judge_model": "org/gpt-x",
            "output": tmp_path / "bench"}


def write_answers(tmp_path, model):
    return write_lines(tmp_path / f"{model}.jsonl", [
        {"question_id": k, "answer_id": "a", "model_id": model, "tstamp": 0.0,
         "choices": [{"index": 0, "turns": [f"{model} {k} first {{answer_2}}", f"{model} {k} second"]}]} for k, _ in QUESTIONS])


def test_answers_of_two_turns(tmp_path, questions, pi_init, tokenizer, monkeypatch):
    asked, said, original = [], set(), common.sample

    def sample(model, prompts, u, temperature, max_new_tokens, ends):
        asked.extend((temperature, max_new_tokens, prompt) for prompt in prompts)
        sampled = original(model, prompts, u, temperature, min(12, max_new_tokens), ends)
        said.update(tokenizer.decode(ids, skip_special_tokens=True).strip() for [(ids, _)] in sampled)
        return sampled

    monkeypatch.setattr(common, "sample", sample)
    stages.run("05_eval", model=pi_init, mt_bench=questions, output=tmp_path / "bench")
    rows = lines(tmp_path / "bench" / "model_answer" / "pi_init.jsonl")
    assert [row["question_id"] for row in rows] == [101, 102, 103, 104]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "pi_init" and row["tstamp"] > 1e9
        [choice] = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(t, str) for t in choice["turns"])
        assert set(choice["turns"]) <= said
        second = tokenizer.apply_chat_template(
            [{"role": "user", "content": "the lid is wet ."}, {"role": "assistant", "content": choice["turns"][0]},
             {"role": "user", "content": "and now ?"}], add_generation_prompt=True, return_dict=False)
        assert second in [prompt for _, _, prompt in asked]
    assert len({row["answer_id"] for row in rows}) == 4
    assert sorted(t for t, *_ in asked) == [0, 0, 0, 0, 0.1, 0.1, 0.7, 0.7]
    assert {n for _, n, _ in asked} == {1024}


def test_temperatures_and_rating():
    assert stage.TEMPERATURES == {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    for text, score in [("Rating: [[5]]", 5), ("[[7.5]] then [[2]]", 7.5), ("no rating", -1), ("[[rating]]", -1),
                        ("Rating: [8]", 8), ("[1] is cited, [[3]]", 3), ("", -1)]:
        assert stage.rating(text) == score


def test_summary_by_hand():
    """First turn (8 + 4) / 2 = 6, second turn 3 (the -1 is left out), all valid rows (8 + 4 + 3) / 3 = 5."""
    rows = [{"question_id": 1, "turn": 1, "score": 8.0}, {"question_id": 1, "turn": 2, "score": -1},
            {"question_id": 2, "turn": 1, "score": 4.0}, {"question_id": 2, "turn": 2, "score": 3.0}]
    found = stage.mt_bench_figures(rows, {1: "math", 2: "writing"})
    assert found == {"mt_bench": 5.0, "mt_bench_turn_1": 6.0, "mt_bench_turn_2": 3.0, "n_judged": 4, "n_without_rating": 1,
                     "mt_bench_categories": {"writing": 3.5, "math": 8.0}}
    assert list(found["mt_bench_categories"]) == ["writing", "math"]  # in Figure 5a's order
    none = stage.mt_bench_figures([{"question_id": 1, "turn": 1, "score": -1}], {1: "math"})
    assert none["mt_bench"] is None and none["mt_bench_turn_2"] is None


def respond(request, before):
    """Rates 10 the first turns of 101, nothing those of 102, 4 what else there is."""
    text = request["messages"][1]["content"]
    return says("Fine. Rating: [[10]]" if " 101 " in text and text.startswith("one") else
                "no idea" if " 102 " in text and text.startswith("one") else "Rating: [[4]]")


def test_judgments_and_scores(tmp_path, judge_options):
    with serving(respond) as server:
        ran = stages.attempt("05_eval", judge=write_answers(tmp_path, "ours"), judge_url=server.url, **judge_options)
        assert ran.status == 0, ran.err
        assert {(r["model"], r["temperature"], r["max_tokens"]) for r in server.requests} == {("org/gpt-x", 0, 2048)}
        assert all("logprobs" not in r for r in server.requests) and len(server.requests) == 8
        systems = {r["messages"][1]["content"]: r["messages"][0] for r in server.requests}
    rows = lines(tmp_path / "bench" / "model_judgment" / "gpt-x_single.jsonl")
    assert [(row["question_id"], row["turn"]) for row in rows] == [(k, t) for k, _ in QUESTIONS for t in (1, 2)]
    for row in rows:
        assert list(row) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
        assert row["model"] == "ours" and row["tstamp"] > 1e9 and systems[row["user_prompt"]]["role"] == "system"
    assert rows[0]["judge"] == ["org/gpt-x", "single-v1"]
    assert rows[0]["user_prompt"] == "one the lid is wet . | ours 101 first {answer_2}"
    assert rows[0]["judgment"] == "Fine. Rating: [[10]]" and systems[rows[0]["user_prompt"]]["content"] == "s1"
    assert rows[1]["judge"][1] == "single-v1-multi-turn"
    assert rows[1]["user_prompt"] == "two the lid is wet . | ours 101 first {answer_2} | and now ? | ours 101 second"
    assert rows[4]["judge"][1] == "single-math-v1" and "103 first right" in rows[4]["user_prompt"]
    assert rows[5]["judge"][1] == "single-math-v1-multi-turn" and "103 second right" in rows[5]["user_prompt"]
    assert [row["score"] for row in rows] == [10, 4, -1, 4, 4, 4, 4, 4]
    scores = json.loads((tmp_path / "bench" / "model_score" / "ours_gpt-x.json").read_text())
    assert scores["mt_bench"] == pytest.approx(34 / 7) and scores["mt_bench_turn_1"] == 6
    assert scores["mt_bench_turn_2"] == 4 and scores["n_without_rating"] == 1
    assert scores["mt_bench_categories"] == {"writing": 7.0, "math": 4.0, "extraction": 4.0, "stem": 4.0}
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_second_model_joins_the_file_and_nothing_is_asked_twice(tmp_path, judge_options):
    target = tmp_path / "bench" / "model_judgment" / "gpt-x_single.jsonl"
    with serving(respond) as server:
        for model in ("ours", "theirs"):
            assert stages.attempt("05_eval", judge=write_answers(tmp_path, model), judge_url=server.url, **judge_options).status == 0
        assert len(server.requests) == 16
        both = lines(target)
        (tmp_path / "bench" / "model_score" / "ours_gpt-x.json").unlink()  # the scores again, from the file of judgments
        assert stages.attempt("05_eval", judge=tmp_path / "ours.jsonl", judge_url=server.url, **judge_options).status == 0
        assert len(server.requests) == 16
        extra = {"question_id": 999, "model": "ours", "judge": ["j", "p"], "user_prompt": "u", "turn": 1, "score": 1}
        write_lines(target, both + [extra])  # of this model, but none of these questions
        (tmp_path / "bench" / "model_score" / "ours_gpt-x.json").unlink()
        assert stages.attempt("05_eval", judge=tmp_path / "ours.jsonl", judge_url=server.url, **judge_options).status == 0
        assert len(server.requests) == 16 and extra in lines(target)
        write_lines(target, both)
    assert [row["model"] for row in both] == ["ours"] * 8 + ["theirs"] * 8
    assert sorted(map(str, lines(target))) == sorted(map(str, both))


def test_a_stopped_run_goes_on(tmp_path, judge_options):
    answers = write_answers(tmp_path, "ours")
    with serving(respond) as server:
        ran = stages.attempt("05_eval", judge=answers, judge_url=server.url, budget=3, **judge_options)
        assert ran.status == 2 and "budget of 3" in ran.err and ran.err.count("\n") == 1
        assert not (tmp_path / "bench" / "model_judgment").exists()
        assert stages.attempt("05_eval", judge=answers, judge_url=server.url, budget=5, **judge_options).status == 0
        assert len(server.requests) == 8
    assert len(lines(tmp_path / "bench" / "model_judgment" / "gpt-x_single.jsonl")) == 8


def test_judgments_of_other_answers_are_not_overwritten(tmp_path, judge_options):
    answers = write_answers(tmp_path, "ours")
    target = tmp_path / "bench" / "model_judgment" / "gpt-x_single.jsonl"
    with serving(respond) as server:
        assert stages.attempt("05_eval", judge=answers, judge_url=server.url, **judge_options).status == 0
        before = target.read_bytes()
        (tmp_path / "bench" / "model_score" / "ours_gpt-x.json").unlink()
        answers.write_text(answers.read_text().replace("101 first", "101 another"))
        ran = stages.attempt("05_eval", judge=answers, judge_url=server.url, **judge_options)
    assert ran.status == 2 and "question 101" in ran.err and target.read_bytes() == before and len(server.requests) == 8


def test_a_local_judge_writes_judgments(tmp_path, judge_options, pi_init, monkeypatch):
    original = common.sample
    monkeypatch.setattr(common, "sample", lambda model, prompts, u, temperature, n, ends: original(model, prompts, u[:, :, :9], temperature, 9, ends))
    stages.run("05_eval", judge=write_answers(tmp_path, "ours"), **judge_options | {"judge_model": pi_init})
    rows = lines(tmp_path / "bench" / "model_judgment" / "pi_init_single.jsonl")
    assert len(rows) == 8 and all(row["judgment"] and row["score"] == -1 for row in rows)


def test_bad_input_is_one_line(tmp_path, judge_options, questions, pi_init):
    answers = write_answers(tmp_path, "ours")
    short = write_lines(tmp_path / "short.jsonl", lines(answers)[:2])
    one_turn = write_lines(tmp_path / "one_turn.jsonl", [{"question_id": 1, "category": "math", "turns": ["a"]}])
    no_prompt = write_lines(tmp_path / "no_prompt.jsonl", lines(judge_options["judge_prompts"])[:1])
    url = {"judge_url": "http://127.0.0.1:9/v1", "judge": answers}
    no_reference = judge_options | url
    del no_reference["reference_answers"]
    no_judge = judge_options | url
    del no_judge["judge_model"]
    for options, said in [
            (judge_options | url | {"judge": short}, "question 103"),
            (no_reference, "--reference-answers"),
            (no_judge, "--judge-model"),
            (judge_options | url | {"judge_prompts": no_prompt}, "single-v1-multi-turn"),
            (judge_options | url | {"judge": [answers, answers]}, "takes one"),
            ({"mt_bench": one_turn, "model": pi_init, "output": tmp_path / "bench"}, "two texts"),
            ({"mt_bench": tmp_path / "none", "model": pi_init, "output": tmp_path / "bench"}, "cannot be read")]:
        ran = stages.attempt("05_eval", **options)
        assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran
    assert not (tmp_path / "bench").exists()


def test_the_benchmarks_own_files(tmp_path, judge_options):
    """The 80 questions and the official judging prompts: every prompt filled, references for 30 questions."""
    folder = stages.ROOT.parent / "shared" / "data" / "mt_bench"
    if not folder.exists():
        pytest.skip("needs MT-Bench's files in ../shared/data/mt_bench")
    questions = lines(folder / "question.jsonl")
    answers = write_lines(tmp_path / "m.jsonl", [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": ["first answer", "second answer"]}]} for row in questions])
    with serving(lambda request, before: says("[[6]]")) as server:
        ran = stages.attempt("05_eval", judge=answers, judge_url=server.url, **judge_options | {
            "mt_bench": folder / "question.jsonl", "judge_prompts": folder / "judge_prompts.jsonl",
            "reference_answers": folder / "reference_answer_gpt-4.jsonl"})
    assert ran.status == 0, ran.err
    rows = lines(tmp_path / "bench" / "model_judgment" / "gpt-x_single.jsonl")
    assert len(rows) == 160 and sum("-math" in row["judge"][1] for row in rows) == 60
    names = r"\{(question|answer|ref_answer)(_[12])?\}"
    assert not any(re.search(names, row["user_prompt"]) for row in rows)
    assert all("first answer" in row["user_prompt"] for row in rows)
    scores = json.loads((tmp_path / "bench" / "model_score" / "m_gpt-x.json").read_text())
    assert len(scores["mt_bench_categories"]) == 8 and scores["mt_bench"] == 6
