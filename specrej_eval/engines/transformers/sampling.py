"""Logits to token ids: pure functions, no global random state.

A row's randomness is its own: one uniform per (stream key, row, step) from an integer hash (splitmix64's finaliser in
int64 arithmetic, the same on CPU and GPU), consumed by inverse-CDF sampling. So a row's token does not depend on which
other rows, prompts or ranks share its batch; ``torch.multinomial`` and fused samplers do not have that property.

The order of the filters is transformers' (temperature, top_k, top_p, min_p), ties at the k-th logit included.

One rule for every temperature: a row is drawn from softmax(logits / temperature), and temperature=0 takes the largest
logit. Nothing overflows on the way: a temperature too small for float32 scores leaves the largest logit alone (exact
ties share), one too large leaves all finite logits alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.errors import ModelError
from specrej_eval.kv.native import logits as logits_kernels

# splitmix64 (Steele, Lea & Flood 2014), constants as signed 64-bit integers
_GAMMA = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685

_STRATA = 0x5F3759DF2545F491
"""Sets the streams that order strata apart from those of rows."""

ROW_CHUNK = 256
"""Rows looked at together on a GPU, which bounds the float64 temporaries."""
CHUNK_BYTES = 2 * 2**20
"""Float32 logits looked at together on a CPU: what stays in its cache is passed over ten times as fast."""
BLOCK = 32
"""Logits of which only the largest is looked at first when the likeliest tokens are searched (``largest``)."""
CDF_BLOCK = 64
"""Tokens whose probabilities are added up before the inverse CDF is searched."""
TIE_SLACK = 64
"""Logits beyond the k-th that are looked at for ties."""
TOP_P_CANDIDATES = 1024
"""Most likely tokens looked at for top_p before the whole vocabulary is sorted."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def row_stream(keys: Tensor, rows: Tensor) -> Tensor:
    """A row's stream: int64, a function of (key, row). Computed once per row, not per step."""
    return _mix(_mix(keys + _GAMMA) ^ (rows * _GAMMA))


def uniform(streams: Tensor, steps: Tensor) -> Tensor:
    """One float64 in (0, 1) per element; a function of (key, row, step) and nothing else.

    Args:
        streams: int64, from ``row_stream``.
        steps: int64, broadcastable, same device.
    """
    x = _mix(streams + (steps + 1) * _GAMMA)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52  # 52 bits: with 53, adding a half could round up to 1


def strata_of(key: Tensor, n: int, block: int, step: int, device: torch.device) -> Tensor:
    """A random permutation of ``n`` strata: which each of ``n`` rows draws from at a step; (n,) int64.

    A function of (key, n, block, step), by streams apart from those of the rows, and independent from step to step.

    Args:
        key: the prompt's stream key, 0-d int64.
        block: rows ``block * n`` and on; those beyond the first are forks.
    """
    streams = row_stream(_mix(key ^ _STRATA).to(device), torch.arange(block * n, (block + 1) * n, device=device))
    order = uniform(streams, torch.tensor(step, device=device)).argsort(stable=True)
    return order.argsort(stable=True)


def stratified(uniforms: Tensor, strata: Tensor, n: int) -> Tensor:
    """Uniforms moved into their strata: ((0, 1) + k) / n, (rows,) float64. 1 itself, by rounding, is kept out."""
    return ((uniforms + strata) / n).clamp_max(1 - 2.0**-53)


