"""The only loop: prompt -> engine -> reward -> strategy -> result.

It holds no tensor and no arithmetic on scores: engines decode, rewards score, strategies decide.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from specrej_eval import budget as budgets
from specrej_eval import stopping
from specrej_eval.budget import Budget
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import AUTO, MAX, N_MAX, RunConfig, checked_until
from specrej_eval.core import GenerationResult, Ledger, Message, Plan
from specrej_eval.engines.base import Engine, EngineSession
from specrej_eval.errors import ConfigError, LimitReached, OutOfMemoryError, PromptError
from specrej_eval.forecast import Forecast
from specrej_eval.in_flight import Admitted, BeingRead, InFlight, Request, Running
from specrej_eval.progress import Progress
from specrej_eval.records.fingerprint import EMBEDDED, of_models, warn_of_uncovered
from specrej_eval.records.journal import Journal
from specrej_eval.records.state import StateFile, state_file
from specrej_eval.records.trace import Tracer
from specrej_eval.rewards.base import RewardModel
from specrej_eval.scheduler import FIXED_PROMPTS, Scheduler, auto_prompts
from specrej_eval.wording import counted

logger = logging.getLogger(__name__)

POLL = 0.5
"""Seconds between two looks at what other processes have finished, where nothing else is left to do."""


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
        prompts = InFlight(self.engine, self.reward)
        keys = {} if journal is None else {index: request.key for index, request, _ in work}
        # looked up before the loop appends to the journal
        taken = {} if journal is None else _recorded(journal, keys, work)
        waiting = [item for item in work if item[0] not in taken]
        in_flight = self._in_flight(waiting) if waiting else FIXED_PROMPTS
        self.prompts_in_flight = in_flight if waiting else self.prompts_in_flight
        shared = journal if journal is not None and journal.joined else None
        scheduler = Scheduler(
            waiting,
            batch_size=in_flight,
            tokens=lambda item: item[1].prompt.num_tokens,
            may_begin=None if shared is None else _claiming(shared, keys),
        )
        name = ", ".join(dict.fromkeys(request.config.strategy for request in requests))
        with (
            stopping.keeping(len(requests), None if journal is None else journal.where) as kept,
            contextlib.closing(
                Progress(len(requests), name=name, in_flight=in_flight, shown=progress, summary=summary)
            ) as bar,
            self._state(len(requests)) as state,
            contextlib.ExitStack() as to_close,
        ):
            running: list[Running] = []
            if shared is not None:
                to_close.callback(shared.give_up_claims)
            to_close.callback(prompts.close, running)
            opening: BeingRead | None = None

            def abandon() -> None:
                if opening is not None:
                    opening.close()

            to_close.callback(abandon)
            while True:
                for index, done in taken.items():
                    bar.finished(done)
                    kept.add()
                    state.finished(done)
                    yield index, done
                limit = self._limit([work.session for work in running])
                if limit is None:
                    if opening is None and (admitted := scheduler.admit(len(running))):
                        opening = prompts.open(admitted)
                    if opening is not None and (opened := opening.read_on()) is not None:
                        running.extend(opened)
                        opening = None
                elif opening is not None:  # nothing was decoded for them: they are left to a later run
                    abandon()
                    scheduler.put_back(opening.admitted)
                    opening = None
                taken = {} if shared is None else _finished_elsewhere(shared, keys, scheduler)
                if not running:
                    if taken or opening is not None:
                        continue
                    if limit is not None or not scheduler.num_waiting:
                        break
                    bar.waiting(scheduler.num_waiting)
                    state.step(())
                    time.sleep(POLL)
                    continue
                num_tokens = scheduler.until_next_look(running)
                if num_tokens:
                    self.engine.decode([work.session for work in running], num_tokens)
                due = [work for work in running if not work.remaining_tokens]
                others = [work for work in running if work.remaining_tokens]
                for each, look in prompts.looks(due, others):
                    if each.result is None:
                        assert look is not None
                        if not prompts.follow(each, look, tracer):
                            continue
                        each.result = prompts.result_of(each)
                    if prompts.audits(each):
                        continue
                    result = each.result
                    running.remove(each)
                    self.totals.add(result.ledger)
                    tracer.request(result)
                    with stopping.held():
                        if journal is not None:
                            journal.put(keys[each.index], result)
                        kept.add()
                    bar.finished(result)
                    state.finished(result)
                    yield each.index, result
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
        if path is None and self._journal is not None:
            path = str(state_file(self._journal.path))
        return StateFile(path, total=total, earlier=self.answered_before)

    def _checked(self, requests: Sequence[Request], journal: Journal | None) -> list[Admitted]:
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
            try:
                fresh = min(budget.n, budget.max_rows(tokens))
                self.engine.follow(session, Plan(keep=(), fresh=fresh, num_tokens=tokens))
                started = time.perf_counter()
                self.engine.decode([session], tokens)
                seconds = (time.perf_counter() - started) / max(1, session.decode_tokens)
            finally:
                self.engine.close(session)
        return seconds

    def _in_flight(self, work: Sequence[Admitted]) -> int:
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
        unlimited = {"max_seconds": None, "max_decode_tokens": None}
        config = self.config.replace(journal=None, join=False, trace_path=None, plan=None, **unlimited)
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
            self._journal = Journal(self.config.journal, fingerprint, join=self.config.join)
            warn_of_uncovered(fingerprint)
        return self._journal


def _recorded(journal: Journal, keys: Mapping[int, str], work: Iterable[Admitted]) -> dict[int, GenerationResult]:
    found = ((index, journal.get(keys[index], request.prompt)) for index, request, _ in work)
    return {index: result for index, result in found if result is not None}


def _claiming(journal: Journal, keys: Mapping[int, str]) -> Callable[[Admitted], bool]:
    return lambda item: journal.claim(keys[item[0]])


def _finished_elsewhere(
    journal: Journal, keys: Mapping[int, str], scheduler: Scheduler[Admitted]
) -> dict[int, GenerationResult]:
    """What other processes have finished of the prompts that wait, which wait no more."""
    journal.refresh()
    found = _recorded(journal, keys, scheduler.waiting)
    if found:
        scheduler.remove(lambda item: item[0] in found)
    return found
