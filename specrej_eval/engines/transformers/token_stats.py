"""What can be told of a token from the logits it was drawn from: the self-scores' raw material, without a forward pass.

All of it belongs to the untempered, unfiltered model, whatever was done to the distribution before drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specrej_eval.core import CONFIDENCE_TOKENS, TokenStat
from specrej_eval.engines.transformers.sampling import in_chunks, largest
from specrej_eval.kv.native import logits as logits_kernels


def stats_of(logits: Tensor, tokens: Tensor, names: Sequence[TokenStat]) -> Tensor:
    """The statistics asked for, and nothing else.

    Args:
        logits: (rows, vocab) or (1, vocab); one row is shared by all tokens.
        tokens: (rows,), int64, the ids drawn.

    Returns:
        (rows, names), float32.
    """
    if not names:
        return logits.new_empty(tokens.shape[0], 0, dtype=torch.float32)

    def of_chunk(logits: Tensor, tokens: Tensor) -> Tensor:
        scores = logits.float()
        total = logits_kernels.logsumexp(scores)  # the one pass that takes time: all of them need it
        if total is None:
            total = scores.logsumexp(-1)
        return torch.stack([_STATS[name](scores, total, tokens).expand(tokens.shape[0]) for name in names], dim=1)

    return in_chunks(of_chunk, logits, tokens)


def logprob(scores: Tensor, total: Tensor, tokens: Tensor) -> Tensor:
    """Log-prob of each drawn token.

    Args:
        scores: (rows, vocab) or (1, vocab), float32.
        total: (rows,) or (1,), their log-sum-exp.
        tokens: (rows,), int64.

    Returns:
        (rows,), float32.
    """
    return scores.expand(tokens.shape[0], -1).gather(-1, tokens[:, None])[:, 0] - total


def self_certainty(scores: Tensor, total: Tensor, tokens: Tensor | None = None) -> Tensor:
    """KL(uniform || p) per row, in nats: 0 for a uniform p, and the larger the surer the model is.

    Self-certainty (arXiv 2502.18581) is its mean over an answer. Tokens that a model rules out altogether (a logit of
    minus infinity, as for padding of the vocabulary) do not count as part of the vocabulary; else it were infinite.

    Args:
        scores, total: see ``logprob``; which token was drawn does not matter.

    Returns:
        (rows,), float32.
    """
    del tokens
    possible = scores > float("-inf")
    size = possible.sum(-1)  # (rows,)
    mean = scores.masked_fill(~possible, 0.0).sum(-1) / size
    return total - mean - size.log()


def confidence(scores: Tensor, total: Tensor, tokens: Tensor | None = None, top_k: int = CONFIDENCE_TOKENS) -> Tensor:
    """Minus the mean log-prob of the ``top_k`` likeliest tokens, per row: DeepConf's token confidence.

    Never below log(top_k), which it has where these tokens share all probability evenly; the surer the model is of one
    of them, the less likely the others, and the larger it is.

    Args:
        scores, total: see ``logprob``; which token was drawn does not matter. A smaller vocabulary counts whole, and so
            do fewer tokens that are possible at all.

    Returns:
        (rows,), float32.
    """
    del tokens
    places = largest(scores, min(top_k, scores.shape[-1]))
    best = scores.gather(-1, places).sort(-1, descending=True).values  # (rows, top_k); sums depend on the order
    possible = best > float("-inf")
    return total - best.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)


_STATS: dict[TokenStat, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logprob": logprob,
    "self_certainty": self_certainty,
    "confidence": confidence,
}
