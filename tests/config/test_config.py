"""Every argument: what a command line leaves of it, the rule it is held to, and what a slip is answered with."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rewards import check_reward

from specrej_eval import registry
from specrej_eval.config import (
    ARGUMENTS,
    HOST,
    RunConfig,
    as_bool,
    as_dict,
    as_float,
    as_int,
    checked_until,
    known_elsewhere,
)
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.strategies.base import make_strategy

OURS = {field.name for field in dataclasses.fields(RunConfig)}


def config(**args) -> RunConfig:
    return RunConfig.from_args(args)[0]


def refused(**args) -> str:
    """The whole message, hint included."""
    with pytest.raises(ConfigError) as caught:
        config(**args)
    return str(caught.value)


# --- defaults and names


def test_the_defaults_are_the_documented_ones():
    expected = {
        "strategy": "speculative_rejection",
        "alpha": 0.5,
        "n": None,
        "first_look": None,
        "kv_budget_tokens": None,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "batch_size": "auto",
        "attention_backend": "auto",
        "compile": "auto",
        "max_gen_toks": 256,
        "on_greedy": "sample",
        "on_nan": "error",
        "partial_turn": "closed",
        "reward_family": "auto",
        "prm_reduce": "last",
        "reward_cache": "full",
        "reward_ensemble": "sum",
        "reward_batch_size": 32,
        "reward_timeout": 60.0,
        "reward_retries": 5,
        "reward_key_over_http": False,
        "judge_max_toks": 16,
        "deepconf_window": 64,
        "floor_toks": 2,
        "floor_repetition": 0.5,
        "dtype": "auto",
        "reward_dtype": "auto",
        "force_sampling_args": False,
        "logprobs": False,
        "join": False,
        "audit": 0.0,
        "variance_reduce": False,
        "trust_remote_code": False,
        "reward_engine": "transformers",
        "engine": "auto",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enforce_eager": False,
        "engine_looks": "auto",
        "engine_timeout": 60.0,
        "engine_retries": 5,
        "engine_key_over_http": False,
    }
    found = config().to_dict()
    assert expected.items() <= found.items()
    assert all(found[name] is None for name in found.keys() - expected.keys()), "everything else is off"


def test_no_argument_is_named_version_and_none_is_both_ours_and_the_hosts():
    assert "version" not in OURS | set(HOST), (
        "lm-eval merges these into each task's metadata, whose `version` is the task's"
    )
    assert not OURS & set(HOST)
    assert "unknown argument 'version'" in refused(version=1)


def test_the_hosts_arguments_are_passed_through_untouched():
    ours, host = RunConfig.from_args({"alpha": 0.25, "revision": "main", "parallelize": "True"})
    assert ours.alpha == 0.25
    assert host == {"revision": "main", "parallelize": "True"}


def test_a_host_may_name_its_own_arguments():
    assert RunConfig.from_args({"port": 1}, host=["port"])[1] == {"port": 1}
    with pytest.raises(ConfigError, match="unknown argument 'revision'"):
        RunConfig.from_args({"revision": "main"}, host=["port"])


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("alhpa", "alpha"),
        ("reward_modle", "reward_model"),
        ("kv_budget_token", "kv_budget_tokens"),
        ("max_gen_tok", "max_gen_toks"),
        ("temprature", "temperature"),
        ("firstlook", "first_look"),
        ("trust_remotecode", "trust_remote_code"),
        ("revison", "revision"),
        ("topk", "top_k"),
    ],
)
def test_an_unknown_argument_suggests_the_nearest(slip, meant):
    message = refused(**{slip: 1})
    assert f"unknown argument {slip!r}" in message
    assert f"did you mean {meant!r}?" in message
    with pytest.raises(ConfigError, match="unknown argument"):
        config().replace(**{slip: 1})


def test_an_argument_like_no_other_is_answered_with_the_whole_list():
    message = refused(xyzzy=1)
    assert all(name in message for name in OURS)


def test_errors_are_one_family_and_still_what_python_expects():
    with pytest.raises(SpecRejError):
        config(alpha=1)
    with pytest.raises(ValueError):
        config(alpha=1)


# --- what a command line leaves of a value


@pytest.mark.parametrize("name", ["alpha", "temperature", "top_p", "min_p"])
def test_numbers_may_come_as_text(name):
    for given_ in (0.5, "0.5", " 0.5 ", "5e-1", ".5"):
        value = getattr(config(**{name: given_}), name)
        assert (value, type(value)) == (0.5, float)


@pytest.mark.parametrize("name", ["alpha", "temperature", "top_p", "min_p"])
@pytest.mark.parametrize(
    "value", ["half", "", "1/2", "50%", None, True, [0.5], {}, "nan", float("nan"), float("inf"), "-inf", 10**400]
)
def test_what_is_no_finite_number_is_refused_by_name_and_value(name, value):
    message = refused(**{name: value})
    assert message.startswith(name) and repr(value) in message


WHOLE = ["n", "n_max", "first_look", "kv_budget_tokens", "top_k", "max_gen_toks", "seed", "batch_size"]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_may_come_as_text_or_as_floats_without_a_fraction(name):
    for given_ in (1000, 1000.0, "1000", "1_000", "1000.0", "1e3", " 1000 "):  # 1_000 reaches us as 1000.0
        value = getattr(config(**{name: given_}), name)
        assert (value, type(value)) == (1000, int)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "value", [2.5, "2.5", "many", "", True, False, [4], "nan", float("nan"), float("inf"), "1e400", "MAX"]
)
def test_what_is_no_whole_number_is_refused_by_name_and_value(name, value):
    message = refused(**{name: value})
    assert message.startswith(f"{name} must be a whole number") and repr(value) in message


@given(number=st.integers(-(10**30), 10**30))
def test_whole_numbers_of_any_size_are_exact(number):
    for given_ in (number, str(number), f"{number:_}"):
        assert as_int("seed", given_) == number, "a float holds no more than 53 bits"


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_their_text(number):
    assert as_float("alpha", repr(number)) == as_float("alpha", number) == number


@pytest.mark.parametrize("name", ["force_sampling_args", "logprobs", "trust_remote_code"])
def test_true_and_false_may_come_as_text_or_as_0_and_1(name):
    for given_ in (True, "True", "true", "TRUE", " yes ", "1", 1, 1.0):
        assert getattr(config(**{name: given_}), name) is True
    for given_ in (False, "False", "false", "no", "0", 0, 0.0):
        assert getattr(config(**{name: given_}), name) is False
    for given_ in ("", "maybe", 2, -1, 0.5, None, [], "None"):
        message = refused(**{name: given_})
        assert message == f"{name} must be true or false, got {given_!r}."


@given(value=st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.booleans(), st.lists(st.integers())))
def test_a_coercion_returns_its_type_or_raises_our_error(value):
    for coerce, kind in ((as_float, float), (as_int, int), (as_bool, bool), (as_dict, dict)):
        try:
            assert type(coerce("x", value)) is kind
        except ConfigError as error:
            assert str(error).startswith("x must be")


def test_a_dict_may_come_as_its_json_text():
    assert as_dict("x", {"a": 1}) == as_dict("x", '{"a": 1}') == {"a": 1}
    for value in ("[1]", "{", "", None, 3):
        with pytest.raises(ConfigError, match="x must be a dict or the JSON text of one"):
            as_dict("x", value)


# --- the rule of each argument


@pytest.mark.parametrize("value", [0, 0.0, "0", "-0.0", 0.01, 0.5, "0.999", 0.9999999999999999])
def test_alpha_may_be_anything_from_0_to_just_below_1(value):
    assert 0 <= config(alpha=value).alpha < 1


@pytest.mark.parametrize("value", [1, 1.0, "1", -0.01, 1.5, 50, "50"])
def test_alpha_outside_0_to_1_is_refused_with_an_example(value):
    message = refused(alpha=value)
    assert "alpha must be in [0, 1)" in message
    assert "alpha=0.5 rejects half of the rows" in message


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("n", 0, "at least 1, or 'max'"),
        ("n", -3, "at least 1, or 'max'"),
        ("first_look", 0, "at least 1"),
        ("kv_budget_tokens", 0, "at least 1"),
        ("max_gen_toks", 0, "at least 1"),
        ("batch_size", 0, "at least 1, or 'auto'"),
        ("n_max", 0, "at least 1"),
        ("temperature", -0.1, "at least 0 (0 decodes greedily)"),
        ("top_k", -1, "at least 0 (0 switches it off)"),
        ("top_p", 0, "in (0, 1]"),
        ("top_p", 1.01, "in (0, 1]"),
        ("min_p", -0.1, "in [0, 1]"),
        ("min_p", 1.01, "in [0, 1]"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_rule(name, value, rule):
    assert f"{name} must be {rule}, got " in refused(**{name: value})
    with pytest.raises(ConfigError):
        config().replace(**{name: value})


@pytest.mark.parametrize(
    "args",
    [{"top_p": 1}, {"top_p": 1e-9}, {"min_p": 1}, {"min_p": 0}, {"top_k": 0}, {"n": 1}, {"n": "max"}, {"seed": -7}],
)
def test_the_ends_of_the_ranges_are_fine(args):
    config(**args)


@pytest.mark.parametrize(
    ("name", "slip", "meant"),
    [
        ("strategy", "best-of-n", "best_of_n"),
        ("strategy", "speculative_rejections", "speculative_rejection"),
        ("on_greedy", "samples", "sample"),
        ("on_nan", "dropp", "drop"),
        ("partial_turn", "close", "closed"),
        ("dtype", "float_16", "float16"),
        ("reward_dtype", "bfloat_16", "bfloat16"),
    ],
)
def test_an_unknown_choice_suggests_the_nearest_and_lists_all(name, slip, meant):
    message = refused(**{name: slip})
    assert f"unknown {name} {slip!r}" in message
    assert f"Did you mean {meant!r}?" in message
    assert "Known: " in message


@pytest.mark.parametrize(
    "name", ["strategy", "on_greedy", "on_nan", "partial_turn", "prm_reduce", "reward_cache", "dtype", "reward_dtype"]
)
@pytest.mark.parametrize("value", [None, "", 3, ["sample"], "base", "__init__"])
def test_what_is_no_choice_at_all_is_refused(name, value):
    assert f"unknown {name} {value!r}" in refused(**{name: value})


def test_an_unknown_reward_family_is_refused_before_any_weights_load():
    with pytest.raises(ConfigError, match="unknown reward_family 'sequence_clasifier'") as caught:
        check_reward(config(reward_model="somebody/something", reward_family="sequence_clasifier"))
    assert "Did you mean 'sequence_classifier'?" in caught.value.hint


@pytest.mark.parametrize("args", [{}, {"n": 16}, {"n": "max"}, {"strategy": "best_of_n"}, {"alpha": 0}])
def test_greedy_decoding_of_more_than_one_row_is_refused(args):
    message = refused(temperature=0, **args)
    assert "temperature=0 decodes greedily" in message and "n=1" in message


def test_greedy_decoding_of_one_row_is_fine():
    for temperature in (0, "0", 0.0):
        assert config(temperature=temperature, n=1).temperature == 0


def test_a_checked_copy_is_checked_and_the_original_stays():
    first = config(n=4)
    assert (first.replace(n="8").n, first.n) == (8, 4)
    with pytest.raises(ConfigError, match="temperature=0"):
        first.replace(temperature=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.n = 5


def test_arguments_survive_their_own_dict_and_json():
    first = config(n="max", alpha="0.7", logprobs="true", trace_path="a.jsonl")
    assert config(**json.loads(json.dumps(first.to_dict()))) == first


# --- other names and spellings


@pytest.mark.parametrize("name", ["n_samples", "num_samples", "num_return_sequences", "best_of"])
def test_what_others_call_n_is_n(name):
    assert config(**{name: "8"}).n == 8
    assert config(**{name: 8, "n": "8"}).n == 8
    assert config(**{name: None, "n": 4}).n == config(**{name: 4, "n": None}).n == 4
    assert config(**{name: "max"}) == config(n="max")
    assert f"n=4 and {name}=8 are two values for the same argument" in refused(**{name: 8, "n": 4})
    assert "n must be a whole number" in refused(**{name: "many"})


@pytest.mark.parametrize("name", ["dtype", "reward_dtype"])
def test_dtypes_have_short_names(name):
    for short, long in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        assert config(**{name: short}) == config(**{name: long})


def test_what_other_tools_call_an_argument_is_answered_with_our_name():
    for slip, meant in known_elsewhere().items():
        if meant in ARGUMENTS and slip not in ARGUMENTS[meant].synonyms:
            assert f"did you mean {meant!r}?" in refused(**{slip: 1})
    assert "until" not in refused(stop="x"), "which --model_args do not take"


# --- alpha as written


@given(digits=st.integers(0, 10**6 - 1))
def test_alpha_is_the_fraction_that_was_written(digits):
    text = f"0.{digits:06}"
    assert config(alpha=text).alpha_fraction == config(alpha=float(text)).alpha_fraction == Fraction(digits, 10**6)


def test_alpha_zero_and_best_of_n_reject_nothing():
    assert config(alpha=0.01).rejects
    for args in ({"alpha": 0}, {"alpha": "-0.0"}, {"strategy": "best_of_n"}, {"strategy": "best_of_n", "alpha": 0.5}):
        assert not config(**args).rejects


# --- stop strings


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (None, ()),
        ([], ()),
        ("\n", ("\n",)),
        (["a", "b"], ("a", "b")),
        (("a", "b"), ("a", "b")),
        (["b", "a", "b", "a"], ("b", "a")),
        ([" "], (" ",)),
    ],
)
def test_stop_strings_become_a_tuple_without_duplicates_in_order(until, expected):
    assert checked_until(until) == expected


@pytest.mark.parametrize("until", ["", [""], [None], ["a", ""], ["a", None], ["a", 3], [["a"]], [b"a"]])
def test_an_empty_stop_string_or_none_among_them_is_refused(until):
    with pytest.raises(ConfigError, match="until must hold non-empty strings") as caught:
        checked_until(until)
    assert "leave it out" in caught.value.hint


@pytest.mark.parametrize("until", [3, 0, b"a", {"a": 1}, True])
def test_what_is_no_list_of_stop_strings_is_refused(until):
    with pytest.raises(ConfigError, match="until must be a string or a list of strings"):
        checked_until(until)


# --- names and files


def test_every_file_of_strategies_is_a_strategy_by_its_name():
    assert {"best_of_n", "speculative_rejection"} <= set(registry.names("specrej_eval.strategies"))
    for name in registry.names("specrej_eval.strategies"):
        strategy = make_strategy(config(strategy=name))
        assert callable(strategy.init) and callable(strategy.step), f"{name}.py makes no strategy"


def test_an_entry_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown strategy 'best'") as caught:
        registry.load_module("specrej_eval.strategies", "best", argument="strategy")
    assert "Known: best_of_n" in caught.value.hint


def test_an_alpha_that_best_of_n_does_not_use_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    RunConfig.from_args({"strategy": "best_of_n", "n": 4})
    RunConfig.from_args({"strategy": "best_of_n", "alpha": 0})
    RunConfig.from_args({"strategy": "best_of_n", "alpha": "0"})
    RunConfig.from_args({"alpha": 0.25})
    assert not caplog.records
    RunConfig.from_args({"strategy": "best_of_n", "alpha": 0.25})
    assert "alpha=0.25 is not used" in caplog.text
