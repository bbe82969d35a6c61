"""Which charts a page has: each with its name, its caption, and how it is drawn at any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specrej_eval.commands.report.page import charts
from specrej_eval.commands.report.page.charts import Agreements, Bars, Cloud, Curve, Point, in_short
from specrej_eval.commands.report.page.data import REWARD, Method, Metric, PageData
from specrej_eval.commands.report.page.measures import (
    PartialScores,
    Spend,
    comparable,
    every,
    is_share,
    mean_of,
    partial_scores,
    spend,
    survival,
)
from specrej_eval.commands.report.page.scene import Scene
from specrej_eval.core import PHASES
from specrej_eval.paths import file_name

MOST_TASKS = 3
"""Tasks that are drawn; tables have all."""
MOST_METRICS = 3
"""Metrics of one task that are drawn."""
MOST_CURVES, MOST_BARS = 12, 24
"""Methods in a chart of lines or bars; the tables have all."""
MOST_SCATTERS = 4
"""Methods whose partial scores are drawn."""
FEWEST = 20
"""Prompts with a correlation below which one is not drawn where another has more."""
COSTS: dict[str, tuple[str, Callable[[Spend], float | None]]] = {
    "tokens": ("tokens decoded per prompt", lambda found: found.decode_tokens),
    "flops": ("FLOPs per prompt", lambda found: found.flops),
    "seconds": ("seconds per prompt", lambda found: found.seconds),
}


@dataclass(frozen=True)
class Figure:
    """One chart."""

    name: str
    """Of its file, without an ending."""
    title: str
    caption: str
    draw: Callable[[int], Scene]
    """Width -> the chart."""


@dataclass(frozen=True)
class Chapter:
    """Charts of one kind for one task."""

    kind: str
    task: str
    figures: Sequence[Figure]


def chapters(data: PageData) -> list[Chapter]:
    """All charts, by kind and task."""
    found = []
    for task in data.tasks[:MOST_TASKS]:
        metrics = [metric for metric in data.metrics if metric.task == task][:MOST_METRICS]
        for kind, costs in (("quality", ("tokens", "flops")), ("seconds", ("seconds",))):
            told = [pareto(data, metric, cost) for cost in costs for metric in metrics]
            found.append(Chapter(kind, task, [figure for figure in told if figure is not None]))
        found.append(Chapter("survival", task, [*_survival(data, task), *_tokens(data, task)]))
        found.append(Chapter("partial", task, _partial(data, task)))
        found.append(Chapter("phases", task, _phases(data, task)))
    return found


def _name(task: str, data: PageData, *parts: str) -> str:
    told = "-".join(parts) if len(data.tasks) < 2 else "-".join((task, *parts))
    return file_name(told.replace(" ", "-")).strip("-")


def pareto(data: PageData, metric: Metric, cost: str) -> Figure | None:
    """Quality against one cost; None where fewer than one method has both."""
    label, take = COSTS[cost]
    points = []
    values: list[float] = []
    drawn = [method for method in data.methods if method.each(metric)]
    others = [method for method in drawn if not comparable(metric, method, drawn[0])]
    for method in drawn:
        if method in others:
            continue
        each = list(method.each(metric).values())
        found = spend(method, metric.task)
        price = None if found is None else take(found)
        if not each or price is None:
            continue
        mean = mean_of(each)
        values += each
        ends = "" if mean.low is None or mean.high is None else f" [{mean.low:.4g}, {mean.high:.4g}]"
        title = f"{method.run.name}: {mean.value:.4g}{ends} at {in_short(price)} {label}"
        points.append(Point(method.short, method.family, price, mean.value, mean.low, mean.high, title))
    if not points:
        return None
    share = is_share(values)
    what = f"mean {metric.label}" if metric.name == REWARD else metric.label
    return Figure(
        name=_name(metric.task, data, metric.label, "against", cost),
        title=f"{what.removeprefix('mean ')} against {label}",
        caption="Bars are 95 % intervals over prompts. Filled: no other is both cheaper and better."
        + (
            f" Of {len(points)} methods, those that none beats are named and have bars."
            if len(points) > charts.MOST_NAMES
            else ""
        )
        + ("" if not others else f" Left out, scored by another reward model: {'; '.join(m.short for m in others)}."),
        draw=lambda width: charts.pareto(
            f"{what} against {label}", points, x_label=label, y_label=what, share=share, width=width
        ),
    )


def _first_of(data: PageData, most: int) -> str:
    """What a caption says where not all methods are drawn."""
    return f" The first {most} of {len(data.methods)} methods." if len(data.methods) > most else ""


def _survival(data: PageData, task: str) -> list[Figure]:
    told = [(method, survival(method, task)) for method in data.methods[:MOST_CURVES]]
    curves = [Curve(method.short, method.family, points) for method, points in told if points]
    if not curves:
        return []
    return [
        Figure(
            name=_name(task, data, "survival"),
            title="Rows that no look has rejected yet",
            caption="Share of all rows started, each prompt weighted alike. A step is a look that rejects rows."
            + _first_of(data, MOST_CURVES),
            draw=lambda width: charts.survival("rows not rejected", curves, width=width),
        )
    ]


def _partial(data: PageData, task: str) -> list[Figure]:
    """Methods of which enough prompts have a correlation; else those that have rows at all."""
    found = [(m, looks[0]) for m in data.methods if (looks := partial_scores(m, task)) and looks[0].answers]
    telling = [(method, look) for method, look in found if look.prompts >= FEWEST]
    drawn = [_scatter(data, task, method, look) for method, look in (telling or found)[:MOST_SCATTERS]]
    lines = []
    for method, _ in telling[:MOST_SCATTERS]:
        along = [look for look in partial_scores(method, task) if look.prompts >= FEWEST]
        lines.append(Agreements(method.short, method.family, [(look.tokens, *look.pearson) for look in along]))
    if lines:
        drawn.append(
            Figure(
                name=_name(task, data, "correlation"),
                title="partial with final score, look by look",
                caption="Medians over prompts, and their middle half, where at least "
                f"{FEWEST} prompts have a correlation.",
                draw=lambda width: charts.correlations("correlation by look", lines, width=width),
            )
        )
    return drawn


def _scatter(data: PageData, task: str, method: Method, look: PartialScores) -> Figure:
    cloud = Cloud(every(look.points), every(look.answers))
    shown, in_all = len(cloud.points) + len(cloud.answers), len(look.points) + len(look.answers)
    caption = (
        f"Look {look.look} ({look.tokens:g} tokens, the median) against the end; each score less its prompt's mean."
    )
    if look.pearson and look.kendall:
        low, middle, high = look.pearson
        caption += (
            f" Pearson's r, prompt by prompt: median {middle:.2f}, middle half {low:.2f} to {high:.2f}; "
            f"Kendall's tau-b: median {look.kendall[1]:.2f} ({look.prompts} prompts)."
        )
    else:
        caption += " Too few rows of a prompt finished for a correlation."
    if method.family == "rejecting":
        caption += " Only rows that were kept have a final score, so r is smaller than over all rows."
    if shown < in_all:
        caption += f" {shown:,} of {in_all:,} rows are drawn, evenly picked."
    return Figure(
        name=_name(task, data, "partial-final", method.short),
        title=f"{method.short}: partial and final score",
        caption=caption,
        draw=lambda width: charts.scatter(
            f"partial and final score, {method.short}",
            cloud,
            x_label="partial score, less its prompt's mean",
            y_label="final score, less its prompt's mean",
            role=method.family,
            width=width,
        ),
    )


def _tokens(data: PageData, task: str) -> list[Figure]:
    found = [(m, spent) for m in data.methods[:MOST_BARS] if (spent := spend(m, task)) is not None]
    rows = [Bars(m.short, (s.decode_tokens, s.reward_tokens, s.prompt_tokens)) for m, s in found]
    names = ("decoded", "read by the reward model", "prompt")
    return [] if not rows else [_bars(data, task, "tokens", "Where tokens go", rows, names, "tokens per prompt")]


def _phases(data: PageData, task: str) -> list[Figure]:
    """What was measured on the machine: seconds by phase, and memory."""
    seconds, memory = [], []
    for method in data.methods[:MOST_BARS]:
        ledgers = method.measured(task)
        if ledgers:
            split = [sum(ledger.seconds.get(phase, 0.0) for ledger in ledgers) / len(ledgers) for phase in PHASES]
            by_phase = dict(zip(PHASES, split, strict=True))
            seconds.append(Bars(method.short, [by_phase[phase] for phase in ("decode", "reward", "prefill", "other")]))
            memory.append(Bars(method.short, [max(ledger.peak_bytes for ledger in ledgers) / 2**30]))
    if not seconds:
        return []
    names = ("decode", "scoring", "prefill", "other")
    told = [_bars(data, task, "time", "Where time goes", seconds, names, "seconds per prompt")]
    if any(row.parts[0] for row in memory):
        told.append(_bars(data, task, "memory", "Peak memory", memory, ("peak",), "GiB"))
    return told


def _bars(
    data: PageData, task: str, name: str, title: str, rows: Sequence[Bars], names: Sequence[str], label: str
) -> Figure:
    return Figure(
        name=_name(task, data, name),
        title=title,
        caption=("Means over prompts." if len(names) > 1 else "Of the process (CPU) or allocated by torch (GPU).")
        + _first_of(data, MOST_BARS),
        draw=lambda width: charts.bars(title, rows, names, x_label=label, width=width),
    )
