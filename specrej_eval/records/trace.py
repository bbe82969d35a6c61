"""The trace: one JSONL event per round, one record per request. Strict JSON, flushed line by line.

Records join lm-eval's samples files on ``(task, prompt_hash, repeat)``; never on doc_id, which the harness may log
wrongly for unsorted sample lists.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from specrej_eval.core import GenerationResult, Prompt, Round
from specrej_eval.errors import ConfigError
from specrej_eval.records import lock
from specrej_eval.records.jsonl import Appender, as_text, scan
from specrej_eval.redaction import redacted_values

SCHEMA_VERSION = 1


class Tracer:
    """Appends events to a file, if one is named; a run's first event names its schema, arguments and hardware.

    Raises:
        ConfigError: the file cannot be opened for appending, or another process writes there.
    """

    def __init__(self, path: str | None) -> None:
        self._give_up_lock: Callable[[], object] = (
            (lambda: None) if path is None else lock.hold(self, path, argument="trace_path")
        )
        self._file = None if path is None else Appender(path, argument="trace_path")

    def run(self, info: dict[str, Any]) -> None:
        self._write("run", {"schema_version": SCHEMA_VERSION, **redacted_values(info, put="")})

    def round(self, prompt: Prompt, index: int, event: Round) -> None:
        keys = {"task": prompt.task, "prompt_hash": prompt.prompt_hash, "repeat": prompt.repeat}
        self._write("round", {**keys, "round": index, **event.to_dict()})

    def request(self, result: GenerationResult) -> None:
        if self._file is not None:
            self._write("request", result.to_dict())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._give_up_lock()

    def _write(self, event: str, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(as_text({"event": event, **record}) + "\n")


def is_trace(path: str | Path) -> bool:
    """Whether every whole line of a file is an event of ours, and there is one."""
    try:
        found = scan(path, argument="trace_path", checksums=False)
    except ConfigError:
        return False
    events = ("run", "round", "request")
    return bool(found.lines) and not found.damaged and all(line.record.get("event") in events for line in found.lines)
