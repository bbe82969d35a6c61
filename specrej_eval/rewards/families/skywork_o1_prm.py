"""Skywork-o1-Open-PRM: a value head at the line break behind each step; its sigmoid is the step's probability.

Source: the model card of Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B (and -1.5B), and SkyworkAI/skywork-o1-prm-inference.

The text is BOS (if the tokenizer has one), question, line break, then each line of the answer and a line break. Lines
are tokenised one by one, as there: a line break never merges with what is around it. Blank lines in between are steps
of their own, as there; line breaks at the very end are left out, where the original would score an empty step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import assemble, load_body, load_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.steps import StepHead, StepRenderer, question, token_id
from specrej_eval.special_tokens import ContentText


class Family(RewardFamily):
    READS = "process: a value head at the line break behind each line; prm_reduce= makes one number"
    EXAMPLES = ("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B", "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B")
    NEEDS = "reward_family=skywork_o1_prm for some copies under another name"
    ARCHITECTURES = ("Qwen2ForPrmModel",)
    BY_NAME = True  # some copies' configs are a plain language model's

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        layer = load_head(source, nn.Linear(body.config.hidden_size, 1), "v_head.summary.")
        head = StepHead(layer, source.config.prm_reduce)
        return assemble(source, body, tokenizer, head, renderer_class=Lines, without_template="text")


class Lines(StepRenderer):
    """Question and lines, tokenised one by one."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.mark = token_id(tokenizer, "\n")

    def encode_steps(self, messages: list[dict[str, str]], response: str) -> tuple[list[int], list[int], list[int]]:
        bos, asked = self.tokenizer.bos_token or "", question(messages)
        prompt = self._ids(ContentText(f"{bos}{asked}\n", [(len(bos), len(bos) + len(asked))]))
        ids, places = [], []
        for step in response.rstrip("\n").split("\n"):
            ids += [*self._ids(step), self.mark]
            places.append(len(ids) - 1)
        return prompt, ids, places

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokeniser.text(text, add_special_tokens=False)["input_ids"]
        return ids
