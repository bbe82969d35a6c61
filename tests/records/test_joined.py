"""One journal of several processes that join: each reads the others, and nobody else writes there meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support import forked
from support.journals import FINGERPRINT, a_journal, a_prompt, a_result, key_of

from specrej_eval import cli, load
from specrej_eval.commands import status
from specrej_eval.errors import ConfigError
from specrej_eval.records import journal as journals
from specrej_eval.records import lock
from specrej_eval.records.journal import Journal, check


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


def joined(folder: Path) -> Journal:
    return Journal(str(folder / "run.jsonl"), FINGERPRINT, join=True)


def has(journal: Journal, number: int) -> bool:
    found = journal.get(key_of(number), a_prompt(number))
    assert found is None or (found.to_dict() == a_result(number).to_dict() and found.taken)
    return found is not None


def test_each_writes_a_file_of_its_own_and_reads_what_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_journal(tmp_path / "run.jsonl", 2)
    one, two = joined(tmp_path), joined(tmp_path)
    assert [Path(each.path).name for each in (one, two)] == ["run_joined0.jsonl", "run_joined1.jsonl"]
    assert has(one, 1) and has(two, 1) and not has(one, 2)
    assert one.claim(key_of(2)) and not two.claim(key_of(2)) and not one.claim(key_of(1)), "answered, or of the other"
    one.put(key_of(2), a_result(2))
    assert not has(two, 2)
    assert not two.claim(key_of(2)) and has(two, 2), "whoever claims it looks once more"
    two.put(key_of(3), a_result(3))
    one.refresh()
    assert has(one, 3)
    three = joined(tmp_path)
    three.put(key_of(4), a_result(4))
    for each in (one, two):
        each.refresh()
        assert has(each, 4), "of one that came later"
    for each in (one, two, three):
        each.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl"] + [
        f"run_joined{number}.jsonl" for number in range(3)
    ], "a regular end leaves nothing else"
    alone = Journal(str(tmp_path / "run.jsonl"), FINGERPRINT)
    assert all(has(alone, number) for number in range(5))
    alone.close()
    for words in (["verify", str(tmp_path / "run.jsonl")], ["verify", alone.path, one.path]):
        assert cli.main(["journal", *words]) == 0
    words = ["merge", str(tmp_path / "run.jsonl"), one.path, "--output", str(tmp_path / "whole.jsonl")]
    assert cli.main(["journal", *words]) == 0
    assert "5 answers of 4 journals" in capsys.readouterr().out
    assert len(journals.read(tmp_path / "whole.jsonl").entries) == 5


def test_a_claim_that_is_given_up_is_anybodys(tmp_path: Path) -> None:
    one, two = joined(tmp_path), joined(tmp_path)
    assert one.claim(key_of(0)) and not two.claim(key_of(0))
    one.give_up_claims()
    assert two.claim(key_of(0))
    two.put(key_of(0), a_result(0))
    assert not one.claim(key_of(0)) and has(one, 0)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = joined(tmp_path), joined(tmp_path)
    for number in range(3):
        one.put(key_of(number), a_result(number))
    two.refresh()
    read: list[int] = []
    monkeypatch.setattr(journals, "scan", lambda *_, **__: pytest.fail("a file was read from its beginning"))
    scanned = journals.scanned

    def counting(content: bytes, **more: int) -> object:
        read.append(content.count(b"\n"))
        return scanned(content, **more)

    monkeypatch.setattr(journals, "scanned", counting)
    two.refresh()
    assert read == []
    one.put(key_of(3), a_result(3))
    two.refresh()
    two.refresh()
    assert read == [1] and has(two, 3) and has(two, 0)


def test_half_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    one, two = joined(tmp_path), joined(tmp_path)
    one.put(key_of(0), a_result(0))
    whole = Path(one.path).read_bytes()
    for cut in (len(whole) - 1, len(whole) - 40, whole.index(b"\n") + 5, 3):
        Path(one.path).write_bytes(whole[:cut])  # in place: the same inode
        third = joined(tmp_path)
        assert has(third, 0) is (cut == len(whole) - 1), "a record that lacks only its line break is whole"
        Path(one.path).write_bytes(whole)
        third.refresh()
        assert has(third, 0), cut
        third.close()
    two.refresh()
    assert has(two, 0)


def test_a_file_that_was_mended_is_read_anew_and_a_damaged_line_is_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = joined(tmp_path), joined(tmp_path)
    for number in range(3):
        one.put(key_of(number), a_result(number))
    file = Path(one.path)
    one.close()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], lines[2].replace(b"answer 1", b"answer 9"), lines[3]]))
    assert has(two, 0) is False
    two.refresh()
    assert has(two, 0) and not has(two, 1) and has(two, 2)
    assert "line 3 of run_joined0.jsonl is damaged" in caplog.text
    assert two.claim(key_of(1)), "it is decoded anew"
    two.give_up_claims()
    again = joined(tmp_path)
    assert again.path == one.path, "whoever goes on with the file mends it"
    again.put(key_of(1), a_result(1))
    two.refresh()
    assert all(has(two, number) for number in range(3))


def test_what_another_dropped_is_left_by_nobody(tmp_path: Path) -> None:
    """One that is killed within a line: its file is gone on with, by the next that joins, and read on by the others."""

    def die() -> None:
        journal = joined(tmp_path)
        for number in range(2):
            assert journal.claim(key_of(number))
            journal.put(key_of(number), a_result(number))
        assert journal.claim(key_of(2))
        with open(journal.path, "ab") as file:
            file.write(b'{"key": "')
        os.kill(os.getpid(), signal.SIGKILL)

    watching = Journal(str(tmp_path / "run.jsonl"), FINGERPRINT, join=True)
    assert forked.ended(forked.start(die)) == -signal.SIGKILL
    watching.refresh()
    assert has(watching, 0) and has(watching, 1) and not has(watching, 2)
    assert watching.claim(key_of(2)), "a dead process has no claim"
    other = joined(tmp_path)
    assert Path(other.path).name == "run_joined1.jsonl" and not other.claim(key_of(2))
    other.put(key_of(3), a_result(3))
    watching.refresh()
    assert has(watching, 3) and has(watching, 1)


@pytest.mark.parametrize("before", ["plain", "rank"])
def test_who_joins_and_who_writes_alone_refuse_each_other(before: str, tmp_path: Path) -> None:
    alone = tmp_path / ("run.jsonl" if before == "plain" else "run_rank1.jsonl")
    path = str(tmp_path / "run.jsonl")
    with forked.living(lambda: Journal(str(alone), FINGERPRINT)) as pid:
        for attempt in (
            lambda: check(path, lambda: FINGERPRINT, join=True),
            lambda: Journal(path, FINGERPRINT, join=True),
        ):
            with pytest.raises(ConfigError, match=f"in use by process {pid} ") as refused:
                attempt()
            assert "run.jsonl' is in use" in str(refused.value) and "join=True" in str(refused.value.hint)
    assert not [*tmp_path.glob("run_joined*")]
    with forked.living(lambda: joined(tmp_path)) as pid:
        for attempt in (lambda: check(str(alone), lambda: FINGERPRINT), lambda: Journal(str(alone), FINGERPRINT)):
            with pytest.raises(ConfigError, match=f"in use by process {pid} "):
                attempt()
        check(path, lambda: FINGERPRINT, join=True)
        joined(tmp_path).close()
    Journal(str(alone), FINGERPRINT).close()  # they are gone


def test_another_configuration_is_refused_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    other = {**FINGERPRINT, "pretrained": "org/another"}
    path = str(tmp_path / "run.jsonl")
    one = joined(tmp_path)  # which has answered nothing yet
    for attempt in (lambda: check(path, lambda: other, join=True), lambda: Journal(path, other, join=True)):
        with pytest.raises(ConfigError, match="different configuration"):
            attempt()
    assert [file.name for file in tmp_path.glob("*.jsonl")] == ["run_joined0.jsonl"]
    one.close()
    with pytest.raises(ConfigError, match="different configuration"):
        Journal(path, other)


def test_of_two_configurations_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    def begin(name: str) -> int:
        try:
            journal = Journal(str(tmp_path / "run.jsonl"), {**FINGERPRINT, "pretrained": name}, join=True)
        except ConfigError:
            return 3
        journal.put(key_of(0), a_result(0))
        return 0

    for _ in range(5):
        pids = [forked.start(lambda name=name: begin(name)) for name in ("org/a", "org/b")]
        assert sorted(map(forked.ended, pids)) == [0, 3]
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()


def test_other_models_are_refused_before_weights_load_and_other_requests_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval import api
    from specrej_eval.config import RunConfig

    path = str(tmp_path / "run.jsonl")
    held = Journal(path, api.resolve(RunConfig(n=2), {}).of_models(), join=True)
    monkeypatch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="reward_model was 'embedded', is now 'likelihood'"):
        load(journal=path, join=True, reward_model="likelihood")
    api.resolve(RunConfig(n=4, alpha=0.25, journal=path, join=True), {})
    held.close()


REFUSED = [
    ({}, "join=True needs journal=FILE"),
    ({"journal": "run.jsonl", "n": "max"}, "n=max with join=True"),
    ({"journal": "run.jsonl", "max_decode_tokens": 100}, "max_decode_tokens counts the tokens of all processes"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED)
def test_what_cannot_be_shared_is_one_error_before_models_load(
    arguments: dict[str, object], told: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval import api

    monkeypatch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=told):
        load(join=True, **arguments)
    assert not [*own_folder.iterdir()]


def test_processes_of_a_launcher_do_not_join(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="2 processes of a launcher"):
            load(join=True, journal="run.jsonl")


def test_status_counts_prompts_once_however_many_share_them(tmp_path: Path) -> None:
    from specrej_eval.records.state import StateFile, state_file

    a_journal(tmp_path / "run.jsonl", 1)

    def work() -> Journal:
        journal = joined(tmp_path)
        state = StateFile(str(state_file(journal.path)), total=8)
        for _ in range(2):
            state.finished(a_result(1))
        state.__enter__()
        return journal

    with forked.living(work), forked.living(work):
        told = "\n".join(status.lines(tmp_path / "run.jsonl"))
    assert "running, 1 of 8 answers" in told and told.count("alive, 2 of 8") == 2
