"""Conversation and response -> the token ids a reward model reads.

All rules are here, so that a family states only where it differs: text is rendered and tokenised in one go (text that
went through a template must not meet the tokenizer's own BOS), a refused system message goes before the first user
message, an unfinished answer is a closed or an open turn, half a character at its end is not read, and what is too
long is cut on the left, so that the response stays.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from specrej_eval import chat_templates
from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.paths import expanded
from specrej_eval.rewards.base import readable
from specrej_eval.special_tokens import DEFUSED, ENCODE_AS_TEXT, Marked, SpecialTokenError, Tokeniser

_NO_LIMIT = 1_000_000
"""Tokenizers without a maximum length report about 1e30."""

_logger = logging.getLogger(__name__)


class Input(NamedTuple):
    """What the model reads for one row."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    """Segment ids of a text pair; empty where the tokenizer has none."""


class Renderer:
    """Makes the inputs of one reward model. A family may give its own template, or override ``encode``.

    Args:
        tokenizer: the checkpoint's.
        name: the reward model's name, for messages.
        vocab_size: ids from here on are refused: tokenizer and weights do not match.
        max_length: most tokens of an input; None = no limit (see ``max_length_of``).
        partial_turn: how an unfinished answer is read: ``closed``, as if it were the whole turn (the reference code's
            way), or ``open``, without the template's tail. Finished answers are always closed.
        template: a Jinja chat template that wins over the tokenizer's. It writes its own BOS; none is added.
        trailing_ids: token ids put behind every input, open turns included (InternLM2's reward token).
        without_template: what a tokenizer without a chat template (and no ``template``) means: ``ask`` = an error that
            asks for ``reward_template=``, ``pair`` = an encoder's text pair, ``text`` = prompt + response as one text,
            with the BOS that the tokenizer adds.
        special_tokens_in_content: see ``special_tokens.Tokeniser``.

    Raises:
        ConfigError: there is no template and the rule is ``ask``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        vocab_size: int,
        max_length: int | None = None,
        partial_turn: str = "closed",
        template: str | None = None,
        trailing_ids: Sequence[int] = (),
        without_template: Literal["ask", "pair", "text"] = "ask",
        special_tokens_in_content: str = ENCODE_AS_TEXT,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokeniser = Tokeniser(tokenizer, special_tokens_in_content)
        self.name = name
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.template: str | None = template
        self.trailing_ids = tuple(trailing_ids)
        self.without_template = without_template
        self.has_template = template is not None or tokenizer.chat_template is not None
        if not self.has_template and without_template == "ask":
            raise ConfigError(
                f"reward_model={name!r}: its tokenizer has no chat template, so it is not known how to write a "
                "conversation for it.",
                hint="reward_template= takes a Jinja chat template or a file that holds one; "
                "\"{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\" reads the plain text.",
            )
        candidates = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.filler: int = next((i for i in candidates if i is not None and i < vocab_size), 0)
        """The id used for padding, which no real token ever attends to."""
        self._open_partials = partial_turn == "open"
        self._merge_system = False
        self._warned: set[str] = set()

    def inputs(
        self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = ""
    ) -> list[Input]:
        """Each row's input, in row order; too long ones are cut on the left, with one warning.

        Raises:
            RewardError: the chat template refuses the conversation, or a token is beyond the model's vocabulary.
        """
        keys = [(readable(row, response_prefix), self._open_partials and not row.finished) for row in rows]
        firsts = {key: row.row for row, key in zip(reversed(rows), reversed(keys), strict=True)}
        together = self._encoded_together(conversation, firsts)
        known: dict[tuple[str, bool], tuple[Input, int]] = {}
        for key in dict.fromkeys(keys):
            encoded = together.get(key)
            if encoded is None:
                encoded = self._merging(self.encode, conversation, *key, row=firsts[key])
            known[key] = self._input(encoded, key[0], row=firsts[key])
        found = [known[key] for key in keys]
        if dropped := [num_dropped for _, num_dropped in found if num_dropped]:
            self.warn(
                "truncation",
                f"rows longer than its {self.max_length:,} tokens: {len(dropped)} of {len(rows)}; cut on the left "
                f"by up to {max(dropped):,} tokens (reported once).",
            )
        return [entry for entry, _ in found]

    def encode(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Any:
        """Tokenise one conversation with its response; a family with a form of its own overrides this.

        Args:
            messages: the turns before the response; a copy, free to change.
            open_turn: leave the response's turn open.

        Returns:
            A mapping with ``input_ids`` (list[int]), and ``token_type_ids`` for a text pair.

        Raises:
            Exception: whatever the template raises; it is tried again with system messages merged into the user's, and
                then becomes a RewardError that names the row.
        """
        if not self.has_template:
            return self._encode_plain(messages, response)
        turns, options = self._turns(messages, response, open_turn)
        return self.tokeniser.chat(turns, **options)

    def write(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Marked:
        """The same as text, as the chat template gives it."""
        turns, options = self._turns(messages, response, open_turn)
        return self.tokeniser.render(turns, **options)

    def text(
        self, conversation: Sequence[Message], response: str, open_turn: bool, *, row: int, with_bos: bool = True
    ) -> str:
        """What the chat template makes of a conversation and a response, for those who tokenise it themselves.

        Args:
            with_bos: False leaves out the BOS that their tokenizer will add.

        Raises:
            RewardError: the template refuses the conversation.
        """
        written: Marked = self._merging(self.write, conversation, response, open_turn, row=row)
        if written.marks:
            self.warn("special tokens", DEFUSED)
        return (written if with_bos else written.without_leading(self.tokenizer.bos_token)).defused

    def _turns(
        self, messages: list[dict[str, str]], response: str, open_turn: bool
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        just_opened = open_turn and not response.strip()  # nothing to continue
        turns = messages if just_opened else [*messages, {"role": "assistant", "content": response}]
        return turns, {
            "chat_template": self.template,
            "add_generation_prompt": just_opened,
            "continue_final_message": open_turn and not just_opened,
        }

    def positions_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Where in an input the head reads: at the last token, unless a family says otherwise."""
        return (len(ids) - 1,)

    def warn(self, key: str, text: str) -> None:
        """Log a warning about this reward model, once per key."""
        if key not in self._warned:
            self._warned.add(key)
            _logger.warning("reward_model=%s: %s", self.name, text)

    def _encode_plain(self, messages: Sequence[Message], response: str) -> Any:
        pair = self.without_template == "pair"
        self.warn(
            "template",
            "its tokenizer has no chat template; it reads the plain text of prompt and response "
            + ("as a text pair." if pair else "as one text."),
        )
        prompt = "\n".join(message["content"] for message in messages)
        if pair:
            return self.tokeniser.pair(prompt, response)
        # a context may begin with BOS already; the tokenizer adds it itself
        return self.tokeniser.text(prompt.removeprefix(self.tokenizer.bos_token or "") + response)

    def _encoded_together(
        self, conversation: Sequence[Message], firsts: Mapping[tuple[str, bool], int]
    ) -> dict[tuple[str, bool], Any]:
        """What ``encode`` gives for some responses, by one call of the tokenizer; without those that are encoded in a
        way of their own.

        Args:
            firsts: response and whether its turn stays open -> the first row that has it.
        """
        if type(self).encode is not Renderer.encode or not self.has_template or len(firsts) < 2:
            return {}
        written = {key: self._merging(self.write, conversation, *key, row=row) for key, row in firsts.items()}
        plain = {key: text.text for key, text in written.items() if not text.marks}
        if not plain:
            return {}
        try:
            found = self.tokenizer(list(plain.values()), add_special_tokens=False)["input_ids"]
        except Exception:  # of one of them: encoded by itself, it says which
            return {}
        return {key: {"input_ids": ids} for key, ids in zip(plain, found, strict=True)}

    def _input(self, encoded: Any, response: str, *, row: int) -> tuple[Input, int]:
        """One input and the number of tokens cut from it."""
        ids = [*encoded["input_ids"], *self.trailing_ids]
        if not ids:  # an empty prompt and response, and a tokenizer without BOS: as the harness does, a prefix token
            ids = [self.filler]
        if max(ids) >= self.vocab_size:
            raise RewardError(
                f"reward_model={self.name!r}: row {row} has token id {max(ids)}, but the model's vocabulary ends at "
                f"{self.vocab_size}: {response[:80]!r}",
                hint="tokenizer and weights do not match.",
            )
        types = list(encoded.get("token_type_ids") or ()) if self.without_template == "pair" else []
        cut = self._positions_to_cut(ids, encoded)
        if not cut:
            return Input(tuple(ids), tuple(types)), 0
        kept = [position for position in range(len(ids)) if position not in cut]
        entry = Input(tuple(ids[i] for i in kept), tuple(types[i] for i in kept) if types else ())
        return entry, len(cut)

    def _positions_to_cut(self, ids: list[int], encoded: Any) -> set[int]:
        """The leftmost tokens over the limit; BOS stays, and of a pair the prompt goes before the response."""
        excess = len(ids) - self.max_length if self.max_length is not None else 0
        if excess <= 0:
            return set()
        leading = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        order = [position for position in range(len(ids)) if position > 0 or ids[0] not in leading]
        if not self.has_template and self.without_template == "pair" and encoded.encodings:
            sides = encoded.sequence_ids(0)  # 0 = prompt, 1 = response, None = [CLS], [SEP]
            order = [i for side in (0, 1) for i in order if sides[i] == side]
        return set(order[:excess])

    def _merging(
        self, encode: Callable[..., Any], conversation: Sequence[Message], response: str, open_turn: bool, *, row: int
    ) -> Any:
        """``encode``, with the system message put elsewhere if the template refuses it."""
        messages = [dict(message) for message in conversation]
        ways = [messages]
        if any(message["role"] == "system" for message in messages) and self.has_template:
            ways = [_merged(messages)] if self._merge_system else [messages, _merged(messages)]
        refusal: Exception | None = None
        for turns in ways:
            try:
                encoded = chat_templates.in_time(functools.partial(encode, turns, response, open_turn=open_turn))
            except chat_templates.EndlessTemplateError as error:
                raise self._template_error(error, row, response, open_turn) from error
            except SpecialTokenError as error:
                raise self._special_token_error(error, row, response) from error
            except Exception as error:  # templates refuse with jinja's errors, and fail with any other
                refusal = refusal or error
                continue
            if refusal is not None:
                self._merge_system = True
                self.warn(
                    "system",
                    "its chat template takes no system message; the system message goes before the first user message.",
                )
            return encoded
        assert refusal is not None
        raise self._template_error(refusal, row, response, open_turn) from refusal

    def _special_token_error(self, error: SpecialTokenError, row: int, response: str) -> RewardError:
        return RewardError(
            f"reward_model={self.name!r}: {error}.\n  row {row}: {response[:80]!r}",
            hint="special_tokens_in_content=allow reads special tokens in prompts and answers as control tokens, "
            "encode_as_text as text.",
        )

    def _template_error(self, error: Exception, row: int, response: str, open_turn: bool) -> RewardError:
        return RewardError(
            f"the chat template of reward_model={self.name!r} failed: {type(error).__name__}: {error}\n"
            f"  row {row}: {response[:80]!r}",
            hint="it must render a conversation that ends with an assistant message"
            + (" and leave that message's text as it is (else partial_turn=closed)." if open_turn else "."),
        )


class TextRenderer(Renderer):
    """For models that were trained on text with the tokenizer's own BOS in front, not on a chat template's.

    One BOS that the template writes is taken for the tokenizer's. Llama tokenizers put a space before the first word of
    a text, but not always behind a BOS that is part of it, so the two ways of writing BOS are not the same.
    """

    def encode(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Any:
        text = self.write(messages, response, open_turn=open_turn)
        return self.tokeniser.encode(text.without_leading(self.tokenizer.bos_token))


def renderer_options(config: RunConfig) -> dict[str, Any]:
    """What the arguments say of rendering, as keyword arguments of ``Renderer``: a given ``reward_template`` comes last
    in ``{"template": family's own, **renderer_options(config)}``, so that it wins."""
    options: dict[str, Any] = {"partial_turn": config.partial_turn}
    options["special_tokens_in_content"] = config.special_tokens_in_content or ENCODE_AS_TEXT
    if config.reward_template is not None:
        options["template"] = read_template(config.reward_template)
    return options


def read_template(value: str) -> str:
    """``reward_template=``: Jinja text as it is, or the text of the file it names.

    Raises:
        ConfigError: it is no Jinja text, and there is no such file.
    """
    if "{{" in value or "{%" in value:
        return value
    path = expanded(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"reward_template={value!r} is neither a Jinja template nor a file that can be read ({error}).",
            hint="inline templates contain {{ ... }} or {% ... %}.",
        ) from error


def max_length_of(config: Any, tokenizer: Any) -> int | None:
    """Most tokens a model reads: the smaller of what model config and tokenizer say; None if neither says."""
    text_config = config.get_text_config()
    stated = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions")]
    stated.append(tokenizer.model_max_length)
    limits = [int(limit) for limit in stated if limit is not None and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


def _merged(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same conversation with its system messages put before the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    for message in rest:
        if message["role"] == "user":
            message["content"] = "\n\n".join([*system, message["content"]])
            return rest
    return [{"role": "user", "content": "\n\n".join(system)}, *rest] if system else rest
