"""One table, as HTML to sort, and as Markdown and LaTeX to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from specrej_eval.wording import inert, inert_latex, inert_markdown


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells are set on the left, numbers on the right."""

    name: str
    """Of its element, and of what a button copies."""
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    """How many columns are words, from the left."""


def number(value: float | None, spec: str, unit: str = "") -> Cell:
    return Cell("-") if value is None else Cell(f"{value:{spec}}{unit}", value)


def as_html(table: Table) -> str:
    def cell(place: int, found: Cell) -> str:
        name, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        look = "" if place < table.words else ' class="number"'
        value = "" if found.value is None else f' data-value="{found.value:.12g}"'
        return f"<{name}{scope}{look}{value}>{escape(inert(found.text))}</{name}>"

    heads = "".join(
        f'<th scope="col" class="{"words" if place < table.words else "number"}">'
        f'<button type="button" class="sort">{escape(inert(heading))}</button></th>'
        for place, heading in enumerate(table.headings)
    )
    lines = "\n".join(
        f"<tr>{''.join(cell(place, found) for place, found in enumerate(row))}</tr>" for row in table.rows
    )
    return (
        f'<div class="scroll"><table id="{table.name}" class="sortable"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>\n{_to_paste(table)}"
    )


def _to_paste(table: Table) -> str:
    parts = "".join(
        f'<h4>{name}</h4><pre id="{table.name}-{name.lower()}">{escape(text)}</pre>'
        f'<button type="button" class="copy" data-copy="{table.name}-{name.lower()}">Copy {name}</button>'
        for name, text in (("Markdown", as_markdown(table)), ("LaTeX", as_latex(table)))
    )
    return f'<details class="paste"><summary>to paste: Markdown, LaTeX</summary>{parts}</details>'


def as_markdown(table: Table) -> str:
    rules = ["---" if place < table.words else "---:" for place in range(len(table.headings))]
    lines = [[inert_markdown(heading) for heading in table.headings], rules]
    lines += [[inert_markdown(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_latex(table: Table) -> str:
    r"""For the package booktabs."""
    columns = "".join("l" if place < table.words else "r" for place in range(len(table.headings)))

    def line(texts: Sequence[str]) -> str:
        return f"{' & '.join(map(inert_latex, texts))} \\\\"

    body = [line([cell.text for cell in row]) for row in table.rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(list(table.headings)),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
