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

import torch
from torch import Tensor, nn

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.rewards.checkpoints.gating import load_gated
from specrej_eval.rewards.checkpoints.native import required
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "quantiles of 19 ratings at the last token, weighed by a gating network at the prompt's end"
EXAMPLES = (
    "nicolinho/QRM-Llama3.1-8B-v2",
    "nicolinho/QRM-Llama3.1-8B",
    "nicolinho/QRM-Llama3-8B",
    "nicolinho/QRM-Gemma-2-27B",
)
NEEDS = ""


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    """A gating class, and quantiles: ArmoRM's checkpoint names the same class."""
    del name
    classes = checkpoint.architectures(checkpoint_config)
    return "num_quantiles" in checkpoint_config and any(
        re.fullmatch(r"\w+ForRewardModelWithGating\d*", entry) for entry in classes
    )


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: config.json does not say how many quantiles there are.
    """
    required(name, checkpoint_config, "num_quantiles")


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    return load_gated(name, config, QRMHead, dtype=dtype, device=device, token=token)


class QRMHead(nn.Module):
    """Everything above the body, under its original names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_quantiles = config.num_quantiles
        ratings = getattr(config, "num_objectives", 19)
        self.regression_layer = nn.Linear(config.hidden_size, ratings * self.num_quantiles, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(ratings))
        self.gating = NormedGating(
            config.hidden_size,
            ratings,
            hidden_size=getattr(config, "gating_hidden_dim", 1024),
            num_hidden=getattr(config, "gating_n_hidden", 3),
            temperature=getattr(config, "gating_temperature", 10),
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, 2 positions: prompt's end and last token, hidden size) -> (rows,)"""
        del mask  # two positions in every row
        weights = self.gating(hidden[:, 0])  # (rows, ratings)
        quantiles = self.regression_layer(hidden[:, 1]).unflatten(-1, (-1, self.num_quantiles))
        ratings = quantiles.mean(dim=-1) @ self.reward_transform_matrix
        scores: Tensor = (weights * ratings).sum(dim=-1)
        return scores


class NormedGating(nn.Module):
    """ArmoRM's gating network with a BatchNorm behind each ReLU, and no bias before it."""

    def __init__(
        self, input_size: int, num_outputs: int, *, hidden_size: int, num_hidden: int, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        layers: list[nn.Module] = []
        for size in [input_size, *[hidden_size] * num_hidden][:num_hidden]:
            layers += [nn.Linear(size, hidden_size, bias=False), nn.ReLU(), nn.BatchNorm1d(hidden_size)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_size, num_outputs))

    def forward(self, prompt: Tensor) -> Tensor:
        """(rows, hidden size) -> (rows, outputs)"""
        weights: Tensor = torch.softmax(self.layers(prompt) / self.temperature, dim=-1) * self.logit_scale
        return weights
