"""A forward pass in progress: where its new keys and values go, and which ones its queries attend to.

Three kinds: parts of prompts (``PrefillStep``), one token for every row of some groups (``DecodeStep``), and new
tokens of rows of unequal lengths (``ragged.ExtendStep``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams
from specrej_eval.kv.cache import Prefix, SuffixPool

SDPA = sdpa.Backend()


class Step(ABC):
    """One forward pass.

    Args:
        length: tokens stored before the first one that is read now; where the model takes itself to be.
        attention: who computes it.
    """

    def __init__(self, length: int, attention: AttentionBackend = SDPA) -> None:
        self.length = length
        self.attention = attention
        self.windows: dict[int, int | None] = {}
        """Out: the sliding window each layer asked for."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Store a layer's new keys and values, and attend.

        Args:
            query: (batch, heads, tokens, head_dim); key, value: the same with kv_heads, the new positions.

        Returns:
            (batch, tokens, heads, head_dim of the values), contiguous.
        """


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive tokens of a prompt, which are being read."""

    prefix: Prefix
    start: int
    """Position of the first of them."""
    count: int


class PrefillStep(Step):
    """Parts of some prompts, packed one behind the other at batch 1. Tokens beyond theirs are padding."""

    def __init__(self, parts: Sequence[PromptPart], attention: AttentionBackend = SDPA) -> None:
        super().__init__(parts[0].start, attention)
        self.parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``; zeros for padding."""
        outs = []
        for part, mine, new_key, new_value in zip(self.parts, *map(self._split, (query, key, value)), strict=True):
            keys, values = part.prefix.store(layer, new_key, new_value, part.start)
            # contiguous, so that bits do not depend on where in the pack a prompt is
            outs.append(self.attention.prefill(mine.contiguous(), keys, values, start=part.start, params=params))
        missing = query.shape[2] - sum(part.count for part in self.parts)
        if missing:
            outs.append(outs[0].new_zeros(1, query.shape[1], missing, outs[0].shape[3]))
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2).contiguous()

    def _split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(1, heads, tokens, head_dim) -> each part's."""
        counts = [part.count for part in self.parts]
        split: tuple[Tensor, ...] = packed[:, :, : sum(counts)].split(counts, dim=2)
        return split


class DecodeStep(Step):
    """One token for every row of some groups.

    Args:
        groups: prefix and suffixes of each, in batch order. Rows of the batch beyond theirs are padding.
    """

    def __init__(self, groups: Sequence[tuple[Prefix, SuffixPool]], attention: AttentionBackend = SDPA) -> None:
        prefix, pool = groups[0]
        super().__init__(prefix.length + pool.length, attention)
        self.groups = groups
        self.scratch = torch.empty(0, dtype=torch.uint8)
        """What kernels work in, one layer after the other."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``; zeros for padding."""
        if (found := self.attention.decode_groups(self.groups, layer, query, key, value, params)) is not None:
            return found
        batch, heads, _, width = query.shape
        kv_heads = key.shape[1]
        parts = []
        first = 0
        for prefix, pool in self.groups:
            rows = slice(first, first + pool.rows)
            pool.append(layer, key[rows], value[rows])
            suffix_key, suffix_value = pool.layer(layer)
            prefix_key, prefix_value = prefix.keys[layer], prefix.values[layer]
            tokens = pool.length + 1
            if params.window is not None:
                oldest = max(0, prefix.length + tokens - params.window)
                prefix_key, prefix_value = prefix_key[:, oldest:], prefix_value[:, oldest:]
                gone = max(0, oldest - prefix.length)
                suffix_key, suffix_value = suffix_key[:, :, gone:], suffix_value[:, :, gone:]
                tokens -= gone
            queries = query[rows, :, 0].reshape(pool.rows, kv_heads, heads // kv_heads, width)
            out = self.attention.decode(
                queries, prefix_key, prefix_value, suffix_key, suffix_value, params, tokens=tokens
            )
            parts.append(out.reshape(pool.rows, heads, -1))
            first += pool.rows
        if first < batch:
            parts.append(parts[0].new_zeros(batch - first, heads, parts[0].shape[-1]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None].contiguous()
