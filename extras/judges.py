"""What the paper compares SPA's direct preference judgment with: --judge and --length-penalty auto of 03_judge.py.

    --judge previous    Eq. 7 with pi_{t-2}, the model that pi_{t-1} was trained from, as reference (Table 7)
            none        no reference: the reward is beta log pi_{t-1}(y | x) (Table 7)
            pairrm      PairRM (Tables 2 and 7; extras/pairrm.py)
            reward      a reward model, which scores each response by itself
            llm         LLM-as-judge (Table 2, App. B.2), asked in both orders of a pair, so that position bias cancels;
                        with --llm-order one in that of sampling alone; the paper does not say which
            gold        the small world's gold judge, for the 100 % rows

    python 03_judge.py --judge llm --judge-model judge --input responses_1.jsonl --output preferences_1.jsonl

Each judge is a function of (rows, args, work, ranks) that returns (rewards, extra): for each row the reward of each
response, and the fields to store with its label ("scores", or "options" of llm, or "logits" of pairrm).
"""

import itertools
from array import array

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
from extras.small_world import gold_score, read_gold
from support import chat, model_checks, models, records, runs

# the options that each judge requires; those of the others are refused
NEEDS = {"init": ["--model", "--init-model"], "previous": ["--model", "--ref-model"], "none": ["--model"],
         "pairrm": ["--reward-model"], "reward": ["--reward-model"], "llm": ["--judge-model"], "gold": ["--gold"]}


def parse_args(parser):
    """03's arguments, its parser given, with the options of these judges."""
    add = parser.add_argument
    add("--ref-model", help="--judge previous: pi_{t-2}, at t = 1 pi_init")
    add("--reward-model", help="--judge pairrm: llm-blender/PairRM-hf, or its folder; --judge reward: a sequence "
        "classifier with one label")
    add("--judge-model", help="--judge llm: what 00_sft.py trained on judge_sft.jsonl of 00_inputs.py")
    add("--llm-order", choices=("both", "one"), default="both",
        help="--judge llm: both orders of a pair, or the order of sampling alone")
    add("--gold", help="--judge gold: gold.json of the small world")
    args = parser.parse_args()
    if args.judge not in NEEDS:
        parser.error(f"--judge {args.judge} is none of {', '.join(NEEDS)}")
    options = {option for of_judge in NEEDS.values() for option in of_judge}
    given = {"--" + name.replace("_", "-") for name, value in vars(args).items() if value is not None} & options
    if given != set(NEEDS[args.judge]):
        parser.error(f"--judge {args.judge} takes {' and '.join(NEEDS[args.judge])}; given: "
                     f"{' and '.join(sorted(given)) or 'none'}")
    return args


def judge(judge_by_likelihood, rows, args, work, ranks):
    """(rewards, extra) by the judge --judge. judge_by_likelihood: 03's function, of which two judges are cases"""
    if args.judge in ("previous", "none"):
        return judge_by_likelihood(args.ref_model, rows, args, work, ranks)
    if args.judge == "pairrm":
        from extras.pairrm import judge_pairrm
        return judge_pairrm(rows, args, work, ranks)
    return {"reward": judge_reward, "llm": judge_llm, "gold": judge_gold}[args.judge](rows, args, work, ranks)


def judge_reward(rows, args, work, ranks):
    """An external reward model: its one output for (x, y), each response by itself."""
    model, tokenizer = load_reward_model(args.reward_model, ranks.device)
    limit = min(model_checks.count_positions(model), tokenizer.model_max_length)
    for row in rows:
        longest = max(len(encode(tokenizer, row["prompt"], y["text"])["input_ids"]) for y in row["responses"])
        if longest > limit:
            raise runs.InputError(f"{args.input}, id {row['id']}: prompt and response are {longest} tokens, and "
                                  f"{args.reward_model} reads {limit}: lower 02's --max-prompt-length or "
                                  "--max-new-tokens, or give another --reward-model")

    @torch.no_grad()
    def compute(batch_rows):
        encoded = [encode(tokenizer, row["prompt"], y["text"]) for row in batch_rows for y in row["responses"]]
        scores = iter(reward_scores(model, encoded))
        return [[next(scores) for _ in row["responses"]] for row in batch_rows]

    scores = common.map_rows(compute, rows, args.micro_batch_size, work, ranks, "scoring with the reward model")
    return scores, [{"scores": of_row} for of_row in scores]


