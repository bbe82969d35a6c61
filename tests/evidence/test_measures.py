"""Each measure against another way to come by the same number: by hand, by brute force, by a library."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from specrej_eval.core import Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.evidence import best_of_k, kl, paper, regret
from specrej_eval.evidence.bootstrap import Bootstrap
from specrej_eval.evidence.equivalent_n import at, equivalent_n
from specrej_eval.evidence.flops import Sizes, flops
from specrej_eval.evidence.methods import Method, grid, listed
from specrej_eval.evidence.partial_scores import agreement, over_prompts
from specrej_eval.evidence.selectors import make_selector
from specrej_eval.evidence.significance import holm, sign_flip

RNG = np.random.default_rng(20)


# bootstrap


def test_an_interval_of_one_seed_is_that_of_scipy() -> None:
    values = RNG.gamma(2.0, size=60)
    ours = Bootstrap(60, resamples=20_000).interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    error = 4 * values.std() / math.sqrt(60) * 0.02  # of a 2.5 % quantile from so many resamples, generously
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=error)


def test_with_seeds_prompts_are_drawn_first_and_seeds_within_each() -> None:
    values = RNG.normal(size=(12, 3)) + RNG.normal(size=(12, 1)) * 2
    rng = np.random.default_rng(5)
    brute = []
    for _ in range(20_000):
        prompts = rng.integers(0, 12, 12)
        brute.append(np.mean([values[prompt, rng.integers(0, 3, 3)].mean() for prompt in prompts]))
    found = Bootstrap(12, 3, resamples=20_000).means(values)
    assert found.mean() == pytest.approx(np.mean(brute), abs=0.02)
    assert found.std() == pytest.approx(np.std(brute), rel=0.03)
    assert np.quantile(found, [0.025, 0.975]) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.05)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = []
    for each in range(400):
        values = np.random.default_rng(each).normal(1.0, 2.0, size=80)
        found = Bootstrap(80, resamples=500, seed=each).interval(values)
        assert found.low is not None and found.high is not None
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_a_ratio_is_one_of_means_and_not_a_mean_of_ratios() -> None:
    over, under = np.array([1.0, 100.0, 3.0, 2.0, 8.0]), np.array([1.0, 10.0, 3.0, 4.0, 2.0])
    found = Bootstrap(5, resamples=200).ratio(over, under)
    assert found.value == pytest.approx(114 / 20)
    assert found.low is not None and found.low < found.value


def test_what_varies_within_prompts_counts_more_than_once_with_both_levels_drawn() -> None:
    values = RNG.normal(size=(40, 4)) + RNG.normal(size=(40, 1))
    means, within = values.mean(axis=1).var(), values.var(axis=1).mean()
    found = Bootstrap(40, 4, resamples=20_000).means(values)
    assert found.var() == pytest.approx((means + within / 4) / 40, rel=0.05)


def test_drawn_in_blocks_resamples_are_those_drawn_at_once() -> None:
    rng = np.random.default_rng(3)
    at_once = rng.multinomial(30, np.full(30, 1 / 30), 1234)
    assert (Bootstrap(30, resamples=1234, seed=3).counts == at_once).all()
    assert (Bootstrap(7, 3, resamples=1234).counts.sum(axis=1) == 21).all()


def test_what_is_no_number_has_no_interval_either() -> None:
    found = Bootstrap(6, resamples=200).interval([1.0, 2.0, math.nan, 4.0, 5.0, 6.0])
    assert found.to_dict() == {"value": None, "low": None, "high": None}


def test_too_few_prompts_have_no_interval_and_wrong_shapes_are_refused() -> None:
    assert Bootstrap(4).interval(np.arange(4.0)).low is None
    with pytest.raises(ValueError, match="4 prompts x 2 seeds"):
        Bootstrap(4, 2).interval(np.zeros((4, 3)))


# significance


@pytest.mark.parametrize("size", [5, 9])
def test_a_sign_flip_p_is_that_of_all_flips(size: int) -> None:
    gaps = RNG.normal(0.5, size=size)
    means = [abs(np.mean(gaps * signs)) for signs in itertools.product((1, -1), repeat=size)]
    exact = np.mean([mean >= abs(gaps.mean()) - 1e-12 for mean in means])
    assert sign_flip(gaps) == pytest.approx(exact, abs=1e-9)


def test_no_difference_is_no_evidence_and_p_is_never_zero() -> None:
    assert sign_flip(np.zeros(30)) == 1.0
    assert 0 < sign_flip(np.full(50, 2.0)) <= 1e-4 * 2.1


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# best of k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_curve_is_the_mean_over_all_subsets(n: int) -> None:
    scores = RNG.integers(0, 4, size=(3, n)).astype(float)  # ties among them
    brute = [
        [np.mean([max(line[list(rows)]) for rows in itertools.combinations(range(n), k)]) for k in range(1, n + 1)]
        for line in scores
    ]
    assert best_of_k.curve(scores) == pytest.approx(np.array(brute))
    assert best_of_k.curve(scores)[:, -1] == pytest.approx(scores.max(axis=1))
    assert best_of_k.curve(scores)[:, 0] == pytest.approx(scores.mean(axis=1))


def test_another_score_follows_the_rows_the_reward_picks_equal_rewards_equally_often() -> None:
    rewards = np.array([1.0, 3.0, 3.0, 0.0, 2.0])
    gold = np.array([0.2, 1.0, 0.0, 0.5, 0.9])
    for k in range(1, 6):
        picked = []
        for rows in itertools.combinations(range(5), k):
            best = max(rewards[list(rows)])
            picked.append(np.mean([gold[row] for row in rows if rewards[row] == best]))
        assert best_of_k.curve(gold, [k], selected_by=rewards)[0] == pytest.approx(np.mean(picked))


def test_of_zeros_and_ones_it_is_pass_at_k() -> None:
    n, right = 20, 6
    scores = np.r_[np.ones(right), np.zeros(n - right)]
    for k in (1, 3, 10, 15, 20):
        assert best_of_k.curve(scores, [k])[0] == pytest.approx(1 - math.comb(n - right, k) / math.comb(n, k))


def test_a_large_pool_loses_no_digits() -> None:
    table = best_of_k.weights(3840, 960)
    assert table.sum() == pytest.approx(1.0, abs=1e-9) and (table >= 0).all()
    with pytest.raises(ValueError, match=r"1\.\.5"):
        best_of_k.weights(5, 6)


def test_of_normal_rewards_it_gives_the_known_means() -> None:
    curve = best_of_k.curve(RNG.normal(size=(4000, 128)), [2, 8, 32]).mean(axis=0)
    assert curve == pytest.approx([0.56419, 1.42360, 2.06967], abs=4 * 0.6 / math.sqrt(4000))
    known = {2: .56419, 4: 1.02938, 8: 1.42360, 16: 1.76599, 32: 2.06967, 64: 2.34373, 120: 2.57209, 240: 2.80592,
             480: 3.02426, 960: 3.22970, 1920: 3.42419, 3840: 3.60928}  # fmt: skip
    pools = RNG.normal(size=(400, 3840))
    for each, (k, expected) in zip(best_of_k.curve(pools, list(known)).T, known.items(), strict=True):
        assert each.mean() == pytest.approx(expected, abs=4 * each.std() / math.sqrt(400)), k
    uniform = best_of_k.curve(RNG.random(size=(4000, 64)), [3, 15]).mean(axis=0)
    assert uniform == pytest.approx([3 / 4, 15 / 16], abs=0.01)


# equivalent N


def test_the_curve_at_k_is_worth_k_rows_and_between_them_it_goes_by_the_logarithm() -> None:
    curve = best_of_k.curve(RNG.normal(size=(50, 24))).mean(axis=0)
    for k in (1, 2, 7, 24):
        assert at(curve[k - 1], curve) == pytest.approx(k)
    half = (curve[1] + curve[2]) / 2
    assert at(half, curve) == pytest.approx(math.sqrt(2 * 3))


def test_it_is_never_extrapolated() -> None:
    curve = np.array([0.0, 1.0, 1.5])
    assert at(1.6, curve) == np.inf and at(-0.1, curve) == 0.0
    rewards, curves = np.full((8, 1), 9.0), np.tile(curve, (8, 1, 1))
    found = equivalent_n(rewards, curves, Bootstrap(8, resamples=50))
    assert found.to_dict() == {"most": 3, "value": {"at_least": 3}, "low": {"at_least": 3}, "high": {"at_least": 3}}
    assert str(found) == "≥ 3 [≥ 3, ≥ 3]"
    below = equivalent_n(rewards * -1, curves, Bootstrap(8, resamples=50))
    assert below.to_dict()["value"] == {"below": 1} and str(below).startswith("< 1")


def test_a_flat_curve_and_a_curve_of_one_row_have_a_value() -> None:
    assert at(2.0, np.array([2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert at(2.0, np.array([2.0])) == 1.0
    assert at(np.array([0.5, 3.0]), np.array([[0.0, 1.0], [0.0, 1.0]])).tolist() == [
        pytest.approx(math.sqrt(2)),
        np.inf,
    ]


# KL, flops, the paper's numbers


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_kl_of_a_model_with_few_answers_stays_below_its_bounds(n: int) -> None:
    chances = RNG.dirichlet(np.ones(6))
    # of Best-of-n, answers sorted by reward: P(best <= i)^n - P(best <= i - 1)^n
    below = np.r_[0.0, np.cumsum(chances)]
    best = below[1:] ** n - below[:-1] ** n
    exact = float((best * np.log(best / chances)).sum())
    assert -1e-12 <= exact <= kl.best_of_n(n) + 1e-12 <= kl.one_of(n) + 2e-12
    # of any rule that returns one of n rows: here the one that is rarest under the model
    rule = np.zeros(6)
    for rows in itertools.product(range(6), repeat=min(n, 4)):
        rule[min(rows, key=chances.__getitem__)] += np.prod(chances[list(rows)])
    assert float((rule * np.log(rule / chances)).sum()) <= kl.one_of(min(n, 4)) + 1e-12


def test_flops_are_those_counted_token_by_token() -> None:
    sizes = Sizes(parameters=1000, layers=2, attention_width=8, reward_parameters=50)
    prompt, rows, read = 5, [3, 1], 40
    total = 0.0
    for place in range(1, prompt + 1):
        total += 2 * 1000 + 4 * 2 * 8 * place
    for tokens in rows:
        for step in range(1, tokens + 1):
            total += 2 * 1000 + 4 * 2 * 8 * (prompt + step)
    assert flops(sizes, prompt_tokens=prompt, rows=rows, reward_tokens=read) == total + 2 * 50 * read
    assert Sizes.from_dict(sizes.to_dict()) == sizes
    for record in (None, {}, {**sizes.to_dict(), "parameters": 0}, {**sizes.to_dict(), "layers": "two"}):
        assert Sizes.from_dict(record) is None


def test_the_improvement_score_is_the_papers_and_has_no_value_where_all_rows_score_alike() -> None:
    rows = np.array([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]])
    found = paper.improvement_score(np.array([3.5, 4.0]), rows)
    assert found[0] == pytest.approx((1 - (3.0 - 3.5) / (3.0 - 1.0)) * 100) and np.isnan(found[1])


# rejection


def test_regret_and_recall_by_hand() -> None:
    finals = np.array([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]])
    assert regret.regret([3.0, 2.0], finals).tolist() == [2.0, 0.0]
    assert regret.best_survived([[True, False, True], [False, True, True]], finals).tolist() == [0.0, 1.0]
    z = regret.z_score([3.0, 2.0], finals)
    assert z[0] == pytest.approx(0.0) and z[1] == pytest.approx((2 - 4 / 3) / np.std([2, 2, 0], ddof=1))
    for rows in (2, 3, 7):  # whose deviation is not 0 but 1e-17
        assert np.isnan(regret.z_score([0.1], [[0.1] * rows])).all()


def test_agreement_is_that_of_scipy_and_of_counted_pairs() -> None:
    partial, final = RNG.normal(size=30).round(1), RNG.normal(size=30)
    found = agreement(partial.tolist(), final.tolist(), keep=10)
    best = np.argsort(-final)[:3]
    pairs = [
        (partial[row] > partial[other]) + 0.5 * (partial[row] == partial[other])
        for row in best
        for other in range(30)
        if other not in best
    ]
    assert found.pearson == pytest.approx(stats.pearsonr(partial, final).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(partial, final).statistic)
    assert found.auc == pytest.approx(np.mean(pairs))
    assert found.recall == float(final.argmax() in np.argsort(-partial, kind="stable")[:10])


@pytest.mark.parametrize("rows", [2, 3, 9, 10, 11, 30, 70, 71, 110])
def test_one_row_in_ten_is_among_the_best_rounded_up(rows: int) -> None:
    final = np.arange(rows, dtype=float)
    best = final >= rows - math.ceil(rows / 10)
    expected = stats.mannwhitneyu(-final[best], -final[~best]).statistic / (best.sum() * (~best).sum())
    assert agreement(-final, final, keep=1).auc == pytest.approx(expected) == 0.0
    some = RNG.permutation(final)
    expected = stats.mannwhitneyu(some[best], some[~best]).statistic / (best.sum() * (~best).sum())
    assert agreement(some, final, keep=1).auc == pytest.approx(expected)


def test_rows_that_all_score_alike_have_no_correlation() -> None:
    for rows in (2, 3, 7):  # the deviation of three times 0.1 is 1e-17
        assert agreement([0.1] * rows, list(range(rows)), keep=1).pearson is None
        assert agreement(list(range(rows)), [0.1] * rows, keep=1).kendall is None


def test_prompts_are_not_pooled() -> None:
    # within each prompt the partial score says the opposite; pooled, easy prompts would make it look good
    of_prompts = [agreement([base, base + 1], [base + 1, base], keep=1) for base in (0.0, 10.0, 20.0)]
    told = over_prompts(of_prompts)
    assert told["pearson"]["mean"] == pytest.approx(-1.0) and told["recall"]["mean"] == 0.0
    assert agreement([1.0, 1.0], [2.0, 3.0], keep=1).pearson is None
    assert over_prompts([agreement([1.0, 1.0], [2.0, 3.0], keep=1)])["pearson"] is None


# selectors and grids


def row(number: int, text: str, reward: float) -> Trajectory:
    return Trajectory(number, text, [1], reward, "eos", 1)


def test_selectors_pick_what_they_say() -> None:
    rows = [row(0, "x Answer: 3", 2.0), row(1, "Answer: 4", 1.0), row(2, "y Answer: 4", 0.5), row(3, "none", 1.9)]
    pattern = r"Answer: (\d+)"
    assert make_selector("max")(rows, "0").row == 0
    assert make_selector("majority", answer=pattern)(rows, "0").row == 1
    assert make_selector("majority")(rows, "0").row == 0, "all texts differ: the highest reward"
    assert make_selector("weighted", answer=pattern)(rows, "0").row == 0, "exp(0) > exp(-1) + exp(-1.5)"
    assert make_selector("median")(rows, "0").row == 1
    drawn = [make_selector("soft:0.7")(rows, f"{number:016x}").row for number in range(4000)]
    weights = np.exp(np.array([2.0, 1.0, 0.5, 1.9]) / 0.7)
    assert np.bincount(drawn, minlength=4) / 4000 == pytest.approx(weights / weights.sum(), abs=0.03)
    assert make_selector("soft:0.7")(rows, "ab").row == make_selector("soft:0.7")(rows, "ab").row


@pytest.mark.parametrize("name", ["best", "soft", "soft:0", "soft:x", "majority:3"])
def test_an_unknown_selector_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="selector"):
        make_selector(name)
    with pytest.raises(ConfigError, match="regular expression"):
        make_selector("majority", answer="(")


def test_a_grid_names_each_method_once_and_alpha_zero_is_best_of_n() -> None:
    found = grid(["speculative_rejection", "best_of_n"], [0.0, 0.5], [4, 2])
    assert [method.name for method in found] == ["bo2", "bo4", "spr_n2_a0.5", "spr_n4_a0.5"]
    assert Method("best_of_n", 1).label == "Sampling"
    close = grid(["speculative_rejection"], [0.1234567, 0.1234568], [4])
    assert len({method.name for method in close}) == len({method.label for method in close}) == 2
    assert listed("alpha", "0.5, 0.1,0.5") == [0.5, 0.1] and listed("n", "8") == [8]


@pytest.mark.parametrize(
    "strategies, alphas, rows, told",
    [
        ([], [0.5], [2], "no strategy"),
        (["best_of_n"], [], [], "no n"),
        (["speculative_rejection"], [], [2], "no alpha"),
    ],
)
def test_an_empty_grid_is_refused(strategies: list[str], alphas: list[float], rows: list[int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        grid(strategies, alphas, rows)


@pytest.mark.parametrize("text, told", [("", "empty"), ("0.5,2", "alpha must be in"), ("half", "must be a number")])
def test_a_bad_list_is_refused_by_the_arguments_own_rule(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        listed("alpha", text)


def test_a_hint_for_an_empty_list_is_an_example_of_it() -> None:
    for name, of, example in (("seeds", "seed", "--seeds 0"), ("n", None, "--n 16"), ("alpha", None, "--alpha 0.5")):
        with pytest.raises(ConfigError) as caught:
            listed(name, " , ", of=of)
        assert str(caught.value.hint).endswith(example)
