"""`specrej-eval init`: what it writes, and what it leaves alone."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from specrej_eval import cli, paths
from specrej_eval.commands.init import files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_copies_all_tasks_and_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "my evaluation"
    assert cli.main(["init", str(target)]) == 0
    written = tree(target)
    assert {"tasks/specrej_prompts.yaml", "tasks/specrej_prompts.py", "tasks/specrej_arithmetic/test.jsonl"} <= set(
        written
    )
    assert any(name.startswith("model_configs/") and name.endswith(".yaml") for name in written)
    assert not any("__pycache__" in name for name in written)
    assert written == {str(place): ours.read_bytes() for ours, place in files()}
    for folder in paths.FOLDERS:
        ours = [path for path in paths.folder(folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert len(ours) == sum(name.startswith(f"{folder}/") for name in written)

    printed = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in printed if line.startswith(("lm_eval", "specrej-eval", "alpaca_eval"))]
    assert [command[0] for command in commands] == ["lm_eval", "specrej-eval", "lm_eval", "specrej-eval", "alpaca_eval"]
    for command in commands:  # what they name is there
        if "--include_path" in command:
            assert Path(command[command.index("--include_path") + 1]) == target / "tasks"
            assert any(f"{command[command.index('--tasks') + 1]}.yaml" in name for name in written)
        if command[0] == "specrej-eval":
            assert command[1] in cli.COMMANDS
    assert Path(commands[-1][-1]).is_file()


def test_init_again_writes_nothing_and_keeps_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    fresh = tree(tmp_path)
    changed = tmp_path / "tasks" / "specrej_prompts.yaml"
    missing = tmp_path / "tasks" / "specrej_prompts.py"
    changed.write_text("mine")
    missing.unlink()
    own = tmp_path / "tasks" / "mine.yaml"
    own.write_text("mine too")
    untouched = tmp_path / "tasks" / "specrej_arithmetic" / "test.jsonl"
    os.utime(untouched, ns=(1, 1))
    capsys.readouterr()

    assert cli.main(["init"]) == 0
    printed = capsys.readouterr().out
    assert f"not overwritten, since you changed it: {Path('tasks/specrej_prompts.yaml')}" in printed
    assert "tasks: 1 file written" in printed and "model_configs: nothing to write" in printed
    assert tree(tmp_path) == {**fresh, "tasks/specrej_prompts.yaml": b"mine", "tasks/mine.yaml": b"mine too"}
    assert untouched.stat().st_mtime_ns == 1

    assert cli.main(["init", "--force"]) == 0
    assert "not overwritten" not in capsys.readouterr().out
    assert tree(tmp_path) == {**fresh, "tasks/mine.yaml": b"mine too"}


def test_init_into_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["init", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "not a folder"
