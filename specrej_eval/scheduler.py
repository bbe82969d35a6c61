"""Who decodes next. Knows sessions and looks; no tokens, no tensors, no rewards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Schedulable(Protocol):
    """A prompt in flight, as far as the scheduler cares."""

    @property
    def remaining_tokens(self) -> int:
        """Tokens its live rows may decode before its next look; 0 = the look is due."""
        ...


class Scheduler(Generic[T]):
    """Admits waiting work in order, at most ``batch_size`` prompts at a time.

    ``batch_size`` bounds prompts in flight and nothing else: which rows are drawn never depends on it.
    """

    def __init__(self, waiting: Iterable[T], *, batch_size: int) -> None:
        self._waiting = deque(waiting)
        self._batch_size = batch_size

    def admit(self, running: int) -> list[T]:
        """The next prompts to open beside ``running`` open ones."""
        room = min(self._batch_size - running, len(self._waiting))
        return [self._waiting.popleft() for _ in range(room)]

    @staticmethod
    def until_next_look(sessions: Sequence[Schedulable]) -> int:
        """Tokens all sessions can decode together before the first of them is due."""
        return min(session.remaining_tokens for session in sessions)
