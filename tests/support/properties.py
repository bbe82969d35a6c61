"""The properties every run must have, as functions of a runner, so that planted defects can be shown to break them.

A runner is ``run(config, process) -> GenerationResult``: the strategy alone (``simulated.run_directly``), the whole
generator on a simulated engine, or one of them with a defect planted.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult
from support.simulated import NEVER, Process

Runner = Callable[..., GenerationResult]
PROMPT_TOKENS = 7


@dataclass(frozen=True)
class Case:
    """A configuration whose budget holds one full row, and a process to run it on."""

    n: int
    max_gen_toks: int
    suffix_tokens: int
    alpha: str
    finals: tuple[float, ...]
    lengths: tuple[int, ...]
    noise: tuple[float, ...]
    """Added to a row's partial scores, so that partial and final scores disagree."""

    def config(self, **changes: Any) -> RunConfig:
        ours = {
            "alpha": self.alpha,
            "n": self.n,
            "kv_budget_tokens": PROMPT_TOKENS + self.suffix_tokens,
            "max_gen_toks": self.max_gen_toks,
        }
        return RunConfig.from_args(ours | changes)[0]

    def process(self) -> Process:
        return Process.of(
            self.finals, lengths=self.lengths, partials=lambda row, tokens: self.finals[row] + self.noise[row] / tokens
        )

    def process_with_true_partials(self) -> Process:
        return Process.of(self.finals, lengths=self.lengths)


# tenths and large cuts come often: that is where floats and rounding go wrong
ALPHAS = st.one_of(
    st.integers(1, 9).map(lambda tenths: f"0.{tenths}"),
    st.integers(90, 99).map(lambda percent: f"0.{percent}"),
    st.integers(1, 99).map(lambda percent: f"0.{percent:02}"),
)


@st.composite
def cases(draw: st.DrawFn, *, alphas: st.SearchStrategy[str] = ALPHAS) -> Case:
    """Few rows, small budgets and coarse scores, so that ties, forced drops and early ends are common."""
    n = draw(st.one_of(st.integers(1, 14), st.just(10)))
    max_gen_toks = draw(st.integers(1, 30))
    first_look = draw(st.integers(1, max_gen_toks // 2 + 1))
    spare = draw(st.integers(0, n - 1))
    alpha = draw(alphas)
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))  # per-row numbers: drawn one by one they would take seconds
    late = rng.choice((0.0, 0.5, 1.0))
    return Case(
        n=n,
        max_gen_toks=max_gen_toks,
        suffix_tokens=max(max_gen_toks, n * first_look + spare),  # one row to its end, each row to the first look
        alpha=alpha,
        finals=tuple(float(rng.randint(-9, 9)) for _ in range(n)),
        lengths=tuple(NEVER if rng.random() < late else rng.randint(1, max_gen_toks + 2) for _ in range(n)),
        noise=tuple(float(rng.randint(-9, 9)) for _ in range(n)),
    )


def ends_within_max_gen_toks_looks(run: Runner, case: Case) -> None:
    result = run(case.config(), case.process())
    assert len(result.rounds) <= case.max_gen_toks, (
        f"{len(result.rounds)} looks for {case.max_gen_toks} tokens: some look decoded nothing, so a run need never end"
    )


