"""What a backend is told of a layer's attention, besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
