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
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.gating import GatedHead, load_gated
from specrej_eval.rewards.checkpoints.reward import CheckpointReward


class Family(RewardFamily):
    READS = "19 ratings at the last token, weighed by a gating network at the prompt's end"
    EXAMPLES = ("RLHFlow/ArmoRM-Llama3-8B-v0.1",)
    NEEDS = "30 GB of memory as it is stored, in float32; reward_dtype=bfloat16 halves that"
    ARCHITECTURES = ("LlamaForRewardModelWithGating",)

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        """The gating class without quantiles; QRM's checkpoints name the same class."""
        return super().matches(name, raw) and "num_quantiles" not in raw

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        return load_gated(source, partial(GatedHead, layers_of=ReluLayers))


class ReluLayers(nn.ModuleList):
    """Linear layers with a ReLU between them, which the original numbers without their ReLUs."""

    def __init__(self, input_size: int, hidden_size: int, num_hidden: int, num_outputs: int) -> None:
        sizes = [input_size, *[hidden_size] * num_hidden, num_outputs]
        super().__init__(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, prompt: Tensor) -> Tensor:
        """(rows, hidden size) -> (rows, outputs)"""
        *hidden, last = self
        for layer in hidden:
            prompt = torch.relu(layer(prompt))
        outputs: Tensor = last(prompt)
        return outputs
