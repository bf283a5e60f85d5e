"""What the stages share: batches, log-probs, sampling, ranks, training. The plain form of it is extras/plain_spa.py.

    batches       collate: prompts and responses as one padded batch; length_batches
    log-probs     ResponseLogps: log pi(y_t | x, y_<t); response_logps: their sum log pi(y | x)
    faster        the same numbers sooner: prompts computed once, logits in chunks, log-probs in place
    sampling      uniforms, sample_token, sample_responses
    ranks         start_ranks, map_batches, map_rows, score: work shared by torchrun's processes
    training      make_policy, store_logps; epoch_batches, make_optimizer, micro_batches, what is logged

support/models.py loads models, support/data.py reads rows as token ids. "Eq. N" is the SPA paper's. Shapes: b pairs,
B sequences of T tokens, N response tokens in all of them, n of these in a chunk, hidden states of d, a vocabulary of V.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before init_process_group: its default arguments would capture the group and its threads
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import get_cosine_schedule_with_warmup

from support.runs import InputError, append_journal, progress, read_journal, torchrun_ranks

# ---------------------------------------------------------------------------------------------
# Batches

Batch = namedtuple("Batch", "ids positions mask logit_positions labels lengths")


def collate(rows, device, max_shared=0):
    """Prompts and their responses, [(prompt ids, [response ids, ...]), ...], as one Batch, padded on the right.

    A response follows its prompt in a sequence of its own. Of ([5, 6], [[7, 8, 9], [4, 3]]):

        ids        (B, T) int64       [[5, 6, 7, 8],      without the last token of a response, which predicts nothing
                                       [5, 6, 4, 0]]
        logit_positions  (N,) int64   [1, 2, 3, 5, 6]     where in ids, flattened, a response token is predicted
        labels     (N,) int64         [7, 8, 9, 4, 3]     what is predicted there
        lengths    list               [3, 2]              tokens of each response
        positions, mask               None                attention is causal, so no response token sees the padding

    Everything comes from lengths, never from `ids == pad`: an EOS that is also the padding keeps its label. Where no
    prompt + response is longer than max_shared, prompts with several responses are shared (`collate_shared`).
    """
    if any(len(ys) > 1 for _, ys in rows) and all(len(x) + len(y) <= max_shared for x, ys in rows for y in ys):
        return collate_shared(rows, device)
    sequences = [(x, y) for x, ys in rows for y in ys]
    ids, logit_positions = padded([[*x, *y[:-1]] for x, y in sequences]), []
    for b, (x, y) in enumerate(sequences):
        first = b * ids.shape[1] + len(x) - 1  # the prompt's last token predicts the first of the response
        logit_positions += range(first, first + len(y))
    labels = torch.tensor([i for _, y in sequences for i in y])
    return Batch(ids.to(device), None, None, torch.tensor(logit_positions).to(device), labels.to(device),
                 [len(y) for _, y in sequences])


def padded(rows, fill=0, side="right"):
    """Lists of integers as a tensor (B, T), padded on that side."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill,
                                     padding_side=side)


