"""``reward_model=likelihood|self_certainty|deepconf``: the engine's own numbers as the reward. Costs no forward pass.

likelihood: mean log-prob of an answer's tokens, the self-reward baseline. The mean, not the sum: a sum would mostly
rank answers by their length. Where we differ from the reference code of Speculative Rejection: it runs a second full
forward pass, row by row, outside its timed region; here the log-probs fall out of decoding.

self_certainty (Kang, Zhao & Song 2025, arXiv 2502.18581): how far from uniform the model's next-token distributions
are, as mean KL(uniform || p) over an answer's tokens. Where we differ from the authors' code: the distribution a token
was *drawn from* counts, the first one included and the one after the last token left out (theirs is off by one).

deepconf (Fu et al. 2025, arXiv 2508.15260): lowest-window confidence. A token's confidence is minus the mean log-prob
of the 20 likeliest tokens; an answer is as good as its least sure stretch: the smallest mean over a sliding window
(``deepconf_window``; the paper's 2048 is made for traces of tens of thousands of tokens). An answer shorter than the
window is one window.

All three stand on a floor. A language model is surest of itself while it repeats itself, and a score that is a mean is
easily topped by an answer of one token. So rows that repeat themselves, and finished answers that are (next to) empty,
are put below all others.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from specrej_eval.config import RunConfig, reward_names
from specrej_eval.core import Message, RowView, TokenStat
from specrej_eval.errors import RewardError
from specrej_eval.rewards.base import RewardModel, RewardPlan
from specrej_eval.rewards.kinds.base import Asked, RewardKind
from specrej_eval.wording import counted

FLOOR_PENALTY = 100.0
"""Nats per token: more than any of the self-scores varies by. Rows below the floor keep their order."""
SEQUENCE = 4
"""Tokens of the sequences that are counted."""
LEAST_SEQUENCES = 16
"""With fewer sequences than this, a share of them says nothing."""
_WHILE_DECODING = "it scores while decoding; texts from a file have no such numbers."

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
            return f"its answer has {counted(row.num_tokens, 'token')} (minimum {self.tokens})"
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


class SelfScore(RewardModel):
    """A reward made of what the engine recorded while it decoded. Reads no text and feeds no token to any model.

    Subclasses say which statistic they need and what a row's score is.
    """

    scores_floored = 0

    def __init__(self, floor: Floor | None = None) -> None:
        self._floor = floor

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One number per row, higher is better.

        Raises:
            RewardError: a row came without the numbers that are needed: the engine ignored what the reward asks for.
        """
        # the conversation is in the condition of each number already
        return [self._floored(row, self._of(row)) for row in rows]

    @abstractmethod
    def _of(self, row: RowView) -> float: ...

    def _stat(self, row: RowView, name: TokenStat) -> Sequence[float]:
        values = row.token_stats.get(name)
        if values is None or len(values) != row.num_tokens:
            raise RewardError(
                f"reward_model={self.name} needs {name} of each of row {row.row}'s {row.num_tokens} tokens, but the "
                f"engine recorded {'nothing' if values is None else f'{len(values)} numbers'}.",
                hint=_WHILE_DECODING,
            )
        return values

    def _floored(self, row: RowView, score: float) -> float:
        reason = None if self._floor is None else self._floor.reason(row)
        if reason is None:
            return score
        if not self.scores_floored:
            _logger.warning(
                "reward_model=%s: row %d ranks last: %s (reported once; floor_toks=1 and floor_repetition=1 switch "
                "this off): %r",
                self.name,
                row.row,
                reason,
                row.text[-80:],
            )
        self.scores_floored += 1
        return score - FLOOR_PENALTY


class Likelihood(SelfScore):
    """Reads ``RowView.mean_logprob``, in nats per token, under the untempered and unfiltered model; at most 0."""

    name = "likelihood"
    needs_logprobs = True

    def _of(self, row: RowView) -> float:
        if row.mean_logprob is None:
            raise RewardError(
                f"reward_model=likelihood needs the log-probs of row {row.row}, but the engine did not record them.",
                hint=_WHILE_DECODING,
            )
        return float(row.mean_logprob)


class SelfCertainty(SelfScore):
    """Mean of the engine's per-token self-certainty, in nats; at least 0."""

    name = "self_certainty"
    needs_token_stats: tuple[TokenStat, ...] = ("self_certainty",)

    def _of(self, row: RowView) -> float:
        values = self._stat(row, "self_certainty")
        return math.fsum(values) / len(values)


class DeepConf(SelfScore):
    """Lowest window mean of the engine's per-token confidence, in nats."""

    name = "deepconf"
    needs_token_stats: tuple[TokenStat, ...] = ("confidence",)

    def __init__(self, floor: Floor | None = None, *, window: int = 64) -> None:
        super().__init__(floor)
        self.window = window

    def _of(self, row: RowView) -> float:
        return lowest_window(self._stat(row, "confidence"), self.window)


def lowest_window(values: Sequence[float], window: int) -> float:
    """Smallest mean of ``window`` values in a row; of all values if there are fewer."""
    size = min(window, len(values))
    return min(math.fsum(values[start : start + size]) for start in range(len(values) - size + 1)) / size


class Kind(RewardKind):
    FORMS: ClassVar[Mapping[str, str]] = {
        "likelihood": "mean log-probability of the row's own tokens; costs nothing",
        "self_certainty": "how far the language model's own predictions are from uniform; costs nothing",
        "deepconf": "the row's least sure stretch of tokens (deepconf_window=); costs nothing",
    }

    def claims(self, name: str) -> bool:
        return name in reward_names.SELF_SCORES

    def resolve(self, asked: Asked) -> RewardPlan:
        floor = Floor.of(asked.config)
        made = {
            "likelihood": lambda device: Likelihood(floor),
            "self_certainty": lambda device: SelfCertainty(floor),
            "deepconf": lambda device: DeepConf(floor, window=asked.config.deepconf_window),
        }
        return RewardPlan(asked.name, made[asked.name])
