"""Instructions in, recorded answers out: what `specrej-eval run` and the alpaca_eval decoder have in common.

Rendering follows one rule: a bare instruction goes through the language model's chat template where it has one; text
that a template of the user's own has rendered is taken as it is. The reward model reads the bare instruction as the
user's turn and renders it with its own template.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specrej_eval import stopping
from specrej_eval.config import RunConfig
from specrej_eval.core import Message, Prompt, Spent
from specrej_eval.engines.base import Engine
from specrej_eval.errors import ConfigError, PromptError
from specrej_eval.generator import Generator, Request
from specrej_eval.records.outputs import Answer, OutputsFolder
from specrej_eval.special_tokens import ContentText

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One instruction to answer."""

    instruction: str
    """What is asked, without any template; the reward model reads it as the user's turn."""
    text: str | None = None
    """What the language model reads, if a template has been applied already."""
    messages: tuple[Message, ...] | None = None
    """What the language model reads, as chat messages."""
    index: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages to the user call it."""
        start = self.instruction[:60] + ("..." if len(self.instruction) > 60 else "")
        return f"instruction {start!r}" if self.index is None else f"prompt {self.index} ({start!r})"


def encode(engine: Engine, question: Question, *, apply_chat_template: bool | str = AUTO) -> Prompt:
    """Tokenise a question.

    Args:
        apply_chat_template: ``auto`` = where the language model has one and the text is the bare instruction; True =
            the text becomes the user's turn of the template whatever it is; False = the text as it is.

    Raises:
        PromptError: the instruction is empty, or a chat template is asked for and there is none.
    """
    text = question.instruction if question.text is None else question.text
    if not question.instruction.strip() or not text.strip():
        raise PromptError(f"{question.name} is empty.", hint="remove it from the file of prompts.")
    bare = text == question.instruction
    use_template = engine.has_chat_template and bare if apply_chat_template == AUTO else apply_chat_template
    read: str | Sequence[Message] = question.messages or [{"role": "user", "content": text}]
    if question.messages is None and not use_template:
        read = ContentText.around(text, question.instruction)  # the template around it is the user's
    try:
        prompt = engine.encode(read)
    except PromptError as error:
        raise PromptError(f"{question.name}: {error.args[0]}", hint=error.hint) from error
    return replace(prompt, conversation=({"role": "user", "content": question.instruction},))


def requests_for(
    engine: Engine,
    questions: Sequence[Question],
    config: RunConfig,
    *,
    task: str,
    until: tuple[str, ...] = (),
    apply_chat_template: bool | str = AUTO,
    max_tokens: int | None = None,
    truncate: bool = False,
) -> list[Request]:
    """Requests in the questions' order; a question asked twice is drawn twice, independently.

    Args:
        task: part of the random streams' key and of the records.
        max_tokens: most tokens of prompt and answer together; shortens ``max_gen_toks`` where the prompt is long.
        truncate: cut prompts that do not fit the context on the left, with one warning; else they are an error.

    Raises:
        PromptError: a prompt is empty, or does not fit; names it.
    """
    seen: Counter[str] = Counter()
    requests = []
    truncated: list[str] = []
    for question in questions:
        prompt = replace(encode(engine, question, apply_chat_template=apply_chat_template), task=task)
        own = config
        if max_tokens is not None:
            room = max_tokens - prompt.num_tokens
            if room < 1:
                raise PromptError(
                    f"{question.name} has {prompt.num_tokens} tokens, and max_tokens={max_tokens} is for prompt and "
                    "answer together.",
                    hint="raise max_tokens, or leave it out.",
                )
            own = config.replace(max_gen_toks=min(config.max_gen_toks, room))
        room = engine.max_length - own.max_gen_toks
        if prompt.num_tokens > room:
            if not truncate or room < 1:
                raise PromptError(
                    f"{question.name} has {prompt.num_tokens} tokens, and with max_gen_toks={own.max_gen_toks} exceeds "
                    f"the model's context of {engine.max_length}.",
                    hint="lower max_gen_toks, shorten the prompt, or use a model with a longer context.",
                )
            truncated.append(f"{question.name}, {prompt.num_tokens} tokens")
            prompt = replace(prompt, token_ids=prompt.token_ids[-room:])
        repeat = seen[prompt.prompt_hash]
        seen[prompt.prompt_hash] += 1
        requests.append(Request(prompt=replace(prompt, repeat=repeat), config=own, until=until))
    if truncated:
        logger.warning(
            "%d prompts are longer than the model's context of %d tokens minus max_gen_toks=%d: their beginning is cut "
            "off. The first: %s.",
            len(truncated),
            engine.max_length,
            config.max_gen_toks,
            truncated[0],
        )
    return requests


def answer(
    generator: Generator,
    questions: Sequence[Question],
    requests: Sequence[Request],
    *,
    store: OutputsFolder | None = None,
    progress: bool = True,
    summary: bool = True,
    on_answer: Callable[[Answer], None] | None = None,
    spent: Spent | None = None,
) -> list[Answer]:
    """Answer requests, in order; what ``store`` has already is taken from there, the rest recorded as it finishes.

    Args:
        spent: counts what this call decodes, and how many answers it finds in records.

    Raises:
        ConfigError, PromptError, RewardError, OutOfMemoryError: as ``Generator.run``; what finished is in ``store``.
    """
    if len(questions) != len(requests):
        raise ConfigError(f"{len(questions)} questions and {len(requests)} requests do not belong together.")
    answers: dict[int, Answer] = {}
    left = []
    for index, request in enumerate(requests):
        known = store.get(request.key, request.prompt) if store is not None else None
        if known is None:
            left.append(index)
        else:
            question = questions[index]  # its place may be another by now
            answers[index] = replace(known, index=question.index, fields=dict(question.fields))
    if spent is not None:
        spent.taken += len(answers)
    if left:
        if answers:
            logger.warning("%d of %d answers were recorded already; %d to go.", len(answers), len(requests), len(left))
        work = [requests[index] for index in left]
        where = store.path if store is not None else generator.config.journal
        with stopping.keeping(len(requests), where, answers=len(answers)) as kept:
            for place, result in generator.run(work, progress=progress, summary=summary):
                index = left[place]
                question = questions[index]
                if spent is not None:
                    spent.count(result)
                done = Answer.of(
                    result,
                    key=requests[index].key,
                    instruction=question.instruction,
                    index=question.index,
                    others=question.fields,
                )
                with stopping.held():
                    if store is not None:
                        store.put(done)
                    kept.add()
                if on_answer is not None:
                    on_answer(done)
                answers[index] = done
    return [answers[index] for index in range(len(requests))]
