"""Attention in plain PyTorch: runs anywhere, and the oracle for other backends.

Two ways to attend over (shared prefix, own suffix):

- ``math``: the two score blocks side by side under one softmax. Default on CPU: the fastest there for decode-sized
  queries, and a row's bits do not depend on how many rows are in the batch (torch's CPU flash kernel gives other bits
  when a row lands on another thread).
- ``flash``: two fused attentions, each with its log-sum-exp, merged (Hydragen, arXiv 2402.05099; FlashInfer's cascade).
  Default on CUDA in half precision. Never materialises scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous, merge, with_sinks

_QUERY_ALIGN = 16
"""On CPU, query rows of a matmul are padded to a multiple of this: with fewer than 4 rows per thread MKL takes
another kernel, whose bits differ (measured: 1-3 rows on one thread, also 5, 6, 7 and 9 on two)."""
_CACHE_BYTES = 8 * 2**20
"""Scores that are computed at a time on a CPU, in float32."""
_LONG_SOFTMAX = 128
"""Columns from which on torch's softmax of half-precision scores is faster than by way of float32."""


def prefill(query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
    """Causal attention of one chunk of the prompt.

    Args:
        query: (1, heads, chunk, head_dim), positions from ``start`` on.
        key, value: (kv_heads, start + chunk, head_dim).

    Returns:
        (1, heads, chunk, head_dim of the values).
    """
    _, heads, chunk, width = query.shape
    kv_heads = key.shape[0]
    groups = heads // kv_heads
    all_seen = params.window is None or start + chunk <= params.window
    plain = params.softcap is None and params.sinks is None and value.shape[-1] == width
    if plain and all_seen and not query.is_cuda:
        by = _prefill_fused if query.dtype == torch.float32 else _prefill_products
        return by(query, key, value, start, params)
    positions = torch.arange(start, start + chunk, device=query.device)[:, None]  # (chunk, 1)
    sources = torch.arange(key.shape[1], device=query.device)[None]  # (1, start + chunk)
    seen = sources <= positions
    if params.window is not None:
        seen &= sources > positions - params.window
    packed = query.reshape(1, kv_heads, groups * chunk, width)
    return masked(packed, key[None], value[None], seen.repeat(groups, 1), params).reshape(1, heads, chunk, -1)


def _prefill_products(query: Tensor, key: Tensor, value: Tensor, start: int, params: AttentionParams) -> Tensor:
    """``prefill`` by products of matrices, so many heads at a time that their scores stay in the cache: in half
    precision four times as fast as the fused kernel (measured on a CPU with bfloat16 instructions)."""
    _, heads, chunk, width = query.shape
    kv_heads, columns, _ = key.shape
    groups = heads // kv_heads
    queries = (query[0] * params.scale).reshape(kv_heads, groups * chunk, width)
    future = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)  # (queries, keys)
    out = query.new_empty(kv_heads, groups * chunk, value.shape[2])
    at_once = max(1, _CACHE_BYTES // (4 * chunk * columns)) * chunk
    for head in range(kv_heads):
        for first in range(0, groups * chunk, at_once):
            rows = slice(first, first + at_once)
            scores = queries[head, rows] @ key[head].T  # (groups at once * chunk, columns)
            scores.unflatten(0, (-1, chunk))[..., start:].masked_fill_(future, float("-inf"))
            torch.mm(_weights(scores, columns, params, None), value[head], out=out[head, rows])
    return out.reshape(1, heads, chunk, -1)


def _prefill_fused(query: Tensor, key: Tensor, value: Tensor, start: int, params: AttentionParams) -> Tensor:
    """``prefill`` by fused kernels: what lies before the chunk, and the chunk itself; no mask is made."""
    heads, kv_heads = query.shape[1], key.shape[0]
    # the query heads of one kv head as a batch: its keys are shared, not repeated
    # (groups, kv_heads, chunk, head_dim)
    queries = query[0].unflatten(0, (kv_heads, heads // kv_heads)).transpose(0, 1)
    keys, values = (each.expand(queries.shape[0], *each.shape) for each in (key, value))
    out, lse = _attend(queries, keys[:, :, start:], values[:, :, start:], params.scale, is_causal=True)
    if start:
        out, _ = merge(out, lse, *_attend(queries, keys[:, :, :start], values[:, :, :start], params.scale))
    return out.to(value.dtype).transpose(0, 1).flatten(0, 1)[None]


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, params: AttentionParams) -> Tensor:
    """Attention where each query sees keys of its own.

    Args:
        query: (batch, kv_heads, groups * tokens, head_dim): the query heads of each kv head one after the other.
        key, value: (batch, kv_heads, keys, head_dim).
        seen: bool, broadcast to (batch, kv_heads, groups * tokens, keys); the window is part of it.

    Returns:
        (batch, kv_heads, groups * tokens, head_dim of the values).
    """
    if params.softcap is None and params.sinks is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=params.scale)
    products = torch.matmul(query, key.transpose(2, 3)).float() * params.scale
    scores = _capped(products, params).masked_fill(~seen, float("-inf"))
    extra = None
    if params.sinks is not None:
        batch, kv_heads, queries, _ = query.shape
        per_head = params.sinks.view(1, kv_heads, -1, 1)
        extra = per_head.expand(batch, -1, -1, queries // per_head.shape[2]).reshape(batch, kv_heads, queries)
    return torch.matmul(_softmax(scores, extra).to(value.dtype), value)


def extends_by_products(query: Tensor, params: AttentionParams) -> bool:
    """Whether ``extend`` is the faster way: on a CPU in half precision, where its fused kernels are slow."""
    plain = params.softcap is None and params.sinks is None
    return plain and query.device.type == "cpu" and query.dtype != torch.float32


def extend(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    seen: Tensor,
    params: AttentionParams,
) -> Tensor:
    """Several new tokens per row over the whole shared prefix and what each sees of the row's own suffix.

    Neither softcap nor sinks. The prefix is not copied for the rows, as it would be for ``masked``.

    Args:
        query: (rows, kv_heads, groups, tokens, head_dim).
        prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); at least one token.
        suffix_key, suffix_value: (rows, kv_heads, stored, head_dim).
        seen: bool, (rows, tokens, stored).

    Returns:
        (rows, kv_heads, groups, tokens, head_dim of the values).
    """
    rows, kv_heads, groups, tokens, _ = query.shape
    prefix, stored = prefix_key.shape[1], suffix_key.shape[2]
    at_once = max(1, _CACHE_BYTES // (4 * kv_heads * groups * tokens * (prefix + stored)))
    out = query.new_empty(rows, kv_heads, groups, tokens, prefix_value.shape[2])
    scaled = (query * params.scale).flatten(2, 3)  # (rows, kv_heads, groups * tokens, head_dim)
    unseen = ~seen[:, None, None].expand(-1, 1, groups, -1, -1).flatten(2, 3)  # (rows, 1, groups * tokens, stored)
    for first in range(0, rows, at_once):
        mine = slice(first, first + at_once)
        own = torch.matmul(scaled[mine], suffix_key[mine].transpose(2, 3)).masked_fill_(unseen[mine], float("-inf"))
        count = own.shape[0]
        shared = _products(_packed(scaled[mine]), prefix_key)  # (kv_heads, rows * groups * tokens, prefix)
        weights = _weights(torch.cat([shared, _packed(own)], dim=-1), prefix + stored, params, None)
        own_weights = _unpack(weights[..., prefix:], count, groups * tokens)
        shared = _unpack(torch.bmm(weights[..., :prefix], prefix_value), count, groups * tokens)
        out[mine] = torch.matmul(own_weights, suffix_value[mine]).add_(shared).reshape(out[mine].shape)
    return out


def decode(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
    *,
    tokens: int | None = None,
    way: str | None = None,
) -> Tensor:
    """One new token per row over the shared prefix and the row's own suffix. Windows are cut by the caller (slices).

    Args:
        query: (rows, kv_heads, groups, head_dim): the query heads of each kv head side by side.
        prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); may hold no token.
        suffix_key, suffix_value: (rows, kv_heads, stored, head_dim); at least one token.
        tokens: of the suffix that count, from the first on; None = all. What is stored behind them must be
            finite: it is multiplied by 0.
        way: ``math`` or ``flash``; None = by device and dtype.

    Returns:
        (rows, kv_heads, groups, head_dim of the values), in the values' dtype.
    """
    way = way or _way(query, suffix_value)
    tokens = suffix_key.shape[2] if tokens is None else tokens
    if way == "math" or params.softcap is not None:
        return _decode_math(query, prefix_key, prefix_value, suffix_key, suffix_value, params, tokens)
    return _decode_flash(
        query, prefix_key, prefix_value, suffix_key[:, :, :tokens], suffix_value[:, :, :tokens], params
    )


def _way(query: Tensor, value: Tensor) -> str:
    """``flash`` where torch's fused kernel takes queries and values like these, else ``math``."""
    fused = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    same = query.shape[-1] == value.shape[-1]
    return "flash" if fused and same and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 else "math"


def decode_masked(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
    *,
    prefix_seen: Tensor | None,
    suffix_seen: Tensor,
    way: str | None = None,
) -> Tensor:
    """``decode`` where masks say which keys count: no shape depends on how long the suffix is (``kv/graphs.py``).

    Args:
        query: (rows, kv_heads, groups, head_dim).
        prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); may hold no token.
        suffix_key, suffix_value: (rows, kv_heads, stored, head_dim), finite where no token is.
        prefix_seen: bool, (prefix tokens,); None = all.
        suffix_seen: bool, (stored,); at least one.
        way: of the prefix, as in ``decode``. The suffix has no fused kernel with a mask and a log-sum-exp.

    Returns:
        (rows, kv_heads, groups, head_dim of the values), in the values' dtype.
    """
    rows, kv_heads, groups, _ = query.shape
    # a row's head as one of a batch: (rows * kv_heads, groups or stored, head_dim)
    own = _masked_part(query.flatten(0, 1), suffix_key.flatten(0, 1), suffix_value.flatten(0, 1), suffix_seen, params)
    out, lse = own[0].view(rows, kv_heads, groups, -1), own[1].view(rows, kv_heads, groups)
    if prefix_key.shape[1]:
        way = way or _way(query, prefix_value)
        if way == "flash" and params.softcap is None and prefix_seen is None:
            packed = _packed(query)[None]  # (1, kv_heads, rows * groups, head_dim)
            shared, shared_lse = (
                part[0] for part in _attend(packed, prefix_key[None], prefix_value[None], params.scale)
            )
        else:
            shared, shared_lse = _masked_part(_packed(query), prefix_key, prefix_value, prefix_seen, params)
        unpacked = _unpack(shared, rows, groups), _unpack(shared_lse[..., None], rows, groups)[..., 0]
        out, lse = merge(out, lse, *unpacked)
    if params.sinks is not None:
        out = with_sinks(out, lse, params.sinks.view(1, kv_heads, groups))
    return out.to(suffix_value.dtype)


def _masked_part(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys and its log-sum-exp, so low where no key is seen that it weighs nothing.

    Args:
        query: (batch, queries, head_dim).
        key, value: (batch, keys, head_dim).
        seen: bool, (keys,); None = all.

    Returns:
        (batch, queries, head_dim of the values) and (batch, queries), float32.
    """
    scores = _capped(_wide_products(query, key) * params.scale, params)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)  # not infinite: no NaN where none is seen
    return torch.bmm(scores.softmax(-1).to(value.dtype), value).float(), scores.logsumexp(-1)


def _wide_products(query: Tensor, key: Tensor) -> Tensor:
    """(batch, queries, d) x (batch, keys, d) -> (batch, queries, keys) in float32, as fused kernels have scores: not
    rounded to half precision, which large ones do not bear."""
    keys = key.transpose(1, 2)
    if query.dtype == torch.float32:
        return torch.bmm(query, keys)
    if query.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # torch 2.8; keys are not copied
        return torch.bmm(query, keys, out_dtype=torch.float32)
    return torch.bmm(query.float(), keys.float())


def _decode_math(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
    tokens: int,
) -> Tensor:
    rows, kv_heads, groups, _ = query.shape
    # scaled here, where it costs least: all scores of a prompt's rows are far larger than its queries
    scaled = query * params.scale
    own = torch.matmul(scaled, suffix_key.transpose(2, 3))  # (rows, kv_heads, groups, stored)
    prefix = prefix_key.shape[1]
    sinks = None if params.sinks is None else params.sinks.view(kv_heads, 1, groups)
    if not prefix:
        extra = None if sinks is None else sinks.transpose(0, 1).expand(rows, -1, -1)
        return torch.matmul(_weights(own, tokens, params, extra), suffix_value)
    columns = prefix + own.shape[3]
    out = query.new_empty(rows, kv_heads, groups, prefix_value.shape[2])
    own_weights = torch.empty_like(own)
    for heads, mine in _blocks(rows, kv_heads, groups * columns * 4, query.is_cuda):
        part = own[mine, heads]  # (rows of the block, heads of the block, groups, stored)
        packed = _pack(scaled[mine, heads])
        shared = _products(packed, prefix_key[heads])
        scores = torch.cat([shared[:, : part.shape[0] * groups], _packed(part)], dim=-1)
        extra = None if sinks is None else sinks[heads].expand(-1, part.shape[0], -1).flatten(1)
        weights = _weights(scores, prefix + tokens, params, extra)  # (heads, rows * groups, prefix + stored)
        own_weights[mine, heads] = _unpack(weights[..., prefix:], part.shape[0], groups)
        shared = torch.bmm(_aligned(weights[..., :prefix]), prefix_value[heads])
        out[mine, heads] = _unpack(shared, part.shape[0], groups)
    return out.add_(torch.matmul(own_weights, suffix_value))


def _blocks(rows: int, kv_heads: int, row_bytes: int, on_cuda: bool) -> Iterator[tuple[slice, slice]]:
    """Heads and rows whose scores are computed together: on a CPU so many that they stay in its cache.

    Memory beyond a few megabytes is fresh from the kernel each time, and costs more than the arithmetic (measured:
    ten times as much at 64 rows behind 1,900 tokens).

    Args:
        row_bytes: of one row's float32 scores in one head.
    """
    heads = kv_heads if on_cuda else max(1, min(kv_heads, _CACHE_BYTES // (rows * row_bytes)))
    at_once = rows if on_cuda else max(1, _CACHE_BYTES // (heads * row_bytes) // _QUERY_ALIGN) * _QUERY_ALIGN
    for head in range(0, kv_heads, heads):
        for row in range(0, rows, at_once):
            yield slice(head, head + heads), slice(row, row + at_once)


def _products(packed: Tensor, key: Tensor) -> Tensor:
    """(kv_heads, queries, head_dim) x (kv_heads, tokens, head_dim) -> (kv_heads, queries, tokens)."""
    if key.shape[1] == 1:  # a product with one column takes MKL's matrix-vector kernel, whose bits depend on the rows
        return (packed * key).sum(-1, keepdim=True)
    return torch.bmm(packed, key.transpose(1, 2))


def _weights(scores: Tensor, tokens: int, params: AttentionParams, extra: Tensor | None) -> Tensor:
    """Softmax in float32 over the first ``tokens`` columns, in the scores' dtype; 0 in the others.

    Args:
        scores: (..., columns), scaled; changed in place.
        extra: (...,), one more logit per query that takes its share and is dropped.
    """
    if params.softcap is not None or extra is not None:
        wide = _capped(scores[..., :tokens].float(), params)
        weights = scores.new_zeros(scores.shape)
        weights[..., :tokens] = _softmax(wide, extra)
        return weights
    if tokens < scores.shape[-1]:
        scores[..., tokens:] = float("-inf")
    if scores.dtype == torch.float32 or scores.shape[-1] >= _LONG_SOFTMAX:
        return scores.softmax(-1)  # in half precision too it counts in float32, and rounds once
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _capped(scores: Tensor, params: AttentionParams) -> Tensor:
    return scores if params.softcap is None else torch.tanh(scores / params.softcap) * params.softcap


def _pack(rowwise: Tensor) -> Tensor:
    """(rows, kv_heads, groups, x) -> (kv_heads, rows * groups, x), padded on CPU so that bits do not depend on rows."""
    return _aligned(_packed(rowwise))


def _packed(rowwise: Tensor) -> Tensor:
    """(rows, kv_heads, groups, x) -> (kv_heads, rows * groups, x)."""
    return rowwise.transpose(0, 1).flatten(1, 2)


def _aligned(packed: Tensor) -> Tensor:
    """Queries padded with zeros to a multiple of ``_QUERY_ALIGN``, on a CPU."""
    missing = -packed.shape[1] % _QUERY_ALIGN
    return packed if packed.is_cuda or not missing else functional.pad(packed, (0, 0, 0, missing))


def _unpack(packed: Tensor, rows: int, groups: int) -> Tensor:
    """(kv_heads, rows * groups padded, x) -> (rows, kv_heads, groups, x)."""
    kv_heads, _, width = packed.shape
    return packed[:, : rows * groups].reshape(kv_heads, rows, groups, width).transpose(0, 1)


def _softmax(scores: Tensor, extra: Tensor | None) -> Tensor:
    """Softmax over the last dim with one more logit per query that takes its share and is dropped."""
    if extra is None:
        return scores.softmax(-1)
    return torch.cat([scores, extra[..., None].to(scores.dtype)], dim=-1).softmax(-1)[..., :-1]


def _decode_flash(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
) -> Tensor:
    rows, kv_heads, groups, _ = query.shape
    out, lse = _attend(
        query, suffix_key, suffix_value, params.scale
    )  # (rows, kv_heads, groups, d), (rows, kv_heads, groups)
    if prefix_key.shape[1]:  # an empty part has no log-sum-exp: it is left out, not merged
        packed = query.transpose(0, 1).reshape(1, kv_heads, rows * groups, -1)
        shared, shared_lse = _attend(packed, prefix_key[None], prefix_value[None], params.scale)
        shared = shared.reshape(kv_heads, rows, groups, -1).transpose(0, 1)
        shared_lse = shared_lse.reshape(kv_heads, rows, groups).transpose(0, 1)
        out, lse = merge(out, lse, shared, shared_lse)
    if params.sinks is not None:
        out = with_sinks(out, lse, params.sinks.view(1, kv_heads, groups))
    return out.to(suffix_value.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Fused attention with its log-sum-exp. All (batch, heads, tokens, head_dim); the output comes back in float32."""
    fused = (
        torch.ops.aten._scaled_dot_product_flash_attention
        if query.is_cuda
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )
    query, key, value = map(last_dim_contiguous, (query, key, value))  # a CPU's kernel does not look
    out, lse = fused(query, key, value, is_causal=is_causal, scale=scale)[:2]
    return out.float(), lse.reshape(query.shape[:3]).float()


class Backend(AttentionBackend):
    """The functions above. It can do everything, anywhere."""

    name = "sdpa"
    reads_behind = True

    def why_not_on(self, device: torch.device) -> str | None:
        """See ``AttentionBackend.why_not_on``."""
        return None

    def why_not(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
    ) -> str | None:
        """See ``AttentionBackend.why_not``."""
        return None

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        return prefill(query, key, value, start=start, params=params)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, params: AttentionParams) -> Tensor:
        return masked(query, key, value, seen, params)

    def _decode(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        params: AttentionParams,
        tokens: int,
    ) -> Tensor:
        return decode(query, prefix_key, prefix_value, suffix_key, suffix_value, params, tokens=tokens)
