"""The journal: finished requests, appended as they finish, taken from there by a rerun with the same configuration.

One JSONL file. Its first line is the fingerprint of the two models (names, files, dtypes); a file of other models is
refused, never silently reused. Each entry's key holds every argument that decides an answer (strategy, sampling, seed,
stop strings), so a rerun with other arguments finds nothing and decodes afresh. A last line cut short by a kill is
dropped; a damaged line is set aside (see ``jsonl``), and its request decoded anew. The memory that ``n=max`` was
resolved with stands here too, so that a resumed run starts as many rows.

Under several processes each writes a file of its own (``run_rank0.jsonl``, ...: see ``parts``), and reads those beside
it, so that a rerun with another number of processes decodes nothing again. Processes that join (``join=True``) also
read what the others finish while they run, and claim a request before they decode it (see ``claims``).

Schema 2: every line carries a checksum, and every entry the digest of the first line's fingerprint. Schema 1 has
neither; such a journal is read and continued as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specrej_eval.checked import BadRecordError, an_object, as_whole
from specrej_eval.core import GenerationResult, Prompt
from specrej_eval.errors import ConfigError
from specrej_eval.paths import check_path
from specrej_eval.records import lock
from specrej_eval.records.claims import Claims
from specrej_eval.records.fingerprint import check_same
from specrej_eval.records.jsonl import (
    RUN,
    Appender,
    Line,
    Scan,
    check_writable,
    checked_line,
    damaged_file,
    describe_damage,
    digest,
    mend,
    plain,
    replace_bytes,
    scan,
    scanned,
)
from specrej_eval.records.lookup import look_up
from specrej_eval.records.parts import beside, files, joined_paths, whole
from specrej_eval.wording import counted

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
CAPACITY = "capacity_tokens"
_LONGEST_HEADER = 1 << 24
_REMEDY = "name another file for this configuration, or delete this one to start over."
_BEGINNING = b'{"journal":'


def request_key(prompt: Prompt, arguments: dict[str, Any], until: tuple[str, ...]) -> str:
    """Identifies a request: its prompt, repeat, and every argument that decides its answer."""
    ids = hashlib.sha256(json.dumps(list(prompt.token_ids)).encode()).hexdigest()
    parts = [prompt.task, prompt.prompt_hash, prompt.repeat, ids, list(until), arguments]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(slots=True)
class Entry:
    """One finished request, and where it stands."""

    file: str
    """Its name, without the folder."""
    line: Line
    result: GenerationResult

    def is_to(self, prompt: Prompt) -> bool:
        theirs = (self.result.task, self.result.prompt_hash, self.result.repeat)
        return theirs == (prompt.task, prompt.prompt_hash, prompt.repeat)

    def place(self) -> str:
        return f"the answer in line {self.line.number} of {self.file}"


@dataclass(slots=True)
class Contents:
    """What a journal's file holds. Made by ``read``."""

    name: str
    """The file's, without the folder."""
    scan: Scan
    header: Line | None = None
    fingerprint: Mapping[str, Any] | None = None
    """Of the first intact header; None if there is none."""
    run: str | None = None
    """The digest of that fingerprint, or the one that all entries carry where the header is damaged."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By key; where one appears twice, the first."""
    capacity_tokens: int | None = None
    repeated: list[int] = field(default_factory=list)
    """Lines with a key and content that stood there before."""
    contradicting: list[tuple[int, int]] = field(default_factory=list)
    """Lines (first, later) with one key and different content."""
    later: dict[str, Entry] = field(default_factory=dict)
    """By key, the last that contradicts the first: what was decoded because the first is to another prompt."""

    @property
    def unchecked(self) -> int:
        """Entries without a checksum: an older version wrote them."""
        return sum(not entry.line.checked for entry in self.entries.values())


