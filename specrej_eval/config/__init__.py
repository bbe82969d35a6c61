"""Every argument, declared once: the same names in ``--model_args``, YAML, Python and the command line.

A file for each room; ``RunConfig`` is their union. Values are coerced and checked here, before a model is loaded. Lists
of names elsewhere (flags, fingerprints, ``--gen_kwargs``, the table in docs/arguments.md) are ``names`` of some kind.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from specrej_eval.config.argument import (
    Argument,
    Decides,
    Kind,
    Takes,
    as_bool,
    as_dict,
    as_float,
    as_int,
    checked_until,
    declared,
)
from specrej_eval.config.decoding import DEFAULT_N, MAX, N_MAX, DecodingArguments, SamplingArguments
from specrej_eval.config.engines import NOT_TAKEN, EngineArguments
from specrej_eval.config.models import HOST, ModelArguments
from specrej_eval.config.records import RecordArguments
from specrej_eval.config.rewards import RewardArguments
from specrej_eval.config.running import AUTO, DecoderArguments, PromptArguments, RunningArguments
from specrej_eval.errors import ConfigError, nearest
from specrej_eval.redaction import redacted_values

__all__ = [
    "ARGUMENTS",
    "AUTO",
    "DECIDING",
    "DEFAULT_N",
    "HOST",
    "MAX",
    "NEUTRAL",
    "N_MAX",
    "PLACEMENT",
    "SAMPLING",
    "Argument",
    "Decides",
    "DecoderArguments",
    "Kind",
    "PromptArguments",
    "RecordArguments",
    "RunConfig",
    "SamplingArguments",
    "Takes",
    "as_bool",
    "as_dict",
    "as_float",
    "as_int",
    "checked_until",
    "declared",
    "in_our_names",
    "known_elsewhere",
    "names",
    "suggest_argument",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunConfig(RecordArguments, RunningArguments, EngineArguments, DecodingArguments, RewardArguments, ModelArguments):
    """All our arguments with their defaults; docs/arguments.md lists them.

    Raises:
        ConfigError: from ``from_args`` or ``replace``, with the rule, the value and the nearest valid name.
    """

    @classmethod
    def from_args(
        cls, args: Mapping[str, Any], *, host: Iterable[str] = HOST, also: Iterable[str] = ()
    ) -> tuple[Self, dict[str, Any]]:
        """Split ``args`` into ours (coerced and checked) and those meant for the host (``host`` names them).

        Args:
            also: names the caller takes besides, for the suggestion.

        Raises:
            ConfigError: an unknown argument (nearest name suggested), one that is given twice, or a bad value.
        """
        args = in_our_names(args)
        check_known(args, {*ARGUMENTS, *host}, also=also)
        config = cls(**{name: value for name, value in args.items() if name in ARGUMENTS}).checked()
        if config.strategy == "best_of_n" and args.get("alpha") is not None and config.alpha:
            logger.warning("alpha=%s is not used: best_of_n decodes all rows to the end.", args["alpha"])
        return config, {name: value for name, value in args.items() if name not in ARGUMENTS}

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some arguments changed.

        Raises:
            ConfigError: as ``from_args``.
        """
        check_known(changes, ARGUMENTS)
        return dataclasses.replace(self, **changes).checked()

    def checked(self) -> Self:
        """Coerce what a command line leaves as text or floats, and hold each argument to its rule."""
        read = {name: made.read(getattr(self, name)) for name, made in ARGUMENTS.items()}
        config = dataclasses.replace(self, **read)
        if config.temperature == 0 and config.n != 1:
            raise ConfigError(
                f"temperature=0 decodes greedily, so all n={config.n or DEFAULT_N} rows would be identical.",
                hint="set temperature above 0, or n=1 for plain greedy decoding.",
            )
        return config

    @property
    def alpha_fraction(self) -> Fraction:
        """alpha as written: the float 0.7 times 10 is not 7, ``Fraction("0.7")`` times 10 is."""
        return Fraction(str(self.alpha))

    @property
    def rejects(self) -> bool:
        """Whether rows can be rejected at all: false for best_of_n and for alpha=0, which are the same thing."""
        return self.strategy != "best_of_n" and self.alpha > 0

    @property
    def of_request(self) -> dict[str, Any]:
        """What stands in a request's key beside its prompt."""
        made = ((name, getattr(self, name)) for name in DECIDING)
        return {name: value for name, value in made if not ARGUMENTS[name].later or value != ARGUMENTS[name].default}

    def to_dict(self) -> dict[str, Any]:
        """For records: without secrets, such as the password that an address may hold."""
        return dict(redacted_values(dataclasses.asdict(self), put=""))


ARGUMENTS = declared(RunConfig)
"""Ours, by name."""


def names(
    *kinds: Decides | Takes | Kind, among: Mapping[str, Argument] = ARGUMENTS, without: Iterable[str] = ()
) -> tuple[str, ...]:
    """Arguments that decide, are taken by, or are of, one of ``kinds``."""
    return tuple(
        name
        for name, made in among.items()
        if name not in without and (made.decides in kinds or made.kind in kinds or made.takes & {*kinds})
    )


DECIDING = names(Decides.ANSWERS, Decides.KEPT)
"""Arguments in the key of a request: they decide an answer, the models apart, or what is kept of it."""
NEUTRAL = names(Decides.TASKS, Decides.PLACE, Decides.NOTHING)
"""Arguments in no fingerprint of models. Any other is about the models, and part of every fingerprint."""
PLACEMENT = names(Decides.PLACE, among=HOST)
"""Arguments of the host that say where weights lie or how they are fetched, not what they are."""
SAMPLING = tuple(declared(SamplingArguments))
"""How a token is drawn."""


def in_our_names(args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` with synonyms (``n_samples``) under our name (``n``).

    Raises:
        ConfigError: two names of one argument, with two values.
    """
    found = dict(args)
    for name, made in ARGUMENTS.items():
        for synonym in made.synonyms:
            value = found.pop(synonym, None)
            if value is None:
                continue
            if found.get(name) is None:
                found[name] = value
            elif str(found[name]) != str(value):
                raise ConfigError(
                    f"{name}={found[name]} and {synonym}={value} are two values for the same argument.",
                    hint=f"give {name} alone.",
                )
    return found


def check_known(given: Iterable[str], known: Iterable[str], *, also: Iterable[str] = ()) -> None:
    """Raises:
    ConfigError: a name that is not known; suggests the one that may be meant.
    """
    known = set(known)
    for name in given:
        if name in NOT_TAKEN and name not in known:
            raise ConfigError(f"{name} is not an argument of ours.", hint=NOT_TAKEN[name])
        if name not in known:
            raise ConfigError(f"unknown argument {name!r}.", hint=suggest_argument(name, {*known, *also}))


def known_elsewhere() -> dict[str, str]:
    """What other tools (the reference code, alpaca_eval's decoders, transformers, vLLM) call our arguments -> ours."""
    both = {**ARGUMENTS, **declared(DecoderArguments)}
    return {other: name for name, made in both.items() for other in (*made.synonyms, *made.elsewhere)}


def suggest_argument(name: str, choices: Iterable[str]) -> str:
    """Nearest argument name, and where the whole list is."""
    choices = set(choices)
    meant = known_elsewhere().get(name.lstrip("-").replace("-", "_"))
    best = meant if meant in choices else nearest(name, choices)
    listing = "docs/arguments.md lists all arguments; `specrej-eval doctor` shows versions."
    return f"did you mean {best!r}? {listing}" if best else f"{listing} Ours: {', '.join(sorted(choices))}."
