"""What the startup hook does once a harness has been imported.

The hook itself (autoload/_specrej_eval_autoload.py) only watches imports; the work is here, and this module is imported only when
a watched module is. One function for each entry of its HOOKS table; each takes the module that has just been executed.
A function may raise: the caller turns that into a RuntimeWarning, so that the harness goes on working without us.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

# The names `lm_eval --model` takes -> "module:class". lm-eval replaces such a placeholder by the class on first use, and accepts
# the class under it only if this string is the class's own module and name.
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
    """Do by hand what the startup hook does: for places where site-packages' .pth files are not read, or it is switched off."""
    try:
        import _specrej_eval_autoload as autoload  # type: ignore[import-not-found]
    except ImportError:  # run from a checkout that was never installed: there is nothing to watch imports with, so import now
        register_lm_eval_models(importlib.import_module("lm_eval.models"))
        return
    autoload.install()
    if not autoload.installed():  # SPECREJ_EVAL_AUTOLOAD=0 stops what happens unasked; this call was asked for
        register_lm_eval_models(importlib.import_module("lm_eval.models"))


def is_hooked() -> bool:
    """Whether our finder is watching imports in this interpreter."""
    autoload = sys.modules.get("_specrej_eval_autoload")
    return autoload is not None and bool(autoload.installed())
