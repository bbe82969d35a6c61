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
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import assemble, load_body, load_head, num_labels
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

_GATED = "LlamaForSequenceClassificationWithNormal_Weights"
_FIXED = "LlamaForSequenceClassificationWithNormal"
WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)
"""Of the attributes in URM-LLaMa-3-8B."""


class Family(RewardFamily):
    READS = "means of five attributes at the last token, weighed by a network (3.1) or by fixed weights (3)"
    EXAMPLES = ("LxzGordon/URM-LLaMa-3.1-8B", "LxzGordon/URM-LLaMa-3-8B")
    ARCHITECTURES = (_GATED, _FIXED)

    def check(self, name: str, raw: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: the labels do not come in pairs of mean and spread, or there are not as many as fixed weights.
        """
        labels, gated = num_labels(raw), _is_gated(raw)
        if labels % 2 or (not gated and labels != 2 * len(WEIGHTS)):
            rule = "an even number of them" if gated else str(2 * len(WEIGHTS))
            raise ConfigError(
                f"reward_model={name!r} has {labels} labels; URM reads a mean and a spread for each attribute: {rule}."
            )

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        head = URMHead(body.config.hidden_size, num_labels(source.raw), gated=_is_gated(source.raw))
        return assemble(source, body, tokenizer, load_head(source, head))


def _is_gated(raw: Mapping[str, Any]) -> bool:
    return _GATED in checkpoint.architectures(raw)


class URMHead(nn.Module):
    """Everything above the body, under its original names."""

    def __init__(self, hidden_size: int, num_labels: int, *, gated: bool) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, num_labels, bias=False)
        self.weights = AttributeWeights(hidden_size, num_labels // 2) if gated else FixedWeights()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, 1, hidden size) -> (rows,)"""
        # the mask says nothing: one position in every row
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
