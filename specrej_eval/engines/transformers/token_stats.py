"""What can be told of a token from the logits it was drawn from: the self-scores' raw material, without a forward pass.

All of it belongs to the untempered, unfiltered model, whatever was done to the distribution before drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specrej_eval.core import TokenStat
from specrej_eval.engines.transformers.sampling import in_chunks, logprobs_of

CONFIDENCE_TOP_K = 20
"""As in DeepConf (arXiv 2508.15260)."""


def stats_of(logits: Tensor, tokens: Tensor, names: Sequence[TokenStat]) -> Tensor:
    """The statistics asked for, and nothing else.

    Args:
        logits: (rows, vocab) or (1, vocab); one row is shared by all tokens.
        tokens: (rows,), int64, the ids drawn.

    Returns:
        (rows, names), float32.
    """
    if not names:
        return logits.new_empty(tokens.shape[0], 0)
    return torch.stack([_STATS[name](logits, tokens) for name in names], dim=1)


def self_certainty(logits: Tensor) -> Tensor:
    """KL(uniform || p) per row, in nats: 0 for a uniform p, and the larger the surer the model is.

    Self-certainty (arXiv 2502.18581) is its mean over an answer. Tokens that a model rules out altogether (a logit of
    minus infinity, as for padding of the vocabulary) do not count as part of the vocabulary; else it were infinite.

    Args:
        logits: (rows, vocab).

    Returns:
        (rows,), float32.
    """
    scores = logits.float()
    possible = scores > float("-inf")
    size = possible.sum(-1)  # (rows,)
    total = scores.masked_fill(~possible, 0.0).sum(-1)
    return scores.logsumexp(-1) - total / size - size.log()


def confidence(logits: Tensor, top_k: int = CONFIDENCE_TOP_K) -> Tensor:
    """Minus the mean log-prob of the ``top_k`` likeliest tokens, per row: DeepConf's token confidence.

    Never below log(top_k), which it has where these tokens share all probability evenly; the surer the model is of one
    of them, the less likely the others, and the larger it is.

    Args:
        logits: (rows, vocab); a smaller vocabulary counts whole, and so do fewer tokens that are possible at all.

    Returns:
        (rows,), float32.
    """
    scores = logits.float()
    best = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values
    possible = best > float("-inf")
    return scores.logsumexp(-1) - best.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)


def _of_distribution(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """In chunks of rows, which bounds the float32 copies; distributions shared by all rows are looked at once."""

    def of(logits: Tensor, tokens: Tensor) -> Tensor:
        return in_chunks(function, logits).expand(tokens.shape[0])

    return of


_STATS: dict[TokenStat, Callable[[Tensor, Tensor], Tensor]] = {
    "logprob": logprobs_of,
    "self_certainty": _of_distribution(self_certainty),
    "confidence": _of_distribution(confidence),
}
