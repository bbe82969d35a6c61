"""Files that earlier versions wrote, read by today's code: no error, no answer lost, what they lack told once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from support import GOLDEN, ROOT

from specrej_eval import cli
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import RunConfig
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.records import fingerprint, journal
from specrej_eval.records.outputs import OutputsFolder, open_run

RECORDS = GOLDEN / "records"
VERSIONS = sorted(folder.name for folder in RECORDS.iterdir() if folder.is_dir())
WITH_FOLDERS = [version for version in VERSIONS if (RECORDS / version / "run").is_dir()]
RUN = ["--n", "4", "--max_gen_toks", "24", "--until", '["\\n"]']

Counted = Callable[[str, int], None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that are decoded."""
    found: list[Any] = []
    opened = TransformersEngine.open_all
    monkeypatch.setattr(
        TransformersEngine,
        "open_all",
        lambda self, openings: found.extend(each.prompt for each in openings) or opened(self, openings),
    )
    monkeypatch.setattr("specrej_eval.records.fingerprint.comparing._said", set())
    return found


@pytest.fixture
def records(request: pytest.FixtureRequest, own_folder: Path) -> Path:
    """A copy of one version's files, and the inputs they were made with, in the working folder."""
    for path in (RECORDS / request.param, RECORDS):
        for entry in path.iterdir():
            if entry.is_file() and entry.suffix != ".md":
                shutil.copy(entry, own_folder)
            elif path != RECORDS:
                shutil.copytree(entry, own_folder / entry.name)
    return own_folder


every_version = pytest.mark.parametrize("records", VERSIONS, indirect=True)
versions_with_folders = pytest.mark.parametrize("records", WITH_FOLDERS, indirect=True)


def is_current(records: Path) -> bool:
    """Whether its records lack nothing that today's have."""
    return bool(json.loads((records / "run.jsonl").read_text().splitlines()[0])["journal"] == journal.SCHEMA_VERSION)


def told_once(text: str, *, current: bool) -> None:
    older = text.count("older version")
    assert older == 0 if current else older >= 1, text
    sentences = [line for line in text.splitlines() if "older version" in line]
    assert len(sentences) == len(set(sentences)), "said more than once"


