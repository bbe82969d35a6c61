# torch-free
"""``alpaca_eval.constants`` asks for the user's name, which a container with a bare user id does not have."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType


def name_unknown_user(constants: ModuleType) -> Callable[[], None] | None:
    """``alpaca_eval.constants`` asks for the user's name, which a container with a bare user id does not have."""
    from getpass import getuser

    try:
        getuser()
        return None
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = "unknown"
        return lambda: os.environ.__delitem__("LOGNAME")


BEFORE = {"alpaca_eval.constants": (name_unknown_user,)}
