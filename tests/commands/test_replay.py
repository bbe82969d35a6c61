"""`specrej-eval replay`: folders of runs in, simulated numbers out, no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.page_runs import a_recorded_run

from specrej_eval import cli
from specrej_eval.records.jsonl import checked_line

SUMS = ["Q: 39 + 16 + 60 = ?", "Q: 15 + 53 + 65 + 91 = ?", "Q: 93 + 38 = ?"]
COMMON = ("--max_gen_toks", "32", "--device", "cpu")


def run(tmp_path: Path, name: str, *words: str) -> str:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(SUMS))
    output = str(tmp_path / name)
    assert cli.main(["run", "--prompts", str(prompts), "--output", output, *COMMON, *words]) == 0
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tmp_path = tmp_path_factory.mktemp("replay")
    pool = ("--strategy", "best_of_n", "--n", "6", "--score_every", "1")
    return {
        "seed0": run(tmp_path, "seed0", *pool),
        "seed1": run(tmp_path, "seed1", *pool, "--seed", "1"),
        "other": run(tmp_path, "other", *pool, "--temperature", "0.7", "--seed", "2"),
        "spr": run(tmp_path, "spr", "--alpha", "0.5", "--n", "6"),
        "unscored": run(tmp_path, "unscored", "--strategy", "best_of_n", "--n", "6"),
    }


def replayed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["replay", *words, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_gives_the_answers_of_the_run_it_simulates(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = replayed(capsys, folders["seed0"], "--alpha", "0.5", "--n", "6")
    cell = next(method for method in found["methods"] if method["name"] == "spr_n6_a0.5")["cells"][0]
    lines = [json.loads(line) for line in (Path(folders["spr"]) / "specrej_outputs.jsonl").read_text().splitlines()]
    assert [prompt["instruction"] for prompt in found["prompts"]] == SUMS == [line["instruction"] for line in lines]
    assert cell["decode_tokens"] == [line["ledger"]["decode_tokens"] for line in lines]
    assert cell["answer_tokens"] == [line["num_tokens"] for line in lines]
    assert cell["looks"] == [len(line["rounds"]) for line in lines]
    assert cell["reward"] == pytest.approx([line["reward"] for line in lines], abs=1e-4)
    assert found["scores"]["between"] == 0


def test_every_number_is_marked_and_seeds_are_paired(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "replay.json"
    words = [folders["seed0"], folders["seed1"], "--n", "3,6", "--alpha", "0.5", "--output", str(output)]
    found = replayed(capsys, *words)
    assert json.loads(output.read_text()) == found
    assert found["simulated"] and found["seeds"] == [0, 1] and found["made_by"] == "replay"
    for method in found["methods"]:
        assert method["simulated"] and method["time"] is None and "reward_tokens" not in method["costs"]
        assert all(seconds is None for cell in method["cells"] for seconds in cell["seconds"])
    assert cli.main(["replay", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("SIMULATED: ") and "nothing was decoded" in shown
    assert cli.main(["replay", *words, "--format", "markdown"]) == 0
    assert "| Best-of-6 |" in capsys.readouterr().out


def test_a_journal_will_do_and_a_selector_is_named(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    journal = str(Path(folders["seed0"]) / "specrej_trajectories.jsonl")
    found = replayed(capsys, journal, "--strategy", "best_of_n", "--n", "6", "--selector", "median")
    assert found["selector"] == "median"
    median = found["methods"][0]["reward"]["value"]
    assert median < replayed(capsys, journal, "--strategy", "best_of_n", "--n", "6")["methods"][0]["reward"]["value"]


def test_no_model_and_no_torch_are_loaded(folders: dict[str, str]) -> None:
    program = (
        "import sys\nfrom specrej_eval import cli\n"
        f"assert cli.main(['replay', {folders['seed0']!r}, '--alpha', '0.5']) == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'alpaca_eval'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["seed0", "--n", "7"], "n=7 rows are needed, and the runs have 6"),
        (["seed0", "--n", ","], "--n is empty"),
        (["seed0", "--alpha", "1"], "alpha must be in"),
        (["seed0", "--selector", "best"], "unknown selector"),
        (["seed0", "--selector", "majority", "--answer", "("], "no regular expression"),
        (["seed0", "--baseline", "bo9"], "no method is called 'bo9'"),
        (["seed0", "seed0"], "two of the runs have seed 0"),
        (["seed0", "other"], "temperature: 1.0 in one, 0.7 in another"),
        (["spr"], "rejected rows: how they would have gone on is on no record"),
        (["unscored"], "scored at their end alone"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    folders: dict[str, str], tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    named = [folders.get(word, word) for word in words]
    assert cli.main(["replay", *named, "--output", str(output)]) != 0
    shown = capsys.readouterr().err
    assert told in shown and "Traceback" not in shown
    assert not output.exists()


def test_runs_of_other_prompts_are_not_paired(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps([SUMS[0], "Q: 1 + 1 = ?", SUMS[2]]))
    pool = ("--strategy", "best_of_n", "--n", "6", "--score_every", "1", "--seed", "1")
    assert cli.main(["run", "--prompts", str(prompts), "--output", str(tmp_path / "r"), *COMMON, *pool]) == 0
    assert cli.main(["replay", folders["seed0"], str(tmp_path / "r")]) != 0
    assert "answered different prompts: they cannot be paired" in capsys.readouterr().err


def test_a_record_of_a_newer_version_is_refused(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    journal = tmp_path / "run.jsonl"
    first, *others = (Path(folders["seed0"]) / "specrej_trajectories.jsonl").read_text().splitlines(keepends=True)
    journal.write_text(checked_line({**json.loads(first), "journal": 9}) + "".join(others))
    assert cli.main(["replay", str(journal)]) != 0
    assert "newer version" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"pretrained": "org/other"}, "pretrained: 'org/policy' in one, 'org/other' in another"),
        ({"reward_model": "org/other"}, "reward_model: 'org/judge' in one, 'org/other' in another"),
        ({"asked": ["one", "two", "four"]}, "answered different prompts: they cannot be paired"),
        ({"asked": ["one", "two"]}, "answered different prompts: they cannot be paired"),
        ({"seed": 0}, "two of the runs have seed 0"),
        ({"rows": False}, "keep_trajectories"),
        ({"schema_version": 99}, "newer version"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused_and_nothing_is_written(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = a_recorded_run(tmp_path / "first", ["one", "two", "three"], rejects=False)
    asked, version = changes.pop("asked", ["one", "two", "three"]), changes.pop("schema_version", None)
    other = a_recorded_run(tmp_path / "other", asked, rejects=False, **{"seed": 1, **changes})
    if version is not None:
        record = json.loads((other / "specrej_run.json").read_text())
        (other / "specrej_run.json").write_text(json.dumps({**record, "schema_version": version}))
    output = tmp_path / "out.json"
    assert cli.main(["replay", str(first), str(other), "--strategy", "best_of_n", "--output", str(output)]) != 0
    shown = capsys.readouterr().err
    assert told in shown and "Traceback" not in shown
    assert not output.exists()


def test_a_selector_chooses_every_answer_of_the_table(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = replayed(capsys, folders["seed0"], "--strategy", "best_of_n", "--n", "3", "--selector", "median")
    plain = replayed(capsys, folders["seed0"], "--strategy", "best_of_n", "--n", "3")
    assert [method["name"] for method in found["methods"]] == ["bo6", "bo3"] == [m["name"] for m in plain["methods"]]
    for ours, theirs in zip(found["methods"], plain["methods"], strict=True):
        assert ours["reward"]["value"] < theirs["reward"]["value"]


def test_prompts_in_another_order_are_paired_by_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"question {number}" for number in range(6)]
    first = a_recorded_run(tmp_path / "first", asked, rejects=False)
    for name, order in (("same", asked), ("turned", asked[::-1])):
        a_recorded_run(tmp_path / name, order, rejects=False, seed=1)
    words = ["--strategy", "best_of_n", "--n", "2,6"]
    same, turned = (replayed(capsys, str(first), str(tmp_path / name), *words) for name in ("same", "turned"))
    assert [method["cells"][1]["reward"] for method in same["methods"]] == [
        method["cells"][1]["reward"] for method in turned["methods"]
    ]
    assert [prompt["instruction"] for prompt in turned["prompts"]] == asked


def test_a_journal_of_several_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        a_recorded_run(tmp_path / str(rejects), ["one", "two"], rejects=rejects, strategy="best_of_n", alpha=None)
        for rejects in (False, True)
    ]
    journal = tmp_path / "both.jsonl"
    texts = [(folder / "specrej_trajectories.jsonl").read_text().splitlines(keepends=True) for folder in folders]
    journal.write_text("".join([*texts[0], *texts[1][1:]]))
    assert cli.main(["replay", str(journal)]) != 0
    assert "the answers of several runs: there are two to one prompt" in capsys.readouterr().err
