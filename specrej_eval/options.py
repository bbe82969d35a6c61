"""Options of a command line out of declarations: all of a run's, or those of a reward model that is used alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from specrej_eval import registry
from specrej_eval.config import ARGUMENTS, HOST, Argument, RunConfig, Takes, names

if TYPE_CHECKING:
    from specrej_eval.rewards.base import RewardModel, RewardPlan


def add_options(group: Any, arguments: Iterable[Argument], **more_flags: str) -> None:
    """An option for each argument, with its help and default.

    Args:
        more_flags: name -> another flag, which stands first.
    """
    for made in arguments:
        default = "" if made.default in (None, (), "", {}) else f" (default: {made.default})"
        flags = dict.fromkeys(
            [more_flags.get(made.name, f"--{made.name}"), *(f"--{n}" for n in (made.name, *made.synonyms))]
        )
        shown = (made.told.replace("``", "") + default).replace("%", "%%")
        text = argparse.SUPPRESS if made.not_in_python else shown  # taken all the same, and answered with what to use
        group.add_argument(*flags, dest=made.name, default=argparse.SUPPRESS, metavar="VALUE", help=text)


def add_grid(group: Any, *, alpha: str, n: str) -> None:
    """Options of a grid of methods."""
    strategies = ",".join(registry.names("specrej_eval.strategies"))
    group.add_argument("--strategy", default=strategies, metavar="LIST", help="strategies")
    group.add_argument("--alpha", default=alpha, metavar="LIST", help="shares rejected at each look; 0 is Best-of-N")
    group.add_argument("--n", default=argparse.SUPPRESS, metavar="LIST", help=f"rows started (default: {n})")


def add_reward_options(parser: argparse.ArgumentParser, *, reward_model: str = "--reward_model") -> None:
    """Options of a reward model used alone (``reward_model`` under another flag, if given), and the hub's token."""
    group = parser.add_argument_group("reward model (the names of --model_args)")
    add_options(group, (ARGUMENTS[name] for name in names(Takes.ALONE)), reward_model=reward_model)
    add_options(group, [HOST["token"]])


def reward_config(options: Mapping[str, Any]) -> RunConfig:
    """The options given, checked.

    Raises:
        ConfigError: a bad value.
    """
    config, _ = RunConfig.from_args({name: options[name] for name in names(Takes.ALONE) if name in options})
    return config


def load_reward(config: RunConfig, token: str | None = None, *, plan: RewardPlan | None = None) -> RewardModel:
    """The reward model, on a GPU if there is one and nothing else is said.

    Args:
        plan: ``resolve_reward(config)``, where that was asked already.

    Raises:
        ConfigError, CheckpointError, RewardError: as ``rewards.choose.resolve_reward``.
    """
    from specrej_eval.checkpoint import device_of
    from specrej_eval.rewards.choose import resolve_reward

    device = device_of(config.device)
    return (plan or resolve_reward(config, token=token)).load(device)
