"""AlpacaFarm's reward-model-human and -sim, as the reference code of Speculative Rejection used them.

Source: Dubois et al., "AlpacaFarm" (2023), its ``models/reward_model.py`` and prompt file, and the reference code's
``utils/alpaca_farm``. A linear head with bias at the last token of LLaMA-7B, which reads Alpaca's prompt with the
answer right behind "### Response:" and no end token.

config.json describes no body; it names another checkpoint (``backbone_model_name_or_path``, a folder of its authors),
whose config and tokenizer are read: hmomin/sft10k where there is no such folder, as in the reference code.

We differ from the reference code in BOS: it writes "<s>" into the text and its tokenizer adds another one; AlpacaFarm
was trained with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval import checkpoint, companions
from specrej_eval.paths import expanded
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import body_config, load_linear
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '\n\n### Instruction:\n' + message['content'] + '\n\n### Response:' }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
)


class Family(RewardFamily):
    READS = "a linear head at the last token of Alpaca's prompt and the answer"
    EXAMPLES = ("hmomin/reward-model-human", "hmomin/reward-model-sim")
    NEEDS = "hmomin/sft10k (config and tokenizer of its body), or the folder that its config.json names"

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        return companions.is_alpaca_farm(raw)

    def check_files(self, folder: Path) -> None:
        """The tokenizer is the backbone's."""
        checkpoint.check_weights("reward_model", folder)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        backbone = companions.alpaca_farm_backbone(source.raw)
        raw = checkpoint.read_config("reward_model", backbone, token=source.token)
        return load_linear(
            source,
            "reward_head.",
            TEMPLATE,
            bias=True,
            model_config=body_config(source.name, raw),
            tokenizer_from=None if checkpoint.has_tokenizer(expanded(source.name)) else backbone,
            key_mapping={r"^backbone_model\.model\.": ""},
        )
