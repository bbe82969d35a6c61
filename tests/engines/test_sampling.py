"""The sampler against the exact softmax, against transformers' filters, and its random stream."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specrej_eval.engines.transformers import sampling
from specrej_eval.engines.transformers.sampling import (
    SamplingParams,
    filtered,
    largest,
    row_stream,
    sample,
    uniform,
)
from specrej_eval.engines.transformers.token_stats import stats_of
from specrej_eval.errors import ModelError

Counted = Callable[[str, int], None]

NO_FILTER = SamplingParams(top_k=0)


def uniforms(count: int, key: int = 1) -> Tensor:
    return uniform(row_stream(torch.tensor(key), torch.arange(count)), torch.tensor(0))


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return stats_of(logits, tokens, ["logprob"])[:, 0]


def by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    """(rows, vocab) probabilities by transformers' processors, in its order, in float64."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.int64)
    return processors(ids, logits.clone()).double().softmax(-1)


def whole(logits: Tensor, params: SamplingParams) -> Tensor:
    """(rows, vocab) probabilities by our filters, put back in vocabulary order and normalised."""
    probabilities, tokens = filtered(logits, params)
    if tokens is not None:
        # padding repeats token 0 with no mass: add, so that it cannot overwrite
        probabilities = torch.zeros(logits.shape, dtype=torch.float64).scatter_add(1, tokens, probabilities)
    return probabilities / probabilities.sum(-1, keepdim=True)


# ---- draws -------------------------------------------------------------------------------------------------------

PARAMS = [
    NO_FILTER,
    SamplingParams(temperature=0.5, top_k=0),
    SamplingParams(temperature=1.7, top_k=0),
    SamplingParams(top_k=4),
    SamplingParams(top_k=0, top_p=0.7),
    SamplingParams(top_k=0, min_p=0.2),
    SamplingParams(temperature=1.3, top_k=6, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_frequencies_are_the_filtered_softmax(params: SamplingParams) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.5, -0.5, 1.2, -3.0, 0.9]])
    want = by_transformers(logits, params)[0]
    draws = sample(logits, uniforms(20_000), params)
    counts = draws.bincount(minlength=logits.shape[1])
    assert not counts[want == 0].any()
    kept = want > 0
    assert stats.chisquare(counts[kept].numpy(), (want[kept] * len(draws)).numpy()).pvalue > 1e-3


def test_chi_square_notices_a_wrong_temperature() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.5]])
    want = by_transformers(logits, NO_FILTER)[0]
    counts = sample(logits, uniforms(20_000), SamplingParams(temperature=1.1, top_k=0)).bincount(minlength=5)
    assert stats.chisquare(counts.numpy(), (want * 20_000).numpy()).pvalue < 1e-6


@given(st.data())
def test_filters_equal_transformers(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(2, 24))
    values = st.integers(-8, 8).map(lambda value: value / 4)  # many exact ties, the k-th included
    rows = data.draw(st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=1, max_size=3))
    logits = torch.tensor(rows)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, vocab + 2)),
        top_p=data.draw(st.sampled_from([1.0, 0.99, 0.9, 0.63, 0.31, 0.05])),
        min_p=data.draw(st.sampled_from([0.0, 0.07, 0.33])),
    )
    want, ours = by_transformers(logits, params), whole(logits, params)
    if params.top_p < 1:
        # which of several equal tokens crosses top_p is an accident of sorting, and so is a sum right at the edge:
        # compared where transformers' own choice is clear
        before = by_transformers(logits, SamplingParams(params.temperature, params.top_k))
        for row in range(len(rows)):
            levels = before[row].unique()
            above = torch.stack([before[row][before[row] > level].sum() for level in levels])
            through = torch.stack([before[row][before[row] >= level].sum() for level in levels])
            last = int(((above < params.top_p) & (levels > 0)).nonzero()[0])
            alone = int((before[row] == levels[last]).sum()) == 1 or through[last] - levels[last] < params.top_p - 1e-6
            assume(alone and float((above - params.top_p).abs().min()) > 1e-6)
    assert torch.equal(ours > 0, want > 0)
    assert torch.allclose(ours, want, atol=1e-6)


