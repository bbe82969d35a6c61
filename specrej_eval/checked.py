"""Reading a record field by field: each has a type and a range, and what breaks them is named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class BadRecordError(ValueError):
    """A record does not hold what its schema says; the message names field and value."""


_REQUIRED: Any = object()


def an_object(value: Any, what: str) -> Mapping[str, Any]:
    """Raises:
    BadRecordError: the value is not a JSON object.
    """
    if not isinstance(value, Mapping):
        raise _wrong(what, "an object", value)
    return value


def object_or_empty(value: Any) -> Mapping[str, Any]:
    """For what is not ours, and may be anything."""
    return value if isinstance(value, Mapping) else {}


def list_or_empty(value: Any) -> list[Any]:
    """As ``object_or_empty``."""
    return value if isinstance(value, list) else []


def number_or(value: Any, other: T) -> float | T:
    """A finite number, or something in the place of whatever else it is."""
    try:
        return as_number(value, "")
    except BadRecordError:
        return other


def object_in(path: Path) -> Mapping[str, Any]:
    """What a JSON file holds; empty where there is none, where it cannot be read, and for anything but an object."""
    try:
        return object_or_empty(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def a_list(data: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> list[Any]:
    return _a(list, "a list", data, name, default)


def text(data: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> str:
    return _a(str, "a text", data, name, default)


def truth(data: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> bool:
    return _a(bool, "true or false", data, name, default)


def one_of(data: Mapping[str, Any], name: str, choices: Iterable[str]) -> Any:
    value = text(data, name)
    if value not in choices:
        raise _wrong(name, f"one of {', '.join(choices)}", value)
    return value


def whole(data: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> int:
    """A whole number, at least 0."""
    return as_whole(_of(data, name, default), name)


def as_whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(name, "a whole number, at least 0", value)
    return value


def as_number(value: Any, name: str) -> float:
    # an int beyond the floats would fail later, in some sum
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        raise _wrong(name, "a finite number", value)
    return value


def number_or_none(data: Mapping[str, Any], name: str) -> float | None:
    value = _of(data, name, _REQUIRED)
    return None if value is None else as_number(value, name)


def _a(kind: type[T], wanted: str, data: Mapping[str, Any], name: str, default: Any) -> T:
    value = _of(data, name, default)
    if not isinstance(value, kind):
        raise _wrong(name, wanted, value)
    return value


def _of(data: Mapping[str, Any], name: str, default: Any) -> Any:
    value = data.get(name, default)
    if value is _REQUIRED:
        raise BadRecordError(f"{name} is missing")
    return value


def _wrong(name: str, wanted: str, value: Any) -> BadRecordError:
    if isinstance(value, dict | list):
        shown = "an object" if isinstance(value, dict) else "a list"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        shown = "a huge number"
    else:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return BadRecordError(f"{name} must be {wanted}, got {shown}")
