"""SPA on one page. `python extras/plain_spa.py runs/world-seed0` prints its numbers beside those of a finished run.

One pair at a time, with full logits; the stages are tested against it. "Eq. N" is the paper's. A pair by hand, with
beta = 1 and two words, a and b, that have the same probabilities everywhere:

Judging. DPO has turned pi_init, (1/2, 1/2), into pi_{t-1}, (3/4, 1/4), which samples y_1 = "a a" and y_2 = "b".
    Eq. 4   what DPO made likelier has the higher reward: 2 ln(0.75 / 0.5) = 0.811 and ln(0.25 / 0.5) = -0.693
    Eq. 7   p(y_1 > y_2 | x) = sigmoid(0.811 + 0.693) = 0.818
    Eq. 8   0.818 > 0.5, so y_w = y_1 and y_l = y_2: a label, and no human has seen the pair
Training. pi_ref is pi_{t-1} now, not pi_init. pi_theta started there too, and has come to (0.8, 0.2).
    Eq. 5   margin = 2 ln(0.8 / 0.75) - ln(0.2 / 0.25) = 0.352, p_theta(y_w > y_l | x) = sigmoid(0.352) = 0.587
    Eq. 6   loss = -ln p_theta = 0.532; its derivative by the margin is p_theta - 1 = -0.413
Refining. A label may be wrong if even pi_theta~, further on the way from pi_ref through pi_theta, doubts it.
    Eq. 12  lambda = 1/2: logits 1.5 ln(0.8 / 0.2) - 0.5 ln(0.75 / 0.25) = 1.530 apart, so pi_theta~ is (0.822, 0.178)
    Eq. 11  its margin is 0.523, its p 0.628. If tau is 0.65, the pair is one of the K % least confident: z = 1
    Eq. 10  alpha = 0.1: loss 0.568, derivative p_theta - 0.9 = -0.313: label smoothing (cDPO), of flagged pairs alone

Why Eq. 12 is of token logits: extrapolating summed log-probs would multiply every margin by 1 + lambda (0.528 here), so
keep their order, and so practically flag those of Eq. 9. What Eq. 12 adds comes from each token's softmax alone.
"""

import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import records, runs


def log_prob(pi, x, y):
    """log pi(y | x), summed over the tokens of y. pi: from ids (1, T) to .logits (1, T, V); x, y: lists of ids"""
    logits = pi(torch.tensor([[*x, *y]])).logits[0, len(x) - 1:-1]  # (tokens of y, V): those before each
    return -F.cross_entropy(logits, torch.tensor([*y]), reduction="sum")


@torch.no_grad()
def sample(pi, x, eos, generator, temperature=0.7, max_new_tokens=300):
    """y ~ pi(. | x), until a token is in eos."""
    y = []
    while len(y) < max_new_tokens and not (y and y[-1] in eos):
        p = (pi(torch.tensor([[*x, *y]])).logits[0, -1] / temperature).softmax(-1)
        y.append(torch.multinomial(p, 1, generator=generator).item())
    return y


def reward(pi, pi_ref, x, y, beta):
    """Eq. 4, without beta log Z(x): it is the same for all y, and cancels in Eq. 5 and 7."""
    return beta * (log_prob(pi, x, y) - log_prob(pi_ref, x, y).detach())


@torch.no_grad()
def preference(pi, pi_ref, x, y_1, y_2, beta):
    """p(y_1 > y_2 | x): Eq. 7 of pi_{t-1} and pi_init, Eq. 5 of pi_theta and pi_{t-1}."""
    return torch.sigmoid(reward(pi, pi_ref, x, y_1, beta) - reward(pi, pi_ref, x, y_2, beta)).item()


def extrapolate(pi_theta, pi_ref, lam):
    """pi_theta~, a language model like any other, whose token logits are those of Eq. 12."""
    return lambda ids: SimpleNamespace(logits=(1 + lam) * pi_theta(ids).logits - lam * pi_ref(ids).logits)


