"""One declaration is enough: every flag, list and table follows it, and no list of names is kept by hand."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
from collections import Counter
from typing import Any

import pytest
from support import ROOT
from support.other_values import OTHER

from specrej_eval import cli
from specrej_eval.config import (
    ARGUMENTS,
    DECIDING,
    HOST,
    NEUTRAL,
    SAMPLING,
    Argument,
    Decides,
    DecoderArguments,
    PromptArguments,
    RunConfig,
    Takes,
    declared,
    known_elsewhere,
    names,
)
from specrej_eval.errors import ConfigError
from specrej_eval.harness.alpaca_eval.config import STRATEGIES, arguments_of
from specrej_eval.harness.alpaca_eval.judge import ARGUMENTS as OF_THE_JUDGE
from specrej_eval.harness.lm_eval.requests import translate
from specrej_eval.options import add_reward_options, reward_config
from specrej_eval.records.fingerprint import differences, of_run, same

spec = importlib.util.spec_from_file_location("tables_of_arguments", ROOT / ".ci" / "arguments.py")
assert spec is not None and spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

EVERYTHING = {**ARGUMENTS, **HOST, **declared(DecoderArguments)}
VALUES: dict[str, Any] = {
    **OTHER,
    "logprobs": True,
    "audit": 0.5,
    "score_every": 8,
    "on_greedy": "error",
    "force_sampling_args": True,
    "reward_batch_size": 3,
    "reward_timeout": 3.0,
    "reward_retries": 3,
    "reward_key_over_http": True,
    "reward_cache": "off",
    "reward_kv_budget_tokens": 3,
    "reward_device": "cpu",
    "device": "cpu",
    "attn_implementation": "eager",
    "compile": "off",
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "gpu_memory_utilization": 0.5,
    "enforce_eager": True,
    "engine_url": "http://localhost:9",
    "engine_looks": "resubmit",
    "engine_timeout": 3.0,
    "engine_retries": 3,
    "engine_key_over_http": True,
    "reward_gpu_memory_utilization": 0.3,
    "batch_size": 3,
    "trace_path": "x.jsonl",
    "journal": "x.jsonl",
    "join": True,
    "max_seconds": 5.0,
    "max_decode_tokens": 100,
    "plan": "only",
}


def test_the_table_in_the_docs_is_todays() -> None:
    text = tables.FILE.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run `python .ci/arguments.py`"
    assert all(f"| `{name}` |" in text for name in EVERYTHING)
    assert Counter(name for room in tables.ROOMS.values() for name in room) == Counter(dict.fromkeys(EVERYTHING, 1))


@pytest.mark.parametrize("made", EVERYTHING.values(), ids=EVERYTHING)
def test_a_declaration_says_all_there_is_to_say(made: Argument) -> None:
    assert made.help.endswith(".") and "\n" not in made.help and not made.none.endswith(".")
    assert made.read(made.default) == made.default, "its own default breaks its rule"
    assert made.kind is not None and isinstance(made.decides, Decides)


def test_names_are_given_once() -> None:
    others = [other for made in EVERYTHING.values() for other in (*made.synonyms, *made.elsewhere)]
    assert len(others) == len(set(others)) == len(known_elsewhere())
    assert not EVERYTHING.keys() & set(others)
    assert not ARGUMENTS.keys() & HOST.keys()


def test_every_argument_decides_models_or_answers_or_nothing() -> None:
    of_models = names(Decides.MODELS)
    assert sorted([*of_models, *DECIDING, *NEUTRAL]) == sorted(ARGUMENTS)
    assert "logprobs" in DECIDING and "logprobs" not in names(Decides.ANSWERS), "of what is kept, not of the answer"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_read_from_text_as_from_its_value(name: str) -> None:
    config = RunConfig().replace(n=1, **({name: VALUES[name]} if name != "n" else {}))
    text = {field: str(value) for field, value in dataclasses.asdict(config).items() if value is not None}
    assert RunConfig.from_args(text)[0] == config


@pytest.mark.parametrize("name", [*EVERYTHING])
def test_run_has_an_option_for_what_it_takes(name: str) -> None:
    made = EVERYTHING[name]
    words = ["--prompts", "x", f"--{name}", str(VALUES.get(name, "x"))]
    if Takes.RUN in made.takes:
        assert vars(cli.parse("run", words))[name] == words[-1]
        for other in made.synonyms:
            assert vars(cli.parse("run", [*words[:2], f"--{other}", words[-1]]))[name] == words[-1]
    else:
        with pytest.raises(ConfigError):
            cli.parse("run", words)


@pytest.mark.parametrize("name", [*ARGUMENTS, *HOST])
def test_what_uses_a_reward_alone_takes_its_arguments_and_no_others(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_reward_options(parser)
    alone = name in names(Takes.ALONE)
    options, unknown = parser.parse_known_args([f"--{name}", str(VALUES.get(name, "x"))])
    assert (not unknown) == (alone or name == "token")
    assert (name in OF_THE_JUDGE) == alone
    if alone:
        assert getattr(reward_config(vars(options)), name) == VALUES[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_request_may_set_what_is_declared_so(name: str) -> None:
    given = {"do_sample": True, name: VALUES[name]}
    if name in names(Takes.REQUEST):
        assert getattr(translate(given, RunConfig()).config, name) == VALUES[name]
    else:
        with pytest.raises(ConfigError, match=f"{name} cannot be set in gen_kwargs"):
            translate(given, RunConfig())


@pytest.mark.parametrize("name", [name for name, made in ARGUMENTS.items() if made.idle_when_greedy])
def test_what_means_nothing_to_greedy_decoding_is_refused_with_it(name: str) -> None:
    explicit = {"do_sample": False, name: 3 if name == "n" else VALUES[name]}
    if name == "strategy":
        explicit[name] = "speculative_rejection"
    with pytest.raises(ConfigError, match="would have no effect"):
        translate(explicit, RunConfig(), explicit=explicit)


@pytest.mark.parametrize("function", STRATEGIES)
@pytest.mark.parametrize("name", [*ARGUMENTS, *HOST, "until", "max_tokens", "price_per_hour", "is_chatml_prompt"])
def test_yaml_takes_them_all(function: str, name: str) -> None:
    value = {"until": ["a"], "max_tokens": 9, "price_per_hour": 2, "is_chatml_prompt": True, **VALUES}.get(name, "x")
    config, host, asked = arguments_of(function, {"n": 1, name: value})
    where = asked if name in declared(DecoderArguments) else config
    found = host[name] if name in HOST else getattr(where, name)
    assert found == (tuple(value) if name == "until" else value)
    assert (name in asked.deciding()) == (name in declared(DecoderArguments) and name != "price_per_hour")
    assert declared(PromptArguments).keys() < asked.deciding().keys()


# A list of arguments' names outside config/ is a second declaration. Those that are none:
NOT_A_DECLARATION = {
    (
        "records/fingerprint/comparing.py",
        ("revision", "subfolder", "gguf_file", "peft", "tokenizer"),
    ),  # what old records knew
    ("commands/report/page/data.py", ("strategy", "n", "alpha")),  # what a short name is made of
    ("generator.py", ("strategy", "n", "alpha", "max_gen_toks", "temperature", "top_k", "seed")),  # what repr shows
    ("engines/transformers/loading.py", ("device_map", "gguf_file", "max_memory", "offload_folder")),  # of one call
}


def test_no_list_of_names_is_kept_by_hand() -> None:
    known = {*ARGUMENTS, *HOST, *declared(DecoderArguments)}
    found = set()
    for path in sorted((ROOT / "specrej_eval").rglob("*.py")):
        where = path.relative_to(ROOT / "specrej_eval").as_posix()
        if where.startswith("config/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Tuple | ast.List | ast.Set):
                continue
            words = [item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            ours = tuple(word for word in words if word in known)
            if len(ours) >= 3 and len(ours) == len(words):
                found.add((where, ours))
    assert found == NOT_A_DECLARATION
    assert set(SAMPLING) <= set(names(Takes.REQUEST))


def test_an_argument_that_is_younger_than_the_records_lets_them_be_gone_on_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``min_p`` plays the part: a journal's keys and a folder's fingerprint from before it, held against today's."""
    monkeypatch.setitem(ARGUMENTS, "min_p", dataclasses.replace(ARGUMENTS["min_p"], later=True))
    config, changed = RunConfig(), RunConfig(min_p=0.2)
    before = {name: value for name, value in config.of_request.items() if name != "min_p"}
    assert config.of_request == before and changed.of_request == {**before, "min_p": 0.2}
    then = {name: value for name, value in of_run(config, {}).items() if name != "min_p"}
    assert same(then, of_run(config, {}))
    assert "min_p" in differences(then, of_run(changed, {}))
