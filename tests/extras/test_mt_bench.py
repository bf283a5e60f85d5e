"""MT-Bench: FastChat's files, read back by field; ratings; the means."""

import json
import re

import pytest

import common
import stages
from chat_server import KEY, on_the_loopback, says, serving
from conftest import save_tiny
from extras import mt_bench
from stages import write_rows

REFERENCE_ANSWERS = {103: ["103 first right", "103 second right"]}
QUESTIONS = [(101, "writing"), (102, "stem"), (103, "math"), (104, "extraction")]


@pytest.fixture
def questions(tmp_path):
    return write_rows(tmp_path / "question.jsonl", [{"question_id": k, "category": category, "turns": [
        "the lid is wet .", "and now ?"]} for k, category in QUESTIONS])


@pytest.fixture
def judge_options(tmp_path, questions):
    prompts = write_rows(tmp_path / "judge_prompts.jsonl", [
        {"name": name, "system_prompt": f"of {name}", "prompt_template": template} for name, template in {
            "single-v1": "one {question} | {answer}", "single-math-v1": "math {question} | {ref_answer_1} | {answer}",
            "single-v1-multi-turn": "two {question_1} | {answer_1} | {question_2} | {answer_2}",
            "single-math-v1-multi-turn": "math two {ref_answer_1} | {ref_answer_2} | {question_1} | {answer_1} | "
                                         "{question_2} | {answer_2}"}.items()])
    references = write_rows(tmp_path / "gpt-4.jsonl", [
        {"question_id": k, "choices": [{"index": 0, "turns": turns}]} for k, turns in REFERENCE_ANSWERS.items()])
    return {"questions": questions, "judge_prompts": prompts, "reference_answers": references,
            "judge_model": "org/gpt-x", "output": tmp_path / "bench"}


def write_answers(tmp_path, model):
    return write_rows(tmp_path / f"{model}.jsonl", [
        {"question_id": k, "answer_id": "a", "model_id": model, "tstamp": 0.0, "choices": [
            {"index": 0, "turns": [f"{model} {k} first {{answer_2}}", f"{model} {k} second"]}]} for k, _ in QUESTIONS])


@pytest.fixture
def judge(tmp_path, judge_options):
    """mt-judge, which must succeed -> (the rows of the file of judgments, the model's scores)."""
    def judge(server, model="ours", **options):
        answers = options.pop("answers", None) or write_answers(tmp_path, model)
        stages.run("05_eval", "mt-judge", answers, judge_url=server.url, **judge_options | options)
        bench = judge_options["output"]
        return (stages.rows(bench / "model_judgment" / "gpt-x_single.jsonl"),
                json.loads((bench / "model_score" / f"{model}_gpt-x.json").read_text()))
    return judge


@pytest.mark.parametrize("empty", [False, True])
def test_answers_of_two_turns(tmp_path, questions, tokenizer, monkeypatch, empty):
    asked, said, original = [], set(), common.sample_responses

    def sample_responses(model, prompts, u, temperature, max_new_tokens, eos):
        sampled = original(model, prompts, u, temperature, min(12, max_new_tokens), eos)
        if temperature < 2:  # otherwise it is the model's trial, when it is loaded
            asked.extend((temperature, max_new_tokens, prompt) for prompt in prompts)
            said.update(tokenizer.decode(ids, skip_special_tokens=True).strip() for [(ids, _)] in sampled)
        return sampled

    monkeypatch.setattr(common, "sample_responses", sample_responses)
    pi_init = save_tiny(tmp_path / "pi_init", tokenizer, max_position_embeddings=2048)
    write_rows(questions, stages.rows(questions) + [  # of an unknown category
        {"question_id": 105, "category": "cooking", "turns": ["the lid is wet .", "and now ?"]}])
    stages.run("05_eval", "mt-sample", *["--empty-system"] * empty, model=pi_init, questions=questions,
               output=tmp_path / "bench")
    rows = stages.rows(tmp_path / "bench" / "model_answer" / "pi_init.jsonl")
    assert [row["question_id"] for row in rows] == [101, 102, 103, 104, 105]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "pi_init" and row["tstamp"] > 1e9
        [choice] = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(t, str) for t in choice["turns"])
        assert set(choice["turns"]) <= said
        talk = [{"role": "system", "content": ""}] * empty + [
            {"role": "user", "content": "the lid is wet ."}, {"role": "assistant", "content": choice["turns"][0]},
            {"role": "user", "content": "and now ?"}]
        for messages in (talk, talk[:-2]):
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) in [
                prompt for _, _, prompt in asked]
    assert len({row["answer_id"] for row in rows}) == 5
    assert sorted(t for t, *_ in asked) == [0, 0, 0, 0, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]
    assert {n for _, n, _ in asked} == {1024}


