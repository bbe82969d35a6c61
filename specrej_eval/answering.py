"""Instructions in, recorded answers out: what `specrej-eval run` and the alpaca_eval decoder have in common.

Rendering follows one rule: a bare instruction goes through the language model's chat template where it has one; text
that a template of the user's own has rendered is taken as it is. The reward model reads the bare instruction as the
user's turn and renders it with its own template.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from specrej_eval import stopping
from specrej_eval.config import AUTO, MAX, PromptArguments, RunConfig
from specrej_eval.core import Message, Prompt, Question, Spent
from specrej_eval.engines.base import Engine
from specrej_eval.errors import ConfigError, LimitReached, PromptError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.progress import audit_line, summary_line
from specrej_eval.records.answers import Answer, audit_sample, total_cost
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.special_tokens import ContentText
from specrej_eval.wording import counted, inert

logger = logging.getLogger(__name__)


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
    asked: PromptArguments,
    *,
    task: str,
    truncate: bool = False,
) -> list[Request]:
    """Requests in the questions' order; a question asked twice is drawn twice, independently.

    Args:
        asked: how a question becomes a prompt; ``max_tokens`` shortens ``max_gen_toks`` where the prompt is long.
        task: part of the random streams' key and of the records.
        truncate: cut prompts that do not fit the context on the left, with one warning; else they are an error.

    Raises:
        PromptError: a prompt is empty, or does not fit; names it.
    """
    seen: Counter[str] = Counter()
    requests = []
    truncated: list[str] = []
    for question in questions:
        prompt = replace(encode(engine, question, apply_chat_template=asked.apply_chat_template), task=task)
        own = config
        if asked.max_tokens is not None:
            room = asked.max_tokens - prompt.num_tokens
            if room < 1:
                raise PromptError(
                    f"{question.name} has {prompt.num_tokens:,} tokens, but max_tokens={asked.max_tokens} is the limit "
                    "of prompt and answer together.",
                    hint="raise max_tokens, or leave it out.",
                )
            own = config.replace(max_gen_toks=min(config.max_gen_toks, room))
        room = engine.max_length - own.max_gen_toks
        if prompt.num_tokens > room:
            if not truncate or room < 1:
                raise PromptError(
                    f"{question.name} has {prompt.num_tokens:,} tokens; with max_gen_toks={own.max_gen_toks} it "
                    f"exceeds the model's context of {engine.max_length:,} tokens.",
                    hint="lower max_gen_toks, shorten the prompt, or use a model with a longer context.",
                )
            truncated.append(f"{question.name}, {prompt.num_tokens} tokens")
            prompt = replace(prompt, token_ids=prompt.token_ids[-room:])
        repeat = seen[prompt.prompt_hash]
        seen[prompt.prompt_hash] += 1
        requests.append(Request(prompt=replace(prompt, repeat=repeat), config=own, until=asked.until))
    if truncated:
        logger.warning(
            "%s longer than the model's context of %d tokens minus max_gen_toks=%d: cut off at the beginning, "
            "the first of them %s.",
            counted(len(truncated), "prompt is", "prompts are"),
            engine.max_length,
            config.max_gen_toks,
            truncated[0],
        )
    return requests


def settle_capacity(
    generator: Generator,
    requests: Sequence[Request],
    store: OutputsFolder,
    *,
    agree: Callable[[int], int] = lambda tokens: tokens,
) -> None:
    """Tokens of KV for ``n=max``: as many as the run in ``store`` began with, else measured now and kept there.

    Args:
        agree: of what several processes have room for, the number that all of them take.
    """
    config = generator.config
    if store.capacity_tokens is None and config.n == MAX and config.kv_budget_tokens is None and requests:
        store.put_capacity(agree(generator.measured_capacity(requests)))
    if store.capacity_tokens is not None:
        generator.capacity_tokens = store.capacity_tokens


def answer(
    generator: Generator,
    questions: Sequence[Question],
    requests: Sequence[Request],
    *,
    store: OutputsFolder | None = None,
    progress: bool = True,
    summary: bool = True,
    spent: Spent | None = None,
    before: int = 0,
) -> list[Answer]:
    """Answer requests, in order; what ``store`` has already is taken from there, the rest recorded as it finishes.

    Args:
        spent: counts what this call decodes, and how many answers it finds in records.
        before: answers of the same run that are there and not asked for here: they stand in its live state.

    Raises:
        ConfigError, PromptError, RewardError, OutOfMemoryError, LimitReached: as ``Generator.run``; what finished is in
            ``store``.
    """
    if len(questions) != len(requests):
        raise ConfigError(f"{len(questions)} questions, but {len(requests)} requests: each question needs one.")
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
            logger.warning(
                "%d of %d answers are already recorded; %d are left to do.", len(answers), len(requests), len(left)
            )
        work = [requests[index] for index in left]
        if store is not None:
            generator.state_path = str(store.state_file)
            generator.answered_before = before + len(answers)
        where = store.path if store is not None else generator.config.journal
        with stopping.keeping(len(requests), where, answers=len(answers)) as kept:
            try:
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
                    answers[index] = done
            except LimitReached as error:
                if store is None:
                    raise
                raise LimitReached.after(
                    len(answers), len(requests), limit=error.limit, where=str(store.path)
                ) from error
    return [answers[index] for index in range(len(requests))]


def summary(answers: Sequence[Answer], spent: Spent, *, name: str) -> Iterator[str]:
    """What a whole run cost and gained, and what is to be said of its answers; a line each."""
    best = [item.reward for item in answers if item.reward is not None]
    ended = [reward for item in answers for reward in item.finished_rewards]
    line = summary_line(len(answers), spent, best, ended, total=total_cost(answers), source="the records")
    name = inert(name)
    yield f"{name}: {line}"
    if told := audit_line(audit_sample(answers), total_cost(answers)):
        yield f"{name}: {told}"
    if empty := [item for item in answers if not item.output.strip()]:
        yield f"{name}: {counted(len(empty), 'answer is', 'answers are')} empty, such as that to {empty[0].called}"
