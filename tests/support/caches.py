"""Cache folders of a test's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from specrej_eval import paths


def own_cache(folder: Path) -> str:
    """For ``XDG_CACHE_HOME``: the kernels that are compiled already lie there, which takes seconds, and nothing else.

    Returns:
        ``folder``.
    """
    known, own = paths.cache("native"), folder / "specrej-eval" / "native"
    if known.is_dir() and not own.exists():
        shutil.copytree(known, own)
    return str(folder)
