"""Speculative Rejection (Sun et al., NeurIPS 2024, arXiv 2410.20290, Algorithm 1).

As many rows as the budget starts; decode until it is full; score the partial answers; drop the worst alpha; go on.

We differ from the paper and its code where they are silent or lose rows:

- the pool of a look is the rows live when the round began; a row that finished earlier never ranks again (the code
  ranks it in every later round, so the share of *live* rows cut is not alpha);
- the best ``n - floor(alpha * n)`` stay, ties by row index (the paper cuts at a quantile, the code rounds half to even,
  which for one row keeps none and returns a truncated answer);
- a row that finished is archived whatever its rank (in the code it is lost if it falls under the cut);
- if the survivors cannot each take one more token, the worst of them are dropped until they can (the code then scores
  after every token until memory runs out);
- alpha = 0 is Best-of-N, token for token (the paper says so; in the code it is not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, RowView
from specrej_eval.strategies.base import State, wave


@dataclass(frozen=True, slots=True)
class SpeculativeRejection:
    alpha: Fraction

    def init(self, budget: Budget) -> tuple[State, Plan]:
        if self.alpha == 0:
            state, plan = wave(State(), budget)
            assert plan is not None  # a budget holds at least one row, and n is at least 1
            return state, plan
        return State(rows_started=budget.n), Plan(keep=(), fresh=budget.n, num_tokens=budget.first_look)

    def step(
        self, state: State, rows: Sequence[RowView], scores: Sequence[float], budget: Budget
    ) -> tuple[State, Plan | None]:
        if self.alpha == 0:
            return wave(state, budget)
        ranked = sorted(range(len(rows)), key=lambda index: (-scores[index], rows[index].row))
        best = ranked[: len(rows) - floor(self.alpha * len(rows))]
        # never empty while nothing has finished: alpha < 1 keeps at least one row, and it is live
        live = [index for index in best if not rows[index].finished]
        if not live:
            return state, None
        tokens = rows[live[0]].num_tokens  # live rows all have one length
        live = live[: budget.max_rows(tokens + 1)]
        keep = tuple(sorted(rows[index].row for index in live))
        return state, Plan(keep=keep, fresh=0, num_tokens=budget.next_look(len(keep)) - tokens)


def from_config(config: RunConfig) -> SpeculativeRejection:
    return SpeculativeRejection(alpha=config.alpha_fraction)
