"""What alpaca_eval left beside a run's answers: leaderboards and annotations, one folder a judge."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specrej_eval.checked import number_or
from specrej_eval.records.scores import Score

TASK = "alpaca_eval"
_METRICS = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
"""Column of a leaderboard -> that of its standard error."""


def scores(folder: Path, name: str) -> Iterator[Score]:
    """The win rates of a generator, in per cent, by each judge whose folder lies in ``folder``."""
    for board in sorted(folder.glob("*/leaderboard.csv")):
        row = _row(board, name)
        each = _win_by_win(board.with_name("annotations.json"), name)
        total = _number(row.get("n_total"))
        for metric, error in _METRICS.items():
            value = _number(row.get(metric))
            if value is None:
                continue
            yield Score(
                task=TASK,
                metric=metric,
                filter=board.parent.name,
                value=value,
                stderr=_number(row.get(error)),
                prompts=None if total is None else int(total),
                each=each if metric == "win_rate" else {},  # length control is a fit over all prompts
            )


def _row(board: Path, name: str) -> dict[str, str]:
    try:
        with board.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("") == name]
    except (OSError, ValueError, csv.Error):
        return {}
    return rows[-1] if rows else {}


def _win_by_win(path: Path, name: str) -> dict[str, float]:
    """Instruction and reference, hashed -> preference in per cent."""
    try:
        annotations: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for row in annotations if isinstance(annotations, list) else ():
        if not isinstance(row, dict) or row.get("generator_2") != name:
            continue
        asked = json.dumps([row.get("instruction"), row.get("output_1")])
        key = hashlib.sha256(asked.encode()).hexdigest()
        seen[key] += 1
        preference = number_or(row.get("preference"), None)
        if preference is not None:
            found[f"{key} {seen[key]}"] = (preference - 1) * 100
    return found


def _number(text: str | None) -> float | None:
    try:
        return number_or(float(text or ""), None)
    except ValueError:
        return None
