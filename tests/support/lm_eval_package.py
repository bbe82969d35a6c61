"""The installed lm_eval with few of its tasks: the command reads the YAML files of all 14,000 at each start."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

TASKS = ("gsm8k",)
"""The bundled tasks that tests name."""


def with_few_tasks(folder: Path) -> Path:
    """Links to the installed package, bytecode included, but for its tasks, of which ``TASKS`` alone are there.

    Returns:
        ``folder``, for ``PYTHONPATH``.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    source, package = Path(spec.origin).parent, folder / "lm_eval"
    (package / "tasks").mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "tasks":
            (package / path.name).symlink_to(path)
    for path in (source / "tasks").iterdir():
        if path.suffix == ".py" or path.name == "__pycache__":
            (package / "tasks" / path.name).symlink_to(path)
    for name in TASKS:
        shutil.copytree(source / "tasks" / name, package / "tasks" / name)
    return folder


def first_on_path(folder: Path) -> dict[str, str]:
    """The environment of a process that imports from this folder first."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
