"""A Hugging Face cache as a download would leave it, so that hub files can be "had" without a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALPACA_EVAL = "tatsu-lab/alpaca_eval"


def add_dataset_files(cache: Path, files: Mapping[str, Any], repo: str = ALPACA_EVAL) -> dict[str, str]:
    """Put files of one data set repository into ``cache``; text as it is, anything else as JSON.

    Returns:
        What a process needs in its environment to see them and nothing else.
    """
    _add(cache / f"datasets--{repo.replace('/', '--')}", files, hashlib.sha1(repo.encode()).hexdigest())
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def add_model_files(cache: Path, repo: str, files: Mapping[str, Any], *, commit: str = "a" * 40) -> None:
    """The same for a model repository, whose ``main`` is then this commit."""
    _add(cache / f"models--{repo.replace('/', '--')}", files, commit)


def _add(folder: Path, files: Mapping[str, Any], commit: str) -> None:
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(content if isinstance(content, str) else json.dumps(content))
