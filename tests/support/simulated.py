"""A language model and a reward model that are nothing but arithmetic, so that strategies can be checked exactly.

A ``Process`` says of every row when it ends, what its partial answers score and what its full answer scores.
``simulate`` is the loop of the generator without an engine: the smallest thing that speaks the plan/step protocol
with a real strategy, and that refuses plans the protocol does not allow. ``SimulatedEngine`` and ``SimulatedReward``
put the same process under the real ``Generator``. Lengths, ends and rewards are functions of the row alone, so two runs
on one process differ by nothing but what the strategy did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrej_eval.budget import Budget, resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import (
    FinishReason,
    GenerationResult,
    Ledger,
    Message,
    Plan,
    Prompt,
    Round,
    RowView,
    Trajectory,
    prompt_hash,
)
from specrej_eval.engines.base import Engine, EngineSession
from specrej_eval.errors import KVBudgetExceededError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.rewards.base import RewardModel
from specrej_eval.strategies.base import make_strategy

EOS = 0
NEVER = 10**9
"""The length of a row that never ends by itself: it stops at the length cap."""


class ProtocolError(AssertionError):
    """A strategy asked for something that no engine could do within the budget."""


@dataclass(frozen=True)
class Process:
    """What would become of each row, were it never rejected."""

    length: Callable[[int], int]
    """row -> tokens at its end of sequence, that token included."""
    partial: Callable[[int, int], float]
    """(row, tokens) -> score of the unfinished answer."""
    final: Callable[[int], float]
    """row -> score of the finished answer."""

    @classmethod
    def of(
        cls,
        finals: Sequence[float],
        *,
        lengths: Sequence[int] | None = None,
        partials: Callable[[int, int], float] | None = None,
    ) -> Process:
        """Tables: by default no row ends before the cap, and partial answers score as the full ones do."""
        return cls(
            length=(lambda row: NEVER) if lengths is None else lengths.__getitem__,
            partial=(lambda row, tokens: finals[row]) if partials is None else partials,
            final=finals.__getitem__,
        )

    def score(self, row: int, tokens: int, finished: bool) -> float:
        return self.final(row) if finished else self.partial(row, tokens)

    def token(self, row: int, step: int) -> int:
        """The row's ``step``-th token, counted from 1: the end of sequence exactly at its length."""
        return EOS if step == self.length(row) else 1 + (row * 1_000_003 + step * 7_919) % 60_000


def simulate(
    strategy: Any,
    budget: Budget,
    process: Process,
    *,
    archive: Callable[[RowView, Plan | None, list[int]], bool] = lambda row, plan, best: True,
) -> GenerationResult:
    """Run one prompt through a strategy: init, decode, score the pool, step, keep, until there is no plan.

    Args:
        archive: whether a row that finished in this round enters the archive; anything but "always" is a defect,
            and only there to plant it. ``best`` are the pool's rows in rank order.

    Raises:
        ProtocolError: the plan keeps a row that is not live, decodes nothing, or exceeds the budget.
    """
    ledger = Ledger(prompt_tokens=budget.prompt_tokens)
    rounds: list[Round] = []
    ended: dict[int, Trajectory] = {}
    tokens_of: dict[int, int] = {}
    survived: dict[int, int] = {}
    looks: dict[int, list[tuple[int, float | None]]] = {}
    live: list[int] = []
    state, plan = strategy.init(budget)
    while plan is not None:
        live = _next_pool(plan, live, tokens_of)
        survived.update((row, survived.get(row, -1) + 1) for row in live)
        held = _decode(plan, live, tokens_of, process, budget, ledger)
        rows = [_view(row, tokens_of[row], process, budget) for row in live]
        scores = [process.score(view.row, tokens_of[view.row], view.finished) for view in rows]
        for view, score in zip(rows, scores, strict=True):
            looks.setdefault(view.row, []).append((tokens_of[view.row], score))
        ledger.reward_calls += 1
        ledger.reward_tokens += sum(tokens_of[row] for row in live)

        state, plan = strategy.step(state, rows, scores, budget)

        keep = () if plan is None else plan.keep
        by_rank = sorted(range(len(rows)), key=lambda index: (-scores[index], rows[index].row))
        for view, score in zip(rows, scores, strict=True):
            lost = view.finished and not archive(view, plan, [rows[index].row for index in by_rank])
            if (view.finished and not lost) or (not view.finished and view.row not in keep):
                if view.row in ended:
                    raise ProtocolError(f"row {view.row} ended twice")
                ended[view.row] = Trajectory(
                    row=view.row,
                    text=view.text,
                    token_ids=[process.token(view.row, step) for step in range(1, tokens_of[view.row] + 1)],
                    reward=score,
                    finish_reason=view.finish_reason or "rejected",
                    rounds_survived=survived[view.row] + view.finished,
                    look_scores=looks[view.row],
                )
        finished = {view.row for view in rows if view.finished}
        kept_scores = [score for view, score in zip(rows, scores, strict=True) if view.row in keep]
        rejected = len(rows) - len(finished) - len(keep)
        rounds.append(
            Round(
                rows=len(rows),
                tokens=max(tokens_of[row] for row in live),
                cut=min(kept_scores) if kept_scores and rejected else None,
                kept=len(keep),
                finished=len(finished),
                rejected=rejected,
                kv_tokens=held,
            )
        )
        ledger.rows_finished += len(finished)
        ledger.rows_rejected += rejected
        live = [row for row in live if row not in finished]
    ledger.rows_started = len(tokens_of)
    trajectories = [ended[row] for row in sorted(ended)]
    complete = [row for row in trajectories if row.finish_reason != "rejected"]
    if not complete:
        raise ProtocolError("the run ended and no row had finished: there is nothing to return")
    best = max(complete, key=lambda row: (row.reward, -row.row))
    return GenerationResult(best=best, trajectories=trajectories, rounds=rounds, ledger=ledger)


