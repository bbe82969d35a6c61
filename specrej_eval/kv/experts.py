"""Mixture-of-experts layers whose rows do not depend on each other, for CPUs.

Rows that are routed to one expert form a matmul of their own, whose size depends on which other rows are in the batch,
and on a CPU a row's bits depend on that size. So each expert's rows are padded to a multiple of ``ROW_ALIGN``, as the
whole batch is. Reading the expert's weights dominates a matmul this small: the padding costs little.

Registered with transformers' experts interface as ``specrej_padded``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from specrej_eval.kv.shared_prefix import ROW_ALIGN

NAME = "specrej_padded"
_REPLACEABLE = (None, "eager", "grouped_mm", "batched_mm")
"""Implementations that compute the same from the same weights; others rearrange the weights when they are loaded."""


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One layer of experts.

    Args:
        self: transformers' experts module; its weights are 3-D, one matrix per expert.
        hidden_states: (tokens, hidden size).
        top_k_index, top_k_weights: (tokens, experts per token); an index beyond the last expert counts for nothing.

    Returns:
        (tokens, hidden size); each token's experts are added up in the order they were routed in.
    """
    per_token = top_k_index.shape[-1]
    chosen = top_k_index.reshape(-1)  # (pairs,): a token and one of its experts
    out = hidden_states.new_zeros(chosen.shape[0], hidden_states.shape[-1])  # (pairs, hidden size)
    for expert in chosen.unique().tolist():
        if expert >= self.num_experts:
            continue
        pairs = (chosen == expert).nonzero()[:, 0]
        rows = hidden_states[pairs // per_token]
        rows = functional.pad(rows, (0, 0, 0, -rows.shape[0] % ROW_ALIGN))
        if self.has_gate:
            inner = self._apply_gate(_linear(self, "gate_up_proj", expert, rows))
        else:
            inner = self.act_fn(_linear(self, "up_proj", expert, rows))
        done = _linear(self, "down_proj", expert, inner)
        if getattr(self, "has_post_expert_norm", False):
            done = self.post_expert_norm(done)
        out[pairs] = done[: pairs.shape[0]]
    out = out * top_k_weights.reshape(-1, 1)
    return out.view(-1, per_token, out.shape[-1]).sum(1).to(hidden_states.dtype)


def _linear(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return functional.linear(rows, weight.T if experts.is_transposed else weight, bias)


@contextmanager
def padded_experts(configs: Sequence[Any]) -> Iterator[None]:
    """Inside, the experts of these configs (``expert_configs``) pad their rows."""
    before = [config._experts_implementation for config in configs]
    for config in configs:
        config._experts_implementation = NAME
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._experts_implementation = own


def expert_configs(model: Any) -> list[Any]:
    """The configs in which a model's experts are looked up; empty if it has none that may be exchanged."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        # what transformers' ``use_experts_implementation`` leaves on a module
        exchangeable = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))
        if config is None or not exchangeable or not _plain_weights(module):
            continue
        if getattr(config, "_experts_implementation", NAME) in _REPLACEABLE:
            found[id(config)] = config
    return list(found.values())


def _plain_weights(module: torch.nn.Module) -> bool:
    weights = list(module.parameters())
    return bool(weights) and all(weight.is_floating_point() and weight.itemsize > 1 for weight in weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
