"""What becomes of a prompt in flight: it is read, its rows are scored at their looks and go on or not, it is finished,
and perhaps audited. When each of these happens is up to the loop (``generator``).

It holds no tensor and no arithmetic on scores: engines decode, rewards score, strategies decide.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from specrej_eval import auditing
from specrej_eval.budget import Budget
from specrej_eval.config import DECIDING, RunConfig
from specrej_eval.core import (
    ROWS_FROM,
    Audit,
    GenerationResult,
    Ledger,
    Plan,
    Prompt,
    Round,
    RowView,
    TokenStat,
    Trajectory,
    finite_or_none,
)
from specrej_eval.engines.base import Engine, EngineSession, Opening
from specrej_eval.errors import OutOfMemoryError, RewardError
from specrej_eval.overlap import overlapped
from specrej_eval.records.journal import request_key
from specrej_eval.records.trace import Tracer
from specrej_eval.rewards.base import RewardModel, RewardSession
from specrej_eval.scheduler import READ_A_TURN, steps_beside
from specrej_eval.strategies.base import State, Strategy, make_strategy

logger = logging.getLogger(__name__)

_STOP = Plan(keep=(), fresh=0, num_tokens=1)
"""What a strategy that is done wants of the engine."""


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
class _Auditing:
    """The rejected rows of a prompt that is done, decoded to their end beside the other prompts in flight."""

    rejected: Mapping[int, Trajectory]
    waiting: list[int]
    """Those that have not been started again yet."""
    tokens: int
    seconds: float
    """What the session had decoded before."""


@dataclass(slots=True)
class Running:
    """A prompt in flight: its two sessions, its strategy's state, and what has been learned of its rows."""

    index: int
    request: Request
    budget: Budget
    strategy: Strategy
    session: EngineSession
    scoring: RewardSession
    state: State
    look_in: int
    """Tokens each live row takes before the next look, counted from the last."""
    aside: RewardSession | None = None
    """Of ``score_every``: a session of its own, so that scores and costs of the looks are what they are without."""
    tokens_at_look: int = 0
    """Tokens that the rows which go on had at the last look."""
    aside_at: int = 0
    """Tokens the live rows had when they were last scored aside."""
    rewards: dict[int, float] = field(default_factory=dict)
    look_scores: dict[int, list[tuple[int, float | None]]] = field(default_factory=dict)
    survived: Counter[int] = field(default_factory=Counter)
    rounds: list[Round] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    nan_rewards: int = 0
    result: GenerationResult | None = None
    """Once the prompt is done."""
    audit: _Auditing | None = None

    @property
    def until_look(self) -> int:
        return 0 if not self.session.num_live else self.look_in - self.session.tokens_since_look

    @property
    def remaining_tokens(self) -> int:
        """Until rows are to be scored: at a look, or aside."""
        every = self.request.config.score_every
        if every is None or not self.until_look or self.result is not None:  # an audit has no looks
            return self.until_look
        tokens = self.tokens_at_look + self.session.tokens_since_look
        return min(self.until_look, 0 if tokens % every == 0 and tokens > self.aside_at else every - tokens % every)


@dataclass(slots=True)
class Look:
    """The rows of a prompt whose look is due, and their scores."""

    pool: Sequence[RowView]
    scores: Sequence[float]
    seconds: float
    """That scoring took, as far as nothing else was done meanwhile."""


Looks = Iterator[tuple[Running, Look | None]]
"""Prompts that are due, in order, as they are scored; None of one that has its answer and is audited."""

Admitted = tuple[int, Request, Budget]
"""A prompt that waits, or was let in: its place among the requests, and what was resolved of it."""


@dataclass(eq=False, slots=True)
class BeingRead:
    """Prompts that were admitted together and are being read, some of their tokens at a time, while others decode."""

    admitted: Sequence[Admitted]
    _turns: Generator[None, None, list[Running]]

    def read_on(self) -> list[Running] | None:
        """A turn of reading; the prompts, once they are open."""
        try:
            next(self._turns)
        except StopIteration as done:
            running: list[Running] = done.value
            return running
        return None

    def close(self) -> None:
        """Let go of what was read."""
        self._turns.close()


