"""Chat templates are programs that came with a checkpoint: they may fail, and they may never end.

A watchdog thread raises an exception in the thread that renders for too long. That reaches whatever Python code runs,
which a compiled Jinja template is; not a single call of C code, such as ``10 ** 10 ** 10`` or a padding of a billion
characters, which nothing ends and which holds off the watchdog too. Those are refused before they begin: transformers
compiles chat templates in a sandbox, and ours computes nothing whose result would be beyond ``MOST_CHARACTERS`` or
``MOST_BITS``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sized
from typing import Any, TypeVar

from specrej_eval.errors import PromptError, SpecRejError
from specrej_eval.wording import shortened

SECONDS = 60.0
"""For one rendering, which takes milliseconds; also under a debugger, or on a machine that is short of everything."""
_POLL = 0.5
MOST_CHARACTERS = 10_000_000
"""Of a text, or items of a list, that one operation of a template may give; a context of a million tokens is less."""
MOST_BITS = 10_000
"""Of a whole number; date arithmetic needs 64."""
_THEIRS = "transformers.utils.chat_template_utils"
_WIDTH = re.compile(r"\d{6,}")
Result = TypeVar("Result")


class EndlessTemplateError(SpecRejError, TimeoutError):
    """A template has not ended in time."""


class TooMuchError(SpecRejError, ValueError):
    """One operation of a template would give more than any chat template needs."""


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


# what one operation may give


def _check(size: float, most: int = MOST_CHARACTERS, *, what: str) -> None:
    if size > most:
        raise TooMuchError(f"{what} would give more than {most:,} {'bits' if most == MOST_BITS else 'characters'}.")


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if operator in ("**", "*"):
            _check(bits, MOST_BITS, what=operator)
    elif operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, Sized) and isinstance(times, int):
                _check(len(many) * times, what="*")
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _check(len(left) + len(right), what="+")
    elif operator == "%" and isinstance(left, str):
        _check_call("%", left, right if isinstance(right, tuple) else (right,))


def _check_call(name: str, text: str, given: tuple[Any, ...]) -> None:
    """A method of a text, or a filter that is one."""
    what = f"{name}()"
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap"):
        lines = text.count("\t") + text.count("\n") + 1 if name in ("expandtabs", "indent") else 1
        for value in given:
            size = value if isinstance(value, int) else len(value) if isinstance(value, str) else 0
            _check(len(text) + lines * size, what=what)
    elif name in ("format", "format_map", "%"):
        given = (*given, *(inner for value in given if isinstance(value, dict) for inner in value.values()))
        asked = max((abs(value) for value in given if isinstance(value, int)), default=0)
        nested = "*" in text if name == "%" else re.search(r"\{[^}]*\{", text) is not None
        _check(MOST_CHARACTERS + 1 if _WIDTH.search(text) or (nested and asked > MOST_CHARACTERS) else 0, what=what)
        _check(sum(len(value) for value in given if isinstance(value, str)) * (len(text) // 2 + 1), what=what)
    elif name == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        _check(len(text) + text.count(given[0]) * len(given[1]), what=what)
    elif name == "join" and given and isinstance(given[0], list | tuple):
        _check(sum(len(text) + (len(item) if isinstance(item, str) else 0) for item in given[0]), what=what)


def _limited(base: type[Any]) -> type[Any]:
    """A sandbox as ``base``, in which one operation gives no more than the limits."""

    class LimitedEnvironment(base):  # type: ignore[misc]  # it is known at run time alone
        intercepted_binops = frozenset(("**", "*", "+", "%"))

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name in ("center", "indent", "wordwrap", "format", "replace"):
                if name in self.filters:
                    self.filters[name] = _checked_filter(name, self.filters[name])
            if "join" in self.filters:
                self.filters["join"] = _checked_filter("join", self.filters["join"], swapped=True)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # jinja2's names
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has a str.format of its own
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str):
                _check_call(getattr(method, "__name__", ""), owner, (*args, *kwargs.values()))
            return super().call(__context, __obj, *args, **kwargs)

    return LimitedEnvironment


def _checked_filter(name: str, original: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    """Args:
    swapped: its first argument is what the method takes, and the text stands behind it.
    """

    @functools.wraps(original)  # jinja2 asks what it is to be passed
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        place = next((at for at, value in enumerate(given) if isinstance(value, str | list | tuple)), None)
        if place is not None and swapped:
            separators = [value for value in given[place + 1 :] if isinstance(value, str)]
            _check_call(name, separators[0] if separators else "", (given[place],))
        elif place is not None and isinstance(given[place], str):
            _check_call(name, given[place], given[place + 1 :])
        return original(*args, **kwargs)

    return checked


def _limit_operations() -> None:
    """From now on transformers compiles chat templates in a sandbox of ours, and again what it has compiled before."""
    theirs = sys.modules.get(_THEIRS)
    base = getattr(theirs, "ImmutableSandboxedEnvironment", None)
    if base is None or base.__name__ == "LimitedEnvironment":
        return
    theirs.ImmutableSandboxedEnvironment = _limited(base)  # type: ignore[union-attr]
    for value in vars(theirs).values():
        if callable(getattr(value, "cache_clear", None)) and "jinja" in getattr(value, "__name__", ""):
            value.cache_clear()


def in_time(render: Callable[[], Result]) -> Result:
    """What ``render`` gives, which renders a template. Of limits within limits the inner one counts.

    It takes a function, for in a ``with`` block the exception could arrive in ``contextlib``, where nothing catches it.

    Raises:
        EndlessTemplateError: it has not ended in time.
    """
    _limit_operations()
    watch, thread = _watch, threading.get_ident()
    try:
        try:
            watch.begin(thread)
            return render()
        finally:
            watch.end(thread)
    except _Late:
        watch.end(thread)  # it may have come while the first one was under way
        raise EndlessTemplateError(
            f"the chat template has not ended after {SECONDS:g} seconds.",
            hint="it loops for ever, or nearly so: use another checkpoint's, or mend its chat_template.jinja.",
        ) from None


def rendered(whose: str, render: Callable[[], Result]) -> Result:
    """As ``in_time``; whatever the template raises becomes one error.

    Raises:
        PromptError: the template failed, or has not ended in time.
        SpecRejError: what was raised inside on purpose.
    """
    try:
        return in_time(render)
    except EndlessTemplateError as error:
        raise PromptError(f"the chat template of {whose}: {error.args[0]}", hint=error.hint) from error
    except TooMuchError as error:
        raise PromptError(
            f"the chat template of {whose} failed: {error.args[0]}",
            hint="use another checkpoint's, or mend its chat_template.jinja.",
        ) from error
    except SpecRejError:
        raise
    except Exception as error:  # a template refuses with jinja's errors, and fails with any other
        raise PromptError(
            f"the chat template of {whose} failed: {type(error).__name__}: {shortened(str(error), 300)}",
            hint="many templates refuse a system message, or turns that do not alternate; chat_template_args= passes "
            "arguments to it.",
        ) from error
