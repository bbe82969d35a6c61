# torch-free
"""Our decoders and our judge put among alpaca_eval's, and its commands wrapped: what a run of ours needs around it.

``AFTER``: alpaca_eval's module -> functions called with it once it has been executed, in this order (see
``harness.startup``). Nothing is written into alpaca_eval's files: all of it happens in memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from specrej_eval import stopping
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.harness.patching import patch

DECODERS = {
    "specrej_completions": "specrej_eval.harness.alpaca_eval.decoder",
    "specrej_best_of_n": "specrej_eval.harness.alpaca_eval.decoder",
    "specrej_reward_judge": "specrej_eval.harness.alpaca_eval.judge",
}
"""Names for ``fn_completions`` in a model's or a judge's YAML -> the module that holds the function."""


def add_decoders(decoders: ModuleType) -> None:
    """``decoders.get_fn_completions``: upstream's list of names is closed."""

    def make(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get_fn_completions(name: Any) -> Any:
            if name in DECODERS:
                return getattr(importlib.import_module(DECODERS[name]), name)
            try:
                return original(name)
            except ValueError as error:
                best = nearest(str(name), DECODERS)
                if best is None or "nknown decoder" not in str(error):
                    raise
                raise ConfigError(
                    f"fn_completions: unknown decoder {name!r}.",
                    hint=f"did you mean {best!r}? Ours: {', '.join(DECODERS)} (a judge).",
                ) from error

        return get_fn_completions

    patch(decoders, "get_fn_completions", make)


def rebind_decoders(base: ModuleType) -> None:
    """``annotators.base`` imports the function by name, possibly before we replaced it (a late activation)."""
    base.__dict__["get_fn_completions"] = importlib.import_module("alpaca_eval.decoders").get_fn_completions


def guard_generation(main: ModuleType) -> None:
    """``evaluate_from_model``: see ``generation``."""
    from specrej_eval.harness.alpaca_eval.generation import wrap_evaluate_from_model

    patch(main, "evaluate_from_model", wrap_evaluate_from_model)


def print_errors_without_traceback(main: ModuleType) -> None:
    """``main.main``, the command: errors raised on purpose are one message, not forty lines of fire's insides."""

    def make(original: Callable[[], Any]) -> Callable[[], Any]:
        def command() -> Any:
            try:
                with stopping.command():
                    return original()
            except (SpecRejError, KeyboardInterrupt) as error:
                sys.exit(stopping.leave("alpaca_eval", error))

        return command

    patch(main, "main", make)


def rebind_commands(main: ModuleType) -> None:
    """Whoever holds ``main``'s functions gets the replaced ones: its table of commands, and the package itself."""
    commands = main.ALL_FUNCTIONS
    for name in commands:
        commands[name] = getattr(main, name)
    package = sys.modules.get("alpaca_eval")
    for name in (*commands, "main"):
        if callable(getattr(package, name, None)):
            setattr(package, name, getattr(main, name))


AFTER = {
    "alpaca_eval.decoders": (add_decoders,),
    "alpaca_eval.annotators.base": (rebind_decoders,),
    "alpaca_eval.main": (guard_generation, print_errors_without_traceback, rebind_commands),
}
