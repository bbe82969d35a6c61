"""Reward servers over HTTP: ``specrej_eval.http`` with the names of our arguments, and scores out of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import SplitResult

from specrej_eval import http
from specrej_eval.config import RunConfig
from specrej_eval.errors import RewardError
from specrej_eval.http import BadAnswerError

__all__ = ["BadAnswerError", "JsonServer", "ServerError", "address", "number", "numbers"]

_NAMES = http.Names(
    server="reward server",
    address="reward_model",
    timeout="reward_timeout",
    retries="reward_retries",
    key_over_http="reward_key_over_http",
    too_large="lower reward_batch_size.",
)


class ServerError(http.ServerError, RewardError):
    """The reward server could not be asked, or answered something else than asked for."""


class JsonServer(http.JsonServer):
    """Asks a reward server.

    Args:
        url, key_variables: as ``http.JsonServer``.
        config: its ``reward_timeout``, ``reward_retries`` and ``reward_key_over_http`` hold.
    """

    failure: ClassVar[type[http.ServerError]] = ServerError

    def __init__(self, url: str, *, key_variables: Sequence[str], config: RunConfig) -> None:
        super().__init__(
            url,
            key_variables=key_variables,
            timeout=config.reward_timeout,
            retries=config.reward_retries,
            key_over_http=config.reward_key_over_http,
            names=_NAMES,
        )


def address(url: str) -> SplitResult:
    """``http.address`` of ``reward_model``."""
    return http.address(url, _NAMES.address)


def number(value: Any) -> float:
    """A score of a JSON answer: a number, or a list of one; null, which is how strict JSON writes NaN, is NaN.

    Raises:
        BadAnswerError: anything else.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswerError(f"one score was expected, got {str(value)[:60]!r}")
    try:
        return float(value)
    except OverflowError:
        raise BadAnswerError("one score was expected, got a number beyond the floats") from None


def numbers(values: Any, count: int) -> list[float]:
    """As many scores as texts were sent.

    Raises:
        BadAnswerError: another number of them, or something that is not a score.
    """
    if not isinstance(values, list):
        raise BadAnswerError(f"{count} scores were expected, got {type(values).__name__}")
    if len(values) != count:
        raise BadAnswerError(f"{count} scores were expected, got {len(values)}")
    return [number(value) for value in values]
