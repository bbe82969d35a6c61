"""Floating-point operations of a run, from its token counts.

    2 P_g (D + F) + 4 L d sum of context + 2 P_r S

P_g, P_r = parameters of the language and the reward model that take part for each token, D = tokens decoded, F = tokens
of the prompt (read once), S = tokens the reward model read, L, d = layers and width of the language model's attention
(Kaplan et al. 2001.08361, appendix B: a multiplication and an addition a parameter; 4 L d for each token attended to).
The reward model's own attention is left out: records do not say how long each of its inputs was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the two models; 0 = not known (a server, a function), and then nothing is counted for it."""

    parameters: int
    layers: int = 0
    attention_width: int = 0
    """Heads times the size of one."""
    reward_parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def context_read(prompt_tokens: int, rows: Iterable[int]) -> int:
    """Tokens attended to, by the prompt's tokens and by those of rows of these lengths."""
    read = prompt_tokens * (prompt_tokens + 1) // 2
    return read + sum(tokens * prompt_tokens + tokens * (tokens + 1) // 2 for tokens in rows)


def flops(sizes: Sizes, *, prompt_tokens: int, rows: Iterable[int], reward_tokens: int) -> float:
    """Of one prompt.

    Args:
        rows: tokens decoded of each row.
        reward_tokens: tokens the reward model read.
    """
    lengths = list(rows)
    linear = 2.0 * sizes.parameters * (sum(lengths) + prompt_tokens)
    attention = 4.0 * sizes.layers * sizes.attention_width * context_read(prompt_tokens, lengths)
    return linear + attention + 2.0 * sizes.reward_parameters * reward_tokens
