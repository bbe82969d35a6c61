"""A device whose memory runs out at chosen operations: what torch dispatches is counted, and some of it fails."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support import ROOT

PACKAGE = str(ROOT / "specrej_eval") + "/"
LOOP = ("generator.py:", "in_flight.py:")
"""The files whose lines are the steps of a run: prompts are read, rows decoded, copied, scored, followed, audited."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that torch dispatched, and where it came from."""

    name: str
    """``aten.mm.default``."""
    path: tuple[str, ...]
    """The lines of the package on the stack, innermost first, as ``kv/cache.py:append:142``; none for a test's own."""

    @property
    def line(self) -> str:
        """The innermost line."""
        return self.path[0] if self.path else "?"

    @property
    def site(self) -> tuple[str, str]:
        """Line and operation: of several in one line, or of the forward pass of a model that one line calls, each is a
        site of its own."""
        return self.line, self.name

    @property
    def function(self) -> str:
        """The innermost function."""
        return self.line.rpartition(":")[0]

    def step(self, of: tuple[str, ...] = LOOP) -> str:
        """The line of the loop that it belongs to."""
        return next((line for line in self.path if line.startswith(of)), "?")


class MemoryRunsOut(TorchDispatchMode):
    """Counts operations; those whose number is in ``at`` raise instead of running.

    Args:
        at: numbers of operations, from 0.
        traced: note each operation (slow).
    """

    def __init__(self, at: Collection[int] = (), *, traced: bool = False) -> None:
        super().__init__()
        self.at = frozenset(at)
        self.num_ops = 0
        self.failed: list[str] = []
        self.operations: list[Operation] | None = [] if traced else None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and the guard against it takes as long as an operation

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.num_ops = self.num_ops, self.num_ops + 1
        if self.operations is not None:
            self.operations.append(Operation(str(function), _ours()))
        if number in self.at:
            self.failed.append(f"{function} in {' < '.join(_ours())}")
            raise torch.OutOfMemoryError(f"operation {number}, {function}")
        return function(*args, **(kwargs or {}))


def _ours() -> tuple[str, ...]:
    """The lines of the package on the stack, innermost first."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            found.append(f"{name[len(PACKAGE) :]}:{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found)


def classes(operations: Iterable[Operation], steps: tuple[str, ...] = LOOP) -> list[list[int]]:
    """Numbers of operations that are the same but for when they happen, in order: same site, same step of the run.

    What differs inside a class is the layer, the token, the row, the chunk of a prompt.
    """

    def key(numbered: tuple[int, Operation]) -> tuple[str, str, str]:
        return *numbered[1].site, numbered[1].step(steps)

    by_class = sorted(enumerate(operations), key=key)  # sorting keeps the order of what is alike
    return [[number for number, _ in members] for _, members in groupby(by_class, key)]


def first_middle_last(operations: Sequence[Operation], steps: tuple[str, ...] = LOOP, *, seed: int = 0) -> list[int]:
    """Of each class its first operation, its last, and one between, drawn by the seed; and of each way of our lines
    that leads to an operation the last time it is gone."""
    chosen = {number for numbers in classes(operations, steps) for number in (numbers[0], numbers[-1])}
    chosen |= {_drawn(numbers[1:-1], operations, seed) for numbers in classes(operations, steps) if len(numbers) > 2}
    last = {(operation.name, operation.path): number for number, operation in enumerate(operations)}
    return sorted(chosen | set(last.values()))


def one_of_each(operations: Sequence[Operation], steps: tuple[str, ...] = LOOP, *, seed: int = 0) -> list[int]:
    """One operation of each class, drawn by the seed."""
    return sorted(_drawn(numbers, operations, seed) for numbers in classes(operations, steps))


def _drawn(numbers: Sequence[int], operations: Sequence[Operation], seed: int) -> int:
    return random.Random(f"{seed} {operations[numbers[0]].site}").choice(numbers)