def evaluate(limit: int) -> list[dict[str, Any]]:
    """lm-eval's samples, in the order of the documents."""
    results = lm_eval.simple_evaluate(
        model="specrej",
        model_args={"n": 4, "max_gen_toks": 24, "journal": "run.jsonl"},
        tasks=["specrej_arithmetic"],
        task_manager=TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    assert results is not None
    samples: list[dict[str, Any]] = results["samples"]["specrej_arithmetic"]
    return sorted(samples, key=lambda sample: sample["doc_id"])


@every_version
def test_a_journal_of_an_earlier_version_is_gone_on_from(
    records: Path, drawn: list[Any], caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    (logged,) = (records / "lm_eval").glob("samples_*.jsonl")
    then = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    before = (records / "run.jsonl").read_bytes()
    now = evaluate(limit=3)
    assert not drawn, "decoded again"
    for name in ("resps", "filtered_resps", "exact_match"):
        assert json.loads(json.dumps([sample[name] for sample in now])) == [sample[name] for sample in then]
    told_once(caplog.text, current=is_current(records))
    assert [sample["resps"] for sample in evaluate(limit=4)[:3]] == [sample["resps"] for sample in now]
    assert len(drawn) == 1
    assert (records / "run.jsonl").read_bytes().startswith(before), "old lines stay as they are"
    counted("old records read", 3)


def test_a_reward_that_an_early_journal_names_by_its_folder_is_told_by_its_files() -> None:
    then = json.loads((RECORDS / "2026-11-23-core" / "run.jsonl").read_text().splitlines()[0])["fingerprint"]
    now = fingerprint.of_models(RunConfig(), {})
    assert fingerprint.same(then, now)
    assert "reward_model: other files" in fingerprint.differences({**then, "reward_files": "0" * 64}, now)
    assert "reward_model was '/x/other'" in fingerprint.differences({**then, "reward_model": "/x/other"}, now)
    own = fingerprint.of_models(RunConfig(reward_model=str(DEMO_REWARD)), {})
    assert "reward_model" not in fingerprint.differences({**then, "reward_model": str(DEMO_REWARD)}, own)


@versions_with_folders
def test_a_folder_of_run_of_an_earlier_version_is_gone_on_from(
    records: Path,
    drawn: list[Any],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    counted: Counted,
) -> None:
    before = open_run(records / "run")[1]
    assert len(before) == 3
    words = ["run", "--prompts", "prompts.json", "--output", "run", *RUN]
    assert cli.main(words) == 0
    assert not drawn and "nothing to do" in capsys.readouterr().out
    texts = json.loads((records / "prompts.json").read_text())
    (records / "prompts.json").write_text(json.dumps([*texts[1:], "Q: 1 + 1 = ?\nA:"]))
    assert cli.main(words) == 0
    assert len(drawn) == 1
    told_once(caplog.text, current=is_current(records))
    store = OutputsFolder(records / "run")
    found = {item.instruction: item.output for item in (*store.answers(), *store.kept())}
    assert {item.instruction: item.output for item in before}.items() <= found.items()
    assert len(found) == 4 and not store.problems()
    counted("old records read", 3)


@versions_with_folders
def test_every_row_behind_the_answers_of_an_earlier_version_is_found_where_the_answers_are_gone(
    records: Path, drawn: list[Any]
) -> None:
    before = open_run(records / "run")[1]
    (records / "run" / "specrej_outputs.jsonl").unlink()
    assert cli.main(["run", "--prompts", "prompts.json", "--output", "run", *RUN]) == 0
    assert not drawn, "specrej_trajectories.jsonl has all of them"
    assert [item.output for item in open_run(records / "run")[1]] == [item.output for item in before]


@versions_with_folders
def test_an_alpaca_eval_folder_of_an_earlier_version_is_gone_on_from(
    records: Path, drawn: list[Any], caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    import alpaca_eval.main

    def evaluate_from_model() -> None:
        alpaca_eval.main.evaluate_from_model(
            "spr.yaml",
            evaluation_dataset="ref.json",
            annotators_config="specrej_reward_judge",
            output_path="alpaca",
            is_return_instead_of_print=True,
        )

    outputs = records / "alpaca" / "model_outputs.json"
    before = outputs.read_bytes()
    evaluate_from_model()
    assert outputs.read_bytes() == before
    outputs.unlink()  # from the answers beside it
    evaluate_from_model()
    assert json.loads(outputs.read_bytes()) == json.loads(before)
    assert not drawn, "decoded again"
    rows = json.loads((records / "ref.json").read_text())
    (records / "ref.json").write_text(json.dumps([*rows, {**rows[0], "instruction": "Q: 1 + 1 = ?\nA:"}]))
    evaluate_from_model()
    assert len(drawn) == 1
    assert json.loads(outputs.read_bytes())[:3] == json.loads(before)
    told_once(caplog.text, current=is_current(records))
    assert open_run(records / "alpaca")[0].complete
    counted("old records read", 3)


@every_version
def test_what_reads_records_reads_those_of_earlier_versions(
    records: Path, capsys: pytest.CaptureFixture[str], counted: Counted
) -> None:
    content = {path: path.read_bytes() for path in records.rglob("*") if path.is_file()}
    folders = [name for name in ("run", "alpaca") if (records / name).is_dir()]
    journals = ["run.jsonl", *(f"{name}/specrej_trajectories.jsonl" for name in folders if name == "run")]
    assert cli.main(["journal", "verify", *journals, *folders]) == 0
    assert capsys.readouterr().out == "no problems found\n"
    for name in journals:
        assert cli.main(["journal", "show", name]) == 0
        shown = capsys.readouterr().out
        assert "3 answers" in shown
        assert shown.count("older version") == (0 if is_current(records) else 1)
    for form in ("text", "markdown", "json"):
        assert cli.main(["report", "lm_eval", "--format", form]) == 0
        assert "specrej_arithmetic" in capsys.readouterr().out
    for name in folders:
        assert cli.main(["export", "alpaca", name, "--output", f"{name}.json"]) == 0
        exported = json.loads((records / f"{name}.json").read_text())
        assert [row["output"] for row in exported] == [item.output.strip() for item in open_run(name)[1]]
        assert cli.main(["gather", name, "--output", f"gathered_{name}"]) == 0
        assert [item.output for item in open_run(f"gathered_{name}")[1]] == [item.output for item in open_run(name)[1]]
    assert cli.main(["journal", "merge", "run.jsonl", "--output", "merged.jsonl"]) == 0
    assert len(journal.read("merged.jsonl").entries) == 3
    assert {path: path.read_bytes() for path in content} == content, "reading changes nothing"
    counted("old records read", 3 * (len(journals) + len(folders)))
