"""Hugging Face's text-embeddings-inference with a sequence classifier (one with one label is a reranker to it).

``/predict`` scores both kinds, raw with ``raw_scores``; ``/rerank``, which answers best first, is asked only where the
address names it. (From its request and response types, late 2026.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrej_eval.checked import object_or_empty
from specrej_eval.errors import ConfigError
from specrej_eval.rewards.base import in_groups
from specrej_eval.rewards.http import BadAnswerError, JsonServer, number, numbers
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
)


class Protocol(ServerProtocol):
    """See the module's text."""

    ENDPOINTS = ("/predict", "/rerank")
    PATHS = ("/predict",)

    adds_bos = True
    without_template = "pair"

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        super().__init__(server, endpoint)
        told = object_or_empty(server.get("/info"))
        self.most_items = count_or_none(told.get("max_client_batch_size")) or 32
        kind = told.get("model_type")
        if isinstance(kind, dict) and "embedding" in kind:
            raise ConfigError(
                f"reward_model={server.shown_url}: this TEI server holds an embedding model, which scores nothing.",
                hint="it must serve a sequence classifier.",
            )

    @classmethod
    def is_told_by(cls, info: Mapping[str, Any]) -> bool:
        return "model_type" in info and "max_client_batch_size" in info

    def served_model(self) -> str | None:
        return text_of(object_or_empty(self._server.get("/info")), "model_id", "model_sha")

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        return "text" if has_tokenizer and has_template and self._endpoint != "/rerank" else "pair"

    def score(self, items: Sequence[Item]) -> Scored:
        if self._endpoint == "/rerank":
            prompts = [item.prompt for item in items]  # a request takes one query
            found = in_groups(
                prompts, lambda places: self._rerank(prompts[places[0]], [items[place].response for place in places])
            )
            return Scored(found, 0)
        inputs = [[item.prompt, item.response] if item.response else [item.text] for item in items]

        def parse(answer: Any) -> list[float]:
            if not isinstance(answer, list):
                raise BadAnswerError("a list of predictions for each text was expected")
            return numbers([[held(label, "score") for label in entries(entry, None)] for entry in answer], len(items))

        return Scored(self._server.post("/predict", {"inputs": inputs, "raw_scores": True}, parse), 0)

    def _rerank(self, query: str, texts: list[str]) -> list[float]:
        def parse(answer: Any) -> list[float]:
            ranked = in_order(entries(answer, None), len(texts))  # they come best first
            return [number(held(entry, "score")) for entry in ranked]

        return self._server.post("/rerank", {"query": query, "texts": texts, "raw_scores": True}, parse)
