"""What process reward models share: steps with a mark behind each, probabilities read at the marks, one number of them.

A step is scored by what is before it, so a process reward model reads unfinished answers as naturally as finished ones:
the last step is just shorter. ``partial_turn`` makes no difference.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint
from specrej_eval.rewards.checkpoints.native import lm_head
from specrej_eval.rewards.checkpoints.renderer import Renderer

Key = TypeVar("Key")
Value = TypeVar("Value")

PLUS_AND_MINUS = ("+", "-")
"""Good and bad, as ``sign_head`` reads them."""
MAX_SPELLED = 4096
"""Inputs a renderer remembers in which the answer writes the mark."""
MAX_PROMPTS = 8
"""Prompts a renderer remembers. Positions are asked for right after inputs were made, so the newest would do."""


def paragraphs(text: str) -> list[str]:
    """The steps of a text with blank lines between them; at least one, empty if there is no text."""
    return [part for part in re.split(r"\n\n+", text) if part.strip()] or [""]


def lines(text: str) -> list[str]:
    """The steps of a text with one on each line; at least one, empty if there is no text."""
    return [part for part in text.split("\n") if part.strip()] or [""]


def reduce_steps(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """One number a row: (rows, steps), with the mask False behind a row's last step -> (rows,).

    Args:
        how: ``last``, ``min``, ``mean`` or ``prod``.
    """
    counts = mask.sum(dim=1)
    if how == "last":
        return values.gather(1, (counts - 1)[:, None])[:, 0]
    if how == "min":
        return values.masked_fill(~mask, float("inf")).amin(dim=1)
    if how == "mean":
        return values.masked_fill(~mask, 0.0).sum(dim=1) / counts
    return values.masked_fill(~mask, 1.0).prod(dim=1)


class StepHead(nn.Module):
    """Probability that a step is good, at each position, and one number of them.

    Args:
        layer: hidden states (..., hidden size) -> (..., outputs). One output: the logit of a good step.
        how: see ``reduce_steps``.
        good: of two outputs, the one for a good step; softmax over both is the sigmoid of their difference.
    """

    def __init__(self, layer: nn.Module, how: str, *, good: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.how = how
        self.good = good

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, steps, hidden size) -> (rows,)"""
        values = self.layer(hidden)
        logits = values[..., 0] if self.good is None else values[..., self.good] - values[..., 1 - self.good]
        return reduce_steps(torch.sigmoid(logits), mask, self.how)


def sign_head(source: RewardCheckpoint, body: Any, tokenizer: Any) -> StepHead:
    """Of a language model that answers with + for a step that is good, - for one that is bad."""
    layer = lm_head(source, body, [token_id(tokenizer, sign) for sign in PLUS_AND_MINUS])
    return StepHead(layer, source.config.prm_reduce, good=0)


def rendered(renderer: Renderer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    """Ids of a conversation in the renderer's chat template."""
    ids: list[int] = renderer.tokeniser.chat(
        messages, chat_template=renderer.template, add_generation_prompt=add_generation_prompt
    )["input_ids"]
    return ids


class StepRenderer(Renderer, ABC):
    """Conversation and steps -> ids whose marks can be found again.

    A family implements ``encode_steps``. Marks are looked for behind the prompt only: a prompt may hold the same token
    (a line break, the Russian syllable of Math-Shepherd).
    """

    mark: int
    """Id of the token behind each step; the family sets it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prompts: dict[tuple[int, ...], None] = {}
        self._spelled: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Inputs in which the answer itself writes the mark, and where ours are, counted from the end."""

    @abstractmethod
    def encode_steps(self, messages: list[dict[str, str]], response: str) -> tuple[list[int], list[int], list[int]]:
        """The prompt's ids, those of the steps with their marks, and where in these the marks behind the steps are."""

    def encode(self, messages: list[dict[str, str]], response: str, *, open_turn: bool) -> Any:
        """Raises:
        ValueError: the marks are not found again; the tokenizer is not the one this family was written for.
        """
        prompt, steps, places = self.encode_steps(messages, response)
        if wrong := sum(steps[place] != self.mark for place in places):
            raise ValueError(f"of {len(places)} steps {wrong} do not end with the token id {self.mark}")
        if steps.count(self.mark) > len(places):
            _remember(self._spelled, tuple(prompt + steps), tuple(len(steps) - place for place in places), MAX_SPELLED)
        _remember(self._prompts, tuple(prompt), None, MAX_PROMPTS)
        return {"input_ids": prompt + steps}

    def positions_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Where the marks behind the steps are."""
        ends = self._spelled.get(ids) or next(
            (ends for known, ends in self._spelled.items() if len(ids) > 1 and known[1 - len(ids) :] == ids[1:]), None
        )
        if ends is not None:
            return tuple(len(ids) - end for end in ends if end <= len(ids)) or (len(ids) - 1,)
        whole = [len(prompt) for prompt in self._prompts if ids[: len(prompt)] == prompt]
        start = max(whole or (_kept(prompt, ids) for prompt in self._prompts), default=0)
        found = tuple(i for i in range(start, len(ids)) if ids[i] == self.mark)
        return found or (len(ids) - 1,)


def _remember(store: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    """The newest ``most`` entries, in order."""
    store.pop(key, None)
    store[key] = value
    while len(store) > most:
        del store[next(iter(store))]


def _kept(prompt: tuple[int, ...], ids: tuple[int, ...]) -> int:
    """How many of the first ids are the end of a prompt that was cut on the left, with or without its BOS."""
    for cut in range(1, len(prompt)):
        glance = prompt[cut : cut + 8]  # the rest is compared only where this fits
        for first in (0, 1) if ids[0] == prompt[0] else (0,):
            rest = len(prompt) - cut
            if ids[first : first + len(glance)] == glance and ids[first : first + rest] == prompt[cut:]:
                return first + rest
    return 0


def token_id(tokenizer: Any, text: str) -> int:
    """The last token of a text: Llama tokenizers may put one for a space in front."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-1]


def question(messages: Sequence[dict[str, str]]) -> str:
    """The turns before the answer as one text: these models know a single question."""
    return "\n".join(message["content"] for message in messages)
