"""Two processes never write into one journal or one folder of answers: the second is told who does."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import forked

from specrej_eval import cli, load
from specrej_eval.errors import ConfigError
from specrej_eval.records import lock
from specrej_eval.records.journal import Journal, check

FINGERPRINT = {"pretrained": "org/policy", "environment": {}}


class Owner:
    """Something that lives."""


def another_process(path: Path) -> AbstractContextManager[int]:
    """A process that holds a path; its id."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def work() -> Owner:
        owner = Owner()
        lock.hold(owner, path, argument="journal")
        return owner

    return forked.living(work)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


def prompts(folder: Path) -> str:
    file = folder / "prompts.json"
    file.write_text(json.dumps(["1 + 2 = ?", "3 + 4 = ?"]))
    return str(file)


def by_run(folder: Path) -> None:
    arguments = {"prompts": prompts(folder), "output": str(folder / "run"), "n": "2", "max_gen_toks": "8"}
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    from specrej_eval.commands import run

    run.run(cli.parse("run", words))


def by_score(folder: Path) -> None:
    file = folder / "pairs.json"
    file.write_text(json.dumps([{"prompt": "1 + 2 = ?", "response": "3"}]))
    from specrej_eval.commands import score

    score.run(cli.parse("score", ["--input", str(file), "--output", str(folder / "scored.jsonl")]))


def by_load(folder: Path) -> None:
    load(n=2, max_gen_toks=8, journal=str(folder / "run.jsonl")).generate(["1 + 2 = ?"])


def by_lm_eval(folder: Path) -> None:
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    SpecRejLM(n=2, max_gen_toks=8, device="cpu", journal=str(folder / "run.jsonl"))


def by_alpaca_eval(folder: Path) -> None:
    import alpaca_eval.main

    rows = [{"instruction": "1 + 2 = ?", "output": "I do not know.", "generator": "reference", "dataset": "sums"}]
    (folder / "ref.json").write_text(json.dumps(rows))
    config = {
        "spr": {
            "prompt_template": "{instruction}",
            "fn_completions": "specrej_completions",
            "completions_kwargs": {"n": 2, "max_gen_toks": 8},
        }
    }
    alpaca_eval.main.evaluate_from_model(
        config,
        evaluation_dataset="ref.json",
        annotators_config="specrej_reward_judge",
        output_path=str(folder / "run"),
        is_return_instead_of_print=True,
    )


def by_trace(folder: Path) -> None:
    load(n=2, max_gen_toks=8, trace_path=str(folder / "trace.jsonl")).generate(["1 + 2 = ?"])


WAYS = [
    (by_run, "run/specrej_outputs.jsonl"),
    (by_score, "scored.jsonl"),
    (by_load, "run.jsonl"),
    (by_trace, "trace.jsonl"),
    (by_lm_eval, "run.jsonl"),
    (by_alpaca_eval, "run/specrej_outputs.jsonl"),
]


@pytest.mark.parametrize(("way", "file"), WAYS, ids=lambda value: getattr(value, "__name__", None))
def test_the_second_process_is_refused_before_models_load_and_told_who_is_there(
    way: Callable[[Path], None], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval import api

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        with another_process(tmp_path / file) as pid:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            with pytest.raises(ConfigError) as refused:
                way(tmp_path)
            left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path in before}
    assert f"process {pid} on {socket.gethostname()}, since 20" in str(refused.value)
    assert f"`kill {pid}` stops it" in str(refused.value.hint)
    assert left == before
    way(tmp_path)  # the other one was killed: nothing is in the way


