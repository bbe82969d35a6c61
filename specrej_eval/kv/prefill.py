"""Prompts are read here: what they have in common once, and their ends together.

A prompt is read in chunks whose ends are counted from token 0. A whole chunk is read by itself, behind what is stored
before it, so its keys and values are a function of the tokens up to its end: prompts that begin alike share it, bit for
bit. What is left, the tail, is packed with the tails of other prompts into one forward pass; only inside attention is
each prompt by itself.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

from specrej_eval.kv import shared_prefix
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.memory import droppable, free_bytes
from specrej_eval.kv.steps import SDPA, PrefillStep, PromptPart

Value = TypeVar("Value")

CPU_CHUNK = 128
"""Tokens of a chunk. Measured on a CPU: 135 M parameters read 900 tokens in chunks of 128 in 1.03 times the time of
chunks of 512, and of five shots (about 800 tokens) 768 can be shared instead of 512."""
CUDA_CHUNK = 512
"""The same on a GPU, where a small forward pass costs as much as a large one."""
_PACKED_CHUNKS = 8
"""Most tokens of tails in one forward pass, in chunks."""
STORE_SHARE = 0.02
"""Of the memory that is free at first use, what chunks that prompts have in common may take. They are the first to go
when memory runs out."""
_NOTED = 16_384
"""Newest chunks of which it is remembered how many prompts had them; 16 bytes each."""

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``forward(ids, positions, wanted)``: (1, tokens), (1, tokens), (n,) places in the packed tokens or None for all ->
(n, width), what the model gives there."""


def chunk_tokens(device: torch.device) -> int:
    """Tokens of a chunk on that device."""
    return CPU_CHUNK if device.type == "cpu" else CUDA_CHUNK


@dataclass(frozen=True, slots=True)
class Chunk:
    """A whole chunk, read."""

    keys: dict[int, Tensor]
    """Per layer: (kv_heads, chunk, head_dim)."""
    values: dict[int, Tensor]
    outputs: Tensor
    """(chunk, width), or none where only the last token's are wanted."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys.values(), *self.values.values(), self.outputs))


class ChunkStore:
    """Chunks that several prompts have in common, the newest within a share of memory.

    Holds nothing of chunks that only one prompt has: a chunk is kept from the second prompt on that has it, or from the
    first, if both are read at the same time. Another thread that runs out of memory may ``drop`` them at any time.

    Args:
        limit: most bytes; None = ``STORE_SHARE`` of the memory that is free when the first chunk is kept.
    """

    def __init__(self, device: torch.device, *, limit: int | None = None) -> None:
        self.limit = limit
        self.held = 0
        """Bytes."""
        self._device = device
        self._guard = threading.Lock()
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()
        self._noted: OrderedDict[bytes, int] = OrderedDict()
        """Prompts that had a chunk, so far."""
        self._in_use: Counter[bytes] = Counter()
        """Those among the ones being read that have it."""
        droppable.add(self)

    @contextmanager
    def reading(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Inside, some prompts are being read; they count as prompts that had these chunks once all of it is done.

        Args:
            keys: of the chunks of one after the other.
        """
        counts = Counter(keys)
        self._in_use += counts
        try:
            yield
        finally:
            self._in_use -= counts
        for key, count in counts.items():
            self._noted[key] = self._noted.pop(key, 0) + count
        while len(self._noted) > _NOTED:
            self._noted.popitem(last=False)

    def get(self, key: bytes) -> Chunk | None:
        """A chunk, if it is held."""
        with self._guard:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def wants(self, key: bytes) -> bool:
        """Whether a chunk should be kept."""
        return self._noted.get(key, 0) + self._in_use[key] > 1 and key not in self._chunks

    def put(self, key: bytes, chunk: Chunk) -> None:
        """Keep a chunk, if there is room: those that no prompt being read has make room for it, the oldest first."""
        if self.limit is None:
            self.limit = int(free_bytes(self._device) * STORE_SHARE)
        with self._guard:
            spare = iter([old for old in self._chunks if old not in self._in_use])
            while self.held + chunk.nbytes > self.limit:
                old = next(spare, None)
                if old is None:
                    return
                self.held -= self._chunks.pop(old).nbytes
            self._chunks[key] = chunk
            self.held += chunk.nbytes

    def drop(self) -> None:
        """Let all chunks go; what is known of prompts stays."""
        with self._guard:
            self._chunks.clear()
            self.held = 0


@dataclass(slots=True)
class _Reading:
    """A prompt being read."""

    ids: Tensor
    """(tokens,)"""
    keys: list[bytes]
    """One of each whole chunk."""
    prefix: Prefix
    outputs: list[Tensor] = field(default_factory=list)
    read: int = 0
    """Tokens that are stored."""

    @property
    def tail(self) -> int:
        return self.prefix.length - self.read