def _next_pool(plan: Plan, live: list[int], tokens_of: dict[int, int]) -> list[int]:
    """The rows of the next round, in row order; new rows take the next free ids."""
    if not set(plan.keep) <= set(live):
        raise ProtocolError(f"{plan} keeps rows that are not live; live are {live}")
    if len(set(plan.keep)) != len(plan.keep):
        raise ProtocolError(f"{plan} names a row twice; these strategies never fork")
    if plan.num_tokens < 1 or len(plan.keep) + plan.fresh < 1:
        raise ProtocolError(f"{plan} decodes nothing: the loop would never end")
    first = len(tokens_of)
    fresh = list(range(first, first + plan.fresh))
    tokens_of.update((row, 0) for row in fresh)
    return sorted([*plan.keep, *fresh])


def _decode(
    plan: Plan, live: list[int], tokens_of: dict[int, int], process: Process, budget: Budget, ledger: Ledger
) -> int:
    """Every live row takes ``num_tokens`` tokens unless it ends earlier; returns the most tokens held on the way."""
    start = {row: tokens_of[row] for row in live}
    for row in live:
        tokens_of[row] = min(tokens_of[row] + plan.num_tokens, process.length(row), budget.max_gen_toks)
        ledger.decode_tokens += tokens_of[row] - start[row]
    held = 0
    for step in sorted({tokens_of[row] - start[row] for row in live}):  # rows only leave at these steps
        there = sum(start[row] + step for row in live if tokens_of[row] - start[row] >= step)
        held = max(held, budget.prompt_tokens + there)
    if held > budget.kv_budget_tokens:
        raise ProtocolError(f"{held} tokens held, the budget is {budget.kv_budget_tokens}: {plan} was too much")
    return held


def _finish_reason(row: int, tokens: int, process: Process, budget: Budget) -> FinishReason | None:
    if tokens == process.length(row):
        return "eos"
    return "length" if tokens == budget.max_gen_toks else None


def _view(row: int, tokens: int, process: Process, budget: Budget) -> RowView:
    reason = _finish_reason(row, tokens, process, budget)
    # a range has a length but holds no numbers: strategies may look at nothing else
    return RowView(row=row, text=f"row {row}, {tokens} tokens", token_ids=range(tokens), finish_reason=reason)


def run_directly(config: RunConfig, process: Process, *, prompt_tokens: int = 7) -> GenerationResult:
    """The real strategy of ``config`` on a simulated process."""
    return simulate(make_strategy(config), resolve(config, prompt_tokens), process)


# --- the same process under the real generator


@dataclass
class _Row:
    row: int
    tokens: int = 0
    at_look: int = 0
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Session(EngineSession):
    """One prompt being simulated."""

    process: Process
    budget: Budget
    rows: list[_Row] = field(default_factory=list)
    live: list[_Row] = field(default_factory=list)
    in_pool: list[_Row] = field(default_factory=list)
    kv_tokens_peak: int = 0
    closed: bool = False

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def tokens_since_look(self) -> int:
        return max((row.tokens - row.at_look for row in self.live), default=0)


