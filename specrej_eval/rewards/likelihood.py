"""The language model's own likelihood as the reward: mean log-prob of an answer's tokens. Costs no forward pass.

The self-reward baseline. The mean, not the sum: a sum would mostly rank answers by their length. Where we differ from
the reference code of Speculative Rejection: it runs a second full forward pass, row by row, outside its timed region;
here the log-probs fall out of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from specrej_eval.core import Message, RowView
from specrej_eval.errors import RewardError


class Likelihood:
    """Reads ``RowView.mean_logprob``, in nats per token, under the untempered and unfiltered model."""

    name = "likelihood"
    needs_logprobs = True

    def __init__(self) -> None:
        self.tokens_scored = 0  # stays 0: the log-probs fall out of decoding
        self.num_calls = 0

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """Mean log-prob of each row, at most 0.

        Raises:
            RewardError: a row came without its mean log-prob (the engine ignored ``needs_logprobs``).
        """
        del conversation, response_prefix  # already in the condition of each log-prob
        scores = []
        for row in rows:
            if row.mean_logprob is None:
                raise RewardError(
                    f"reward_model=likelihood needs the log-probs of row {row.row}, but the engine did not record them."
                )
            scores.append(float(row.mean_logprob))
        return scores
