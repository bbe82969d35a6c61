"""A run's answers in a folder: what `specrej-eval run` and the alpaca_eval decoder write, and what reads them.

``specrej_run.json`` says what was run (its fingerprint decides whether a later run may go on from here), and
``specrej_outputs.jsonl`` holds one line per answered instruction, appended as each is finished: reward, tokens, seconds
and rounds, for which an evaluation harness's own files have no room. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from specrej_eval.core import GenerationResult, Ledger
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.fingerprint import check_same, is_demo
from specrej_eval.jsonl import drop_torn_line, open_append, read_lines, write_atomically

SCHEMA_VERSION = 1
PREFIX = "specrej"
"""Files of a run are called ``specrej_*``; those of a second one in the same folder (a reference) otherwise."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answered instruction."""

    instruction: str
    """What was asked, without any template: what the reward model read."""
    output: str
    """The answer, as it was decoded."""
    reward: float | None
    """Its reward; None if it was not finite (``on_nan=drop``)."""
    finish_reason: str
    num_tokens: int
    """Tokens of the answer."""
    n: int
    """Rows started for it. Merged answers: of all runs together."""
    seeds: list[int]
    """The seed it was drawn with. Merged answers: of all runs."""
    index: int | None = None
    """Its place in the file of prompts, from 0; None where there is no such file."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The other columns of its prompt."""
    finished_rewards: list[float] = field(default_factory=list)
    """Rewards of all rows that finished, the answer's own among them."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=lambda: Ledger().to_dict())
    seconds: float = 0.0
    """Sum of the ledger's seconds."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """The arguments as resolved for this prompt."""
    degraded: bool = False
    nan_rewards: int = 0
    prompt_hash: str = ""
    repeat: int = 0
    key: str = ""
    """Identifies prompt and arguments: a later run takes this answer only for the same key."""

    @classmethod
    def of(
        cls,
        result: GenerationResult,
        *,
        key: str,
        instruction: str,
        index: int | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> Self:
        """The answer a result holds, without the rows that lost."""
        ended = [row.reward for row in result.trajectories if row.finish_reason != "rejected"]
        return cls(
            instruction=instruction,
            output=result.text,
            reward=result.best.reward,
            finish_reason=result.best.finish_reason,
            num_tokens=result.best.num_tokens,
            n=len(result.trajectories),
            seeds=[int(result.resolved["seed"])],
            index=index,
            fields=dict(others or {}),
            finished_rewards=[reward for reward in ended if reward is not None],
            rounds=[round_.to_dict() for round_ in result.rounds],
            ledger=result.ledger.to_dict(),
            seconds=sum(result.ledger.seconds.values()),
            resolved=dict(result.resolved),
            degraded=result.degraded,
            nan_rewards=result.nan_rewards,
            prompt_hash=result.prompt_hash,
            repeat=result.repeat,
            key=key,
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; unknown names are left out, so that older readers take newer files."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """What was run: the content of ``specrej_run.json``."""

    generator: str
    """Name of the run in leaderboards."""
    fingerprint: dict[str, Any]
    """Everything that decides its answers; see ``specrej_eval.fingerprint``."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """All arguments, those included that decide nothing."""
    described: dict[str, Any] = field(default_factory=dict)
    """Versions and hardware."""
    capacity_tokens: int | None = None
    """What memory held when the run began (``n=max``): a run that goes on from here starts as many rows."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Cost of all answers, once the run is complete."""
    complete: bool = False
    num_prompts: int | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def embedded_demo_pair(self) -> bool:
        return is_demo(self.fingerprint)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "embedded_demo_pair": self.embedded_demo_pair}


class OutputsFolder:
    """A folder of answers: written by one run at a time (each of its ranks into a file of its own), read by anyone.

    Args:
        path: the folder; made by ``begin``.
        prefix: of the file names.
        rank, world_size: this process among those that write.
    """

    def __init__(self, path: str | Path, *, prefix: str = PREFIX, rank: int = 0, world_size: int = 1) -> None:
        self.path = Path(path)
        self.prefix = prefix
        self.rank = rank
        self.world_size = world_size
        self._answers: dict[str, Answer] | None = None
        self._file: Any = None
        self._writing = False

    @property
    def run_file(self) -> Path:
        return self.path / f"{self.prefix}_run.json"

    @property
    def outputs_file(self) -> Path:
        return self.path / f"{self.prefix}_outputs.jsonl"

    @property
    def trajectories_file(self) -> Path:
        """Journal with every row of every prompt (`specrej-eval run`)."""
        return self.path / f"{self.prefix}_trajectories.jsonl"

    # reading

    def record(self) -> RunRecord | None:
        """What was run here; None if nothing was.

        Raises:
            ConfigError: the file is not one of ours.
        """
        if not self.run_file.is_file():
            return None
        try:
            content = json.loads(self.run_file.read_text(encoding="utf-8"))
            return RunRecord.from_dict(content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(self.run_file)!r} cannot be read: {error}.", hint="delete the folder to start over."
            ) from error

    def answers(self) -> list[Answer]:
        """All answers found here, of all ranks; those with an index in its order, then the others as written.

        Raises:
            SpecRejError: a file is not one of ours.
        """
        found = list(self._read().values())
        return sorted(found, key=lambda answer: (answer.index is None, answer.index or 0))

    def get(self, key: str) -> Answer | None:
        """The answer recorded for a key."""
        return self._read().get(key)

    # writing

    def begin(self, record: RunRecord, *, going_on: bool = True) -> RunRecord:
        """Open the folder for a run. Only rank 0 writes ``specrej_run.json``.

        Args:
            going_on: take over the answers found here; False starts anew.

        Returns:
            The record as it stands on disk now; ``capacity_tokens`` is that of the first run.

        Raises:
            ConfigError: ``going_on``, and the folder belongs to another configuration: says what differs, what to do.
        """
        self._writing = True
        before = self.record() if going_on else None
        if before is not None:
            check_same(
                before.fingerprint,
                record.fingerprint,
                what=f"{str(self.path)!r} holds answers of {before.generator!r}, which",
                remedy="to keep them, give this run another name or output folder; to start over, delete the folder.",
            )
            if before.generator != record.generator:
                raise ConfigError(
                    f"{str(self.path)!r} holds the same answers under the name {before.generator!r}, not "
                    f"{record.generator!r}.",
                    hint="keep that name, or give this run a folder of its own.",
                )
            record.fingerprint = before.fingerprint  # of the oldest answer here: what it did not know stays unknown
            record.capacity_tokens = before.capacity_tokens
            record.described = record.described or before.described
        elif self.rank == 0:
            for path in self._parts():
                path.unlink()
        self._answers = None
        if self.rank == 0:
            self.write_record(record)
        return record

    def write_record(self, record: RunRecord) -> None:
        write_atomically(self.run_file, json.dumps(record.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def put(self, answer: Answer) -> None:
        """Append an answer and flush it to disk."""
        if self._file is None:
            self._file = open_append(str(self._own_part()), argument="output")
        self._file.write(json.dumps(answer.to_dict(), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._read()[answer.key] = answer

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge_parts(self, answers: Sequence[Answer]) -> None:
        """One file in order, whatever the number of ranks that wrote; rank 0, once the others have closed theirs."""
        self.close()
        lines = [json.dumps(answer.to_dict(), allow_nan=False, ensure_ascii=False) + "\n" for answer in answers]
        write_atomically(self.outputs_file, "".join(lines))
        for path in self._parts():
            if path != self.outputs_file:
                path.unlink()

    def mark_complete(self, record: RunRecord, answers: Sequence[Answer]) -> None:
        """Write down that all prompts are answered, and what that cost."""
        record.totals = total_cost(answers).to_dict()
        record.complete = True
        record.num_prompts = len(answers)
        self.write_record(record)

    def _own_part(self) -> Path:
        if self.world_size == 1:
            return self.outputs_file
        return self.outputs_file.with_name(f"{self.prefix}_outputs_rank{self.rank}.jsonl")

    def _parts(self) -> list[Path]:
        ranks = sorted(self.path.glob(f"{self.prefix}_outputs_rank*.jsonl"))
        return [path for path in (self.outputs_file, *ranks) if path.is_file()]

    def _read(self) -> dict[str, Answer]:
        if self._answers is None:
            self._answers = {}
            for path in self._parts():
                records, whole = read_lines(path, argument="output")
                if self._writing and path == self._own_part():
                    drop_torn_line(path, whole)  # a kill cut it short; a mere reader may see a line being written
                for record in records:
                    try:
                        answer = Answer.from_dict(record)
                    except TypeError as error:
                        raise SpecRejError(
                            f"{str(path)!r} does not hold answers of ours ({error}).", hint="delete it, or use another."
                        ) from error
                    self._answers[answer.key] = answer
        return self._answers


def total_cost(answers: Iterable[Answer]) -> Ledger:
    """The ledgers of answers added up."""
    total = Ledger()
    for answer in answers:
        total.add(Ledger(**answer.ledger))
    return total


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
            f"{str(path)!r} holds no run of specrej-eval: there is no {store.run_file.name}.",
            hint="`specrej-eval run --output DIR` writes one, and so does alpaca_eval with our decoders.",
        )
    return record, store.answers()
