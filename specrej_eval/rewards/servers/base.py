"""What a file of this folder offers: one kind of reward server, and how it is asked for raw scores.

Raw matters: a sigmoid in bfloat16 is exactly 1 from a score of 8 on, so best-of-n over squashed scores is a lottery
among the best rows. A kind of server is one file here with ``class Protocol(ServerProtocol)``; ``reward_family=`` knows
it by its file's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from specrej_eval import registry
from specrej_eval.checked import object_or_empty
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.http import BadAnswerError, JsonServer

_PACKAGE = "specrej_eval.rewards.servers"

Form = Literal["ids", "text", "pair", "messages"]


class Item(NamedTuple):
    """One row in the form its server reads; the other fields stay empty."""

    ids: tuple[int, ...] = ()
    text: str = ""
    """Rendered by a chat template."""
    prompt: str = ""
    """Beside a rendered text, the rendered part before the response; of a pair, the first text."""
    response: str = ""
    """Of a pair, the second text."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) pairs, the response last."""
    open_turn: bool = False
    """Of messages: the last one goes on."""


class Scored(NamedTuple):
    scores: list[float]
    tokens: int
    """Tokens the server says it read; 0 if it does not say."""


class ServerProtocol(ABC):
    """One kind of server.

    Args:
        server: where it is.
        endpoint: the one of ENDPOINTS that the address named.
    """

    ENDPOINTS: ClassVar[tuple[str, ...]]
    """Paths of its own that an address may end with."""
    PATHS: ClassVar[tuple[str, ...]]
    """Paths that it alone has in ``/openapi.json``: it is known by any of them."""

    most_items: int | None = None
    """Items it takes in one request; None = any number."""
    max_length: int | None = None
    """Tokens it takes in one item, if it says so."""
    adds_bos: bool = False
    """Whether it puts a BOS of its own before a text."""
    without_template: Literal["ask", "pair"] = "ask"
    """What a tokenizer without a chat template means to it (``checkpoints.renderer``)."""

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        self._server = server
        self._endpoint = endpoint

    @classmethod
    def is_told_by(cls, info: Mapping[str, Any]) -> bool:
        """Whether the JSON at ``/info`` is this kind's."""
        return False

    @abstractmethod
    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        """In which form it reads rows.

        Raises:
            ConfigError: it needs ``reward_tokenizer``.
        """

    def served_model(self) -> str | None:
        """What the server says it holds now; None where it does not say.

        Raises:
            ServerError: it fails.
        """
        return None

    def check(self, sample: Sequence[Item]) -> None:
        """Whether raw scores are to be had, tried out on two items.

        Raises:
            ConfigError: they are not.
            ServerError: the server fails.
        """
        self.score(sample)

    @abstractmethod
    def score(self, items: Sequence[Item]) -> Scored:
        """One raw score per item, in order.

        Raises:
            ServerError: after its retries.
        """


def protocol_names() -> tuple[str, ...]:
    """Names of the kinds of servers; imports none of them."""
    return registry.names(_PACKAGE)


def protocols() -> dict[str, type[ServerProtocol]]:
    """Every kind of server by its name."""
    return {name: registry.load_module(_PACKAGE, name, argument="reward_family").Protocol for name in protocol_names()}


def find_protocol(server: JsonServer) -> str:
    """Which kind of server it is, by what it says of itself.

    Raises:
        ConfigError: none that is known.
        ServerError: it cannot be asked.
    """
    known = protocols()
    paths = object_or_empty(object_or_empty(server.get("/openapi.json")).get("paths"))
    found = [name for name, protocol in known.items() if any(path in paths for path in protocol.PATHS)]
    if not found:
        info = object_or_empty(server.get("/info"))
        found = [name for name, protocol in known.items() if protocol.is_told_by(info)]
    if not found:
        served = object_or_empty(server.get("/v1/models")).get("data")
        owners = [object_or_empty(model).get("owned_by") for model in served] if isinstance(served, list) else []
        found = [owner for owner in owners if isinstance(owner, str) and owner in known]
    if found:
        return found[0]
    raise ConfigError(
        f"reward_model={server.shown_url}: it answers, but not as a reward server that is known here does "
        "(asked: /openapi.json, /info, /v1/models).",
        hint=f"name its kind: reward_family={'|'.join(known)}; or judge:MODEL@URL for a chat model as judge.",
    )


def needs_tokenizer(protocol: str, server: JsonServer, path: str | None) -> ConfigError:
    """The error of a server that takes texts only."""
    return ConfigError(
        f"reward_model={server.shown_url}: a server of kind {protocol} reads texts or tokens, not messages, so its "
        "model's chat template is needed here.",
        hint=f"reward_tokenizer={path}."
        if path
        else "reward_tokenizer= the checkpoint it serves (a hub name or a folder; only the tokenizer is read).",
    )


def entries(answer: Any, key: str | None) -> list[Mapping[str, Any]]:
    """A list of objects, under a key of the answer or as the answer itself.

    Raises:
        BadAnswerError: it is something else.
    """
    found = answer if key is None else answer.get(key) if isinstance(answer, dict) else None
    if isinstance(found, dict):  # SGLang answers a single text with a single object
        found = [found]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BadAnswerError("a list of objects was expected" + (f" under {key!r}" if key else ""))
    return found


def held(entry: Mapping[str, Any], name: str) -> Any:
    """What an entry holds; null, which is a score that is none, is something.

    Raises:
        BadAnswerError: there is no such name.
    """
    if name not in entry:
        raise BadAnswerError(f"an object with {name!r} was expected")
    return entry[name]


def in_order(told: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Entries that say their own places, in this order.

    Raises:
        BadAnswerError: they are not those of ``count`` items.
    """
    found = {entry["index"]: entry for entry in told if type(entry.get("index")) is int}
    if len(told) != count or sorted(found) != list(range(count)):
        raise BadAnswerError(f"{count} scores were expected, each with its index from 0, got {len(told)}")
    return [found[place] for place in range(count)]


def text_of(told: Mapping[str, Any], *names: str) -> str | None:
    """Names of what a server holds, joined; None where it says none of them."""
    found = [told[name] for name in names if isinstance(told.get(name), str) and told[name]]
    return " ".join(dict.fromkeys(found)) or None


def count_or_none(value: Any) -> int | None:
    """A number of things that a server tells; None for anything else."""
    return value if type(value) is int and 0 < value < 2**53 else None


def token_count(value: Any, name: str) -> int:
    """What a server says it has read; 0 if it does not say."""
    return count_or_none(object_or_empty(value).get(name)) or 0
