"""What alpaca_eval left beside a run's answers: leaderboards and annotations, one folder a judge."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
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


def preferred(folder: Path, name: str) -> dict[str, dict[tuple[str, str], float]]:
    """Judge -> (instruction, answer) -> how surely the answer is preferred to the reference's, in per cent; of an
    answer that was judged several times the mean."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for path in sorted(folder.glob("*/annotations.json")):
        values: dict[tuple[str, str], list[float]] = {}
        for row in _annotations(path, name):
            preference = number_or(row.get("preference"), None)
            if preference is not None:
                pair = str(row.get("instruction")), str(row.get("output_2")).strip()
                values.setdefault(pair, []).append((preference - 1) * 100)
        if values:
            found[path.parent.name] = {pair: fmean(each) for pair, each in values.items()}
    return found


def _row(board: Path, name: str) -> dict[str, str]:
    try:
        with board.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("") == name]
    except (OSError, ValueError, csv.Error):
        return {}
    return rows[-1] if rows else {}


def _win_by_win(path: Path, name: str) -> dict[str, float]:
    """Instruction and reference, hashed -> preference in per cent."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for row in _annotations(path, name):
        asked = json.dumps([row.get("instruction"), row.get("output_1")])
        key = hashlib.sha256(asked.encode()).hexdigest()
        seen[key] += 1
        preference = number_or(row.get("preference"), None)
        if preference is not None:
            found[f"{key} {seen[key]}"] = (preference - 1) * 100
    return found


def _annotations(path: Path, name: str) -> list[dict[str, Any]]:
    """Those of a generator's answers; none where the file cannot be read."""
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    rows = told if isinstance(told, list) else []
    return [row for row in rows if isinstance(row, dict) and row.get("generator_2") == name]


def _number(text: str | None) -> float | None:
    try:
        return number_or(float(text or ""), None)
    except ValueError:
        return None
