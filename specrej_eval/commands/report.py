"""One table from the results files that lm-eval wrote: what each run scored, and what it cost.

A run is known by its resolved arguments, not by its folder: of two results files with equal arguments the newer counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrej_eval.config import RecordArguments, declared
from specrej_eval.errors import SpecRejError

RECORDS = tuple(declared(RecordArguments))
ABSENT = "-"  # a run of another model has no reward and no ledger


@dataclass(frozen=True)
class Run:
    """One results file."""

    path: Path
    date: float  # seconds since the epoch
    scores: Mapping[str, Mapping[str, Any]]  # task -> "metric,filter" -> value
    config: Mapping[str, Any]

    @property
    def ours(self) -> Mapping[str, Any]:
        """What our model wrote about itself; empty for another model's run."""
        block = self.config.get("specrej")
        return block if isinstance(block, Mapping) else {}

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The resolved arguments that say what was run, without those that only say where its records went."""
        arguments = self.ours.get("arguments")
        arguments = arguments if isinstance(arguments, Mapping) else {}
        return {name: value for name, value in arguments.items() if name not in RECORDS}

    @property
    def identity(self) -> str:
        """Equal for two runs of the same thing."""
        what = self.arguments or self.config.get("model_args")
        return json.dumps([self.config.get("model"), what, self.config.get("limit"), sorted(self.scores)], default=str)

    @property
    def label(self) -> str:
        strategy, n = self.arguments.get("strategy"), self.arguments.get("n")
        if strategy == "speculative_rejection":
            return f"Speculative Rejection, alpha={self.arguments.get('alpha')}, n={n}"
        if strategy == "best_of_n":
            return "Sampling, n=1" if n == 1 else f"Best-of-N, n={n}"
        if strategy:
            return f"{strategy}, n={n}"
        return str(self.config.get("model", self.path.parent.name))


def find_runs(folder: Path) -> list[Run]:
    """The newest results file of every run under `folder`, oldest run first."""
    if not folder.is_dir():
        raise SpecRejError(f"no such folder: {folder}", hint="give the --output_path of your lm_eval runs")
    newest: dict[str, Run] = {}
    for path in folder.rglob("*.json"):
        run = read_run(path)
        if run is not None and (run.identity not in newest or newest[run.identity].date < run.date):
            newest[run.identity] = run
    if not newest:
        raise SpecRejError(
            f"no lm-eval results under {folder}",
            hint=f"run lm_eval with --output_path {folder}; it writes results_*.json when a run is complete",
        )
    return sorted(newest.values(), key=lambda run: run.date)


def read_run(path: Path) -> Run | None:
    """The run a file holds, or None if it is not one of lm-eval's results files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # half written, or not JSON in UTF-8
        return None
    if not (isinstance(content, dict) and isinstance(content.get("results"), dict)):
        return None
    if not isinstance(content.get("config"), dict):
        return None
    date = content.get("date")
    scores = {task: values for task, values in content["results"].items() if isinstance(values, dict)}
    return Run(
        path=path,
        date=float(date) if isinstance(date, int | float) else path.stat().st_mtime,
        scores=scores,
        config=content["config"],
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names; runs that would share one get the arguments they differ in."""
    names = [run.label for run in runs]
    for name in set(names):
        same = [index for index, other in enumerate(names) if other == name]
        if len(same) < 2:
            continue
        settings = {index: {**runs[index].arguments, "limit": runs[index].config.get("limit")} for index in same}
        keys = sorted({key for values in settings.values() for key in values})
        differing = [key for key in keys if len({str(settings[index].get(key)) for index in same}) > 1]
        for index in same:
            details = [f"{key}={settings[index].get(key)}" for key in differing]
            names[index] = ", ".join([name, *details]) if details else f"{name} ({runs[index].path.parent})"
    return names


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each metric of each task of each run; plain values, None where a run does not have one."""
    table = []
    for run, label in zip(runs, labels(runs), strict=True):
        for task, values in run.scores.items():
            for key, value in values.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr") or not is_number(value):
                    continue
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                table.append(
                    {
                        "run": label,
                        "task": task,
                        "metric": metric,
                        "filter": filter_name,
                        "value": value,
                        "stderr": stderr if is_number(stderr) else None,
                        **costs(run),
                    }
                )
    return table


def costs(run: Run) -> dict[str, Any]:
    """What the whole run cost (all its tasks together)."""
    totals = run.ours.get("totals")
    totals = totals if isinstance(totals, Mapping) else {}
    seconds = totals.get("seconds")
    started, rejected = totals.get("rows_started"), totals.get("rows_rejected")
    return {
        "mean_reward": run.ours.get("mean_reward"),
        "decode_tokens": totals.get("decode_tokens"),
        "reward_tokens": totals.get("reward_tokens"),
        "rejected_share": rejected / started if started and rejected is not None else None,
        "seconds": sum(seconds.values()) if isinstance(seconds, Mapping) else seconds,
        "scoring_share": _scoring_share(seconds),
    }


def _scoring_share(seconds: Any) -> float | None:
    """What share of the seconds the reward model took."""
    total = sum(seconds.values()) if isinstance(seconds, Mapping) else 0
    return seconds.get("reward", 0.0) / total if total else None


def render(runs: Sequence[Run], style: str = "text") -> str:
    """The table as aligned text, Markdown, or JSON."""
    table = rows(runs)
    if style == "json":
        return json.dumps(table, indent=2)

    several_tasks = len({row["task"] for row in table}) > 1
    several_filters = len({(row["task"], row["metric"], row["filter"]) for row in table}) > len(
        {(row["task"], row["metric"]) for row in table}
    )
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    one_metric = metrics[0] if len(metrics) == 1 else None

    header = ["run"]
    header += ["task"] if several_tasks else []
    header += ["filter"] if several_filters else []
    header += [f"{one_metric} ± stderr"] if one_metric else ["metric", "value ± stderr"]
    header += ["mean reward", "tokens decoded", "reward tokens", "rejected", "seconds", "scoring"]
    lines = []
    previous = None
    for row in table:
        first = row["run"] != previous  # costs belong to the run: say them once
        previous = row["run"]
        line = [row["run"] if first or style == "markdown" else ""]
        line += [row["task"]] if several_tasks else []
        line += [row["filter"]] if several_filters else []
        line += [] if one_metric else [row["metric"]]
        line += [number(row["value"], ".4f") + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")]
        if first:
            line += [
                number(row["mean_reward"], ".3f"),
                number(row["decode_tokens"], ",.0f"),
                number(row["reward_tokens"], ",.0f"),
                number(row["rejected_share"], ".1%"),
                number(row["seconds"], ".1f"),
                number(row["scoring_share"], ".0%"),
            ]
        else:
            line += [""] * 6
        lines.append(line)
    left = 1 + several_tasks + several_filters + (one_metric is None)  # so many columns of words, then numbers
    return align(header, lines, left, style)


def align(header: Sequence[str], lines: Sequence[Sequence[str]], left: int, style: str) -> str:
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def spread(cells: Iterable[str]) -> list[str]:
        pairs = zip(cells, widths, strict=True)
        return [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(pairs)]

    if style == "markdown":
        rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (spread(header), rule, *map(spread, lines)))
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(cells).rstrip() for cells in (spread(header), rule, *map(spread, lines)))


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing: other hardware, partial tasks, warnings."""
    found: list[str] = []
    machines = list(dict.fromkeys(describe(run.ours["hardware"]) for run in runs if run.ours.get("hardware")))
    found += [f"hardware: {machine}" for machine in machines]
    if len(machines) > 1:
        found.append("not all runs used the same hardware: their seconds do not compare")
    limits = list(dict.fromkeys(run.config.get("limit") for run in runs))
    if any(limit is not None for limit in limits):
        found.append(f"--limit was {', '.join(map(str, limits))}: these are not scores of the whole task")
    by_warning: dict[str, list[str]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        for warning in run.ours.get("warnings") or ():
            by_warning.setdefault(str(warning), []).append(label)
    found += [
        f"warning: {text}" + ("" if len(who) == len(runs) else f" ({'; '.join(who)})")
        for text, who in by_warning.items()
    ]
    return found


def describe(hardware: Any) -> str:
    if isinstance(hardware, Mapping):
        return ", ".join(f"{key}={value}" for key, value in hardware.items())
    return str(hardware)


def number(value: Any, spec: str) -> str:
    return format(value, spec) if is_number(value) else ABSENT


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where lm_eval's --output_path pointed; searched with its subfolders")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    runs = find_runs(args.folder)
    print(render(runs, args.format))
    if args.format != "json":
        remarks = notes(runs)
        if remarks:
            print("\n" + "\n".join(remarks))
    return 0
