"""lm-eval's requests in our words: messages behind a prompt, arguments out of gen_kwargs, draws out of repeats."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from specrej_eval.config import (
    ARGUMENTS,
    SAMPLING,
    RunConfig,
    Takes,
    as_bool,
    as_float,
    as_int,
    checked_until,
    known_elsewhere,
    names,
)
from specrej_eval.core import Message
from specrej_eval.errors import ConfigError, nearest

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names of one limit."""
KNOBS = names(Takes.REQUEST, without=(*SAMPLING, *_LENGTHS))
"""Arguments of ours that a task, or ``--gen_kwargs``, may set for its own requests."""
GREEDY: dict[str, Any] = {
    "strategy": "best_of_n",
    "n": 1,
    "temperature": 0.0,
    "first_look": None,
    "kv_budget_tokens": None,
    "force_sampling_args": False,
}
"""What makes greedy decoding of a run."""

SAMPLED_TASKS = frozenset({"specrej_prompts"})
"""Tasks of ours that leave sampling to the model. Their YAML cannot say so: with ``do_sample: true`` and no temperature
(one of the task's own would win over ours) other models fail before they can be told that they have no rewards."""

_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}


class ChatPrompt(str):
    """A prompt rendered by a chat template that still knows its messages.

    lm-eval passes on the text alone, but a reward model has a template of its own and needs the messages. It survives
    what lm-eval does to a prompt: copies, pickles (also dill's, in its request cache), JSON.
    """

    messages: tuple[Message, ...]
    add_generation_prompt: bool

    def __new__(cls, text: str, messages: Sequence[Message], add_generation_prompt: bool = True) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.messages = tuple(messages)
        prompt.add_generation_prompt = add_generation_prompt
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatPrompt, (str(self), self.messages, self.add_generation_prompt)


class ScoredText(str):
    """An answer that still knows its reward and its length, for tasks whose metric is the reward (`specrej_prompts`).

    To lm-eval it is a string; it survives copies, pickles (its answer cache, other ranks), JSON and the filters that
    pick among answers.
    """

    reward: float | None
    """None if it was not finite (``on_nan=drop``)."""
    num_tokens: int

    def __new__(cls, text: str, reward: float | None = None, num_tokens: int = 0) -> ScoredText:
        # lm-eval makes a gold answer of the same type as the model's, from its text alone: type(answer)(gold)
        answer = super().__new__(cls, text)
        answer.reward = reward
        answer.num_tokens = num_tokens
        return answer

    def __reduce__(self) -> tuple[Any, ...]:
        return ScoredText, (str(self), self.reward, self.num_tokens)


def conversation_of(context: str) -> tuple[tuple[Message, ...], str]:
    """What the reward model reads before an answer: the messages, and the start of the assistant's turn if any.

    Without a chat template the messages are not to be had: the whole context, examples included, is one user turn.
    """
    if not isinstance(context, ChatPrompt):
        return ({"role": "user", "content": context},), ""
    messages = context.messages
    if not context.add_generation_prompt and messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


@dataclass(frozen=True, slots=True)
class Translated:
    """What one request's gen_kwargs ask for."""

    config: RunConfig
    until: tuple[str, ...]
    asks_greedy: bool
    """The task asks for greedy decoding and nothing in our own arguments makes it greedy anyway."""
    ignored: tuple[str, ...]
    """Names we have no use for, such as ``num_beams``."""


