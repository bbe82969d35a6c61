"""Several rewards as one: ``reward_model=a+0.5*b``, or a list; ``reward_ensemble=sum|rank`` says how they are joined.

``sum``: the weighted sum of the scores, which is fair only among rewards of one scale. ``rank``: the weighted mean of
each reward's ranks among the rows of one call, from 0 (worst) to 1 (best), equal scores sharing the mean of their
places; it needs no common scale. A rank holds only among the rows it was made of: the loop asks once more for those
that finished, before it picks the best (``RewardSession.compare``).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from specrej_eval.config import RunConfig, Takes, as_float, names, reward_names
from specrej_eval.core import Message, RowView, TokenStat, finite_or_none
from specrej_eval.errors import ConfigError
from specrej_eval.redaction import redacted
from specrej_eval.rewards.base import Pair, RewardModel, RewardPlan, RewardSession, in_groups
from specrej_eval.rewards.kinds.base import Asked, RewardKind

_FORM = 'a+0.5*b, or a list such as ["a", "0.5*b", {"reward_model": "http://host:8000", "weight": 2}]'
_OWN = set(names(Takes.PART))
"""Arguments that a part in a list may have for itself, with ``weight`` and ``reward_model``."""


class Part(NamedTuple):
    weight: float
    config: RunConfig
    """The run's, with ``reward_model`` and what else the part has for itself."""


def parse(name: str, config: RunConfig) -> list[Part]:
    """The parts, in the order given.

    Raises:
        ConfigError: an empty part, a weight that is no finite number or is 0, an unknown name in a list's entry.
    """
    entries: Sequence[Any] = reward_names.split(name)
    if name.lstrip().startswith("["):
        try:
            entries = json.loads(name)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"reward_model={name!r} is not a JSON list ({error}).", hint=f"{_FORM}.") from error
    if not entries:
        raise ConfigError("reward_model=[] names no reward.", hint=f"{_FORM}.")
    return [_part(entry, name, config) for entry in entries]


def _part(entry: Any, whole: str, config: RunConfig) -> Part:
    given: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"reward_model": entry}
    name, weight = given.pop("reward_model", None), given.pop("weight", None)
    if unknown := sorted(given.keys() - _OWN):
        raise ConfigError(
            f"reward_model={whole!r}: a part has no argument {unknown[0]!r}.",
            hint=f"it can have: {', '.join(sorted({'reward_model', 'weight', *_OWN}))}.",
        )
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"reward_model={whole!r} has a part without a name.", hint=f"{_FORM}.")
    match = reward_names.TERM.fullmatch(name)
    if weight is None and match is not None and match["weight"] is not None:
        name, weight = match["name"], match["weight"]
    value = as_float(f"the weight of {name!r}", 1 if weight is None else weight)
    if value == 0 or not name.strip() or reward_names.is_ensemble(name):
        raise ConfigError(
            f"reward_model={whole!r}: {entry!r} is not a part of an ensemble.",
            hint=f"a weight other than 0 and one reward's name each: {_FORM}. A plus sign in an address is %2B.",
        )
    return Part(value, config.replace(reward_model=name.strip(), **given))


class Kind(RewardKind):
    ORDER = 0  # before what its parts may be
    FORMS: ClassVar[Mapping[str, str]] = {"a+0.5*b": "several of these: a weighted sum, or reward_ensemble=rank"}

    def claims(self, name: str) -> bool:
        """A folder of that very name wins."""
        return reward_names.is_ensemble(name)

    def resolve(self, asked: Asked) -> RewardPlan:
        """Raises:
        ConfigError, CheckpointError, RewardError: as ``parse``, and as the parts.
        """
        parts = parse(asked.name, asked.config)
        plans = [asked.resolve(part.config) for part in parts]
        weights, by_rank = [part.weight for part in parts], asked.config.reward_ensemble == "rank"
        name = redacted(asked.name, put="")

        def load(device: str) -> Ensemble:
            return Ensemble([plan.load(device) for plan in plans], weights, name=name, by_rank=by_rank)

        held = [plan.deciding.get("reward_served_model") for plan in plans]
        return RewardPlan(asked.name, load, deciding={"reward_served_model": held} if any(held) else {})


