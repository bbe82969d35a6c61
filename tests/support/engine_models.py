"""Tiny random models of many architectures, and what the engine's tests compare against.

Weight matrices are four times larger than at initialisation: attention is then sharp, so a wrong position, window or
row shows in the logits. Biases and norms stay as they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv.models import with_softcap

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
    reference: str = "eager"
    """Attention of the reference; not ours, and not the one transformers chooses, unless those two disagree."""


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
    Architecture(
        "falcon_alibi", {"alibi": True, "head_dim": None}, path="replicated", model_type="falcon", reference="sdpa"
    ),
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
    # rewritten in transformers 5.24, so that its attention can be exchanged
    Architecture(
        "gptj",
        {**_GPT2_SIZES, "rotary_dim": 4},
        path="shared_prefix" if Version(transformers.__version__) >= Version("5.24") else "replicated",
    ),
]
BY_NAME = {arch.name: arch for arch in ARCHITECTURES}


def build(arch: Architecture | str, *, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """A new model of the table, float32, eval mode. The same weights whatever the attention implementation."""
    arch = BY_NAME[arch] if isinstance(arch, str) else arch
    arguments = {**_SIZES, **arch.extra, **overrides}
    config = AutoConfig.for_model(arch.model_type or arch.name, **{k: v for k, v in arguments.items() if v is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
    return with_softcap(model)


@cache
def shared_model(name: str) -> Any:
    """One model per name and test session. Leave it as it is."""
    return build(name)


class Reference:
    """Plain forward passes of whole sequences.

    Args:
        fresh: every sequence gets a model that has seen no other.
    """

    def __init__(self, model: Any, *, fresh: bool = False) -> None:
        self._model = model
        self._fresh = fresh
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, tokens: tuple[int, ...]) -> Tensor:
        """(tokens, vocab)"""
        if tokens not in self._logits:
            model = copy.deepcopy(self._model) if self._fresh else self._model
            with torch.inference_mode():
                self._logits[tokens] = model(torch.tensor([tokens]), use_cache=False).logits[0]
        return self._logits[tokens]


@cache
def shared_reference(name: str) -> Reference:
    """The same weights with the model's eager attention: shares no attention code with the engine."""
    return Reference(build(name, attention=BY_NAME[name].reference))


# ---- forced tokens through the engine's parts, and what the logits must be ---------------------------------------

TOLERANCE = 1e-4
"""Of the largest logit."""


@dataclass
class Rows:
    """A group under test and the tokens each of its rows has been fed, prompt included."""

    group: Group
    fed: dict[int, list[int]]


@dataclass
class Seen:
    """Logits the engine gave after a sequence of tokens."""

    tokens: list[int]
    logits: Tensor


def forced_token(row: int, place: int) -> int:
    """Another token for every row and place."""
    return 3 + (row * 31 + place * 17 + row * place * 7) % (VOCAB - 3)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [3 + (place * place * 5 + place * 11 + salt * 29) % (VOCAB - 3) for place in range(length)]


def decode_script(runner: ModelRunner, *, path: Any = None, lengths: tuple[int, int] = (21, 5)) -> list[Seen]:
    """Two prompts in one batch; rows are rejected, forked and started late on the way.

    The first prompt is longer than WINDOW and the second shorter; both decode more than WINDOW tokens, so windows end
    in the prompt, at its edge and inside the suffix.
    """
    seen: list[Seen] = []
    groups: list[Rows] = []

    def start(length: int, ids: list[int], salt: int) -> None:
        prompt = prompt_of(length, salt)
        prefix = runner.prefill(prompt, path)
        assert prefix.logits is not None
        seen.append(Seen(prompt, prefix.logits[0]))
        group = Group(prefix, ids, capacity=6, device=runner.device)
        groups.append(Rows(group, {row: list(prompt) for row in ids}))

    def select(rows: Rows, wanted: list[tuple[int, int]], capacity: int) -> None:
        """(parent, new id) pairs."""
        places = [rows.group.row_ids.index(parent) for parent, _ in wanted]
        fed = {new: list(rows.fed[parent]) for parent, new in wanted}
        rows.group.select(places, [new for _, new in wanted], capacity)
        rows.fed = fed

    def step() -> None:
        tokens = []
        for rows in groups:
            group = rows.group
            mine = [forced_token(row, group.num_sampled) for row in group.row_ids]
            group.rows.tokens[:, group.num_sampled] = torch.tensor(mine, dtype=torch.int32)
            group.num_sampled += 1
            tokens += mine
            for row, token in zip(group.row_ids, mine, strict=True):
                rows.fed[row].append(token)
        logits = runner.step([rows.group for rows in groups], torch.tensor(tokens))
        place = 0
        for rows in groups:
            rows.group.advance()
            for row in rows.group.row_ids:
                seen.append(Seen(list(rows.fed[row]), logits[place]))
                place += 1

    with torch.inference_mode(), runner.active():
        start(lengths[0], [0, 1, 2, 3, 4], salt=1)
        for _ in range(3):
            step()
        start(lengths[1], [5, 6, 7], salt=2)
        for _ in range(2):
            step()
        groups[0].group.drop([0, 3])  # the last row moves into a hole
        step()
        select(groups[0], [(2, 2), (4, 8), (2, 9), (4, 4)], capacity=24)
        select(groups[1], [(7, 7), (5, 5), (6, 6)], capacity=24)
        for _ in range(4):
            step()
        groups[1].group.drop([1])
        for _ in range(8):
            step()
    return seen


def worst_error(seen: list[Seen], reference: Reference, *, causal: bool = True) -> float:
    """Largest difference from plain forward passes of whole sequences, relative to the largest logit.

    Args:
        causal: sequences that begin alike share a forward pass; False = one pass per sequence, for models whose logits
            at a place depend on how long the whole sequence is.
    """
    ends: dict[tuple[int, ...], list[Seen]] = {}
    for item in sorted(seen, key=lambda item: -len(item.tokens)):
        whole = next((end for end in ends if causal and list(end[: len(item.tokens)]) == item.tokens), None)
        ends.setdefault(whole or tuple(item.tokens), []).append(item)
    error = largest = torch.zeros(())
    for whole, items in ends.items():
        want = reference(whole)
        largest = torch.maximum(largest, want.abs().max())
        for item in items:
            error = torch.maximum(error, (item.logits - want[len(item.tokens) - 1]).abs().max())  # a NaN stays
    return float(error / largest)


def skip_unless_known(arch: Architecture) -> None:
    """Older releases of transformers do not know every architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if (arch.model_type or arch.name) not in CONFIG_MAPPING:
        pytest.skip(f"transformers does not know {arch.model_type or arch.name}")
