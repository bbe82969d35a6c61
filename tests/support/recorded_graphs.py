"""A CUDA graph's semantics on a CPU: what a region does to tensors is recorded, and done again without its Python.

As with CUDA graphs
- a recording computes nothing: results hold no number before the first replay, and memory that the region writes to is
  as it was;
- a replay runs the same operators on the same memory, in the same order, with the numbers that Python gave them then;
- results lie in the same memory each time;
- what would make the host wait, or read or write the host's memory, is an error while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specrej_eval.engines.transformers import groups as engine_groups
from specrej_eval.kv import graphs
from specrej_eval.kv.cache import SuffixPool

ERROR = "operation not permitted when stream is capturing"
_WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave.Tensor",
    "_index_put_impl_",
    "_pin_memory",
}
"""Operators whose result's shape, or whose answer, the host needs."""


class Replay:
    """What was recorded."""

    def __init__(self) -> None:
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.operators:
            found = [each for each in tree_leaves(function(*args, **kwargs)) if isinstance(each, Tensor)]
            for result, new in zip(results, found, strict=False):  # none where it writes to its arguments
                result.copy_(new)


def _address(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()  # packed weights


class _Recording(TorchDispatchMode):
    def __init__(self, made: Replay) -> None:
        super().__init__()
        self._made = made
        self._mine: set[int] = set()
        """Memory that the region allocated."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """What other memory held, which the region wrote to."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self._refuse(name, function._overloadname, args, given)
        if function._schema.is_mutable:
            written = [
                value
                for argument, value in zip(function._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for each in (each for each in [*written, *kwargs.values()] if isinstance(each, Tensor)):
                whole = each.new_empty(0).set_(each.untyped_storage())
                if _address(each) not in self._mine:
                    self.before.setdefault(_address(each), (whole, whole.clone()))
        out = function(*args, **kwargs)
        if function._schema.is_mutable:
            self._made.operators.append((function, args, kwargs, []))
            return out
        known = {_address(each) for each in given}
        results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if not any(_address(each) in known for each in results):  # else it is a view, and stays one
            self._mine.update(map(_address, results))
            self._made.operators.append((function, args, kwargs, results))
        return out

    def _refuse(self, name: str, overload: str, args: Any, given: list[Tensor]) -> None:
        scalars = all(each.dim() == 0 for each in given)
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        copied = (
            name in ("lift_fresh", "lift_fresh_copy") and not scalars
        )  # the host's memory; a number is passed along
        if name in _WAITS or f"{name}.{overload}" in _WAITS or by_mask or copied:
            raise RuntimeError(f"CUDA error: {ERROR} (aten::{name}.{overload})")


def record(region: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
    """See ``graphs.on_cuda``."""
    assert device.type == "cpu"
    region()  # as there: a first run that is not recorded
    made = Replay()
    recording = _Recording(made)
    with recording:
        out = region()
    for function, _, _, results in made.operators:
        del function
        for each in results:
            each.fill_(float("nan") if each.dtype.is_floating_point else 0)
    for whole, was in recording.before.values():
        whole.copy_(was)
    return made, out


class PoisonedPool(SuffixPool):
    """As on a GPU: all of its memory from the start, and what holds no token is no number."""

    def __init__(self, rows: int, *, capacity: int, align: int = 1, grows: bool = False) -> None:
        del align, grows
        super().__init__(rows, capacity=capacity)

    def _allocate(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_full(shape, float("nan"))


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replay]]:
    """Decode steps on the CPU can be recorded, and pools are those of a GPU. Gives what is recorded."""
    made: list[Replay] = []

    def kept(region: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        graph, out = record(region, device)
        made.append(graph)
        return graph, out

    with monkeypatch.context() as patched:
        patched.setitem(graphs.RECORDERS, "cpu", kept)
        patched.setattr(engine_groups, "SuffixPool", PoisonedPool)
        yield made
