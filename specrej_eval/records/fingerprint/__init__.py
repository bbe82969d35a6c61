"""What decides an answer, as plain JSON: two runs with equal fingerprints give equal answers.

Kept beside every record that a later run may go on from (a journal, lm-eval's ``--use_cache``, a folder of `run` or of
alpaca_eval), so that a changed argument, checkpoint or reward function is noticed instead of old answers being passed
off as new ones. One function builds it and one compares it (``comparing``), for all of them. What an argument decides
is said where it is declared (``config``).

Beside what decides stand two things that do not: ``environment``, whose change is warned about (other versions or
another device give other last bits, which is rarely another answer), and ``uncovered``, what nobody can hold to account
from here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from specrej_eval import vllm_adapter
from specrej_eval.checkpoint import DEMO_POLICY
from specrej_eval.config import DEFAULT_N, HOST, NEUTRAL, PLACEMENT, Decides, RunConfig, as_dict, names
from specrej_eval.config.argument import checkpoint, template
from specrej_eval.config.engines import AUTO_BACKEND, AUTO_ENGINE, SDPA, VLLM, engine_of
from specrej_eval.records.fingerprint.comparing import (
    BETWEEN,
    SINCE,
    Comparison,
    check_same,
    compare,
    differences,
    has_files_of,
    same,
    same_reward_files,
    uncovered,
    warn_of_uncovered,
    warnings_of,
)
from specrej_eval.records.fingerprint.files import EMBEDDED, HOST_DEFAULTS, Behind, plain, text_or_digest
from specrej_eval.redaction import redacted, redacted_values

__all__ = [
    "BETWEEN",
    "EMBEDDED",
    "NUMBERS_VERSION",
    "SINCE",
    "Comparison",
    "check_same",
    "compare",
    "differences",
    "from_first_rank",
    "has_files_of",
    "is_demo",
    "of_models",
    "of_run",
    "same",
    "same_reward_files",
    "uncovered",
    "version_of",
    "warn_of_uncovered",
    "warnings_of",
]

NUMBERS_VERSION = 1
"""Of our own arithmetic: what the same arguments, models and versions give. Raised when, and only when, an answer, a
reward or a draw changes, which ``tests/system/test_numbers.py`` notices; records of another version are not gone on
from."""

_OF_HOST = names(checkpoint, among=HOST)
_VERSIONS = ("specrej_eval", "torch", "transformers", "tokenizers")


def of_models(config: RunConfig, host: Mapping[str, Any], *, loaded: Sequence[str] = ()) -> dict[str, Any]:
    """Names, files and dtypes of the two models, and the host's arguments that change what they compute.

    Args:
        loaded: arguments that were given as objects, not by name (``pretrained``); their names say little of them.

    Raises:
        CheckpointError: a file of theirs cannot be read.
    """
    about = Behind(config, host)
    policy, reward = config.pretrained, _reward_name(config)
    if "pretrained" in loaded:
        about.uncovered.append(f"pretrained: the weights of the loaded model that was given ({policy})")
        policy_files = None
    else:
        policy_files = about.checkpoint(policy or str(DEMO_POLICY), revision=host.get("revision"), policy=True)
    reward_files = about.reward(reward)
    for name in _OF_HOST:
        value = host.get(name)
        if isinstance(value, str):
            about.files[name] = about.checkpoint(value, weights=name != "tokenizer")
        elif value is not None:
            about.loaded_object(name, value)
    if config.reward_tokenizer is not None:
        about.files["reward_tokenizer"] = about.checkpoint(config.reward_tokenizer, weights=False)
    return {
        "numbers_version": NUMBERS_VERSION,
        "pretrained": policy or EMBEDDED,
        "pretrained_files": policy_files,
        "reward_model": redacted(reward, put=""),
        "reward_files": reward_files,
        **{f"{name}_files": files for name, files in about.files.items() if files is not None},
        **({"reward_data_files": about.data} if about.data is not None else {}),
        **({"companion_files": dict(sorted(about.companions.items()))} if about.companions else {}),
        **({"hub_commits": dict(sorted(about.commits.items()))} if about.commits else {}),
        **redacted_values({**_about_models(config), **_of_host(host)}, put=""),
        "environment": _environment(config, about.distributions),
        "uncovered": redacted_values(about.uncovered),
    }


def of_run(
    config: RunConfig,
    host: Mapping[str, Any],
    *,
    until: Sequence[str] = (),
    loaded: Sequence[str] = (),
    **others: Any,
) -> dict[str, Any]:
    """Models, strategy and sampling of a whole run; ``others`` = what else decides its answers (a prompt template)."""
    arguments = {name: getattr(config, name) for name in names(Decides.ANSWERS)}
    if not config.rejects:
        arguments["alpha"] = None  # never used
    if config.n is None and config.kv_budget_tokens is None:
        arguments["n"] = DEFAULT_N  # left out or written out, it is the same run
    return {**of_models(config, host, loaded=loaded), **arguments, "until": list(until), **plain(others)}


def from_first_rank(compute: Callable[[], dict[str, Any]], *, rank: int, world_size: int) -> dict[str, Any]:
    """Computed by rank 0 (files are read in full) and sent to the others; every rank must call it.

    Raises:
        Exception: on every rank, what ``compute`` raised on the first.
    """
    if world_size < 2:
        return compute()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = compute()
        except Exception as error:  # the others wait for an answer
            found[1] = error
    result, failure = broadcast_object_list(found, from_process=0)
    if failure is not None:
        raise failure
    return dict(result)


def is_demo(fingerprint: Mapping[str, Any]) -> bool:
    """Whether the embedded language model or the embedded reward model had a part in it."""
    return EMBEDDED in (fingerprint.get("pretrained"), fingerprint.get("reward_model"))


def _reward_name(config: RunConfig) -> str:
    if config.reward_model is not None:
        return config.reward_model
    return EMBEDDED if config.pretrained is None else "likelihood"


def _about_models(config: RunConfig) -> dict[str, Any]:
    of_file = names(template)
    found = {name: getattr(config, name) for name in names(Decides.MODELS, without=("pretrained", "reward_model"))}
    if config.attention_backend in (AUTO_BACKEND, SDPA):  # what earlier records have; auto's choice is environment
        del found["attention_backend"]
    found["engine"] = AUTO_ENGINE if engine_of(config.engine) == engine_of(AUTO_ENGINE) else config.engine
    return {name: text_or_digest(value) if value and name in of_file else value for name, value in found.items()}


def _of_host(host: Mapping[str, Any]) -> dict[str, Any]:
    """The host's arguments that decide, in one spelling: JSON text as what it says, defaults as if left out."""
    found = {}
    for name, value in sorted(host.items()):
        if name in PLACEMENT or name in NEUTRAL:
            continue
        if name in names(as_dict, among=HOST) and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                pass  # refused, with words, where it is used
        if value is not None and value != HOST_DEFAULTS.get(name):
            found[name] = plain(value)
    return found


def _environment(config: RunConfig, distributions: Iterable[str]) -> dict[str, Any]:
    """Versions and hardware; torch is asked for the device only where it is loaded anyway."""
    found = {name: version_of(name) for name in sorted({*_VERSIONS, *distributions})}
    device = config.device or "cpu"
    if VLLM in (config.engine, config.reward_engine):
        found["vllm"] = vllm_adapter.version()
    torch = sys.modules.get("torch")
    if torch is not None and (config.device is None or config.device.startswith("cuda")) and torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    return {
        **found,
        "python": sys.version.partition(" ")[0],
        "device": device,
        "attn_implementation": config.attn_implementation,
    }


def version_of(distribution: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
