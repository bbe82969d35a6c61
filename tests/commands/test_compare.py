"""`specrej-eval compare` on the demo task: its cells, its numbers, what it refuses."""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.lm_eval_tasks import task
from support.page_runs import a_recorded_run

from specrej_eval import cli, paths
from specrej_eval.commands.compare import cells
from specrej_eval.commands.compare.sources import PromptFile
from specrej_eval.commands.report.page.data import Metric, read
from specrej_eval.commands.report.runs import find_runs
from specrej_eval.config import PromptArguments
from specrej_eval.core import Trajectory
from specrej_eval.evidence.methods import Method
from specrej_eval.harness.lm_eval.tasks import TaskPrompts
from specrej_eval.in_flight import InFlight
from specrej_eval.records import jsonl
from specrej_eval.records.outputs import OutputsFolder

GRID = ("--alpha", "0.5", "--n", "2,4", "--seeds", "0,1", "--device", "cpu")
TASK = ("--tasks", "specrej_arithmetic", "--limit", "5", "--resamples", "500")
TASK_ARGUMENTS = (*TASK, *GRID)


def compare(output: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["compare", "--output", str(output), *words]) == 0
    found: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of which most answers take their rows from the largest cell."""
    output = tmp_path_factory.mktemp("compare") / "grid"
    compare(output, *TASK_ARGUMENTS, "--timed", "2", "--score_every", "8", "--perplexity", "true")
    return output


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def raw(folder: Path, method: str, seed: int) -> list[dict[str, Any]]:
    """Results of a cell in the prompts' order, read without any code of ours."""
    cell = folder / "cells" / method / f"seed{seed}"
    lines = [json.loads(line) for line in (cell / "specrej_trajectories.jsonl").read_text().splitlines()]
    by_key = {line["key"]: line["result"] for line in lines if "key" in line}
    answers = [json.loads(line) for line in (cell / "specrej_outputs.jsonl").read_text().splitlines()]
    return [by_key[answer["key"]] for answer in sorted(answers, key=lambda answer: answer["index"])]


def rows_of(result: dict[str, Any]) -> list[Any]:
    kept = ("row", "token_ids", "text", "finish_reason", "rounds_survived")
    return [[row[name] for name in kept] for row in result["trajectories"]]


def best_row(result: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in result["trajectories"] if row["row"] == result["best"])


METHODS = ("bo2", "bo4", "spr_n2_a0.5", "spr_n4_a0.5")
PROBLEMS = 5


def answers_of(problems: int) -> list[str]:
    lines = (paths.folder("tasks") / "specrej_arithmetic" / "test.jsonl").read_text().splitlines()
    return [str(json.loads(line)["answer"]) for line in lines[:problems]]


def is_right(text: str, answer: str) -> float:
    found = re.findall(r"Answer: ?(-?[0-9]+)", text)
    return float(bool(found) and found[0] == answer)


# the numbers, from the raw records


