"""Of processes that join, one at a time has a request, and a dead one has none."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support import FULL, forked

from specrej_eval.errors import ConfigError
from specrej_eval.records import lock
from specrej_eval.records.claims import Claims

Counted = Callable[[str, int], None]


def folder_of(journal: Path) -> Path:
    return journal.with_name(f".{journal.name}.claims")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_one_has_it_until_it_is_given_up(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    mine, yours = Claims(journal), Claims(journal)
    assert mine.take("a") and not mine.take("a") and not yours.take("a"), "within one process too"
    assert yours.take("b")
    yours.give_up("a")
    assert not yours.take("a"), "who has it not cannot give it up"
    mine.give_up("a")
    assert yours.take("a")
    yours.give_up_all()
    assert mine.take("a") and mine.take("b")


def test_another_name_of_the_journal_is_the_same_journal(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("run.jsonl")
    assert Claims(tmp_path / "run_joined1.jsonl").take("a")
    assert not Claims(tmp_path / "link.jsonl").take("a")


def test_a_claim_ends_with_its_process_and_not_with_another_descriptor(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"

    def work() -> Claims:
        claims = Claims(journal)
        assert claims.take("a")
        for path in folder_of(journal).iterdir():
            path.read_bytes()  # what closes here would end a lock of fcntl's
        assert forked.ended(forked.start(lambda: None)) == 0, "nor does a forked process end it"
        return claims

    with forked.living(work):
        assert not Claims(journal).take("a")
    assert Claims(journal).take("a")


def test_a_forked_process_has_none_of_its_parents_claims(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "run.jsonl")
    assert claims.take("a")
    assert forked.ended(forked.start(lambda: int(Claims(tmp_path / "run.jsonl").take("a")))) == 0
    claims.give_up("a")
    assert forked.ended(forked.start(lambda: int(not Claims(tmp_path / "run.jsonl").take("a")))) == 0


def test_what_killed_processes_have_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"

    def work() -> None:
        claims = Claims(journal)
        assert claims.take("a") and claims.take("b")
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked.ended(forked.start(work)) == -signal.SIGKILL
    (folder_of(journal) / "notes of mine").touch()
    one, other = Claims(journal), Claims(journal)
    assert len([*folder_of(journal).iterdir()]) == 3
    assert other.take("c")
    one.tidy()
    assert {path.name for path in folder_of(journal).iterdir()} == {".c.lock", "notes of mine"}
    assert not one.take("c")
    (folder_of(journal) / "notes of mine").unlink()
    other.tidy()
    assert not folder_of(journal).exists()
    assert one.take("c"), "the folder is made again"


@pytest.mark.parametrize("processes", [3])
def test_processes_that_contend_and_are_killed_never_have_one_together(
    processes: int, tmp_path: Path, counted: Counted
) -> None:
    """Each takes one of a few again and again, holds it, tidies up; some are killed while they hold it."""
    journal, inside = tmp_path / "run.jsonl", tmp_path / "inside"
    inside.mkdir()
    rounds = 400 if FULL else 60

    def work() -> int:
        claims = Claims(journal)
        draw = random.Random(os.getpid())
        for _ in range(rounds):
            key = draw.choice("abcd")
            if not claims.take(key):
                continue
            mark = inside / key
            held = mark.read_text() if mark.exists() else ""
            if held and is_alive(int(held)):
                return 1
            mark.write_text(str(os.getpid()))
            if draw.random() < 0.01:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(draw.random() / 2000)
            mark.unlink()
            claims.give_up(key)
            if draw.random() < 0.1:
                claims.tidy()
        return 0

    codes = [forked.ended(pid) for pid in [forked.start(work) for _ in range(processes)]]
    assert set(codes) <= {0, -signal.SIGKILL}
    counted("claims contended for", processes * rounds)


def test_one_begins_at_a_time_and_a_dead_one_is_no_hindrance(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"

    def die() -> None:
        with Claims(journal).beginning():
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked.ended(forked.start(die)) == -signal.SIGKILL

    def begin() -> int:
        with Claims(journal).beginning():
            seen = (tmp_path / "begun").read_text() if (tmp_path / "begun").exists() else ""
            time.sleep(0.05)
            (tmp_path / "begun").write_text(f"{seen}.")
        return 0

    assert [forked.ended(pid) for pid in [forked.start(begin) for _ in range(3)]] == [0] * 3
    assert (tmp_path / "begun").read_text() == "..."


def test_where_nothing_can_be_locked_or_written_that_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Claims(tmp_path / "file" / "run.jsonl").take("a")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", refuse)
        with pytest.raises(ConfigError, match="files cannot be locked there"):
            Claims(tmp_path / "run.jsonl").take("a")
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(ConfigError, match="files cannot be locked there"):
        Claims(tmp_path / "run.jsonl").take("a")


def test_claims_given_out_are_each_of_one(tmp_path: Path) -> None:
    claims = [Claims(tmp_path / "run.jsonl") for _ in range(3)]
    keys = [f"{number:064x}" for number in range(30)]
    taken = Counter(key for each in claims for key in keys if each.take(key))
    assert taken == Counter(keys)
