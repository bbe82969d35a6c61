"""alpaca_eval's command, files for it, and a look at whether its installed files are still what they were."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LITERAL = (
    "make_leaderboard",
    *("--leaderboard_path", "leader_board.csv"),
    *("--all_model_outputs", "X.json"),
    *("--reference_outputs", "Y.json"),
    *("--output_path", "leader_board"),
    *("--fn_metric", "get_length_controlled_winrate"),
    *("--sort_by", "length_controlled_winrate"),
    "--is_overwrite_leaderboard",
)
"""The leaderboard command that this project was asked to make work, word for word."""


def sums(generator: str, count: int = 8, wrong_by: int = 0, prefix: str = "") -> list[dict[str, Any]]:
    """Answers to small sums, all of them wrong by the same number."""
    return [
        {
            "dataset": "sums",
            "instruction": f"Q: {10 + i} + {20 + 3 * i} = ?",
            "output": f"{prefix}{30 + 4 * i + wrong_by}",
            "generator": generator,
        }
        for i in range(count)
    ]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def alpaca_eval(
    *words: object, cwd: Path, env: Mapping[str, str] | None = None, command: Sequence[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the installed console script (or ``command``) as a user would."""
    program = command or [str(Path(sys.executable).parent / "alpaca_eval")]
    return subprocess.run(
        [*program, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
        capture_output=True,
        text=True,
    )


def package_digest() -> str:
    """Of all files of the installed alpaca_eval, bytecode apart. Imports nothing."""
    spec = importlib.util.find_spec("alpaca_eval")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
