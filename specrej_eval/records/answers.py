"""What a run's folder holds, as nouns: the record of the run, and the answers to its prompts. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from typing import Any, Self

from specrej_eval.auditing import AuditSample
from specrej_eval.checked import (
    BadRecordError,
    a_list,
    an_object,
    as_number,
    as_whole,
    number_or_none,
    text,
    truth,
    whole,
)
from specrej_eval.core import Audit, GenerationResult, Ledger, Prompt, Round, called
from specrej_eval.records.fingerprint import is_demo
from specrej_eval.redaction import redacted_values

SCHEMA_VERSION = 2
GATHERED = "gathered"
"""Where the record of a run that was put together names the runs it was made of."""


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
    rounds: list[Round] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    seconds: float = 0.0
    """Sum of the ledger's seconds."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """The arguments as resolved for this prompt."""
    degraded: bool = False
    nan_rewards: int = 0
    audit: Audit | None = None
    """What its rejected rows would have come to, without those rows."""
    prompt_hash: str = ""
    repeat: int = 0
    key: str = ""
    """Identifies prompt and arguments: a later run takes this answer only for the same key."""

    @property
    def called(self) -> str:
        """How messages to the user call it."""
        return called(self.instruction, self.index)

    def is_to(self, prompt: Prompt) -> bool:
        return (self.prompt_hash, self.repeat) == (prompt.prompt_hash, prompt.repeat)

    def place(self) -> str:
        return f"the answer recorded for {self.called}"

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
            rounds=list(result.rounds),
            ledger=result.ledger,
            seconds=result.ledger.total_seconds,
            resolved=dict(result.resolved),
            degraded=result.degraded,
            nan_rewards=result.nan_rewards,
            audit=None if result.audit is None else replace(result.audit, rows=[]),
            prompt_hash=result.prompt_hash,
            repeat=result.repeat,
            key=key,
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; unknown names are left out, so that older readers take newer files.

        Raises:
            BadRecordError: a field is missing or holds what no answer can.
        """
        index = record.get("index")
        return cls(
            instruction=text(record, "instruction"),
            output=text(record, "output"),
            reward=number_or_none(record, "reward"),
            finish_reason=text(record, "finish_reason"),
            num_tokens=whole(record, "num_tokens"),
            n=whole(record, "n"),
            seeds=[_a_seed(value) for value in a_list(record, "seeds")],
            index=None if index is None else as_whole(index, "index"),
            fields=dict(an_object(record.get("fields", {}), "fields")),
            finished_rewards=[as_number(v, "finished_rewards") for v in a_list(record, "finished_rewards", [])],
            rounds=[Round.from_dict(item) for item in a_list(record, "rounds", [])],
            ledger=Ledger.from_dict(record.get("ledger", {})),
            seconds=as_number(record.get("seconds", 0.0), "seconds"),
            resolved=dict(an_object(record.get("resolved", {}), "resolved")),
            degraded=truth(record, "degraded", False),
            nan_rewards=whole(record, "nan_rewards", 0),
            audit=None if record.get("audit") is None else Audit.from_dict(record["audit"]),
            prompt_hash=text(record, "prompt_hash", ""),
            repeat=whole(record, "repeat", 0),
            key=text(record, "key", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        rounds = [round_.to_dict() for round_ in self.rounds]
        told = {**asdict(self), "rounds": rounds, "ledger": self.ledger.to_dict()}
        if self.audit is None:
            del told["audit"]
        return told


def _a_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRecordError("seeds must be whole numbers")
    return value


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """What was run: the content of ``specrej_run.json``."""

    name: str
    """Of the run, in leaderboards: ``generator`` in the file, as alpaca_eval calls it."""
    fingerprint: dict[str, Any]
    """Everything that decides its answers; see ``specrej_eval.records.fingerprint``."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """All arguments, those included that decide nothing."""
    described: dict[str, Any] = field(default_factory=dict)
    """Versions and hardware."""
    capacity_tokens: int | None = None
    """What memory held when the run began (``n=max``): a run that goes on from here starts as many rows."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Cost of all answers, once the run is complete: those included that an earlier process decoded."""
    audit: dict[str, Any] = field(default_factory=dict)
    """What rejection cost, estimated (``auditing.AuditEstimate``); empty without an audit."""
    spent: dict[str, Any] = field(default_factory=dict)
    """What the last process that decoded any of them spent itself, and how many it took from records (``Spent``)."""
    complete: bool = False
    stopped: str = ""
    """The limit that ended it before it was complete, such as ``max_seconds=600``."""
    num_prompts: int | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def embedded_demo_pair(self) -> bool:
        return is_demo(self.fingerprint)

    @property
    def machines(self) -> list[dict[str, Any]]:
        """Versions and hardware of the run, or of each run that it was put together from."""
        parts = self.described.get(GATHERED)
        if not isinstance(parts, list):
            return [self.described] if self.described else []
        return [part["described"] for part in parts if isinstance(part, dict) and part.get("described")]

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``; unknown names are left out.

        Raises:
            BadRecordError: a field is missing or holds what no record can.
        """
        data = an_object(record, "the record of a run")
        truth(data, "complete", False)
        for name in ("fingerprint", "arguments", "described", "totals", "audit", "spent"):
            an_object(data.get(name, None if name == "fingerprint" else {}), name)
        for name in ("capacity_tokens", "num_prompts"):
            if data.get(name) is not None:
                whole(data, name)
        whole(data, "schema_version", 1)
        text(data, "stopped", "")
        known = {entry.name for entry in fields(cls)} - {"name"}
        told = {"schema_version": 1, **{name: value for name, value in data.items() if name in known}}
        return cls(name=text(data, "generator"), **told)

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        told |= {name: redacted_values(told[name], put="") for name in ("arguments", "described")}  # older ones, too
        return {"generator": told.pop("name"), **told, "embedded_demo_pair": self.embedded_demo_pair}


def audit_sample(answers: Iterable[Answer]) -> AuditSample:
    """What the audits of some answers found; those of runs without ``audit`` tell nothing."""
    found = AuditSample()
    for answer in answers:
        if answer.resolved.get("audit"):
            found.count(answer.ledger.rows_rejected, answer.audit)
    return found


def audited(answers: Iterable[Answer]) -> dict[str, Any]:
    """What rejection cost, estimated (``AuditEstimate.to_dict``); empty without an audit."""
    estimate = audit_sample(answers).estimate()
    return {} if estimate is None else estimate.to_dict()


def total_cost(answers: Iterable[Answer]) -> Ledger:
    """The ledgers of answers added up."""
    return reduce(Ledger.add, (answer.ledger for answer in answers), Ledger())
