"""A model beside pi_init on held-out prompts: two scores of a run on any data, without a judge.

    Distance: the mean of KL[pi(. | x, y_<t) || pi_init(. | x, y_<t)] over the tokens of the model's own responses, and
    the share of tokens to which pi_init gives less than 1e-4. Both rise first when a run collapses.
    Agreement: p(y_w > y_l | x) of Eq. 7, with the evaluated model in the place of pi_{t-1}, on rows of eval.jsonl that
    have chosen and rejected. Spreading rests on this implicit reward: where it falls to what the longer response or the
    likelihood under pi_init would give, D_t teaches nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F

import common
from support import chat, models, runs


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


@torch.no_grad()
def token_divergence(model, init, batch):
    """[(KL in nats of each token, log pi_init of it), (N,) each] for the N response tokens of a batch.

    model, init: each a ResponseLogps
    """
    (hidden, *head), (hidden_init, *head_init) = model.hidden(batch), init.hidden(batch)
    parts, size = [], common.chunk_rows(head[0])
    for states, states_init, labels in zip(*(values.split(size) for values in (hidden, hidden_init, batch.labels))):
        logp = F.linear(states, *head).float().log_softmax(-1)  # (n, V)
        logp_init = F.linear(states_init, *head_init).float().log_softmax(-1)
        kl = F.kl_div(logp_init, logp, log_target=True, reduction="none").sum(-1)
        parts.append(torch.stack([kl, logp_init.gather(1, labels[:, None])[:, 0]]))
    return torch.cat(parts, 1)


def distance(args, sampler, init, prompts, responses, partial):
    """The metrics of how far the model is from pi_init. prompts, responses: lists of token ids"""
    model, init = common.ResponseLogps(sampler.model), common.ResponseLogps(init)

    def compute(rows):
        batch = common.collate([(row["prompt_ids"], [y["ids"] for y in row["responses"]]) for row in rows],
                               sampler.ranks.device)
        kl, logp_init = token_divergence(model, init, batch)
        improbable = (logp_init < common.IMPROBABLE).float()
        return torch.stack([common.response_logps(values, batch.lengths) for values in (kl, improbable)], 1).tolist()

    rows = [{"prompt_ids": prompt, "responses": [{"ids": ids}]} for prompt, ids in zip(prompts, responses)]
    kl, improbable = np.sum(common.map_rows(compute, rows, args.micro_batch_size, partial, sampler.ranks,
                                            "distance from pi_init"), 0) / sum(map(len, responses))
    return {"kl_per_token": float(kl), "improbable": 100 * float(improbable)}


def evaluate(args, sampler, rows, prompts, responses, partial):
    """The metrics of --model beside --init-model.

    rows: of --input; of those with labels, those that fit into the model's positions; prompts, responses: of each row,
    lists of token ids
    """
    models.check_same_vocabulary(args.model, args.init_model)
    init = models.load_model(args.init_model, sampler.ranks.device, common.scoring_dtype(sampler.ranks.device))
    metrics = distance(args, sampler, init, prompts, responses, partial)
    labelled, pairs = [], []
    for row in rows:
        if runs.is_text(row.get("chosen")) and runs.is_text(row.get("rejected")):
            prompt, *answers = chat.tokenize_pair(args.input, row, sampler.tokenizer, sampler.eos)
            if len(prompt) + max(map(len, answers)) <= models.count_positions(sampler.model):
                labelled.append(row)
                pairs.append({"prompt_ids": prompt, "responses": [{"ids": ids} for ids in answers]})
    if not pairs:
        return metrics

    def log_ratio(model, label):  # log pi(y_w | x) - log pi(y_l | x), (n,)
        scores = common.score(common.ResponseLogps(model), pairs, args.micro_batch_size, partial, sampler.ranks, label)
        return np.array([logps for logps, _ in scores]) @ [1, -1]

    ours = log_ratio(sampler.model, "scoring held-out labels")
    theirs = log_ratio(init, "scoring with pi_init")
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in labelled])
    metrics |= {"agreement_n": len(pairs), "longer_agreement": agreement(longer)[0],
                "init_agreement": agreement(theirs)[0]}
    margin = args.beta * (ours - theirs)
    if margin.any():  # else it is pi_init itself
        rate, error = agreement(margin)
        metrics |= {"agreement": rate, "agreement_error": error,
                    "calibration": calibration(1 / (1 + np.exp(-margin.clip(-500, 500))))}
    return metrics
