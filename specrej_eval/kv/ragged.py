"""Rows of unequal lengths behind one prefix, several new tokens each: what scoring needs and decoding does not.

The new tokens of all rows are *packed* into one sequence, so that a model's linear layers waste nothing on padding;
only inside attention is there a row dimension, padded and masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.memory import twice
from specrej_eval.kv.steps import SDPA, Step

_SCORE_BYTES = 128 * 2**20
"""Most memory of a layer's attention scores, were they materialised (with softcap or sinks they are); rows take turns
beyond that, which also bounds the copies of the prefix."""


class RaggedPool(SuffixPool):
    """Suffix KV of rows with lengths of their own. Positions are counted from the first token behind the prefix.

    What lies behind a row's length is masked, but must be a number: 0 x NaN is NaN. So memory starts as zeros.
    """

    def _allocate(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_zeros(*shape)

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of a layer, over whatever was there.

        Args:
            key, value: (tokens, kv_heads, head_dim), packed.
            rows, slots: (tokens,), int64: where each goes.

        Returns:
            Keys and values of all rows, (rows, kv_heads, capacity, head_dim) views.
        """
        for store, new in zip(self._stores, (key, value), strict=True):
            if layer not in store:
                store[layer] = new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[2])
            store[layer][rows, :, slots] = new
        keys, values = (store[layer][: self.rows] for store in self._stores)
        return keys, values

    def gather(self, places: Sequence[int], length: int, capacity: int, device: torch.device) -> None:
        """Keep the rows at ``places`` (duplicates fork), their first ``length`` positions; room for ``capacity``."""
        index = twice(lambda: torch.tensor(list(places), dtype=torch.int64, device=device))
        self.length = min(length, self.capacity)
        self.select(index, capacity)
        twice(lambda: self.to(device))  # ``select`` moves a layer to the host where memory is short


class ExtendStep(Step):
    """New tokens of consecutive rows of a pool: what one forward pass reads.

    Args:
        prefix: what all rows share.
        starts: per row, tokens behind the prefix that are stored already; new ones are written from there on.
        counts: per row, new tokens; at least one.
        pool: where keys and values are kept; None: nowhere, the rows are read from the prefix on (``starts`` are 0).
        first: the first row's place in the pool.
        align: stored lengths and padded counts are rounded up to this, so that on a CPU a row's bits depend on its
            company as little as possible.
    """

    def __init__(
        self,
        prefix: Prefix,
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        pool: RaggedPool | None,
        first: int = 0,
        align: int = 1,
        device: torch.device,
        attention: AttentionBackend = SDPA,
    ) -> None:
        super().__init__(prefix.length, attention)
        self.prefix = prefix
        self.pool = pool
        self.first = first
        self.num_rows = len(counts)
        self.num_tokens = sum(counts)
        self.longest = -(-max(counts) // align) * align
        self.stored = -(-max(start + count for start, count in zip(starts, counts, strict=True)) // align) * align
        """Positions behind the prefix that attention looks at."""
        repeats = torch.tensor(counts, device=device)
        self.starts = torch.tensor(starts, device=device)  # (rows,)
        self.rows = torch.arange(self.num_rows, device=device).repeat_interleave(repeats)  # (tokens,)
        ends = repeats.cumsum(0)
        self.places = (
            torch.arange(self.num_tokens, device=device) - (ends - repeats)[self.rows]
        )  # (tokens,), in its row
        self.slots = self.places + self.starts[self.rows]  # (tokens,), behind the prefix
        self.positions = self.slots + prefix.length  # (tokens,), in the whole sequence

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``. Batch 1: the tokens of all rows are packed, padding behind them; zeros for padding."""
        _, heads, tokens, width = query.shape
        queries, new_key, new_value = (new[0, :, : self.num_tokens].transpose(0, 1) for new in (query, key, value))
        keys, values = self._store(layer, new_key, new_value)  # (rows, kv_heads, stored, head_dim)
        kv_heads = keys.shape[1]
        padded = query.new_zeros(self.num_rows, self.longest, heads, width)
        padded[self.rows, self.places] = queries
        padded = padded.reshape(self.num_rows, self.longest, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        span = self.prefix.length + self.stored
        at_once = max(1, _SCORE_BYTES // (4 * heads * self.longest * span))
        out = query.new_zeros(tokens, heads, values.shape[3])
        parts = []
        for start in range(0, self.num_rows, at_once):
            rows = slice(start, start + at_once)
            parts.append(self._attend_rows(layer, rows, padded[rows], keys[rows], values[rows], params))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)  # (rows, longest, heads, head_dim of the values)
        out[: self.num_tokens] = whole[self.rows, self.places]
        return out[None]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.pool or RaggedPool(self.num_rows, capacity=self.stored)
        keys, values = pool.write(layer, key, value, self.rows + self.first, self.slots)
        mine = slice(self.first, self.first + self.num_rows)
        return keys[mine, :, : self.stored], values[mine, :, : self.stored]

    def _attend_rows(
        self,
        layer: int,
        rows: slice,
        query: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        """(rows, kv_heads, groups, longest, head_dim) -> (rows, longest, heads, head_dim of the values)."""
        count, kv_heads, groups, longest, width = query.shape
        keys = torch.cat([_expanded(self.prefix.keys[layer], count), suffix_key], dim=2)
        values = torch.cat([_expanded(self.prefix.values[layer], count), suffix_value], dim=2)
        sources = torch.arange(keys.shape[2], device=query.device)
        own = (
            self.prefix.length + self.starts[rows, None] + torch.arange(longest, device=query.device)
        )  # (rows, longest)
        seen = sources <= own[..., None]  # (rows, longest, prefix + stored)
        if params.window is not None:
            seen &= sources > own[..., None] - params.window
        seen = seen[:, None, None].expand(-1, 1, groups, -1, -1).reshape(count, 1, groups * longest, -1)
        out = self.attention.masked(query.reshape(count, kv_heads, groups * longest, width), keys, values, seen, params)
        return out.reshape(count, kv_heads, groups, longest, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _expanded(prefix: Tensor, rows: int) -> Tensor:
    """(kv_heads, tokens, head_dim) -> (rows, kv_heads, tokens, head_dim), no copy."""
    return prefix.expand(rows, *prefix.shape)
