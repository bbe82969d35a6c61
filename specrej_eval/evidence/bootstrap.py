"""Intervals by resampling prompts, and then seeds within each prompt: what chance alone would do to a number.

Percentile intervals (Efron & Tibshirani 1993, chapter 13). A prompt is the unit: its rows, methods and seeds go into a
resample together, so differences are paired. Seeds are drawn within each prompt, since a row's tokens are a function of
(seed, prompt, row): the draws of one seed on two prompts have nothing in common (two-level bootstrap, Davison & Hinkley
1997, section 3.8). Every number is made anew from each resample as a whole: a ratio is one of means, never a mean of
ratios.

With S seeds the intervals are on the wide side: what varies within a prompt counts 1 + (S - 1) / S times, since both
levels are drawn with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrej_eval.evidence import RESAMPLES

Array = NDArray[np.float64]

LEVEL = 0.95
BLOCK = 500
"""Resamples that are drawn and added up at a time."""
FEWEST = 5
"""Prompts below which an interval would say nothing."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval; ``low`` and ``high`` are None where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": _plain(self.value), "low": _plain(self.low), "high": _plain(self.high)}


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(slots=True)
class Bootstrap:
    """Resamples of ``prompts`` x ``seeds`` values, the same ones for whatever is asked of them.

    Args:
        seed: of the resampling.
    """

    prompts: int
    seeds: int = 1
    resamples: int = RESAMPLES
    seed: int = 0
    _counts: NDArray[np.int16] | None = field(default=None, repr=False)

    @property
    def counts(self) -> NDArray[np.int16]:
        """(resamples, prompts * seeds): how often each value counts in each resample; a row adds up to their number."""
        if self._counts is None:
            rng = np.random.default_rng(self.seed)
            self._counts = np.empty((self.resamples, self.prompts * self.seeds), np.int16)
            for start in range(0, self.resamples, BLOCK):  # what NumPy draws has eight bytes a number
                block = self._counts[start : start + BLOCK]
                drawn = rng.multinomial(self.prompts, np.full(self.prompts, 1 / self.prompts), len(block))
                if self.seeds > 1:  # each time a prompt is drawn, as many seeds as there are are drawn for it
                    of_seeds = rng.multinomial(drawn * self.seeds, np.full(self.seeds, 1 / self.seeds))
                    drawn = of_seeds.reshape(len(block), -1)
                block[:] = drawn
        return self._counts

    def means(self, values: Any) -> Array:
        """Means over prompts and seeds, in each resample.

        Args:
            values: (prompts, seeds, ...), or (prompts,) for one seed.

        Returns:
            (resamples, ...).
        """
        data = self._shaped(values)
        size = self.prompts * self.seeds
        flat = data.reshape(size, -1)
        blocks = range(0, self.resamples, BLOCK)  # in float64, and not all of them at a time
        found: Array = np.concatenate([self.counts[start : start + BLOCK] @ flat for start in blocks]) / size
        return found.reshape(self.resamples, *data.shape[2:])

    def interval(
        self, values: Any, statistic: Callable[[Array], Any] = lambda means: means, *, level: float = LEVEL
    ) -> Estimate:
        """A function of means, with its interval; no interval where the number itself is none (NaN).

        Args:
            values: as for ``means``.
            statistic: (..., features) means -> (...) numbers; by default the mean itself, for values without features.
        """
        data = self._shaped(values)
        value = float(np.asarray(statistic(data.mean(axis=(0, 1))[None]))[0])
        if self.prompts < FEWEST or math.isnan(value):
            return Estimate(value)
        spread = np.asarray(statistic(self.means(values)), dtype=float)
        spread = spread[~np.isnan(spread)]
        if not len(spread):
            return Estimate(value)
        # of the nearest resample, not between two: one of them may be infinite
        low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        return Estimate(value, float(low), float(high))

    def ratio(self, over: Any, under: Any) -> Estimate:
        """Ratio of two means."""
        pair = np.stack([self._shaped(over), self._shaped(under)], axis=-1)
        return self.interval(pair, lambda means: means[..., 0] / means[..., 1])

    def _shaped(self, values: Any) -> Array:
        data = np.asarray(values, dtype=float)
        if data.ndim == 1:
            data = data[:, None]
        if data.shape[:2] != (self.prompts, self.seeds):
            raise ValueError(f"values of {self.prompts} prompts x {self.seeds} seeds are needed, got {data.shape[:2]}")
        return data
