"""A comparison for the eye: in a terminal, as plain text, as Markdown. All from its plain data: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from specrej_eval.wording import counted, inert, inert_markdown

ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is words, the others numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Those that have something to say."""
    made = [_quality(report), _costs(report), _rejection(report), _of_paper(report), _curve(report), _judged(report)]
    return [table for table in made if table is not None]


def headline(report: Mapping[str, Any]) -> str:
    """What was compared."""
    prompts = counted(len(report["prompts"]), "prompt")
    seeds = f"seed {report['seeds'][0]}" if len(report["seeds"]) == 1 else f"{len(report['seeds'])} seeds"
    where = f" of {report['task']['name']}" if report.get("task") else ""
    marked = "SIMULATED: " if report["simulated"] else ""
    return f"{marked}{counted(len(report['methods']), 'method')} on {prompts}{where}, {seeds}; 95 % intervals, paired"


def conclusion(report: Mapping[str, Any]) -> str | None:
    """What to conclude of the best method that rejects rows, held against Best-of-N with as many."""
    known = {method["name"]: method for method in report["methods"]}
    found = [
        (method, against)
        for method in report["methods"]
        for against in method["against"]
        if known[against["method"]]["strategy"] == "best_of_n"
        and method["strategy"] != "best_of_n"
        and against["scores"]
    ]
    same_n = [(method, against) for method, against in found if known[against["method"]]["n"] == method["n"]]
    if not (same_n or found):
        return None
    pairs = same_n or found
    name = _score_of(report)
    if not all(name in against["scores"] for _, against in pairs):  # then methods would be ranked by different scores
        name = "reward"
        pairs = [pair for pair in pairs if name in pair[1]["scores"]]
    if not pairs:
        return None
    method, against = max(pairs, key=lambda pair: (_value(_score(pair[0], name)), -_tokens(pair[0])))
    score = against["scores"][name]
    scale, unit = (100, " points") if name in _shares(report) else (1, "")
    ends = "too few prompts for an interval"
    if score["low"] is not None:
        ends = f"95 % interval {scale * score['low']:+.3g} to {scale * score['high']:+.3g}"
        if score["low"] <= 0 <= score["high"]:
            ends += ", which includes 0: it may be chance"
        elif score["p_holm"] >= 0.05:  # the best of several is best by luck, too
            ends += f", but p is {score['p_holm']:.2g} after Holm's correction: it may be chance"
    best_of = f", the best of {len(pairs)} that reject rows," if len(pairs) > 1 else ""
    tokens = against["cost_ratios"].get("decode_tokens")
    cost = "" if tokens is None else f", for {tokens['value']:.0%} of its decoded tokens"
    rival = known[against["method"]]["label"]
    gap = f"{scale * score['value']:+.3g}{unit} of {name}"
    return f"{method['label']}{best_of} against {rival}: {gap} ({ends}){cost}."


def print_tables(report: Mapping[str, Any], notes: Sequence[str], *, file: TextIO) -> None:
    """With rich where there is a terminal, else as plain text."""
    if file.isatty():
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=file, highlight=False)
        console.print(Text(inert(headline(report)), style="bold"))
        for table in tables(report):
            shown = RichTable(title=Text(inert(table.title)), title_justify="left", header_style="bold")
            for place, heading in enumerate(table.headings):
                shown.add_column(Text(inert(heading)), justify="right" if place else "left", no_wrap=not place)
            for row in table.rows:
                shown.add_row(*(Text(inert(cell)) for cell in row))
            console.print(shown)
        for line in _below(report, notes):
            console.print(Text(inert(line)))
        return
    print(as_text(report, notes), file=file)


def as_text(report: Mapping[str, Any], notes: Sequence[str]) -> str:
    parts = [inert(headline(report))]
    for table in tables(report):
        lines = [[inert(cell) for cell in row] for row in (table.headings, *table.rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(table.headings))]
        lines.insert(1, ["-" * width for width in widths])
        told = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        parts.append("\n".join([inert(table.title), *(line.rstrip() for line in told)]))
    parts.append("\n".join(map(inert, _below(report, notes))))
    return "\n\n".join(filter(None, parts))


def as_markdown(report: Mapping[str, Any], notes: Sequence[str]) -> str:
    parts = [f"**{inert_markdown(headline(report))}**"]
    for table in tables(report):
        rows = [table.headings, [":--", *["--:"] * (len(table.headings) - 1)], *table.rows]
        lines = [
            "| " + " | ".join(cell if place == 1 else inert_markdown(cell) for cell in row) + " |"
            for place, row in enumerate(rows)
        ]
        parts.append("\n".join([f"### {inert_markdown(table.title)}", "", *lines]))
    parts.append("\n\n".join(map(inert_markdown, _below(report, notes))))
    return "\n\n".join(filter(None, parts))


