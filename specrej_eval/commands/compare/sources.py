"""What methods are compared on: a file of prompts, or tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from specrej_eval.answering import requests_for
from specrej_eval.api import RunPlan
from specrej_eval.commands.run import TASK
from specrej_eval.config import PromptArguments, RunConfig
from specrej_eval.core import Question, Trajectory
from specrej_eval.in_flight import Request

if TYPE_CHECKING:
    from specrej_eval.engines.base import Engine
    from specrej_eval.harness.lm_eval.tasks import TaskPrompts
    from specrej_eval.rewards.base import RewardModel


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def deciding(self) -> Mapping[str, Any]:
        """What else decides answers: part of each cell's fingerprint."""
        ...

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Of metrics, by name; filled in by ``metrics``."""
        ...

    def questions(self) -> list[Question]:
        """In order; no model is needed."""
        ...

    def load(self, plan: RunPlan) -> tuple[Engine, RewardModel]:
        """The two models."""
        ...

    def requests(self, engine: Engine, questions: Sequence[Question], config: RunConfig) -> list[Request]:
        """One for each question."""
        ...

    def metrics(self, rows: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Scores of one answer to each question, by name; empty where there is nothing but the reward."""
        ...

    def scored_by(self) -> str:
        """Digest of what decides ``metrics`` beside the answers: they are made anew where it is another."""
        ...

    def described(self) -> dict[str, Any]:
        """For the comparison's file."""
        ...


@dataclass(slots=True)
class PromptFile:
    """As `specrej-eval run` reads one: cells have the rows that it would draw."""

    name: str
    asked: PromptArguments
    listed: Sequence[Question]
    higher_is_better: dict[str, bool] = field(default_factory=dict)

    @property
    def deciding(self) -> Mapping[str, Any]:
        return self.asked.deciding()

    def questions(self) -> list[Question]:
        return list(self.listed)

    def load(self, plan: RunPlan) -> tuple[Engine, RewardModel]:
        return plan.load()

    def requests(self, engine: Engine, questions: Sequence[Question], config: RunConfig) -> list[Request]:
        return requests_for(engine, questions, config, self.asked, task=TASK)

    def metrics(self, rows: Sequence[Trajectory]) -> dict[str, list[float]]:
        return {}

    def scored_by(self) -> str:
        return ""

    def described(self) -> dict[str, Any]:
        return {"kind": "prompts", "name": Path(self.name).name}


@dataclass(slots=True)
class Tasks:
    """As lm-eval makes prompts of them: cells have the rows of `lm_eval --model specrej`."""

    prompts: TaskPrompts
    arguments: Mapping[str, Any]
    """Of ``SpecRejLM``."""
    _lm: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.prompts.name

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return self.prompts.higher_is_better

    @property
    def deciding(self) -> Mapping[str, Any]:
        tasks = self.prompts.tasks
        return {
            "tasks": {name: {"num_fewshot": task.get_config("num_fewshot")} for name, task in tasks.items()},
            "apply_chat_template": self.prompts.apply_chat_template,
            "fewshot_as_multiturn": self.prompts.fewshot_as_multiturn,
            "system_instruction": self.prompts.system_instruction,
        }

    def questions(self) -> list[Question]:
        return self.prompts.questions()

    def load(self, plan: RunPlan) -> tuple[Engine, RewardModel]:
        from specrej_eval.harness.lm_eval.model import SpecRejLM

        self._lm = SpecRejLM(**dict(self.arguments))
        return self._lm.generator.engine, self._lm.generator.reward

    def requests(self, engine: Engine, questions: Sequence[Question], config: RunConfig) -> list[Request]:
        return self.prompts.requests(self._lm, config)

    def metrics(self, rows: Sequence[Trajectory]) -> dict[str, list[float]]:
        return self.prompts.metrics(rows)

    def scored_by(self) -> str:
        return self.prompts.scored_by()

    def described(self) -> dict[str, Any]:
        return {"kind": "tasks", "name": self.name, "higher_is_better": dict(sorted(self.higher_is_better.items()))}
