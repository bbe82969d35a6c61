"""Strategies against known answers: exact properties, cost identities, and two analytic reward processes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import FULL, properties
from support.properties import Case, cases
from support.simulated import Process, run_directly, run_generator, simulate

from specrej_eval.budget import Budget, resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.strategies.base import State, make_strategy
from specrej_eval.strategies.best_of_n import BestOfN


def config(**args) -> RunConfig:
    return RunConfig.from_args(args)[0]


def look(scores, *, alpha, finished=(), tokens=4, suffix=10_000, max_gen_toks=100):
    """One look at len(scores) rows of ``tokens`` tokens; returns the next plan."""
    budget = Budget(
        prompt_tokens=5, kv_budget_tokens=5 + suffix, n=len(scores), first_look=tokens, max_gen_toks=max_gen_toks
    )
    rows = [RowView(row, "", range(tokens), "eos" if row in finished else None) for row in range(len(scores))]
    strategy = make_strategy(config(alpha=alpha))
    return strategy.step(State(rows_started=len(scores)), rows, [float(score) for score in scores], budget)[1]


# --- the rule of one look


@pytest.mark.parametrize("run", [run_directly, run_generator], ids=["strategy alone", "whole generator"])
@pytest.mark.parametrize("property_", properties.PROPERTIES, ids=lambda property_: property_.__name__)
@given(case=cases())
@example(case=Case(1, 3, 3, "0.5", (0.0,), (9,), (0.0,)))
@example(case=Case(3, 4, 12, "0.01", (0.0, 0.0, 0.0), (9, 9, 9), (0.0, 0.0, 0.0)))
def test_every_run_has(property_, run, case):
    property_(run, case)


@pytest.mark.parametrize(
    ("alpha", "n", "kept"),
    [
        ("0.7", 10, 3),
        ("0.9", 10, 1),
        ("0.3", 10, 7),
        ("0.1", 10, 9),
        ("0.58", 50, 21),
        ("0.29", 100, 71),
        ("0.5", 7, 4),
    ],
)
def test_alpha_is_exact_where_a_float_is_not(alpha, n, kept):
    plan = look(range(n), alpha=alpha)
    assert len(plan.keep) == kept, f"alpha={alpha} of {n} rows keeps {kept}: floor of the fraction, not of a float"


@given(n=st.integers(1, 400), percent=st.integers(1, 99))
def test_a_look_keeps_n_minus_floor_alpha_n_rows_and_never_none(n, percent):
    plan = look(range(n), alpha=percent / 100)
    expected = n - n * percent // 100
    assert expected >= 1
    assert plan.keep == tuple(range(n - expected, n)), f"{len(plan.keep)} of {n} kept at alpha=0.{percent:02}"


@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.99, 0.9999999])
def test_one_row_alone_is_never_rejected(alpha):
    assert look([0.0], alpha=alpha).keep == (0,), "round(0.5) is 0 in Python: a rounding rule would keep nobody"


def test_ties_go_to_the_lower_row_index():
    assert look([1, 1, 1, 1, 1, 1], alpha=0.5).keep == (0, 1, 2)
    assert look([0, 2, 1, 1, 1, 2], alpha=0.5).keep == (1, 2, 5)


def test_minus_infinity_ranks_last_so_that_a_dropped_nan_cannot_win():
    assert look([-math.inf, 0, -math.inf, -5], alpha=0.5).keep == (1, 3)


def test_a_finished_row_takes_a_place_in_the_look_in_which_it_finishes():
    assert look([9, 1, 2, 3], alpha=0.5, finished={0}).keep == (3,), "rows 0 and 3 are the best two; row 0 has left"


def test_a_finished_row_under_the_cut_takes_no_place():
    assert look([0, 1, 2, 3], alpha=0.5, finished={0}).keep == (2, 3)


def test_nothing_goes_on_when_all_of_the_best_have_finished():
    assert look([9, 8, 2, 3], alpha=0.5, finished={0, 1}) is None


def test_the_worst_survivors_are_dropped_until_each_can_take_one_more_token():
    # 10 rows of 4 tokens fill 40; alpha=0.1 keeps 9, of which only 8 have room for a fifth token
    plan = look(range(10), alpha=0.1, suffix=40)
    assert plan.keep == (2, 3, 4, 5, 6, 7, 8, 9)
    assert plan.num_tokens == 1


def test_a_cut_that_rounds_to_nobody_still_makes_progress_when_the_budget_is_full():
    plan = look([3, 1, 2], alpha=0.01, suffix=12)
    assert plan.keep == (0, 2), "floor(0.01 * 3) = 0 rows go by rank, but three rows have no room for one more token"
    assert plan.num_tokens == 2


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_rows_in_another_order_give_the_same_rows_in_that_order(case, seed):
    order = np.random.default_rng(seed).permutation(case.n)
    finals = [float(final) + row / 64 for row, final in enumerate(case.finals)]  # no ties: they go by row index
    case = Case(**{**vars(case), "finals": tuple(finals), "noise": (0.0,) * case.n})

    def pick(values):
        return tuple(values[old] for old in order)

    other = Case(**{**vars(case), "finals": pick(case.finals), "lengths": pick(case.lengths)})
    result, moved = run_directly(case.config(), case.process()), run_directly(other.config(), other.process())
    assert order[moved.best.row] == result.best.row
    fate = {row.row: (row.finish_reason, row.num_tokens, row.reward) for row in result.trajectories}
    assert {
        int(order[row.row]): (row.finish_reason, row.num_tokens, row.reward) for row in moved.trajectories
    } == fate, "rows without ties are treated by their scores alone"


@pytest.mark.parametrize(
    "transform",
    [lambda x: 3 * x - 7, lambda x: x**3, lambda x: math.exp(x / 4), math.atan],
    ids=["line", "cube", "exp", "atan"],
)
@given(case=cases())
def test_any_increasing_transform_of_the_rewards_gives_the_same_run(transform, case):
    process = Process.of(
        case.finals,
        lengths=case.lengths,
        partials=lambda row, tokens: float((case.finals[row] * 7 + case.noise[row] * tokens) % 10),
    )
    changed = Process(
        length=process.length,
        partial=lambda row, tokens: transform(process.partial(row, tokens)),
        final=lambda row: transform(process.final(row)),
    )
    before, after = run_directly(case.config(), process), run_directly(case.config(), changed)
    assert [(row.row, row.finish_reason, row.token_ids) for row in before.trajectories] == [
        (row.row, row.finish_reason, row.token_ids) for row in after.trajectories
    ], "only ranks may matter: rewards have no unit"
    assert before.best.row == after.best.row


@given(case=cases(alphas=st.just("0")))
def test_best_of_n_has_no_partial_look(case):
    result = run_directly(case.config(strategy="best_of_n"), case.process())
    properties.no_finished_row_is_lost(run_directly, case)
    assert all(round_.rejected == 0 and round_.kept == 0 for round_ in result.rounds)
    assert result.best.reward == max(case.finals)


def test_without_a_budget_best_of_n_and_alpha_zero_run_all_rows_in_one_wave():
    process = Process.of([float(row) for row in range(40)])
    for arguments in ({"strategy": "best_of_n"}, {"alpha": 0}):
        result = run_directly(config(n=40, max_gen_toks=32, **arguments), process)
        assert [round_.rows for round_ in result.rounds] == [40], f"{arguments}: the default budget holds n rows"


@given(case=cases())
def test_best_of_n_never_starts_more_rows_than_can_finish(case):
    budget = resolve(case.config(strategy="best_of_n"), properties.PROMPT_TOKENS)
    state, plan = BestOfN().init(budget)
    while plan is not None:
        assert plan.keep == () and plan.num_tokens == case.max_gen_toks
        assert plan.fresh * case.max_gen_toks <= budget.suffix_tokens
        state, plan = BestOfN().step(state, [], [], budget)
    assert state.rows_started == case.n


# --- cost identities (memory-driven rounds; M = row-tokens, R = cuts, T = max_gen_toks)


EXACT = [  # alpha, rows at each look; chosen so that no division leaves a remainder
    ("0.5", (64, 32, 16, 8, 4)),
    ("0.75", (64, 16, 4, 1)),
    ("0.25", (64, 48, 36, 27)),
    ("0.2", (125, 100, 80, 64)),
    ("0.6", (125, 50, 20, 8)),
    ("0.7", (100, 30, 9)),
    ("0.1", (100, 90, 81)),
    ("0.9", (100, 10, 1)),
]


@pytest.mark.parametrize("run", [run_directly, run_generator], ids=["strategy alone", "whole generator"])
@pytest.mark.parametrize(("alpha", "rows"), EXACT, ids=[alpha for alpha, _ in EXACT])
def test_costs_are_those_of_the_identities_exactly(alpha, rows, run):
    cuts, n, last = len(rows) - 1, rows[0], rows[-1]
    fraction = Fraction(alpha)
    first_look = last // math.gcd(n, last)
    max_gen_toks = n * first_look // last
    memory = n * first_look
    assert memory == last * max_gen_toks, "the example is badly chosen"

    scores = np.random.default_rng(0).permutation(n).astype(float)
    result = run(config(alpha=alpha, n=n, first_look=first_look, max_gen_toks=max_gen_toks), Process.of(list(scores)))

    assert tuple(round_.rows for round_ in result.rounds) == rows
    looks = [round_.tokens for round_ in result.rounds]
    assert [pool * tokens for pool, tokens in zip(rows, looks, strict=True)] == [memory] * (cuts + 1), "b_r tau_r = M"
    for before, after in pairwise(looks):
        assert after == before / (1 - fraction), "tau_{r+1} = tau_r / (1 - alpha)"
    assert looks[-1] == max_gen_toks, "as many decode steps as Best-of-N"
    assert result.ledger.decode_tokens == memory * (1 + fraction * cuts), "decode tokens = M (1 + alpha R)"
    assert result.ledger.reward_tokens == memory * (cuts + 1), "tokens read without a prefix cache = M (R + 1)"
    assert result.ledger.reward_calls == cuts + 1
    assert {round_.kv_tokens for round_ in result.rounds} == {7 + memory}, "every round fills the budget to the token"
    ratio = Fraction(max_gen_toks, first_look)
    assert Fraction(1) / (1 - fraction) ** cuts == ratio == Fraction(n, last), "R = ln q / -ln(1 - alpha)"

    same_memory = run(config(strategy="best_of_n", n=last, max_gen_toks=max_gen_toks), Process.of(list(scores)))
    assert same_memory.ledger.decode_tokens == memory, "Best-of-N with the rows that fit to the end decodes M"


# --- one cut, Gaussian rewards with correlation rho between the partial and the final score


def one_cut(n: int, m: int) -> tuple[RunConfig, Budget]:
    """Arguments under which n rows are looked at once, m stay, and those m fill the budget at their end."""
    settings = config(
        alpha=str(Fraction(n - m, n).limit_denominator(10**9).__float__()), n=n, first_look=1, max_gen_toks=n // m
    )
    budget = resolve(settings, 7)
    return settings, budget


def draw_one_cut(n: int, m: int, rho: float, trials: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(reward returned, whether the best of all n rows was returned) of each trial, by the real strategy."""
    settings, budget = one_cut(n, m)
    strategy = make_strategy(settings)
    rng = np.random.default_rng(seed)
    state, plan = strategy.init(budget)
    assert (plan.fresh, plan.num_tokens) == (n, 1)
    rows = [RowView(row, "", range(1), None) for row in range(n)]
    returned, survived = np.empty(trials), np.empty(trials)
    for trial in range(trials):
        partial, other = rng.standard_normal((2, n))
        final = rho * partial + math.sqrt(1 - rho * rho) * other
        after, plan = strategy.step(state, rows, partial.tolist(), budget)
        assert len(plan.keep) == m and plan.num_tokens == budget.max_gen_toks - 1
        kept = final[list(plan.keep)]
        returned[trial], survived[trial] = kept.max(), kept.max() == final.max()
    del after
    return returned, survived


