"""Numbers and quoted texts as messages write them."""

from __future__ import annotations

from typing import Any


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 answer``, ``1,200 answers``; ``plural`` where it takes more than an s, a verb for one."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def start_of(text: Any) -> str:
    """The beginning of an instruction or answer, for a message."""
    return repr(shortened(" ".join(str(text).split())))


def shortened(text: str, most: int = 60) -> str:
    """At most so many characters; where some are left out, it ends with three dots."""
    return text if len(text) <= most else text[: most - 3] + "..."