def translate(
    gen_kwargs: Mapping[str, Any], base: RunConfig, *, explicit: Mapping[str, Any] | None = None
) -> Translated:
    """One request's arguments: ``base`` (model_args) with its gen_kwargs applied.

    ``do_sample``, ``temperature`` and the names of the length limit are read as lm-eval reads them. A task that
    samples brings its own sampling arguments (unless ``force_sampling_args``); one that asks for greedy decoding does
    not: what becomes of it is ``on_greedy``. What the user gave (``explicit``) is another matter: it wins over the
    task's own and over model_args, ``do_sample=False`` or ``temperature=0`` means greedy decoding, and what can have
    no effect is refused.

    Args:
        gen_kwargs: the task's own, with the user's merged into them.
        explicit: the user's alone (``--gen_kwargs``).

    Raises:
        ConfigError: a bad value, a bad stop string, or an argument that a single request cannot change.
    """
    explicit = {name: value for name, value in (explicit or {}).items() if value is not None}
    given = {name: value for name, value in gen_kwargs.items() if name != "until" and value is not None}
    until = checked_until(gen_kwargs.get("until"))
    fixed = sorted(ARGUMENTS.keys() & given.keys() - {*KNOBS, *SAMPLING, *_LENGTHS})
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot be set in gen_kwargs: the model is already loaded.", hint="use --model_args."
        )
    wants_greedy = _wants_greedy(explicit)
    _let_explicit_win(given, explicit)
    if "do_sample" in given:
        given["do_sample"] = as_bool("do_sample", given["do_sample"])
    for name in _LENGTHS:
        if name in given:
            given[name] = as_int(name, given[name])
    if "temperature" in given:
        given["temperature"] = as_float("temperature", given["temperature"])
    # a task that samples and leaves the temperature to us: without one, lm-eval would warn of temperature=0
    ours = {"temperature": base.temperature} if given.get("do_sample") else {}
    kwargs = normalize_gen_kwargs({**ours, **given}, base.max_gen_toks)

    changes = {name: given[name] for name in KNOBS if name in given}
    changes["max_gen_toks"] = kwargs["max_gen_toks"]
    if wants_greedy:
        changes["on_greedy"] = "greedy"
    if not kwargs["do_sample"]:
        changes.update({name: explicit[name] for name in SAMPLING if name in explicit and name != "temperature"})
    elif as_bool("force_sampling_args", changes.get("force_sampling_args", base.force_sampling_args)):
        changes.update({name: explicit[name] for name in SAMPLING if name in explicit})
    else:
        changes.update({name: given[name] for name in SAMPLING if name in given})
        if not float(changes.get("temperature", 1)):  # sampling at 0 is a contradiction: ours, as if left out
            del changes["temperature"]
    if changes.get("top_k") == -1:  # vLLM's way to switch it off
        changes["top_k"] = 0
    config = base.replace(**changes)
    asks_greedy = not kwargs["do_sample"] and config.temperature > 0
    if asks_greedy and config.on_greedy == "greedy":
        _refuse_without_effect(explicit, config)
        config = greedy(config)
    elif explicit.get("alpha") is not None and config.strategy == "best_of_n" and config.alpha:
        raise ConfigError(
            f"alpha={explicit['alpha']} in gen_kwargs has no effect: best_of_n decodes all rows to the end.",
            hint="leave it out, or use strategy=speculative_rejection.",
        )
    known = {*KNOBS, *SAMPLING, *_LENGTHS, "do_sample"}
    ignored = tuple(sorted(name for name in given.keys() - known if given[name] != _NEUTRAL.get(name)))
    _refuse_slips(ignored)
    if foreign := [name for name in ignored if name in explicit]:
        raise ConfigError(
            f"--gen_kwargs has names that our decoding does not use: {describe_ignored(foreign)}.",
            hint=f"leave them out. Known: {', '.join(sorted({*known, 'until'}))}.",
        )
    return Translated(config, until, asks_greedy, ignored)


def _wants_greedy(explicit: Mapping[str, Any]) -> bool:
    """Whether the user asks for greedy decoding.

    Raises:
        ConfigError: the user asks for it and for its contrary.
    """
    do_sample = as_bool("do_sample", explicit["do_sample"]) if "do_sample" in explicit else None
    temperature = as_float("temperature", explicit["temperature"]) if "temperature" in explicit else None
    if temperature is not None and temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}.")
    wants = do_sample is False or (temperature == 0 and do_sample is None)
    contrary = do_sample is False and temperature
    if contrary or (do_sample and temperature == 0) or (wants and explicit.get("on_greedy") in ("sample", "error")):
        both = ("do_sample", "temperature", "on_greedy")
        told = ", ".join(f"{name}={explicit[name]}" for name in both if name in explicit)
        raise ConfigError(
            f"{told} in gen_kwargs contradict each other.",
            hint="do_sample=False or temperature=0 decodes greedily; temperature above 0 samples.",
        )
    return wants


