"""Name -> module: the directory listing is the registry, and a module is imported on use.

A reward family, a strategy or an attention backend is one file; its file name is its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from specrej_eval.errors import ConfigError, suggest

_NOT_ENTRIES = {"base"}


@cache
def names(package: str) -> tuple[str, ...]:
    """The entries of a package (``"specrej_eval.strategies"``), sorted; imports none of them."""
    path = importlib.import_module(package).__path__
    found = (info.name for info in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in found if name not in _NOT_ENTRIES and not name.startswith("_")))


def load_module(package: str, name: str, *, argument: str) -> ModuleType:
    """Import the entry ``name`` of ``package``.

    Raises:
        ConfigError: the package has no such entry; names the nearest one and lists all.
    """
    if name not in names(package):
        raise ConfigError(f"unknown {argument} {name!r}.", hint=suggest(name, names(package)))
    return importlib.import_module(f"{package}.{name}")
