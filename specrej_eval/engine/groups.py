"""A group of rows of one prompt with one length: their KV and everything else that is per row, on the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specrej_eval.core import TokenStat
from specrej_eval.engine.sampling import row_stream
from specrej_eval.kv.cache import Prefix, SuffixPool

CPU_TOKEN_ALIGN = 16  # see SuffixPool


def padded(rowwise: Tensor, align: int) -> Tensor:
    """(rows, ...) -> (rows and padding, ...): the last row again, until there are a multiple of ``align``."""
    missing = -rowwise.shape[0] % align
    if not missing:
        return rowwise
    return torch.cat([rowwise, rowwise[-1:].expand(missing, *rowwise.shape[1:])])


class Group:
    """Rows that share a prefix and a length. Row order inside a group means nothing; ``row_ids`` says who is where."""

    def __init__(
        self, prefix: Prefix, row_ids: list[int], *, pool: SuffixPool | None, capacity: int, device: Any
    ) -> None:
        self.prefix = prefix
        self.row_ids = row_ids
        self.pool = pool
        """Suffix KV on the shared-prefix path."""
        self.cache: Any = None
        """A transformers cache on the replicated path, with rows of padding behind the group's own. None: the next step
        makes it (again), from the prefix's."""
        self.length = 0
        """Tokens fed: positions whose KV is stored."""
        self.num_sampled = 0
        """Tokens sampled; the last one has not been fed yet."""
        self.sampled_at_look = 0
        """``num_sampled`` at the last look."""
        rows = len(row_ids)
        self.ids = torch.tensor(row_ids, dtype=torch.int64, device=device)  # (rows,)
        self.tokens = torch.empty(rows, capacity, dtype=torch.int32, device=device)  # (rows, capacity)
        self.stats: dict[TokenStat, Tensor] = {}  # each (rows, capacity), float32
        """What is kept of every token besides its id."""
        self.positions = torch.full((rows,), prefix.length, dtype=torch.int64, device=device)  # (rows,)
        self.steps = torch.zeros(rows, dtype=torch.int64, device=device)  # (rows,), num_sampled as a tensor
        self.key = torch.tensor(0)
        """Stream key of the prompt: 0-d int64 on the host."""
        self.streams = row_stream(self.key, self.ids)  # (rows,)
        self.capacity = capacity
        self._device = device

    @classmethod
    def start(
        cls,
        prefix: Prefix,
        row_ids: list[int],
        *,
        capacity: int,
        device: torch.device,
        recorded: Sequence[TokenStat] = (),
    ) -> Group:
        """Fresh rows behind a prefix; ``capacity`` = tokens each row may reach before the next ``select``."""
        pool = None
        if prefix.keys:
            pool = SuffixPool(len(row_ids), align=CPU_TOKEN_ALIGN if device.type == "cpu" else 1)
            pool.reserve(capacity)
        group = cls(prefix, row_ids, pool=pool, capacity=capacity, device=device)
        for name in recorded:
            group.stats[name] = torch.empty(len(row_ids), capacity, dtype=torch.float32, device=device)
        return group

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    def advance(self) -> None:
        """The token just fed counts."""
        self.length += 1
        self.positions += 1
        if self.pool is not None:
            self.pool.advance()

    def use_streams(self, key: Tensor) -> None:
        """Give every row its random stream. ``key``: 0-d int64 on the host."""
        self.key = key
        self.streams = row_stream(key, self.ids)

    def sampled(self, tokens: Tensor, stats: Mapping[TokenStat, Tensor]) -> None:
        """A token was drawn for every row: (rows,) ids, and (rows,) numbers for each name in ``stats``."""
        self.tokens[:, self.num_sampled] = tokens.to(torch.int32)
        for name, buffer in self.stats.items():
            buffer[:, self.num_sampled] = stats[name]
        self.num_sampled += 1
        self.steps += 1

    def select(self, places: Sequence[int], row_ids: list[int], capacity: int) -> None:
        """Gather the rows at ``places`` (duplicates fork) under new row ids, with room for ``capacity`` tokens."""
        index = torch.tensor(list(places), dtype=torch.int64, device=self._device)
        # everything that may run out of memory comes before the first change
        tokens = self._grown(self.tokens, index, capacity)
        stats = {name: self._grown(buffer, index, capacity) for name, buffer in self.stats.items()}
        positions, steps = self.positions[index], self.steps[index]
        ids = torch.tensor(row_ids, dtype=torch.int64, device=self._device)
        if self.pool is not None:
            self.pool.select(index, capacity)
        self._reorder_cache(index)
        self.tokens, self.stats, self.positions, self.steps, self.ids = tokens, stats, positions, steps, ids
        self.row_ids = row_ids
        self.use_streams(self.key)
        self.capacity = max(self.capacity, capacity)

    def _reorder_cache(self, index: Tensor) -> None:
        cache, self.cache = self.cache, None
        if cache is None:
            return
        try:
            cache.reorder_cache(padded(index, self.prefix.row_align))
        except torch.OutOfMemoryError:
            return  # some layers are reordered and some are not: it is made again
        self.cache = cache

    def _grown(self, buffer: Tensor, index: Tensor, capacity: int) -> Tensor:
        new = buffer.new_empty(index.shape[0], max(self.capacity, capacity))
        new[:, : self.num_sampled] = buffer[index, : self.num_sampled]
        return new

    def drop(self, places: Sequence[int]) -> None:
        """Forget the rows at ``places``: each hole takes a row from the end, so nothing else moves."""
        gone = set(places)
        rows = self.num_rows - len(gone)
        holes = sorted(place for place in gone if place < rows)
        sources = [place for place in range(rows, self.num_rows) if place not in gone]
        order = list(range(rows))
        for hole, source in zip(holes, sources, strict=True):
            order[hole] = source
        self._reorder_cache(torch.tensor(order, dtype=torch.int64, device=self._device))
        hole_index = torch.tensor(holes, dtype=torch.int64, device=self._device)
        source_index = torch.tensor(sources, dtype=torch.int64, device=self._device)
        if self.pool is not None:
            self.pool.drop(source_index, hole_index, rows)
        for buffer in (self.tokens, self.ids, self.streams, *self.stats.values()):
            if holes:
                buffer[hole_index] = buffer[source_index]
        for hole, source in zip(holes, sources, strict=True):
            self.row_ids[hole] = self.row_ids[source]
        self.row_ids = self.row_ids[:rows]
        for name in ("tokens", "ids", "positions", "steps", "streams"):
            setattr(self, name, getattr(self, name)[:rows])
        self.stats = {name: buffer[:rows] for name, buffer in self.stats.items()}

    def split(self) -> Group:
        """Keep the first half of the rows; return a group of the rest."""
        at = self.num_rows // 2
        rest = copy.copy(self)
        if self.pool is not None:
            rest.pool = self.pool.split(at)
        self.cache = rest.cache = None
        rest.row_ids, self.row_ids = self.row_ids[at:], self.row_ids[:at]
        for name in ("ids", "tokens", "positions", "steps", "streams"):
            whole = getattr(self, name)
            setattr(rest, name, whole[at:])
            setattr(self, name, whole[:at])
        rest.stats = {stat: buffer[at:] for stat, buffer in self.stats.items()}
        self.stats = {stat: buffer[:at] for stat, buffer in self.stats.items()}
        return rest

    def park(self) -> None:
        """Move the KV to host memory; a transformers cache is let go, and made again when it is needed."""
        self.cache = None
        if self.pool is not None:
            self.pool.to("cpu")

    def unpark(self) -> None:
        """Bring the KV back to the device."""
        if self.pool is not None:
            self.pool.to(self._device)
