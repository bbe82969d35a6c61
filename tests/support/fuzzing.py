"""Hostile inputs, and what may come of one: a valid outcome or one clear error, in time, and nothing written elsewhere.

Inputs are valid documents with a few parts replaced, left out, doubled or moved, or bytes that were cut, flipped and
repeated: what is wrong everywhere is refused at the first look, and says little about the looks after it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specrej_eval import cli, paths
from specrej_eval.errors import SpecRejError
from support import FULL

SECONDS = 60
"""Of this process's own work, for one input: more is a hang. Not by the clock: others may keep the machine busy."""
MOST = 6000
"""Characters of one clear error; some quote a long list of names."""


def examples(full: int, short: int = 200) -> int:
    """How many inputs a surface is tried with."""
    return full if FULL else short


# values


TEXTS = (
    *("", " ", "0", "-1", "1e999", "nan", "inf", "None", "null", "true", "[]", "{}", "a" * 300, "9" * 5000, "[" * 3000),
    *("../../x", "/etc/passwd", "a/b", "a\\b", "~", "~nobody/x", "C:\\x", ".", "..", "a\0b", "\ud800", "a\ud800b"),
    *(
        "\x1b[2J\x1b]0;x\x07",
        "\u202egnp.exe",
        "\u2028",
        "\ufeff",
        "=cmd|' /C calc'!A0",
        "<script>x</script>",
        "\\input{x}",
    ),
    *(
        "http://",
        "http://[",
        "http://x:y@z",
        "http://a:99999",
        "judge:",
        "judge:m@http://[",
        "x:y",
        "os:system",
        "a,b=c",
    ),
    *("{instruction}", "{{ x }}", "{% for x in y %}", "%s%n", "<|im_end|>", "<bos>", "</s>", "auto", "max", "sum", "*"),
)
NUMBERS = (0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**299, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324)
WRONG: tuple[Any, ...] = (
    *(None, True, False, float("nan"), float("inf"), float("-inf"), *NUMBERS, *TEXTS),
    *([], [1], [[]], [None], ["x", {}], {}, {"": 0}, {"a": [1]}, {"0": {}}, [[[[1]]]], [["a", 1]], {"a": {"b": None}}),
)
texts = st.sampled_from(TEXTS) | st.text(st.characters(), max_size=20) | st.text("a{}[]=,:\"'\\\n\ud800\0", max_size=12)
scalars = st.sampled_from(WRONG) | st.integers() | st.floats() | texts
values = st.sampled_from(WRONG) | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=4
)


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a document, itself among them."""
    yield at
    if isinstance(document, dict):
        for key, inner in document.items():
            yield from places(inner, (*at, key))
    elif isinstance(document, list):
        for index, inner in enumerate(document):
            yield from places(inner, (*at, index))


_OPERATIONS = ("replace", "replace", "replace", "leave out", "double", "rename", "move", "wrap")


@st.composite
def altered(draw: st.DrawFn, document: Any, *, most: int = 3, whole: bool = True) -> Any:
    """A document with one part or a few changed.

    Args:
        most: changes.
        whole: the document itself may be replaced.
    """
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        there = list(places(found))
        place = draw(st.sampled_from(there))
        if not place:
            if whole and draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(values))
            continue
        operation = draw(st.sampled_from(_OPERATIONS))
        inside = found
        for step in place[:-1]:
            inside = inside[step]
        last = place[-1]
        if operation == "leave out":
            del inside[last]
        elif operation == "double" and isinstance(inside, list):
            inside.insert(last, copy.deepcopy(inside[last]))
        elif operation == "rename" and isinstance(inside, dict):
            inside[draw(texts)] = inside.pop(last)
        elif operation == "move":
            taken = found
            for step in draw(st.sampled_from(there)):
                taken = taken[step] if _has(taken, step) else taken
            inside[last] = copy.deepcopy(taken)
        elif operation == "wrap":
            inside[last] = [inside[last]]
        else:
            inside[last] = copy.deepcopy(draw(values))  # a later change must not reach what others are drawn from
    return found


def _has(value: Any, step: Any) -> bool:
    return (isinstance(value, dict) and step in value) or (
        isinstance(value, list) and isinstance(step, int) and step < len(value)
    )


_PIECES = (
    *(
        b"\n",
        b"\r\n",
        b"\0",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b":",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
    ),
    *(
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 2000,
        b"\\ud800",
        b"\x1b[2J",
        b"---",
    ),
    *(
        b"!!python/object/apply:os.system [x]",
        b"&a [*a]",
        b"? ",
        b"<<: *x",
        b"\t",
        b"'",
        b"|",
        b"=1+1",
        b"\xe2\x80\xa8",
    ),
    *(
        b"2020-01-01",
        b"1:30:00",
        b"!!binary aaa",
        b"!!set {a}",
        b"~",
        b"0o7",
        b"\x85",
        b"<<: [{a: 1}]",
        b"{a: 1, a: 2}",
    ),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, *, most: int = 4) -> bytes:
    """Bytes that were cut, flipped, repeated, moved or written over."""
    found = content
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, len(found)))
        end = min(len(found), start + draw(st.sampled_from((0, 1, 1, 2, 7, 40, 400))))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            found = found[:start] + found[end:]
        elif kind == 1:
            found = found[:start] + draw(st.sampled_from(_PIECES)) + found[end:]
        elif kind == 2 and start < len(found):
            found = found[:start] + bytes([found[start] ^ (1 << draw(st.integers(0, 7)))]) + found[start + 1 :]
        elif kind == 3:
            found = found[:start]
        elif kind == 4:
            found = found[:end] + found[start:]
        elif kind == 5:
            lines = found.splitlines(keepends=True)
            if len(lines) > 1:
                one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
                lines[one], lines[other] = lines[other], lines[one]
            found = b"".join(lines)
        else:
            found = found[:start] + draw(st.binary(max_size=8)) + found[end:]
    return found


def json_of(document: Any) -> bytes:
    """As a hostile writer writes it: lone surrogates escaped, NaN as Python reads it."""
    with contextlib.suppress(ValueError):
        return json.dumps(document).encode()
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document).encode()
    finally:
        sys.set_int_max_str_digits(before)


# what may come of it


class Hang(BaseException):
    """An input that keeps this process busy for too long."""


class Outside(AssertionError):
    """Something was written, made or removed where it has no place."""


_CHANGES = {f"os.{name}" for name in ("mkdir", "remove", "rmdir", "truncate", "chmod", "symlink", "link", "rename")}


class _Guard:
    """Where this process writes; an audit hook, since it sees whatever way a file is opened by."""

    def __init__(self) -> None:
        self.inside: tuple[str, ...] | None = None
        self.found: list[str] = []
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            self._installed = True
            sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(mark in mode for mark in "wax+") if isinstance(mode, str) else False
            if not writes and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            self._check(event, path)
        elif event in _CHANGES:
            self._check(event, *arguments[:2])

    def _check(self, event: str, *paths: Any) -> None:
        for path in paths:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            place = os.path.abspath(os.fsdecode(path))
            if self.inside is not None and not place.startswith((*self.inside, "/dev/")):
                self.found.append(f"{event} {place}")


_guard = _Guard()


@contextlib.contextmanager
def kept_inside(*folders: Path) -> Iterator[None]:
    """Fails what writes, makes or removes anything outside of some folders, whoever's code does it. (The package's own
    cache, where digests of large files are remembered, is none of the user's files.)

    Raises:
        Outside: it did.
    """
    _guard.install()
    _guard.found.clear()
    _guard.inside = tuple(str(folder) for folder in (*folders, paths.cache("")))
    try:
        yield
    finally:
        _guard.inside = None
    if _guard.found:
        raise Outside(", ".join(_guard.found[:3]))


def _late(*_: Any) -> None:
    raise Hang(f"more than {SECONDS} seconds of work")


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, _late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_message(text: str) -> None:
    """One clear error: it can be printed, moves no cursor, and does not go on for pages."""
    assert text.strip() and len(text) < MOST, f"{len(text)} characters: {text[:200]!r}"
    text.encode()
    odd = {mark for mark in text if mark not in "\n\t" and not mark.isprintable()}
    assert not odd, f"{odd!r} in {text[:300]!r}"
    assert "Traceback" not in text


def command(words: Sequence[str]) -> tuple[int, str]:
    """A command of ours: its exit code, and what it says on stderr.

    0 = done, 1 = one error of ours (or what `journal verify` has found), 2 = argparse does not take the words.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(words))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            assert code in (0, 2), (code, err.getvalue())
    said = err.getvalue()
    assert code in (0, 1, 2), code
    if code == 1 and words[:2] == ["journal", "verify"] and not said:
        check_message(out.getvalue())
    elif code == 1:
        assert said.count(f"specrej-eval {words[0]}: ") == 1, said[-2000:]
        check_message(said[said.index(f"specrej-eval {words[0]}: ") :])
    elif code == 2:
        said.encode()
        assert said.count("error: ") == 1 or "unknown command" in said or "usage: " in said, said[-2000:]
    out.getvalue().encode()
    return code, said


