"""Rows of unequal lengths behind their prompts, several new tokens each: what scoring needs and decoding does not.

The new tokens of all rows, of one prompt or of several, are *packed* into one sequence, so that a model's linear layers
waste nothing on padding; only inside attention is there a row dimension, padded and masked, and each prompt by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from specrej_eval.kv.attention import sdpa
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


class NewTokens:
    """New tokens of consecutive rows of a pool, behind one prefix.

    What rows have in common goes through the model once: a token is fed for one of the rows that have it behind the
    same tokens. Each row attends for itself, to keys and values of its own.

    Args:
        prefix: what all rows share.
        rows: per row, the ids of all its tokens behind the prefix.
        starts: per row, how many of them are stored already; new ones, at least one, are written from there on.
        pool: where keys and values are kept; None: nowhere, the rows are read from the prefix on (``starts`` are 0).
        first: the first row's place in the pool.
        align: stored lengths and padded counts are rounded up to this, so that on a CPU a row's bits depend on its
            company as little as possible.
    """

    def __init__(
        self,
        prefix: Prefix,
        rows: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        *,
        pool: RaggedPool | None,
        first: int = 0,
        align: int = 1,
        device: torch.device,
        attention: AttentionBackend = SDPA,
    ) -> None:
        self.attention = attention
        self.prefix = prefix
        self.pool = pool
        self.first = first
        self.counts = [len(ids) - start for ids, start in zip(rows, starts, strict=True)]
        """New tokens of each row."""
        self.num_rows = len(rows)
        self.longest = -(-max(self.counts) // align) * align
        self.stored = -(-max(map(len, rows)) // align) * align
        """Positions behind the prefix that attention looks at."""
        fed, owners, self.ids = _in_common(rows, starts)
        """``ids``: those that are fed."""
        repeats = torch.tensor(self.counts, device=device)
        self.starts = torch.tensor(starts, device=device)  # (rows,)
        self.rows = torch.arange(self.num_rows, device=device).repeat_interleave(repeats)  # (tokens,)
        ends = repeats.cumsum(0)
        self.places = torch.arange(sum(self.counts), device=device) - (ends - repeats)[self.rows]  # (tokens,), new ones
        self.slots = self.places + self.starts[self.rows]  # (tokens,), behind the prefix
        self._fed = None if fed == list(range(len(fed))) else torch.tensor(fed, device=device)
        """(tokens,): where each is among those that are fed; None if they are the same."""
        owner = torch.tensor(owners, device=device)  # (fed,): where among the tokens
        self.fed_rows, self.fed_places = self.rows[owner], self.places[owner]  # (fed,)
        self.positions = self.slots[owner] + prefix.length  # (fed,), in the whole sequence
        self._seen: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Store a layer's new keys and values, and attend.

        Args:
            query: (fed, heads, head_dim), packed; key, value: the same with kv_heads.

        Returns:
            (fed, heads, head_dim of the values).
        """
        heads, width = query.shape[1:]
        keys, values = self._store(layer, self._each(key), self._each(value))  # (rows, kv_heads, stored, head_dim)
        kv_heads = keys.shape[1]
        padded = query.new_zeros(self.num_rows, self.longest, heads, width)
        padded[self.rows, self.places] = self._each(query)
        padded = padded.reshape(self.num_rows, self.longest, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        span = self.prefix.length + self.stored
        at_once = max(1, _SCORE_BYTES // (4 * heads * self.longest * span))
        parts = []
        for start in range(0, self.num_rows, at_once):
            rows = slice(start, start + at_once)
            parts.append(self._attend_rows(layer, rows, padded[rows], keys[rows], values[rows], params))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)  # (rows, longest, heads, head_dim of the values)
        return whole[self.fed_rows, self.fed_places]

    def split(self, fed: Tensor) -> tuple[Tensor, ...]:
        """(fed, width) -> of each row (new tokens, width)."""
        found: tuple[Tensor, ...] = self._each(fed).split(self.counts)
        return found

    def _each(self, fed: Tensor) -> Tensor:
        """(fed, ...) -> (tokens, ...)"""
        return fed if self._fed is None else fed[self._fed]

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
        prefix_key, prefix_value = self.prefix.keys[layer], self.prefix.values[layer]
        cut = params.window is not None and self.prefix.length + self.stored > params.window
        if not cut:
            stored = (prefix_key, prefix_value, suffix_key, suffix_value)
            found = self.attention.extend(query, *stored, self.starts[rows], params)
            if found is not None:
                return found.permute(0, 3, 1, 2, 4).flatten(2, 3)
        seen = self._seen_by(rows, params.window)
        if sdpa.extends_by_products(query, params) and self.prefix.length and not cut:
            own = seen[..., self.prefix.length :]
            out = sdpa.extend(query, prefix_key, prefix_value, suffix_key, suffix_value, own, params)
            return out.permute(0, 3, 1, 2, 4).flatten(2, 3)
        keys = torch.cat([_expanded(prefix_key, count), suffix_key], dim=2)
        values = torch.cat([_expanded(prefix_value, count), suffix_value], dim=2)
        seen = seen[:, None, None].expand(-1, 1, groups, -1, -1).reshape(count, 1, groups * longest, -1)
        out = self.attention.masked(query.reshape(count, kv_heads, groups * longest, width), keys, values, seen, params)
        return out.reshape(count, kv_heads, groups, longest, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _seen_by(self, rows: slice, window: int | None) -> Tensor:
        """(rows, longest, prefix + stored): the keys that each query sees. The same in all layers with that window."""
        seen = self._seen.get((rows.start, window))
        if seen is None:
            sources = torch.arange(self.prefix.length + self.stored, device=self.starts.device)
            places = torch.arange(self.longest, device=self.starts.device)
            own = self.prefix.length + self.starts[rows, None] + places  # (rows, longest)
            seen = sources <= own[..., None]
            if window is not None:
                seen &= sources > own[..., None] - window
            if self.num_rows * self.longest * len(sources) <= _SCORE_BYTES:
                self._seen[rows.start, window] = seen
        return seen


class ExtendStep(Step):
    """New tokens of rows of some prompts, packed one behind the other at batch 1. Tokens beyond theirs are padding."""

    def __init__(self, parts: Sequence[NewTokens]) -> None:
        super().__init__(parts[0].prefix.length)
        self.parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``; zeros for padding."""
        counts = [len(part.ids) for part in self.parts]
        num_tokens = sum(counts)
        packed = (new[0, :, :num_tokens].transpose(0, 1).split(counts) for new in (query, key, value))
        outs = [part.attend(layer, *mine, params) for part, *mine in zip(self.parts, *packed, strict=True)]
        missing = query.shape[2] - num_tokens
        if missing:
            outs.append(outs[0].new_zeros(missing, *outs[0].shape[1:]))
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


def _in_common(rows: Sequence[tuple[int, ...]], starts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """What of some rows' new tokens is fed, if a token counts once that several rows have behind the same tokens.

    Returns:
        Of each new token, row by row, its number among those that are fed; of each of these, the number of a token that
        it is fed for, and its id.
    """
    counts = [len(ids) - start for ids, start in zip(rows, starts, strict=True)]
    offsets = [0, *accumulate(counts)]
    fed = [-1] * offsets[-1]
    owners: list[int] = []
    ids: list[int] = []
    before: tuple[int, ...] = ()
    path: list[int] = []  # of each token of the row before, its number; -1 if it is not fed
    for place in sorted(range(len(rows)), key=rows.__getitem__):  # each begins like the one before as far as it can
        row, start, offset = rows[place], starts[place], offsets[place]
        same = common(before, row)
        path = path[:same] + [-1] * (len(row) - same)
        fresh = [position for position in range(start, len(row)) if path[position] < 0]
        for position in fresh:
            path[position] = len(ids)
            ids.append(row[position])
            owners.append(offset + position - start)
        fed[offset : offset + counts[place]] = path[start:]
        before = row
    return fed, owners, ids


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _expanded(prefix: Tensor, rows: int) -> Tensor:
    """(kv_heads, tokens, head_dim) -> (rows, kv_heads, tokens, head_dim), no copy."""
    return prefix.expand(rows, *prefix.shape)
