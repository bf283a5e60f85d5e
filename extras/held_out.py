"""A model beside pi_init on held-out prompts: two scores of a run on any data, without a judge.

    Distance: the mean of KL[pi(. | x, y_<t) || pi_init(. | x, y_<t)] over the tokens of the model's own responses, and
    the share of tokens to which pi_init gives less than 1e-4. Far from pi_init, its log-probs say little about a text,
    and so does Eq. 7, which compares with them.
    Agreement: how often Eq. 7, with the evaluated model in the place of pi_{t-1}, prefers the chosen response of the
    rows of eval.jsonl that have chosen and rejected. SPA labels by this implicit reward: once it is right no more often
    than the longer response or the likelihood under pi_init, D_t teaches nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F

import common
from extras.alpaca_eval import win_rate
from support import data, model_checks, models, records


def agreement(margin):
    """(percent of pairs with a positive margin, a zero counting half; its standard error, None for one pair). (n,)"""
    return win_rate((np.sign(margin) + 1) / 2)


@torch.no_grad()
def token_divergence(model, init, batch):
    """(2, N), of the N response tokens of a batch: the KL in nats; 1 where pi_init gives the token less than 1e-4.

    model, init: each a ResponseLogps
    """
    (hidden, *head), (hidden_init, *head_init) = model.hidden(batch), init.hidden(batch)

    def divergence(hidden, hidden_init, labels):  # (n, d), (n, d), (n,) -> (2, n)
        logp = F.linear(hidden, *head).float().log_softmax(-1)  # (n, V)
        logp_init = F.linear(hidden_init, *head_init).float().log_softmax(-1)
        kl = F.kl_div(logp_init, logp, log_target=True, reduction="none").sum(-1)
        improbable = logp_init.gather(1, labels[:, None])[:, 0] < common.IMPROBABLE
        return torch.stack([kl, improbable.float()])

    return common.in_chunks(divergence, common.chunk_rows(head[0]), hidden, hidden_init, batch.labels)


def distance(args, sampler, init, prompts, responses, work):
    """The metrics of how far the model is from pi_init. prompts, responses: lists of token ids"""
    model, init = common.ResponseLogps(sampler.model), common.ResponseLogps(init)

    def compute(rows):
        batch = common.collate([(row["prompt_ids"], [y["ids"] for y in row["responses"]]) for row in rows],
                               sampler.ranks.device)
        sums = [common.response_logps(values, batch.lengths) for values in token_divergence(model, init, batch)]
        return torch.stack(sums, 1).tolist()

    rows = [{"prompt_ids": prompt, "responses": [{"ids": ids}]} for prompt, ids in zip(prompts, responses)]
    kl, improbable = np.sum(common.map_rows(compute, rows, args.micro_batch_size, work, sampler.ranks,
                                            "distance from pi_init"), 0) / sum(map(len, responses))
    return {"kl_per_token": float(kl), "improbable": 100 * float(improbable)}


def evaluate(args, sampler, rows, prompts, responses, work):
    """The metrics of --model beside --init-model.

    rows: those of --input; labels that do not fit into the model's positions are left out; prompts, responses: of each
    row, lists of token ids
    """
    models.check_same_vocabulary(args.model, args.init_model)
    init = models.load_model(args.init_model, sampler.ranks.device, common.scoring_dtype(sampler.ranks.device))
    metrics = distance(args, sampler, init, prompts, responses, work)
    pairs, longer, positions = [], [], model_checks.count_positions(sampler.model)
    for row in rows:
        if records.is_text(row.get("chosen")) and records.is_text(row.get("rejected")):
            prompt, *answers = data.tokenize_pair(args.input, row, sampler.tokenizer, sampler.eos)
            if len(prompt) + max(map(len, answers)) <= positions:
                pairs.append({"prompt_ids": prompt, "responses": [{"ids": ids} for ids in answers]})
                longer.append(len(row["chosen"]) - len(row["rejected"]))
    if not pairs:
        return metrics

    def log_ratio(model, label):  # log pi(y_w | x) - log pi(y_l | x), (n,)
        scores = common.score(common.ResponseLogps(model), pairs, args.micro_batch_size, work, sampler.ranks, label)
        return np.array([logps for logps, _ in scores]) @ [1, -1]

    theirs = log_ratio(init, "scoring with pi_init")
    margin = log_ratio(sampler.model, "scoring held-out labels") - theirs  # of Eq. 7, but for beta, a positive factor
    metrics |= {"agreement_n": len(pairs), "longer_agreement": agreement(longer)[0],
                "init_agreement": agreement(theirs)[0]}
    if margin.any():  # else it is pi_init itself
        metrics["agreement"], metrics["agreement_error"] = agreement(margin)
    return metrics
