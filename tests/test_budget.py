"""The three numbers of a budget: what follows from what, what must agree, and what holds one full row."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.properties import ALPHAS

from specrej_eval.budget import Budget, check_arguments, resolve
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.strategies.base import make_strategy


def config(**args) -> RunConfig:
    return RunConfig.from_args(args)[0]


def numbers(prompt_tokens=20, capacity_tokens=None, **args) -> tuple[int, int, int]:
    """(n, first_look, kv_budget_tokens) as resolved."""
    budget = resolve(config(**args), prompt_tokens, capacity_tokens=capacity_tokens)
    assert (budget.prompt_tokens, budget.max_gen_toks) == (prompt_tokens, args.get("max_gen_toks", 256))
    return budget.n, budget.first_look, budget.kv_budget_tokens


# --- which follows from which


@pytest.mark.parametrize(
    ("given_", "n", "first_look", "kv_budget_tokens"),
    [
        ({}, 16, 32, 20 + 16 * 32),
        ({"n": 10}, 10, 32, 20 + 10 * 32),
        ({"first_look": 50}, 16, 50, 20 + 16 * 50),
        ({"kv_budget_tokens": 20 + 16 * 40}, 16, 40, 20 + 16 * 40),
        ({"n": 12, "first_look": 24}, 12, 24, 20 + 12 * 24),
        ({"n": 12, "kv_budget_tokens": 20 + 12 * 24}, 12, 24, 20 + 12 * 24),
        ({"first_look": 24, "kv_budget_tokens": 20 + 12 * 24}, 12, 24, 20 + 12 * 24),
        ({"n": 12, "first_look": 24, "kv_budget_tokens": 20 + 12 * 24}, 12, 24, 20 + 12 * 24),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, dict) else str(value),
)
def test_given_two_of_the_three_the_third_follows_and_n_is_16_by_default(given_, n, first_look, kv_budget_tokens):
    assert numbers(**given_) == (n, first_look, kv_budget_tokens)


@pytest.mark.parametrize("max_gen_toks", [8, 40, 64, 100, 128, 256, 1000, 4096])
def test_the_default_first_look_is_an_eighth_of_max_gen_toks_and_at_least_8(max_gen_toks):
    assert numbers(max_gen_toks=max_gen_toks)[1] == max(8, max_gen_toks // 8)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_default_first_look_of_few_rows_is_late_enough_for_one_full_row(n):
    n, first_look, kv_budget_tokens = numbers(n=n)
    assert first_look == -(-256 // n), "the earliest look at which the budget still holds one row to its end"
    assert kv_budget_tokens - 20 >= 256


@pytest.mark.parametrize("max_gen_toks", [1, 3, 7])
def test_the_first_look_is_never_later_than_the_last_token(max_gen_toks):
    assert numbers(n=16, max_gen_toks=max_gen_toks) == (16, max_gen_toks, 20 + 16 * max_gen_toks)
    assert numbers(n=16, first_look=50, max_gen_toks=max_gen_toks) == (16, max_gen_toks, 20 + 16 * max_gen_toks)


def test_nothing_about_the_machine_enters():
    for device in (None, "cpu", "cuda", "cuda:3", "mps"):
        for batch_size in (1, 64):
            found = numbers(device=device, batch_size=batch_size, capacity_tokens=10**9)
            assert found == numbers(), "only n=max may look at the memory"


@pytest.mark.parametrize("rows_never_cut", [{"strategy": "best_of_n"}, {"alpha": 0}])
def test_without_a_budget_rows_that_are_never_cut_are_all_held_to_their_end(rows_never_cut):
    assert numbers(**rows_never_cut) == (16, 256, 20 + 16 * 256)
    assert numbers(n=100, **rows_never_cut) == (100, 256, 20 + 100 * 256)


@pytest.mark.parametrize("rows_never_cut", [{"strategy": "best_of_n"}, {"alpha": 0}])
def test_rows_that_are_never_cut_fit_any_budget_of_one_full_row(rows_never_cut):
    budget = resolve(config(n=1000, kv_budget_tokens=20 + 256, **rows_never_cut), 20)
    assert (budget.n, budget.rows_to_the_end) == (1000, 1), "a thousand waves of one row"


# --- n = max


def test_n_max_fills_the_memory():
    assert numbers(n="max", capacity_tokens=20 + 32 * 500 + 31) == (500, 32, 20 + 32 * 500 + 31)
    assert numbers(n="max", first_look=50, capacity_tokens=20 + 5000) == (100, 50, 5020)
    assert numbers(n="max", strategy="best_of_n", capacity_tokens=20 + 256 * 9 + 1) == (9, 256, 20 + 256 * 9 + 1)


def test_n_max_with_a_budget_fills_the_budget_and_needs_no_capacity():
    assert numbers(n="max", kv_budget_tokens=20 + 3200, capacity_tokens=10**6) == (100, 32, 3220)
    assert numbers(n="max", kv_budget_tokens=20 + 3200) == (100, 32, 3220)


@pytest.mark.parametrize("strategy", ["speculative_rejection", "best_of_n"])
def test_n_max_starts_no_more_rows_than_it_is_told_to(strategy):
    def most(**args):
        return numbers(n="max", strategy=strategy, **args)

    look = most(capacity_tokens=10**9)[1]
    assert most(capacity_tokens=10**9) == (1024, look, 20 + 1024 * look)
    assert most(capacity_tokens=10**9, n_max=50) == (50, look, 20 + 50 * look)
    assert most(capacity_tokens=10**9, n_max=1) == (1, 256, 20 + 256), "one row that reaches its end"
    assert most(capacity_tokens=20 + 9 * look, n_max=50)[0] == 9, "no more than memory holds"
    assert most(kv_budget_tokens=10**6, n_max=50) == (50, look, 20 + 50 * look)


def test_the_most_that_can_be_decoded_is_what_a_run_without_early_ends_decodes():
    budget = resolve(config(n=16, first_look=32), 20)
    assert budget.most_decoded(Fraction(0)) == 16 * 256
    # 16 rows to 32 tokens, 8 to 64, 4 to 128, 2 to 256
    assert budget.most_decoded(Fraction(1, 2)) == 16 * 32 + 8 * 32 + 4 * 64 + 2 * 128


def test_n_max_without_a_capacity_says_so():
    with pytest.raises(ConfigError, match="n=max needs to know how much memory is free"):
        numbers(n="max")


def test_n_max_in_too_little_memory_is_an_error():
    with pytest.raises(ConfigError, match=r"not even one row|too few for one row"):
        numbers(n="max", capacity_tokens=20 + 255)
    with pytest.raises(ConfigError, match=r"not even one row|too few for one row"):
        numbers(n="max", capacity_tokens=10)


# --- what does not fit


@pytest.mark.parametrize(
    "args",
    [
        {"n": 16, "first_look": 32, "kv_budget_tokens": 20 + 16 * 34},
        {"n": 16, "first_look": 32, "kv_budget_tokens": 20 + 16 * 32 - 1},
        {"n": 17, "first_look": 32, "kv_budget_tokens": 20 + 16 * 32},
        {"n": 16, "first_look": 300, "kv_budget_tokens": 20 + 16 * 256},
    ],
)
def test_all_three_must_agree(args):
    with pytest.raises(ConfigError, match="contradict each other") as caught:
        numbers(**args)
    for name, value in args.items():
        assert f"{name}={value}" in str(caught.value), "the message names all three"
    assert "20 + " in str(caught.value), "and the prompt"
    assert "two of the three" in caught.value.hint


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"kv_budget_tokens": 20 + 255}, "255 tokens next to the prompt, too few for one row of max_gen_toks=256"),
        ({"n": 4, "first_look": 8}, "32 tokens next to the prompt, too few for one row of max_gen_toks=256"),
        ({"first_look": 8}, "128 tokens next to the prompt, too few for one row of max_gen_toks=256"),
        ({"n": 300, "kv_budget_tokens": 20 + 299}, "cannot hold the prompt of 20 tokens and n=300 rows"),
        ({"kv_budget_tokens": 20}, "cannot hold the prompt of 20 tokens and n=16 rows"),
        ({"kv_budget_tokens": 5}, "cannot hold the prompt of 20 tokens and n=16 rows"),
        (
            {"first_look": 8, "kv_budget_tokens": 27},
            "holds the prompt of 20 tokens, but not even one row of first_look=8",
        ),
        (
            {"first_look": 8, "kv_budget_tokens": 5},
            "holds the prompt of 20 tokens, but not even one row of first_look=8",
        ),
        ({"strategy": "best_of_n", "kv_budget_tokens": 20 + 255}, "255 tokens next to the prompt, too few for one row"),
    ],
)
def test_a_budget_that_cannot_hold_one_full_row_is_an_error_that_says_what_to_do(args, said):
    with pytest.raises(ConfigError) as caught:
        numbers(**args)
    assert said in str(caught.value)
    assert "raise kv_budget_tokens" in caught.value.hint


# --- before any prompt is seen


@pytest.mark.parametrize(
    "args",
    [
        {"n": 4, "first_look": 8},
        {"first_look": 8},
        {"kv_budget_tokens": 256},
        {"n": 16, "first_look": 32, "kv_budget_tokens": 16 * 32},
        {"n": 600, "kv_budget_tokens": 600},
        {"n": 1, "first_look": 300, "kv_budget_tokens": 300},
    ],
)
def test_arguments_that_no_prompt_can_satisfy_are_refused_before_a_model_is_loaded(args):
    with pytest.raises(ConfigError):
        check_arguments(config(**args))
    for prompt_tokens in (1, 20, 2000):
        with pytest.raises(ConfigError):
            numbers(prompt_tokens, **args)


def test_a_tasks_own_max_gen_toks_may_still_make_a_small_budget_do():
    check_arguments(config(kv_budget_tokens=200), max_gen_toks_known=False)
    with pytest.raises(ConfigError, match="contradict each other"):
        check_arguments(config(n=16, first_look=32, kv_budget_tokens=500), max_gen_toks_known=False)


OPTIONAL = {
    "n": st.none() | st.integers(1, 40) | st.just("max"),
    "first_look": st.none() | st.integers(1, 80),
    "kv_budget_tokens": st.none() | st.integers(1, 900),
    "max_gen_toks": st.integers(1, 64),
    "alpha": st.just("0") | ALPHAS,
    "strategy": st.sampled_from(["speculative_rejection", "best_of_n"]),
}


@given(args=st.fixed_dictionaries(OPTIONAL), prompt_tokens=st.integers(1, 50), capacity_tokens=st.integers(0, 2000))
def test_what_the_early_check_refuses_no_prompt_could_have_used(args, prompt_tokens, capacity_tokens):
    settings = config(**args)
    try:
        check_arguments(settings)
    except ConfigError:
        with pytest.raises(ConfigError):
            resolve(settings, prompt_tokens, capacity_tokens=capacity_tokens)


def resolved(args, prompt_tokens: int, capacity_tokens: int) -> tuple[RunConfig, Budget]:
    settings = config(**args)
    try:
        return settings, resolve(settings, prompt_tokens, capacity_tokens=capacity_tokens)
    except ConfigError as error:
        assert error.hint, f"every refusal says what to do: {error}"
        assume(False)
        raise


@given(args=st.fixed_dictionaries(OPTIONAL), prompt_tokens=st.integers(1, 50), capacity_tokens=st.integers(0, 2000))
def test_resolved_numbers_satisfy_the_identities_and_hold_one_full_row(args, prompt_tokens, capacity_tokens):
    settings, budget = resolved(args, prompt_tokens, capacity_tokens)
    n, first_look, suffix = budget.n, budget.first_look, budget.suffix_tokens
    assert suffix == budget.kv_budget_tokens - prompt_tokens
    assert suffix >= budget.max_gen_toks == settings.max_gen_toks, "one row reaches its end"
    assert budget.rows_to_the_end == suffix // settings.max_gen_toks >= 1
    assert n >= 1 and 1 <= first_look <= settings.max_gen_toks
    # what was given is what is used
    assert settings.n in (None, "max", n)
    assert settings.kv_budget_tokens in (None, budget.kv_budget_tokens)
    assert settings.first_look in (None, first_look) or settings.first_look > settings.max_gen_toks == first_look
    if settings.rejects:
        assert n * first_look <= suffix, f"{n} rows of {first_look} tokens exceed the {suffix} tokens there are"
        exact = settings.kv_budget_tokens is None and settings.n != "max"
        if exact:
            assert budget.kv_budget_tokens == prompt_tokens + n * first_look
        elif first_look < settings.max_gen_toks:
            assert suffix - n * first_look < max(n, first_look), "neither another row nor a later look would fit"


@given(args=st.fixed_dictionaries(OPTIONAL), prompt_tokens=st.integers(1, 50), capacity_tokens=st.integers(0, 2000))
def test_resolved_numbers_given_back_resolve_to_themselves(args, prompt_tokens, capacity_tokens):
    """A resume takes them from the journal, a user from the results; they must not 'disagree'."""
    settings, budget = resolved(args, prompt_tokens, capacity_tokens)
    again = settings.replace(n=budget.n, first_look=budget.first_look, kv_budget_tokens=budget.kv_budget_tokens)
    check_arguments(again)
    assert resolve(again, prompt_tokens) == budget


@pytest.mark.parametrize(
    "args",
    [
        {"first_look": 30, "kv_budget_tokens": 20 + 299},  # room for 9 rows of 33, but 30 was asked for
        {"n": 1000, "kv_budget_tokens": 20 + 300, "strategy": "best_of_n"},  # waves: not even one token for each row
        {"n": 16, "first_look": 500},  # later than the last token
        {"n": 16, "kv_budget_tokens": 20 + 16 * 500 + 7},
        {"max_gen_toks": 3},
    ],
)
def test_resolved_numbers_are_taken_back_where_divisions_leave_a_remainder(args):
    settings = config(**args)
    budget = resolve(settings, 20)
    again = settings.replace(n=budget.n, first_look=budget.first_look, kv_budget_tokens=budget.kv_budget_tokens)
    check_arguments(again)
    assert resolve(again, 20) == budget


def test_the_first_look_that_was_asked_for_is_the_first_look_there_is():
    budget = resolve(config(first_look=30, kv_budget_tokens=20 + 299), 20)
    _, plan = make_strategy(config()).init(budget)
    assert (plan.fresh, plan.num_tokens) == (9, 30), "nine rows could take 33 tokens, but 30 was asked for and recorded"


@given(args=st.fixed_dictionaries(OPTIONAL), prompt_tokens=st.integers(1, 50), capacity_tokens=st.integers(0, 2000))
def test_the_first_plan_of_a_strategy_is_the_budgets_n_and_first_look(args, prompt_tokens, capacity_tokens):
    settings, budget = resolved(args, prompt_tokens, capacity_tokens)
    _, plan = make_strategy(settings).init(budget)
    if settings.rejects:
        assert (plan.fresh, plan.num_tokens) == (budget.n, budget.first_look), "as recorded in the result"
    else:
        assert (plan.fresh, plan.num_tokens) == (min(budget.n, budget.rows_to_the_end), budget.max_gen_toks)


@given(rows=st.integers(1, 50), tokens=st.integers(1, 50), suffix=st.integers(50, 500), max_gen_toks=st.integers(1, 50))
def test_the_arithmetic_of_a_budget_is_that_of_whole_tokens(rows, tokens, suffix, max_gen_toks):
    budget = Budget(prompt_tokens=9, kv_budget_tokens=9 + suffix, n=1, first_look=1, max_gen_toks=max_gen_toks)
    most = budget.max_rows(tokens)
    assert budget.kv_tokens(most, tokens) <= 9 + suffix < budget.kv_tokens(most + 1, tokens)
    look = budget.next_look(rows)
    assert look == max_gen_toks or budget.kv_tokens(rows, look) <= 9 + suffix < budget.kv_tokens(rows, look + 1)
    assert look <= max_gen_toks and budget.kv_tokens(rows, look) <= 9 + suffix


def test_processes_that_join_do_not_each_fill_their_own_memory_whoever_asks_for_it() -> None:
    asked = config(n="max", join=True, journal="run.jsonl")
    for refused in (check_arguments, lambda own: resolve(own, 20, capacity_tokens=10_000)):  # a task's own come later
        with pytest.raises(ConfigError, match="n=max with join=True"):
            refused(asked)
    assert resolve(asked.replace(kv_budget_tokens=2000), 20).n > 1
