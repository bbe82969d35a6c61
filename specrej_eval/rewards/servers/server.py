"""``reward_model=http://host:port``: a reward model behind a server (vLLM, SGLang, TEI, OpenRLHF).

Which kind it is, the server is asked once; ``reward_family=`` names it by hand, and so does an address that ends with
one of its paths (``/pooling``, ``/classify``, ``/predict``, ``/rerank``, ``/get_reward``). ``reward_tokenizer`` names
the checkpoint whose tokenizer and chat template render the rows; vLLM can do without (it renders messages itself).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import CheckpointError, ConfigError, suggest
from specrej_eval.rewards.base import AUTO, Pair, Stateless
from specrej_eval.rewards.checkpoints.renderer import Renderer, renderer_options
from specrej_eval.rewards.servers.http import JsonServer, without_password
from specrej_eval.rewards.servers.protocols import ENDPOINTS, PROTOCOLS, Item, ServerProtocol, find_protocol
from specrej_eval.special_tokens import DEFUSED, ENCODE_AS_TEXT, ContentGuard, Marked

KEY_VARIABLES = ("SPECREJ_REWARD_API_KEY",)
SATURATED = 4
"""So many different texts with one and the same score are worth a warning."""

_SAMPLE = (
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "I like turtles, turtles and turtles."),
)
_logger = logging.getLogger(__name__)


def claims(name: str) -> bool:
    """Whether a ``reward_model`` is the address of a server."""
    return name.startswith(("http://", "https://"))


def check(name: str, config: RunConfig, token: str | bool | None = None) -> None:
    """Find the server and score two texts, before any weights load.

    Raises:
        ConfigError: a bad address or protocol name, a tokenizer that is needed, only squashed scores to be had.
        CheckpointError: the tokenizer cannot be loaded.
        RewardError: the server does not answer as it should.
    """
    make(name, config, "", token)


def make(name: str, config: RunConfig, device: str, token: str | bool | None = None) -> HttpReward:
    """The server at an address, asked which kind it is. Raises as ``check``."""
    del device  # the server's own
    url, endpoint = split_endpoint(name)
    family = config.reward_family
    if family not in (AUTO, *PROTOCOLS):
        raise ConfigError(f"unknown reward_family {family!r} of a server.", hint=suggest(family, (AUTO, *PROTOCOLS)))
    server = JsonServer(url, key_variables=KEY_VARIABLES, timeout=config.reward_timeout, retries=config.reward_retries)
    if family == AUTO:
        family = (endpoint and ENDPOINTS[endpoint]) or find_protocol(server)
    if endpoint is not None and ENDPOINTS[endpoint] not in (None, family):
        raise ConfigError(
            f"reward_model={server.shown_url}{endpoint} is a path of {ENDPOINTS[endpoint]}, but reward_family={family}."
        )
    protocol: ServerProtocol = PROTOCOLS[family](server, endpoint)
    tokenizer = None if config.reward_tokenizer is None else load_tokenizer(config, token)
    reward = HttpReward(server, protocol, tokenizer, config=config, family=family)
    reward.check()
    return reward


def split_endpoint(name: str) -> tuple[str, str | None]:
    """The address without one of the known paths, and that path.

    Raises:
        ConfigError: no host, or a port that is no number.
    """
    parts = urlsplit(name)
    try:
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"reward_model={without_password(name)!r} is no address of a server.", hint="http://host:port"
        )
    path = parts.path.rstrip("/")
    endpoint = next((known for known in ENDPOINTS if path.endswith(known)), None)
    if endpoint is not None:
        path = path.removesuffix(endpoint)
    # /classify and /pooling lie beside /v1, where people look for them
    return urlunsplit(parts._replace(path=path.removesuffix("/v1"), query="", fragment="")), endpoint


def load_tokenizer(config: RunConfig, token: str | bool | None) -> Any:
    """Raises:
    CheckpointError: ``reward_tokenizer`` names none.
    """
    from transformers import AutoTokenizer

    name = config.reward_tokenizer
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, token=token)
    except Exception as error:  # files, formats and remote code fail in many ways
        raise CheckpointError(
            f"reward_tokenizer={name!r} cannot be loaded: {type(error).__name__}: {error}",
            hint="the hub name or folder of the checkpoint that the server holds.",
        ) from error


class HttpReward(Stateless):
    """Scores with a server; see the module's text.

    Rows that read the same are sent once, so equal answers are exact ties.
    """

    needs_logprobs = False

    def __init__(
        self, server: JsonServer, protocol: ServerProtocol, tokenizer: Any, *, config: RunConfig, family: str
    ) -> None:
        self.name = f"{server.shown_url} ({family})"
        self.family = family
        self.tokens_scored = 0
        """As the server counts them; stays 0 where it does not say."""
        self._server = server
        self._protocol = protocol
        self._open_partials = config.partial_turn == "open"
        self._renderer = None if tokenizer is None else self._make_renderer(tokenizer, config)
        has_template = self._renderer is not None and self._renderer.has_template
        self._form = protocol.form(self._renderer is not None, has_template)
        self._batch_size = min(config.reward_batch_size, protocol.most_items or config.reward_batch_size)
        self._warned = False
        known = None if self._renderer is None else self._renderer.tokeniser
        self._guard = ContentGuard(self.name, config.special_tokens_in_content or ENCODE_AS_TEXT, known)

    @property
    def renderer(self) -> Renderer | None:
        """What makes the token ids, or the text, of a row; None where the server does."""
        return self._renderer

    @property
    def guard(self) -> ContentGuard | None:
        """What holds texts to ``special_tokens_in_content``; None where ids or a text rendered here are sent."""
        return self._guard if self._form in ("pair", "messages") else None

    def text_sent(self, conversation: Sequence[Message], response: str) -> str | None:
        """The rendered text of a finished answer as it is sent; None where something else is."""
        if self._form != "text":
            return None
        assert isinstance(self._renderer, _TextRenderer)
        return self._renderer.text(conversation, response, False, row=0)

    @property
    def num_calls(self) -> int:
        """Requests answered."""
        return self._server.num_requests

    def check(self) -> None:
        """Score two texts with it. Raises as the module's ``check``."""
        pairs = [Pair(({"role": "user", "content": prompt},), answer) for prompt, answer in _SAMPLE]
        self._protocol.check([self._items(pair.conversation, [pair.row], "")[0] for pair in pairs])

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """The server's raw scores.

        Raises:
            RewardError: the server failed after its retries, or the chat template refuses the conversation.
        """
        return self._score_items(self._items(conversation, rows, response_prefix))

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Finished answers of any conversations, together in as few requests as can be. Raises as ``score``."""
        return self._score_items([self._items(pair.conversation, [pair.row], "")[0] for pair in pairs])

    def _score_items(self, items: Sequence[Item]) -> list[float]:
        unique = list(dict.fromkeys(items))
        scores: dict[Item, float] = {}
        for start in range(0, len(unique), self._batch_size):
            batch = unique[start : start + self._batch_size]
            found = self._protocol.score(batch)
            scores.update(zip(batch, found.scores, strict=True))
            self.tokens_scored += found.tokens
        self._notice_saturation(scores)
        return [scores[item] for item in items]

    def _items(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str) -> list[Item]:
        if self._form == "ids":
            assert self._renderer is not None
            return [Item(ids=entry.ids) for entry in self._renderer.inputs(conversation, rows, response_prefix)]
        items = []
        for row in rows:
            # an unfinished row may end within a character; the bytes so far decode to U+FFFD
            response = response_prefix + (row.text if row.finished else row.text.rstrip("\ufffd"))
            open_turn = self._open_partials and not row.finished
            if self._form == "text":
                assert isinstance(self._renderer, _TextRenderer)
                text = self._renderer.text(conversation, response, open_turn, row=row.row)
                items.append(Item(text=text, prompt=self._renderer.text(conversation, "", True, row=row.row)))
            elif self._form == "pair":
                prompt = self._guard.text("\n".join(message["content"] for message in conversation), row.row)
                response = self._guard.text(response, row.row)
                items.append(Item(prompt=prompt, response=response or " "))  # no second text is no pair
            else:
                turns = [(message["role"], self._guard.text(message["content"], row.row)) for message in conversation]
                response = self._guard.text(response, row.row)
                items.append(Item(messages=(*turns, ("assistant", response)), open_turn=open_turn and bool(response)))
        return items

    def _make_renderer(self, tokenizer: Any, config: RunConfig) -> Renderer:
        return _TextRenderer(
            tokenizer,
            name=self.name,
            vocab_size=len(tokenizer),
            max_length=self._protocol.max_length,
            without_template="pair" if self.family == "tei" else "ask",
            adds_bos=self.family == "tei",
            **renderer_options(config),
        )

    def _notice_saturation(self, scores: dict[Item, float]) -> None:
        values = list(scores.values())
        if self._warned or len(values) < SATURATED or len(set(values)) > 1 or values[0] != values[0]:
            return
        self._warned = True
        _logger.warning(
            "reward_model=%s: %d different answers all scored exactly %g, so they cannot be told apart. A score of 0 "
            "or 1 is a saturated sigmoid: ask the server for raw scores, or run its model in float32 (said once).",
            self.name,
            len(values),
            values[0],
        )


class _TextRenderer(Renderer):
    """A renderer that stops at the text, for servers that tokenise it themselves."""

    def __init__(self, tokenizer: Any, *, adds_bos: bool, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._adds_bos = adds_bos
        self._as_text = False

    def text(self, conversation: Sequence[Message], response: str, open_turn: bool, *, row: int) -> str:
        """What the chat template makes of it; without the BOS that the server's tokenizer will add.

        Raises:
            RewardError: the template refuses the conversation.
        """
        self._as_text = True
        try:
            rendered: Marked = self._encode_or_merge(conversation, response, open_turn, row=row)
        finally:
            self._as_text = False
        bos = self.tokenizer.bos_token
        if rendered.marks:
            self.warn("special tokens", DEFUSED)
        return (rendered.without_leading(bos) if self._adds_bos else rendered).defused

    def encode(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Any:
        if not self._as_text:
            return super().encode(messages, response, open_turn=open_turn)
        turn = [] if open_turn and not response.strip() else [{"role": "assistant", "content": response}]
        return self.tokeniser.render(
            [*messages, *turn],
            chat_template=self.template,
            add_generation_prompt=not turn,
            continue_final_message=bool(turn) and open_turn,
        )
