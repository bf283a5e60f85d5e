"""Algorithm 1, line 3, second half: label the sampled pairs by direct preference judgment, giving D_t.

    p_{t-1}(y_1 > y_2 | x) = sigmoid(  beta log[pi_{t-1}(y_1 | x) / pi_init(y_1 | x)]
                                     - beta log[pi_{t-1}(y_2 | x) / pi_init(y_2 | x)])          (7)
    (y_w, y_l) = (y_1, y_2) if p_{t-1}(y_1 > y_2 | x) > 0.5 else (y_2, y_1)                     (8)

The reference is the fixed pi_init here, and pi_{t-1} in 04_refined_dpo.py: they are easily confused.

Reads  responses_t.jsonl    what 02_generate.py writes; of more than two responses the best and the worst are paired
Writes preferences_t.jsonl  {"id": "12", "prompt": [...], "prompt_ids": [1, 733, ...],
                             "chosen": {"text", "ids", "finish"}, "rejected": {...}, "p": 0.73,
                             "logps": {"policy": [-21.5, -30.2], "ref": [-24.1, -27.7]}, "judge": "init"}
                             p is of y_1 over y_2 in the order they were sampled in, as are the log-probs (of all)

    python 03_judge.py --model pi_0 --init-model pi_init --input responses_1.jsonl --output preferences_1.jsonl
    torchrun --nproc-per-node 4 03_judge.py --model pi_0 --init-model pi_init --input ... --output ...

Departs from the paper: pairs that carry no preference (the same response twice, p = 0.5 exactly) are dropped.
"""

import math
import time

import torch

import common


def preference(logps_policy, logps_ref, beta):
    """Eq. 7 for one pair. Two summed log-probs (y_1, y_2) under each model -> p(y_1 > y_2 | x)"""
    log_ratio_1, log_ratio_2 = (policy - ref for policy, ref in zip(logps_policy, logps_ref))
    return sigmoid(beta * log_ratio_1 - beta * log_ratio_2)


def sigmoid(x):
    """Without overflow at either end."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def best_and_worst(scores):
    """Indices (first, second), in the order of sampling, of the highest and the lowest score. For two: (0, 1)."""
    best = max(range(len(scores)), key=scores.__getitem__)
    worst = min(range(len(scores)), key=scores.__getitem__)
    return min(best, worst), max(best, worst)


def parse_args():
    parser = common.Parser(description="Label pairs of responses by the model's own implicit reward.")
    add = parser.add_argument
    # what is read and written
    add("--model", required=True, help="pi_{t-1}, which sampled the responses")
    add("--init-model", required=True, help="pi_init, the reference in Eq. 7")
    add("--input", required=True, help="responses of 02_generate.py")
    add("--output", required=True, help="D_t: JSON Lines of labelled pairs")
    # Section 5.1
    add("--beta", type=common.nonnegative, default=0.1, help="beta in Eq. 7: scales p, never the label")
    # memory
    add("--micro-batch-size", type=common.positive, default=16, help="prompts scored at a time by one rank")
    return parser.parse_args()


def score(name, rows, label, args, partial, ranks):
    """log pi(y | x) of every response of every row, by the model in the folder `name`: a list of lists."""
    model = common.load_model(name, ranks.device, common.scoring_dtype(ranks.device))
    for row in rows:
        for ids in [row["prompt_ids"]] + [y["ids"] for y in row["responses"]]:
            common.check_ids(args.input, row["id"], ids, model)
    response_logits = common.ResponseLogits(model)

    @torch.no_grad()
    def compute(indices):
        sequences = [(rows[i]["prompt_ids"], y["ids"]) for i in indices for y in rows[i]["responses"]]
        batch = common.collate(sequences, ranks.device)
        logps = iter(common.sequence_logps(response_logits(batch.ids, batch.keep), batch).tolist())
        return [[next(logps) for _ in rows[i]["responses"]] for i in indices]

    lengths = [len(row["prompt_ids"]) + max(len(y["ids"]) for y in row["responses"]) for row in rows]
    batches = common.length_batches(lengths, args.micro_batch_size)
    scored = common.map_batches(compute, batches, partial, ranks, label)
    return [scored[i] for i in range(len(rows))]


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "init_model", "input")
    ranks = common.start_ranks()
    rows = common.read_jsonl(args.input, {"id": common.an_id, "prompt": common.a_prompt,
                                          "prompt_ids": common.token_ids, "responses": common.responses})
    counts = {"prompts read": len(rows), "all responses the same": 0, "ties": 0}
    kept = [row for row in rows if any(y["ids"] != row["responses"][0]["ids"] for y in row["responses"])]
    counts["all responses the same"] = len(rows) - len(kept)
    common.check_same_vocabulary(args.model, args.init_model)

    logps_policy = score(args.model, kept, "scoring with pi_{t-1}", args, partial, ranks)
    logps_ref = score(args.init_model, kept, "scoring with pi_init", args, partial, ranks)

    if ranks.rank == 0:
        preferences = []
        for row, policy, ref in zip(kept, logps_policy, logps_ref):
            if not all(map(math.isfinite, policy + ref)):
                raise common.InputError(f"{args.input}, id {row['id']}: a log-prob is not finite ({policy}, {ref}): "
                                        "remove the row, or look at the models")
            one, two = best_and_worst([a - b for a, b in zip(policy, ref)])
            p = preference([policy[one], policy[two]], [ref[one], ref[two]], args.beta)
            if p == 0.5:
                counts["ties"] += 1
                continue
            chosen, rejected = (one, two) if p > 0.5 else (two, one)  # Eq. 8
            preferences.append({"id": row["id"], "prompt": row["prompt"], "prompt_ids": row["prompt_ids"],
                                "chosen": row["responses"][chosen], "rejected": row["responses"][rejected], "p": p,
                                "logps": {"policy": policy, "ref": ref}, "judge": "init"})
        if not preferences:
            raise common.InputError(f"{args.input}: no pair carries a preference ({counts}): is --model "
                                    "still the same as --init-model?")
        counts["pairs"] = len(preferences)
        counts["first chosen"] = sum(row["p"] > 0.5 for row in preferences)
        common.write_jsonl(partial / "preferences", preferences)
        common.close_output(args, partial, partial / "preferences", counts, started)
    common.barrier()


if __name__ == "__main__":
    common.run(main)