def _let_explicit_win(given: dict[str, Any], explicit: Mapping[str, Any]) -> None:
    """Take out what of the task's own would get in the way of the user's arguments, merged into them by lm-eval.

    Raises:
        ConfigError: the user gives two lengths.
    """
    if lengths := [name for name in _LENGTHS if name in explicit]:
        if len({str(explicit[name]) for name in lengths}) > 1:
            told = ", ".join(f"{name}={explicit[name]}" for name in lengths)
            raise ConfigError(f"{told} in gen_kwargs are two values for the same limit.", hint="give one of them.")
        for name in _LENGTHS:
            if name not in explicit:
                given.pop(name, None)
    if "temperature" in explicit and "do_sample" not in explicit:
        given.pop("do_sample", None)
    if "do_sample" in explicit and "temperature" not in explicit and not as_bool("do_sample", explicit["do_sample"]):
        given.pop("temperature", None)


def _refuse_without_effect(explicit: Mapping[str, Any], config: RunConfig) -> None:
    """Raises:
    ConfigError: the user's own arguments mean nothing to greedy decoding.
    """
    told = [
        f"{name}={explicit[name]}"
        for name, made in ARGUMENTS.items()
        if made.idle_when_greedy and name in explicit and getattr(config, name) != GREEDY.get(name, explicit)
    ]
    if told:
        raise ConfigError(
            f"{', '.join(told)} in gen_kwargs would have no effect: decoding is greedy, one row without rejection.",
            hint="leave out either these or what makes it greedy (do_sample=False, temperature=0, on_greedy=greedy).",
        )


def greedy(config: RunConfig) -> RunConfig:
    """The same run as plain greedy decoding."""
    return config.replace(**GREEDY)


def _refuse_slips(names: Sequence[str]) -> None:
    """Raises:
    ConfigError: a name that nothing knows is one slip away from one of our arguments.
    """
    for name in names:
        meant = difflib.get_close_matches(name, (*KNOBS, *SAMPLING), n=1, cutoff=0.8)
        if meant:
            raise ConfigError(f"unknown argument {name!r} in gen_kwargs.", hint=f"did you mean {meant[0]!r}?")


def describe_ignored(names: Sequence[str]) -> str:
    """The names of ignored gen_kwargs, each with the argument that may have been meant."""
    described = []
    for name in names:
        meant = known_elsewhere().get(name) or nearest(name, (*KNOBS, *SAMPLING, *_LENGTHS, "until"))
        described.append(f"{name} (did you mean {meant}?)" if meant else name)
    return ", ".join(described)


@dataclass(frozen=True, slots=True)
class Draw:
    """One answer to produce: the ``repeat``-th of a request."""

    instance: Any
    repeat: int


def draws_of(instances: Sequence[Any]) -> tuple[list[Draw], list[int]]:
    """The answers to produce, and for each of lm-eval's requests the index of its answer.

    A task with ``repeats`` sends the same object that many times, and each time is a draw of its own. Where ranks have
    different numbers of requests lm-eval sends the last one more often still: padding, which gets the draws there are.
    """
    draws: list[Draw] = []
    source: list[int] = []
    seen: Counter[int] = Counter()
    index: dict[tuple[int, int], int] = {}
    for instance in instances:
        repeat = seen[id(instance)] % max(1, instance.repeats or 1)
        seen[id(instance)] += 1
        key = (id(instance), repeat)
        if key not in index:
            index[key] = len(draws)
            draws.append(Draw(instance, repeat))
        source.append(index[key])
    return draws, source
