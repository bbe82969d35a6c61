"""Attention in plain PyTorch: runs anywhere, and the oracle for other backends.

Two ways to attend over (shared prefix, own suffix):

- ``math``: the two score blocks side by side under one softmax. Default on CPU: the fastest there for decode-sized
  queries, and a row's bits do not depend on how many rows are in the batch (torch's CPU flash kernel gives other bits
  when a row lands on another thread).
- ``flash``: two fused attentions, each with its log-sum-exp, merged (Hydragen, arXiv 2402.05099; FlashInfer's cascade).
  Default on CUDA in half precision. Never materialises scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams

_QUERY_ALIGN = 16
"""On CPU, query rows of a matmul are padded to a multiple of this: with fewer than 4 rows per thread MKL takes
another kernel, whose bits differ (measured: 1-3 rows on one thread, also 5, 6, 7 and 9 on two)."""


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
    positions = torch.arange(start, start + chunk, device=query.device)[:, None]  # (chunk, 1)
    sources = torch.arange(key.shape[1], device=query.device)[None]  # (1, start + chunk)
    seen = sources <= positions
    if params.window is not None:
        seen &= sources > positions - params.window
    packed = query.reshape(1, kv_heads, groups * chunk, width)
    return masked(packed, key[None], value[None], seen.repeat(groups, 1), params).reshape(1, heads, chunk, -1)


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
    scores = _scores(torch.matmul(query, key.transpose(2, 3)), params).masked_fill(~seen, float("-inf"))
    extra = None
    if params.sinks is not None:
        batch, kv_heads, queries, _ = query.shape
        per_head = params.sinks.view(1, kv_heads, -1, 1)
        extra = per_head.expand(batch, -1, -1, queries // per_head.shape[2]).reshape(batch, kv_heads, queries)
    return torch.matmul(_softmax(scores, extra).to(value.dtype), value)


def decode(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
    *,
    way: str | None = None,
) -> Tensor:
    """One new token per row over the shared prefix and the row's own suffix. Windows are cut by the caller (slices).

    Args:
        query: (rows, kv_heads, groups, head_dim): the query heads of each kv head side by side.
        prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); may hold no token.
        suffix_key, suffix_value: (rows, kv_heads, suffix tokens, head_dim); at least one token.
        way: ``math`` or ``flash``; None = by device and dtype.

    Returns:
        (rows, kv_heads, groups, head_dim of the values), in the values' dtype.
    """
    if way is None:
        fused = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
        way = "flash" if fused and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 else "math"
    attend = _decode_math if way == "math" or params.softcap is not None else _decode_flash
    return attend(query, prefix_key, prefix_value, suffix_key, suffix_value, params)


def _decode_math(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    params: AttentionParams,
) -> Tensor:
    rows, kv_heads, groups, _ = query.shape
    prefix = prefix_key.shape[1]
    scores = torch.matmul(query, suffix_key.transpose(2, 3))  # (rows, kv_heads, groups, suffix)
    if prefix:
        packed = _pack(query)
        if prefix == 1:  # a product with one column takes MKL's matrix-vector kernel, whose bits depend on the rows
            shared = (packed * prefix_key).sum(-1, keepdim=True)
        else:
            shared = torch.bmm(packed, prefix_key.transpose(1, 2))  # (kv_heads, rows * groups padded, prefix)
        scores = torch.cat([_unpack(shared, rows, groups), scores], dim=-1)
    extra = None if params.sinks is None else params.sinks.view(1, kv_heads, groups).expand(rows, -1, -1)
    scores = _scores(scores, params)  # under the same name: memory of the products is free for what follows
    weights = _softmax(scores, extra).to(suffix_value.dtype)
    out = torch.matmul(weights[..., prefix:], suffix_value)
    if prefix:
        out = out + _unpack(torch.bmm(_pack(weights[..., :prefix]), prefix_value), rows, groups)
    return out


def _scores(products: Tensor, params: AttentionParams) -> Tensor:
    """Products of queries and keys, scaled and capped in float32."""
    scores = products.float() * params.scale
    return scores if params.softcap is None else torch.tanh(scores / params.softcap) * params.softcap


def _pack(rowwise: Tensor) -> Tensor:
    """(rows, kv_heads, groups, x) -> (kv_heads, rows * groups, x), padded on CPU so that bits do not depend on rows."""
    rows, kv_heads, groups, width = rowwise.shape
    packed = rowwise.transpose(0, 1).reshape(kv_heads, rows * groups, width)
    missing = -(rows * groups) % _QUERY_ALIGN
    if missing and not rowwise.is_cuda:
        packed = functional.pad(packed, (0, 0, 0, missing))
    return packed


def _unpack(packed: Tensor, rows: int, groups: int) -> Tensor:
    """(kv_heads, rows * groups padded, x) -> (rows, kv_heads, groups, x)."""
    return packed[:, : rows * groups].reshape(packed.shape[0], rows, groups, -1).transpose(0, 1)


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
        # a sink is one more logit without a value: it scales the output by the mass the others keep
        out = out * torch.sigmoid(lse - params.sinks.view(1, kv_heads, groups).float())[..., None]
    return out.to(suffix_value.dtype)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (natural logarithms).

    Args:
        out_a, out_b: (..., head_dim), float32.
        lse_a, lse_b: (...), float32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None], lse


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fused attention with its log-sum-exp. All (batch, heads, tokens, head_dim); the output comes back in float32."""
    if query.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return out.float(), lse.reshape(query.shape[:3]).float()


class Backend(AttentionBackend):
    """The functions above. It can do everything, anywhere."""

    name = "sdpa"
    devices = ("cpu", "cuda")

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
    ) -> Tensor:
        return decode(query, prefix_key, prefix_value, suffix_key, suffix_value, params)
