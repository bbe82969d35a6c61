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

from typing import Any

from torch import nn

from specrej_eval.errors import ConfigError
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import assemble, load_body, load_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.steps import StepHead, StepRenderer, paragraphs, rendered, token_id
from specrej_eval.special_tokens import ContentText

MARK = "<extra_0>"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


class Family(RewardFamily):
    READS = "process: a two-layer head at <extra_0> behind each paragraph; prm_reduce= makes one number"
    EXAMPLES = ("Qwen/Qwen2.5-Math-PRM-7B", "Qwen/Qwen2.5-Math-PRM-72B", "Qwen/Qwen2.5-Math-7B-PRM800K")
    ARCHITECTURES = ("Qwen2ForProcessRewardModel",)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        size = body.config.hidden_size
        layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))  # wrong, right
        head = StepHead(load_head(source, layers, "score."), source.config.prm_reduce, good=1)
        return assemble(source, body, tokenizer, head, renderer_class=QwenSteps)


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
