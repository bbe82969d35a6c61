"""InternLM2-reward: a linear head at a reward token that is put behind the conversation.

Source: Cai et al., "InternLM2 Technical Report" (2024), model card and ``modeling_internlm2.py`` of
internlm/internlm2-{1_8b,7b,20b}-reward.

InternLM2 is Llama with other names and with query, key and value in one matrix, grouped by key-value head: for each,
its queries, then its key, then its value. transformers has no such class, so the tensors are taken apart for its Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from specrej_eval.errors import CheckpointError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import (
    LastToken,
    assemble,
    body_config,
    fill,
    load_body,
    read_tensors,
    required,
)
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

_RENAMED = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
}
"""InternLM2's names and Llama's."""


class Family(RewardFamily):
    READS = "a linear head at the reward token put behind the conversation"
    EXAMPLES = ("internlm/internlm2-1_8b-reward", "internlm/internlm2-7b-reward", "internlm/internlm2-20b-reward")
    NEEDS = "trust_remote_code=True for its tokenizer, unless the folder holds a tokenizer.json"
    ARCHITECTURES = ("InternLM2ForRewardModel",)

    def check(self, name: str, raw: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: config.json does not name the reward token.
        """
        required(name, raw, "reward_token_id")

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        raw = source.raw
        bias = raw.get("bias", False)
        llama = body_config(source.name, {**raw, "attention_bias": bias}, model_type="llama")
        tensors = read_tensors(source, lambda key: True)
        state = llama_state(
            source.name, {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}, llama
        )
        body, tokenizer = load_body(source, model_config=llama, state=state)
        head = fill(source, nn.Linear(llama.hidden_size, 1, bias=False), tensors, "v_head.")
        return assemble(source, body, tokenizer, LastToken(head), trailing_ids=(int(raw["reward_token_id"]),))


def llama_state(name: str, tensors: Mapping[str, Tensor], llama: Any) -> dict[str, Tensor]:
    """InternLM2's tensors under Llama's names.

    Raises:
        CheckpointError: a fused matrix that does not divide into the heads of config.json.
    """
    state = {}
    queries = llama.num_attention_heads // llama.num_key_value_heads  # that share one key-value head
    for key, tensor in tensors.items():
        plain = key.removeprefix("model.")
        if ".attention.wqkv." in plain:
            layer, kind = plain.split(".attention.wqkv.")  # weight or bias
            if tensor.shape[0] != llama.num_key_value_heads * (queries + 2) * llama.head_dim:
                raise CheckpointError(
                    f"reward_model={name!r}: {key} has {tensor.shape[0]} rows, but its config.json calls for "
                    f"{llama.num_key_value_heads} x ({queries} + 2) heads of {llama.head_dim}.",
                    hint="config.json and weights do not match, or the file was cut short.",
                )
            heads = tensor.unflatten(0, (llama.num_key_value_heads, queries + 2, llama.head_dim))
            parts = {"q_proj": heads[:, :queries], "k_proj": heads[:, -2:-1], "v_proj": heads[:, -1:]}
            for part, rows in parts.items():
                state[f"{layer}.self_attn.{part}.{kind}"] = rows.flatten(0, 2).contiguous()
            continue
        for old, new in _RENAMED.items():
            plain = plain.replace(old, new)
        state[plain] = tensor
    return state
