"""`specrej-eval report`: the runs under some folders in one table: what each scored, on how many prompts, what it cost,
on which machine.

It reads lm-eval's results files (of other models too), folders of `specrej-eval run`, and those of alpaca_eval.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from specrej_eval.commands.report.comparison import chosen, conclusions, rows
from specrej_eval.commands.report.notes import notes
from specrej_eval.commands.report.runs import Run, find_runs
from specrej_eval.commands.report.table import SHOWN, Style, as_csv, as_json, as_tables, print_rich
from specrej_eval.errors import ConfigError
from specrej_eval.wording import inert

SUMMARY = "print one table of the runs found under a folder, with paired differences between them"
EXAMPLES = (
    "specrej-eval report results/demo",
    "specrej-eval report results/demo --html report.html",
    "specrej-eval report results/demo --plots plots --plot_format svg",
    'specrej-eval report results/spr results/bo16 --baseline "best-of-n, n=16"',
    "specrej-eval report results --format markdown",
    "specrej-eval report results --format csv > results.csv",
)
PLOT_FORMATS = ("svg", "png")
MEGABYTES = 12.0
"""Most that the rows take in a page, unless it is told otherwise."""
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
        "--format", choices=("text", "markdown", "latex", *_FOR_PROGRAMS), default="text", help="format of the table"
    )
    shown.add_argument(
        "--baseline",
        metavar="TEXT",
        help="name of the run to compare with, or a part that no other name has (default: the first)",
    )

    page = parser.add_argument_group("a page to send around, from the rows that were recorded")
    page.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page: charts, tables, rows")
    page.add_argument("--plots", metavar="DIR", type=Path, help="write every plot of the page into a folder")
    page.add_argument(
        "--plot_format", choices=("both", *PLOT_FORMATS), help="of --plots; png needs matplotlib (default: both)"
    )
    page.add_argument(
        "--megabytes",
        type=_megabytes,
        help="most that the rows take in the page; where that is less than all, the page says so "
        f"(default: {MEGABYTES:g})",
    )


def _megabytes(text: str) -> float:
    """Raises:
    argparse.ArgumentTypeError: not a number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Raises:
    SpecRejError: no run is found; a record is damaged.
    ConfigError: no run is called as ``--baseline`` says, or several are; an option is about one that is not given.
    """
    for name, of in (("plot_format", "plots"), ("megabytes", "html")):
        if getattr(args, name) is not None and getattr(args, of) is None:
            raise ConfigError(f"--{name} is about --{of}, which is not given.", hint=f"add --{of}, or leave it out.")
    if args.html is not None or args.plots is not None:
        if args.format != "text":
            raise ConfigError(
                f"--format {args.format} is about the table in the terminal, which --html and --plots leave out.",
                hint="a page has its tables as Markdown and LaTeX too; or run `specrej-eval report` once more.",
            )
        return _write_page(args)
    runs = find_runs(*args.folder)
    table = rows(runs, args.baseline)
    if args.format in _FOR_PROGRAMS:
        print(_FOR_PROGRAMS[args.format](table))
        return 0
    style: Style = args.format
    drawn = style == "text" and sys.stdout.isatty() and print_rich(table)
    mark = "% " if style == "latex" else ""
    # the line that says what to conclude comes last
    told = ["\n".join(mark + SHOWN[style](line) for line in lines) for lines in (notes(runs), _last(runs))]
    print("\n\n".join(filter(None, ["" if drawn else as_tables(table, style=style), *told])))
    return 0


def _last(runs: Sequence[Run]) -> list[str]:
    """What to conclude."""
    if found := conclusions(runs):
        return found
    if len(runs) == 1:
        return ["one run: there is nothing to hold it against yet; make a second one on the same prompts."]
    return ["no Speculative Rejection and Best-of-N on the same prompts: there is nothing to conclude about the two."]


def _write_page(args: argparse.Namespace) -> int:
    """In the order in which folders are given, so that a page does not depend on when a run ended."""
    from specrej_eval.commands.report.page import write  # with NumPy, which a table in the terminal needs not

    def place(run: Run) -> tuple[int, str]:
        above = (run.path, *run.path.parents)
        given = [folder.parent if folder.is_file() and folder != run.path else folder for folder in args.folder]
        first = next((number for number, folder in enumerate(given) if folder in above), len(given))
        return first, str(run.path)

    runs = sorted(find_runs(*args.folder), key=place)
    formats = PLOT_FORMATS if args.plot_format in (None, "both") else (args.plot_format,)
    written = write(
        runs,
        chosen(runs, args.baseline),
        html=args.html,
        plots=args.plots,
        formats=formats,
        megabytes=MEGABYTES if args.megabytes is None else args.megabytes,
    )
    for line in [*(f"wrote {path}" for path in written), "", *_last(runs)]:
        print(inert(line))
    return 0
