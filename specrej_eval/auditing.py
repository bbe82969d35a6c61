"""What rejection cost: the rejected rows of some prompts, drawn at random, are decoded to their end (``audit``).

Prompts are drawn, and not single rows: the best of a prompt's rejected rows cannot be told from a few of them. (Under
draws of rows with probability pi, the unbiased estimator of "one of them is better than the answer" is
1 - (1 - 1/pi)^k for k such rows found: at 2 % it is 0, 50, -2400, ... . With prompts each number is exact, and the
mean of those drawn is unbiased.) Each rejected row has the same chance to be decoded, ``audit``, and rows of one prompt
decode together, so that an audit of 2 % costs about 2 % of what finishing all rows would.

A draw is a function of (seed, task, prompt, repeat) and ``audit``: batch, ranks and resumed runs draw the same prompts,
and a larger ``audit`` draws them and others. What the draw says is of *this run's* prompts; at ``audit=1`` it is exact.
No source: neither the paper nor its code has such a number. Standard library, and scipy where an interval is asked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from specrej_eval.core import Audit, GenerationResult, stream_key

FEWEST = 5
"""Prompts with a regret above 0 below which the mean regret gets no interval: their spread says too little."""
LEVEL = 0.95


def is_drawn(rate: float, *, seed: int, task: str, prompt_hash: str, repeat: int) -> bool:
    """Whether a prompt's rejected rows are decoded to their end. Its stream is apart from those of its rows."""
    return stream_key(seed, task, prompt_hash, repeat, purpose="audit") < rate * 2**63


