"""Hours of one iteration of SPA at Mistral-7B's size, computed, not measured: python benchmarks/hours.py

10,000 prompts of 200 tokens, two answers of 300 tokens (App. B.4), on cards of a stated peak and bandwidth:
    02  each token of a batch (32 prompts, two answers) reads all weights, in bf16, and the keys and values, at the
        card's full bandwidth
    03  two models read prompt and answers once: 2 operations a weight and token, at 40 % of the peak
    04  one epoch: 6 operations a weight and token, 2 for the checkpointed forward pass, 2 for pi_ref, at 40 % as well
What --fsdp sends between the cards, Python and the loading of models are not counted: a real run takes longer.
"""

WEIGHTS, LAYERS, KEYS_AND_VALUES = 7.24e9, 32, 2 * 8 * 128  # Mistral-7B; keys and values of a token in a layer
PROMPTS, PROMPT, ANSWER, BATCH, SHARE = 10_000, 200, 300, 32, 0.4
CARDS = {"four A6000 (48 GB)": (4, 155e12, 768e9), "one H100 (80 GB)": (1, 989e12, 3.35e12)}  # number, FLOP/s, bytes/s


def hours(number, peak, bandwidth):
    """(02, 03, 04) on `number` cards, each of `peak` operations in bf16 and `bandwidth` bytes a second."""
    context = PROMPT + ANSWER / 2  # tokens whose keys and values an average step reads
    step = 2 * (WEIGHTS + 2 * BATCH * context * LAYERS * KEYS_AND_VALUES) / bandwidth  # seconds, 2 bytes a number
    sampling = PROMPTS / BATCH / number * ANSWER * step
    work = PROMPTS * (PROMPT + 2 * ANSWER) * WEIGHTS / (number * SHARE * peak)  # seconds, of one operation each
    return [seconds / 3600 for seconds in (sampling, 2 * 2 * work, (6 + 2 + 2) * work)]


def main():
    print("| Computed hours, 10,000 prompts | 02 | 03 | 04 | together |\n|---|---|---|---|---|")
    for name, card in CARDS.items():
        parts = [round(part, 2) for part in hours(*card)]
        print(f"| {name} | " + " | ".join(f"{part:.2f}" for part in [*parts, sum(parts)]) + " |")
    print("| the paper, measured on four A6000 (App. B.4) | 1 to 2 | 1 to 2 | 1 to 2 | 5 to 6 |")


if __name__ == "__main__":
    main()
