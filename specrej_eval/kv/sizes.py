"""How large a model is, for counts of floating-point operations (``evidence.flops``)."""

from __future__ import annotations

from typing import Any

import torch


def parameters_per_token(model: Any) -> int:
    """Parameters that each token is multiplied with: all but an embedding that is looked up and nothing else.

    An embedding that is the output layer too counts once.

    Returns:
        0 where the weights do not say: quantized ones, and experts, of which a token meets a few.
    """
    if getattr(model, "is_quantized", False) or any(hasattr(module, "num_experts") for module in model.modules()):
        return 0
    looked_up = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = getattr(looked_up, "weight", None)
    tied = table is not None and table is getattr(output, "weight", None)
    total = sum(weight.numel() for weight in model.parameters() if weight is not table or tied)
    return total if all(weight.is_floating_point() for weight in model.parameters()) else 0


def attention_size(model: Any) -> tuple[int, int]:
    """Layers, and heads times the size of one; zeros where the config does not say."""
    config = model.config.get_text_config(decoder=True)
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    known = all(isinstance(number, int) for number in (layers, heads, width))
    return (layers, heads * width) if known else (0, 0)


def of_modules(*parts: Any) -> int:
    """``parameters_per_token`` of a body and its head together; 0 where one of them does not say."""
    counts = [parameters_per_token(part) for part in parts if isinstance(part, torch.nn.Module)]
    return sum(counts) if all(counts) else 0