def length_batches(lengths, size, tokens=None):
    """Batches of indices in order of length, each of at most `size`, and of at most `tokens` tokens with the padding.

    They depend on the input alone, not on the number of ranks.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not batches or len(batches[-1]) == size
        if full or tokens and (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


# ---------------------------------------------------------------------------------------------
# Log-probs


class ResponseLogps(nn.Module):
    """Wraps a causal language model; forward() returns the log-probs of response tokens. DDP and FSDP wrap this."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def hidden(self, batch):
        """[hidden states (N, d) that predict the response tokens, the head's weight (V, d), its bias (V,) or None]"""
        states = self.model.base_model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask,
                                       use_cache=False).last_hidden_state  # (B, T, d)
        head = self.model.get_output_embeddings()
        values = [states.flatten(0, 1)[batch.logit_positions], head.weight, head.bias]
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            values = [value if value is None else value.to(dtype) for value in values]
        return values

    def forward(self, batch, ref=None, extrapolate=None):
        """log pi(y_t | x, y_<t) of each response token, (N,).

        With ref, a second ResponseLogps, and extrapolate, a function of both models' token logits (n, V), three such:
        those of this model, of ref and of extrapolate(logits_theta, logits_ref), the last two without a gradient.
        """
        hidden, *head = self.hidden(batch)
        if ref is None:
            def label_logps(hidden, labels):  # (n, d), (n,) -> (n,)
                return LabelLogps.apply(F.linear(hidden, *head).float(), labels)
            return in_chunks(label_logps, chunk_rows(head[0]), hidden, batch.labels)

        with torch.no_grad():
            hidden_ref, *head_ref = ref.hidden(batch)

        def three_logps(hidden, hidden_ref, labels):  # (n, d), (n, d), (n,) -> (3, n)
            logits_theta = F.linear(hidden, *head).float()
            with torch.no_grad():
                logits_ref = F.linear(hidden_ref, *head_ref).float()
                logits_tilde = extrapolate(logits_theta, logits_ref)  # before LabelLogps overwrites the two
                no_gradient = [LabelLogps.apply(logits, labels) for logits in (logits_ref, logits_tilde)]
            return torch.stack([LabelLogps.apply(logits_theta, labels), *no_gradient])

        logp_theta, *others = in_chunks(three_logps, chunk_rows(head[0]), hidden, hidden_ref, batch.labels)
        return logp_theta.clone(), *(logp.detach() for logp in others)  # FSDP warns of an output that is a view


def response_logps(logp, lengths):
    """log pi(y | x): the sum over each response's tokens, not their mean. logp (N,), lengths of B responses -> (B,)"""
    return torch.stack([tokens.sum() for tokens in logp.split(lengths)])


def autocast(device):
    """Compute in bf16 on a GPU, in float32 on a CPU. Weights are float32 on both."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def scoring_dtype(device):
    """What 02 and 03 hold a model in: the dtype in which a policy computes."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------------
# Faster: the same numbers sooner. tests/method/test_logps.py shows each equal to the plain page. A first reader skips
# them: ResponseLogps could also be -F.cross_entropy(F.linear(hidden, *head).float(), labels, reduction="none").


def collate_shared(rows, device):
    """The Batch of `collate`, with each prompt computed once for all its responses: a sixth of a DPO step is saved.

    Of ([5, 6], [[7, 8, 9], [4, 3]]), which has the labels and lengths that it has there:

        ids        (B, T) int64       [[5, 6, 7, 8, 4]]
        positions  (B, T) int64       [[0, 1, 2, 3, 2]]   each response directly follows the prompt
        mask       (B, 1, T, T) bool                      and sees no other response
        logit_positions  (N,) int64   [1, 2, 3, 1, 4]
    """
    ids = padded([[*x, *(i for y in ys for i in y[:-1])] for x, ys in rows])
    positions = padded([[*range(len(x)), *(len(x) + i for y in ys for i in range(len(y) - 1))] for x, ys in rows])
    # 0 for the prompt, k for its k-th response, -1 for the padding
    segment = padded([[0] * len(x) + [k for k, y in enumerate(ys, 1) for _ in y[:-1]] for x, ys in rows], fill=-1)
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = (seen & (positions[:, None, :] <= positions[:, :, None]))[:, None]
    logit_positions = []
    for b, (x, ys) in enumerate(rows):
        last, end = b * ids.shape[1] + len(x) - 1, b * ids.shape[1] + len(x)
        for y in ys:
            start, end = end, end + len(y) - 1
            logit_positions += [last, *range(start, end)]
    labels = [i for _, ys in rows for y in ys for i in y]
    ids, positions, mask, logit_positions, labels = (torch.as_tensor(values).to(device) for values in (
        ids, positions, mask, logit_positions, labels))
    return Batch(ids, positions, mask, logit_positions, labels, [len(y) for _, ys in rows for y in ys])


def in_chunks(compute, size, *inputs):
    """compute(*inputs), `size` of their N rows at a time, so that the full logits (N, V) are never in memory.

    Of several chunks, each one's logits are computed again in the backward pass. compute: tensors (n, ...) -> (..., n)
    """
    chunks = list(zip(*(values.split(size) for values in inputs)))
    if len(chunks) == 1:
        return compute(*chunks[0])
    return torch.cat([checkpoint(compute, *chunk, use_reentrant=False) for chunk in chunks], -1)


