"""A run's answers in a folder: what `specrej-eval run` and the alpaca_eval decoder write, and what reads them.

``specrej_run.json`` says what was run (its fingerprint decides whether a later run may go on from here), and
``specrej_outputs.jsonl`` holds one line per answered instruction, appended as each is finished: reward, tokens, seconds
and rounds, for which an evaluation harness's own files have no room. These are the answers to the prompts of the last
run; ``specrej_outputs_kept.jsonl`` holds those to other prompts that were answered here before (a larger ``--limit``,
another file), and a run that asks for them again takes them from there. Nothing that was decoded is dropped. Lines
carry checksums (see ``jsonl``). Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from specrej_eval.checked import (
    BadRecordError,
)
from specrej_eval.core import Prompt, Spent
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.records import lock
from specrej_eval.records.answers import SCHEMA_VERSION, Answer, RunRecord, audited, total_cost
from specrej_eval.records.claims import Claims
from specrej_eval.records.fingerprint import check_same
from specrej_eval.records.jsonl import (
    RUN,
    Appender,
    Damage,
    Scan,
    as_text,
    checked_line,
    damaged_file,
    describe_damage,
    digest,
    mend,
    parsed,
    scan,
    write_atomically,
)
from specrej_eval.records.lookup import look_up
from specrej_eval.records.parts import files, joined_paths, kind, rank_path
from specrej_eval.records.state import state_file
from specrej_eval.wording import counted

logger = logging.getLogger(__name__)

PREFIX = "specrej"
"""Files of a run are called ``specrej_*``; those of a second one in the same folder (a reference) otherwise."""
RUN_FILES = {f"{prefix}_run.json": prefix for prefix in (PREFIX, "specrej_reference")}
"""File that says what was run -> prefix of all of that run's files."""


