"""RLHFlow's process reward models: each step is a user's turn, and the model answers it with + or -.

Source: RLHFlow/Llama3.1-8B-PRM-Deepseek-Data (and -Mistral-Data), ``math-rm/prm_evaluate.py`` of
RLHFlow/RLHF-Reward-Modeling.

The first turn is question and first step with a space between; the answer's paragraphs, stripped, are its steps, each
answered "+" in the text. P(+) against P(-) is read at the token before each "+", the end of the assistant's header.
One pass over the whole text gives what the original gets from one pass for each step.

The checkpoint with "Mistral" in its name was trained on steps of one line each, and gets them so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import assemble, load_body
from specrej_eval.rewards.checkpoints.renderer import Renderer
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.steps import (
    PLUS_AND_MINUS,
    lines,
    paragraphs,
    question,
    rendered,
    sign_head,
    token_id,
)

GOOD = PLUS_AND_MINUS[0]


class Family(RewardFamily):
    READS = "process: + against - after each paragraph as a user's turn; prm_reduce= makes one number"
    EXAMPLES = ("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "RLHFlow/Llama3.1-8B-PRM-Mistral-Data")
    NEEDS = "reward_family=rlhflow_prm for a copy under another name"
    BY_NAME = True  # its config is a plain language model's, and any of those answers with + or -

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        head = sign_head(source, body, tokenizer)
        return assemble(source, body, tokenizer, head, renderer_class=TurnRenderer)


class TurnRenderer(Renderer):
    """Steps as turns; an answer's "+" is found again by what the template writes around it."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.split = lines if "mistral" in Path(self.name).name.lower() else paragraphs
        opened = rendered(self, [{"role": "user", "content": "x"}], add_generation_prompt=True)
        before = rendered(self, [{"role": "user", "content": "x"}], add_generation_prompt=False)
        self.pattern = (*opened[len(before) :], token_id(tokenizer, GOOD))

    def encode(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Any:
        """Raises:
        ValueError: the answers are not found again: a template without a header for the assistant.
        """
        # an open turn makes no difference: the last one is always "+"
        steps = [step.strip() for step in self.split(response)]
        turns = [f"{question(messages)} {steps[0]}", *steps[1:]]
        ids = rendered(
            self,
            [
                turn
                for text in turns
                for turn in ({"role": "user", "content": text}, {"role": "assistant", "content": GOOD})
            ],
            add_generation_prompt=False,
        )
        if len(self.positions_of(tuple(ids))) < len(steps):
            raise ValueError(f"{len(steps)} steps were answered with {GOOD!r}, and not all are found again")
        return {"input_ids": ids}

    def positions_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The last token before each "+"."""
        size = len(self.pattern)
        found = tuple(end - 2 for end in range(size, len(ids) + 1) if ids[end - size : end] == self.pattern)
        return found or (len(ids) - 1,)
