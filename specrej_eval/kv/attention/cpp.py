"""A C++ kernel of our own for CPUs, compiled on the machine (``kv/native``).

Keys and values of a prefix are laid out for vector products once a layer, for all rows; scores and weights of a few
queries at a time stay in the first cache, under a softmax that is carried on from block to block of keys (online
softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135), over the prefix first and then over the row's own suffix.
In bfloat16 it multiplies pairs (AVX512-BF16 where there is one), sums in float32 and rounds weights once, as flash
attention does. A row's numbers do not depend on its company, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous
from specrej_eval.kv.cache import Prefix, SuffixPool
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

    def _decode_groups(
        self,
        groups: Sequence[tuple[Prefix, SuffixPool]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        new = (query, key, value)
        if params.sinks is not None or any(each.stride(-1) != 1 or each.dtype != query.dtype for each in new):
            return None
        batch, heads, _, _ = query.shape
        out = value.new_empty(batch, 1, heads, value.shape[-1])
        for prefix, pool in groups:
            if not _is_noted(pool.noted.get(layer), prefix, pool):
                mine = _note(prefix, pool, layer, query, out)
                if mine is None:
                    return None
                pool.noted[layer] = mine
        told = noted(groups, layer, params)
        told.query, told.key, told.value = (each.data_ptr() for each in new)
        for name, each in zip(("query", "key", "value", "out"), (*new, out.transpose(1, 2)), strict=True):
            setattr(told, f"{name}_row", each.stride(0))
            setattr(told, f"{name}_head", each.stride(1))
        told.out = out.data_ptr()
        kernels = build.library()
        scratch = torch.empty(kernels.decode_bytes(ctypes.byref(told)), dtype=torch.uint8)
        told.scratch = scratch.data_ptr()
        kernels.decode(ctypes.byref(told))
        if (ours := sum(pool.rows for _, pool in groups)) < batch:
            out[ours:] = 0
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
        own = suffix_key, suffix_value
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
    own = (prefix_key[None, :, :0], prefix_value[None, :, :0]) if suffix is None else suffix
    own_key, own_value = map(last_dim_contiguous, own)
    prefix_key, own_key = map(_in_words, (prefix_key, own_key))
    sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
    own_starts = None if own_starts is None else own_starts.contiguous()
    told = _request(query, prefix_key, prefix_value, own_key, own_value, out)
    told.causal_start, told.window = start, 0 if start < 0 else params.window or 0
    told.scale, told.softcap = params.scale, params.softcap or 0
    told.sinks = None if sinks is None else sinks.data_ptr()
    told.suffix_starts, told.new_tokens = None if own_starts is None else own_starts.data_ptr(), new_tokens
    kernels = build.library()
    scratch = torch.empty(kernels.scratch_bytes(ctypes.byref(told)), dtype=torch.uint8)
    told.scratch = scratch.data_ptr()
    kernels.attention(ctypes.byref(told))


def _request(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, own_key: Tensor, own_value: Tensor, out: Tensor
) -> Any:
    """``build.Attention`` of these (see ``_attend``), whose last dims are contiguous; every row sees all."""
    rows, kv_heads, groups, width = query.shape
    return build.Attention(
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
        rows=rows,
        kv_heads=kv_heads,
        groups=groups,
        width=width,
        value_width=out.shape[-1],
        prefix=prefix_key.shape[1],
        suffix=own_key.shape[2],
        causal_start=-1,
        single=query.dtype == torch.float32,
    )


@dataclass(frozen=True, slots=True)
class _Noted:
    """One layer of a group, as the kernel is told of it, for as long as its memory stays where it is."""

    prefix: Prefix
    capacity: int
    told: Any
    """``build.Attention``; which rows of a step are its own, and how long its suffix is, are told with each step."""
    address: int


def _is_noted(mine: Any, prefix: Prefix, pool: SuffixPool) -> bool:
    """Whether it tells of where a layer's memory lies now, with room for the next token."""
    known = isinstance(mine, _Noted) and mine.prefix is prefix
    return known and mine.capacity >= max(pool.capacity, pool.length + 1)


def noted(groups: Sequence[tuple[Prefix, SuffixPool]], layer: int, params: AttentionParams) -> Any:
    """``build.Decode`` of a layer, without what depends on its queries; None if a group's memory is not noted."""
    mine: list[Any] = [pool.noted.get(layer) for _, pool in groups]
    if not all(_is_noted(each, *group) for each, group in zip(mine, groups, strict=True)):
        return None
    count = len(groups)
    addresses = (ctypes.c_void_p * count)(*[each.address for each in mine])
    rows = (ctypes.c_int64 * count)(*[pool.rows for _, pool in groups])
    suffixes = (ctypes.c_int64 * count)(*[pool.length + 1 for _, pool in groups])
    places = ctypes.addressof(addresses), ctypes.addressof(rows), ctypes.addressof(suffixes)
    told: Any = build.Decode(*places, count)
    told.arrays = addresses, rows, suffixes  # they live as long as it
    told.window, told.scale, told.softcap = params.window or 0, params.scale, params.softcap or 0
    return told


def _note(prefix: Prefix, pool: SuffixPool, layer: int, query: Tensor, out: Tensor) -> _Noted | None:
    """None where memory is not laid out as the kernel reads it, or where there is none yet."""
    own = pool.ready(layer)
    if own is None or pool.length >= pool.capacity:
        return None
    stored = (prefix.keys[layer], prefix.values[layer], *own)
    if any(each.stride(-1) != 1 or each.dtype != query.dtype or not each.is_cpu for each in stored):
        return None
    if any(_in_words(keys) is not keys for keys in stored[::2]):
        return None
    kv_heads = own[0].shape[1]
    by_kv_head = query[: pool.rows, :, 0].unflatten(1, (kv_heads, -1)), out[: pool.rows, 0].unflatten(1, (kv_heads, -1))
    told = _request(by_kv_head[0], *stored, by_kv_head[1])
    return _Noted(prefix, pool.capacity, told, ctypes.addressof(told))
