"""One run at a time on one file or folder of records: an advisory lock that ends with the process, however it ends.

The lock lies on a hidden file beside what it guards (``.run.jsonl.lock``), since that itself is replaced when it is
mended. It says who holds it, and is removed at a regular end; what a killed process leaves is no lock, for the kernel
has released it. Ranks of one run have files of their own, ``run_rank0.jsonl`` and so on, and do not lock each other
out, nor do processes that join, with ``run_joined0.jsonl`` and so on. Those of one kind refuse those of another, and
both a process that writes ``run.jsonl`` alone, and the other way round.

Within one process a lock may be taken again: what it writes, it writes in order. Not so ``take``, for what one of
several is to have alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError
from specrej_eval.paths import check_path
from specrej_eval.records import parts
from specrej_eval.wording import inert

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
"""None where this is no POSIX system."""

logger = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds for which a lock may still be held by a process that is just being killed, or that only looks."""
_POLL = 0.05
_OR_JOIN = "; or start each of them with join=True, and they share the prompts"
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(slots=True)
class _Held:
    file: int
    """Descriptor; the lock ends when it is closed."""
    path: Path
    count: int = 1


_held: dict[str, _Held] = {}
"""Of this process: real path of what is guarded -> its lock."""
_guard = threading.RLock()


def hold(owner: object, path: str | Path, *, argument: str) -> Callable[[], object]:
    """Keep a file of records to this process for as long as ``owner`` lives.

    Args:
        path: the file, or one that stands for a whole folder.
        argument: what messages call it.

    Returns:
        What gives it up before that.

    Raises:
        ConfigError: another process holds it (says which, since when, and what to do), or its folder cannot be written.
    """
    taken = _take(path, argument)
    return weakref.finalize(owner, _release, os.path.realpath(path)) if taken else lambda: None


@contextlib.contextmanager
def holding(path: str | Path, *, argument: str) -> Iterator[None]:
    """As ``hold``, for a block."""
    taken = _take(path, argument)
    try:
        yield
    finally:
        if taken:
            _release(os.path.realpath(path))


def hold_first(owner: object, paths: Iterable[Path], *, argument: str) -> tuple[Path, Callable[[], object]]:
    """As ``hold``, of the first among paths that nobody has, this process included.

    Returns:
        The path, and what gives it up.

    Raises:
        ConfigError: as ``hold``, if a process of another kind holds the name; or files cannot be locked here.
    """
    for path in paths:
        place = os.path.realpath(path)
        with _guard:
            if not take(path, argument=argument):
                continue
            _refuse_others(path, place, argument)
        return path, weakref.finalize(owner, _release, place)
    raise AssertionError("there is always another")


def take(path: Path, *, argument: str) -> bool:
    """Lock something at once, unless anybody has it, this process included; ``give_up`` ends it.

    Raises:
        ConfigError: its folder cannot be written, or files cannot be locked here.
    """
    place = os.path.realpath(path)
    try:
        with _guard:
            return place not in _held and _acquire(place, patience=0)
    except FileNotFoundError:
        return False  # whoever tidied up has just removed its folder; the next time it is made again
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise ConfigError(
                f"{argument}={str(path)!r}: files cannot be locked there ({error.strerror}), and processes that join "
                "share their work by locks.",
                hint="name a file on another file system; or leave join out and start one process.",
            ) from error
        raise _not_writable(path, argument, error) from error


def give_up(path: Path) -> None:
    """End what ``take`` has taken."""
    _release(os.path.realpath(path))


def check(path: str | Path, *, argument: str, joins: bool = False) -> None:
    """Refuse now what ``hold`` would refuse; nothing is locked, and nothing is written.

    Args:
        joins: what ``hold_first`` would refuse, of paths such as this one.

    Raises:
        ConfigError: another process holds it.
    """
    check_path(path, argument=argument)
    place = os.path.realpath(path)
    if fcntl is None or place in _held or _is_no_file(path):
        return
    if not joins and _is_held(lock_file(Path(place))):
        raise _refusal(path, lock_file(Path(place)), argument)
    _refuse_others(path, place, argument)


