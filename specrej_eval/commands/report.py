"""One table of the runs under some folders: what each scored, on how many prompts, what it cost, on which machine.

It reads lm-eval's results files (of other models too), folders of `specrej-eval run`, and those of alpaca_eval. A run
of lm-eval is known by its resolved arguments, not by its folder: of two results files with equal ones the newer counts.

Where runs have answered the same prompts, each is held against the first one prompt by prompt: the mean of the
differences, and its 95 % interval by Student's t (a paired t-test's; binary scores make it approximate).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from specrej_eval.checked import object_or_empty
from specrej_eval.config import DECIDING, NEUTRAL, RecordArguments, declared
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.records import alpaca_eval_files, lm_eval_files
from specrej_eval.records.fingerprint import EMBEDDED
from specrej_eval.records.outputs import RUN_FILES, Answer, OutputsFolder, total_cost
from specrej_eval.records.run_names import model_name
from specrej_eval.records.scores import Score, mean_score
from specrej_eval.wording import counted

SUMMARY = "print one table of the runs found under a folder, with paired differences between them"
EXAMPLES = (
    "specrej-eval report results/demo",
    "specrej-eval report results/spr results/bo16 --baseline best",
    "specrej-eval report results --format markdown",
    "specrej-eval report results --format csv > results.csv",
)

RECORDS = (*declared(RecordArguments), "prompts", "limit")
"""Arguments that say where records went, and what was asked; not what answered."""
ABSENT = "-"  # a run of another model has no reward and no ledger
FEWEST = 5
"""Prompts below which an interval would say nothing."""
MODELS = ("pretrained", "reward_model")
MACHINE = ("device", "device_name", "cpu_threads", "dtype", "memory_gib")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, whatever wrote it down."""

    kind: str
    """``lm-eval``, ``run`` or ``alpaca_eval``."""
    path: Path
    date: float
    """Seconds since the epoch."""
    model: str
    """What it is called where no argument of ours says what was run."""
    scores: Sequence[Score]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The resolved arguments that say what was run; empty for another model's run."""
    models: Mapping[str, str | None] = field(default_factory=dict)
    limit: float | None = None
    hardware: Any = None
    warnings: Sequence[str] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    """A ``Ledger``'s counts."""
    mean_reward: float | None = None

    @property
    def identity(self) -> str:
        """Equal for two runs of the same thing."""
        what = [self.model, self.arguments, _limit(self), sorted({score.task for score in self.scores})]
        return json.dumps([*what, None if self.kind == "lm-eval" else str(self.path)], default=str)

    @property
    def label(self) -> str:
        strategy, n = self.arguments.get("strategy"), self.arguments.get("n")
        name = f"{self.model}: " if self.kind == "alpaca_eval" else ""
        if strategy and n is None:
            return f"{name}{self.model}, log-likelihood requests alone"
        if strategy == "speculative_rejection":
            return f"{name}Speculative Rejection, alpha={self.arguments.get('alpha')}, n={n}"
        if strategy == "best_of_n":
            return name + ("Sampling, n=1" if n == 1 else f"Best-of-N, n={n}")
        return f"{name}{strategy}, n={n}" if strategy else self.model


# reading


def find_runs(*folders: Path) -> list[Run]:
    """The runs under some folders, oldest first; of equal ones the newest.

    Raises:
        SpecRejError: there is no such folder, or no run in it; a record is damaged.
    """
    newest: dict[str, Run] = {}
    for folder in folders:
        if not folder.exists():
            raise SpecRejError(f"no such folder: {folder}", hint="give the --output_path of your lm_eval runs")
        for run in _runs_in(folder):
            if run.identity not in newest or newest[run.identity].date < run.date:
                newest[run.identity] = run
    if not newest:
        raise SpecRejError(
            f"no runs under {', '.join(map(str, folders))}",
            hint="name what was given to lm_eval as --output_path (it writes results_*.json when a run is complete), "
            "the folder of a `specrej-eval run`, or alpaca_eval's results",
        )
    return sorted(newest.values(), key=lambda run: run.date)


def _runs_in(folder: Path) -> Iterable[Run]:
    paths = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
    for path in paths:
        prefix = RUN_FILES.get(path.name)
        if prefix is not None:
            yield _recorded(path, prefix)
        elif (results := lm_eval_files.read_results(path)) is not None:
            yield _of_lm_eval(results)


