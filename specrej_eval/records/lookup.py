"""A finished request is found by its key; the one lookup of journals and folders of answers."""

from __future__ import annotations

import logging
from typing import Protocol, TypeVar

from specrej_eval.core import Prompt

_logger = logging.getLogger(__name__)


class Recorded(Protocol):
    """A finished request as it is recorded."""

    def is_to(self, prompt: Prompt) -> bool:
        """Whether its content says that it is to this prompt."""

    def place(self) -> str:
        """Where it stands, for messages."""


Found = TypeVar("Found", bound=Recorded)


def look_up(key: str, prompt: Prompt | None, *records: dict[str, Found]) -> Found | None:
    """What is recorded for a key, in the first that has it.

    Records of older versions carry no checksum. One that another prompt's key was put on is told from its content; it
    is taken out of ``records``, said so, and not used.

    Args:
        prompt: whose it must be; None = whoever has the key.
    """
    for held in records:
        found = held.get(key)
        if found is not None and (prompt is None or found.is_to(prompt)):
            return found
        if found is not None:
            _logger.warning("%s is not to the prompt that its key says; it is decoded again.", found.place())
            del held[key]
    return None
