"""Weights of linear layers laid out once for a CPU's matrix kernels, in bfloat16: the same bits in less time.

Torch lays a weight out for oneDNN in every call, which for the few rows of a decode step costs about as much as the
product. Here it is done once. The model is not changed by it: parameters, ``state_dict``, hooks, adapters and whoever
else calls the model find everything as it was; only inside ``active`` do its linear layers compute with the copies. In
float32 the copies would give other bits, so there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from specrej_eval.kv.memory import free_bytes

LARGEST_SHARE = 0.25
"""Of the free memory; if the copies were larger, there are none."""
_ROWS = 64
"""Rows that a layout is chosen for; others are right too."""


Source = tuple[int, int]
"""What a copy was made from: where the weight lies, and the sum of its bits. Torch counts writes to a tensor, but not
those through ``.data``, which is how adapters are merged; adding all up takes a few milliseconds per call of ours."""


class _PackedForward:
    """In the place of one linear layer's ``forward``."""

    def __init__(self, layer: torch.nn.Linear, weight: Tensor) -> None:
        self._layer = layer
        self._weight = weight

    def __call__(self, input: Tensor) -> Tensor:
        layer = self._layer
        if input.dtype != torch.bfloat16 or torch.is_grad_enabled():
            return functional.linear(input, layer.weight, layer.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, layer.bias, "none", [], "")
        return out


class PackedWeights:
    """Copies of a model's linear weights; none where they would not help, or take too much memory.

    Args:
        model: any module.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = [module for module in model.modules() if _packable(module)]
        self._packed: dict[torch.nn.Linear, tuple[Source, Tensor]] = {}
        self._depth = 0
        self.nbytes = sum({layer.weight.data_ptr(): layer.weight.nbytes for layer in self._layers}.values())
        """Memory that the copies take, in bytes; 0 = there are none."""
        if self.nbytes > LARGEST_SHARE * free_bytes(torch.device("cpu")) or not _supported():
            self._layers, self.nbytes = [], 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model's linear layers compute with the copies; those of weights that have changed are made anew.

        Raises:
            RuntimeError: no memory for the copies; the model is as it was.
        """
        if self._depth:
            yield
            return
        self._refresh()
        self._depth += 1
        try:
            for layer, (_, weight) in self._packed.items():
                if "forward" not in vars(layer):  # else somebody has put another there since
                    layer.forward = _PackedForward(layer, weight)  # type: ignore[method-assign]  # taken back below
            yield
        finally:
            self._depth -= 1
            for layer in self._packed:
                if isinstance(vars(layer).get("forward"), _PackedForward):
                    del layer.forward

    def _refresh(self) -> None:
        made: dict[Source, Tensor] = {}
        for layer in self._layers:
            source = _source(layer.weight)
            if layer not in self._packed or self._packed[layer][0] != source:
                self._packed.pop(layer, None)  # its memory is free for the next
                if source not in made:
                    made[source] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
                self._packed[layer] = source, made[source]


def _packable(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it is a plain linear layer in bfloat16 on the CPU: no subclass, and nobody has replaced its ``forward``
    (accelerate's hooks do)."""
    if type(module) is not torch.nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    plain = type(weight) is torch.nn.Parameter and weight.is_contiguous() and not weight.nbytes % 8
    return plain and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def _source(weight: Tensor) -> Source:
    return weight.data_ptr(), int(weight.detach().view(torch.int64).sum())


@cache
def _supported() -> bool:
    """Tried out: the operators are torch's own business, and the bits must be the same."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(size, 64, generator=generator).bfloat16() for size in (48, 16))
    try:
        with torch.inference_mode():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            out = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
            return torch.equal(out, functional.linear(rows, weight))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
