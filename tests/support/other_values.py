"""Another valid value for every argument."""

from __future__ import annotations

from typing import Any

# another valid value for every argument; an argument without one fails the test that it is there
OTHER: dict[str, Any] = {
    "special_tokens_in_content": "allow",
    "pretrained": "owner/other",
    "reward_model": "likelihood",
    "reward_family": "sequence_classifier",
    "strategy": "best_of_n",
    "alpha": 0.25,
    "n": 8,
    "n_max": 40,
    "first_look": 64,
    "kv_budget_tokens": 4096,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "max_gen_toks": 64,
    "seed": 1,
    "dtype": "bfloat16",
    "reward_dtype": "bfloat16",
    "on_nan": "drop",
    "partial_turn": "open",
    "reward_template": "{{ messages }}",
    "prm_reduce": "min",
    "reward_tokenizer": "owner/other",
    "reward_ensemble": "rank",
    "judge_prompt": "{prompt} {response}",
    "judge_max_toks": 64,
    "deepconf_window": 8,
    "floor_toks": 9,
    "floor_repetition": 0.9,
    "trust_remote_code": True,
    "attention_backend": "flash_attn",
    "engine": "vllm",
    "quantization": "fp8",
    "max_model_len": 77,
    "reward_engine": "vllm",
    "variance_reduce": True,
}
