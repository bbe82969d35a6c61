# torch-free
"""Any server with OpenAI's ``/v1/completions``: rows come as text, so they are decoded to their end (Best-of-N).

Only what OpenAI's API has is asked for. What a server of unknown make does with other fields (``top_k``), it does not
say: such arguments are refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from specrej_eval.checked import object_or_empty
from specrej_eval.config import RunConfig
from specrej_eval.core import TokenStat
from specrej_eval.engines.servers.protocols.base import Asked, Delta, EngineProtocol, Finish, error_of
from specrej_eval.http import BadAnswerError

COMPLETIONS = "/v1/completions"


class Protocol(EngineProtocol):
    """See the module's text."""

    KIND: ClassVar[str] = "an OpenAI-compatible server"

    def connect(self) -> None:
        self.gives_ids = False
        self.identify()

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        config = asked.config
        body = {
            "prompt": list(asked.token_ids),
            "max_tokens": asked.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": asked.seed % 2**31,
            "stream": True,
        }
        return COMPLETIONS, {**body, **({"model": self.model} if self.model else {})}

    def refuses(self, config: RunConfig, token_stats: Collection[TokenStat]) -> str | None:
        del token_stats
        if config.temperature and (config.top_k or config.min_p):
            return (
                f"top_k={config.top_k} and min_p={config.min_p:g} are not of OpenAI's API, and a server may ignore "
                "what it does not know: give top_k=0,min_p=0 (top_p works)"
            )
        return None

    def read(self, event: Any) -> Delta:
        choice = choice_of(event)
        text = choice.get("text")
        return Delta(text=text if isinstance(text, str) else "", finish=finish_of(choice))


def choice_of(event: Any) -> Any:
    """The one choice of an event; empty where it has none.

    Raises:
        BadAnswerError: the event tells of an error, or is none.
    """
    error_of(event)
    choices = object_or_empty(event).get("choices")
    if not isinstance(choices, list):
        raise BadAnswerError(f"choices were expected, got {str(event)[:60]!r}")
    return object_or_empty(choices[0]) if choices else {}


def finish_of(choice: Any) -> Finish | None:
    """Raises:
    BadAnswerError: a reason that is none of OpenAI's.
    """
    reason = choice.get("finish_reason")
    if reason in (None, "stop", "length", "abort"):
        return reason  # type: ignore[no-any-return]  # held by the line above
    raise BadAnswerError(f"finish_reason {str(reason)[:60]!r}")
