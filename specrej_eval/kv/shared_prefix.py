"""The attention function transformers calls while we run a model, and the cache object handed to the model.

Registered as ``specrej_shared_prefix``. A model reaches it in every layer with rotary position already applied; which
keys it attends to is taken from the step in progress (module-level slot), not from the arguments, because some models
drop keyword arguments on the way (stablelm, nemotron).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.ragged import Extension

NAME = "specrej_shared_prefix"
PREFILL_CHUNK = 512
"""Prompt tokens per forward. Boundaries are counted from token 0, so a prompt's bits never depend on its company."""
ROW_ALIGN = 16
"""On CPU a batch is padded to a multiple of this many rows, so that every thread's share of a matmul has at least 4
rows: with fewer, MKL takes another kernel and a row's bits would depend on its company."""


@dataclass(slots=True)
class Step:
    """One forward pass in progress: a chunk of a prompt, one token for every row of some groups, or new tokens of rows
    of unequal lengths."""

    backend: ModuleType = sdpa
    prefix: Prefix | None = None
    """Prefill: the prompt being stored."""
    start: int = 0
    """Prefill: position of the chunk's first token."""
    groups: Sequence[tuple[Prefix, SuffixPool]] = field(default_factory=list)
    """Decode: the groups in batch order. Rows beyond their sum are padding."""
    extension: Extension | None = None
    """Ragged: rows of one prompt, their new tokens packed into one sequence. Tokens beyond theirs are padding."""
    windows: dict[int, int | None] = field(default_factory=dict)
    """Out: the sliding window each layer asked for."""


_step: Step | None = None


@contextmanager
def running(step: Step) -> Iterator[Step]:
    """Make ``step`` the one the attention function and the cache see."""
    global _step
    previous, _step = _step, step
    try:
        yield step
    finally:
        _step = previous


def _current() -> Step:
    if _step is None:
        raise RuntimeError(f"attention implementation {NAME!r} was called outside a step of ours.")
    return _step


class _Layer(CacheLayerMixin):
    """Tells the model where it is; holds nothing. Some models cache other things than they attend to (MLA: latents)."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        del key_states, value_states  # nothing to allocate: prefixes and pools allocate themselves

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        del args, kwargs  # what is stored are the keys and values that reach the attention function
        return key_states, value_states

    def get_seq_length(self) -> int:
        step = _current()
        if step.prefix is not None:
            return step.start
        if step.extension is not None:
            return step.extension.prefix.length
        prefix, pool = step.groups[0]
        return prefix.length + pool.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SharedPrefixCache(Cache):
    """The ``past_key_values`` of every forward pass of ours."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])  # type: ignore[no-untyped-call]  # an untyped base


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        query: (1, heads, chunk, head_dim) in prefill, (rows padded, heads, 1, head_dim) in decode, (1, heads, tokens
            padded, head_dim) in an extension.
        key, value: the same with kv_heads, the new positions; stored in the step's prefix or pools.

    Returns:
        (batch, tokens, heads, head_dim), contiguous, and None for the weights.
    """
    del attention_mask, dropout, kwargs  # our engine pads nothing and never trains
    step = _current()
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of transformers carries an int
    heads, width = query.shape[1], query.shape[-1]
    scale = width**-0.5 if scaling is None else float(scaling)
    step.windows[layer] = sliding_window
    if step.prefix is not None:
        prefix_key, prefix_value = step.prefix.store(layer, key, value, step.start)
        out = step.backend.prefill(
            query,
            prefix_key,
            prefix_value,
            start=step.start,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        return out.transpose(1, 2).contiguous(), None
    if step.extension is not None:
        out = step.extension.attend(
            layer, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux
        )
        return out[None], None
    parts = []
    first = 0
    for prefix, pool in step.groups:
        rows = slice(first, first + pool.rows)
        pool.append(layer, key[rows], value[rows])
        suffix_key, suffix_value = pool.layer(layer)
        prefix_key, prefix_value = prefix.keys[layer], prefix.values[layer]
        if sliding_window is not None:
            oldest = max(0, prefix.length + pool.length - sliding_window + 1)
            prefix_key, prefix_value = prefix_key[:, oldest:], prefix_value[:, oldest:]
            gone = max(0, oldest - prefix.length)
            suffix_key, suffix_value = suffix_key[:, :, gone:], suffix_value[:, :, gone:]
        kv_heads = suffix_key.shape[1]
        out = step.backend.decode(
            query[rows, :, 0].reshape(pool.rows, kv_heads, heads // kv_heads, width),
            prefix_key,
            prefix_value,
            suffix_key,
            suffix_value,
            scale=scale,
            softcap=softcap,
            sinks=s_aux,
        )
        parts.append(out.reshape(pool.rows, heads, -1))
        first += pool.rows
    if first < query.shape[0]:
        parts.append(parts[0].new_zeros(query.shape[0] - first, heads, parts[0].shape[-1]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None].contiguous(), None


AttentionInterface.register(NAME, attention_forward)
