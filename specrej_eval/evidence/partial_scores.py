"""How well the score of an unfinished answer tells its final one: per prompt and look, never pooled over prompts.

Pooled, prompts that are easy as a whole make any score look good (Simpson). Pearson and Kendall's tau-b are those of
the paper's appendix B; the AUC says how well partial scores pick out the rows that end in the best tenth; recall, how
often the row that ends best is among those a look would keep. Rows that a look no longer has were rejected by earlier
ones: correlations among survivors are smaller than among all rows, and are told apart by their look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ONE_IN = 10
"""One of so many rows of a prompt counts as its best, rounded up."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the rows of one prompt at one look; None where rows or scores are too few or all alike."""

    rows: int
    pearson: float | None
    kendall: float | None
    auc: float | None
    recall: float | None
    """1 if the row that ends best is among the best ``keep`` partial scores, else 0."""


def agreement(partial: Sequence[float], final: Sequence[float], *, keep: int) -> Agreement:
    """Args:
    partial, final: (rows,) each, of one prompt.
    keep: rows that the look keeps.
    """
    from scipy import stats

    early, late = np.asarray(partial, dtype=float), np.asarray(final, dtype=float)
    if len(early) < 2:
        return Agreement(len(early), None, None, None, None)
    vary = np.ptp(early) > 0 and np.ptp(late) > 0  # a deviation of equal numbers may be 1e-17
    best = late >= np.sort(late)[len(late) - -(-len(late) // ONE_IN)]
    auc = None
    if 0 < best.sum() < len(best):
        ranks = stats.rankdata(early)
        wins = ranks[best].sum() - best.sum() * (best.sum() + 1) / 2
        auc = float(wins / (best.sum() * (~best).sum()))
    kept = np.argsort(-early, kind="stable")[:keep]
    return Agreement(
        rows=len(early),
        pearson=float(np.corrcoef(early, late)[0, 1]) if vary else None,
        kendall=float(stats.kendalltau(early, late).statistic) if vary else None,
        auc=auc,
        recall=float(bool((late[kept] == late.max()).any())),
    )


def over_prompts(found: Sequence[Agreement]) -> dict[str, Any]:
    """Mean and quartiles over prompts of each number."""
    told: dict[str, Any] = {"prompts": len(found), "rows": float(np.mean([each.rows for each in found]))}
    for name in ("pearson", "kendall", "auc", "recall"):
        values = [value for each in found if (value := getattr(each, name)) is not None]
        told[name] = None
        if values:
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            told[name] = {
                "mean": float(np.mean(values)),
                "quartiles": [float(low), float(middle), float(high)],
                "prompts": len(values),
            }
    return told
