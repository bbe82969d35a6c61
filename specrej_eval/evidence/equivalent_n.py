"""Equivalent N: the number of rows with which Best-of-N has the mean reward that another method has.

N_eq = k with mean over prompts of E_k = the method's mean reward, E_k the unbiased curve of ``best_of_k``, read off
linearly in log k between whole k. It is never extrapolated: above the curve it is "at least n" (infinity here), below
it "less than 1" (0 here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrej_eval.evidence.bootstrap import Bootstrap, Estimate

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EquivalentN:
    """What a reader is told."""

    estimate: Estimate
    most: int
    """Rows of the curve: beyond them nothing is known."""

    def to_dict(self) -> dict[str, Any]:
        """``value`` None with ``at_least`` or ``below``: off the curve. So are the ends of the interval."""
        told: dict[str, Any] = {"most": self.most}
        for name in ("value", "low", "high"):
            told[name] = _read(getattr(self.estimate, name), self.most)
        return told

    def __str__(self) -> str:
        low, high = self.estimate.low, self.estimate.high
        ends = "" if low is None or high is None else f" [{self._end(low)}, {self._end(high)}]"
        return f"{self._end(self.estimate.value)}{ends}"

    def _end(self, value: float) -> str:
        return "< 1" if value == 0 else f"≥ {self.most}" if np.isinf(value) else f"{value:.1f}"


def _read(value: float | None, most: int) -> Any:
    if value is None or np.isnan(value):
        return None
    return {"below": 1} if value == 0 else {"at_least": most} if np.isinf(value) else float(value)


def at(means: Any, curves: Any) -> Array:
    """N_eq of mean rewards; 0 below the curve, infinity above it.

    Args:
        means: (...,).
        curves: (..., n): mean E_k for k = 1..n, which never falls.
    """
    levels, lines = np.asarray(means, dtype=float), np.asarray(curves, dtype=float)
    n = lines.shape[-1]
    # sums of rounded numbers: what equals an end of the curve but for its last bits is on it
    slack = 1e-9 * np.maximum(1.0, np.abs(lines).max(axis=-1))
    above = np.clip((lines < levels[..., None]).sum(axis=-1), 1, max(1, n - 1))[..., None]
    low, high = (np.take_along_axis(lines, np.minimum(place, n - 1), -1)[..., 0] for place in (above - 1, above))
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.clip(np.where(high > low, (levels - low) / (high - low), 0.0), 0.0, 1.0)
    below = above[..., 0].astype(float)
    found = np.exp(np.log(below) + part * (np.log(below + 1) - np.log(below))) if n > 1 else np.ones(levels.shape)
    found = np.where(levels < lines[..., 0] - slack, 0.0, found)
    whole: Array = np.where(levels > lines[..., -1] + slack, np.inf, found)
    return whole


def equivalent_n(rewards: Any, curves: Any, bootstrap: Bootstrap) -> EquivalentN:
    """N_eq with its interval: curve and mean are made anew in each resample.

    Args:
        rewards: (prompts, seeds) of the method.
        curves: (prompts, seeds, n): E_k of each prompt's pool.
    """
    rewards, curves = np.asarray(rewards, dtype=float), np.asarray(curves, dtype=float)
    together = np.concatenate([rewards[..., None], curves], axis=-1)
    found = bootstrap.interval(together, lambda means: at(means[..., 0], means[..., 1:]))
    return EquivalentN(found, curves.shape[-1])
