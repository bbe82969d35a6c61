"""How a command ends early: Ctrl-C and SIGTERM, what is kept by then, and the command that goes on from there.

A signal becomes an exception in the main thread (``Stopped``, a KeyboardInterrupt), so that files are closed on the way
out. Whatever the main thread is waiting for, a library's C code included, the process has ended PATIENCE seconds later.
Only our own commands do this, and those of the harnesses while a model of ours runs; a program that calls us from
Python, or has handlers of its own, keeps Python's ways.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

from specrej_eval.errors import SpecRejError
from specrej_eval.redaction import PUT, is_secret_name, redacted
from specrej_eval.wording import counted

STOPPED = "What is finished is recorded; run the same command again to continue."
PATIENCE = 4.0
"""Seconds that the way out may take."""
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(NAMES.get(signal.Signals(signum), str(signum)))
        self.signum = signum


@dataclass(slots=True)
class Kept:
    """Answers that a rerun will not draw again."""

    total: int
    where: str | None
    """The file or folder that holds them; None = nowhere."""
    answers: int = 0
    what: str = "answers"
    """What is counted, in the plural."""
    active: bool = True

    def add(self) -> None:
        self.answers += 1


class _State:
    """Of this process; there is one main thread and one pair of signal handlers."""

    command = 0
    handling = False
    kept: Kept | None = None
    held = 0
    pending: int | None = None
    told = False

    def __init__(self) -> None:
        self.callbacks: list[weakref.WeakMethod[Callable[[], None]]] = []


_state = _State()


@contextlib.contextmanager
def command() -> Iterator[None]:
    """What runs inside is a command line, not somebody's Python program: ``signals`` may take effect."""
    _state.command += 1
    try:
        yield
    finally:
        _state.command -= 1


def is_command() -> bool:
    return _state.command > 0


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Within a ``command``, in the main thread: Ctrl-C and SIGTERM raise ``Stopped``.

    A second Ctrl-C ends the process at once. A signal that is ignored stays so (a shell's background jobs and ``nohup``
    ignore Ctrl-C; SIGTERM is told all the same), and where somebody else has set a handler nothing changes.
    """
    ours = is_command() and not _state.handling and threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in NAMES} if ours else {}
    before = {number: handler for number, handler in found.items() if handler == _DEFAULTS[number]}
    if not before or any(found[number] != signal.SIG_IGN for number in found.keys() - before.keys()):
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(reader,), name="specrej-stopping", daemon=True).start()
    for number in before:
        signal.signal(number, _on_signal)
    _state.handling = True
    try:
        yield
    except Stopped:
        raise  # the handlers stay: on the way out a second signal means what it says
    except BaseException:
        _restore(before, previous, writer)
        raise
    else:
        _restore(before, previous, writer)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal waits until this is over: writing an answer and counting it are one step."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        if not _state.held and _state.pending is not None:
            signum, _state.pending = _state.pending, None
            raise Stopped(signum)


@contextlib.contextmanager
def keeping(
    total: int, where: str | os.PathLike[str] | None, answers: int = 0, *, what: str = "answers"
) -> Iterator[Kept]:
    """Count the answers kept, for the message. Inside another ``keeping`` nothing is counted: the outer one does."""
    kept = Kept(total, None if where is None else os.fspath(where), answers, what)
    if _state.kept is not None and _state.kept.active:
        yield kept
        return
    _state.kept = kept
    try:
        yield kept
    finally:
        kept.active = False


def message(signum: int) -> str:
    """Why it ended, what is kept, how to go on."""
    return f"stopped by {NAMES.get(signal.Signals(signum), signum)}: {what_is_kept()}"


def what_is_kept() -> str:
    """The answers kept by now, and the command that goes on."""
    kept, rank = _state.kept, rank_name()
    whose = f" ({rank})" if rank else ""
    again = "run the same command again to continue" + ("." if rank else f":\n  {command_line()}")
    if kept is None:
        return f"stopped before the first answer of this start{whose}; earlier answers are kept. To start, {again}"
    if kept.where is None:
        return (
            f"none of {counted(kept.total, 'answer')} is kept{whose}, since no file was named. journal=FILE in "
            "--model_args keeps each one as it is finished, and the same command continues from there."
        )
    return f"{kept.answers:,} of {kept.total:,} {kept.what}{whose} are kept in {kept.where}; {again}"


def command_line() -> str:
    """The command as it was typed, without its secrets."""
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    if words[0] == "__main__.py":  # python -m NAME
        words = ["python", "-m", os.path.basename(os.path.dirname(sys.argv[0])), *sys.argv[1:]]
    shown = []
    for place, word in enumerate(words):
        secret = place > 0 and words[place - 1].startswith("-") and is_secret_name(words[place - 1])
        shown.append(PUT if secret else redacted(word))
    return shlex.join(shown)


def rank_name() -> str:
    """``rank 1 of 2`` where there are several processes."""
    size = os.environ.get("WORLD_SIZE", "1")
    return f"rank {os.environ.get('RANK', '0')} of {size}" if size.isdigit() and int(size) > 1 else ""


def leave(name: str, error: SpecRejError | KeyboardInterrupt) -> int:
    """Say on stderr, in one message, how a command ended; its exit code."""
    if isinstance(error, SpecRejError):
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
    if not _state.told:
        _state.told = isinstance(error, Stopped)
        told = f"\n{name}: {message(signum)}" if _state.told else f"{name}: stopped. {STOPPED}"
        print(told, file=sys.stderr, flush=True)
    return 128 + int(signum)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it after Ctrl-C: we are leaving already
    if _state.held:
        _state.pending = signum
    else:
        raise Stopped(signum)


def on_the_way_out(callback: Callable[[], None]) -> None:
    """Call a bound method when a signal ends this process although the main thread never got its turn; quick, and no
    more than once. Its object may go before that."""
    _state.callbacks.append(weakref.WeakMethod(callback))


def _end_in_time(reader: socket.socket) -> None:
    """Of a thread of its own, woken by the C part of the signal handling even if Python's never gets its turn."""
    while True:
        try:
            data = reader.recv(1)
        except OSError:
            return
        if not data:
            return
        if data[0] in NAMES:
            break
    time.sleep(PATIENCE)
    for found in _state.callbacks:
        if (callback := found()) is not None:
            callback()
    leave("specrej-eval", Stopped(data[0]))
    os._exit(128 + data[0])


def _restore(before: Mapping[signal.Signals, object], previous: int, writer: socket.socket) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal gave
    signal.set_wakeup_fd(previous)
    writer.close()
    _state.handling = False
