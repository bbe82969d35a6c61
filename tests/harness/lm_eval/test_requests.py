"""What lm-eval asks for, and what we make of it: no model is loaded here."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import dill
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args

from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval.requests import (
    ChatPrompt,
    conversation_of,
    describe_ignored,
    draws_of,
    translate,
)

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "1+1?"}
PREFIX = {"role": "assistant", "content": "The answer is"}


# messages behind a prompt


@pytest.mark.parametrize(
    "trip",
    [
        copy.copy,
        copy.deepcopy,
        lambda prompt: pickle.loads(pickle.dumps(prompt)),
        lambda prompt: dill.loads(dill.dumps(prompt)),
        lambda prompt: copy.deepcopy(Instance("generate_until", {}, (prompt, {}), 0)).args[0],
    ],
    ids=["copy", "deepcopy", "pickle", "dill", "instance"],
)
def test_a_chat_prompt_keeps_its_messages(trip: Any) -> None:
    prompt = ChatPrompt("<s>1+1?", [SYSTEM, QUESTION], add_generation_prompt=False)
    back = trip(prompt)
    assert isinstance(back, ChatPrompt)
    assert back == "<s>1+1?"
    assert back.messages == (SYSTEM, QUESTION)
    assert back.add_generation_prompt is False


def test_to_json_and_to_lm_evals_hashes_a_chat_prompt_is_its_text() -> None:
    prompt = ChatPrompt("text", [QUESTION])
    assert json.dumps([prompt]) == '["text"]'
    assert hash_args("generate_until", (prompt, {})) == hash_args("generate_until", ("text", {}))


def test_conversation_of_a_chat_prompt_is_its_messages() -> None:
    assert conversation_of(ChatPrompt("...", [SYSTEM, QUESTION])) == ((SYSTEM, QUESTION), "")


def test_a_prefilled_assistant_turn_is_the_response_prefix() -> None:
    prompt = ChatPrompt("...", [SYSTEM, QUESTION, PREFIX], add_generation_prompt=False)
    assert conversation_of(prompt) == ((SYSTEM, QUESTION), "The answer is")


def test_an_assistant_turn_that_is_over_is_no_prefix() -> None:
    assert conversation_of(ChatPrompt("...", [QUESTION, PREFIX])) == ((QUESTION, PREFIX), "")


def test_conversation_without_a_template_is_the_context_as_a_user_turn() -> None:
    assert conversation_of("Q: 1+1?\nA:") == (({"role": "user", "content": "Q: 1+1?\nA:"},), "")


# gen_kwargs


@pytest.mark.parametrize(
    ("gen_kwargs", "asks_greedy"),
    [
        ({}, True),
        ({"do_sample": False}, True),
        ({"temperature": 0.0}, True),
        ({"do_sample": False, "temperature": 0.7}, True),
        ({"do_sample": "false"}, True),
        ({"do_sample": True}, False),
        ({"do_sample": 1}, False),
        ({"temperature": 0.7}, False),
        ({"temperature": None}, True),
    ],
)
def test_what_counts_as_greedy(gen_kwargs: dict[str, Any], asks_greedy: bool) -> None:
    assert translate(gen_kwargs, RunConfig()).asks_greedy is asks_greedy


def test_a_greedy_task_is_sampled_with_our_own_arguments() -> None:
    base = RunConfig(temperature=0.9, top_p=0.8, top_k=7)
    config = translate({"do_sample": False, "temperature": 0.0, "top_p": 1.0, "top_k": 1}, base).config
    assert (config.temperature, config.top_p, config.top_k) == (0.9, 0.8, 7)


def test_on_greedy_greedy_decodes_one_row_at_temperature_0() -> None:
    base = RunConfig(on_greedy="greedy", n=8, first_look=4, alpha=0.9)
    config = translate({"max_gen_toks": 12}, base).config
    assert (config.strategy, config.n, config.temperature, config.max_gen_toks) == ("best_of_n", 1, 0.0, 12)
    assert config.first_look is None and config.kv_budget_tokens is None


def test_nothing_is_overridden_when_we_decode_greedily_ourselves() -> None:
    assert not translate({"do_sample": False}, RunConfig(temperature=0, n=1)).asks_greedy


def test_the_arguments_of_a_task_that_samples_win() -> None:
    kwargs = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1}
    config = translate(kwargs, RunConfig(top_p=0.5)).config
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.7, 0.9, 3, 0.1)


def test_force_sampling_args_turns_that_round() -> None:
    kwargs = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    config = translate(kwargs, RunConfig(temperature=1.3, force_sampling_args=True)).config
    assert (config.temperature, config.top_p) == (1.3, 1.0)


@pytest.mark.parametrize("kwargs", [{"do_sample": True}, {"do_sample": True, "temperature": 0.0}])
def test_a_task_that_samples_without_a_temperature_gets_ours(kwargs: dict[str, Any]) -> None:
    assert translate(kwargs, RunConfig(temperature=0.6)).config.temperature == 0.6


def test_top_k_of_minus_1_is_off() -> None:
    assert translate({"do_sample": True, "top_k": -1}, RunConfig()).config.top_k == 0


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_all_names_of_the_length_limit(name: str) -> None:
    assert translate({name: 33}, RunConfig()).config.max_gen_toks == 33


def test_our_length_limit_holds_where_a_task_sets_none() -> None:
    assert translate({}, RunConfig(max_gen_toks=77)).config.max_gen_toks == 77


def test_our_own_knobs_in_gen_kwargs() -> None:
    kwargs = {"alpha": 0.3, "n": 6.0, "first_look": 9, "seed": "5", "strategy": "best_of_n", "on_greedy": "sample"}
    config = translate(kwargs, RunConfig()).config
    assert (config.alpha, config.n, config.first_look, config.seed, config.strategy) == (0.3, 6, 9, 5, "best_of_n")


def test_the_given_gen_kwargs_are_left_alone() -> None:
    kwargs = {"until": "x", "do_sample": False, "temperature": 0.7, "num_beams": 2}
    before = copy.deepcopy(kwargs)
    translate(kwargs, RunConfig())
    assert kwargs == before


def test_unknown_names_are_reported_not_refused() -> None:
    translated = translate({"num_beams": 2, "top_pp_k": 0.3, "use_cache": True, "until": []}, RunConfig())
    assert translated.ignored == ("num_beams", "top_pp_k")
    assert describe_ignored(translated.ignored) == "num_beams, top_pp_k (did you mean top_p?)"


@pytest.mark.parametrize("kwargs", [{"reward_model": "x"}, {"dtype": "float32"}, {"batch_size": 2}])
def test_an_argument_of_the_loaded_model_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set in gen_kwargs(.|\n)*--model_args"):
        translate(kwargs, RunConfig())


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (None, ()),
        ([], ()),
        ("\n", ("\n",)),
        (["\n", "Q:", "\n"], ("\n", "Q:")),
        (("\n",), ("\n",)),
    ],
)
def test_until(until: Any, expected: tuple[str, ...]) -> None:
    assert translate({"until": until}, RunConfig()).until == expected


@pytest.mark.parametrize("until", [[None], [""], "", ["\n", ""], [3], 3])
def test_a_bad_until_is_refused(until: Any) -> None:
    with pytest.raises(ConfigError, match="until must"):
        translate({"until": until}, RunConfig())


@pytest.mark.parametrize(
    "kwargs",
    [{"alpha": 1}, {"max_gen_toks": 0}, {"do_sample": True, "temperature": -1}, {"n": 1.5}, {"do_sample": "maybe"}],
)
def test_bad_values_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        translate(kwargs, RunConfig())


# repeats


def instance(text: str, repeats: int | None = 1) -> Instance:
    return Instance("generate_until", {}, (text, {}), 0, metadata=("task", 0, repeats))


def test_each_time_a_request_is_sent_is_a_draw_of_its_own() -> None:
    a, b = instance("a", 3), instance("b", None)
    draws, source = draws_of([a, a, a, b])
    assert [(draw.instance.args[0], draw.repeat) for draw in draws] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert source == [0, 1, 2, 3]


def test_padding_gets_the_draws_there_are() -> None:
    a, b = instance("a", 2), instance("b", 2)
    draws, source = draws_of([a, a, b, b, b, b])
    assert len(draws) == 4
    assert source == [0, 1, 2, 3, 2, 3]


def test_equal_requests_are_not_padding() -> None:
    draws, source = draws_of([instance("same"), instance("same")])
    assert len(draws) == 2
    assert source == [0, 1]


def test_a_slip_in_gen_kwargs_is_refused_and_a_foreign_key_is_not() -> None:
    base = RunConfig()
    with pytest.raises(ConfigError, match=r"'alhpa'(.|\n)*did you mean 'alpha'"):
        translate({"alhpa": 0.3}, base)
    assert translate({"num_beams": 4, "repetition_penalty": 1.1}, base).ignored == ("num_beams", "repetition_penalty")
