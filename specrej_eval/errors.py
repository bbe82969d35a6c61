"""One error family. Every message states the rule and the value; the hint says what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from specrej_eval.redaction import redacted
from specrej_eval.wording import counted, inert_lines

MOST = 2000
"""Characters of a message, and of its hint: what they quote may be of any size."""


class SpecRejError(Exception):
    """Base of all errors raised on purpose. ``hint`` is printed below the message. Neither shows a secret.

    What a message quotes may be anybody's text: as it is shown, nothing in it moves a terminal's cursor, and it does
    not go on for pages.
    """

    exit_code = 1
    """Of a command that ends with it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(_bounded(redacted(message)))
        self.hint = None if hint is None else _bounded(redacted(hint))

    def __str__(self) -> str:
        message = super().__str__()
        return inert_lines(f"{message}\n  hint: {self.hint}" if self.hint else message)


def _bounded(text: str) -> str:
    """Its beginning and its end; the rule stands in one of them."""
    return text if len(text) <= MOST else f"{text[: MOST * 3 // 4]} ... {text[-MOST // 4 :]}"


class ConfigError(SpecRejError, ValueError):
    """An argument, or a combination of arguments, breaks a rule."""


class PromptError(SpecRejError, ValueError):
    """A prompt cannot be decoded: empty, or longer than the context."""


class CheckpointError(SpecRejError, OSError):
    """A model folder is missing, broken, or of a kind we cannot use."""


class ModelError(SpecRejError, RuntimeError):
    """The language model computed something that cannot be decoded."""


class MissingDependencyError(SpecRejError, ImportError):
    """An optional package is not installed."""


class RewardError(SpecRejError, RuntimeError):
    """A reward model failed, or returned something that is not one finite number per row."""


class KVBudgetExceededError(SpecRejError, RuntimeError):
    """More tokens were about to be held than the KV budget allows: a defect of the scheduler."""


class OutOfMemoryError(SpecRejError, MemoryError):
    """Not even one row could be decoded in the memory there is."""


class LimitReached(SpecRejError):
    """``max_seconds`` or ``max_decode_tokens`` ended a run between two requests: what is there is part of it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, message: str, *, hint: str | None = None, limit: str = "") -> None:
        super().__init__(message, hint=hint)
        self.limit = limit
        """As it was given: ``max_seconds=600``."""
        self.results: Any = None
        """Index -> result, of ``Generator.generate``."""

    @classmethod
    def after(cls, answered: int, total: int, *, limit: str, where: str | None) -> Self:
        """What is said of a run that a limit ended.

        Args:
            where: the file or folder that holds the answers; None = nowhere.
        """
        kept = "" if where is None else f" The answers are kept in {where}."
        again = "run the same command again to continue (a limit holds for each start), or leave the limit out."
        return cls(
            f"{limit} is reached: {answered:,} of {counted(total, 'prompt')} are answered, and this is not the result "
            f"of the whole run.{kept}",
            hint=again if kept else "journal=FILE keeps answers for the next run.",
            limit=limit,
        )


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice closest to ``name``, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the nearest choice and lists all of them."""
    options = sorted(choices)
    best = nearest(name, options)
    listing = f"Known: {', '.join(options)}."
    return f"Did you mean {best!r}? {listing}" if best else listing
