"""`specrej-eval report`: one table of runs of every kind, and paired differences where prompts are the same."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from support import ROOT
from support.run_folders import a_run, an_answer

from specrej_eval import cli
from specrej_eval.commands import report as summary


def arguments(**changes: Any) -> dict[str, Any]:
    return {"strategy": "speculative_rejection", "alpha": 0.5, "n": 16, "seed": 0} | changes


def write_results(
    folder: Path,
    *,
    date: float,
    resolved: dict[str, Any] | None = None,
    scores: dict[str, dict[str, Any]] | None = None,
    limit: float | None = None,
    warnings: tuple[str, ...] = (),
    hardware: Any = "4 cores",
    rejected: int = 30,
    whole: int = 4,
    samples: list[float] | None = None,
) -> Path:
    """One results file with the fields of lm-eval 0.4.13 that matter here, and our own block."""
    config: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": "x"}, "limit": limit}
    if resolved is not None:
        config |= {"model": "specrej", "model_args": {}}
        config["specrej"] = {
            "arguments": resolved,
            "totals": {
                "requests": 4,
                "prompt_tokens": 100,
                "decode_tokens": 12345,
                "reward_tokens": 6789,
                "reward_calls": 8,
                "rows_started": 60,
                "rows_finished": 60 - rejected,
                "rows_rejected": rejected,
                "seconds": {"prefill": 0.5, "decode": 2.0, "reward": 1.0, "other": 0.25},
                "peak_bytes": 1,
            },
            "mean_reward": 1.5,
            "hardware": hardware,
            "warnings": list(warnings),
        }
    content = {
        "results": scores
        or {"sums": {"alias": "sums", "exact_match,none": 0.75, "exact_match_stderr,none": 0.25, "sample_len": 4}},
        "config": config,
        "n-samples": {"sums": {"original": whole, "effective": 4}},
        "date": date,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"2026-11-28T20-00-{date}"
    path = folder / f"results_{stamp}.json"
    path.write_text(json.dumps(content))
    lines = [
        {
            "doc_id": i,
            "prompt_hash": f"p{i}",
            "target_hash": "t",
            "filter": "none",
            "metrics": ["exact_match"],
            "exact_match": value,
        }
        for i, value in enumerate(samples or [])
    ]
    if samples is not None:
        (folder / f"samples_sums_{stamp}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["report", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_report_shows_scores_and_costs_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "brave-otter", date=1.0, resolved=arguments())
    write_results(tmp_path / "n1" / "calm-newt", date=2.0, resolved=arguments(strategy="best_of_n", n=1), rejected=0)
    write_results(tmp_path / "n16" / "shy-crow", date=3.0, resolved=arguments(strategy="best_of_n"), rejected=0)
    lines = report(capsys, tmp_path).splitlines()
    assert lines[0].split("  ")[0] == "run" and "exact_match ± stderr" in lines[0]
    assert [line.partition("   ")[0].strip() for line in lines[2:5]] == [
        "Speculative Rejection, alpha=0.5, n=16",
        "Sampling, n=1",
        "Best-of-N, n=16",
    ]
    assert lines[2].split()[-11:] == [
        "0.7500",
        "±",
        "0.2500",
        "4",
        "1.500",
        "12,345",
        "6,789",
        "50.0%",
        "3.8",
        "27%",
        "A",
    ]
    assert lines[3].split()[-4] == "0.0%"
    assert "machine A: 4 cores" in lines


def test_report_counts_only_the_newest_of_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval makes up a new folder name for every run that is given no `pretrained`."""
    new = {"sums": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}
    write_results(tmp_path / "newer", date=2.0, resolved=arguments(), scores=new)
    write_results(tmp_path / "older", date=1.0, resolved=arguments(trace_path="elsewhere.jsonl"))
    text = report(capsys, tmp_path)
    assert "0.5000 ± 0.1000" in text and "0.7500" not in text


def test_report_tells_apart_runs_that_would_share_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(seed=0))
    write_results(tmp_path, date=2.0, resolved=arguments(seed=1))
    text = report(capsys, tmp_path)
    assert "n=16, seed=0" in text and "n=16, seed=1" in text


def test_runs_in_folders_side_by_side_are_told_apart_by_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [a_run(tmp_path / name, [an_answer("a"), an_answer("b")]) for name in ("one", "two")]
    assert cli.main(["report", *folders]) == 0
    told = capsys.readouterr().out
    assert f"({tmp_path / 'one'})" in told and f"({tmp_path / 'two'})" in told


