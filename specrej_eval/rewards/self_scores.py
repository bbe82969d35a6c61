"""What likelihood, self_certainty and deepconf share: they read the engine's own numbers, and stand on a floor.

A language model is surest of itself while it repeats itself, and a score that is a mean is easily topped by an answer
of one token. So rows that repeat themselves, and finished answers that are (next to) empty, are put below all others.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView, TokenStat
from specrej_eval.errors import RewardError
from specrej_eval.rewards.base import Stateless

FLOOR_PENALTY = 100.0
"""Nats per token: more than any of the self-scores varies by. Rows below the floor keep their order."""
SEQUENCE = 4
"""Tokens of the sequences that are counted."""
LEAST_SEQUENCES = 16
"""With fewer sequences than this, a share of them says nothing."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Floor:
    """Which rows are put below all others; see ``floor_toks`` and ``floor_repetition`` of ``RunConfig``."""

    tokens: int = 2
    max_repetition: float = 0.5

    @classmethod
    def of(cls, config: RunConfig) -> Floor | None:
        """None for a single row: it is compared with nothing, and its score is only told."""
        return None if config.n == 1 else cls(config.floor_toks, config.floor_repetition)

    def reason(self, row: RowView) -> str | None:
        """Why a row is below the floor, in words; None if it is not."""
        if row.finished and row.num_tokens < self.tokens:
            return f"its answer has {row.num_tokens} of at least {self.tokens} tokens"
        share = repetition(row.token_ids)
        if share > self.max_repetition:
            return f"{share:.0%} of it is repetition"
        return None


def repetition(token_ids: Sequence[int]) -> float:
    """Share of a row's 4-token sequences that have been in the row before; 0 for short rows."""
    total = len(token_ids) - SEQUENCE + 1
    if total < LEAST_SEQUENCES:
        return 0.0
    distinct = {tuple(token_ids[start : start + SEQUENCE]) for start in range(total)}
    return 1 - len(distinct) / total


class SelfScore(Stateless, ABC):
    """A reward made of what the engine recorded while it decoded. Reads no text and feeds no token to any model.

    Subclasses say which statistic they need and what a row's score is.
    """

    name: str
    needs_logprobs = False
    needs_token_stats: tuple[TokenStat, ...] = ()

    def __init__(self, floor: Floor | None = None) -> None:
        self.tokens_scored = 0  # stays 0: the numbers fall out of decoding
        self.num_calls = 0
        self.scores_floored = 0
        """Scores of rows below the floor since the model was made."""
        self._floor = floor

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One number per row, higher is better.

        Raises:
            RewardError: a row came without the numbers that are needed: the engine ignored what the reward asks for.
        """
        del conversation, response_prefix  # already in the condition of each number
        return [self._floored(row, self._of(row)) for row in rows]

    @abstractmethod
    def _of(self, row: RowView) -> float: ...

    def _stat(self, row: RowView, name: TokenStat) -> Sequence[float]:
        values = row.token_stats.get(name)
        if values is None or len(values) != row.num_tokens:
            raise RewardError(
                f"reward_model={self.name} needs {name} of each of row {row.row}'s {row.num_tokens} tokens, but the "
                f"engine recorded {'nothing' if values is None else f'{len(values)} numbers'}.",
                hint="it scores while decoding; texts from a file have no such numbers.",
            )
        return values

    def _floored(self, row: RowView, score: float) -> float:
        reason = None if self._floor is None else self._floor.reason(row)
        if reason is None:
            return score
        if not self.scores_floored:
            _logger.warning(
                "reward_model=%s: row %d is ranked below all others, since %s (said once; floor_toks=1 and "
                "floor_repetition=1 switch the floor off): %r",
                self.name,
                row.row,
                reason,
                row.text[-80:],
            )
        self.scores_floored += 1
        return score - FLOOR_PENALTY
