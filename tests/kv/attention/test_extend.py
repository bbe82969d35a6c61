"""New tokens of rows behind a shared prefix, by products: the same as attention with a mask over copies of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specrej_eval.kv import choose
from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.attention.base import AttentionParams
from specrej_eval.kv.native import build


@given(
    rows=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 7),
    prefix=st.integers(1, 40),
    stored=st.integers(1, 20),
    cache=st.sampled_from([1, 2000, 2**21]),
    seed=st.integers(0, 10**6),
)
def test_products_give_what_a_mask_over_copies_gives(
    rows: int, kv_heads: int, groups: int, tokens: int, prefix: int, stored: int, cache: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query = drawn(rows, kv_heads, groups, tokens, 8)
    prefix_key, prefix_value = drawn(kv_heads, prefix, 8), drawn(kv_heads, prefix, 6)
    suffix_key, suffix_value = drawn(rows, kv_heads, stored, 8), drawn(rows, kv_heads, stored, 6)
    seen = torch.rand(rows, tokens, stored, generator=generator) < 0.5
    params = AttentionParams(0.37)
    keys = torch.cat([prefix_key.expand(rows, -1, -1, -1), suffix_key], 2)
    values = torch.cat([prefix_value.expand(rows, -1, -1, -1), suffix_value], 2)
    whole = torch.cat([torch.ones(rows, tokens, prefix, dtype=torch.bool), seen], 2)
    whole = whole[:, None, None].expand(-1, 1, groups, -1, -1).reshape(rows, 1, groups * tokens, -1)
    want = sdpa.masked(query.flatten(2, 3), keys, values, whole, params).unflatten(2, (groups, tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_CACHE_BYTES", cache)
        got = sdpa.extend(query, prefix_key, prefix_value, suffix_key, suffix_value, seen, params)
    assert torch.allclose(got, want, atol=1e-5)
    halves = (each.bfloat16() for each in (query, prefix_key, prefix_value, suffix_key, suffix_value))
    assert torch.allclose(sdpa.extend(*halves, seen, params).float(), want, atol=0.1)


def test_it_is_taken_on_a_cpu_in_half_precision_only() -> None:
    query = torch.zeros(1, 1, 1, 1, 8)
    assert sdpa.extends_by_products(query.bfloat16(), AttentionParams(1.0, window=4))
    assert not sdpa.extends_by_products(query, AttentionParams(1.0))
    assert not sdpa.extends_by_products(query.bfloat16(), AttentionParams(1.0, softcap=2.0))
    assert not sdpa.extends_by_products(query.bfloat16(), AttentionParams(1.0, sinks=torch.zeros(1)))


@given(
    rows=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    tokens=st.integers(1, 40),
    prefix=st.sampled_from([0, 1, 15, 16, 127, 128, 129, 300]),
    stored=st.integers(1, 150),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_the_cpp_kernel_gives_what_a_mask_over_copies_gives(
    rows: int,
    kv_heads: int,
    groups: int,
    tokens: int,
    prefix: int,
    stored: int,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if reason := build.why_not():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = drawn(rows, kv_heads, groups, tokens, 8)
    own_keys = [drawn(kv_heads, prefix, 8), drawn(kv_heads, prefix, 6)]
    own_keys += [drawn(rows, kv_heads, stored, 8), drawn(rows, kv_heads, stored, 6)]
    starts = torch.randint(0, stored, (rows,), generator=generator)
    params = AttentionParams(0.37, softcap=softcap, sinks=torch.randn(kv_heads * groups) if sinks else None)
    got = choose.build("cpp").extend(query, *own_keys, starts, params)
    wide = [each.float() for each in own_keys]
    keys, values = (
        torch.cat([each.expand(rows, -1, -1, -1), own], 2) for each, own in zip(wide, wide[2:], strict=False)
    )
    seen = torch.arange(stored) <= (starts[:, None] + torch.arange(tokens))[..., None]  # (rows, tokens, stored)
    whole = torch.cat([torch.ones(rows, tokens, prefix, dtype=torch.bool), seen], 2)
    whole = whole[:, None, None].expand(-1, 1, groups, -1, -1).reshape(rows, 1, groups * tokens, -1)
    want = sdpa.masked(query.float().flatten(2, 3), keys, values, whole, params).unflatten(2, (groups, tokens))
    assert got is not None
    assert torch.allclose(got.float(), want, atol=1e-5 if dtype == torch.float32 else 0.05)
    alone = choose.build("cpp").extend(
        query[-1:], *own_keys[:2], own_keys[2][-1:], own_keys[3][-1:], starts[-1:], params
    )
    assert alone is not None
    assert torch.equal(alone[0], got[-1]), "a row's bits depend on its company"