@pytest.mark.slow
def test_every_number_agrees_with_a_recomputation_from_the_raw_records(folder: Path, report: dict[str, Any]) -> None:
    truth = answers_of(PROBLEMS)
    told = {method["name"]: method for method in report["methods"]}
    assert set(told) == {*METHODS}
    pool = {seed: raw(folder, "bo4", seed) for seed in (0, 1)}
    about = json.loads((folder / "specrej_compare.json").read_text())
    sizes = about["sizes"]
    for name in METHODS:
        method, own = told[name], {seed: raw(folder, name, seed) for seed in (0, 1)}
        both = [(result, whole) for seed in (0, 1) for result, whole in zip(own[seed], pool[seed], strict=True)]
        best = [best_row(result) for result, _ in both]
        assert method["reward"]["value"] == pytest.approx(np.mean([row["reward"] for row in best]))
        right = [is_right(row["text"], answer) for row, answer in zip(best, truth * 2, strict=True)]
        assert method["metrics"]["exact_match"]["value"] == pytest.approx(np.mean(right))
        for cost in ("decode_tokens", "reward_tokens", "prompt_tokens"):
            expected = np.mean([result["ledger"][cost] for result, _ in both])
            assert method["costs"][cost]["value"] == pytest.approx(expected), cost
        assert method["costs"]["decode_tokens"]["value"] == pytest.approx(
            np.mean([sum(len(row["token_ids"]) for row in result["trajectories"]) for result, _ in both])
        )
        assert method["costs"]["flops"]["value"] == pytest.approx(np.mean([operations(r, sizes) for r, _ in both]))
        kv = [max(round_["kv_tokens"] for round_ in result["rounds"]) for result, _ in both]
        assert method["costs"]["kv_tokens"]["value"] == pytest.approx(np.mean(kv))
        n = len(both[0][0]["trajectories"])
        bound = math.log(n) - (n - 1) / n if name.startswith("bo") else math.log(n)
        assert method["kl_bound"] == pytest.approx(bound)
        curve = np.mean([curve_of([row["reward"] for row in whole["trajectories"]]) for _, whole in both], axis=0)
        check_equivalent(method["equivalent_n"]["value"], method["reward"]["value"], curve)
        if name.startswith("spr"):
            finals = [[row["reward"] for row in whole["trajectories"][:n]] for _, whole in both]
            regrets = [max(ends) - ends[result["best"]] for (result, _), ends in zip(both, finals, strict=True)]
            assert method["regret"]["value"] == pytest.approx(np.mean(regrets), abs=1e-9)
            kept = [
                any(
                    end == max(ends) and row["finish_reason"] != "rejected"
                    for end, row in zip(ends, result["trajectories"], strict=True)
                )
                for (result, _), ends in zip(both, finals, strict=True)
            ]
            assert method["best_survived"]["value"] == pytest.approx(np.mean(kept))
            check_first_look(method["partial_scores"][0], both)
        nll = [-sum(whole["trajectories"][row["row"]]["logprobs"]) for (_, whole), row in zip(both, best, strict=True)]
        tokens = [len(row["token_ids"]) for row in best]
        assert method["perplexity"]["value"] == pytest.approx(math.exp(sum(nll) / sum(tokens)))
        smallest = {seed: raw(folder, "bo2", seed) for seed in (0, 1)}
        scores = []
        for seed in (0, 1):
            for result, small in zip(own[seed], smallest[seed], strict=True):
                z = [row["reward"] for row in small["trajectories"]]
                part = (max(z) - best_row(result)["reward"]) / (max(z) - min(z)) if max(z) > min(z) else math.nan
                scores.append((1 - part) * 100)
        if not np.isnan(scores).any():
            assert method["paper"]["improvement_score"]["value"] == pytest.approx(np.mean(scores), rel=1e-6)


def operations(result: dict[str, Any], sizes: dict[str, int]) -> float:
    prompt, rows = result["ledger"]["prompt_tokens"], [len(row["token_ids"]) for row in result["trajectories"]]
    read = sum(range(1, prompt + 1)) + sum(prompt + step for tokens in rows for step in range(1, tokens + 1))
    tokens = prompt + sum(rows)
    per_token = 4 * sizes["layers"] * sizes["attention_width"]
    reward = 2 * sizes["reward_parameters"] * result["ledger"]["reward_tokens"]
    return 2.0 * sizes["parameters"] * tokens + per_token * read + reward


def curve_of(rewards: list[float]) -> list[float]:
    n = len(rewards)
    return [
        float(np.mean([max(rewards[place] for place in rows) for rows in itertools.combinations(range(n), k)]))
        for k in range(1, n + 1)
    ]


def check_equivalent(found: Any, reward: float, curve: np.ndarray[Any, Any]) -> None:
    if reward < curve[0] - 1e-9:
        assert found == {"below": 1}
    elif reward > curve[-1] + 1e-6:
        assert found == {"at_least": len(curve)}
    elif isinstance(found, float):
        assert np.interp(math.log(found), np.log(np.arange(1, len(curve) + 1)), curve) == pytest.approx(
            reward, abs=1e-5
        )


