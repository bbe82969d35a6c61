"""Which source files a ``pkg.module:function`` is made of, found without running any of them.

From its module on, imports are followed (those inside functions too) as long as they lead to code of the same
distribution, or to code of no distribution at all: files beside it, the working directory, ``PYTHONPATH``. Other
distributions are told by their versions; the standard library by Python's. What a module imports by a name made at run
time, files that it opens and what it reads from a network cannot be followed: they are named instead.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_NETWORK = {
    *("aiohttp", "anthropic", "ftplib", "google", "grpc", "http", "httpx", "huggingface_hub", "openai", "pycurl"),
    *("requests", "socket", "telnetlib", "urllib", "urllib3", "websocket", "websockets"),
}
_NOT_NETWORK = {"urllib.parse", "http.HTTPStatus"}
_READS = {
    "open",
    "read_text",
    "read_bytes",
    "from_pretrained",
    "pipeline",
    "load_dataset",
    "import_module",
    "__import__",
}
"""Calls that take in what is no source: files, checkpoints, modules by a name made at run time."""
_OURS = "specrej_eval"


@dataclass(slots=True)
class Sources:
    """What is known of a function."""

    files: dict[str, Path] = field(default_factory=dict)
    """``pkg/module.py``, as it is imported -> where it lies."""
    distributions: set[str] = field(default_factory=set)
    """Those whose code it imports."""
    uncovered: list[str] = field(default_factory=list)
    """What may change its answers and is not seen here."""


def of_callable(name: str) -> Sources:
    """The sources of ``pkg.module:function`` (or ``pkg.module:Class.method``); empty if there is no such module."""
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    found = Sources()
    home = _distribution(top)
    pending, seen = [module], set[str]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        package, _, _ = current.rpartition(".")
        if package:
            pending.append(package)  # importing a module runs its packages
        root = current.partition(".")[0]
        if root in sys.stdlib_module_names or root == _OURS:
            continue
        distribution = _distribution(root)
        if distribution is not None and distribution != home and root != top:
            found.distributions.add(distribution)
            continue
        spec = _find(current)
        if spec is None:
            if current == module:
                found.uncovered.append(f"the source of {module}, which is no file")
            continue
        if not spec.origin or not Path(spec.origin).is_file():
            continue  # a namespace package
        path = Path(spec.origin)
        shown = current.replace(".", "/")
        is_package = path.name.startswith("__init__.")
        found.files[f"{shown}/{path.name}" if is_package else f"{shown}{path.suffix}"] = path
        if path.suffix == ".py":
            pending += _follow(path, current if is_package else package, found)
    found.files = dict(sorted(found.files.items()))
    found.uncovered = sorted(set(found.uncovered))
    return found


def _follow(path: Path, package: str, found: Sources) -> Iterator[str]:
    """Names that may be modules it imports; what it does that cannot be followed is noted."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)] if origin else []
        elif isinstance(node, ast.Call):
            called = node.func
            word = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            if word in _READS:
                found.uncovered.append(f"what {path.name} reads with {word}()")
        for name in names:
            network = name.partition(".")[0] in _NETWORK
            if network and not any(f"{name}.".startswith(f"{harmless}.") for harmless in _NOT_NETWORK):
                root = name.partition(".")[0]
                if name != root or not isinstance(node, ast.ImportFrom):
                    found.uncovered.append(f"what {path.name} reads from the network (it imports {root})")
            yield name


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module lies. Unlike ``importlib.util.find_spec`` this imports no package on the way."""
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        # console scripts lack the working directory, from where a reward may be imported all the same
        spec = importlib.machinery.PathFinder.find_spec(parts[0], [os.getcwd()])
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        places = list(spec.submodule_search_locations)
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), places)
    return spec


def _distribution(top: str) -> str | None:
    """The installed distribution that a top-level module belongs to; None for code that lies about."""
    names = _distributions().get(top)
    return sorted(names)[0] if names else None


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()