def every_look_cuts_by_the_rule(run: Runner, case: Case) -> None:
    """Each look against the rule written out again: who ranks, who goes on, and when the next look is."""
    process, alpha = case.process(), Fraction(case.alpha)
    budget = resolve(case.config(), PROMPT_TOKENS)
    result = run(case.config(), process)
    pool = list(result.trajectories)
    for number, round_ in enumerate(result.rounds):
        due = budget.first_look if number == 0 else min(case.max_gen_toks, case.suffix_tokens // len(pool))
        finished = [row.row for row in pool if min(process.length(row.row), case.max_gen_toks) <= due]
        assert (round_.rows, round_.finished) == (len(pool), len(finished)), (
            f"look {number} at {due} tokens counts {round_.rows} rows, {round_.finished} finished: the pool is the "
            f"{len(pool)} rows live when the round began and no others, and {finished} of them finish by then"
        )
        score = {row.row: process.score(row.row, due, row.row in finished) for row in pool}
        ranked = sorted(score, key=lambda row: (-score[row], row))
        stay = len(pool) - math.floor(alpha * len(pool))  # exact: alpha is a fraction
        best = [row for row in ranked[:stay] if row not in finished]
        room = len(best) if due == case.max_gen_toks else case.suffix_tokens // (due + 1)
        expected = sorted(best[:room])
        after = [row for row in pool if row.rounds_survived > number and row.row not in finished]
        assert sorted(row.row for row in after) == expected, (
            f"look {number} at {due} tokens, scores {score}, finished {finished}: of {len(pool)} rows the best {stay} "
            f"stay (floor({case.alpha} * {len(pool)}) go), the budget has room for {room}, so {expected} go on, "
            f"not {[row.row for row in after]}"
        )
        rejected = len(pool) - len(finished) - len(after)
        assert (round_.kept, round_.rejected) == (len(after), rejected), f"look {number} miscounts: {round_}"
        if after:
            assert round_.tokens == due, f"look {number} was due at {due} tokens, not {round_.tokens}"
        pool = after
    assert not pool, f"the run ended although rows {[row.row for row in pool]} were to go on"


def no_finished_row_is_lost(run: Runner, case: Case) -> None:
    """Each row is in the archive once; those that were not rejected are whole; the best of these is returned."""
    process = case.process()
    config = case.config()
    result = run(config, process)
    times = Counter(row.row for row in result.trajectories)
    assert times == Counter(range(case.n)), (
        f"{case.n} rows were started, yet the archive holds (row: times) {dict(times)}: each belongs there once"
    )
    assert [row.row for row in result.trajectories] == sorted(times), "trajectories are in row order"
    for row in result.trajectories:
        whole = min(process.length(row.row), case.max_gen_toks)
        if row.finish_reason == "rejected":
            assert row.num_tokens < whole, (
                f"row {row.row} had all its {whole} tokens, its score was final, and still it counts as rejected"
            )
        else:
            reason = "eos" if process.length(row.row) <= case.max_gen_toks else "length"
            assert (row.num_tokens, row.finish_reason) == (whole, reason), (
                f"row {row.row} is returned as {row.finish_reason} with {row.num_tokens} tokens, "
                f"but it ends as {reason} with {whole}: a partial answer must never be returned"
            )
            assert row.reward == case.finals[row.row], f"row {row.row} finished: its reward is its final score"
    complete = [row for row in result.trajectories if row.finish_reason != "rejected"]
    expected = max(complete, key=lambda row: (row.reward, -row.row))
    assert result.best is expected or result.best == expected, (
        f"row {result.best.row} was returned, but row {expected.row} finished with a better reward "
        f"(or an equal one and a lower index)"
    )


def the_budget_is_never_exceeded(run: Runner, case: Case) -> None:
    result = run(case.config(), case.process())
    budget = PROMPT_TOKENS + case.suffix_tokens
    for number, round_ in enumerate(result.rounds):
        assert round_.kv_tokens <= budget, f"round {number} held {round_.kv_tokens} tokens of {budget}"


def the_ledger_counts_every_token_once(run: Runner, case: Case) -> None:
    result = run(case.config(), case.process())
    ledger = result.ledger
    lengths = sum(row.num_tokens for row in result.trajectories)
    assert ledger.decode_tokens == lengths, f"{ledger.decode_tokens} tokens decoded, but the rows hold {lengths}"
    finished = sum(row.finish_reason != "rejected" for row in result.trajectories)
    assert (ledger.rows_started, ledger.rows_finished, ledger.rows_rejected) == (case.n, finished, case.n - finished)
    assert ledger.prompt_tokens == PROMPT_TOKENS, "the prompt is prefilled once, whatever the number of rows"


def true_partial_scores_return_the_best_of_n(run: Runner, case: Case) -> None:
    """partial == final: the best row is first in every pool it is in, so no alpha can lose it."""
    result = run(case.config(), case.process_with_true_partials())
    best = max(range(case.n), key=lambda row: (case.finals[row], -row))
    assert result.best.row == best, (
        f"row {result.best.row} was returned, but row {best} is the best from its first token to its last"
    )


def never_better_than_best_of_n(run: Runner, case: Case) -> None:
    """Pathwise: the same rows, run to their ends in shadow, hold a row at least as good; token for token the same."""
    result = run(case.config(), case.process())
    shadow = run(case.config(strategy="best_of_n"), case.process())
    assert result.best.reward <= shadow.best.reward, "rejecting rows found a better row than keeping all of them"
    for row, whole in zip(result.trajectories, shadow.trajectories, strict=True):
        assert row.token_ids == whole.token_ids[: row.num_tokens], (
            f"row {row.row} has other tokens than under best_of_n: a row's randomness must be its own"
        )


def alpha_zero_is_best_of_n(run: Runner, case: Case) -> None:
    ours = run(case.config(alpha=0), case.process())
    theirs = run(case.config(strategy="best_of_n"), case.process())
    assert ours.trajectories == theirs.trajectories, "alpha=0 must be Best-of-N, token for token"
    assert (ours.best, ours.rounds) == (theirs.best, theirs.rounds)
    assert all(row.finish_reason != "rejected" for row in ours.trajectories), "alpha=0 rejected a row"
    wave = min(case.n, case.suffix_tokens // case.max_gen_toks)
    assert [round_.rows for round_ in ours.rounds] == [min(wave, case.n - start) for start in range(0, case.n, wave)], (
        "waves hold as many rows as can all reach max_gen_toks within the budget"
    )


PROPERTIES = (
    ends_within_max_gen_toks_looks,
    every_look_cuts_by_the_rule,
    no_finished_row_is_lost,
    the_budget_is_never_exceeded,
    the_ledger_counts_every_token_once,
    true_partial_scores_return_the_best_of_n,
    never_better_than_best_of_n,
    alpha_zero_is_best_of_n,
)
