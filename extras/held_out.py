"""Agreement with held-out labels: a score of a run on any data, without a judge.

    p(y_w > y_l | x) of Eq. 7, with the evaluated model in the place of pi_{t-1}, on rows of eval.jsonl that have chosen
    and rejected. Spreading rests on this implicit reward: where it falls to what the longer response or the likelihood
    under pi_init would give, D_t teaches nothing.
"""

import numpy as np

import chat
import common
import runs

init_ratios = {}  # pi_init's, for all commands of one start


def agreement(margin):
    """(percent of pairs with a positive margin, a zero counting half; its standard error, None for one pair). (n,)"""
    right = (np.sign(margin) + 1) / 2
    error = 100 * float(right.std(ddof=1)) / len(right) ** 0.5 if len(right) > 1 else None
    return 100 * float(right.mean()), error


def calibration(p, bins=10):
    """For each tenth of the confidence max(p, 1 - p), from 0.5 to 1: [mean confidence, percent right, pairs].

    p: (n,), of the preferred response over the other one. A bin without pairs has [None, None, 0].
    """
    confidence = np.maximum(p, 1 - p)
    index = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    found = [(confidence[index == k], p[index == k] > 0.5) for k in range(bins)]
    return [[float(c.mean()), 100 * float(right.mean()), len(c)] if len(c) else [None, None, 0] for c, right in found]


def evaluate(args, sampler, rows, partial):
    """The metrics of --model against --init-model on the labelled rows that fit into its positions."""
    labelled, pairs = [], []
    for row in rows:
        if runs.is_text(row.get("chosen")) and runs.is_text(row.get("rejected")):
            pair = chat.tokenize_pair(args.input, row, sampler.tokenizer, sampler.eos)
            if common.row_length(pair) - min(len(pair["chosen"]), len(pair["rejected"])) <= common.count_positions(
                    sampler.model):
                labelled.append(row)
                pairs.append(pair)
    if not pairs:
        return {}

    def log_ratio(model, label):  # log pi(y_w | x) - log pi(y_l | x), (n,)
        logps = common.pair_logps(common.ResponseLogps(model), pairs, args, partial, sampler.ranks, label)
        return np.array(logps) @ [1, -1]

    common.check_same_vocabulary(args.model, args.init_model)
    ours = log_ratio(sampler.model, "scoring held-out labels")
    key = args.init_model, args.micro_batch_size, str(pairs)
    if key not in init_ratios:
        init_ratios[key] = log_ratio(common.load_model(args.init_model, sampler.ranks.device, common.scoring_dtype(
            sampler.ranks.device)), "scoring with pi_init")
    init = init_ratios[key]
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in labelled])
    metrics = {"agreement_n": len(pairs), "longer_agreement": agreement(longer)[0],
               "init_agreement": agreement(init)[0]}
    margin = args.beta * (ours - init)
    if margin.any():  # else it is pi_init itself
        rate, error = agreement(margin)
        metrics |= {"agreement": rate, "agreement_error": error,
                    "calibration": calibration(1 / (1 + np.exp(-margin.clip(-500, 500))))}
    return metrics
