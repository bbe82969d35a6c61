"""Weights of linear layers laid out once for a CPU's matrix kernels, which makes products faster.

In bfloat16 torch lays a weight out in every call, which for the few rows of a decode step costs about as much as the
product. Where the C++ kernels are in use, they multiply (``native/products.py``): other last bits than torch's, no
farther from the truth, and the same for a row whatever its company. Elsewhere oneDNN does, with torch's bits.
In float32 torch calls MKL, whose bits are others than oneDNN's, though not closer to the truth; with
oneDNN a row's bits do not depend on how many rows there are (measured from two rows up, on one, two and four threads).

The model is not changed by it: parameters, ``state_dict``, hooks, adapters and whoever else calls the model find
everything as it was; only inside ``active`` do its linear layers compute with the copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.kv.memory import free_bytes, is_out_of_memory
from specrej_eval.kv.native import build, products

LARGEST_SHARE = 0.25
"""Of the free memory; if the copies were larger, there are none."""
_DTYPES = (torch.bfloat16, torch.float32)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS = 64
"""Rows that a layout is chosen for; others are right too."""


Source = tuple[int, int]
"""What a copy was made from: where the weight lies, and the sum of its bits. Torch counts writes to a tensor, but not
those through ``.data``, which is how adapters are merged."""


class _PackedForward:
    """In the place of one linear layer's ``forward``."""

    def __init__(self, layer: torch.nn.Linear, weight: Tensor | products.Packed) -> None:
        self._layer = layer
        self.weight = weight

    def __call__(self, input: Tensor) -> Tensor:
        layer, weight = self._layer, self.weight
        if input.dtype != layer.weight.dtype or torch.is_grad_enabled():
            return functional.linear(input, layer.weight, layer.bias)
        if isinstance(weight, Tensor):
            out: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, layer.bias, "none", [], "")
            return out
        if not weight.takes(input, layer.bias):
            return functional.linear(input, layer.weight, layer.bias)
        return weight.product(input, layer.bias)


class PackedWeights:
    """Copies of a model's linear weights; none where they would not help, or take too much memory.

    Args:
        model: any module.
        kernels: whether the C++ kernels multiply, where they can.

    Raises:
        RuntimeError: no memory to try the operators out.
    """

    def __init__(self, model: torch.nn.Module, *, kernels: bool = False) -> None:
        self._layers = [module for module in model.modules() if _packable(module)]
        self._packed: dict[torch.nn.Linear, tuple[Source, Tensor | products.Packed]] = {}
        self._depth = 0
        dtypes = {layer.weight.dtype for layer in self._layers}
        self._kernels: ctypes.CDLL | None = None
        """In bfloat16."""
        if kernels and products.DTYPE in dtypes and products.why_not() is None:
            self._kernels = build.library()
        self.nbytes = sum({layer.weight.data_ptr(): self._nbytes(layer.weight) for layer in self._layers}.values())
        """Memory that the copies take, in bytes; 0 = there are none."""
        able = all(self._is_ours(dtype) or _supported(dtype) for dtype in dtypes)
        if self.nbytes > LARGEST_SHARE * free_bytes(torch.device("cpu")) or not able:
            self._layers, self.nbytes = [], 0

    @property
    def by(self) -> str | None:
        """Whose kernels multiply: ``cpp`` (ours, in bfloat16), ``onednn``; None: torch, as without copies."""
        if not self._layers:
            return None
        return "onednn" if self._kernels is None else "cpp"

    def kernel_of(self, layer: torch.nn.Linear) -> products.Packed | None:
        """Our kernel that computes a layer now; None if none does."""
        forward = vars(layer).get("forward")
        if not isinstance(forward, _PackedForward) or not isinstance(forward.weight, products.Packed):
            return None
        return forward.weight if layer in self._packed and forward.weight is self._packed[layer][1] else None

    def _is_ours(self, dtype: torch.dtype) -> bool:
        return self._kernels is not None and dtype == products.DTYPE

    def _nbytes(self, weight: Tensor) -> int:
        return products.nbytes(weight) if self._is_ours(weight.dtype) else weight.nbytes

    def _made(self, weight: Tensor) -> Tensor | products.Packed:
        if self._kernels is not None and weight.dtype == products.DTYPE:
            return products.Packed(weight, self._kernels)
        made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        return made

    @contextmanager
    def active(self, *, unchanged: bool = False) -> Iterator[None]:
        """Inside, the model's linear layers compute with the copies; those of weights that have changed are made anew.

        Args:
            unchanged: the caller knows that weights are those of the last time: in the middle of a prompt they can be
                no others. Finding out takes about as long as a decode step, which reads all of them too.

        Raises:
            RuntimeError: no memory for the copies; the model is as it was.
        """
        if self._depth:
            yield
            return
        self._refresh(unchanged)
        self._depth += 1
        exchanged: dict[torch.nn.Linear, _PackedForward] = {}
        try:
            for layer, (_, weight) in self._packed.items():
                if "forward" not in vars(layer):  # else somebody has put another there since
                    exchanged[layer] = _PackedForward(layer, weight)
                    layer.forward = exchanged[layer]  # type: ignore[method-assign]  # taken back below
            yield
        finally:
            self._depth -= 1
            for layer, forward in exchanged.items():
                if vars(layer).get("forward") is forward:  # not another's, of the same model in another engine
                    del layer.forward

    def _refresh(self, unchanged: bool) -> None:
        made: dict[Source, Tensor | products.Packed] = {}
        for layer in self._layers:
            if unchanged and layer in self._packed and self._packed[layer][0][0] == layer.weight.data_ptr():
                continue
            source = _source(layer.weight)
            if layer not in self._packed or self._packed[layer][0] != source:
                self._packed.pop(layer, None)  # its memory is free for the next
                if source not in made:
                    made[source] = self._made(layer.weight.detach())
                self._packed[layer] = source, made[source]


def _packable(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it is a plain linear layer on the CPU: no subclass, and nobody has replaced its ``forward`` (accelerate's
    hooks do)."""
    if type(module) is not torch.nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    plain = type(weight) is torch.nn.Parameter and weight.is_contiguous()
    return plain and weight.dtype in _DTYPES and weight.device.type == "cpu"


def _source(weight: Tensor) -> Source:
    bits = weight.detach().flatten()
    by_eight = not (bits.nbytes % 8 or bits.storage_offset() * bits.itemsize % 8)  # the fastest to add up
    return weight.data_ptr(), int(bits.view(torch.int64 if by_eight else _INTEGERS[bits.itemsize]).sum())


@cache
def _supported(dtype: torch.dtype) -> bool:
    """Tried out: the operators are torch's own business, and what they compute must be right."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(size, 64, generator=generator).to(dtype) for size in (48, 16))
    try:
        with torch.inference_mode():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            out = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise  # it says nothing of the operators, and what is found out here holds for the whole process
        return False
    plain = functional.linear(rows, weight)
    return torch.allclose(out, plain, atol=1e-4) if dtype == torch.float32 else torch.equal(out, plain)
