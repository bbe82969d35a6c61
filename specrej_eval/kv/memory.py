"""Out of memory: what it looks like, and how work that may meet it is written.

The rule: a step happens or it does not. Whatever can allocate comes before the first change of state, or writes what a
second try writes again; so what failed is simply taken again (``twice``), and if that is not enough, another way.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import psutil
import torch

from specrej_eval.errors import OutOfMemoryError

T = TypeVar("T")


class Droppable(Protocol):
    """Memory that holds nothing but what can be computed again."""

    def drop(self) -> None:
        """Let it go. Allocates nothing."""


droppable: weakref.WeakSet[Droppable] = weakref.WeakSet()
"""What goes first when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's own error, or the plain RuntimeError of its CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release_memory() -> None:
    """Give back what is droppable or no longer referenced. After an out-of-memory error only: it is slow."""
    for store in list(droppable):
        store.drop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def or_else(work: Callable[[], T], instead: Callable[[], T]) -> T:
    """``work()``; or, should memory run out, ``instead()``, once the failed try's tensors are gone."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # outside the except block: the traceback would keep the failed try's tensors alive
    release_memory()
    return instead()


def twice(work: Callable[[], T]) -> T:
    """``work()``, taken again once if memory runs out; it must leave nothing behind that a second try does not mend."""
    return or_else(work, work)


@contextmanager
def clear_error(doing: str, hint: str) -> Iterator[None]:
    """What nothing could be done about becomes one error of ours.

    Raises:
        OutOfMemoryError: memory ran out inside; says while ``doing`` what.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory while {doing}.", hint=hint) from error
