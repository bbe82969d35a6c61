"""Which attention backend a run uses, and which ones are known to be right on this machine.

``attention_backend=auto`` takes nothing on trust: on a GPU it uses a backend only where `specrej-eval doctor
--attention` has found it right, on this device and with these versions; the C++ kernel of a CPU runs the same contract
when it is first used. What is found is kept in a small file, of which nothing but speed depends: without it, or with
one that cannot be read, a GPU's attention is computed by ``sdpa``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from specrej_eval import __version__, paths, registry, temporary
from specrej_eval.checked import object_in
from specrej_eval.config.engines import AUTO_BACKEND, CPP, SDPA
from specrej_eval.errors import ConfigError, MissingDependencyError
from specrej_eval.kv import contract
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.graphs import RecordedAttention
from specrej_eval.kv.memory import clear_error, twice

logger = logging.getLogger(__name__)

_PACKAGE = "specrej_eval.kv.attention"
_said: set[str] = set()


def build(name: str) -> AttentionBackend:
    """A backend with ``sdpa`` behind it.

    Raises:
        ConfigError: there is no such backend.
    """
    sdpa: AttentionBackend = registry.load_module(_PACKAGE, SDPA, argument="attention_backend").Backend()
    if name == SDPA:
        return sdpa
    made: AttentionBackend = registry.load_module(_PACKAGE, name, argument="attention_backend").Backend(sdpa)
    return made


def all_backends() -> list[AttentionBackend]:
    """Each one there is, whether or not it can be used here; those that ``auto`` prefers first."""
    return sorted(map(build, registry.names(_PACKAGE)), key=lambda backend: -backend.preference)


def graphs() -> RecordedAttention:
    """What CUDA graphs of decode steps attend with: it is found right on a device as a backend is, and kept as one."""
    return RecordedAttention(build(SDPA))


def replays(attention: AttentionBackend, device: str, compiled: str = "auto") -> bool:
    """Whether decode steps with this backend are replayed as CUDA graphs: under ``compile=auto`` where `specrej-eval
    doctor --attention` found them right on the device. Says once where ``compile=on`` asks for what was never tried."""
    place = torch.device(device)
    if place.type not in RecordedAttention.devices or attention.name != SDPA or compiled == "off":
        return False
    verified = is_verified(graphs(), place)
    if compiled == "on" and not verified and graphs().name not in _said:
        _said.add(graphs().name)
        logger.warning(
            "compile=on: CUDA graphs were never found right on this device (%s) with these versions; "
            "`specrej-eval doctor --attention` finds out in a minute or two.",
            device_name(place),
        )
    return verified or compiled == "on"


def resolve(asked: str, device: str, compiled: str = "auto") -> AttentionBackend:
    """The backend for a value of ``attention_backend``, before a weight is loaded.

    Says once where one that is asked for was never found right on this device.

    Args:
        compiled: ``compile``: whether C++ kernels may, must or must not be compiled for a CPU, and decode steps be
            replayed as CUDA graphs. Where they are, ``auto`` is ``sdpa``, whose attention they know.

    Raises:
        MissingDependencyError: its package, or a compiler, is not installed or fails.
        ConfigError: it does not run on the device, is not allowed to be compiled, or not what must be.
        OutOfMemoryError: no memory to try C++ kernels out.
    """
    place = torch.device(device)
    graphed = place.type in RecordedAttention.devices
    if compiled == "on" and not graphed and (reason := build(CPP).why_not_on(place)):
        raise MissingDependencyError(
            f"compile=on: C++ kernels cannot be had: {reason}.",
            hint=f"install with: {build(CPP).install}" if place.type == "cpu" else "compile=auto fits every device.",
        )
    if asked == AUTO_BACKEND and replays(build(SDPA), device, compiled):
        return build(SDPA)
    if asked == AUTO_BACKEND:
        able = (each for each in all_backends() if each.name != CPP or compiled != "off")
        return next((backend for backend in able if _trusted(backend, place)), build(SDPA))
    if asked == CPP and compiled == "off":
        raise ConfigError(f"attention_backend={CPP} needs kernels that compile=off forbids.", hint="leave one out.")
    if asked == SDPA and compiled == "on" and place.type == "cpu":
        raise ConfigError(
            f"compile=on: the C++ kernels of a CPU compute attention too, and attention_backend={SDPA} forbids that.",
            hint="leave one of the two out.",
        )
    backend = build(asked)
    if compiled == "on" and graphed and asked != SDPA:
        raise ConfigError(
            f"compile=on: CUDA graphs are made with the attention of {SDPA}, not of {asked}.", hint="leave one out."
        )
    if reason := backend.why_not_on(place):
        if backend.missing() and place.type in backend.devices:
            raise MissingDependencyError(
                f"attention_backend={asked}: {reason}.", hint=f"install with: {backend.install}"
            )
        raise ConfigError(f"attention_backend={asked}: {reason}.", hint="attention_backend=auto fits every device.")
    if asked != SDPA and not _verified(backend, place) and asked not in _said:
        _said.add(asked)
        logger.warning(
            "attention_backend=%s was never found right on this device (%s) with these versions; "
            "`specrej-eval doctor --attention` finds out in a minute or two.",
            asked,
            device_name(place),
        )
    return backend


def of_rewards(device: torch.device, compiled: str) -> AttentionBackend:
    """The backend of a reward model. On a GPU it is ``sdpa``: others have no kernel for rows of unequal lengths."""
    return resolve(AUTO_BACKEND, "cpu", compiled) if device.type == "cpu" else build(SDPA)


def _trusted(backend: AttentionBackend, device: torch.device) -> bool:
    if backend.name == SDPA or device.type not in backend.devices:
        return False
    return backend.why_not_on(device) is None and _verified(backend, device)


def _verified(backend: AttentionBackend, device: torch.device) -> bool:
    """``is_verified``; where that is not known and takes less than a second, it is found out."""
    if is_verified(backend, device) or device.type != "cpu" or backend.name != CPP:
        return is_verified(backend, device)

    def first_wrong() -> contract.Outcome | None:
        outcomes = contract.check(backend, device, dtypes=backend.dtypes)
        return next((found for found in outcomes if not found.kept), None)

    with clear_error(f"attention_backend={backend.name} was tried out", "compile=off takes no C++ kernels."):
        wrong = twice(first_wrong)
    if wrong is not None:
        logger.warning("attention_backend=%s is wrong on this machine and is not used: %s", backend.name, wrong)
        return False
    with contextlib.suppress(OSError):  # then it is tried again next time
        record(backend, device, right=True)
    return True


# what doctor found


def device_name(device: torch.device) -> str:
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


def stamp(backend: AttentionBackend, device: torch.device) -> dict[str, str]:
    """What a backend was found right with; of another device or version nothing is known."""
    found = {"backend": backend.name, "device": device_name(device)}
    versions = {"specrej_eval": __version__, "torch": torch.__version__}
    if backend.distribution is not None:
        versions[backend.distribution] = _version_of(backend.distribution)
    if (built := backend.built()) is not None:
        versions["built"] = built
    return {**found, **versions}


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def store() -> Path:
    """Where it is kept what doctor found."""
    return paths.cache("attention.json")


def _entries() -> list[dict[str, Any]]:
    found = object_in(store()).get("verified")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def is_verified(backend: AttentionBackend, device: torch.device) -> bool:
    """Whether `doctor --attention` found a backend right on this device, with these versions."""
    wanted = stamp(backend, device)
    return any(entry.get("stamp") == wanted for entry in _entries())


def record(backend: AttentionBackend, device: torch.device, *, right: bool, **others: Any) -> None:
    """Keep what was found; where that is not right, forget that it once was.

    Raises:
        OSError: the file cannot be written.
    """
    wanted = stamp(backend, device)
    entries = [entry for entry in _entries() if entry.get("stamp") != wanted]
    if right:
        entries.append({"stamp": wanted, **others})
    file = store()
    file.parent.mkdir(parents=True, exist_ok=True)
    written = temporary.partial(file)
    written.write_text(json.dumps({"verified": entries}, indent=2), encoding="utf-8")
    os.replace(written, file)  # another process reads the old file or the new one
