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

# The names `lm_eval --model` takes -> "module:class". lm-eval imports the class on first use; the string has to be
# the class's own module and name.
LM_EVAL_MODELS = {
    "specrej": "specrej_eval.harness.lm_eval.model:SpecRejLM",
    "best_of_n": "specrej_eval.harness.lm_eval.model:BestOfNLM",
    "best-of-n": "specrej_eval.harness.lm_eval.model:BestOfNLM",
}

# alpaca_eval's module -> repairs ("module:function" below this package), each called with the executed module. Each
# looks for itself whether this alpaca_eval needs it, and none depends on another one.
ALPACA_EVAL_REPAIRS = {
    "alpaca_eval.constants": ("alpaca_eval.data:serve_datasets_as_json",),
    "alpaca_eval.utils": (
        "alpaca_eval.data:keep_text_text",
        "alpaca_eval.configs:find_configs_outside_the_package",
        "alpaca_eval.prompts:keep_fields_with_prompts",
        "alpaca_eval.leaderboard:print_whole_leaderboard",
        "alpaca_eval.leaderboard:leave_bundled_leaderboards_alone",
    ),
    "alpaca_eval.decoders": ("alpaca_eval.repairs:add_decoders",),
    "alpaca_eval.annotators.base": (
        "alpaca_eval.data:keep_text_text",
        "alpaca_eval.repairs:rebind_decoders",
        "alpaca_eval.configs:find_annotators_outside_the_package",
        "alpaca_eval.cache:cache_in_output_folder",
    ),
    "alpaca_eval.annotators.pairwise_evaluator": (
        "alpaca_eval.swap:add_position_swap",
        "alpaca_eval.judge:note_judges",
    ),
    "alpaca_eval.metrics": ("alpaca_eval.winrate:control_length_where_valid",),
    "alpaca_eval.main": (
        "alpaca_eval.data:keep_text_text",
        "alpaca_eval.runs:announce_runs",
        "alpaca_eval.repairs:guard_generation",
        "alpaca_eval.repairs:print_errors_without_traceback",
        "alpaca_eval.repairs:rebind_commands",
    ),
}
ALPACA_EVAL_PREPARATIONS = {
    "alpaca_eval.constants": ("alpaca_eval.repairs:name_unknown_user",),
    "alpaca_eval.utils": ("alpaca_eval.repairs:stand_in_for_pkg_resources",),
}
failed_repairs: dict[str, str] = {}
"""Repair -> why it could not be done, for `specrej-eval doctor`."""


def wrap_lm_eval(evaluator: ModuleType) -> None:
    """After `lm_eval.evaluator`: its seed and the user's gen_kwargs can be read while it runs."""
    importlib.import_module("specrej_eval.harness.lm_eval.run").wrap_simple_evaluate(evaluator)


def wrap_lm_eval_command(main: ModuleType) -> None:
    """After `lm_eval.__main__`: our errors, and signals, end in one message."""
    importlib.import_module("specrej_eval.harness.lm_eval.run").wrap_command(main)


def register_lm_eval_models(models: ModuleType) -> None:
    """After `lm_eval.models`: put our names beside the built-in ones.

    Not earlier: `get_model` fills the registry with the built-in models only if it is still empty.
    """
    registry = importlib.import_module("lm_eval.api.registry")
    if hasattr(registry, "load_plugins"):  # this lm-eval reads the entry points of pyproject.toml by itself
        return
    for name, target in LM_EVAL_MODELS.items():
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=target)


def repair_alpaca_eval(module: ModuleType) -> None:
    """After one of alpaca_eval's modules: do its repairs. One that fails costs a warning, and only itself."""
    for repair in ALPACA_EVAL_REPAIRS[module.__name__]:
        _attempt(repair, module)


def prepare_alpaca_eval(module: ModuleType) -> Callable[[], None]:
    """Before one of alpaca_eval's modules; what is returned undoes it once the module has been executed."""
    undo = [_attempt(repair, module) for repair in ALPACA_EVAL_PREPARATIONS[module.__name__]]

    def clean_up() -> None:
        for step in undo:
            if step is not None:
                step()

    return clean_up


def _attempt(repair: str, module: ModuleType) -> Callable[[], None] | None:
    home, _, name = repair.partition(":")
    try:
        function = getattr(importlib.import_module(f"specrej_eval.harness.{home}"), name)
        undo: Callable[[], None] | None = function(module)
        return undo
    except Exception as error:  # alpaca_eval must go on working, with its own defects if need be
        failed_repairs[f"{module.__name__}: {name}"] = repr(error)
        autoload_module().warn(
            f"specrej-eval could not repair {module.__name__} ({name}: {error!r}); run `specrej-eval doctor`"
        )
        return None


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
