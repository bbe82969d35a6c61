"""UltraRM: a linear head at the last token of Llama-2-13B, on "Human: ... Assistant: ..." text.

Source: Cui et al., "UltraFeedback" (2023), and the model card of openbmb/UltraRM-13b. The card's template has a blank
line before "Assistant:", its example texts one line break; reward-bench writes "User:" in place of "Human:". We follow
the card's template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.rewards.checkpoints.native import load_regression_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "a linear head at the last token of 'Human: q\\n\\nAssistant: a'"
EXAMPLES = ("openbmb/UltraRM-13b",)
NEEDS = ""

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}{%- endif -%}"
    "{%- if not loop.first -%}{{ '\n\n' }}{%- endif -%}"
    "{{ ('Human: ' if message['role'] == 'user' else 'Assistant: ') + message['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    del name
    return "LlamaRewardModel" in checkpoint.architectures(checkpoint_config)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: all that counts are the body's keys."""


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    return load_regression_head(name, config, TEMPLATE, dtype=dtype, device=device, token=token)
