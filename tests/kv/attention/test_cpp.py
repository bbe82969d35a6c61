"""The C++ kernel with numbers and layouts that the contract's cases do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specrej_eval.kv import choose
from specrej_eval.kv.attention.base import AttentionParams
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.native import build
from specrej_eval.kv.steps import DecodeStep

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PARAMS = [AttentionParams(0.37), AttentionParams(0.37, softcap=1.5), AttentionParams(0.37, sinks=torch.ones(2))]


def drawn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    dtype=DTYPES,
    params=st.sampled_from(PARAMS),
    prefix=st.sampled_from([0, 1, 17, 128, 300]),
    suffix=st.sampled_from([1, 16, 33, 140]),
    where=st.sampled_from(["a query", "a key of the suffix", "all keys", "a value"]),
    bad=st.sampled_from([float("nan"), float("inf")]),
    at=st.integers(0, 10**6),
)
def test_a_number_that_is_none_is_never_lost(
    dtype: torch.dtype, params: AttentionParams, prefix: int, suffix: int, where: str, bad: float, at: int
) -> None:
    """A kernel that leaves NaN out of its sums would turn a broken model into plausible answers."""
    rows, row = 3, at % 3
    query, key, value = (drawn(seed, dtype, rows, 1, count, 8) for seed, count in enumerate((2, suffix, suffix)))
    prefix_key, prefix_value = drawn(3, dtype, 1, prefix, 8), drawn(4, dtype, 1, prefix, 8)
    place = at % suffix
    if where == "a query":
        query[row, 0, 0, at % 8] = float("nan")
    elif where == "a key of the suffix":
        key[row, 0, place, at % 8] = float("nan")
    elif where == "all keys":
        key[row, :, :, at % 8] = float("nan")
    else:
        value[row, 0, place, at % 8] = bad
    out = choose.build("cpp").decode(query, prefix_key, prefix_value, key, value, params)
    others = [other for other in range(rows) if other != row]
    assert bool(out[others].isfinite().all()), "no other row is touched"
    lost = ~out[row].isfinite()  # (kv_heads, groups, head_dim)
    if where == "a query":
        assert bool(lost[0, 0].all()) and not bool(lost[0, 1].any())
    elif where == "a value":
        assert bool(lost[0, :, at % 8].all())
    else:
        assert bool(lost.all())


@given(dtype=DTYPES, width=st.sampled_from([6, 8, 34, 64]), more=st.integers(1, 3), first=st.integers(0, 1))
def test_keys_may_be_parts_of_something_of_any_size(dtype: torch.dtype, width: int, more: int, first: int) -> None:
    def part(seed: int, *shape: int) -> Tensor:
        return drawn(seed, dtype, *shape, width + more)[..., first : first + width]

    query = drawn(0, dtype, 4, 2, 3, width)
    stored = part(1, 2, 40), part(2, 2, 40), part(3, 4, 2, 21), part(4, 4, 2, 21)
    params = AttentionParams(width**-0.5)
    backend = choose.build("cpp")
    got = backend.decode(query, *stored, params)
    assert torch.equal(got, backend.decode(query, *(each.contiguous() for each in stored), params))
    starts = torch.tensor([3, 20, 0, 11])
    got_extended = backend.extend(query[:, :, :, None], *stored, starts, params)
    want = backend.extend(query[:, :, :, None], *(each.contiguous() for each in stored), starts, params)
    assert got_extended is not None and want is not None and torch.equal(got_extended, want)


def test_numbers_of_two_dtypes_are_refused() -> None:
    query, stored = torch.zeros(1, 1, 1, 8), torch.zeros(1, 4, 8)
    own = torch.zeros(1, 1, 2, 8)
    backend = choose.build("cpp")
    for wrong in range(4):
        given = [stored, stored, own, own]
        given[wrong] = given[wrong].bfloat16()
        with pytest.raises(TypeError, match="bfloat16"):
            backend.decode(query, *given, AttentionParams(1.0))


@given(
    dtype=DTYPES,
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    prefixes=st.lists(st.sampled_from([0, 1, 40, 128, 300]), min_size=5, max_size=5),
    lengths=st.lists(st.sampled_from([1, 5, 31, 32, 70]), min_size=5, max_size=5),
    padding=st.integers(0, 3),
    window=st.sampled_from([None, 1, 20, 60, 400]),
    softcap=st.sampled_from([None, 1.5]),
    heads=st.sampled_from([(1, 1), (2, 6), (3, 9)]),
    seed=st.integers(0, 10**6),
)
def test_groups_that_decode_at_once_get_the_bits_they_get_one_by_one(
    dtype: torch.dtype,
    rows: list[int],
    prefixes: list[int],
    lengths: list[int],
    padding: int,
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    seed: int,
) -> None:
    (kv_heads, all_heads), width = heads, 16
    params = AttentionParams(0.3, window=window, softcap=softcap)
    at_once, one_by_one = choose.build("cpp"), choose.build("cpp")
    one_by_one._decode_groups = lambda *_: None  # type: ignore[method-assign]

    def groups() -> list[tuple[Prefix, SuffixPool]]:
        made = []
        for place, (count, length, prefix) in enumerate(zip(rows, lengths, prefixes, strict=False)):
            pool = SuffixPool(count, capacity=100, align=32, grows=place % 2 == 0)
            for token in range(length):
                key, value = (drawn(seed + 7 * token + i, dtype, count, kv_heads, 1, width) for i in (0, 1))
                pool.append(0, key, value)
                pool.advance()
            stored = (drawn(seed + i, dtype, kv_heads, prefix, width) for i in (2, 3))
            made.append((Prefix(prefix, *({0: each} for each in stored)), pool))
        return made

    batch = sum(rows) + padding
    mine, theirs = groups(), groups()
    for step in range(3):
        # as a model gives them: heads of a token side by side
        query, key, value = (
            drawn(seed + 50 * step + i, dtype, batch, 1, count, width).transpose(1, 2)
            for i, count in enumerate((all_heads, kv_heads, kv_heads))
        )
        got = DecodeStep(mine, at_once).attend(0, query, key, value, params)
        want = DecodeStep(theirs, one_by_one).attend(0, query, key, value, params)
        assert torch.equal(got, want)
        assert got.is_contiguous() and not bool(got[sum(rows) :].any())
        for (_, one), (_, other) in zip(mine, theirs, strict=True):
            assert one.noted.keys() == {0} and not other.noted
            for kept, expected in zip(one.ready(0) or (), other.ready(0) or (), strict=True):
                assert torch.equal(kept[:, :, : one.length + 1], expected[:, :, : one.length + 1])
            for pool in (one, other):
                pool.advance()
                if step == 1 and pool.rows > 1:  # a cut, and a finished row
                    pool.select(torch.tensor([*range(pool.rows - 1), 0]), 100)
                    pool.move(torch.tensor([pool.rows - 1]), torch.tensor([0]))


def test_what_a_pool_noted_is_forgotten_when_its_memory_moves() -> None:
    pool = SuffixPool(4, capacity=4, align=2, grows=True)
    zeros = torch.zeros(4, 1, 1, 2)

    def noted_after(change: Any) -> bool:
        pool.noted[0] = "where it lies"
        change()
        return 0 in pool.noted

    pool.append(0, zeros, zeros)
    pool.advance()
    assert noted_after(lambda: pool.append(0, zeros, zeros)), "there is room"
    pool.advance()
    assert not noted_after(lambda: pool.append(0, zeros, zeros)), "it has grown"
    pool.advance()
    pool.advance()
    assert not noted_after(lambda: pool.ready(0)), "it has grown"
    assert not noted_after(lambda: pool.select(torch.tensor([1, 1, 0, 2]), 8))
    assert not noted_after(lambda: pool.to("cpu"))
    assert not noted_after(lambda: pool.split(2))
    assert noted_after(lambda: pool.move(torch.tensor([1]), torch.tensor([0]))), "rows move inside of it"


def test_a_full_pool_is_an_error_and_nothing_is_written_behind_it() -> None:
    pool = SuffixPool(1, capacity=2)
    zeros = torch.zeros(1, 1, 1, 8)
    prefix = Prefix(1, {0: torch.zeros(1, 1, 8)}, {0: torch.zeros(1, 1, 8)})
    step = DecodeStep([(prefix, pool)], choose.build("cpp"))
    for _ in range(2):
        step.attend(0, zeros, zeros, zeros, AttentionParams(1.0))
        pool.advance()
    pool.capacity = 2
    with pytest.raises(IndexError):
        step.attend(0, zeros, zeros, zeros, AttentionParams(1.0))