def _of_lm_eval(results: lm_eval_files.Results) -> Run:
    block, arguments = results.block, results.arguments
    given = object_or_empty(results.config.get("model_args"))
    embedded = bool(block.get("embedded_demo_pair"))
    return Run(
        kind="lm-eval",
        path=results.path,
        date=results.date,
        model=str(results.config.get("model", results.path.parent.name)),
        scores=list(results.scores()),
        arguments={name: value for name, value in arguments.items() if name not in RECORDS} if block else {},
        models={
            "pretrained": EMBEDDED if embedded else arguments.get("pretrained") or given.get("pretrained"),
            "reward_model": block.get("reward_model") or arguments.get("reward_model"),
        },
        limit=results.config.get("limit"),
        hardware=block.get("hardware"),
        warnings=[*map(str, block.get("warnings") or ()), *lm_eval_files.remarks(results)],
        totals=object_or_empty(block.get("totals")),
        mean_reward=block.get("mean_reward"),
    )


def _recorded(path: Path, prefix: str) -> Run:
    """A folder of `run` or of alpaca_eval."""
    store = OutputsFolder(path.parent, prefix=prefix)
    record = store.record()
    assert record is not None, f"{path} was there a moment ago"
    answers = store.answers()
    judged = alpaca_eval_files.scores(path.parent, record.name)
    prompts = record.arguments.get("prompts")
    task = Path(str(prompts)).name if prompts else "alpaca_eval"
    scores = [_reward_score(task, answers, record.fingerprint), *judged]
    decided = {name: record.fingerprint[name] for name in DECIDING if name in record.fingerprint}
    asked = {name: value for name, value in {**record.arguments, **decided}.items() if name not in RECORDS}
    rows = sorted({answer.n for answer in answers})
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    return Run(
        kind="run" if prompts else "alpaca_eval",
        path=path.parent,
        date=path.stat().st_mtime,
        model=record.name,
        scores=scores,
        arguments=asked if len(rows) != 1 else {**asked, "n": rows[0]},
        models={name: record.fingerprint.get(name) for name in MODELS},
        limit=record.arguments.get("limit"),
        hardware=_one_machine(record.machines),
        warnings=_remarks(answers, complete=record.complete),
        totals=record.totals or total_cost(answers).to_dict(),
        mean_reward=statistics.fmean(rewards) if rewards else None,
    )


def _one_machine(machines: Sequence[Mapping[str, Any]]) -> Any:
    """The machine of a run; of one put together on several, all of them in words."""
    told = list(dict.fromkeys(map(describe, machines)))
    return machines[0] if len(told) == 1 else " and ".join(told) or None


def _reward_score(task: str, answers: Sequence[Answer], fingerprint: Mapping[str, Any]) -> Score:
    """Rewards compare where one reward model gave them."""
    scale = json.dumps([fingerprint.get("reward_model"), fingerprint.get("reward_files")], sort_keys=True)
    found = {f"{a.prompt_hash} {a.repeat}": a.reward for a in answers if a.reward is not None}
    return mean_score(found, task=task, metric="reward", scale=scale, answered=len(answers))


def _remarks(answers: Sequence[Answer], *, complete: bool) -> list[str]:
    counts = [
        (sum(answer.degraded for answer in answers), "gave up rows for want of memory (degraded)", "answer", ""),
        (sum(answer.nan_rewards for answer in answers), "not finite", "reward was", "rewards were"),
        (sum(not answer.output.strip() for answer in answers), "empty", "answer is", "answers are"),
    ]
    found = [] if complete else [f"not finished: {counted(len(answers), 'answer')} so far"]
    return found + [f"{counted(count, one, more)} {what}" for count, what, one, more in counts if count]


