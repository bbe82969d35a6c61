"""What killed runs have left for a moment is removed at the next start, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, forked

from specrej_eval import temporary
from specrej_eval.paths import is_running


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder of temporary files is the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by_a_killed_run() -> Path:
    reader, writer = os.pipe()

    def work() -> None:
        made = temporary.folder("templates")
        (made / "deep").mkdir()
        (made / "deep" / "file.txt").write_text("a template")
        os.write(writer, str(made).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked.ended(forked.start(work)) == -signal.SIGKILL
    os.close(writer)
    with os.fdopen(reader) as told:
        return Path(told.read())


def test_a_killed_runs_folder_is_removed_at_the_next_start(place: Path) -> None:
    left = left_by_a_killed_run()
    assert left.is_dir() and left.parent == place
    mine = temporary.folder("templates")
    assert [*place.iterdir()] == [mine]


def test_the_folder_of_a_run_that_goes_on_stays(place: Path) -> None:
    mine = temporary.folder("templates")
    assert forked.ended(forked.start(lambda: len(temporary.remove_abandoned()))) == 0
    assert mine.is_dir()


def test_nothing_of_the_users_is_touched(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dead = int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)
    assert not is_running(dead)
    host = temporary._host()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file.txt").write_text("precious")
    names = (
        "specrej_eval_templates",
        "specrej_eval_templates_12345678",
        f"specrej_eval_templates_{host}-{os.getpid()}_12345678",  # it runs
        f"specrej_eval_templates_{'0' * 8}-{dead}_12345678",  # of another machine
        f"specrej_eval_templates_{host}-{dead}_1234567",
        f"specrej_eval_templates_{host}-{dead}_123456789",
        f"specrej_eval_templates_{host}-{dead}",
        f"specrej_eval_templates_{host}-0_12345678",
        f"specrej_eval_templates_{host}--1_12345678",
        f"specrej_eval_templates_{host}-{'9' * 30}_12345678",
        f"specrej_eval_templates_{host}-{dead}_12345678.bak",
        f"my_specrej_eval_templates_{host}-{dead}_12345678",
    )
    for name in names:
        (place / name).mkdir()
        (place / name / "mine.txt").write_text("precious")
    (place / f"specrej_eval_links_{host}-{dead}_12345678").symlink_to(elsewhere)
    (place / f"specrej_eval_files_{host}-{dead}_12345678").write_text("precious")
    before = sorted(place.rglob("*"))
    assert temporary.remove_abandoned() == []
    assert sorted(place.rglob("*")) == before and (elsewhere / "file.txt").is_file()

    # and with exactly what those lack it is removed, without what it links to
    ours = place / f"specrej_eval_templates_{host}-{dead}_12345678"
    ours.mkdir()
    (ours / "link").symlink_to(elsewhere)
    assert temporary.remove_abandoned() == [ours]
    assert sorted(place.rglob("*")) == before and (elsewhere / "file.txt").is_file()


@pytest.mark.parametrize("call", range(6))
def test_a_kill_while_a_folder_is_being_made_or_removed_leaves_nothing_for_good(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Killed before each call that changes the disk: mkdir, two files, their removal, rmdir."""

    def work() -> None:
        calls = 0

        def counting(name: str) -> None:
            real = getattr(os, name)

            def called(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return real(*arguments, **options)

            monkeypatch.setattr(os, name, called)

        for name in ("mkdir", "unlink", "rmdir"):
            counting(name)
        made = temporary.folder("templates")
        (made / "a.txt").write_text("a template")
        (made / "deep").mkdir()
        (made / "deep" / "b.txt").write_text("a template")
        temporary._remove(made, os.getpid())

    assert forked.ended(forked.start(work)) == -signal.SIGKILL
    temporary.remove_abandoned()
    assert [*place.iterdir()] == []


def test_a_regular_end_leaves_nothing(tmp_path: Path) -> None:
    code = "from specrej_eval import temporary; import os; m = temporary.folder('templates'); os.fork() or os._exit(0)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", f"{code}; assert m.is_dir()"], env=environment, check=True, timeout=60)
    assert [*tmp_path.iterdir()] == []


def test_the_next_alpaca_eval_run_clears_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import alpaca_eval.main

    from specrej_eval.errors import SpecRejError

    left = left_by_a_killed_run()
    config = {
        "spr": {
            "prompt_template": "{instruction}",
            "fn_completions": "specrej_completions",
            "completions_kwargs": {"alpha": "much"},
        }
    }
    with pytest.raises(SpecRejError):
        alpaca_eval.main.evaluate_from_model(config, annotators_config="specrej_reward_judge", output_path=None)
    assert not left.exists()