@dataclass(slots=True)
class AuditSample:
    """What the audits of a run found, as it adds up over answers and ranks."""

    prompts: int = 0
    """Answers, those without an audit included."""
    rejecting: int = 0
    """Those with a rejected row: of the others it is known that rejection cost them nothing."""
    regrets: list[float] = field(default_factory=list)
    """Of the prompts audited among these."""
    rows: int = 0
    """Rejected rows decoded to their end."""
    rows_better: int = 0
    """Those of them that are better than the answer."""
    lost: int = 0
    """Prompts whose audit failed: taken as if they had not been drawn."""

    def count(self, rejected: int, audit: Audit | None) -> None:
        """One answer.

        Args:
            rejected: rows rejected for it.
        """
        self.prompts += 1
        self.rejecting += rejected > 0
        if audit is None or not rejected:
            return
        if audit.regret is None:
            self.lost += 1
            return
        self.regrets.append(audit.regret)
        self.rows += audit.num_rows
        self.rows_better += audit.better

    def add(self, other: AuditSample) -> Self:
        for name in ("prompts", "rejecting", "rows", "rows_better", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.regrets += other.regrets
        return self

    @classmethod
    def of(cls, results: Iterable[GenerationResult]) -> Self:
        found = cls()
        for result in results:
            found.count(result.ledger.rows_rejected, result.audit)
        return found

    def estimate(self) -> AuditEstimate | None:
        """What rejection cost this run; None if no prompt was audited, and one had rows rejected.

        With N prompts, R of them with rejected rows, of which m were drawn (a simple random sample, given m):

        - regret: (R / N) * mean of the m regrets, the Horvitz-Thompson estimator with m / R in the place of the
          inclusion probability (Hajek's; Sarndal, Swensson & Wretman 1992, section 5.7). Its interval is Hall's
          transformed t (P. Hall 1992, J. R. Stat. Soc. B 54, "On the removal of skewness by transformation"; regrets
          are many zeros and a tail) with the finite population correction sqrt(1 - m / R).
        - probability that the best row was rejected: (R / N) * x / m, x of the m with a regret above 0. Its interval
          is exact: all counts X among R for which neither tail of the hypergeometric distribution of x is below 2.5 %.
        """
        drawn = len(self.regrets)
        if not self.prompts or (self.rejecting and not drawn):
            return None  # (a run that rejects nothing is known to have lost nothing)
        share = self.rejecting / self.prompts
        lost = sum(regret > 0 for regret in self.regrets)
        regret = statistics.fmean(self.regrets) if drawn else 0.0
        around = _mean_interval(self.regrets, self.rejecting)
        counts = _count_interval(lost, drawn, self.rejecting)
        return AuditEstimate(
            prompts=self.prompts,
            prompts_rejecting=self.rejecting,
            prompts_audited=drawn,
            rows_audited=self.rows,
            rows_better=self.rows_better,
            prompts_lost=self.lost,
            regret=share * regret,
            regret_interval=None if around is None else (share * around[0], share * around[1]),
            best_rejected=share * lost / drawn if drawn else 0.0,
            best_rejected_interval=(counts[0] / self.prompts, counts[1] / self.prompts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEstimate:
    """What rejection cost a run, estimated. Intervals are 95 % ones, over which prompts were drawn."""

    prompts: int
    prompts_rejecting: int
    prompts_audited: int
    rows_audited: int
    rows_better: int
    prompts_lost: int
    regret: float
    """Mean over all prompts of how much better the best rejected row would have been than the answer, 0 where none."""
    regret_interval: tuple[float, float] | None
    """None where too few regrets are above 0."""
    best_rejected: float
    """Share of the prompts whose best row was rejected."""
    best_rejected_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "regret_interval": None if self.regret_interval is None else list(self.regret_interval),
            "best_rejected_interval": list(self.best_rejected_interval),
        }

    def __str__(self) -> str:
        exact = self.prompts_audited == self.prompts_rejecting
        low, high = self.best_rejected_interval
        told = f"the best row was rejected for {self.best_rejected:.1%} of prompts"
        told += "" if exact else f" (95 % interval {low:.1%} to {high:.1%})"
        told += f", mean regret {self.regret:.3f}"
        if not exact:
            found = self.regret_interval
            told += " (too few for an interval)" if found is None else f" ({found[0]:.3f} to {found[1]:.3f})"
        told += f"; audited: {self.rows_audited:,} rows of {self.prompts_audited:,} prompts"
        told += "" if exact else f" among {self.prompts_rejecting:,}"
        return told + (f", {self.prompts_lost} more could not be" if self.prompts_lost else "")


def of_totals(found: Any) -> AuditEstimate | None:
    """The inverse of ``to_dict``, of a record that may be of an older version, or damaged; then None."""
    try:
        names = AuditEstimate.__slots__
        pairs = {name: found[name] and tuple(map(float, found[name])) for name in names if name.endswith("_interval")}
        return AuditEstimate(**{**{name: found[name] for name in names}, **pairs})
    except (TypeError, KeyError, ValueError):
        return None


def _count_interval(found: int, drawn: int, among: int) -> tuple[int, int]:
    """How many of ``among`` there can be, if ``found`` of ``drawn`` were found: at least 95 % coverage."""
    if drawn >= among:
        return found, found
    import numpy as np
    from scipy.stats import hypergeom

    tail = (1 - LEVEL) / 2
    counts = np.arange(found, among - (drawn - found) + 1)
    likely = hypergeom.sf(found - 1, among, counts, drawn) > tail
    likely &= hypergeom.cdf(found, among, counts, drawn) > tail
    return int(counts[likely].min()), int(counts[likely].max())


def _mean_interval(values: Sequence[float], among: int) -> tuple[float, float] | None:
    """Of the mean of ``among`` numbers at least 0, of which ``values`` were drawn."""
    drawn = len(values)
    mean = statistics.fmean(values) if values else 0.0
    if drawn >= among:
        return mean, mean
    if sum(value > 0 for value in values) < FEWEST:
        return None
    from scipy.special import stdtrit

    spread = statistics.stdev(values)
    scale = spread * math.sqrt((1 - drawn / among) / drawn)
    skew = statistics.fmean(((value - mean) / spread) ** 3 for value in values) if spread else 0.0
    quantile = float(stdtrit(drawn - 1, (1 + LEVEL) / 2))
    bend = skew / math.sqrt(drawn)
    low, high = mean - _hall(quantile, bend) * scale, mean - _hall(-quantile, bend) * scale
    return max(0.0, low), high


def _hall(quantile: float, bend: float) -> float:
    """The inverse of g(T) = T + bend T^2 / 3 + bend^2 T^3 / 27 + bend / 6."""
    if abs(bend) < 1e-9:
        return quantile
    return 3 / bend * (math.cbrt(1 + bend * (quantile - bend / 6)) - 1)
