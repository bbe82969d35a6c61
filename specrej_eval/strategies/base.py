"""What a strategy is: frozen parameters, a small state, and ``init``/``step`` that return a ``Plan``.

A strategy owns no loop and no tensor. ``step`` is called at each look with the rows of the pool (those live when the
round began, the ones that finished in it included, in row order) and one score per row, higher is better.
Rows that finished are archived by the generator, exactly once, whatever a strategy says of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, RowView


@dataclass(frozen=True, slots=True)
class State:
    """What a strategy remembers between looks."""

    rows_started: int = 0


class Strategy(Protocol):
    def init(self, budget: Budget) -> tuple[State, Plan]:
        """The first plan."""

    def step(
        self, state: State, rows: Sequence[RowView], scores: Sequence[float], budget: Budget
    ) -> tuple[State, Plan | None]:
        """The next plan, or None: nothing is left to decode."""


def wave(state: State, budget: Budget) -> tuple[State, Plan | None]:
    """As many fresh rows as can finish within the budget, until n rows have been started."""
    fresh = min(budget.rows_to_the_end, budget.n - state.rows_started)
    if fresh == 0:
        return state, None
    return State(rows_started=state.rows_started + fresh), Plan(keep=(), fresh=fresh, num_tokens=budget.max_gen_toks)


def make_strategy(config: RunConfig) -> Strategy:
    """The strategy named by ``config.strategy``.

    Raises:
        ConfigError: no such strategy; the nearest name is suggested.
    """
    from specrej_eval import registry

    module = registry.load_module("specrej_eval.strategies", config.strategy, argument="strategy")
    strategy: Strategy = module.from_config(config)
    return strategy