# naming


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names; runs that would share one get the arguments they differ in."""
    names = [run.label for run in runs]
    if len({str(run.models) for run in runs if run.arguments}) > 1:
        for index, run in enumerate(runs):
            if run.arguments:
                names[index] += ", " + " by ".join(model_name(name) for name in run.models.values() if name)
    told = [(name, {score.task for score in run.scores}) for name, run in zip(names, runs, strict=True)]
    same = [[o for o, (other, theirs) in enumerate(told) if other == name and tasks & theirs] for name, tasks in told]
    for index, alike in enumerate(same):
        settings = {i: {**runs[i].arguments, "limit": _limit(runs[i])} for i in alike}
        # what an older version did not write down is no difference
        known = set.intersection(*map(set, settings.values()))
        keys = sorted(known.difference(NEUTRAL, MODELS))
        differing = [key for key in keys if len({str(values.get(key)) for values in settings.values()}) > 1]
        names[index] = ", ".join([names[index], *(f"{key}={settings[index].get(key)}" for key in differing)])
    twins = [[names[index] for index in alike].count(names[i]) > 1 for i, alike in enumerate(same)]
    return [f"{name} ({run.path.parent})" if twin else name for name, run, twin in zip(names, runs, twins, strict=True)]


def _limit(run: Run) -> str | None:
    """As a number is written, whether YAML or a command line gave it."""
    return f"{run.limit:g}" if lm_eval_files.is_number(run.limit) else None


# the table as data


def rows(runs: Sequence[Run], baseline: str | None = None) -> list[dict[str, Any]]:
    """One row for each score of each run; plain values, None where a run does not have one.

    Args:
        baseline: a part of the name of the run that the others are held against; None = the first.

    Raises:
        ConfigError: no run is called so, or several are.
    """
    names = labels(runs)
    chosen = _named(names, baseline)
    table = []
    for run, name in zip(runs, names, strict=True):
        strategy = run.arguments.get("strategy")
        for score in run.scores:
            table.append(
                {
                    "run": name,
                    "task": score.task,
                    "metric": score.metric,
                    "filter": score.filter,
                    "value": score.value,
                    "stderr": score.stderr,
                    "prompts": score.prompts,
                    "prompts_in_all": score.prompts_in_all,
                    "limit": run.limit,
                    "strategy": strategy,
                    "alpha": run.arguments.get("alpha") if strategy != "best_of_n" else None,
                    "n": run.arguments.get("n"),
                    "seed": run.arguments.get("seed"),
                    "models": dict(run.models),
                    "hardware": run.hardware,
                    "warnings": list(run.warnings),
                    **costs(run),
                    "paired": _paired(score, run, runs, names, chosen),
                    "kind": run.kind,
                    "path": str(run.path),
                }
            )
    return table


def _named(names: Sequence[str], baseline: str | None) -> int:
    if baseline is None:
        return 0
    wanted = baseline.casefold()
    found = [index for index, name in enumerate(names) if wanted in name.casefold()]
    found = [index for index in found if wanted == names[index].casefold()] or found
    if not found:
        close = nearest(baseline, names)
        hint = f"did you mean {close!r}?" if close else f"there are {'; '.join(names)}."
        raise ConfigError(f"no run is called {baseline!r}.", hint=hint)
    if len(found) > 1:
        raise ConfigError(
            f"--baseline {baseline!r} is part of the names of {counted(len(found), 'run')}.",
            hint=f"give more of one: {'; '.join(names[index] for index in found)}.",
        )
    return found[0]


def _paired(score: Score, run: Run, runs: Sequence[Run], names: Sequence[str], chosen: int) -> dict[str, Any] | None:
    """This score against that of the baseline, or else of the first run that has one on the same prompts."""
    for index in (chosen, *range(len(runs))):
        for other in runs[index].scores:
            if other.comparable != score.comparable or not other.each.keys() & score.each.keys():
                continue
            if runs[index] is run:
                return None
            return {"baseline": names[index], **paired_difference(score.each, other.each)}
    return None


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    """Mean difference over the prompts that both have, and its 95 % interval (None below FEWEST prompts)."""
    both = sorted(ours.keys() & theirs.keys())
    gaps = [ours[key] - theirs[key] for key in both]
    mean = statistics.fmean(gaps)
    low = high = None
    if len(gaps) >= FEWEST and (spread := statistics.stdev(gaps)):
        from scipy.special import stdtrit

        width = float(stdtrit(len(gaps) - 1, 0.975)) * spread / math.sqrt(len(gaps))
        low, high = mean - width, mean + width
    return {"difference": mean, "low": low, "high": high, "prompts": len(both)}


def costs(run: Run) -> dict[str, Any]:
    """What the whole run cost (all its tasks together)."""
    seconds = run.totals.get("seconds")
    phases = object_or_empty(seconds)
    total = sum(phases.values())
    started, rejected = run.totals.get("rows_started"), run.totals.get("rows_rejected")
    return {
        "mean_reward": run.mean_reward,
        "decode_tokens": run.totals.get("decode_tokens"),
        "reward_tokens": run.totals.get("reward_tokens"),
        "rejected_share": rejected / started if started and rejected is not None else None,
        "seconds": total if phases else seconds,
        "scoring_share": phases.get("reward", 0.0) / total if total else None,
    }


# the table as text


def render(runs: Sequence[Run], style: str = "text", baseline: str | None = None) -> str:
    """The table as aligned text, Markdown, JSON or CSV."""
    table = rows(runs, baseline)
    if style == "json":
        return json.dumps(table, indent=2)
    if style == "csv":
        return _as_csv(table)
    parts = [_scores_table(runs, table, style)]
    if any(row["paired"] for row in table):
        parts.append(_differences_table(table, style))
    return "\n\n".join(parts)


class Column(NamedTuple):
    """One column of a table for the eye."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    words: bool = False
    """Set on the left."""
    once: bool = False
    """It belongs to the run: said in the first of its rows alone."""


