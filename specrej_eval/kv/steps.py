"""A forward pass in progress: where its new keys and values go, and which ones its queries attend to.

Three kinds: a chunk of a prompt (``PrefillStep``), one token for every row of some groups (``DecodeStep``), and new
tokens of rows of unequal lengths (``ragged.ExtendStep``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

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


class PrefillStep(Step):
    """A chunk of a prompt, at batch 1.

    Args:
        start: position of the chunk's first token.
    """

    def __init__(self, prefix: Prefix, start: int, attention: AttentionBackend = SDPA) -> None:
        super().__init__(start, attention)
        self.prefix = prefix

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``."""
        stored_key, stored_value = self.prefix.store(layer, key, value, self.length)
        out = self.attention.prefill(query, stored_key, stored_value, start=self.length, params=params)
        return out.transpose(1, 2).contiguous()


class DecodeStep(Step):
    """One token for every row of some groups.

    Args:
        groups: prefix and suffixes of each, in batch order. Rows of the batch beyond theirs are padding.
    """

    def __init__(self, groups: Sequence[tuple[Prefix, SuffixPool]], attention: AttentionBackend = SDPA) -> None:
        prefix, pool = groups[0]
        super().__init__(prefix.length + pool.length, attention)
        self.groups = groups

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``; zeros for padding."""
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
