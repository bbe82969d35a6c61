"""`specrej-eval report`: the runs under some folders in one table: what each scored, on how many prompts, what it cost,
on which machine.

It reads lm-eval's results files (of other models too), folders of `specrej-eval run`, and those of alpaca_eval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specrej_eval.commands.report.comparison import conclusions, rows
from specrej_eval.commands.report.notes import notes
from specrej_eval.commands.report.runs import find_runs
from specrej_eval.commands.report.table import as_csv, as_json, as_tables
from specrej_eval.wording import inert, inert_markdown

SUMMARY = "print one table of the runs found under a folder, with paired differences between them"
EXAMPLES = (
    "specrej-eval report results/demo",
    'specrej-eval report results/spr results/bo16 --baseline "best-of-n, n=16"',
    "specrej-eval report results --format markdown",
    "specrej-eval report results --format csv > results.csv",
)
_FOR_PROGRAMS = {"json": as_json, "csv": as_csv}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to read")
    read.add_argument(
        "folder",
        nargs="+",
        type=Path,
        help="results of lm_eval (--output_path), `specrej-eval run` or alpaca_eval; subfolders are searched too",
    )
    shown = parser.add_argument_group("how to show it")
    shown.add_argument(
        "--format", choices=("text", "markdown", *_FOR_PROGRAMS), default="text", help="format of the table"
    )
    shown.add_argument(
        "--baseline",
        metavar="TEXT",
        help="name of the run to compare with, or a part that no other name has (default: the first)",
    )


def run(args: argparse.Namespace) -> int:
    """Raises:
    SpecRejError: no run is found; a record is damaged.
    ConfigError: no run is called as ``--baseline`` says, or several are.
    """
    runs = find_runs(*args.folder)
    table = rows(runs, args.baseline)
    if args.format in _FOR_PROGRAMS:
        print(_FOR_PROGRAMS[args.format](table))
        return 0
    markdown = args.format == "markdown"
    told = ["\n".join(map(inert_markdown if markdown else inert, lines)) for lines in (conclusions(runs), notes(runs))]
    print("\n\n".join(filter(None, [as_tables(table, markdown=markdown), *told])))
    return 0
