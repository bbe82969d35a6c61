"""A language model that is a table, and an engine over it in plain Python: the contract of engines is tried on it, and
on copies of it with one fault each, which it must find.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Plan, Prompt, RowView, TokenStat, stream_key
from specrej_eval.engines.base import Engine, EngineSession
from specrej_eval.errors import KVBudgetExceededError
from support.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

LETTERS = "abcdefgh .\n€"
"""What answers are made of; the last is three tokens, each a part of a character."""


def fraction(*parts: Any) -> float:
    """A number in (0, 1) that is a function of ``parts``."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return (struct.unpack(">Q", digest[:8])[0] + 0.5) / 2**64


@cache
def candidates() -> tuple[int, ...]:
    ids = {token for letter in LETTERS for token in tiny_tokenizer().encode(letter, add_special_tokens=False)}
    return tuple(sorted(ids))


@cache
def logits_after(last: int, place: int) -> tuple[float, ...]:
    """Of the next token, by the last one and the parity of its place. Every tenth row or so ends."""
    found = [-math.inf] * VOCAB_SIZE
    for token in candidates():
        found[token] = 4 * fraction("toy", last, place % 2, token)
    found[EOS] = 0.3
    return tuple(found)


def logits_of(context: Sequence[int]) -> tuple[float, ...]:
    return logits_after(context[-1], len(context))


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(value - top) for value in logits))
    return [value - total for value in logits]


def distribution(logits: Sequence[float], config: RunConfig) -> list[float]:
    """Probabilities after temperature, top_k (ties at the k-th stay), top_p and min_p, by their definitions."""
    return list(_distribution(tuple(logits), config.temperature, config.top_k, config.top_p, config.min_p))


