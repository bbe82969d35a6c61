"""How four kinds of reward servers are asked for raw scores: vLLM, SGLang, text-embeddings-inference, OpenRLHF.

Raw matters: a sigmoid in bfloat16 is exactly 1 from a score of 8 on, so best-of-n over squashed scores is a lottery
among the best rows. Facts from the servers' own request and response types, late 2026:

- vLLM ``/classify`` and ``/pooling`` squash single scores unless ``use_activation`` is false (called ``activation``
  before 0.11; unknown fields are ignored, so whether it was heard has to be tried out). ``/pooling`` answers a
  classifier token by token: the last one is the score. Token ids are taken as they are.
- SGLang's own ``/classify`` gives raw values in ``embedding``; its ``/v1/classify`` gives probabilities only.
- TEI has ``raw_scores``; a classifier with one label is a reranker to it; answers of ``/rerank`` come best first.
- OpenRLHF ``/get_reward`` reads texts with no special token added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from specrej_eval.errors import ConfigError
from specrej_eval.rewards.servers.http import BadAnswerError, JsonServer, ServerError, number, numbers

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


class ServerProtocol(Protocol):
    """One kind of server."""

    most_items: int | None
    """Items it takes in one request; None = any number."""
    max_length: int | None
    """Tokens it takes in one item, if it says so."""

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        """In which form it reads rows.

        Raises:
            ConfigError: it needs ``reward_tokenizer``.
        """
        ...

    def check(self, sample: Sequence[Item]) -> None:
        """Whether raw scores are to be had, tried out on two items.

        Raises:
            ConfigError: they are not.
            ServerError: the server fails.
        """
        ...

    def score(self, items: Sequence[Item]) -> Scored:
        """One raw score per item, in order.

        Raises:
            ServerError: after its retries.
        """
        ...


class Vllm:
    """vLLM's pooling server (``vllm serve MODEL`` of a sequence classifier, or with ``--runner pooling``)."""

    most_items: int | None = None

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        self._server = server
        self._endpoints = [endpoint] if endpoint else ["/classify", "/pooling"]
        listed = server.get("/v1/models")
        served = listed["data"][0] if isinstance(listed, dict) and listed.get("data") else {}
        self._model = served.get("id")
        length = served.get("max_model_len")
        self.max_length: int | None = length if isinstance(length, int) else None

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        del has_template
        return "ids" if has_tokenizer else "messages"

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
        # a request holds one conversation
        parts = self._server.each(lambda item: self._ask(self._conversation(item), 1, activation), items)
        return Scored([score for part in parts for score in part.scores], sum(part.tokens for part in parts))

    @staticmethod
    def _conversation(item: Item) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in item.messages]
        return {"messages": messages, "add_generation_prompt": False, "continue_final_message": item.open_turn}

    def _ask(self, body: dict[str, Any], count: int, activation: bool) -> Scored:
        endpoint = self._endpoints[0]
        asked = {"use_activation": activation, "activation": activation, **body}
        if self._model is not None:
            asked["model"] = self._model

        def parse(answer: Any) -> Scored:
            entries = _entries(answer, "data")
            if all("index" in entry for entry in entries):
                entries = sorted(entries, key=lambda entry: int(entry["index"]))
            found = [_last_token(entry.get("probs" if endpoint == "/classify" else "data")) for entry in entries]
            usage = answer.get("usage")
            return Scored(numbers(found, count), _count(usage, "prompt_tokens"))

        return self._server.post(endpoint, asked, parse)


class Sglang:
    """SGLang's native server (``--is-embedding``)."""

    most_items: int | None = None
    max_length: int | None = None

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        del endpoint  # there is one
        self._server = server

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        del has_template
        if has_tokenizer:
            return "ids"
        told = self._server.get("/get_model_info") or self._server.get("/model_info")
        path = told.get("tokenizer_path") or told.get("model_path") if isinstance(told, dict) else None
        raise needs_tokenizer("sglang", self._server, path)

    def check(self, sample: Sequence[Item]) -> None:
        self.score(sample)

    def score(self, items: Sequence[Item]) -> Scored:
        def parse(answer: Any) -> Scored:
            entries = _entries(answer, None)
            tokens = sum(_count(entry.get("meta_info"), "prompt_tokens") for entry in entries)
            return Scored(numbers([entry.get("embedding") for entry in entries], len(items)), tokens)

        return self._server.post("/classify", {"input_ids": [list(item.ids) for item in items]}, parse)


