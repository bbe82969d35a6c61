# torch-free
"""Sessions of engines whose rows run ahead of a look: they cannot stop every row at the very token.

Such an engine decodes until each live row has reached the look, or its end; some have gone on by then. A look sees
exactly each row's first t tokens. What lies behind them is kept: they are the row's next tokens. Where a row ends is
known as soon as its tokens are, and counts when the look comes to it. So rows, rounds and budgets are those of rows
that all decode together.
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
from specrej_eval.engines.text import Detokenizer
from specrej_eval.errors import KVBudgetExceededError


def row_seed(key: int, row: int) -> int:
    """A row's own 63-bit seed, of its prompt's ``core.stream_key`` and its number: no two rows share one."""
    return int.from_bytes(hashlib.sha256(f"{key}\x1f{row}".encode()).digest()[:8], "big") >> 1


@dataclass(eq=False, slots=True)
class Row:
    """One row: the tokens the engine has given of it, and how many of them count."""

    row: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    """Up to its end, if that is known."""
    stats: dict[TokenStat, list[float]] = field(default_factory=dict)
    """One number for each of ``tokens``."""
    inherited: int = 0
    """Tokens that a fork has from its parent."""
    counted: int = 0
    """Tokens that looks know of; the rest is ahead."""
    counted_at_look: int = 0
    ahead_at_look: int = 0
    """Tokens ahead at the last look, which have been counted as overshoot."""
    end: FinishReason | None = None
    """Why its last token is the last, known ahead of ``finish_reason``."""
    rejected: bool = False

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.rejected:
            return "rejected"
        return self.end if self.end is not None and self.counted == len(self.tokens) else None

    @property
    def live(self) -> bool:
        return self.finish_reason is None

    @property
    def ahead(self) -> int:
        return len(self.tokens) - self.counted


class AheadSession(EngineSession):
    """One prompt, and all rows ever started.

    Args:
        until: stop strings.
        recorded: what is kept of every token, besides its id.
        eos_ids: what ends a row.
    """

    def __init__(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...],
        recorded: Collection[TokenStat],
        eos_ids: Collection[int],
        detokenizer: Detokenizer,
    ) -> None:
        super().__init__(prompt_tokens=prompt.num_tokens)
        self.prompt = prompt
        self.config = config
        self.recorded = tuple(sorted(recorded))
        self.all_rows: list[Row] = []
        self._in_pool: list[Row] = []
        """Rows live at the last ``follow``."""
        self._until = until
        self._may_stop = detokenizer.may_complete(until, len(detokenizer.tokenizer)) if until else []
        self._eos_ids = frozenset(eos_ids)
        self._budget = budget
        self._detokenizer = detokenizer
        self._key = stream_key(config.seed, prompt.task, prompt.prompt_hash, prompt.repeat)
        self._held_at: Counter[int] = Counter()
        """Suffix tokens held, by tokens counted since the last look."""
        self._taken = 0
        """Tokens counted since the last look, by rows that are live."""

    @property
    def live(self) -> list[Row]:
        """Rows that go on, in row order."""
        return [row for row in self._in_pool if row.live]

    @property
    def num_live(self) -> int:
        return sum(row.live for row in self._in_pool)

    @property
    def tokens_since_look(self) -> int:
        return self._taken if self.num_live else 0

    @property
    def kv_tokens_peak(self) -> int:
        return self.prompt_tokens + max(self._held_at.values(), default=0)

    # looks

    def follow(self, plan: Plan) -> tuple[list[Row], list[Row]]:
        """Keep, fork and start rows.

        Returns:
            Rows that are new, forks among them; and rows that were rejected.
        """
        live = {row.row: row for row in self._in_pool if row.live}
        kept: list[Row] = []
        started: list[Row] = []
        known = len(self.all_rows)
        seen: set[int] = set()
        for name in plan.keep:
            parent = live[name]
            if name not in seen:
                kept.append(parent)
            else:  # a fork gets a number of its own, else it would draw its parent's tokens again
                started.append(self._fork(parent, known + len(started)))
            seen.add(name)
        fresh = [known + len(started) + new for new in range(plan.fresh)]
        started += [self._fork(None, number) for number in fresh]
        held = sum(row.counted for row in (*kept, *started))
        self._check_budget(held)
        rejected = [row for row in live.values() if row.row not in seen]
        for row in rejected:
            row.rejected = True
        for row in self._in_pool:
            new = row.ahead - row.ahead_at_look
            self.overshoot_tokens += max(0, new)
            row.ahead_at_look = row.ahead
            if row.rejected:
                self.discarded_tokens += row.ahead
        self.all_rows += started
        self._in_pool = sorted((*kept, *started), key=lambda row: row.row)
        for row in self._in_pool:
            row.counted_at_look = row.counted
        self._held_at = Counter({0: held})
        self._taken = 0
        return started, rejected

    def _fork(self, parent: Row | None, number: int) -> Row:
        tokens = [] if parent is None else parent.tokens[: parent.counted]
        stats = {name: [] if parent is None else parent.stats[name][: parent.counted] for name in self.recorded}
        count = len(tokens)
        return Row(number, row_seed(self._key, number), tokens, stats, inherited=count, counted=count)

    def pool(self) -> list[RowView]:
        """Rows of the look."""
        return [self._view(row) for row in self._in_pool]

    def rows(self) -> list[RowView]:
        """All rows ever started."""
        return [self._view(row) for row in self.all_rows]

    def _view(self, row: Row) -> RowView:
        ids, reason = row.tokens[: row.counted], row.finish_reason
        stats: Mapping[TokenStat, Sequence[float]] = {
            name: numbers[: row.counted] for name, numbers in row.stats.items()
        }
        logprobs = stats.get("logprob")
        return RowView(
            row=row.row,
            text=self._detokenizer.visible(ids, None if reason == "rejected" else reason, self._until),
            token_ids=ids,
            finish_reason=reason,
            mean_logprob=math.fsum(logprobs) / len(ids) if logprobs else None,
            token_stats=stats,
        )

    # tokens

    def receive(self, row: Row, token_ids: Sequence[int], stats: Mapping[TokenStat, Sequence[float]]) -> bool:
        """Tokens that the engine has decoded of a row, in order; what comes behind its end is thrown away.

        Returns:
            Whether the row has come to its end.
        """
        for place, token in enumerate(token_ids):
            if row.end is not None or row.rejected:
                self.discarded_tokens += len(token_ids) - place
                break
            row.tokens.append(token)
            for name in self.recorded:
                row.stats[name].append(stats[name][place])
            row.end = self._end(row.tokens)
        return row.end is not None

    def _end(self, tokens: list[int]) -> FinishReason | None:
        """Why the last of ``tokens`` is a row's last."""
        last = tokens[-1]
        if last in self._eos_ids:
            return "eos"
        may_stop = bool(self._may_stop) and (last >= len(self._may_stop) or self._may_stop[last])
        if may_stop and self._detokenizer.stop_position(tokens, self._until) is not None:
            return "stop"
        return "length" if len(tokens) >= self._budget.max_gen_toks else None

    def ends_in(self) -> int | None:
        """Tokens after which no row is live any more; None while some row's end is not known."""
        live = self.live
        return None if any(row.end is None for row in live) else max((row.ahead for row in live), default=0)

    def is_there(self, num_tokens: int) -> bool:
        """Whether every live row has ``num_tokens`` tokens ahead, or its end."""
        return all(row.end is not None or row.ahead >= num_tokens for row in self._in_pool if row.live)

    def advance(self, num_tokens: int) -> None:
        """So many tokens of each live row count, or those up to its end. All of them are there.

        Raises:
            KVBudgetExceededError: more tokens would be held than the budget allows.
        """
        live = self.live
        takes = [min(num_tokens, row.ahead) for row in live]
        lengths = [row.counted for row in live]
        for step in range(1, max(takes, default=0) + 1):
            there = [length + step for length, take in zip(lengths, takes, strict=True) if take >= step]
            self._held_at[self._taken + step] += sum(there)
            self._check_budget(sum(there))
        for row, take in zip(live, takes, strict=True):
            row.counted += take
            row.ahead_at_look = max(0, row.ahead_at_look - take)
        self.decode_tokens += sum(takes)
        self._taken += num_tokens

    def _check_budget(self, suffix_tokens: int) -> None:
        held, limit = self.prompt_tokens + suffix_tokens, self._budget.kv_budget_tokens
        if held > limit:
            raise KVBudgetExceededError(f"{held} tokens would be held; the KV budget is {limit}.")


def steps_to_take(sessions: Sequence[AheadSession], num_tokens: int) -> int:
    """Of the ``num_tokens`` steps of ``Engine.decode``, those before the first session has no live row left.

    It is known for certain once ``is_there`` holds for it in all sessions.
    """
    ends = [end for session in sessions if (end := session.ends_in()) is not None]
    return min([num_tokens, *ends])