class SimulatedEngine(Engine):
    """Prompts are looked up by what their user says.

    Args:
        process_of: (what the user says, seed) -> process.
        capacity: tokens of memory, for ``n=max``.
    """

    def __init__(self, process_of: Callable[[str, int], Process], *, capacity: int = 0) -> None:
        self.process_of = process_of
        self.capacity = capacity
        self.sessions: list[Session] = []
        self.most_in_flight = 0
        self.max_length = 10**6

    def check(self, prompt: Prompt, config: RunConfig) -> None: ...

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[str] = (),
    ) -> Session:
        process = self.process_of(prompt.conversation[-1]["content"], config.seed)
        session = Session(process=process, budget=budget, prompt_tokens=prompt.num_tokens)
        self.sessions.append(session)
        self.most_in_flight = max(self.most_in_flight, sum(not other.closed for other in self.sessions))
        return session

    def follow(self, session: Session, plan: Plan) -> None:
        live = {row.row: row for row in session.live}
        if not set(plan.keep) <= live.keys() or len(set(plan.keep)) != len(plan.keep):
            raise ProtocolError(f"{plan} keeps rows that are not live, or forks; live are {sorted(live)}")
        fresh = [_Row(row=len(session.rows) + new) for new in range(plan.fresh)]
        session.rows += fresh
        session.live = [row for row in session.live if row.row in plan.keep] + fresh
        session.in_pool = list(session.live)
        for row in session.live:
            row.at_look = row.tokens
        session.kv_tokens_peak = session.prompt_tokens + sum(row.tokens for row in session.live)

    def decode(self, sessions: Sequence[Session], num_tokens: int) -> None:
        if num_tokens < 1:
            raise ProtocolError("the loop decodes nothing: it would never end")
        for _ in range(num_tokens):
            for session in sessions:
                self._step(session)
            if not all(session.live for session in sessions):
                return

    def _step(self, session: Session) -> None:
        for row in session.live:
            row.tokens += 1
            row.finish_reason = _finish_reason(row.row, row.tokens, session.process, session.budget)
        held = session.prompt_tokens + sum(row.tokens for row in session.live)
        if held > session.budget.kv_budget_tokens:
            raise KVBudgetExceededError(f"{held} tokens held, the budget is {session.budget.kv_budget_tokens}")
        session.kv_tokens_peak = max(session.kv_tokens_peak, held)
        session.decode_tokens += len(session.live)
        session.live = [row for row in session.live if row.finish_reason is None]

    def pool(self, session: Session) -> list[RowView]:
        return [_view(row.row, row.tokens, session.process, session.budget) for row in session.in_pool]

    def rows(self, session: Session) -> list[RowView]:
        return [
            RowView(
                row=row.row,
                token_ids=[session.process.token(row.row, step) for step in range(1, row.tokens + 1)],
                text=_view(row.row, row.tokens, session.process, session.budget).text,
                finish_reason=row.finish_reason or "rejected",
            )
            for row in session.rows
        ]

    finishes_rejected = True

    def again(self, session: Session, rows: Mapping[int, Sequence[int]]) -> None:
        if session.live:
            raise ProtocolError("rejected rows are started again while others are live")
        for row in rows:
            given = session.rows[row]
            if given.finish_reason is not None or len(rows[row]) != given.tokens:
                raise ProtocolError(f"row {row} was not rejected after {len(rows[row])} tokens")
            given.tokens = given.at_look = 0
            session.live.append(given)
        session.in_pool = list(session.live)

    def close(self, session: Session) -> None:
        session.closed = True

    def capacity_tokens(self, prompt_tokens: int) -> int:
        return self.capacity

    def peak_bytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"device": "none"}


class SimulatedReward(RewardModel):
    """Reads every token of every row at every look, as without a prefix cache."""

    name = "simulated"
    tokens_scored = 0
    num_calls = 0

    def __init__(self, process_of: Callable[[str], Process]) -> None:
        self.process_of = process_of

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        process = self.process_of(conversation[-1]["content"])
        self.num_calls += 1
        self.tokens_scored += sum(row.num_tokens for row in rows)
        return [process.score(row.row, row.num_tokens, row.finished) for row in rows]


def request(config: RunConfig, says: str = "?", *, prompt_tokens: int = 7) -> Request:
    """A prompt of one user turn."""
    prompt = Prompt(
        token_ids=tuple(range(prompt_tokens)),
        conversation=({"role": "user", "content": says},),
        prompt_hash=prompt_hash(says),
        task="simulated",
    )
    return Request(prompt=prompt, config=config)


def make_generator(processes: Mapping[str, Process], config: RunConfig) -> Generator:
    """The real generator, on processes named by what the user says."""
    engine = SimulatedEngine(lambda says, seed: processes[says])
    return Generator(engine=engine, reward=SimulatedReward(processes.__getitem__), config=config)


def run_generator(config: RunConfig, process: Process, *, prompt_tokens: int = 7) -> GenerationResult:
    """One prompt through the real generator."""
    generator = make_generator({"?": process}, config)
    ((_, result),) = generator.run([request(config, prompt_tokens=prompt_tokens)], progress=False)
    assert all(session.closed for session in generator.engine.sessions), "a finished prompt's memory is freed"
    return result