class Tei:
    """Hugging Face's text-embeddings-inference with a sequence classifier (one with one label is a reranker to it).

    ``/predict`` scores both kinds; ``/rerank`` is asked only where the address names it.
    """

    max_length: int | None = None

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        self._server = server
        self._endpoint = endpoint
        told = server.get("/info")
        told = told if isinstance(told, dict) else {}
        most = told.get("max_client_batch_size")
        self.most_items: int | None = most if isinstance(most, int) and most > 0 else 32
        kind = told.get("model_type")
        if isinstance(kind, dict) and "embedding" in kind:
            raise ConfigError(
                f"reward_model={server.shown_url}: this TEI server holds an embedding model, which scores nothing.",
                hint="it must serve a sequence classifier.",
            )

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        return "text" if has_tokenizer and has_template and self._endpoint != "/rerank" else "pair"

    def check(self, sample: Sequence[Item]) -> None:
        self.score(sample)

    def score(self, items: Sequence[Item]) -> Scored:
        if self._endpoint == "/rerank":
            places: dict[str, list[int]] = {}  # a request takes one query
            for place, item in enumerate(items):
                places.setdefault(item.prompt, []).append(place)
            scores = [0.0] * len(items)
            for prompt, mine in places.items():
                found = self._rerank(prompt, [items[place].response for place in mine])
                for place, score in zip(mine, found, strict=True):
                    scores[place] = score
            return Scored(scores, 0)
        inputs = [[item.prompt, item.response] if item.response else [item.text] for item in items]

        def parse(answer: Any) -> list[float]:
            if not isinstance(answer, list) or not all(isinstance(entry, list) for entry in answer):
                raise BadAnswerError("a list of predictions for each text was expected")
            return numbers([[label.get("score") for label in entry] for entry in answer], len(items))

        return Scored(self._server.post("/predict", {"inputs": inputs, "raw_scores": True}, parse), 0)

    def _rerank(self, query: str, texts: list[str]) -> list[float]:
        def parse(answer: Any) -> list[float]:
            entries = _entries(answer, None)
            found = {entry.get("index"): number(entry.get("score")) for entry in entries}
            if sorted(found, key=str) != sorted(range(len(texts)), key=str):
                raise BadAnswerError(f"{len(entries)} ranks came for {len(texts)} texts")
            return [found[index] for index in range(len(texts))]  # they come best first

        return self._server.post("/rerank", {"query": query, "texts": texts, "raw_scores": True}, parse)


class OpenRlhf:
    """OpenRLHF's ``serve_rm``, and what follows its form (``{"query": [...]}`` -> ``{"rewards": [...]}``)."""

    most_items: int | None = None
    max_length: int | None = None

    def __init__(self, server: JsonServer, endpoint: str | None) -> None:
        self._server = server
        self._endpoint = endpoint or "/get_reward"

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        del has_template
        if not has_tokenizer:
            raise needs_tokenizer("openrlhf", self._server, None)
        return "text"

    def check(self, sample: Sequence[Item]) -> None:
        self.score(sample)

    def score(self, items: Sequence[Item]) -> Scored:
        def parse(answer: Any) -> list[float]:
            if not isinstance(answer, dict) or "rewards" not in answer:
                raise BadAnswerError("an object with 'rewards' was expected")
            return numbers(answer["rewards"], len(items))

        # the server reads the query alone; reward functions behind the same form also want to know where it starts
        body = {"query": [item.text for item in items], "prompts": [item.prompt for item in items]}
        return Scored(self._server.post(self._endpoint, body, parse), 0)


PROTOCOLS: dict[str, type[Vllm] | type[Sglang] | type[Tei] | type[OpenRlhf]] = {
    "vllm": Vllm,
    "sglang": Sglang,
    "tei": Tei,
    "openrlhf": OpenRlhf,
}
ENDPOINTS: dict[str, str | None] = {
    "/classify": None,  # of vLLM or SGLang
    "/pooling": "vllm",
    "/predict": "tei",
    "/rerank": "tei",
    "/get_reward": "openrlhf",
}
"""Paths that an address may end with, and whose they are."""


def find_protocol(server: JsonServer) -> str:
    """Which kind of server it is, by what it says of itself.

    Raises:
        ConfigError: none that is known.
        ServerError: it cannot be asked.
    """
    told = server.get("/openapi.json")
    paths = told.get("paths") if isinstance(told, dict) else None
    if isinstance(paths, dict):
        for path, name in (
            ("/get_reward", "openrlhf"),
            ("/get_model_info", "sglang"),
            ("/model_info", "sglang"),
            ("/pooling", "vllm"),
            ("/predict", "tei"),
        ):
            if path in paths:
                return name
    told = server.get("/info")
    if isinstance(told, dict) and "model_type" in told and "max_client_batch_size" in told:
        return "tei"
    told = server.get("/v1/models")
    if isinstance(told, dict) and isinstance(told.get("data"), list):
        for served in told["data"]:
            if isinstance(served, dict) and served.get("owned_by") in PROTOCOLS:
                return str(served["owned_by"])
    raise ConfigError(
        f"reward_model={server.shown_url}: it answers, but not as a reward server that is known here does "
        "(asked: /openapi.json, /info, /v1/models).",
        hint=f"name its kind: reward_family={'|'.join(PROTOCOLS)}; or judge:MODEL@URL for a chat model as judge.",
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


def _entries(answer: Any, key: str | None) -> list[Mapping[str, Any]]:
    found = answer if key is None else answer.get(key) if isinstance(answer, dict) else None
    if isinstance(found, dict):  # SGLang answers a single text with a single object
        found = [found]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BadAnswerError("a list of objects was expected" + (f" under {key!r}" if key else ""))
    return found


def _last_token(value: Any) -> Any:
    """Of scores token by token, the last token's."""
    while isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    return value


def _count(value: Any, name: str) -> int:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, int) else 0
