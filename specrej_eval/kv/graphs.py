"""Decode steps on a CUDA device, recorded once as a CUDA graph and replayed: one launch instead of a thousand.

A graph knows addresses and shapes. So whatever changes from step to step lies in tensors that are filled before a
replay: tokens, positions, and how long each group's suffix is. Attention runs over the whole stretch that the steps
ahead will fill, and a mask made on the device from those lengths says what is seen; new keys and values go where a
length says. Rows that finish stay on as padding until a third of them is gone.

It was built without a GPU, so nothing is taken on trust:

- ``doctor --attention`` runs the contract of attention backends over it (``RecordedAttention``), on the user's device;
- a model is tried when it is loaded: what waits for the host, or takes its place from a Python number, is not recorded;
- a graph's first replay, with other tokens and one token later than it was recorded, is compared with the plain step;
  if logits or keys and values differ, no graph is used again in the run, and a warning says so;
- before each replay it is checked that everything still lies where it lay. A graph keeps its memory alive, and lives no
  longer than one ``active``: neither another prompt nor other weights ever meet one that was made before them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from specrej_eval.kv import contract
from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.memory import droppable, or_else
from specrej_eval.kv.probe import difference, tried
from specrej_eval.kv.steps import Step

logger = logging.getLogger(__name__)

HORIZON = 128
"""Tokens that a graph is recorded for. All of them are read in each step, seen or not."""
WORTH = 16
"""Tokens that must lie ahead. Recording and comparing cost about four plain steps and what CUDA takes to build a graph:
a guess until somebody has measured it (``benchmarks/roofline.py --compile``)."""

Groups = Sequence[tuple[Prefix, SuffixPool]]
Region = Callable[[], Tensor]
Forward = Callable[[Step, Tensor, Tensor], Tensor]
"""(step, tokens (rows, 1), positions (rows, 1)) -> (rows, vocab) logits."""


class Replayable(Protocol):
    """What was done, to be done again with whatever the same memory then holds."""

    def replay(self) -> None: ...


def on_cuda(region: Region, device: torch.device) -> tuple[Replayable, Tensor]:
    """Run a region once, and record it; the tensor that each replay writes its result to."""
    current = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    # the outer stream: should the end of a recording fail, torch leaves its own in place
    with torch.cuda.device(device), torch.cuda.stream(current):
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):  # libraries make their workspaces now, outside of the graph's memory
                region()
        finally:
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = region()
    return graph, out


_streams: dict[torch.device, torch.cuda.Stream] = {}
RECORDERS: dict[str, Callable[[Region, torch.device], tuple[Replayable, Tensor]]] = {"cuda": on_cuda}
"""By kind of device."""


class _Member:
    """One group, as a graph knows it."""

    def __init__(self, prefix: Prefix, pool: SuffixPool, end: int) -> None:
        self.prefix, self.pool = prefix, pool
        self.rows = pool.rows
        self.start, self.end = pool.length, end
        """It serves suffixes of [start, end) tokens."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values, (rows, kv_heads, end, head_dim)."""
        for layer in prefix.keys:
            stored = pool.ready(layer)
            assert stored is not None, "a group's first step makes the pool"
            self.layers[layer] = stored[0][:, :, :end], stored[1][:, :, :end]
        device = next(iter(prefix.keys.values())).device
        self.length = torch.full((1,), pool.length, device=device)
        self._places = torch.arange(max(end, prefix.length), device=device)
        self._memory = self._present()
        pool.clear(pool.length, end)  # finite: it is multiplied by 0

    def _present(self) -> list[Tensor]:
        return [*self.pool.memory(), *self.prefix.keys.values(), *self.prefix.values.values()]

    def serves(self, prefix: Prefix, pool: SuffixPool) -> bool:
        """Whether it is this group, where it was, no larger, and of a length that was recorded."""
        same = self.prefix is prefix and self.pool is pool
        if not same or pool.rows > self.rows or not self.start <= pool.length < self.end:
            return False
        present = self._present()
        return len(present) == len(self._memory) and all(map(lambda one, two: one is two, present, self._memory))

    def seen(self, window: int | None) -> tuple[int, Tensor | None, Tensor]:
        """First position that any step sees; of those from there on which are seen, in the prefix (None = all) and in
        the suffix."""
        own = self._places[: self.end] <= self.length
        if window is None or self.prefix.length + self.end <= window:
            return 0, None, own
        first = max(0, self.prefix.length + self.start + 1 - window)
        oldest = self.length + (self.prefix.length + 1 - window)
        own &= self._places[: self.end] >= oldest - self.prefix.length
        shared = self._places[first : self.prefix.length] >= oldest
        return first, shared, own[max(0, first - self.prefix.length) :]

    def at(self, position: int) -> list[Tensor]:
        """Keys and values of one position of the live rows in each layer, (rows, kv_heads, head_dim) views."""
        return [part[: self.pool.rows, :, position] for stored in self.layers.values() for part in stored]


