"""Which of the rows that finished is the answer: the best reward, or something that trusts it less."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from specrej_eval.core import Trajectory
from specrej_eval.errors import ConfigError, suggest

Selector = Callable[[Sequence[Trajectory], str], Trajectory]
"""(finished rows, hash of the prompt) -> the answer."""

KNOWN = {
    "max": "the highest reward (the first of equal ones), as every run does",
    "majority": "the answer most rows give, of these rows the best reward; --answer says what of a text is its answer",
    "weighted": "as majority, each row counted with exp(its reward - the highest)",
    "soft:LAMBDA": "a row drawn with chance proportional to exp(reward / LAMBDA) (Soft Best-of-N, arXiv 2505.03156)",
    "median": "the middle reward: what a row is like that nobody chose",
}


def make_selector(name: str, *, answer: str | None = None) -> Selector:
    """Raises:
    ConfigError: no such selector; ``answer`` is no regular expression.
    """
    kind, colon, parameter = name.partition(":")
    if kind in ("majority", "weighted") and not colon:
        return _vote(_reading(answer), weighted=kind == "weighted")
    if kind == "soft":
        try:
            temperature = float(parameter)
        except ValueError:
            temperature = 0.0
        if not temperature > 0:
            raise ConfigError(f"selector {name!r}: soft needs a number above 0.", hint="for example soft:0.5")
        return _soft(temperature)
    if name in ("max", "median"):
        return _best if name == "max" else _median
    raise ConfigError(f"unknown selector {name!r}.", hint=suggest(name, KNOWN))


def _reward(row: Trajectory) -> float:
    return -math.inf if row.reward is None else row.reward


def _best(rows: Sequence[Trajectory], _: str) -> Trajectory:
    return max(rows, key=_reward)


def _median(rows: Sequence[Trajectory], _: str) -> Trajectory:
    return sorted(rows, key=_reward)[(len(rows) - 1) // 2]


def _reading(pattern: str | None) -> Callable[[str], str | None]:
    if pattern is None:
        return lambda text: text.strip() or None
    try:
        known = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--answer {pattern!r} is no regular expression: {error}.") from None

    def read(text: str) -> str | None:
        found = known.search(text)
        return None if found is None else found[1] if known.groups else found[0]

    return read


def _vote(read: Callable[[str], str | None], *, weighted: bool) -> Selector:
    def select(rows: Sequence[Trajectory], _: str) -> Trajectory:
        highest = max(map(_reward, rows))
        votes: dict[str, float] = {}
        of: dict[str, list[Trajectory]] = {}
        for row in rows:
            answer = read(row.text)
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + (math.exp(_reward(row) - highest) if weighted else 1.0)
                of.setdefault(answer, []).append(row)
        if not votes:
            return _best(rows, "")
        most = max(votes.values())
        return _best([row for answer, count in votes.items() if count == most for row in of[answer]], "")

    return select


def _soft(temperature: float) -> Selector:
    def select(rows: Sequence[Trajectory], prompt_hash: str) -> Trajectory:
        import numpy as np

        rewards = np.array([_reward(row) for row in rows])
        chances = np.exp((rewards - rewards.max()) / temperature)
        # of the prompt alone, so that a replay is the same every time
        rng = np.random.default_rng(int(prompt_hash[:16] or "0", 16))
        return rows[int(rng.choice(len(rows), p=chances / chances.sum()))]

    return select
