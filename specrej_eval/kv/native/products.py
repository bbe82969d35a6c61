"""Rows times the weight of a linear layer, in bfloat16: a weight is laid out once, and read from memory once a call.

Each number is one float32 sum over the inputs in their order, the bias last, rounded once; so a row's bits depend
neither on how many rows there are nor on the number of threads. Numbers below bfloat16's normal range count as zeros
(as for every product of pairs by AVX512-BF16, torch's included); NaN and infinities are kept.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.kv.native import build

logger = logging.getLogger(__name__)

DTYPE = torch.bfloat16
_TENSORS = (Tensor, torch.nn.Parameter)
"""What has its numbers where it says: subclasses (quantised, sharded) need not."""
_LANES = 16
"""Outputs that lie side by side, as in kernels.cpp."""
_TRIED = ((1, 64, 48), (24, 96, 80), (11, 33, 21), (3, 1, 1), (40, 130, 200), (5, 2101, 40), (270, 32, 33))
"""Rows, inputs and outputs of products that are compared with float64 before the first that counts."""


class Packed:
    """The weight of a linear layer, laid out.

    Args:
        weight: (outputs, inputs), bfloat16, contiguous, on a CPU.
        kernels: see ``build.library``.

    Raises:
        RuntimeError: no memory for it.
    """

    def __init__(self, weight: Tensor, kernels: ctypes.CDLL) -> None:
        self._kernels = kernels
        self.outputs, self.inputs = weight.shape
        vectors, words = _laid_out(weight)
        self._numbers = torch.empty(vectors, words, 2 * _LANES, dtype=DTYPE)
        kernels.pack(weight.data_ptr(), self.outputs, self.inputs, self._numbers.data_ptr())
        self.told: Any = build.Weights(self._numbers.data_ptr(), words, self.outputs)

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether these are plain tensors on a CPU, bfloat16, of its sizes and not empty."""
        for each in (x,) if bias is None else (x, bias):
            if type(each) not in _TENSORS or each.dtype != DTYPE or not each.is_cpu:
                return False
        sized = x.dim() > 0 and x.shape[-1] == self.inputs and x.numel() > 0
        return sized and (bias is None or bias.is_contiguous())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., inputs) -> (..., outputs).

        Args:
            bias: (outputs,), contiguous; like ``x`` bfloat16 on a CPU.
        """
        rows = x.reshape(-1, self.inputs)
        if self.inputs % 2:
            rows = functional.pad(rows, (0, 1))
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(*x.shape[:-1], self.outputs, dtype=DTYPE)
        self._kernels.product(
            *(rows.data_ptr(), rows.stride(0), self.told, None if bias is None else bias.data_ptr()),
            *(out.data_ptr(), rows.shape[0]),
        )
        return out


def nbytes(weight: Tensor) -> int:
    """Memory that a weight takes when it is laid out."""
    vectors, words = _laid_out(weight)
    return vectors * words * _LANES * 4


def _laid_out(weight: Tensor) -> tuple[int, int]:
    """Vectors of outputs, and words of two inputs each; the last ones are filled up with zeros."""
    outputs, inputs = weight.shape
    return -(-outputs // _LANES), -(-inputs // 2)


@cache
def why_not() -> str | None:
    """Why products cannot be computed here; None if they can. Tries some, the first time."""
    if reason := build.why_not():
        return reason
    kernels = build.library()
    if not kernels.multiplies():
        return "the processor has no AVX512-BF16, or has AMX, for which torch's products are made"
    if reason := mistake(kernels):
        logger.warning("Products of the C++ kernels are wrong on this machine and are not used: %s", reason)
        return reason
    return None


def mistake(kernels: ctypes.CDLL) -> str | None:
    """What is wrong with a few products of all kinds; None if nothing is."""
    for seed, (rows, inputs, outputs) in enumerate(_TRIED):
        generator = torch.Generator().manual_seed(seed)
        shapes = (rows, inputs), (outputs, inputs), (outputs,)
        x, weight, bias = (torch.randn(*shape, generator=generator).to(DTYPE) for shape in shapes)
        packed = Packed(weight, kernels)
        with torch.inference_mode():
            out = packed.product(x, bias)
            want = functional.linear(x.double(), weight.double(), bias.double())
            shape = f"{rows} x {inputs} x {outputs}"
            if not torch.allclose(out.double(), want, rtol=2**-8, atol=1e-3):
                return f"numbers of {shape}"
            for first in range(rows):
                few = slice(first, first + 1 + first % 9)
                if not torch.equal(packed.product(x[few], bias), out[few]):
                    return f"a row of {shape} depends on its company"
    return None