def read(path: str | Path, *, argument: str = "journal") -> Contents:
    """Everything a journal's file holds, sorted into what can be used and what is damaged; nothing is written.

    Raises:
        ConfigError: the file cannot be read, is no journal of ours, or was written by a newer version.
    """
    found = Contents(Path(path).name, scan(path, argument=argument))
    for line in found.scan.lines:
        if "journal" in line.record:
            _check_version(path, line, argument)
            if found.header is None and _is_header(line):
                found.header, found.fingerprint = line, line.record["fingerprint"]
                found.run = digest(line.record["fingerprint"])
    if found.header is None:
        runs = Counter(str(line.record[RUN]) for line in found.scan.lines if line.checked and RUN in line.record)
        found.run = runs.most_common(1)[0][0] if runs else None
    _sort(found)
    if found.header is None and not found.scan.lines and not _began_as_journal(found.scan):
        raise ConfigError(
            f"{argument}={str(path)!r} is not a journal: it does not begin like one.",
            hint="name a file that journal= wrote, or the specrej_trajectories.jsonl of a run's folder.",
        )
    return found


def environment(path: str | Path) -> Mapping[str, Any]:
    """What a run was begun with that decides no more than last bits, of its journal or those of its processes; empty
    if nothing is known of it. Says nothing of what may be wrong with them: ``check`` does."""
    for file in files(path):
        with contextlib.suppress(OSError, ValueError), file.open("rb") as opened:
            for line in scanned(opened.readline(_LONGEST_HEADER)).lines:
                found = line.record.get("fingerprint")
                if "journal" in line.record and _is_header(line) and isinstance(found, dict):
                    told = found.get("environment")
                    return told if isinstance(told, dict) else {}
    return {}


def _began_as_journal(found: Scan) -> bool:
    """Whether an empty or damaged file can have been a journal whose header was being written."""
    raws = [*(line.raw for line in found.lines), *(damage.raw for damage in found.damaged), found.torn]
    return all(raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)] for raw in raws)


def _check_version(path: str | Path, line: Line, argument: str) -> None:
    version = line.record["journal"]
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise ConfigError(
            f"{argument}={str(path)!r} was written by a newer version of specrej_eval: its schema is {version}, and "
            f"this version reads 1 to {SCHEMA_VERSION}. Nothing in it was changed.",
            hint="update specrej_eval, or name another file.",
        )


def _is_header(line: Line) -> bool:
    version, fingerprint = line.record["journal"], line.record.get("fingerprint")
    return version in (1, 2) and isinstance(fingerprint, dict) and (line.checked or version == 1)


def _sort(found: Contents) -> None:
    """Go through the lines in order; what cannot be used becomes damage."""
    section = None if found.header is None else found.run  # of entries without a digest: the header above them
    must_be_checked = found.header is not None and found.header.record["journal"] != 1
    usable = []
    spare_capacity = None
    for line in found.scan.lines:
        try:
            if "journal" in line.record:
                if not _is_header(line):
                    raise BadRecordError("not a header of ours, or without its checksum")
                section = digest(line.record["fingerprint"])
                if section != found.run:
                    raise BadRecordError("the header of a different configuration")
            else:
                if not line.checked and must_be_checked:
                    raise BadRecordError("it carries no checksum")
                run = line.record.get(RUN, section)
                if run != found.run:
                    raise BadRecordError("it belongs to a different configuration")
                tokens = _take(found, line)
                spare_capacity = tokens if spare_capacity is None else spare_capacity
        except BadRecordError as error:
            found.scan.damage(line, str(error))
        else:
            usable.append(line)
    found.scan.lines = usable
    if found.capacity_tokens is None:
        found.capacity_tokens = spare_capacity


def _take(found: Contents, line: Line) -> int | None:
    """Enter one record; the capacity it was made with, if it says so."""
    key = line.record.get("key")
    if not isinstance(key, str):
        raise BadRecordError("not a record of a journal")
    if key == CAPACITY:
        tokens = as_whole(line.record.get("result"), CAPACITY)
        if tokens < 1:
            raise BadRecordError(f"{CAPACITY} must be at least 1")
        found.capacity_tokens = tokens if found.capacity_tokens is None else found.capacity_tokens
        return None
    if len(key) != 64 or set(key) - set("0123456789abcdef"):
        raise BadRecordError("its key is none of ours")
    result = GenerationResult.from_dict(an_object(line.record.get("result"), "result"))
    first = found.entries.setdefault(key, Entry(found.name, line, result))
    if first.line is not line:
        if first.line.record["result"] == line.record["result"]:
            found.repeated.append(line.number)
        else:
            found.contradicting.append((first.line.number, line.number))
            found.later[key] = Entry(found.name, line, result)
    capacity = line.record.get(CAPACITY)
    return as_whole(capacity, CAPACITY) if capacity is not None else None


