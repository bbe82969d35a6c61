"""Files and folders that are meant to last for a moment, and what killed processes have left of them.

Their names say that they are ours and which process made them, from the moment at which they are there to the moment at
which they are gone. What is found at the next start is removed if that process is gone; nothing else is touched: no
other name, no link, nothing of another user's or machine's, nothing that might still be in use.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from specrej_eval.paths import is_running, shortened

PREFIX = "specrej_eval_"
_END = "specrej-partial"


def partial(path: Path) -> Path:
    """Where a file is written before it takes the place of ``path``, beside it."""
    name = shortened(path.name)
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    ours = re.compile(rf"\.{re.escape(name)}\.{_host()}-(\d+)-\d+\.{_END}")
    with contextlib.suppress(OSError):
        for entry in os.listdir(path.parent):
            found = ours.fullmatch(entry)
            if found is not None and int(found[1]) != os.getpid() and not is_running(int(found[1])):
                with contextlib.suppress(OSError):
                    path.with_name(entry).unlink()
    return path.with_name(f".{name}.{_host()}-{os.getpid()}-{threading.get_ident()}.{_END}")


def folder(purpose: str) -> Path:
    """A new folder for this process, removed when it ends, or by ``remove_abandoned`` if it is killed.

    Args:
        purpose: a word that becomes part of its name.
    """
    remove_abandoned()
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}_{_host()}-{os.getpid()}_"))
    atexit.register(_remove, made, os.getpid())
    return made


def remove_abandoned() -> list[Path]:
    """Remove the folders that killed processes of this user have left; which."""
    removed = []
    for path in _ours(Path(tempfile.gettempdir())):
        shutil.rmtree(path, ignore_errors=True)  # follows no link
        removed.append(path)
    return removed


def _ours(place: Path) -> Iterator[Path]:
    """Folders that a process which is gone has made, as their names say."""
    ours = re.compile(rf"{PREFIX}[a-z]+_{_host()}-([1-9][0-9]{{0,9}})_[a-z0-9_]{{8}}")
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        found = ours.fullmatch(entry.name)
        if found is None:
            continue
        try:
            if not entry.is_dir(follow_symlinks=False):
                continue
            if hasattr(os, "getuid") and entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
        except OSError:  # it may be removed by another process at this very moment
            continue
        if not is_running(int(found[1])):
            yield Path(entry.path)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not from one that was forked
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
