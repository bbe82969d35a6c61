"""Tiny random models of many architectures, and what the engine's tests compare against.

Weight matrices are four times larger than at initialisation: attention is then sharp, so a wrong position, window or
row shows in the logits. Biases and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specrej_eval.engine.groups import Group
from specrej_eval.engine.model import ModelRunner

VOCAB = 97
WINDOW = 8
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how to build it, and which path must decode it."""

    name: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    path: str = "shared_prefix"
    window: bool = False
    """True if some layer has a sliding window of WINDOW tokens."""
    model_type: str = ""
    scale: float = 4.0


ARCHITECTURES = [
    Architecture("llama"),
    Architecture("qwen2"),
    Architecture("qwen2_windows", {**_ALTERNATING, "use_sliding_window": True}, window=True, model_type="qwen2"),
    Architecture("qwen3"),
    Architecture("mistral", {"sliding_window": WINDOW}, window=True),
    Architecture("gemma"),
    Architecture("gemma2", {**_ALTERNATING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, window=True),
    Architecture("gemma3_text", {**_ALTERNATING, "query_pre_attn_scalar": 8}, window=True),
    Architecture("phi3"),
    Architecture("phi3_window", {"sliding_window": WINDOW}, window=True, model_type="phi3"),
    Architecture("phi"),
    Architecture("smollm3"),
    Architecture("olmo2"),
    Architecture("granite"),
    Architecture("cohere2", _ALTERNATING, window=True),
    Architecture("starcoder2", {"sliding_window": WINDOW}, window=True),
    Architecture("stablelm"),
    Architecture("gpt_neox"),
    Architecture("gpt2", _GPT2_SIZES),
    Architecture("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("gpt_oss", {**_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}, window=True),
    Architecture("qwen3_moe", {"num_experts": 4, **_MOE}),
    Architecture("mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}, window=True),
    Architecture("exaone4", _ALTERNATING, window=True),
    Architecture("nemotron"),
    Architecture(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **_MOE,
        },
    ),
    Architecture("bloom", {"n_head": 4, "n_layer": 2}, path="replicated"),
    Architecture("falcon", {"head_dim": None}, path="replicated"),
    Architecture("falcon_alibi", {"alibi": True, "head_dim": None}, path="replicated", model_type="falcon"),
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"]}, path="replicated"),
    Architecture(
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            **_MOE,
        },
        path="replicated",
    ),
    Architecture(
        "qwen2_moe",
        {
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
            **_MOE,
        },
        path="replicated",
        window=True,
    ),
    Architecture(
        "llama4_text",
        {"attention_chunk_size": WINDOW, "num_local_experts": 4, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
        path="replicated",
        window=True,
    ),
    Architecture("mamba", {"state_size": 4, "time_step_rank": 4}, path="replicated"),
    Architecture("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, path="replicated"),
    Architecture("gptj", {**_GPT2_SIZES, "rotary_dim": 4}, path="replicated"),
]
BY_NAME = {arch.name: arch for arch in ARCHITECTURES}


def build(arch: Architecture | str, *, seed: int = 0, **overrides: Any) -> Any:
    """A new model of the table, float32, eval mode."""
    arch = BY_NAME[arch] if isinstance(arch, str) else arch
    arguments = {**_SIZES, **arch.extra, **overrides}
    config = AutoConfig.for_model(arch.model_type or arch.name, **{k: v for k, v in arguments.items() if v is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(arch.scale)
    return model


@cache
def shared_model(name: str) -> Any:
    """One model per name and test session. Leave it as it is."""
    return build(name)
