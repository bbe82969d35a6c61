"""One row more in AlpacaEval's CSV files, every other line left byte for byte as it is (a diff shows one line)."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
from importlib import metadata
from pathlib import Path

from specrej_eval.errors import ConfigError
from specrej_eval.wording import inert_cell

LEADERBOARD = "leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
WEIGHTS = "metrics/weights/weighted_alpaca_eval_gpt4_turbo/length_controlled_v1/baseline_gpt4_1106_preview.csv"
"""Where both lie below ``src/alpaca_eval`` of the repository, and below the installed package."""

Row = dict[str, str]


def installed(path: str) -> Path | None:
    """A file of the installed alpaca_eval, found without importing it."""
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / path
    return file if file.is_file() else None


def altered(path: str) -> bool:
    """Whether an installed file differs from what was installed: alpaca_eval writes into its own leaderboard."""
    file = installed(path)
    for entry in metadata.files("alpaca_eval") or ():
        if file is not None and entry.as_posix() == f"alpaca_eval/{path}" and entry.hash is not None:
            digest = hashlib.new(entry.hash.mode, file.read_bytes()).digest()
            return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != entry.hash.value
    return False


def read_row(file: Path, name: str) -> Row | None:
    """The row of a generator, values as they are written; None if it has none.

    Raises:
        ConfigError: not a table with generators in its first column.
    """
    try:
        lines = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{str(file)!r} cannot be read as CSV: {error}.") from error
    if not lines or len(lines[0]) < 2:
        raise ConfigError(f"{str(file)!r} is not a table with generators in its first column.")
    header, rows = lines[0], [line for line in lines[1:] if line and line[0] == name]
    return dict(zip(header[1:], rows[-1][1:], strict=False)) if rows else None


def with_row(text: str, name: str, row: Row, *, source: str) -> str:
    """A CSV file's text with ``row`` in the place of the generator's old one, or at the end.

    Raises:
        ConfigError: ``row`` lacks a column of the file.
    """
    lines = text.splitlines(keepends=True)
    header = next(csv.reader([lines[0]]))
    missing = [column for column in header[1:] if not row.get(column)]
    if missing:
        raise ConfigError(
            f"{source}: the row of {name!r} has no {', '.join(missing)}.",
            hint="alpaca_eval's default metric, get_length_controlled_winrate, writes all of them.",
        )
    made = line([name, *(row[column] for column in header[1:])])
    places = [index for index, old in enumerate(lines) if index and next(csv.reader([old]), [""])[0] == name]
    if places:
        lines[places[0]] = made
        lines = [old for index, old in enumerate(lines) if index not in places[1:]]
    else:
        if not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines.append(made)
    return "".join(lines)


def line(values: list[str]) -> str:
    """One line of CSV."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(map(inert_cell, values))
    return written.getvalue()
