"""``reward_model=http://host:port``: a reward model behind a server (``rewards.servers``: vLLM, SGLang, TEI, OpenRLHF).

Which kind it is, the server is asked once; ``reward_family=`` names it by hand, and so does an address that ends with
one of its paths (``/pooling``, ``/classify``, ``/predict``, ``/rerank``, ``/get_reward``). ``reward_tokenizer`` names
the checkpoint whose tokenizer and chat template render the rows; vLLM can do without (it renders messages itself).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlunsplit

from specrej_eval.config import RunConfig, reward_names
from specrej_eval.core import Message, RowView
from specrej_eval.errors import CheckpointError, ConfigError, suggest
from specrej_eval.rewards.base import Pair, RewardModel, RewardPlan, readable
from specrej_eval.rewards.checkpoints.renderer import Renderer, renderer_options
from specrej_eval.rewards.http import JsonServer, ServerError, address
from specrej_eval.rewards.kinds.base import AUTO, Asked, RewardKind
from specrej_eval.rewards.servers.base import Item, ServerProtocol, find_protocol, protocols
from specrej_eval.special_tokens import ENCODE_AS_TEXT, ContentGuard

KEY_VARIABLES = ("SPECREJ_REWARD_API_KEY",)
SATURATED = 4
"""So many different texts with one and the same score are worth a warning."""

_SAMPLE = (
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "I like turtles, turtles and turtles."),
)
_logger = logging.getLogger(__name__)


class Kind(RewardKind):
    FORMS: ClassVar[Mapping[str, str]] = {"http://host:port": "a reward server: vLLM, SGLang, TEI or OpenRLHF"}

    def claims(self, name: str) -> bool:
        return reward_names.is_address(name)

    def resolve(self, asked: Asked) -> RewardPlan:
        """Find the server and score two texts.

        Raises:
            ConfigError: a bad address or protocol name, a tokenizer that is needed, only squashed scores to be had.
            CheckpointError: the tokenizer cannot be loaded.
            RewardError: the server does not answer as it should.
        """
        reward = _connected(asked.name, asked.config, asked.token)
        reward.check()
        held = {} if reward.served_model is None else {"reward_served_model": reward.served_model}
        return RewardPlan(asked.name, lambda device: reward, deciding=held)


def _connected(name: str, config: RunConfig, token: str | bool | None) -> HttpReward:
    """The server at an address, asked which kind it is."""
    known = protocols()
    url, endpoint = split_endpoint(name, [path for protocol in known.values() for path in protocol.ENDPOINTS])
    family = config.reward_family
    if family not in (AUTO, *known):
        raise ConfigError(f"unknown reward_family {family!r} of a server.", hint=suggest(family, (AUTO, *known)))
    server = JsonServer(url, key_variables=KEY_VARIABLES, config=config)
    owners = [owner for owner, protocol in known.items() if endpoint in protocol.ENDPOINTS]
    if family == AUTO:
        family = owners[0] if len(owners) == 1 else find_protocol(server)
    if endpoint is not None and family not in owners:
        raise ConfigError(
            f"reward_model={server.shown_url}{endpoint} is a path of {' and '.join(owners)}, but "
            f"reward_family={family}."
        )
    tokenizer = None if config.reward_tokenizer is None else load_tokenizer(config, token)
    return HttpReward(server, known[family](server, endpoint), tokenizer, config=config, family=family)


def split_endpoint(name: str, endpoints: Sequence[str]) -> tuple[str, str | None]:
    """The address without one of the paths of protocols, and that path.

    Raises:
        ConfigError: as ``address``.
    """
    parts = address(name)
    path = parts.path.rstrip("/")
    endpoint = next((known for known in endpoints if path.endswith(known)), None)
    if endpoint is not None:
        path = path.removesuffix(endpoint)
    # /classify and /pooling lie beside /v1, where people look for them
    return urlunsplit(parts._replace(path=path.removesuffix("/v1"))), endpoint


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


class HttpReward(RewardModel):
    """Scores with a server; see the module's text.

    Rows that read the same are sent once, so equal answers are exact ties.
    """

    tokens_scored = 0
    """As the server counts them; stays 0 where it does not say."""

    def __init__(
        self, server: JsonServer, protocol: ServerProtocol, tokenizer: Any, *, config: RunConfig, family: str
    ) -> None:
        self.name = f"{server.shown_url} ({family})"
        self.family = family
        self._server = server
        self._protocol = protocol
        self.served_model = protocol.served_model()
        """What the server says it holds; None where it does not say."""
        self._breaks = server.num_breaks
        self._open_partials = config.partial_turn == "open"
        self.renderer: Renderer | None = None
        if tokenizer is not None:
            self.renderer = Renderer(
                tokenizer,
                name=self.name,
                vocab_size=len(tokenizer),
                max_length=protocol.max_length,
                without_template=protocol.without_template,
                **renderer_options(config),
            )
        has_template = self.renderer is not None and self.renderer.has_template
        self._form = protocol.form(self.renderer is not None, has_template)
        self._batch_size = min(config.reward_batch_size, protocol.most_items or config.reward_batch_size)
        self._warned = False
        known = None if self.renderer is None else self.renderer.tokeniser
        self._guard = ContentGuard(self.name, config.special_tokens_in_content or ENCODE_AS_TEXT, known)

    @property
    def guard(self) -> ContentGuard | None:
        """None where ids, or a text rendered here, are sent."""
        return self._guard if self._form in ("pair", "messages") else None

    def text_sent(self, conversation: Sequence[Message], response: str) -> str | None:
        if self._form != "text":
            return None
        assert self.renderer is not None
        return self.renderer.text(conversation, response, False, row=0)

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
            self._check_model()
            scores.update(zip(batch, found.scores, strict=True))
            self.tokens_scored += found.tokens
        self._notice_saturation(scores)
        return [scores[item] for item in items]

    def _check_model(self) -> None:
        """Before scores count: since the server was last asked it may have been started anew.

        Raises:
            ServerError: with another model.
        """
        if self.served_model is None or self._server.num_breaks == self._breaks:
            return
        now = self._protocol.served_model()
        if now != self.served_model:
            raise ServerError(
                f"reward_model={self._server.shown_url} has come back with another model: {now!r}, where the scores so "
                f"far are of {self.served_model!r}.",
                hint="start it with that model again, then the same command: with journal= or --output, answers that "
                "were finished are kept.",
            )
        self._breaks = self._server.num_breaks

    def _items(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str) -> list[Item]:
        if self._form == "ids":
            assert self.renderer is not None
            return [Item(ids=entry.ids) for entry in self.renderer.inputs(conversation, rows, response_prefix)]
        items = []
        for row in rows:
            response = readable(row, response_prefix)
            open_turn = self._open_partials and not row.finished
            if self._form == "text":
                assert self.renderer is not None
                text, prompt = (
                    self.renderer.text(conversation, *part, row=row.row, with_bos=not self._protocol.adds_bos)
                    for part in ((response, open_turn), ("", True))
                )
                items.append(Item(text=text, prompt=prompt))
            elif self._form == "pair":
                prompt = self._guard.text("\n".join(message["content"] for message in conversation), row.row)
                response = self._guard.text(response, row.row)
                items.append(Item(prompt=prompt, response=response or " "))  # no second text is no pair
            else:
                turns = [(message["role"], self._guard.text(message["content"], row.row)) for message in conversation]
                response = self._guard.text(response, row.row)
                items.append(Item(messages=(*turns, ("assistant", response)), open_turn=open_turn and bool(response)))
        return items

    def _notice_saturation(self, scores: dict[Item, float]) -> None:
        values = list(scores.values())
        if self._warned or len(values) < SATURATED or len(set(values)) > 1 or values[0] != values[0]:
            return
        self._warned = True
        _logger.warning(
            "reward_model=%s: %d different answers all scored exactly %g, so they cannot be told apart. A score of 0 "
            "or 1 is a saturated sigmoid: ask the server for raw scores, or run its model in float32 (reported once).",
            self.name,
            len(values),
            values[0],
        )
