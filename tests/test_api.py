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
from specrej_eval.records import fingerprint, journal
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
        return {**found, "environment": {**found["environment"], **plan.engine.environment()}}

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


def of_lm_eval(**args: Any) -> Any:
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    return SpecRejLM(**args)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded"))


@pytest.mark.parametrize("way", [specrej_eval.load, of_lm_eval])
@pytest.mark.parametrize("beside", ["", "_rank0"], ids=["its own", "another process's"])
def test_a_journal_of_other_models_is_refused_before_weights_load_and_left_alone(
    way: Callable[..., Any], beside: str, tmp_path: Path, no_weights: None
) -> None:
    there, path = tmp_path / f"run{beside}.jsonl", str(tmp_path / "run.jsonl")
    plan = api.resolve(RunConfig(n=2), {})
    journal.Journal(str(there), plan.of_models()).close()
    before = there.read_bytes()
    with pytest.raises(ConfigError, match="reward_model was 'embedded', is now 'likelihood'"):
        way(**SMALL, journal=path, reward_model="likelihood")
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(there, before)]
    api.resolve(RunConfig(n=4, alpha=0.25, journal=path), {})  # other requests of the same models


@pytest.mark.parametrize("way", [specrej_eval.load, of_lm_eval])
@pytest.mark.parametrize("argument", ["journal", "trace_path"])
@pytest.mark.parametrize("place", ["", "file/run.jsonl", "file/deep/run.jsonl"])
def test_a_file_of_the_run_that_cannot_be_written_is_refused_before_weights_load(
    way: Callable[..., Any], argument: str, place: str, tmp_path: Path, no_weights: None
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=f"{argument}='.*' cannot be written: (Is|Not) a directory"):
        way(**SMALL, **{argument: str(tmp_path / place)})


def test_a_file_that_can_be_written_is_not_made_before_weights_load(tmp_path: Path) -> None:
    api.resolve(RunConfig(journal=str(tmp_path / "new" / "a.jsonl"), trace_path=str(tmp_path / "b.jsonl")), {})
    assert not any(tmp_path.iterdir())
