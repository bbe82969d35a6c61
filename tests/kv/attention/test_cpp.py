"""The C++ kernel with numbers and layouts that the contract's cases do not have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specrej_eval.kv import choose
from specrej_eval.kv.attention.base import AttentionParams
from specrej_eval.kv.native import build

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