def _scores_table(runs: Sequence[Run], table: Sequence[Mapping[str, Any]], style: str) -> str:
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    one_metric = metrics[0] if len(metrics) == 1 else None
    filtered = len({(row["task"], row["metric"], row["filter"]) for row in table})
    several_filters = filtered > len({(row["task"], row["metric"]) for row in table})
    machines = _machines(runs)

    def cost(heading: str, name: str, spec: str) -> Column:
        return Column(heading, lambda row: number(row[name], spec), once=True)

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
    return _as_text(columns, table, style)


def _task_column(table: Sequence[Mapping[str, Any]]) -> list[Column]:
    several = len({row["task"] for row in table}) > 1
    return [Column("task", itemgetter("task"), words=True)] if several else []


def _value(row: Mapping[str, Any]) -> str:
    return number(row["value"], ".4f") + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


def _prompts(row: Mapping[str, Any]) -> str:
    """How many prompts a score is of, and whether that is all of them."""
    answered, whole = row["prompts"], row["prompts_in_all"]
    if answered is None:
        return ABSENT if row["limit"] is None else f"limit {row['limit']:g}"
    if whole is not None and whole != answered:
        return f"{answered:,} of {whole:,}"
    return f"{answered:,}" + ("" if row["limit"] is None else " (limit)")


def _differences_table(table: Sequence[Mapping[str, Any]], style: str) -> str:
    compared = [row for row in table if row["paired"]]
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
    return f"{title}\n\n{_as_text(columns, compared, style)}"


def _metric_and_filter(row: Mapping[str, Any]) -> str:
    return str(row["metric"]) + (f" ({row['filter']})" if row["filter"] not in ("", "none") else "")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["paired"]["low"], row["paired"]["high"]
    return ABSENT if low is None else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # never -0.0000


