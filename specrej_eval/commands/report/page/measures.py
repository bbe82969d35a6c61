"""What a page's charts and tables say: measures over the prompts of each method, by the functions of ``evidence``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from specrej_eval.commands.report.page.data import REWARD, Key, Method, Metric, PageData
from specrej_eval.core import Trajectory
from specrej_eval.evidence.bootstrap import Bootstrap, Estimate
from specrej_eval.evidence.partial_scores import Agreement, agreement

RESAMPLES = 4_000
MOST_DOTS = 1_500
"""Rows drawn in a scatter."""


def is_share(values: Sequence[float]) -> bool:
    """Whether scores are shares, as accuracy is: all in [0, 1], and some at an end."""
    return all(0 <= value <= 1 for value in values) and any(value in (0, 1) for value in values)


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean over prompts and its 95 % interval: Wilson's for zeros and ones, else by bootstrap over prompts."""
    if len(values) >= 5 and set(values) <= {0.0, 1.0}:
        return Estimate(statistics.fmean(values), *wilson(sum(values), len(values)))
    return resampled(len(values)).interval(list(values))


@lru_cache(maxsize=4)
def resampled(prompts: int) -> Bootstrap:
    """The resamples of so many prompts: they are drawn once, whatever they are asked."""
    return Bootstrap(prompts, resamples=RESAMPLES)


