"""`specrej-eval doctor --attention`: which attention backends compute the right thing on this machine.

Every backend that can be used runs the contract of ``specrej_eval.kv.contract`` on the device. What is found right is
kept, and ``attention_backend=auto`` uses nothing else on a GPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specrej_eval.commands.doctor.findings import Finding, Status, show
from specrej_eval.config.engines import AUTO_BACKEND

if TYPE_CHECKING:
    import torch

    from specrej_eval.kv.attention.base import AttentionBackend
    from specrej_eval.kv.contract import Outcome

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attention",
        action="store_true",
        default=argparse.SUPPRESS,
        help="try every attention backend on the device; attention_backend=auto then uses the best that is right",
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of one backend."""

    backend: str
    stamp: dict[str, str]
    why_not: str | None = None
    """Why nothing was tried; None if it was."""
    outcomes: Sequence[Outcome] = field(default=(), repr=False)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """It computed something, and nothing wrong."""
        return any(one.left_to is None for one in self.outcomes) and all(one.kept for one in self.outcomes)

    @property
    def largest(self) -> dict[str, float]:
        """Largest error by dtype, of what the backend computed itself."""
        found: dict[str, float] = defaultdict(float)
        for one in self.outcomes:
            if one.left_to is None:
                name = str(one.dtype).removeprefix("torch.")
                found[name] = max(found[name], one.error)
        return dict(found)

    @property
    def left(self) -> dict[str, int]:
        """Why cases were left to ``sdpa``, and how many."""
        found: dict[str, int] = defaultdict(int)
        for one in self.outcomes:
            if one.left_to is not None:
                found[one.left_to] += 1
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "backend": self.backend,
            "stamp": self.stamp,
            "why_not": self.why_not,
            "right": self.right,
            "cases": len(self.outcomes),
            "seconds": round(self.seconds, 2),
            "largest_error": {name: _plain(error) for name, error in self.largest.items()},
            "left_to_sdpa": self.left,
            "waits_for_the_device": any(one.waits for one in self.outcomes),
            "wrong": [
                {
                    "case": one.case.name,
                    "dtype": str(one.dtype).removeprefix("torch."),
                    "error": _plain(one.error),
                    "failure": one.failure,
                }
                for one in self.outcomes
                if not one.kept
            ],
        }


def run(args: argparse.Namespace) -> int:
    """Carry out the command; 0 if every backend that can be used is right, else 1.

    Raises:
        ConfigError: a device that is not there.
    """
    import torch

    from specrej_eval import checkpoint
    from specrej_eval.kv.choose import device_name

    device = torch.device(checkpoint.device_of(vars(args).get("device")))
    title = f"Attention backends on {device_name(device)}, torch {torch.__version__}"
    return show([(title, _findings(device))], well="Every attention backend that can be used here is right.")


def examine(device: torch.device) -> Iterator[Report]:
    """Try every backend, and keep what is right; ``sdpa`` last, and attention that is replayed as CUDA graphs."""
    from specrej_eval.kv import choose

    for backend in (*choose.all_backends(), choose.graphs()):
        stamp = choose.stamp(backend, device)
        if reason := backend.why_not_on(device):
            yield Report(backend.name, stamp, reason)
            continue
        report = _tried(backend, device, stamp)
        try:
            choose.record(backend, device, right=report.right, largest_error=report.to_dict()["largest_error"])
        except OSError as error:
            logger.warning("What was found of %s cannot be kept: %s", backend.name, error)
        yield report


def _tried(backend: AttentionBackend, device: torch.device, stamp: dict[str, str]) -> Report:
    from specrej_eval.kv import contract
    from specrej_eval.kv.memory import clear_error, twice

    started = time.perf_counter()
    with clear_error(
        f"attention_backend={backend.name} was tried out", "end what else uses the device, and try again."
    ):
        outcomes = twice(lambda: tuple(contract.check(backend, device)))
    return Report(backend.name, stamp, outcomes=outcomes, seconds=time.perf_counter() - started)


def _findings(device: torch.device) -> Iterator[Finding]:
    from specrej_eval.kv import choose

    for report in examine(device):
        yield from _told(report)
    chosen = choose.resolve(AUTO_BACKEND, str(device))
    replayed = ", replayed as CUDA graphs" if choose.replays(chosen, str(device)) else ""
    yield Finding("ok", "attention_backend", f"auto is {chosen.name}{replayed} here; kept in {choose.store()}")


def _told(report: Report) -> Iterator[Finding]:
    if report.why_not is not None:
        yield Finding("note", report.backend, f"not tried: {report.why_not}")
        return
    mine = sum(one.left_to is None for one in report.outcomes)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in report.largest.items())
    status: Status = "ok" if report.right else "broken"
    detail = f"{mine} cases in {report.seconds:.0f} s; largest error of the largest value: {errors}"
    yield Finding(status, report.backend, detail)
    for reason, number in report.left.items():
        yield Finding("note", "", f"{number} cases are left to sdpa: {reason}")
    if any(one.waits for one in report.outcomes):
        yield Finding("note", "", "the host waits for the device in every step")
    wrong = [one for one in report.outcomes if not one.kept]
    for one in wrong[:5]:
        told = one.failure or f"off by {one.error:.1e}"
        yield Finding("broken", "", f"{one.case.name}, {str(one.dtype).removeprefix('torch.')}: {told}")
    if len(wrong) > 5:
        yield Finding("note", "", f"and {len(wrong) - 5} more cases that are wrong")


def _plain(error: float) -> float | None:
    """For JSON, which has no infinity."""
    return error if math.isfinite(error) else None
