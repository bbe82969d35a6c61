"""One name of a record, and the files that several processes write for it.

``run.jsonl`` is written by one process; the ranks of a launcher write ``run_rank0.jsonl`` and so on, and processes that
join (``join=True``) ``run_joined0.jsonl`` and so on. All of them are read as one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_PART = re.compile(r"_(rank|joined)\d+$")


def rank_path(path: str, rank: int, world_size: int) -> str:
    """Each rank writes a file of its own: ``trace.jsonl`` becomes ``trace_rank1.jsonl`` and so on."""
    if world_size == 1:
        return path
    root, extension = os.path.splitext(path)
    return f"{root}_rank{rank}{extension}"


def joined_paths(path: str | Path) -> Iterator[Path]:
    """The files of processes that join; each takes the first that no other has."""
    own = whole(path)
    return (own.with_name(f"{own.stem}_joined{number}{own.suffix}") for number in count())


def kind(path: str | Path) -> str:
    """``rank``, ``joined``, or empty: of a process that writes alone."""
    found = _PART.search(Path(path).stem)
    return found[1] if found else ""


def whole(path: str | Path) -> Path:
    """The name that was given, of any of its files."""
    own = Path(path)
    return own.with_name(f"{_PART.sub('', own.stem)}{own.suffix}") if _PART.search(own.stem) else own


def alike(path: str, other: str) -> str:
    """The name for ``path`` of the process that has written ``other``."""
    found = _PART.search(Path(other).stem)
    root, extension = os.path.splitext(path)
    return f"{root}{found[0] if found else ''}{extension}"


def are_of(path: str | Path, names: list[str]) -> list[str]:
    """Those among file names that belong to the same name as ``path``, sorted; itself included."""
    own = whole(path)
    family = re.compile(rf"{re.escape(own.stem)}(_(rank|joined)\d+)?{re.escape(own.suffix)}")
    return sorted(filter(family.fullmatch, names))


def beside(path: str | Path) -> Iterator[Path]:
    """The files that other processes, or another number of them, have written for the same name."""
    own = Path(path)
    try:
        names = os.listdir(own.parent)
    except (OSError, ValueError):  # no folder, NUL in its name
        return
    others = (own.with_name(name) for name in are_of(own, names) if name != own.name)
    yield from filter(os.path.isfile, others)


def files(path: str | Path) -> list[Path]:
    """All that there are of one name: that of a process which writes alone first."""
    own = whole(path)
    return [*filter(os.path.isfile, [own]), *beside(own)]
