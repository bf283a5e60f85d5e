"""PairRM, the external reward model of Tables 2 and 7: --judge pairrm of 03_judge.py.

It reads a prompt and both responses at once, as the llm-blender package (0.0.2) does, whose code is not run:

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> y_1 [SEP] [CLS] <|candidate2|> y_2 [SEP]
    logit(y_1, y_2) = mean over tasks of head([s; c_1]) - head([s; c_2]),    s, c_1, c_2: encoded prefix tokens
    p(y_1 > y_2 | x) = sigmoid((logit(y_1, y_2) - logit(y_2, y_1)) / 2)

The prompt is cut to 1,224 tokens, each response to half of what is left of 2,048. Of several turns the prompt is the
conversation so far, as one text. The package writes earlier answers into the candidates, but here both have the same.
"""

import itertools

import torch
from torch import nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel, PreTrainedTokenizerFast

import common
from support import chat, models, records, runs

PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")  # fields of its config


class PairRM(DebertaV2PreTrainedModel):
    """The encoder and the head, under the names that the published weights have."""

    def __init__(self, config):
        super().__init__(config)
        self.pretrained_model, d = DebertaV2Model(config), config.hidden_size
        self.head_layer = nn.Sequential(nn.Identity(), nn.Linear(2 * d, d), nn.Tanh(),  # Identity: dropout in training
                                        nn.Identity(), nn.Linear(d, config.n_tasks))
        self.post_init()

    def forward(self, rows):
        """Lists of ids, each with the three prefix tokens once -> (B,): logits that the first response is better."""
        ids, mask = (common.padded(part).to(self.device) for part in (rows, [[1] * len(row) for row in rows]))
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, d)
        s, *c = (hidden[ids == getattr(self.config, prefix)] for prefix in PREFIXES)          # (B, d) each
        score_1, score_2 = (self.head_layer(torch.cat([s, c_k], 1)) for c_k in c)             # (B, tasks)
        return (score_1 - score_2).mean(1)


def load_pairrm(name, device):
    """(the model in float32, read: (prompt, y_1, y_2) -> the ids in which it reads them)"""
    config = models.load_config(name)
    # AutoTokenizer would replace the normalizer of tokenizer.json
    tokenizer = models.from_pretrained(PreTrainedTokenizerFast, name, "a tokenizer")
    added = tokenizer.added_tokens_decoder
    known = all(getattr(config, prefix, None) in list(added) for prefix in PREFIXES)
    if not known or len(tokenizer) > config.vocab_size:
        raise runs.InputError(f"{name}: is not PairRM: {', '.join(PREFIXES)} of its config must be added tokens of its "
                              "tokenizer, and its vocabulary the model's: give llm-blender/PairRM-hf")
    model = models.load_weights(PairRM, name, "PairRM", config=config, dtype=torch.float32)
    tokenizer.extra_special_tokens = [token.content for token in added.values()]  # so that no text can spell one
    _, names, encoder = chat.special_tokens(tokenizer)
    source, *candidates = (names[added[getattr(config, prefix)].content] for prefix in PREFIXES)

    def read(prompt, *responses):
        encoder.enable_truncation(1224)
        ids = encoder.encode(source + prompt).ids
        encoder.enable_truncation((2048 - len(ids)) // 2)
        return sum((encoder.encode(prefix + text).ids for prefix, text in zip(candidates, responses)), ids)

    return model.to(device).eval(), read


def judge_pairrm(rows, args, work, ranks):
    """A judge of judges.py. Of more than two responses each is compared with every other, see `rewards`."""
    model, read = load_pairrm(args.reward_model, ranks.device)

    def pairs(row):
        return itertools.permutations(range(len(row["responses"])), 2)

    @torch.no_grad()
    def compute(batch_rows):
        asked = [read(records.as_text(row["prompt"]), *(row["responses"][k]["text"] for k in pair))
                 for row in batch_rows for pair in pairs(row)]
        logits = torch.empty(len(asked))
        for batch in common.length_batches([len(ids) for ids in asked], len(asked), 2**13):  # attention holds (B, T, T)
            logits[batch] = model([asked[i] for i in batch]).cpu()
        logits = iter(logits.tolist())
        return [[[*pair, next(logits)] for pair in pairs(row)] for row in batch_rows]

    logits = common.map_rows(compute, rows, args.micro_batch_size, work, ranks, "comparing with PairRM")
    return ([rewards(len(row["responses"]), of_row) for row, of_row in zip(rows, logits, strict=True)],
            [{"logits": of_row} for of_row in logits])


def rewards(count, logits):
    """The mean logit of each response against all, itself (0) included: two rewards differ by the argument of p above.

    logits: [[first, second, logit], ...] for both orders of every pair
    """
    return [sum(logit if one == k else -logit for one, two, logit in logits if k in (one, two)) / (2 * count)
            for k in range(count)]