def wilson(hits: float, number: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right near 0 and 1, where a normal one goes beyond."""
    share = hits / number
    centre = share + z * z / (2 * number)
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return (centre - reach) / (1 + z * z / number), (centre + reach) / (1 + z * z / number)


@dataclass(frozen=True, slots=True)
class Spend:
    """Means over the prompts of one task; None where records do not say."""

    decode_tokens: float
    reward_tokens: float
    prompt_tokens: float
    flops: float | None
    seconds: float | None
    """Of the answers that were measured; None if none was."""
    scoring_seconds: float | None
    rows: float
    rejected_share: float


@lru_cache(maxsize=256)
def spend(method: Method, task: str) -> Spend | None:
    """What an answer costs on average; None without answers."""
    answers = [answer for _, answer in method.of_task(task)]
    if not answers:
        return None
    costs = [method.cost(answer) for answer in answers]
    timed = method.measured(task)
    operations = [cost.flops for cost in costs if cost.flops is not None]
    started = sum(answer.ledger.rows_started for answer in answers)
    return Spend(
        decode_tokens=statistics.fmean(cost.decode_tokens for cost in costs),
        reward_tokens=statistics.fmean(cost.reward_tokens for cost in costs),
        prompt_tokens=statistics.fmean(cost.prompt_tokens for cost in costs),
        flops=statistics.fmean(operations) if len(operations) == len(costs) else None,
        seconds=statistics.fmean(ledger.total_seconds for ledger in timed) if timed else None,
        scoring_seconds=statistics.fmean(ledger.seconds.get("reward", 0.0) for ledger in timed) if timed else None,
        rows=started / len(answers),
        rejected_share=sum(answer.ledger.rows_rejected for answer in answers) / started if started else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """Two methods on the prompts that both answered."""

    method: str
    baseline: str
    metric: Metric
    estimate: Estimate
    prompts: int


def differences(data: PageData, baseline: Method) -> list[Difference]:
    """Of each method to the baseline on its own seed, where there is one; prompt by prompt, with intervals by bootstrap
    over prompts."""
    found = []
    of_seed = {m.seed: m for m in reversed(data.methods) if m.run.label == baseline.run.label} | {
        baseline.seed: baseline
    }
    for metric in data.metrics:
        for method in data.methods:
            rival = of_seed.get(method.seed, baseline)
            ours, theirs = method.each(metric), rival.each(metric)
            both = [key for key in theirs if key in ours]
            if method is rival or not both or not comparable(metric, method, rival):
                continue
            gaps = [ours[key] - theirs[key] for key in both]
            estimate = resampled(len(gaps)).interval(gaps)
            found.append(Difference(method.short, rival.short, metric, estimate, len(both)))
    return found


def comparable(metric: Metric, one: Method, other: Method) -> bool:
    """Rewards compare where one reward model gave them."""
    return metric.name != REWARD or one.reward_scale == other.reward_scale


def survival(method: Method, task: str) -> list[tuple[float, float]]:
    """(tokens, share of the rows started that no look has rejected by then), prompts weighted alike."""
    drops: dict[int, float] = {}
    longest = number = 0
    for _, answer in method.of_task(task):
        if not answer.ledger.rows_started or not answer.rounds:
            continue
        number += 1
        for round_ in answer.rounds:
            longest = max(longest, round_.tokens)
            if round_.rejected:
                drops[round_.tokens] = drops.get(round_.tokens, 0.0) + round_.rejected / answer.ledger.rows_started
    if not number:
        return []
    points, left = [(0.0, 1.0)], 1.0
    for tokens in sorted(drops):
        left -= drops[tokens] / number
        points.append((float(tokens), left))
    return _thinned([*points, (float(longest), left)])


def _thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """A step curve without steps too small to be seen, its last point kept."""
    reach = points[-1][0] or 1.0
    kept: dict[int, tuple[float, float]] = {}
    for point in points:
        kept[int(point[0] / reach * most)] = point
    return [points[0], *(point for point in kept.values() if point != points[0])]


@dataclass(frozen=True, slots=True)
class Look:
    """Means over the prompts that had so many looks."""

    number: int
    prompts: int
    tokens: float
    rows: float
    finished: float
    rejected: float
    kept: float
    cut: float | None
    kv_tokens: float


def looks(method: Method, task: str, most: int = 12) -> list[Look]:
    """Look by look; at most the first ``most``."""
    found = []
    every = [answer.rounds for _, answer in method.of_task(task)]
    for number in range(min(most, max(map(len, every), default=0))):
        here = [rounds[number] for rounds in every if len(rounds) > number]
        cuts = [round_.cut for round_ in here if round_.cut is not None]
        mean = {
            name: statistics.fmean(getattr(round_, name) for round_ in here)
            for name in ("tokens", "rows", "finished", "rejected", "kept", "kv_tokens")
        }
        found.append(
            Look(number=number + 1, prompts=len(here), cut=statistics.fmean(cuts) if cuts else None, **mean)
        )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class PartialScores:
    """How the score at one look tells the final one, over the rows that finished later."""

    look: int
    """From 1."""
    tokens: float
    """Median over rows."""
    rows: int
    prompts: int
    """Those with an agreement: at least three rows whose scores are not all alike."""
    pearson: tuple[float, float, float] | tuple[()]
    kendall: tuple[float, float, float] | tuple[()]
    """Quartiles over prompts; empty where no prompt has one."""
    points: Sequence[tuple[float, float]]
    """(partial, final), each less the mean over its prompt's rows."""
    answers: Sequence[tuple[float, float]]
    """Those of them that became answers."""


def look_scores(row: Trajectory) -> list[tuple[int, float | None]]:
    """(tokens, score) at each look; of an older record the last alone."""
    return list(row.look_scores) if row.look_scores else [(row.num_tokens, row.reward)]


@lru_cache(maxsize=256)
def partial_scores(method: Method, task: str, most: int = 8) -> list[PartialScores]:
    """Look by look, the first ``most``."""
    by_look: dict[int, dict[Key, list[tuple[int, float, float, bool]]]] = {}
    for key, answer in method.of_task(task):
        for row in answer.rows:
            if row.finish_reason == "rejected" or row.reward is None:
                continue
            early = [(tokens, score) for tokens, score in look_scores(row) if tokens < row.num_tokens]
            for place, (tokens, score) in enumerate(early[:most]):
                if score is not None:
                    told = (tokens, score, row.reward, row.row == answer.best)
                    by_look.setdefault(place, {}).setdefault(key, []).append(told)
    return [_partial_scores(place + 1, by_look[place]) for place in sorted(by_look)]


def _partial_scores(look: int, of_prompts: dict[Key, list[tuple[int, float, float, bool]]]) -> PartialScores:
    found: list[Agreement] = []
    points: list[tuple[float, float]] = []
    answers: list[tuple[float, float]] = []
    for rows in of_prompts.values():
        early, late = [row[1] for row in rows], [row[2] for row in rows]
        if len(rows) >= 3:
            found.append(agreement(early, late, keep=max(1, len(rows) // 2)))
        means = statistics.fmean(early), statistics.fmean(late)
        for _, partial, final, best in rows:
            if len(rows) > 1:
                (answers if best else points).append((partial - means[0], final - means[1]))
    told = [each for each in found if each.pearson is not None]
    return PartialScores(
        look=look,
        tokens=statistics.median(row[0] for rows in of_prompts.values() for row in rows),
        rows=sum(map(len, of_prompts.values())),
        prompts=len(told),
        pearson=_quartiles([each.pearson for each in told]),
        kendall=_quartiles([each.kendall for each in told]),
        points=points,
        answers=answers,
    )


def _quartiles(values: Sequence[float | None]) -> tuple[float, float, float] | tuple[()]:
    import numpy as np

    known = [value for value in values if value is not None]
    if not known:
        return ()
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def every(points: Sequence[tuple[float, float]], most: int = MOST_DOTS) -> list[tuple[float, float]]:
    """At most so many of them, evenly picked, the same ones each time."""
    if len(points) <= most:
        return list(points)
    return [points[place * len(points) // most] for place in range(most)]
