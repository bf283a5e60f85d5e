"""Log-probs of responses, against the model's own logits and torch's cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config,
                          PhiConfig, Qwen2Config)

import common

SHAPE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),  # shorter than the sequences
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)}
SEQUENCES = [([5, 6, 7], [8, 9, 10, 11, 2]), ([3], [4]), ([12, 13, 14, 15, 16, 17], [18, 19, 2]), ([5, 6], [7, 7, 7, 2])]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()


@torch.no_grad()
def logps(model, sequences):
    """As 01, 03 and 04 compute them."""
    batch = common.collate(sequences, "cpu")
    logits = common.ResponseLogits(model)(batch.ids, batch.keep)
    return common.response_logps(common.token_logps(logits, batch.labels), batch.lengths)


@torch.no_grad()
def cross_entropy(model, prompt, response):
    """Of the sequence alone, without padding, through the model's own head: summed over the response."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    labels = torch.tensor([-100] * len(prompt) + response)
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def test_a_response_logp_is_minus_the_summed_cross_entropy(model):
    expected = torch.stack([-cross_entropy(model, x, y) for x, y in SEQUENCES])
    torch.testing.assert_close(logps(model, SEQUENCES), expected, rtol=1e-5, atol=1e-4)


def test_padding_changes_nothing(model):
    alone = torch.cat([logps(model, [sequence]) for sequence in SEQUENCES])
    torch.testing.assert_close(logps(model, SEQUENCES), alone, rtol=1e-5, atol=1e-4)
    long = ([5] * 20, [6] * 20)
    torch.testing.assert_close(logps(model, SEQUENCES + [long])[:-1], alone, rtol=1e-5, atol=1e-4)


def test_the_order_of_a_batch_changes_nothing(model):
    order = [2, 0, 3, 1]
    torch.testing.assert_close(logps(model, [SEQUENCES[i] for i in order]), logps(model, SEQUENCES)[order],
                               rtol=1e-5, atol=1e-4)


def test_a_cut_response_keeps_the_logps_of_its_first_tokens(model):
    prompt, response = SEQUENCES[0]
    batch = common.collate([(prompt, response)], "cpu")
    with torch.no_grad():
        logp = common.token_logps(common.ResponseLogits(model)(batch.ids, batch.keep), batch.labels)
    for length in range(1, len(response) + 1):
        torch.testing.assert_close(logps(model, [(prompt, response[:length])])[0], logp[:length].sum(),
                                   rtol=1e-5, atol=1e-4)


def test_token_logps_by_hand():
    # softmax of (0, ln 3) = (1/4, 3/4), of (0, 0) = (1/2, 1/2)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = torch.tensor([0.75, 0.5]).log()
    torch.testing.assert_close(common.token_logps(logits, torch.tensor([1, 0])), expected)
    # one response of both tokens: ln 3/8; two of one token each: ln 3/4, ln 1/2
    torch.testing.assert_close(common.response_logps(expected, [2]), torch.tensor([math.log(3 / 8)]))
    torch.testing.assert_close(common.response_logps(expected, [1, 1]), expected)


def test_logits_of_a_bf16_model_are_summed_in_float32():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval().to(torch.bfloat16)
    batch = common.collate([([5], list(range(6, 36)))], "cpu")
    with torch.no_grad():
        logits = common.ResponseLogits(model)(batch.ids, batch.keep)
    assert logits.dtype == torch.float32
    exact = logits.double().log_softmax(-1).gather(-1, batch.labels[:, None]).sum().item()
    [logps] = common.response_logps(common.token_logps(logits, batch.labels), batch.lengths).tolist()
    assert logps == pytest.approx(exact, abs=1e-3)


def test_gradients_are_those_of_the_cross_entropy(model):
    batch = common.collate(SEQUENCES, "cpu")
    logits = common.ResponseLogits(model)(batch.ids, batch.keep)
    common.response_logps(common.token_logps(logits, batch.labels), batch.lengths).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.enable_grad():
        for x, y in SEQUENCES:
            logits = model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:-1]
            (-F.cross_entropy(logits, torch.tensor(y), reduction="sum")).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-3)
    model.zero_grad()


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    # Gemma 2 takes tanh of its logits after the head, which ResponseLogits does not
    torch.manual_seed(1)
    config = Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=5.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    with pytest.raises(common.InputError, match="not supported"):
        common.load_model(str(tmp_path / "gemma"), torch.device("cpu"))


def test_dropout_is_zero_in_a_loaded_model(tmp_path):
    # attention dropout is a number in the config, which eval() and train() do not reach
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_dropout=0.5)).save_pretrained(tmp_path / "model")
    model = common.load_model(str(tmp_path / "model"), torch.device("cpu")).train()
    one, two = (logps(model, SEQUENCES) for _ in range(2))
    assert torch.equal(one, two)


def test_a_checkpoint_in_bf16_is_trained_in_float32(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = common.load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
