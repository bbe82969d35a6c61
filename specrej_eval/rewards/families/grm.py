"""GRM with a value head: a language model's body with a small MLP on the last token.

Source: Yang et al., "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs" (2024), the
configs of Ray2333/GRM-*-sftreg and -distill, and reward-bench's ``grm.py``. The ``-rewardmodel-ft`` checkpoints are
plain sequence classifiers, though their configs keep the value head's keys.

We differ from the authors' code in BOS: it tokenises a rendered template once more, which gives two; here there is one.
Its dropout is off, as in evaluation mode there.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from specrej_eval import checkpoint
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, load_body, load_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward


class Family(RewardFamily):
    READS = "a value head (MLP or linear) at the last token of a language model"
    EXAMPLES = (
        "Ray2333/GRM-Gemma2-2B-sftreg",
        "Ray2333/GRM-llama3.2-3B-sftreg",
        "Ray2333/GRM-llama3-8B-sftreg",
        "Ray2333/GRM-Gemma-2B-sftreg",
        "Ray2333/GRM-llama3-8B-distill",
    )

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        """A language model whose config describes a value head."""
        classes = checkpoint.architectures(raw)
        return "vhead_layer_type" in raw and any(entry.endswith("ForCausalLM") for entry in classes)

    def check(self, name: str, raw: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: a kind of value head that is not known.
        """
        kind = raw.get("vhead_layer_type", "mlp")
        if kind not in ("mlp", "linear"):
            raise ConfigError(f"reward_model={name!r}: vhead_layer_type must be mlp or linear, got {kind!r}.")

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        head = load_head(source, value_head(body.config), "v_head.summary.")
        return assemble(source, body, tokenizer, LastToken(head))


def value_head(config: Any) -> nn.Module:
    """Linear layers with ReLU between them, numbered as in the original."""
    if getattr(config, "vhead_layer_type", "mlp") == "linear":
        return nn.Linear(config.hidden_size, 1)
    neurons = getattr(config, "vhead_num_neurons", 1024)
    sizes = [config.hidden_size, *[neurons] * getattr(config, "vhead_num_layers", 1)]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(neurons, 1))
