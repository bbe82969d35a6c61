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
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.forward import float32
from specrej_eval.rewards.checkpoints.loading import load_checkpoint
from specrej_eval.rewards.checkpoints.memory import Allowance
from specrej_eval.rewards.checkpoints.native import LastToken, num_labels
from specrej_eval.rewards.checkpoints.renderer import Renderer, max_length_of, renderer_options
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.special_tokens import ENCODE_AS_TEXT


class Family(RewardFamily):
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
    GENERAL = True

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        """``*ForSequenceClassification`` exactly: names that go on (``...WithNormal_Weights``) are other families'."""
        return any(entry.endswith("ForSequenceClassification") for entry in checkpoint.architectures(raw))

    def check(self, name: str, raw: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: the checkpoint has several labels.
        """
        labels = num_labels(raw)
        if labels != 1:
            raise ConfigError(
                f"reward_model={name!r} has several labels ({labels}) and no rule that makes one reward of them.",
                hint="num_labels must be 1; wrap other models in a function and give pkg.module:function.",
            )

    def load(self, source: RewardCheckpoint) -> SequenceClassifier:
        """Raises:
        CheckpointError: the files cannot be loaded, or hold no weights for the head (transformers would make it up).
        ConfigError: a decoder without a chat template, and no ``reward_template``.
        """
        model, tokenizer = load_checkpoint(source, AutoModelForSequenceClassification.from_pretrained)
        return SequenceClassifier(
            model,
            tokenizer,
            name=source.name,
            cache=source.config.reward_cache,
            compile=source.config.compile,
            allowance=Allowance.of(source.config, source.device),
            **renderer_options(source.config),
        )


class SequenceClassifier(CheckpointReward):
    """Scores (conversation, response) pairs; see the module's text for pooling.

    Args:
        model: a transformers sequence classifier with one label, on its device.
        tokenizer: its tokenizer, with its chat template if it has one.
        partial_turn, template, special_tokens_in_content: see ``renderer.Renderer``.
        options: of ``forward.Forward``.
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
        head = None if base is None else LastToken(float32(model.score))
        super().__init__(model if base is None else base, head, renderer, **options)


def _decoder_base(model: Any) -> Any:
    """The model below the head; None for a model that pools in its own way: no linear ``score`` on a base model."""
    base = getattr(model, model.base_model_prefix, None)
    return base if isinstance(getattr(model, "score", None), torch.nn.Linear) else None
