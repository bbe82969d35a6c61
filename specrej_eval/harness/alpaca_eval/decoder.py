"""``fn_completions: specrej_completions`` and ``specrej_best_of_n``: alpaca_eval's completion functions, our way.

alpaca_eval calls such a function once for every 64 instructions, with rendered prompts. The models are loaded by the
first call and kept; an answer is recorded as soon as it is finished, so that a run that was stopped goes on there.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from alpaca_eval import utils

from specrej_eval import stopping
from specrej_eval.answering import answer, requests_for, settle_capacity, summary
from specrej_eval.api import RunPlan, resolve
from specrej_eval.config import Decides, DecoderArguments, names
from specrej_eval.core import Question, Spent
from specrej_eval.engines.base import Engine
from specrej_eval.errors import ConfigError, LimitReached
from specrej_eval.generator import Generator
from specrej_eval.harness.alpaca_eval.config import arguments_of
from specrej_eval.kv.memory import release_memory
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.rewards.base import RewardModel
from specrej_eval.special_tokens import ALLOW, concerned

logger = logging.getLogger(__name__)

TASK = "alpaca_eval"

_MARKUP = re.compile(r"<\|im_(?:start|end)\|>")
_KEPT = 2  # a model and a reference model are asked in turn, 64 instructions each
_loaded: dict[str, tuple[Engine, RewardModel, dict[str, Generator]]] = {}
"""What is loaded, and the generators that share it by configuration."""


@stopping.signals()
def specrej_completions(
    prompts: Sequence[str], *, generation: Generation | None = None, **completions_kwargs: Any
) -> dict[str, list[Any]]:
    """Answer prompts by Speculative Rejection.

    Args:
        prompts: as alpaca_eval renders them.
        generation: where answers are recorded (``evaluate_from_model`` gives it); None = nowhere.
        completions_kwargs: the arguments of ``--model_args``, and ``until``, ``max_tokens`` (prompt and answer
            together), ``apply_chat_template`` (``auto``, true, false), ``is_chatml_prompt``, ``price_per_hour`` (what
            the machine costs, for ``price_per_example``; 0 unless given).

    Returns:
        ``completions``, ``time_per_example`` (seconds), ``price_per_example`` and ``completions_all`` (one dict per
        answer: reward, tokens, rounds), each as long as ``prompts``.

    Raises:
        ConfigError, CheckpointError: before anything is loaded.
        PromptError, RewardError, OutOfMemoryError, LimitReached: what finished before is recorded.
    """
    return _completions(prompts, generation or Generation.of("specrej_completions", completions_kwargs))


@stopping.signals()
def specrej_best_of_n(
    prompts: Sequence[str], *, generation: Generation | None = None, **completions_kwargs: Any
) -> dict[str, list[Any]]:
    """Answer prompts by Best-of-N. See ``specrej_completions``."""
    return _completions(prompts, generation or Generation.of("specrej_best_of_n", completions_kwargs))


@dataclass(slots=True, kw_only=True)
class Generation:
    """What one YAML configuration asks for, checked, and where its answers go."""

    plan: RunPlan
    asked: DecoderArguments
    store: OutputsFolder | None = None
    record: RunRecord | None = None
    places: dict[str, int] = field(default_factory=dict)
    """Instructions of the whole run and where each stands; when all are answered the run is complete."""
    instructions: tuple[str, ...] = ()
    """Those of the whole run, in order; empty where only a chunk of them is known."""
    warned: bool = False
    """Whether special tokens in instructions were told of."""
    answered: dict[str, Answer] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    """What this process decoded of them, and how many it found recorded."""
    started: float | None = None
    """When its first chunk began (``time.perf_counter``), as ``max_seconds`` counts."""
    spent_before: int = 0
    """Tokens its generator had decoded by then, for another run in this process."""

    @classmethod
    def of(cls, function: str, completions_kwargs: Mapping[str, Any]) -> Self:
        """Check ``completions_kwargs``; nothing is loaded.

        Raises:
            ConfigError, CheckpointError: an unknown argument, a bad value, a checkpoint that is not there.
        """
        config, host, asked = arguments_of(function, completions_kwargs)
        if config.plan is not None:
            raise ConfigError(
                "plan=only answers nothing, and alpaca_eval would have no outputs to judge.",
                hint="leave it out; `specrej-eval run --plan only` says what the same arguments take.",
            )
        return cls(plan=resolve(config, host), asked=asked)

    def fingerprint(self, **others: Any) -> dict[str, Any]:
        """Everything that decides the answers; ``others`` = the prompt template."""
        return self.plan.fingerprint(**self.asked.deciding(), **others)

    def question(self, prompt: str) -> Question:
        """A rendered prompt as a question; its bare instruction is known if our hook has rendered it."""
        row: Mapping[str, Any] = getattr(prompt, "row", {})
        instruction = str(row.get("instruction", prompt))
        index = self.places.get(instruction)
        others = {"dataset": str(row["dataset"])} if "dataset" in row else {}
        if not self.asked.is_chatml_prompt:
            return Question(instruction=instruction, text=str(prompt), index=index, fields=others)
        try:
            messages = self._chatml(str(prompt), instruction if row else "")
        except (AssertionError, IndexError):
            raise ConfigError(
                "is_chatml_prompt=true, but the prompt template is not ChatML: it must begin with <|im_start|> and end "
                f"with <|im_end|>. The first rendered prompt: {str(prompt)[:80]!r}.",
                hint='leave is_chatml_prompt out: prompt_template "{instruction}" goes through the chat template.',
            ) from None
        return Question(instruction=instruction, messages=messages, index=index, fields=others)

    def _chatml(self, prompt: str, instruction: str) -> tuple[dict[str, str], ...]:
        """alpaca_eval's reading of ChatML, to which an instruction can spell further turns; where special tokens in
        content are no control tokens, it cannot."""
        if self.plan.config.special_tokens_in_content in (None, ALLOW) or not _MARKUP.search(instruction):
            return tuple(utils.prompt_to_chatml(prompt))
        mark = next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in prompt)
        messages = utils.prompt_to_chatml(prompt.replace(instruction, mark))
        return tuple({**turn, "content": turn["content"].replace(mark, instruction).strip()} for turn in messages)

    def generator(self) -> Generator:
        """The models, loaded once for all chunks and for all configurations that name the same ones."""
        plan, config = self.plan, self.plan.config
        placed = [getattr(config, name) for name in names(Decides.PLACE)]
        # a self-score has no floor where nothing is compared
        models = _key(of_models := plan.of_models(), placed, config.partial_turn, config.n == 1)
        if models not in _loaded:
            while len(_loaded) >= _KEPT:
                del _loaded[next(iter(_loaded))]  # the oldest, before new ones ask for memory
            _loaded[models] = (*plan.load(content_rule=ALLOW), {})
        engine, reward, generators = _loaded[models]
        key = _key(config.to_dict())
        if key not in generators:
            generators[key] = plan.generator(engine, reward, models=of_models)
        return generators[key]

    def everything(self) -> list[Answer]:
        """All answers of this run's instructions; empty until each has one.

        alpaca_eval does not ask again for what it has in ``model_outputs.json``: the record has those too.
        """
        known = self.store.answers() if self.store is not None else list(self.answered.values())
        # as this data set has them: it may be another than the one they were drawn for
        found = [
            replace(self.answered.get(item.key, item), index=self.places[item.instruction])
            for item in known
            if item.instruction in self.places
        ]
        return found if len({item.instruction for item in found}) == len(self.places) else []

    def mark_complete(self) -> None:
        """Write down that all instructions are answered, if they are."""
        found = self.everything()
        if found and self.store is not None and self.record is not None:
            self.store.merge_parts(sorted(found, key=lambda item: self.places[item.instruction]))
            self.store.mark_complete(self.record, found, self.spent)

    def answered_all(self, answers: Sequence[Answer]) -> None:
        """Count answers; once they are all there say what they cost, and mark the run as complete."""
        self.answered.update({item.key: item for item in answers})
        found = self.everything()
        if not found:
            return
        for line in summary(
            found, self.spent, name=self.record.name if self.record is not None else self.plan.config.strategy
        ):
            logger.warning("%s", line)
        self.mark_complete()


def _completions(prompts: Sequence[str], generation: Generation) -> dict[str, list[Any]]:
    generator = generation.generator()
    store, record = generation.store, generation.record
    questions = [generation.question(prompt) for prompt in prompts]
    requests = requests_for(
        generator.engine,
        questions,
        generation.plan.config,
        generation.asked,
        task=TASK,
        truncate=True,
    )
    if generation.plan.config.special_tokens_in_content is None and not generation.warned:
        generation.warned = True  # of all chunks, with the first
        asked = generation.instructions or [question.instruction for question in questions]
        if told := concerned(generator.engine.tokeniser, asked):
            logger.warning("%s", told)

    if store is not None:
        settle_capacity(generator, requests, store)
    if generation.started is None:
        generation.started = time.perf_counter()
        generation.spent_before = generator.totals.decode_tokens + generator.totals.audit_tokens
    generator.started, generator.spent_before = generation.started, -generation.spent_before
    try:
        answers = answer(
            generator,
            questions,
            requests,
            store=store,
            summary=not generation.places,
            spent=generation.spent,
        )
    except LimitReached as error:
        raise _told_of_all(error, generation) from error
    if record is not None and not record.described:
        record.described = generator.describe()
    generation.answered_all(answers)
    return {
        "completions": [item.output for item in answers],
        "time_per_example": [item.seconds for item in answers],
        "price_per_example": [item.seconds / 3600 * generation.asked.price_per_hour for item in answers],
        "completions_all": [item.to_dict() for item in answers],
    }


def _told_of_all(error: LimitReached, generation: Generation) -> LimitReached:
    """The limit as one of the whole run, and not of alpaca_eval's chunk of it; the run is marked as stopped by it."""
    store, record = generation.store, generation.record
    if store is None or record is None:
        return error
    record.stopped = error.limit
    store.write_record(record)
    answered = len({item.instruction for item in store.answers()} & generation.places.keys())
    return LimitReached.after(answered, len(generation.places), limit=error.limit, where=str(store.path))


def release_models() -> bool:
    """Let go of all loaded models; the next call loads its own again. False if there were none."""
    found = bool(_loaded)
    _loaded.clear()
    release_memory()
    return found


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
