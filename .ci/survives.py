"""Writes docs/survives.md's table from the list in tests/support/survival.py: `python .ci/survives.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from support import survival  # noqa: E402  # tests are no package

FILE = ROOT / "docs" / "survives.md"
BEGIN = "<!-- made by `python .ci/survives.py`: edit tests/support/survival.py, not this table -->"
END = "<!-- end of the table -->"


def table() -> str:
    """A row for each fault; below it the tests, which the cells' numbers name."""
    tests: dict[str, int] = {}
    lines = [f"| | {' | '.join(_heading(way) for way in survival.WAYS)} |", "|---|" + "---|" * len(survival.WAYS)]
    for fault, cells in survival.TABLE:
        told = []
        for way in survival.WAYS:
            if way not in cells:
                told.append("")
                continue
            outcome, test = cells[way]
            told.append(f"{outcome} [{tests.setdefault(test, len(tests) + 1)}]")
        lines.append(f"| {' | '.join([fault, *told])} |")
    listed = [f"{number}. `tests/{test}`" for test, number in tests.items()]
    return "\n".join([*lines, "", "The tests behind it, by the numbers in brackets:", "", *listed])


def rewritten(text: str) -> str:
    """A file's text with today's table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _heading(way: str) -> str:
    return way if way == "Python" else f"`{way}`"


if __name__ == "__main__":
    FILE.write_text(rewritten(FILE.read_text(encoding="utf-8")), encoding="utf-8")
