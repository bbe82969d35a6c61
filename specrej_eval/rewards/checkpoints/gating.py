"""What ArmoRM and QRM share: ratings at the last token, weighed by a network that reads the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint
from specrej_eval.rewards.checkpoints.native import assemble, load_body, load_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

ASSISTANT_TURN = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}
"""End of the user's turn and start of the assistant's, by the body's ``model_type``."""


class GatingPositions:
    """``(gate, last)``: the end of the last user turn, where the gating network reads what kind of prompt it is, and
    the last token.

    The original code has the ids of ``ASSISTANT_TURN`` written into it ([128009, 128006, 78191, 128007, 271] for
    Llama-3); here the tokenizer gives them. It also takes the last occurrence and its first token.
    """

    def __init__(self, name: str, tokenizer: Any, model_type: str) -> None:
        """Raises:
        ConfigError: a body for which no assistant turn is known.
        """
        if model_type not in ASSISTANT_TURN:
            raise ConfigError(
                f"reward_model={name!r}: how an assistant's turn begins is known for "
                f"{', '.join(sorted(ASSISTANT_TURN))}, not for model_type {model_type!r}."
            )
        self.name = name
        self.turn = ASSISTANT_TURN[model_type]
        self.pattern = tuple(tokenizer(self.turn, add_special_tokens=False)["input_ids"])

    def __call__(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Raises:
        RewardError: the text holds no assistant turn: it was cut, or its template is another one.
        """
        for start in range(len(ids) - len(self.pattern), -1, -1):
            if ids[start : start + len(self.pattern)] == self.pattern:
                return (start, len(ids) - 1)
        raise RewardError(
            f"reward_model={self.name!r} needs {self.turn!r} in what it reads ({len(ids)} tokens): its gating network "
            "reads the prompt there.",
            hint="an answer longer than the reward model's context cuts it off: a smaller max_gen_toks; a template of "
            "your own must write it.",
        )


class GatedHead(nn.Module):
    """Everything above the body, under its original names.

    Args:
        config: the body's, with the checkpoint's further keys.
        layers_of: makes the gating network's layers: (input size, hidden size, hidden layers, outputs) -> layers.
        num_quantiles: numbers that a rating is the mean of.
    """

    def __init__(
        self, config: Any, layers_of: Callable[[int, int, int, int], nn.Module], *, num_quantiles: int = 1
    ) -> None:
        super().__init__()
        ratings = getattr(config, "num_objectives", 19)
        self.num_quantiles = num_quantiles
        self.regression_layer = nn.Linear(config.hidden_size, ratings * num_quantiles, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(ratings))
        hidden_size, num_hidden = getattr(config, "gating_hidden_dim", 1024), getattr(config, "gating_n_hidden", 3)
        layers = layers_of(config.hidden_size, hidden_size, num_hidden, ratings)
        self.gating = Gating(layers, getattr(config, "gating_temperature", 10))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, 2 positions: prompt's end and last token, hidden size) -> (rows,)"""
        # the mask says nothing: two positions in every row
        weights = self.gating(hidden[:, 0])  # (rows, ratings)
        quantiles = self.regression_layer(hidden[:, 1]).unflatten(-1, (-1, self.num_quantiles))
        ratings = quantiles.mean(dim=-1) @ self.reward_transform_matrix
        scores: Tensor = (weights * ratings).sum(dim=-1)
        return scores


class Gating(nn.Module):
    """Layers with a tempered softmax: how much each rating counts for this prompt."""

    def __init__(self, layers: nn.Module, temperature: float) -> None:
        super().__init__()
        self.layers = layers
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, prompt: Tensor) -> Tensor:
        """(rows, hidden size) -> (rows, outputs)"""
        weights: Tensor = torch.softmax(self.layers(prompt) / self.temperature, dim=-1) * self.logit_scale
        return weights


def load_gated(source: RewardCheckpoint, head_of: Callable[[Any], GatedHead]) -> CheckpointReward:
    """A body, and above it ``head_of(body.config)`` under its original key names.

    Raises:
        CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    body, tokenizer = load_body(source)
    head = load_head(source, head_of(body.config))
    positions_of = GatingPositions(source.name, tokenizer, body.config.model_type)
    return assemble(source, body, tokenizer, head, positions_of=positions_of)
