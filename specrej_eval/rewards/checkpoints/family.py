"""What a reward family is, and the checkpoint that it is asked to load. See ``rewards.families``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from specrej_eval import checkpoint, registry
from specrej_eval.config import RunConfig
from specrej_eval.rewards.base import RewardModel

_PACKAGE = "specrej_eval.rewards.families"


@dataclass(frozen=True, slots=True)
class RewardCheckpoint:
    """One checkpoint to load, and everything that was found out about it before."""

    name: str
    """A folder or a hub name."""
    raw: Mapping[str, Any]
    """Its ``config.json``, or the one that stands for it (``RewardFamily.config_from``)."""
    config: RunConfig
    """How it is read: templates, partial turns, caches, remote code."""
    dtype: str
    """Of the body; heads are float32."""
    device: str
    token: str | bool | None
    """Of the hub."""


class RewardFamily(ABC):
    """Reads the checkpoints of one kind. The name of its file is the family's name."""

    READS: ClassVar[str]
    """One line for `specrej-eval rewards`: what is read where."""
    EXAMPLES: ClassVar[tuple[str, ...]]
    """Hub names of checkpoints it was written for."""
    NEEDS: ClassVar[str] = ""
    """What a user must bring besides the checkpoint's name; empty if nothing."""
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ()
    """Classes in ``config.json`` that are this family's."""
    BY_NAME: ClassVar[bool] = False
    """Whether copies of EXAMPLES under their own name are this family's, whatever ``config.json`` names."""
    GENERAL: ClassVar[bool] = False
    """Whether a family that is more particular wins where both match."""

    def matches(self, name: str, raw: Mapping[str, Any]) -> bool:
        """Whether this family reads the checkpoint (``reward_family=auto``).

        By the classes that ``config.json`` names; where those say nothing (a reward model saved as a plain language
        model), by the checkpoint's name, or by other keys in families that say so.
        """
        known = {entry.rpartition("/")[2].lower() for entry in self.EXAMPLES if self.BY_NAME}
        return Path(name).name.lower() in known or not set(self.ARCHITECTURES).isdisjoint(checkpoint.architectures(raw))

    def config_from(self, name: str) -> str | None:
        """Another checkpoint whose ``config.json`` stands for this one, if it is published without."""
        return None

    def check(self, name: str, raw: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to check
        """Raise ConfigError for what ``config.json`` already rules out."""

    def check_files(self, folder: Path) -> None:
        """Hold a checkpoint's folder to what this family needs of it: as a rule, what transformers does.

        Raises:
            CheckpointError: weight files or a tokenizer are missing or broken.
        """
        checkpoint.check_weights("reward_model", folder)
        checkpoint.check_tokenizer_files("reward_model", folder)

    @abstractmethod
    def load(self, source: RewardCheckpoint) -> RewardModel:
        """Load tokenizer and weights.

        Raises:
            CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
            ConfigError: what only the tokenizer or the weights could tell is not as it must be.
        """


def family_names() -> tuple[str, ...]:
    """Names of the checkpoint families; imports none of them."""
    return registry.names(_PACKAGE)


def load_family(name: str) -> RewardFamily:
    """The family of that name.

    Raises:
        ConfigError: there is none.
    """
    family: RewardFamily = registry.load_module(_PACKAGE, name, argument="reward_family").Family()
    return family