def check(path: str, fingerprint: Callable[[], dict[str, Any]], *, join: bool = False) -> None:
    """Refuse now what ``Journal`` would refuse once the models are loaded; nothing is written.

    Args:
        fingerprint: makes it; asked only where there is a journal to go on from.

    Raises:
        ConfigError: as ``Journal``.
    """
    if join:  # which file it goes on with is known when it begins
        check_path(path, argument="journal")
        path = str(next(joined_paths(os.path.realpath(path))))
    check_writable(path, argument="journal")
    lock.check(path, argument="journal", joins=join)
    others = [*beside(path)]
    if others or Path(path).is_file():
        now = fingerprint()
        for other in others:
            _of_this_run(other, now)
        if Path(path).is_file():
            _read_own(path, now)


def _read_own(path: str, fingerprint: dict[str, Any]) -> Contents:
    """The journal of a run that goes on. Raises as ``Journal``."""
    found = read(path)
    if found.fingerprint is not None:
        check_same(found.fingerprint, fingerprint, what=f"journal={path!r}", remedy=_REMEDY)
    elif found.scan.lines and found.run != digest(fingerprint):
        told = "its entries belong to another configuration" if found.run else "nothing says which models it is of"
        raise ConfigError(
            f"journal={path!r} has {counted(len(found.entries), 'intact entry', 'intact entries')}, but its first "
            f"line, which says which models they come from, is damaged, and {told}. Nothing in it was changed.",
            hint="the command that started it continues from there; `specrej-eval journal verify` lists what is "
            "damaged, and `specrej-eval journal merge FILE JOURNAL --output NEW` gives its entries the first line "
            "of another journal of the same run.",
        )
    return found


def _of_this_run(path: Path, fingerprint: dict[str, Any]) -> Contents | None:
    """What another process's file holds; None if it is of no use. Nothing in it is changed: it may be in use.

    Raises:
        ConfigError: it belongs to another configuration.
    """
    try:
        found = read(path)
    except ConfigError as error:
        logger.warning("%s is not used: %s", path.name, error)
        return None
    if found.fingerprint is not None:
        check_same(found.fingerprint, fingerprint, what=f"journal={str(path)!r}", remedy=_REMEDY)
    elif found.run != digest(fingerprint):
        return None
    return found


@dataclass(frozen=True, slots=True)
class _Other:
    """The file of another process, as far as it has been read."""

    contents: Contents | None
    """What was read last; None if it is of no use."""
    place: tuple[int, int] | None
    """Device and inode: it may be replaced."""
    num_bytes: int
    num_lines: int = 0
    """Those before the ones that have not been read."""

    @classmethod
    def read(cls, path: Path, fingerprint: dict[str, Any]) -> _Other:
        """Raises:
        ConfigError: it belongs to another configuration.
        """
        place: tuple[int, int] | None = None
        size = 0
        with contextlib.suppress(OSError):
            about = os.stat(path)  # before it is read: what has grown by then is read twice, and not left out
            place, size = (about.st_dev, about.st_ino), about.st_size
        found = _of_this_run(path, fingerprint)
        if found is not None:
            return cls(found, place, found.scan.num_bytes, found.scan.num_ended)
        return cls(None, place, size)

    def now(self, path: Path, fingerprint: dict[str, Any]) -> _Other:
        """With what has been added since in ``contents``; itself, if that is nothing.

        Raises:
            ConfigError: as ``read``.
            OSError: it is gone.
        """
        with open(path, "rb") as file:  # opened anew: over a network, this is what shows the new lines
            about = os.fstat(file.fileno())
            replaced = (about.st_dev, about.st_ino) != self.place or about.st_size < self.num_bytes
            if not replaced and about.st_size == self.num_bytes:
                return self
            if self.contents is None or replaced:
                return self.read(path, fingerprint)
            file.seek(self.num_bytes)
            new = scanned(file.read(), after=self.num_lines)
        run = self.contents
        found = Contents(run.name, new, run.header, run.fingerprint, run.run)
        _sort(found)
        return _Other(found, self.place, self.num_bytes + new.num_bytes, new.num_ended)


