"""What a reward model is to the rest of the house, and how the one named by the arguments is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specrej_eval.core import Message, RowView


class RewardModel(Protocol):
    """Scores the rows of one prompt. Higher is better; scores of different prompts are not comparable.

    Rows of different prompts are never scored in one batch, so that a score does not depend on what else is in flight.
    """

    name: str
    """For traces and results: the checkpoint, ``likelihood`` or ``pkg.module:function``."""
    needs_logprobs: bool
    """Whether ``RowView.mean_logprob`` must be filled in by the engine."""
    tokens_scored: int
    """Tokens read since the model was made, padding not counted."""
    num_calls: int
    """Forward passes (or calls of a callable) since the model was made."""

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
        ...
