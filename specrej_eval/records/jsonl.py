"""JSONL files that survive a kill and tell when they were damaged.

Whole lines count; a last line cut short is dropped. Each line of our records carries a checksum over everything else in
it, and the digest of the run it belongs to: a line that was edited, or taken from elsewhere, is known as such. What is
damaged is never deleted: it moves to ``FILE.damaged``, and what is intact stays byte for byte.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from specrej_eval import temporary
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.paths import check_path

CHECKSUM = "checksum"
RUN = "run"
"""Names of the two fields that every line of our records carries."""


@dataclass(frozen=True, slots=True)
class Line:
    """One whole line of a file that is a JSON object."""

    number: int
    """From 1."""
    raw: bytes
    record: dict[str, Any]
    checked: bool
    """It carries a checksum, and that is right. False = it carries none: an older version wrote it."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One whole line that cannot be used."""

    number: int
    raw: bytes
    reason: str


@dataclass(slots=True)
class Scan:
    """What a file holds."""

    lines: list[Line] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    torn: bytes = b""
    """What follows the last line break, unless it is a whole record that lacks nothing else."""
    unended: bool = False
    """The last line is whole but for its line break."""
    num_ended: int = 0
    """Lines that end with a line break, whatever they hold."""
    num_bytes: int = 0
    """In those."""

    def damage(self, line: Line, reason: str) -> None:
        """A line that is well formed, but not what should stand there."""
        self.damaged.append(Damage(line.number, line.raw, reason))

    def without_damage(self) -> bytes:
        """The intact lines, as they were."""
        bad = {damage.number for damage in self.damaged}
        return b"".join(line.raw.removesuffix(b"\n") + b"\n" for line in self.lines if line.number not in bad)


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Names a run in each line of its records: 16 hex digits of SHA-256 over its fingerprint."""
    return hashlib.sha256(_canonical(plain(fingerprint)).encode()).hexdigest()[:16]


def checksum(record: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over a record's content, ``checksum`` itself left out; spaces and order do not count."""
    return hashlib.sha256(_canonical({k: v for k, v in record.items() if k != CHECKSUM}).encode()).hexdigest()[:16]


def checked_line(record: Mapping[str, Any], *, ensure_ascii: bool = True) -> str:
    """A record as one line of JSON, with its checksum."""
    told = plain(record)
    told[CHECKSUM] = checksum(told)
    return as_text(told, ensure_ascii=ensure_ascii) + "\n"


def as_text(value: Any, *, ensure_ascii: bool = False, indent: int | None = None, strict: bool = True) -> str:
    """JSON that can be written as UTF-8: where a text has half a surrogate pair in it, all are escaped.

    Args:
        strict: refuse NaN and infinity, which are no JSON; False where another program has written them.
    """
    text = json.dumps(value, allow_nan=not strict, ensure_ascii=ensure_ascii, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=not strict, indent=indent)
    return text


