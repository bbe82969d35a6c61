"""Texts that anybody may have written do nothing where they are shown: terminal, log, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import GOLDEN
from support.journals import FINGERPRINT, a_result
from support.run_folders import a_run, an_answer

from specrej_eval import cli
from specrej_eval.commands.doctor.findings import Finding, show
from specrej_eval.commands.submission.leaderboard_rows import line
from specrej_eval.errors import ConfigError
from specrej_eval.records.journal import Journal
from specrej_eval.wording import inert, inert_cell, inert_lines, inert_markdown

Counted = Callable[[str, int], None]

HOSTILE = {
    "clears the screen": "a\x1b[2J\x1b[1;1Hb",
    "sets the title": "a\x1b]0;owned\x07b",
    "writes over the line": "0.99\r0.11",
    "one-byte escapes": "a\x9b31mb",
    "goes back": "secret\b\b\b\b\b\b",
    "turned round": "a\u202efdp.exe",
    "half a character": "a\ud800b",
    "a further line": "a\nspecrej-eval: all is well",
    "a further cell": "a | b | c",
    "a link": "[click](http://evil.example)",
    "an image": "![x](http://evil.example/track.png)",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "code": "`a` ```b",
    "a formula": '=HYPERLINK("http://evil.example","x")',
    "a formula with plus": "+cmd|' /C calc'!A0",
    "a formula with minus": "-2+3+cmd|' /C calc'!A0",
    "a formula with at": "@SUM(1+1)*cmd|' /C calc'!A0",
    "a formula behind a tab": "\t=1+1",
    "a formula behind a line break": "\r\n=1+1",
    "a formula in full width": "\uff1d1+1",
    "LaTeX": r"\input{/etc/passwd} $\write18{ls}$",
}
every_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
any_text = st.one_of(
    st.text(), st.sampled_from([*HOSTILE.values()]), st.text(st.sampled_from("=+-@\t\r\n |<>[]`1\x1b\ud800a"))
)


def is_quiet(text: str) -> bool:
    return all(mark.isprintable() or mark in "\n\t" for mark in text)


def is_formula(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")) and len(cell) > 1
    return False


@given(any_text)
def test_no_text_gets_through_any_of_the_functions(text: str) -> None:
    assert inert(text).isprintable() and "\n" not in inert(text)
    assert is_quiet(inert_lines(text)) and inert_lines(text).count("\n") == text.count("\n")
    told = inert_markdown(text)
    assert told.isprintable() and "<" not in told and ">" not in told
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]*$~]", told)
    cell = inert_cell(text)
    assert is_quiet(cell) and not is_formula(cell)


@given(st.floats() | st.integers() | st.none() | st.booleans())
def test_numbers_stay_numbers_in_a_cell(value: Any) -> None:
    assert inert_cell(value) is value
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    ):
        assert inert_cell(str(value)) == str(value)


@given(
    st.text(st.characters(categories=["L", "N"]))
    | st.sampled_from(["SpR, alpha=0.5, n=16", "org/model_1-2.b", "äöü 漢字"])
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert inert(text) == inert_lines(text) == inert_markdown(text) == inert_cell(text) == text


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, both streams; it must be quiet."""

    def call(*words: object, code: int = 0) -> str:
        capsys.readouterr()
        assert cli.main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        assert is_quiet(out) and is_quiet(err), (words, out, err)
        return out + err

    return call


def hostile_folder(folder: Path, text: str, seed: int = 0) -> str:
    """A run of `specrej-eval run` in which every free text is this one."""
    answers = [an_answer(f"{text} {n}", reward=float(n), seed=seed, index=n, finish_reason="eos") for n in range(6)]
    for answer in answers:
        answer.output = text
        answer.fields = {text: text}
    fingerprint = {"pretrained": text, "reward_model": text, "strategy": text, "seed": seed}
    return a_run(folder, answers, name=text, **fingerprint)


def hostile_lm_eval(folder: Path, text: str) -> Path:
    """lm-eval's results in which every free text is this one."""
    source = next((GOLDEN / "records" / "2026-11-26" / "lm_eval").glob("results_*.json"))
    content = json.loads(source.read_text())
    values = content["results"].pop("specrej_arithmetic")
    content["results"] = {text: {**values, f"{text},{text}": 0.5, "name": text, "alias": text}}
    for name in ("n-samples", "configs"):
        content[name] = {text: content[name]["specrej_arithmetic"]}
    content["config"]["model"] = text
    block = content["config"]["specrej"]
    block.update(warnings=[text], reward_model=text, embedded_demo_pair=False, hardware={"device_name": text})
    block["arguments"].update(strategy=text, pretrained=text)
    folder.mkdir(parents=True)
    (folder / source.name).write_text(json.dumps(content))
    return folder


