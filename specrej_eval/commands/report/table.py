"""The rows of a report as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from specrej_eval.commands.report.comparison import PAIRED
from specrej_eval.commands.report.runs import MODELS, describe
from specrej_eval.records import lm_eval_files
from specrej_eval.wording import inert, inert_markdown, inert_row

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

    def set(self, texts: Sequence[str], *, markdown: bool) -> list[str]:
        """Its cells at one width, with a rule below the heading."""
        texts = [(inert_markdown if markdown else inert)(text) for text in texts]
        width = max(map(len, texts))
        rule = "-" * (width - 1) + ":" if markdown and not self.words else "-" * width
        first, *others = (text.ljust(width) if self.words else text.rjust(width) for text in texts)
        return [first, rule, *others]


def as_tables(rows: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    """The scores, and below them the differences."""
    parts = [_scores(rows, markdown=markdown)]
    if compared := [row for row in rows if row["paired"]]:
        parts.append(_differences(compared, markdown=markdown))
    return "\n\n".join(parts)


def _scores(table: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    one_metric = metrics[0] if len(metrics) == 1 else None
    filtered = len({(row["task"], row["metric"], row["filter"]) for row in table})
    several_filters = filtered > len({(row["task"], row["metric"]) for row in table})
    machines = letters([row["hardware"] for row in table])

    def cost(heading: str, name: str, spec: str) -> Column:
        return Column(heading, lambda row: _number(row[name], spec), once=True)

    columns = [
        Column("run", itemgetter("run"), words=True, once=not markdown),
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
    return _as_text(columns, table, markdown=markdown)


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


def _differences(compared: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
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
    shown = inert_markdown if markdown else inert
    title = f"against {shown(baselines[0])}, on the same prompts:" if len(baselines) == 1 else "on the same prompts:"
    return f"{title}\n\n{_as_text(columns, compared, markdown=markdown)}"


def _metric_and_filter(row: Mapping[str, Any]) -> str:
    return str(row["metric"]) + (f" ({row['filter']})" if row["filter"] not in ("", "none") else "")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["paired"]["low"], row["paired"]["high"]
    return ABSENT if low is None else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # never -0.0000


def _as_text(columns: Sequence[Column], table: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    lines = [[column.heading for column in columns]]
    previous = None
    for row in table:
        lines.append(["" if column.once and row["path"] == previous else column.cell(row) for column in columns])
        previous = row["path"]
    cells = [column.set(texts, markdown=markdown) for column, *texts in zip(columns, *lines, strict=True)]
    spread = list(zip(*cells, strict=True))
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in spread)
    return "\n".join("  ".join(line).rstrip() for line in spread)


def letters(hardware: Sequence[Any]) -> dict[str, str]:
    """Each machine in words -> its letter in the table."""
    described = dict.fromkeys(describe(machine) for machine in hardware if machine)
    return {machine: chr(ord("A") + place % 26) for place, machine in enumerate(described)}


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if lm_eval_files.is_number(value) else ABSENT