def load_reward_model(name, device):
    """(a sequence classifier with one output, its tokenizer). float32 everywhere: bf16 rounding would create ties."""
    config = models.load_config(name)
    if config.num_labels != 1:
        raise runs.InputError(f"{name}: is not a reward model (it has {config.num_labels} labels): give a sequence "
                              "classifier with one label")
    tokenizer = models.from_pretrained(AutoTokenizer, name, "a tokenizer")
    model = models.load_weights(AutoModelForSequenceClassification, name, "a reward model", config=config,
                                dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def encode(tokenizer, messages, text):
    """A prompt and a response as the reward model reads them: by its chat template, else as a pair of texts."""
    if tokenizer.chat_template:
        messages = [message for message in messages if message != records.EMPTY_SYSTEM]
        ids = chat.encode(tokenizer, chat.render(tokenizer, messages + [{"role": "assistant", "content": text}]))
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
    return dict(tokenizer(records.as_text(messages), text, split_special_tokens=True))


def reward_scores(model, encoded):
    """The model's output for each encoded text, padded on the right; one by one where it has no padding token."""
    pad, scores = model.config.pad_token_id, []
    for batch in [encoded] if pad is not None else [[one] for one in encoded]:
        inputs = {key: common.padded([one[key] for one in batch], pad or 0 if key == "input_ids" else 0)
                  for key in batch[0]}
        scores += model(**{key: ids.to(model.device) for key, ids in inputs.items()}).logits[:, 0].tolist()
    return scores


LETTERS = ("A", "B")  # the options of LLM-as-judge, in the order of its prompt


def before_listing_1(rows):
    """The empty system message, where prompts of the rows begin with it (--empty-system): then all of a run do."""
    return [dict(records.EMPTY_SYSTEM)] if any(row["prompt"][0] == records.EMPTY_SYSTEM for row in rows) else []


def judging_prompt(messages, one, two, before=()):
    """Listing 1, as messages, after those of `before_listing_1`. The answer is the letter of the better response."""
    return [*before, *records.as_messages("Consider the following conversation between a human and an assistant:\n"
                                          f"{records.as_text(messages)}\n"
                                          "Please choose the response that is the most helpful, honest, and harmless.\n"
                                          f"Options:\n(A) {one}\n(B) {two}\n"
                                          "The answer is:")]


# the words that a judge's vocabulary needs besides those of prompts and responses
JUDGING_WORDS = " ".join([judging_prompt(records.as_messages(""), "", "")[0]["content"], *LETTERS])


def judging_examples(seed, orders):
    """Listing 2, as rows for 00_sft.py: Listing 1 about each seed pair, and the chosen one's letter.

    orders: "both", or "one": A and B are the answer in turn
    """
    before = before_listing_1(seed)
    for k, row in enumerate(seed):
        for letter in LETTERS if orders == "both" else LETTERS[k % 2]:
            one, two = ("chosen", "rejected") if letter == "A" else ("rejected", "chosen")
            prompt = judging_prompt(row["prompt"], row[one], row[two], before)
            yield {"id": f"{row['id']}-{letter}", "prompt": prompt, "response": letter}


def judge_llm(rows, args, work, ranks):
    """LLM-as-judge (App. B.2): the log-prob of the letter of each response as the answer to Listing 1.

    A response's reward is the mean over both orders of the pair, so that position bias cancels, or, with --llm-order
    one, its value in the order of sampling alone. Of more than two responses: the mean over all pairs that it is in.
    """
    tokenizer = chat.load_tokenizer(args.judge_model)
    model = models.load_model(args.judge_model, ranks.device, common.scoring_dtype(ranks.device))
    before = before_listing_1(rows)
    opening, letters = letter_ids(args.judge_model, tokenizer, before)
    orders = itertools.permutations if args.llm_order == "both" else itertools.combinations
    pairs = [list(orders(range(len(row["responses"])), 2)) for row in rows]
    asked = []  # a row for each question: Listing 1, to which A and B are the responses
    for row, of_row in zip(rows, pairs):
        texts = [y["text"] for y in row["responses"]]
        for one, two in of_row:
            question = judging_prompt(row["prompt"], texts[one], texts[two], before)
            ids = array("i", chat.prompt_ids(tokenizer, question, f"{args.input}, id {row['id']}") + opening)
            asked.append({"id": row["id"], "prompt_ids": ids, "responses": [{"ids": letter} for letter in letters]})
    model_checks.check_limits(args.input, [(row["id"], row["prompt_ids"], letters) for row in asked], model,
                              "02's --max-new-tokens")
    scores = iter(common.score(common.ResponseLogps(model), asked, args.micro_batch_size, work, ranks,
                               "asking about pairs"))
    options = [[[one, two, *next(scores)[0]] for one, two in of_row] for of_row in pairs]
    rewards = [llm_rewards(len(row["responses"]), of_row) for row, of_row in zip(rows, options, strict=True)]
    return rewards, [{"options": of_row} for of_row in options]


def llm_rewards(count, options):
    """The mean log-prob of each response's letter. options: [[first, second, log-prob of A, of B], ...] by order"""
    logps = [[a if k == one else b for one, two, a, b in options if k in (one, two)] for k in range(count)]
    return [sum(values) / len(values) for values in logps]


def letter_ids(name, tokenizer, before=()):
    """(ids that the template writes before a letter, [[id of A], [id of B]]), tokenised as by 00_sft.py.

    The letter is the token in which the two answers differ: a template may write a thought before, an EOS after it.
    Raises InputError unless it is one token.
    """
    question = judging_prompt(records.as_messages("x"), "y", "z", before)
    prompt, eos = chat.prompt_ids(tokenizer, question, name), chat.eos_ids(name, tokenizer)
    answers = [chat.response_ids(tokenizer, question, prompt, letter, eos) for letter in LETTERS]
    differ = [k for k, (a, b) in enumerate(zip(*answers)) if a != b]
    if len(answers[0]) != len(answers[1]) or len(differ) != 1:
        raise runs.InputError(f"{name}: its tokenizer makes {answers} of the options {LETTERS}: give a judge to which "
                              "each is a token of its own")
    [at] = differ
    return answers[0][:at], [[ids[at]] for ids in answers]


def judge_gold(rows, args, work, ranks):
    """The small world's gold judge."""
    gold = read_gold(args.gold)
    scores = [[gold_score(gold, row["prompt"], y["text"]) for y in row["responses"]] for row in rows]
    return scores, [{"scores": of_row} for of_row in scores]


def balancing_penalty(rewards, lengths):
    """The alpha of Eq. 13 at which chosen and rejected are equally long on average, or as nearly as possible.

    rewards, lengths: (n, 2). Pair i prefers its longer response as long as alpha < (r_1 - r_2) / (|y_1| - |y_2|), so
    the mean of |y_w| - |y_l| falls in steps at these n thresholds; alpha is 0 or the middle between two of them.
    Negative where the chosen ones would be the shorter ones without it.
    """
    d_reward, d_length = (np.reshape(values, (-1, 2)).astype(float) @ [1, -1] for values in (rewards, lengths))
    unequal = d_length != 0
    if not unequal.any():
        return 0.0
    threshold, which = np.unique(d_reward[unequal] / d_length[unequal], return_inverse=True)
    size = np.bincount(which, abs(d_length[unequal]))  # of the step at each threshold
    length_gap = size.sum() - 2 * np.concatenate([[0], size.cumsum()])  # in all, if k thresholds lie below alpha
    edges = np.concatenate([threshold[:1] - 1, threshold, threshold[-1:] + 1])
    low, high = edges[:-1], edges[1:]
    alpha = np.where((low < 0) & (0 < high), 0.0, (low + high) / 2)
    return float(min(zip(abs(length_gap), abs(alpha), alpha))[2])