def test_ties_at_the_kth_logit_all_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert (whole(logits, SamplingParams(top_k=2)) > 0).tolist() == [[False, True, True, True, True, False]]


@pytest.mark.parametrize("ties", [sampling.TIE_SLACK - 2, sampling.TIE_SLACK + 40])
def test_long_ties(ties: int) -> None:
    logits = torch.linspace(-5, -4, 300)[None]
    logits[0, 7 : 7 + ties] = 1.0
    logits[0, 200] = 2.0
    params = SamplingParams(top_k=3)
    assert torch.allclose(whole(logits, params), by_transformers(logits, params), atol=1e-7)


@pytest.mark.parametrize("spread", [0.01, 0.5, 4.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_beyond_the_candidates(spread: float, top_p: float) -> None:
    vocab = 3 * sampling.TOP_P_CANDIDATES
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0)) * spread
    params = SamplingParams(top_k=0, top_p=top_p)
    want, ours = by_transformers(logits, params), whole(logits, params)
    # transformers sums 3072 float32 numbers: at most a token at the edge may differ
    assert ((ours > 0) != (want > 0)).sum(-1).max() <= 2
    assert torch.allclose(ours, want, atol=1e-4)
    needed = (want > 0).sum(-1)
    assert bool((needed > sampling.TOP_P_CANDIDATES).any()) == (spread < 1 and top_p > 0.5)


@pytest.mark.parametrize("params", [*PARAMS, SamplingParams(top_k=3), SamplingParams(top_k=0, top_p=0.99)], ids=str)
def test_a_draw_does_not_depend_on_other_rows(params: SamplingParams) -> None:
    # the rows reach every branch: plain, ties longer than the slack, flatter than the candidates of top_p
    vocab = 2 * sampling.TOP_P_CANDIDATES
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, vocab, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = 0.0
    logits[3] *= 8
    logits[4, :300] = 9.0
    logits[5] = logits[5].bfloat16()
    draws = uniforms(9, key=5)
    together = sample(logits, draws, params)
    alone = torch.cat([sample(logits[row : row + 1], draws[row : row + 1], params) for row in range(9)])
    backwards = sample(logits.flip(0), draws.flip(0), params).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, backwards)


def test_more_rows_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 30, generator=torch.Generator().manual_seed(0))
    want = sample(logits, uniforms(11), PARAMS[-1])
    want_logprobs = _logprobs(logits, want)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 16 * logits.shape[1])  # four rows
    assert torch.equal(sample(logits, uniforms(11), PARAMS[-1]), want)
    assert torch.equal(_logprobs(logits, want), want_logprobs)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 3000), st.integers(1, 6), st.integers(0, 10**6))
def test_the_largest_are_the_largest(rows: int, width: int, more: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, width + more, generator=generator)
    if levels < 6:  # many ties
        scores = (scores * levels).round()
    if seed % 3 == 0:
        scores[torch.rand(scores.shape, generator=generator) < 0.7] = float("-inf")
    places = largest(scores, width)
    assert all(len(set(row)) == width for row in places.tolist())
    got = scores.gather(-1, places).sort(-1, descending=True).values
    assert torch.equal(got, scores.topk(width).values)


@given(st.integers(1, 300), st.sampled_from([0.0, 0.01, 0.5, 1]), st.sampled_from([0.3, 1.0, 4.0]), st.integers(0, 99))
def test_drawing_from_all_is_the_inverse_cdf(vocab: int, min_p: float, temperature: float, seed: int) -> None:
    params = SamplingParams(top_k=0, min_p=min_p, temperature=temperature)
    logits = 3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed))
    draws = uniforms(4, key=seed)
    cdf = whole(logits, params).cumsum(-1)
    for row, token in enumerate(sample(logits, draws, params).tolist()):
        below = float(cdf[row, token - 1]) if token else 0.0
        assert below - 1e-6 <= float(draws[row]) <= float(cdf[row, token]) + 1e-6


def test_one_row_of_logits_serves_all_uniforms() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    for params in PARAMS:
        assert torch.equal(sample(logits, uniforms(7), params), sample(logits.expand(7, -1), uniforms(7), params))