@lru_cache(maxsize=4096)
def _distribution(
    logits: tuple[float, ...], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[float, ...]:
    if temperature == 0:
        largest = logits.index(max(logits))
        return tuple(float(token == largest) for token in range(len(logits)))
    scores = [value / temperature for value in logits]
    if 0 < top_k < len(scores):
        least = sorted(scores, reverse=True)[top_k - 1]
        scores = [value if value >= least else -math.inf for value in scores]
    probabilities = [math.exp(value) for value in log_softmax(scores)]
    if top_p < 1:
        mass, kept = 0.0, set()
        for token in sorted(range(len(scores)), key=lambda token: -probabilities[token]):
            if mass >= top_p:
                break
            kept.add(token)
            mass += probabilities[token]
        probabilities = [p if token in kept else 0.0 for token, p in enumerate(probabilities)]
    floor = min_p * max(probabilities)
    probabilities = [p if p >= floor else 0.0 for p in probabilities]
    total = math.fsum(probabilities)
    return tuple(p / total for p in probabilities)


def draw(probabilities: Sequence[float], uniform: float) -> int:
    reached, last = 0.0, 0
    for token, p in enumerate(probabilities):
        if p:
            reached, last = reached + p, token
            if uniform < reached:
                return token
    return last


@dataclass(eq=False)
class ToyRow:
    row: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    at_look: int = 0
    finish_reason: FinishReason | None = None
    stream: int = 0


class ToySession(EngineSession):
    def __init__(
        self, prompt: Prompt, config: RunConfig, budget: Budget, until: tuple[str, ...], stats: Collection[TokenStat]
    ) -> None:
        super().__init__(prompt_tokens=prompt.num_tokens)
        self.prompt, self.config, self.budget, self.until, self.stats = prompt, config, budget, until, set(stats)
        self.all_rows: list[ToyRow] = []
        self.in_pool: list[ToyRow] = []
        self.held: Counter[int] = Counter()
        self.taken = 0
        self.ghosts = 0
        self.key = stream_key(config.seed, prompt.task, prompt.prompt_hash, prompt.repeat)

    @property
    def live(self) -> list[ToyRow]:
        return [row for row in self.in_pool if row.finish_reason is None]

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def tokens_since_look(self) -> int:
        return self.taken if self.live else 0

    @property
    def kv_tokens_peak(self) -> int:
        return self.prompt_tokens + max(self.held.values(), default=0)


FAULTS = (
    *("a row that was kept is dropped", "a row that was dropped goes on", "one fresh row too few"),
    *("fresh rows take used numbers", "survivors start anew", "a rejected row loses its tokens"),
    *("a fork starts from the prompt", "a finished row is lost"),
    *("a look comes one token late", "a look comes one token early", "a row is left behind"),
    *("rows share a stream", "a fork repeats its parent", "the seed is not used", "a repeat is not used"),
    *("company changes tokens", "looks change tokens", "the prompt is not used"),
    *("a stop string is seen one token late", "a stop string is not cut", "a stop string is whole tokens"),
    *("the prompt stops an answer", "the end of sequence is passed", "one token beyond the cap"),
    *("the budget is not held", "the peak forgets the prompt", "the peak counts rows that are gone"),
    *("a fork's past is counted as decoded", "the last token of a row is not counted", "the prompt counts per row"),
    *("the temperature is not used", "top_k takes one more", "top_p is not used", "min_p is not used"),
    *("the largest token is never drawn", "greedy draws"),
    *("log-probs are of the tempered model", "log-probs are of the token before", "a closed session goes on"),
    *("rows come in another order", "statistics come unasked", "decoding goes on after a session has ended"),
)


class ToyEngine(Engine):
    """Fault by name, each at the one line where it belongs."""

    promises = "bits"

    def __init__(self, fault: str = "") -> None:
        assert not fault or fault in FAULTS, fault
        super().__init__(tiny_tokenizer(), max_length=10_000)
        self.fault = fault
        self.open_sessions: set[ToySession] = set()

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> ToySession:
        self.check(prompt, config)
        session = ToySession(prompt, config, budget, until, token_stats)
        if self.fault == "the seed is not used":
            session.key = stream_key(0, prompt.task, prompt.prompt_hash, prompt.repeat)
        if self.fault == "a repeat is not used":
            session.key = stream_key(config.seed, prompt.task, prompt.prompt_hash, 0)
        if self.fault == "the prompt is not used":
            session.key = stream_key(config.seed, "", "", prompt.repeat)
        self.open_sessions.add(session)
        return session

    def follow(self, session: ToySession, plan: Plan) -> None:
        fault = self.fault
        live = {row.row: row for row in session.live}
        kept: list[ToyRow] = []
        started: list[ToyRow] = []
        known = len(session.all_rows)
        for name in plan.keep:
            parent = live[name]
            if parent not in kept:
                kept.append(parent)
                if fault == "survivors start anew":
                    parent.tokens, parent.logprobs = [], []
                continue
            fork = ToyRow(known + len(started), list(parent.tokens), list(parent.logprobs))
            fork.stream = parent.row if fault == "a fork repeats its parent" else fork.row
            if fault == "a fork starts from the prompt":
                fork.tokens, fork.logprobs = [], []
            if fault == "a fork's past is counted as decoded":
                session.decode_tokens += len(fork.tokens)
            started.append(fork)
        for _ in range(plan.fresh - (fault == "one fresh row too few" and bool(session.all_rows))):
            row = ToyRow(known + len(started))
            row.stream = len(kept) + len(started) if fault == "fresh rows take used numbers" else row.row
            started.append(row)
        gone = [row for row in live.values() if row not in kept]
        if fault == "a row that was kept is dropped" and len(kept) > 1:
            gone.append(kept.pop())
        if fault == "a row that was dropped goes on" and gone:
            kept.append(gone.pop())
        for row in gone:
            row.finish_reason = "rejected"
            if fault == "a rejected row loses its tokens":
                row.tokens = row.tokens[:-1]
        if fault == "a finished row is lost":
            session.all_rows = [row for row in session.all_rows if row.finish_reason in (None, "rejected")]
        held = sum(len(row.tokens) for row in (*kept, *started))
        self._check(session, held)
        session.all_rows += started
        session.in_pool = sorted((*kept, *started), key=lambda row: row.row)
        if fault == "rows come in another order":
            session.in_pool.reverse()
        for row in session.in_pool:
            row.at_look = len(row.tokens)
        session.ghosts = sum(len(row.tokens) for row in gone) * (fault == "the peak counts rows that are gone")
        session.held = Counter({0: held})
        session.taken = 0

    def _check(self, session: ToySession, held: int) -> None:
        if session.prompt_tokens + held > session.budget.kv_budget_tokens and self.fault != "the budget is not held":
            raise KVBudgetExceededError(f"{held}")

    def decode(self, sessions: Sequence[ToySession], num_tokens: int) -> None:
        extra = {"a look comes one token late": 1, "a look comes one token early": -1}.get(self.fault, 0)
        for step in range(num_tokens + extra):
            for session in sessions:
                self._step(session, len(sessions))
                session.taken += step < num_tokens or bool(extra)
            if self.fault != "decoding goes on after a session has ended" and not all(s.live for s in sessions):
                return
        if extra:
            for session in sessions:
                session.taken -= extra

    def _step(self, session: ToySession, company: int) -> None:
        fault = self.fault
        live = session.live
        if fault == "a row is left behind" and session.taken == 1 and len(live) > 1:
            live = live[:-1]
        for row in live:
            self._take(session, row, company)
        held = sum(len(row.tokens) for row in live)
        forgotten = session.prompt_tokens if fault == "the peak forgets the prompt" else 0
        session.held[session.taken + 1] += held + session.ghosts - forgotten
        self._check(session, held)
        session.decode_tokens += len(live)
        if fault == "the last token of a row is not counted":
            session.decode_tokens -= sum(row.finish_reason is not None for row in live)

    def _take(self, session: ToySession, row: ToyRow, company: int) -> None:
        fault, config = self.fault, session.config
        logits = logits_of([*session.prompt.token_ids, *row.tokens])
        used = config
        if fault == "the temperature is not used" and config.temperature:
            used = config.replace(temperature=1.0)
        if fault == "top_k takes one more" and 0 < config.top_k < 20:
            used = config.replace(top_k=config.top_k + 1)
        if fault == "top_p is not used":
            used = config.replace(top_p=1.0)
        if fault == "min_p is not used":
            used = config.replace(min_p=0.0)
        if fault == "greedy draws" and not config.temperature:
            used = RunConfig(n=1)
        probabilities = distribution(logits, used)
        if fault == "the largest token is never drawn" and config.temperature:
            probabilities[probabilities.index(max(probabilities))] /= 2
        stream: Any = 0 if fault == "rows share a stream" else row.stream
        if fault == "company changes tokens":
            stream = (stream, company)
        if fault == "looks change tokens":
            stream = (stream, row.at_look)
        token = draw(probabilities, fraction(session.key, stream, len(row.tokens)))
        told = log_softmax([value / used.temperature for value in logits] if "tempered" in fault else logits)
        row.logprobs.append(
            (row.logprobs or [0.0])[-1] if fault == "log-probs are of the token before" else told[token]
        )
        row.tokens.append(token)
        row.finish_reason = self._end(session, row)

    def _end(self, session: ToySession, row: ToyRow) -> FinishReason | None:
        fault = self.fault
        if row.tokens[-1] == EOS and fault != "the end of sequence is passed":
            return "eos"
        tokens = row.tokens[:-1] if fault == "a stop string is seen one token late" else row.tokens
        read = [*session.prompt.token_ids, *tokens] if fault == "the prompt stops an answer" else tokens
        if fault == "a stop string is whole tokens":
            last = self.detokenizer.raw(tokens[-1:])
            if last in session.until:
                return "stop"
        elif session.until and self.detokenizer.stop_position(read, session.until) is not None:
            return "stop"
        cap = session.budget.max_gen_toks + (fault == "one token beyond the cap")
        return "length" if len(row.tokens) >= cap else None

    def _view(self, session: ToySession, row: ToyRow) -> RowView:
        asked = session.stats or ({"logprob"} if self.fault == "statistics come unasked" else set())
        until = () if self.fault == "a stop string is not cut" else session.until
        reason = row.finish_reason
        return RowView(
            row=row.row,
            text=self.detokenizer.visible(row.tokens, None if reason == "rejected" else reason, until),
            token_ids=list(row.tokens),
            finish_reason=reason,
            mean_logprob=math.fsum(row.logprobs) / len(row.tokens) if asked and row.tokens else None,
            token_stats={"logprob": list(row.logprobs)} if asked else {},
        )

    def pool(self, session: ToySession) -> list[RowView]:
        return [self._view(session, row) for row in session.in_pool]

    def rows(self, session: ToySession) -> list[RowView]:
        if self.fault == "the prompt counts per row":
            session.prompt_tokens = session.prompt.num_tokens * len(session.all_rows)
        return [self._view(session, row) for row in session.all_rows]

    def close(self, session: ToySession) -> None:
        if self.fault != "a closed session goes on":
            self.open_sessions.discard(session)

    def peak_bytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"engine": "toy", "device": "none", "promises": self.promises}
