"""Limits, plans and audits inside lm-eval: no score of part of a task, and nothing answered is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from support import forked
from support.lm_eval_tasks import task

from specrej_eval.api import RunPlan
from specrej_eval.errors import ConfigError, LimitReached

QUESTIONS = [f"{number}+{number}=?" for number in range(10, 15)]
SHORT = {"n": 4, "max_gen_toks": 12, "first_look": 4, "device": "cpu", "batch_size": 1}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(*, use_cache: str | None = None, **args: Any) -> Any:
    own = {"until": ["\n"], "do_sample": False}
    return lm_eval.simple_evaluate(
        model="specrej",
        model_args={**SHORT, **args},
        tasks=[task(questions=QUESTIONS, generation_kwargs=own)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        use_cache=use_cache,
    )


def test_a_limit_ends_lm_eval_before_it_makes_scores_and_the_journal_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    whole = evaluate()
    answered = 0
    for _ in range(len(QUESTIONS)):
        try:
            results = evaluate(journal=path, max_decode_tokens=60)
            break
        except LimitReached as error:
            assert f"of {len(QUESTIONS)} prompts are answered" in str(error) and path in str(error)
            lines = len(Path(path).read_bytes().splitlines()) - 1
            assert answered < lines < len(QUESTIONS)
            answered = lines
    assert answered
    assert results["results"] == whole["results"]
    assert results["config"]["specrej"]["spent"]["taken_from_records"] == answered


@pytest.mark.full
def test_processes_that_join_have_the_results_of_one_and_share_what_it_costs(tmp_path: Path) -> None:
    whole = evaluate()

    def work(name: str) -> None:
        results = evaluate(journal=str(tmp_path / "run.jsonl"), join=True)
        told = {"results": results["results"], "spent": results["config"]["specrej"]["spent"]}
        (tmp_path / name).write_text(json.dumps(told))

    pids = [forked.start(lambda name=name: work(name)) for name in ("a", "b")]
    assert [forked.ended(pid) for pid in pids] == [0, 0]
    found = [json.loads((tmp_path / name).read_text()) for name in ("a", "b")]
    assert found[0]["results"] == found[1]["results"] == json.loads(json.dumps(whole["results"]))
    decoded = [told["spent"]["decoded"] for told in found]
    assert sum(decoded) == len(QUESTIONS)
    assert [told["spent"]["taken_from_records"] for told in found] == [len(QUESTIONS) - each for each in decoded]


def test_a_cache_of_lm_evals_own_is_not_for_processes_that_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunPlan, "of", lambda *_, **__: pytest.fail("models were looked at"))
    with pytest.raises(ConfigError, match="--use_cache with join=True"):
        evaluate(use_cache=str(tmp_path / "cache"), journal=str(tmp_path / "run.jsonl"), join=True)


def test_a_plan_ends_lm_eval_with_exit_code_0_and_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(SystemExit) as caught:
        evaluate(plan="only")
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert f"plan of {len(QUESTIONS)} prompts, from a probe of 3" in told
    assert "exact_match" not in told and not path.exists()


def test_results_say_what_rejection_cost_and_scores_are_those_without_an_audit() -> None:
    plain, audited = evaluate(), evaluate(audit=1.0)
    assert audited["results"] == plain["results"]
    block = audited["config"]["specrej"]
    assert "audit" not in plain["config"]["specrej"]
    assert block["audit"]["prompts_audited"] == block["audit"]["prompts_rejecting"] > 0
    assert block["audit"]["regret_interval"] == [block["audit"]["regret"]] * 2
    totals, before = block["totals"], plain["config"]["specrej"]["totals"]
    assert totals["audit_rows"] == totals["rows_rejected"] and totals["audit_tokens"] > 0
    assert [totals[name] for name in ("decode_tokens", "reward_tokens", "rows_started")] == [
        before[name] for name in ("decode_tokens", "reward_tokens", "rows_started")
    ]
