"""Replayed runs against real ones, and against what theory says of rows whose scores are drawn from known laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import FULL
from support.simulated import NEVER, Process, make_generator, request

from specrej_eval import load
from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, Ledger, Plan, Trajectory
from specrej_eval.engines.recorded import RecordedEngine, place_of
from specrej_eval.errors import ConfigError
from specrej_eval.evidence.partial_scores import agreement
from specrej_eval.evidence.replay import Replayed, replay

SUMS = (
    "Q: 39 + 16 + 60 + 70 + 72 + 89 + 50 + 79 = ?\nA:",
    "Q: 15 + 53 + 65 + 91 + 11 + 54 + 96 + 78 = ?\nA:",
    "Q: 93 + 38 + 33 + 59 + 98 + 97 + 71 + 27 = ?\nA:",
)


def decoded(**arguments: Any) -> list[GenerationResult]:
    generator = load(**{"max_gen_toks": 96, "device": "cpu", **arguments})
    return generator.generate(list(SUMS), until=["\n"])


@pytest.fixture(scope="module")
def pool() -> list[GenerationResult]:
    return decoded(strategy="best_of_n", n=12, score_every=1)


def course(result: GenerationResult) -> list[Any]:
    """Everything that happened to the rows of a prompt."""
    rows = [(row.row, row.token_ids, row.finish_reason, row.rounds_survived) for row in result.trajectories]
    looks = [(r.rows, r.tokens, r.kept, r.finished, r.rejected, r.kv_tokens) for r in result.rounds]
    counts = (result.ledger.decode_tokens, result.ledger.rows_rejected, result.ledger.prompt_tokens)
    return [rows, looks, counts, result.best.row, result.best.text]


def test_scoring_between_looks_changes_no_answer_and_no_cost(pool: list[GenerationResult]) -> None:
    plain = decoded(strategy="best_of_n", n=12)
    for with_scores, without in zip(pool, plain, strict=True):
        assert course(with_scores) == course(without)
        assert [row.reward for row in with_scores.trajectories] == [row.reward for row in without.trajectories]
        ours, theirs = with_scores.ledger.to_dict(), without.ledger.to_dict()
        for name in ("seconds", "peak_bytes"):
            del ours[name], theirs[name]
        assert ours == theirs
        for row in with_scores.trajectories:
            assert [tokens for tokens, _ in row.look_scores or []] == list(range(1, row.num_tokens + 1))


@pytest.mark.parametrize("alpha", [pytest.param(0.1, marks=pytest.mark.full), 0.5, 0.9])
@pytest.mark.parametrize("n", [5, 12])
def test_a_replay_keeps_the_rows_and_gives_the_answers_of_the_real_engine(
    pool: list[GenerationResult], alpha: float, n: int
) -> None:
    real = decoded(alpha=alpha, n=n)
    config, _ = RunConfig.from_args({"alpha": alpha, "n": n, "max_gen_toks": 96})
    found = replay(pool, config)
    assert found.scores_between == 0 and found.scores_asked > 0
    for ours, theirs in zip(found.results, real, strict=True):
        assert course(ours) == course(theirs)
        # to rounding: the reward model read these rows in other pieces
        assert [row.reward for row in ours.trajectories] == pytest.approx(
            [r.reward for r in theirs.trajectories], abs=1e-4
        )
        assert ours.resolved["rows_from"] == "records" and not ours.ledger.total_seconds


def test_best_of_fewer_rows_and_waves_are_replayed_too(pool: list[GenerationResult]) -> None:
    for arguments in ({"n": 4}, {"n": 12, "kv_budget_tokens": 500}):
        real = decoded(strategy="best_of_n", **arguments)
        config, _ = RunConfig.from_args({"strategy": "best_of_n", "max_gen_toks": 96, **arguments})
        found = replay(pool, config)
        assert [course(result) for result in found.results] == [course(result) for result in real]


def test_where_no_score_was_recorded_the_last_one_before_counts() -> None:
    finals = [float(row) for row in range(8)]
    process = Process.of(finals, partials=lambda row, tokens: finals[row] if tokens >= 8 else -finals[row])
    every = {"score_every": 8, "strategy": "best_of_n", "n": 8, "max_gen_toks": 32}
    results = simulated(process, **every)
    config, _ = RunConfig.from_args({"alpha": 0.5, "n": 8, "max_gen_toks": 32, "first_look": 12})
    found = replay(results, config)
    assert found.results[0].best.row == 7, "at 12 tokens the score at 8 counts"
    assert 0 < found.scores_between <= found.scores_asked
    early, _ = RunConfig.from_args({"alpha": 0.5, "n": 8, "max_gen_toks": 32, "first_look": 7})
    assert replay(results, early).scores_between > 0, "before the first score the first one counts"


def test_rows_are_scored_aside_at_multiples_whatever_the_looks() -> None:
    process = Process.of(
        [0.0, 1.0, 2.0, 3.0], lengths=[5, 17, NEVER, NEVER], partials=lambda row, tokens: row + tokens / 100
    )
    (result,) = simulated(process, alpha=0.5, n=4, max_gen_toks=20, first_look=6, score_every=4)
    scored = {row.row: [tokens for tokens, _ in row.look_scores or []] for row in result.trajectories}
    assert scored[0] == [4, 5], "its end is scored at the look"
    assert scored[3][:3] == [4, 6, 8], "the look at 6 stands among the multiples of 4"
    for row in result.trajectories:
        assert row.look_scores is not None and row.look_scores[-1] == (row.num_tokens, row.reward)
        again = Trajectory.from_dict(row.to_dict())
        assert again.look_scores == row.look_scores


def simulated(process: Process, **arguments: Any) -> list[GenerationResult]:
    config, _ = RunConfig.from_args(arguments)
    generator = make_generator({"?": process}, config)
    return [result for _, result in generator.run([request(config)], progress=False)]


# refused


def test_what_is_on_no_record_is_refused(pool: list[GenerationResult]) -> None:
    def config(**arguments: Any) -> RunConfig:
        return RunConfig.from_args({"max_gen_toks": 96, "n": 12, **arguments})[0]

    with pytest.raises(ConfigError, match="n=13 rows are needed, and 12 are on record"):
        replay(pool, config(n=13))
    with pytest.raises(ConfigError, match=r"drawn with temperature=1\.0, not 0\.5"):
        replay(pool, config(temperature=0.5))
    with pytest.raises(ConfigError, match="was rejected: how it would have gone on is on no record"):
        replay(decoded(alpha=0.5, n=6, score_every=8), config(alpha=0.5, n=6))
    with pytest.raises(ConfigError, match="scored at their end alone"):
        replay(decoded(strategy="best_of_n", n=3), config(alpha=0.5, n=3))


def test_what_an_engine_of_records_cannot_do_is_refused() -> None:
    (result,) = simulated(Process.of([0.0, 1.0]), strategy="best_of_n", n=2, max_gen_toks=4, score_every=1)
    engine = RecordedEngine({place_of(result): result})
    config, _ = RunConfig.from_args({"n": 2, "max_gen_toks": 4})
    prompt = request(config).prompt
    budget = resolve(config, prompt.num_tokens)
    session = engine.open(prompt, config, budget)
    engine.follow(session, Plan(keep=(), fresh=2, num_tokens=1))
    engine.decode([session], 1)
    for keep in ((0, 0), (5,)):
        with pytest.raises(ConfigError, match="forks rows or takes up dropped ones"):
            engine.follow(session, Plan(keep=keep, fresh=0, num_tokens=1))
    with pytest.raises(ConfigError, match="logprob of each token, which records do not hold"):
        engine.open(prompt, config, budget, token_stats=["logprob"])
    with pytest.raises(ConfigError, match="no rows on record"):
        engine.open(request(config, "another prompt").prompt, config, budget)
    with pytest.raises(ConfigError, match="drawn with until="):
        engine.open(prompt, config, budget, until=("x",))


def test_a_row_of_an_older_version_has_no_scores_on_the_way(pool: list[GenerationResult]) -> None:
    told = pool[0].to_dict()
    for each in told["trajectories"]:
        del each["look_scores"]
    old = GenerationResult.from_dict(told)
    assert all(row.look_scores is None for row in old.trajectories)
    with pytest.raises(ConfigError, match="made by an older version"):
        replay([old], RunConfig.from_args({"max_gen_toks": 96, "n": 12})[0])


def test_ranks_say_nothing_between_looks() -> None:
    with pytest.raises(ConfigError, match="ranks among the rows of one look"):
        load(
            n=2,
            score_every=4,
            reward_model='["likelihood", "self_certainty"]',
            reward_ensemble="rank",
            device="cpu",
            max_gen_toks=8,
        ).generate("Q: 1+1=?\nA:")


# known answers, from simulations of their own


def of_scores(looks: Sequence[tuple[int, NDArray[Any]]], finals: NDArray[Any], length: int) -> list[GenerationResult]:
    """Runs of Best-of-N whose rows all have one length.

    Args:
        looks: tokens, and partial scores (prompts, rows) there.
        finals: (prompts, rows).
    """
    results = []
    for prompt, ends in enumerate(finals):
        rows = [
            Trajectory(
                row=row,
                text=f"{prompt} {row}",
                token_ids=[0] * length,
                reward=float(final),
                finish_reason="eos",
                rounds_survived=1,
                look_scores=[(tokens, float(scores[prompt, row])) for tokens, scores in looks]
                + [(length, float(final))],
            )
            for row, final in enumerate(ends)
        ]
        best = max(rows, key=lambda row: row.reward or 0.0)
        resolved = {"seed": 0, "max_gen_toks": length, "score_every": 1}
        ledger = Ledger(prompt_tokens=3)
        results.append(GenerationResult(best, rows, [], ledger, prompt_hash=str(prompt), task="t", resolved=resolved))
    return results


def one_round(
    rows: int, kept: int, rho: float, prompts: int, *, alpha: float | None = None, part: int = 0
) -> tuple[Replayed, NDArray[Any]]:
    """P and F bivariate normal; one look, before the last token, at which the best ``kept`` by P stay."""
    rng = np.random.default_rng([rows, kept, int(100 * rho), part])
    partial = rng.normal(size=(prompts, rows))
    final = rho * partial + math.sqrt(1 - rho**2) * rng.normal(size=(prompts, rows))
    alpha = (rows - kept) / rows if alpha is None else alpha
    # long enough for the budget (first_look tokens of all rows) to hold those kept to their end
    length = 2 if kept == rows else max(2, math.ceil(rows / (rows - kept)))
    looks = {} if kept == rows else {"first_look": length - 1}
    config, _ = RunConfig.from_args({"alpha": alpha, "n": rows, "max_gen_toks": length, "batch_size": 256, **looks})
    return replay(of_scores([(length - 1, partial)], final, length), config), final


@pytest.mark.parametrize(
    "rows, kept, rho, expected",
    [
        (16, 8, 0.5, 1.69760),
        (64, 16, 0.5, 2.22725),
        pytest.param(64, 32, 0.0, 2.06967, marks=pytest.mark.full),
        pytest.param(64, 32, 0.6, 2.33095, marks=pytest.mark.full),
        pytest.param(64, 32, 0.3, 2.25036, marks=pytest.mark.full),
        pytest.param(64, 32, 0.9, 2.34373, marks=pytest.mark.full),
        pytest.param(64, 6, 0.5, 2.00318, marks=pytest.mark.full),
        pytest.param(128, 64, 0.3, 2.51901, marks=pytest.mark.full),
    ],
)
def test_one_round_of_normal_scores_gives_the_known_means(rows: int, kept: int, rho: float, expected: float) -> None:
    prompts = 1200
    found, _ = one_round(rows, kept, rho, prompts)
    rewards = np.array([result.best.reward for result in found.results])
    assert all(len(result.rounds) == 2 and result.rounds[0].kept == kept for result in found.results)
    assert rewards.mean() == pytest.approx(expected, abs=4 * rewards.std() / math.sqrt(prompts))


@pytest.mark.full
@pytest.mark.parametrize("kept, expected", [(500, 3.20008), (100, 2.95185)])
def test_one_round_of_a_thousand_rows_gives_the_known_means(kept: int, expected: float) -> None:
    """rho is what the paper's figure 2 shows at 256 tokens."""
    rewards: list[float] = []
    for part in range(4):  # 400 prompts, of which 100 are in memory at a time
        found, _ = one_round(1000, kept, 0.31, 100, part=part)
        assert all(len(result.rounds) == 2 and result.rounds[0].kept == kept for result in found.results)
        rewards += [result.best.reward or 0.0 for result in found.results]
    assert np.mean(rewards) == pytest.approx(expected, abs=4 * np.std(rewards) / math.sqrt(len(rewards)))


