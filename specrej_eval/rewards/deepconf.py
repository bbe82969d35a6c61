"""DeepConf's lowest-window confidence as the reward (Fu et al. 2025, arXiv 2508.15260). Costs no forward pass.

A token's confidence is minus the mean log-prob of the 20 likeliest tokens; an answer is as good as its least sure
stretch: the smallest mean over a sliding window (``deepconf_window``; the paper's 2048 is made for traces of tens of
thousands of tokens). An answer shorter than the window is one window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from specrej_eval.core import RowView, TokenStat
from specrej_eval.rewards.self_scores import Floor, SelfScore


class DeepConf(SelfScore):
    """Lowest window mean of the engine's per-token confidence, in nats."""

    name = "deepconf"
    needs_token_stats: tuple[TokenStat, ...] = ("confidence",)

    def __init__(self, floor: Floor | None = None, *, window: int = 64) -> None:
        super().__init__(floor)
        self.window = window

    def _of(self, row: RowView) -> float:
        return lowest_window(self._stat(row, "confidence"), self.window)


def lowest_window(values: Sequence[float], window: int) -> float:
    """Smallest mean of ``window`` values in a row; of all values if there are fewer."""
    size = min(window, len(values))
    return min(math.fsum(values[start : start + size]) for start in range(len(values) - size + 1)) / size
