"""A device whose memory runs out at chosen operations: what torch dispatches is counted, and some of it fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support import ROOT

PACKAGE = str(ROOT / "specrej_eval")


class MemoryRunsOut(TorchDispatchMode):
    """Counts operations; those whose number is in ``at`` raise instead of running.

    Args:
        at: numbers of operations, from 0.
        sites: note where each operation comes from (slow).
    """

    def __init__(self, at: Collection[int] = (), *, sites: bool = False) -> None:
        super().__init__()
        self.at = frozenset(at)
        self.num_ops = 0
        self.failed: list[str] = []
        self.sites: list[tuple[str, str]] | None = [] if sites else None
        """Per operation: its name, and the innermost line of ours that it was called from."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.num_ops = self.num_ops, self.num_ops + 1
        if self.sites is not None:
            self.sites.append((str(function), where()))
        if number in self.at:
            self.failed.append(f"{function} in {where()}")
            raise torch.OutOfMemoryError(f"operation {number}, {function}")
        return function(*args, **(kwargs or {}))


def where() -> str:
    """The innermost line of the package on the stack, as ``engine/groups.py:drop``."""
    # from a frame of our own: by itself ``walk_stack`` leaves out four, and older torch has fewer between
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name[len(PACKAGE) + 1 :]}:{frame.f_code.co_name}:{frame.f_lineno}"
    return "?"
