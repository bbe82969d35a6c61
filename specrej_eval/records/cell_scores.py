"""What a task and a judge say of the answers of a cell of `specrej-eval compare`, in two files beside its rows.

Each is of certain texts, whose digest it holds: of other texts it says nothing. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from specrej_eval.checked import a_list, an_object, as_number, object_or_empty, text
from specrej_eval.core import GenerationResult
from specrej_eval.errors import ConfigError
from specrej_eval.records.jsonl import as_text, digest, parsed, write_atomically

METRICS, PREFERENCES = "specrej_metrics.json", "specrej_preferences.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class CellMetrics:
    """A task's metrics: name -> score of each prompt."""

    best: Mapping[str, Sequence[float]]
    """Of the answers."""
    rows: Sequence[Mapping[str, Sequence[float]]] = ()
    """Of row 0 of each prompt, of row 1, ...; empty where they were not asked for."""
    higher_is_better: Mapping[str, bool] | None = None

    def of_rows(self) -> dict[str, list[list[float]]]:
        """Name -> scores of all rows of each prompt."""
        names = self.rows[0] if self.rows else {}
        return {
            name: [list(of_prompt) for of_prompt in zip(*(row[name] for row in self.rows), strict=True)]
            for name in names
        }

    @classmethod
    def read(
        cls,
        cell: Path,
        answers: Sequence[str],
        *,
        results: Sequence[GenerationResult] = (),
        scored_by: str | None = None,
    ) -> Self | None:
        """Those on file; None where there are none, or not of these texts.

        Args:
            answers: texts, in the order of the cell's answers.
            results: likewise; without them no rows are read.
            scored_by: of what gave the scores (``Source.scored_by``): those of another are none; None = of anything.

        Raises:
            ConfigError: the file is of a newer version.
        """
        told = versioned(cell / METRICS)
        try:
            rows = [_scores(each, len(results)) for each in a_list(told, "rows")] if results else []
            if told["of"] != digest_of(answers) or scored_by not in (None, told.get("scored_by")):
                return None
            if rows and told["of_rows"] != _digest_of_rows(results, len(rows)):
                return None
            better = {name: bool(more) for name, more in object_or_empty(told.get("higher_is_better")).items()}
            return cls(_scores(told["best"], len(answers)), rows, better)
        except (ValueError, KeyError):
            return None

    def write(self, cell: Path, results: Sequence[GenerationResult], *, scored_by: str) -> None:
        told = {
            "schema_version": VERSION,
            "of": digest_of([result.text for result in results]),
            "of_rows": _digest_of_rows(results, len(self.rows)),
            "scored_by": scored_by,
            "higher_is_better": dict(self.higher_is_better or {}),
            "best": self.best,
            "rows": list(self.rows),
        }
        write_atomically(cell / METRICS, as_text(told) + "\n")


@dataclass(frozen=True, slots=True)
class CellPreferences:
    """A judge's preference for each answer over that of another method to the same prompt."""

    annotators: str
    against: str
    """The other method's name."""
    preferred: Sequence[float | None]
    """The chance that the answer is preferred, 0.5 where both are the same; None where the judge did not say."""

    @classmethod
    def read(cls, cell: Path, answers: Sequence[str]) -> Self | None:
        """As ``CellMetrics.read``."""
        told = versioned(cell / PREFERENCES)
        try:
            given = [None if each is None else as_number(each, "preferred") for each in a_list(told, "preferred")]
            if told["of"] != digest_of(answers) or len(given) != len(answers):
                return None
            return cls(text(told, "annotators"), text(told, "against"), given)
        except (ValueError, KeyError):
            return None

    def write(self, cell: Path, answers: Sequence[str]) -> None:
        told = {
            "schema_version": VERSION,
            "of": digest_of(answers),
            "annotators": self.annotators,
            "against": self.against,
            "preferred": list(self.preferred),
        }
        write_atomically(cell / PREFERENCES, as_text(told) + "\n")


def digest_of(answers: Sequence[str]) -> str:
    return digest({"texts": list(answers)})


def _digest_of_rows(results: Sequence[GenerationResult], number: int) -> str:
    """Of the texts of the first rows of each prompt."""
    return digest({"texts": [[row.text for row in result.trajectories[:number]] for result in results]})


def versioned(path: Path, newest: int = VERSION) -> Mapping[str, Any]:
    """What a JSON file of ours holds; empty where there is none, or none that can be read.

    Raises:
        ConfigError: it was written by a newer version.
    """
    try:
        told = object_or_empty(parsed(path.read_bytes()))
    except (OSError, ValueError):
        return {}
    version = told.get("schema_version")
    if isinstance(version, int) and version > newest:
        raise ConfigError(
            f"{str(path)!r} was written by a newer version of specrej_eval: its schema is {version}, and this version "
            f"reads 1 to {newest}. Nothing was changed.",
            hint="update specrej_eval, or work in another folder.",
        )
    return told


def _scores(told: Any, prompts: int) -> dict[str, list[float]]:
    """Raises:
    BadRecordError: not a number for each prompt.
    """
    found = {
        str(name): [as_number(value, str(name)) for value in a_list(an_object(told, "metrics"), name)]
        for name in an_object(told, "metrics")
    }
    if any(len(values) != prompts for values in found.values()):
        raise ValueError(f"scores of {prompts} prompts are needed")
    return found
