"""What rejection lost: the answer against the best of the same rows, had each gone to its end.

Rows are a function of (seed, prompt, row), so a run of Best-of-N on the same seed tells what became of the rows that
another strategy rejected. regret = max F - r >= 0; recall = whether the best row went to its end; z =
(r - mean F) / sd F, on the scale of the prompt's own rows (not their range: that is set by the worst one).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def regret(rewards: Any, finals: Any) -> Array:
    """Of each prompt.

    Args:
        rewards: (...,): of the answers.
        finals: (..., n): rewards of all rows at their ends.
    """
    found: Array = np.asarray(finals, dtype=float).max(axis=-1) - np.asarray(rewards, dtype=float)
    return found


def best_survived(finished: Any, finals: Any) -> Array:
    """1 where a row with the highest final reward went to its end, else 0.

    Args:
        finished: (..., n) of truth values: the row was not rejected.
        finals: (..., n).
    """
    ends = np.asarray(finals, dtype=float)
    best = ends == ends.max(axis=-1, keepdims=True)
    found: Array = (best & np.asarray(finished, dtype=bool)).any(axis=-1).astype(float)
    return found


def z_score(rewards: Any, finals: Any) -> Array:
    """(r - mean) / standard deviation of the prompt's rows; NaN where all score alike."""
    ends = np.asarray(finals, dtype=float)
    apart = ends.max(axis=-1) > ends.min(axis=-1)  # a deviation of equal numbers may be 1e-17
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (np.asarray(rewards, dtype=float) - ends.mean(axis=-1)) / ends.std(axis=-1, ddof=1)
    found: Array = np.where(apart, z, np.nan)
    return found
