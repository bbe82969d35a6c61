"""ArmoRM: 19 absolute ratings of the answer, weighed by a gating network that reads the prompt.

Source: Wang et al., "Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts" (2024), and
the model card and ``modeling_custom.py`` of RLHFlow/ArmoRM-Llama3-8B-v0.1.

    ratings = regression_layer(last token)                                  19 numbers
    weights = softmax(MLP(end of the last user turn) / temperature) * logit_scale
    score   = sum(weights * (ratings @ reward_transform_matrix))            the matrix takes the verbosity bias out

We differ in the last token: it is the last one read, where the original looks for the first padding token and so can
be led astray by pad = eot. Scores lie close together (about 0.1 to 0.2), hence float32 from the last hidden state on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.rewards.checkpoints.gating import load_gated
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "19 ratings at the last token, weighed by a gating network at the prompt's end"
EXAMPLES = ("RLHFlow/ArmoRM-Llama3-8B-v0.1",)
NEEDS = "30 GB of memory as it is stored, in float32; reward_dtype=bfloat16 halves that"


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    """The gating class without quantiles; QRM's checkpoints name the same class."""
    del name
    return (
        "LlamaForRewardModelWithGating" in checkpoint.architectures(checkpoint_config)
        and "num_quantiles" not in checkpoint_config
    )


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: every key has the original code's default."""


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    return load_gated(name, config, ArmoRMHead, dtype=dtype, device=device, token=token)


class ArmoRMHead(nn.Module):
    """Everything above the body, under its original names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        ratings = getattr(config, "num_objectives", 19)
        self.regression_layer = nn.Linear(config.hidden_size, ratings, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(ratings))
        self.gating = Gating(
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
        ratings = self.regression_layer(hidden[:, 1]) @ self.reward_transform_matrix
        scores: Tensor = (weights * ratings).sum(dim=-1)
        return scores


class Gating(nn.Module):
    """A ReLU MLP with a tempered softmax: how much each rating counts for this prompt."""

    def __init__(
        self, input_size: int, num_outputs: int, *, hidden_size: int, num_hidden: int, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = [input_size, *[hidden_size] * num_hidden, num_outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, prompt: Tensor) -> Tensor:
        """(rows, hidden size) -> (rows, outputs)"""
        *hidden, last = self.layers
        for layer in hidden:
            prompt = torch.relu(layer(prompt))
        weights: Tensor = torch.softmax(last(prompt) / self.temperature, dim=-1) * self.logit_scale
        return weights
