"""The page: one file, no network, and the same bytes for the same records.

What a machine measured (seconds, memory, and what is made of them) stands in one section, ``measured``: it is all that
may differ between a run that went through and one that was stopped and resumed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources

from specrej_eval.commands.report.comparison import conclusions
from specrej_eval.commands.report.notes import notes
from specrej_eval.commands.report.page import measures, viewer
from specrej_eval.commands.report.page.charts import NARROW, WIDE, scientific
from specrej_eval.commands.report.page.data import REWARD, Method, Metric, PageData
from specrej_eval.commands.report.page.figures import MOST_TASKS, Chapter, Figure
from specrej_eval.commands.report.page.measures import is_share, mean_of, spend
from specrej_eval.commands.report.page.scene import DARK, LIGHT, as_svg, style
from specrej_eval.commands.report.page.tables import Cell, Table, as_html, number
from specrej_eval.commands.report.runs import describe
from specrej_eval.commands.report.table import letters
from specrej_eval.evidence.bootstrap import Estimate
from specrej_eval.records.scores import Score
from specrej_eval.wording import counted, inert_page

JUDGED = {"win_rate": "win rate", "length_controlled_winrate": "length-controlled"}
"""Columns of alpaca_eval's leaderboards -> headings."""


def page(data: PageData, chapters: Sequence[Chapter], *, baseline: Method, megabytes: float) -> str:
    """The whole page as text."""
    styles, script = _style(), _file("page.js")
    rows = viewer.rows(data, megabytes)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(styles)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{', '.join(data.tasks[:3])}: {counted(len(data.methods), 'method')}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="generator" content="specrej-eval report --html">',
            f"<title>{_text(title)}</title>",
            f"<style>{styles}</style>",
            "</head>",
            "<body>",
            _header(data, title),
            "<main>",
            _summary(data, baseline),
            _section(
                data, chapters, "quality", "Quality for its cost",
                "Up is better, left is cheaper. FLOPs are of both models: decoding, reading the prompt, scoring.",
            ),
            _survival(data, chapters),
            _partial(data, chapters),
            _viewer(rows),
            _measured(data, chapters),
            "</main>",
            "<footer><p>Made from records by <code>specrej-eval report --html</code>. Intervals: 95 %, Wilson&#8217;s "
            "for shares of zeros and ones, else by bootstrap over prompts.</p></footer>",
            f'<script type="application/json" id="rows">{rows.json}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )  # fmt: skip


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _style() -> str:
    def variables(colours: dict[str, str]) -> str:
        return "".join(f"--{role}:{value};" for role, value in colours.items())

    dark = variables(DARK) + "color-scheme:dark"
    return "\n".join(
        [
            f":root{{{variables(LIGHT)}color-scheme:light}}",
            f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}",
            f":root[data-theme=dark]{{{dark}}}",
            _file("page.css"),
            style({}),
        ]
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: str) -> str:
    """Anybody's text, for HTML."""
    return escape(inert_page(text))


def _header(data: PageData, title: str) -> str:
    runs = [method.run for method in data.methods]
    told = "".join(f'<p class="conclusion">{_text(line)}</p>' for line in conclusions(runs))
    machines, others = _notes(data)
    del machines  # in the section of what was measured
    lines = [*others, *data.remarks]
    if len(data.tasks) > MOST_TASKS:
        lines.append(f"charts are of the first {MOST_TASKS} of {len(data.tasks)} tasks; the table has all")
    listed = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return (
        f'<header><div class="title"><h1>{_text(title)}</h1>'
        '<button type="button" id="theme" aria-label="light or dark">◐</button></div>'
        f'{told}<ul class="notes">{listed}</ul></header>'
    )


def _notes(data: PageData) -> tuple[list[str], list[str]]:
    """What is about machines, and what is not."""
    told = notes([method.run for method in data.methods])
    machines = [line for line in told if line.startswith(("machine ", "not all runs used"))]
    return machines, [line for line in told if line not in machines]