def within_four_standard_errors(sample: np.ndarray, expected: float, what: str) -> None:
    mean, error = sample.mean(), sample.std(ddof=1) / math.sqrt(len(sample))
    assert abs(mean - expected) < 4 * error, (
        f"{what}: {mean:.5f} over {len(sample)} fixed draws, expected {expected:.5f}: "
        f"{abs(mean - expected) / error:.1f} standard errors off, and chance makes four once in 16,000 cases"
    )


def draws(n: int) -> int:
    return (40_000 if FULL else 4_000) * 64 // max(n, 64)


@pytest.mark.parametrize(
    ("n", "m", "rho", "expected"),
    [
        (64, 32, 0.0, 2.06967),
        (64, 32, 0.3, 2.25036),
        (64, 32, 0.6, 2.33095),
        (64, 32, 0.9, 2.34373),
        (64, 16, 0.5, 2.22725),
        (64, 6, 0.5, 2.00318),
        (16, 8, 0.5, 1.69760),
        (128, 64, 0.3, 2.51901),
        (1000, 500, 0.31, 3.20008),
        (1000, 100, 0.31, 2.95185),
    ],
)
def test_the_mean_reward_after_one_cut_is_the_analytic_one(n, m, rho, expected):
    returned, _ = draw_one_cut(n, m, rho, draws(n), seed=n + m)
    within_four_standard_errors(returned, expected, f"E({n}, {m}, {rho})")


