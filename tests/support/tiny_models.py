"""Tiny random models and tokenizers, saved as checkpoint folders. Built from configs in milliseconds; no downloads.

folder = save(tiny_causal_lm("llama"), tiny_tokenizer(), tmp_path / "policy")
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from specrej_eval.kv.models import with_softcap

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|turn|>", "<|end|>")
PAD, BOS, EOS, TURN, END = range(5)
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # and every byte

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)


def tiny_tokenizer(
    *, chat_template: str | None = CHAT_TEMPLATE, pad_is_eos: bool = False, pair: bool = False, **overrides: Any
) -> PreTrainedTokenizerFast:
    """One token per byte, so any text round-trips and a character can be cut in the middle.

    Args:
        pad_is_eos: the trap of many reward models: the end token of a turn is also the padding token.
        pair: an encoder's post-processing, ``[BOS] a [EOS] b [EOS]`` with segment ids; else ``[BOS] a``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = {"single": "<bos> $A", "pair": None}
    if pair:
        template = {"single": "<bos> $A <eos>", "pair": "<bos> $A <eos> $B:1 <eos>:1"}
    tokenizer.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    arguments: dict[str, Any] = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<|end|>" if pad_is_eos else "<pad>",
        "additional_special_tokens": ["<|turn|>", "<|end|>"],
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    if pair:
        arguments["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**arguments, **overrides})


def tiny_config(arch: str = "llama", **overrides: Any) -> Any:
    """A config of a few thousand parameters for a decoder (llama, mistral, qwen2, ...), gpt2, bert or t5."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if arch == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            del sizes[name]
        del sizes["num_key_value_heads"], sizes["max_position_embeddings"]
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    if arch == "t5":
        sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
        sizes |= {"decoder_start_token_id": PAD, "pad_token_id": PAD}
    return AutoConfig.for_model(arch, **{**sizes, **overrides})


def tiny_causal_lm(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random language model in float32. Weights are scaled up, so that its logits are not all alike."""
    return _scaled(AutoModelForCausalLM, tiny_config(arch, **overrides), seed)


def tiny_reward_model(arch: str = "llama", *, seed: int = 1, num_labels: int = 1, **overrides: Any) -> PreTrainedModel:
    """A random sequence classifier in float32 whose scores differ visibly from text to text."""
    return _scaled(AutoModelForSequenceClassification, tiny_config(arch, num_labels=num_labels, **overrides), seed)


def _scaled(auto_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    with_softcap(model)  # as when we load it
    return model.eval()


def save(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> Path:
    """Save what is given as one checkpoint folder."""
    for part in (model, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return folder


SOFTCAP = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}
"""Of a Gemma 2 that shows it in every number."""


def leave_softcaps_out(monkeypatch: Any) -> None:
    """From here on transformers is as before 5.21: Gemma 2 is loaded with ``sdpa`` attention, which has no softcap and
    says nothing."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    own = AttentionInterface._global_mapping["sdpa"]

    def sdpa(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        del softcap
        return own(*args, **kwargs)

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.20.0" if name == "transformers" else version(name))
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa)
