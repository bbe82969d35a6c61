"""What a file of this folder offers: one form that ``reward_model=`` may have, and what becomes of it.

A reward that is no checkpoint is one file here with ``class Kind(RewardKind)``; ``choose.resolve_reward`` finds it,
and `specrej-eval rewards` lists its forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from specrej_eval.config import RunConfig
from specrej_eval.rewards.base import RewardPlan

AUTO = "auto"
"""``reward_family``: the family of a checkpoint, or the protocol of a server, is found out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reward is resolved from."""

    name: str
    config: RunConfig
    token: str | bool | None
    """Of the hub."""
    resolve: Callable[[RunConfig], RewardPlan]
    """For rewards that are made of others."""


class RewardKind(ABC):
    """One kind of reward."""

    ORDER: ClassVar[int] = 1
    """Kinds are asked in this order whether a name is theirs: 0 = names made of names, 1 = a form that no other kind
    has, 2 = a form that is looser than others', 3 = what is left."""
    FORMS: ClassVar[Mapping[str, str]] = {}
    """Form of the name -> one line on what it is, for `specrej-eval rewards`."""

    @abstractmethod
    def claims(self, name: str) -> bool:
        """Whether a ``reward_model`` is of this kind, well written or not."""

    @abstractmethod
    def resolve(self, asked: Asked) -> RewardPlan:
        """Say everything that can be said before any weights load.

        Raises:
            ConfigError, CheckpointError, RewardError: as ``choose.resolve_reward``.
        """
