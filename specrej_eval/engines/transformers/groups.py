"""A group of rows of one prompt with one length: their KV and everything else that is per row, on the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specrej_eval.core import TokenStat
from specrej_eval.engines.transformers.sampling import row_stream
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.memory import is_out_of_memory

CPU_TOKEN_ALIGN = 16  # see SuffixPool
_PER_ROW = ("ids", "tokens", "positions", "steps", "streams")
"""Tensors of a group with a first dimension of rows."""


@dataclass(slots=True)
class Selection:
    """Rows of a group gathered, all but their KV: what ``Group.take`` puts in place."""

    index: Tensor
    """(rows,), int64: the places they come from."""
    row_ids: list[int]
    capacity: int
    tokens: Tensor
    stats: dict[TokenStat, Tensor]
    positions: Tensor
    steps: Tensor
    ids: Tensor
    streams: Tensor


def padded(rowwise: Tensor, align: int) -> Tensor:
    """(rows, ...) -> (rows and padding, ...): the last row again, until there are a multiple of ``align``."""
    missing = -rowwise.shape[0] % align
    if not missing:
        return rowwise
    return torch.cat([rowwise, rowwise[-1:].expand(missing, *rowwise.shape[1:])])


class Group:
    """Rows that share a prefix and a length. Row order inside a group means nothing; ``row_ids`` says who is where.

    Memory may run out in any method; then nothing has changed, or nothing that doing it again does not put right.
    """

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
        self.count(self.positions + 1, self.steps, fed=True, sampled=False)  # it was sampled before

    def next_counters(self, *, fed: bool) -> tuple[Tensor, Tensor]:
        """``positions`` and ``steps`` as they will be after a step; ``fed``: a token was read in it."""
        return (self.positions + 1 if fed else self.positions), self.steps + 1

    def count(self, positions: Tensor, steps: Tensor, *, fed: bool, sampled: bool = True) -> None:
        """A step counts from now on. Touches no tensor: this cannot fail."""
        self.positions, self.steps = positions, steps
        self.num_sampled += sampled
        if fed:
            self.length += 1
            if self.pool is not None:
                self.pool.advance()

    def use_streams(self, key: Tensor) -> None:
        """Give every row its random stream. ``key``: 0-d int64 on the host."""
        self.key = key
        self.streams = row_stream(key, self.ids)

    def write(self, tokens: Tensor, stats: Mapping[TokenStat, Tensor]) -> None:
        """Put down what was drawn, where ``count`` makes it count: (rows,) ids, and (rows,) numbers for each name."""
        self.tokens[:, self.num_sampled] = tokens.to(torch.int32)
        for name, buffer in self.stats.items():
            buffer[:, self.num_sampled] = stats[name]

    def sampled(self, tokens: Tensor, stats: Mapping[TokenStat, Tensor]) -> None:
        """A token was drawn for every row, and counts."""
        self.write(tokens, stats)
        self.count(*self.next_counters(fed=False), fed=False)

    def select(self, places: Sequence[int], row_ids: list[int], capacity: int) -> None:
        """Gather the rows at ``places`` (duplicates fork) under new row ids, with room for ``capacity`` tokens."""
        selection = self.selection(places, row_ids, capacity)
        self.gather(selection)
        self.take(selection)

    def selection(self, places: Sequence[int], row_ids: list[int], capacity: int) -> Selection:
        """All of ``select`` that changes nothing."""
        index = torch.tensor(list(places), dtype=torch.int64, device=self._device)
        capacity = max(self.capacity, capacity)
        ids = torch.tensor(row_ids, dtype=torch.int64, device=self._device)
        return Selection(
            index=index,
            row_ids=row_ids,
            capacity=capacity,
            tokens=self._grown(self.tokens, index, capacity),
            stats={name: self._grown(buffer, index, capacity) for name, buffer in self.stats.items()},
            positions=self.positions[index],
            steps=self.steps[index],
            ids=ids,
            streams=row_stream(self.key, ids),
        )

    def gather(self, selection: Selection) -> None:
        """Gather the KV, layer by layer: the one change that cannot be made ready beside what there is, as a budget
        that is full leaves no room for all layers twice. A layer that does not fit is gathered on the host."""
        if self.pool is not None:
            self.pool.select(selection.index, selection.capacity)
        self._reorder_cache(selection.index)

    def take(self, selection: Selection) -> None:
        """Put the rest of a selection in place. Touches no tensor: this cannot fail."""
        self.tokens, self.stats = selection.tokens, selection.stats
        self.positions, self.steps = selection.positions, selection.steps
        self.ids, self.streams, self.row_ids = selection.ids, selection.streams, selection.row_ids
        self.capacity = selection.capacity

    def _reorder_cache(self, index: Tensor) -> None:
        cache, self.cache = self.cache, None
        if cache is None:
            return
        try:
            cache.reorder_cache(padded(index, self.prefix.row_align))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return  # some layers are reordered and some are not: it is made again
        self.cache = cache

    def _grown(self, buffer: Tensor, index: Tensor, capacity: int) -> Tensor:
        new = buffer.new_empty(index.shape[0], capacity)
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
        order_index = torch.tensor(order, dtype=torch.int64, device=self._device)
        hole_index = torch.tensor(holes, dtype=torch.int64, device=self._device)
        source_index = torch.tensor(sources, dtype=torch.int64, device=self._device)
        # Rows are copied over rows that are leaving, and stay where they come from: copying them again is harmless.
        if self.pool is not None:
            self.pool.move(source_index, hole_index)
        for buffer in (self.tokens, self.ids, self.streams, *self.stats.values()):
            if holes:
                buffer[hole_index] = buffer[source_index]
        kept = {name: getattr(self, name)[:rows] for name in _PER_ROW}
        stats = {name: buffer[:rows] for name, buffer in self.stats.items()}
        self._reorder_cache(order_index)  # not harmless twice, but the last thing that can fail, and it does not
        for hole, source in zip(holes, sources, strict=True):
            self.row_ids[hole] = self.row_ids[source]
        self.row_ids = self.row_ids[:rows]
        for name, tensor in kept.items():
            setattr(self, name, tensor)
        self.stats = stats
        if self.pool is not None:
            self.pool.rows = rows

    def split(self) -> Group:
        """Keep the first half of the rows; return a group of the rest."""
        at = self.num_rows // 2
        halves = {name: (getattr(self, name)[:at], getattr(self, name)[at:]) for name in _PER_ROW}
        stats = {name: (buffer[:at], buffer[at:]) for name, buffer in self.stats.items()}
        rest = copy.copy(self)
        rest.pool = self.pool.split(at) if self.pool is not None else None
        self.cache = rest.cache = None
        rest.row_ids, self.row_ids = self.row_ids[at:], self.row_ids[:at]
        for name, (mine, theirs) in halves.items():
            setattr(self, name, mine)
            setattr(rest, name, theirs)
        self.stats = {name: mine for name, (mine, _) in stats.items()}
        rest.stats = {name: theirs for name, (_, theirs) in stats.items()}
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
