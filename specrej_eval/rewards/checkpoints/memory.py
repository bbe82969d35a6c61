"""Forward passes and caches within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from specrej_eval.config import MAX, RunConfig
from specrej_eval.kv.cache import Prefix, bytes_per_token
from specrej_eval.kv.memory import free_bytes, or_else, twice

Item = TypeVar("Item")
Value = TypeVar("Value")

MEMORY_SHARE = 0.25
"""Of the memory free at first use, what the caches of a reward model may take unless told otherwise."""
MEMORY_SHARE_BESIDE_MAX = 0.05
"""The same beside ``n=max`` on a GPU: there the language model's cache takes all but a tenth of what is free."""


class Allowance:
    """Tokens that the caches of one reward model hold, over all its sessions, and may hold.

    Args:
        limit: most tokens; None = a share of the memory that is free at first use (``measure``).
    """

    def __init__(self, limit: int | None = None, *, share: float = MEMORY_SHARE) -> None:
        self.limit = limit
        self.held = 0
        self._share = share

    @classmethod
    def of(cls, config: RunConfig, device: str) -> Allowance:
        """What the arguments say, for a reward model on that device."""
        share = MEMORY_SHARE_BESIDE_MAX if config.n == MAX and device.startswith("cuda") else MEMORY_SHARE
        return cls(config.reward_kv_budget_tokens, share=share)

    def grows_by(self, tokens: int) -> bool:
        """Whether ``tokens`` more may be held."""
        return self.limit is None or self.held + tokens <= self.limit

    def measure(self, prefix: Prefix, device: torch.device) -> None:
        """Find the limit, unless there is one, from a prefilled prompt and the memory that is free."""
        if self.limit is None:
            self.limit = int(free_bytes(device) * self._share) // bytes_per_token(prefix)


def in_batches(items: Sequence[Item], length: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Runs of items, sorted by length, of at most ``most`` padded tokens each; an item longer than that goes alone."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) + 1) * length(item) > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def in_halves(
    batch: list[Item], forward: Callable[[list[Item]], list[Value]], too_big: Callable[[Item], Exception]
) -> list[Value]:
    """``forward(batch)``, or, should memory not suffice twice, of halves of it.

    The smaller size is not remembered: the split must not depend on the prompts that came before.

    Raises:
        Exception: ``too_big(item)``, if not even one item fits.
    """

    def halves() -> list[Value]:
        if len(batch) == 1:
            raise too_big(batch[0])
        middle = len(batch) // 2
        return in_halves(batch[:middle], forward, too_big) + in_halves(batch[middle:], forward, too_big)

    return or_else(lambda: twice(lambda: forward(batch)), halves)
