# torch-free
"""One prompt whose rows a server decodes: what came of each row, and how much of it counts by now.

Rows of one look count the same number of tokens, however far the server has gone on with some of them: tokens beyond
are kept, count from a later look on, or are overshoot if there is none.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Plan, Prompt, RowView, TokenStat, stream_key
from specrej_eval.engines.base import EngineSession
from specrej_eval.engines.servers.protocols.base import Delta
from specrej_eval.engines.servers.streams import RowStream
from specrej_eval.engines.text import Detokenizer
from specrej_eval.errors import KVBudgetExceededError, ModelError
from specrej_eval.http import BadAnswerError


@dataclass(eq=False, slots=True)
class Row:
    """One row as far as the server has told of it."""

    number: int
    ids: list[int] = field(default_factory=list)
    """All token ids it has, those that do not count yet included."""
    stats: dict[TokenStat, list[float]] = field(default_factory=dict)
    text: str = ""
    """Where the server gives no ids: what it wrote."""
    base: int = 0
    """Tokens it had at the last look."""
    end: int | None = None
    """Tokens at which it ends, once that is known."""
    reason: FinishReason | None = None
    looked_at: int = 0
    """Tokens that were looked at for an end."""
    requests: int = 0
    """Times it was asked for."""
    asked_with: int = 0
    """Tokens it had at the last request."""
    asked_for: int = 0
    """Most tokens of that request."""
    failures: int = 0
    """Requests in a row that brought nothing."""
    not_before: float = 0.0
    """When to ask again."""
    stream: RowStream | None = None

    @property
    def finished(self) -> bool:
        """Whether its end is known; it may count only later."""
        return self.end is not None

    def counted(self, taken: int) -> int:
        """Tokens that count, so many after the last look."""
        return self.base + taken if self.end is None else min(self.base + taken, self.end)


class Session(EngineSession):
    """A prompt and the records of all rows ever started.

    Args:
        until: stop strings.
        recorded: numbers kept of every token, besides its id.
        stop_ids: token ids that end an answer.
        may_stop: for each token id, whether it can complete a stop string; empty = none can.
        gives_ids: whether the server gives token ids; else rows come as text, and count when they are at their end.
    """

    def __init__(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...],
        recorded: tuple[TokenStat, ...],
        stop_ids: Collection[int],
        may_stop: Sequence[bool],
        detokenizer: Detokenizer,
        gives_ids: bool,
    ) -> None:
        super().__init__(prompt_tokens=prompt.num_tokens)
        self.prompt = prompt
        self.config = config
        self.recorded = recorded
        self.gives_ids = gives_ids
        self.max_gen_toks = budget.max_gen_toks
        self.live: list[Row] = []
        self.look_in = 0
        """Tokens each live row takes until the next look."""
        self.taken = 0
        """Tokens each live row has counted since the last look."""
        self.rows_started: list[Row] = []
        self._records: list[RowView] = []
        self._pool: list[Row] = []
        self._budget = budget
        self._until = until
        self._stop_ids = stop_ids
        self._may_stop = may_stop
        self._detokenizer = detokenizer
        self._key = stream_key(config.seed, prompt.task, prompt.prompt_hash, prompt.repeat)
        self._held_at: Counter[int] = Counter()
        """Tokens of rows held, by tokens counted since the last look, as if all rows were decoded together."""

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def tokens_since_look(self) -> int:
        return self.taken if self.live else 0

    @property
    def kv_tokens_peak(self) -> int:
        return self.prompt_tokens + max(self._held_at.values(), default=0)

    @property
    def overshoot_tokens(self) -> int:
        """Tokens the server was seen to decode that count in no row: of live rows, beyond what counts so far."""
        live = {row.number for row in self.live}
        return sum(
            len(row.ids) - (row.counted(self.taken) if row.number in live else self._records[row.number].num_tokens)
            for row in self.rows_started
        )

    @property
    def streams(self) -> list[RowStream]:
        """Requests in flight, of rows that are given up too."""
        return [row.stream for row in self.rows_started if row.stream is not None]

    # looks

    def follow(self, plan: Plan) -> list[Row]:
        """Keep, fork and start rows; returns those that go."""
        live = {row.number: row for row in self.live}
        kept: list[Row] = []
        forks = 0
        for number in plan.keep:
            row = live[number]
            if row in kept:  # a fork has a number of its own, else it would draw its parent's noise
                forks += 1
                row = self._forked(row, len(self.rows_started) + forks - 1)
            kept.append(row)
        goes = [row for row in self.live if row not in kept]
        fresh = [Row(number=len(self.rows_started) + forks + new) for new in range(plan.fresh)]
        held = sum(row.counted(self.taken) for row in kept)
        self._check(held)
        for row in goes:
            self._records[row.number] = self._view(row, "rejected")
        for row in kept:
            row.base = row.counted(self.taken)
        started = [row for row in kept if row.number >= len(self.rows_started)] + fresh
        self.rows_started += started
        self._records += [RowView(row.number, "", [], None) for row in started]
        self.live = sorted([*kept, *fresh], key=lambda row: row.number)
        self._pool = list(self.live)
        self.taken, self.look_in = 0, plan.num_tokens
        self._held_at = Counter({0: held})
        return goes

    def _forked(self, parent: Row, number: int) -> Row:
        count = parent.counted(self.taken)
        stats = {name: values[:count] for name, values in parent.stats.items()}
        return Row(number=number, ids=parent.ids[:count], stats=stats, base=count, looked_at=count)

    def pool(self) -> list[RowView]:
        """Rows of the look, as far as they count."""
        for row in self.live:
            self._records[row.number] = self._view(row, None)
        return [self._records[row.number] for row in self._pool]

    def rows(self) -> list[RowView]:
        """All rows."""
        return self._records

    # what comes in

    def seed_of(self, row: Row) -> int:
        """The noise of a row's next request: its own, and never the same again."""
        text = f"{self._key}\x1f{row.number}\x1f{row.requests}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def receive(self, row: Row, delta: Delta) -> bool:
        """Take in what a stream brought; whether it was something new.

        Raises:
            BadAnswerError: tokens are missing, differ from what was sent before, or are more than were asked for.
            ModelError: the server ended the row before it was at its end.
        """
        before = len(row.ids) + len(row.text)
        if not self.gives_ids:
            self._receive_text(row, delta)
            return len(row.ids) + len(row.text) > before
        received = len(row.ids) - row.asked_with
        ids = list(delta.token_ids)
        start = received if delta.total is None else delta.total - len(ids)
        again = row.ids[row.asked_with + start :] if 0 <= start <= received else None
        if again is None or again != ids[: len(again)]:
            raise BadAnswerError(f"row {row.number}: tokens are missing, or others than were sent before")
        if start + len(ids) > row.asked_for:
            raise BadAnswerError(f"row {row.number}: more than the {row.asked_for} tokens asked for")
        new = ids[len(again) :]
        for name in self.recorded:
            values = delta.stats.get(name, ())
            if new and len(values) != len(ids):
                raise BadAnswerError(f"row {row.number}: no {name} of each token")
            row.stats.setdefault(name, []).extend(values[len(again) :])
        row.ids += new
        self._look_for_end(row)
        if delta.finish == "stop" and row.end is None and row.ids:
            row.end, row.reason = len(row.ids), "eos"  # an end of the server's own: it stands last
        if delta.finish == "length" and row.end is None and len(row.ids) < row.asked_with + row.asked_for:
            raise ModelError(
                f"the server ended a row after {len(row.ids) - row.asked_with} of the {row.asked_for} tokens asked for.",
                hint="does its context hold prompt and answer? max_length= says how many tokens it holds.",
            )
        return len(row.ids) > before

    def _look_for_end(self, row: Row) -> None:
        for place in range(row.looked_at, len(row.ids)):
            if row.end is not None:
                return
            token, count = row.ids[place], place + 1
            row.looked_at = count
            if token in self._stop_ids:
                row.end, row.reason = count, "eos"
            elif (
                self._may_stop
                and (token >= len(self._may_stop) or self._may_stop[token])
                and self._detokenizer.stop_position(row.ids[:count], self._until) is not None
            ):
                row.end, row.reason = count, "stop"
            elif count >= self.max_gen_toks:
                row.end, row.reason = count, "length"

    def _receive_text(self, row: Row, delta: Delta) -> None:
        """Of a server that gives none, a row's ids are those of its text, tokenised here."""
        if row.end is not None:
            return
        row.text += delta.text
        stopped = any(stop in row.text for stop in self._until)
        if stopped or delta.finish in ("stop", "length"):
            row.ids = list(self._detokenizer.tokenizer.encode(row.text, add_special_tokens=False))
            row.end = len(row.ids)
            row.reason = "stop" if stopped else "eos" if delta.finish == "stop" else "length"

    def advance(self, most: int) -> None:
        """Let tokens count: as many on each live row, and at most ``most`` since the last look."""
        last = max((row.end - row.base for row in self.live if row.end is not None), default=0)
        open_rows = [len(row.ids) - row.base for row in self.live if row.end is None]
        steps = min([most, *open_rows]) if open_rows else min(most, last)
        for step in range(self.taken + 1, steps + 1):
            rows = [row for row in self.live if row.end is None or row.end >= row.base + step]
            self._held_at[step] = sum(row.base + step for row in rows)
            if self.gives_ids:
                self._check(self._held_at[step])
            self.decode_tokens += len(rows)
        self.taken = max(self.taken, steps)
        for row in [row for row in self.live if row.end is not None and row.end <= row.base + self.taken]:
            self._records[row.number] = self._view(row, row.reason)
            self.live.remove(row)

    def _check(self, held: int) -> None:
        """Raises:
        KVBudgetExceededError: so many tokens of rows beside the prompt are more than the budget.
        """
        total, limit = self.prompt_tokens + held, self._budget.kv_budget_tokens
        if total > limit:
            raise KVBudgetExceededError(f"{total} tokens held, the budget is {limit}")

    def _view(self, row: Row, reason: FinishReason | None) -> RowView:
        count = row.counted(self.taken)
        ids = row.ids[:count]
        stats: Mapping[TokenStat, list[float]] = {name: row.stats.get(name, [])[:count] for name in self.recorded}
        logprobs = stats.get("logprob")
        shown = None if reason == "rejected" else reason
        return RowView(
            row=row.number,
            text=self._detokenizer.visible(ids, shown, self._until) if self.gives_ids else self._cut(row.text),
            token_ids=ids,
            finish_reason=reason,
            mean_logprob=math.fsum(logprobs) / len(ids) if logprobs else None,
            token_stats=stats,
        )

    def _cut(self, text: str) -> str:
        return text[: min((at for at in (text.find(stop) for stop in self._until) if at >= 0), default=len(text))]
