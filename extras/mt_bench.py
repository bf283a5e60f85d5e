"""MT-Bench (Section 5.1), in FastChat's own files: each can come from FastChat and go to it.

The commands mt-sample and mt-judge of 05_eval.py, and FastChat's, are in extras/README.md (Scores). With --output
mt_bench, --name spa_3 and gpt-4 as the judge they write in the folder mt_bench
    model_answer/spa_3.jsonl           {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    model_judgment/gpt-4_single.jsonl  {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn",
                                       "tstamp"} of all models that were judged; this model's older ones are replaced
    model_score/spa_3_gpt-4.json       mean ratings, 1 to 10: of both turns, each turn, each of the eight categories
A judgment without a rating in 1 to 10 after the judge's thought, if it has one, has the score -1 and is left out of the
means. It is "$ERROR$" where the judge would always refuse. mt-judge resumes as alpaca-judge does (alpaca_eval.py).

Departs from FastChat: the prompts of mt-sample come from the tokenizer's chat template, not from FastChat's
conversation templates, of which some have a system message; an answer ends where the model's positions do. No rating is
read in a thought, in a judgment that is cut at 2,048 tokens and may be one, or outside 1 to 10.
"""

import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np

from extras.answers import Sampler, file_name, fill, is_string, write_output
from extras.endpoint import FREE, JudgeEndpoint, ask_all
from support import records, runs

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0,
                "stem": 0.1, "humanities": 0.1}  # the categories in the order of Figure 5a; any other one: 0.7


def is_turns(value):
    "a list of two strings"
    return isinstance(value, list) and len(value) == 2 and all(map(is_string, value))


def is_choices(value):
    "a list [{index, turns: two strings}]"
    return isinstance(value, list) and value != [] and isinstance(value[0], dict) and is_turns(value[0].get("turns"))


QUESTIONS = {"question_id": records.is_id, "category": records.is_text, "turns": is_turns}
ANSWERS = {"question_id": records.is_id, "choices": is_choices}
JUDGE_PROMPTS = {"name": records.is_text, "system_prompt": is_string, "prompt_template": records.is_text}


def read_rating(judgment, cut=False):
    """The first [[rating]] of a judgment, otherwise the first [rating] as FastChat does; -1 unless it is in [1, 10].

    Of a judge that thinks, what follows the thought is read; nothing where the thought does not end. A judgment that
    is cut at the limit may be a thought that the judge's prompt has opened.
    """
    _, end, answer = judgment.rpartition("</think>")
    if not end and (cut or judgment.lstrip().startswith("<think>")):
        return -1
    found = re.search(r"\[\[(\d{1,9}(\.\d*)?)\]\]", answer) or re.search(r"\[(\d{1,9}(\.\d*)?)\]", answer)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else -1


def mt_bench_metrics(rows, category):
    """Means over the judgments that have a rating, those of both turns pooled. category: {question_id: category}"""
    rated = [row for row in rows if row["score"] != -1]

    def mean(chosen):
        return float(np.mean([row["score"] for row in chosen])) if chosen else None

    return {"mt_bench": mean(rated), "mt_bench_turn_1": mean([row for row in rated if row["turn"] == 1]),
            "mt_bench_turn_2": mean([row for row in rated if row["turn"] == 2]),
            "mt_bench_categories": {name: mean([row for row in rated if category[row["question_id"]] == name])
                                    for name in sorted(set(category.values()), key=category_order)},
            "n_judged": len(rows), "n_without_rating": len(rows) - len(rated)}


def category_order(category):
    """A sort key: the order of Figure 5a, unknown categories last, by name."""
    known = list(TEMPERATURES)
    return known.index(category) if category in known else len(known), category


