"""Rewards that are no checkpoint, recognised by the form of their name: one entry of KINDS each.

The order matters: ``a+0.5*b`` is looked at before what its parts may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from specrej_eval.config import RunConfig
from specrej_eval.rewards import ensemble
from specrej_eval.rewards import function as callable_reward
from specrej_eval.rewards.base import RewardModel
from specrej_eval.rewards.deepconf import DeepConf
from specrej_eval.rewards.likelihood import Likelihood
from specrej_eval.rewards.self_certainty import SelfCertainty
from specrej_eval.rewards.self_scores import Floor
from specrej_eval.rewards.servers import judge
from specrej_eval.rewards.servers import server as http_server

_SELF_SCORES: dict[str, Callable[[RunConfig], RewardModel]] = {
    "likelihood": lambda config: Likelihood(Floor.of(config)),
    "self_certainty": lambda config: SelfCertainty(Floor.of(config)),
    "deepconf": lambda config: DeepConf(Floor.of(config), window=config.deepconf_window),
}


class Kind(NamedTuple):
    """One kind of reward that is no checkpoint."""

    claims: Callable[[str], bool]
    """Whether a ``reward_model`` is of this kind."""
    check: Callable[[str, RunConfig, str | bool | None], None]
    """What can be said before any weights load; raises as ``base.check_reward``. Third: the hub token."""
    make: Callable[[str, RunConfig, str, str | bool | None], RewardModel]
    """The reward; third: the language model's device."""


def _check_callable(name: str, config: RunConfig, token: str | bool | None) -> None:
    del config, token
    callable_reward.import_callable(name)


KINDS = (
    Kind(ensemble.claims, ensemble.check, ensemble.make),
    Kind(judge.claims, judge.check, judge.make),
    Kind(http_server.claims, http_server.check, http_server.make),
    Kind(
        lambda name: name in _SELF_SCORES,
        lambda name, config, token: None,
        lambda name, config, device, token: _SELF_SCORES[name](config),
    ),
    Kind(
        callable_reward.is_callable_name,
        _check_callable,
        lambda name, config, device, token: callable_reward.CallableReward(name),
    ),
)


def kind_of(name: str) -> Kind | None:
    """None for a checkpoint."""
    return next((kind for kind in KINDS if kind.claims(name)), None)
