"""YAML that somebody else may have written: read within limits, or refused with one error.

Few lines of YAML can stand for a document of any size, by names (``&a``, ``*a``) that stand for what holds other names;
or for one that holds itself. Whatever walks through such a document, even a message that quotes it, never ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError

MOST_PARTS = 100_000
"""Values of a document, each counted wherever it stands; ours have about a hundred."""


def read_yaml(path: Path, *, what: str) -> Any:
    """What a file holds.

    Args:
        what: how messages begin: ``--model_config 'mine.yaml'``.

    Raises:
        ConfigError: it cannot be read, is no YAML, or its names stand for a document without end.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # PyYAML's constructors fail with errors of any kind, such as a list that is to be a key
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{what} cannot be read as YAML: {told}.") from error
    parts, level = 0, [found]
    while level:
        parts += len(level)
        if parts > MOST_PARTS:
            raise ConfigError(
                f"{what} cannot be read as YAML: its names (&a, *a) stand for more than {MOST_PARTS:,} values.",
                hint="write out what is meant; no configuration needs so many.",
            )
        # of one level the next may be a thousand times as long: no more of it than the limit needs
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set):
                below += value
            if len(below) > MOST_PARTS:
                break
        level = below
    return found
