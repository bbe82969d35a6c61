"""INF-ORM: a two-layer head at the last token.

Source: the model card of infly/INF-ORM-Llama3.1-70B and reward-bench's ``inform.py``. We differ in the last token: the
original looks for the first padding token; here it is the last one read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, fill, load_body, read_tensors
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "a two-layer head at the last token"
EXAMPLES = ("infly/INF-ORM-Llama3.1-70B",)
NEEDS = "about 140 GB of memory in bfloat16"


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    del name
    return "INFORMForSequenceClassification" in checkpoint.architectures(checkpoint_config)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: the head has one output whatever the config says of labels."""


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    body, tokenizer = load_body(name, config, dtype=dtype, device=device, token=token)
    size = body.config.hidden_size
    layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))
    tensors = read_tensors(name, lambda key: key.startswith("score."), token=token)
    return assemble(name, config, body, tokenizer, LastToken(fill(name, layers, tensors, prefix="score.")))