@pytest.mark.parametrize("edge", [2.0**-60, 1 - 2.0**-53, 1.0])
def test_extreme_uniforms_draw_tokens_of_some_mass(edge: float) -> None:
    logits = torch.full((1, 40), float("-inf"))
    logits[0, [11, 20, 30]] = torch.tensor([0.0, 1.0, -30.0])
    for params in (NO_FILTER, SamplingParams(top_k=3), SamplingParams(top_k=0, top_p=0.9)):
        drawn = sample(logits, torch.tensor([edge], dtype=torch.float64), params)
        assert int(drawn) in (11, 20, 30)


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, uniforms(5), SamplingParams(temperature=0)), logits.argmax(-1))


def test_logprobs_are_of_the_untempered_model() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1, 5, 0, 29, 7])
    want = logits.log_softmax(-1)[torch.arange(5), tokens]
    assert torch.allclose(_logprobs(logits, tokens), want, atol=1e-6)
    assert torch.allclose(_logprobs(logits[:1], tokens), logits[0].log_softmax(-1)[tokens], atol=1e-6)


# ---- any temperature ---------------------------------------------------------------------------------------------

FILTERS = [
    SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    for top_k in (0, 1, 4, 30)
    for top_p in (1.0, 0.6)
    for min_p in (0.0, 0.2)
]
TINY = [5e-324, 1e-320, 1e-300, 1e-100, 1e-46, 1e-45, 1e-39, 2.0**-126, 1e-37, 1e-30]
HUGE = [1e20, 1e30, 3.4e38, 1e39, 1e100, 1e300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def awkward_logits(dtype: torch.dtype) -> Tensor:
    """(rows, 30): ordinary, shifted far up and down, forbidden tokens, zeros, the largest and smallest of the dtype."""
    base = torch.randn(8, 30, generator=torch.Generator().manual_seed(5))
    base[1] += 90
    base[2] -= 90
    base[3, ::2] = -torch.inf
    base[4] = -torch.inf
    base[4, 17] = -2.0
    base[5] = torch.where(base[5] > 0, 0.0, -torch.inf)
    base[5, 9] = 0.5
    logits = base.to(dtype)
    top = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    logits[6] = torch.linspace(-1, 1, 30).to(dtype) * top
    logits[7] = -torch.linspace(0.5, 1, 30).to(dtype) * top
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tiny_temperature_draws_the_greedy_token(dtype: torch.dtype, counted: Counted) -> None:
    logits = awkward_logits(dtype)
    for temperature, filters in itertools.product(TINY, FILTERS):
        params = dataclasses.replace(filters, temperature=temperature)
        for edge in (2.0**-53, 0.3, 1 - 2.0**-53):
            drawn = sample(logits, torch.full((len(logits),), edge, dtype=torch.float64), params)
            # two logits of one value share, so values are compared, not ids
            assert torch.equal(logits.gather(1, drawn[:, None])[:, 0], logits.amax(-1)), params
        counted("temperatures drawn at", len(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_huge_temperature_draws_every_allowed_token_alike(dtype: torch.dtype, counted: Counted) -> None:
    logits = awkward_logits(dtype)[:6]
    for temperature in HUGE:
        probabilities = whole(logits, SamplingParams(temperature=temperature, top_k=0))
        allowed = logits > -torch.inf
        assert torch.equal(probabilities > 0, allowed)
        assert torch.allclose(probabilities, allowed.double() / allowed.sum(-1, keepdim=True), atol=1e-6)
        for filters in FILTERS:
            drawn = sample(logits, uniforms(len(logits)), dataclasses.replace(filters, temperature=temperature))
            assert bool(allowed.gather(1, drawn[:, None]).all())
            counted("temperatures drawn at", len(logits))


@given(st.data())
def test_any_temperature_draws_from_the_softmax(data: st.DataObject) -> None:
    # against arithmetic in float64, which holds every quotient met here once the largest logit is taken off
    temperature = 10.0 ** data.draw(st.floats(-320, 300))
    assume(temperature > 0)
    scale = 10.0 ** data.draw(st.floats(-6, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randn(3, 20, generator=generator) * scale
    logits[1, data.draw(st.integers(1, 19)) :] = -torch.inf
    exact = logits.double()
    want = ((exact - exact.amax(-1, keepdim=True)) / temperature).softmax(-1)
    got = whole(logits, SamplingParams(temperature=temperature, top_k=0))
    assert bool(got.isfinite().all())
    # float32 scores are off by up to one part in 2**24: compared where that is little, or where one token has it all
    first, second = exact.sort(-1, descending=True).values[:, :2].unbind(-1)
    settled = bool(((first - second) / temperature > 60).all())
    assume(settled or float(exact[exact.isfinite()].abs().max()) / temperature < 1e4)
    assert torch.allclose(got, want, atol=1e-9 if settled else 1e-2)


def test_ordinary_temperatures_divide_directly(counted: Counted) -> None:
    # draws may not change from version to version: the scores are float32 quotients, bit for bit
    generator = torch.Generator().manual_seed(1)
    for temperature in torch.logspace(-2, 1, 40, dtype=torch.float64).tolist():
        logits = torch.randn(16, 400, generator=generator) * 8
        plain = (logits / temperature).double().softmax(-1)
        probabilities, _ = filtered(logits, SamplingParams(temperature=temperature, top_k=0))
        assert torch.equal(probabilities, plain)
        counted("temperatures drawn at", len(logits))


def test_a_row_is_tempered_alone() -> None:
    logits = awkward_logits(torch.float32)
    for temperature in (1e-39, 1e-37, 1.0, 1e39):
        for filters in FILTERS:
            params = dataclasses.replace(filters, temperature=temperature)
            together = sample(logits, uniforms(len(logits)), params)
            alone = torch.cat([sample(logits[i : i + 1], uniforms(len(logits))[i : i + 1], params) for i in range(8)])
            assert torch.equal(together, alone)


def test_logits_that_are_nan_are_refused() -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        sample(logits, uniforms(3), NO_FILTER)
    for greedy in (logits, logits[1:2]):
        with pytest.raises(ModelError, match="NaN"):
            sample(greedy, uniforms(3), SamplingParams(temperature=0.0))


# ---- the random stream -------------------------------------------------------------------------------------------


def grid(keys: Tensor, rows: int, steps: int) -> Tensor:
    """(keys, rows, steps)"""
    streams = row_stream(keys[:, None], torch.arange(rows)[None])
    return uniform(streams[..., None], torch.arange(steps))


def test_moments_and_independence() -> None:
    u = grid(torch.tensor([0, 1, 2**62 + 12345]), 200, 400)
    n = u.numel()
    assert float(u.min()) > 0 and float(u.max()) < 1
    for power in (1, 2, 3, 4):
        moment, spread = 1 / (power + 1), math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(float((u**power).mean()) - moment) < 4.5 * spread / math.sqrt(n)
    centred = u - 0.5
    for shifted in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[:, :, 1:] * centred[:, :, :-1],
        centred[:, 1:, :-1] * centred[:, :-1, 1:],  # row + 1 must not be step + 1
    ):
        assert abs(float(shifted.mean())) < 4.5 / 12 / math.sqrt(shifted.numel())
    assert stats.kstest(u.flatten()[::7].numpy(), "uniform").pvalue > 1e-3


def test_no_two_places_share_a_number() -> None:
    u = grid(torch.arange(-3, 4), 120, 120)
    assert u.unique().numel() == u.numel()  # about 1e5 draws of 2**52 values


def test_streams_of_neighbours_do_not_repeat_each_other_shifted() -> None:
    sequences = grid(torch.tensor([7, 8]), 50, 60).reshape(-1, 60)
    windows = {tuple(row[start : start + 3].tolist()) for row in sequences for start in range(58)}
    assert len(windows) == sequences.shape[0] * 58


@pytest.mark.parametrize("key", [0, -1, 1, 2**63 - 1, -(2**63)])
def test_equals_the_integer_arithmetic_of_splitmix64(key: int) -> None:
    mask = 2**64 - 1
    gamma = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    places = [0, 1, 2**31, 2**63 - 1]
    for row, step in itertools.product(places, places[:3]):
        stream = mix(mix((key + gamma) & mask) ^ (row * gamma & mask))
        want = ((mix((stream + (step + 1) * gamma) & mask) >> 12) + 0.5) * 2.0**-52
        got = uniform(row_stream(torch.tensor(key), torch.tensor([row])), torch.tensor([step]))
        assert got.item() == want