def test_turns_for_which_the_model_has_no_positions(tmp_path, questions, tokenizer):
    """Too few for the questions alone are seen before anything is sampled; else each turn has what there is."""
    options = dict(questions=questions, max_new_tokens=30)
    least = len(tokenizer.apply_chat_template([
        {"role": "user", "content": "the lid is wet ."}, {"role": "assistant", "content": "."},
        {"role": "user", "content": "and now ?"}], add_generation_prompt=True, return_dict=False))
    small = save_tiny(tmp_path / "small", tokenizer, max_position_embeddings=least)
    ran = stages.attempt("05_eval", "mt-sample", **options, model=small, output=tmp_path / "bench")
    assert ran.status == 2 and ran.err.count("\n") == 1 and f"{least} positions" in ran.err, ran
    assert not list(tmp_path.rglob("turn_1*"))
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "the lid is wet . " * least}])
    assert f"{least} positions" in stages.refused("05_eval", "alpaca-sample", model=small, instructions=long,
                                                  output=tmp_path / "outputs.json")
    model = save_tiny(tmp_path / "model", tokenizer, max_position_embeddings=least + 1, eos_token_id=None)
    ran = stages.attempt("05_eval", "mt-sample", **options, model=model, output=tmp_path / "bench")
    assert ran.status == 0 and "answers with less room than --max-new-tokens 8" in ran.out, ran
    turns = [row["choices"][0]["turns"] for row in stages.rows(tmp_path / "bench" / "model_answer" / "model.jsonl")]
    assert all(first for first, _ in turns) and "" in {second for _, second in turns}


def test_temperatures_and_rating():
    assert mt_bench.TEMPERATURES == {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0,
                                     "math": 0, "coding": 0, "reasoning": 0}
    assert sorted(mt_bench.TEMPERATURES, key=mt_bench.category_order) == [
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]  # Figure 5a's order
    for text, score in [("Rating: [[5]]", 5), ("[[7.5]] then [[2]]", 7.5), ("no rating", -1), ("[[rating]]", -1),
                        ("Rating: [8]", 8), ("[1] is cited, [[3]]", 3), ("", -1), ("[[7.]]", 7),
                        # a thought is not read, however it is opened, and one that does not end has no rating
                        ("<think>\nMaybe [[3]].\n</think>\n\nRating: [[8]]", 8), ("Maybe [[3]].</think> [[8]]", 8),
                        (" <think>\nMaybe [[3]], or", -1), ("<think>[[3]]</think> well", -1),
                        ("It writes <think> twice. Rating: [[4]]", 4),
                        # not between 1 and 10
                        ("It was in [2023].", -1), ("[[0]]", -1), ("[[10.5]]", -1), ("[[1]]", 1), ("[[10]]", 10),
                        # numbers that are none, found without delay
                        ("[[" + "1" * 400 + "]]", -1), ("[[" + "1" * 200_000, -1), ("[" * 200_000, -1),
                        ("[[1" * 50_000, -1)]:
        assert mt_bench.read_rating(text) == score
    # cut at the limit, it may be a thought that the prompt has opened
    assert [mt_bench.read_rating(text, cut=True) for text in ("Maybe [[3]], or", "a</think> [[8]] since")] == [-1, 8]