EQUAL_TOKENS = {
    0.1: (2.0697, 2.0771, 2.0531, 1.9608, 1.7044),
    0.3: (2.0697, 2.1227, 2.1603, 2.1527, 1.9974),
    0.5: (2.0697, 2.1441, 2.2247, 2.2896, 2.2355),
    0.7: (2.0697, 2.1501, 2.2523, 2.3688, 2.4082),
    0.9: (2.0697, 2.1506, 2.2568, 2.3926, 2.4944),
}
"""rho -> mean reward with alpha 0, 0.25, 0.5, 0.75 and 0.9."""


@pytest.mark.full
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("rho", EQUAL_TOKENS)
def test_what_alpha_gains_at_equal_tokens_is_as_known(rho: float, alpha: float) -> None:
    """Tokens of 32 whole rows, a look at a quarter of their length: as many rows as these tokens allow."""
    rows = math.floor(32 / (0.25 + 0.75 * (1 - alpha)))
    kept = math.ceil(round((1 - alpha) * rows, 9))
    prompts = 1200
    found, _ = one_round(rows, kept, rho, prompts, alpha=alpha)
    assert rows * 0.25 + kept * 0.75 == pytest.approx(32, abs=1)
    rewards = np.array([result.best.reward for result in found.results])
    if alpha:
        assert {result.rounds[0].kept for result in found.results} == {kept}
    expected = EQUAL_TOKENS[rho][(0.0, 0.25, 0.5, 0.75, 0.9).index(alpha)]
    assert rewards.mean() == pytest.approx(expected, abs=4 * rewards.std() / math.sqrt(prompts))