def in_chunks(function: Callable[..., Tensor], logits: Tensor, *rowwise: Tensor) -> Tensor:
    """``function(logits, *rowwise)`` for some rows at a time, which bounds what it allocates.

    Args:
        logits: (rows, vocab) or (1, vocab); one row is shared by all of ``rowwise``.
        rowwise: (rows, ...) each.

    Returns:
        (rows, ...).
    """
    at_once = ROW_CHUNK if logits.is_cuda else max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = [
        function(
            logits if logits.shape[0] == 1 else logits[start : start + at_once],
            *(mine[start : start + at_once] for mine in rowwise),
        )
        for start in range(0, (rowwise or (logits,))[0].shape[0], at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """Draw one token per row by inverse CDF over the filtered distribution.

    Args:
        logits: (rows, vocab) or (1, vocab), any float dtype; one row is shared by all uniforms.
        uniforms: (rows,), float64 in (0, 1).

    Returns:
        (rows,), int64.

    Raises:
        ModelError: a logit is NaN.
    """
    if params.greedy:
        likeliest = logits.argmax(-1)
        if bool(logits.gather(-1, likeliest[:, None]).isnan().any()):  # of a row that holds one, it is the largest
            raise _nan_error()
        return likeliest.expand(uniforms.shape[0])
    return in_chunks(partial(_sample_chunk, params), logits, uniforms)


def _sample_chunk(params: SamplingParams, logits: Tensor, uniforms: Tensor) -> Tensor:
    if not 0 < params.top_k < logits.shape[-1] and params.top_p >= 1:
        return _draw_from_all(_tempered(logits, params.temperature), uniforms, params.min_p)
    probabilities, tokens = filtered(logits, params)
    cdf = probabilities.cumsum(-1)  # (rows or 1, candidates)
    targets = (uniforms * cdf[:, -1]).unsqueeze(-1)  # (rows, 1)
    drawn = torch.searchsorted(cdf if cdf.shape[0] > 1 else cdf[0], targets, right=True)
    # u < 1, but u * total may round up to the total: step back onto the last token of non-zero mass
    last = (probabilities > 0).long().mul(torch.arange(1, cdf.shape[1] + 1, device=cdf.device)).amax(-1) - 1
    drawn = torch.minimum(drawn.squeeze(-1), last)
    if tokens is None:
        return drawn
    return tokens.expand(uniforms.shape[0], -1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _draw_from_all(scores: Tensor, uniforms: Tensor, min_p: float) -> Tensor:
    """One token per row from the whole vocabulary: first a block of it, then a token of the block.

    Args:
        scores: (rows, vocab) or (1, vocab), float32; the largest of each row is finite.
        uniforms: (rows,), float64.

    Returns:
        (rows,), int64.
    """
    rows, vocab = uniforms.shape[0], scores.shape[-1]
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()  # 1 for the likeliest
    if min_p > 0:
        weights = weights.masked_fill_(weights < min_p, 0.0)
    weights = functional.pad(weights, (0, -vocab % CDF_BLOCK)).unflatten(-1, (-1, CDF_BLOCK))
    ends = weights.sum(-1, dtype=torch.float64).cumsum(-1).expand(rows, -1)  # (rows, blocks)
    targets = uniforms[:, None] * ends[:, -1:]
    # u < 1, but u * total may round up to the total: step back onto the last block of non-zero mass
    block = torch.minimum(_first_above(ends, targets), _first_above(ends, ends[:, -1:].nextafter(ends.new_zeros(()))))
    before = functional.pad(ends, (1, 0)).gather(-1, block)
    inside = weights.expand(rows, -1, -1).gather(1, block[..., None].expand(-1, -1, CDF_BLOCK))[:, 0]
    place = _first_above(inside.double().cumsum(-1), targets - before)
    places = torch.arange(1, CDF_BLOCK + 1, device=scores.device)
    last = ((inside > 0) * places).amax(-1, keepdim=True) - 1
    return (block * CDF_BLOCK + torch.minimum(place, last))[:, 0]


def _first_above(rising: Tensor, targets: Tensor) -> Tensor:
    """(rows, 1): the first place whose number is larger than the row's target; the width, if there is none."""
    return torch.searchsorted(rising.contiguous(), targets, right=True)


def filtered(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities after temperature, top_k, top_p and min_p, in float64. Each row's depend on that row alone.

    Candidates are in order of falling probability, ties in order of token id, so that where they came from (a top-k
    kernel, or the whole vocabulary sorted) cannot be seen in what is drawn.

    Returns:
        (rows, candidates) probabilities, 0 where filtered out, not renormalised, and the candidates' token ids
        (rows, candidates), or None where the candidates are the whole vocabulary in order.
    """
    vocab = logits.shape[-1]
    scores = _tempered(logits, params.temperature)
    if 0 < params.top_k < vocab:
        width = min(params.top_k + TIE_SLACK, vocab)
        values, tokens = _most_likely(scores, width)
        kth = values[:, params.top_k - 1 : params.top_k]
        long_tie = (values[:, -1] == kth[:, 0]) & (kth[:, 0] > float("-inf")) & (width < vocab)
        probabilities = _nucleus(values.masked_fill(values < kth, float("-inf")).double().softmax(-1), params)
        return _with_sorted_rows(probabilities, tokens, scores, long_tie, params)
    if params.top_p < 1:
        width = min(TOP_P_CANDIDATES, vocab)
        values, tokens = _most_likely(scores, width)
        mass = (values.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
        too_flat = (mass.sum(-1) < params.top_p) & (width < vocab)
        return _with_sorted_rows(_nucleus(mass, params), tokens, scores, too_flat, params)
    probabilities = scores.double().softmax(-1)
    if params.min_p > 0:
        floor = params.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    return probabilities, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Scores whose softmax is softmax(logits / temperature): (rows, vocab), float32, the largest of each row finite.

    Divided directly wherever float32 holds the result; rows where it does not are shifted by their largest logit
    first, in float64, so that it scores 0. Which way a row goes depends on that row alone.

    Raises:
        ModelError: a logit is NaN, which has no place in any order.
    """
    wide = logits.float()
    scores = wide if temperature == 1 else wide / temperature
    # infinite: the largest overflowed, or none is left; NaN: 0 / 0 or inf / inf, the temperature being no float32
    lost = ~scores.amax(-1).isfinite()
    if not bool(lost.any()):
        return scores
    rows = wide[lost].double()
    if bool(rows.isnan().any()):
        raise _nan_error()
    largest = rows.amax(-1, keepdim=True)
    # written so that inf - inf never counts: whatever equals the largest logit scores 0
    shifted = ((rows - largest) / temperature).masked_fill(rows == largest, 0.0)
    return scores.index_put((lost,), shifted.float())


def _nan_error() -> ModelError:
    return ModelError(
        "the language model's logits are NaN, so no token can be drawn.",
        hint="a half-precision dtype may have overflowed: try dtype=float32 or dtype=bfloat16.",
    )


def _most_likely(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest scores of each row, falling, ties by token id, and their token ids."""
    if width == scores.shape[-1]:
        values, tokens = scores.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    tokens = largest(scores, width).sort(-1).values
    values, order = scores.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


def largest(scores: Tensor, width: int) -> Tensor:
    """Places of the ``width`` largest scores of each row, (rows, width), in no order; which of equal ones is left open.

    The vocabulary is cut into blocks of ``BLOCK`` tokens, and only those ``width`` blocks are searched whose largest
    scores are the largest: a score outside them has ``width`` scores above or equal to it, one in each.
    """
    found = logits_kernels.largest(scores, width)
    if found is not None:
        return found
    rows, vocab = scores.shape
    blocks = vocab // BLOCK
    if blocks < 4 * width:
        return scores.topk(width, dim=-1, sorted=False).indices
    # a block is every ``blocks``-th score, so that the maxima are taken along whole rows of memory
    grid = scores[:, : blocks * BLOCK].unflatten(-1, (BLOCK, blocks))  # (rows, BLOCK, blocks)
    chosen = grid.amax(1).topk(width, dim=-1, sorted=False).indices  # (rows, width)
    rest = torch.arange(blocks * BLOCK, vocab, device=scores.device)
    firsts = torch.arange(0, blocks * BLOCK, blocks, device=scores.device)[:, None]
    places = torch.cat([(chosen[:, None] + firsts).flatten(1), rest.expand(rows, -1)], dim=-1)
    return places.gather(-1, scores.gather(-1, places).topk(width, dim=-1, sorted=False).indices)


def _with_sorted_rows(
    probabilities: Tensor, tokens: Tensor, scores: Tensor, unsure: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """Do the rows marked ``unsure`` over by sorting their whole vocabulary; pad the others to its width.

    Reached by long ties and by very flat distributions only.
    """
    if not bool(unsure.any()):
        return probabilities, tokens
    missing = scores.shape[-1] - tokens.shape[-1]
    probabilities, tokens = functional.pad(probabilities, (0, missing)), functional.pad(tokens, (0, missing))
    values, tokens[unsure] = scores[unsure].sort(dim=-1, descending=True, stable=True)
    if 0 < params.top_k < scores.shape[-1]:
        values = values.masked_fill(values < values[:, params.top_k - 1 : params.top_k], float("-inf"))
    probabilities[unsure] = _nucleus(values.double().softmax(-1), params)
    return probabilities, tokens


def _nucleus(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """top_p and min_p on (rows, candidates) probabilities sorted in descending order."""
    if params.top_p < 1:
        # the token that crosses top_p stays, as in transformers; the first always does
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    if params.min_p > 0:
        floor = params.min_p * probabilities[:, :1]
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    return probabilities
