"""The nouns that travel from prompt to result. Standard library only: no torch, no I/O.

Flow: prompt -> engine -> reward -> strategy -> result -> harness.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from specrej_eval.checked import (
    BadRecordError,
    a_list,
    an_object,
    as_number,
    as_whole,
    number_or_none,
    one_of,
    text,
    truth,
    whole,
)

Message = Mapping[str, str]
"""One chat turn: ``{"role": ..., "content": ...}``."""

FinishReason = Literal["eos", "stop", "length", "rejected"]

TokenStat = Literal["logprob", "self_certainty", "confidence"]
"""A number the engine can record for every token it draws, of the untempered and unfiltered distribution p it was drawn
from: the token's own log-prob; KL(uniform || p); minus the mean log-prob of p's likeliest tokens."""
CONFIDENCE_TOKENS = 20
"""Likeliest tokens that ``confidence`` is the mean of, as in DeepConf (arXiv 2508.15260)."""


def prompt_hash(text: str) -> str:
    """SHA-256 of a prompt's text, hex: the join key that lm-eval's samples files use too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stream_key(seed: int, task: str, hash_of_prompt: str, repeat: int, *, purpose: str = "") -> int:
    """The 63-bit key of a prompt's random streams; row and step are mixed in by the sampler.

    Depends on nothing but its arguments, so neither order, batch, rank nor a resumed run changes a row's tokens.

    Args:
        purpose: names a stream apart from that of the rows.
    """
    text = f"{seed}\x1f{task}\x1f{hash_of_prompt}\x1f{repeat}" + (f"\x1f{purpose}" if purpose else "")
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def called(instruction: str, index: int | None) -> str:
    """How messages call an instruction: by its place in the file of prompts, if it has one, and by its beginning."""
    start = repr(instruction if len(instruction) <= 60 else instruction[:60] + "...")
    return f"instruction {start}" if index is None else f"prompt {index} ({start})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One instruction to answer, as a file of prompts or a harness gives it."""

    instruction: str
    """What is asked, without any template; the reward model reads it as the user's turn."""
    text: str | None = None
    """What the language model reads, if a template has been applied already."""
    messages: tuple[Message, ...] | None = None
    """What the language model reads, as chat messages."""
    index: int | None = None
    """Its place in the file of prompts, from 0."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of its row."""

    @property
    def name(self) -> str:
        """How messages to the user call it."""
        return called(self.instruction, self.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenised once. ``(task, prompt_hash, repeat)`` identifies it in traces and seeds."""

    token_ids: tuple[int, ...]
    """What the language model reads."""
    conversation: tuple[Message, ...]
    """What the reward model reads before the response, as chat messages."""
    response_prefix: str = ""
    """Start of the assistant's turn that the prompt already holds; the reward model reads it before the response."""
    prompt_hash: str = ""
    task: str = ""
    repeat: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a strategy wants next. Rows are named by row id; naming one twice forks it."""

    keep: tuple[int, ...]
    """Row ids that go on, among the rows still live."""
    fresh: int
    """New rows to start from the prompt."""
    num_tokens: int
    """Tokens every live row decodes before the next look, unless it finishes earlier."""


@dataclass(frozen=True, slots=True)
class RowView:
    """One row as a reward model and a strategy see it at a look. No tensors."""

    row: int
    text: str
    """What the benchmark will see: cut at the stop string, special tokens stripped."""
    token_ids: Sequence[int]
    finish_reason: FinishReason | None
    """None while the row is live."""
    mean_logprob: float | None = None
    """Mean log-prob of ``token_ids`` under the untempered, unfiltered model; None unless it was asked for."""
    token_stats: Mapping[TokenStat, Sequence[float]] = field(default_factory=dict)
    """One number per token id, for each statistic that was asked for."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class Trajectory:
    """One row from its first token to its end, rejected rows included."""

    row: int
    text: str
    token_ids: list[int] = field(repr=False)
    """Ends with the EOS, or with the token that completes the stop string."""
    reward: float | None
    """Last score; of the partial answer, for a rejected row. None if it was not finite (``on_nan=drop``)."""
    finish_reason: FinishReason
    rounds_survived: int
    logprobs: list[float] | None = field(default=None, repr=False)
    """Log-prob of each id under the untempered, unfiltered model (``logprobs=True``)."""
    reward_parts: dict[str, float | None] | None = None
    """What each reward of an ensemble said of the row last; None where there is one reward."""
    look_scores: list[tuple[int, float | None]] | None = field(default=None, repr=False)
    """(tokens the row had, its score) at each look it was in the pool of, in order, and after every ``score_every``
    tokens. The last one is ``reward`` (but for ranks, which are made anew at the end). A score that was not finite is
    None; so is the list, in records of older versions."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            BadRecordError: a field is missing or holds what no trajectory can.
        """
        data = an_object(record, "a trajectory")
        token_ids = [as_whole(value, "token_ids") for value in a_list(data, "token_ids")]
        if data.get("num_tokens", len(token_ids)) != len(token_ids):
            raise BadRecordError(f"num_tokens is not the number of token_ids, {len(token_ids)}")
        logprobs: list[Any] | None = None
        if data.get("logprobs") is not None:
            given = a_list(data, "logprobs")
            logprobs = [None if value is None else as_number(value, "logprobs") for value in given]
            if len(logprobs) != len(token_ids):
                raise BadRecordError(f"there are {len(logprobs)} logprobs for {len(token_ids)} token_ids")
        parts = data.get("reward_parts")
        if parts is not None:
            parts = {name: number_or_none(parts, name) for name in an_object(parts, "reward_parts")}
        looks: list[tuple[int, float | None]] | None = None
        if data.get("look_scores") is not None:
            looks = [_look_score(item, len(token_ids)) for item in a_list(data, "look_scores")]
        return cls(
            row=whole(data, "row"),
            text=text(data, "text"),
            token_ids=token_ids,
            reward=number_or_none(data, "reward"),
            finish_reason=one_of(data, "finish_reason", get_args(FinishReason)),
            rounds_survived=whole(data, "rounds_survived"),
            logprobs=logprobs,
            reward_parts=parts,
            look_scores=looks,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "num_tokens": self.num_tokens,
            "reward": finite_or_none(self.reward),
            "finish_reason": self.finish_reason,
            "rounds_survived": self.rounds_survived,
            "logprobs": None if self.logprobs is None else [finite_or_none(value) for value in self.logprobs],
            **({} if self.reward_parts is None else {"reward_parts": dict(self.reward_parts)}),
            **(
                {}
                if self.look_scores is None
                else {"look_scores": [[t, finite_or_none(s)] for t, s in self.look_scores]}
            ),
        }


def _look_score(item: Any, num_tokens: int) -> tuple[int, float | None]:
    """One of ``Trajectory.look_scores``."""
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise BadRecordError("look_scores must hold pairs of tokens and score")
    tokens = as_whole(item[0], "tokens in look_scores")
    if tokens > num_tokens:
        raise BadRecordError(f"look_scores has a score at {tokens} tokens of a row of {num_tokens}")
    return tokens, None if item[1] is None else as_number(item[1], "a score in look_scores")


@dataclass(frozen=True, slots=True)
class Round:
    """One look: the rows that were scored and what became of them."""

    rows: int
    """Rows in the pool: those live when the round began, the ones that finished in it included."""
    tokens: int
    """Tokens each row that is still live has decoded by now."""
    cut: float | None
    """Reward of the worst row kept (r_cut of Algorithm 1); None if no row was rejected."""
    kept: int
    """Live rows that go on."""
    finished: int
    """Rows of the pool that finished in this round."""
    rejected: int
    """Live rows dropped at this look."""
    kv_tokens: int
    """Most tokens (shared prompt + own suffixes) held during the round; never above the budget."""

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            BadRecordError: a field is missing or holds what no round can.
        """
        data = an_object(record, "a round")
        counts = {name: whole(data, name) for name in ("rows", "tokens", "kept", "finished", "rejected", "kv_tokens")}
        return cls(cut=number_or_none(data, "cut"), **counts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cut": finite_or_none(self.cut)}


ROWS_FROM = "rows_from"
"""In ``GenerationResult.resolved``, where rows were not decoded but taken from another run: seconds say nothing."""
PHASES = ("prefill", "decode", "reward", "other")
_COUNTS = (
    "prompt_tokens",
    "decode_tokens",
    "reward_tokens",
    "reward_calls",
    "scores_floored",
    "grades_unreadable",
    "rows_started",
    "rows_finished",
    "rows_rejected",
    "overshoot_tokens",
    "discarded_tokens",
    "cached_tokens",
    "audit_rows",
    "audit_tokens",
    "audit_reward_tokens",
)
_OF_OTHER_ENGINES = ("overshoot_tokens", "discarded_tokens", "cached_tokens")
"""Written where there is something to tell."""


@dataclass(slots=True)
class Ledger:
    """What one answer cost. Tokens are exact; seconds are a prompt's share of the steps it ran in."""

    prompt_tokens: int = 0
    """Of the prompt. What it has in common with others counts for each, so that no ledger depends on company."""
    decode_tokens: int = 0
    """Tokens sampled, over all rows."""
    reward_tokens: int = 0
    """Tokens the reward model read. What a prompt has in common with others counts for each of them."""
    reward_calls: int = 0
    """Forward passes of the reward model that had a part in it, with or without others; calls of a callable, requests
    to a server."""
    scores_floored: int = 0
    """Scores that ``floor_toks`` or ``floor_repetition`` put below all others, over all looks."""
    grades_unreadable: int = 0
    """Scores that a judge's answer did not give, over all looks; ``on_nan`` decides about them."""
    rows_started: int = 0
    rows_finished: int = 0
    rows_rejected: int = 0
    overshoot_tokens: int = 0
    """Tokens that rows had decoded beyond a look when it was taken, by an engine that cannot stop all of them at the
    very token. A row that goes on takes them as its next; then they are in ``decode_tokens`` as well."""
    discarded_tokens: int = 0
    """Tokens decoded that came to nothing: those of rejected rows beyond their last look, and what came behind a row's
    end. Not in ``decode_tokens``: the two together are what the engine decoded."""
    cached_tokens: int = 0
    """Tokens of the prompt (and of what forks have from their parents) that rows found in the engine's prefix cache;
    0 where the prompt is read once by construction."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """By phase. Of scores made while rows of other prompts decoded, ``reward`` has what decoding waited for."""
    peak_bytes: int = 0
    """Peak memory: allocated by torch on a GPU, resident set of the process on a CPU."""
    audit_rows: int = 0
    """Rejected rows that ``audit`` decoded to their end. What the audit took stands in these four alone."""
    audit_tokens: int = 0
    """Tokens decoded for that, those included that the rows had before they were rejected."""
    audit_reward_tokens: int = 0
    audit_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def add(self, other: Ledger) -> Self:
        """Add another ledger's counts to this one, and return it; peak memory is the larger of the two."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for phase, value in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.audit_seconds += other.audit_seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        return self

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``; what an older version did not count is 0.

        Raises:
            BadRecordError: a field holds what no ledger can.
        """
        data = an_object(record, "ledger")
        seconds = an_object(data.get("seconds", {}), "seconds")
        return cls(
            **{name: whole(data, name, 0) for name in (*_COUNTS, "peak_bytes")},
            seconds=dict.fromkeys(PHASES, 0.0) | {str(k): as_number(v, f"seconds of {k}") for k, v in seconds.items()},
            audit_seconds=as_number(data.get("audit_seconds", 0.0), "audit_seconds"),
        )

    def to_dict(self) -> dict[str, Any]:
        told = {name: value for name, value in asdict(self).items() if value or name not in _OF_OTHER_ENGINES}
        return {**told, "seconds": {phase: self.seconds.get(phase, 0.0) for phase in PHASES}}


@dataclass(slots=True)
class Audit:
    """What the rejected rows of one prompt would have come to (``audit``); see ``specrej_eval.auditing``."""

    rows: list[Trajectory]
    """The rejected rows, decoded to their end, with their final rewards. Records of answers alone leave them out."""
    num_rows: int
    regret: float | None
    """How much better the best of them is than the answer, at least 0; None where that could not be found out."""
    better: int = 0
    """Rejected rows whose reward is above the answer's."""
    error: str = ""
    """Why it could not be found out."""

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            BadRecordError: a field is missing or holds what no audit can.
        """
        data = an_object(record, "audit")
        return cls(
            rows=[Trajectory.from_dict(item) for item in a_list(data, "rows")],
            num_rows=whole(data, "num_rows"),
            regret=number_or_none(data, "regret"),
            better=whole(data, "better"),
            error=text(data, "error", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "num_rows": self.num_rows,
            "regret": finite_or_none(self.regret),
            "better": self.better,
            "error": self.error,
        }


@dataclass(slots=True, repr=False)
class GenerationResult:
    """The answer to one prompt, every candidate behind it, and what it cost."""

    best: Trajectory
    trajectories: list[Trajectory]
    """In row order, rejected rows included."""
    rounds: list[Round]
    ledger: Ledger
    prompt_hash: str = ""
    task: str = ""
    repeat: int = 0
    resolved: dict[str, Any] = field(default_factory=dict)
    """The arguments as resolved for this prompt: strategy, alpha, n, first_look, kv_budget_tokens, seed, sampling."""
    degraded: bool = False
    """True if rows were given up because memory did not suffice even one row at a time."""
    nan_rewards: int = 0
    """Non-finite scores ranked last under ``on_nan=drop``."""
    audit: Audit | None = None
    """What its rejected rows would have come to, if this prompt was drawn for the audit."""
    taken: bool = field(default=False, compare=False)
    """True if it comes from a journal: its ledger says what it cost then, and this process spent nothing on it."""

    @property
    def text(self) -> str:
        return self.best.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 200 else f"{self.text[:197]}..."
        rejected = sum(row.finish_reason == "rejected" for row in self.trajectories)
        return (
            f"GenerationResult(text={text!r}, reward={self.best.reward}, rows={len(self.trajectories)}, "
            f"rejected={rejected}, rounds={len(self.rounds)}, decode_tokens={self.ledger.decode_tokens}"
            f"{', degraded=True' if self.degraded else ''})"
        )

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            BadRecordError: a field is missing or holds what no result can.
        """
        data = an_object(record, "a result")
        trajectories = [Trajectory.from_dict(item) for item in a_list(data, "trajectories")]
        rows = {trajectory.row: trajectory for trajectory in trajectories}
        if len(rows) != len(trajectories):
            raise BadRecordError("two trajectories belong to the same row")
        best = rows.get(whole(data, "best"))
        if best is None or best.finish_reason == "rejected":
            raise BadRecordError(f"best is row {data['best']}, which is not among those that finished")
        if text(data, "text", best.text) != best.text:
            raise BadRecordError(f"text is not that of the best row, row {best.row}")
        resolved = dict(an_object(data.get("resolved"), "resolved"))
        if not isinstance(resolved.get("seed", 0), int):
            raise BadRecordError("the seed in resolved is not a whole number")
        return cls(
            best=best,
            trajectories=trajectories,
            rounds=[Round.from_dict(item) for item in a_list(data, "rounds")],
            ledger=Ledger.from_dict(data.get("ledger")),
            prompt_hash=text(data, "prompt_hash"),
            task=text(data, "task"),
            repeat=whole(data, "repeat"),
            resolved=resolved,
            degraded=truth(data, "degraded"),
            nan_rewards=whole(data, "nan_rewards"),
            audit=None if data.get("audit") is None else Audit.from_dict(data["audit"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps(..., allow_nan=False)`` takes."""
        return {
            "text": self.text,
            "best": self.best.row,
            "trajectories": [trajectory.to_dict() for trajectory in self.trajectories],
            "rounds": [round_.to_dict() for round_ in self.rounds],
            "ledger": self.ledger.to_dict(),
            "prompt_hash": self.prompt_hash,
            "task": self.task,
            "repeat": self.repeat,
            "resolved": dict(self.resolved),
            "degraded": self.degraded,
            "nan_rewards": self.nan_rewards,
            **({} if self.audit is None else {"audit": self.audit.to_dict()}),
        }


@dataclass(slots=True)
class Spent:
    """What one process spent itself: answers it took from records cost it nothing."""

    decoded: int = 0
    """Answers decoded here."""
    taken: int = 0
    """Answers taken from a journal or an outputs folder."""
    ledger: Ledger = field(default_factory=Ledger)
    """Cost of those decoded."""

    def count(self, result: GenerationResult) -> None:
        if result.taken:
            self.taken += 1
        else:
            self.decoded += 1
            self.ledger.add(result.ledger)

    def add(self, other: Spent) -> Self:
        self.decoded += other.decoded
        self.taken += other.taken
        self.ledger.add(other.ledger)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"decoded": self.decoded, "taken_from_records": self.taken, **self.ledger.to_dict()}


def finite_or_none(value: float | None) -> float | None:
    """NaN and infinities have no JSON form: they become None."""
    return value if value is not None and math.isfinite(value) else None
