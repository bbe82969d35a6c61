"""Where the files that are not code lie: in a wheel beside the package, in a checkout beside the package's folder."""

from __future__ import annotations

import os
from pathlib import Path

from specrej_eval.errors import SpecRejError

FOLDERS = ("tasks", "model_configs")
PACKAGE = Path(__file__).resolve().parent


def expanded(name: str | Path) -> Path:
    """The path with a leading ``~`` resolved; as it is where there is no such user (``Path.expanduser`` fails then)."""
    return Path(os.path.expanduser(name))


def is_folder(name: str | Path) -> bool:
    """Whether a name is a folder's. Any text may be asked: what is too long for a path is none (pathlib fails)."""
    return os.path.isdir(expanded(name))


def is_there(name: str | Path) -> bool:
    """Whether a name is that of a file or folder; see ``is_folder``."""
    return os.path.exists(expanded(name))


def cache(name: str) -> Path:
    """A file or folder of what may be lost: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "specrej-eval" / name


def folder(name: str) -> Path:
    """The folder of lm-eval tasks (`tasks`) or of alpaca_eval configurations (`model_configs`)."""
    candidates = (PACKAGE / f"_{name}", PACKAGE.parent / name)  # a wheel's copy; an editable install's original
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise SpecRejError(
        f"the folder {name!r} is missing; looked for {' and '.join(map(str, candidates))}",
        hint="reinstall specrej-eval; its wheel contains this folder",
    )
