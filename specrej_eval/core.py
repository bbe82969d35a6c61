"""The nouns that travel from prompt to result. Standard library only: no torch, no I/O.

Flow: prompt -> engine -> reward -> strategy -> result -> harness.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, str]
"""One chat turn: ``{"role": ..., "content": ...}``."""

FinishReason = Literal["eos", "stop", "length", "rejected"]

TokenStat = Literal["logprob", "self_certainty", "confidence"]
"""A number the engine can record for every token it draws, of the untempered and unfiltered distribution p it was drawn
from: the token's own log-prob; KL(uniform || p); minus the mean log-prob of p's 20 likeliest tokens."""


def prompt_hash(text: str) -> str:
    """SHA-256 of a prompt's text, hex: the join key that lm-eval's samples files use too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stream_key(seed: int, task: str, hash_of_prompt: str, repeat: int) -> int:
    """The 63-bit key of a prompt's random streams; row and step are mixed in by the sampler.

    Depends on nothing but its arguments, so neither order, batch, rank nor a resumed run changes a row's tokens.
    """
    text = f"{seed}\x1f{task}\x1f{hash_of_prompt}\x1f{repeat}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


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
    token_ids: list[int]
    """Ends with the EOS, or with the token that completes the stop string."""
    reward: float | None
    """Last score; of the partial answer, for a rejected row. None if it was not finite (``on_nan=drop``)."""
    finish_reason: FinishReason
    rounds_survived: int
    logprobs: list[float] | None = None
    """Log-prob of each id under the untempered, unfiltered model (``logprobs=True``)."""
    reward_parts: dict[str, float | None] | None = None
    """What each reward of an ensemble said of the row last; None where there is one reward."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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
        }


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

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "cut": finite_or_none(self.cut),
            "kept": self.kept,
            "finished": self.finished,
            "rejected": self.rejected,
            "kv_tokens": self.kv_tokens,
        }


PHASES = ("prefill", "decode", "reward", "other")


@dataclass(slots=True)
class Ledger:
    """What one answer cost. Tokens are exact; seconds are a prompt's share of the steps it ran in."""

    prompt_tokens: int = 0
    """Tokens prefilled: once per prompt."""
    decode_tokens: int = 0
    """Tokens sampled, over all rows."""
    reward_tokens: int = 0
    """Tokens the reward model read."""
    reward_calls: int = 0
    """Forward passes of the reward model; calls of a callable, requests to a server."""
    scores_floored: int = 0
    """Scores that ``floor_toks`` or ``floor_repetition`` put below all others, over all looks."""
    grades_unreadable: int = 0
    """Scores that a judge's answer did not give, over all looks; ``on_nan`` decides about them."""
    rows_started: int = 0
    rows_finished: int = 0
    rows_rejected: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peak_bytes: int = 0
    """Peak memory: allocated by torch on a GPU, resident set of the process on a CPU."""

    def add(self, other: Ledger) -> None:
        """Add another ledger's counts to this one; peak memory is the larger of the two."""
        for name in (
            "prompt_tokens",
            "decode_tokens",
            "reward_tokens",
            "reward_calls",
            "scores_floored",
            "grades_unreadable",
            "rows_started",
            "rows_finished",
            "rows_rejected",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for phase, value in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "reward_tokens": self.reward_tokens,
            "reward_calls": self.reward_calls,
            "scores_floored": self.scores_floored,
            "grades_unreadable": self.grades_unreadable,
            "rows_started": self.rows_started,
            "rows_finished": self.rows_finished,
            "rows_rejected": self.rows_rejected,
            "seconds": {phase: self.seconds.get(phase, 0.0) for phase in PHASES},
            "peak_bytes": self.peak_bytes,
        }


@dataclass(slots=True)
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

    @property
    def text(self) -> str:
        return self.best.text

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
        }


def finite_or_none(value: float | None) -> float | None:
    """NaN and infinities have no JSON form: they become None."""
    return value if value is not None and math.isfinite(value) else None