def _estimate(found: Estimate, *, share: bool, signed: bool = False) -> Cell:
    scale, spec, unit = (100.0, ".1f", " %") if share else (1.0, ".3f", "")
    sign = "+" if signed else ""

    def told(value: float) -> str:
        rounded = round(value * scale, 1 if share else 3) + 0.0  # never -0.0
        return f"{rounded:{sign}{spec}}"

    text = f"{told(found.value)}{unit if not signed else ''}"
    if found.low is not None and found.high is not None:
        text += f" [{told(found.low)}, {told(found.high)}]"
    return Cell(text, found.value)


def _summary(data: PageData, baseline: Method) -> str:
    parts = ['<section id="summary"><h2>In numbers</h2>']
    for place, task in enumerate(data.tasks):
        metrics = [metric for metric in data.metrics if metric.task == task]
        heading = f"<h3>{_text(task)}</h3>" if len(data.tasks) > 1 else ""
        parts.append(heading + as_html(_table(data, task, metrics, f"summary-{place}")))
    if judged := _judged(data):
        parts.append(judged)
    if found := measures.differences(data, baseline):
        shares = {metric: _is_share(data, metric) for metric in data.metrics}
        rivals = list(dict.fromkeys(each.baseline for each in found))
        lines = [
            [
                Cell(each.method),
                *([Cell(each.baseline)] if len(rivals) > 1 else []),
                Cell(f"{each.metric.task}: {each.metric.label}" if len(data.tasks) > 1 else each.metric.label),
                _estimate(each.estimate, share=shares[each.metric], signed=True),
                number(each.prompts, ",d"),
            ]
            for each in found
        ]
        against = ["against"] if len(rivals) > 1 else []
        heads = ["run", *against, "of", "difference [95 % interval]", "prompts"]
        table = Table("differences", heads, lines, words=2 + len(against))
        name = baseline.run.name if len(rivals) == 1 else f"{baseline.run.label}, of the same seed"
        parts.append(
            f"<h3>Against {_text(name)}</h3>"
            "<p>Prompt by prompt (shares in points of a hundred). Where the interval holds 0, it may be chance.</p>"
            + as_html(table)
        )
    return "\n".join([*parts, "</section>"])


def _judged(data: PageData) -> str:
    """What alpaca_eval's judges say of whole runs, with the length control that no single answer has."""
    lines = []
    for method in data.methods:
        of_judge: dict[str, dict[str, Score]] = {}
        for score in method.run.scores:
            if score.metric in JUDGED:
                of_judge.setdefault(score.filter, {})[score.metric] = score
        for judge, scores in of_judge.items():
            told = [scores.get(metric) for metric in JUDGED]
            prompts = next((score.prompts for score in told if score is not None and score.prompts is not None), None)
            tokens = [answer.num_tokens for answer in method.answers.values()]
            lines.append(
                [
                    Cell(method.short),
                    Cell(judge),
                    *(Cell("-") if score is None else _with_error(score.value, score.stderr) for score in told),
                    number(sum(tokens) / len(tokens) if tokens else None, ",.1f"),
                    number(prompts, ",d"),
                ]
            )
    if not lines:
        return ""
    heads = ["run", "judge", *JUDGED.values(), "tokens an answer", "prompts"]
    return (
        "<h3>As judges of alpaca_eval have it</h3><p>Win rates against the reference, in per cent, each with its "
        "standard error. Judges like long answers: length control is alpaca_eval&#8217;s, a fit over all prompts.</p>"
        + as_html(Table("judged", heads, lines, words=2))
    )


def _with_error(value: float | None, error: float | None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}"), value)


def _is_share(data: PageData, metric: Metric) -> bool:
    values = [value for method in data.methods for value in method.each(metric).values()]
    return metric.name != REWARD and is_share(values)


