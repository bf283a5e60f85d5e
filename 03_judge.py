"""Algorithm 1, line 3, second half: label the sampled pairs by direct preference judgment, giving D_t.

    r(x, y) = beta log[pi_{t-1}(y | x) / pi_init(y | x)]                           (4, without beta log Z(x))
    p_{t-1}(y_1 > y_2 | x) = sigmoid(  beta log[pi_{t-1}(y_1 | x) / pi_init(y_1 | x)]
                                     - beta log[pi_{t-1}(y_2 | x) / pi_init(y_2 | x)])          (7)
    (y_w, y_l) = (y_1, y_2) if p_{t-1}(y_1 > y_2 | x) > 0.5 else (y_2, y_1)                     (8)
    r_penalty(x, y) = r(x, y) - alpha |y|, with --length-penalty alpha                          (13)

Do not confuse the references: here the fixed pi_init, in 04_refined_dpo.py pi_{t-1}. --judge names one of the judges
that the paper compares with instead, which are in extras/judges.py.

Reads  responses_t.jsonl    what 02_generate.py writes; of more than two responses the best and the worst are paired
Writes preferences_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...],
                             "chosen": {"text", "ids", "finish"}, "rejected": {...}, "p": 0.73,
                             "logps": {"policy": [-21.5, -30.2], "ref": [-24.1, -27.7]}, "improbable": [0, 1],
                             "judge": "init"}
                             p is of y_1 over y_2 in the order of sampling; logps are of all responses in that order;
                             improbable: their tokens to which the reference gives less than 1e-4

The summary says how far pi_{t-1} is from pi_init on its own responses: the mean of log pi_{t-1}(y | x) - log
pi_init(y | x), by response and by token, and the share of improbable tokens; it leaves out rows with identical
responses. Eq. 7 rests on pi_init's log-probs: where pi_{t-1} has moved far away they say little, and so does a label.

    python 03_judge.py --model pi_0 --init-model pi_init --input responses_1.jsonl --output preferences_1.jsonl
    torchrun --nproc-per-node 4 03_judge.py --model pi_0 --init-model pi_init --input ... --output ...

Departs from the paper: pairs that carry no preference (the same response twice, p = 0.5 exactly) are dropped.
"""

import math
import sys

import common
from support import model_checks, models, records, runs


def implicit_rewards(logps_policy, logps_ref, beta):
    """Eq. 4 of each response to one prompt, from summed log-probs; without beta log Z(x), which is the same for all."""
    return [beta * (policy - ref) for policy, ref in zip(logps_policy, logps_ref)]


def preference(reward_1, reward_2):
    """Eq. 7 where the rewards are Eq. 4's, in general Eq. 1: p(y_1 > y_2 | x) = sigmoid(reward_1 - reward_2)"""
    x = reward_1 - reward_2
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))  # neither overflows


def best_and_worst(rewards):
    """Indices (first, second), in the order of sampling, of the highest and the lowest reward. For two: (0, 1)."""
    pair = rewards.index(max(rewards)), rewards.index(min(rewards))
    return min(pair), max(pair)


def penalised(rewards, lengths, alpha):
    """Eq. 13 for the responses to one prompt."""
    return [reward - alpha * length for reward, length in zip(rewards, lengths)]


READ = ("model", "init_model", "ref_model", "reward_model", "judge_model", "gold")  # options that make up a judge


def penalty(text):
    """An argparse type: a number, or auto."""
    return text if text == "auto" else runs.number(float, -1e9, 1e9)(text)


def parse_args():
    parser = runs.Parser(description="Label pairs of responses by the model's own implicit reward.")
    add = parser.add_argument
    # what is read and written
    add("--model", help="pi_{t-1}, which sampled the responses")
    add("--init-model", help="pi_init, the reference in Eq. 7")
    add("--input", required=True, help="responses of 02_generate.py")
    add("--output", required=True, help="D_t: JSON Lines of labelled pairs")
    # Section 5.1
    add("--beta", type=runs.nonnegative, default=0.1,
        help="beta in Eq. 7; without --length-penalty no label depends on it")
    # what it is compared with
    add("--judge", default="init", help="init: Eq. 7; previous, none, pairrm, reward, llm, gold: others, whose options "
        "--judge NAME --help lists")
    add("--length-penalty", type=penalty, help="alpha in Eq. 13, or auto: the one that makes chosen and rejected "
        "equally long on average")
    add("--length-unit", choices=("characters", "tokens"), default="characters",
        help="of |y| in Eq. 13; the paper's alpha, 0.001 to 0.01, goes with characters")
    # memory
    add("--micro-batch-size", type=runs.positive, default=16, help="prompts scored at a time by one rank")
    if any(word.startswith("--judge") for word in sys.argv[1:]):
        from extras import judges
        return judges.parse_args(parser)
    args = parser.parse_args()
    if not (args.model and args.init_model):
        parser.error("--model and --init-model are required")
    return args


def read_responses(args):
    """(the rows whose responses are not all identical, counts of what was read and dropped)"""
    read = records.read_jsonl(args.input, records.RESPONSES)
    rows = [row for row in read if any(y["ids"] != row["responses"][0]["ids"] for y in row["responses"])]
    if not rows:
        raise runs.InputError(f"{args.input}: the responses to every prompt are identical: raise 02's --temperature")
    if args.length_penalty == "auto" and any(len(row["responses"]) != 2 for row in rows):
        raise runs.InputError(f"{args.input}: --length-penalty auto takes two responses to each prompt: "
                              "give the penalty as a number")
    return rows, {"prompts read": len(read), "dropped for identical responses": len(read) - len(rows)}


