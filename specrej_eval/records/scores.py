"""What a run scored on one task by one metric, as a whole and prompt by prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Score:
    """One number of a run, with what it is made of."""

    task: str
    metric: str
    filter: str
    value: float | None
    """None where not one prompt has a score."""
    stderr: float | None
    prompts: int | None = None
    """How many it is of; None where the record does not say."""
    prompts_in_all: int | None = None
    """How many the whole task has."""
    each: Mapping[str, float] = field(default_factory=dict)
    """Prompt (its hash, and which of equal ones it is) -> its own score."""
    scale: str = ""
    """Scores of different scales do not compare, such as two reward models' rewards."""

    @property
    def comparable(self) -> tuple[str, str, str, str]:
        """Equal for scores that may be held against each other where their prompts are the same."""
        return (self.task, self.metric, self.filter, self.scale)


def mean_score(each: Mapping[str, float], *, task: str, metric: str, scale: str = "", answered: int) -> Score:
    """The mean over prompts, and its standard error; ``answered`` prompts were asked in all."""
    values = list(each.values())
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = statistics.fmean(values) if values else None
    return Score(task, metric, "none", mean, stderr, len(values), answered, each, scale)