class OutputsFolder:
    """A folder of answers: written by one run at a time (each of its ranks into a file of its own), read by anyone.

    Args:
        path: the folder; made by ``begin``.
        prefix: of the file names.
        rank, world_size: this process among those that write.
        join: other processes that join may write at the same time, each a file of its own; what all of them share
            is written by one at a time (``alone``).
    """

    def __init__(
        self, path: str | Path, *, prefix: str = PREFIX, rank: int = 0, world_size: int = 1, join: bool = False
    ) -> None:
        self.path = Path(path)
        self.prefix = prefix
        self.rank = rank
        self.join = join
        self.run_file = self.path / f"{prefix}_run.json"
        self.outputs_file = self.path / f"{prefix}_outputs.jsonl"
        self.trajectories_file = self.path / f"{prefix}_trajectories.jsonl"
        """Journal with every row of every prompt (`specrej-eval run`)."""
        self.kept_file = self.path / f"{prefix}_outputs_kept.jsonl"
        """Answers to other prompts than those of the last run."""
        self._own_part = Path(rank_path(str(self.outputs_file), rank, world_size))
        self.state_file = state_file(self._own_part)
        self._answers: dict[str, Answer] | None = None
        self._kept: dict[str, Answer] = {}
        self._damaged: list[tuple[Path, list[Damage]]] = []
        self._record: RunRecord | None = None
        self._run: str | None = None
        self._file: Appender | None = None
        self._writing = False
        self._is_new = False

    # reading

    def record(self) -> RunRecord | None:
        """What was run here; None if nothing was.

        Raises:
            ConfigError: the file is not one of ours, or was written by a newer version.
        """
        if not self.run_file.is_file():
            return None
        try:
            record = RunRecord.from_dict(parsed(self.run_file.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{str(self.run_file)!r} cannot be read: {error}. It says which models the answers next to it "
                "come from.",
                hint="restore it from a copy, or give this run another folder; nothing here was changed.",
            ) from error
        if record.schema_version > SCHEMA_VERSION:
            raise ConfigError(
                f"{str(self.run_file)!r} was written by a newer version of specrej_eval: its schema is "
                f"{record.schema_version}, and this version reads 1 to {SCHEMA_VERSION}. Nothing was changed.",
                hint="update specrej_eval, or give this run another folder.",
            )
        return record

    def answers(self) -> list[Answer]:
        """The answers to the prompts of the last run, of all ranks; those with an index in its order, then the others
        as written.

        Raises:
            SpecRejError: a line is damaged, or an answer is missing from a run that was complete.
        """
        found = list(self._read().values())
        if self._damaged and not self._writing:
            path, damaged = self._damaged[0]
            raise SpecRejError(
                f"{describe_damage(path, damaged)}: {str(self.path)!r} lacks an answer.",
                hint="run the command that made it again: it sets the line aside and decodes that answer again.",
            )
        return sorted(found, key=lambda answer: (answer.index is None, answer.index or 0))

    def kept(self) -> list[Answer]:
        """The answers to other prompts, in the order they were set apart."""
        self._read()
        return list(self._kept.values())

    def count(self) -> tuple[int, int]:
        """Answers and damaged lines by now, while somebody may be writing."""
        answers = self._read()
        return len(answers), sum(len(damaged) for _, damaged in self._damaged)

    def problems(self) -> list[tuple[Path, Damage]]:
        """All lines that cannot be used; nothing is written."""
        self._read()
        return [(path, damage) for path, damaged in self._damaged for damage in damaged]

    def get(self, key: str, prompt: Prompt | None = None) -> Answer | None:
        """The answer recorded for a key, whichever prompts it was asked with; see ``look_up``."""
        return look_up(key, prompt, self._read(), self._kept)

    # writing

    def begin(
        self,
        record: RunRecord,
        *,
        going_on: bool = True,
        delete: bool = False,
        to_start_over: str = "delete the folder",
    ) -> RunRecord:
        """Open the folder for a run. Only rank 0 writes ``specrej_run.json`` and mends what is damaged.

        Args:
            going_on: take over the answers found here; False starts anew, and moves what is here to
                ``FILE.previous`` (``.previous.2`` and so on).
            delete: with ``going_on=False``, delete it: only where the user asked for that.
            to_start_over: what the user is to do for ``going_on=False``, for messages.

        Returns:
            The record as it stands on disk now; ``capacity_tokens`` is that of the first run.

        Raises:
            ConfigError: ``going_on``, and the folder belongs to another configuration (says what differs, what to do),
                or holds answers of which nothing says how they were made; or another process is writing there.
        """
        if not self._writing and self.join:
            self._own_part, _ = lock.hold_first(self, joined_paths(self.outputs_file), argument="output")
            self.state_file = state_file(self._own_part)
        elif not self._writing:
            lock.hold(self, self._own_part, argument="output")
        before = self.record() if going_on else None
        self._is_new = before is None
        if before is not None:
            check_same(
                before.fingerprint,
                record.fingerprint,
                what=f"the run {before.name!r} in {str(self.path)!r}",
                remedy=f"to keep it, give this run another name or output folder; to start over, {to_start_over}.",
            )
            if before.name != record.name:
                raise ConfigError(
                    f"{str(self.path)!r} holds the same answers under the name {before.name!r}, not {record.name!r}.",
                    hint="keep that name, or give this run its own folder.",
                )
            record.fingerprint = before.fingerprint  # of the oldest answer here: what it did not know stays unknown
            record.capacity_tokens = before.capacity_tokens
            record.spent = before.spent
            record.described = record.described or before.described
        elif self.rank == 0:
            self._begin_anew(record, going_on=going_on, delete=delete)
        self._writing = True
        self._record = record
        self._run = digest(record.fingerprint)
        self._answers = None
        if self.rank == 0:
            if before is not None:
                self._mend(before)
            self.write_record(record)
        return record

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Of processes that join, one at a time is inside: for ``begin``, ``write_record`` and what merges."""
        if not self.join:
            yield
            return
        claims = Claims(self.outputs_file)
        try:
            with claims.beginning():
                yield
        finally:
            claims.tidy()

    @contextlib.contextmanager
    def unless_refused(self) -> Iterator[None]:
        """What is refused inside before its first answer leaves no record: nothing was paid for, and the arguments that
        were wrong must not hold the folder against the right ones."""
        try:
            yield
        except SpecRejError:
            if self.rank == 0 and self._is_new and not any(p.stat().st_size for p in self._parts()):
                self.close()
                self.run_file.unlink(missing_ok=True)
            raise

    def _begin_anew(self, record: RunRecord, *, going_on: bool, delete: bool) -> None:
        paths = [path for path in (*self._parts(), self.kept_file) if path.is_file()]
        if going_on and paths and not self._all_of(paths, digest(record.fingerprint)):
            raise ConfigError(
                f"{str(self.path)!r} holds answers, but nothing says what made them: there is no {self.run_file.name}.",
                hint="restore that file, or give this run another folder; nothing here was changed.",
            )
        for path in () if going_on else paths:
            if delete:
                path.unlink()
            else:
                os.replace(path, _previous(path))

    def _all_of(self, paths: Iterable[Path], run: str) -> bool:
        """Whether each intact line says that it belongs to this run."""
        lines = [line for path in paths for line in scan(path, argument="output").lines]
        return bool(lines) and all(line.checked and line.record.get(RUN) == run for line in lines)

    def _mend(self, before: RunRecord) -> None:
        """Set damaged lines aside; give those of an older version their checksums."""
        old = 0
        for path in (*self._parts(), self.kept_file):
            if not path.is_file() or (self.join and kind(path) == "joined" and path != self._own_part):
                continue  # another process may be writing it
            found, answers = self._sorted_out(path, before)
            if found.damaged:
                logger.warning(
                    "%s: set aside in %s, and decoded again when it is asked for.",
                    describe_damage(path, found.damaged),
                    damaged_file(path).name,
                )
            mend(path, found)
            unchecked = sum(not line.checked for line in found.lines)
            if unchecked:
                old += unchecked
                self._write_lines(path, answers)
        if old:
            logger.warning(
                "%s was written by an older version: %s no checksum, so an edit there could not be noticed. From now "
                "on each carries one.",
                self.path,
                counted(old, "answer carried", "answers carried"),
            )

    def write_record(self, record: RunRecord) -> None:
        record.schema_version = SCHEMA_VERSION
        self._run = digest(record.fingerprint)
        write_atomically(self.run_file, as_text(record.to_dict(), indent=2) + "\n")

    @property
    def capacity_tokens(self) -> int | None:
        """What memory held when the run began (``n=max``)."""
        return None if self._record is None else self._record.capacity_tokens

    def put_capacity(self, tokens: int) -> None:
        """Remember it, so that a resumed run starts as many rows; only rank 0 writes."""
        assert self._record is not None, "begin() comes first"
        self._record.capacity_tokens = tokens
        if self.rank == 0:
            self.write_record(self._record)

    def put(self, answer: Answer) -> None:
        """Append an answer and flush it to disk.

        Raises:
            WriteError: it cannot be written; the answers before are intact.
        """
        if self._file is None:
            self._file = Appender(str(self._own_part), argument="output")
        self._file.write(self._line(answer))
        self._file.sync()
        self._read()[answer.key] = answer

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def set_apart(self, belongs: Callable[[Answer], bool]) -> int:
        """Move the answers to other prompts than this run's out of the way, into ``kept_file``; rank 0 only.

        Args:
            belongs: whether an answer is to one of this run's prompts.

        Returns:
            How many answers to other prompts are kept.
        """
        self.merge_parts([*filter(belongs, self.answers()), *filter(belongs, self.kept())])
        return len(self.kept())

    def merge_parts(self, answers: Sequence[Answer]) -> None:
        """One file in order, whatever the number of ranks that wrote; rank 0, once the others have closed theirs.

        All other answers found here are kept in ``kept_file``.
        """
        self.close()
        if self._run is None and (record := self.record()) is not None:
            self._run = digest(record.fingerprint)
        here = {answer.key for answer in answers}
        self._answers = None  # what the other ranks wrote is there now
        before = {**self._read(), **self._kept}
        others = [answer for key, answer in before.items() if key not in here]
        # first those that leave the file, then the file: a kill in between leaves an answer twice, and never none
        if others and others != list(self._kept.values()):
            self._write_lines(self.kept_file, [*self._kept.values(), *(a for a in others if a.key not in self._kept)])
        self._write_lines(self.outputs_file, answers)
        for path in self._parts():
            if path != self.outputs_file:
                path.unlink()
        if others and others != list(self._kept.values()):
            self._write_lines(self.kept_file, others)
        elif not others:
            self.kept_file.unlink(missing_ok=True)
        self._answers = {answer.key: answer for answer in answers}
        self._kept = {answer.key: answer for answer in others}

    def mark_complete(self, record: RunRecord, answers: Sequence[Answer], spent: Spent | None = None) -> None:
        """Write down that all prompts are answered, and what that cost.

        Args:
            spent: what this process (all its ranks) spent itself, if it decoded anything.
        """
        record.totals = total_cost(answers).to_dict()
        record.audit = audited(answers)
        if spent is not None and spent.decoded:
            record.spent = spent.to_dict()
        record.complete = True
        record.stopped = ""
        record.num_prompts = len(answers)
        self.write_record(record)

    def _line(self, answer: Answer) -> str:
        return checked_line({**answer.to_dict(), RUN: self._run}, ensure_ascii=False)

    def _write_lines(self, path: Path, answers: Iterable[Answer]) -> None:
        write_atomically(path, "".join(map(self._line, answers)))

    def _parts(self) -> list[Path]:
        return files(self.outputs_file)

    def _sorted_out(self, path: Path, record: RunRecord | None) -> tuple[Scan, list[Answer]]:
        """The intact answers of one file, the first of each key; what is wrong with a line makes it damage."""
        found = scan(path, argument="output")
        old = record is None or record.schema_version < 2  # nobody gave such lines a checksum
        runs = [] if record is None else [digest(record.fingerprint)]  # a line may say anything of itself
        intact: list[Answer] = []
        lines = []
        for line in found.lines:
            try:
                if not line.checked and not old:
                    raise BadRecordError("it carries no checksum")
                if line.checked and runs and line.record.get(RUN) not in runs:
                    raise BadRecordError("it belongs to another run")
                intact.append(Answer.from_dict(line.record))
                lines.append(line)
            except BadRecordError as error:
                found.damage(line, str(error))
        found.lines = lines
        return found, intact

    def _read(self) -> dict[str, Answer]:
        if self._answers is None:
            self._answers, self._kept, self._damaged = {}, {}, []
            record = self.record()
            for path in (*self._parts(), self.kept_file):
                if not path.is_file():
                    continue
                found, answers = self._sorted_out(path, record)
                if found.torn and self._writing and path == self._own_part and self._file is None:
                    mend(path, Scan(found.lines, [], found.torn, found.unended))
                if found.damaged:
                    self._damaged.append((path, found.damaged))
                into = self._kept if path == self.kept_file else self._answers
                for answer in answers:
                    into.setdefault(answer.key, answer)
            self._kept = {key: answer for key, answer in self._kept.items() if key not in self._answers}
        return self._answers


def _previous(path: Path) -> Path:
    """A free name beside a file that is set aside."""
    names = (f"{path.name}.previous{'' if number == 1 else f'.{number}'}" for number in count(1))
    return next(found for found in map(path.with_name, names) if not found.exists())


def open_run(path: str | Path) -> tuple[RunRecord, list[Answer]]:
    """Read a finished or unfinished run: its folder, or any file in it.

    Raises:
        SpecRejError: no run of ours lies there.
    """
    folder = Path(path)
    folder = folder if folder.is_dir() else folder.parent
    store = OutputsFolder(folder)
    record = store.record()
    if record is None:
        raise SpecRejError(
            f"{str(path)!r} is not a run of specrej-eval: there is no {store.run_file.name}.",
            hint="`specrej-eval run --output DIR` writes one, and so does alpaca_eval with our decoders.",
        )
    return record, store.answers()


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run as a folder holds it, for the commands that put runs together."""

    path: str
    record: RunRecord
    answers: tuple[Answer, ...]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises:
        SpecRejError: no run lies there, or it has no answers.
        """
        record, answers = open_run(path)
        if not answers:
            raise SpecRejError(f"the run in {str(path)!r} has no answers yet.", hint="finish it, or leave it out.")
        return cls(str(path), record, tuple(answers))

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for answer in self.answers for seed in answer.seeds})

    @property
    def rows(self) -> list[int]:
        """The numbers of rows behind its answers; several under ``n=max``."""
        return sorted({answer.n for answer in self.answers})