@pytest.mark.parametrize(
    "rho, alpha, expected",
    [
        (0.6, 0.5, 0.4120),
        pytest.param(0.3, 0.5, 0.1863, marks=pytest.mark.full),
        pytest.param(0.8, 0.9, 0.4808, marks=pytest.mark.full),
    ],
)
def test_among_survivors_the_correlation_is_smaller_by_the_known_amount(
    rho: float, alpha: float, expected: float
) -> None:
    """Range restriction: lambda = phi(c) / (1 - alpha), u^2 = 1 + c lambda - lambda^2, of which rho' is made."""
    rows, prompts = 200, 100
    found, _ = one_round(rows, round(rows * (1 - alpha)), rho, prompts)
    correlations = []
    for result in found.results:
        left = [row for row in result.trajectories if row.finish_reason != "rejected"]
        partial = [row.look_scores[0][1] or 0.0 for row in left if row.look_scores]
        pearson = agreement(partial, [row.reward or 0.0 for row in left], keep=1).pearson
        assert pearson is not None
        correlations.append(pearson)
    slack = 4 * float(np.std(correlations)) / math.sqrt(prompts) + 0.02  # of samples, not of the law
    assert np.mean(correlations) == pytest.approx(expected, abs=slack)


def test_rows_kept_by_a_score_that_says_nothing_are_as_good_as_any() -> None:
    """Uniform rewards: E max of the m rows kept is m / (m + 1), the bound of a win rate."""
    rng = np.random.default_rng(8)
    rows, prompts = 16, 1200
    found = replay(
        of_scores([(1, rng.normal(size=(prompts, rows)))], rng.random((prompts, rows)), 2),
        RunConfig.from_args({"alpha": 0.5, "n": rows, "max_gen_toks": 2, "first_look": 1, "batch_size": 256})[0],
    )
    rewards = np.array([result.best.reward for result in found.results])
    assert rewards.mean() == pytest.approx(8 / 9, abs=4 * rewards.std() / math.sqrt(prompts))