def _below(report: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    told = conclusion(report)
    return [*notes, *([told] if told else [])]


# the tables


def _quality(report: Mapping[str, Any]) -> Table:
    names = _metrics(report)
    shares = _shares(report)
    baseline = report["baseline"]
    named = next(method["label"] for method in report["methods"] if method["name"] == baseline)
    score = _score_of(report)
    scale = 100 if score in shares else 1

    def difference(method: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found = next((each for each in method["against"] if each["method"] == baseline), None)
        return None if found is None else found["scores"].get(score)

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("method", lambda method: method["label"])]
    for name in names:
        columns.append((name, _reader(name, percent=name in shares)))
    columns += [
        ("reward", lambda method: _interval(method["reward"], 3)),
        (f"{score} - {named}", lambda method: _interval(difference(method), 1 if scale > 1 else 3, scale, sign=True)),
        ("p (Holm)", lambda method: ABSENT if not (d := difference(method)) else _p(d["p_holm"])),
        ("equivalent N", lambda method: _equivalent(method.get("equivalent_n"))),
        ("KL ≤", lambda method: f"{method['kl_bound']:.2f}"),
    ]
    return _made("What the answers are worth", columns, report)


def _reader(name: str, *, percent: bool) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: _interval(method["metrics"].get(name), 1 if percent else 3, 100 if percent else 1)


def _costs(report: Mapping[str, Any]) -> Table:
    def cost(name: str, digits: int = 0, scale: float = 1) -> Callable[[Mapping[str, Any]], str]:
        def read(method: Mapping[str, Any]) -> str:
            found = method["costs"].get(name)
            return ABSENT if found is None or found["value"] is None else f"{found['value'] * scale:,.{digits}f}"

        return read

    def ratio(name: str) -> Callable[[Mapping[str, Any]], str]:
        def read(method: Mapping[str, Any]) -> str:
            found = next((each for each in method["against"] if each["method"] == report["baseline"]), None)
            value = None if found is None else found["cost_ratios"].get(name)
            return ABSENT if value is None or value["value"] is None else f"{value['value']:.0%}"

        return read

    def seconds(method: Mapping[str, Any]) -> str:
        time = method["time"]
        return ABSENT if time is None else f"{time['seconds']['value']:.3g}"

    def peak(method: Mapping[str, Any]) -> str:
        time = method["time"]
        return ABSENT if time is None else f"{time['peak_bytes'] / 1e9:.2f}"

    columns = [
        ("method", lambda method: method["label"]),
        ("tokens", cost("decode_tokens")),
        ("share", ratio("decode_tokens")),
        ("reward tokens", cost("reward_tokens")),
        ("GFLOPs", cost("flops", 2, 1e-9)),
        ("share", ratio("flops")),
        ("seconds*", seconds),
        ("share", ratio("seconds")),
        ("KV tokens", cost("kv_tokens")),
        ("peak GB*", peak),
    ]
    named = next(method["label"] for method in report["methods"] if method["name"] == report["baseline"])
    timed = sorted({method["time"]["prompts"] for method in report["methods"] if method["time"] is not None})
    told = f"; *{' to '.join(map(str, timed))} prompts a seed decoded for the method alone" if timed else ""
    return _made(f"What a prompt costs (share: of {named}{told})", columns, report)


def _rejection(report: Mapping[str, Any]) -> Table | None:
    if not any("regret" in method for method in report["methods"]):
        return None

    def look(name: str) -> Callable[[Mapping[str, Any]], str]:
        def read(method: Mapping[str, Any]) -> str:
            looks = method.get("partial_scores") or []
            return ABSENT if not looks or looks[0][name] is None else f"{looks[0][name]['mean']:.2f}"

        return read

    columns = [
        ("method", lambda method: method["label"]),
        ("looks", lambda method: f"{method['costs']['looks']['value']:.1f}"),
        ("rejected", lambda method: f"{method['costs']['rejected']['value']:.0%}"),
        ("regret", lambda method: _interval(method["regret"], 3)),
        ("best row kept", lambda method: _interval(method["best_survived"], 0, 100)),
        ("Pearson", look("pearson")),
        ("Kendall", look("kendall")),
        ("AUC", look("auc")),
        ("recall", look("recall")),
    ]
    return _made(
        "What rejection loses (correlations: partial with final reward at the first look, means over prompts)",
        columns,
        report,
        lambda method: "regret" in method,
    )


def _of_paper(report: Mapping[str, Any]) -> Table | None:
    known = [method for method in report["methods"] if method["paper"]]
    if not known:
        return None

    def read(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda method: _interval((method["paper"] or {}).get(name), digits)

    of, labels = known[0]["paper"], _labels(report)
    return _made(
        f"The paper's numbers (improvement score and relative compute by {labels[of['smallest']]}, speedup by "
        f"{labels[of['largest']]})",
        [
            ("method", lambda method: method["label"]),
            ("improvement score", read("improvement_score", 1)),
            ("relative compute", read("relative_compute", 2)),
            ("speedup", read("speedup", 2)),
        ],
        report,
    )


def _curve(report: Mapping[str, Any]) -> Table | None:
    curve = report["curve"]
    if curve is None:
        return None
    shares = _shares(report)
    shown = [place for place, k in enumerate(curve["ks"]) if k & (k - 1) == 0 or k == curve["ks"][-1]]
    names = list(curve["metrics"])
    headings = ["k", *names, "reward", "tokens"]
    rows = [
        [
            f"{curve['ks'][place]}" + ("" if curve["ks"][place] <= curve["steady"] else " †"),
            *(
                _interval(curve["metrics"][name][place], 1 if name in shares else 3, 100 if name in shares else 1)
                for name in names
            ),
            _interval(curve["reward"][place], 3),
            f"{curve['decode_tokens'][place]:,.0f}",
        ]
        for place in shown
    ]
    few = " († few subsets)" if any(curve["ks"][place] > curve["steady"] for place in shown) else ""
    return Table(f"Best-of-k, from all subsets of the rows of {_labels(report)[curve['pool']]}{few}", headings, rows)


def _judged(report: Mapping[str, Any]) -> Table | None:
    known = [name for name in ("win_rate", "perplexity") if any(name in method for method in report["methods"])]
    if not known:
        return None
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("method", lambda method: method["label"])]
    if "win_rate" in known:
        columns.append(("win rate %", lambda method: _interval(method.get("win_rate"), 1, 100)))
        columns.append(("length", lambda method: f"{method['costs']['answer_tokens']['value']:.1f}"))
    if "perplexity" in known:
        columns.append(("perplexity", lambda method: _interval(method.get("perplexity"), 3)))
    return _made("The answers, judged by others", columns, report, lambda method: any(name in method for name in known))


def _made(
    title: str,
    columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]],
    report: Mapping[str, Any],
    of: Callable[[Mapping[str, Any]], bool] = lambda method: True,
) -> Table:
    """Without the columns that have nothing to say."""
    methods = [method for method in report["methods"] if of(method)]
    cells = [[read(method) for method in methods] for _, read in columns]
    kept = [place for place, column in enumerate(cells) if place == 0 or any(cell != ABSENT for cell in column)]
    rows = [[cells[place][row] for place in kept] for row in range(len(methods))]
    return Table(title, [columns[place][0] for place in kept], rows)


