"""The likeliest tokens and log-sum-exps by C++ kernels: torch's, for every row of numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specrej_eval.engines.transformers import sampling, token_stats
from specrej_eval.kv.native import build, logits

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")

NUMBERS = st.floats(width=32, allow_nan=False)
KINDS = st.sampled_from(["drawn", "rising", "falling", "equal", "few values", "mostly minus infinity"])


def row_of(kind: str, count: int, seed: int) -> torch.Tensor:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 4
    if kind == "rising":
        return numbers.sort().values
    if kind == "falling":
        return numbers.sort(descending=True).values
    if kind == "equal":
        return torch.zeros(count)
    if kind == "few values":
        return numbers.round()
    if kind == "mostly minus infinity":
        return numbers.masked_fill(numbers < 6, float("-inf"))
    return numbers


@given(
    kinds=st.lists(KINDS, min_size=1, max_size=4),
    count=st.integers(1, 3000),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_the_largest_are_torchs(kinds: list[str], count: int, share: float, seed: int) -> None:
    scores = torch.stack([row_of(kind, count, seed + place) for place, kind in enumerate(kinds)])
    width = max(1, round(share * count))
    with build.used(build.library()):
        places = logits.largest(scores, width)
    assert places is not None
    assert all(len(set(row)) == width for row in places.tolist()), "a place is named twice"
    got = scores.gather(1, places).sort(descending=True).values
    assert torch.equal(got, scores.topk(width).values)


@given(st.lists(NUMBERS, min_size=1, max_size=100))
def test_log_sum_exps_are_torchs(numbers: list[float]) -> None:
    scores = torch.tensor([numbers, numbers[::-1]])
    with build.used(build.library()):
        got = logits.logsumexp(scores)
    assert got is not None
    assert torch.allclose(got, scores.double().logsumexp(1).float(), rtol=1e-6, atol=1e-6)


@given(
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=300),
    at=st.integers(0, 299),
    width=st.integers(1, 300),
    others=st.sampled_from([None, float("-inf"), float("inf")]),
)
def test_a_nan_makes_a_sum_nan_and_is_no_place(numbers: list[float], at: int, width: int, others: float | None) -> None:
    numbers = [number if others is None else others for number in numbers]
    numbers[at % len(numbers)] = float("nan")
    scores = torch.tensor([numbers])
    with build.used(build.library()):
        total = logits.logsumexp(scores)
        places = logits.largest(scores, min(width, len(numbers)))
    assert total is not None and bool(total.isnan())
    assert places is not None and bool(((places >= 0) & (places < len(numbers))).all())


@given(kind=KINDS, count=st.integers(1, 60_000), seed=st.integers(0, 10**6))
def test_log_sum_exps_of_long_rows_are_as_near_to_the_truth_as_torchs(kind: str, count: int, seed: int) -> None:
    scores = row_of(kind, count, seed)[None]
    with build.used(build.library()):
        got = logits.logsumexp(scores)
    assert got is not None
    assert torch.allclose(got.double(), scores.double().logsumexp(1), rtol=3e-7, atol=3e-6)


def test_kernels_are_used_where_they_are_in_use_only() -> None:
    scores = torch.randn(3, 200)
    assert logits.largest(scores, 5) is None and logits.logsumexp(scores) is None
    with build.used(build.library()):
        assert logits.largest(scores.double(), 5) is None, "of float32 alone"
        assert logits.largest(scores.T, 2) is None, "of rows that lie in memory as such"
        assert logits.largest(scores[:, 3:], 5) is not None
    assert build.in_use() is None


@pytest.mark.parametrize("params", [{}, {"top_k": 0}, {"top_p": 0.9}, {"top_k": 0, "top_p": 0.3}, {"temperature": 0.2}])
def test_tokens_are_the_same_and_their_statistics_too(params: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 3000, generator=generator) * 3
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    given = sampling.SamplingParams(**params)  # type: ignore[arg-type]  # top_k is an int here
    tokens = sampling.sample(scores, uniforms, given)
    stats = token_stats.stats_of(scores, tokens, tuple(token_stats._STATS))
    with build.used(build.library()):
        assert torch.equal(sampling.sample(scores, uniforms, given), tokens)
        assert torch.allclose(token_stats.stats_of(scores, tokens, tuple(token_stats._STATS)), stats, rtol=1e-5)