class RecordedStep(Step):
    """One token for every row of some groups, with no number in it that changes from step to step.

    Args:
        length: what the model is told of where it is; it must make no difference.
    """

    def __init__(self, members: Sequence[_Member], length: int) -> None:
        super().__init__(length)
        self._members = members
        self._seen: dict[tuple[int, int | None], tuple[int, Tensor | None, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See ``Step.attend``; there is no padding behind the groups' rows."""
        heads, kv_heads = query.shape[1], key.shape[1]
        parts = []
        place = 0
        for number, member in enumerate(self._members):
            rows = slice(place, place + member.rows)
            place += member.rows
            own = member.layers[layer]
            for stored, new in zip(own, (key, value), strict=True):
                stored.index_copy_(2, member.length, new[rows])
            if (number, params.window) not in self._seen:
                self._seen[number, params.window] = member.seen(params.window)
            first, prefix_seen, suffix_seen = self._seen[number, params.window]
            gone = max(0, first - member.prefix.length)
            out = sdpa.decode_masked(
                query[rows, :, 0].unflatten(1, (kv_heads, heads // kv_heads)),
                member.prefix.keys[layer][:, first:],
                member.prefix.values[layer][:, first:],
                own[0][:, :, gone:],
                own[1][:, :, gone:],
                params,
                prefix_seen=prefix_seen,
                suffix_seen=suffix_seen,
            )
            parts.append(out.flatten(1, 2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None].contiguous()


class _Recorded:
    """The decode step of some groups at their present places, for as long as their suffixes grow by ``span`` tokens."""

    def __init__(self, groups: Groups, tokens: Tensor, forward: Forward, span: int) -> None:
        self.members = [_Member(prefix, pool, min(pool.capacity, pool.length + span)) for prefix, pool in groups]
        self._tokens = torch.empty_like(tokens)
        self._positions = torch.empty_like(tokens)
        self._forward = forward
        self._graph: Replayable | None = None
        self._logits = tokens.new_empty(0)
        self.compared = False
        """Whether its first replay was right."""
        self._fill(groups, tokens)

    def run(self, length: int = 0) -> Tensor:
        """What is recorded; (rows, vocab) logits."""
        step = RecordedStep(self.members, length)
        return self._forward(step, self._tokens[:, None], self._positions[:, None])

    def record(self) -> None:
        """Runs it once, and records it."""
        device = self._tokens.device
        self._graph, self._logits = RECORDERS[device.type](self.run, device)

    def serves(self, groups: Groups) -> bool:
        """Whether it does these groups' step: the same ones, of which no more than a third of the rows is gone."""
        if len(groups) != len(self.members) or not all(map(_Member.serves, self.members, *zip(*groups, strict=True))):
            return False
        return 3 * sum(pool.rows for _, pool in groups) >= 2 * len(self._tokens)

    def _fill(self, groups: Groups, tokens: Tensor) -> None:
        place = given = 0
        for member, (prefix, pool) in zip(self.members, groups, strict=True):
            self._tokens[place : place + pool.rows].copy_(tokens[given : given + pool.rows])
            self._positions[place : place + member.rows].fill_(prefix.length + pool.length)
            member.length.fill_(pool.length)
            place += member.rows
            given += pool.rows

    def replay(self, groups: Groups, tokens: Tensor) -> Tensor:
        """(rows, vocab) logits, valid until the next replay. Writes nothing that another step would not write again."""
        assert self._graph is not None
        self._fill(groups, tokens)
        self._graph.replay()
        parts = []
        place = 0
        for member, (_, pool) in zip(self.members, groups, strict=True):
            parts.append(self._logits[place : place + pool.rows])
            place += member.rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def wait(self) -> None:
        """Until no replay is under way."""
        if self._tokens.is_cuda:
            torch.cuda.current_stream(self._tokens.device).synchronize()

    def newest(self) -> list[Tensor]:
        """Keys and values of the token that is fed, of live rows, by group and layer: (rows, kv_heads, head_dim)."""
        return [part for each in self.members for part in each.at(each.pool.length)]

    def earlier(self) -> list[Tensor]:
        """The same of the token that was fed when it was recorded: where a replay that has missed the change writes."""
        return [part for each in self.members for part in each.at(each.start)]


class DecodeGraphs:
    """The decode steps of one model: replayed where that is right and pays, plain elsewhere.

    Args:
        forward: the model, within a step.
        obstacle: why the model cannot be recorded as it is now; None if nothing is known against it.
        name: of the model.
        positions: how many the model knows; 0 = that is not known.
    """

    def __init__(self, forward: Forward, obstacle: Callable[[], str | None], *, name: str, positions: int = 0) -> None:
        self._forward = forward
        self._obstacle = obstacle
        self._name = name
        self._last_position = max(0, positions - 1)
        self._fits = False
        self._held: _Recorded | None = None
        self._pauses = False
        self.off: str | None = None
        """Why no graph is used any more; None while one may be."""
        self.taken = 0
        """Steps that were replayed, after a first one."""
        droppable.add(self)

    def forget(self) -> None:
        """Let a graph go, once the device is done with it."""
        held, self._held = self._held, None
        if held is not None:
            held.wait()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Graphs live in here only."""
        self._pauses = False
        try:
            yield
        finally:
            self.forget()

    def drop(self) -> None:
        """Memory has run out: the graph's is given back, and no other made until the next ``active``."""
        self._pauses = True
        self.forget()

    def step(self, groups: Groups, tokens: Tensor, ahead: int, plain: Region) -> Tensor:
        """(rows, vocab) logits of a decode step, which ``plain`` gives too.

        Args:
            groups: prefix and suffixes of each, in batch order.
            tokens: (rows,), int64.
            ahead: tokens that every group is yet to decode.
        """
        held = self._held  # looked at once: a reward model that runs out of memory in another thread may drop it
        if held is not None and not held.serves(groups):
            held = None
            self.forget()
        if held is None:
            if self._pays(groups, ahead):
                span = ahead if ahead < HORIZON + WORTH else HORIZON
                self.refuse(or_else(lambda: tried(lambda: self._record(groups, tokens, span)), lambda: None))
            return plain()
        if any(member.pool.length == member.start for member in held.members):
            return plain()  # the step that was recorded, taken again: what a recording holds fast shows only later
        if not held.compared:
            return self._compared(held, groups, tokens, plain)
        self.taken += 1
        return held.replay(groups, tokens)

    def _pays(self, groups: Groups, ahead: int) -> bool:
        if self.off is not None or self._pauses or ahead < WORTH:
            return False
        # a group's first step is a plain one: it makes the pool
        return all(0 < pool.length <= pool.capacity - WORTH for _, pool in groups)

    def _record(self, groups: Groups, tokens: Tensor, span: int) -> str | None:
        """Hold the graph of a step, or say why there is none. ``plain`` writes the step's keys and values again."""
        if (reason := self._obstacle()) is not None:
            return reason
        recorded = _Recorded(groups, tokens, self._forward, span)
        if not self._fits:  # found out first: a recording that fails leaves torch's generators unusable
            with contract.no_waiting() if tokens.is_cuda else nullcontext():
                first, last = recorded.run(), recorded.run(self._last_position)
            if not torch.equal(first, last):
                return "it takes its place in the text from a number that a graph holds fast"
            self._fits = True
        recorded.record()
        self._held = recorded
        return None

    def _compared(self, held: _Recorded, groups: Groups, tokens: Tensor, plain: Region) -> Tensor:
        """The plain step's logits, with which those of a graph's first replay are compared."""
        earlier = [part.clone() for part in held.earlier()]
        for part in held.newest():
            part.zero_()
        found: list[Tensor] = []

        def replayed() -> str | None:
            found.append(held.replay(groups, tokens).clone())
            found.extend(part.clone() for part in held.newest())
            return None

        try:
            reason = tried(replayed)
        finally:
            for part, was in zip(held.earlier(), earlier, strict=True):
                part.copy_(was)
        logits = plain()
        self.refuse(reason or _differs(found, [logits, *held.newest()]))
        held.compared = True
        return logits

    def refuse(self, reason: str | None) -> None:
        """Use no graph any more, and say so; None = there is no reason to."""
        if reason is None or self.off is not None:
            return
        self.off = reason
        self.forget()
        logger.warning(
            "decode steps of %s are not replayed as CUDA graphs (%s): they run one kernel at a time, as without.",
            self._name,
            reason,
        )


def _differs(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    """What of logits, keys and values is not the same but for rounding."""
    numbers = [
        torch.stack([(one.float() - two.float()).abs().max(), two.float().abs().max()])
        for one, two in zip(found, wanted, strict=True)
    ]
    for place, (error, largest) in enumerate(torch.stack(numbers).tolist()):  # the host waits once
        what = "keys or values" if place else "logits"
        if (reason := difference(error, largest, wanted[place].dtype, f"its {what}")) is not None:
            return reason
    return None


class RecordedAttention(AttentionBackend):
    """Attention of a recorded step, for the contract: recorded with other tokens at another length, then replayed."""

    name = "cuda_graphs"
    prepares = True
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def _decode_groups(
        self,
        groups: Sequence[tuple[Prefix, SuffixPool]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        if any(pool.ready(layer) is None for _, pool in groups):
            return None  # in a run too a group's first step is a plain one
        members = [_Member(prefix, pool, min(pool.capacity, pool.length + HORIZON)) for prefix, pool in groups]
        rows = sum(member.rows for member in members)
        given = [each[:rows] for each in (query, key, value)]
        fed = [torch.ones_like(each) for each in given]
        for member in members:
            member.length.fill_(min(member.start + 1, member.end - 1))
        graph, out = RECORDERS[query.device.type](
            lambda: RecordedStep(members, 0).attend(layer, fed[0], fed[1], fed[2], params), query.device
        )
        for member in members:
            member.pool.clear(member.start, member.end)
            member.length.fill_(member.start)
        for each, new in zip(fed, given, strict=True):
            each.copy_(new)
        graph.replay()
        padding = query.shape[0] - rows
        return out.clone() if not padding else torch.cat([out, out.new_zeros(padding, *out.shape[1:])])

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
        keys = (prefix_key, prefix_value, suffix_key, suffix_value)
        return self._fallback()._decode(query, *keys, params, tokens)
