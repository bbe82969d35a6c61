"""Nemotron reward models saved as language models: the reward is the logit of vocabulary id 0 after the answer.

Source: the model card of nvidia/Llama-3.1-Nemotron-70B-Reward-HF, which generates one token and takes
``scores[0][0][0]``: the first logit at the position behind the template's last token. Only row 0 of the language-model
head is read here. The card's -3.28125 is that ``scores`` value; if the checkpoint's generation settings scale logits
(a temperature), the raw logit differs from it by that factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from specrej_eval.config import RunConfig
from specrej_eval.rewards.checkpoints.loading import named
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, fill, load_body, read_tensors
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

READS = "the logit of vocabulary id 0 behind the last token of a language model"
EXAMPLES = ("nvidia/Llama-3.1-Nemotron-70B-Reward-HF",)
NEEDS = "about 140 GB of memory in bfloat16; reward_family=nemotron for a copy under another name"


def matches(name: str, checkpoint_config: Mapping[str, Any]) -> bool:
    """By name: its config is a plain language model's."""
    del checkpoint_config
    return named(EXAMPLES, name)


def check(name: str, checkpoint_config: Mapping[str, Any]) -> None:
    """Nothing: any language model has a logit 0; that it is a reward only its name tells."""


def load(name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> CheckpointReward:
    """Raises:
    CheckpointError: files that cannot be loaded, or hold no language-model head.
    """
    body, tokenizer = load_body(name, config, dtype=dtype, device=device, token=token)
    # tied embeddings are stored once
    key = "model.embed_tokens.weight" if body.config.tie_word_embeddings else "lm_head.weight"
    tensors = {name_: tensor[:1] for name_, tensor in read_tensors(name, key.__eq__, token=token).items()}
    head = fill(name, nn.Linear(body.config.hidden_size, 1, bias=False), tensors, prefix=key.removesuffix("weight"))
    return assemble(name, config, body, tokenizer, LastToken(head))
