"""Key/value storage: one prefix shared by all rows of a prompt, one dense suffix pool per group of rows.

A *group* is rows of one prompt that started together (a wave, or the survivors of one): they all have the same length,
so decoding them needs no page table and no padding mask. Suffix pools are ``(rows, kv_heads, capacity, head_dim)`` per
layer; a cut gathers survivors into a pool of the next capacity; a finished row is overwritten by the last row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specrej_eval.errors import KVBudgetExceededError
from specrej_eval.kv.memory import or_else

_TOKEN_ALIGN = 16


@dataclass(slots=True)
class TokenAccount:
    """Tokens one prompt may hold, and holds. Counts every sampled token, so it is never below what memory holds."""

    limit: int
    held: int
    """Shared prompt + suffixes of all live rows."""

    def hold(self, tokens: int) -> None:
        """Count ``tokens`` more (fewer, if negative).

        Raises:
            KVBudgetExceededError: the limit would be passed.
        """
        self.check(tokens)
        self.held += tokens

    def check(self, tokens: int) -> None:
        """Whether ``tokens`` more may be held.

        Raises:
            KVBudgetExceededError: the limit would be passed.
        """
        if tokens > 0 and self.held + tokens > self.limit:
            raise KVBudgetExceededError(f"{self.held} + {tokens} tokens exceed the KV budget of {self.limit}.")


@dataclass(slots=True)
class Prefix:
    """The prompt, prefilled once at batch 1."""

    length: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Per layer: (kv_heads, tokens, head_dim)."""
    values: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    """(1, vocab), of the prompt's last token."""
    token_ids: Tensor | None = None
    """(tokens,): kept only where KV is not shared."""
    cache: Any = None
    """A transformers cache of batch 1: the replicated path copies it for every row."""
    row_align: int = 1
    """Batches of rows behind it are padded to a multiple of this."""

    def store(self, layer: int, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Append a chunk and return all of the layer so far.

        Args:
            key, value: (1, kv_heads, chunk, head_dim), for positions from ``start`` on.

        Returns:
            Keys and values, (kv_heads, start + chunk, head_dim).
        """
        end = start + key.shape[2]
        for store, new in ((self.keys, key), (self.values, value)):
            if layer not in store:
                # each head's keys begin on a cache line then: on a CPU bits of a chunk must not depend on the length of
                # the prompt that it is read for
                allocated = -(-self.length // _TOKEN_ALIGN) * _TOKEN_ALIGN
                store[layer] = new.new_empty(new.shape[1], allocated, new.shape[3])[:, : self.length]
            store[layer][:, start:end] = new[0]
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class SuffixPool:
    """Suffix KV of one group. Positions are counted from the first sampled token.

    Args:
        rows: rows held.
        capacity: tokens there is room for in each row, before the next ``select``.
        align: capacities are multiples of this many tokens. On CPU 16 keeps every row's slab 64-byte aligned, so that
            a row's bits do not depend on where it lies in the pool.
        grows: memory follows ``length`` in steps of ``align`` tokens, whatever the capacity asked for, and starts as
            zeros. A layer is then one contiguous block, stored positions and the few behind them: on a CPU, products
            with it are up to three times as fast as with a slice. The copies come to 1 / ``align`` of what is read.
    """

    def __init__(self, rows: int, *, capacity: int, align: int = 1, grows: bool = False) -> None:
        self.rows = rows
        self.length = 0
        """Tokens stored per row."""
        self._align = align
        self._grows = grows
        self.capacity = self._aligned(capacity)
        self._stores: tuple[dict[int, Tensor], ...] = ({}, {})
        """Keys and values per layer, (rows allocated, kv_heads, capacity, head_dim)."""
        self.noted: dict[int, Any] = {}
        """Per layer: what a backend has noted of where its memory lies, forgotten when that moves."""

    def _aligned(self, tokens: int) -> int:
        """Tokens that memory is allocated for, to hold so many."""
        return -(-(self.length + 1 if self._grows else tokens) // self._align) * self._align

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the next position of a layer; ``advance`` makes it count. Writing it again is harmless.

        Args:
            key, value: (rows, kv_heads, 1, head_dim).
        """
        for store, new in zip(self._stores, (key, value), strict=True):
            if layer not in store:
                store[layer] = self._allocate(new, self.rows, new.shape[1], self.capacity, new.shape[3])
            elif store[layer].shape[2] < self.capacity:
                self._grow(store, layer)
            store[layer][: self.rows, :, self.length] = new[:, :, 0]

    def ready(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a layer with room for the next position, for whoever writes it there himself; None before
        the first one was appended.

        Returns:
            (rows, kv_heads, capacity, head_dim) views.
        """
        for store in self._stores:
            if layer not in store:
                return None
            if store[layer].shape[2] < self.capacity:
                self._grow(store, layer)
        keys, values = (store[layer][: self.rows] for store in self._stores)
        return keys, values

    def _grow(self, store: dict[int, Tensor], layer: int) -> None:
        self.noted.pop(layer, None)
        store[layer] = self._copied(store[layer][: self.rows])

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values with the position just appended, (rows, kv_heads, stored, head_dim) views.

        ``length`` + 1 positions count. A pool that grows gives all of its memory, finite numbers behind them.
        """
        stored = self.capacity if self._grows else self.length + 1
        keys, values = (store[layer][: self.rows, :, :stored] for store in self._stores)
        return keys, values

    def memory(self) -> list[Tensor]:
        """All that it lies in; the same tensors as long as nothing moves."""
        return [tensor for store in self._stores for tensor in store.values()]

    def clear(self, first: int, end: int) -> None:
        """Zeros at the positions [first, end) of every row, none of which holds a token that counts."""
        for tensor in self.memory():
            tensor[: self.rows, :, first:end] = 0

    def advance(self) -> None:
        self.length += 1
        self.capacity = max(self.capacity, self._aligned(self.capacity))

    def select(self, index: Tensor, capacity: int) -> None:
        """Gather rows (duplicates fork) into pools with room for ``capacity`` tokens; layer by layer."""
        rows = index.shape[0]
        self.noted.clear()
        self.capacity = max(self.capacity, self._aligned(capacity))
        for store in self._stores:
            for layer, old in store.items():
                store[layer] = self._selected(old, index)
        self.rows = rows

    def _selected(self, old: Tensor, index: Tensor) -> Tensor:
        """A layer's rows at ``index``; on the host if the device has no room (``to`` brings it back)."""
        return or_else(lambda: self._gathered(old, index), lambda: self._gathered(old.cpu(), index))

    def _gathered(self, old: Tensor, index: Tensor) -> Tensor:
        return self._copied(old[:, :, : self.length].index_select(0, index.to(old.device)))

    def _copied(self, old: Tensor) -> Tensor:
        """What is stored of these rows, with room for the present capacity."""
        new = self._allocate(old, old.shape[0], old.shape[1], self.capacity, old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def _allocate(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_zeros(*shape) if self._grows else like.new_empty(*shape)

    def move(self, sources: Tensor, holes: Tensor) -> None:
        """Copy rows ``sources`` over ``holes``: O(rows moved), no gather. Doing it again is harmless as long as no row
        is a source and a hole; lowering ``rows`` then forgets the sources."""
        if sources.numel():
            for store in self._stores:
                for tensor in store.values():
                    tensor[holes, :, : self.length] = tensor[sources, :, : self.length]

    def split(self, at: int) -> SuffixPool:
        """Keep rows [0, at); return a pool of the rest. Both are views of the same memory, and never overlap."""
        self.noted.clear()
        rest = SuffixPool(self.rows - at, capacity=self.capacity, align=self._align, grows=self._grows)
        rest.length, rest.capacity = self.length, self.capacity
        rest._stores = tuple({layer: buffer[at : self.rows] for layer, buffer in each.items()} for each in self._stores)
        mine = tuple({layer: buffer[:at] for layer, buffer in each.items()} for each in self._stores)
        self._stores, self.rows = mine, at
        return rest

    def to(self, device: torch.device | str) -> None:
        """Park the pool on the host, or bring it back."""
        self.noted.clear()
        for store in self._stores:
            for layer, tensor in store.items():
                store[layer] = tensor[: self.rows].to(device)


def bytes_per_token(prefix: Prefix) -> int:
    """KV bytes of one token, read off a prefilled prompt: 2 x layers x kv heads x head dim x itemsize.

    Read, not computed from the config, so that models with unequal layers (or latent KV) are right too.
    """
    stored = [*prefix.keys.values(), *prefix.values.values()]
    return sum(tensor.nbytes for tensor in stored) // prefix.length
