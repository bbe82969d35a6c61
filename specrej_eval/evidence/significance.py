"""How likely a difference as large is by chance: sign flips over prompts, and Holm's correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FLIPS = 9_999
BATCH = 500
"""Flips that are in memory at a time: each takes some 20 bytes a prompt."""


def sign_flip(differences: Any, *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of a mean difference: the share of sign flips of the prompts that give one at least as large.

    Under the hypothesis that both methods do alike, a prompt's difference is as likely to have the other sign (Fisher
    1935). All 2^prompts flips where there are few enough, else ``flips`` random ones, the one observed counted in
    (Phipson & Smyth 2010), so that p is never 0. By ``scipy.stats.permutation_test``.

    Args:
        differences: (prompts,), or (prompts, seeds): then of the means over seeds, since prompts are the unit.
    """
    from scipy import stats

    data = np.asarray(differences, dtype=float)
    data = data.mean(axis=1) if data.ndim > 1 else data
    if len(data) < 2 or not np.any(data):
        return 1.0
    found = stats.permutation_test(
        (data,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=flips,
        batch=BATCH,
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for being several (Holm 1979): the i-th smallest of m times m - i + 1, never falling."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        found[place] = highest
    return found