def respond(request, before):
    """Rates 10 the first turns of 101, nothing those of 102, where it repeats the key, 4 what else there is."""
    text = request["messages"][1]["content"]
    return says("Fine. Rating: [[10]]" if " 101 " in text and text.startswith("one") else
                f"no idea, {KEY}" if " 102 " in text and text.startswith("one") else "Rating: [[4]]")


def test_judgments_and_scores(tmp_path, judge_options, judge):
    with serving(respond) as server:
        stopped = stages.attempt("05_eval", "mt-judge", write_answers(tmp_path, "ours"), judge_url=server.url,
                                 max_requests=3, **judge_options)
        assert stopped.status == 2 and not (tmp_path / "bench" / "model_judgment").exists()
        rows, scores = judge(server, max_requests=5)  # resumed
        assert {(r["model"], r["temperature"], r["max_tokens"]) for r in server.requests} == {("org/gpt-x", 0, 2048)}
        assert all("logprobs" not in r for r in server.requests) and len(server.requests) == 8
        systems = {r["messages"][1]["content"]: r["messages"][0] for r in server.requests}
    assert [(row["question_id"], row["turn"]) for row in rows] == [(k, t) for k, _ in QUESTIONS for t in (1, 2)]
    for row in rows:
        assert list(row) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
        assert row["model"] == "ours" and row["tstamp"] > 1e9 and row["judge"][0] == "org/gpt-x"
        assert systems[row["user_prompt"]] == {"role": "system", "content": f"of {row['judge'][1]}"}
    assert [row["judge"][1] for row in rows] == [
        "single-v1", "single-v1-multi-turn"] * 2 + ["single-math-v1", "single-math-v1-multi-turn"] + [
        "single-v1", "single-v1-multi-turn"]
    assert rows[0]["user_prompt"] == "one the lid is wet . | ours 101 first {answer_2}"
    assert rows[1]["user_prompt"] == "two the lid is wet . | ours 101 first {answer_2} | and now ? | ours 101 second"
    assert "103 first right" in rows[4]["user_prompt"] and "103 second right" in rows[5]["user_prompt"]
    assert rows[0]["judgment"] == "Fine. Rating: [[10]]"
    assert [row["score"] for row in rows] == [10, 4, -1, 4, 4, 4, 4, 4]
    assert scores["mt_bench"] == pytest.approx(34 / 7) and scores["mt_bench_turn_1"] == 6
    assert scores["mt_bench_turn_2"] == 4 and scores["n_without_rating"] == 1
    assert list(scores["mt_bench_categories"].items()) == [  # in the order of Figure 5a
        ("writing", 7.0), ("math", 4.0), ("extraction", 4.0), ("stem", 4.0)]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_second_model_joins_the_file_and_a_model_judged_again_replaces_its_judgments(tmp_path, judge_options, judge):
    with serving(respond) as server:
        both = [judge(server, model)[0] for model in ("ours", "theirs")][1]
        assert [row["model"] for row in both] == ["ours"] * 8 + ["theirs"] * 8
        answers = tmp_path / "ours.jsonl"
        answers.write_text(answers.read_text().replace("101 first", "101 another"))
        error = stages.refused("05_eval", "mt-judge", answers, judge_url=server.url, **judge_options)
        assert "ours_gpt-x.json" in error and "--answers" in error and len(server.requests) == 16
        (tmp_path / "bench" / "model_score" / "ours_gpt-x.json").unlink()
        again, _ = judge(server, answers=answers)
    assert again[:8] == both[8:] and [row["model"] for row in again[8:]] == ["ours"] * 8
    assert "101 another" in again[8]["user_prompt"] and len(server.requests) == 24


