# torch-free
"""``vllm serve``: completions with token ids, and in dev mode (``VLLM_SERVER_DEV_MODE=1``) a pause.

``/pause`` without a mode aborts everything that runs: it is never called without ``mode=keep``. What a request leaves
out, vLLM takes from the checkpoint's generation_config.json, so all is said. (From vLLM 0.32's ``entrypoints/openai/
completion`` and ``entrypoints/rl/online/api_router.py``; it gives token ids since 0.10.2.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from specrej_eval.checked import object_or_empty
from specrej_eval.config import RunConfig
from specrej_eval.core import CONFIDENCE_TOKENS, TokenStat
from specrej_eval.engines.servers.protocols.base import (
    Asked,
    Delta,
    EngineProtocol,
    count_of,
    whole_ids,
)
from specrej_eval.engines.servers.protocols.completions import COMPLETIONS, choice_of, finish_of
from specrej_eval.http import BadAnswerError
from specrej_eval.vllm_adapter import refusal

logger = logging.getLogger(__name__)


class Protocol(EngineProtocol):
    """See the module's text."""

    KIND: ClassVar[str] = "vLLM"
    STATS: ClassVar[frozenset[TokenStat]] = frozenset({"logprob", "confidence"})
    HOW_TO_PAUSE: ClassVar[str] = "VLLM_SERVER_DEV_MODE=1 vllm serve ..."

    def connect(self) -> None:
        self.identify()
        version = object_or_empty(self.server.get("/version")).get("version")
        self.version = version if isinstance(version, str) else None
        paused = self.paused()
        self.can_pause = paused is not None
        if paused:
            logger.warning(
                "%s was left paused, by a run that was killed or by another client: it goes on now.",
                self.server.shown_url,
            )
            self.resume()
        asked = Asked(request_id="specrej-eval", token_ids=[1], max_tokens=1, seed=0, config=RunConfig(), stop_ids=())
        path, body = self.request(asked)
        del body["stream"], body["stream_options"], body["request_id"]
        self.gives_ids = isinstance(
            self.server.post(path, body, lambda answer: choice_of(answer).get("token_ids")), list
        )

    def refuses(self, config: RunConfig, token_stats: Collection[TokenStat]) -> str | None:
        del token_stats
        return refusal(config)

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        config = asked.config
        body: dict[str, Any] = {
            "prompt": list(asked.token_ids),
            "max_tokens": asked.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": config.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": asked.seed,
            "stop_token_ids": list(asked.stop_ids),
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True,
            "request_id": asked.request_id,
        }
        if asked.token_stats:
            body["logprobs"] = CONFIDENCE_TOKENS if "confidence" in asked.token_stats else 0
            body["return_tokens_as_token_ids"] = True
        return COMPLETIONS, {**body, **({"model": self.model} if self.model else {})}

    def read(self, event: Any) -> Delta:
        choice = choice_of(event)
        if not choice:  # the last event: what it cost (`vllm serve --enable-prompt-tokens-details`)
            details = object_or_empty(object_or_empty(event).get("usage")).get("prompt_tokens_details")
            return Delta(cached=count_of(object_or_empty(details).get("cached_tokens")))
        finish = finish_of(choice)
        if not self.gives_ids:
            text = choice.get("text")
            return Delta(text=text if isinstance(text, str) else "", finish=finish)
        token_ids = whole_ids(choice.get("token_ids") or [])
        total = object_or_empty(object_or_empty(event).get("usage")).get("completion_tokens")
        return Delta(
            total=total if isinstance(total, int) else None,
            token_ids=token_ids,
            stats=_stats(choice.get("logprobs"), len(token_ids)),
            finish=finish,
        )

    def pause(self) -> None:
        self.server.tell("/pause?mode=keep")

    def resume(self, *, once: bool = False) -> None:
        self.server.tell("/resume", once=once)

    def paused(self, *, once: bool = False) -> bool | None:
        told = object_or_empty(self.server.get("/is_paused", once=once)).get("is_paused")
        return told if isinstance(told, bool) else None

    def abort(self, request_ids: Sequence[str]) -> None:
        if request_ids:  # an empty list aborts everybody's
            self.server.tell("/abort_requests", {"request_ids": [f"cmpl-{name}-0" for name in request_ids]}, once=True)


def _stats(logprobs: Any, count: int) -> dict[TokenStat, list[float]]:
    """Log-probs of the drawn tokens, and the mean of the likeliest ones', of an event.

    Raises:
        BadAnswerError: not one for each token.
    """
    if logprobs is None:
        return {}
    told = object_or_empty(logprobs)
    drawn, likeliest = told.get("token_logprobs"), told.get("top_logprobs")
    if not isinstance(drawn, list) or len(drawn) != count:
        raise BadAnswerError(f"log-probs of {count} tokens were expected, got {str(drawn)[:60]!r}")
    found: dict[TokenStat, list[float]] = {"logprob": [_number(value) for value in drawn]}
    if isinstance(likeliest, list) and len(likeliest) == count:
        found["confidence"] = [_confidence(entry) for entry in likeliest]
    return found


def _confidence(entry: Any) -> float:
    """Minus the mean log-prob of the likeliest tokens. The drawn one stands among them as an extra if it is not one."""
    values = sorted((_number(value) for value in object_or_empty(entry).values()), reverse=True)[:CONFIDENCE_TOKENS]
    return -math.fsum(values) / len(values) if values else math.nan


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswerError(f"a log-prob was expected, got {str(value)[:60]!r}")
    return float(value)
