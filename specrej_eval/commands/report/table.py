"""The rows of a report as text, Markdown, LaTeX, CSV or JSON, and as a table of rich on a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from specrej_eval.commands.report.comparison import PAIRED
from specrej_eval.commands.report.runs import MODELS, describe
from specrej_eval.records import lm_eval_files
from specrej_eval.wording import inert, inert_latex, inert_markdown, inert_row

Style = Literal["text", "markdown", "latex"]
SHOWN: dict[Style, Callable[[str], str]] = {"text": inert, "markdown": inert_markdown, "latex": inert_latex}
"""What makes anybody's text harmless in each."""
ABSENT = "-"  # a run of another model has no reward and no ledger


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, indent=2)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; what is nested in JSON has columns of its own."""
    lines = [
        {name: value for name, value in row.items() if name not in ("models", "paired", "audit")}
        | {"hardware": "" if row["hardware"] is None else describe(row["hardware"])}
        | {"warnings": "; ".join(row["warnings"])}
        | {name: row["models"].get(name) for name in MODELS}
        | {f"paired_{name}": (row["paired"] or {}).get(name) for name in PAIRED}
        | {f"audit_{name}": (row["audit"] or {}).get(name) for name in ("regret", "best_rejected", "prompts_audited")}
        for row in rows
    ]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(inert_row, lines))
    return written.getvalue().rstrip("\n")


class Column(NamedTuple):
    """One column of a table for the eye."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    words: bool = False
    """Set on the left."""
    once: bool = False
    """It belongs to the run: said in the first of its rows alone."""

    def set(self, texts: Sequence[str], *, style: Style) -> list[str]:
        """Its cells at one width, with a rule below the heading."""
        texts = [SHOWN[style](text) for text in texts]
        width = max(map(len, texts))
        rule = "-" * (width - 1) + ":" if style == "markdown" and not self.words else "-" * width
        first, *others = (text.ljust(width) if self.words else text.rjust(width) for text in texts)
        return [first, rule, *others]


class Sheet(NamedTuple):
    """One table before it is written."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def lines(self) -> list[list[str]]:
        """The headings, and the cells of each row."""
        lines = [[column.heading for column in self.columns]]
        previous = None
        for row in self.rows:
            lines.append(["" if c.once and row["path"] == previous else c.cell(row) for c in self.columns])
            previous = row["path"]
        return lines


def _sheets(rows: Sequence[Mapping[str, Any]], *, style: Style) -> list[Sheet]:
    """The scores, and below them the differences."""
    compared = [row for row in rows if row["paired"]]
    return [_scores(rows, style=style), *([_differences(compared)] if compared else [])]


def as_tables(rows: Sequence[Mapping[str, Any]], *, style: Style) -> str:
    """The scores, and below them the differences."""
    return "\n\n".join(_as_text(sheet, style) for sheet in _sheets(rows, style=style))


def print_rich(rows: Sequence[Mapping[str, Any]]) -> bool:
    """The same on a terminal, by rich; False where it is not installed, or the terminal is too narrow for it."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console(highlight=False)
    drawn = []
    for sheet in _sheets(rows, style="text"):
        heads, *lines = sheet.lines()
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column, head in zip(sheet.columns, heads, strict=True):
            broken = inert(head) if column.words else inert(head).replace(" ± ", " ±\n").replace(" ", "\n")
            broken = broken.replace("\n±", " ±").replace("95\n%", "95 %")
            side: Literal["left", "right"] = "left" if column.words else "right"
            table.add_column(Text(broken), justify=side, no_wrap=not column.words, vertical="bottom")
        for line in lines:
            table.add_row(*(Text(inert(text)) for text in line))
        if console.measure(table, options=console.options.update(max_width=10_000)).minimum + 10 > console.width:
            return False
        drawn.append((Text(inert(sheet.title)), table))
    for title, table in drawn:
        console.print(*([title] if title else []), table)
    return True