class Ensemble(RewardModel):
    """Weighted sum, or weighted mean rank, of several rewards. See the module's text.

    Args:
        members: the rewards, at least one.
        weights: one each; negative ones count against.
        by_rank: join ranks in place of scores.
    """

    def __init__(
        self, members: Sequence[RewardModel], weights: Sequence[float], *, name: str = "ensemble", by_rank: bool = False
    ) -> None:
        self.name = name
        self.members = list(members)
        self.weights = list(weights)
        self.by_rank = by_rank
        if all(member.devices for member in members):
            self.devices = frozenset().union(*(member.devices for member in members))
        self.needs_logprobs = any(member.needs_logprobs for member in members)
        wanted: dict[TokenStat, None] = dict.fromkeys(stat for member in members for stat in member.needs_token_stats)
        self.needs_token_stats = tuple(wanted)

    @property
    def tokens_scored(self) -> int:
        return sum(member.tokens_scored for member in self.members)

    @property
    def num_calls(self) -> int:
        return sum(member.num_calls for member in self.members)

    @property
    def scores_floored(self) -> int:
        return sum(member.scores_floored for member in self.members)

    @property
    def grades_unreadable(self) -> int:
        return sum(member.grades_unreadable for member in self.members)

    @property
    def nan_reasons(self) -> dict[int, str]:
        return {place: reason for member in self.members for place, reason in member.nan_reasons.items()}

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One number per row; ranks are among the rows given.

        Raises:
            RewardError: as the members.
        """
        return self.join([list(member.score(conversation, rows, response_prefix)) for member in self.members])

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Finished answers of any conversations; ranks are among the answers to one of them. Raises as ``score``."""
        scores = [member.score_pairs(pairs) for member in self.members]
        if not self.by_rank:
            return self.join(scores)
        return in_groups(
            [pair.key for pair in pairs],
            lambda places: self.join([[member[place] for place in places] for member in scores]),
        )

    def open(self, conversation: Sequence[Message], response_prefix: str = "") -> EnsembleSession:
        """Opens a session of every member."""
        return EnsembleSession(self, [member.open(conversation, response_prefix) for member in self.members])

    def read_ahead(self, looks: Sequence[tuple[RewardSession, Sequence[RowView]]], *, exact: bool) -> None:
        """Each member reads ahead. See ``RewardModel.read_ahead``."""
        opened = [(session.members, rows) for session, rows in looks if isinstance(session, EnsembleSession)]
        for place, member in enumerate(self.members):
            member.read_ahead([(members[place], rows) for members, rows in opened], exact=exact)

    def join(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """Members' scores (members, rows) -> (rows,).

        A row that any member scores NaN is NaN, and has no part in the others' ranks.
        """
        columns = list(zip(*scores, strict=True))
        sound = [place for place, column in enumerate(columns) if not any(math.isnan(score) for score in column)]
        total = sum(abs(weight) for weight in self.weights)
        joined = [math.nan] * len(columns)
        table = [[member[place] for place in sound] for member in scores]
        if self.by_rank:
            table = [ranks(member) for member in table]
        for number, place in enumerate(sound):
            products = [weight * member[number] for weight, member in zip(self.weights, table, strict=True)]
            joined[place] = _sum(products) / (total if self.by_rank else 1)
        return joined


class EnsembleSession(RewardSession):
    """Sessions of all members, and what each last said of a row."""

    def __init__(self, ensemble: Ensemble, members: Sequence[RewardSession]) -> None:
        self._ensemble = ensemble
        self.members = members
        self._parts: dict[int, tuple[float, ...]] = {}

    def score(self, rows: Sequence[RowView]) -> list[float]:
        scores = [list(member.score(rows)) for member in self.members]
        self._parts.update(zip([row.row for row in rows], zip(*scores, strict=True), strict=True))
        return self._ensemble.join(scores)

    def compare(self, row_ids: Sequence[int]) -> list[float] | None:
        """Scores of rows that were looked at at different times, made comparable; from what the members said then.

        None where they are comparable as they are.
        """
        if not self._ensemble.by_rank or not row_ids:
            return None
        return self._ensemble.join(list(zip(*(self._parts[row] for row in row_ids), strict=True)))

    def parts(self, row_id: int) -> dict[str, float | None] | None:
        """What each member last said of a row; None for a row never looked at."""
        found = self._parts.get(row_id)
        if found is None:
            return None
        named: dict[str, float | None] = {}
        for member, value in zip(self._ensemble.members, found, strict=True):
            name = member.name
            while name in named:
                name += "'"  # the same reward twice
            named[name] = finite_or_none(value)
        return named

    def keep(self, row_ids: Sequence[int]) -> None:
        for member in self.members:
            member.keep(row_ids)

    def close(self) -> None:
        for member in self.members:
            member.close()


def ranks(scores: Sequence[float]) -> list[float]:
    """Each score's rank from 0 (lowest) to 1 (highest); equal ones share the mean of their places. 1 for one alone."""
    if len(scores) == 1:
        return [1.0]
    order = sorted(scores)
    # twice the mean of the first place and the last
    sums = [bisect_left(order, score) + bisect_right(order, score) - 1 for score in scores]
    return [both / 2 / (len(scores) - 1) for both in sums]


def _sum(products: Sequence[float]) -> float:
    """Exact where it can be; infinities of both signs are NaN."""
    return math.fsum(products) if all(math.isfinite(value) for value in products) else sum(products)