@every_text
def test_a_report_is_inert_in_every_format(
    text: str, tmp_path: Path, shown: Callable[..., str], counted: Counted
) -> None:
    folders = [hostile_folder(tmp_path / f"run{seed}", text, seed) for seed in (0, 1)]
    folders.append(str(hostile_lm_eval(tmp_path / "lm_eval", text)))
    shown("report", *folders)
    markdown = shown("report", *folders, "--format", "markdown")
    assert "<script" not in markdown and "](" not in markdown.replace("\\](", "")
    table = list(itertools.takewhile(lambda row: row.startswith("| "), markdown.splitlines()))
    assert len(table) > 2 and len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1
    rows = list(csv.reader(io.StringIO(shown("report", *folders, "--format", "csv"))))
    assert len(rows) >= 4 and len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if is_formula(cell)]
    told = json.loads(shown("report", *folders, "--format", "json"))
    assert any(row["metric"] == text.split(",")[0] for row in told), "a program gets the text as it is"
    shown("report", *folders, "--baseline=?" + text, code=1)
    counted("hostile texts shown", 5)


@every_text
def test_a_journal_is_shown_inert(text: str, tmp_path: Path, shown: Callable[..., str], counted: Counted) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(str(path), {**FINGERPRINT, text: text, "files": {text: text}})
    result = a_result(1)
    result.task = text
    for row in result.trajectories:
        row.text = text
    journal.put("ab" * 32, result)
    journal.close()
    with path.open("ab") as file:
        file.write(b"\x1b[2J not json\n")
    shown("journal", "show", path)
    shown("journal", "show", path, "--key", "ab")
    shown("journal", "show", path, "--key=zz" + text, code=1)
    shown("journal", "verify", path, code=1)
    counted("hostile texts shown", 4)


@every_text
def test_gather_export_and_submission_print_inert_text(
    text: str, tmp_path: Path, shown: Callable[..., str], counted: Counted
) -> None:
    runs = [hostile_folder(tmp_path / f"run{seed}", text, seed) for seed in (0, 1)]
    shown("gather", *runs, "--output", tmp_path / "gathered")
    shown("export", "alpaca", tmp_path / "gathered", "--output", tmp_path / "out.json")
    exported = json.loads((tmp_path / "out.json").read_bytes().decode("utf-8"))
    assert exported[0]["output"] == text.strip(), "a program gets the text as it is"
    shown("submission", "lm-eval", hostile_lm_eval(tmp_path / "lm_eval", text), "--output", tmp_path / "s", code=1)
    shown("report", runs[0])
    counted("hostile texts shown", 4)


@every_text
def test_errors_findings_and_leaderboards_are_inert(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_quiet(str(ConfigError(f"bad: {text}", hint=text)))
    show([("title", [Finding("broken", text, text)])], well="well")
    from alpaca_eval import utils

    from specrej_eval.harness.alpaca_eval import runs

    runs_note = runs.Evaluation(None)
    token = runs._current.set(runs_note)
    try:
        runs.note(text)
        frame = pd.DataFrame(
            {"win_rate": [1.0], "standard_error": [0.0], "n_total": [1], "avg_length": [1]},
            index=pd.Index([text], dtype=object),
        )
        utils.print_leaderboard(frame, None, current_name=text)
    finally:
        runs._current.reset(token)
    out, err = capsys.readouterr()
    assert is_quiet(out) and is_quiet(err) and "NOTE" in out
    (cells,) = csv.reader(io.StringIO(line([text, "-0.5", "12"])))
    assert not is_formula(cells[0]) and cells[1:] == ["-0.5", "12"]


def test_old_records_are_shown_as_before(tmp_path: Path, shown: Callable[..., str]) -> None:
    """None of it touches ordinary names: tables of real runs have no escapes in them."""
    shutil.copytree(GOLDEN / "records" / "2026-11-26" / "run", tmp_path / "run")
    for form in ("text", "markdown", "csv"):
        assert "\\" not in shown("report", tmp_path / "run", "--format", form)
