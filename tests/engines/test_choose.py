"""``engine=``: who decodes is chosen by name, and what is meant for another engine is refused before anything loads."""

from __future__ import annotations

from typing import Any

import pytest

from specrej_eval import api
from specrej_eval.config import ARGUMENTS, HOST, RunConfig
from specrej_eval.config.engines import ENGINES, NOT_TAKEN, OF_VLLM, TRANSFORMERS, VLLM, engine_of
from specrej_eval.engines import choose
from specrej_eval.errors import ConfigError
from specrej_eval.records import fingerprint


def test_every_engine_that_can_be_named_has_a_loader() -> None:
    assert tuple(choose.LOADERS) == ENGINES and engine_of("auto") == TRANSFORMERS


def test_the_names_of_vllm_are_its_own() -> None:
    assert OF_VLLM == (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "distributed_executor_backend",
        "quantization",
        "max_model_len",
        "gpu_memory_utilization",
        "enforce_eager",
    )


@pytest.mark.parametrize(
    ("given", "meant"), [("vlm", "vllm"), ("vllm_server", "vllm-server"), ("transformer", "transformers")]
)
def test_an_engine_that_is_not_known_is_answered_with_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown engine '{given}'") as raised:
        RunConfig.from_args({"engine": given})
    assert f"Did you mean {meant!r}?" in str(raised.value)


def test_a_misspelt_argument_of_vllm_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensor_parallel_size'"):
        RunConfig.from_args({"engine": VLLM, "tensor_paralel_size": 2})


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_is_done_by_our_own_ranks_is_refused_and_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not an argument of ours") as raised:
        RunConfig.from_args({"engine": VLLM, name: 2})
    assert "prompts are split over processes" in str(raised.value)


VALUES: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "quantization": "fp8",
    "max_model_len": 77,
    "gpu_memory_utilization": 0.5,
    "enforce_eager": True,
    "attention_backend": "sdpa",
    "attn_implementation": "eager",
    "compile": "off",
    "engine_url": "http://localhost:9",
    "engine_looks": "resubmit",
    "engine_timeout": 3.0,
    "engine_retries": 3,
    "engine_key_over_http": True,
}


@pytest.mark.parametrize("name", [name for name, made in ARGUMENTS.items() if made.engines])
def test_an_argument_of_another_engine_is_refused_before_a_model_is_looked_at(name: str) -> None:
    wrong = next(engine for engine in ENGINES if engine not in ARGUMENTS[name].engines)
    config = RunConfig(engine=wrong, pretrained="no/such/folder", reward_model="likelihood").replace(
        **{name: VALUES[name]}
    )
    with pytest.raises(ConfigError, match=f"{name}=.* is for engine=.*here engine={wrong} decodes"):
        api.resolve(config, {})


@pytest.mark.parametrize("name", [name for name, made in HOST.items() if made.engines == (TRANSFORMERS,)])
def test_what_only_the_loader_of_transformers_takes_is_refused_by_the_others(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='yes' is for engine=transformers"):
        choose.check_taken(RunConfig(engine=VLLM), {name: "yes"})
    choose.check_taken(RunConfig(engine=VLLM), {name: HOST[name].default})


def test_a_loaded_model_is_decoded_by_our_own_engine_alone() -> None:
    with pytest.raises(ConfigError, match="engine=vllm loads its model itself"):
        choose.resolve_engine(RunConfig(engine=VLLM), {}, check=False)


def test_auto_and_transformers_are_one_run_and_vllm_is_another() -> None:
    auto = fingerprint.of_run(RunConfig(), {})
    assert fingerprint.of_run(RunConfig(engine=TRANSFORMERS), {}) == auto
    assert "engine was 'auto', is now 'vllm'" in fingerprint.differences(
        auto, fingerprint.of_run(RunConfig(engine=VLLM), {})
    )
    before = {name: value for name, value in auto.items() if name != "engine"}
    assert fingerprint.same(before, auto), "records from before there was a second engine"
