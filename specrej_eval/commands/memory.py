"""`specrej-eval memory`: what the weights of two models take, what a token of KV cache takes, and how many rows fit.

Arithmetic on ``config.json`` alone; nothing is loaded. KV bytes per token are 2 x layers x KV heads x head dim x bytes
per number (every layer keeps a key and a value of each KV head). Weights are those of a dense decoder with a gated MLP
(Llama, Qwen, Mistral, Gemma and the like); a mixture of experts, MLA or a vision tower is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specrej_eval.errors import CheckpointError, ConfigError

SUMMARY = "say what models and KV cache take in memory, and how many rows of one prompt fit"
EXAMPLES = (
    "specrej-eval memory --pretrained meta-llama/Llama-3.1-8B-Instruct --gpu_gb 80",
    "specrej-eval memory --pretrained llama-70b --reward_model llama-8b --gpu_gb 141 --gpus 2",
)

GB = 10**9
SHARE = 0.9
"""Of the memory, for weights and KV cache; the rest is for what a forward pass allocates."""
REWARD_SHARE = 0.25
"""Of what the weights leave, for the reward model's own KV cache (``reward_kv_budget_tokens``)."""
_OTHER = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank", "vision_config", "state_size")
"""What a config has whose weights or cache follow other formulas."""

KNOWN = {
    "llama-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    },
    "llama-70b": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    },
}
"""Configs that need no download: the shapes of Llama 3.1."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one model.

    Raises:
        CheckpointError: from ``of``; a config that follows other formulas, or lacks a number.
    """

    parameters: int
    kv_bytes_per_token: int
    weight_bytes: int

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], *, bits: int = 16, kv_bits: int = 16, head: bool = True) -> Sizes:
        """
        Args:
            bits: of one weight.
            kv_bits: of one number in the KV cache.
            head: False for a reward model: one score in the place of a logit for each token.
        """
        other = [key for key in _OTHER if config.get(key)]
        if other:
            raise CheckpointError(
                f"{name}: a model with {', '.join(other)} follows other formulas than a dense decoder's.",
                hint="its weights are the sum of its weight files; n=max measures its KV cache.",
            )
        try:
            hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
            heads, inner, vocab = (
                int(config[key]) for key in ("num_attention_heads", "intermediate_size", "vocab_size")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{name}: config.json does not say {error}.") from error
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim  # queries and output; keys, values
        layer = attention + 3 * hidden * inner + 2 * hidden  # gate, up and down; two norms
        ends = vocab * hidden * (2 if head and not config.get("tie_word_embeddings") else 1) + hidden
        parameters = layers * layer + ends + (0 if head else hidden)
        return cls(
            parameters=parameters,
            weight_bytes=parameters * bits // 8,
            kv_bytes_per_token=2 * layers * kv_heads * head_dim * kv_bits // 8,
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is left for rows."""

    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    """For the language model's KV cache; below 0 where the weights do not fit."""
    tokens: int

    def rows(self, prompt_tokens: int, tokens_per_row: int) -> int:
        """Rows of one prompt, shared, that hold so many tokens each."""
        return max(0, self.tokens - prompt_tokens) // tokens_per_row


def fit(policy: Sizes, reward: Sizes | None, memory_bytes: int) -> Fit:
    """Both models in ``memory_bytes``, over all GPUs; the reward model's KV cache takes its share."""
    weights = policy.weight_bytes + (reward.weight_bytes if reward else 0)
    left = int(memory_bytes * SHARE) - weights
    kv_bytes = int(left * (1 - REWARD_SHARE)) if reward else left
    return Fit(
        memory_bytes=memory_bytes,
        weight_bytes=weights,
        kv_bytes=kv_bytes,
        tokens=max(0, kv_bytes) // policy.kv_bytes_per_token,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(KNOWN)
    parser.add_argument("--pretrained", help=f"language model: a hub name, a folder, or one of {known}")
    parser.add_argument("--reward_model", help="reward model beside it, the same way (default: none that takes memory)")
    parser.add_argument("--gpu_gb", type=float, default=80.0, help="memory of one GPU in GB, 10^9 bytes (default: 80)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the models (default: 1)")
    parser.add_argument("--bits", type=int, default=16, help="bits of a weight: 16, 8 or 4 (default: 16)")
    parser.add_argument("--kv_bits", type=int, default=16, help="bits of a number in the KV cache (default: 16)")
    parser.add_argument("--prompt_tokens", type=int, default=1024, help="tokens of the prompt (default: 1024)")
    parser.add_argument("--max_gen_toks", type=int, default=2048, help="tokens of a row at its end (default: 2048)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print (default: text)")


def run(args: argparse.Namespace) -> int:
    """Raises:
    ConfigError: no model, or a number below 1.
    CheckpointError: no ``config.json``, or one of another kind.
    """
    if args.pretrained is None:
        raise ConfigError("memory needs --pretrained.", hint=f"a hub name, a folder, or one of {', '.join(KNOWN)}.")
    for name in ("gpu_gb", "gpus", "bits", "kv_bits", "prompt_tokens", "max_gen_toks"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(args, name)}.")
    policy = Sizes.of(args.pretrained, _config("pretrained", args.pretrained), bits=args.bits, kv_bits=args.kv_bits)
    reward = None
    if args.reward_model is not None:
        reward = Sizes.of(args.reward_model, _config("reward_model", args.reward_model), head=False)
    found = fit(policy, reward, int(args.gpu_gb * GB) * args.gpus)
    looks = [args.max_gen_toks >> halvings for halvings in range(4) if args.max_gen_toks >> halvings]
    rows = {look: found.rows(args.prompt_tokens, look) for look in looks}
    if args.format == "json":
        told = {"weight_bytes": found.weight_bytes, "kv_bytes_per_token": policy.kv_bytes_per_token}
        print(json.dumps({**told, "kv_tokens": found.tokens, "rows_at": rows}, indent=2))
        return 0 if found.kv_bytes > 0 else 1
    print(f"language model   {policy.parameters / GB:.2f} billion parameters, {policy.weight_bytes / GB:.1f} GB")
    if reward is not None:
        print(f"reward model     {reward.parameters / GB:.2f} billion parameters, {reward.weight_bytes / GB:.1f} GB")
    print(f"KV cache         {policy.kv_bytes_per_token:,} bytes for each token of the language model")
    if found.kv_bytes <= 0:
        print(f"too much for {SHARE:.0%} of {found.memory_bytes / GB:.0f} GB: it takes more GPUs or fewer bits")
        return 1
    print(f"left for it      {found.kv_bytes / GB:.1f} GB of {found.memory_bytes / GB:.0f}: {found.tokens:,} tokens")
    for look, number in rows.items():
        print(f"rows of {look:>6} tokens beside a prompt of {args.prompt_tokens}: {number:,}")
    return 0


def _config(argument: str, name: str) -> Mapping[str, Any]:
    from specrej_eval import checkpoint

    return KNOWN[name] if name in KNOWN else checkpoint.read_config(argument, name)