def train(pi_theta, pi_ref, pairs, refine, lam=0.5, alpha=0.1, k_percent=10, beta=0.1, lr=5e-7, epochs=1, batch_size=32,
          window=50, refine_after=0.2, seed=0, log=print):
    """DPO of pi_theta on pairs (x, y_w, y_l): Eq. 6 or, with refine, Eq. 10. log is called with each step's metrics."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(pairs)) for _ in range(epochs)]
    steps = [order[i:i + batch_size] for order in orders for i in range(0, len(pairs), batch_size)]
    optimizer = torch.optim.AdamW(pi_theta.parameters(), lr=lr, weight_decay=0.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, -(-len(steps) // 10), len(steps))
    pi_tilde = extrapolate(pi_theta, pi_ref, lam)
    confidences = []  # of every pair so far
    for step, batch in enumerate(steps):
        tau = 0.0  # no p is below it; in the first step pi_theta is pi_ref, and every p is 0.5
        if refine and step >= refine_after * len(steps) and len(confidences) >= window:
            # Weibull's: a new value is below the k-th smallest of n with probability k / (n + 1), so K % are flagged
            tau = float(np.percentile(confidences[-window:], k_percent, method="weibull"))
        rows = []
        for x, y_w, y_l in (pairs[i] for i in batch):
            margin = reward(pi_theta, pi_ref, x, y_w, beta) - reward(pi_theta, pi_ref, x, y_l, beta)  # of Eq. 5
            # these passes repeat those of the margin, to be plain: 04 takes the logits from there
            confidence = preference(pi_tilde, pi_ref, x, y_w, y_l, beta) if refine else torch.sigmoid(margin).item()
            z = float(confidence < tau)                                           # Eq. 11; Eq. 9 where lambda = 0
            loss = -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))  # Eq. 10
            (loss / len(batch)).backward()
            rows.append({"loss": loss.item(), "rewards/margins": margin.item(), "confidence": confidence, "flagged": z})
        confidences += [row["confidence"] for row in rows]
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        grad_norm = torch.nn.utils.clip_grad_norm_(pi_theta.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        log({"step": step + 1, **mean, "tau": tau, "grad_norm": grad_norm, "learning_rate": scheduler.get_last_lr()[0]})
        scheduler.step()


def spa(pi_init, D_0, X, eos, **options):
    """Algorithm 1 -> pi_T. D_0: labelled pairs; X: lists X_1, X_2, X_3 of new prompts; options: of `train`"""
    generator, pi = torch.Generator().manual_seed(0), deepcopy(pi_init)
    train(pi, pi_init, D_0, refine=False, epochs=3, **options)         # 01: pi_0 by DPO with pi_init and D_0 (Eq. 6)
    for X_t, lam in zip(X, [1 / 2, 1 / 4, 1 / 8]):                     # for t = 1 to T do
        D_t = []                                                       #     synthesize D_t with pi_{t-1} and X_t
        for x in X_t:
            y_1, y_2 = sample(pi, x, eos, generator), sample(pi, x, eos, generator)                      # 02
            p = preference(pi, pi_init, x, y_1, y_2, beta=0.1)         # 03: Eq. 7; for any beta the same label
            D_t.append((x, y_1, y_2) if p > 0.5 else (x, y_2, y_1))    #     Eq. 8
        pi_theta, pi_ref = deepcopy(pi), pi                            # 04: pi_theta, pi_ref <- pi_{t-1}
        train(pi_theta, pi_ref, D_t, refine=True, lam=lam, **options)  #     the inner loop (Eq. 10 to 12)
        pi = pi_theta                                                  #     pi_t
    return pi


def main():
    def load(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False,
                                                                 use_safetensors=True)  # in eval mode: no dropout
    parser = runs.Parser(description="SPA on one page, beside the stages.")
    parser.add_argument("run", type=Path, help="folder of a finished run of the small world: runs/world-seed0")
    run = parser.parse_args().run
    rows = records.read_jsonl(run / "preferences_1.jsonl", records.PREFERENCES)[:48]
    if rows[0].get("judge") != "init" or not all((run / name).is_dir() for name in ("pi_init", "pi_0")):
        raise runs.InputError(f"{run}: has no pi_init, no pi_0, or another judge: give a run of the small world")
    transformers.utils.logging.disable_progress_bar()
    pi_init, pi_0, pi_theta = (load(run / name) for name in ("pi_init", "pi_0", "pi_0"))
    pairs = [(row["prompt_ids"], row["chosen"]["ids"], row["rejected"]["ids"]) for row in rows]
    print("03_judge.py | here: log pi_0 of y_1 and of y_2, log pi_init of both, whether y_1 is y_w")
    for row, (x, y_w, y_l) in zip(rows[:20], pairs):
        y_1, y_2 = (y_w, y_l) if row["p"] > 0.5 else (y_l, y_w)
        ours = [log_prob(pi, x, y).item() for pi in (pi_0, pi_init) for y in (y_1, y_2)]
        print(row["id"], *(f"{a:.4f} | {b:.4f}  " for a, b in zip(row["logps"]["policy"] + row["logps"]["ref"], ours)),
              row["p"] > 0.5, "|", preference(pi_0, pi_init, x, y_1, y_2, beta=0.1) > 0.5)
    options = dict(beta=10, lr=2e-4, batch_size=6, window=12, k_percent=25)
    with tempfile.TemporaryDirectory() as folder:
        runs.write_jsonl(f"{folder}/pairs", rows)
        files = ["--model", run / "pi_0", "--input", f"{folder}/pairs", "--output", f"{folder}/pi_1"]
        words = [f"--{name}={value}".replace("_", "-") for name, value in options.items()]
        if subprocess.run([sys.executable, ROOT / "04_refined_dpo.py", *files, *words], stdout=subprocess.DEVNULL,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode:  # float32 on the CPU, as here
            sys.exit(2)  # it has said why
        theirs = [runs.parse_json(line, folder) for line in open(f"{folder}/pi_1/metrics.jsonl", encoding="utf-8")]
        pi_1 = load(f"{folder}/pi_1")
    ours = []
    train(pi_theta, pi_0, pairs, refine=True, **options, log=ours.append)
    print("04_refined_dpo.py | here: loss, confidence, tau, flagged")
    for one, two in zip(theirs, ours):
        print(*(f"{one[name]:.5f} | {two[name]:.5f}" for name in ("loss", "confidence", "tau", "flagged")), sep="   ")
    w, w_04, w_0 = (torch.cat([weight.flatten() for weight in pi.parameters()]) for pi in (pi_theta, pi_1, pi_0))
    print(f"weights differ by {(w - w_04).abs().max():.1e} at most; training moved them by {(w - w_0).abs().max():.1e}")


if __name__ == "__main__":
    runs.run(main)