def test_report_names_metrics_filters_and_tasks_where_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "sums": {"exact_match,strict": 0.25, "exact_match,loose": 0.5, "exact_match_stderr,strict": "N/A"},
        "words": {"bleu,none": 12.0},
    }
    write_results(tmp_path, date=1.0, resolved=arguments(), scores=scores)
    text = report(capsys, tmp_path, "--format", "markdown")
    assert text.startswith("| run ") and text.splitlines()[1].endswith("-: |")
    for word in ("sums", "words", "strict", "loose", "exact_match", "bleu", "12.0000"):
        assert word in text
    assert text.count("12,345") == 1, "what a run cost is said once"


def test_report_shows_a_run_of_another_model_without_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0)
    assert report(capsys, tmp_path).splitlines()[2].split() == ["hf", "0.7500", "±", "0.2500", "4", *"-------"]


def test_report_warns_of_what_makes_runs_incomparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(), limit=2.0, warnings=("greedy task was sampled",))
    write_results(tmp_path, date=2.0, resolved=arguments(alpha=0.25), hardware={"device": "gpu", "memory_gib": 80})
    text = report(capsys, tmp_path)
    assert "their seconds do not compare" in text
    assert "not scores of the whole task" in text
    assert "warning: greedy task was sampled (Speculative Rejection, alpha=0.5, n=16)" in text
    assert "machine B: device=gpu, memory_gib=80" in text
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["A", "B"], "each row names its machine"


def test_report_as_json_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments())
    (row,) = json.loads(report(capsys, tmp_path, "--format", "json"))
    assert (row["value"], row["stderr"], row["rejected_share"], row["seconds"]) == (0.75, 0.25, 0.5, 3.75)
    assert row["scoring_share"] == 1 / 3.75


def test_report_passes_over_files_that_are_not_results(tmp_path: Path) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments())
    (tmp_path / "half.json").write_text('{"results": {"su')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "other.json").write_text('{"results": {}, "config": null}')
    assert len(summary.find_runs(tmp_path)) == 1


def test_report_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "--output_path" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


# --- what was limited, folders of other kinds, other formats ---


def test_report_says_of_every_row_how_many_prompts_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(), whole=1200, limit=4.0)
    write_results(tmp_path, date=2.0, resolved=arguments(alpha=0.25))
    first, second = report(capsys, tmp_path).splitlines()[2:4]
    assert "4 of 1,200" in first and " of " not in second


def a_judged_run(folder: Path, name: str, preferences: list[float], **fingerprint: Any) -> None:
    """What alpaca_eval leaves with our decoder: our own records, and a judge's folder beside them."""
    answers = [an_answer(f"q{i}", reward=float(i), index=i) for i in range(len(preferences))]
    a_run(folder, answers, name=name, **fingerprint)
    record = json.loads((folder / "specrej_run.json").read_text())
    del record["arguments"]["prompts"]
    (folder / "specrej_run.json").write_text(json.dumps(record))
    judge = folder / "a_judge"
    judge.mkdir()
    mean = sum(preferences) / len(preferences) * 100 - 100
    (judge / "leaderboard.csv").write_text(
        f",win_rate,standard_error,mode,n_total,length_controlled_winrate,lc_standard_error\n"
        f"somebody,1.0,1.0,verified,805,1.0,1.0\n{name},{mean},2.5,community,{len(preferences)},{mean + 1},\n"
    )
    rows = [
        {"instruction": f"q{i}", "output_1": "ref", "generator_2": name, "preference": value}
        for i, value in enumerate(preferences)
    ]
    (judge / "annotations.json").write_text(json.dumps(rows))


def test_report_reads_folders_of_every_kind_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "lm", date=1.0, resolved=arguments())
    a_run(tmp_path / "run", [an_answer("one", reward=1.0), an_answer("two", reward=4.0)], name="mine")
    a_judged_run(tmp_path / "alpaca" / "spr", "spr", [2.0, 1.0, 1.5, 2.0])
    table = json.loads(report(capsys, tmp_path, "--format", "json"))
    assert [(row["kind"], row["task"], row["metric"], row["prompts"]) for row in table] == [
        ("lm-eval", "sums", "exact_match", 4),
        ("run", "p.csv", "reward", 2),
        ("alpaca_eval", "alpaca_eval", "reward", 4),
        ("alpaca_eval", "alpaca_eval", "win_rate", 4),
        ("alpaca_eval", "alpaca_eval", "length_controlled_winrate", 4),
    ]
    of_run, of_judge = table[1], table[3]
    assert (of_run["value"], of_run["mean_reward"]) == (2.5, 2.5)
    assert of_run["stderr"] == pytest.approx(1.5)
    assert (of_run["n"], of_run["alpha"], of_run["strategy"]) == (4, None, "best_of_n")
    assert of_run["models"] == {"pretrained": "org/policy", "reward_model": "org/judge"}
    assert (of_run["decode_tokens"], of_run["seconds"]) == (80, 1.0)
    assert (of_judge["value"], of_judge["stderr"], of_judge["filter"]) == (62.5, 2.5, "a_judge")
    text = report(capsys, tmp_path)
    assert "spr: Best-of-N, n=4" in text and "length_controlled_winrate" in text