def test_of_two_runs_at_once_one_is_refused_and_the_answers_are_those_of_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    by_run(alone)
    both = tmp_path / "both"
    both.mkdir()
    prompts(both)

    def work() -> int:
        try:
            by_run(both)
        except ConfigError as error:
            assert "is in use by process" in str(error), str(error)
            return 3
        return 0

    codes = sorted(map(forked.ended, [forked.start(work) for _ in range(3)]))
    assert codes[0] == 0 and set(codes) <= {0, 3}, capfd.readouterr().err
    answers = [
        [json.loads(line)["output"] for line in (folder / "run/specrej_outputs.jsonl").read_text().splitlines()]
        for folder in (alone, both)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 2
    assert not [*both.rglob("*.lock")], "a regular end leaves nothing"


def test_processes_that_contend_and_are_killed_never_hold_it_together(tmp_path: Path) -> None:
    path, inside = tmp_path / "run.jsonl", tmp_path / "inside"

    def work() -> int:
        rng = random.Random(os.getpid())
        for _ in range(12):
            owner = Owner()
            try:
                give_up = lock.hold(owner, path, argument="journal")
            except ConfigError:
                continue
            (inside / str(os.getpid())).touch()
            if [*inside.iterdir()] != [inside / str(os.getpid())]:
                return 1
            time.sleep(rng.random() / 100)
            (inside / str(os.getpid())).unlink()
            give_up()
        return 0

    inside.mkdir()
    codes = [forked.ended(pid) for pid in [forked.start(work) for _ in range(5)]]
    assert codes == [0] * 5
    for _ in range(5):  # a holder is killed, and the next one waits no longer than it takes to look
        with another_process(path) as pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            lock.hold(Owner(), path, argument="journal")()


@pytest.mark.parametrize(
    ("theirs", "mine", "refused"),
    [
        ("run_rank0.jsonl", "run_rank1.jsonl", False),
        ("run_rank1.jsonl", "run_rank0.jsonl", False),
        ("run_rank0.jsonl", "run_rank0.jsonl", True),
        ("run.jsonl", "run_rank1.jsonl", True),
        ("run_rank1.jsonl", "run.jsonl", True),
        ("other_rank1.jsonl", "run.jsonl", False),
        ("run.jsonl", "run2.jsonl", False),
    ],
)
def test_ranks_of_one_run_do_not_lock_each_other_out_but_another_run_is(
    theirs: str, mine: str, refused: bool, tmp_path: Path
) -> None:
    with another_process(tmp_path / theirs):
        for attempt in (lambda: lock.check(tmp_path / mine, argument="journal"), lambda: hold(tmp_path / mine)):
            if refused:
                with pytest.raises(ConfigError, match="is in use by process"):
                    attempt()
            else:
                attempt()


def hold(path: Path) -> None:
    Journal(str(path), FINGERPRINT).close()


def test_a_journal_by_another_name_is_the_same_journal(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("run.jsonl")
    with another_process(tmp_path / "run.jsonl"), pytest.raises(ConfigError, match="in use by process"):
        check(str(tmp_path / "link.jsonl"), lambda: FINGERPRINT)


def test_one_process_may_open_its_journal_again(tmp_path: Path) -> None:
    first, second = (Journal(str(tmp_path / "run.jsonl"), FINGERPRINT) for _ in range(2))
    first.close()
    assert [*tmp_path.glob(".*.lock")], "the second still holds it"
    second.close()
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_forked_process_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "run.jsonl"), FINGERPRINT)

    def work() -> int:
        with pytest.raises(ConfigError, match=f"process {os.getppid()} on"):
            hold(tmp_path / "run.jsonl")
        return 0

    assert forked.ended(forked.start(work)) == 0
    journal.close()
    hold(tmp_path / "run.jsonl")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "\\u001b[2J", "host": ["x"]}', "\x00" * 10_000])
def test_a_lock_file_that_says_nothing_of_use_locks_all_the_same(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with another_process(path):
        lock.lock_file(path).write_text(content)
        with pytest.raises(ConfigError, match="is in use by") as refused:
            hold(path)
    assert "\x1b" not in str(refused.value)
    lock.lock_file(path).write_text(content)  # what a killed process left
    hold(path)


@pytest.mark.parametrize("how", ["no fcntl", "no locks on this file system"])
def test_where_files_cannot_be_locked_that_is_said_once(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    lock._say_once.cache_clear()
    if how == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    for name in ("a.jsonl", "b.jsonl", "a.jsonl"):
        hold(tmp_path / name)
    assert len([record for record in caplog.records if "cannot be locked here" in record.getMessage()]) == 1


def test_what_is_no_file_is_locked_by_nobody_and_no_lock_lies_beside_it(tmp_path: Path) -> None:
    from specrej_eval.records.trace import Tracer

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (str(pipe), "/dev/null"):
        lock.check(path, argument="trace_path")
        tracer = Tracer(path)
        tracer.run({"n": 1})
        tracer.close()
    assert json.loads(os.read(reader, 4096))["event"] == "run"
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert not Path("/dev/.null.lock").exists()
