"""The best of k rows, without bias, from n >= k rows of one prompt.

Every subset of k rows is as good a Best-of-k as any other; the mean over all of them is

    E_k = sum over i = k..n of x_(i) * C(i - 1, k - 1) / C(n, k)

with x_(1) <= ... <= x_(n). pass@k (Chen et al. 2021) is the special case of 0 and 1. Near k = n few subsets are left,
and E_n is a single draw of the best: ``steady`` says up to where the curve has averaged over something (n >= 4 k).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weights(n: int, k: int) -> Array:
    """(n,): the chance that the i-th smallest of n is the best of a random k, adding up to 1.

    Raises:
        ValueError: k is not in 1..n.
    """
    from scipy.special import gammaln

    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}")
    places = np.arange(k, n + 1)
    log_choose = gammaln(places) - gammaln(k) - gammaln(places - k + 1)
    log_all = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    found = np.zeros(n)
    found[k - 1 :] = np.exp(log_choose - log_all)
    return found


def curve(scores: Any, ks: Any = None, *, selected_by: Any = None) -> Array:
    """Expected score of the best of k, for each k.

    Args:
        scores: (..., n): what is reported of each row.
        ks: whole numbers in 1..n; None = all.
        selected_by: (..., n): what picks the best row (the reward), where it is not ``scores`` itself (accuracy). Rows
            that it gives one value are picked equally often.

    Returns:
        (..., number of ks).
    """
    data = np.asarray(scores, dtype=float)
    n = data.shape[-1]
    ordered = np.sort(data, axis=-1) if selected_by is None else _by(data, np.asarray(selected_by, dtype=float))
    table = np.stack([weights(n, int(k)) for k in (range(1, n + 1) if ks is None else ks)], axis=-1)  # (n, ks)
    found: Array = ordered @ table
    return found


def steady(n: int) -> int:
    """The largest k whose estimate rests on several subsets that have nothing in common."""
    return max(1, n // 4)


def _by(data: Array, keys: Array) -> Array:
    """``data`` in the order of ``keys``, averaged over rows of one key."""
    order = np.argsort(keys, axis=-1, kind="stable")
    data, keys = np.take_along_axis(data, order, -1), np.take_along_axis(keys, order, -1)
    flat, of = data.reshape(-1, data.shape[-1]).copy(), keys.reshape(-1, keys.shape[-1])
    for line, key in zip(flat, of, strict=True):
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        if len(starts) < len(key):
            sizes = np.diff(np.r_[starts, len(key)])
            line[:] = np.repeat(np.add.reduceat(line, starts) / sizes, sizes)
    return flat.reshape(data.shape)
