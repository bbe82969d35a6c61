"""UltraRM: a linear head at the last token of Llama-2-13B, on "Human: ... Assistant: ..." text.

Source: Cui et al., "UltraFeedback" (2023), and the model card of openbmb/UltraRM-13b. The card's template has a blank
line before "Assistant:", its example texts one line break; reward-bench writes "User:" in place of "Human:". We follow
the card's template.
"""

from __future__ import annotations

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import load_linear
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}{%- endif -%}"
    "{%- if not loop.first -%}{{ '\n\n' }}{%- endif -%}"
    "{{ ('Human: ' if message['role'] == 'user' else 'Assistant: ') + message['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)


class Family(RewardFamily):
    READS = "a linear head at the last token of 'Human: q\\n\\nAssistant: a'"
    EXAMPLES = ("openbmb/UltraRM-13b",)
    ARCHITECTURES = ("LlamaRewardModel",)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        return load_linear(source, "regression_head.", TEMPLATE)