class InFlight:
    """What is done to each prompt in flight, with one engine and one reward model.

    Args:
        engine: decodes; see ``engines.base.Engine``.
        reward: scores; see ``rewards.base.RewardModel``.
    """

    def __init__(self, engine: Engine, reward: RewardModel) -> None:
        self.engine = engine
        self.reward = reward

    def open(self, admitted: Sequence[Admitted]) -> BeingRead:
        """Begin to read prompts. Nothing stays open of what fails."""
        return BeingRead(admitted, self._opened(admitted))

    def _opened(self, admitted: Sequence[Admitted]) -> Generator[None, None, list[Running]]:
        """Read prompts, a part with each ``next``, and start their rows."""
        openings = [
            Opening(
                prompt=request.prompt,
                config=request.config,
                budget=budget,
                until=request.until,
                token_stats=self._token_stats(request.config),
            )
            for _, request, budget in admitted
        ]
        sessions = yield from self.engine.open_by_turns(openings, tokens=READ_A_TURN)
        started: list[Running] = []
        try:
            for item, session in zip(admitted, sessions, strict=True):
                started.append(self._start(*item, session))
        except BaseException:
            self.close(started)
            for session in sessions[len(started) :]:
                self.engine.close(session)
            raise
        return started

    def _start(self, index: int, request: Request, budget: Budget, session: EngineSession) -> Running:
        """A prompt in flight, from one that was read."""
        strategy = make_strategy(request.config)
        state, plan = strategy.init(budget)
        self.engine.follow(session, plan)
        return Running(
            index=index,
            request=request,
            budget=budget,
            strategy=strategy,
            session=session,
            scoring=self.reward.open(request.prompt.conversation, request.prompt.response_prefix),
            state=state,
            look_in=plan.num_tokens,
            aside=self._aside(request),
        )

    def _aside(self, request: Request) -> RewardSession | None:
        if request.config.score_every is None:
            return None
        return self.reward.open(request.prompt.conversation, request.prompt.response_prefix)

    @property
    def overlaps(self) -> bool:
        """Whether the reward model may score while the engine decodes: each has devices of its own."""
        engine, reward = self.engine.devices, self.reward.devices
        return bool(engine and reward) and engine.isdisjoint(reward)

    @cached_property
    def _parameters(self) -> tuple[int, int]:
        """Of the language model, and of the reward model."""
        return self.engine.parameters_per_token(), self.reward.parameters_per_token()

    def _token_stats(self, config: RunConfig) -> set[TokenStat]:
        """What the engine is to record of every token."""
        wanted: set[TokenStat] = set(self.reward.needs_token_stats)
        return wanted | {"logprob"} if self.reward.needs_logprobs or config.logprobs else wanted

    def looks(self, due: Sequence[Running], others: Sequence[Running]) -> Looks:
        """Score prompts that are due: at their look, or aside.

        Each is scored when its turn comes. Where the reward model has devices of its own and there are ``others``, all
        of them are scored at once, in another thread, while those decode a few tokens more; none goes beyond its look.
        Should all prompts be due at once, half of them are left to the next turn, in which the first half decodes.

        Yields:
            Prompts whose look is due, and those whose audit is, in order.

        Raises:
            RewardError, OutOfMemoryError: scoring failed, or decoding did; what was scored before comes first.
        """
        if self.overlaps and not others:
            due = due[: (len(due) + 1) // 2]
        rows = {work.index: self._rows(work) for work in due if work.result is None}
        scored = self._scored(due, rows)
        if not (rows and others and self.overlaps):
            return scored
        new = sum(max(0, row.num_tokens - work.tokens_at_look) for work in due for row in rows.get(work.index, ()))
        new += sum(work.session.prompt_tokens for work in due if not work.rounds)
        steps = steps_beside(new, reward_parameters=self._parameters[1], parameters=self._parameters[0])
        return self._scored_beside(scored, others, min(steps, *(work.remaining_tokens for work in others)))

    def _scored_beside(self, scored: Looks, others: Sequence[Running], num_tokens: int) -> Looks:
        """All of it is scored while the others decode so many tokens."""
        sessions = [work.session for work in others]
        taken = overlapped(scored, lambda: self.engine.decode(sessions, num_tokens))
        for work, look in taken:
            if look is not None:
                look.seconds *= taken.share  # the rest is in what decoding took
            yield work, look

    def _rows(self, work: Running) -> list[RowView]:
        """Those to be scored: of a look its pool, aside the live ones."""
        if not work.until_look:
            with _clocked(work.ledger, "other"):
                return self.engine.pool(work.session)
        assert work.aside is not None
        rows = [row for row in self.engine.pool(work.session) if not row.finished]
        work.aside_at = rows[0].num_tokens
        work.aside.keep([row.row for row in rows])
        return rows

    def _scored(self, due: Sequence[Running], rows: Mapping[int, Sequence[RowView]]) -> Looks:
        """Calls the reward model and nothing else, and changes nothing but what is known of these prompts: the engine
        may be at work in another thread.

        Scores aside are kept; nothing else changes by them, and nothing is charged.
        """
        for work in due:
            if work.until_look:
                assert work.aside is not None
                mine = rows[work.index]
                for row, score in zip(mine, work.aside.score(mine), strict=True):
                    work.look_scores.setdefault(row.row, []).append((row.num_tokens, finite_or_none(score)))
        at_look = [work for work in due if not work.until_look]
        seconds = self._read_together([(work.scoring, rows[work.index]) for work in at_look if work.index in rows])
        for work in at_look:
            if work.index not in rows:
                yield work, None
                continue
            pool = rows[work.index]
            started = time.perf_counter()
            scores = self._score(work, pool)
            yield work, Look(pool, scores, seconds * len(pool) + time.perf_counter() - started)

    def _read_together(self, looks: Sequence[tuple[RewardSession, Sequence[RowView]]]) -> float:
        """What scoring has to read of several prompts is read together; the seconds that it took for each row."""
        if len(looks) < 2:
            return 0.0
        started = time.perf_counter()
        self.reward.read_ahead(looks, exact=self.engine.promises == "bits")
        return (time.perf_counter() - started) / max(1, sum(len(pool) for _, pool in looks))

    def follow(self, work: Running, look: Look, tracer: Tracer) -> bool:
        """Ask the strategy what becomes of the rows of a look, and follow its plan. True if the prompt is done."""
        pool, scores = look.pool, look.scores
        work.ledger.seconds["reward"] += look.seconds
        with _clocked(work.ledger, "other"):
            work.state, plan = work.strategy.step(work.state, pool, scores, work.budget)
            round_ = _round_of(pool, scores, plan or _STOP, work.session.kv_tokens_peak)
            tracer.round(work.request.prompt, len(work.rounds) + 1, round_)
            self._follow(work, pool, plan or _STOP)
            self._learn(work, pool, scores, plan or _STOP, round_)
        return plan is None

    def _score(self, work: Running, pool: Sequence[RowView]) -> list[float]:
        """One float per row; one that is not finite is an error or ranks last, as ``on_nan`` says."""
        if not pool:
            return []
        before = self._reward_counts()
        scores = list(work.scoring.score(pool))
        work.ledger.add(Ledger(**{name: count - before[name] for name, count in self._reward_counts().items()}))
        lost = [place for place, score in enumerate(scores) if not math.isfinite(score)]
        if lost and work.request.config.on_nan == "error":
            row, score = pool[lost[0]], scores[lost[0]]
            raise RewardError(
                f"{self.reward.name} scored row {row.row} of a prompt with {score}{self.reward.why_nan(lost[0])}; its "
                f"text begins {row.text[:80]!r}.",
                hint="on_nan=drop ranks such rows last and counts them.",
            )
        work.nan_rewards += len(lost)
        for place in lost:
            scores[place] = -math.inf
        return scores

    def _reward_counts(self) -> dict[str, Any]:
        """What the reward model has counted so far, by the ledger's names."""
        reward = self.reward
        return {
            "reward_tokens": reward.tokens_scored,
            "reward_calls": reward.num_calls,
            "scores_floored": reward.scores_floored,
            "grades_unreadable": reward.grades_unreadable,
        }

    def _follow(self, work: Running, pool: Sequence[RowView], plan: Plan) -> None:
        self.engine.follow(work.session, plan)
        work.scoring.keep(plan.keep)
        work.look_in = plan.num_tokens
        kept = set(plan.keep)
        work.tokens_at_look = max((row.num_tokens for row in pool if row.row in kept), default=0)
        work.aside_at = work.tokens_at_look

    @staticmethod
    def _learn(work: Running, pool: Sequence[RowView], scores: Sequence[float], plan: Plan, round_: Round) -> None:
        """Put down what a look has shown. A row that finished is in the pool of one look, and survives it."""
        work.rewards.update((row.row, score) for row, score in zip(pool, scores, strict=True))
        for row, score in zip(pool, scores, strict=True):
            work.look_scores.setdefault(row.row, []).append((row.num_tokens, finite_or_none(score)))
        work.survived.update(row.row for row in pool if row.finished)
        work.survived.update(set(plan.keep))
        work.rounds.append(round_)

    def close(self, works: Sequence[Running]) -> None:
        for work in works:
            self.engine.close(work.session)
            work.scoring.close()
            if work.aside is not None:
                work.aside.close()

    @staticmethod
    def _make_comparable(work: Running, finished: Sequence[int]) -> None:
        """Scores that hold only among the rows of one look (ranks) are made anew among all rows that finished."""
        scores = work.scoring.compare(finished)
        if scores is not None:
            work.rewards.update(zip(finished, scores, strict=True))

    def _trajectories(self, work: Running) -> list[Trajectory]:
        """All rows of a prompt that is done, in row order."""
        rows = self.engine.rows(work.session)
        self._make_comparable(work, [row.row for row in rows if row.finish_reason != "rejected"])
        return [
            Trajectory(
                row=row.row,
                text=row.text,
                token_ids=list(row.token_ids),
                reward=finite_or_none(work.rewards.get(row.row)),
                finish_reason=row.finish_reason or "rejected",
                rounds_survived=work.survived[row.row],
                logprobs=list(row.token_stats["logprob"]) if work.request.config.logprobs else None,
                reward_parts=work.scoring.parts(row.row),
                look_scores=work.look_scores.get(row.row, []),
            )
            for row in rows
        ]

    def result_of(self, work: Running) -> GenerationResult:
        session, trajectories = work.session, self._trajectories(work)
        finished = [trajectory for trajectory in trajectories if trajectory.finish_reason != "rejected"]
        if not finished:
            raise OutOfMemoryError(
                "out of memory: none of this prompt's rows could be decoded to its end.",
                hint="use a smaller model or dtype, a shorter prompt, or fewer rows (n).",
            )
        # the first of the highest reward; one that is not finite ranks last
        best = max(finished, key=lambda row: -math.inf if row.reward is None else row.reward)
        ledger = work.ledger
        ledger.prompt_tokens = session.prompt_tokens
        ledger.decode_tokens = session.decode_tokens
        ledger.overshoot_tokens = session.overshoot_tokens
        ledger.discarded_tokens = session.discarded_tokens
        ledger.cached_tokens = session.cached_tokens
        ledger.rows_started = len(trajectories)
        ledger.rows_finished = len(finished)
        ledger.rows_rejected = len(trajectories) - len(finished)
        ledger.seconds["prefill"] = session.prefill_seconds
        ledger.seconds["decode"] = session.decode_seconds
        ledger.peak_bytes = self.engine.peak_bytes()
        if not self.engine.decodes:
            ledger.seconds = Ledger().seconds
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
                **({} if self.engine.decodes else {ROWS_FROM: "records"}),
            },
            degraded=session.degraded,
            nan_rewards=work.nan_rewards,
        )

    def audits(self, work: Running) -> bool:
        """Whether a prompt that is done stays in flight: it is drawn for the audit (see ``auditing``), and its rejected
        rows decode to their end, as many at a time as its budget holds. Whatever fails here costs no answer."""
        result, session, budget = work.result, work.session, work.budget
        assert result is not None
        prompt, config = work.request.prompt, work.request.config
        if work.audit is None:
            if not auditing.is_drawn(
                config.audit,
                seed=config.seed,
                task=prompt.task,
                prompt_hash=prompt.prompt_hash,
                repeat=prompt.repeat,
            ):
                self.close([work])
                return False
            rejected = {row.row: row for row in result.trajectories if row.finish_reason == "rejected"}
            work.audit = _Auditing(rejected, list(rejected), session.decode_tokens, session.decode_seconds)
        audit = work.audit
        started = time.perf_counter()
        try:
            if wave := audit.waiting[: budget.rows_to_the_end]:
                del audit.waiting[: len(wave)]
                self.engine.again(session, {row: audit.rejected[row].token_ids for row in wave})
                work.look_in = budget.max_gen_toks
                return True
            result.audit = self._audited(work, audit.rejected)
        except (OutOfMemoryError, RewardError) as error:
            # its text: who keeps log records would keep the error, and with it the failed step's tensors
            logger.warning("The audit of a prompt failed, which its answer does not depend on: %s", str(error))
            result.audit = Audit(rows=[], num_rows=0, regret=None, error=str(error.args[0]))
        work.ledger.audit_rows = result.audit.num_rows
        work.ledger.audit_tokens = session.decode_tokens - audit.tokens
        work.ledger.audit_seconds = session.decode_seconds - audit.seconds + time.perf_counter() - started
        self.close([work])
        return False

    def _audited(self, work: Running, rejected: Mapping[int, Trajectory]) -> Audit:
        """What the rejected rows, now at their end, come to beside the answer."""
        assert work.result is not None
        best = work.result.best
        if not rejected:
            return Audit(rows=[], num_rows=0, regret=0.0)
        views = {row.row: row for row in self.engine.rows(work.session)}
        if any(views[row].finish_reason == "rejected" for row in rejected):
            raise OutOfMemoryError("out of memory while decoding rejected rows to their end.")
        finished = [row for row in work.result.trajectories if row.row not in rejected]
        rewards = {row.row: row.reward for row in finished}
        scored = [*(rewards if self.reward.by_rank else ()), *rejected]  # ranks hold among the rows of one call
        before = self._reward_counts()["reward_tokens"]
        scoring = self.reward.open(work.request.prompt.conversation, work.request.prompt.response_prefix)
        try:
            found = map(finite_or_none, scoring.score([views[row] for row in scored]))
            rewards.update(zip(scored, found, strict=True))
            parts = {row: scoring.parts(row) for row in rejected}
        finally:
            scoring.close()
        work.ledger.audit_reward_tokens = self._reward_counts()["reward_tokens"] - before
        worth = {row: -math.inf if reward is None else reward for row, reward in rewards.items()}
        # one text is one answer: read in other company, its reward may differ in its last bits
        better = [row for row in rejected if worth[row] > worth[best.row] and views[row].text != best.text]
        top = max((worth[row] for row in better), default=worth[best.row])
        rows = [
            replace(
                row,
                text=views[row.row].text,
                token_ids=list(views[row.row].token_ids),
                reward=rewards[row.row],
                finish_reason=views[row.row].finish_reason or "rejected",
                logprobs=None if row.logprobs is None else list(views[row.row].token_stats["logprob"]),
                reward_parts=parts[row.row],
            )
            for row in rejected.values()
        ]
        # an answer without a finite reward: what it lost has no size
        regret = finite_or_none(top - worth[best.row]) if better else 0.0
        return Audit(rows=rows, num_rows=len(rows), regret=regret, better=len(better))


@contextlib.contextmanager
def _clocked(ledger: Ledger, phase: str) -> Iterator[None]:
    """What happens inside is charged to a phase of a prompt."""
    started = time.perf_counter()
    yield
    ledger.seconds[phase] += time.perf_counter() - started


def _round_of(pool: Sequence[RowView], scores: Sequence[float], plan: Plan, kv_tokens: int) -> Round:
    """What became of the rows of a look."""
    keep = set(plan.keep)
    rejected = sum(not row.finished and row.row not in keep for row in pool)
    kept_scores = [score for row, score in zip(pool, scores, strict=True) if row.row in keep]
    return Round(
        rows=len(pool),
        tokens=max((row.num_tokens for row in pool), default=0),
        cut=min(kept_scores, default=None) if rejected else None,
        kept=len(keep),
        finished=sum(row.finished for row in pool),
        rejected=rejected,
        kv_tokens=kv_tokens,
    )
