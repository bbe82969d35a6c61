"""Whether a model may be run in a way of ours is not assumed but tried out: what the probes have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from specrej_eval.kv.memory import is_out_of_memory

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Of the largest number compared."""
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError)

MOST_THREADS = 2
"""On more, torch cuts elementwise loops at places that depend on the number of rows, and computes the few elements at a
cut with scalar functions of other bits: too rare for a probe to see."""

logger = logging.getLogger(__name__)


def may_be_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a row's numbers have a chance to be the same bits in any company: in float32 on few threads of a CPU."""
    return device.type == "cpu" and dtype == torch.float32 and torch.get_num_threads() <= MOST_THREADS


def probe_ids(count: int, vocab: int) -> list[int]:
    """Token ids that look random and are the same everywhere."""
    return [(place * 7919 + 11) % vocab for place in range(count)]


def tried(work: Callable[[], str | None]) -> str | None:
    """What ``work`` says is wrong, or the error that running a model ended in, in one line; None if all is well.

    Raises:
        RuntimeError: memory ran out, which says nothing of the model.
    """
    try:
        with torch.inference_mode():
            return work()
    except _MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        logger.debug("a probe failed", exc_info=True)
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def difference(error: float, largest: float, dtype: torch.dtype, what: str) -> str | None:
    """Why an error is too large to come from rounding in ``dtype``; None if it is not.

    Args:
        largest: number compared, in absolute value.
        what: was compared.
    """
    allowed = _TOLERANCE.get(dtype, 8e-2) * max(largest, 1e-6)
    return None if error <= allowed else f"{what} differ by {error:.1e}"
