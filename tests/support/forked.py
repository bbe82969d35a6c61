"""Runs in processes forked from the test's own, so that nothing is imported again, and kill -9 at an exact moment.

A run survives a kill by what has reached the disk. So the moments that matter are those at which something does: each
``os.fsync`` and each ``os.replace``, just before and just after it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.std import tqdm

SECONDS = 240.0


class Moments:
    """Counts the moments at which something reaches the disk, and ends this process at one of them.

    Args:
        place: which one, from 0: twice the number of the call, and one more for the moment after it.
        torn: at ``os.fsync``, cut so many bytes off the file first, as a kill within a write does.
    """

    def __init__(self, place: int, torn: int = 0) -> None:
        self.left = place
        self.torn = torn

    def install(self) -> None:
        os.fsync = self._around(os.fsync)
        os.replace = self._around(os.replace)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._count(*args)
            result = original(*args, **kwargs)
            self._count(*args)
            return result

        return call

    def _count(self, *args: Any) -> None:
        if self.left == 0:
            if self.torn and isinstance(args[0], int):
                os.ftruncate(args[0], max(0, os.fstat(args[0]).st_size - self.torn))
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def start(work: Callable[[], Any], *, moments: Moments | None = None, env: dict[str, str] | None = None) -> int:
    """Fork; the process id. The child's exit code is 0 if ``work`` returns 0 or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads that wait (tqdm's) do not live on in the child
        pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.environ.update(env or {})
        # torch makes the pool of its threads anew after a fork, when it is first asked for; of two threads that ask at
        # once, as when weights are loaded, one finds none and fails
        torch.set_num_threads(torch.get_num_threads())
        _own_bars()
        if moments is not None:
            moments.install()
        code = int(work() or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _own_bars() -> None:
    """The lock of progress bars is one for a process and all that are forked from it: one that is killed while it draws
    would keep it for good, and the tests would wait for ever."""
    lock = threading.RLock()
    classes = [tqdm]
    while classes:
        each = classes.pop()
        each.set_lock(lock)
        classes += each.__subclasses__()


def speaking(
    work: Callable[[], Any], *, said: Path, folder: Path, env: dict[str, str] | None = None, argv: Sequence[str] = ()
) -> int:
    """As ``start``, in a working folder of its own, as a command finds it.

    Args:
        said: a folder for ``stdout`` and ``stderr``.
        argv: what ``sys.argv`` is there.
    """

    def alone() -> Any:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        logging.root.handlers.clear()  # pytest's
        for name in logging.root.manager.loggerDict:
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    handler.stream = sys.stderr  # setStream flushes the one before, which a test may have closed
        PartialState._reset_state()  # of whatever this test process has used accelerate for
        os.chdir(folder)
        sys.argv = list(argv)
        try:
            return work()
        except SystemExit as ended:
            return ended.code
        except BaseException:
            traceback.print_exc()
            return 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    return start(alone, env=env)


def output(
    work: Callable[[], Any], *, folder: Path, env: dict[str, str] | None = None, argv: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """What a command says and how it ends; see ``speaking``."""
    with tempfile.TemporaryDirectory() as made:
        said = Path(made)
        code = ended(speaking(work, said=said, folder=folder, env=env, argv=argv))
        return subprocess.CompletedProcess(argv, code, *((said / name).read_text() for name in ("stdout", "stderr")))


@contextmanager
def living(work: Callable[[], object]) -> Iterator[int]:
    """A process that has done something, holds what came of it, and lives until the end of the block; its id."""
    reader, writer = os.pipe()

    def keep() -> None:
        held = work()
        os.write(writer, b".")
        time.sleep(600)
        assert held is not work, "it is held until here"

    pid = start(keep)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(reader)


def ended(pid: int) -> int:
    """How a process ended: its exit code, or minus the signal."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end")


def killed(work: Callable[[], Any], place: int, *, torn: int = 0) -> bool:
    """Whether a run was killed at this moment; False if it was over before, and well."""
    code = ended(start(work, moments=Moments(place, torn)))
    assert code in (0, -signal.SIGKILL), f"exit code {code}"
    return code != 0


def together(
    work: Callable[[], Any], ranks: int, *, killed_at: int | None = None, said: Path | None = None
) -> Sequence[int]:
    """A run of several processes: their exit codes.

    Args:
        killed_at: kill the first of them at this moment, and then all the others, as when a machine is gone.
        said: each writes its standard error to ``errorsRANK`` in this folder.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def alone() -> Any:
        PartialState._reset_state()  # of whatever this test process has used accelerate for
        if said is not None:
            os.dup2(os.open(said / f"errors{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
        return work()

    pids = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = {name: str(value) for name, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        moments = Moments(killed_at) if rank == 0 and killed_at is not None else None
        pids.append(start(alone, moments=moments, env=env))
    codes = [ended(pids[0])]
    for pid in pids[1:]:
        if codes[0] == -signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
    return codes