@pytest.mark.parametrize(
    ("n", "m", "rho", "expected"),
    [(64, 32, 0.3, 0.76755), (64, 32, 0.6, 0.95283), (64, 6, 0.6, 0.54516), (16, 8, 0.5, 0.83848)],
)
def test_the_best_row_survives_one_cut_as_often_as_it_must(n, m, rho, expected):
    _, survived = draw_one_cut(n, m, rho, draws(n), seed=n + m + 1)
    within_four_standard_errors(survived, expected, f"survival of the best row ({n}, {m}, {rho})")


@pytest.mark.parametrize(("n", "m"), [(64, 32), (64, 6), (16, 8)])
def test_a_cut_by_noise_leaves_the_maximum_of_m_uniforms(n, m):
    """rho = 0 and uniform rewards: m / (m + 1), whatever n was; the bound on a win rate."""
    settings, budget = one_cut(n, m)
    strategy, rng = make_strategy(settings), np.random.default_rng(n * m)
    rows = [RowView(row, "", range(1), None) for row in range(n)]
    best = np.empty(draws(n))
    for trial in range(len(best)):
        _, plan = strategy.step(State(rows_started=n), rows, rng.random(n).tolist(), budget)
        best[trial] = rng.random(n)[list(plan.keep)].max()
    within_four_standard_errors(best, m / (m + 1), f"uniform rewards, {m} of {n} kept by chance")


