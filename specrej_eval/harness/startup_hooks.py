"""What the startup hook does once a harness has been imported.

The hook itself (autoload/_specrej_eval_autoload.py) only watches imports; the work is here, and this module is imported
only when a watched module is. One function for each entry of its HOOKS table; each takes the module that has just been
executed. It may raise: the caller turns that into a RuntimeWarning, so that the harness goes on working without us.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# The names `lm_eval --model` takes -> "module:class". lm-eval imports the class on first use; the string has to be
# the class's own module and name.
LM_EVAL_MODELS = {
    "specrej": "specrej_eval.harness.lm_eval_model:SpecRejLM",
    "best_of_n": "specrej_eval.harness.lm_eval_model:BestOfNLM",
    "best-of-n": "specrej_eval.harness.lm_eval_model:BestOfNLM",
}


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
