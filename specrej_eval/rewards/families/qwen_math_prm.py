"""Qwen2.5-Math-PRM: the probability that a step is right, at a token put behind each step.

Source: Zhang et al., "The Lessons of Developing Process Reward Models in Mathematical Reasoning" (2025), model card and
``modeling_qwen2_rm.py`` of Qwen/Qwen2.5-Math-PRM-7B (transformers and vLLM know it as well; its own remote code needs
an older transformers).

The answer's paragraphs are its steps; ``<extra_0>`` stands behind each in place of the blank line. A two-layer head
gives (wrong, right) there. Without a system message the card's own is used.

We differ from the card's helper, which looks for probabilities other than zero and so loses a step whose probability
underflows: positions are looked for here. Empty steps are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.native import assemble, fill, load_body, read_tensors
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.steps import (
    GoodAgainstBad,
    StepHead,
    StepRenderer,
    paragraphs,
    rendered,
    token_id,
)
from specrej_eval.special_tokens import ContentText

READS = "process: a two-layer head at <extra_0> behind each paragraph; prm_reduce= makes one number"
EXAMPLES = ("Qwen/Qwen2.5-Math-PRM-7B", "Qwen/Qwen2.5-Math-PRM-72B", "Qwen/Qwen2.5-Math-7B-PRM800K")
NEEDS = ""

MARK = "<extra_0>"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_RIGHT = 1


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    del name
    return "Qwen2ForProcessRewardModel" in checkpoint.architectures(checkpoint_config)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: the head has two outputs whatever the config says of labels."""


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    ConfigError: the tokenizer has no token for the mark.
    """
    body, tokenizer = load_body(name, config, dtype=dtype, device=device, token=token)
    size = body.config.hidden_size
    layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
    tensors = read_tensors(name, lambda key: key.startswith("score."), token=token)
    head = StepHead(GoodAgainstBad(fill(name, layers, tensors, prefix="score."), good=_RIGHT), config.prm_reduce)
    return assemble(name, config, body, tokenizer, head, renderer_class=QwenSteps)


class QwenSteps(StepRenderer):
    """The tokenizer's chat template, the answer with marks in it."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if len(tokenizer(MARK, add_special_tokens=False)["input_ids"]) != 1:
            raise ConfigError(f"reward_model={self.name!r}: its tokenizer has no token {MARK}.")
        self.mark = token_id(tokenizer, MARK)

    def encode_steps(self, messages: list[dict[str, str]], response: str) -> tuple[list[int], list[int], list[int]]:
        if not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        steps = paragraphs(response)
        spans, text = [], ""
        for step in steps:
            spans.append((len(text), len(text) + len(step)))
            text += step + MARK
        answer = {"role": "assistant", "content": ContentText(text, spans)}
        prompt = rendered(self, messages, add_generation_prompt=True)
        ids = rendered(self, [*messages, answer], add_generation_prompt=False)
        start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        return ids[:start], ids[start:], [i for i, token in enumerate(ids[start:]) if token == self.mark]
