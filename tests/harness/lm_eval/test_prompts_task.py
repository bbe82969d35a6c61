"""The task `specrej_prompts`: any file of prompts in lm-eval, scored by the reward of the answers."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict
from support.lm_eval_command import OFFLINE, lm_eval_command

import specrej_eval
from specrej_eval import cli, demo, paths
from specrej_eval.core import Prompt, prompt_hash
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval.model import SpecRejLM
from specrej_eval.harness.lm_eval.requests import ScoredText
from specrej_eval.in_flight import Request

SUMS = ["12 + 34 = ?", "50 + 17 + 23 = ?", "99 + 11 = ?", "20 + 30 + 40 + 50 = ?", "64 + 64 = ?", "71 + 13 + 11 = ?"]
PROMPTS = [f"Q: {text}\nA:" for text in SUMS]
ARGUMENTS: dict[str, Any] = {"n": 4, "alpha": 0.5, "max_gen_toks": 40, "device": "cpu"}
TASK = "specrej_prompts"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip for all installed packages after each evaluation: more than a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.delenv("SPECREJ_PROMPTS", raising=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "kind": i}) + "\n" for i, text in enumerate(PROMPTS)))
    return path


def manager(*, include: Path | None = None, **metadata: Any) -> TaskManager:
    folder = str(include or paths.folder("tasks"))
    return TaskManager(include_defaults=False, include_path=folder, metadata={**ARGUMENTS, **metadata})


def evaluate(lm: HFLM, tasks: TaskManager, name: str = TASK, **options: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True, **options
    )
    assert results is not None
    return dict(results)


def samples(results: dict[str, Any], name: str = TASK) -> list[dict[str, Any]]:
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


# the metric


def test_the_metric_is_the_reward_that_load_gives(prompts: Path) -> None:
    """The same prompts, task and seed through `specrej_eval.load`, with nothing of lm-eval in between."""
    results = evaluate(SpecRejLM(**ARGUMENTS), manager(prompts=str(prompts)))
    generator = specrej_eval.load(**ARGUMENTS)
    requests = [
        Request(
            prompt=Prompt(
                token_ids=generator.engine.encode(text).token_ids,
                conversation=({"role": "user", "content": text},),
                prompt_hash=prompt_hash(text),
                task=TASK,
            ),
            config=generator.config,
            until=(),
        )
        for text in PROMPTS
    ]
    expected = dict(generator.run(requests, progress=False))
    found = samples(results)
    assert [sample["doc"]["instruction"] for sample in found] == PROMPTS
    for place, sample in enumerate(found):
        assert sample["resps"] == [[expected[place].text]]
        assert sample["reward"] == pytest.approx(expected[place].best.reward, abs=1e-6)
        assert sample["answer_tokens"] == expected[place].best.num_tokens
    rewards = [result.best.reward for result in expected.values()]
    scores = results["results"][TASK]
    assert scores["reward,none"] == pytest.approx(fmean(rewards), abs=1e-6)
    assert scores["answer_tokens,none"] == pytest.approx(fmean(r.best.num_tokens for r in expected.values()))
    assert results["config"]["specrej"]["mean_reward"] == pytest.approx(scores["reward,none"])
    assert results["higher_is_better"][TASK] == {"reward": True, "answer_tokens": None}


def test_our_sampling_arguments_hold_without_a_warning(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []  # by lm-eval, of do_sample without a temperature
    monkeypatch.setattr("lm_eval.models.utils.warning_once", lambda logger, message: said.append(message))
    lm = SpecRejLM(**ARGUMENTS, temperature=0.7)
    block = evaluate(lm, manager(prompts=str(prompts)), limit=1)["config"]["specrej"]
    assert block["warnings"] == []
    assert said == []
    assert block["per_task"][TASK]["greedy_overridden"] == 0
    assert block["per_task"][TASK]["resolved"]["temperature"] == 0.7


def test_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("instruction\n" + "\n".join(SUMS) + "\n")
    results = evaluate(SpecRejLM(**ARGUMENTS), manager(prompts=str(path)), apply_chat_template=True)
    assert [sample["arguments"][0][0] for sample in samples(results)] == PROMPTS  # what the template makes of them
    assert not results["config"]["specrej"]["warnings"]


def test_repeats_count_with_all_their_draws(prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(paths.folder("tasks"), tmp_path / "tasks")
    (tmp_path / "tasks" / "thrice.yaml").write_text("include: specrej_prompts.yaml\ntask: thrice\nrepeats: 3\n")
    lm = SpecRejLM(**ARGUMENTS)
    results = evaluate(lm, manager(include=tmp_path / "tasks", prompts=str(prompts)), "thrice", limit=3)
    found = samples(results, "thrice")
    assert all(len(sample["resps"][0]) == 3 for sample in found)
    for sample in found:
        assert sample["reward"] == pytest.approx(fmean(answer.reward for answer in sample["resps"][0]))
    assert results["results"]["thrice"]["reward,none"] == pytest.approx(
        results["config"]["specrej"]["mean_reward"], abs=1e-6
    )
    assert results["config"]["specrej"]["totals"]["requests"] == 9


def test_batch_size_changes_nothing(prompts: Path) -> None:
    one, many = (evaluate(SpecRejLM(**ARGUMENTS, batch_size=size), manager(prompts=str(prompts))) for size in (1, 6))
    assert one["results"] == many["results"]


def test_use_cache_keeps_the_rewards(prompts: Path, tmp_path: Path) -> None:
    cache, tasks = str(tmp_path / "cache"), manager(prompts=str(prompts))
    first = evaluate(SpecRejLM(**ARGUMENTS), tasks, use_cache=cache)
    again = SpecRejLM(**ARGUMENTS)
    second = evaluate(again, tasks, use_cache=cache)
    assert second["results"] == first["results"]
    assert again.tally.num_requests == 0
    assert samples(second)[0]["resps"][0][0].reward == samples(first)[0]["reward"]


def test_a_prompt_without_a_finite_reward_is_left_out_of_the_mean(prompts: Path) -> None:
    lm = SpecRejLM(**ARGUMENTS, reward_model=f"{__name__}:nan_for_long_questions", on_nan="drop")
    results = evaluate(lm, manager(prompts=str(prompts)))
    assert "reward" not in samples(results)[3]
    assert results["results"][TASK]["reward,none"] == pytest.approx(fmean([1.0] * 5))
    assert results["config"]["specrej"]["per_task"][TASK]["nan_rewards"] > 0


def nan_for_long_questions(conversation: list[dict[str, str]], responses: list[str]) -> list[float]:
    long = len(conversation[-1]["content"]) > 25
    return [float("nan") if long else 1.0 for _ in responses]


# what is wrong


def test_another_models_answers_have_no_reward(prompts: Path) -> None:
    hf = HFLM(pretrained=str(demo.POLICY_DIR), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"have none\.\n  hint: .*--model best_of_n --model_args n=1,"):
        evaluate(hf, manager(prompts=str(prompts)), limit=1, gen_kwargs="max_gen_toks=4")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"which prompts to read\.\n  hint: --metadata prompts=FILE .*SPECREJ_PROMPTS=FILE"),
        ({"prompts": "prompts.jsn"}, "from .json, .jsonl, .csv, .tsv files"),
        ({"prompts": "nowhere.csv"}, "there is no file 'nowhere.csv'"),
        ({"prompts": "prompts.jsonl", "prompt_column": "kind"}, "line 1: 'kind' must be a text"),
    ],
)
def test_one_error_for_what_is_wrong_with_the_file(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(prompts.parent)
    with pytest.raises(ConfigError, match=message):
        manager(**metadata).load([TASK])


def test_the_environment_names_the_file_where_metadata_does_not(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.json"
    other.write_text('["from metadata"]')
    monkeypatch.setenv("SPECREJ_PROMPTS", str(prompts))
    for tasks, expected in ((manager(), PROMPTS), (manager(prompts=str(other)), ["from metadata"])):
        task = tasks.load([TASK])["tasks"][TASK]
        assert [doc["instruction"] for doc in task.test_docs()] == expected


# answers that know their reward


@pytest.mark.parametrize("reward", [1.25, None])
def test_a_scored_text_is_a_string_that_keeps_its_reward(reward: float | None) -> None:
    answer = ScoredText("vierzig", reward, 7)
    assert answer == "vierzig" and hash(answer) == hash("vierzig") and json.dumps([answer]) == '["vierzig"]'
    for copied in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert isinstance(copied, ScoredText)
        assert (copied, copied.reward, copied.num_tokens) == ("vierzig", reward, 7)


def test_lm_eval_can_make_a_gold_answer_of_the_same_type() -> None:
    gold = type(ScoredText("40", 1.0, 2))("forty")  # what its exact_match does with a target
    assert gold == "forty" and gold.reward is None


def test_every_answer_of_our_model_is_scored() -> None:
    lm = SpecRejLM(**ARGUMENTS)
    request = Instance("generate_until", {}, (PROMPTS[0], {"do_sample": True}), 0, metadata=("toy", 0, 1))
    (answer,) = lm.generate_until([request])
    assert isinstance(answer, ScoredText)
    assert answer.reward == lm.tally.mean_reward and 0 < answer.num_tokens <= 40


# lm-eval's own command


@pytest.mark.slow
@pytest.mark.parametrize(
    "metadata", ['{"prompts": "prompts.csv"}', pytest.param("prompts=prompts.csv", marks=pytest.mark.full)]
)
def test_the_command_and_its_report(
    tmp_path: Path, few_tasks: Path, capsys: pytest.CaptureFixture[str], metadata: str
) -> None:
    (tmp_path / "prompts.csv").write_text("id,instruction\n" + "".join(f"{i},{text}\n" for i, text in enumerate(SUMS)))
    assert cli.main(["init", str(tmp_path)]) == 0
    capsys.readouterr()
    words = ["--model", "specrej", "--tasks", TASK, "--include_path", "tasks", "--metadata", metadata]
    words += ["--model_args", "n=4,max_gen_toks=40", "--apply_chat_template", "--log_samples", "--output_path", "out"]
    printed = lm_eval_command(*words, cwd=tmp_path, few_tasks=few_tasks).stdout
    assert "reward" in printed and "answer_tokens" in printed
    (path,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(path.read_text())["results"][TASK]
    (sampled,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rewards = [json.loads(line)["reward"] for line in sampled.read_text().splitlines()]
    assert len(rewards) == len(SUMS)
    assert scores["reward,none"] == pytest.approx(fmean(rewards))
    assert scores["reward_stderr,none"] == pytest.approx(stdev(rewards) / len(rewards) ** 0.5)

    assert cli.main(["report", str(tmp_path / "out"), "--format", "json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"reward", "answer_tokens"}
    assert rows["reward"]["value"] == scores["reward,none"] == pytest.approx(rows["reward"]["mean_reward"])
    assert rows["reward"]["stderr"] == scores["reward_stderr,none"]


@pytest.mark.full
def test_two_ranks_have_the_metric_of_one(tmp_path: Path, prompts: Path) -> None:
    """Seven documents: the second rank gets a padding copy, which must not count."""
    lines = prompts.read_text()
    prompts.write_text(lines + json.dumps({"prompt": "Q: 8 + 9 = ?\nA:", "kind": 6}) + "\n")
    words = ["--model", "specrej", "--tasks", TASK, "--include_path", str(paths.folder("tasks"))]
    words += ["--metadata", f"prompts={prompts.name}", "--model_args", "n=4,max_gen_toks=40", "--output_path", "out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lm_eval"]
    env = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*launch, *words, "--log_samples"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    two = json.loads(path.read_text())
    assert two["config"]["specrej"]["world_size"] == 2
    one = evaluate(SpecRejLM(n=4, max_gen_toks=40, device="cpu"), manager(prompts=str(prompts)))
    for metric in ("reward,none", "answer_tokens,none"):
        assert two["results"][TASK][metric] == pytest.approx(one["results"][TASK][metric], abs=1e-6)
    assert two["config"]["specrej"]["totals"]["requests"] == 7


def test_the_demo_task_is_loaded_without_advice_on_data_that_it_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="lm_eval.api.task"):
        get_task_dict(["specrej_arithmetic"], manager(include=paths.folder("tasks") / "specrej_arithmetic"))
        logging.getLogger("lm_eval.api.task").warning("another warning")
    assert "another warning" in caplog.text and "--metadata" not in caplog.text
