"""The small world's external reward model: in the tables it has the place of PairRM, trained on much more gold data.

    L_R = E[-log sigmoid(r_phi(x, y_w) - r_phi(x, y_l))]                                        (2)

Starts from a language model with a new head of one output. What it writes is what `03_judge.py --judge reward` reads:
a sequence classifier with one label, to which prompt and response are shown by the chat template. One process.

Reads  all_gold.jsonl  {"id", "prompt", "chosen", "rejected"}
Writes a model folder with args.json, where "held-out accuracy" is that on the last tenth of the pairs

    python benchmarks/reward_model.py --model pi_init --input all_gold.jsonl --output reward_model
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def parse_args():
    parser = common.Parser(description="Train a reward model on preferences (Eq. 2).")
    add = parser.add_argument
    add("--model", required=True, help="the language model it starts from")
    add("--input", required=True, help="JSON Lines of id, prompt, chosen, rejected")
    add("--output", required=True, help="folder for the reward model")
    add("--tokenizer", help="folder or name of a tokenizer, where --model has none")
    add("--chat-template", help="file with a Jinja chat template, where the tokenizer has none")
    add("--lr", type=common.nonnegative, default=3e-4, help="peak learning rate")
    add("--epochs", type=common.positive, default=2)
    add("--batch-size", type=common.positive, default=32, help="pairs of one optimizer step")
    add("--seed", type=common.natural, default=0, help="decides the new head and the order of the pairs")
    return parser.parse_args()


def read_pairs(args, tokenizer):
    """[(ids of prompt and chosen, ids of prompt and rejected)] as the chat template writes them."""
    rows = common.stream_jsonl(args.input, {"id": common.an_id, "prompt": common.a_prompt, "chosen": common.a_text,
                                            "rejected": common.a_text})
    return [[tokenizer.apply_chat_template(row["prompt"] + [{"role": "assistant", "content": row[key]}],
                                           return_dict=False) for key in ("chosen", "rejected")] for row in rows]


def margins(model, pairs, device):
    """r(x, y_w) - r(x, y_l) of b pairs: one pass over 2b texts, padded on the right. -> (b,)"""
    texts = [pair[k] for k in (0, 1) for pair in pairs]
    width, pad = max(map(len, texts)), model.config.pad_token_id
    ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
    chosen, rejected = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().chunk(2)
    return chosen - rejected


def main():
    args, started = parse_args(), time.time()
    partial = common.open_output(args, "model", "input")
    device = common.start_ranks().device
    tokenizer = common.load_tokenizer(args)
    pairs = read_pairs(args, tokenizer)
    held_out, pairs = pairs[len(pairs) - len(pairs) // 10:], pairs[:len(pairs) - len(pairs) // 10]

    torch.manual_seed(args.seed)
    config = common.load_config(args.model)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(args.model, config=config, dtype=torch.float32,
                                                                use_safetensors=True, trust_remote_code=False)
    model = model.to(device).train()
    steps = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(steps))
    for batch in steps:
        loss = -F.logsigmoid(margins(model, [pairs[i] for i in batch], device)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

    model.eval()
    with torch.no_grad():
        right = [margin > 0 for k in range(0, len(held_out), 64)
                 for margin in margins(model, held_out[k:k + 64], device).tolist()]
    common.save_model(model, tokenizer, partial / "model")
    counts = {"pairs": len(pairs), "steps": len(steps), "last loss": round(loss.item(), 4),
              "held-out accuracy": round(sum(right) / max(1, len(right)), 4)}
    common.close_output(args, partial, partial / "model", counts, started)


if __name__ == "__main__":
    common.run(main)
