"""URM: five HelpSteer2 attributes as normal distributions, whose means are weighed.

Source: Lou et al., "Uncertainty-aware Reward Model" (2024), the model cards of LxzGordon/URM-LLaMa-3.1-8B and
URM-LLaMa-3-8B, and SGLang's port (``llama_reward.py``).

``score`` gives (mean, spread) of each attribute in turn, at the last token. 3.1: a SELU network on the same token
weighs the means. 3: fixed weights, those of Nemotron-4 (helpfulness, correctness, coherence, complexity, verbosity);
this rule is the card's in words, its code was not seen. The spreads tell how sure the model is and are not used.

We differ from SGLang in precision: it runs the weighing network in float16, we run it in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.native import assemble, fill, load_body, read_tensors
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "means of five attributes at the last token, weighed by a network (3.1) or by fixed weights (3)"
EXAMPLES = ("LxzGordon/URM-LLaMa-3.1-8B", "LxzGordon/URM-LLaMa-3-8B")
NEEDS = ""

_GATED = "LlamaForSequenceClassificationWithNormal_Weights"
_FIXED = "LlamaForSequenceClassificationWithNormal"
WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)
"""Of the attributes in URM-LLaMa-3-8B."""


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    del name
    return bool({_GATED, _FIXED} & set(checkpoint.architectures(checkpoint_config)))


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the labels do not come in pairs of mean and spread, or there are not as many as fixed weights.
    """
    labels = _num_labels(checkpoint_config)
    gated = _GATED in checkpoint.architectures(checkpoint_config)
    if labels % 2 or (not gated and labels != 2 * len(WEIGHTS)):
        rule = "an even number of them" if gated else str(2 * len(WEIGHTS))
        raise ConfigError(
            f"reward_model={name!r} has {labels} labels; URM reads a mean and a spread for each attribute: {rule}."
        )


def _num_labels(checkpoint_config: Mapping[str, Any]) -> int:
    labels = checkpoint_config.get("id2label")
    return len(labels) if labels is not None else int(checkpoint_config.get("num_labels", 2))


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    raw = checkpoint.read_config("reward_model", name, token=token)
    body, tokenizer = load_body(name, config, dtype=dtype, device=device, token=token)
    tensors = read_tensors(name, lambda key: not key.startswith("model."), token=token)
    head = URMHead(body.config.hidden_size, _num_labels(raw), gated=_GATED in checkpoint.architectures(raw))
    return assemble(name, config, body, tokenizer, fill(name, head, tensors))


class URMHead(nn.Module):
    """Everything above the body, under its original names."""

    def __init__(self, hidden_size: int, num_labels: int, *, gated: bool) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, num_labels, bias=False)
        self.weights = AttributeWeights(hidden_size, num_labels // 2) if gated else FixedWeights()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, 1, hidden size) -> (rows,)"""
        del mask  # one position in every row
        last = hidden[:, 0]
        means = self.score(last).unflatten(-1, (-1, 2))[..., 0]  # (rows, attributes)
        scores: Tensor = (means * self.weights(last)).sum(dim=-1)
        return scores


class AttributeWeights(nn.Module):
    def __init__(self, hidden_size: int, num_attributes: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.SELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SELU(),
            nn.Linear(hidden_size, num_attributes),
        )

    def forward(self, last: Tensor) -> Tensor:
        """(rows, hidden size) -> (rows, attributes)"""
        weights: Tensor = self.fc(last)
        return weights


class FixedWeights(nn.Module):
    def forward(self, last: Tensor) -> Tensor:
        """(rows, hidden size) -> (attributes,)"""
        return torch.tensor(WEIGHTS, device=last.device)