class Journal:
    """Reads what is there, then appends.

    Args:
        path: the file; made if missing.
        fingerprint: what must not have changed since it was begun.
        join: other processes that join may write the journal at the same time, each a file of its own.

    Raises:
        ConfigError: the file belongs to another configuration (the message says what differs), is no journal, was
            written by a newer version, is in use by another process, or cannot be written. The file is as it was then.
    """

    def __init__(self, path: str, fingerprint: dict[str, Any], *, join: bool = False) -> None:
        self.joined = join
        self._claims = Claims(path)
        with self._claims.beginning() if join else contextlib.nullcontext():
            if join:
                paths = joined_paths(os.path.realpath(path))
                own, self._give_up_lock = lock.hold_first(self, paths, argument="journal")
                weakref.finalize(self, self._claims.tidy)
                path = str(own)
            else:
                self._give_up_lock = lock.hold(self, path, argument="journal")
                self._claims.tidy()
            try:
                self._open(path, fingerprint)
            except BaseException:
                self._give_up_lock()
                raise

    def _open(self, path: str, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self._name = Path(path).name
        self._entries: dict[str, Entry] = {}
        """By key, of this file and those beside it."""
        self._later: dict[str, Entry] = {}
        self._told = {self._name}
        self.capacity_tokens: int | None = None
        """What memory held when the run began (``n=max``)."""
        self._fingerprint = plain(fingerprint)
        self._run = digest(fingerprint)
        self._others: dict[str, _Other] = {}
        """By name."""
        others = [(other, _Other.read(other, self._fingerprint)) for other in beside(path)]
        has_header = Path(path).is_file() and self._read()
        for beside_it, other in others:
            self._take_over(beside_it, other)
        self._file = Appender(path, argument="journal")
        if not has_header:
            self._write_header()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, prompt: Prompt | None = None) -> GenerationResult | None:
        """The finished request, if this journal has it; see ``look_up``."""
        entry = look_up(key, prompt, self._entries, self._later)
        if entry is None:
            return None
        if entry.file not in self._told and not self.joined:
            self._told.add(entry.file)
            logger.warning(
                "Answers are also taken from %s, written by a run with a different number of processes.", entry.file
            )
        entry.result.taken = True
        return entry.result

    def put(self, key: str, result: GenerationResult) -> None:
        """Append a finished request and flush it to disk; then a claim on it ends.

        Raises:
            WriteError: it cannot be written; the entries before are intact.
        """
        record: dict[str, Any] = {"key": key, "result": result.to_dict()}
        if self.capacity_tokens is not None:
            record[CAPACITY] = self.capacity_tokens
        self._write(record)
        self._file.sync()
        self._claims.give_up(key)

    def refresh(self) -> None:
        """Read what other processes have finished since.

        Raises:
            ConfigError: a file of another configuration has appeared.
        """
        for path in beside(self.path):
            known = self._others.get(path.name)
            with contextlib.suppress(OSError):  # somebody has moved it away
                now = _Other.read(path, self._fingerprint) if known is None else known.now(path, self._fingerprint)
                if now is not known:
                    self._take_over(path, now)

    def claim(self, key: str) -> bool:
        """Whether a request is for this process to decode. False: another has it, or has finished it.

        Raises:
            ConfigError: claims cannot be made there.
        """
        if key in self._entries or not self._claims.take(key):
            return False
        self.refresh()  # whoever had it before may have finished it
        if key in self._entries:
            self._claims.give_up(key)
            return False
        return True

    def give_up_claims(self) -> None:
        """On what is not finished: others may decode it."""
        self._claims.give_up_all()

    @property
    def where(self) -> str:
        """The file, or the files, for messages."""
        if not self.joined:
            return self.path
        own = whole(self.path)
        return str(own.with_name(f"{own.stem}_joined*{own.suffix}"))

    def put_capacity(self, tokens: int) -> None:
        """Remember what ``n=max`` was resolved with, so that a resumed run starts as many rows."""
        self.capacity_tokens = tokens
        self._write({"key": CAPACITY, "result": tokens})

    @property
    def rows_of_capacity(self) -> int:
        """Most rows of an answer that had all of ``capacity_tokens``: begun before there was ``n_max``, a run goes on
        with as many."""
        if self.capacity_tokens is None:
            return 0
        found = [entry.result.resolved for entry in self._entries.values()]
        rows = [numbers.get("n", 0) for numbers in found if numbers.get("kv_budget_tokens") == self.capacity_tokens]
        return max(rows, default=0)

    def close(self) -> None:
        self._file.close()
        if self.joined:
            self._claims.tidy()
        self._give_up_lock()

    def _read(self) -> bool:
        """Fill the entries and mend the file; False if its header has yet to be written."""
        found = _read_own(self.path, self._fingerprint)
        if found.fingerprint is not None:
            self._run = digest(found.fingerprint)
        self._entries, self._later = dict(found.entries), dict(found.later)
        self.capacity_tokens = found.capacity_tokens
        self._tell(found)
        mend(self.path, found.scan)
        if found.fingerprint is None and found.scan.lines:
            # what is used now must be next time: with a header of today's, entries without a checksum would not
            version = 1 if found.unchecked else SCHEMA_VERSION
            header = checked_line({"journal": version, "fingerprint": self._fingerprint})
            place = Path(os.path.realpath(self.path))
            replace_bytes(place, header.encode() + place.read_bytes())
            return True
        return found.fingerprint is not None

    def _take_over(self, path: Path, other: _Other) -> None:
        self._others[path.name] = other
        found = other.contents
        if found is None:
            return
        for key, entry in found.entries.items():
            self._entries.setdefault(key, entry)
        # where it has no answer yet, it is of this very run, whose processes measure for themselves
        if self.capacity_tokens is None and found.entries:
            self.capacity_tokens = found.capacity_tokens
        if found.scan.damaged:
            logger.warning(
                "%s: it is left out here; %s used.",
                describe_damage(path, found.scan.damaged),
                counted(len(found.entries), "intact entry is", "intact entries are"),
            )

    def _tell(self, found: Contents) -> None:
        if found.scan.damaged:
            logger.warning(
                "%s: set aside in %s. %s used; a damaged one is decoded again.",
                describe_damage(self.path, found.scan.damaged),
                damaged_file(self._name),
                counted(len(found.entries), "intact entry is", "intact entries are"),
            )
        if found.unchecked:
            lacking = f"; lacking as well: {', '.join(fields)}" if (fields := lacking_fields(found)) else ""
            logger.warning(
                "%s was started by an older version: %s no checksum, so an edit there would not be noticed%s. New "
                "entries carry one.",
                self._name,
                counted(found.unchecked, "entry carries", "entries carry"),
                lacking,
            )
        if found.contradicting:
            first, later = found.contradicting[0]
            logger.warning(
                "%s answers %s more than once and differently (lines %d and %d): the first of them counts.",
                self._name,
                counted(len(found.contradicting), "request"),
                first,
                later,
            )

    def _write_header(self) -> None:
        self._write({"journal": SCHEMA_VERSION, "fingerprint": self._fingerprint})

    def _write(self, record: dict[str, Any]) -> None:
        if "fingerprint" not in record:
            self._reopen_if_replaced()
            record[RUN] = self._run
        self._file.write(checked_line(record))

    def _reopen_if_replaced(self) -> None:
        """Another process may have mended the file, or someone deleted it: answers must not go where nobody looks."""
        try:
            there, mine = os.stat(self.path), os.fstat(self._file.fileno())
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return
            empty = there.st_size == 0
        except OSError:
            empty = True
        self._file.close()
        self._file = Appender(self.path, argument="journal")
        if empty:
            self._write_header()


def lacking_fields(found: Contents) -> list[str]:
    """What older versions did not write down, of what this one does."""
    lacking = set()
    for entry in found.entries.values():
        if not entry.line.checked:
            told, now = entry.line.record["result"], entry.result.to_dict()
            lacking |= now.keys() - told.keys()
            lacking |= {f"ledger.{name}" for name in now["ledger"].keys() - told.get("ledger", {}).keys()}
            lacking |= {f"resolved.{name}" for name in now["resolved"].keys() - told["resolved"].keys()}
    return sorted(lacking)