class PromptReader:
    """Reads prompts with one model. Inside its ``our_attention`` only.

    Args:
        forward: see ``Forward``.
        last_only: whether only what the model gives behind a prompt's last token is wanted.
        align: forward passes are padded to a multiple of so many tokens.
        packs: whether several tails may share a forward pass.
        shares: whether prompts may share chunks: not where rotary angles change with a sequence's length.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        *,
        last_only: bool,
        align: int = 1,
        packs: bool = True,
        shares: bool = True,
    ) -> None:
        self._forward = forward
        self._device = device
        self._last_only = last_only
        self._align = align
        self.packs = packs
        self._shares = shares
        self.store = ChunkStore(device)
        self.attention: AttentionBackend = SDPA
        """Who computes it."""
        self.windows: dict[int, int | None] = {}
        """Sliding window each layer asked for in the last forward pass."""
        self.tokens_read = 0
        """Tokens that went through the model: a chunk in common counts once."""

    def read(self, prompts: Sequence[Sequence[int]], *, share: bool = True) -> list[tuple[Prefix, Tensor]]:
        """Read prompts. Changes nothing but what the store holds, so it can be taken again.

        Args:
            share: False for prompts that nobody asked: they neither take from the store nor leave anything there.

        Returns:
            Of each its KV, and what the model gives: (1, width) of its last token, or (tokens, width) of all.
        """
        return drained(self.turns(prompts, share=share))

    def turns(
        self, prompts: Sequence[Sequence[int]], *, share: bool = True
    ) -> Generator[int, None, list[tuple[Prefix, Tensor]]]:
        """``read`` in parts: one forward pass each, or a chunk that is held already.

        ``next`` is called inside ``our_attention``; in between the model may serve anybody. A chunk's bits are a
        function of the tokens up to its end, so they do not depend on when it is read.

        Yields:
            Tokens that went through the model.
        """
        share = share and self._shares
        chunk = chunk_tokens(self._device)
        readings = [
            _Reading(
                torch.tensor(list(ids), device=self._device),
                _chunk_keys(ids, chunk),
                Prefix(length=len(ids), row_align=self._align),
            )
            for ids in prompts
        ]
        with self.store.reading([key for reading in readings for key in reading.keys] if share else []):
            for reading in readings:
                for key in reading.keys:
                    yield self._read_chunk(reading, key, chunk, share=share)
            for batch in self._batches(readings, _PACKED_CHUNKS * chunk if self.packs else 0):
                yield self._read_tails(batch)
        return [(reading.prefix, torch.cat(reading.outputs)) for reading in readings]

    def _read_chunk(self, reading: _Reading, key: bytes, size: int, *, share: bool) -> int:
        """The next chunk of a prompt; how many tokens went through the model for it."""
        chunk = self.store.get(key) if share else None
        start = reading.read
        if chunk is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self._device)
            outputs = self._run([(reading, size)], nothing if self._last_only else None)
            if share and self.store.wants(key):
                keys, values = (
                    {layer: tensor[:, start : start + size].clone() for layer, tensor in stored.items()}
                    for stored in (reading.prefix.keys, reading.prefix.values)
                )
                self.store.put(key, Chunk(keys, values, outputs.clone()))
        else:
            outputs = chunk.outputs
            for layer, stored in chunk.keys.items():
                reading.prefix.store(layer, stored[None], chunk.values[layer][None], start)
        reading.outputs.append(outputs)
        reading.read += size
        return size if chunk is None else 0

    @staticmethod
    def _batches(readings: Sequence[_Reading], most: int) -> Iterator[list[_Reading]]:
        batch: list[_Reading] = []
        for reading in readings:
            if batch and sum(other.tail for other in batch) + reading.tail > most:
                yield batch
                batch = []
            batch.append(reading)
        if batch:
            yield batch

    def _read_tails(self, batch: Sequence[_Reading]) -> int:
        """What is left of some prompts; how many tokens."""
        counts = [reading.tail for reading in batch]
        ends = torch.tensor(counts, device=self._device).cumsum(0) - 1  # (prompts,)
        wanted = _padded(ends, self._align) if self._last_only else None
        outputs = self._run([(reading, reading.tail) for reading in batch], wanted)
        split = outputs[: len(batch)].split(1) if self._last_only else outputs[: sum(counts)].split(counts)
        for reading, mine in zip(batch, split, strict=True):
            reading.outputs.append(mine)
            reading.read = reading.prefix.length
        return sum(counts)

    def _run(self, parts: Sequence[tuple[_Reading, int]], wanted: Tensor | None) -> Tensor:
        """One forward pass over the next tokens of some prompts, by how many each."""
        ids = torch.cat([reading.ids[reading.read : reading.read + count] for reading, count in parts])
        positions = torch.cat(
            [torch.arange(reading.read, reading.read + count, device=self._device) for reading, count in parts]
        )
        named = [PromptPart(reading.prefix, reading.read, count) for reading, count in parts]
        with shared_prefix.running(PrefillStep(named, self.attention)) as step:
            outputs = self._forward(_padded(ids, self._align)[None], _padded(positions, self._align)[None], wanted)
        self.windows = step.windows
        self.tokens_read += len(ids)
        return outputs


def drained(turns: Generator[int, None, Value]) -> Value:
    """What it returns, once all of it is done."""
    while True:
        try:
            next(turns)
        except StopIteration as done:
            value: Value = done.value
            return value


def _chunk_keys(ids: Sequence[int], chunk: int) -> list[bytes]:
    """Of every whole chunk that is not the end of the prompt, a digest of the tokens up to its end."""
    digest = blake2b(digest_size=16)
    keys = []
    for end in range(chunk, len(ids), chunk):
        digest.update(array("q", ids[end - chunk : end]).tobytes())
        keys.append(digest.copy().digest())
    return keys


def _padded(tokenwise: Tensor, align: int) -> Tensor:
    """(tokens,) with the last one again, until there are a multiple of ``align``."""
    missing = -tokenwise.shape[0] % align
    return torch.cat([tokenwise, tokenwise[-1:].expand(missing)]) if missing else tokenwise
