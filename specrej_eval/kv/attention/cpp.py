"""A C++ kernel of our own for CPUs, compiled on the machine (``kv/native``).

Keys and values of the prefix are laid out for vector products once a layer, for all rows; scores and weights of a few
queries at a time stay in the first cache, under a softmax that is carried on from block to block of keys (online
softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135), over the prefix first and then over the row's own suffix.
In bfloat16 it multiplies pairs (AVX512-BF16 where there is one), sums in float32 and rounds weights once, as flash
attention does. A row's numbers do not depend on its company, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous
from specrej_eval.kv.native import build


class Backend(AttentionBackend):
    """Decoding and prompts; other head dims, and float16, are left to ``otherwise``."""

    name = "cpp"
    install = "a C++ compiler, such as: apt-get install g++"
    devices = ("cpu",)
    dtypes = (torch.bfloat16, torch.float32)
    preference = 1

    def missing(self) -> str | None:
        """See ``AttentionBackend.missing``. Compiles the kernel, the first time ever."""
        return build.why_not()

    def built(self) -> str | None:
        """See ``AttentionBackend.built``."""
        return None if build.why_not() else str(build.library()._name).rpartition("/")[2]

    def _why_not_dims(self, head_dim: int, value_dim: int) -> str | None:
        return f"its head dims are even, not {head_dim}" if head_dim % 2 else None

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
        out = suffix_value.new_empty(*query.shape[:3], suffix_value.shape[-1])
        _attend(query, prefix_key, prefix_value, out, params, suffix=(suffix_key, suffix_value))
        return out

    def _extend(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        starts: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        tokens = query.shape[3]
        packed = query.flatten(2, 3)  # (rows, kv_heads, groups * tokens, head_dim)
        out = suffix_value.new_empty(*packed.shape[:3], suffix_value.shape[-1])
        own = (suffix_key, suffix_value)
        sinks = None if params.sinks is None else params.sinks.repeat_interleave(tokens)
        params = dataclasses.replace(params, sinks=sinks)
        _attend(packed, prefix_key, prefix_value, out, params, suffix=own, own_starts=starts, new_tokens=tokens)
        by_token: Tensor = out.unflatten(2, (-1, tokens))
        return by_token

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        _, heads, chunk, _ = query.shape
        by_kv_head = (key.shape[0], heads // key.shape[0])
        out = value.new_empty(chunk, heads, value.shape[-1])
        rows = query[0].transpose(0, 1).unflatten(1, by_kv_head)  # (chunk, kv_heads, groups, head_dim)
        _attend(rows, key, value, out.unflatten(1, by_kv_head), params, start=start)
        return out.transpose(0, 1)[None]


def _in_words(keys: Tensor) -> Tensor:
    """Keys as the kernel reads them: by words of 4 bytes. A copy only where they are parts of something of odd size."""
    if keys.dtype == torch.float32 or not (keys.data_ptr() % 4 or any(stride % 2 for stride in keys.stride()[:-1])):
        return keys
    return keys.clone(memory_format=torch.contiguous_format)


def _attend(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    params: AttentionParams,
    *,
    suffix: tuple[Tensor, Tensor] | None = None,
    start: int = -1,
    own_starts: Tensor | None = None,
    new_tokens: int = 1,
) -> None:
    """Fill ``out``.

    Args:
        query, out: (rows, kv_heads, groups, head_dim).
        prefix_key, prefix_value: (kv_heads, tokens, head_dim).
        suffix: keys and values, (rows, kv_heads, tokens, head_dim).
        start: row r sees ``start`` + r + 1 tokens of the prefix, or the window's part of them; -1 = each row sees all.
        own_starts: (rows,), int64: query g of a row sees so many + g % ``new_tokens`` + 1 tokens of the suffix; None =
            all of it.

    Raises:
        TypeError: they are of several dtypes.
        RuntimeError: no memory to work in.
    """
    kept = (prefix_key, prefix_value) if suffix is None else (prefix_key, prefix_value, *suffix)
    if any(each.dtype != query.dtype for each in kept):
        raise TypeError(f"queries are {query.dtype}, and what is kept is {', '.join({str(x.dtype) for x in kept})}")
    query, prefix_key, prefix_value = map(last_dim_contiguous, (query, prefix_key, prefix_value))
    own_key, own_value = (prefix_key[None], prefix_value[None]) if suffix is None else map(last_dim_contiguous, suffix)
    prefix_key, own_key = map(_in_words, (prefix_key, own_key))
    sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
    own_starts = None if own_starts is None else own_starts.contiguous()
    rows, kv_heads, groups, width = query.shape
    told: Any = build.Attention(
        query.data_ptr(),
        *query.stride()[:3],
        prefix_key.data_ptr(),
        prefix_value.data_ptr(),
        *prefix_key.stride()[:2],
        *prefix_value.stride()[:2],
        own_key.data_ptr(),
        own_value.data_ptr(),
        *own_key.stride()[:3],
        *own_value.stride()[:3],
        out.data_ptr(),
        *out.stride()[:3],
        None if sinks is None else sinks.data_ptr(),
        None,
        rows,
        kv_heads,
        groups,
        width,
        out.shape[-1],
        prefix_key.shape[1],
        0 if suffix is None else own_key.shape[2],
        start,
        0 if start < 0 else params.window or 0,
        None if own_starts is None else own_starts.data_ptr(),
        new_tokens,
        params.scale,
        params.softcap or 0,
        query.dtype == torch.float32,
    )
    kernels = build.library()
    scratch = torch.empty(kernels.scratch_bytes(ctypes.byref(told)), dtype=torch.uint8)
    told.scratch = scratch.data_ptr()
    kernels.attention(ctypes.byref(told))
