"""The small world's external reward model: in the tables it takes PairRM's place, trained on much more gold data.

    L_R = E[-log sigmoid(r_phi(x, y_w) - r_phi(x, y_l))]                                        (2)

Starts from a language model with a new head of one output, and writes what `03_judge.py --judge reward` reads: a
sequence classifier with one label, which sees prompt and response as the chat template writes them. One process.

Reads  all_gold.jsonl  {"id", "prompt", "chosen", "rejected"}
Writes a model folder; "held-out accuracy" in its args.json is that on the last tenth of the pairs

    python benchmarks/reward_model.py --model pi_init --input all_gold.jsonl --output reward_model
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from support import chat, models, records, runs


def parse_args():
    parser = runs.Parser(description="Train a reward model on preferences (Eq. 2).")
    add = parser.add_argument
    add("--model", required=True, help="the language model it starts from")
    add("--input", required=True, help="JSON Lines of id, prompt, chosen, rejected")
    add("--output", required=True, help="folder for the reward model")
    add("--lr", type=runs.nonnegative, default=3e-4, help="peak learning rate")
    add("--epochs", type=runs.positive, default=2)
    add("--batch-size", type=runs.positive, default=32, help="pairs of one optimizer step")
    add("--seed", type=runs.natural, default=0, help="decides the new head and the order of the pairs")
    return parser.parse_args()


def read_pairs(path, tokenizer):
    """[(ids of prompt and chosen, ids of prompt and rejected)] as the chat template writes them."""
    def ids(messages, text):
        return chat.encode(tokenizer, chat.render(tokenizer, messages + [{"role": "assistant", "content": text}]))

    return [[ids(row["prompt"], row[key]) for key in ("chosen", "rejected")]
            for row in records.read_jsonl(path, records.LABELLED)]


def margins(model, pairs):
    """r(x, y_w) - r(x, y_l) of b pairs, (b,): one pass over 2b texts, padded on the right."""
    texts = [pair[k] for k in (0, 1) for pair in pairs]
    ids = common.padded(texts, model.config.pad_token_id).to(model.device)
    mask = common.padded([[1] * len(text) for text in texts]).to(model.device)
    chosen, rejected = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().chunk(2)
    return chosen - rejected


def load_classifier(name, tokenizer, seed):
    """The language model with a head of one output, whose weights follow the seed."""
    torch.manual_seed(seed)
    config = models.load_config(name)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    return AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=torch.float32,
                                                              use_safetensors=True, trust_remote_code=False)


def main():
    args = parse_args()
    work = runs.open_output(args, "model", "input")
    tokenizer = chat.load_tokenizer(args.model)
    pairs = read_pairs(args.input, tokenizer)
    pairs, held_out = pairs[:len(pairs) - len(pairs) // 10], pairs[len(pairs) - len(pairs) // 10:]
    model = load_classifier(args.model, tokenizer, args.seed).to(common.start_ranks().device).train()

    batches = common.epoch_batches(len(pairs), args.batch_size, args.epochs, args.seed)
    optimizer, scheduler = common.make_optimizer(model, args.lr, len(batches))
    for batch in batches:
        loss = -F.logsigmoid(margins(model, [pairs[i] for i in batch])).mean()  # Eq. 2
        optimizer.zero_grad()
        loss.backward()
        common.clip_gradient(model)
        optimizer.step()
        scheduler.step()

    model.eval()
    with torch.no_grad():
        right = [margin > 0 for k in range(0, len(held_out), 64)
                 for margin in margins(model, held_out[k:k + 64]).tolist()]
    models.save_model(model, tokenizer, work / "model")
    counts = {"pairs": len(pairs), "steps": len(batches), "last loss": round(loss.item(), 4),
              "held-out accuracy": round(sum(right) / max(1, len(right)), 4)}
    runs.close_output(args, work, work / "model", counts)


if __name__ == "__main__":
    runs.run(main)
