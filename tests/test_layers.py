"""The import rules of the package, read from its source: who imports whom, and where heavy packages are imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT

PACKAGE = ROOT / "specrej_eval"
HEAVY = {"alpaca_eval", "lm_eval", "torch", "transformers"}
HARNESSES = {"alpaca_eval", "lm_eval"}

# From the ground up. A room is a folder of the package or a file beside the folders; it may import those of the lines
# above its own, and those of its own line only where SIDE_BY_SIDE says so.
LAYERS = (
    {"redaction"},
    {"errors", "checked", "wording"},
    {"yaml_files", "connections"},
    {"paths", "registry", "core", "stopping", "chat_templates", "http"},
    {"checkpoint", "companions", "temporary", "config", "special_tokens", "ranks"},
    {"budget", "auditing", "vllm_adapter"},
    {"kv", "strategies", "records", "demo"},
    {"engines", "rewards"},  # never each other
    {"scheduler", "progress", "forecast", "overlap"},
    {"in_flight"},
    {"generator"},
    {"api", "answering", "options", "evidence"},
    {"harness"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
)
SIDE_BY_SIDE = {
    ("errors", "wording"),
    ("companions", "checkpoint"),
    ("config", "checkpoint"),
    ("special_tokens", "config"),
    ("harness", "commands"),
}
# What is below the loop is known above it by its protocols only; putting the parts together is done inside functions.
PROTOCOLS = {"specrej_eval.engines.base", "specrej_eval.rewards.base", "specrej_eval.strategies.base"}
ABOVE_THE_LOOP = {"scheduler", "progress", "overlap", "in_flight", "generator", "answering", "harness", "commands"}
# The engine and the reward models keep KV behind a shared prefix in the same way: kv. These rooms own tensors.
HEAVY_ROOMS = {"kv", "engines", "rewards", "harness"}
TORCH_FREE = "# torch-free"
"""First line of a file in a heavy room that imports nothing heavy at its top."""


class Import(NamedTuple):
    name: str  # absolute
    line: int
    lazy: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING:`


def modules() -> dict[str, Path]:
    """Dotted name below the package ("" for its __init__) -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    first = module.partition(".")[0] or "__init__"
    known = any(first in layer for layer in LAYERS)
    assert known, f"specrej_eval/{first} has no place yet: add it to LAYERS in {Path(__file__).name}"
    return first


def floor(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if room(module) in layer)


def imports(module: str) -> list[Import]:
    path = MODULES[module]
    package = ["specrej_eval", *module.split(".")] if module else ["specrej_eval"]
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy, typing)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                origin = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    if (origin, alias.name) == ("specrej_eval", "__version__"):
                        continue  # a string, whose home no room depends on
                    below = f"{origin}.{alias.name}".removeprefix("specrej_eval.")
                    yield Import(f"specrej_eval.{below}" if below in MODULES else origin, child.lineno, lazy, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy or function, typing or guard)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), lazy=False, typing=False))


def ours(found: Import) -> str | None:
    """The imported module of ours, below the package."""
    if found.name == "specrej_eval":
        return ""
    return found.name.removeprefix("specrej_eval.") if found.name.startswith("specrej_eval.") else None


def is_light(module: str) -> bool:
    if room(module) not in HEAVY_ROOMS:
        return True
    with MODULES[module].open(encoding="utf-8") as lines:
        return next(lines, TORCH_FREE).startswith(TORCH_FREE) or MODULES[module].name == "__init__.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    wrong = []
    for found in imports(module):
        target = ours(found)
        if target is None or room(target) == room(module) or floor(target) < floor(module):
            continue
        if (room(module), room(target)) in SIDE_BY_SIDE:
            continue
        wrong.append(f"line {found.line}: {found.name} lies in {room(target)!r}, which is not below {room(module)!r}")
    assert not wrong, f"{MODULES[module].relative_to(PACKAGE.parent)}: " + "; ".join(wrong)


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in ABOVE_THE_LOOP])
def test_engines_rewards_and_strategies_are_known_by_their_protocols(module: str) -> None:
    wrong = []
    for found in imports(module):
        target = ours(found)
        below = target is not None and room(target) in {"engines", "rewards", "strategies"}
        if below and found.name not in PROTOCOLS and not (found.lazy or found.typing):
            wrong.append(f"line {found.line}: import {found.name} inside the function that puts the parts together")
    assert not wrong, f"{MODULES[module].relative_to(PACKAGE.parent)}: " + "; ".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_belong(module: str) -> None:
    wrong = []
    for found in imports(module):
        top = found.name.partition(".")[0]
        if found.typing or top not in HEAVY:
            continue
        if top in HARNESSES and room(module) != "harness" and not (module == f"commands.{top}" and found.lazy):
            wrong.append(f"line {found.line}: only harness/ knows {top}")
        elif not found.lazy and is_light(module):
            wrong.append(f"line {found.line}: import {top} inside the function that needs it")
    assert not wrong, f"{MODULES[module].relative_to(PACKAGE.parent)}: " + "; ".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {ours(found) for found in imports(module) if not found.typing} - {None, module, ""}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_importing_the_light_modules_imports_nothing_heavy() -> None:
    names = [f"specrej_eval.{module}".rstrip(".") for module in MODULES if is_light(module)]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imported {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
