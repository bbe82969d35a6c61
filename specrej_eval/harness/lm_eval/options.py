"""lm-eval's options and our arguments brought together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specrej_eval.config import AUTO, HOST
from specrej_eval.errors import ConfigError


def merge_options(
    arguments: dict[str, Any], harness: Mapping[str, Any], *, device_given: bool = False
) -> tuple[int | str, list[str]]:
    """Bring model_args and lm-eval's own options together in ``arguments``; model_args win.

    Args:
        device_given: the user named the device; lm-eval passes ``cuda:0`` where nobody did.

    Returns:
        HFLM's batch size, and what there is to warn about.
    """
    options = {name: value for name, value in harness.items() if value is not None}
    if not device_given and options.get("device") == "cuda:0" and not torch.cuda.is_available():
        del options["device"]
    notes = []
    given = arguments.pop("batch_size", None)
    host_batch_size = options.pop("batch_size", 1 if given is None else given)
    ours = given if given is not None else host_batch_size if str(host_batch_size) != "1" else None
    if given is not None and str(host_batch_size) not in ("1", str(given)):
        notes.append(
            f"batch_size={given} in model_args wins over --batch_size {host_batch_size} for generation; "
            "log-likelihood requests use the latter."
        )
    if ours is not None and not str(ours).startswith(AUTO):
        arguments["batch_size"] = ours
    for name, value in options.items():
        if arguments.get(name) is None:
            arguments[name] = value
        elif arguments[name] != value and (device_given or value != "cuda:0"):
            notes.append(f"{name}={arguments[name]} in model_args wins over --{name} {value}.")
    return host_batch_size, notes


def check_host_arguments(host: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: a name that HFLM takes but cannot make use of.
    """
    if host.get("backend") == "seq2seq":
        raise seq2seq_refused()
    for name, value in host.items():
        if value is not None and (hint := HOST[name].not_in_lm_eval):
            raise ConfigError(f"{name}={value!r} has no effect on lm-eval's own loader.", hint=hint)


def name_of(loaded: Any) -> str:
    """A loaded model or tokenizer by its checkpoint, or at least by its class."""
    return str(getattr(loaded, "name_or_path", "") or type(loaded).__name__)


def seq2seq_refused() -> ConfigError:
    return ConfigError(
        "encoder-decoder models are not supported: rows share the prompt's KV cache, and these models have none.",
        hint="use a causal language model, or --model hf for this one.",
    )
