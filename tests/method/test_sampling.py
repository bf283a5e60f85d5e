"""The sampling loop, against transformers' greedy generate and against the distribution it must draw from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import is_psutil_available

import common
import sampling
from families import FAMILIES, make

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15, 16], [5, 6, 9, 9, 20]]
EOS = [1, 2, 3, 4, 17, 21, 33, 38]  # so many that some responses end early


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param, seed=2)


@pytest.fixture(scope="module")
def llama():
    return make("llama", seed=2)


def sample(model, prompts, keys, n, steps, temperature, eos=EOS):
    u = np.array([[common.uniforms(0, key, k, steps) for k in range(n)] for key in keys])
    return common.sample_responses(model, prompts, u, temperature, steps, eos)


def test_temperature_0_gives_what_generate_gives(model):
    sampled = sample(model, PROMPTS, "abcd", 2, 12, temperature=0)
    for prompt, (one, two) in zip(PROMPTS, sampled, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                             eos_token_id=EOS, pad_token_id=0)
        expected = out[0, len(prompt):].tolist()
        assert one == two == (expected, "eos" if expected[-1] in EOS else "length")
    assert len({len(ids) for [(ids, _), _] in sampled}) > 1


def test_a_response_does_not_depend_on_its_batch(model):
    def responses(chosen):
        return sample(model, [PROMPTS[i] for i in chosen], [f"id {i}" for i in chosen], 2, 12, temperature=0.7)

    together = responses([0, 1, 2, 3])
    assert [responses([i])[0] for i in range(4)] == together
    assert responses([3, 1]) == [together[3], together[1]]


def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(llama):
    sampled = [ids for ids, _ in sample(llama, [[5, 6, 7]], ["w"], 5000, 2, temperature=1.5, eos=[])[0]]
    first = max(range(40), key=[ids[0] for ids in sampled].count)
    for given, drawn in (([], [ids[0] for ids in sampled]), ([first], [ids[1] for ids in sampled if ids[0] == first])):
        logits = llama(input_ids=torch.tensor([[5, 6, 7, *given]])).logits[0, -1].detach().double()

        def chi_square(temperature):
            expected = len(drawn) * (logits / temperature).softmax(-1).numpy()
            return ((np.bincount(drawn, minlength=40) - expected) ** 2 / expected).sum()

        # a chi-square of 39 degrees of freedom passes 72.1 once in 1,000 times
        assert chi_square(1.5) < 72.1 < min(chi_square(1.0), chi_square(2.0))


NEVER = -float("inf")


@pytest.mark.parametrize("logits, temperature, u, tokens", [
    # probabilities 1/10, 2/10, 3/10, 4/10: the boundaries lie at 0.1, 0.3, 0.6
    (np.log([1, 2, 3, 4]), 1.0, [0, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 0.999], [0, 0, 1, 1, 2, 2, 3, 3]),
    # at temperature 1/2 the odds are squared, 1 : 4 : 9 : 16 of 30: the boundaries lie at 0.033, 0.167, 0.467
    (np.log([1, 2, 3, 4]), 0.5, [0, 0.032, 0.034, 0.166, 0.168, 0.466, 0.468, 0.999], [0, 0, 1, 1, 2, 2, 3, 3]),
    # the likeliest
    *(([-1.0, 2.0, 1.0], temperature, [0, 0.999], [1, 1]) for temperature in (0, 5e-324, 1e-39, 1e-20)),
    # none of probability 0, with the least and the largest u that numpy draws
    ([NEVER, 0.0, NEVER, 1.0, NEVER], 1.0, [0, 0.5, 1 - 2 ** -53], [1, 3, 3]),
    # where sums of float32 probabilities are least exact
    ([NEVER] + 39_999 * [0.0] + 10_000 * [NEVER], 1.0, [0, 1 - 2 ** -53], [1, 39_999])])
def test_sample_token_inverts_the_cumulative_distribution(logits, temperature, u, tokens):
    logits = torch.as_tensor(logits, dtype=torch.float32).expand(len(u), -1)
    assert common.sample_token(logits, torch.tensor(u, dtype=torch.float64), temperature).tolist() == tokens


def test_uniforms_are_decided_by_seed_prompt_and_sample():
    base = common.uniforms(0, "a", 0, 5)
    assert (common.uniforms(0, "a", 0, 5) == base).all()
    assert (common.uniforms(0, "a", 0, 9)[:5] == base).all()  # a larger limit only adds to a response
    others = [common.uniforms(1, "a", 0, 5), common.uniforms(0, "b", 0, 5), common.uniforms(0, "a", 1, 5)]
    assert not any((other == base).any() for other in others)


BATCHES = [[1, 2], [3, 0]]


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark with EOS and limits for the models of this file."""
    monkeypatch.setattr(sampling, "EOS", range(0, 40, 7))
    monkeypatch.setattr(sampling, "LIMIT", 12)
    monkeypatch.setattr(sampling, "GREEDY_LIMIT", 12)
    return sampling


@pytest.mark.parametrize("way", ["by_common", "by_generate", "static cache", "by_generate_batch"])
def test_the_benchmark_draws_two_responses_a_prompt_up_to_their_ends(benchmark, way):
    if way == "by_generate_batch" and transformers.__version__.startswith("5.17") and not is_psutil_available():
        pytest.skip("needs psutil")
    model = make("llama", seed=2)  # its own: generate_batch replaces its attention
    done = {"by_common": lambda: benchmark.by_common(model, PROMPTS, BATCHES, 0),
            "by_generate": lambda: benchmark.by_generate(model, PROMPTS, BATCHES, benchmark.drawn()),
            "static cache": lambda: benchmark.by_generate(model, PROMPTS, BATCHES,
                                                          benchmark.drawn(cache_implementation="static")),
            "by_generate_batch": lambda: benchmark.by_generate_batch(model, PROMPTS, benchmark.drawn())}[way]()
    assert sorted(done) == [0, 1, 2, 3] and all(len(pair) == 2 for pair in done.values())
    for ids in sum(done.values(), []):
        assert all(i % 7 for i in ids[:-1]) and (ids[-1] % 7 == 0 or len(ids) == 12)


def test_the_benchmark_stops_at_a_greedy_token_that_differs_and_passes_a_tie(benchmark, llama):
    theirs = benchmark.by_generate(llama, PROMPTS, BATCHES, benchmark.generation(12, do_sample=False))
    i = max(theirs, key=lambda i: len(theirs[i][0]))
    [response], theirs = theirs[i], {i: theirs[i]}
    other = [*response[:2], (response[2] + 1) % 40]
    for differs in (other + response[3:], response[:2]):
        with pytest.raises(SystemExit, match=f"prompt {i}.* token 2 "):
            benchmark.compare_greedy(llama, PROMPTS, {i: [response, differs]}, theirs)

    def tied(ids):
        return SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 40))
    assert benchmark.compare_greedy(tied, PROMPTS, {i: [response, other]}, theirs) == (len(response) + 2, 1)
