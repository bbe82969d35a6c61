"""``variance_reduce``: stratified uniforms over a prompt's rows. Each row alone is drawn as before."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare, kstest
from support import FULL
from support.engine_runs import PROMPTS, generate, make_engine, outcome
from support.simulated import Process, make_generator, request
from support.tiny_models import tiny_causal_lm

from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, stream_key
from specrej_eval.engines.transformers.groups import Group, in_strata
from specrej_eval.engines.transformers.sampling import row_stream, strata_of, stratified, uniform
from specrej_eval.errors import ConfigError
from specrej_eval.kv.cache import Prefix

TIMES = 10 if FULL else 1
DEVICE = torch.device("cpu")
UNTIL = ["e", "7", "q"]


def uniforms(seed: int, n: int, steps: int) -> torch.Tensor:
    """(steps, n), as rows 0 to n - 1 of a prompt draw them."""
    key = torch.tensor(stream_key(seed, "task", "prompt", 0))
    streams = row_stream(key, torch.arange(n))
    return torch.stack(
        [
            stratified(uniform(streams, torch.tensor(step)), strata_of(key, n, 0, step, DEVICE), n)
            for step in range(steps)
        ]
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
def test_at_each_step_each_stratum_has_one_row(n: int) -> None:
    found = uniforms(seed=5, n=n, steps=40)
    assert bool(((found > 0) & (found < 1)).all())
    assert ((found * n).floor().long().sort(-1).values == torch.arange(n)).all()


def test_the_last_stratum_never_rounds_up_to_1() -> None:
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert float(stratified(largest, torch.tensor([15]), 16)) < 1


@pytest.mark.parametrize("n", [2, 5, 16])
def test_a_rows_own_uniforms_are_uniform_and_independent_from_step_to_step(n: int) -> None:
    """Chi-square over seeds, for every row: cells of one step, and of two steps together."""
    seeds, cells = 800 * TIMES, 8
    found = torch.stack([uniforms(seed, n, 2) for seed in range(seeds)]).numpy()  # (seeds, 2, n)
    p_values = []
    for row in range(n):
        first, second = found[:, 0, row], found[:, 1, row]
        for values in (first, second):
            p_values.append(chisquare(np.bincount((values * cells).astype(int), minlength=cells)).pvalue)
            p_values.append(kstest(values, "uniform").pvalue)
        pairs = (first * cells).astype(int) * cells + (second * cells).astype(int)
        p_values.append(chisquare(np.bincount(pairs, minlength=cells**2)).pvalue)
    # under the null these are uniform: the smallest of m of them, and Fisher's sum for the chi-squares
    assert min(p_values) > 0.001 / len(p_values)


def test_strata_of_two_rows_are_as_independent_as_they_can_be() -> None:
    """All n (n - 1) pairs of strata come equally often, at every step anew."""
    n, seeds = 4, 800 * TIMES
    pairs: dict[tuple[int, int], int] = {}
    for seed in range(seeds):
        key = torch.tensor(stream_key(seed, "task", "prompt", 0))
        first, *_, last = strata_of(key, n, 0, seed % 7, DEVICE).tolist()
        pairs[first, last] = pairs.get((first, last), 0) + 1
    assert len(pairs) == n * (n - 1)
    assert chisquare(list(pairs.values())).pvalue > 0.001


def test_rows_are_a_function_of_seed_prompt_row_and_n() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    plain = generate(engine, until=UNTIL)
    reduced = [outcome(result) for result in generate(engine, until=UNTIL, variance_reduce=True)]
    assert reduced != [outcome(result) for result in plain]
    for changed in ({"batch_size": 1}, {"batch_size": 3}):
        assert [outcome(r) for r in generate(engine, until=UNTIL, variance_reduce=True, **changed)] == reduced
    backwards = generate(engine, PROMPTS[::-1], until=UNTIL, variance_reduce=True)
    assert [outcome(result) for result in backwards[::-1]] == reduced


def test_alpha_0_is_best_of_n_in_waves_too_and_a_rejected_row_is_the_start_of_its_whole() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    common: dict[str, Any] = {"until": UNTIL, "variance_reduce": True}
    whole = generate(engine, **common, strategy="best_of_n", first_look=None)
    waves = generate(engine, **common, strategy="best_of_n", first_look=None, kv_budget_tokens=160)
    assert any(len(result.rounds) > 1 for result in waves)
    rejecting = generate(engine, **common, alpha=0.5, audit=1.0)
    for all_rows, in_waves, rejected, zero in zip(
        whole, waves, rejecting, generate(engine, **common, alpha=0), strict=True
    ):
        ids = [row.token_ids for row in all_rows.trajectories]
        assert [row.token_ids for row in in_waves.trajectories] == ids
        assert [row.token_ids for row in zero.trajectories] == ids
        for row in rejected.trajectories:
            assert row.token_ids == ids[row.row][: row.num_tokens]
        assert all(row.token_ids == ids[row.row] for row in rejected.audit.rows)


def test_forks_draw_from_strata_of_their_own() -> None:
    key = torch.tensor(stream_key(0, "task", "prompt", 0))
    group = Group(Prefix(length=3), [0, 5, 4, 2], capacity=8, device=DEVICE, key=key)
    plain = Group(Prefix(length=3), [1], capacity=8, device=DEVICE, key=key)
    group.strata = 4
    own = torch.full((5,), 0.5, dtype=torch.float64)
    found = in_strata([plain, group], own)
    assert found[0] == 0.5
    first, second = strata_of(key, 4, 0, 0, DEVICE), strata_of(key, 4, 1, 0, DEVICE)
    assert found[1:].tolist() == [(float(k) + 0.5) / 4 for k in (first[0], second[1], second[0], first[2])]
    group.row_ids = [2]
    assert in_strata([group], own[:1]).tolist() == [(float(first[2]) + 0.5) / 4]
    assert in_strata([plain], own[:1]) is not None


def test_an_engine_that_draws_otherwise_refuses_it() -> None:
    made = make_generator({"?": Process.of([0.0] * 4)}, RunConfig(n=4, variance_reduce=True).checked())
    with pytest.raises(ConfigError, match="variance_reduce=True needs an engine"):
        list(made.run([request(made.config)], progress=False))


# what it does to means and maxima: any function of a row's uniforms is a reward of a row


def _first_token(u: torch.Tensor) -> torch.Tensor:
    return (u[0] < 0.3).double() * 2 + (u[0] > 0.8).double()


def _first_token_most(u: torch.Tensor) -> torch.Tensor:
    return 3 * u[0].square() + 0.5 * u[1:].mean(0)


def _every_token(u: torch.Tensor) -> torch.Tensor:
    return u.mean(0)


def _walk(u: torch.Tensor) -> torch.Tensor:
    """What a token means depends on those before: nothing to gain beyond the first."""
    state = torch.zeros(u.shape[1], dtype=torch.float64)
    for step in u:
        state = torch.where(state.sin() > 0, state + step, state - step * 2)
    return state


@pytest.mark.parametrize("reward", [_first_token, _first_token_most, _every_token, _walk])
@pytest.mark.parametrize("n", [4, 16])
def test_the_variance_of_the_mean_and_of_the_best_is_not_larger(
    reward: Callable[[torch.Tensor], torch.Tensor], n: int
) -> None:
    seeds, steps = 400 * TIMES, 6
    means: tuple[list[float], list[float]] = ([], [])
    bests: tuple[list[float], list[float]] = ([], [])
    for seed in range(seeds):
        key = torch.tensor(stream_key(seed, "task", "prompt", 0))
        streams = row_stream(key, torch.arange(n))
        plain = torch.stack([uniform(streams, torch.tensor(step)) for step in range(steps)])
        for which, each in enumerate((plain, uniforms(seed, n, steps))):
            values = reward(each)
            means[which].append(float(values.mean()))
            bests[which].append(float(values.max()))
    # a ratio of variances of so many draws: below its 99.9 % quantile under equality
    bound = float(chi2.ppf(0.999, seeds - 1) / chi2.ppf(0.001, seeds - 1)) ** 0.5 * 1.05
    for plain_values, reduced in (means, bests):
        assert statistics.variance(reduced) <= statistics.variance(plain_values) * bound
    # unbiased: the mean of the mean stays, and the best is not worse
    error = 4 * (statistics.variance(means[0]) / seeds) ** 0.5
    assert abs(statistics.fmean(means[1]) - statistics.fmean(means[0])) <= error * 2**0.5
    assert statistics.fmean(bests[1]) >= statistics.fmean(bests[0]) - 4 * (statistics.variance(bests[0]) / seeds) ** 0.5
    if reward is _first_token_most:
        assert statistics.variance(means[1]) < 0.5 * statistics.variance(means[0])


def test_the_sessions_groups_carry_it_through_cuts() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    config = RunConfig(n=4, max_gen_toks=12, first_look=3, variance_reduce=True).checked()
    prompt = engine.encode("abc")
    session = engine.open(prompt, config, resolve(config, prompt.num_tokens))
    engine.follow(session, Plan(keep=(), fresh=4, num_tokens=3))
    engine.decode([session], 3)
    live = [row for group in session.groups for row in group.row_ids]
    engine.follow(session, Plan(keep=tuple(live[:1] * 2), fresh=0, num_tokens=2))
    assert all(group.strata == 4 for group in session.groups)
    engine.decode([session], 2)
    engine.close(session)
