"""The only loop: prompt -> engine -> reward -> strategy -> result.

It holds no tensor and no arithmetic on scores: engines decode, rewards score, strategies decide.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specrej_eval import budget as budgets
from specrej_eval import stopping
from specrej_eval.budget import Budget
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import DECIDING, MAX, RunConfig, checked_until
from specrej_eval.core import (
    GenerationResult,
    Ledger,
    Message,
    Plan,
    Prompt,
    Round,
    RowView,
    Trajectory,
    finite_or_none,
)
from specrej_eval.engines.base import Engine
from specrej_eval.errors import OutOfMemoryError, RewardError
from specrej_eval.progress import Progress
from specrej_eval.records.fingerprint import EMBEDDED, of_models, warn_of_uncovered
from specrej_eval.records.journal import Journal, request_key
from specrej_eval.records.trace import Tracer
from specrej_eval.rewards.base import RewardModel, RewardSession
from specrej_eval.scheduler import Scheduler
from specrej_eval.strategies.base import State, Strategy, make_strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to answer, with its arguments as they stand for it."""

    prompt: Prompt
    config: RunConfig
    until: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Identifies the request in records: its prompt and every argument that decides its answer."""
        return request_key(self.prompt, self.config.of_request, self.until)


@dataclass(slots=True)
class _Running:
    """A prompt in flight: its two sessions, its strategy's state, and what has been learned of its rows."""

    index: int
    request: Request
    budget: Budget
    strategy: Strategy
    session: Any
    """The engine's."""
    scoring: RewardSession
    state: State
    look_in: int
    """Tokens each live row takes before the next look, counted from the last."""
    rewards: dict[int, float] = field(default_factory=dict)
    survived: Counter[int] = field(default_factory=Counter)
    rounds: list[Round] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    archived: set[int] = field(default_factory=set)
    nan_rewards: int = 0

    @property
    def remaining_tokens(self) -> int:
        return 0 if not self.session.num_live else self.look_in - self.session.tokens_since_look


