"""Speculative Rejection and Best-of-N inside the benchmarks you already run.

Importing this package imports no torch; names are loaded on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specrej_eval.api import load
    from specrej_eval.core import GenerationResult, Ledger, Round, Trajectory
    from specrej_eval.errors import SpecRejError
    from specrej_eval.generator import Generator
    from specrej_eval.harness.startup import activate

_HOME = {
    "GenerationResult": "specrej_eval.core",
    "Generator": "specrej_eval.generator",
    "Ledger": "specrej_eval.core",
    "Round": "specrej_eval.core",
    "SpecRejError": "specrej_eval.errors",
    "Trajectory": "specrej_eval.core",
    "activate": "specrej_eval.harness.startup",
    "load": "specrej_eval.api",
}

__all__ = [
    "GenerationResult",
    "Generator",
    "Ledger",
    "Round",
    "SpecRejError",
    "Trajectory",
    "__version__",
    "activate",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
