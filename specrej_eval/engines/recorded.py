# torch-free
"""An engine whose rows were decoded before: what a strategy would have made of them, without the language model.

A row's tokens are a function of (seed, task, prompt, repeat, row), so the rows of one run to the end (Best-of-N) are
those that any other strategy, alpha or n would have begun; only where each of them is cut differs. The loop, the
strategies, the budget and the ledger's counts are the real ones. Seconds and memory are nobody's: both are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrej_eval.budget import Budget
from specrej_eval.config import SAMPLING, RunConfig
from specrej_eval.core import GenerationResult, Plan, Prompt, RowView, TokenStat, Trajectory
from specrej_eval.engines.base import Engine, EngineSession, Promise
from specrej_eval.engines.text import Detokenizer
from specrej_eval.errors import ConfigError, KVBudgetExceededError

Recorded = Mapping[tuple[str, str, int], GenerationResult]
"""(task, prompt hash, repeat) -> the finished request whose rows are to be used."""


def place_of(prompt: Prompt | GenerationResult) -> tuple[str, str, int]:
    """How a recorded request is found."""
    return prompt.task, prompt.prompt_hash, prompt.repeat


@dataclass(eq=False)
class RecordedSession(EngineSession):
    """One prompt being decoded again."""

    source: Sequence[Trajectory]
    budget: Budget
    visible: Callable[[RowView], str]
    tokens: list[int] = field(default_factory=list)
    """Of each row started."""
    live: list[int] = field(default_factory=list)
    in_pool: list[int] = field(default_factory=list)
    at_look: dict[int, int] = field(default_factory=dict)
    """Tokens that rows of the pool had when the round began."""
    peak: int = 0

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def tokens_since_look(self) -> int:
        return max((self.tokens[row] - self.at_look[row] for row in self.live), default=0)

    @property
    def kv_tokens_peak(self) -> int:
        return self.peak

    @property
    def held(self) -> int:
        return self.prompt_tokens + sum(self.tokens[row] for row in self.live)

    def has_ended(self, row: int) -> bool:
        return self.tokens[row] == self.source[row].num_tokens

    def view(self, row: int, *, ended: bool) -> RowView:
        """Args:
        ended: the row goes no further, whether it has finished or not.
        """
        tokens, source = self.tokens[row], self.source[row]
        if self.has_ended(row):
            return RowView(row, source.text, source.token_ids, source.finish_reason)
        partial = RowView(row, "", source.token_ids[:tokens], None)
        return RowView(row, self.visible(partial), partial.token_ids, "rejected" if ended else None)


class RecordedEngine(Engine):
    """Rows out of records.

    Args:
        recorded: finished requests of a run that rejected no row.
        text: shows partial rows, for a reward that reads them; None where scores are recorded too.
        promises: of the engine that decoded them.
        max_length: the model's context.
    """

    decodes = False

    def __init__(  # no tokenizer: prompts are tokenised already
        self,
        recorded: Recorded,
        *,
        text: Detokenizer | None = None,
        promises: Promise = "bits",
        max_length: int = 2**62,
    ) -> None:
        self.recorded = recorded
        self.text = text
        self.promises = promises
        self.max_length = max_length

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> RecordedSession:
        """See ``Engine.open``.

        Raises:
            ConfigError: what is recorded cannot stand for what would be decoded.
        """
        found = self.recorded.get(place_of(prompt))
        if found is None:
            raise ConfigError("a prompt has no rows on record.", hint="name the run that answered the same prompts.")
        check_usable(found, config, budget, until)
        if token_stats:
            raise ConfigError(
                f"the reward needs {', '.join(sorted(token_stats))} of each token, which records do not hold.",
                hint="rows for such a reward have to be decoded.",
            )
        detokenizer = self.text

        def visible(row: RowView) -> str:
            return "" if detokenizer is None else detokenizer.visible(row.token_ids, None, until)

        return RecordedSession(
            source=found.trajectories, budget=budget, visible=visible, prompt_tokens=prompt.num_tokens
        )

    def follow(self, session: RecordedSession, plan: Plan) -> None:
        if not set(plan.keep) <= set(session.live) or len(set(plan.keep)) < len(plan.keep):
            raise ConfigError(
                f"the strategy forks rows or takes up dropped ones ({plan}): their tokens are on no record.",
                hint="such a strategy has to be run.",
            )
        fresh = range(len(session.tokens), len(session.tokens) + plan.fresh)
        session.tokens += [0] * plan.fresh
        session.live = sorted([*plan.keep, *fresh])
        session.in_pool = list(session.live)
        session.at_look = {row: session.tokens[row] for row in session.live}
        session.peak = session.held

    def decode(self, sessions: Sequence[RecordedSession], num_tokens: int) -> None:
        """See ``Engine.decode``."""
        for _ in range(num_tokens):
            for session in sessions:
                self._step(session)
            if not all(session.live for session in sessions):
                return

    def _step(self, session: RecordedSession) -> None:
        for row in session.live:
            session.tokens[row] += 1
        held = session.held
        if held > session.budget.kv_budget_tokens:
            raise KVBudgetExceededError(f"{held} tokens held, the budget is {session.budget.kv_budget_tokens}")
        session.peak = max(session.peak, held)
        session.decode_tokens += len(session.live)
        session.live = [row for row in session.live if not session.has_ended(row)]

    def pool(self, session: RecordedSession) -> list[RowView]:
        return [session.view(row, ended=False) for row in session.in_pool]

    def rows(self, session: RecordedSession) -> list[RowView]:
        return [session.view(row, ended=True) for row in range(len(session.tokens))]

    def close(self, session: RecordedSession) -> None:
        session.live = []

    def peak_bytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"engine": "recorded", "promises": self.promises}


FIXED = (*SAMPLING, "max_gen_toks", "seed")
"""What decides a row's tokens, its models, prompt and number apart."""


def check_usable(found: GenerationResult, config: RunConfig, budget: Budget, until: tuple[str, ...]) -> None:
    """Whether recorded rows are those that would be decoded.

    Raises:
        ConfigError: too few of them, some were cut, or they were drawn with other arguments.
    """
    rows = found.trajectories
    if [row.row for row in rows] != list(range(len(rows))) or len(rows) < budget.n:
        raise ConfigError(
            f"n={budget.n} rows are needed, and {len(rows)} are on record for a prompt.",
            hint=f"ask for n={len(rows)} or fewer, or decode a run with more rows.",
        )
    if cut := [row.row for row in rows[: budget.n] if row.finish_reason == "rejected"]:
        raise ConfigError(
            f"row {cut[0]} of a prompt was rejected: how it would have gone on is on no record.",
            hint="name a run of Best-of-N (strategy=best_of_n, or alpha=0), whose rows all went to their end.",
        )
    now = {**{name: getattr(config, name) for name in FIXED}, "until": list(until)}
    for name, value in now.items():
        if name in found.resolved and found.resolved[name] != value:
            raise ConfigError(
                f"the rows on record were drawn with {name}={found.resolved[name]!r}, not {value!r}.",
                hint=f"leave {name} as it is: other rows would have to be decoded.",
            )