class Generator:
    """Answers prompts with one engine, one reward model and the strategy each request names.

    Made by ``specrej_eval.load`` or by a harness adapter.

    Args:
        engine: decodes; see ``engine.base.Engine``.
        reward: scores; see ``rewards.base.RewardModel``.
        config: defaults for ``generate``; ``batch_size``, ``trace_path`` and ``journal`` hold for all requests.
        identity: the host's arguments (``fingerprint.of_models``), for the journal's fingerprint.
        fingerprint: of the models, for the journal, where the caller has made it already.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        reward: RewardModel,
        config: RunConfig,
        identity: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.reward = reward
        self.config = config
        self.totals = Ledger()
        """Cost of everything this generator decoded so far; what a journal had ready cost it nothing."""
        self.identity = dict(identity or {})
        # of the files as they were loaded, where a journal is kept: an edit from now on must not pass for what answers
        self.fingerprint = fingerprint
        if fingerprint is None and config.journal is not None:
            self.fingerprint = of_models(config, self.identity)
        self._tracer: Tracer | None = None
        self._journal: Journal | None = None
        self.capacity_tokens: int | None = None
        """Tokens of KV that memory holds (``n=max``): measured by the first run that needs it, unless set before."""

    # the public call

    def generate(
        self,
        prompts: str | Sequence[Message] | Sequence[str | Sequence[Message]],
        *,
        until: str | Sequence[str] | None = None,
        max_gen_toks: int | None = None,
        seed: int | None = None,
    ) -> list[GenerationResult]:
        """Answer prompts; results are in the prompts' order.

        A prompt given twice is drawn twice, independently. Otherwise a result depends on its prompt and the seed, and
        on no other prompt of the call.

        Args:
            prompts: each a string (raw context) or a list of chat messages (rendered with the model's template); a
                single one needs no list around it.
            until: stop strings; the answer is cut before the first of them.
            max_gen_toks: most tokens of an answer; None = the argument given to ``load``.
            seed: None = the argument given to ``load``.

        Raises:
            ConfigError: a bad stop string, or a budget that does not fit a prompt; before anything is decoded.
            PromptError: an empty or over-long prompt; before anything is decoded.
            RewardError: the reward model failed; prompts finished before that are in the journal, if there is one.
        """
        changes = {"max_gen_toks": max_gen_toks, "seed": seed}
        config = self.config.replace(**{name: value for name, value in changes.items() if value is not None})
        stops = checked_until(list(until) if isinstance(until, (tuple, set)) else until)
        listed: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
        if listed and all(isinstance(item, Mapping) for item in listed):
            listed = [listed]  # one conversation
        seen: Counter[str] = Counter()
        requests = []
        for item in listed:
            prompt = self.engine.encode(item)
            repeat = seen[prompt.prompt_hash]
            seen[prompt.prompt_hash] += 1
            if repeat:
                prompt = replace(prompt, repeat=repeat)
            requests.append(Request(prompt=prompt, config=config, until=stops))
        results = dict(self.run(requests, progress=len(requests) > 1))
        return [results[index] for index in range(len(requests))]

    # the loop

    def run(
        self, requests: Sequence[Request], *, progress: bool = True, summary: bool = True
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Answer requests; yields ``(index, result)`` as each finishes.

        Every budget is resolved and every prompt checked before the first token is decoded.

        Args:
            progress: show a progress bar.
            summary: with it, say at the end what the run cost; a caller that makes several calls says it itself.

        Raises:
            ConfigError, PromptError: before anything is decoded.
            RewardError, OutOfMemoryError: what finished before has been yielded, traced and journalled.
        """
        journal = self._open_journal()
        work = self._checked(requests, journal)
        tracer = self._open_tracer()
        scheduler = Scheduler(self._not_in(journal, work), batch_size=self.config.batch_size)
        bar = Progress(len(requests), shown=progress, summary=summary)
        running: list[_Running] = []
        keeping = stopping.keeping(len(requests), None if journal is None else journal.path)
        kept = keeping.__enter__()
        try:
            for index, done in self._taken_from(journal, work):
                bar.finished(done)
                kept.add()
                yield index, done
            while True:
                for index, request, budget in scheduler.admit(len(running)):
                    running.append(self._open(index, request, budget))
                if not running:
                    break
                num_tokens = scheduler.until_next_look(running)
                if num_tokens:
                    self.engine.decode([work.session for work in running], num_tokens)
                for due in [work for work in running if not work.remaining_tokens]:
                    result = self._look(due, tracer)
                    if result is None:
                        continue
                    running.remove(due)
                    self.totals.add(result.ledger)
                    tracer.request(result)
                    with stopping.held():
                        if journal is not None:
                            journal.put(due.request.key, result)
                        kept.add()
                    bar.finished(result)
                    yield due.index, result
                bar.step([work.session for work in running])
        finally:
            for work_left in running:
                self._close(work_left)
            bar.close()
            keeping.__exit__(None, None, None)

    def _checked(self, requests: Sequence[Request], journal: Journal | None) -> list[tuple[int, Request, Budget]]:
        checked = []
        for index, request in enumerate(requests):
            self.engine.check(request.prompt, request.config)
            if request.config.n == MAX:
                if self.capacity_tokens is None:
                    self.capacity_tokens = self.measured_capacity(requests)
                if journal is not None and journal.capacity_tokens is None:
                    journal.put_capacity(self.capacity_tokens)
            budget = budgets.resolve(request.config, request.prompt.num_tokens, capacity_tokens=self.capacity_tokens)
            checked.append((index, request, budget))
        return checked

    def measured_capacity(self, requests: Sequence[Request]) -> int:
        """Tokens of KV that memory holds: measured once in a run; a resumed run takes the journal's number."""
        journal = self._open_journal()
        if journal is not None and journal.capacity_tokens is not None:
            return journal.capacity_tokens
        longest = max(request.prompt.num_tokens for request in requests)
        return self.engine.capacity_tokens(self.config, longest)

    def _open(self, index: int, request: Request, budget: Budget) -> _Running:
        strategy = make_strategy(request.config)
        session = self.engine.open(
            request.prompt,
            request.config,
            budget,
            until=request.until,
            with_logprobs=self.reward.needs_logprobs,
            token_stats=self.reward.needs_token_stats,
        )
        scoring = self.reward.open(request.prompt.conversation, request.prompt.response_prefix)
        state, plan = strategy.init(budget)
        self.engine.follow(session, plan)
        return _Running(
            index=index,
            request=request,
            budget=budget,
            strategy=strategy,
            session=session,
            scoring=scoring,
            state=state,
            look_in=plan.num_tokens,
        )

    def _look(self, work: _Running, tracer: Tracer) -> GenerationResult | None:
        """Score the pool, ask the strategy, follow it. The result if the prompt is done, else None."""
        looked = time.perf_counter()
        scored = work.ledger.seconds["reward"]
        pool = self.engine.pool(work.session)
        scores = self._score(work, pool)
        peak = work.session.kv_tokens_peak
        tokens = max((row.num_tokens for row in pool), default=0)
        for row, score in zip(pool, scores, strict=True):
            work.rewards[row.row] = score
            if row.finished and row.row not in work.archived:
                work.archived.add(row.row)
                work.survived[row.row] += 1
        work.state, plan = work.strategy.step(work.state, pool, scores, work.budget)
        keep = set(plan.keep) if plan is not None else set()
        kept_scores = [score for row, score in zip(pool, scores, strict=True) if row.row in keep]
        rejected = sum(1 for row in pool if not row.finished and row.row not in keep)
        round_ = Round(
            rows=len(pool),
            tokens=tokens,
            cut=min(kept_scores, default=None) if rejected else None,
            kept=len(keep),
            finished=sum(row.finished for row in pool),
            rejected=rejected,
            kv_tokens=peak,
        )
        work.survived.update(keep)
        work.rounds.append(round_)
        tracer.round(work.request.prompt, len(work.rounds), round_)
        self.engine.follow(work.session, plan or Plan(keep=(), fresh=0, num_tokens=1))
        work.scoring.keep(plan.keep if plan is not None else ())
        scoring = work.ledger.seconds["reward"] - scored
        work.ledger.seconds["other"] += time.perf_counter() - looked - scoring
        if plan is None:
            return self._result(work)
        work.look_in = plan.num_tokens
        return None

    def _score(self, work: _Running, pool: Sequence[RowView]) -> list[float]:
        if not pool:
            return []
        reward = self.reward
        started, tokens, calls = time.perf_counter(), reward.tokens_scored, reward.num_calls
        floored, unreadable = reward.scores_floored, reward.grades_unreadable
        scores = list(work.scoring.score(pool))
        work.ledger.seconds["reward"] += time.perf_counter() - started
        work.ledger.reward_tokens += reward.tokens_scored - tokens
        work.ledger.reward_calls += reward.num_calls - calls
        work.ledger.scores_floored += reward.scores_floored - floored
        work.ledger.grades_unreadable += reward.grades_unreadable - unreadable
        for place, (row, score) in enumerate(zip(pool, scores, strict=True)):
            if math.isfinite(score):
                continue
            if work.request.config.on_nan == "error":
                raise RewardError(
                    f"{reward.name} scored row {row.row} of a prompt with {score}{reward.why_nan(place)}; its text "
                    f"begins {row.text[:80]!r}.",
                    hint="on_nan=drop ranks such rows last and counts them.",
                )
            work.nan_rewards += 1
            scores[place] = -math.inf
        return scores

    def _close(self, work: _Running) -> None:
        self.engine.close(work.session)
        work.scoring.close()

    @staticmethod
    def _make_comparable(work: _Running, finished: Sequence[int]) -> None:
        """Scores that hold only among the rows of one look (ranks) are made anew among all rows that finished."""
        scores = work.scoring.compare(finished)
        if scores is not None:
            work.rewards.update(zip(finished, scores, strict=True))

    def _result(self, work: _Running) -> GenerationResult:
        session, rows = work.session, self.engine.rows(work.session)
        self._make_comparable(work, [row.row for row in rows if row.finish_reason != "rejected"])
        trajectories = [
            Trajectory(
                row=row.row,
                text=row.text,
                token_ids=row.token_ids,
                reward=finite_or_none(work.rewards.get(row.row)),
                finish_reason=row.finish_reason,
                rounds_survived=work.survived[row.row],
                logprobs=row.logprobs,
                reward_parts=work.scoring.parts(row.row),
            )
            for row in rows
        ]
        self._close(work)
        finished = [trajectory for trajectory in trajectories if trajectory.finish_reason != "rejected"]
        if not finished:
            raise OutOfMemoryError(
                "out of memory: of this prompt's rows not one could be decoded to its end.",
                hint="use a smaller model or dtype, a shorter prompt, or fewer rows (n).",
            )
        # highest reward first, ties by row index; a reward that is not finite ranks last
        best = min(finished, key=lambda item: (-math.inf if item.reward is None else item.reward) * -1)
        ledger = work.ledger
        ledger.prompt_tokens = session.prompt_tokens
        ledger.decode_tokens = session.decode_tokens
        ledger.rows_started = len(trajectories)
        ledger.rows_finished = len(finished)
        ledger.rows_rejected = len(trajectories) - len(finished)
        ledger.seconds["prefill"] = session.prefill_seconds
        ledger.seconds["decode"] = session.decode_seconds
        ledger.peak_bytes = self.engine.peak_bytes()
        config, budget = work.request.config, work.budget
        return GenerationResult(
            best=best,
            trajectories=trajectories,
            rounds=work.rounds,
            ledger=ledger,
            prompt_hash=work.request.prompt.prompt_hash,
            task=work.request.prompt.task,
            repeat=work.request.prompt.repeat,
            resolved={
                **{name: getattr(config, name) for name in DECIDING},
                "n": budget.n,
                "first_look": budget.first_look,
                "kv_budget_tokens": budget.kv_budget_tokens,
                "until": list(work.request.until),
            },
            degraded=session.degraded,
            nan_rewards=work.nan_rewards,
        )

    # records

    def describe(self) -> dict[str, Any]:
        """Engine, reward model and versions, for results and traces."""
        from specrej_eval import __version__

        reward = EMBEDDED if self.reward.name == str(DEMO_REWARD) else self.reward.name
        return {"specrej_eval": __version__, "reward_model": reward, **self.engine.describe()}

    def _open_tracer(self) -> Tracer:
        if self._tracer is None:
            self._tracer = Tracer(self.config.trace_path)
            self._tracer.run({"arguments": self.config.to_dict(), **self.describe()})
        return self._tracer

    def _open_journal(self) -> Journal | None:
        if self._journal is None and self.config.journal is not None:
            fingerprint = of_models(self.config, self.identity) if self.fingerprint is None else self.fingerprint
            self._journal = Journal(self.config.journal, dict(fingerprint))
            warn_of_uncovered(fingerprint)
        return self._journal

    def _not_in(
        self, journal: Journal | None, work: Sequence[tuple[int, Request, Budget]]
    ) -> list[tuple[int, Request, Budget]]:
        return [item for item in work if journal is None or journal.get(item[1].key, item[1].prompt) is None]

    def _taken_from(
        self, journal: Journal | None, work: Sequence[tuple[int, Request, Budget]]
    ) -> Iterator[tuple[int, GenerationResult]]:
        if journal is None:
            return
        # looked up before the loop appends to the journal
        found = [(index, journal.get(request.key, request.prompt)) for index, request, _ in work]
        for index, result in found:
            if result is not None:
                yield index, result
