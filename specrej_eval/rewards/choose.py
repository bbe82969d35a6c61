"""``reward_model=`` -> a plan -> a reward: which kind is named, and everything that can be said of it before it loads.

Imports every room here and is imported by none of them. Kinds, families and protocols are found by listing folders.
"""

from __future__ import annotations

from functools import cache, partial

from specrej_eval import checkpoint, registry
from specrej_eval.config import RunConfig
from specrej_eval.config.engines import VLLM
from specrej_eval.errors import ConfigError, suggest
from specrej_eval.rewards.base import RewardPlan
from specrej_eval.rewards.checkpoints import pooled
from specrej_eval.rewards.checkpoints.family import family_names
from specrej_eval.rewards.kinds.base import AUTO, Asked, RewardKind
from specrej_eval.rewards.servers.base import protocol_names

_KINDS = "specrej_eval.rewards.kinds"


def resolve_reward(config: RunConfig, *, token: str | bool | None = None) -> RewardPlan:
    """Everything that can be said of the reward before any weights load; ``resolve_reward(config).load(device)`` is it.

    Args:
        token: for a gated hub repository.

    Raises:
        ConfigError: no reward named where one is needed, an unknown name or family, several labels, a callable that
            cannot be imported, a template file or a device that is not there, a server that cannot give raw scores.
        CheckpointError: a folder that is missing or broken.
        MissingDependencyError: ``reward_engine=vllm``, and no vLLM.
        RewardError: a server that does not answer as it should.
    """
    name = _name(config)
    known = (AUTO, *family_names(), *protocol_names())
    if config.reward_family not in known:
        raise ConfigError(f"unknown reward_family {config.reward_family!r}.", hint=suggest(config.reward_family, known))
    if config.reward_engine == VLLM:
        pooled.check_asked(name, config)
    kind = next(kind for kind in kinds().values() if kind.claims(name))
    return kind.resolve(Asked(name, config, token, partial(resolve_reward, token=token)))


@cache
def kinds() -> dict[str, RewardKind]:
    """Every kind of reward by its file's name, in the order in which they are asked."""
    loaded = {
        name: registry.load_module(_KINDS, name, argument="reward_model").Kind() for name in registry.names(_KINDS)
    }
    return dict(sorted(loaded.items(), key=lambda item: item[1].ORDER))


def _name(config: RunConfig) -> str:
    """``config.reward_model``, or what stands in for it.

    None means the embedded reward model beside the embedded language model. One row alone (``n=1``) is never compared
    with anything, so beside another language model it needs no reward, and gets the one that costs nothing.

    Raises:
        ConfigError: another language model, several rows, and no reward to compare them with.
    """
    if config.reward_model is not None:
        return config.reward_model
    if config.pretrained is None:
        return str(checkpoint.DEMO_REWARD)
    if config.n == 1:
        return "likelihood"
    raise ConfigError(
        f"a reward model is needed to rank the candidates of pretrained={config.pretrained!r}.",
        hint="reward_model= takes a checkpoint folder, a hub name, likelihood, or pkg.module:function; "
        "n=1 samples plainly and needs none.",
    )
