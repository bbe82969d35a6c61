# torch-free
"""``alpaca_eval.utils`` imports pkg_resources, which setuptools 82 removed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def stand_in_for_pkg_resources(utils: ModuleType) -> Callable[[], None] | None:
    """``alpaca_eval.utils`` imports pkg_resources, which setuptools 82 removed. It gets a stand-in, and nobody else."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        return None
    # what utils imports besides: some packages try pkg_resources themselves, and must not meet the stand-in
    for name in ("datasets", "pandas", "tqdm", "yaml"):
        importlib.import_module(name)
    from packaging.version import parse

    stand_in = ModuleType("pkg_resources")
    stand_in.__dict__["get_distribution"] = importlib.metadata.distribution  # its .version is all that is asked for
    stand_in.__dict__["parse_version"] = parse
    sys.modules["pkg_resources"] = stand_in
    return lambda: _take_away("pkg_resources", stand_in)


def _take_away(name: str, module: ModuleType) -> None:
    if sys.modules.get(name) is module:
        del sys.modules[name]


BEFORE = {"alpaca_eval.utils": (stand_in_for_pkg_resources,)}
