"""Any ``AutoModelForSequenceClassification`` with one label, read through its own chat template.

Decoder checkpoints (a linear ``score`` head on a base model, the ``GenericForSequenceClassification`` of transformers)
are pooled here, at the last attended token, with the head in float32. transformers itself pools at the last token that
is not ``pad_token_id``: with pad == eos it silently reads one token too early. Encoders (BERT, DeBERTa, ...) pool in
their own way: their own forward, and without a chat template a text pair.

Where we differ from the reference code of Speculative Rejection: it sets pad = eos and pads on the left, so its scores
depend on the pooling rule above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.loading import load_checkpoint, named
from specrej_eval.rewards.checkpoints.renderer import Renderer, max_length_of, renderer_options
from specrej_eval.rewards.checkpoints.reward import CheckpointReward, linear_head
from specrej_eval.special_tokens import ENCODE_AS_TEXT

READS = "a linear head with one label, at the last token; encoders as they pool (text pair)"
EXAMPLES = (
    "Skywork/Skywork-Reward-V2-Qwen3-8B",
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
    "Skywork/Skywork-Reward-Gemma-2-27B-v0.2",
    "sfairXC/FsfairX-LLaMA3-RM-v0.1",
    "weqweasdas/RM-Mistral-7B",
    "weqweasdas/RM-Gemma-7B",
    "Ray2333/GRM-Llama3.2-3B-rewardmodel-ft",
    "NCSOFT/Llama-3-OffsetBias-RM-8B",
    "OpenAssistant/reward-model-deberta-v3-large-v2",
)
NEEDS = ""

_OTHER_CLASSES = ("INFORMForSequenceClassification",)
"""Classes with this ending that transformers does not have; families of their own read them."""
_OTHER_CHECKPOINTS = ("Nexusflow/Starling-RM-34B",)
"""Calls itself a LlamaForSequenceClassification, but has another head under other names."""


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    """``*ForSequenceClassification`` exactly: names that go on (``...WithNormal_Weights``) are other families."""
    if named(_OTHER_CHECKPOINTS, name):
        return False
    classes = checkpoint.architectures(checkpoint_config)
    return any(entry.endswith("ForSequenceClassification") and entry not in _OTHER_CLASSES for entry in classes)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the checkpoint has several labels.
    """
    labels = _num_labels(checkpoint_config)
    if labels != 1:
        raise ConfigError(
            f"reward_model={name!r} has several labels ({labels}) and no rule that makes one reward of them.",
            hint="num_labels must be 1; wrap other models in a function and give pkg.module:function.",
        )


def _num_labels(checkpoint_config: Mapping[str, Any]) -> int:
    """As transformers counts: ``id2label`` wins, ``num_labels`` next, 2 by default."""
    labels = checkpoint_config.get("id2label")
    return len(labels) if labels is not None else int(checkpoint_config.get("num_labels", 2))


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> SequenceClassifier:
    """Load tokenizer and weights from a folder or hub repository.

    Raises:
        CheckpointError: the files cannot be loaded, or hold no weights for the head (transformers would make it up).
        ConfigError: a decoder without a chat template, and no ``reward_template``.
    """
    model, tokenizer = load_checkpoint(
        name, config, AutoModelForSequenceClassification, dtype=dtype, device=device, token=token
    )
    return SequenceClassifier(model, tokenizer, name=name, **renderer_options(config))


class SequenceClassifier(CheckpointReward):
    """Scores (conversation, response) pairs; see the module's text for pooling.

    Args:
        model: a transformers sequence classifier with one label, on its device.
        tokenizer: its tokenizer, with its chat template if it has one.
        partial_turn, template, special_tokens_in_content: see ``_rendering.Renderer``.
        options: of ``CheckpointReward``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "reward model",
        partial_turn: str = "closed",
        template: str | None = None,
        special_tokens_in_content: str = ENCODE_AS_TEXT,
        **options: Any,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        base = _decoder_base(model)
        renderer = Renderer(
            tokenizer,
            name=name,
            vocab_size=int(model.get_input_embeddings().weight.shape[0]),
            max_length=max_length_of(model.config, tokenizer),
            partial_turn=partial_turn,
            template=template,
            special_tokens_in_content=special_tokens_in_content,
            without_template="pair" if base is None else "ask",
        )
        head = None if base is None else linear_head(model.score)
        super().__init__(model if base is None else base, head, renderer, **options)


def _decoder_base(model: Any) -> Any:
    """The model below the head; None for a model that pools in its own way: no linear ``score`` on a base model."""
    base = getattr(model, model.base_model_prefix, None)
    return base if isinstance(getattr(model, "score", None), torch.nn.Linear) else None
