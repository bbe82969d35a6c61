"""What a token is drawn from, in one pass over a row of logits each, where the kernels are in use."""

from __future__ import annotations

import torch
from torch import Tensor

from specrej_eval.kv.native import build


def largest(scores: Tensor, width: int) -> Tensor | None:
    """Places of the ``width`` largest scores of each row, (rows, width) int64, in no order; None where the kernels are
    not in use.

    Args:
        scores: (rows, vocab), no NaN.
        width: at most the vocabulary.
    """
    kernels = build.in_use()
    if kernels is None or not _plain(scores):
        return None
    rows, vocab = scores.shape
    places = torch.empty(rows, width, dtype=torch.int64)
    kernels.largest(scores.data_ptr(), scores.stride(0), rows, vocab, width, places.data_ptr())
    return places


def logsumexp(scores: Tensor) -> Tensor | None:
    """Of each row, (rows,) float32; None where the kernels are not in use.

    Args:
        scores: (rows, vocab), no NaN.
    """
    kernels = build.in_use()
    if kernels is None or not _plain(scores):
        return None
    out = torch.empty(scores.shape[0])
    kernels.logsumexp(scores.data_ptr(), scores.stride(0), *scores.shape, out.data_ptr())
    return out


def _plain(scores: Tensor) -> bool:
    return scores.is_cpu and scores.dtype == torch.float32 and scores.stride(1) == 1