def _scores(table: Sequence[Mapping[str, Any]], *, style: Style) -> Sheet:
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    one_metric = metrics[0] if len(metrics) == 1 else None
    filtered = len({(row["task"], row["metric"], row["filter"]) for row in table})
    several_filters = filtered > len({(row["task"], row["metric"]) for row in table})
    machines = letters([row["hardware"] for row in table])

    def cost(heading: str, name: str, spec: str) -> Column:
        return Column(heading, lambda row: _number(row[name], spec), once=True)

    columns = [
        Column("run", itemgetter("run"), words=True, once=style != "markdown"),
        *_task_column(table),
        *([Column("filter", itemgetter("filter"), words=True)] if several_filters else []),
        *([] if one_metric else [Column("metric", itemgetter("metric"), words=True)]),
        Column(f"{one_metric or 'value'} ± stderr", _value),
        Column("prompts", _prompts),
        *([] if one_metric == "reward" else [cost("mean reward", "mean_reward", ".3f")]),
        cost("tokens decoded", "decode_tokens", ",.0f"),
        cost("reward tokens", "reward_tokens", ",.0f"),
        cost("rejected", "rejected_share", ".1%"),
        cost("seconds", "seconds", ".1f"),
        cost("scoring", "scoring_share", ".0%"),
        Column("machine", lambda row: machines.get(describe(row["hardware"]), ABSENT), once=True),
    ]
    return Sheet("", columns, table)


def _task_column(table: Sequence[Mapping[str, Any]]) -> list[Column]:
    several = len({row["task"] for row in table}) > 1
    return [Column("task", itemgetter("task"), words=True)] if several else []


def _value(row: Mapping[str, Any]) -> str:
    return _number(row["value"], ".4f") + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


def _prompts(row: Mapping[str, Any]) -> str:
    """How many prompts a score is of, and whether that is all of them."""
    answered, whole = row["prompts"], row["prompts_in_all"]
    if answered is None:
        return ABSENT if row["limit"] is None else f"limit {row['limit']:g}"
    if whole is not None and whole != answered:
        return f"{answered:,} of {whole:,}"
    return f"{answered:,}" + ("" if row["limit"] is None else " (limit)")


def _differences(compared: Sequence[Mapping[str, Any]]) -> Sheet:
    baselines = list(dict.fromkeys(row["paired"]["baseline"] for row in compared))
    columns = [
        Column("run", itemgetter("run"), words=True),
        *([Column("against", lambda row: row["paired"]["baseline"], words=True)] if len(baselines) > 1 else []),
        *_task_column(compared),
        Column("metric", _metric_and_filter, words=True),
        Column("difference", lambda row: _signed(row["paired"]["difference"])),
        Column("95 % interval", _interval),
        Column("prompts", lambda row: f"{row['paired']['prompts']:,}"),
    ]
    title = f"against {baselines[0]}, on the same prompts:" if len(baselines) == 1 else "on the same prompts:"
    return Sheet(title, columns, compared)


def _metric_and_filter(row: Mapping[str, Any]) -> str:
    return str(row["metric"]) + (f" ({row['filter']})" if row["filter"] not in ("", "none") else "")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["paired"]["low"], row["paired"]["high"]
    return ABSENT if low is None else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # never -0.0000


def _as_text(sheet: Sheet, style: Style) -> str:
    cells = [column.set(texts, style=style) for column, *texts in zip(sheet.columns, *sheet.lines(), strict=True)]
    spread = list(zip(*cells, strict=True))
    title = SHOWN[style](sheet.title)
    if style == "latex":
        head, _, *body = (f"{' & '.join(line)} \\\\" for line in spread)
        columns = "".join("l" if column.words else "r" for column in sheet.columns)
        begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        written = "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"])
        return f"% {title}\n{written}" if title else written
    if style == "markdown":
        written = "\n".join(f"| {' | '.join(line)} |" for line in spread)
    else:
        written = "\n".join("  ".join(line).rstrip() for line in spread)
    return f"{title}\n\n{written}" if title else written


def letters(hardware: Sequence[Any]) -> dict[str, str]:
    """Each machine in words -> its letter in the table."""
    described = dict.fromkeys(describe(machine) for machine in hardware if machine)
    return {machine: chr(ord("A") + place % 26) for place, machine in enumerate(described)}


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if lm_eval_files.is_number(value) else ABSENT
