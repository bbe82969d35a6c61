"""Chat templates are programs that came with a checkpoint: they may fail, and they may never end.

A watchdog thread raises an exception in the thread that renders for too long. That reaches whatever Python code runs,
which a compiled Jinja template is; not a single C call (``10 ** 10 ** 10`` in a template), which nothing ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator

from specrej_eval.errors import PromptError, SpecRejError
from specrej_eval.wording import shortened

SECONDS = 60.0
"""For one rendering, which takes milliseconds; also under a debugger, or on a machine that is short of everything."""
_POLL = 0.5


class EndlessTemplateError(SpecRejError, TimeoutError):
    """A template has not ended in time."""


class _Late(BaseException):
    """Raised from outside; no ``except Exception`` of a template's library may catch it."""


class _Watch:
    """Who renders until when. One thread looks after all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        """Thread -> when it is late."""
        self.late: set[int] = set()
        """Threads in which the exception was raised."""
        self._process = 0

    def begin(self, thread: int) -> None:
        with self.lock:
            self.late.discard(thread)
            self.deadlines[thread] = time.monotonic() + SECONDS
            if self._process != os.getpid():  # threads do not live on in a forked process
                self._process = os.getpid()
                threading.Thread(target=self._look, name="specrej-templates", daemon=True).start()

    def end(self, thread: int) -> None:
        with self.lock:
            self.deadlines.pop(thread, None)
            was_late = thread in self.late
            self.late.discard(thread)
        if was_late:  # it may not have arrived yet, and must not later
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _look(self) -> None:
        while True:
            time.sleep(min(_POLL, SECONDS / 4))
            with self.lock:
                now = time.monotonic()
                for thread in [thread for thread, deadline in self.deadlines.items() if deadline < now]:
                    del self.deadlines[thread]
                    self.late.add(thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Late))


_watch = _Watch()


def _after_fork() -> None:
    global _watch
    _watch = _Watch()  # its lock may have been held by a thread that is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """What happens inside renders a template. Of limits within limits the inner one counts.

    Raises:
        EndlessTemplateError: it has not ended in time.
    """
    watch, thread = _watch, threading.get_ident()
    watch.begin(thread)
    try:
        try:
            yield
        finally:
            watch.end(thread)
    except _Late:
        watch.end(thread)  # it may have come while the first one was under way
        raise EndlessTemplateError(
            f"the chat template has not ended after {SECONDS:g} seconds.",
            hint="it loops for ever, or nearly so: use another checkpoint's, or mend its chat_template.jinja.",
        ) from None


@contextlib.contextmanager
def rendering(whose: str) -> Iterator[None]:
    """As ``time_limit``; whatever the template raises becomes one error.

    Raises:
        PromptError: the template failed, or has not ended in time.
        SpecRejError: what was raised inside on purpose.
    """
    try:
        with time_limit():
            yield
    except EndlessTemplateError as error:
        raise PromptError(f"the chat template of {whose}: {error.args[0]}", hint=error.hint) from error
    except SpecRejError:
        raise
    except Exception as error:  # a template refuses with jinja's errors, and fails with any other
        raise PromptError(
            f"the chat template of {whose} failed: {type(error).__name__}: {shortened(str(error), 300)}",
            hint="many templates refuse a system message, or turns that do not alternate; chat_template_args= passes "
            "arguments to it.",
        ) from error
