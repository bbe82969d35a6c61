"""Eurus-RM: a linear head at the last token of Mistral, which reads Mistral-Instruct's form without an end token.

Source: Yuan et al., "Advancing LLM Reasoning Generalists with Preference Trees" (2024), model card and
``modeling_eurus_rm.py`` of openbmb/Eurus-RM-7b.

The card says "the same template as Mistral-Instruct-v0.2" and gives the example "[INST] q [\\INST] a", slash the wrong
way round; its output (47.44) was made with that text. We write "[INST] q [/INST] a". Where others differ: the reference
code of Speculative Rejection has no space before the answer, reward-bench puts an end token behind it. Earlier answers
of a conversation end with the end token, as in Mistral-Instruct; the card says nothing of them.
"""

from __future__ import annotations

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import load_linear
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}"
    "{%- elif message['role'] == 'user' -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] }}{%- if not loop.last -%}{{ eos_token }}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}"
)


class Family(RewardFamily):
    READS = "a linear head at the last token of '[INST] q [/INST] a'"
    EXAMPLES = ("openbmb/Eurus-RM-7b",)
    ARCHITECTURES = ("EurusRewardModel",)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        return load_linear(source, "regression_head.", TEMPLATE)
