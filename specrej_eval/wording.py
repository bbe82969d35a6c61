"""Numbers and quoted texts as messages write them. What was read somewhere is shown so that it can do nothing there.

The texts of prompts, answers and records are anybody's: a model may write ANSI sequences that rewrite the terminal, and
a benchmark's name may be a spreadsheet's formula. Whatever shows such a text passes it through the function of the
place it is shown in.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

_FORMULA = re.compile(r"\s*[=+\-@\t\r\n|%\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?")
_MARKDOWN = re.compile(r"([\\`*\[\]|~$])")
"""Not the underscore: within a name, where ours stand, it is none of Markdown's."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 answer``, ``1,200 answers``; ``plural`` where it takes more than an s, a verb for one."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def start_of(text: Any) -> str:
    """The beginning of an instruction or answer, for a message."""
    return repr(shortened(" ".join(str(text).split())))


def shortened(text: str, most: int = 60) -> str:
    """At most so many characters; where some are left out, it ends with three dots."""
    return text if len(text) <= most else text[: most - 3] + "..."


def inert(text: str) -> str:
    r"""A text for the terminal or a log, in one line: what is not printable (control characters, line breaks, marks
    that turn the direction of writing, lone surrogates) is shown as an escape.

    >>> inert("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def inert_lines(text: str) -> str:
    """As ``inert``, but line breaks and tabs stay: for a message of several lines."""
    return "".join(mark if mark in "\n\t" else inert(mark) for mark in text)


def inert_markdown(text: str) -> str:
    r"""A text for a cell of a Markdown table: no markup, no HTML, no further cell.

    >>> inert_markdown("[a](b) | <i>")
    '\\[a\\](b) \\| &lt;i&gt;'
    """
    return _MARKDOWN.sub(r"\\\1", html.escape(inert(text), quote=False))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
}


def inert_latex(text: str) -> str:
    r"""A text for a LaTeX table: no command, no further cell.

    >>> inert_latex(r"\input{a} & 5 %")
    '\\textbackslash{}input\\{a\\} \\& 5 \\%'
    """
    return "".join(_LATEX.get(mark, mark) for mark in inert(text))


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
)


def inert_page(text: str) -> str:
    r"""A text for a web page, which escapes it besides: control characters, marks that turn the direction of writing
    and lone surrogates are shown as escapes. Line breaks and tabs stay, and so does every letter of every script.

    >>> inert_page("a\x1b[2J\n\u202e")
    'a\\x1b[2J\n\\u202e'
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def inert_cell(value: Any) -> Any:
    """A value for a CSV file: a text that a spreadsheet program would take for a formula begins with an apostrophe.

    A text that is a number stays as it is, and so does what is no text. Line breaks stay too: a CSV cell may have some.

    >>> inert_cell("=1+1"), inert_cell("-0.5"), inert_cell(-0.5)
    ("'=1+1", '-0.5', -0.5)
    """
    if not isinstance(value, str):
        return value
    text = inert_lines(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def inert_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file, by ``inert_cell``; its column names too."""
    return {inert_cell(name): inert_cell(value) for name, value in row.items()}
