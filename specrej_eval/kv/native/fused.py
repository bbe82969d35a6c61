"""Small operators of a layer (RMSNorm, rotary embedding, SiLU gate) as one C++ kernel each; torch needs five to ten.

A module is taken only if its code is, word for word, that of transformers' Llama, from which most models' are copied;
whatever is another's stays as it is. As with packed weights, nothing of the model is changed by it, and the kernels
stand in only inside ``active``. They round where the model's own operators round: rotary embeddings are the same bits,
the others differ in last bits of float32.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from specrej_eval.kv.native import build

_DTYPES = (torch.bfloat16, torch.float32)
_TENSORS = (Tensor, torch.nn.Parameter)
"""What has its numbers where it says: subclasses (quantised, sharded) need not."""
_SILU = (torch.nn.SiLU, type(ACT2FN["silu"]))
_ROTARY = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


class _Norm:
    """In the place of one norm's ``forward``."""

    def __init__(self, module: torch.nn.Module, kernels: ctypes.CDLL) -> None:
        self._module = module
        self._kernels = kernels

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module: Any = self._module
        weight: Tensor = module.weight
        width = hidden_states.shape[-1]
        able = plain(hidden_states, weight) and weight.numel() == width
        if not able or not hidden_states.is_contiguous() or not weight.is_contiguous():
            found: Tensor = type(module).forward(module, hidden_states)
            return found
        out = torch.empty_like(hidden_states)
        self._kernels.norm(
            *(hidden_states.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(hidden_states.numel() // width, width, module.variance_epsilon, weight.dtype == torch.float32),
        )
        return out


class _Gated:
    """In the place of one MLP's ``forward``."""

    def __init__(self, module: torch.nn.Module, kernels: ctypes.CDLL) -> None:
        self._module = module
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self._module
        gate, up = module.gate_proj(x), module.up_proj(x)
        able = plain(gate, up) and gate.shape == up.shape and is_silu(module.act_fn)
        if able and gate.is_contiguous() and up.is_contiguous():
            out = torch.empty_like(gate)
            addresses = gate.data_ptr(), up.data_ptr(), out.data_ptr()
            self._kernels.gate(*addresses, gate.numel(), gate.dtype == torch.float32)
        else:
            out = module.act_fn(gate) * up
        found: Tensor = module.down_proj(out)
        return found


class _Rotated:
    """In the place of a module's ``apply_rotary_pos_emb``, which all models of its kind share: a thread in which no
    kernels are in use finds the module's own."""

    def __init__(self, original: Rotary, kernels: ctypes.CDLL) -> None:
        self._original = original
        self._kernels = kernels

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        able = build.in_use() is not None
        able = able and unsqueeze_dim == 1 and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        able = able and cos.shape[-1] == q.shape[-1] == k.shape[-1] and cos.shape[1] == q.shape[2] == k.shape[2]
        able = able and not cos.shape[-1] % 2
        able = able and cos.shape[0] in (1, q.shape[0]) and q.shape[0] == k.shape[0]
        able = able and plain(q, k, cos, sin) and cos.is_contiguous() and sin.is_contiguous()
        if not able or q.stride(-1) != 1 or k.stride(-1) != 1:
            return self._original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return self._rotated(q, cos, sin), self._rotated(k, cos, sin)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        batch, heads, tokens, width = x.shape
        self._kernels.rotate(
            *(x.data_ptr(), _Strides(*x.stride()[:3]), out.data_ptr(), _Strides(*out.stride()[:3])),
            *(cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else tokens * width),
            *(batch, heads, tokens, width, x.dtype == torch.float32),
        )
        return out


_Strides = ctypes.c_int64 * 3
_guard = threading.Lock()
_exchanged: dict[str, tuple[Any, int]] = {}
"""Modules of Python code, by name, whose function is exchanged: what it was, and how often it is."""


@contextmanager
def _exchange(rotary: Mapping[str, _Rotated]) -> Iterator[None]:
    """Inside, modules have these functions. Two models, each in a thread of its own, may both be in here: the first of
    them exchanges a function, and the last puts it back."""
    with _guard:
        for name, function in rotary.items():
            original, times = _exchanged.get(name) or (getattr(sys.modules[name], _ROTARY), 0)
            _exchanged[name] = original, times + 1
            if not times:
                setattr(sys.modules[name], _ROTARY, function)
    try:
        yield
    finally:
        with _guard:
            for name in rotary:
                original, times = _exchanged.pop(name)
                if times > 1:
                    _exchanged[name] = original, times - 1
                else:
                    setattr(sys.modules[name], _ROTARY, original)


def plain(*tensors: Tensor) -> bool:
    """Whether these are what the kernels take: plain tensors on a CPU, of one dtype, and nobody wants gradients."""
    dtype = tensors[0].dtype
    for each in tensors:
        if type(each) not in _TENSORS or each.dtype != dtype or not each.is_cpu:
            return False
    return dtype in _DTYPES and not torch.is_grad_enabled()


class FusedOperators:
    """Kernels in the place of a model's small operators, and in use for its logits; none where there are none.

    Args:
        model: any module.
        wanted: False = none.
    """

    def __init__(self, model: torch.nn.Module, *, wanted: bool = True) -> None:
        self._forwards: dict[torch.nn.Module, Any] = {}
        self._rotary: dict[str, _Rotated] = {}
        """Modules of Python code, by name, whose function is exchanged."""
        self._depth = 0
        able = wanted and next(model.parameters()).device.type == "cpu" and build.why_not() is None
        self._kernels = build.library() if able else None
        if self._kernels is not None:
            self._find(model, self._kernels)

    def _find(self, model: torch.nn.Module, kernels: ctypes.CDLL) -> None:
        for module in model.modules():
            if "forward" in vars(module):  # somebody has put another there (accelerate's hooks do)
                continue
            code = code_of(type(module).forward)
            if code == code_of(modeling_llama.LlamaRMSNorm.forward) and _has(module, "weight", "variance_epsilon"):
                self._forwards[module] = _Norm(module, kernels)
            elif code == code_of(modeling_llama.LlamaMLP.forward) and is_silu(getattr(module, "act_fn", None)):
                self._forwards[module] = _Gated(module, kernels)
            of = sys.modules.get(type(module).__module__)
            function = getattr(of, _ROTARY, None)
            if of is not None and inspect.isfunction(function) and of.__name__ not in self._rotary:
                same = code_of(function) == code_of(modeling_llama.apply_rotary_pos_emb)
                halves = code_of(getattr(of, "rotate_half", None)) == code_of(modeling_llama.rotate_half)
                if same and halves:
                    self._rotary[of.__name__] = _Rotated(function, kernels)

    def __len__(self) -> int:
        return len(self._forwards) + len(self._rotary)

    def stands_for(self, module: torch.nn.Module) -> bool:
        """Whether a kernel computes it now."""
        return module in self._forwards and vars(module).get("forward") is self._forwards[module]

    def rotates(self, name: str) -> bool:
        """Whether a kernel computes the rotary embeddings of a module of Python code now."""
        if name not in self._rotary or build.in_use() is None:
            return False
        return isinstance(getattr(sys.modules[name], _ROTARY), _Rotated)  # perhaps another model's, which came first

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, kernels compute these operators."""
        if self._depth:
            yield
            return
        self._depth += 1
        try:
            for module, forward in self._forwards.items():
                if "forward" not in vars(module):
                    module.forward = forward
            with _exchange(self._rotary), build.used(self._kernels):
                yield
        finally:
            self._depth -= 1
            for module, forward in self._forwards.items():
                if vars(module).get("forward") is forward:
                    del module.forward


def is_silu(function: Any) -> bool:
    """Whether it computes SiLU, and nobody listens to it: hooks run only where it is called."""
    if type(function) not in _SILU or "forward" in vars(function):
        return False
    return not (function._forward_hooks or function._forward_pre_hooks)


def _has(module: torch.nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


@cache
def code_of(function: Any) -> str | None:
    """The arguments and statements of a function, without its name, decorators, docstring and annotations; None if they
    are unknown."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    for argument in (each for each in ast.walk(tree.args) if isinstance(each, ast.arg)):
        argument.annotation = None
    return "\n".join([ast.unparse(tree.args), *map(ast.unparse, body)])