def chunk_rows(weight):
    """Tokens whose logits are in memory at a time: 1 GB of them on a GPU, 128 MB on a CPU. weight: (V, d)"""
    return max(1, (2 ** 28 if weight.is_cuda else 2 ** 25) // len(weight))


class LabelLogps(torch.autograd.Function):
    """-F.cross_entropy(logits, labels, reduction="none"), in place: (n, V) float32, (n,) -> (n,). It overwrites logits.

    A tenth of a DPO step is saved on a CPU: allocating a second (n, V), as cross_entropy does, costs more than the
    arithmetic. float32, since in bf16 the log-probs of a response err by nats.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        label_logits = logits.gather(1, labels[:, None])
        highest = logits.amax(1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(1, keepdim=True)  # logits now hold exp(logits - highest)
        ctx.save_for_backward(logits, total, labels)
        return label_logits[:, 0] - highest[:, 0] - total.log()[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exp, total, labels = ctx.saved_tensors
        # the gradient of a log-prob by the logits is the one-hot label less the softmax
        return exp.mul_(-grad[:, None] / total).scatter_add_(1, labels[:, None], grad[:, None]), None


# ---------------------------------------------------------------------------------------------
# Sampling


def uniforms(seed, key, sample, steps):
    """Uniform numbers in [0, 1), one a token, from a generator whose key is a hash of (seed, prompt id, sample).

    So a response is the same in any batch, on any number of ranks and after resuming.
    """
    digest = hashlib.blake2b(json.dumps([seed, key, sample]).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest))).random(steps)


def sample_token(logits, u, temperature):
    """The token at which the cumulative distribution passes u, which has the probability p(token) for a uniform u.

    logits (B, V), u (B,) float64 in [0, 1) -> (B,)
    """
    if temperature < 1e-30:  # 0, or so small that logits / temperature would overflow
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_responses(model, prompts, u, temperature, max_new_tokens, eos):
    """[[(token ids, "eos" or "length") of each of n samples] of each of the B prompts].

    model: in eval mode; prompts: B lists of ids; u: (B, n, max_new_tokens), see `uniforms`; eos: ids that end a
    response. One prefill serves the n samples, and rows that have ended leave the batch.
    """
    device, n = model.device, u.shape[1]
    ids = padded(prompts, side="left").to(device)  # every row's next token is in the last column
    mask = padded([[1] * len(prompt) for prompt in prompts], side="left").to(device)
    u = torch.as_tensor(u, device=device).flatten(0, 1)
    eos = torch.tensor(eos, device=device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True, logits_to_keep=1)
    # transformers 5.24 renamed it
    names = [name for name in ("cache", "past_key_values", "cache_params") if out.get(name) is not None]
    if not names:
        raise ValueError("it gives no cache to sample with")
    [name, *_] = names
    cache, logits = out[name], out.logits[:, -1].repeat_interleave(n, 0)
    cache.reorder_cache(torch.arange(len(u), device=device) // n)  # row i of the cache becomes rows n i ... n i + n - 1
    mask = mask.repeat_interleave(n, 0)
    tokens = torch.full((len(u), max_new_tokens), -1, device=device)
    rows = torch.arange(len(u), device=device)  # those that have not ended
    for step in range(max_new_tokens):
        token = sample_token(logits, u[rows, step], temperature)
        tokens[rows, step] = token
        active = ~torch.isin(token, eos)
        if step + 1 == max_new_tokens or not active.any():
            break
        if not active.all():
            cache.reorder_cache(active.nonzero()[:, 0])
            rows, token, mask = rows[active], token[active], mask[active]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
                       use_cache=True, **{name: cache}).logits[:, -1]
    sampled = [[i for i in row if i >= 0] for row in tokens.tolist()]
    finished = [(ids, "eos" if ids[-1] in eos.tolist() else "length") for ids in sampled]
    return [finished[b:b + n] for b in range(0, len(finished), n)]


# ---------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process's rank (0 of 1 without torchrun) and its device."""
    rank: int
    world: int
    device: torch.device

    def gather(self, rows):
        """The lists of all ranks as one list, in the order of the ranks. Waits for all of them."""
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def on_first(self, finish):
        """Rank 0 calls finish(), the others wait; its error is raised on every rank."""
        errors = []
        if self.rank == 0:
            try:
                finish()
            except (InputError, OSError) as error:
                errors = [error]
        for error in self.gather(errors):
            raise error


def start_ranks():
    """Join torchrun's other processes, after `open_output`: rank 0 has then made the folder to work in."""
    rank, world, local_rank = torchrun_ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1), torch.cuda.device_count()
        if processes > gpus:
            raise InputError(f"{processes} processes on a machine where CUDA finds {gpus} GPUs: start one for each GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by the command before, of 05_eval.py --then
        dist.barrier()
    elif world > 1:  # a long timeout: saving a large model takes rank 0 long, and torchrun notices a rank that dies
        on_gpu = dict(device_id=device) if device.type == "cuda" else {}
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1), **on_gpu)
    return Ranks(rank, world, device)


