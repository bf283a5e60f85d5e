"""Log-probs of responses, against the model's own logits and torch's cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MambaConfig, MistralConfig,
                          Phi3Config, PhiConfig, Qwen2Config)

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
    """As 00_sft computes them."""
    batch = common.collate([(x, [y]) for x, y in sequences], "cpu")
    return common.response_logps(common.ResponseLogps(model)(batch), batch.lengths)


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
    with torch.no_grad():
        logp = common.ResponseLogps(model)(common.collate([(prompt, [response])], "cpu"))
    for length in range(1, len(response) + 1):
        torch.testing.assert_close(logps(model, [(prompt, response[:length])])[0], logp[:length].sum(),
                                   rtol=1e-5, atol=1e-4)


def test_token_logps_by_hand():
    # softmax of (0, ln 3) = (1/4, 3/4), of (0, 0) = (1/2, 1/2)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = torch.tensor([0.75, 0.5]).log()
    for shift in (0.0, 1e4, -1e4):  # exp(1e4) would overflow; 1e4 + ln 3 has 3 digits after the point
        changed = logits + shift
        logps, total = common.token_logps_in_place(changed, torch.tensor([1, 0]))
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-3 if shift else 1e-6)
        torch.testing.assert_close(changed / total, logits.softmax(-1), rtol=0, atol=1e-3 if shift else 1e-6)
    # one response of both tokens: ln 3/8; two of one token each: ln 3/4, ln 1/2
    torch.testing.assert_close(common.response_logps(expected, [2]), torch.tensor([math.log(3 / 8)]))
    torch.testing.assert_close(common.response_logps(expected, [1, 1]), expected)


ANSWERED = [([5, 6, 7], [[8, 9, 10, 11, 2], [4]]), ([3], [[4], [5, 6]]), ([12, 13, 14], [[9, 2], [9, 2]]),
            ([12, 13, 14, 15, 16, 17], [[18, 19, 2], [7, 7, 7, 2], [2]])]  # as 01, 03 and 04 have them


def test_a_prompt_is_computed_once_for_all_its_responses_where_that_is_exact(model, request):
    model.shared_span = common.shared_span(model)
    assert model.shared_span == (4 if "mistral" in request.node.name else math.inf)
    alone = logps(model, [(x, y) for x, ys in ANSWERED for y in ys])
    for rows in [ANSWERED] + [[row] for row in ANSWERED]:
        batch = common.collate(rows, "cpu", model.shared_span)
        shares = all(len(x) + len(y) <= model.shared_span for x, ys in rows for y in ys)
        assert len(batch.ids) == (len(rows) if shares else len(batch.lengths))
        with torch.no_grad():
            ours = common.response_logps(common.ResponseLogps(model)(batch), batch.lengths)
        start = sum(len(ys) for _, ys in ANSWERED[:ANSWERED.index(rows[0])])
        torch.testing.assert_close(ours, alone[start:start + len(ours)], rtol=1e-5, atol=1e-4)


def test_a_model_that_follows_no_mask_computes_each_sequence_alone():
    # a recurrence runs from one response into the next, whatever the mask says
    torch.manual_seed(1)
    config = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert common.shared_span(model) == 0
    expected = torch.stack([-cross_entropy(model, x, y) for x, y in SEQUENCES])
    torch.testing.assert_close(logps(model, SEQUENCES), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_size_of_a_chunk_changes_nothing(model, rows, monkeypatch):
    monkeypatch.setattr(common, "chunk_rows", lambda weight: rows)
    test_a_response_logp_is_minus_the_summed_cross_entropy(model)
    test_gradients_are_those_of_the_cross_entropy(model)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_two_models_and_the_mix_of_their_logits(rows, monkeypatch):
    monkeypatch.setattr(common, "chunk_rows", lambda weight: rows)
    torch.manual_seed(1)
    theta, ref = (AutoModelForCausalLM.from_config(FAMILIES["phi"]).eval() for _ in range(2))  # its head has a bias
    with torch.no_grad():
        theta.lm_head.bias += torch.randn(40)
    batch = common.collate([(x, [y]) for x, y in SEQUENCES], "cpu")
    ours = common.ResponseLogps(theta)(batch, common.ResponseLogps(ref), lambda a, b: 1.5 * a - 0.5 * b)
    whole = []  # logits of the response tokens
    for model in (theta, ref):
        with torch.no_grad():
            whole.append(torch.cat([model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1:-1]
                                    for x, y in SEQUENCES]))
    for logp, logits in zip(ours, (*whole, 1.5 * whole[0] - 0.5 * whole[1])):
        torch.testing.assert_close(logp, -F.cross_entropy(logits, batch.labels, reduction="none"), rtol=1e-5, atol=1e-4)
    assert [logp.requires_grad for logp in ours] == [True, False, False]
    factor = torch.linspace(-1, 1, len(batch.labels))  # of each token another
    (ours[0] * factor).sum().backward()
    gradient = theta.lm_head.bias.grad
    expected = factor @ (F.one_hot(batch.labels, 40) - whole[0].softmax(-1))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)
    assert all(p.grad is None for p in ref.parameters())


def test_logits_of_a_bf16_model_are_summed_in_float32():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval().to(torch.bfloat16)
    batch = common.collate([([5], [list(range(6, 36))])], "cpu")
    with torch.no_grad():
        hidden, weight, _ = common.ResponseLogps(model).hidden(batch)
        logp = common.ResponseLogps(model)(batch)
    assert logp.dtype == torch.float32
    exact = F.linear(hidden, weight).double().log_softmax(-1).gather(-1, batch.labels[:, None]).sum().item()
    assert common.response_logps(logp, batch.lengths).item() == pytest.approx(exact, abs=1e-3)


def test_gradients_are_those_of_the_cross_entropy(model):
    batch = common.collate([(x, [y]) for x, y in SEQUENCES], "cpu")
    common.ResponseLogps(model)(batch).sum().backward()
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
    # Gemma 2 takes tanh of its logits after the head, which ResponseLogps does not
    torch.manual_seed(1)
    config = Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=5.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    with pytest.raises(common.InputError, match="not supported"):
        common.load_model(str(tmp_path / "gemma"), torch.device("cpu"))


def test_dropout_is_zero_in_the_config_of_a_multimodal_model(tmp_path):
    from transformers import Gemma3Config
    Gemma3Config(text_config={"attention_dropout": 0.5}).save_pretrained(tmp_path)
    assert common.load_config(str(tmp_path)).get_text_config().attention_dropout == 0


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
