"""The improvement score of the paper's figure 3 (arXiv 2410.20290, section 5), so that its readers find it.

Its two others are ratios of seconds: relative compute, T / T of Best-of-N with the smallest n, and speedup, T of
Best-of-N with the largest n / T (a statement about that n, not about an equal reward). Its code extrapolates beyond the
largest N and divides by zero where all rows score alike. Neither is done here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def improvement_score(rewards: Any, rows: Any) -> Array:
    """100 * (1 - (max Z - r) / (max Z - min Z)) of each prompt; 100 = the reward of the reference's best row.

    The scale is the range of the reference's rows: noisy, larger for more rows, and set by its worst one. NaN where
    all rows score alike.

    Args:
        rewards: (...,): r, of the method.
        rows: (..., n): Z, rewards of all rows of the reference (Best-of-N with the smallest n).
    """
    r, z = np.asarray(rewards, dtype=float), np.asarray(rows, dtype=float)
    highest, lowest = z.max(axis=-1), z.min(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(highest > lowest, 100 * (1 - (highest - r) / (highest - lowest)), np.nan)
    return found