# cells


def _interval(found: Mapping[str, Any] | None, digits: int, scale: float = 1, *, sign: bool = False) -> str:
    if found is None or found["value"] is None:
        return ABSENT
    spec = f"{'+' if sign else ''}.{digits}f"

    def told(value: float) -> str:
        return format(round(value * scale, digits) + 0.0, spec)  # never -0.0

    ends = found.get("low"), found.get("high")
    return told(found["value"]) + ("" if None in ends else f" [{told(ends[0])}, {told(ends[1])}]")  # type: ignore[arg-type]


def _equivalent(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return ABSENT

    def told(value: Any) -> str:
        if isinstance(value, Mapping):
            return "< 1" if "below" in value else f"≥ {value['at_least']}"
        return f"{value:.1f}"

    ends = [found["low"], found["high"]]
    return told(found["value"]) + ("" if None in ends else f" [{told(ends[0])}, {told(ends[1])}]")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _metrics(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for method in report["methods"] for name in method["metrics"]))


def _shares(report: Mapping[str, Any]) -> set[str]:
    """Metrics that are shares of 1."""
    values: dict[str, list[float]] = {}
    for method in report["methods"]:
        for cell in method["cells"]:
            for name, of_prompts in cell["metrics"].items():
                values.setdefault(name, []).extend(of_prompts)
    return {name for name, found in values.items() if found and all(0 <= value <= 1 for value in found)}


def _labels(report: Mapping[str, Any]) -> dict[str, str]:
    return {method["name"]: method["label"] for method in report["methods"]}


def _score_of(report: Mapping[str, Any]) -> str:
    """What methods are judged by: the task's first metric, else the reward."""
    better = (report.get("task") or {}).get("higher_is_better", {})
    return next((name for name in _metrics(report) if better.get(name, True)), "reward")


def _score(method: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = method["metrics"].get(name) or method["reward"]
    return found


def _value(found: Mapping[str, Any]) -> float:
    return float("-inf") if found["value"] is None else float(found["value"])


def _tokens(method: Mapping[str, Any]) -> float:
    return float(method["costs"]["decode_tokens"]["value"])
