"""What a user sees of a run: a progress bar, and at its end what it cost next to what it gained."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from specrej_eval.auditing import AuditSample
from specrej_eval.core import GenerationResult, Ledger, Spent
from specrej_eval.engines.base import EngineSession
from specrej_eval.wording import counted


class Progress:
    """A progress bar over prompts; when it closes, what the run cost and what it gained, on stderr.

    Args:
        name: what answers: the strategy.
    """

    def __init__(self, total: int, *, name: str, in_flight: int, shown: bool, summary: bool = True) -> None:
        self._name = name
        self._bar = tqdm(
            total=total, disable=not shown, desc=f"{name} ({min(in_flight, total)} at a time)", unit="prompt"
        )
        self._summary = shown and summary
        self._started = time.perf_counter()
        self._spent = Spent()
        self._best: list[float] = []
        self._finished: list[float] = []
        self._audits = AuditSample()

    def finished(self, result: GenerationResult) -> None:
        self._spent.count(result)
        if result.best.reward is not None:
            self._best.append(result.best.reward)
        rows = [row.reward for row in result.trajectories if row.finish_reason != "rejected"]
        self._finished += [reward for reward in rows if reward is not None]
        if result.resolved.get("audit"):
            self._audits.count(result.ledger.rows_rejected, result.audit)
        self._bar.update(1)

    def step(self, sessions: Sequence[EngineSession]) -> None:
        live = sum(session.num_live for session in sessions)
        done = self._spent.ledger
        tokens = done.decode_tokens + sum(session.decode_tokens for session in sessions)
        speed = tokens / max(1e-9, time.perf_counter() - self._started)
        rejected = done.rows_rejected / max(1, done.rows_started)
        self._bar.set_postfix_str(
            f"{counted(live, 'live row')}, {rejected:.0%} rejected, {speed:,.0f} tok/s", refresh=False
        )

    def waiting(self, prompts: int) -> None:
        """Nothing decodes here: other processes have the prompts that are left."""
        self._bar.set_postfix_str(f"waiting for {counted(prompts, 'prompt')} of other processes")

    def close(self) -> None:
        answers = int(self._bar.n)
        self._bar.close()
        if self._summary and answers:
            line = summary_line(answers, self._spent, self._best, self._finished)
            tqdm.write(f"{self._name}: {line}", file=sys.stderr)
            if told := audit_line(self._audits, self._spent.ledger):
                tqdm.write(f"{self._name}: {told}", file=sys.stderr)


def summary_line(
    answers: int,
    spent: Spent,
    best: Sequence[float],
    finished: Sequence[float],
    *,
    total: Ledger | None = None,
    source: str = "the journal",
) -> str:
    """What answers cost next to what they gained.

    Args:
        spent: by this process, which paid nothing for the answers it took from ``source``.
        total: what all of them cost, whoever decoded them; told where it is more than what was spent.
        best: rewards of the answers returned.
        finished: rewards of all rows that finished, for comparison.
    """
    cost = spent.ledger
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in cost.seconds.items())
    if spent.taken and not cost.rows_started:
        parts = [f"{counted(answers, 'answer')}, all of them taken from {source}"]
    else:
        parts = [
            f"{counted(answers, 'answer')}, "
            + (f"{spent.taken} of them taken from {source}, " if spent.taken else "")
            + f"{counted(cost.rows_started, 'row')} ({cost.rows_rejected / max(1, cost.rows_started):.0%} rejected), "
            f"{counted(cost.decode_tokens, 'token')} decoded, reward model read "
            f"{counted(cost.reward_tokens, 'token')} in {counted(cost.reward_calls, 'call')}",
            f"seconds: {seconds}",
            f"peak memory {cost.peak_bytes / 1e9:.2f} GB",
        ]
    if total is not None and spent.taken:
        parts.append(f"all answers cost {total.decode_tokens:,} tokens and {total.total_seconds:.1f} s")
    if cost.scores_floored:
        floored = counted(cost.scores_floored, "score")
        parts.append(f"{floored} put below all others (answer repeats itself or is almost empty)")
    if cost.grades_unreadable:
        parts.append(f"{counted(cost.grades_unreadable, 'answer')} of the judge had no readable grade")
    if best:
        parts.append(
            f"mean reward {sum(best) / len(best):.3f} (of all finished rows: {sum(finished) / len(finished):.3f})"
        )
    return "; ".join(parts)


def audit_line(audits: AuditSample, cost: Ledger) -> str:
    """What rejection cost, estimated, and what that took; empty without an audit, or where no row was rejected.

    Args:
        cost: of the answers, with what their audits took beside it.
    """
    if not audits.rejecting:
        return ""
    estimate = audits.estimate()
    if estimate is None:
        if audits.lost:
            return f"the audit of {counted(audits.lost, 'prompt')} failed, so nothing is known of what rejection cost"
        missed = "no prompt was drawn for the audit: a larger audit= or more prompts would tell what rejection cost"
        return missed
    took = f" (took {counted(cost.audit_tokens, 'token')} and {cost.audit_seconds:.1f} s beside the run's own)"
    return f"{estimate}{took if cost.audit_rows else ''}"
