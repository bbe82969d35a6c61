# torch-free
"""Small repairs of alpaca_eval 0.6.6 that belong to no larger one. Larger ones have files of their own.

Called by ``startup_hooks`` with the module of alpaca_eval that has just been (or is about to be) executed. Nothing is
written into alpaca_eval's files: all of it happens in memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from specrej_eval import stopping
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.harness.patching import patch
from specrej_eval.stopping import STOPPED

DECODERS = {
    "specrej_completions": "specrej_eval.harness.alpaca_eval.decoder",
    "specrej_best_of_n": "specrej_eval.harness.alpaca_eval.decoder",
    "specrej_reward_judge": "specrej_eval.harness.alpaca_eval.judge",
}
"""Names for ``fn_completions`` in a model's or a judge's YAML -> the module that holds the function."""


def stand_in_for_pkg_resources(utils: ModuleType) -> Callable[[], None] | None:
    """``alpaca_eval.utils`` imports pkg_resources, which setuptools 82 removed. It gets a stand-in, and nobody else."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        return None
    # what utils imports besides: some packages try pkg_resources themselves, and must not meet the stand-in
    for name in ("datasets", "pandas", "tqdm", "yaml"):
        importlib.import_module(name)
    from packaging.version import parse

    stand_in = ModuleType("pkg_resources")
    stand_in.__dict__["get_distribution"] = importlib.metadata.distribution  # its .version is all that is asked for
    stand_in.__dict__["parse_version"] = parse
    sys.modules["pkg_resources"] = stand_in
    return lambda: _take_away("pkg_resources", stand_in)


def _take_away(name: str, module: ModuleType) -> None:
    if sys.modules.get(name) is module:
        del sys.modules[name]


def name_unknown_user(constants: ModuleType) -> Callable[[], None] | None:
    """``alpaca_eval.constants`` asks for the user's name, which a container with a bare user id does not have."""
    from getpass import getuser

    try:
        getuser()
        return None
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "unknown"
        return lambda: os.environ.__delitem__("LOGNAME")


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
    """``evaluate_from_model``: see ``alpaca_eval_generation``."""
    from specrej_eval.harness.alpaca_eval.generation import wrap_evaluate_from_model

    patch(main, "evaluate_from_model", wrap_evaluate_from_model)


def print_errors_without_traceback(main: ModuleType) -> None:
    """``main.main``, the command: errors raised on purpose are one message, not forty lines of fire's insides."""

    def make(original: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(original)
        def command() -> Any:
            try:
                with stopping.command():
                    return original()
            except SpecRejError as error:
                print(f"alpaca_eval: {error}", file=sys.stderr)
                sys.exit(1)
            except stopping.Stopped as stopped:
                sys.exit(stopping.leave("alpaca_eval", stopped))
            except KeyboardInterrupt:
                print(f"alpaca_eval: stopped. {STOPPED}", file=sys.stderr)
                sys.exit(130)

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