def plain(value: Any) -> Any:
    """The value as it will be read back: JSON's own types."""
    return json.loads(json.dumps(value, allow_nan=False, default=str))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def parsed(raw: bytes | str) -> Any:
    """Strict JSON.

    Raises:
        ValueError: it is none; the message says what is wrong. Nothing else is raised, whatever the bytes.
    """
    if isinstance(raw, bytes):
        if b"\0" in raw:
            raise ValueError("NUL bytes")
        try:
            raw = raw.decode("utf-8", "surrogatepass")  # as it was written: a text may hold half a surrogate pair
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start})") from error
    try:
        value = json.loads(raw, parse_constant=_no_constant)
        _canonical(value)  # what cannot be written again is not ours: 1e999 reads as infinity, and nesting counts twice
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def scan(path: str | Path, *, argument: str, checksums: bool = True) -> Scan:
    """Read a file line by line; never raises for what the lines hold.

    Args:
        checksums: False for a file that is not of our records, where ``checksum`` is a field as any.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"{argument}={str(path)!r} cannot be read: {exc.strerror or exc}.") from exc
    return scanned(content, checksums=checksums)


def scanned(content: bytes, *, checksums: bool = True, after: int = 0) -> Scan:
    """As ``scan``, of what a file holds after so many lines."""
    found = Scan()
    raws = content.split(b"\n")
    last = raws.pop()
    found.num_ended, found.num_bytes = after + len(raws), len(content) - len(last)
    for number, raw in enumerate(raws, after + 1):
        _take(found, number, raw + b"\n", checksums)
    if last:
        tail = Scan()
        _take(tail, found.num_ended + 1, last, checksums)
        if tail.lines:
            found.lines += tail.lines
            found.unended = True
        else:
            found.torn = last
    return found


def _take(found: Scan, number: int, raw: bytes, checksums: bool) -> None:
    try:
        record = parsed(raw)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        checked = checksums and CHECKSUM in record
        if checked and record[CHECKSUM] != checksum(record):
            raise ValueError("its checksum is wrong")
    except ValueError as error:
        found.damaged.append(Damage(number, raw, str(error)))
    else:
        found.lines.append(Line(number, raw, record, checked))


def mend(path: str | Path, found: Scan) -> None:
    """Leave the intact lines alone in a file; damaged ones move to ``FILE.damaged``, a torn end is cut off.

    Raises:
        ConfigError: the files cannot be written.
    """
    if not (found.damaged or found.torn or found.unended):
        return
    place = Path(os.path.realpath(path))
    set_aside(place, found.damaged)
    replace_bytes(place, found.without_damage())


def set_aside(path: Path, damaged: Sequence[Damage]) -> None:
    """Append damaged lines to ``FILE.damaged``: one JSON object each, with number, reason and the line as it was."""
    if not damaged:
        return
    with Appender(str(damaged_file(path)), argument="file") as file:
        for item in sorted(damaged, key=lambda item: item.number):
            told: dict[str, Any] = {"file": path.name, "line": item.number, "reason": item.reason}
            try:
                told["text"] = item.raw.decode("utf-8")
            except UnicodeDecodeError:
                told["base64"] = base64.b64encode(item.raw).decode()
            file.write(json.dumps(told) + "\n")
        file.sync()


def damaged_file(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).name}.damaged")


def describe_damage(path: str | Path, damaged: Sequence[Damage]) -> str:
    """``line 17 of run.jsonl is damaged (its checksum is wrong)``, and how many more."""
    first = min(damaged, key=lambda item: item.number)
    if len(damaged) == 1:
        return f"line {first.number} of {Path(path).name} is damaged ({first.reason})"
    numbers = sorted(item.number for item in damaged)
    listed = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(damaged)} lines of {Path(path).name} are damaged ({listed}; line {first.number}: {first.reason})"


class WriteError(SpecRejError, OSError):
    """A record could not be written: the disk is full, a limit is reached. What stood there before is as it was."""


class Appender:
    """A file that grows by whole lines: what cannot be written to its end leaves no part of itself behind. It and its
    folder are made if need be.

    Raises:
        ConfigError: the file or its folder cannot be written.
    """

    def __init__(self, path: str, *, argument: str) -> None:
        self._told = f"{argument}={path!r}"
        check_path(path, argument=argument)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # it is closed by close()
        except OSError as exc:
            raise ConfigError(f"{self._told} cannot be written: {exc.strerror or exc}.") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: str) -> None:
        """Append a line, and hand it to the system.

        Raises:
            WriteError: it cannot be written; the file ends where it ended before.
        """
        left = memoryview(text.encode("utf-8", "surrogatepass"))
        before = written = 0
        try:
            before = os.fstat(self.fileno()).st_size
            while written < len(left):
                written += self._file.write(left[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line; unless somebody else has appended since
                if written and os.fstat(self.fileno()).st_size == before + written:
                    os.ftruncate(self.fileno(), before)
            raise self._error(error) from error

    def sync(self) -> None:
        """Wait until the disk has it.

        Raises:
            WriteError: it cannot be said that it has.
        """
        try:
            os.fsync(self.fileno())
        except OSError as error:
            raise self._error(error) from error

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def _error(self, error: OSError) -> WriteError:
        return WriteError(
            f"{self._told} cannot be written: {error.strerror or error}. The records before are intact.",
            hint="make room there; the same command goes on from what is recorded.",
        )


def check_writable(path: str, *, argument: str) -> None:
    """What ``Appender`` would refuse, as far as it can be said without writing.

    Raises:
        ConfigError: the file, or the folder it is to lie in, cannot be written.
    """
    check_path(path, argument=argument)
    place = Path(path)
    there = next(known for known in (place, *place.absolute().parents) if os.path.exists(known))
    # os.path's questions: where a folder may not be entered, those of Path raise
    beneath = there != place and not os.path.isdir(there)
    wrong = errno.EISDIR if os.path.isdir(place) else errno.ENOTDIR if beneath else 0
    if not wrong and not os.access(there, os.W_OK):
        wrong = errno.EACCES
    if wrong:
        raise ConfigError(f"{argument}={path!r} cannot be written: {os.strerror(wrong)}.")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old text or the new one, never half of it.

    Raises:
        ConfigError: the file cannot be written.
    """
    replace_bytes(path, text.encode("utf-8", "surrogatepass"))


def replace_bytes(path: Path, content: bytes) -> None:
    """``write_atomically`` for bytes."""
    check_path(path, argument="file")
    partial = temporary.partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            partial.unlink()  # on a full disk it would only be in the way
        raise ConfigError(f"{str(path)!r} cannot be written: {exc.strerror or exc}.") from exc
