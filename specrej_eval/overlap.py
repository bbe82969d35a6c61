"""Two things at the same time: what an iterator gives is made in a thread of its own while something else goes on here.

For scores: a reward model on a device of its own reads while rows of other prompts decode. The thread never outlives
the call, so nothing of one turn of the loop is under way in the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Taken(Generic[T]):
    """What an iterator gave until it ended or raised. Iterated over, it raises what that one raised, at the same place;
    what was raised beside it comes last."""

    items: list[T] = field(default_factory=list)
    failed: BaseException | None = None
    failed_beside: Exception | None = None
    seconds: float = 0.0
    """That it took."""
    waited: float = 0.0
    """Those of them that nothing else was done in."""

    def __iter__(self) -> Iterator[T]:
        try:
            yield from self.items
            for error in (self.failed, self.failed_beside):
                if error is not None:
                    raise error
        finally:
            self.failed = self.failed_beside = error = None  # an error knows this frame, and would keep itself alive

    @property
    def share(self) -> float:
        """Of its seconds, those that count beside what else was done."""
        return min(1.0, self.waited / self.seconds) if self.seconds else 1.0


def overlapped(items: Iterator[T], work: Callable[[], None]) -> Taken[T]:
    """Take all items in a thread of its own while ``work`` runs here; returns when both have ended.

    Raises:
        BaseException: what is no ``Exception`` (a signal) and comes meanwhile; then no further item is begun.
    """
    taken: Taken[T] = Taken()
    ended, given_up = threading.Event(), threading.Event()

    def take() -> None:
        started = time.perf_counter()
        try:
            for item in items:
                taken.items.append(item)
                if given_up.is_set():
                    break
        except BaseException as error:
            taken.failed = error
        finally:
            taken.seconds = time.perf_counter() - started
            ended.set()

    # a daemon: should a second signal end the process while it is waited for, it does not stand in the way
    thread = threading.Thread(target=take, name="specrej-overlap", daemon=True)
    thread.start()
    try:
        try:
            work()
        except Exception as error:
            taken.failed_beside = error
        waiting = time.perf_counter()
        ended.wait()  # not ``join``, which signals cannot interrupt everywhere
        taken.waited = time.perf_counter() - waiting
    except BaseException:
        given_up.set()
        ended.wait()  # what it works on is closed next
        raise
    finally:
        if ended.is_set():
            thread.join()
    return taken
