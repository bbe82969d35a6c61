"""What a check of `specrej-eval doctor` finds, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from specrej_eval.errors import SpecRejError
from specrej_eval.wording import inert, inert_lines

Status = Literal["ok", "note", "broken"]
_MARKS = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}


class Finding(NamedTuple):
    status: Status  # only "broken" makes the exit code 1
    subject: str
    detail: str


def show(sections: Iterable[tuple[str, Iterable[Finding]]], *, well: str) -> int:
    """Print what is found, section by section; the exit code.

    Args:
        well: the last line where nothing is broken.
    """
    broken = 0
    for title, findings in sections:
        print(title)
        try:
            for status, subject, detail in findings:
                broken += status == "broken"
                print(f"  {_MARKS[status]}  {inert(subject):<21}  {inert_lines(detail)}", flush=True)
        except SpecRejError as error:  # the other checks may still tell something
            broken += 1
            print(f"  BROKEN  {'failed':<21}  {error}", flush=True)
    print(f"\n{broken} thing{'s' * (broken != 1)} broken." if broken else f"\n{well}")
    return 1 if broken else 0
