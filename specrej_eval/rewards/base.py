"""What a reward model is to the rest of the house.

A reward model scores the rows of one prompt; a session is one prompt being scored from look to look. What only some
rewards can do is a method or an attribute with a default here, so that nobody has to ask whether it is there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from specrej_eval.core import Message, RowView, TokenStat
from specrej_eval.special_tokens import ContentGuard


class RewardSession(ABC):
    """One prompt being scored: what a reward model remembers of its rows from look to look.

    What is remembered saves work and changes no score: a row's score depends on its text alone (to rounding).
    """

    @abstractmethod
    def score(self, rows: Sequence[RowView]) -> list[float]:
        """As ``RewardModel.score``. Rows never seen before may appear at any look: fresh ones, and forks."""

    def keep(self, row_ids: Sequence[int]) -> None:  # noqa: B027 - nothing to forget is the rule
        """Only these rows go on; what is held for others is freed at once.

        A row named twice is a fork: its twin turns up at the next look under a row id of its own, and finds by its
        text what it shares with its parent.
        """

    def compare(self, row_ids: Sequence[int]) -> list[float] | None:
        """Scores of these rows that compare with each other, for scores that hold only among the rows of one look.

        None where they did all along. Asked for once, when a prompt is done.
        """
        return None

    def parts(self, row_id: int) -> dict[str, float | None] | None:
        """What each of several rewards last said of a row, by name; None for a single reward."""
        return None

    def close(self) -> None:  # noqa: B027 - nothing to free is the rule
        """Free everything. No other call follows; closing twice is harmless."""


class RewardModel(ABC):
    """Scores the rows of one prompt. Higher is better; scores of different prompts are not comparable.

    Rows of different prompts are never scored in one batch by ``score``, so that a score does not depend on what else
    is in flight; where that holds in one batch as well, ``read_ahead`` makes one.
    """

    name: str
    """For traces and results: the checkpoint, ``likelihood`` or ``pkg.module:function``."""
    needs_logprobs: bool = False
    """Whether ``RowView.mean_logprob`` must be filled in by the engine."""
    needs_token_stats: tuple[TokenStat, ...] = ()
    """Other per-token numbers that the engine must record (``RowView.token_stats``)."""
    by_rank: bool = False
    """Whether scores are ranks, which hold only among the rows of one call."""
    members: Sequence[RewardModel] = ()
    """The rewards that it is made of; empty for a single one."""
    devices: frozenset[Any] = frozenset()
    """All those that scores are computed on, by models that nobody else uses; empty = unknown, or none of its own."""
    renderer: Any = None
    """What makes token ids of a conversation, where that is done on our side (``checkpoints.renderer``)."""

    @property
    def guard(self) -> ContentGuard | None:
        """What holds the texts it is given to ``special_tokens_in_content``, where that is done without a renderer."""
        return None

    def text_sent(self, conversation: Sequence[Message], response: str) -> str | None:
        """The rendered text of a finished answer, where that is what a server gets."""
        return None

    @property
    def reads_text(self) -> bool:
        """Whether it can score a text of a file, with nothing that an engine recorded."""
        return not self.needs_logprobs and not self.needs_token_stats

    # counted since the model was made; the caller takes differences. One that counts has an attribute of this name.

    @property
    def tokens_scored(self) -> int:
        """Tokens read, padding not counted; 0 where that is not known."""
        return 0

    @property
    def num_calls(self) -> int:
        """Forward passes, calls of a function, or requests to a server."""
        return 0

    @property
    def scores_floored(self) -> int:
        """Scores of rows that were put below all others."""
        return 0

    @property
    def grades_unreadable(self) -> int:
        """Scores that became NaN because a judge wrote no grade."""
        return 0

    def parameters_per_token(self) -> int:
        """Parameters that take part in reading a token; 0 = none, or unknown (a server, a function)."""
        return sum(member.parameters_per_token() for member in self.members)

    @property
    def nan_reasons(self) -> Mapping[int, str]:
        """Why scores of the last call are NaN, by their places; empty where that is not known."""
        return {}

    def why_nan(self, place: int) -> str:
        """Why the score at that place of the last call is NaN, as a message may go on; empty where not known."""
        return f" ({self.nan_reasons[place]})" if place in self.nan_reasons else ""

    @abstractmethod
    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One float per row, in order.

        Args:
            conversation: the messages before the response.
            rows: partial or finished answers; their ``text`` is what the benchmark will see.
            response_prefix: the start of the assistant's turn that the prompt already holds.

        Raises:
            RewardError: the model failed, or did not return one number per row. (NaN is returned as it is; the
                generator applies ``on_nan``.)
        """

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Scores of finished answers to any conversations, in order.

        Raises:
            RewardError: as ``score``.
        """

        def together(places: Sequence[int]) -> list[float]:
            rows = [RowView(number, pairs[place].response, (), "eos") for number, place in enumerate(places)]
            return self.score(pairs[places[0]].conversation, rows)

        return in_groups([pair.key for pair in pairs], together)

    def open(self, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
        """A session for one prompt: what the loop scores with. Reads no token yet; several may be open at a time.

        One that remembers nothing, unless the reward has a better one: every look is scored in full.
        """
        return FullScoring(self, conversation, response_prefix)

    def read_ahead(self, looks: Sequence[tuple[RewardSession, Sequence[RowView]]], *, exact: bool) -> None:  # noqa: B027 - reading one by one is the rule
        """The sessions' ``score`` of these rows comes next: what it has to read may be read together.

        Changes no count and raises nothing that ``score`` would raise in its turn: that goes to the right prompt.

        Args:
            looks: sessions of this reward, each once, and their rows.
            exact: do so only if no bit of a score depends on it.
        """


class FullScoring(RewardSession):
    """A session that remembers nothing."""

    def __init__(self, reward: RewardModel, conversation: Sequence[Message], response_prefix: str) -> None:
        self._reward = reward
        self._conversation = conversation
        self._response_prefix = response_prefix

    def score(self, rows: Sequence[RowView]) -> list[float]:
        return self._reward.score(self._conversation, rows, self._response_prefix)


@dataclass(frozen=True, slots=True)
class RewardPlan:
    """A reward that was named and checked, and is not loaded yet."""

    name: str
    load: Callable[[str], RewardModel]
    """``load(device)``, with the language model's device; ``reward_device`` wins. What can only be known from weights
    and tokenizers is found out here: CheckpointError, ConfigError, RewardError."""
    deciding: Mapping[str, Any] = field(default_factory=dict)
    """What decides its scores and no argument says: the model that a server says it holds."""


class Pair(NamedTuple):
    """A finished answer and what was asked."""

    conversation: tuple[Message, ...]
    response: str

    @property
    def key(self) -> str:
        """The same for pairs of one conversation."""
        return json.dumps([dict(message) for message in self.conversation])

    @property
    def row(self) -> RowView:
        """The answer as a row of its own."""
        return RowView(0, self.response, (), "eos")


def in_groups(keys: Sequence[str], score: Callable[[Sequence[int]], Sequence[float]]) -> list[float]:
    """``score(places)`` of all places that share a key, for every key; in the order of the keys given."""
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    found: dict[int, float] = {}
    for places in groups.values():
        found.update(zip(places, score(places), strict=True))
    return [found[place] for place in range(len(keys))]


def readable(row: RowView, response_prefix: str = "") -> str:
    """The answer as a reward reads it: an unfinished row may end within a character, whose bytes so far decode to
    U+FFFD; those are left out."""
    return response_prefix + (row.text if row.finished else row.text.rstrip("\ufffd"))
