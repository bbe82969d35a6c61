"""What one declaration says of an argument, and the kinds of values there are. Everything else is derived from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from specrej_eval.errors import ConfigError, suggest

Number = TypeVar("Number", int, float)
Kind = Callable[[str, Any], Any]
"""``(name, value) -> value``: what a command line or YAML leaves of a value, in its type and held to its rule.

Raises ``ConfigError``, with the rule and the value.
"""


class Decides(Enum):
    """What changes with an argument, and so where it stands in records. The value is the docs' word."""

    MODELS = "models"
    """What the models are and how they are read: in every fingerprint."""
    ANSWERS = "answers"
    """An answer, the models given: in a run's fingerprint and in each request's key."""
    KEPT = "what is kept"
    """How much of an answer is kept: in each request's key alone."""
    TASKS = "tasks' say"
    """What a task's own arguments count: in the fingerprint of ``--use_cache`` alone, where requests have no key."""
    PLACE = "nothing: how and where models compute"
    """Fixed once they are loaded."""
    NOTHING = "nothing: how a run goes and where records lie"
    """May change while the models are loaded."""


class Takes(Enum):
    """Who takes an argument, beside ``--model_args``, YAML and Python, which take all. The value is the docs' word."""

    RUN = "`run`"
    REQUEST = "`--gen_kwargs`"
    """A task or the user may set it for single requests."""
    ALONE = "rewards alone"
    """`score`, `doctor --reward` and alpaca_eval's ``specrej_reward_judge``: no language model beside them."""
    POLICY = "`doctor --pretrained`"
    """A language model that is looked at without a reward model."""
    PART = "parts of ensembles"
    """A part of a list of rewards may have a value of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """One declaration.

    Args:
        name: where it is a dataclass's field, that field's.
        help: one line, without what None means.
        none: what None, the default, means.
        synonyms: other names that are taken.
        elsewhere: what other tools call it: not taken, but answered with our name.
        idle_when_greedy: means nothing where one row is decoded greedily.
        later: younger than the first journals: at its default it is left out of a request's key, so that these are
            gone on from.
        private: of this machine or its user: left out of what is published.
        not_in_python: of the host: what to use in its place in the Python API, which does not take it.
        not_in_lm_eval: of the host: what to use in its place inside lm-eval, which takes it and loses it.
        engines: those it is for; the others refuse it. None named = all.
    """

    name: str = ""
    default: Any
    kind: Kind
    help: str
    none: str = ""
    decides: Decides
    takes: frozenset[Takes]
    synonyms: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    idle_when_greedy: bool = False
    later: bool = False
    private: bool = False
    not_in_python: str = ""
    not_in_lm_eval: str = ""
    engines: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """The value in its type.

        Raises:
            ConfigError: it breaks the rule.
        """
        return None if value is None and self.default is None else self.kind(self.name, value)

    @property
    def told(self) -> str:
        """The help of a command line."""
        return f"{self.help} (default: {self.none})" if self.none else self.help


def argument(
    default: Any, kind: Kind, help: str, *, decides: Decides, takes: Iterable[Takes] = (Takes.RUN,), **others: Any
) -> Any:
    """A dataclass's field that declares an argument; ``others`` as in ``Argument``."""
    made = Argument(default=default, kind=kind, help=help, decides=decides, takes=frozenset(takes), **others)
    return dataclasses.field(default=default, metadata={"argument": made})


def declared(owner: type) -> dict[str, Argument]:
    """Name -> declaration, of a dataclass whose fields are made by ``argument``."""
    return {
        field.name: dataclasses.replace(field.metadata["argument"], name=field.name)
        for field in dataclasses.fields(owner)
    }


# kinds


def as_is(name: str, value: Any) -> Any:
    return value


def text(name: str, value: Any) -> str:
    return str(value)


def checkpoint(name: str, value: Any) -> str:
    """A hub name or a folder."""
    return str(value)


def template(name: str, value: Any) -> str:
    """A text, or a file of it."""
    return str(value)


