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

from torch import nn

from specrej_eval import checkpoint, companions
from specrej_eval.config import RunConfig
from specrej_eval.paths import expanded
from specrej_eval.rewards.checkpoints.native import (
    LastToken,
    TextRenderer,
    assemble,
    body_config,
    fill,
    load_body,
    read_tensors,
)
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "a linear head at the last token of Alpaca's prompt and the answer"
EXAMPLES = ("hmomin/reward-model-human", "hmomin/reward-model-sim")
NEEDS = "hmomin/sft10k (config and tokenizer of its body), or the folder that its config.json names"

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system messages') }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '\n\n### Instruction:\n' + message['content'] + '\n\n### Response:' }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
)


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    del name
    return companions.is_alpaca_farm(checkpoint_config)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: what counts is the backbone's config."""


def check_files(folder: Path) -> None:
    """Raises:
    CheckpointError: weight files that are missing or broken. (The tokenizer is the backbone's.)
    """
    checkpoint.check_weights("reward_model", folder)


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    raw = checkpoint.read_config("reward_model", name, token=token)
    backbone = companions.alpaca_farm_backbone(raw)
    own_tokenizer = any((expanded(name) / file).is_file() for file in checkpoint.TOKENIZER_FILES)
    body, tokenizer = load_body(
        name,
        config,
        dtype=dtype,
        device=device,
        token=token,
        model_config=body_config(name, checkpoint.read_config("reward_model", backbone, token=token)),
        tokenizer_from=None if own_tokenizer else backbone,
        key_mapping={r"^backbone_model\.model\.": ""},
    )
    tensors = read_tensors(name, lambda key: key.startswith("reward_head."), token=token)
    head = fill(name, nn.Linear(body.config.hidden_size, 1), tensors, prefix="reward_head.")
    return assemble(name, config, body, tokenizer, LastToken(head), renderer_class=TextRenderer, template=TEMPLATE)
