"""Best-of-N: n rows to their end, the best reward wins. Waves where n rows do not fit the budget together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, RowView
from specrej_eval.strategies.base import State, wave


@dataclass(frozen=True, slots=True)
class BestOfN:
    """No row is ever rejected; a row's tokens do not depend on the wave it ran in."""

    def init(self, budget: Budget) -> tuple[State, Plan]:
        state, plan = wave(State(), budget)
        assert plan is not None  # a budget holds at least one row, and n is at least 1
        return state, plan

    def step(
        self, state: State, rows: Sequence[RowView], scores: Sequence[float], budget: Budget
    ) -> tuple[State, Plan | None]:
        # every row of a wave has finished by its look
        return wave(state, budget)


def from_config(config: RunConfig) -> BestOfN:
    return BestOfN()  # n and the budget are all it has