def _as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; what is nested in JSON has columns of its own."""
    empty = {"baseline": None, "difference": None, "low": None, "high": None, "prompts": None}
    flat = []
    for row in table:
        paired = {f"paired_{name}": value for name, value in (row["paired"] or empty).items()}
        more = {
            "hardware": "" if row["hardware"] is None else describe(row["hardware"]),
            "warnings": "; ".join(row["warnings"]),
        }
        models = {name: row["models"].get(name) for name in MODELS}
        flat.append({**{k: v for k, v in row.items() if k not in ("models", "paired")}, **more, **models, **paired})
    written = io.StringIO()
    writer = csv.DictWriter(written, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return written.getvalue().rstrip("\n")


def _as_text(columns: Sequence[Column], table: Sequence[Mapping[str, Any]], style: str) -> str:
    lines = [[column.heading for column in columns]]
    previous = None
    for row in table:
        lines.append(["" if column.once and row["path"] == previous else column.cell(row) for column in columns])
        previous = row["path"]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    set_, rule = [], []
    for column, width in zip(columns, widths, strict=True):
        set_.append(str.ljust if column.words else str.rjust)
        rule.append("-" * (width - 1) + ":" if style == "markdown" and not column.words else "-" * width)
    spread = [[put(cell, width) for put, cell, width in zip(set_, line, widths, strict=True)] for line in lines]
    spread.insert(1, rule)
    if style == "markdown":
        return "\n".join(f"| {' | '.join(cells)} |" for cells in spread)
    return "\n".join("  ".join(cells).rstrip() for cells in spread)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing: models, machines, partial tasks, warnings."""
    found: list[str] = []
    models = {tuple(run.models.items()) for run in runs if run.arguments}
    if len(models) == 1:
        pair = {name: value for name, value in next(iter(models)) if value}
        told = ", ".join(f"{name}={value}" for name, value in pair.items())
        demo = " (the demo pair, which knows nothing but small sums)" if EMBEDDED in pair.values() else ""
        found += [f"models: {told}{demo}"] if told else []
    machines = _machines(runs)
    found += [f"machine {letter}: {machine}" for machine, letter in machines.items()]
    if len(machines) > 1:
        found.append("not all runs used the same hardware: their seconds do not compare")
    limits = [f"{run.limit:g}" for run in runs if run.limit is not None]
    if limits:
        told = f"--limit was {', '.join(dict.fromkeys(limits))} in {len(limits)} of {counted(len(runs), 'run')}"
        found.append(f"{told}: these are not scores of the whole task")
    by_warning: dict[str, list[str]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        for warning in run.warnings:
            by_warning.setdefault(str(warning), []).append(label)
    found += [
        f"warning: {text}" + ("" if len(who) == len(runs) else f" ({'; '.join(who)})")
        for text, who in by_warning.items()
    ]
    return found


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What the numbers mean, a line for each task where Speculative Rejection meets Best-of-N on the same prompts.

    The best run of the first is held against the best of the second (plain sampling aside), both by their means.
    """
    found: dict[str, tuple[tuple[Score, Run, str], tuple[Score, Run, str]]] = {}
    told = [
        (score, run, label) for run, label in zip(runs, labels(runs), strict=True) for score in run.scores if score.each
    ]
    for ours in told:
        for theirs in told:
            rejects = ours[1].arguments.get("strategy") == "speculative_rejection"
            best_of_n = theirs[1].arguments.get("strategy") == "best_of_n" and theirs[1].arguments.get("n") != 1
            if not (rejects and best_of_n) or ours[0].comparable != theirs[0].comparable:
                continue
            # the same prompts, not merely common ones: means and tokens of other prompts do not compare
            if ours[0].each.keys() != theirs[0].each.keys():
                continue
            key = json.dumps([ours[0].comparable, sorted(ours[0].each)], default=str)
            if key not in found or [s.value for s, *_ in found[key]] < [ours[0].value, theirs[0].value]:
                found[key] = ours, theirs
    return [_conclusion(*pair, task=len(found) > 1) for pair in found.values()]


def _conclusion(ours: tuple[Score, Run, str], theirs: tuple[Score, Run, str], *, task: bool) -> str:
    (score, run, label), (other, rival, its_label) = ours, theirs
    gap = paired_difference(score.each, other.each)
    shares = all(0 <= value <= 1 for each in (score.each, other.each) for value in each.values())
    scale, digits, unit = (100, 1, " points") if shares else (1, 3, "")
    size = f"{abs(gap['difference']) * scale:.{digits}f}{unit} {'more' if gap['difference'] > 0 else 'less'} than"
    text = f"{label}: {size} {its_label}" if gap["difference"] else f"{label}: the same score as {its_label}"
    if gap["low"] is None:
        text += " (too few prompts for an interval)"
    else:
        chance = ", which includes 0: it may be chance" if gap["low"] <= 0 <= gap["high"] else ""
        low, high = (f"{round(gap[end] * scale, digits) + 0.0:+.{digits}f}" for end in ("low", "high"))  # never -0.0
        text += f" (95 % interval {low} to {high}{chance})"
    tokens, its_tokens = run.totals.get("decode_tokens"), rival.totals.get("decode_tokens")
    # a run's total is of all its tasks
    if tokens and its_tokens and all(len({s.task for s in each.scores}) == 1 for each in (run, rival)):
        text += f", for {tokens / its_tokens:.0%} of its decoded tokens"
    where = f" on {score.task} ({score.metric})" if task else f" ({score.metric})"
    return f"{text}{where}."


def _machines(runs: Sequence[Run]) -> dict[str, str]:
    """Each machine in words -> its letter in the table."""
    described = dict.fromkeys(describe(run.hardware) for run in runs if run.hardware)
    return {machine: chr(ord("A") + place % 26) for place, machine in enumerate(described)}


def describe(hardware: Any) -> str:
    if not isinstance(hardware, Mapping):
        return str(hardware)
    shown = {name: hardware[name] for name in MACHINE if hardware.get(name) is not None} or hardware
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def number(value: Any, spec: str) -> str:
    return format(value, spec) if lm_eval_files.is_number(value) else ABSENT


# the command


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
        "--format", choices=("text", "markdown", "json", "csv"), default="text", help="format of the table"
    )
    shown.add_argument(
        "--baseline", metavar="TEXT", help="part of the name of the run to compare with (default: the first)"
    )


def run(args: argparse.Namespace) -> int:
    runs = find_runs(*args.folder)
    print(render(runs, args.format, args.baseline))
    if args.format in ("text", "markdown") and (told := conclusions(runs)):
        print("\n" + "\n".join(told))
    if args.format in ("text", "markdown") and (remarks := notes(runs)):
        print("\n" + "\n".join(remarks))
    return 0