def test_a_judgment_that_is_refused_for_ever_is_fastchat_s_error(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "Fine")  # a key that is a word is not hidden in judgments
    with serving(lambda request, before: says(None) if " 102 " in request["messages"][1]["content"] else
                 respond(request, before)) as server:
        rows, scores = judge(server)
    assert [row["score"] for row in rows] == [10, 4, -1, -1, 4, 4, 4, 4] and len(server.requests) == 8
    assert [row["judgment"] for row in rows[:4]] == ["Fine. Rating: [[10]]", "Rating: [[4]]", "$ERROR$", "$ERROR$"]
    assert scores["n_without_rating"] == 2 and scores["mt_bench"] == 5  # (10 + 5 x 4) / 6


def test_a_judge_that_thinks_is_read_after_its_thought(judge):
    def thinks(request, before):
        ends = "two " not in request["messages"][1]["content"]  # the thoughts about the second turns are cut
        return says("Maybe [[3]]." + " </think> Rating: [[8]]" * ends) | {"finish_reason": "stop" if ends else "length"}
    with serving(thinks) as server:
        rows, scores = judge(server)
    assert [row["score"] for row in rows] == [8, -1] * 4 and rows[1]["judgment"] == "Maybe [[3]]."
    assert scores["n_without_rating"] == 4 and scores["mt_bench"] == 8 and scores["mt_bench_turn_2"] is None


def test_a_judgment_that_cannot_be_written_is_not_an_answer(tmp_path, judge_options):
    half = r'{"choices": [{"message": {"content": "\ud800 [[7]]"}}]}'  # of a surrogate pair
    with serving(lambda request, before: (200, half, {})) as server:
        ran = stages.attempt("05_eval", "mt-judge", write_answers(tmp_path, "ours"), judge_url=server.url,
                             judge_retries=0, **judge_options)
    assert ran.status == 2 and "8 of 8" in ran.err and ran.err.count("\n") == 1


def test_bad_input_is_one_line(tmp_path, judge_options, questions, pi_init):
    answers = write_answers(tmp_path, "ours")
    short = write_rows(tmp_path / "short.jsonl", stages.rows(answers)[:2])
    one_turn = write_rows(tmp_path / "one_turn.jsonl", [{"question_id": 1, "category": "math", "turns": ["a"]}])
    no_prompt = write_rows(tmp_path / "no_prompt.jsonl", stages.rows(judge_options["judge_prompts"])[:1])
    for words, changes, said in [
            (["mt-judge", short], {}, "question 103"),
            (["mt-judge", answers], {"judge_prompts": no_prompt}, "single-v1-multi-turn"),
            (["mt-judge", answers], {"questions": one_turn}, "one_turn.jsonl:1"),
            (["mt-sample", "--model", pi_init, "--questions", one_turn], None, "one_turn.jsonl:1")]:
        options = {} if changes is None else judge_options | {"judge_url": "http://127.0.0.1:9/v1"} | changes
        assert said in stages.refused("05_eval", *words, **options | {"output": tmp_path / "bench"})


def test_the_benchmarks_own_files(tmp_path, judge):
    """The 80 questions and the official judging prompts: every prompt filled, references for 30 questions."""
    folder = stages.ROOT.parent / "shared" / "data" / "mt_bench"
    if not folder.exists():
        pytest.skip("needs MT-Bench's files in ../shared/data/mt_bench")
    questions = stages.rows(folder / "question.jsonl")
    answers = write_rows(tmp_path / "m.jsonl", [{"question_id": row["question_id"], "choices": [
        {"index": 0, "turns": ["first answer", "second answer"]}]} for row in questions])
    with serving(lambda request, before: says("[[6]]")) as server:
        rows, scores = judge(server, "m", answers=answers, questions=folder / "question.jsonl",
                             judge_prompts=folder / "judge_prompts.jsonl",
                             reference_answers=folder / "reference_answer_gpt-4.jsonl")
    assert len(rows) == 160 and sum("-math" in row["judge"][1] for row in rows) == 60
    names = r"\{(question|answer|ref_answer)(_[12])?\}"
    assert not any(re.search(names, row["user_prompt"]) for row in rows)
    assert all("first answer" in row["user_prompt"] for row in rows)
    assert len(scores["mt_bench_categories"]) == 8 and scores["mt_bench"] == 6
