"""What a user sees of a run: a progress bar, and at its end what it cost next to what it gained."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from specrej_eval.core import GenerationResult, Ledger
from specrej_eval.engine.base import EngineSession


class Progress:
    """A progress bar over prompts; when it closes, what the run cost and what it gained, on stderr."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar = tqdm(total=total, disable=not shown, desc="specrej", unit="prompt")
        self._shown = shown
        self._started = time.perf_counter()
        self._done = Ledger()
        self._best: list[float] = []
        self._finished: list[float] = []

    def finished(self, result: GenerationResult) -> None:
        self._done.add(result.ledger)
        if result.best.reward is not None:
            self._best.append(result.best.reward)
        rows = [row.reward for row in result.trajectories if row.finish_reason != "rejected"]
        self._finished += [reward for reward in rows if reward is not None]
        self._bar.update(1)

    def step(self, sessions: Sequence[EngineSession]) -> None:
        live = sum(session.num_live for session in sessions)
        tokens = self._done.decode_tokens + sum(session.decode_tokens for session in sessions)
        speed = tokens / max(1e-9, time.perf_counter() - self._started)
        rejected = self._done.rows_rejected / max(1, self._done.rows_started)
        self._bar.set_postfix_str(f"{live} live rows, {rejected:.0%} rejected, {speed:,.0f} tok/s", refresh=False)

    def close(self) -> None:
        answers = self._bar.n
        self._bar.close()
        if self._shown and answers:
            tqdm.write(f"specrej: {answers} answers, {self._summary()}", file=sys.stderr)

    def _summary(self) -> str:
        done = self._done
        seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in done.seconds.items())
        parts = [
            f"{done.rows_started} rows ({done.rows_rejected / max(1, done.rows_started):.0%} rejected), "
            f"{done.decode_tokens:,} tokens decoded, {done.reward_tokens:,} scored in {done.reward_calls:,} calls",
            f"seconds: {seconds}",
            f"peak memory {done.peak_bytes / 1e9:.2f} GB",
        ]
        if self._best:
            best, finished = sum(self._best) / len(self._best), sum(self._finished) / len(self._finished)
            parts.append(f"mean reward {best:.3f} (all rows that finished: {finished:.3f})")
        return "; ".join(parts)
