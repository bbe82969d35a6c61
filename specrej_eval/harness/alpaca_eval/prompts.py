# torch-free
"""Prompts that know the fields they were rendered from, so that nobody has to parse them back out of the text."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Self

from specrej_eval.errors import ConfigError, nearest
from specrej_eval.harness.patching import patch, takes

_PLACEHOLDER = re.compile(r"{([A-Za-z_]\w*)}")
_logger = logging.getLogger(__name__)


class RenderedPrompt(str):
    """The text a template gave, and the fields of the rows it was given."""

    rows: tuple[Mapping[str, Any], ...]
    """One for each example in the prompt; several only where an annotator's ``batch_size`` is above 1."""

    def __new__(cls, text: str, rows: Sequence[Mapping[str, Any]]) -> Self:
        prompt = super().__new__(cls, text)
        prompt.rows = tuple(rows)
        return prompt

    @property
    def row(self) -> Mapping[str, Any]:
        """The (first) example's fields: instruction, output_1, output_2, ..."""
        return self.rows[0]

    def __reduce__(self) -> tuple[type[RenderedPrompt], tuple[str, tuple[Mapping[str, Any], ...]]]:
        return type(self), (str(self), self.rows)


def keep_fields_with_prompts(utils: ModuleType) -> None:
    """``utils.make_prompts``: upstream fills one field after the other, so that ``{output_1}`` inside an instruction
    is replaced too, and fails at any other braces in a template."""
    if takes(utils.make_prompts, "df", "template", "batch_size"):
        patch(utils, "make_prompts", lambda original: make_prompts)


def make_prompts(df: Any, template: str, batch_size: int = 1) -> tuple[list[str], Any]:
    """As upstream's: one prompt for every ``batch_size`` rows, the k-th ``{column}`` taken from the k-th of them.

    Raises:
        ConfigError: the template names no column, but something close to one.
        ValueError: as upstream: a placeholder not repeated ``batch_size`` times, rows that do not fill the last prompt.
    """
    if df.empty:
        return [], df
    columns = [str(name) for name in df.columns]
    placeholder = re.compile("|".join(re.escape(f"{{{name}}}") for name in columns))
    found = [match[1:-1] for match in placeholder.findall(template)]
    _check_other_braces(template, columns, found)
    counts = {name: found.count(name) for name in found}
    if any(count != batch_size for count in counts.values()):
        raise ValueError(f"All placeholders should be repeated batch_size={batch_size} times but {counts}.")
    if len(df) % batch_size > 0:
        raise ValueError(
            f"The number of rows should be dividable by the batch_size={batch_size} but got {len(df)}."
            "You should use PaddingForBatchesProcessor"
        )
    rows = [{str(key): value for key, value in row.items()} for row in df.to_dict(orient="records")]
    prompts: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts.append(RenderedPrompt(_fill(template, placeholder, batch), batch))
    return prompts, df.copy()


def _fill(template: str, placeholder: re.Pattern[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """One pass over the template: text that comes from a field is never looked at again."""
    used = dict.fromkeys(rows[0], 0)

    def value(match: re.Match[str]) -> str:
        name = match[0][1:-1]
        used[name] += 1
        return str(rows[used[name] - 1][name])

    return placeholder.sub(value, template)


def _check_other_braces(template: str, columns: Sequence[str], found: Sequence[str]) -> None:
    unknown = [name for name in dict.fromkeys(_PLACEHOLDER.findall(template)) if name not in columns]
    if not unknown:
        return
    listing = f"The data has {', '.join(columns)}."
    names = ", ".join(f"{{{name}}}" for name in unknown)
    if not found:
        best = nearest(unknown[0], columns)
        raise ConfigError(
            f"the prompt template has {names}, but no column of the data.",
            hint=f"did you mean {{{best}}}? {listing}" if best else listing,
        )
    _warn_once(f"Prompt template: {names} stays as it is. {listing}")


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


AFTER = {"alpaca_eval.utils": (keep_fields_with_prompts,)}
