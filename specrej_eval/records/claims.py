"""Which of several processes decodes which request of a journal that they share (``join=True``).

A claim is a lock on a file of its own, in a hidden folder beside the journal (``.run.jsonl.claims``): the kernel gives
it up when its holder dies, and then another takes the request over. Whoever has a claim looks for an answer once more
before it decodes, and gives the claim up when its own answer is on disk. So nothing is decoded twice but after a death.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from specrej_eval.errors import ConfigError
from specrej_eval.paths import check_path, shortened
from specrej_eval.records import lock, parts

_BEGINNING = "beginning"
_PATIENCE = 600.0
"""Seconds that another process may take to read the journal."""
_POLL = 0.05


class Claims:
    """Those of one process on one journal.

    Args:
        journal: as it was named.

    Raises:
        ConfigError: it can be no path.
    """

    def __init__(self, journal: str | Path) -> None:
        check_path(journal, argument="journal")
        whole = parts.whole(os.path.realpath(journal))
        self._folder = whole.with_name(f".{shortened(whole.name)}.claims")
        self._mine: set[str] = set()

    def take(self, key: str) -> bool:
        """Whether this process may decode a request. False: another has it, or this one has already.

        Raises:
            ConfigError: files cannot be made or locked there.
        """
        taken = lock.take(self._folder / key, argument="journal")
        if taken:
            self._mine.add(key)
        return taken

    def give_up(self, key: str) -> None:
        if key in self._mine:
            self._mine.remove(key)
            lock.give_up(self._folder / key)

    def give_up_all(self) -> None:
        for key in sorted(self._mine):
            self.give_up(key)

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """One process begins at a time, so that the second finds the first line of the first, and whose models it is
        of.

        Raises:
            ConfigError: as ``take``; or another process has been at it for very long.
        """
        deadline = time.monotonic() + _PATIENCE
        while not self.take(_BEGINNING):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process has been opening the journal beside {str(self._folder)!r} for {_PATIENCE:.0f} s.",
                    hint="is it stopped? `specrej-eval status` with the journal's name lists those that run.",
                )
            time.sleep(_POLL)
        try:
            yield
        finally:
            self.give_up(_BEGINNING)

    def tidy(self) -> None:
        """Remove what killed processes have left; what is in use stays."""
        self.give_up_all()
        with contextlib.suppress(OSError, ConfigError):
            for name in os.listdir(self._folder):
                key = name.removeprefix(".").removesuffix(".lock")
                if name == f".{key}.lock" and self.take(key):
                    self.give_up(key)  # which removes it
            self._folder.rmdir()
