"""Checkpoints that are not all in one place: a tokenizer, a body's config or code that lies in another repository.

What a fingerprint has to hold to account beside the checkpoint itself. Torch-free: the families that read these
repositories import the names from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specrej_eval import checkpoint
from specrej_eval.paths import expanded, is_folder

CONFIG_ELSEWHERE = {"Starling-RM-7B-alpha": "meta-llama/Llama-2-7b-chat-hf"}
"""Reward models published as bare weights (by the last part of their name), and where their body's config lies."""
STARLING_TOKENIZERS = {
    "Starling-RM-7B-alpha": "meta-llama/Llama-2-7b-chat-hf",
    "Starling-RM-34B": "01-ai/Yi-34B-Chat",
}
"""Neither checkpoint brings one along."""
ALPACA_FARM_BACKBONE = "hmomin/sft10k"
"""Config and tokenizer of AlpacaFarm's reward models, where the folder that their config.json names is not there."""

CODE_FILES = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files of a checkpoint whose ``auto_map`` may name code of another repository."""


class Companion(NamedTuple):
    """Another checkpoint that is read with one."""

    name: str
    """A hub name or a folder."""
    role: str
    """``config``, ``tokenizer``, ``config and tokenizer``, or ``code``."""


def of_reward(name: str, config: Mapping[str, Any], *, family: str = "auto") -> Iterator[Companion]:
    """What the reward families read beside the checkpoint ``name``, whose ``config.json`` says ``config``."""
    folder = expanded(name)
    own = checkpoint.has_tokenizer(folder)
    config_from = None if os.path.isfile(folder / "config.json") else CONFIG_ELSEWHERE.get(Path(name).name)
    tokenizer_from = None if own else STARLING_TOKENIZERS.get(Path(name).name)
    if family == "alpaca_farm" or is_alpaca_farm(config):
        config_from = alpaca_farm_backbone(config)
        tokenizer_from = None if own else config_from
    roles = {"config": config_from, "tokenizer": tokenizer_from}
    for other in dict.fromkeys(other for other in roles.values() if other is not None):
        yield Companion(other, " and ".join(role for role, read in roles.items() if read == other))


def is_alpaca_farm(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of AlpacaFarm's reward models."""
    return config.get("model_type") == "reward_model" and "backbone_model_name_or_path" in config


def alpaca_farm_backbone(config: Mapping[str, Any]) -> str:
    """The folder that its ``config.json`` names, or the hub's copy."""
    named = str(config.get("backbone_model_name_or_path"))
    return named if is_folder(named) else ALPACA_FARM_BACKBONE


def of_code(name: str, config: Mapping[str, Any]) -> Iterator[Companion]:
    """Repositories whose code ``config`` (one of CODE_FILES) asks for: ``owner/repo--module.Class``."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return
    named = set()
    for value in auto_map.values():
        references = value if isinstance(value, (list, tuple)) else [value]  # tokenizers: [slow, fast], either None
        named |= {entry.split("--")[0] for entry in references if isinstance(entry, str) and "--" in entry}
    yield from (Companion(repository, "code") for repository in sorted(named - {name}))
