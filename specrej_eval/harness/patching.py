# torch-free
"""Replacing a function of a harness: once, recognisably, and only if it still is what we know."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ORIGINAL = "__specrej_eval_original__"


def patch(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]], *, own_signature: bool = False) -> None:
    """Put ``make(original)`` in the place of ``owner.name``. Nothing happens the second time: hooks may run twice.

    Args:
        own_signature: it takes other arguments than the original.
    """
    if is_patched(owner, name):
        return
    original = getattr(owner, name)
    replacement = make(original)
    # keeps name, docstring and signature: fire builds the command line from them
    signature = inspect.signature(replacement if own_signature else original)
    functools.update_wrapper(replacement, original)
    setattr(replacement, "__signature__", signature)  # noqa: B010 (mypy: not of a Callable)
    setattr(replacement, _ORIGINAL, original)
    setattr(owner, name, replacement)


def is_patched(owner: Any, name: str) -> bool:
    """Whether ``owner`` itself (not a base class) holds our replacement."""
    return hasattr(vars(owner).get(name), _ORIGINAL)


def takes(function: Any, *names: str) -> bool:
    """Whether a function still has these parameters, so that a newer upstream is left alone."""
    return callable(function) and set(names) <= set(inspect.signature(function).parameters)


class ModuleView(ModuleType):
    """A module as one importer sees it: a few names replaced, all others the real ones."""

    def __init__(self, module: ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_viewed"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)
