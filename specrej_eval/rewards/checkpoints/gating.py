"""What ArmoRM and QRM share: the position in the prompt at which their gating networks look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.rewards.checkpoints.native import assemble, fill, load_body, read_tensors
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


def load_gated(
    name: str,
    config: RunConfig,
    head_class: Callable[[Any], nn.Module],
    *,
    dtype: str,
    device: str,
    token: str | bool | None,
) -> CheckpointReward:
    """A body, and above it ``head_class(body.config)`` under its original key names.

    Raises:
        CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    body, tokenizer = load_body(name, config, dtype=dtype, device=device, token=token)
    tensors = read_tensors(name, lambda key: not key.startswith("model."), token=token)
    head = fill(name, head_class(body.config), tensors)
    positions_of = GatingPositions(name, tokenizer, body.config.model_type)
    return assemble(name, config, body, tokenizer, head, positions_of=positions_of)