def rewards(name: str, value: Any) -> str:
    """A reward's name, or a list of them as YAML writes it."""
    return json.dumps(value, default=str) if isinstance(value, (list, tuple)) else str(value)


def number(rule: str, holds: Callable[[float], bool], hint: str | None = None) -> Kind:
    """A finite float."""

    def read(name: str, value: Any) -> float:
        found = as_float(name, value)
        return held(name, found, holds(found), rule, hint)

    return read


def whole(at_least: int | None = 1, *, also: str | None = None, told: str = "") -> Kind:
    """A whole number.

    Args:
        at_least: the least one; None = any.
        also: a word that is taken, too.
        told: what to add to the rule.
    """

    def read(name: str, value: Any) -> int | str:
        if also is not None and value == also:
            return also
        found = as_int(name, value, also="" if also is None else f"or {also!r}")
        if at_least is None:
            return found
        rule = f"at least {at_least}{f' ({told})' if told else ''}{'' if also is None else f', or {also!r}'}"
        return held(name, found, found >= at_least, rule)

    return read


def choice(
    *options: str, among: Callable[[], Iterable[str]] | None = None, also: Mapping[str, str] | None = None
) -> Kind:
    """One of some words.

    Args:
        among: lists them, where they are not known here.
        also: other spellings.
    """

    def read(name: str, value: Any) -> str:
        found = (also or {}).get(value, value) if isinstance(value, str) else value
        known = tuple(among()) if among is not None else options
        if found not in known:
            raise ConfigError(f"unknown {name} {value!r}.", hint=missing_comma(value) or suggest(str(value), known))
        return str(found)

    return read


def on_off(*options: str) -> Kind:
    """``choice`` of words that hold ``on`` and ``off``, which YAML and ``--model_args`` read as true and false."""
    of_words = choice(*options, also={"true": "on", "false": "off"})
    return lambda name, value: of_words(name, {True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def held(name: str, value: Number, holds: bool, rule: str, hint: str | None = None) -> Number:
    """The value.

    Raises:
        ConfigError: the rule does not hold.
    """
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}.", hint=hint)
    return value


def missing_comma(value: Any) -> str | None:
    """The hint for a value that holds the next argument, as in ``alpha=0.5 n=16``; None if it does not."""
    found = re.search(r"[\s;]\s*(\w+)=", value) if isinstance(value, str) else None
    return f"is a comma missing before {found[1]}=?" if found else None


def as_float(name: str, value: Any) -> float:
    """A finite float, from a number or its text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be a number, got {value!r}.", hint=missing_comma(value)) from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {value!r}.")
    return number


def as_int(name: str, value: Any, *, also: str = "") -> int:
    """An int, from an int, its text, or a float without a fraction (lm-eval's parser gives 1_000 as 1000.0)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        try:
            return int(value if isinstance(value, int) else str(value))  # a seed above 2**53 is no float
        except ValueError:
            number = float(str(value))
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        expected = f"a whole number {also}".strip()
        raise ConfigError(f"{name} must be {expected}, got {value!r}.", hint=missing_comma(value)) from None
    return int(number)


def as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0", "yes", "no"):
        return value.strip().lower() in ("true", "1", "yes")
    raise ConfigError(f"{name} must be true or false, got {value!r}.", hint=missing_comma(value))


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """A dict, or the JSON text of one (a command line cannot express more)."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name} must be a dict or the JSON text of one, got {value!r}.")
    return parsed


def checked_until(until: Any) -> tuple[str, ...]:
    """Stop strings as a tuple, duplicates removed, order kept.

    Raises:
        ConfigError: an entry is empty, None, or not a string.
    """
    if until is None:
        return ()
    entries = [until] if isinstance(until, str) else until
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"until must be a string or a list of strings, got {until!r}.")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(
                f"until must hold non-empty strings, got {entry!r} in {list(entries)!r}.",
                hint="an empty stop string would stop every answer at once; leave it out.",
            )
    return tuple(dict.fromkeys(entries))
