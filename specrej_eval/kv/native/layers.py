"""A decode step of a whole decoder layer in one call: with few rows, a quarter of a step is Python between operators.

Only layers whose code is known, word for word, are taken: those of Llama's form, with or without a window, with or
without norms of each head, in bfloat16. The call is made of the kernels that stand in for its operators one by one
(``fused``, ``packed``, ``attention/cpp``), so its bits are theirs; each layer's first call is compared with them, and
where a bit is another, layers are computed as before. So is whatever has something special about it: hooks, adapters,
a row's first token, a prompt.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules

from specrej_eval.kv import shared_prefix
from specrej_eval.kv.attention import cpp
from specrej_eval.kv.attention.base import AttentionParams
from specrej_eval.kv.native import build, products
from specrej_eval.kv.native.fused import FusedOperators, code_of, is_silu, plain
from specrej_eval.kv.packed import PackedWeights
from specrej_eval.kv.steps import DecodeStep

logger = logging.getLogger(__name__)

_LINEAR = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "before_attention": "input_layernorm",
    "before_mlp": "post_attention_layernorm",
    "of_queries": "self_attn.q_norm",
    "of_keys": "self_attn.k_norm",
}
_OF_HEADS = ("of_queries", "of_keys")


@dataclass(frozen=True, slots=True)
class _Form:
    """What attention does besides what Llama's does."""

    window: Literal["none", "of the config", "of the module"] = "none"
    """Where its sliding window is found."""
    heads: bool = False
    """Whether queries and keys have norms of each head."""
    may_not_rotate: bool = False
    """Whether its ``use_rope`` says if it has rotary embeddings."""


_LAYERS = ("dc2a7e8a52a4",)
"""Codes of ``forward``: of decoder layers, in transformers 5.17 to 5.24."""
_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = (
    _Form(),
    _Form(window="of the config"),
    _Form(window="of the module"),
    _Form(window="of the module", heads=True),
)
_SMOLLM3 = _Form(window="of the module", may_not_rotate=True)
_ATTENTION = {
    **{"a5c2468be9c4": _LLAMA, "63d31441cffb": _MISTRAL, "aab65fa195fa": _QWEN2, "8fad30359f99": _QWEN3},
    **{"28777c280b60": _SMOLLM3},
    # since 5.24, which tells a cache more
    **{"bfcd58138c91": _LLAMA, "d387608e6b5e": _MISTRAL, "c3596ba99313": _QWEN2, "200d77550ce8": _QWEN3},
    **{"6d94ef330e93": _SMOLLM3},
}
"""And of attention."""
_CACHE = ("past_key_values", "cache")
"""Names of the cache, until and since 5.24."""
_TAKEN = {"attention_mask", "position_ids", "use_cache", "position_embeddings", "cache_position", *_CACHE}
"""Keyword arguments of a layer that it is known what they are for; our attention needs neither mask nor cache."""


class FusedLayers:
    """Calls in the place of whole layers, in a decode step; none where there are none.

    Args:
        model: any module.
        wanted: False = none.
    """

    def __init__(self, model: torch.nn.Module, *, wanted: bool = True) -> None:
        self._layers = [found for module in model.modules() if wanted and (found := _known(module)) is not None]
        self._depth = 0

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def active(self, packed: PackedWeights, fused: FusedOperators) -> Iterator[None]:
        """Inside, one call computes a layer's decode step.

        Args:
            packed, fused: the kernels that compute its operators one by one; they are ``active``.
        """
        if self._depth:
            yield
            return
        self._depth += 1
        exchanged: list[_Layer] = []
        try:
            if not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks):
                for layer in self._layers:
                    if layer.prepare(packed, fused):
                        layer.module.forward = layer
                        exchanged.append(layer)
            yield
        finally:
            self._depth -= 1
            for layer in exchanged:
                if vars(layer.module).get("forward") is layer:
                    del layer.module.forward
            if any(layer.bits == "other" for layer in self._layers):
                logger.warning("C++ calls for whole layers give other bits than their parts here, and are not used.")
                self._layers = []


