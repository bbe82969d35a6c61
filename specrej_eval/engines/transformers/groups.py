"""A group of rows of one prompt with one length: their KV and everything else that is per row, on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from specrej_eval.engines.transformers.sampling import row_stream, strata_of, stratified
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.memory import or_else

CPU_TOKEN_ALIGN = 32  # see SuffixPool: it grows by so much


@dataclass(frozen=True, slots=True)
class RowTensors:
    """What is kept of each row on the device, besides its KV. The first dimension is rows."""

    streams: Tensor
    """(rows,), int64: each row's random stream."""
    tokens: Tensor
    """(rows, capacity), int32."""
    stats: Tensor
    """(rows, capacity, numbers), float32: what is recorded of every token besides its id."""

    def map(self, change: Callable[[Tensor], Tensor]) -> RowTensors:
        """All of them changed alike."""
        return RowTensors(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a group gathered, all but their KV: what ``Group.take`` puts in place."""

    index: Tensor
    """(rows,), int64: the places they come from."""
    row_ids: list[int]
    rows: RowTensors


def padded(rowwise: Tensor, align: int) -> Tensor:
    """(rows, ...) -> (rows and padding, ...): the last row again, until there are a multiple of ``align``."""
    missing = -rowwise.shape[0] % align
    if not missing:
        return rowwise
    return torch.cat([rowwise, rowwise[-1:].expand(missing, *rowwise.shape[1:])])


class Group:
    """Rows that share a prefix and a length. Row order inside a group means nothing; ``row_ids`` says who is where.

    Memory may run out in any method; then nothing has changed, or nothing that doing it again does not put right.

    Args:
        prefix: what all rows share; they start right behind it.
        capacity: tokens each row may reach before the next ``select``.
        key: the prompt's stream key, 0-d int64 on the host.
        recorded: how many numbers are kept of every token.
    """

    def __init__(
        self,
        prefix: Prefix,
        row_ids: list[int],
        *,
        capacity: int,
        device: torch.device,
        key: Tensor | None = None,
        recorded: int = 0,
    ) -> None:
        self.prefix = prefix
        self.row_ids = row_ids
        self.pool: SuffixPool | None = None
        """Suffix KV on the shared-prefix path."""
        if prefix.keys:
            on_cpu = device.type == "cpu"
            self.pool = SuffixPool(
                len(row_ids), capacity=capacity, align=CPU_TOKEN_ALIGN if on_cpu else 1, grows=on_cpu
            )
        self.cache: Any = None
        """A transformers cache on the replicated path, with rows of padding behind the group's own. None: the next step
        makes it (again), from the prefix's."""
        self.length = 0
        """Tokens fed: positions whose KV is stored."""
        self.num_sampled = 0
        """Tokens sampled; the last one has not been fed yet."""
        self.sampled_at_look = 0
        """``num_sampled`` at the last look."""
        self.target = 0
        """``num_sampled`` at which decoding stops."""
        self.strata = 0
        """Rows over which uniforms are stratified (``variance_reduce``): those that the prompt starts. 0 = not."""
        self._places: tuple[list[int], Tensor] | None = None
        """Row ids and the same on the device."""
        self.given: Mapping[int, Sequence[int]] = {}
        """Row id -> the first tokens of a row that has been decoded before: it takes them again (``as_given``)."""
        self._key = torch.tensor(0) if key is None else key
        self._device = device
        self.rows = RowTensors(
            streams=self._streams(row_ids),
            tokens=torch.empty(len(row_ids), capacity, dtype=torch.int32, device=device),
            stats=torch.empty(len(row_ids), capacity, recorded, dtype=torch.float32, device=device),
        )

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    @property
    def is_done(self) -> bool:
        """Whether decoding has come to its target."""
        return self.num_sampled >= self.target

    @property
    def capacity(self) -> int:
        """Tokens there is room for in each row."""
        return self.rows.tokens.shape[1]

    def positions(self) -> Tensor:
        """(rows,), int64: where each row's next token to feed stands."""
        return torch.full((self.num_rows,), self.prefix.length + self.length, device=self._device)

    def steps(self) -> Tensor:
        """(rows,), int64: ``num_sampled`` of each row."""
        return torch.full((self.num_rows,), self.num_sampled, device=self._device)

    def _streams(self, row_ids: Sequence[int]) -> Tensor:
        return row_stream(self._key, torch.tensor(list(row_ids), dtype=torch.int64, device=self._device))

    def stratified(self, uniforms: Tensor) -> Tensor:
        """The rows' uniforms at this step, (rows,), each moved into the row's stratum."""
        if self._places is None or self._places[0] is not self.row_ids:
            self._places = self.row_ids, torch.tensor(self.row_ids, dtype=torch.int64, device=self._device)
        blocks = range(max(self.row_ids) // self.strata + 1)
        found = [strata_of(self._key, self.strata, block, self.num_sampled, self._device) for block in blocks]
        return stratified(uniforms, torch.cat(found)[self._places[1]], self.strata)

    def write(self, tokens: Tensor, stats: Tensor) -> None:
        """Put down what was drawn, (rows,) ids and (rows, numbers); raising ``num_sampled`` makes it count."""
        self.rows.tokens[:, self.num_sampled] = tokens.to(torch.int32)
        if stats.shape[1]:
            self.rows.stats[:, self.num_sampled] = stats

    def advance(self) -> None:
        """The token just fed counts. Touches no tensor: this cannot fail."""
        self.length += 1
        if self.pool is not None:
            self.pool.advance()

    def select(self, places: Sequence[int], row_ids: list[int], capacity: int) -> None:
        """Gather the rows at ``places`` (duplicates fork) under new row ids, with room for ``capacity`` tokens."""
        selection = self.selection(places, row_ids, capacity)
        self.gather(selection)
        self.take(selection)

    def selection(self, places: Sequence[int], row_ids: list[int], capacity: int) -> Selection:
        """All of ``select`` that changes nothing."""
        index = torch.tensor(list(places), dtype=torch.int64, device=self._device)
        capacity = max(self.capacity, capacity)
        rows = RowTensors(
            streams=self._streams(row_ids),
            tokens=self._grown(self.rows.tokens, index, capacity),
            stats=self._grown(self.rows.stats, index, capacity),
        )
        return Selection(index=index, row_ids=row_ids, rows=rows)

    def gather(self, selection: Selection) -> None:
        """Gather the KV, layer by layer: the one change that cannot be made ready beside what there is, as a budget
        that is full leaves no room for all layers twice. A layer that does not fit is gathered on the host."""
        if self.pool is not None:
            self.pool.select(selection.index, selection.rows.tokens.shape[1])
        self._reorder_cache(selection.index)

    def take(self, selection: Selection) -> None:
        """Put the rest of a selection in place. Touches no tensor: this cannot fail."""
        self.rows, self.row_ids = selection.rows, selection.row_ids

    def _reorder_cache(self, index: Tensor) -> None:
        cache, self.cache = self.cache, None
        if cache is None:
            return

        def reordered() -> Any:
            cache.reorder_cache(padded(index, self.prefix.row_align))
            return cache

        self.cache = or_else(reordered, lambda: None)  # some layers are reordered and some are not: it is made again

    def _grown(self, buffer: Tensor, index: Tensor, capacity: int) -> Tensor:
        new = buffer.new_empty(index.shape[0], capacity, *buffer.shape[2:])
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
        order_index, hole_index, source_index = (
            torch.tensor(found, dtype=torch.int64, device=self._device) for found in (order, holes, sources)
        )

        def moved(buffer: Tensor) -> Tensor:
            if holes:
                buffer[hole_index] = buffer[source_index]
            return buffer[:rows]

        # Rows are copied over rows that are leaving, and stay where they come from: copying them again is harmless.
        if self.pool is not None:
            self.pool.move(source_index, hole_index)
        kept = self.rows.map(moved)
        self._reorder_cache(order_index)  # not harmless twice, but the last thing that can fail, and it does not
        self.rows, self.row_ids = kept, [self.row_ids[place] for place in order]
        if self.pool is not None:
            self.pool.rows = rows

    def split(self) -> Group:
        """Keep the first half of the rows; return a group of the rest."""
        at = self.num_rows // 2
        mine, theirs = self.rows.map(lambda buffer: buffer[:at]), self.rows.map(lambda buffer: buffer[at:])
        rest = copy.copy(self)
        rest.pool = self.pool.split(at) if self.pool is not None else None
        self.cache = rest.cache = None
        self.rows, rest.rows = mine, theirs
        self.row_ids, rest.row_ids = self.row_ids[:at], self.row_ids[at:]
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


def as_given(groups: Sequence[Group], tokens: Tensor) -> Tensor:
    """The tokens drawn, (rows,) of all groups in order; for rows that were decoded before, those they had.

    On a CPU they are the same bits; where other company may change the last of them, a row must still be the one that
    was rejected.
    """
    if not any(group.given for group in groups):
        return tokens
    had = [
        row[group.num_sampled] if group.num_sampled < len(row) else -1
        for group in groups
        for row in (group.given.get(row_id, ()) for row_id in group.row_ids)
    ]
    known = torch.tensor(had, dtype=tokens.dtype, device=tokens.device)
    return torch.where(known < 0, tokens, known)


def in_strata(groups: Sequence[Group], uniforms: Tensor) -> Tensor:
    """The uniforms of a step, (rows,) of all groups in order; stratified over the rows of a prompt where it asks so."""
    if not any(group.strata for group in groups):
        return uniforms
    parts = uniforms.split([group.num_rows for group in groups])
    return torch.cat(
        [group.stratified(mine) if group.strata else mine for group, mine in zip(groups, parts, strict=True)]
    )