def score(name, rows, label, args, work, ranks):
    """For each row ([log pi(y | x) of each response], [improbable tokens of each]), by the model `name`."""
    model = models.load_model(name, ranks.device, common.scoring_dtype(ranks.device))
    model_checks.check_limits(args.input, ((row["id"], row["prompt_ids"], [y["ids"] for y in row["responses"]])
                                           for row in rows), model, "02's --max-prompt-length or --max-new-tokens")
    return common.score(common.ResponseLogps(model), rows, args.micro_batch_size, work, ranks, label)


def judge_by_likelihood(ref_model, rows, args, work, ranks):
    """(rewards, extra): for each row the reward of each response (Eq. 4), and the fields to store with the label.

    ref_model: pi_init; None: the reward is beta log pi_{t-1}(y | x)
    """
    if ref_model:
        models.check_same_vocabulary(args.model, ref_model)
    policy = [logps for logps, _ in score(args.model, rows, "scoring with pi_{t-1}", args, work, ranks)]
    if not ref_model:
        return [[args.beta * logp for logp in logps] for logps in policy], [{"logps": {"policy": l}} for l in policy]
    rewards, extra = [], []
    ref = score(ref_model, rows, "scoring with the reference", args, work, ranks)
    for logps_policy, (logps_ref, improbable) in zip(policy, ref):
        rewards.append(implicit_rewards(logps_policy, logps_ref, args.beta))  # Eq. 4
        extra.append({"logps": {"policy": logps_policy, "ref": logps_ref}, "improbable": improbable})
    return rewards, extra


def distance(rows, extra):
    """How far pi_{t-1} is from the reference on these responses: in nats by response and by token, and in percent."""
    lengths = [len(y["ids"]) for row in rows for y in row["responses"]]
    nats = sum(sum(fields["logps"]["policy"]) - sum(fields["logps"]["ref"]) for fields in extra)
    improbable = sum(sum(fields["improbable"]) for fields in extra)
    return {"log-ratio per response": round(nats / len(lengths), 4),
            "log-ratio per token": round(nats / sum(lengths), 4),
            "improbable tokens (%)": round(100 * improbable / sum(lengths), 4)}


def make_pairs(args, rows, rewards, extra, counts):
    """The rows of D_t; updates the counts. Raises InputError where no pair carries a preference."""
    pairs = []
    for row, of_row, fields in zip(rows, rewards, extra, strict=True):
        one, two = best_and_worst(of_row)
        p = preference(of_row[one], of_row[two])                  # Eq. 7
        if p == 0.5:
            continue
        chosen, rejected = (one, two) if p > 0.5 else (two, one)  # Eq. 8
        pairs.append({"id": row["id"], "prompt": row["prompt"], "prompt_ids": row["prompt_ids"],
                      "chosen": row["responses"][chosen], "rejected": row["responses"][rejected],
                      "p": p, **fields, "judge": args.judge})
    counts |= {"dropped as ties": len(rows) - len(pairs), "pairs": len(pairs)}
    if not pairs:
        options = ["--" + name.replace("_", "-") for name in READ if getattr(args, name, None)]
        raise runs.InputError(f"{args.input}: no pair carries a preference ({counts}): "
                              f"check what the judge is made of, {' and '.join(options)}")
    extra_tokens = [len(pair["chosen"]["ids"]) - len(pair["rejected"]["ids"]) for pair in pairs]
    counts |= {"pairs with the first response chosen": sum(pair["p"] > 0.5 for pair in pairs),
               "mean extra tokens of the chosen response": round(sum(extra_tokens) / len(pairs), 3)}
    return pairs


def main():
    args = parse_args()
    work = runs.open_output(args, "input", *READ)
    ranks = common.start_ranks()
    rows, counts = read_responses(args)
    if args.judge == "init":
        rewards, extra = judge_by_likelihood(args.init_model, rows, args, work, ranks)
    else:
        from extras import judges
        rewards, extra = judges.judge(judge_by_likelihood, rows, args, work, ranks)
    bad = [row["id"] for row, of_row in zip(rows, rewards, strict=True) if not all(map(math.isfinite, of_row))]
    if bad:
        raise runs.InputError(f"{args.input}, id {bad[0]}: a score is not finite: remove the row or check the models")
    if "improbable" in extra[0]:
        counts |= distance(rows, extra)
    if args.length_penalty is not None:
        unit = {"characters": "text", "tokens": "ids"}[args.length_unit]
        lengths, alpha = [[len(y[unit]) for y in row["responses"]] for row in rows], args.length_penalty
        if alpha == "auto":
            from extras.judges import balancing_penalty
            alpha = balancing_penalty(rewards, lengths)
        rewards = [penalised(*of_row, alpha) for of_row in zip(rewards, lengths)]  # Eq. 13
        counts["length penalty"] = alpha
    pairs = make_pairs(args, rows, rewards, extra, counts)

    def write():
        runs.write_jsonl(work / "preferences", pairs)
        runs.close_output(args, work, work / "preferences", counts)

    ranks.on_first(write)


if __name__ == "__main__":
    runs.run(main)