class _Layer:
    """In the place of one layer's ``forward``."""

    def __init__(self, module: Any, form: _Form) -> None:
        self.module = module
        self.bits: Literal["unknown", "same", "other"] = "unknown"
        """Compared with those of the operators one by one."""
        self._form = form
        self._linear: dict[str, Any] = {name: module.get_submodule(path) for name, path in _LINEAR.items()}
        norms = _NORMS if form.heads else {name: path for name, path in _NORMS.items() if name not in _OF_HEADS}
        self._norms: dict[str, Any] = {name: module.get_submodule(path) for name, path in norms.items()}
        self._modules = list(module.modules())
        self._made_from: list[Any] = []
        self._told: Any = None
        self._params = AttentionParams(1.0)

    def prepare(self, packed: PackedWeights, fused: FusedOperators) -> bool:
        """Note where its weights are. False if one of its operators is not computed by a kernel of ours now."""
        module, attention = self.module, self.module.self_attn
        if list(module.modules()) != self._modules or _form_of(module) != self._form:  # an adapter, or a patch
            return False
        if "forward" in vars(module) or "forward" in vars(attention) or not is_silu(module.mlp.act_fn):
            return False
        if any(each._forward_hooks or each._forward_pre_hooks for each in self._modules[1:]):
            return False  # its own are called by whoever calls it
        kernels = {name: packed.kernel_of(layer) for name, layer in self._linear.items()}
        if not all(map(fused.stands_for, (module.mlp, *self._norms.values()))) or None in kernels.values():
            return False
        rotates = not self._form.may_not_rotate or bool(attention.use_rope)
        if rotates and not fused.rotates(type(attention).__module__):
            return False
        self._params = AttentionParams(float(attention.scaling), self._window_of(attention), None, None)
        biases = {name: layer.bias for name, layer in self._linear.items()}
        weights = {name: norm.weight for name, norm in self._norms.items()}
        epsilons = [norm.variance_epsilon for norm in self._norms.values()]
        places = [None if each is None else each.data_ptr() for each in (*biases.values(), *weights.values())]
        made_from = [*kernels.values(), *places, *epsilons, attention.head_dim, rotates]
        if made_from != self._made_from:
            self._made_from = []
            told = _told(kernels, biases, weights, epsilons, attention.head_dim)
            if told is None:
                return False
            told.rotates = rotates
            self._told, self._made_from = told, made_from
        return True

    def _window_of(self, attention: Any) -> int | None:
        if self._form.window == "none":
            return None
        place = attention.config if self._form.window == "of the config" else attention
        found: int | None = getattr(place, "sliding_window", None)
        return found

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = None
        if not args and self.bits != "other":
            out = self._decoded(hidden_states, kwargs)
            if out is not None and self.bits == "same":
                return out
        found: Tensor = type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        if out is not None:
            same = torch.allclose(out, found, rtol=0, atol=0, equal_nan=True)
            self.bits = "same" if same else "other"
        return found

    def _decoded(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """(rows, 1, hidden), keys and values stored; None, and nothing done, where this is not a step that is known."""
        step = shared_prefix.in_progress()
        if not isinstance(step, DecodeStep) or not isinstance(step.attention, cpp.Backend):
            return None
        if not kwargs.keys() <= _TAKEN or not isinstance(kwargs.get("position_embeddings"), tuple):
            return None
        told, width = self._told, self._told.width
        rows = x.shape[0]
        cos, sin = kwargs["position_embeddings"]
        able = x.dim() == 3 and x.shape[1:] == (1, told.output.outputs) and plain(x, cos, sin)
        able = able and x.dtype == products.DTYPE and x.is_contiguous()
        able = able and cos.shape == sin.shape and cos.shape in ((rows, 1, width), (1, 1, width))
        if not able or not (cos.is_contiguous() and sin.is_contiguous()):
            return None
        layer = self.module.self_attn.layer_idx
        decode = cpp.noted(step.groups, layer, self._params)
        if decode is None:
            return None
        step.windows[layer] = self._params.window
        out = torch.empty_like(x)
        table_row = width if cos.shape[0] > 1 else 0
        places = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), table_row, rows, out.data_ptr()
        run = build.library().layer
        if needed := run(told, decode, *places, step.scratch.data_ptr(), step.scratch.nbytes):
            step.scratch = torch.empty(needed, dtype=torch.uint8)
            run(told, decode, *places, step.scratch.data_ptr(), needed)
        return out


def _told(
    kernels: Mapping[str, Any], biases: Mapping[str, Any], weights: Mapping[str, Any], epsilons: list[Any], width: int
) -> Any:
    """``build.Layer``; None where something has a size or a place that is not known."""
    told = build.Layer()
    told.width = width
    for name, kernel in kernels.items():
        setattr(told, name, kernel.told)
    inputs = {name: kernel.inputs for name, kernel in kernels.items()}
    outputs = {name: kernel.outputs for name, kernel in kernels.items()}
    hidden, heads, inner = inputs["query"], outputs["query"], inputs["down"]
    sized = all(inputs[name] == hidden for name in ("key", "value", "gate", "up")) and inputs["output"] == heads
    sized = sized and outputs["gate"] == outputs["up"] == inner and outputs["output"] == outputs["down"] == hidden
    sized = sized and outputs["key"] == outputs["value"] and not any(each % 2 for each in (hidden, inner, width))
    sized = sized and not heads % width and not outputs["key"] % width and not heads % outputs["key"]
    for name, bias in biases.items():
        if bias is not None:
            sized = sized and bias.is_contiguous() and bias.is_cpu and bias.dtype == products.DTYPE
            setattr(told, f"{name}_bias", bias.data_ptr())
    for (name, weight), epsilon in zip(weights.items(), epsilons, strict=True):
        sized = sized and weight.is_contiguous() and weight.is_cpu and weight.dtype == products.DTYPE
        sized = sized and weight.numel() == (width if name in _OF_HEADS else hidden)
        setattr(told, name, weight.data_ptr())
        setattr(told, f"{name}_eps", epsilon)
    return told if sized else None


def _known(module: Any) -> _Layer | None:
    """None if it is not a decoder layer whose code is known."""
    form = _form_of(module)
    if form is None:
        return None
    wanted = {path for name, path in (_LINEAR | _NORMS).items() if form.heads or name not in _OF_HEADS}
    parts = {name for name, part in module.named_modules() if name and not list(part.children())}
    return _Layer(module, form) if parts == wanted | {"mlp.act_fn"} else None


def _form_of(module: Any) -> _Form | None:
    """By the code of a decoder layer and of its attention."""
    attention = getattr(module, "self_attn", None)
    if _digest(type(module).forward) not in _LAYERS or not isinstance(attention, torch.nn.Module):
        return None
    return _ATTENTION.get(_digest(type(attention).forward) or "")


@cache
def _digest(function: Any) -> str | None:
    """Of its code; None if that is unknown."""
    code = code_of(function)
    if code is None:
        return None
    return hashlib.sha256(re.sub(rf"\b{_CACHE[0]}\b", _CACHE[1], code).encode()).hexdigest()[:12]
