"""Whole runs of the real engine and generator on tiny models, with every step's logits on record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, RowView
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.generator import Generator
from specrej_eval.rewards.base import RewardModel
from support.tiny_models import tiny_tokenizer

PROMPTS = ["a", "Tell me about rivers.", "x" * 70, "One, two, three: " * 3]
SMALL = {"n": 8, "max_gen_toks": 24, "first_look": 6}


class HashReward(RewardModel):
    """Scores that look random and depend on the text alone."""

    name = "hash"

    def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        del conversation, response_prefix
        return [hashlib.sha256(row.text.encode()).digest()[0] / 256 for row in rows]


def make_engine(model: Any, **arguments: Any) -> TransformersEngine:
    return TransformersEngine(model, tiny_tokenizer(), **arguments)


def generate(
    engine: TransformersEngine, prompts: Sequence[str] = PROMPTS, until: Any = None, **arguments: Any
) -> list[GenerationResult]:
    config, _ = RunConfig.from_args({**SMALL, **arguments})
    return Generator(engine=engine, reward=HashReward(), config=config).generate(list(prompts), until=until)


def outcome(result: GenerationResult) -> dict[str, Any]:
    """What must not depend on how the work was done: everything but the cost."""
    whole = result.to_dict()
    return {name: whole[name] for name in ("best", "trajectories", "rounds", "degraded")}


class Recorder:
    """Logits by (prompt's tokens, row, tokens sampled before), and the tokens fed to the model."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.logits: dict[tuple[tuple[int, ...], int, int], Tensor] = {}
        self.rows_per_step: list[int] = []
        self.prompts_read: list[tuple[int, ...]] = []
        self.tokens_fed = 0
        self._prompt_of: dict[int, tuple[int, ...]] = {}
        self._kept: list[Any] = []  # so that ids are not used again
        runner = engine.runner
        prefill_all, step, forward = runner.prefill_all, runner.step, runner.model.forward

        def recorded_prefill(prompts: Any) -> Any:
            prefixes = prefill_all(prompts)
            for (token_ids, _), prefix in zip(prompts, prefixes, strict=True):
                self.prompts_read.append(tuple(token_ids))
                self._prompt_of[id(prefix)] = tuple(token_ids)
                self._kept.append(prefix)
                assert prefix.logits is not None
                self.logits[tuple(token_ids), -1, 0] = prefix.logits[0].clone()
            return prefixes

        def recorded_step(groups: Any, tokens: Tensor) -> Tensor:
            logits = step(groups, tokens)
            self.rows_per_step.append(len(tokens))
            places = [(group, row) for group in groups for row in group.row_ids]
            for (group, row), mine in zip(places, logits, strict=True):
                self.logits[self._prompt_of[id(group.prefix)], row, group.num_sampled] = mine.clone()
            return logits

        def counted_forward(ids: Tensor, **kwargs: Any) -> Any:
            self.tokens_fed += ids.numel()
            return forward(ids, **kwargs)

        runner.prefill_all, runner.step = recorded_prefill, recorded_step  # type: ignore[method-assign]
        self._restore = lambda: (
            setattr(runner, "prefill_all", prefill_all),
            setattr(runner, "step", step),
            setattr(runner.model, "forward", forward),
        )
        runner.model.forward = counted_forward

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._restore()


def limit_rows(engine: TransformersEngine, most: int) -> None:
    """A device on which a step of more rows than ``most`` runs out of memory."""
    step = engine.runner.step

    def limited(groups: Any, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > most:
            raise torch.OutOfMemoryError(f"{len(tokens)} rows")
        return step(groups, tokens)

    engine.runner.step = limited  # type: ignore[method-assign]
