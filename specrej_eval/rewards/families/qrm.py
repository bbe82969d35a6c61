"""QRM: ArmoRM's shape with a distribution for each rating, given by its quantiles.

Source: Dorka, "Quantile Regression for Distributional Reward Models in RLHF" (2024), and ``modeling_custom.py`` of
nicolinho/QRM-Llama3-8B, QRM-Llama3.1-8B and -v2.

    quantiles = regression_layer(last token) as (ratings, quantiles)
    ratings   = mean over quantiles                                         the expected rating
    weights   = softmax(MLP with BatchNorm(end of the last user turn) / temperature) * logit_scale
    score     = sum(weights * (ratings @ reward_transform_matrix))

The BatchNorm must use its stored statistics: in training mode a row's score would depend on the batch. The original
loads through flash-attn whatever it is told; here attention is chosen as for any body.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from specrej_eval import checkpoint
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.gating import GatedHead, load_gated
from specrej_eval.rewards.checkpoints.native import required
from specrej_eval.rewards.checkpoints.reward import CheckpointReward


class Family(RewardFamily):
    READS = "quantiles of 19 ratings at the last token, weighed by a gating network at the prompt's end"
    EXAMPLES = (
        "nicolinho/QRM-Llama3.1-8B-v2",
        "nicolinho/QRM-Llama3.1-8B",
        "nicolinho/QRM-Llama3-8B",
        "nicolinho/QRM-Gemma-2-27B",
    )

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        """A gating class, and quantiles: ArmoRM's checkpoint names the same class."""
        return "num_quantiles" in raw and any(
            re.fullmatch(r"\w+ForRewardModelWithGating\d*", entry) for entry in checkpoint.architectures(raw)
        )

    def check(self, name: str, raw: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: config.json does not say how many quantiles there are.
        """
        required(name, raw, "num_quantiles")

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        return load_gated(source, lambda config: GatedHead(config, normed_layers, num_quantiles=config.num_quantiles))


def normed_layers(input_size: int, hidden_size: int, num_hidden: int, num_outputs: int) -> nn.Module:
    """ArmoRM's gating network with a BatchNorm behind each ReLU, and no bias before it."""
    layers: list[nn.Module] = []
    for size in [input_size, *[hidden_size] * num_hidden][:num_hidden]:
        layers += [nn.Linear(size, hidden_size, bias=False), nn.ReLU(), nn.BatchNorm1d(hidden_size)]
    return nn.Sequential(*layers, nn.Linear(hidden_size, num_outputs))
