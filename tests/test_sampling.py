"""The sampling loop, against transformers' greedy generate and against the distribution it must draw from."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, PhiConfig
from transformers.utils import is_psutil_available

import common
import stages

sys.path.append(str(stages.ROOT / "benchmarks"))
import sampling

SHAPE = dict(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
             bos_token_id=None, eos_token_id=None)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),  # shorter than a prompt with its response
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "gpt2": GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15, 16], [5, 6, 9, 9, 20]]
ENDS = [1, 2, 3, 4, 17, 21]  # so many that some responses end early


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()


def uniforms(keys, samples, steps, seed=0):
    return np.array([[common.uniforms(seed, key, k, steps) for k in range(samples)] for key in keys])


def test_temperature_0_gives_what_generate_gives(model):
    sampled = common.sample(model, PROMPTS, uniforms("abcd", 2, 12), 0, 12, ENDS)
    for prompt, (one, two) in zip(PROMPTS, sampled, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                             eos_token_id=ENDS, pad_token_id=0)
        expected = out[0, len(prompt):].tolist()
        assert one == two == (expected, "eos" if expected[-1] in ENDS else "length")
    assert {finish for [(_, finish), _] in sampled} == {"eos", "length"} or len({len(y) for [(y, _), _] in sampled}) > 1


def test_the_end_token_is_the_last_of_a_response_and_only_there(model):
    for pair in common.sample(model, PROMPTS, uniforms("abcd", 2, 12), 1.0, 12, ENDS):
        for ids, finish in pair:
            assert all(i not in ENDS for i in ids[:-1])
            assert (finish == "eos") == (ids[-1] in ENDS)
            assert finish == "eos" or len(ids) == 12


def test_a_response_does_not_depend_on_its_batch(model):
    def sample(chosen):
        u = uniforms([f"id {i}" for i in chosen], 2, 12)
        return common.sample(model, [PROMPTS[i] for i in chosen], u, 0.7, 12, ENDS)

    together = sample([0, 1, 2, 3])
    assert [sample([i])[0] for i in range(4)] == together
    assert sample([3, 1]) == [together[3], together[1]]


def test_the_first_token_is_drawn_from_the_softmax_of_the_logits_over_the_temperature(llama):
    n = 5000
    sampled = common.sample(llama, [[5, 6, 7]], uniforms(["x"], n, 1), 1.5, 1, [])
    counts = np.bincount([ids[0] for ids, _ in sampled[0]], minlength=30)
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()

    def chi_square(temperature):
        expected = n * (logits / temperature).softmax(-1).numpy()
        return ((counts - expected) ** 2 / expected).sum()

    # a chi-square of 29 degrees of freedom passes 58.3 once in 1,000 times
    assert chi_square(1.5) < 58.3
    assert chi_square(1.0) > 58.3 and chi_square(2.0) > 58.3


def test_the_second_token_is_drawn_given_the_first(llama):
    sampled = [ids for ids, _ in common.sample(llama, [[5, 6, 7]], uniforms(["x"], 5000, 2), 1.0, 2, [])[0]]
    first = max(range(30), key=[ids[0] for ids in sampled].count)
    after = np.bincount([ids[1] for ids in sampled if ids[0] == first], minlength=30)
    with torch.no_grad():
        p = llama(input_ids=torch.tensor([[5, 6, 7, first]])).logits[0, -1].double().softmax(-1).numpy()
    error = (p * (1 - p) / after.sum()) ** 0.5
    assert after.sum() > 500 and (abs(after / after.sum() - p) < 4 * error + 1e-3).all()


def test_pick_inverts_the_cumulative_distribution():
    # probabilities 1/10, 2/10, 3/10, 4/10: the boundaries lie at 0.1, 0.3, 0.6
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4)
    u = torch.tensor([0, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 0.999], dtype=torch.float64)
    assert common.pick(logits, u, 1.0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # at temperature 1/2 the odds are squared, 1 : 4 : 9 : 16 of 30: the boundaries lie at 0.033, 0.167, 0.467
    u = torch.tensor([0, 0.032, 0.034, 0.166, 0.168, 0.466, 0.468, 0.999], dtype=torch.float64)
    assert common.pick(logits, u, 0.5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pick_never_takes_a_token_of_probability_0():
    never = -float("inf")
    logits = torch.tensor([[never, 0.0, never, 1.0, never]]).expand(3, 5)
    u = torch.tensor([0.0, 0.5, 1 - 2 ** -53], dtype=torch.float64)  # the least and the largest that numpy draws
    assert common.pick(logits, u, 1.0).tolist() == [1, 3, 3]
    big = torch.full((1, 50_000), never)  # where sums of float32 probabilities are least exact
    big[0, 1:40_000] = 0.0
    assert common.pick(big, u[:1], 1.0).item() == 1
    assert common.pick(big, u[2:], 1.0).item() == 39_999


def test_pick_at_temperature_0_takes_the_likeliest():
    assert common.pick(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.0], dtype=torch.float64), 0).tolist() == [1]


def test_uniforms_are_decided_by_seed_prompt_and_sample():
    base = common.uniforms(0, "a", 0, 5)
    assert (common.uniforms(0, "a", 0, 5) == base).all()
    assert (common.uniforms(0, "a", 0, 9)[:5] == base).all()  # a larger limit only adds to a response
    others = [common.uniforms(1, "a", 0, 5), common.uniforms(0, "b", 0, 5), common.uniforms(0, "a", 1, 5)]
    assert not any((other == base).any() for other in others)
    many = np.concatenate([common.uniforms(0, str(k), 0, 100) for k in range(100)])
    assert 0 <= many.min() and many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.01)  # standard error 0.29 / 100


# ---------------------------------------------------------------------------------------------
# benchmarks/sampling.py


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark with words, ends and limits for the models of this file."""
    monkeypatch.setattr(sampling, "ENDS", range(0, 30, 7))
    monkeypatch.setattr(sampling, "LIMIT", 12)
    monkeypatch.setattr(sampling, "GREEDY_LIMIT", 12)
    return sampling