def sample(args):
    """Write model_answer/MODEL.jsonl: two turns, the second asked after the model's own first answer."""
    name = file_name(args.name or args.model)
    args.output = str(Path(args.output) / "model_answer" / f"{name}.jsonl")
    questions = records.read_rows(args.questions, QUESTIONS, "question_id")
    work = runs.open_output(args, "model", "questions")
    sampler = Sampler(args)
    temperatures = [TEMPERATURES.get(row["category"], 0.7) for row in questions]
    start = [records.EMPTY_SYSTEM] if args.empty_system else []
    # of the second turns, were the first answers as short as can be
    sampler.check_room(sampler.prompt_ids([
        [*start, *records.as_messages(row["turns"][0]), {"role": "assistant", "content": "."},
         *records.as_messages(row["turns"][1])] for row in questions], args.questions))
    conversations, finishes = [start for _ in questions], []
    for turn in (0, 1):
        conversations = [asked + records.as_messages(row["turns"][turn])
                         for asked, row in zip(conversations, questions)]
        prompts = sampler.prompt_ids(conversations, args.questions)
        keys = [[row["question_id"], turn] for row in questions]
        answers = sampler.generate_answers(work, prompts, keys, temperatures, f"turn_{turn + 1}")
        conversations = [asked + [{"role": "assistant", "content": text}]
                         for asked, (text, *_) in zip(conversations, answers)]
        finishes += [finish for _, finish, _ in answers]
    rows = [{"question_id": row["question_id"],
             "answer_id": hashlib.sha256(json.dumps([name, row["question_id"], messages]).encode()).hexdigest()[:22],
             "model_id": name, "choices": [{"index": 0, "turns": [messages[-3]["content"], messages[-1]["content"]]}],
             "tstamp": time.time()} for row, messages in zip(questions, conversations)]
    counts = {"questions": len(questions), "turns cut at the limit": finishes.count("length")} | sampler.counts
    sampler.ranks.on_first(lambda: write_output(args, work, rows, counts, runs.write_jsonl))


def judge(args):
    """Add a model to model_judgment/JUDGE_single.jsonl and write its means, model_score/MODEL_JUDGE.json."""
    questions = records.read_rows(args.questions, QUESTIONS, "question_id")
    model, judge_name = Path(args.answers).name.removesuffix(".jsonl"), file_name(args.judge_model)
    rows, jobs = prepare_judgments(args, questions, model)
    path = Path(args.output) / "model_judgment" / f"{judge_name}_single.jsonl"
    others = records.read_rows(path, {"model": is_string}) if path.exists() else []
    args.output = str(Path(args.output) / "model_score" / f"{model}_{judge_name}.json")
    work = runs.open_output(args, "questions", "answers", "judge_prompts", "reference_answers", free=FREE)
    for k, answer in ask_all(JudgeEndpoint(args), jobs, work).items():
        text, finish = answer or ("$ERROR$", "stop")  # as FastChat writes it
        rows[k] |= {"judgment": text, "score": read_rating(text, finish == "length"), "tstamp": time.time()}
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_jsonl(path, [row for row in others if row["model"] != model] + rows)
    metrics = mt_bench_metrics(rows, {row["question_id"]: row["category"] for row in questions})
    counts = {"mean rating": metrics["mt_bench"], "without rating": metrics["n_without_rating"]}
    write_output(args, work, {"name": args.name or model, "gold_labels": args.label_share} | metrics, counts)


def prepare_judgments(args, questions, model):
    """(rows of FastChat's single-answer judgments, without the judgment; {k: the messages that ask for row k})"""
    def read(path, fields, key):
        return {row[key]: row for row in records.read_rows(path, fields, key)}

    def find(found, key, path, kind):
        if key not in found:
            raise runs.InputError(f"{path}: has no {kind} {key}, which {args.questions} needs: give the whole file")
        return found[key]

    answers, references = (read(path, ANSWERS, "question_id") for path in (args.answers, args.reference_answers))
    prompts = read(args.judge_prompts, JUDGE_PROMPTS, "name")
    rows, jobs = [], {}
    for question in questions:
        k, turns = question["question_id"], question["turns"]
        answer = find(answers, k, args.answers, "answer to question")["choices"][0]["turns"]
        fields = {"question": turns[0], "question_1": turns[0], "question_2": turns[1],
                  "answer": answer[0], "answer_1": answer[0], "answer_2": answer[1]}
        math = question["category"] in ("math", "reasoning", "coding")
        if math:  # judged against a reference answer
            found = find(references, k, args.reference_answers, "reference answer to question")
            fields["ref_answer_1"], fields["ref_answer_2"] = found["choices"][0]["turns"]
        for turn in (1, 2):
            name = "single" + "-math" * math + "-v1" + "-multi-turn" * (turn == 2)
            prompt = find(prompts, name, args.judge_prompts, "prompt")
            user = fill(prompt["prompt_template"], fields)
            jobs[len(rows)] = [{"role": "system", "content": prompt["system_prompt"]},
                               {"role": "user", "content": user}]
            rows.append({"question_id": k, "model": model, "judge": [args.judge_model, name], "user_prompt": user,
                         "judgment": None, "score": None, "turn": turn, "tstamp": None})
    return rows, jobs