def _table(data: PageData, task: str, metrics: Sequence[Metric], name: str) -> Table:
    headings = ["run", *(metric.label for metric in metrics)]
    headings += ["tokens decoded", "reward tokens", "FLOPs", "rows", "rejected", "prompts"]
    shares = [_is_share(data, metric) for metric in metrics]
    lines = []
    for method in data.methods:
        found = spend(method, task)
        cells = [Cell(method.short)]
        for metric, share in zip(metrics, shares, strict=True):
            values = list(method.each(metric).values())
            cells.append(_estimate(mean_of(values), share=share) if values else Cell("-"))
        if found is None:
            cells += [Cell("-")] * 6
        else:
            cells += [
                number(found.decode_tokens, ",.0f"),
                number(found.reward_tokens, ",.0f"),
                Cell("-") if found.flops is None else Cell(scientific(found.flops), found.flops),
                number(found.rows, ",.4g"),
                number(100 * found.rejected_share, ".1f", " %"),
                number(sum(1 for _ in method.of_task(task)), ",d"),
            ]
        lines.append(cells)
    return Table(name, headings, lines)


def _figure(figure: Figure) -> str:
    drawn = "\n".join(
        as_svg(figure.draw(width), extra_class=look) for width, look in ((WIDE, " wide"), (NARROW, " narrow"))
    )
    return (
        f'<figure id="{escape(figure.name)}"><h4>{_text(figure.title)}</h4>\n{drawn}\n'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _charts(data: PageData, chapters: Sequence[Chapter], kind: str) -> str:
    parts = []
    for chapter in chapters:
        if chapter.kind == kind and chapter.figures:
            heading = f"<h3>{_text(chapter.task)}</h3>" if len(data.tasks) > 1 else ""
            parts.append(f'{heading}<div class="charts">{"".join(map(_figure, chapter.figures))}</div>')
    return "\n".join(parts)


def _section(data: PageData, chapters: Sequence[Chapter], kind: str, title: str, told: str) -> str:
    drawn = _charts(data, chapters, kind)
    lead = f"<p>{told}</p>" if told else ""
    if kind == "quality" and any(method.answers and method.sizes is None for method in data.methods):
        lead += "<p>No FLOPs where a run does not say how large its models are (older versions, other models).</p>"
    return f'<section id="{kind}"><h2>{title}</h2>{lead}{drawn}</section>' if drawn else ""


def _survival(data: PageData, chapters: Sequence[Chapter]) -> str:
    drawn = _charts(data, chapters, "survival")
    if not drawn:
        return ""
    parts = [f'<section id="survival"><h2>What looks reject, and what it saves</h2>{drawn}']
    lines = []
    for task in data.tasks:
        for method in data.methods:
            for look in measures.looks(method, task):
                lines.append(
                    [
                        Cell(method.short),
                        *([Cell(task)] if len(data.tasks) > 1 else []),
                        number(look.number, "d"),
                        number(look.prompts, ",d"),
                        number(look.tokens, ".1f"),
                        number(look.rows, ".1f"),
                        number(look.finished, ".1f"),
                        number(look.rejected, ".1f"),
                        number(look.kept, ".1f"),
                        number(look.cut, ".3f"),
                        number(look.kv_tokens, ",.0f"),
                    ]
                )
    several = ["task"] if len(data.tasks) > 1 else []
    heads = [
        "run",
        *several,
        "look",
        "prompts",
        "tokens",
        "rows",
        "finished",
        "rejected",
        "kept",
        "cut at",
        "KV tokens",
    ]
    parts.append(
        "<details><summary>look by look</summary><p>Means over the prompts that had so many looks. Cut at: score of "
        "the worst row kept. KV tokens: most that one prompt held.</p>"
        + as_html(Table("looks", heads, lines, words=1 + len(several)))
        + "</details>"
    )
    return "\n".join([*parts, "</section>"])


def _partial(data: PageData, chapters: Sequence[Chapter]) -> str:
    drawn = _charts(data, chapters, "partial")
    if not drawn:
        told = "These records have no score of an unfinished row that was finished later."
        return f'<section id="partial"><h2>Do partial scores tell the end?</h2><p>{told}</p></section>'
    lines = []
    for task in data.tasks:
        for method in data.methods:
            for look in measures.partial_scores(method, task):
                quartiles = [*(look.pearson or (None,) * 3), *(look.kendall or (None,) * 3)]
                lines.append(
                    [
                        Cell(method.short),
                        *([Cell(task)] if len(data.tasks) > 1 else []),
                        number(look.look, "d"),
                        number(look.tokens, "g"),
                        number(look.rows, ",d"),
                        number(look.prompts, ",d"),
                        *(number(value, ".2f") for value in quartiles),
                    ]
                )
    several = ["task"] if len(data.tasks) > 1 else []
    heads = ["run", *several, "look", "tokens", "rows", "prompts"]
    heads += ["r, lower quartile", "r, median", "r, upper quartile", "tau, lower", "tau, median", "tau, upper"]
    table = as_html(Table("partial-scores", heads, lines, words=1 + len(several)))
    return (
        '<section id="partial"><h2>Do partial scores tell the end?</h2>'
        "<p>Correlations are made prompt by prompt and never pooled: easy prompts would make any score look good.</p>"
        f"{drawn}<details><summary>look by look</summary>{table}</details></section>"
    )


def _viewer(rows: viewer.Rows) -> str:
    told = "".join(f'<p class="note">{_text(note)}</p>' for note in rows.notes)
    side = (
        '<div class="side"><label>method <select class="method"></select></label>'
        '<div class="panel" aria-live="polite"></div></div>'
    )
    return (
        '<section id="viewer"><h2>Rows</h2><p>One prompt, all its rows, their score at each look. A row opens on a '
        f"click.</p>{told}<noscript><p>The viewer needs JavaScript; everything above does not.</p></noscript>"
        '<div class="controls"><button type="button" id="previous" aria-label="previous prompt">←</button>'
        '<label class="grow">prompt <select id="prompt"></select></label>'
        '<button type="button" id="next" aria-label="next prompt">→</button>'
        '<label>order <select id="order"><option value="run">as run</option>'
        '<option value="gap">largest difference of reward first</option></select></label></div>'
        f'<details class="question"><summary>the prompt</summary><pre id="question"></pre></details>'
        f'<div class="sides">{side}{side}</div></section>'
    )


def _measured(data: PageData, chapters: Sequence[Chapter]) -> str:
    machines, _ = _notes(data)
    listed = "".join(f"<li>{_text(line)}</li>" for line in machines)
    named = letters([method.run.hardware for method in data.methods])
    lines = []
    for task in data.tasks:
        for method in data.methods:
            if (found := spend(method, task)) is None:
                continue
            peak = max((ledger.peak_bytes for ledger in method.measured(task)), default=0)
            seconds, scoring = found.seconds, found.scoring_seconds
            decoded = sum(ledger.decode_tokens for ledger in method.measured(task))
            spent = sum(ledger.total_seconds for ledger in method.measured(task))
            lines.append(
                [
                    Cell(method.short),
                    *([Cell(task)] if len(data.tasks) > 1 else []),
                    Cell(named.get(describe(method.run.hardware), "-") if method.run.hardware else "-"),
                    number(seconds, ",.3f"),
                    number(100 * scoring / seconds if seconds and scoring is not None else None, ".0f", " %"),
                    number(decoded / spent if spent else None, ",.0f"),
                    number(peak / 2**30 if peak else None, ",.2f"),
                    number(len(method.measured(task)), ",d"),
                ]
            )
    several = ["task"] if len(data.tasks) > 1 else []
    heads = [
        "run",
        *several,
        "machine",
        "seconds per prompt",
        "scoring",
        "tokens a second",
        "peak GiB",
        "prompts timed",
    ]
    table = as_html(Table("times", heads, lines, words=2 + len(several))) if lines else ""
    return (
        '<section id="measured"><h2>Measured on the machine</h2><p>Seconds are a prompt&#8217;s share of the steps it '
        "ran in: of this machine, and of what else ran on it. All else on this page stays as it is where a run is "
        f'stopped and resumed, or made again.</p><ul class="notes">{listed}</ul>{_charts(data, chapters, "seconds")}'
        f"{_charts(data, chapters, 'phases')}{table}</section>"
    )
