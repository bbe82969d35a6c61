# torch-free
"""What stands in for HFLM's model where another engine loads the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from specrej_eval.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NoModel:
    """Has a config, as HFLM's context length, padding and report need one, and no weights."""

    config: Any
    name_or_path: str

    def to(self, device: Any) -> NoModel:
        """HFLM places its model; there is nothing to place."""
        del device
        return self


def no_loglikelihoods(engine: str, pretrained: str) -> NoReturn:
    """Raises:
    ConfigError: log-likelihood requests are lm-eval's own, and need a model of its own.
    """
    raise ConfigError(
        f"engine={engine} answers no log-likelihood requests: it decodes, and lm-eval has no weights here.",
        hint=f"`lm_eval --model vllm --model_args pretrained={pretrained},...` answers them (they have no part in "
        "decoding), or engine=transformers does; give these tasks a run of their own.",
    )