def map_batches(compute, batches, work, ranks, label):
    """{i: compute's result for i}, with batches (lists of i) shared among the ranks, in turn.

    compute: list of i -> list of results (JSON). Finished batches are recorded in `work`: when the stage is started
    again, on any number of ranks and with batches of any size, what they have of these i is read instead of computed.
    """
    def recorded():
        return {i: result for batch, results in read_journal(work, label) for i, result in zip(batch, results)}

    done = recorded()
    mine = [[i for i in batch if i not in done] for batch in batches[ranks.rank::ranks.world]]
    for batch in progress([batch for batch in mine if batch], label, ranks):
        append_journal([batch, compute(batch)], work, label, ranks.rank)
    ranks.gather([])  # wait until all are done
    done = recorded()
    ranks.gather([])  # before any rank may remove the folder
    return {i: done[i] for batch in batches for i in batch}


def map_rows(compute, rows, size, work, ranks, label, tokens=None):
    """compute's result for each row, in order, computed in batches of rows of similar length (see `length_batches`).

    compute: list of rows -> list of results (JSON); a row has "prompt_ids" and perhaps "responses" with "ids"
    """
    lengths = [len(row["prompt_ids"]) + sum(len(y["ids"]) for y in row.get("responses", [])) for row in rows]
    batches = length_batches(lengths, size, tokens)
    results = map_batches(lambda batch: compute([rows[i] for i in batch]), batches, work, ranks, label)
    return [results[i] for i in range(len(rows))]


IMPROBABLE = math.log(1e-4)  # a token with a lower log-prob under pi_init is counted as improbable


def score(policy, rows, size, work, ranks, label, tokens=None):
    """For each row ([log pi(y | x) of each response], [improbable tokens of each]). policy: a ResponseLogps

    rows, size, tokens: as for `map_rows`
    """
    @torch.no_grad()
    def compute(batch_rows):
        batch = collate([(row["prompt_ids"], [y["ids"] for y in row["responses"]]) for row in batch_rows],
                        ranks.device, policy.model.max_shared_length)
        with autocast(ranks.device):
            logp = policy(batch)  # (N,)
        columns = (logp, (logp < IMPROBABLE).int())
        scores = [iter(response_logps(values, batch.lengths).tolist()) for values in columns]
        return [[list(itertools.islice(values, len(row["responses"]))) for values in scores] for row in batch_rows]

    return map_rows(compute, rows, size, work, ranks, label, tokens)


# ---------------------------------------------------------------------------------------------
# Training: the model and its data


def is_sharded(args, ranks):
    return args.fsdp and ranks.world > 1


def make_policy(model, args, ranks):
    """What the training loop calls: the model in train mode as a ResponseLogps, under DDP or FSDP on several ranks."""
    model.train()
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    policy = ResponseLogps(model)
    if is_sharded(args, ranks):
        return shard(policy, ranks)
    return nn.parallel.DistributedDataParallel(policy, gradient_as_bucket_view=True) if ranks.world > 1 else policy