def test_the_benchmark_takes_generates_responses_to_their_ends(benchmark, llama):
    batches = [[1, 2], [3, 0]]
    theirs = benchmark.by_generate(llama, PROMPTS, batches, benchmark.greedy())
    for prompt, [response] in zip(PROMPTS, [theirs[i] for i in range(4)], strict=True):
        alone = llama.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                               generation_config=benchmark.greedy())
        assert response == alone[0, len(prompt):].tolist()
    assert len({len(response) for [response] in theirs.values()}) > 1
    ours = benchmark.by_common(llama, PROMPTS, batches, 0, 0, 12)
    assert ours == {i: [response] * 2 for i, [response] in theirs.items()}
    assert benchmark.compare_greedy(llama, PROMPTS, ours, theirs) == (2 * sum(len(y) for [y] in theirs.values()), 0)


def check_drawn(done):
    assert sorted(done) == [0, 1, 2, 3] and all(len(pair) == 2 for pair in done.values())
    for ids in (ids for pair in done.values() for ids in pair):
        assert all(i % 7 for i in ids[:-1]) and (ids[-1] % 7 == 0 or len(ids) == 12)


def test_the_benchmark_draws_two_responses_a_prompt_up_to_their_ends(benchmark, llama):
    batches = [[1, 2], [3, 0]]
    check_drawn(benchmark.by_common(llama, PROMPTS, batches, 0))
    check_drawn(benchmark.by_generate(llama, PROMPTS, batches, benchmark.drawn()))
    check_drawn(benchmark.by_generate(llama, PROMPTS, batches, benchmark.drawn(cache_implementation="static")))


@pytest.mark.skipif(transformers.__version__.startswith("5.17") and not is_psutil_available(), reason="needs psutil")
def test_the_benchmark_gets_all_responses_out_of_continuous_batching(benchmark):
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()  # its own: its attention is replaced
    check_drawn(benchmark.by_generate_batch(model, PROMPTS, benchmark.drawn()))


def test_the_benchmark_stops_at_a_greedy_token_that_differs_and_passes_a_tie(benchmark, llama):
    theirs = benchmark.by_generate(llama, PROMPTS, [[0]], benchmark.greedy())
    [[response]] = theirs.values()
    for other in ([*response[:2], (response[2] + 1) % 30, *response[3:]], response[:2]):
        with pytest.raises(SystemExit, match="prompt 0: the greedy responses differ from token 2 on"):
            benchmark.compare_greedy(llama, PROMPTS, {0: [response, other]}, theirs)

    def tied(ids):
        return SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 30))

    other = [*response[:2], (response[2] + 1) % 30]
    assert benchmark.compare_greedy(tied, PROMPTS, {0: [response, other]}, theirs) == (len(response) + 2, 1)
