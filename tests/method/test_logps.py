"""Log-probs of responses and their gradients, against extras/plain_spa.py: the model's own full logits."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, Gemma3Config, LlamaConfig, OPTConfig

import common
from extras import plain_spa
from support import models
from families import FAMILIES, HYBRIDS, SHAPE, make, with_images

CPU = torch.device("cpu")
SEQUENCES = [([5, 6, 7], [8, 9, 10, 11, 2]), ([3], [4]), ([12, 13, 14, 15, 16, 17], [18, 19, 2]),
             ([5, 6], [7, 7, 7, 2]), ([5] * 15, [6] * 15)]
ANSWERED = [([5, 6, 7], [[8, 9, 10, 11, 2], [4]]), ([3], [[4], [5, 6]]), ([12, 13, 14], [[9, 2], [9, 2]]),
            ([12, 13, 14, 15, 16, 17], [[18, 19, 2], [7, 7, 7, 2], [2]])]  # as 01, 03 and 04 have them


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


def batch_of(sequences):
    """As 00_sft makes one."""
    return common.collate([(x, [y]) for x, y in sequences], CPU)


def plain_logps(model, sequences):
    """log pi(y_t | x, y_<t) of each token, as the log-prob of a response of one token, without padding."""
    return torch.stack([plain_spa.log_prob(model, [*x, *y[:t]], [y[t]]) for x, y in sequences for t in range(len(y))])


def gradients(model, logp):
    """The gradient of every weight, where each token's log-prob has another factor."""
    model.zero_grad()
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_logps_and_their_gradients_are_those_of_the_full_logits(model, rows, monkeypatch):
    monkeypatch.setattr(common, "chunk_rows", lambda weight: rows)
    ours, expected = common.ResponseLogps(model)(batch_of(SEQUENCES)), plain_logps(model, SEQUENCES)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients(model, ours), gradients(model, expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_two_models_and_the_combination_of_their_logits(rows, monkeypatch):
    monkeypatch.setattr(common, "chunk_rows", lambda weight: rows)
    theta, ref = make("phi", seed=1), make("phi", seed=2)  # their heads have a bias
    with torch.no_grad():
        theta.lm_head.bias += torch.randn(40)
        ref.lm_head.bias += torch.randn(40)
    ours = common.ResponseLogps(theta)(batch_of(SEQUENCES), common.ResponseLogps(ref), lambda a, b: 1.5 * a - 0.5 * b)
    expected = [plain_logps(pi, SEQUENCES) for pi in (theta, ref, plain_spa.extrapolate(theta, ref, 0.5))]
    torch.testing.assert_close(list(ours), expected, rtol=1e-5, atol=1e-4)
    assert [logp.requires_grad for logp in ours] == [True, False, False]
    torch.testing.assert_close(gradients(theta, ours[0]), gradients(theta, expected[0]), rtol=1e-4, atol=1e-3)
    assert all(weight.grad is None for weight in ref.parameters())


def peak_memory(compute):
    """The most bytes that compute() has in use at a time, beyond what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return used.max().item()


@pytest.mark.parametrize("two", [False, True], ids=["one model", "two models"])
def test_the_full_logits_are_never_in_memory(two, monkeypatch):
    model, ref = (make(LlamaConfig(**SHAPE | dict(vocab_size=4000, hidden_size=8))) for _ in range(2))
    batch, whole = batch_of([([5, 6], [*range(6, 36)])] * 8), 4 * 8 * 30 * 4000  # bytes of (N, V) in float32
    more = (common.ResponseLogps(ref), torch.add) if two else ()

    def train():
        logp = common.ResponseLogps(model)(batch, *more)
        (logp[0] if two else logp).sum().backward()

    assert peak_memory(train) > whole  # by default so few tokens are one chunk
    monkeypatch.setattr(common, "chunk_rows", lambda weight: 8)
    assert peak_memory(train) < 0.5 * whole
    with torch.no_grad():
        assert peak_memory(lambda: common.ResponseLogps(model)(batch, *more)) < 0.5 * whole


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])  # exp(1e4) would overflow; 1e4 + 1 has 3 digits after the point
def test_label_logps_are_the_cross_entropy_whatever_the_logits(shift):
    torch.manual_seed(0)
    logits, labels = (torch.randn(9, 7) + shift).requires_grad_(), torch.arange(9) % 7
    expected = -F.cross_entropy(logits, labels, reduction="none")
    ours = common.LabelLogps.apply(logits.clone(), labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3 if shift else 1e-6)
    torch.testing.assert_close(*(torch.autograd.grad((logp * torch.arange(9)).sum(), logits)[0]
                                 for logp in (ours, expected)), rtol=0, atol=1e-5)


def test_logits_of_a_bf16_model_are_summed_in_float32():
    model, sequence = make("llama").to(torch.bfloat16), ([5], [*range(6, 36)])
    with torch.no_grad():
        logp = common.ResponseLogps(model)(batch_of([sequence]))
        expected = plain_spa.log_prob(lambda ids: types.SimpleNamespace(logits=model(ids).logits.double()), *sequence)
    assert logp.dtype == torch.float32
    assert logp.sum().item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("rows", [3, 100])
def test_gradients_under_autocast_are_near_those_in_float32(rows, monkeypatch):
    monkeypatch.setattr(common, "chunk_rows", lambda weight: rows)
    model = make("phi")
    with torch.autocast("cpu", torch.bfloat16):
        logp = common.ResponseLogps(model)(batch_of(SEQUENCES))
    assert logp.dtype == torch.float32
    ours = gradients(model, logp)
    exact = gradients(model, plain_logps(model, SEQUENCES))
    for one, two in zip(ours, exact, strict=True):
        assert one.dtype == torch.float32 and (one - two).norm() < 0.05 * two.norm() + 1e-3


def test_a_prompt_is_computed_once_for_all_its_responses_where_that_is_exact(model, request, tmp_path):
    model.save_pretrained(tmp_path)
    span = models.load_model(str(tmp_path), CPU).max_shared_length
    family = request.node.callspec.params["model"]
    assert span == (0 if family in HYBRIDS else 4 if family in ("mistral", "gemma3") else math.inf)
    for rows in [ANSWERED] + [[row] for row in ANSWERED]:
        batch, sequences = common.collate(rows, CPU, span), [(x, y) for x, ys in rows for y in ys]
        shares = all(len(x) + len(y) <= span for x, y in sequences)
        assert len(batch.ids) == len(rows if shares else sequences)
        with torch.no_grad():
            ours, expected = common.ResponseLogps(model)(batch), plain_logps(model, sequences)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config, name", [
    (Gemma3Config(text_config={"attention_dropout": 0.5}), "attention_dropout"),  # of a multimodal model
    (OPTConfig(layerdrop=0.5), "layerdrop")])
def test_every_dropout_is_zero_in_the_config(tmp_path, config, name):
    config.save_pretrained(tmp_path)
    assert getattr(models.load_config(str(tmp_path)).get_text_config(), name) == 0


UNREACHED = {  # what a text does not reach: images; what balances the load of experts, within the text model
    "images": with_images(40),
    "balance": AutoConfig.for_model("ernie4_5_moe", **SHAPE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
                                    moe_layer_start_index=1, moe_num_shared_experts=1)}


@pytest.mark.parametrize("name", [*FAMILIES, *UNREACHED])
def test_the_weights_that_a_text_reaches_are_trained(tmp_path, name):
    make(UNREACHED.get(name, name)).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), CPU)
    plain_logps(model, SEQUENCES).sum().backward()
    reached = [weight.grad is not None for weight in model.parameters()]
    model.zero_grad()
    models.freeze_unused(model)
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == reached and all(reached) == (name in FAMILIES)


def test_a_bf16_checkpoint_is_trained_in_float32(tmp_path):
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {weight.dtype for weight in models.load_model(str(tmp_path), CPU).parameters()} == {torch.float32}
