"""vLLM's pooling server (``vllm serve MODEL`` of a sequence classifier, or with ``--runner pooling``).

``/classify`` and ``/pooling`` squash single scores unless ``use_activation`` is false (called ``activation`` before
0.11; unknown fields are ignored, so whether it was heard has to be tried out). ``/pooling`` answers a classifier token
by token: the last one is the score. Token ids are taken as they are. (From its request and response types, late 2026.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrej_eval.checked import object_or_empty
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.http import JsonServer, ServerError, numbers
from specrej_eval.rewards.servers.base import (
    Form,
    Item,
    Scored,
    ServerProtocol,
    count_or_none,
    entries,
    held,
    in_order,
    text_of,
    token_count,
)


class Protocol(ServerProtocol):
    """See the module's text."""

    ENDPOINTS = ("/classify", "/pooling")
    PATHS = ("/pooling",)

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        super().__init__(server, endpoint)
        self._endpoints = [endpoint] if endpoint else list(self.ENDPOINTS)
        served = self._info()
        model = served.get("id")
        self._model = model if isinstance(model, str) else None
        self.max_length = count_or_none(served.get("max_model_len"))

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        return "ids" if has_tokenizer else "messages"

    def served_model(self) -> str | None:
        return text_of(self._info(), "id", "root")

    def _info(self) -> Mapping[str, Any]:
        listed = object_or_empty(self._server.get("/v1/models")).get("data")
        return object_or_empty(listed[0] if isinstance(listed, list) and listed else None)

    def check(self, sample: Sequence[Item]) -> None:
        while True:
            try:
                raw = self._ask_all(sample, activation=False).scores
                break
            except ServerError as error:
                # 400 is how vLLM says that the model does not support the task of an endpoint
                if error.status not in (400, 404, 405) or len(self._endpoints) < 2:
                    raise
                del self._endpoints[0]
        squashed = self._ask_all(sample, activation=True).scores
        same = all(abs(one - other) < 1e-6 for one, other in zip(raw, squashed, strict=True))
        if same and all(0 <= score <= 1 for score in raw):
            raise ConfigError(
                f"reward_model={self._server.shown_url}: this vLLM gives the same scores, all in [0, 1] "
                f"({', '.join(f'{score:.4g}' for score in raw)}), whether or not it is asked for raw ones: good "
                "answers would tie at 1.",
                hint="use vLLM 0.11 or newer; or start it with --pooler-config '{\"use_activation\": false}' "
                "(--override-pooler-config in older releases), and this check passes.",
            )

    def score(self, items: Sequence[Item]) -> Scored:
        return self._ask_all(items, activation=False)

    def _ask_all(self, items: Sequence[Item], *, activation: bool) -> Scored:
        if not items[0].messages:
            return self._ask({"input": [list(item.ids) for item in items]}, len(items), activation)

        def one(item: Item) -> Scored:  # a request holds one conversation
            messages = [{"role": role, "content": content} for role, content in item.messages]
            body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": item.open_turn}
            return self._ask(body, 1, activation)

        parts = self._server.each(one, items)
        return Scored([score for part in parts for score in part.scores], sum(part.tokens for part in parts))

    def _ask(self, body: dict[str, Any], count: int, activation: bool) -> Scored:
        endpoint = self._endpoints[0]
        asked = {"use_activation": activation, "activation": activation, **body}
        if self._model is not None:
            asked["model"] = self._model

        def parse(answer: Any) -> Scored:
            told = entries(answer, "data")
            if all("index" in entry for entry in told):
                told = in_order(told, count)
            found = [_last_token(held(entry, "probs" if endpoint == "/classify" else "data")) for entry in told]
            usage = answer.get("usage")
            return Scored(numbers(found, count), token_count(usage, "prompt_tokens"))

        return self._server.post(endpoint, asked, parse)


def _last_token(value: Any) -> Any:
    """Of scores token by token, the last token's."""
    while isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    return value
