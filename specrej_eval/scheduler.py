"""Who decodes next. Knows sessions and looks; no tokens, no tensors, no rewards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

AUTO_ROWS = 512
"""Rows that ``batch_size=auto`` lets decode together: the demo pair's tokens per second hardly rise beyond
(docs/benchmarks.md), and what is in flight is what a kill costs."""
AUTO_ROWS_UNIFORMS = 256
"""The same where company may change the last bits of a result: on a GPU, or in half precision."""
AUTO_PROMPTS = 128
"""Prompts that it lets do so, however few rows each has."""
READ_A_TURN = 4096
"""Tokens of prompts that are read between two turns of those that decode already, which wait meanwhile; a longer prompt
takes several turns."""
FIXED_PROMPTS = 4
"""What it comes to where memory is not known; where company may change a result, the least."""
READ_A_STEP = 128
"""Tokens that a reward model as large as the language model reads while that decodes one more for each of its rows, on
another GPU: a step takes as long as reading the weights once, in which time a GPU multiplies each of them with so many
tokens (about half of the ratio of its FLOP/s in bfloat16 to its bytes/s). An estimate: nothing but speed depends on it.
That it is no measurement is on purpose: what decodes together would depend on the clock, and with it last bits."""


def auto_prompts(rows: int, tokens: int, capacity_tokens: Callable[[], int], *, bits: bool) -> int:
    """Prompts in flight of ``batch_size=auto``, at least 1.

    Args:
        rows: that one of them decodes at a time, at most.
        tokens: of KV that one of them may hold, at most.
        capacity_tokens: tokens of KV that free memory holds, 0 = unknown; asked for only where it matters.
        bits: whether company changes no bit of a result.
    """
    prompts = max(1, min(AUTO_ROWS // rows, AUTO_PROMPTS))
    if not bits:
        prompts = max(FIXED_PROMPTS, min(AUTO_ROWS_UNIFORMS // rows, AUTO_PROMPTS))
    if prompts <= FIXED_PROMPTS:
        return prompts
    return max(FIXED_PROMPTS, min(prompts, capacity_tokens() // tokens))


def steps_beside(tokens: int, *, reward_parameters: int, parameters: int) -> int:
    """Steps in which a reward model on another device may read so many tokens, at least 1.

    Args:
        reward_parameters, parameters: of the two models; 0 = unknown.
    """
    ratio = reward_parameters / parameters if reward_parameters and parameters else 1.0
    return max(1, round(tokens * ratio / READ_A_STEP))


class Schedulable(Protocol):
    """A prompt in flight, as far as the scheduler cares."""

    @property
    def remaining_tokens(self) -> int:
        """Tokens its live rows may decode before its next look; 0 = the look is due."""
        ...


class Scheduler(Generic[T]):
    """Admits waiting work in order, at most ``batch_size`` prompts at a time.

    ``batch_size`` bounds prompts in flight and nothing else: which rows are drawn never depends on it.

    Args:
        tokens: of a prompt that waits; None = not known, and not bounded.
        may_begin: asked of a prompt when its turn has come; False puts it off, behind the others. None = each may.
    """

    def __init__(
        self,
        waiting: Iterable[T],
        *,
        batch_size: int,
        tokens: Callable[[T], int] | None = None,
        may_begin: Callable[[T], bool] | None = None,
    ) -> None:
        self._waiting = deque(waiting)
        self._batch_size = batch_size
        self._tokens = tokens or (lambda _: 0)
        self._may_begin = may_begin or (lambda _: True)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> Sequence[T]:
        return self._waiting

    def remove(self, belongs: Callable[[T], bool]) -> None:
        """Take prompts out of those that wait."""
        self._waiting = deque(item for item in self._waiting if not belongs(item))

    def admit(self, running: int) -> list[T]:
        """The next prompts to open beside ``running`` open ones.

        At least one, if there is room and one that may begin; beyond that no more than ``READ_A_TURN`` tokens while
        others wait to decode.
        """
        admitted: list[T] = []
        put_off: list[T] = []
        tokens = 0
        while self._waiting and running + len(admitted) < self._batch_size:
            more = self._tokens(self._waiting[0])
            if running and admitted and tokens + more > READ_A_TURN:
                break
            item = self._waiting.popleft()
            if self._may_begin(item):
                admitted.append(item)
                tokens += more
            else:
                put_off.append(item)
        self._waiting.extend(put_off)
        return admitted

    def put_back(self, admitted: Sequence[T]) -> None:
        """Those admitted last wait again, in their order: nothing was decoded for them."""
        self._waiting.extendleft(reversed(admitted))

    @staticmethod
    def until_next_look(sessions: Sequence[Schedulable]) -> int:
        """Tokens all sessions can decode together before the first of them is due."""
        return min(session.remaining_tokens for session in sessions)
