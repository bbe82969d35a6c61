"""Rewards by the names of arguments, in one call."""

from __future__ import annotations

from specrej_eval.config import RunConfig
from specrej_eval.rewards.base import RewardModel
from specrej_eval.rewards.choose import resolve_reward

check_reward = resolve_reward


def make_reward(config: RunConfig, *, device: str = "cpu", token: str | None = None) -> RewardModel:
    """Resolved and loaded."""
    return resolve_reward(config, token=token).load(device)
