"""What an attention backend is, and what it is told of a layer besides queries, keys and values."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specrej_eval.kv.cache import Prefix, SuffixPool


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How a layer scores keys, by the names transformers' models give it."""

    scale: float
    window: int | None = None
    """A query sees this many positions, its own included; None = all."""
    softcap: float | None = None
    """Scores are squashed to within plus and minus this (gemma2)."""
    sinks: Tensor | None = None
    """(heads,): one more logit per head that takes probability but has no value (gpt-oss)."""


class AttentionBackend(ABC):
    """Attention over (shared prefix, own suffix). A file of this folder holds one, under the name ``Backend``.

    Steps call ``prefill``, ``masked`` and ``decode``. What a backend cannot do (``why_not``) or has no kernel for is
    done by ``otherwise``; that rule is here and nowhere else. It looks at device, dtype and head dims alone, so it is
    the same for every step of a layer, and needs no look at the device.

    Args:
        otherwise: the backend that can do everything (``sdpa``, which is the only one without).
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    """What it imports; None = torch is enough."""
    distribution: ClassVar[str | None] = None
    """What that is called where packages are installed from; its version is part of what was verified."""
    install: ClassVar[str] = ""
    """What to type where the package is missing."""
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    reads_behind: ClassVar[bool] = False
    """It takes suffixes with memory behind their tokens, and multiplies that by 0: faster where it saves a copy."""
    prepares: ClassVar[bool] = False
    """Each call makes something ready first, for which the host may wait."""
    preference: ClassVar[int] = 0
    """``attention_backend=auto`` takes the one with the highest, of those that are verified on the device."""

    def __init__(self, otherwise: AttentionBackend | None = None) -> None:
        self._otherwise = otherwise
        self._able: dict[tuple[str, torch.dtype, int, int], AttentionBackend] = {}

    def missing(self) -> str | None:
        """Why its package cannot be used; None if it can. Imports it."""
        if self.package is None:
            return None
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution or self.package} is not installed"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # most often built for another torch or CUDA
            return f"{self.package} cannot be imported: {error!r}"
        return None

    def built(self) -> str | None:
        """What distinguishes the kernel from others that were compiled from other sources; None where that is the
        package's version."""
        return None

    def why_not_on(self, device: torch.device) -> str | None:
        """Why nothing can be computed on a device, whatever the model; None if something can."""
        if device.type not in self.devices:
            return f"it runs on {' or '.join(self.devices)} only, not on {device.type}"
        return self.missing()

    def why_not(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
    ) -> str | None:
        """Why a layer is left to ``otherwise``; None if this backend computes it.

        Args:
            head_dim: of queries and keys.
            value_dim: of values; None = the same.
        """
        if reason := self.why_not_on(device):
            return reason
        if dtype not in self.dtypes:
            known = " and ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            return f"it computes {known} only, not {str(dtype).removeprefix('torch.')}"
        return self._why_not_dims(head_dim, head_dim if value_dim is None else value_dim)

    def _why_not_dims(self, head_dim: int, value_dim: int) -> str | None:
        return None

    def _of(self, query: Tensor, value: Tensor) -> AttentionBackend:
        """Who computes a layer: this backend, or ``otherwise``."""
        key = (query.device.type, query.dtype, query.shape[-1], value.shape[-1])
        if key not in self._able:
            able = self._otherwise is None or self.why_not(query.device, *key[1:]) is None
            self._able[key] = self if able or self._otherwise is None else self._otherwise
        return self._able[key]

    @property
    def reads_prompts(self) -> bool:
        """Whether it has a kernel for prompts."""
        return type(self)._prefill is not AttentionBackend._prefill

    # what steps call

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        """Causal attention of one chunk of the prompt.

        Args:
            query: (1, heads, chunk, head_dim), positions from ``start`` on.
            key, value: (kv_heads, start + chunk, head_dim).

        Returns:
            (1, heads, chunk, head_dim of the values).
        """
        return self._of(query, value)._prefill(query, key, value, start=start, params=params)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, params: AttentionParams) -> Tensor:
        """Attention where each query sees keys of its own.

        Args:
            query: (batch, kv_heads, groups * tokens, head_dim): the query heads of each kv head one after the other.
            key, value: (batch, kv_heads, keys, head_dim).
            seen: bool, broadcast to (batch, kv_heads, groups * tokens, keys); the window is part of it.

        Returns:
            (batch, kv_heads, groups * tokens, head_dim of the values).
        """
        return self._of(query, value)._masked(query, key, value, seen, params)

    def decode(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        params: AttentionParams,
        *,
        tokens: int | None = None,
    ) -> Tensor:
        """One new token per row over the shared prefix and the row's own suffix. Windows are cut by the caller.

        Args:
            query: (rows, kv_heads, groups, head_dim): the query heads of each kv head side by side.
            prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); may hold no token.
            suffix_key, suffix_value: (rows, kv_heads, stored, head_dim), views of a pool; at least one token.
            tokens: of the suffix that count, from the first on; None = all. What is stored behind them is finite.

        Returns:
            (rows, kv_heads, groups, head_dim of the values), in the values' dtype.
        """
        taken = self._of(query, suffix_value)
        stored = suffix_key.shape[2]
        count = stored if tokens is None else tokens
        if count < stored and not taken.reads_behind:
            suffix_key, suffix_value = suffix_key[:, :, :count], suffix_value[:, :, :count]
        return taken._decode(query, prefix_key, prefix_value, suffix_key, suffix_value, params, count)

    def decode_groups(
        self,
        groups: Sequence[tuple[Prefix, SuffixPool]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        """``decode`` of all groups of a step at once, new keys and values stored in their pools; None where there is no
        kernel for it, and then nothing is stored.

        Args:
            query: (rows of all groups and padding, heads, 1, head_dim); key, value: the same with kv_heads.

        Returns:
            (rows and padding, 1, heads, head_dim of the values), zeros for padding.
        """
        return self._of(query, value)._decode_groups(groups, layer, query, key, value, params)

    def extend(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        starts: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        """Several new tokens per row over the whole shared prefix and the row's own suffix, without a window that is in
        the way; None where there is no kernel for it.

        Args:
            query: (rows, kv_heads, groups, tokens, head_dim).
            prefix_key, prefix_value: (kv_heads, prefix tokens, head_dim); may hold no token.
            suffix_key, suffix_value: (rows, kv_heads, stored, head_dim), finite where no token is.
            starts: (rows,), int64: token t of a row sees so many + t + 1 of what is stored.

        Returns:
            (rows, kv_heads, groups, tokens, head_dim of the values).
        """
        keys = (prefix_key, prefix_value, suffix_key, suffix_value)
        return self._of(query, suffix_value)._extend(query, *keys, starts, params)

    # what a backend is made of

    def _decode_groups(
        self,
        groups: Sequence[tuple[Prefix, SuffixPool]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        return None

    def _extend(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        starts: Tensor,
        params: AttentionParams,
    ) -> Tensor | None:
        return None

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        return self._fallback()._prefill(query, key, value, start=start, params=params)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, params: AttentionParams) -> Tensor:
        return self._fallback()._masked(query, key, value, seen, params)

    @abstractmethod
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
        """``decode`` of what ``why_not`` has nothing against. Nothing in it may wait for the device.

        Args:
            tokens: those of the suffix; it is no longer than that, unless the backend ``reads_behind``.
        """

    def _fallback(self) -> AttentionBackend:
        assert self._otherwise is not None, f"{self.name} has no kernel for this and nobody to leave it to"
        return self._otherwise


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """What every kernel wants: a head's numbers side by side. No copy where they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (natural logarithms).

    Args:
        out_a, out_b: (..., head_dim).
        lse_a, lse_b: (...), float32.

    Returns:
        Output and log-sum-exp, float32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a.float() * (lse_a - lse).exp()[..., None] + out_b.float() * (lse_b - lse).exp()[..., None], lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink is one more logit without a value: it scales the output by the mass the others keep.

    Args:
        out: (..., head_dim).
        lse: (...), natural logarithms.
        sinks: broadcast to ``lse``.
    """
    return out.float() * torch.sigmoid(lse - sinks.float())[..., None]