def holder(path: str | Path) -> dict[str, Any] | None:
    """Who holds it: pid, host, since, as far as that is written down; None if nobody does.

    Raises:
        OSError: this system cannot tell.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    file = lock_file(Path(os.path.realpath(path)))
    return _holder(file) if _is_held(file) else None


def _is_no_file(path: str | Path) -> bool:
    """Whether it is a pipe, a terminal or a device: nothing is kept there that two runs could mix up."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def lock_file(path: Path) -> Path:
    name = f".{path.name}.lock"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.lock"
    return path.with_name(name)


def _take(path: str | Path, argument: str) -> bool:
    check_path(path, argument=argument)
    if fcntl is None:
        _say_once("this system has no flock")
        return False
    if _is_no_file(path):
        return False
    place = os.path.realpath(path)
    with _guard:
        if place in _held:
            _held[place].count += 1
            return True
        try:
            if not _acquire(place, patience=PATIENCE):
                raise _refusal(path, lock_file(Path(place)), argument)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _say_once(f"{os.path.dirname(place)}: {error.strerror}")
                return False
            raise _not_writable(path, argument, error) from error
        _refuse_others(path, place, argument)
    return True


def _acquire(place: str, *, patience: float) -> bool:
    """Lock what this process does not hold yet; False if another does.

    Raises:
        OSError: it cannot be locked, or its folder cannot be written.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    file = lock_file(Path(place))
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(file, patience)
    if descriptor is None:
        return False
    _held[place] = _Held(descriptor, file)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, it only does not say who has it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _this_process().encode(), 0)
    return True


def _refuse_others(path: str | Path, place: str, argument: str) -> None:
    for other in _others(Path(place)):
        if _is_held(lock_file(other)):
            _release(place)
            raise _refusal(path, lock_file(other), argument)


def _locked(file: Path, patience: float) -> int | None:
    """A descriptor with the lock; None if somebody else has it."""
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                return descriptor
        except OSError as error:
            if error.errno not in _BUSY:
                os.close(descriptor)
                raise
        os.close(descriptor)  # held, or removed by its holder between our opening and locking it
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL)


def _is_held(file: Path) -> bool:
    """Whether a process has this lock, for longer than a look takes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError as error:
            if error.errno not in _BUSY:
                return False
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            return True
        time.sleep(_POLL)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        there, mine = os.stat(file), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _release(place: str) -> None:
    with _guard:
        held = _held.get(place)
        if held is None:
            return
        held.count -= 1
        if held.count:
            return
        del _held[place]
        if _is_at(held.file, held.path):
            with contextlib.suppress(OSError):
                held.path.unlink()  # before the lock is given up: whoever waits for it looks whether it is still there
        os.close(held.file)


def _others(path: Path) -> Iterator[Path]:
    """Files of the same name that only another run can be writing: those of another kind."""
    mine = parts.kind(path)
    if mine:
        yield parts.whole(path)
    with contextlib.suppress(OSError):
        locked = [name[1:-5] for name in os.listdir(path.parent) if name.startswith(".") and name.endswith(".lock")]
        yield from (path.with_name(name) for name in parts.are_of(path, locked) if parts.kind(name) not in ("", mine))


def _refusal(path: str | Path, file: Path, argument: str) -> ConfigError:
    holder = _holder(file)
    named = parts.whole(path) if parts.kind(path) == "joined" else path
    pid, host, since = (inert(str(holder.get(name, ""))) for name in ("pid", "host", "since"))
    here = host == socket.gethostname()
    who = f"process {pid} on {host or 'another machine'}, since {since}" if pid else "another process"
    stop = f"`kill {pid}` stops it{'' if here else f' on {host}'}" if pid.isdigit() else "stop it"
    return ConfigError(
        f"{argument}={str(named)!r} is in use by {who}: two runs that write there would mix their answers.",
        hint=f"wait until it ends; or {stop}, and this command goes on from what it has recorded; or give this run "
        f"a place of its own{_OR_JOIN if argument == 'journal' else ''}.",
    )


def _not_writable(path: str | Path, argument: str, error: OSError) -> ConfigError:
    return ConfigError(f"{argument}={str(path)!r} cannot be written: {error.strerror or error}.")


def _holder(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _this_process() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"


@functools.cache
def _say_once(why: str) -> None:
    logger.warning("Files of records cannot be locked here (%s): start no two runs on one folder or journal.", why)


def _after_fork() -> None:
    """A forked process has its parent's descriptors, but holds nothing: a lock is of the process that took it."""
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        os.close(held.file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
