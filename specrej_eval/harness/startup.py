# torch-free
"""What the startup hook does once a harness has been imported.

The hook itself (autoload/_specrej_eval_autoload.py) only watches imports; the work is here, and this module is imported
only when a watched module is. One function for each entry of its HOOKS and BEFORE tables; each takes the module that
has been, or is about to be, executed. It may raise: the caller turns that into a RuntimeWarning, so that the harness
goes on working without us.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from specrej_eval import registry
from specrej_eval.harness.lm_eval import LM_EVAL_MODELS

Repair = Callable[[ModuleType], Callable[[], None] | None]

# What is done to alpaca_eval: upstream's defects, one file each, then what our own part in it needs. ``registration``
# comes last, since it hands alpaca_eval's functions on as they are by then.
REPAIRS = "specrej_eval.harness.alpaca_eval.repairs"
OURS = tuple(
    f"specrej_eval.harness.alpaca_eval.{name}" for name in ("prompts", "swap", "judge", "runs", "registration")
)
failed_repairs: dict[str, str] = {}
"""Repair -> why it could not be done, for `specrej-eval doctor`."""


def wrap_lm_eval(evaluator: ModuleType) -> None:
    """After `lm_eval.evaluator`: its seed and the user's gen_kwargs can be read while it runs."""
    importlib.import_module("specrej_eval.harness.lm_eval.run").wrap_simple_evaluate(evaluator)


def wrap_lm_eval_command(main: ModuleType) -> None:
    """After `lm_eval.__main__`: our errors, and signals, end in one message."""
    importlib.import_module("specrej_eval.harness.lm_eval.command").wrap_command(main)


def register_lm_eval_models(models: ModuleType) -> None:
    """After `lm_eval.models`: put our names beside the built-in ones.

    Not earlier: `get_model` fills the registry with the built-in models only if it is still empty.
    """
    upstream = importlib.import_module("lm_eval.api.registry")
    if hasattr(upstream, "load_plugins"):  # this lm-eval reads the entry points of pyproject.toml by itself
        return
    for name, target in LM_EVAL_MODELS.items():
        if name not in upstream.model_registry:
            upstream.model_registry.register(name, target=target)


def repair_alpaca_eval(module: ModuleType) -> None:
    """After one of alpaca_eval's modules: what the tables ``AFTER`` say."""
    for repair in repairs("AFTER", module.__name__):
        _attempt(repair, module)


def prepare_alpaca_eval(module: ModuleType) -> Callable[[], None]:
    """Before one of alpaca_eval's modules; what is returned undoes it once the module has been executed."""
    undo = [_attempt(repair, module) for repair in repairs("BEFORE", module.__name__)]

    def clean_up() -> None:
        for step in undo:
            if step is not None:
                step()

    return clean_up


def repairs(table: str, name: str) -> list[Repair]:
    """What the files with such a table want done to alpaca_eval's module ``name``, in order."""
    found: list[Repair] = []
    for home in (*(f"{REPAIRS}.{entry}" for entry in registry.names(REPAIRS)), *OURS):
        try:
            found.extend(getattr(importlib.import_module(home), table, {}).get(name, ()))
        except Exception as error:
            _give_up(name, home, error)
    return found


def _attempt(repair: Repair, module: ModuleType) -> Callable[[], None] | None:
    """One that fails costs a warning, and only itself: alpaca_eval goes on, with its own defects if need be."""
    try:
        return repair(module)
    except Exception as error:
        _give_up(module.__name__, repair.__name__, error)
        return None


def _give_up(name: str, repair: str, error: Exception) -> None:
    failed_repairs[f"{name}: {repair}"] = repr(error)
    autoload_module().warn(f"specrej-eval could not repair {name} ({repair}: {error!r}); run `specrej-eval doctor`")


def activate() -> None:
    """Do by hand what happens at interpreter start.

    For places that read no .pth files (`python -S`, `pip install --target`), and where SPECREJ_EVAL_AUTOLOAD=0
    switched the hook off.
    """
    autoload_module().install(force=True)


def autoload_module() -> ModuleType:
    """_specrej_eval_autoload: beside the package where installed; else in the checkout's autoload/."""
    name = "_specrej_eval_autoload"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        source = Path(__file__).parents[2] / "autoload" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, source)
        if not source.is_file() or spec is None or spec.loader is None:
            raise
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
