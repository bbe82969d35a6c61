"""Append-only JSONL files that survive a kill: whole lines count, a last line cut short is dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from specrej_eval.errors import ConfigError


def open_append(path: str, *, argument: str) -> IO[str]:
    """Open a JSONL file for appending, its folder made if need be.

    Raises:
        ConfigError: the file or its folder cannot be written.
    """
    try:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8", errors="surrogatepass")
    except OSError as exc:
        raise ConfigError(f"{argument}={path!r} cannot be written: {exc.strerror or exc}.") from exc


def read_lines(path: str | Path, *, argument: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a file's whole lines, and how many bytes those lines take.

    Raises:
        ConfigError: a whole line is not a JSON object.
    """
    records: list[dict[str, Any]] = []
    whole = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{argument}={str(path)!r} is not one of our files (line {number + 1} is not a JSON object).",
                    hint="name another file, or delete this one.",
                )
            records.append(record)
            whole += len(line)
    return records, whole


def drop_torn_line(path: str | Path, whole_bytes: int) -> None:
    """Cut off what a kill left behind the last whole line."""
    if Path(path).stat().st_size > whole_bytes:
        os.truncate(path, whole_bytes)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old text or the new one, never half of it.

    Raises:
        ConfigError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as exc:
        raise ConfigError(f"{str(path)!r} cannot be written: {exc.strerror or exc}.") from exc
