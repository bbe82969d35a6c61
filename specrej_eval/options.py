"""The options of commands that use a reward model alone: those of ``RunConfig`` that say which, and how it is read."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from specrej_eval.config import RunConfig, descriptions

if TYPE_CHECKING:
    from specrej_eval.rewards.base import RewardModel

NAMES = (
    "reward_model",
    "reward_family",
    "reward_tokenizer",
    "reward_template",
    "reward_ensemble",
    "reward_dtype",
    "reward_device",
    "reward_batch_size",
    "reward_timeout",
    "reward_retries",
    "judge_prompt",
    "judge_max_toks",
    "special_tokens_in_content",
    "trust_remote_code",
)
_HELP = {
    "reward_dtype": "auto = float32 for the embedded one, else the checkpoint's.",
    "special_tokens_in_content": "Special tokens such as <|im_end|> that a prompt or an answer spells: encode_as_text "
    "(also where it is not given), allow (control tokens) or error.",
    "reward_device": "None = cuda if there is one, else cpu.",
    "trust_remote_code": "Run code from the checkpoint.",
}
"""Where the words of ``RunConfig`` speak of a language model beside it."""


def add_reward_options(parser: argparse.ArgumentParser, *, reward_model: str = "--reward_model") -> None:
    """One option for each of NAMES (``reward_model`` under another name, if given), and ``--token`` for the hub."""
    told = descriptions()
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    group = parser.add_argument_group("reward model (the names of --model_args)")
    for name in NAMES:
        default = "" if defaults[name] is None else f" (default: {defaults[name]})"
        text = _HELP.get(name, told[name]) + default
        flags = dict.fromkeys([reward_model, "--reward_model"]) if name == "reward_model" else [f"--{name}"]
        group.add_argument(*flags, dest=name, default=None, metavar="VALUE", help=text.replace("%", "%%"))
    group.add_argument("--token", metavar="VALUE", help="of the hub, for gated checkpoints")


def reward_config(args: argparse.Namespace, **others: Any) -> RunConfig:
    """The options given, checked.

    Raises:
        ConfigError: a bad value.
    """
    given = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    config, _ = RunConfig.from_args({**given, **others})
    return config


def load_reward(config: RunConfig, token: str | None = None) -> RewardModel:
    """The reward model, on a GPU if there is one and nothing else is said.

    Raises:
        ConfigError, CheckpointError, RewardError: as ``rewards.choose.resolve_reward``.
    """
    import torch

    from specrej_eval.rewards.choose import resolve_reward

    return resolve_reward(config, token=token).load("cuda" if torch.cuda.is_available() else "cpu")
