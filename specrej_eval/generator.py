"""The only loop: prompt -> engine -> reward -> strategy -> result.

It holds no tensor and no arithmetic on scores: engines decode, rewards score, strategies decide.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from specrej_eval import auditing, stopping
from specrej_eval import budget as budgets
from specrej_eval.budget import Budget
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import AUTO, DECIDING, MAX, N_MAX, RunConfig, checked_until
from specrej_eval.core import (
    ROWS_FROM,
    Audit,
    GenerationResult,
    Ledger,
    Message,
    Plan,
    Prompt,
    Round,
    RowView,
    TokenStat,
    Trajectory,
    finite_or_none,
)
from specrej_eval.engines.base import Engine, EngineSession, Opening
from specrej_eval.errors import ConfigError, LimitReached, OutOfMemoryError, PromptError, RewardError
from specrej_eval.forecast import Forecast
from specrej_eval.progress import Progress
from specrej_eval.records.fingerprint import EMBEDDED, of_models, warn_of_uncovered
from specrej_eval.records.journal import Journal, request_key
from specrej_eval.records.state import StateFile, state_file
from specrej_eval.records.trace import Tracer
from specrej_eval.rewards.base import RewardModel, RewardSession
from specrej_eval.scheduler import FIXED_PROMPTS, Scheduler, auto_prompts
from specrej_eval.strategies.base import State, Strategy, make_strategy
from specrej_eval.wording import counted

logger = logging.getLogger(__name__)


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


_STOP = Plan(keep=(), fresh=0, num_tokens=1)
"""What a strategy that is done wants of the engine."""


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
class _Running:
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


class Generator:
    """Answers prompts with one engine, one reward model and the strategy each request names.

    Made by ``specrej_eval.load`` or by a harness adapter.

    Args:
        engine: decodes; see ``engines.base.Engine``.
        reward: scores; see ``rewards.base.RewardModel``.
        config: defaults for ``generate``; ``batch_size``, ``trace_path`` and ``journal`` hold for all requests.
        fingerprint: of the models (``fingerprint.of_models``), for the journal if there is one; None = as ``config``
            names them.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        reward: RewardModel,
        config: RunConfig,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.reward = reward
        self.config = config
        self.totals = Ledger()
        """Cost of everything this generator decoded so far; what a journal had ready cost it nothing."""
        self.fingerprint = of_models(config, {}) if fingerprint is None and config.journal is not None else fingerprint
        self._tracer: Tracer | None = None
        self._journal: Journal | None = None
        self.capacity_tokens: int | None = None
        """Tokens of KV that memory holds for one prompt (``n=max``): measured by the first run that needs them, unless
        set before."""
        self.started = time.perf_counter()
        """What ``max_seconds`` counts from."""
        self.spent_before = 0
        """Tokens that count for ``max_decode_tokens`` beside its own: of other generators of the same run."""
        self.processes = 1
        """That answer a run together: each has its share of ``max_decode_tokens``."""
        self.state_path: str | None = None
        """Where a run's live state is kept (``records.state``); None = beside the journal, if there is one."""
        self.answered_before = 0
        """Answers that its caller had before, and does not ask for: they stand in the live state."""
        self.prompts_in_flight: int | None = None
        """What ``batch_size`` came to, in the last run."""

    def __repr__(self) -> str:
        names = ("strategy", "n", "alpha", "max_gen_toks", "temperature", "top_k", "seed")
        about = {"pretrained": self.config.pretrained or EMBEDDED, **self.describe()}
        shown = ("pretrained", "reward_model", "device", "dtype", "promises")
        parts = [f"{name}={about[name]!r}" for name in shown if name in about]
        return f"Generator({', '.join(parts + [f'{name}={getattr(self.config, name)!r}' for name in names])})"

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
            LimitReached: ``max_seconds`` or ``max_decode_tokens``; its ``results`` holds what was answered, by index.
        """
        changes = {"max_gen_toks": max_gen_toks, "seed": seed}
        config = self.config.replace(**{name: value for name, value in changes.items() if value is not None})
        stops = checked_until(list(until) if isinstance(until, (tuple, set)) else until)
        if not isinstance(prompts, Iterable):
            raise PromptError(
                f"prompts must be a string, a list of chat messages, or a list of either, got {prompts!r}.",
                hint='generate("Name a fruit.") answers one prompt.',
            )
        listed: Sequence[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
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
        results: dict[int, GenerationResult] = {}
        try:
            for index, result in self.run(requests, progress=len(requests) > 1):
                results[index] = result
        except LimitReached as error:
            error.results = results
            raise
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
            LimitReached: likewise, of ``max_seconds`` or ``max_decode_tokens``.
        """
        if self.config.plan is not None:
            raise ConfigError(
                "plan=only answers nothing: it is for `specrej-eval run` and lm-eval.",
                hint="leave it out here; in Python, forecast(requests) of a generator makes a plan.",
            )
        journal = self._open_journal()
        work = self._checked(requests, journal)
        tracer = self._open_tracer()
        # looked up before the loop appends to the journal
        found = {} if journal is None else {i: journal.get(request.key, request.prompt) for i, request, _ in work}
        taken = {index: result for index, result in found.items() if result is not None}
        waiting = [item for item in work if item[0] not in taken]
        in_flight = self._in_flight(waiting) if waiting else FIXED_PROMPTS
        self.prompts_in_flight = in_flight if waiting else self.prompts_in_flight
        scheduler = Scheduler(waiting, batch_size=in_flight, tokens=lambda item: item[1].prompt.num_tokens)
        name = ", ".join(dict.fromkeys(request.config.strategy for request in requests))
        with (
            stopping.keeping(len(requests), None if journal is None else journal.path) as kept,
            contextlib.closing(
                Progress(len(requests), name=name, in_flight=in_flight, shown=progress, summary=summary)
            ) as bar,
            self._state(len(requests)) as state,
            contextlib.ExitStack() as to_close,
        ):
            running: list[_Running] = []
            to_close.callback(self._close, running)
            for index, done in taken.items():
                bar.finished(done)
                kept.add()
                state.finished(done)
                yield index, done
            while True:
                limit = self._limit([work.session for work in running])
                if limit is None:
                    running.extend(self._open(scheduler.admit(len(running))))
                if not running:
                    break
                num_tokens = scheduler.until_next_look(running)
                if num_tokens:
                    self.engine.decode([work.session for work in running], num_tokens)
                for each in running:
                    if each.result is None and each.until_look and not each.remaining_tokens:
                        self._score_aside(each)
                at_look = [work for work in running if not work.until_look]
                looking = [work for work in at_look if work.result is None]
                pools = dict(zip((work.index for work in looking), self._pools(looking), strict=True))
                for due in at_look:
                    if due.result is None:
                        if not self._look(due, pools[due.index], tracer):
                            continue
                        due.result = self._result(due)
                    if self._audits(due):
                        continue
                    result = due.result
                    running.remove(due)
                    self.totals.add(result.ledger)
                    tracer.request(result)
                    with stopping.held():
                        if journal is not None:
                            journal.put(due.request.key, result)
                        kept.add()
                    bar.finished(result)
                    state.finished(result)
                    yield due.index, result
                bar.step([work.session for work in running])
                state.step([work.session for work in running])
            if limit is not None and scheduler.num_waiting:
                answered = len(requests) - scheduler.num_waiting
                raise LimitReached.after(answered, len(requests), limit=limit, where=kept.where)

    def _limit(self, sessions: Sequence[EngineSession]) -> str | None:
        """The limit that is reached; None = none is."""
        config = self.config
        if config.max_seconds is not None and time.perf_counter() - self.started >= config.max_seconds:
            return f"max_seconds={config.max_seconds:g}"
        decoded = self.totals.decode_tokens + self.totals.audit_tokens + self.spent_before
        decoded += sum(session.decode_tokens for session in sessions)
        if config.max_decode_tokens is not None and decoded * self.processes >= config.max_decode_tokens:
            return f"max_decode_tokens={config.max_decode_tokens}"
        return None

    def _state(self, total: int) -> StateFile:
        path = self.state_path
        if path is None and self.config.journal is not None:
            path = str(state_file(self.config.journal))
        return StateFile(path, total=total, earlier=self.answered_before)

    def _checked(self, requests: Sequence[Request], journal: Journal | None) -> list[tuple[int, Request, Budget]]:
        for request in requests:
            self.engine.check(request.prompt, request.config)
            if request.config.variance_reduce and not self.engine.stratifies:
                raise ConfigError(
                    f"variance_reduce=True needs an engine that draws tokens from our own random numbers, and "
                    f"{type(self.engine).__name__} does not.",
                    hint="leave it out, or use the transformers engine.",
                )
            if request.config.audit and not self.engine.finishes_rejected:
                raise ConfigError(
                    f"audit={request.config.audit:g} needs an engine that can go on with rejected rows, and "
                    f"{type(self.engine).__name__} cannot.",
                    hint="leave audit out, or use the transformers engine.",
                )
            if request.config.score_every is not None and self.reward.by_rank:
                raise ConfigError(
                    f"score_every={request.config.score_every}: the scores of {self.reward.name} are ranks among the "
                    "rows of one look, and say nothing between looks.",
                    hint="reward_ensemble=mean gives scores that compare; or leave score_every out.",
                )
        of_memory = [r for r in requests if r.config.n == MAX and r.config.kv_budget_tokens is None]
        if of_memory:
            if self.capacity_tokens is None:
                self.capacity_tokens = self.measured_capacity(of_memory)
            if journal is not None and journal.capacity_tokens is None:
                journal.put_capacity(self.capacity_tokens)
        return [(index, request, self._budget(request)) for index, request in enumerate(requests)]

    def _budget(self, request: Request) -> Budget:
        journal = self._open_journal()
        return budgets.resolve(
            request.config,
            request.prompt.num_tokens,
            capacity_tokens=self.capacity_tokens,
            n_max=max(N_MAX, 0 if journal is None else journal.rows_of_capacity),
        )

    def measured_capacity(self, requests: Sequence[Request]) -> int:
        """Tokens of KV that memory holds for each prompt in flight, one if ``batch_size=auto``.

        Measured, and said, once in a run; a resumed run takes the journal's number.

        Args:
            requests: some with ``n=max``.

        Raises:
            ConfigError: so many rows of one prompt would take very long on this engine, and ``n_max`` is not given.
            OutOfMemoryError: the engine does not know.
        """
        journal = self._open_journal()
        if journal is not None and journal.capacity_tokens is not None:
            return journal.capacity_tokens
        longest = max(requests, key=lambda request: request.prompt.num_tokens)
        prompts = 1 if self.config.batch_size == AUTO else int(self.config.batch_size)
        tokens = self.engine.capacity_tokens(longest.prompt.num_tokens) // prompts
        if not tokens:
            raise OutOfMemoryError(
                "n=max needs to know how much memory a token of KV takes, which this engine or model cannot tell.",
                hint="give n (and kv_budget_tokens) as numbers.",
            )
        budget = budgets.resolve(longest.config, longest.prompt.num_tokens, capacity_tokens=tokens)
        told = f"n=max comes to {counted(budget.n, 'row')} of a prompt of {budget.prompt_tokens} tokens"
        told += f", {budget.kv_budget_tokens:,} tokens of KV cache"
        told += f" ({budget.kv_budget_tokens * self.engine.bytes_per_token() / 2**20:,.0f} MiB)"
        most = self.engine.most_rows_unasked
        if most is not None and budget.n > most and longest.config.n_max is None:
            raise ConfigError(
                f"{told}: more than {most} rows of one prompt take very long on this machine.",
                hint=f"n_max={budget.n} starts them all the same, a smaller n_max= so many; n= gives a number.",
            )
        decoded = budget.most_decoded(longest.config.alpha_fraction if longest.config.rejects else Fraction(0))
        seconds = self._seconds_per_token(longest, budget) * decoded
        logger.warning(
            "%s; decoding takes about %s a prompt if no row ends early (%s tokens; scoring comes on top).",
            told,
            f"{seconds:,.0f} s" if seconds >= 1 else "a second",
            f"{decoded:,}",
        )
        return tokens

    def _seconds_per_token(self, request: Request, budget: Budget) -> float:
        """Of decoding all rows of a prompt together: its first tokens, the second time it is done."""
        tokens = min(4, budget.first_look)
        seconds = 0.0
        for _ in range(2):
            session = self.engine.open(request.prompt, request.config, budget, until=request.until)
            self.engine.follow(session, Plan(keep=(), fresh=min(budget.n, budget.max_rows(tokens)), num_tokens=tokens))
            started = time.perf_counter()
            self.engine.decode([session], tokens)
            seconds = (time.perf_counter() - started) / max(1, session.decode_tokens)
            self.engine.close(session)
        return seconds

    def _in_flight(self, work: Sequence[tuple[int, Request, Budget]]) -> int:
        """Prompts in flight: ``batch_size``; ``auto`` is 1 with ``n=max``, whose rows may have all of the memory."""
        if self.config.batch_size != AUTO:
            return int(self.config.batch_size)
        if any(request.config.n == MAX for _, request, _ in work):
            return 1
        return auto_prompts(
            max(b.n if request.config.rejects else min(b.n, b.rows_to_the_end) for _, request, b in work),
            max(budget.kv_budget_tokens for _, _, budget in work),
            lambda: self.engine.capacity_tokens(1),  # a guard against filling memory, not a measurement for n=max
            bits=self.engine.promises == "bits",
        )

    def _open(self, admitted: Sequence[tuple[int, Request, Budget]]) -> Iterator[_Running]:
        sessions = self.engine.open_all(
            [
                Opening(
                    prompt=request.prompt,
                    config=request.config,
                    budget=budget,
                    until=request.until,
                    token_stats=self._token_stats(request.config),
                )
                for _, request, budget in admitted
            ]
        )
        for (index, request, budget), session in zip(admitted, sessions, strict=True):
            strategy = make_strategy(request.config)
            state, plan = strategy.init(budget)
            self.engine.follow(session, plan)
            yield _Running(
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

    def _score_aside(self, work: _Running) -> None:
        """Score the live rows between two looks and keep the scores; nothing else changes, and nothing is charged."""
        assert work.aside is not None
        rows = [row for row in self.engine.pool(work.session) if not row.finished]
        work.aside_at = rows[0].num_tokens
        work.aside.keep([row.row for row in rows])
        for row, score in zip(rows, work.aside.score(rows), strict=True):
            work.look_scores.setdefault(row.row, []).append((row.num_tokens, finite_or_none(score)))

    def _token_stats(self, config: RunConfig) -> set[TokenStat]:
        """What the engine is to record of every token."""
        wanted: set[TokenStat] = set(self.reward.needs_token_stats)
        return wanted | {"logprob"} if self.reward.needs_logprobs or config.logprobs else wanted

    def _pools(self, due: Sequence[_Running]) -> list[list[RowView]]:
        """The rows of prompts whose look is due; what scoring has to read of them is read together."""
        pools = []
        for work in due:
            with _clocked(work.ledger, "other"):
                pools.append(self.engine.pool(work.session))
        if len(due) > 1:
            started = time.perf_counter()
            looks = [(work.scoring, pool) for work, pool in zip(due, pools, strict=True)]
            self.reward.read_ahead(looks, exact=self.engine.promises == "bits")
            seconds = (time.perf_counter() - started) / max(1, sum(map(len, pools)))
            for work, pool in zip(due, pools, strict=True):
                work.ledger.seconds["reward"] += seconds * len(pool)
        return pools

    def _look(self, work: _Running, pool: Sequence[RowView], tracer: Tracer) -> bool:
        """Score the pool, ask the strategy, follow its plan. True if the prompt is done."""
        with _clocked(work.ledger, "reward"):
            scores = self._score(work, pool)
        with _clocked(work.ledger, "other"):
            work.state, plan = work.strategy.step(work.state, pool, scores, work.budget)
            round_ = _round_of(pool, scores, plan or _STOP, work.session.kv_tokens_peak)
            tracer.round(work.request.prompt, len(work.rounds) + 1, round_)
            self._follow(work, pool, plan or _STOP)
            self._learn(work, pool, scores, plan or _STOP, round_)
        return plan is None

    def _score(self, work: _Running, pool: Sequence[RowView]) -> list[float]:
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

    def _follow(self, work: _Running, pool: Sequence[RowView], plan: Plan) -> None:
        self.engine.follow(work.session, plan)
        work.scoring.keep(plan.keep)
        work.look_in = plan.num_tokens
        kept = set(plan.keep)
        work.tokens_at_look = max((row.num_tokens for row in pool if row.row in kept), default=0)
        work.aside_at = work.tokens_at_look

    @staticmethod
    def _learn(work: _Running, pool: Sequence[RowView], scores: Sequence[float], plan: Plan, round_: Round) -> None:
        """Put down what a look has shown. A row that finished is in the pool of one look, and survives it."""
        work.rewards.update((row.row, score) for row, score in zip(pool, scores, strict=True))
        for row, score in zip(pool, scores, strict=True):
            work.look_scores.setdefault(row.row, []).append((row.num_tokens, finite_or_none(score)))
        work.survived.update(row.row for row in pool if row.finished)
        work.survived.update(set(plan.keep))
        work.rounds.append(round_)

    def _close(self, works: Sequence[_Running]) -> None:
        for work in works:
            self.engine.close(work.session)
            work.scoring.close()
            if work.aside is not None:
                work.aside.close()

    @staticmethod
    def _make_comparable(work: _Running, finished: Sequence[int]) -> None:
        """Scores that hold only among the rows of one look (ranks) are made anew among all rows that finished."""
        scores = work.scoring.compare(finished)
        if scores is not None:
            work.rewards.update(zip(finished, scores, strict=True))

    def _trajectories(self, work: _Running) -> list[Trajectory]:
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

    def _result(self, work: _Running) -> GenerationResult:
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

    def _audits(self, work: _Running) -> bool:
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
                self._close([work])
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
            logger.warning("The audit of a prompt failed, which its answer does not depend on: %s", error)
            result.audit = Audit(rows=[], num_rows=0, regret=None, error=str(error.args[0]))
        work.ledger.audit_rows = result.audit.num_rows
        work.ledger.audit_tokens = session.decode_tokens - audit.tokens
        work.ledger.audit_seconds = session.decode_seconds - audit.seconds + time.perf_counter() - started
        self._close([work])
        return False

    def _audited(self, work: _Running, rejected: Mapping[int, Trajectory]) -> Audit:
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

    # records

    def describe(self) -> dict[str, Any]:
        """Engine, reward model and versions, for results and traces."""
        from specrej_eval import __version__

        reward = EMBEDDED if self.reward.name == str(DEMO_REWARD) else self.reward.name
        told = {"reward_model": reward, "reward_parameters": self.reward.parameters_per_token()}
        return {"specrej_eval": __version__, **told, **self.engine.describe()}

    def forecast(self, requests: Sequence[Request]) -> Forecast:
        """What answering requests will take, from a probe of three of them; nothing is recorded.

        Raises:
            ConfigError, PromptError: as ``run``, for all of them.
        """
        config = self.config.replace(journal=None, trace_path=None, max_seconds=None, max_decode_tokens=None, plan=None)
        probe = Generator(engine=self.engine, reward=self.reward, config=config)
        probe.capacity_tokens = self.capacity_tokens
        work = probe._checked(requests, None)
        by_length = sorted(work, key=lambda item: item[1].prompt.num_tokens)
        places = dict.fromkeys(len(work) * sixth // 6 for sixth in (1, 3, 5))
        chosen = [by_length[place][1] for place in places]
        in_flight = probe._in_flight(work)
        probe.config = config.replace(batch_size=min(in_flight, len(chosen)))
        probe._seconds_per_token(chosen[0], probe._budget(chosen[0]))  # the first steps of all take longer
        started = time.perf_counter()
        results = [result for _, result in probe.run(chosen, progress=False)]
        return Forecast(
            prompts=len(requests),
            in_flight=min(in_flight, len(requests)),
            results=results,
            seconds=time.perf_counter() - started,
            budgets=[budget for *_, budget in work],
            most_decoded=sum(
                budget.most_decoded(request.config.alpha_fraction if request.config.rejects else Fraction(0))
                for _, request, budget in work
            ),
            bytes_per_token=self.engine.bytes_per_token(),
            peak_bytes=self.engine.peak_bytes(),
        )

    def _open_tracer(self) -> Tracer:
        if self._tracer is None:
            self._tracer = Tracer(self.config.trace_path)
            self._tracer.run({"arguments": self.config.to_dict(), **self.describe()})
        return self._tracer

    def _open_journal(self) -> Journal | None:
        if self._journal is None and self.config.journal is not None:
            fingerprint = dict(self.fingerprint or {})
            self._journal = Journal(self.config.journal, fingerprint)
            warn_of_uncovered(fingerprint)
        return self._journal


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
