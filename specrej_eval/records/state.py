"""A run's live state, in a small file beside its records, for `specrej-eval status`; removed at a regular end.

It is replaced as a whole, at most once a second, and nothing depends on it: where it cannot be written, a run goes on
without. Whether the process lives is told by its lock (``lock``), not by this file. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

from specrej_eval.core import GenerationResult
from specrej_eval.records.jsonl import write_atomically

STATE = ".state"
EVERY = 1.0
"""Seconds between two writes, at least."""


class Session(Protocol):
    """A prompt in flight."""

    decode_tokens: int


@dataclass(slots=True)
class RunState:
    """What one process of a run is at."""

    pid: int = 0
    host: str = ""
    started: float = 0.0
    """Seconds since the epoch, as ``updated``."""
    updated: float = 0.0
    total: int = 0
    """Requests of this process."""
    earlier: int = 0
    """Answers that were there before it began, and are in no request of its."""
    done: int = 0
    """Those answered, the ones taken from records included."""
    decoded: int = 0
    """Those that this process decoded."""
    in_flight: int = 0
    decode_tokens: int = 0
    """Decoded by this process so far."""

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / max(1e-9, self.updated - self.started)

    @property
    def decoded_per_second(self) -> float:
        return self.decoded / max(1e-9, self.updated - self.started)

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this process so far; None before its first answer."""
        return (self.total - self.done) / self.decoded_per_second if self.decoded else None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none, or nothing that can be read."""
        try:
            told = json.loads(path.read_bytes()[:4096])
            found = {entry.name: told[entry.name] for entry in fields(cls)}
            return cls(**found) if all(_is_like(getattr(cls(), name), value) for name, value in found.items()) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


def _is_like(example: Any, value: Any) -> bool:
    kinds = (int, float) if isinstance(example, (int, float)) else type(example)
    return isinstance(value, kinds) and not isinstance(value, bool)


def state_file(records: str | Path) -> Path:
    """Where the state of the run lies that writes ``records``: ``.run.jsonl.state``."""
    path = Path(records)
    return path.with_name(f".{path.name}{STATE}")


class StateFile:
    """Kept up to date by the loop.

    Args:
        path: None = keep none.
        total: requests of this process.
        earlier: see ``RunState``.
    """

    def __init__(self, path: str | None, *, total: int, earlier: int = 0) -> None:
        self._path = None if path is None else Path(path)
        self._written = 0.0
        now = time.time()
        self.state = RunState(pid=os.getpid(), host=socket.gethostname(), started=now, updated=now)
        self.state.total, self.state.earlier = total, earlier
        self._of_finished = 0

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None and self._path is not None and self.state.done >= self.state.total:
            with contextlib.suppress(OSError):
                self._path.unlink()
        else:
            self._write()

    def finished(self, result: GenerationResult) -> None:
        self.state.done += 1
        if not result.taken:
            self.state.decoded += 1
            self._of_finished += result.ledger.decode_tokens
            self._now_and_then()

    def step(self, sessions: Sequence[Session]) -> None:
        self.state.in_flight = len(sessions)
        self.state.decode_tokens = self._of_finished + sum(session.decode_tokens for session in sessions)
        self._now_and_then()

    def _now_and_then(self) -> None:
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = time.monotonic()
        self.state.updated = time.time()
        with contextlib.suppress(Exception):  # a full disk is for the records to tell
            write_atomically(self._path, json.dumps(asdict(self.state)) + "\n")
