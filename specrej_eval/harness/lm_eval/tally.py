"""What a run inside lm-eval adds up to: the numbers of the results file's ``specrej`` block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrej_eval.auditing import AuditSample
from specrej_eval.core import GenerationResult, Ledger, Spent


@dataclass(slots=True)
class TaskTally:
    """One task's share."""

    requests: int = 0
    """Answers decoded; each repeat of a prompt is one."""
    greedy_overridden: int = 0
    """Requests that asked for greedy decoding and were sampled."""
    truncated: int = 0
    """Prompts cut on the left to fit the context."""
    degraded: int = 0
    """Answers for which rows were given up for want of memory."""
    nan_rewards: int = 0
    reward_sum: float = 0.0
    rewards: int = 0
    """Answers with a finite reward."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """The arguments as resolved for the task's first prompt."""

    @property
    def mean_reward(self) -> float | None:
        return self.reward_sum / self.rewards if self.rewards else None

    def add(self, other: TaskTally) -> None:
        for name in ("requests", "greedy_overridden", "truncated", "degraded", "nan_rewards", "reward_sum", "rewards"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.resolved = self.resolved or dict(other.resolved)

    def to_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "greedy_overridden": self.greedy_overridden,
            "truncated": self.truncated,
            "degraded": self.degraded,
            "nan_rewards": self.nan_rewards,
            "mean_reward": self.mean_reward,
            "resolved": dict(self.resolved),
        }


@dataclass(slots=True)
class Tally:
    """All tasks of one rank, or of all ranks once merged."""

    tasks: dict[str, TaskTally] = field(default_factory=dict)
    totals: Ledger = field(default_factory=Ledger)
    """What the answers cost in all, those a journal had ready included."""
    spent: Spent = field(default_factory=Spent)
    """What this run spent itself, and how many answers it took from its journal."""
    audits: AuditSample = field(default_factory=AuditSample)
    warnings: dict[object, str] = field(default_factory=dict)
    """Cause -> message; a cause speaks once."""

    def task(self, name: str) -> TaskTally:
        return self.tasks.setdefault(name, TaskTally())

    def add(self, result: GenerationResult, *, first_of_task: bool = False) -> None:
        """Count one answer; of a task's first prompt, keep the arguments as they were resolved."""
        self.totals.add(result.ledger)
        self.spent.count(result)
        if result.resolved.get("audit"):
            self.audits.count(result.ledger.rows_rejected, result.audit)
        task = self.task(result.task)
        task.requests += 1
        task.degraded += result.degraded
        task.nan_rewards += result.nan_rewards
        if result.best.reward is not None and math.isfinite(result.best.reward):
            task.reward_sum += result.best.reward
            task.rewards += 1
        if first_of_task and not task.resolved:
            task.resolved = dict(result.resolved)

    def warn(self, message: str, *, key: object = None) -> bool:
        """Keep a warning; False if its cause has spoken already."""
        key = message if key is None else key
        if key in self.warnings:
            return False
        self.warnings[key] = message
        return True

    @property
    def num_requests(self) -> int:
        return sum(task.requests for task in self.tasks.values())

    @property
    def mean_reward(self) -> float | None:
        """Mean reward of the answers returned, over all tasks; None without a finite one."""
        rewards = sum(task.rewards for task in self.tasks.values())
        return sum(task.reward_sum for task in self.tasks.values()) / rewards if rewards else None

    def resolved_first(self) -> dict[str, Any]:
        """``n`` and ``first_look`` of the first prompt of all."""
        resolved = next((task.resolved for task in self.tasks.values() if task.resolved), {})
        # the budget depends on the prompt's length; stop strings are the task's
        return {name: value for name, value in resolved.items() if name not in ("kv_budget_tokens", "until")}

    @classmethod
    def merged(cls, ranks: Sequence[Tally]) -> Tally:
        merged = cls()
        for rank in ranks:
            merged.totals.add(rank.totals)
            merged.spent.add(rank.spent)
            merged.audits.add(rank.audits)
            merged.warnings = {**rank.warnings, **merged.warnings}
            for name, task in rank.tasks.items():
                merged.task(name).add(task)
        return merged


def strict_json(value: Any) -> Any:
    """The value in JSON's own types: NaN and infinities become None, what is foreign becomes its text."""
    if isinstance(value, Mapping):
        return {str(name): strict_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