class Surface:
    """What one place that takes inputs does with many.

    All that is wrong is told together at the end, one input for each place in our code: the first is seldom the last.

    Args:
        name: for the counts.
        folders: where it may write.
    """

    def __init__(self, name: str, counted: Callable[[str, int], None], *folders: Path) -> None:
        self.name = name
        self.counted = counted
        self.folders = folders
        self.tried = self.refused = 0
        self.wrong: dict[str, str] = {}

    def fuzz(self, strategy: st.SearchStrategy[Any], work: Callable[[Any], Any], number: int) -> None:
        """``work`` of so many inputs: it may return, or raise one ``SpecRejError``."""

        # no shrinking: each input is small, and a failure is found again by its number
        @settings(
            max_examples=number,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
            deadline=None,
        )
        @given(strategy)
        def each(value: Any) -> None:
            self.give(value, work)

        each()

    def give(self, value: Any, work: Callable[[Any], Any]) -> None:
        """``work`` of one input."""
        self.tried += 1
        try:
            with in_time(), kept_inside(*self.folders):
                work(value)
        except SpecRejError as error:
            self.refused += 1
            try:
                check_message(str(error))
            except (AssertionError, UnicodeError) as bad:
                self._put(f"message {type(error).__name__}: {str(bad)[:60]}", value, bad)
        except (Exception, Hang, SystemExit, KeyboardInterrupt) as error:
            self._put(_where(error), value, error)

    def _put(self, where: str, value: Any, error: BaseException) -> None:
        told = "".join(traceback.format_exception(error, limit=-6))
        self.wrong.setdefault(where, f"{_shown(value)}\n{told}")

    def done(self, *, refused: bool = True) -> None:
        """Count, and fail where anything was wrong.

        Args:
            refused: some inputs must have been, and some not: else the surface was not reached.
        """
        self.counted(f"inputs fuzzed: {self.name}", self.tried)
        told = "\n\n".join(f"--- {where}\n{what}" for where, what in self.wrong.items())
        assert not self.wrong, f"{len(self.wrong)} places, of {self.tried} inputs:\n{told}"
        if refused:
            assert 0 < self.refused < self.tried, f"{self.refused} of {self.tried} refused"


def _where(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "specrej_eval/" in frame.filename] or frames
    return f"{type(error).__name__} at {ours[-1].filename.rpartition('specrej_eval/')[2]}:{ours[-1].lineno}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        text = f"<{type(value).__name__} with a number of thousands of digits>"
    return text if len(text) < 1500 else f"{text[:1000]} ... {text[-400:]}"
