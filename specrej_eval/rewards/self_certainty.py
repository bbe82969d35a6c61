"""Self-certainty as the reward (Kang, Zhao & Song 2025, arXiv 2502.18581): how far from uniform the model's next-token
distributions are, as mean KL(uniform || p) over an answer's tokens. Costs no forward pass.

Where we differ from the authors' code: the distribution a token was *drawn from* counts, the first one included and the
one after the last token left out (theirs is off by one).
"""

from __future__ import annotations

import math

from specrej_eval.core import RowView, TokenStat
from specrej_eval.rewards.self_scores import SelfScore


class SelfCertainty(SelfScore):
    """Mean of the engine's per-token self-certainty, in nats; at least 0."""

    name = "self_certainty"
    needs_token_stats: tuple[TokenStat, ...] = ("self_certainty",)

    def _of(self, row: RowView) -> float:
        values = self._stat(row, "self_certainty")
        return math.fsum(values) / len(values)
