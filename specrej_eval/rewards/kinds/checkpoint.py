"""``reward_model=`` a folder or a hub name: a checkpoint, read by one of ``rewards.families``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval import checkpoint
from specrej_eval.config.engines import VLLM
from specrej_eval.config.reward_names import SELF_SCORES
from specrej_eval.errors import ConfigError, nearest
from specrej_eval.paths import expanded, is_folder
from specrej_eval.rewards.base import RewardModel, RewardPlan
from specrej_eval.rewards.checkpoints import pooled
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily, family_names, load_family
from specrej_eval.rewards.checkpoints.renderer import read_template
from specrej_eval.rewards.kinds.base import AUTO, Asked, RewardKind


class Kind(RewardKind):
    ORDER = 3

    def claims(self, name: str) -> bool:
        return True  # whatever no other kind claims

    def resolve(self, asked: Asked) -> RewardPlan:
        """Raises:
        ConfigError: neither a folder nor a hub name, no family or several, a template or a device that is not there.
        CheckpointError: a folder or ``config.json`` that is missing or broken.
        """
        name, config, token = asked.name, asked.config, asked.token
        if config.reward_template is not None:
            read_template(config.reward_template)
        if config.reward_device is not None:
            checkpoint.check_device("reward_device", config.reward_device)
        _check_is_checkpoint(name)
        named = family_names() if config.reward_family == AUTO else (config.reward_family,)
        families = {entry: load_family(entry) for entry in named}
        raw = read_config(name, families, token=token)
        family = find_family(name, raw, families) if config.reward_family == AUTO else families[config.reward_family]
        folder = checkpoint.check_folder("reward_model", name)
        if folder is not None:
            family.check_files(folder)
        family.check(name, raw)
        demo = config.reward_dtype == "auto" and name == str(checkpoint.DEMO_REWARD)
        dtype = "float32" if demo else config.reward_dtype
        if config.reward_engine == VLLM:
            pooled.check_family(type(family).__module__.rpartition(".")[2], name, raw)
            return RewardPlan(name, lambda device: pooled.load(name, config, dtype, token))

        def load(device: str) -> RewardModel:
            return family.load(RewardCheckpoint(name, raw, config, dtype, config.reward_device or device, token))

        return RewardPlan(name, load)


def _check_is_checkpoint(name: str) -> None:
    """Raises:
    ConfigError: neither a folder, nor ``owner/name`` of the hub, nor a path.
    """
    if is_folder(name) or "/" in name:
        return
    best = nearest(name, SELF_SCORES)
    raise ConfigError(
        f"unknown reward_model {name!r}: there is no such folder.",
        hint=(f"did you mean {best!r}? " if best else "") + "It can be a checkpoint folder, a hub name owner/name, "
        "likelihood, pkg.module:function, or another of the forms that `specrej-eval rewards` lists.",
    )


def read_config(
    name: str, families: Mapping[str, RewardFamily], *, token: str | bool | None = None
) -> Mapping[str, Any]:
    """The ``config.json`` that belongs to a checkpoint, which may be another one's.

    Raises:
        CheckpointError: as ``checkpoint.read_config``.
    """
    others = [] if (expanded(name) / "config.json").is_file() else [one.config_from(name) for one in families.values()]
    return checkpoint.read_config("reward_model", next(filter(None, others), name), token=token)


def find_family(name: str, raw: Mapping[str, Any], families: Mapping[str, RewardFamily]) -> RewardFamily:
    """The only family whose ``matches`` says that it reads a checkpoint; general ones give way to others.

    Raises:
        ConfigError: none or several match.
    """
    found = {entry: family for entry, family in families.items() if family.matches(name, raw)}
    found = {entry: family for entry, family in found.items() if not family.GENERAL} or found
    if len(found) == 1:
        return next(iter(found.values()))
    listed = ", ".join(checkpoint.architectures(raw)) or "none"
    if found:
        raise ConfigError(
            f"reward_model={name!r} (architectures: {listed}) is claimed by several families: {', '.join(found)}.",
            hint=f"choose one: reward_family={next(iter(found))}.",
        )
    examples = {example.rpartition("/")[2]: entry for entry, family in families.items() for example in family.EXAMPLES}
    best = nearest(Path(name).name, examples)
    raise ConfigError(
        f"reward_model={name!r}: no reward family reads its architectures ({listed}).",
        hint=(f"its name is most like {best}, which reward_family={examples[best]} reads. " if best else "")
        + "A reward model has a trained head; a plain language model has none (reward_model=likelihood uses one "
        f"as its own reward). Families: {', '.join(families)}; reward_family= names one, "
        "`specrej-eval rewards` says what each reads.",
    )