@pytest.mark.parametrize(
    "rows, kept, rho, expected",
    [
        (16, 8, 0.5, 0.83848),
        pytest.param(64, 6, 0.6, 0.54516, marks=pytest.mark.full),
        pytest.param(64, 32, 0.3, 0.76755, marks=pytest.mark.full),
        pytest.param(64, 32, 0.6, 0.95283, marks=pytest.mark.full),
    ],
)
def test_the_best_row_survives_as_often_as_is_known(rows: int, kept: int, rho: float, expected: float) -> None:
    prompts = 1500
    found, final = one_round(rows, kept, rho, prompts)
    survived = [
        result.trajectories[int(ends.argmax())].finish_reason != "rejected"
        for result, ends in zip(found.results, final, strict=True)
    ]
    assert np.mean(survived) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / prompts))


@pytest.mark.parametrize(
    "kappa, rows_it_is_worth",
    [
        (1.0, 56),
        (0.0, 16),
        pytest.param(0.6, 43, marks=pytest.mark.full),
        pytest.param(0.3, 27, marks=pytest.mark.full),
    ],
)
def test_several_rounds_are_worth_the_known_number_of_rows(kappa: float, rows_it_is_worth: int) -> None:
    """A value function (kappa=1), one with noise, or no information at all (0): n0=16, q=4, alpha=0.5."""
    prompts, rows, length = 2500 if FULL else 800, 64, 16
    rng = np.random.default_rng(int(kappa * 10))
    steps = rng.normal(size=(prompts, rows, length)) / math.sqrt(length)
    walk = steps.cumsum(axis=-1)
    noise = rng.normal(size=(prompts, rows, length))
    passed = np.arange(1, length + 1) / length
    # so that the correlation with the end is kappa * sqrt(t / T)
    partial = walk + noise * np.sqrt(passed * (kappa**-2 - 1)) if kappa else noise
    config, _ = RunConfig.from_args(
        {"alpha": 0.5, "n": rows, "max_gen_toks": length, "first_look": 4, "batch_size": 256}
    )
    looks = [(tokens, partial[..., tokens - 1]) for tokens in (4, 8)]
    found = replay(of_scores(looks, walk[..., -1], length), config)
    rewards = np.array([result.best.reward for result in found.results])
    # decode tokens = M (1 + alpha R), M = 256 row-tokens, R = 2 rejections
    assert {result.ledger.decode_tokens for result in found.results} == {512}
    assert {tuple(r.tokens for r in result.rounds) for result in found.results} == {(4, 8, 16)}
    expected = _mean_of_best(rows_it_is_worth)
    slack = 4 * rewards.std() / math.sqrt(prompts) + 0.01  # the notes round N to whole rows
    assert rewards.mean() == pytest.approx(expected, abs=slack)


def _mean_of_best(n: int) -> float:
    """E max of n normals, by quadrature."""
    from scipy import integrate, stats

    return float(integrate.quad(lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), -8, 8)[0])
