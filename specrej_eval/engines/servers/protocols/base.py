# torch-free
"""What the engine asks of a server, whatever its make: rows as streams of token ids, and a pause between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from specrej_eval.checked import object_or_empty
from specrej_eval.config import RunConfig
from specrej_eval.core import TokenStat
from specrej_eval.http import BadAnswerError, JsonServer, ServerError

Finish = Literal["stop", "length", "abort"]
"""Why a request ended: a token that ends answers, its ``max_tokens``, or somebody's word."""

SAMPLE = "The quick brown fox (1 + 2 = 3) jumps over:\n\tthe lazy dog's naïve façade."
"""Tokenised here and there: a server with another tokenizer shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: tokens of one row."""

    request_id: str
    token_ids: Sequence[int]
    """The prompt, and what the row has by now."""
    max_tokens: int
    seed: int
    """63 bits."""
    config: RunConfig
    """How tokens are drawn."""
    stop_ids: Sequence[int]
    """Token ids that end an answer."""
    token_stats: Collection[TokenStat] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What an event of a request's stream brought."""

    total: int | None = None
    """Tokens of the request so far, these included; None = the server does not say."""
    token_ids: Sequence[int] = ()
    stats: Mapping[TokenStat, Sequence[float]] = field(default_factory=dict)
    """One number per token id."""
    text: str = ""
    """New text, where there are no ids."""
    finish: Finish | None = None
    cached: int = 0
    """Tokens of the request's prompt that the server had read before; told once a request."""


class EngineProtocol(ABC):
    """How to ask one kind of server. ``connect`` comes first and fills in what the server can do.

    Args:
        pretrained: the model's name, to choose among several that a server holds.
    """

    KIND: ClassVar[str]
    """What a server is called in messages."""
    STATS: ClassVar[frozenset[TokenStat]] = frozenset()
    """Numbers it can give for each token."""
    HOW_TO_PAUSE: ClassVar[str] = ""
    """How its server is started so that it can be paused; empty = it cannot."""

    def __init__(self, server: JsonServer, pretrained: str) -> None:
        self.server = server
        self.pretrained = pretrained
        self.model: str | None = None
        """As the server calls it."""
        self.root: str | None = None
        """Where the server has it from."""
        self.version: str | None = None
        self.max_length: int | None = None
        self.gives_ids = True
        self.can_pause = False

    @abstractmethod
    def connect(self) -> None:
        """Ask what the server holds and can do.

        Raises:
            ServerError: it is not there, or refuses.
        """

    @abstractmethod
    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Path and body of a request whose answer comes as a stream."""

    @abstractmethod
    def read(self, event: Any) -> Delta:
        """What an event says.

        Raises:
            BadAnswerError: it is not what was asked for, or the server's error.
        """

    def refuses(self, config: RunConfig, token_stats: Collection[TokenStat]) -> str | None:
        """Why rows cannot be drawn as these arguments say, or such numbers not be had; None = they can."""
        del config, token_stats
        return None

    # only where it can be paused

    def pause(self) -> None:
        """No request gets another token until ``resume``; none is ended."""
        raise NotImplementedError

    def resume(self, *, once: bool = False) -> None:
        """All requests go on.

        Args:
            once: do not try again.
        """
        raise NotImplementedError

    def paused(self, *, once: bool = False) -> bool | None:
        """Whether it is paused, by whomever; None = it does not say.

        Args:
            once: do not try again.
        """
        del once
        return None

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests of ours; not tried again, since a stream that is cut ends its request too."""
        raise NotImplementedError

    # what servers have in common

    @property
    def served_model(self) -> str | None:
        """What the server says it holds: where it has it from, else its name."""
        return self.root or self.model

    def identify(self) -> None:
        """Ask which model the server holds, and its context: ``GET /v1/models``.

        Raises:
            ServerError: it is not there, or fails.
        """
        self.model = self.root = None
        listed = object_or_empty(self.server.get("/v1/models")).get("data")
        entries = [object_or_empty(entry) for entry in listed] if isinstance(listed, list) else []
        named = [entry for entry in entries if self.pretrained in (entry.get("id"), entry.get("root"))]
        for entry in (named or entries)[:1]:
            self.model = entry["id"] if isinstance(entry.get("id"), str) else None
            self.root = entry["root"] if isinstance(entry.get("root"), str) else self.model
            length = entry.get("max_model_len")
            self.max_length = length if isinstance(length, int) and length > 0 else None

    def token_ids_of(self, text: str) -> list[int] | None:
        """Of a text, by the server's tokenizer; None = it does not tell."""
        body = {"prompt": text, "add_special_tokens": False, **({"model": self.model} if self.model else {})}
        try:
            found = self.server.post("/tokenize", body, lambda answer: object_or_empty(answer).get("tokens"))
        except ServerError as error:
            if error.hopeless:
                return None
            raise
        return found if isinstance(found, list) and all(isinstance(token, int) for token in found) else None


def whole_ids(value: Any) -> list[int]:
    """Token ids of an event.

    Raises:
        BadAnswerError: something else.
    """
    if not isinstance(value, list) or not all(isinstance(token, int) and token >= 0 for token in value):
        raise BadAnswerError(f"token ids were expected, got {str(value)[:60]!r}")
    return value


def count_of(value: Any) -> int:
    """A number of tokens; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def error_of(event: Any) -> None:
    """Raises:
    BadAnswerError: the event tells of an error.
    """
    told = object_or_empty(event).get("error")
    if told is not None:
        message = object_or_empty(told).get("message", told)
        raise BadAnswerError(f"the server's error {str(message)[:200]!r}")