def shard(module, ranks, method="forward"):
    """FSDP2: each rank holds its part of every weight, and gathers a layer when it is computed, in bf16 on a GPU.

    method: the method of the module that is called from outside
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # takes seconds
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,))
    dtypes = MixedPrecisionPolicy(param_dtype=scoring_dtype(ranks.device), reduce_dtype=torch.float32)
    for layer in list(module.modules()):
        if type(layer).__name__ in module.model._no_split_modules:
            fully_shard(layer, mesh=mesh, mp_policy=dtypes)
    fully_shard(module, mesh=mesh, mp_policy=dtypes, reshard_after_forward=False)
    if method != "forward":
        register_fsdp_forward_method(module, method)
    return module


def store_logps(ref, pairs, args, work, ranks):
    """Set pair["logps_ref"], the log-probs of y_w and y_l under pi_ref: it is fixed, so once is enough."""
    rows = [{"prompt_ids": pair["prompt"], "responses": [{"ids": pair["chosen"]}, {"ids": pair["rejected"]}]}
            for pair in pairs]
    scores = score(ref, rows, args.micro_batch_size, work, ranks, "scoring with pi_ref", args.micro_batch_tokens)
    for pair, (logps, _) in zip(pairs, scores):
        pair["logps_ref"] = logps


def collate_pairs(pairs, model):
    """(Batch with y_w and y_l of each pair in turn, their log-probs under pi_ref (b, 2), zeros if not stored)"""
    rows = [(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs]
    logps_ref = torch.tensor([pair.get("logps_ref") or [0.0, 0.0] for pair in pairs], device=model.device)
    return collate(rows, model.device, model.max_shared_length), logps_ref


# ---------------------------------------------------------------------------------------------
# Training: the steps


def epoch_batches(count, batch_size, epochs, seed, path="the input"):
    """Indices of each optimizer step: every epoch visits each of `count` rows once, in an order of its own."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(count).tolist() for _ in range(epochs)]
    batches = [order[i:i + batch_size] for order in orders for i in range(0, count, batch_size)]
    if len(batches) == 1:
        raise InputError(f"{path}: its {count} rows make a single optimizer step, at the learning rate 0 where the "
                         "warm-up starts: lower --batch-size or raise --epochs")
    return batches


def make_optimizer(model, lr, steps):
    """AdamW without weight decay; the rate rises from 0 over 10 % of the steps, then falls as a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, -(-steps // 10), steps)


def micro_batches(rows, args, ranks):
    """This rank's [(rows, weight)] of an optimizer step: what it computes at a time, rows of similar length together.

    weight * losses.sum() / (rows of the step), summed over micro-batches and averaged over ranks, is the mean loss.
    weight is the number of ranks, by which DDP and FSDP divide where they average; or 0 for the first micro-batch once
    more, where there are none left for a rank: every rank has to take part in every forward and backward pass.
    Every rank gets its share (32 rows, 4 ranks: 8 each), even where one could hold all.
    """
    per_rank = math.ceil(len(rows) / ranks.world)
    size = math.ceil(per_rank / math.ceil(per_rank / args.micro_batch_size))
    batches = length_batches([row_length(row) for row in rows], size, args.micro_batch_tokens)
    weighted = [(batch, ranks.world) for batch in batches] + [(batches[0], 0)] * (-len(batches) % ranks.world)
    return [([rows[i] for i in batch], weight) for batch, weight in weighted[ranks.rank::ranks.world]]


def row_length(row):
    """Tokens of a pair, or of an example of 00_sft.py."""
    return sum(len(row[key]) for key in ("prompt", "chosen", "rejected", "response") if key in row)


def grad_sync(policy, last):
    """DDP averages the gradients over the ranks in the last micro-batch of a step only, FSDP in each."""
    return policy.no_sync() if hasattr(policy, "no_sync") and not last else contextlib.nullcontext()


def pair_metrics(losses, margin, logps_theta, logps_ref, beta):
    """{name: (b,)} to log, with TRL's names. At the first step, where pi_theta is pi_ref, margins are rounding errors.

    logps_theta, logps_ref: (b, 2), of y_w and y_l
    """
    rewards = beta * (logps_theta - logps_ref)  # (b, 2)
    return {"loss": losses, "rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1],
            "rewards/margins": margin, "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": logps_theta[:, 0], "logps/rejected": logps_theta[:, 1]}


def per_row(rows, logged, weight):
    """[{"id", name: value}] of the b rows of a micro-batch; none if its weight is 0. logged: {name: (b,)}"""
    columns = [values.detach().tolist() for values in logged.values()]
    return [{"id": row["id"], **dict(zip(logged, values))} for row, *values in zip(rows, *columns) if weight]


def clip_gradient(model):
    """Clip to norm 1.0; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # a DTensor where it is sharded