def test_report_of_an_unfinished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path, [an_answer("one", reward=1.0), an_answer("two", reward=None, nan_rewards=2)], complete=False)
    text = report(capsys, tmp_path)
    assert "warning: not finished: 2 answers so far" in text
    assert "warning: 2 rewards were not finite" in text
    assert "1 of 2" in text, "an answer without a reward is in no mean"


@pytest.mark.parametrize("style", ["text", "markdown", "csv", "json"])
def test_a_run_without_a_score_stands_in_the_table_all_the_same(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "a", [an_answer("q", reward=None)])
    a_run(tmp_path / "b", [], complete=False, seed=1)
    text = report(capsys, tmp_path, "--format", style)
    assert "seed=0" in text and "seed=1" in text


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cpu", "cuda")])
def test_a_gathered_run_names_the_machines_of_its_parts(
    devices: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, device in enumerate(devices):
        folder = Path(a_run(tmp_path / f"seed{seed}", [an_answer("q", reward=seed, seed=seed)], seed=seed))
        record = json.loads((folder / "specrej_run.json").read_text())
        record["described"] = {"device": device, "torch": "2"}
        (folder / "specrej_run.json").write_text(json.dumps(record))
    parts = [str(tmp_path / f"seed{seed}") for seed in range(2)]
    assert cli.main(["gather", *parts, "--output", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    (row,) = json.loads(report(capsys, tmp_path / "whole", "--format", "json"))
    wanted = {"device": "cpu", "torch": "2"} if devices[1] == "cpu" else "device=cpu and device=cuda"
    assert row["hardware"] == wanted and (row["n"], row["seed"]) == (8, [0, 1])


def test_differences_are_those_of_a_paired_t_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    two = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]  # and a prompt more
    write_results(tmp_path, date=1.0, resolved=arguments(strategy="best_of_n", n=1), samples=one)
    write_results(tmp_path, date=2.0, resolved=arguments(), samples=two)
    first, second = json.loads(report(capsys, tmp_path, "--format", "json"))
    assert first["paired"] is None
    found, wanted = second["paired"], stats.ttest_rel(two[:8], one).confidence_interval(0.95)
    assert (found["baseline"], found["prompts"], found["difference"]) == ("Sampling, n=1", 8, 0.0)
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
    text = report(capsys, tmp_path)
    assert "against Sampling, n=1, on the same prompts:" in text and "+0.0000" in text and "-0.0000" not in text
    turned = report(capsys, tmp_path, "--baseline", "speculative")
    assert "against Speculative Rejection, alpha=0.5, n=16, on the same prompts:" in turned
    assert cli.main(["report", str(tmp_path), "--baseline", "nobody"]) == 1
    assert "no run is called 'nobody'" in capsys.readouterr().err


def test_a_baseline_that_several_runs_could_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for date, n in enumerate((2, 4, 16)):
        write_results(tmp_path / str(n), date=date, resolved=arguments(strategy="best_of_n", n=n), samples=[1.0] * 8)
    assert cli.main(["report", str(tmp_path), "--baseline", "best"]) == 1
    told = capsys.readouterr().err
    assert "'best' is part of the names of 3 runs" in told
    assert "Best-of-N, n=2; Best-of-N, n=4; Best-of-N, n=16" in told
    write_results(tmp_path / "1", date=9, resolved=arguments(strategy="best_of_n", n=160), samples=[1.0] * 8)
    assert "against Best-of-N, n=16," in report(capsys, tmp_path, "--baseline", "best-of-n, N=16"), "its whole name"


def test_the_demos_report_reads_its_own_runs_alone(tmp_path: Path) -> None:
    """Whatever other demos (another LIMIT) and the README's commands have left, its baseline names one run."""
    told = subprocess.run(["make", "-n", "demo", "LIMIT=7"], cwd=ROOT, capture_output=True, text=True).stdout
    folder = re.search(r"specrej-eval report (\S+) --baseline", told)
    assert folder is not None and folder[1] == "results/demo/first_7"
    targets = re.findall(r"^demo-[\w.-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = subprocess.run(["make", "-n", *targets, "LIMIT=7"], cwd=ROOT, capture_output=True, text=True).stdout
    paths = re.findall(r"--output_path (\S+)", told)
    assert len(set(paths)) == len(targets) == 4 and all(path.startswith(f"{folder[1]}/") for path in paths)


def test_one_line_says_what_the_numbers_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = {"sampling": [0.0] * 8, "bo": [1, 0, 0, 1, 0, 1, 0, 0], "spr": [1, 1, 0, 1, 1, 1, 1, 0]}
    settings = {"sampling": {"strategy": "best_of_n", "n": 1}, "bo": {"strategy": "best_of_n"}, "spr": {"n": 32}}
    for date, (name, samples) in enumerate(rewards.items()):
        write_results(tmp_path / name, date=date, resolved=arguments(**settings[name]), samples=samples, whole=8)
    assert cli.main(["report", str(tmp_path)]) == 0
    t = stats.ttest_rel(rewards["spr"], rewards["bo"]).confidence_interval()
    want = (
        f"Speculative Rejection, alpha=0.5, n=32: 37.5 points more than Best-of-N, n=16 (95 % interval "
        f"{100 * t.low:+.1f} to {100 * t.high:+.1f}, which includes 0: it may be chance), for 100% of its decoded "
        "tokens (exact_match)."
    )
    assert want in capsys.readouterr().out
    write_results(tmp_path / "spr", date=9, resolved=arguments(n=32), samples=rewards["sampling"], whole=8)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "n=32: 37.5 points less than Best-of-N, n=16" in capsys.readouterr().out
    # one prompt, answered well and cheaply, is no match for eight
    write_results(tmp_path / "few", date=10, resolved=arguments(n=2), samples=[1.0], whole=8)
    assert cli.main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "n=32: 37.5 points less than Best-of-N, n=16" in told and "n=2: " not in told


def test_other_prompts_and_other_rewards_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a", [an_answer(f"q{i}", reward=i) for i in range(6)])
    a_run(tmp_path / "b", [an_answer(f"r{i}", reward=i) for i in range(6)], seed=1)
    a_run(tmp_path / "c", [an_answer(f"q{i}", reward=i) for i in range(6)], reward_model="org/other")
    assert not any(row["paired"] for row in json.loads(report(capsys, tmp_path, "--format", "json")))
    a_run(tmp_path / "d", [an_answer(f"q{i}", reward=i + 1 + i % 2) for i in range(6)], seed=2)
    (row,) = [row for row in json.loads(report(capsys, tmp_path, "--format", "json")) if row["paired"]]
    assert row["seed"] == 2 and row["paired"]["difference"] == 1.5 and row["paired"]["low"] > 0


def test_of_few_prompts_there_is_a_difference_and_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        a_run(tmp_path / str(seed), [an_answer(f"q{i}", reward=i * seed) for i in range(4)], seed=seed)
    (row,) = [row for row in json.loads(report(capsys, tmp_path, "--format", "json")) if row["paired"]]
    assert (row["paired"]["low"], row["paired"]["prompts"]) == (None, 4)


def test_runs_of_other_models_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a", [an_answer("q", reward=1)])
    a_run(tmp_path / "b", [an_answer("q", reward=1)], pretrained="org/large")
    text = report(capsys, tmp_path)
    assert "n=4, policy by judge" in text and "n=4, large by judge" in text


def test_an_argument_that_an_older_version_did_not_know_tells_no_runs_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "old", [an_answer("q", reward=1)])
    a_run(tmp_path / "new", [an_answer("q", reward=1)], seed=1, min_p=0.1)
    text = report(capsys, tmp_path)
    assert "n=4, seed=0" in text and "n=4, seed=1" in text and "min_p" not in text


def test_report_as_csv_has_a_column_for_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(), samples=[1.0] * 4, warnings=("a, b", "c"), limit=4.0)
    write_results(tmp_path, date=2.0, resolved=arguments(strategy="best_of_n"), samples=[0.0, 1.0, 1.0, 0.0])
    first, second = csv.DictReader(io.StringIO(report(capsys, tmp_path, "--format", "csv")))
    assert (first["value"], first["alpha"], first["n"], first["limit"]) == ("0.75", "0.5", "16", "4.0")
    assert (first["warnings"], first["hardware"]) == ("a, b; c", "4 cores")
    assert (second["alpha"], second["paired_difference"], second["paired_baseline"]) == ("", "-0.5", first["run"])
    assert {"pretrained", "reward_model", "decode_tokens", "prompts_in_all", "path"} <= first.keys()


def test_damaged_samples_are_no_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(), samples=[1.0] * 4)
    path = write_results(tmp_path, date=2.0, resolved=arguments(alpha=0.25), samples=[1.0] * 4)
    samples = path.with_name(path.name.replace("results_", "samples_sums_") + "l")
    samples.write_text(samples.read_text()[:-30])
    assert not any(row["paired"] for row in json.loads(report(capsys, tmp_path, "--format", "json")))
