"""``plan=only``: what a run will take, from a probe of three of its prompts. Arithmetic on what the probe showed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specrej_eval.budget import Budget
from specrej_eval.core import GenerationResult
from specrej_eval.wording import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run that has not been made."""

    prompts: int
    in_flight: int
    """Prompts that decode at the same time."""
    results: Sequence[GenerationResult]
    """Of the probe."""
    seconds: float
    """That the probe took, audits included, its prompts in flight together."""
    budgets: Sequence[Budget]
    """Of all prompts."""
    most_decoded: int
    """Tokens of all prompts together if no row ends before max_gen_toks."""
    bytes_per_token: int
    peak_bytes: int
    """Of the process after the probe."""
    processes: int = 1

    @property
    def decode_tokens(self) -> int:
        """Expected, of all prompts."""
        return round(self._mean("decode_tokens") * self.prompts)

    @property
    def hours(self) -> float:
        """At the probe's speed."""
        return self.seconds / len(self.results) * self.prompts / self.processes / 3600

    def _mean(self, count: str) -> float:
        return statistics.fmean(getattr(result.ledger, count) for result in self.results)

    def lines(self) -> Iterator[str]:
        """For the screen."""
        rounds = [len(result.rounds) for result in self.results]
        rows = sorted({budget.n for budget in self.budgets})
        looks = sorted({budget.first_look for budget in self.budgets})
        held = max(budget.kv_budget_tokens for budget in self.budgets)
        memory = held * self.bytes_per_token * self.in_flight
        yield f"plan of {counted(self.prompts, 'prompt')}, from a probe of {len(self.results)}:"
        yield f"  rows     {_range(rows)} a prompt, {sum(budget.n for budget in self.budgets):,} in all"
        yield f"  rounds   {_range(sorted(set(rounds)))} a prompt; first look after {_range(looks)} tokens of each row"
        yield (
            f"  tokens   about {self.decode_tokens:,} decoded (at most {self.most_decoded:,}), about "
            f"{round(self._mean('reward_tokens') * self.prompts):,} read by the reward model"
        )
        kv = f"KV cache up to {memory / 2**20:,.0f} MiB" if memory else "KV cache of unknown size"
        yield f"  memory   {kv} ({counted(self.in_flight, 'prompt')} at a time, up to {held:,} tokens each)"
        yield f"           and {self.peak_bytes / 2**30:.2f} GiB, which this process has used by now"
        few = min(len(self.results), self.in_flight)
        faster = f", or less: the probe had {few} prompts at a time, the run has {self.in_flight}"
        yield f"  time     about {duration(self.hours * 3600)}{faster if self.in_flight > few else ''}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as one says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
