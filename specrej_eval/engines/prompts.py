"""Strings and chat messages to prompts: tokenised once, BOS exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specrej_eval import chat_templates
from specrej_eval.core import Message, Prompt, prompt_hash
from specrej_eval.errors import PromptError
from specrej_eval.special_tokens import ContentText, Tokeniser, check_text


def encode_prompt(
    tokeniser: Tokeniser,
    prompt: str | Sequence[Message],
    *,
    add_bos_token: bool | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
) -> Prompt:
    """A raw context (str), or chat messages rendered with the tokenizer's own template.

    Messages that end with an assistant turn are continued; that turn's text is the prompt's ``response_prefix``.

    Args:
        tokeniser: the tokenizer, and what becomes of special tokens in messages, and in the spans of a
            ``ContentText``. In any other string they are the caller's own, and stay special tokens.
        add_bos_token: None = the tokenizer's own way. A string that begins with BOS never gets a second one.

    Raises:
        PromptError: empty text, no messages, a message without role or content, half of a surrogate pair in a text, no
            chat template, or one that fails or does not end.
        SpecialTokenError: special tokens in content that are not allowed, or cannot be told from the template's.
    """
    tokenizer = tokeniser.tokenizer
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is an empty string.", hint="give a non-empty string or chat messages.")
        check_text(prompt)
        return Prompt(
            token_ids=tuple(encode_text(tokeniser, prompt, add_bos_token)),
            conversation=({"role": "user", "content": str(prompt)},),
            prompt_hash=prompt_hash(prompt),
        )
    if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping):
        raise PromptError(
            f"a prompt must be a string or a list of chat messages, got {prompt!r}.",
            hint='for example "Name a fruit." or [{"role": "user", "content": "Name a fruit."}]',
        )
    messages = [checked_message(message, place) for place, message in enumerate(prompt)]
    for message in messages:
        check_text(message["content"])
    if not messages:
        raise PromptError("the prompt holds no messages.", hint="give a string, or at least one user message.")
    if not tokenizer.chat_template:
        raise PromptError(
            "chat messages were given, but the tokenizer has no chat template.",
            hint="give the prompt as a string, or use an instruction-tuned model.",
        )
    continued = messages[-1]["role"] == "assistant"
    options: dict[str, Any] = {
        "add_generation_prompt": not continued,
        "continue_final_message": continued,
        **(chat_template_args or {}),
    }
    rendered = chat_templates.rendered(
        "the language model", lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options)
    )
    token_ids = tuple(chat_templates.in_time(lambda: tokeniser.chat(messages, **options))["input_ids"])
    return Prompt(
        token_ids=token_ids,
        conversation=tuple(messages[:-1] if continued else messages),
        response_prefix=messages[-1]["content"] if continued else "",
        prompt_hash=prompt_hash(rendered),
    )


def encode_text(tokeniser: Tokeniser, text: str, add_bos_token: bool | None = None) -> list[int]:
    """Token ids of a raw context. As HFLM: the tokenizer decides on BOS, unless the text begins with it already."""
    tokenizer = tokeniser.tokenizer
    bos = tokenizer.bos_token
    if isinstance(text, ContentText):
        marked = tokeniser.all_content(text)
        if marked.marks:
            return tokeniser.raw_context(marked, bos, add_bos_token)
    kwargs: dict[str, bool] = {}
    if bos and text.startswith(bos):
        kwargs["add_special_tokens"] = False
    elif add_bos_token is not None:
        kwargs["add_special_tokens"] = add_bos_token
    return list(tokenizer.encode(str(text), **kwargs))


def checked_message(message: Any, place: int) -> dict[str, str]:
    """A chat turn as a plain dict.

    Raises:
        PromptError: it is no mapping with a string role and a string content.
    """
    if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise PromptError(
            f"message {place} must be a dict with a string 'role' and a string 'content', got {message!r}.",
            hint='for example {"role": "user", "content": "..."}.',
        )
    return {"role": message["role"], "content": message["content"]}
