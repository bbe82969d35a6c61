"""What killed runs have left for a moment is removed at the next start, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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
    good = {"pid": dead, "host": temporary._host()}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / temporary.MARKER).write_text(json.dumps(good))
    markers = {
        "specrej_eval_no_marker": None,
        "specrej_eval_running": json.dumps({**good, "pid": os.getpid()}),
        "specrej_eval_another_machine": json.dumps({**good, "host": "0" * 8}),
        "specrej_eval_no_json": "{",
        "specrej_eval_a_list": "[]",
        "specrej_eval_pid_in_words": json.dumps({**good, "pid": str(dead)}),
        "specrej_eval_pid_true": json.dumps({**good, "pid": True}),
        "specrej_eval_pid_of_all": json.dumps({**good, "pid": -1}),
        "specrej_eval_pid_none": json.dumps({**good, "pid": 0}),
        "specrej_eval_pid_too_large": json.dumps({**good, "pid": 0.5}),
        "another_name": json.dumps(good),
    }
    for name, marker in markers.items():
        (place / name).mkdir()
        (place / name / "mine.txt").write_text("precious")
        if marker is not None:
            (place / name / temporary.MARKER).write_text(marker)
    (place / "specrej_eval_a_link").symlink_to(elsewhere)
    (place / "specrej_eval_a_file").write_text("precious")
    linked = place / "specrej_eval_linked_marker"
    linked.mkdir()
    (linked / temporary.MARKER).symlink_to(elsewhere / temporary.MARKER)
    before = sorted(place.rglob("*"))
    assert temporary.remove_abandoned() == []
    assert sorted(place.rglob("*")) == before and (elsewhere / temporary.MARKER).is_file()

    ours = (
        place / "specrej_eval_templates_x"
    )  # and with exactly what those lack it is removed, without what it links to
    ours.mkdir()
    (ours / temporary.MARKER).write_text(json.dumps(good))
    (ours / "link").symlink_to(elsewhere)
    assert temporary.remove_abandoned() == [ours]
    assert sorted(place.rglob("*")) == before and (elsewhere / temporary.MARKER).is_file()


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
