"""Math-Shepherd: a language model that says + or - at a mark behind each step of a plain text.

Source: Wang et al., "Math-Shepherd" (2024), and the model card of peiyi9979/math-shepherd-mistral-7b-prm.

The text is "question step ки\\nstep ки\\n...", one step a line; at each mark the logits of + and - are compared. The
space before the mark belongs to it ("ки" without one is another token). The tokenizer puts BOS in front.

Steps are lines here, as in its training data; search-and-learn takes paragraphs. Blank lines are left out.
"""

from __future__ import annotations

from typing import Any

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import assemble, load_body
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.steps import (
    StepRenderer,
    lines,
    question,
    sign_head,
    token_id,
)
from specrej_eval.special_tokens import ContentText

MARK = "ки"


class Family(RewardFamily):
    READS = "process: + against - at the mark behind each line; prm_reduce= makes one number"
    EXAMPLES = ("peiyi9979/math-shepherd-mistral-7b-prm",)
    NEEDS = "reward_family=math_shepherd for a copy under another name"
    BY_NAME = True  # its config is a plain language model's, and any of those answers with + or -

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        head = sign_head(source, body, tokenizer)
        return assemble(source, body, tokenizer, head, renderer_class=MarkedLines, without_template="text")


class MarkedLines(StepRenderer):
    """One plain text, tokenised in one go."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.mark = token_id(tokenizer, MARK)

    def encode_steps(self, messages: list[dict[str, str]], response: str) -> tuple[list[int], list[int], list[int]]:
        asked = question(messages)
        steps = lines(response)
        text, spans, ends = f"{asked} ", [(0, len(asked))], set()
        for number, step in enumerate(steps):
            text += "\n" if number else ""
            spans.append((len(text), len(text) + len(step)))
            text += f"{step} {MARK}"
            ends.add(len(text))
        encoded = self.tokeniser.text(ContentText(text, spans), return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        # the first token that begins behind the question; special tokens have empty offsets
        start = next((i for i, (a, b) in enumerate(offsets) if a >= len(asked) and b > a), len(ids))
        # the mark's last token, of those that end where ours does (a character may be several tokens)
        last = {b: i for i, (a, b) in enumerate(offsets) if b in ends and b > a}
        return ids[:start], ids[start:], [last[end] - start for end in sorted(ends) if end in last]
