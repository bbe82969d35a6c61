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

PACKAGE = Path(__file__).parent.parent / "specrej_eval"
HEAVY = {"alpaca_eval", "lm_eval", "matplotlib", "torch", "transformers"}
HARNESSES = {"alpaca_eval", "lm_eval"}

# A room is a folder of the package, or one of these groups of files beside each other.
FILES = {
    "budget": "core",
    "checked": "core",
    "checkpoint": "core",
    "config": "core",
    "callable_sources": "core",
    "companions": "core",
    "core": "core",
    "digests": "core",
    "errors": "core",
    "fingerprint": "core",
    "names": "core",
    "paths": "core",
    "registry": "core",
    "reward_names": "core",
    "special_tokens": "core",
    "stopping": "core",
    "journal": "record",
    "jsonl": "record",
    "outputs": "record",
    "prompt_files": "record",
    "ranks": "record",
    "trace": "record",
    "answering": "generator",
    "generator": "generator",
    "progress": "generator",
    "scheduler": "generator",
    "__init__": "front",
    "__main__": "front",
    "api": "front",
    "init": "front",
    "policy_doctor": "front",
    "reward_doctor": "front",
    "reward_list": "front",
    "reward_options": "front",
    "reward_probes": "front",
    "run": "front",
    "score": "front",
    "cli": "front",
    "doctor": "front",
}
# room -> rooms it may import, in functions too. The front may import everything, but heavy things only in functions.
MAY_IMPORT = {
    "core": {"core"},
    "record": {"core", "record"},
    # The engine and the reward models keep KV behind a shared prefix in the same way, and never import each other.
    "kv": {"core", "kv"},
    "engine": {"core", "kv", "engine"},
    "rewards": {"core", "kv", "rewards"},
    "strategies": {"core", "strategies"},
    "generator": {"core", "record", "generator"},
    "harness": {"core", "record", "generator", "harness", "demo", "front"},
    "report": {"core", "record", "report"},
    "demo": {"core", "demo"},
    "front": {*FILES.values(), "kv", "engine", "rewards", "strategies", "harness", "report", "demo"},
}
# The loop and the adapters talk to the other rooms through their protocols only.
PROTOCOLS = {"specrej_eval.engine.base", "specrej_eval.rewards.base", "specrej_eval.strategies.base"}
# lm-eval's HFLM has loaded the language model already, so its adapter puts the parts together itself, in a function.
PUTS_TOGETHER = {"harness.alpaca_eval_judge", "harness.lm_eval_model"}
PARTS = {
    "specrej_eval.engine.loading",
    "specrej_eval.engine.transformers_engine",
    "specrej_eval.rewards.base",
    "specrej_eval.rewards.callable_reward",
}
HEAVY_ROOMS = {"kv", "engine", "rewards", "harness", "demo"}
LIGHT_FILES_IN_HEAVY_ROOMS = {
    "demo",
    "harness",
    "harness.alpaca_eval_cache",
    "harness.alpaca_eval_cli",
    "harness.alpaca_eval_configs",
    "harness.alpaca_eval_data",
    "harness.alpaca_eval_judge",
    "harness.alpaca_eval_leaderboard",
    "harness.alpaca_eval_prompts",
    "harness.alpaca_eval_repairs",
    "harness.alpaca_eval_runs",
    "harness.alpaca_eval_swap",
    "harness.alpaca_eval_winrate",
    "harness.lm_eval_cli",
    "harness.lm_eval_run",
    "harness.patching",
    "harness.startup_hooks",
}


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
    if (PACKAGE / first).is_dir():
        return first
    assert first in FILES, f"specrej_eval/{first}.py is in no room: add it to FILES in {Path(__file__).name}"
    return FILES[first]


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
    return room(module) not in HEAVY_ROOMS or module in LIGHT_FILES_IN_HEAVY_ROOMS


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_the_rooms_it_may(module: str) -> None:
    allowed = MAY_IMPORT[room(module)]
    wrong = []
    for found in imports(module):
        target = ours(found)
        if target is None or room(target) in allowed:
            continue
        if room(module) in {"generator", "harness"} and found.name in PROTOCOLS:
            continue
        if module in PUTS_TOGETHER and found.name in PARTS and (found.lazy or found.typing):
            continue
        wrong.append(f"line {found.line}: {found.name} is in {room(target)!r}; may import {sorted(allowed)}")
    assert not wrong, f"{MODULES[module].relative_to(PACKAGE.parent)}: " + "; ".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_belong(module: str) -> None:
    wrong = []
    for found in imports(module):
        top = found.name.partition(".")[0]
        if found.typing or top not in HEAVY:
            continue
        if top in HARNESSES and room(module) != "harness":
            wrong.append(f"line {found.line}: only harness/ knows {top}")
        elif not found.lazy and is_light(module):
            wrong.append(f"line {found.line}: import {top} inside the function that needs it")
    assert not wrong, f"{MODULES[module].relative_to(PACKAGE.parent)}: " + "; ".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {ours(found) for found in imports(module) if not (found.lazy or found.typing)} - {None, module, ""}
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