def check_first_look(told: dict[str, Any], both: list[Any]) -> None:
    pearsons = []
    for result, whole in both:
        pairs = [
            (row["look_scores"][0][1], whole["trajectories"][row["row"]]["reward"])
            for row in result["trajectories"]
            if len(row["look_scores"]) > 1 or row["finish_reason"] == "rejected"
        ]
        early, late = zip(*pairs, strict=True) if len(pairs) > 1 else ((), ())
        if len(set(early)) > 1 and len(set(late)) > 1:
            pearsons.append(np.corrcoef(early, late)[0, 1])
    assert told["look"] == 1 and told["pearson"]["mean"] == pytest.approx(np.mean(pearsons))


@pytest.mark.slow
def test_differences_are_paired_and_the_curve_is_that_of_all_subsets(folder: Path, report: dict[str, Any]) -> None:
    told = {method["name"]: method for method in report["methods"]}
    assert report["baseline"] == "bo4" and told["bo4"]["against"] == []
    found = next(each for each in told["spr_n2_a0.5"]["against"] if each["method"] == "bo2")
    assert found["is"] == "same_n"
    gaps = [
        ours["reward"][place] - theirs["reward"][place]
        for ours, theirs in zip(told["spr_n2_a0.5"]["cells"], told["bo2"]["cells"], strict=True)
        for place in range(PROBLEMS)
    ]
    assert found["scores"]["reward"]["value"] == pytest.approx(np.mean(gaps))
    assert found["scores"]["reward"]["low"] <= np.mean(gaps) <= found["scores"]["reward"]["high"]
    ratio = told["spr_n2_a0.5"]["costs"]["decode_tokens"]["value"] / told["bo2"]["costs"]["decode_tokens"]["value"]
    assert found["cost_ratios"]["decode_tokens"]["value"] == pytest.approx(ratio)
    truth = answers_of(PROBLEMS)
    rewards, rights = [], []
    for seed in (0, 1):
        for result, answer in zip(raw(folder, "bo4", seed), truth, strict=True):
            rows = [(row["reward"], is_right(row["text"], answer)) for row in result["trajectories"]]
            rewards.append(curve_of([reward for reward, _ in rows]))
            rights.append([np.mean([max(some)[1] for some in itertools.combinations(rows, k)]) for k in range(1, 5)])
    curve = report["curve"]
    assert curve["ks"] == [1, 2, 3, 4] and curve["pool"] == "bo4"
    assert [each["value"] for each in curve["reward"]] == pytest.approx(np.mean(rewards, axis=0))
    assert [each["value"] for each in curve["metrics"]["exact_match"]] == pytest.approx(
        np.mean(rights, axis=0), abs=0.05
    )


# rows of another cell stand for decoded ones


