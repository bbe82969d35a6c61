"""Secrets in ``--model_args``: our model gets them; lm-eval's output, files and caches do not."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from support import reward_servers as servers
from support.lm_eval_command import lm_eval_command
from support.lm_eval_tasks import task

from specrej_eval import paths
from specrej_eval.api import RunPlan
from specrej_eval.config import RunConfig
from specrej_eval.harness.lm_eval import run as lm_eval_run
from specrej_eval.harness.lm_eval import sealing

PASSWORD, TOKEN = "Tr0ub4dor3", "hf_" + "aB3" * 11
SECRETS = (PASSWORD, TOKEN)


@pytest.fixture(autouse=True)
def wrapped(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    lm_eval_run.wrap_simple_evaluate(lm_eval.evaluator)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    for name in ("SPECREJ_REWARD_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub's token, as our model got it."""
    seen: list[Any] = []
    made = RunPlan.of

    def of(config: RunConfig, host: dict[str, Any], **options: Any) -> RunPlan:
        seen.append(host.get("token"))
        return made(config, host, **options)

    monkeypatch.setattr(RunPlan, "of", of)
    return seen


@pytest.fixture
def judge() -> Iterator[servers.Server]:
    with servers.chat(lambda text: {"7": 0.5, "3": 0.5}) as server:
        yield server


def arguments(server: servers.Server) -> dict[str, Any]:
    url = server.url.replace("http://", f"http://me:{PASSWORD}@")
    return {
        "reward_model": f"likelihood+0.5*judge:m@{url}",
        "token": TOKEN,
        "n": 2,
        "max_gen_toks": 8,
        "first_look": 4,
        "journal": "run.jsonl",
        "trace_path": "trace.jsonl",
    }


def check(server: servers.Server, tokens: list[Any], folder: Path, *told: str) -> None:
    """They were used, and stand nowhere."""
    assert server.headers and all(header["Authorization"].startswith("Basic ") for header in server.headers)
    assert TOKEN in tokens
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".jsonl", ".db"}
    for text in (*(path.read_bytes() for path in files), *(text.encode() for text in told)):
        assert not [secret for secret in SECRETS if secret.encode() in text]
    for path in folder.rglob("*.db"):
        with sqlite3.connect(path) as database:
            for row in database.execute("select value from unnamed"):
                assert not [secret for secret in SECRETS if secret.encode() in bytes(row[0])]


@pytest.mark.parametrize("form", ["dict", "text"])
def test_nothing_that_simple_evaluate_keeps_holds_a_secret(
    form: str, judge: servers.Server, tokens: list[Any], own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: Any = arguments(judge)
    if form == "text":
        given = ",".join(f"{name}={value}" for name, value in given.items())
    tracker = EvaluationTracker(output_path="out")
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "lm_eval"):
        results = lm_eval.simple_evaluate(
            model="specrej",
            model_args=given,
            tasks=[task(questions=["1+1=?"])],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            use_cache="cache/answers",
            evaluation_tracker=tracker,
        )
    assert results is not None
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="toy", samples=samples["toy"])
    check(judge, tokens, own_folder, caplog.text, repr(results), json.dumps(results["config"], default=str))
    assert "***" in str(results["config"]["model_args"]) and "Initializing specrej" in caplog.text


@pytest.mark.parametrize("where", ["line", "file"])
def test_nothing_that_the_command_prints_or_writes_holds_a_secret(
    where: str, judge: servers.Server, own_folder: Path, few_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ",".join(f"{name}={value}" for name, value in arguments(judge).items())
    words = ["run", "--tasks", "specrej_arithmetic", "--include_path", str(paths.folder("tasks"))]
    words += ["--limit", "1", "--log_samples", "--output_path", "out", "--use_cache", "cache/answers"]
    words += ["--gen_kwargs", "max_gen_toks=8", "--cache_requests", "refresh"]
    if where == "line":
        words += ["--model", "specrej", "--model_args", given]
    else:
        lines = "".join(f"  {name}: {value}\n" for name, value in arguments(judge).items())
        outside = own_folder.parent / f"{own_folder.name}.yaml"
        outside.write_text(f"model: specrej\nmodel_args:\n{lines}")
        words += ["--config", str(outside)]
    env = {"LMEVAL_LOG_LEVEL": "DEBUG", "LM_HARNESS_CACHE_PATH": str(own_folder / "requests")}
    monkeypatch.setattr("lm_eval.caching.cache.PATH", env["LM_HARNESS_CACHE_PATH"])  # read when it was imported
    done = lm_eval_command(*words, cwd=own_folder, few_tasks=few_tasks, env=env)
    assert "DEBUG" in done.stderr
    assert "exact_match" in done.stdout and "specrej (" in done.stdout and "token" in done.stdout
    assert [*(own_folder / "requests").iterdir()]
    check(judge, [TOKEN], own_folder, done.stdout, done.stderr)


def test_what_lm_eval_reads_is_sealed_within_alone() -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    before = {name: vars(EvaluatorConfig)[name] for name in ("from_cli", "load_yaml_config")}
    with pytest.raises(KeyError), sealing.sealed_configs():
        assert {name: vars(EvaluatorConfig)[name] for name in before} != before
        raise KeyError
    assert {name: vars(EvaluatorConfig)[name] for name in before} == before
