"""What both submissions need: a folder written as a whole or not at all, and rows named so that they can be found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.paths import below
from specrej_eval.records.jsonl import write_atomically
from specrej_eval.redaction import Search, own_secrets

_OF_ARGUMENTS = ("results_", "configs.yaml")
"""How the files begin that say with which arguments a run was made."""


class Tree:
    """Files planned for a folder. Nothing is written before ``write``, so a check that fails leaves nothing behind.

    Args:
        root: the folder.
        force: replace files that lie there already.
        lookalikes: take what only looks like a secret.
    """

    def __init__(self, root: str | Path, *, force: bool, lookalikes: bool = False) -> None:
        self.root = Path(root)
        self._force = force
        self._lookalikes = lookalikes
        self.secrets = own_secrets()
        """Secret -> what it is: what no file may hold."""
        self._texts: dict[str, str] = {}
        self._copies: dict[str, Path] = {}
        self._stale: set[str] = set()
        self.contents: list[tuple[str, str]] = []
        """Planned files and what they are, in the order they were added."""

    @property
    def paths(self) -> list[str]:
        """Planned files, below the root."""
        return sorted({*self._texts, *self._copies})

    def add(self, path: str, text: str, what: str = "") -> None:
        below(self.root, path, what="the planned file")
        self._texts[path] = text
        self.contents.append((path, what))

    def copy(self, path: str, source: Path, what: str = "") -> None:
        below(self.root, path, what="the planned file")
        self._copies[path] = source
        self.contents.append((path, what))

    def drop(self, path: str) -> None:
        """This file of an earlier submission must not stay: it would not belong to the others."""
        below(self.root, path, what="the planned file")
        self._stale.add(path)

    def write(self) -> None:
        """Write all files.

        Raises:
            SpecRejError: one of them holds a secret.
            ConfigError: one of them exists and ``force`` was not given, or a file cannot be written.
        """
        self._refuse_secrets()
        there = [path for path in sorted({*self.paths, *self._stale}) if (self.root / path).exists()]
        if there and not self._force:
            raise ConfigError(
                f"{str(self.root)!r} already contains {there[0]!r}"
                + (f" and {len(there) - 1} more." * (len(there) > 1)),
                hint="give another --output; --force replaces these files and leaves all others alone.",
            )
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"--output {str(self.root)!r} is a file.", hint="give a folder.")
        try:
            for path in self._stale - set(self.paths):
                (self.root / path).unlink(missing_ok=True)
            for path, source in self._copies.items():
                target = self.root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.resolve() != target.resolve():
                    shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigError(f"{str(self.root)!r} cannot be written: {error}.") from error
        for path, text in self._texts.items():
            write_atomically(self.root / path, text)

    def _refuse_secrets(self) -> None:
        search = Search(self.secrets)
        for path in self.paths:
            arguments = Path(path).name.startswith(_OF_ARGUMENTS)
            for number, line in enumerate(self._lines(path), start=1):
                found = search(line, arguments=arguments)
                if found is None or (self._lookalikes and not found[1]):
                    continue
                source = f" (from {str(self._copies[path])!r})" if path in self._copies else ""
                looks = "" if found[1] else "what looks like "
                hint = "put *** in its place in the file it comes from; if others have seen it, have it withdrawn."
                if not found[1]:
                    hint += " If it is no secret (an answer may look like one): --allow_lookalikes."
                raise SpecRejError(
                    f"{path}{source}, line {number}, holds {looks}{found[0]}. Nothing was written.", hint=hint
                )

    def _lines(self, path: str) -> Iterator[str]:
        if path in self._texts:
            yield from self._texts[path].split("\n")
            return
        try:
            with self._copies[path].open(encoding="utf-8", errors="replace", newline="\n") as lines:
                yield from lines
        except OSError as error:
            raise ConfigError(f"{str(self._copies[path])!r} cannot be read: {error}.") from error


def read_rows(path: Path, *, what: str, hint: str) -> list[dict[str, Any]]:
    """A JSON file that holds a list of objects.

    Raises:
        SpecRejError: there is no such file, or it holds something else; names the row.
    """
    if not path.is_file():
        raise SpecRejError(f"{what}: there is no file {str(path)!r}.", hint=hint)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecRejError(f"{what}: {str(path)!r} cannot be read as JSON: {error}.", hint=hint) from error
    if not isinstance(rows, list):
        raise SpecRejError(f"{what}: {str(path)!r} must hold a JSON list, got {type(rows).__name__}.", hint=hint)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise SpecRejError(f"{what}: row {number} of {str(path)!r} is not a JSON object.", hint=hint)
    return rows
