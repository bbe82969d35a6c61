"""Resolve once, then load: every way in asks each model's plan for once, and before a weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import specrej_eval
from specrej_eval import api, cli
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import HOST, RunConfig
from specrej_eval.engines.transformers import loading
from specrej_eval.errors import ConfigError
from specrej_eval.records import fingerprint
from specrej_eval.rewards import choose

SMALL: dict[str, Any] = {"n": 2, "max_gen_toks": 8, "device": "cpu"}


def by_python(folder: Path) -> None:
    specrej_eval.load(**SMALL).generate("Q: 1+1=?\nA:")


def by_run(folder: Path) -> None:
    (folder / "prompts.json").write_text('[{"prompt": "Q: 1+1=?\\nA:"}]')
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    given = ["--prompts", str(folder / "prompts.json"), "--output", str(folder / "out")]
    assert cli.main(["run", *given, *words, "--seeds", "0,1"]) == 0


def by_lm_eval(folder: Path) -> None:
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    SpecRejLM(**SMALL)


def by_alpaca_eval(folder: Path) -> None:
    from specrej_eval.harness.alpaca_eval import decoder

    generation = decoder.Generation.of("specrej_completions", SMALL)
    for _ in range(2):  # a chunk each
        decoder.specrej_completions(["Q: 1+1=?\nA:"], generation=generation)
    decoder.release_models()


@pytest.mark.parametrize("way", [by_python, by_run, by_lm_eval, by_alpaca_eval])
def test_every_way_in_resolves_each_model_once_and_loads_nothing_before(
    way: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noting(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(loading, "resolve_engine")
    noting(choose, "resolve_reward")
    noting(loading.AutoModelForCausalLM, "from_pretrained")
    way(tmp_path)
    assert events == ["resolve_engine", "resolve_reward", "from_pretrained"]


def test_chat_template_args_that_are_no_dict_are_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.EnginePlan, "load_model", lambda _: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="chat_template_args must be a dict"):
        specrej_eval.load(chat_template_args="{half")


def test_a_plan_has_the_fingerprint_of_its_arguments() -> None:
    config, host = RunConfig(n=3, reward_model=str(DEMO_REWARD)), {"revision": "main"}
    plan = api.resolve(config, host)

    def resolved(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "environment": {**found["environment"], "attention_backend": plan.engine.attention.name}}

    assert plan.fingerprint(until=("a",)) == resolved(fingerprint.of_run(config, host, until=("a",)))
    assert plan.of_models() == resolved(fingerprint.of_models(config, host))
    assert plan.replace(seed=7).fingerprint() == resolved(fingerprint.of_run(config.replace(seed=7), host))


def test_one_rank_of_several_has_files_of_its_own() -> None:
    plan = api.resolve(RunConfig(journal="a.jsonl", trace_path="b.jsonl"), {})
    of_rank = plan.of_rank(1, 2)
    assert (of_rank.config.journal, of_rank.config.trace_path) == ("a_rank1.jsonl", "b_rank1.jsonl")
    assert plan.of_rank(0, 1).config == plan.config


@pytest.mark.parametrize("name", [name for name, made in HOST.items() if made.not_in_python])
def test_what_only_lm_evals_loader_takes_is_refused_before_a_model_is_looked_at(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='yes' is not supported in the Python API"):
        specrej_eval.load(pretrained="no/such/folder/at/all", **{name: "yes"})
