"""What the text of a ``reward_model`` is: a Python function, a server, several rewards in one, or a checkpoint.

The kinds of rewards ask here whether a name is theirs, and so do records, which import no reward.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specrej_eval.paths import is_there

SELF_SCORES = ("likelihood", "self_certainty", "deepconf")
"""Rewards made of what the engine records while it decodes."""
JUDGE = "judge:"
TERM = re.compile(r"\s*(?:(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*)?(?P<name>.*?)\s*", re.DOTALL)
"""One part of ``a+0.5*b``."""

_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_callable(name: str) -> bool:
    """Whether ``name`` has the form ``pkg.module:function``."""
    return _CALLABLE.fullmatch(name) is not None


def is_judge(name: str) -> bool:
    """Whether ``name`` is a model that grades, with the address of its server."""
    return name.startswith(JUDGE)


def is_address(name: str) -> bool:
    """Whether ``name`` is that of a reward server."""
    return name.startswith(("http://", "https://"))


def is_ensemble(name: str) -> bool:
    """Whether ``name`` names several rewards, or one with a weight. A folder of that very name wins."""
    if name.lstrip().startswith("["):
        return True
    if is_there(name):
        return False
    match = TERM.fullmatch(name)
    return "+" in name or (match is not None and match["weight"] is not None)


def split(name: str) -> list[str]:
    """``a+0.5*b`` at each plus sign but that of a number such as 1e+3."""
    return re.split(r"(?<![\d.][eE])\+", name)


def parts(name: str) -> list[dict[str, Any]]:
    """Each reward in ``name`` and the arguments that a list gives it for itself; what is badly written is left out."""
    if not is_ensemble(name):
        return [{"reward_model": name}]
    entries: Any = split(name)
    if name.lstrip().startswith("["):
        try:
            entries = json.loads(name)
        except (ValueError, RecursionError):
            entries = []
    found = []
    for entry in entries if isinstance(entries, list) else []:
        given = dict(entry) if isinstance(entry, Mapping) else {"reward_model": entry}
        match = TERM.fullmatch(str(given.get("reward_model") or ""))
        if match is not None and match["name"]:
            found.append({**given, "reward_model": match["name"]})
    return found
