"""Which source files a ``pkg.module:function`` is made of, found without running any of them.

From its module on, imports are followed (those inside functions too) as long as they lead to code of the same
distribution, or to code of no distribution at all: files beside it, the working directory, ``PYTHONPATH``. Other
distributions are told by their versions; the standard library by Python's. Where the code reads files, those of the
function's own package that are no Python belong to it too, unless they are too many or the code writes files as well (a
log or a cache would be another reward after every call). What a module imports by a name made at run time, other files
that it opens and what it reads from a network cannot be followed: they are named instead.
"""

from __future__ import annotations

import ast
import fnmatch
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
_LOADS = {
    *("fromfile", "genfromtxt", "get_data", "load", "load_file", "load_model", "loadtxt", "memmap", "safe_open"),
    *("read_csv", "read_excel", "read_json", "read_parquet", "read_pickle", "read_table"),
    *("__file__", "__path__", "resources"),
}
"""Beside ``_READS``: words of code that takes in files of its package."""
_WRITES = {
    *("FileHandler", "RotatingFileHandler", "connect", "dump", "mkdir", "save", "save_file", "save_pretrained"),
    *("savetxt", "savez", "savez_compressed", "to_csv", "to_json", "to_parquet", "to_pickle", "tofile"),
    *("write_bytes", "write_text"),
}
"""Calls of code that leaves files behind."""
_OURS = "specrej_eval"

DATA_BYTES = 64 << 20
"""Most bytes of a package's data files, all together, that are held to account."""
DATA_FILES = 2_000
"""Most of them."""
_NO_DATA_IN = (
    *("__pycache__", ".*", "*cache*", "site-packages", "node_modules", "checkpoint-*", "global_step*"),
    *("logs", "outputs", "results", "runs", "wandb", "mlruns"),
)
_NO_DATA = (
    *(".*", "*.py", "*.py[cod]", "*.log", "*.lock", "*.tmp", "*.bak", "*~"),
    *("*cache*", "events.out.*", "model_outputs.json", "results_*", "samples_*", "specrej_*"),
)
"""Folders and files that caches, editors and runs leave behind."""


@dataclass(slots=True)
class Sources:
    """What is known of a function."""

    files: dict[str, Path] = field(default_factory=dict)
    """``pkg/module.py``, as it is imported -> where it lies."""
    data: dict[str, Path] = field(default_factory=dict)
    """``pkg/words.txt`` -> where it lies: files of its own package that are no Python, if the code reads any."""
    distributions: set[str] = field(default_factory=set)
    """Those whose code it imports."""
    uncovered: list[str] = field(default_factory=list)
    """What may change its answers and is not seen here."""
    reads: bool = False
    """Whether the code reads files that may lie in its package."""
    writes: bool = False
    """Whether the code writes files."""


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
    if found.reads and top not in sys.stdlib_module_names and top != _OURS:
        _add_data(module, found)
    found.uncovered = sorted(set(found.uncovered))
    return found


def _add_data(module: str, found: Sources) -> None:
    """The data files of the outermost package, or of the outermost within it that does not hold too much."""
    outermost = None
    for depth in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:depth])
        spec = _find(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # a module, which has no files of its own
        outermost = outermost or package
        data = _data_files(package, [Path(folder) for folder in spec.submodule_search_locations])
        if data is None:
            continue
        if package != outermost:
            found.uncovered.append(f"the files of {outermost} outside {package} that are no code: they are too many")
        if data and found.writes:
            found.uncovered.append(f"the files of {package} that are no code, since its code writes files too")
        else:
            found.data = data
        return
    if outermost is not None:
        found.uncovered.append(f"the files of {outermost} that are no code: they are too many")


def _data_files(package: str, folders: list[Path]) -> dict[str, Path] | None:
    """Files that are neither Python nor left behind by caches and runs, by their names below the package, sorted; None
    if there are more than DATA_FILES of them, or more than DATA_BYTES in them."""
    data: dict[str, Path] = {}
    size = 0
    for root in folders:
        for place, inner, files in os.walk(root):
            if "specrej_run.json" in files:  # a run's folder
                inner.clear()
                continue
            inner[:] = sorted(name for name in inner if not _is_like(name, _NO_DATA_IN))
            for name in sorted(files):
                path = Path(place) / name
                if _is_like(name, _NO_DATA) or not path.is_file():
                    continue
                size += path.stat().st_size
                if size > DATA_BYTES or len(data) >= DATA_FILES:
                    return None
                data[f"{package.replace('.', '/')}/{path.relative_to(root).as_posix()}"] = path
    return dict(sorted(data.items()))


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
            if word == "open" and _writes(node):
                found.writes = True
            elif word in _READS:
                found.uncovered.append(f"what {path.name} reads with {word}()")
            found.reads |= word in _READS or word in _LOADS
            found.writes |= word in _WRITES
        elif isinstance(node, (ast.Name, ast.Attribute)):
            found.reads |= (node.id if isinstance(node, ast.Name) else node.attr) in _LOADS
        for name in names:
            root = name.partition(".")[0]
            harmless = any(f"{name}.".startswith(f"{one}.") for one in _NOT_NETWORK)
            if root in _NETWORK and not harmless and (name != root or not isinstance(node, ast.ImportFrom)):
                found.uncovered.append(f"what {path.name} reads from the network (it imports {root})")
            yield name


def _writes(call: ast.Call) -> bool:
    """Whether an ``open`` has a mode that writes, as far as its text says: ``open(path, "w")``, ``path.open("w")``."""
    first = 0 if isinstance(call.func, ast.Attribute) and len(call.args) == 1 else 1
    given = [*call.args[first : first + 1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)


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