def test_the_mean_reward_grows_with_the_correlation():
    means = []
    for rho in (0.0, 0.3, 0.6, 0.9):
        returned, _ = draw_one_cut(64, 16, rho, draws(64), seed=1)
        means.append((returned.mean(), returned.std(ddof=1) / math.sqrt(len(returned))))
    for (low, low_error), (high, high_error) in pairwise(means):
        assert high - low > 4 * math.hypot(low_error, high_error), f"means {means} must grow with rho"


# --- many cuts


E_NORMALS = {16: 1.76599, 64: 2.34373}
"""Mean of the maximum of n standard normals."""


def brownian(rng: np.random.Generator, n: int, steps: int, kappa: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores (row, step) and final rewards: correlation kappa * sqrt(step / steps); kappa = 0 is noise alone."""
    value = rng.standard_normal((n, steps)).cumsum(axis=1) / math.sqrt(steps)
    share = np.arange(1, steps + 1) / steps
    noise = rng.standard_normal((n, steps))
    return kappa * value / np.sqrt(share) + math.sqrt(1 - kappa**2) * noise, value[:, -1]


def many_cuts(kappa: float, trials: int, seed: int) -> np.ndarray:
    settings = config(alpha=0.5, n=64, first_look=4, max_gen_toks=16)
    budget = resolve(settings, 7)
    strategy, rng = make_strategy(settings), np.random.default_rng(seed)
    best = np.empty(trials)
    for trial in range(trials):
        scores, finals = brownian(rng, 64, 16, kappa)
        scores, finals = scores.tolist(), finals.tolist()
        process = Process.of(finals, partials=lambda row, tokens, scores=scores: scores[row][tokens - 1])
        result = simulate(strategy, budget, process)
        assert [round_.rows for round_ in result.rounds] == [64, 32, 16]
        best[trial] = result.best.reward
    return best


def test_cuts_by_noise_are_as_good_as_the_rows_they_leave():
    best = many_cuts(0.0, draws(64) // 8, seed=2)
    within_four_standard_errors(best, E_NORMALS[16], "64 rows cut twice by noise: the mean maximum of the 16 left")


def test_better_partial_scores_never_cost_reward():
    means = [many_cuts(kappa, draws(64) // 8, seed=3) for kappa in (0.0, 0.5, 1.0)]
    for low, high in pairwise(means):
        error = math.hypot(low.std(ddof=1), high.std(ddof=1)) / math.sqrt(len(low))
        assert high.mean() - low.mean() > 4 * error, f"means {[mean.mean() for mean in means]} must grow with kappa"
    bound = E_NORMALS[64] + 4 * means[-1].std(ddof=1) / math.sqrt(len(means[-1]))
    assert means[-1].mean() < bound, "64 rows cannot do better than the best of 64 rows"


def test_an_adversarial_reward_leaves_the_worst_rows_and_returns_the_best_of_these():
    finals = [float(row) for row in np.random.default_rng(4).permutation(64)]
    process = Process.of(finals, partials=lambda row, tokens: -finals[row])
    result = run_directly(config(alpha=0.5, n=64, first_look=4, max_gen_toks=64), process)
    assert [round_.rows for round_ in result.rounds] == [64, 32, 16, 8, 4]
    assert result.best.reward == 3.0, "partial = -final keeps the four worst rows of 64, and the best of these is 3"


def test_an_adversarial_reward_cannot_take_a_finished_row_away():
    finals = [float(row) for row in range(64)]
    lengths = [100] * 63 + [2]  # the best row finishes before the first look
    process = Process.of(finals, lengths=lengths, partials=lambda row, tokens: 1000.0 - finals[row])
    result = run_directly(config(alpha=0.5, n=64, first_look=4, max_gen_toks=64), process)
    assert result.best.row == 63, "row 63 fell under the first cut, but it had finished: its score is final"
    assert result.best.finish_reason == "eos" and result.best.num_tokens == 2


def test_a_late_bloomer_is_rejected_by_its_partial_score_and_only_by_that():
    finals = [float(row) for row in range(16)]

    def partials(row: int, tokens: int) -> float:
        return -1.0 if row == 15 else finals[row]  # the row that would win is last until the very end

    process = Process.of(finals, partials=partials)
    rejected = run_directly(config(alpha=0.5, n=16, first_look=8, max_gen_toks=64), process)
    assert rejected.best.row == 14
    assert rejected.trajectories[15].finish_reason == "rejected"
    assert (rejected.trajectories[15].reward, rejected.trajectories[15].num_tokens) == (-1.0, 8)
    assert run_directly(config(alpha=0, n=16, max_gen_toks=64), process).best.row == 15
    assert run_directly(config(alpha=0, n=16, first_look=8, max_gen_toks=64), process).best.row == 15, "in waves, too"
