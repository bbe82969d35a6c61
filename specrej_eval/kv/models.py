"""What can be read off a transformers model: the only file that asks its objects what they have."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

from specrej_eval.kv import shared_prefix

logger = logging.getLogger(__name__)


def obstacle(model: Any) -> str | None:
    """Why a model's attention cannot be exchanged for ours; None if it may work (a probe has the last word)."""
    text_config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    settable = getattr(type(model), "_can_set_attn_implementation", None)
    if not getattr(model, "_supports_attention_backend", False) and not (settable and settable()):
        return "attention that cannot be exchanged"
    return None


def with_softcap(model: Any, *, asked: bool = False) -> Any:
    """The model, with attention that heeds its softcap (Gemma 2): before 5.21 transformers takes ``sdpa``, which leaves
    it out and gives other logits; ``eager`` does not, and is taken from 5.21 on.

    Args:
        asked: whether the user has named the attention: then a warning says that it is another.
    """
    text_config = model.config.get_text_config(decoder=True)
    capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    version = metadata.version("transformers")
    if capped and Version(version) < Version("5.21.0.dev0") and text_config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        logger.log(
            logging.WARNING if asked else logging.INFO,
            "The sdpa attention of transformers %s leaves out the softcap of %s, which gives other logits: eager "
            "attention is taken instead.",
            version,
            text_config.model_type,
        )
    return model


@contextmanager
def our_attention(model: Any) -> Iterator[Any]:
    """Inside, the model attends through ``shared_prefix``; gives what its attention is outside.

    The same object still serves other callers: with our attention no padding mask is built.
    """
    own = attention_of(model.config)
    try:
        model.set_attn_implementation(shared_prefix.NAME)
        yield own
    finally:
        model.set_attn_implementation(own)


def attention_of(config: Any) -> Any:
    """The attention implementations of a config and its sub-configs, in the form ``set_attn_implementation`` takes."""
    if not getattr(config, "sub_configs", None):
        return config._attn_implementation
    saved = {"": config._attn_implementation}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            saved[name] = attention_of(getattr(config, name))
    return saved


def windows_missing(text_config: Any, windows: Mapping[int, int | None]) -> bool:
    """Whether a layer that should have a sliding window asked for none (a probe is too short to see it in numbers).

    Args:
        windows: what each layer asked for (``shared_prefix.Step.windows``).
    """
    window = getattr(text_config, "sliding_window", None)
    if not window or not getattr(text_config, "use_sliding_window", True):
        return False
    num_layers = int(text_config.num_hidden_layers)
    types = getattr(text_config, "layer_types", None) or ["sliding_attention"] * num_layers
    return any(kind == "sliding_attention" and windows.get(layer) != window for layer, kind in enumerate(types))


def rope_limit(text_config: Any) -> int | None:
    """Tokens from which on a sequence's rotary angles change with its length; None where they never do.

    With ``dynamic`` and ``longrope`` scaling the angles change once a sequence outgrows the original context, so keys
    cached before that are wrong after it.
    """
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    entries = [rope, *rope.values()] if isinstance(rope, dict) else []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("rope_type", entry.get("type")) in ("dynamic", "longrope"):
            limit = entry.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            return int(limit or text_config.max_position_embeddings)
    return None


def reset_rotary(model: Any, device: torch.device) -> None:
    """``dynamic`` rotary scaling remembers the longest sequence it saw; numbers may not depend on other prompts."""
    if rope_limit(model.config.get_text_config(decoder=True)) is None:
        return
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq").to(device, copy=True)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, name, module.original_max_seq_len)


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether somebody's code runs beside its forward passes."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def has_odd_widths(model: Any, *, apart_from: Any = None) -> bool:
    """Whether batches of a multiple of ``ROW_ALIGN`` rows are not enough on a CPU, only of twice as many.

    Torch's elementwise loops take 32 floats at a time and do what is left over with scalar functions, whose bits may
    differ (sigmoid, silu, softplus). A multiple of ROW_ALIGN leaves nothing over, unless a layer is an odd number wide:
    the one-output gate of a shared expert is.
    """
    layers = (module for module in model.modules() if module is not apart_from)
    return any(module.out_features % 2 for module in layers if isinstance(module, torch.nn.Linear))


def context_length(model: Any, tokenizer: Any) -> int:
    """The model's context in tokens, by the names configs use for it; else the tokenizer's; else 2048."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int) and limit < 10**9 else 2048


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All ids that end an answer: the generation config's list, the model config's and the tokenizer's own."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return tuple(sorted(found))


def parameters_per_token(model: Any) -> int:
    """Parameters that multiply something for each token: all but the input embeddings (a table to look up), and of
    experts the share that a token is sent to; 0 where the weights do not say (quantised ones)."""
    weights = list(model.named_parameters())
    if getattr(model, "is_quantized", False) or not all(weight.is_floating_point() for _, weight in weights):
        return 0
    text_config = _text_config(model)
    experts = next((n for name in ("num_local_experts", "num_experts") if (n := getattr(text_config, name, None))), 0)
    share = getattr(text_config, "num_experts_per_tok", experts) / experts if experts else 1.0
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = output is not None and table is not None and getattr(output, "weight", None) is getattr(table, "weight", 0)
    looked_up = set() if table is None or tied else {id(weight) for weight in table.parameters()}
    counted = (
        weight.numel() * (share if ".experts." in name else 1.0)
        for name, weight in weights
        if id(weight) not in looked_up
    )
    return int(sum(counted))


def attention_size(model: Any) -> tuple[int, int]:
    """Layers, and heads times the size of one; zeros where the config does not say."""
    config = _text_config(model)
    layers, heads = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    known = all(isinstance(number, int) and number for number in (layers, heads, size))
    return (layers, heads * size) if known else (0, 0)


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    return config if config is None or not hasattr(config, "get_text_config") else config.get_text_config(decoder=True)
