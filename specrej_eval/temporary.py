"""Files and folders that are meant to last for a moment, and what killed processes have left of them.

They say in their name, or in a marker, that they are ours and whose process made them. What is found at the next start
is removed if that process is gone; nothing else is touched: no other name, no link, nothing of another user's or
machine's, nothing that might still be in use.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
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
MARKER = ".specrej-eval.json"
"""In each folder of ours: who made it."""
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
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}_"))
    (made / MARKER).write_text(json.dumps({"pid": os.getpid(), "host": _host()}) + "\n", encoding="utf-8")
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
    """Folders whose marker says that a process which is gone has made them."""
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            if hasattr(os, "getuid") and entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            marker = Path(entry.path, MARKER)
            if marker.is_symlink() or not marker.is_file():
                continue
            told = json.loads(marker.read_bytes()[:1000])
            if isinstance(told, dict) and told.get("host") == _host() and _is_gone(told.get("pid")):
                yield Path(entry.path)
        except (OSError, ValueError, RecursionError):  # it may be removed by another process at this very moment
            continue


def _is_gone(pid: object) -> bool:
    return isinstance(pid, int) and not isinstance(pid, bool) and pid > 0 and not is_running(pid)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not from one that was forked
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