@pytest.mark.slow
def test_answers_made_of_another_cells_rows_are_those_of_a_real_decode(
    folder: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    real = compare(tmp_path / "real", *TASK_ARGUMENTS, "--timed", "all")
    made = 0
    for method, seed in itertools.product(METHODS, (0, 1)):
        ours, theirs = raw(folder, method, seed), raw(tmp_path / "real", method, seed)
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            made += "rows_from" in one["resolved"]
            assert ("rows_from" in one["resolved"]) == (method != "bo4" and place >= 2)
            assert "rows_from" not in other["resolved"]
            assert rows_of(one) == rows_of(other) and one["best"] == other["best"] and one["rounds"] == other["rounds"]
            if method != "bo4":  # that one was scored in between, too
                assert [row["look_scores"] for row in one["trajectories"]] == [
                    row["look_scores"] for row in other["trajectories"]
                ]
            drop = ("seconds", "peak_bytes")
            assert {k: v for k, v in one["ledger"].items() if k not in drop} == {
                k: v for k, v in other["ledger"].items() if k not in drop
            }
    assert made == 3 * 2 * (PROBLEMS - 2)
    for ours_, theirs_ in zip(report["methods"], real["methods"], strict=True):
        for name in ("name", "reward", "metrics", "costs", "kl_bound", "equivalent_n", "z_score"):
            assert ours_.get(name) == theirs_.get(name), name
        for name in ("regret", "best_survived", "partial_scores"):
            assert ours_.get(name) == theirs_.get(name), name
        whole_cell = ours_["name"] == "bo4"
        assert theirs_["time"]["prompts"] == PROBLEMS and ours_["time"]["prompts"] == (PROBLEMS if whole_cell else 2)
        for cell in ours_["cells"]:
            known = [seconds is not None for seconds in cell["seconds"]]
            assert known == [whole_cell or place < 2 for place in range(PROBLEMS)]


@pytest.mark.slow
def test_rows_that_differ_from_the_pools_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = cells.Decoder.use_as_pool

    def edited(self: cells.Decoder, place: cells.Place) -> None:
        honest(self, place)
        for result in self._pools[place.seed].values():
            result.trajectories[0].token_ids[0] += 1

    monkeypatch.setattr(cells.Decoder, "use_as_pool", edited)
    found = compare(
        tmp_path / "c", *TASK[:2], "--limit", "3", "--n", "2,3", "--alpha", "0.5", "--timed", "1", "--resamples", "100"
    )
    assert all(method["time"]["prompts"] == 3 for method in found["methods"])
    assert "rows decoded for it differ from those of Best-of-3" in caplog.text


@pytest.mark.slow
def test_a_cell_has_the_rows_of_the_same_run_inside_lm_eval(folder: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    journal = tmp_path / "run.jsonl"
    lm_eval.simple_evaluate(
        model="specrej",
        model_args=f"alpha=0.5,n=4,seed=1,device=cpu,journal={journal}",
        tasks=["specrej_arithmetic"],
        task_manager=TaskManager(include_path=str(paths.folder("tasks")), include_defaults=False),
        limit=3,
        bootstrap_iters=0,
    )
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    theirs = {line["result"]["prompt_hash"]: line["result"] for line in lines if "key" in line}
    ours = raw(folder, "spr_n4_a0.5", 1)[:3]
    assert [rows_of(result) for result in ours] == [rows_of(theirs[result["prompt_hash"]]) for result in ours]


# going on


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_and_comes_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", "specrej_arithmetic", "--limit", "2", "--resamples", "100", "--n", "2,4", "--device", "cpu")
    words = (*words, "--alpha", "0.5", "--timed", "1")
    report, output = compare(tmp_path / "whole", *words), tmp_path / "again"
    honest, count = InFlight.follow, itertools.count()

    def dies(self: InFlight, *args: Any) -> bool:
        if next(count) == 5:
            raise KeyboardInterrupt
        return honest(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(InFlight, "follow", dies)
        assert cli.main(["compare", "--output", str(output), *words]) != 0
    assert not (output / "comparison.json").exists(), "nothing is written half"
    kept = sum(len(OutputsFolder(path.parent).answers()) for path in output.rglob("specrej_run.json"))
    assert kept > 0
    again = compare(output, *words)
    assert without_time(again) == without_time(report)
    # complete: no model is loaded, and the very same bytes come out
    before = (output / "comparison.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(cells.Decoder, "decode", _never)
        compare(output, *words)
    assert (output / "comparison.json").read_bytes() == before


def _never(*_: Any) -> None:
    raise AssertionError("nothing was left to decode")


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    """Everything but seconds and memory, and what is made of them."""
    timed = {"time", "seconds", "relative_compute", "speedup", "hardware"}

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walk(each) for name, each in value.items() if name not in timed}
        return [walk(each) for each in value] if isinstance(value, list) else value

    found: dict[str, Any] = walk(report)
    return found


# what else reads it


@pytest.mark.slow
def test_cells_are_runs_to_report_and_replay(
    folder: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(folder / "cells")]) == 0
    shown = capsys.readouterr().out
    assert "Speculative Rejection, alpha=0.5, n=4, seed=1" in shown
    assert f"{PROBLEMS - 2} answers were made of another run's rows: no seconds" in shown
    pool = str(folder / "cells" / "bo4" / "seed0")
    assert cli.main(["replay", pool, "--alpha", "0.5", "--n", "2,4", "--format", "json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    told = {method["name"]: method for method in report["methods"]}
    for method in replayed["methods"]:
        if method["strategy"] == "best_of_n":
            cell = told[method["name"]]["cells"][0]
            assert method["cells"][0]["best_row"] == cell["best_row"] and method["cells"][0]["reward"] == pytest.approx(
                cell["reward"], abs=1e-5
            )
            assert method["cells"][0]["metrics"] == cell["metrics"], "what the task said of those rows"
        assert method["simulated"] is True and method["time"] is None
        assert method["metrics"].keys() == {"exact_match"}
    assert [each["value"] for each in replayed["curve"]["metrics"]["exact_match"]] == pytest.approx(
        best_of_k_by_hand(folder), abs=0.05
    )
    voted = ["replay", pool, "--strategy", "best_of_n", "--n", "4", "--selector", "median", "--format", "json"]
    assert cli.main(voted) == 0
    by_median = json.loads(capsys.readouterr().out)["methods"][0]
    truth = zip(raw(folder, "bo4", 0), by_median["cells"][0]["best_row"], answers_of(PROBLEMS), strict=True)
    assert by_median["cells"][0]["metrics"]["exact_match"] == [
        is_right(result["trajectories"][row]["text"], answer) for result, row, answer in truth
    ]


def best_of_k_by_hand(folder: Path) -> list[float]:
    """Accuracy of the best of k of the four rows of seed 0, over all subsets."""
    found = []
    for result, answer in zip(raw(folder, "bo4", 0), answers_of(PROBLEMS), strict=True):
        rows = [(row["reward"], is_right(row["text"], answer)) for row in result["trajectories"]]
        found.append([np.mean([max(some)[1] for some in itertools.combinations(rows, k)]) for k in range(1, 5)])
    return [float(each) for each in np.mean(found, axis=0)]


@pytest.mark.slow
def test_the_table_is_printed_and_written_as_markdown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*TASK_ARGUMENTS, "--timed", "2", "--score_every", "8", "--perplexity", "true")
    assert cli.main(["compare", "--output", str(folder), *words, "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown == (folder / "comparison.md").read_text()
    for text in (
        "| Best-of-4 |",
        "exact\\_match" if "exact\\_match" in shown else "exact_match",
        "KL",
        "improvement score",
    ):
        assert text in shown
    for line in shown.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")


@pytest.mark.slow
def test_a_file_of_prompts_is_compared_with_the_rows_of_run(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["Q: 12 + 45 = ?", "Q: 11 + 12 + 13 = ?", "Say something."]))
    common = ("--prompts", str(prompts), "--max_gen_toks", "24", "--device", "cpu", "--n", "3")
    found = compare(tmp_path / "c", *common, "--alpha", "0.5", "--resamples", "200")
    assert found["task"] == {"kind": "prompts", "name": "prompts.json"}
    assert [method["metrics"] for method in found["methods"]] == [{}, {}]
    assert [prompt["instruction"] for prompt in found["prompts"]] == json.loads(prompts.read_text())
    assert cli.main(["run", *common, "--alpha", "0.5", "--output", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "specrej_trajectories.jsonl").read_text().splitlines()]
    theirs = {line["result"]["prompt_hash"]: line["result"] for line in lines if "key" in line}
    for result in raw(tmp_path / "c", "spr_n3_a0.5", 0):
        assert rows_of(result) == rows_of(theirs[result["prompt_hash"]])


@pytest.mark.slow
def test_a_win_rate_is_the_mean_preference_of_the_judge_equal_answers_count_half(folder: Path, tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "grid"
    shutil.copytree(folder, output)  # all cells are there
    words = (*TASK_ARGUMENTS, "--timed", "2", "--score_every", "8", "--perplexity", "true")
    found = compare(output, *words, "--annotators", "specrej_reward_judge")
    told = {method["name"]: method for method in found["methods"]}
    assert "win_rate" not in told["bo4"], "the baseline itself"
    for name in ("bo2", "spr_n2_a0.5", "spr_n4_a0.5"):
        expected = []
        for seed in (0, 1):
            for ours, theirs in zip(raw(folder, name, seed), raw(folder, "bo4", seed), strict=True):
                best, other = best_row(ours), best_row(theirs)
                # the judge is the run's own reward model: its preference is the sigmoid of the difference
                expected.append(
                    0.5 if best["text"] == other["text"] else 1 / (1 + math.exp(other["reward"] - best["reward"]))
                )
        win_rate = told[name]["win_rate"]
        assert win_rate["value"] == pytest.approx(np.mean(expected), abs=1e-3)
        assert win_rate["against"] == "bo4" and win_rate["prompts"] == PROBLEMS
        assert len(told[name]["cells"][0]["preferred"]) == PROBLEMS
    # the page of the cells has them too, in per cent
    metric = Metric("specrej_arithmetic", "win_rate", "specrej_reward_judge, against bo4")
    shown = {method.run.path.parts[-2:]: method.each(metric) for method in read(find_runs(output / "cells")).methods}
    assert not shown["bo4", "seed0"] and not shown["bo4", "seed1"]
    for name, place in itertools.product(("bo2", "spr_n2_a0.5", "spr_n4_a0.5"), (0, 1)):
        preferred = told[name]["cells"][place]["preferred"]
        assert [*shown[name, f"seed{place}"].values()] == pytest.approx([100 * each for each in preferred])
    again = compare(output, *words, "--annotators", "specrej_reward_judge")
    assert [method.get("win_rate") for method in again["methods"]] == [m.get("win_rate") for m in found["methods"]]


# refused, before any model is loaded


def bad_task(tmp_path: Path) -> str:
    (tmp_path / "choice.yaml").write_text(
        "task: pick_one\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: x.json\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "x.json").write_text('{"q": "?"}\n')
    text = (tmp_path / "choice.yaml").read_text().replace("x.json", str(tmp_path / "x.json"))
    (tmp_path / "choice.yaml").write_text(text)
    return str(tmp_path)


REFUSED: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda _: [*TASK, "--n", ""], "--n is empty"),
    (lambda _: [*TASK, "--alpha", " , "], "--alpha is empty"),
    (lambda _: [*TASK, "--strategy", ""], "--strategy is empty"),
    (lambda _: [*TASK, "--seeds", ","], "--seeds is empty"),
    (lambda _: [*TASK, "--alpha", "0.5,1.5"], "alpha must be in"),
    (lambda _: [*TASK, "--n", "max"], "differs from machine to machine"),
    (lambda _: [*TASK, "--seeds", "0,x"], "seed must be a whole number"),
    (lambda _: [*TASK, "--strategy", "bestofn"], "Did you mean 'best_of_n'"),
    (lambda _: [*TASK, "--baseline", "bo7"], "no method is called 'bo7'"),
    (lambda _: [*TASK, "--timed", "0"], "--timed must be at least 1"),
    (lambda _: [*TASK[:2], "--limit", "0"], "--limit must be at least 1"),
    (lambda _: [*TASK, "--annotators", "specrej_reward_juge"], "specrej_reward_judge"),
    (lambda _: [*TASK, "--perplexity", "true", "--strategy", "speculative_rejection"], "needs best_of_n in the grid"),
    (lambda _: [*TASK, "--resamples", "3"], "--resamples must be at least 100"),
    (lambda _: [*TASK, "--plan", "only"], "plan=only plans one run"),
    (lambda _: [*TASK, "--seed", "3"], "did you mean --seeds"),
    (lambda _: [*TASK, "--pretrained", "/nowhere/at/all"], "/nowhere/at/all"),
    (lambda _: [*TASK, "--first_look", "1", "--kv_budget_tokens", "9"], "contradict each other"),
    (lambda _: [], "give either --tasks or --prompts"),
    (lambda tmp: ["--tasks", "a", "--prompts", str(tmp)], "are two things"),
    (lambda _: [*TASK, "--until", "x"], "--until is the task's to say"),
    (lambda tmp: ["--prompts", str(tmp / "none.csv")], "none.csv"),
]


OF_LM_EVAL: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda _: ["--tasks", "specrej_arithmetics"], "Did you mean 'specrej_arithmetic'"),
    (lambda tmp: ["--tasks", "pick_one", "--include_path", bad_task(tmp)], "its output_type is multiple_choice"),
]
"""lm-eval reads all of its tasks for these."""


@pytest.mark.usefixtures("few_tasks_here")
@pytest.mark.parametrize(
    "words, told",
    [*REFUSED, *(pytest.param(*each, marks=pytest.mark.slow) for each in OF_LM_EVAL)],
    ids=[told for _, told in [*REFUSED, *OF_LM_EVAL]],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(
    words: Callable[[Path], list[str]],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells.Decoder, "decode", _never)
    output = tmp_path / "out"
    assert cli.main(["compare", "--output", str(output), *words(tmp_path)]) != 0
    shown = capsys.readouterr().err
    assert told in shown and "Traceback" not in shown
    assert not output.exists(), "nothing is written"


@pytest.mark.slow
def test_a_folder_of_other_models_prompts_or_a_newer_version_is_refused_untouched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TASK_ARGUMENTS, "--timed", "2", "--score_every", "8", "--perplexity", "true"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(cells.Decoder, "decode", _never)
    for other, told in (
        (["--temperature", "0.7"], "temperature was 1.0, is now 0.7"),
        (["--reward_model", "likelihood"], "reward_model"),
        (["--system_instruction", "Be brief."], "system_instruction"),
    ):
        assert cli.main(["compare", "--output", str(folder), *words, *other]) != 0
        shown = capsys.readouterr().err
        assert told in shown and "cannot be paired" in shown
    prompts = tmp_path / "other.json"
    prompts.write_text(json.dumps(["Q: 1 + 2 = ?"]))
    assert cli.main(["compare", "--output", str(folder), "--prompts", str(prompts), *GRID]) != 0
    assert "cannot be paired" in capsys.readouterr().err
    cell = folder / "cells" / "bo4" / "seed0"
    for file in (
        *(cell / name for name in ("specrej_run.json", "specrej_metrics.json", "specrej_preferences.json")),
        *(folder / name for name in ("comparison.json", "specrej_compare.json")),
    ):
        newer = json.loads(before.get(file, b"{}"))
        file.write_text(jsonl.as_text({**newer, "schema_version": 99}))
        try:
            assert cli.main(["compare", "--output", str(folder), *words]) != 0
            told = capsys.readouterr().err
            assert "newer version" in told and file.name in told and "Traceback" not in told
        finally:
            file.write_bytes(before[file]) if file in before else file.unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


class Scored(PromptFile):
    """Prompts with a metric of their own."""

    asked_for = 0
    way = "a"

    def metrics(self, rows: Sequence[Trajectory]) -> dict[str, list[float]]:
        self.asked_for += 1
        self.higher_is_better["length"] = True
        return {"length": [float(len(row.text)) for row in rows]}

    def scored_by(self) -> str:
        return self.way


def test_metrics_on_file_are_taken_only_for_the_very_texts_and_the_way_they_are_of(tmp_path: Path) -> None:
    place = cells.Place(Method("best_of_n", 6), 0, tmp_path)
    a_recorded_run(tmp_path / place.below, ["one", "two"], rejects=False)
    source = Scored("p.csv", PromptArguments(), [])

    def asked_for(*, is_pool: bool) -> int:
        before = source.asked_for
        cell = cells.read_cell(place, source, is_pool=is_pool)
        assert cell.metrics == {"length": [len("row 0 of seed 0")] * 2} and source.higher_is_better == {"length": True}
        assert not is_pool or cell.row_metrics == {"length": [[len("row 0 of seed 0")] * 6] * 2}
        return source.asked_for - before

    file = place.store.path / "specrej_metrics.json"
    assert [asked_for(is_pool=False), asked_for(is_pool=False)] == [1, 0]
    assert [asked_for(is_pool=True), asked_for(is_pool=True), asked_for(is_pool=False)] == [7, 0, 0]
    source.way = "b"  # another answer is right by now
    assert [asked_for(is_pool=True), asked_for(is_pool=True)] == [7, 0]
    whole = json.loads(file.read_text())
    for broken in ("", "[]", "{", *(json.dumps({**whole, name: "x"}) for name in ("of", "scored_by", "best", "rows"))):
        file.write_text(broken)
        assert [asked_for(is_pool=True), asked_for(is_pool=True)] == [7, 0]
    file.write_text(json.dumps({**whole, "best": {"length": [1.0]}}))
    assert asked_for(is_pool=True) == 7, "one number for two prompts"


def test_what_a_task_holds_right_decides_its_scores() -> None:
    from lm_eval.tasks import TaskManager

    def scored_by(**changes: Any) -> str:
        questions = changes.pop("questions", None)
        loaded = TaskManager(include_defaults=False).load([task(questions=questions, **changes)])["tasks"]
        prompts = TaskPrompts(loaded)
        prompts.questions()
        return prompts.scored_by()

    assert scored_by() == scored_by()
    other = {"metric_list": [{"metric": "exact_match", "ignore_case": True}]}
    assert len({scored_by(), scored_by(doc_to_target="no"), scored_by(questions=["Why?"]), scored_by(**other)}) == 4


# limits


@pytest.mark.full
def test_limits_hold_for_all_cells_together_and_the_comparison_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, warmed = cells._warm_up, itertools.count()
    monkeypatch.setattr(cells, "_warm_up", lambda *args: (next(warmed), honest(*args)))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["Q: 12 + 45 = ?", "Q: 11 + 12 + 13 = ?", "Q: 7 + 70 = ?"]))
    grid = ("--prompts", str(prompts), "--max_gen_toks", "16", "--device", "cpu", "--n", "3", "--alpha", "0.5")
    words = (*grid, "--batch_size", "1", "--timed", "2", "--resamples", "100")
    whole = compare(tmp_path / "whole", *words)
    assert next(warmed) == 1, "once, and in no number"
    first = sum(result["ledger"]["decode_tokens"] for result in raw(tmp_path / "whole", "bo3", 0))
    output = tmp_path / "c"
    limited = ["compare", "--output", str(output), *words, "--max_decode_tokens", str(first + 1)]
    capsys.readouterr()
    assert cli.main(limited) == 75
    told = " ".join(capsys.readouterr().err.split())
    assert f"max_decode_tokens={first + 1} is reached: 1 of 2 cells are complete" in told and "same command" in told
    assert not (output / "comparison.json").exists()
    records = [OutputsFolder(output / "cells" / name / "seed0").record() for name in ("bo3", "spr_n3_a0.5")]
    assert [(record.complete, record.stopped) for record in records if record is not None] == [
        (True, ""),
        (False, f"max_decode_tokens={first + 1}"),
    ]
    assert len(OutputsFolder(output / "cells" / "spr_n3_a0.5" / "seed0").answers()) == 1
    gc.collect()  # in a process of its own, the run would have given its lock up by now
    assert cli.main(["status", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "bo3/seed0: complete, 3 answers" in shown
    assert f"spr_n3_a0.5/seed0: stopped by max_decode_tokens={first + 1}, 1 of 2 answers" in shown
    assert cli.main(limited) == 0, "what rows from records would have taken is no decoding"
    assert without_time(json.loads((output / "comparison.json").read_text())) == without_time(whole)


# the whole of it


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_papers_grid_on_200_problems(tmp_path: Path) -> None:
    """The command of docs/compare.md: 200 problems, nine alphas, n 8, 16 and 32, three seeds.

    On two quiet cores it is to stay below half an hour; pytest's --durations says how long it took.
    """
    output = tmp_path / "grid"
    alphas = ",".join(f"0.{tenth}" for tenth in range(1, 10))
    found = compare(
        output,
        "--tasks",
        "specrej_arithmetic",
        "--limit",
        "200",
        "--alpha",
        alphas,
        "--n",
        "8,16,32",
        "--seeds",
        "0,1,2",
    )
    assert len(found["methods"]) == 30 and len(found["prompts"]) == 200 and found["seeds"] == [0, 1, 2]
    truth = answers_of(200)
    for method in found["methods"]:
        assert method["time"]["prompts"] >= 20
        rewards, right, tokens = [], [], []
        for seed in (0, 1, 2):
            for result, answer in zip(raw(output, method["name"], seed), truth, strict=True):
                best = best_row(result)
                rewards.append(best["reward"])
                right.append(is_right(best["text"], answer))
                tokens.append(sum(len(row["token_ids"]) for row in result["trajectories"]))
        assert method["reward"]["value"] == pytest.approx(np.mean(rewards))
        assert method["metrics"]["exact_match"]["value"] == pytest.approx(np.mean(right))
        assert method["costs"]["decode_tokens"]["value"] == pytest.approx(np.mean(tokens))
