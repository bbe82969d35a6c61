"""The language model's own likelihood as the reward: mean log-prob of an answer's tokens. Costs no forward pass.

The self-reward baseline. The mean, not the sum: a sum would mostly rank answers by their length. Where we differ from
the reference code of Speculative Rejection: it runs a second full forward pass, row by row, outside its timed region;
here the log-probs fall out of decoding.
"""

from __future__ import annotations

from specrej_eval.core import RowView
from specrej_eval.errors import RewardError
from specrej_eval.rewards.self_scores import SelfScore


class Likelihood(SelfScore):
    """Reads ``RowView.mean_logprob``, in nats per token, under the untempered and unfiltered model; at most 0."""

    name = "likelihood"
    needs_logprobs = True

    def _of(self, row: RowView) -> float:
        if row.mean_logprob is None:
            raise RewardError(
                f"reward_model=likelihood needs the log-probs of row {row.row}, but the engine did not record them.",
                hint="it scores while decoding; texts from a file have no such numbers.",
            )
        return float(row.mean_logprob)
