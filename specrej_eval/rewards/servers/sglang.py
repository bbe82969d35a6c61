"""SGLang's native server (``--is-embedding``).

Its own ``/classify`` gives raw values in ``embedding``; its ``/v1/classify`` gives probabilities only. (From its
request and response types, late 2026.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrej_eval.checked import object_or_empty
from specrej_eval.rewards.http import numbers
from specrej_eval.rewards.servers.base import (
    Form,
    Item,
    Scored,
    ServerProtocol,
    entries,
    held,
    needs_tokenizer,
    text_of,
    token_count,
)


class Protocol(ServerProtocol):
    """See the module's text."""

    ENDPOINTS = ("/classify",)
    PATHS = ("/get_model_info", "/model_info")

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        if has_tokenizer:
            return "ids"
        told = self._info()
        named = [told[name] for name in ("tokenizer_path", "model_path") if isinstance(told.get(name), str)]
        raise needs_tokenizer("sglang", self._server, named[0] if named else None)

    def served_model(self) -> str | None:
        return text_of(self._info(), "model_path", "weight_version")

    def _info(self) -> Mapping[str, Any]:
        return object_or_empty(self._server.get("/get_model_info") or self._server.get("/model_info"))

    def score(self, items: Sequence[Item]) -> Scored:
        def parse(answer: Any) -> Scored:
            told = entries(answer, None)
            tokens = sum(token_count(entry.get("meta_info"), "prompt_tokens") for entry in told)
            return Scored(numbers([held(entry, "embedding") for entry in told], len(items)), tokens)

        return self._server.post("/classify", {"input_ids": [list(item.ids) for item in items]}, parse)
