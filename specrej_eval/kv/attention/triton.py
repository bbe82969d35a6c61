"""A Triton kernel of our own: the prefix as one product for all rows, suffixes beside it, merged where they are read.

One kernel, launched twice a layer. Over the prefix a tile of queries is any rows and query heads of one kv head, so
keys are read once a tile and not once a row; long prefixes are cut into parts for the sake of occupancy. Over suffixes
a tile is one row's query heads of one kv head; having read its own keys it takes in what was found in the prefix, and
the sinks. All sums are float32; products of float32 are not rounded to TF32.

``TRITON_INTERPRET=1`` runs it on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous

try:
    import triton
    import triton.language as tl
except Exception:  # not installed, or for another torch; ``missing`` says which
    triton = tl = None

_PROGRAMS = 256
"""Programs that keep a GPU busy: long key ranges are cut into parts until there are as many. The same on every GPU, so
that the order of sums is."""
_PART_TOKENS = 256
"""No part is shorter than this."""
_TILE_ROWS = 64
_LEAST_TILE = 16
"""Rows of the smallest product tensor cores take."""
_CHANGING = ("rows_per_batch", "num_queries", "part_stride", "tokens", "part_tokens", "num_parts")
"""Numbers that change from step to step: a kernel is not compiled anew where one of them is 1 or a multiple of 16."""


class Backend(AttentionBackend):
    """Prefix-as-product and suffixes in one kernel; prompts are left to ``otherwise``."""

    name = "triton"
    package = "triton"
    distribution = "triton"
    install = "pip install triton  # PyTorch for CUDA on Linux brings it"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    preference = 2

    def why_not_on(self, device: torch.device) -> str | None:
        """See ``AttentionBackend.why_not_on``."""
        if device.type == "cpu" and interpreted():
            return self.missing()
        return super().why_not_on(device)

    def why_not(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
    ) -> str | None:
        """See ``AttentionBackend.why_not``."""
        if dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter cannot multiply bfloat16"
        return super().why_not(device, dtype, head_dim, value_dim)

    def _why_not_dims(self, head_dim: int, value_dim: int) -> str | None:
        if max(head_dim, value_dim) > 256:
            return f"its head dims are at most 256, not {max(head_dim, value_dim)}"
        return None

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
        rows, kv_heads, groups, _ = query.shape
        prefix, suffix = prefix_key.shape[1], tokens
        shared = _num_parts(prefix, -(-rows * groups // _tile_rows(query)) * kv_heads)
        own = _num_parts(suffix, rows * kv_heads) - 1  # the last part is read by the launch that merges
        cut = 0 if own <= 0 else -(-suffix // (own + 1)) * own
        parts = shared + max(own, 0)
        # (parts, rows, kv_heads, groups, head_dim of the values), (parts, rows, kv_heads, groups)
        out_parts = query.new_empty(parts, rows, kv_heads, groups, suffix_value.shape[-1], dtype=torch.float32)
        lse_parts = query.new_empty(parts, rows, kv_heads, groups, dtype=torch.float32)
        out = suffix_value.new_empty(rows, kv_heads, groups, suffix_value.shape[-1])
        with torch.cuda.device_of(query):  # Triton launches on the current device
            if shared:
                _launch(query, prefix_key[None], prefix_value[None], params, out_parts, lse_parts, parts=shared)
            if own > 0:
                mine = out_parts[shared:], lse_parts[shared:]
                _launch(query, suffix_key[:, :, :cut], suffix_value[:, :, :cut], params, *mine, parts=own)
            keys, values = suffix_key[:, :, cut:], suffix_value[:, :, cut:]
            _launch(query, keys, values, params, out_parts, lse_parts, parts=1, merged=out)
        return out


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _num_parts(tokens: int, programs: int) -> int:
    """How many parts a range of keys is cut into, none of them empty: by shape alone."""
    if not tokens:
        return 0
    wanted = min(-(-tokens // _PART_TOKENS), max(1, _PROGRAMS // programs))
    return -(-tokens // -(-tokens // wanted))


def _tile_rows(query: Tensor) -> int:
    """Queries of one kv head that a program takes."""
    wanted = _TILE_ROWS if _power_of_two(query.shape[-1]) * query.element_size() <= 512 else _TILE_ROWS // 2
    return max(_LEAST_TILE, min(wanted, _power_of_two(query.shape[0] * query.shape[2])))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    out_parts: Tensor,
    lse_parts: Tensor,
    *,
    parts: int,
    merged: Tensor | None = None,
) -> None:
    """Attention over one range of keys.

    Args:
        query: (rows, kv_heads, groups, head_dim).
        key, value: (1 or rows, kv_heads, tokens, head_dim): all rows' or each row's own.
        out_parts, lse_parts: where ``parts`` parts are written; with ``merged``, what is taken in.
        merged: (rows, kv_heads, groups, head_dim of the values): where the whole is written.
    """
    query, key, value = map(last_dim_contiguous, (query, key, value))
    rows, kv_heads, groups, _ = query.shape
    batch, tokens, value_dim = key.shape[0], key.shape[2], value.shape[3]
    per_batch = rows // batch
    constants = _shape_constants(query[:per_batch], value_dim)
    tiles = -(-per_batch * groups // constants["TILE"])
    grid = (tiles * batch * kv_heads, parts)  # only the first dim of a grid may be larger than 65,535
    sinks = params.sinks if merged is not None else None
    _kernel(interpreted())[grid](
        query,
        key,
        value,
        out_parts,
        lse_parts,
        merged if merged is not None else out_parts,
        sinks if sinks is not None else lse_parts,
        per_batch,
        per_batch * groups,
        rows * kv_heads * groups,
        tokens,
        -(-tokens // parts),
        out_parts.shape[0],
        params.scale,
        params.softcap or 1.0,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        KV_HEADS=kv_heads,
        GROUPS=groups,
        SOFTCAP=params.softcap is not None,
        SINKS=sinks is not None,
        MERGES=merged is not None,
        **constants,
        **_OPTIONS,
    )


_OPTIONS = {"num_warps": 4, "num_stages": 2}


def _shape_constants(query: Tensor, value_dim: int) -> dict[str, Any]:
    """What is compiled in of shape and dtype: tiles that fit into a GPU's shared memory.

    Args:
        query: (rows of one batch, kv_heads, groups, head_dim).
    """
    width = query.shape[-1]
    widest = _power_of_two(max(width, value_dim)) * query.element_size()
    return {
        "DIM": width,
        "VALUE_DIM": value_dim,
        "TILE": _tile_rows(query),
        "KEYS": max(_LEAST_TILE, min(64, 64 * 256 // widest)),
        "BLOCK": max(_LEAST_TILE, _power_of_two(width)),
        "VALUE_BLOCK": max(_LEAST_TILE, _power_of_two(value_dim)),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


@cache
def _kernel(interpret: bool) -> Any:
    del interpret  # compiled and interpreted are two
    return triton.jit(_attend, do_not_specialize=_CHANGING)


def _attend(  # one program: a tile of queries of one kv head, over one part of the keys
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    out_parts: tl.tensor,  # float32 (parts, rows, kv_heads, groups, head_dim of the values)
    lse_parts: tl.tensor,  # float32 (parts, rows, kv_heads, groups)
    merged: tl.tensor,  # (rows, kv_heads, groups, head_dim of the values)
    sinks: tl.tensor,  # (kv_heads * groups,)
    rows_per_batch: tl.tensor,
    num_queries: tl.tensor,  # of one batch and kv head
    part_stride: tl.tensor,
    tokens: tl.tensor,
    part_tokens: tl.tensor,
    num_parts: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    query_row_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_group_stride: tl.tensor,
    key_batch_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_batch_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    MERGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    tiles = tl.cdiv(num_queries, TILE)
    stretch = tl.program_id(0) // tiles  # tiles that read the same keys are neighbours
    head = (stretch % KV_HEADS).to(tl.int64)  # a large pool has more elements than int32 can count
    batch = (stretch // KV_HEADS).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    there = place < num_queries
    row = batch * rows_per_batch + place // GROUPS
    group = place % GROUPS
    index = (row * KV_HEADS + head) * GROUPS + group  # of (rows, kv_heads, groups)
    dims = tl.arange(0, BLOCK)
    value_dims = tl.arange(0, VALUE_BLOCK)

    from_query = query + row * query_row_stride + head * query_head_stride + group * query_group_stride
    queries = tl.load(from_query[:, None] + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    from_key = key + batch * key_batch_stride + head * key_head_stride
    from_value = value + batch * value_batch_stride + head * value_head_stride

    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, VALUE_BLOCK], tl.float32)
    for start in range(first, last, KEYS):
        token = start + tl.arange(0, KEYS)
        seen = token < last
        keys = tl.load(
            from_key + token[None, :] * key_token_stride + dims[:, None],
            mask=seen[None, :] & (dims < DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        if SOFTCAP:  # tanh
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(most - higher)
        values = tl.load(
            from_value + token[:, None] * value_token_stride + value_dims[None, :],
            mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        out = out * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        most = higher

    written = there[:, None] & (value_dims < VALUE_DIM)[None, :]
    if MERGES:
        for other in range(0, num_parts):
            at = index + tl.cast(other, tl.int64) * part_stride
            lse = tl.load(lse_parts + at, mask=there, other=0.0)
            higher = tl.maximum(most, lse)
            shrunk = tl.exp(most - higher)
            weight = tl.exp(lse - higher)
            found = tl.load(out_parts + at[:, None] * VALUE_DIM + value_dims[None, :], mask=written, other=0.0)
            total = total * shrunk + weight
            out = out * shrunk[:, None] + found * weight[:, None]
            most = higher
        if SINKS:
            sink = tl.load(sinks + head * GROUPS + group, mask=there, other=0.0).to(tl.float32)
            higher = tl.maximum(most, sink)
            shrunk = tl.exp(most - higher)
            total = total * shrunk + tl.exp(sink - higher)
            out = out * shrunk[:, None]
        whole = out / total[:, None]
        tl.store(
            merged + index[:, None] * VALUE_DIM + value_dims[None, :],
            whole.to(merged.dtype.element_ty),
            mask=written,
        )
    else:
        at = index + part * part_stride
        tl.store(lse_parts + at, most + tl.log(total), mask=there)
        tl.store(out_parts + at[:, None] * VALUE_DIM + value_dims[None, :], out / total[:, None], mask=written)
