# torch-free
"""``engine=`` -> a plan -> an engine: who decodes, and everything that can be said of it before it loads.

Imports no engine before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from specrej_eval.config import ARGUMENTS, HOST, RunConfig
from specrej_eval.config.engines import SERVERS, TRANSFORMERS, VLLM, engine_of
from specrej_eval.engines.base import EnginePlan
from specrej_eval.errors import ConfigError

LOADERS = {
    TRANSFORMERS: "specrej_eval.engines.transformers.loading",
    VLLM: "specrej_eval.engines.vllm.loading",
    **dict.fromkeys(SERVERS, "specrej_eval.engines.servers.loading"),
}
"""A module with ``resolve_engine(config, host, *, check) -> EnginePlan`` for each."""


def resolve_engine(config: RunConfig, host: Mapping[str, Any], *, check: bool = True) -> EnginePlan:
    """Everything that can be said of the language model before its weights load.

    Args:
        check: False where the model is there already, which only our own engine can decode.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: as the engine's own ``resolve_engine``; an argument that
            is for another engine.
    """
    name = engine_of(config.engine)
    if not check and name != TRANSFORMERS:
        raise ConfigError(
            f"engine={name} loads its model itself, and a loaded one was given.",
            hint="give pretrained= as a hub name or a folder, or leave engine= out.",
        )
    check_taken(config, host)
    plan: EnginePlan = importlib.import_module(LOADERS[name]).resolve_engine(config, host, check=check)
    return plan


def check_taken(config: RunConfig, host: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: an argument that is for another engine.
    """
    name = engine_of(config.engine)
    ours = ((made, getattr(config, made.name)) for made in ARGUMENTS.values())
    theirs = ((HOST[given], value) for given, value in host.items() if given in HOST)
    for made, value in (*ours, *theirs):
        if made.engines and name not in made.engines and value is not None and value != made.default:
            raise ConfigError(
                f"{made.name}={value!r} is for engine={' or '.join(made.engines)}; here engine={name} decodes.",
                hint=f"leave {made.name} out, or give engine={made.engines[0]}.",
            )
