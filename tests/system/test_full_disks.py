"""Disks that are full, folders that cannot be written, paths that can be none: one error, earlier records intact."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FULL, forked
from support.journals import FINGERPRINT, a_journal, a_prompt, a_result, key_of

from specrej_eval import cli, load
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.records.journal import Journal
from specrej_eval.records.jsonl import Appender, WriteError, as_text, checked_line, parsed, write_atomically
from specrej_eval.records.trace import Tracer

Counted = Callable[[str, int], None]
ANSWERS = 6


def limited(size: int, work: Callable[[], Any]) -> int:
    """The exit code of ``work`` in a process whose files may grow to so many bytes; 3 where it was told so."""

    def within() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            return int(work() or 0)
        except WriteError as error:
            text = str(error)
            return 3 if "cannot be written: File too large" in text and "hint: " in text else 4
        except ConfigError as error:  # of a file that is replaced as a whole
            return 3 if "cannot be written: File too large" in str(error) else 5

    return forked.ended(forked.start(within))


def sizes(whole: int) -> Iterator[int]:
    step = max(1, whole // (60 if FULL else 12))
    yield from range(0, whole + step, step)


def whole_lines(content: bytes, of: bytes) -> bool:
    """Whether it is the beginning of what an undisturbed run writes, up to the end of a line."""
    return of.startswith(content) and (not content or content.endswith(b"\n"))


def test_a_journal_on_a_full_disk_keeps_what_it_has_and_goes_on_later(tmp_path: Path, counted: Counted) -> None:
    whole = b"".join(a_journal(tmp_path / "whole.jsonl", ANSWERS))

    def work() -> None:
        a_journal(path, ANSWERS)

    for size in sizes(len(whole)):
        path = tmp_path / "run.jsonl"
        path.unlink(missing_ok=True)
        assert limited(size, work) == (3 if size < len(whole) else 0), size
        left = path.read_bytes()
        assert whole_lines(left, whole) and len(left) <= size
        journal = Journal(str(path), FINGERPRINT)
        for number in range(ANSWERS):
            if journal.get(key_of(number), a_prompt(number)) is None:
                journal.put(key_of(number), a_result(number))
        journal.close()
        assert path.read_bytes() == whole
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
        counted("disks full at a byte", 1)


def test_a_process_that_goes_on_after_a_full_disk_writes_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"

    def work() -> int:
        with Appender(str(path), argument="journal") as file:
            for number in range(10):
                try:
                    file.write(f"{number}" * 100 + "\n")
                except WriteError:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return 0

    assert limited(450, work) == 0
    assert path.read_text() == "".join(f"{number}" * 100 + "\n" for number in range(10) if number != 4)


def test_a_trace_on_a_full_disk_ends_with_a_whole_event(tmp_path: Path) -> None:
    def work() -> None:
        tracer = Tracer(str(tmp_path / "trace.jsonl"))
        for number in range(ANSWERS):
            tracer.request(a_result(number))

    assert limited(1500, work) == 3
    lines = (tmp_path / "trace.jsonl").read_text().split("\n")
    assert lines.pop() == "" and all(json.loads(line)["event"] == "request" for line in lines)


def test_a_file_that_is_replaced_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "specrej_run.json"
    write_atomically(path, "the old text")
    assert limited(100, lambda: write_atomically(path, "x" * 1000)) == 3
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {path.name: "the old text"}


def test_a_device_without_room_is_told_by_its_own_name() -> None:
    with Appender("/dev/full", argument="journal") as file, pytest.raises(WriteError, match="No space left on device"):
        file.write("a line\n")


def run_words(folder: Path) -> list[str]:
    (folder / "prompts.json").write_text(json.dumps([f"{number} + 2 = ?" for number in range(4)]))
    words = ["run", "--prompts", str(folder / "prompts.json"), "--output", str(folder / "out")]
    return [*words, "--n", "2", "--max_gen_toks", "8", "--device", "cpu"]


def answers_of(folder: Path) -> list[str]:
    return [json.loads(line)["output"] for line in (folder / "out/specrej_outputs.jsonl").read_text().splitlines()]


def limited_command(size: int, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command whose files may grow to so many bytes; a pipe has no size."""
    reader, writer = os.pipe()

    def work() -> int:
        sys.stdout = sys.stderr = open(writer, "w", buffering=1, closefd=False)  # noqa: SIM115  # it is this process's
        return cli.main(words)

    code = limited(size, work)
    os.close(writer)
    with open(reader) as told:
        return code, told.read()


def test_a_run_whose_disk_is_full_says_so_once_and_is_completed_by_the_same_command(
    tmp_path: Path, counted: Counted
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    assert cli.main(run_words(alone)) == 0
    largest = max(path.stat().st_size for path in (alone / "out").iterdir())
    for size in range(500, largest, largest // (20 if FULL else 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        words = run_words(folder)
        code, said = limited_command(size, words)
        assert code == 1 and said.count("cannot be written: File too large") == 1 and "Traceback" not in said, said
        for path in (folder / "out").glob("*.jsonl"):
            content = path.read_bytes()
            assert not content or content.endswith(b"\n"), path
        assert cli.main(words) == 0
        assert answers_of(folder) == answers_of(alone)
        counted("runs whose disk was full", 1)


def test_a_small_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, where this user may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, timeout=30, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(WriteError, match="No space left on device"):
            a_journal(disk / "run.jsonl", 1000)
        content = (disk / "run.jsonl").read_bytes()
        assert content.endswith(b"\n")
        assert len(Journal(str(disk / "run.jsonl"), FINGERPRINT)) == content.count(b"\n") - 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


# folders that cannot be written, and paths that can be none


NOWHERE = "/proc/specrej_eval"
"""Where not even root can make a folder."""
NO_PATHS = {
    "too long a name": "x" * 300,
    "too long a path": "a/" * 3000 + "b",
    "NUL": "a\0b",
    "a line break": "a\nb",
    "an escape": "\x1b[2Jb",
    "no text": "a\udcffb",
    "half a character": "a\ud800b",
    "turned round": "a\u202egnp.exe",
}


def commands(path: str, folder: Path) -> dict[str, list[str]]:
    """Every path that a command takes, here at its place."""
    prompts = folder / "pairs.json"
    prompts.write_text(json.dumps([{"prompt": "1 + 2 = ?", "response": "3"}]))
    given = str(prompts)
    return {
        "run --output": ["run", "--prompts", given, "--output", path],
        "run --prompts": ["run", "--prompts", path],
        "run --name": ["run", "--prompts", given, "--name", path],
        "run --trace_path": ["run", "--prompts", given, "--output", str(folder / "o"), "--trace_path", path],
        "score --input": ["score", "--input", path],
        "score --output": ["score", "--input", given, "--output", path],
        "report": ["report", path],
        "journal show": ["journal", "show", path],
        "journal verify": ["journal", "verify", path],
        "journal merge": ["journal", "merge", path, "--output", str(folder / "m.jsonl")],
        "gather": ["gather", path, "--output", str(folder / "g")],
        "export": ["export", "alpaca", path, "--output", str(folder / "e.json")],
        "submission lm-eval": ["submission", "lm-eval", path, "--output", str(folder / "s")],
        "submission alpaca": ["submission", "alpaca", "--name", "a", "--model_outputs", path, "--output", str(folder)],
        "init": ["init", path],
    }


@pytest.mark.parametrize("kind", [*NO_PATHS, "a folder that cannot be made"])
def test_a_path_that_can_be_none_is_one_error_in_every_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], counted: Counted
) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = kind not in NO_PATHS
    path = f"{NOWHERE}/x.json" if nowhere else NO_PATHS[kind]
    for name, words in commands(path, tmp_path).items():
        if nowhere and name == "run --name":
            continue
        assert cli.main(words) == 1, name
        out, err = capsys.readouterr()
        assert "Traceback" not in err and not out, (name, err)
        assert err.count(f"specrej-eval {words[0]}: ") == 1 and len(err) < 1500, (name, err)
        assert nowhere or err.replace("\n", "").isprintable(), (name, err)  # progress bars while models load
        counted("paths refused", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["pairs.json"], ["o", "pairs.json"])


NOBODY = 65534
"""The user who owns nothing."""


def as_nobody(work: Callable[[], Any]) -> int:
    """The exit code of ``work`` in a process without root's rights; what it needs must be imported already."""

    def within() -> int:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return int(work() or 0)

    return forked.ended(forked.start(within))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "what",
    [
        "a folder of root's",
        "one that may not be entered",
        pytest.param("one without a right to write", marks=pytest.mark.full),
        "a file of root's",
    ],
)
def test_a_place_that_this_user_may_not_write_is_one_error(what: str, tmp_path: Path, counted: Counted) -> None:
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    prompts = tmp_path / "pairs.json"
    prompts.write_text(json.dumps([{"prompt": "1 + 2 = ?", "response": "3"}]))
    place = tmp_path / "place"
    place.mkdir()
    earlier = {}
    if what == "a file of root's":
        a_journal(place / "run.jsonl", 2)
        (place / "trace.jsonl").write_text('{"event": "run"}\n')
        earlier = {path: path.read_bytes() for path in place.iterdir()}
        place.chmod(0o777)  # what lies there is root's all the same
    elif what == "one that may not be entered":
        place.chmod(0o700)
    elif what == "one without a right to write":
        os.chown(place, NOBODY, NOBODY)
        place.chmod(0o555)
    given = ["--prompts", str(prompts), "--n", "2", "--max_gen_toks", "4", "--device", "cpu"]
    ways = {
        "run --trace_path": ["run", *given, "--output", str(place / "o"), "--trace_path", str(place / "trace.jsonl")],
    }
    if not earlier:
        ways["score"] = ["score", "--input", str(prompts), "--output", str(place / "scored.jsonl")]
        ways["run"] = ["run", *given, "--output", str(place / "out")]
        ways["init"] = ["init", str(place / "new")]
    assert cli.main(["run", *given, "--output", str(tmp_path / "before")]) == 0  # everything is imported now
    for name, words in ways.items():
        reader, writer = os.pipe()

        def work(words: list[str] = words, writer: int = writer) -> int:
            sys.stdout = sys.stderr = open(writer, "w", buffering=1, closefd=False)  # noqa: SIM115  # this process's
            return cli.main(words)

        code = as_nobody(work)
        os.close(writer)
        with open(reader) as told:
            said = told.read()
        assert code == 1 and "Traceback" not in said and "ermission denied" in said, (name, said)
        assert said.count(f"specrej-eval {words[0]}: ") == 1, (name, said)
        counted("places refused", 1)

    def by_python() -> int:
        with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
            load(n=2, max_gen_toks=4, device="cpu", journal=str(place / "run.jsonl"))
        return 0

    assert as_nobody(by_python) == 0
    assert {path: path.read_bytes() for path in place.iterdir()} == earlier


@pytest.mark.parametrize("path", NO_PATHS.values(), ids=NO_PATHS)
@pytest.mark.parametrize("argument", ["journal", "trace_path"])
def test_a_path_that_can_be_none_is_told_before_models_load(
    path: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval import api

    monkeypatch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=argument):
        load(**{argument: path})


# texts that are none


HALVES = ("a\ud800b", "\udfff", "x" * 500 + "\udc00")


@pytest.mark.parametrize("text", HALVES)
def test_half_a_surrogate_pair_in_a_prompt_is_told_before_anything_is_decoded(text: str, tmp_path: Path) -> None:
    generator = load(n=2, max_gen_toks=4, journal=str(tmp_path / "run.jsonl"))
    asked = ["1 + 2 = ?", text]
    with pytest.raises(SpecRejError, match="half of a surrogate pair"):
        generator.generate(asked)
    assert not (tmp_path / "run.jsonl").exists() or (tmp_path / "run.jsonl").read_bytes().count(b"\n") <= 1
    assert len(generator.generate(asked[:1])) == 1
    for suffix, content in ((".json", json.dumps(asked)), (".jsonl", "\n".join(map(json.dumps, asked)))):
        file = tmp_path / f"prompts{suffix}"
        file.write_text(content)
        from specrej_eval.records.prompt_files import read_prompts

        with pytest.raises(ConfigError, match=r"(row|line) 2: .* half of a surrogate pair") as refused:
            read_prompts(file)
        assert str(refused.value).encode()


@given(st.recursive(st.text(st.characters()) | st.text(st.sampled_from("a\ud800\x00\u2028")), st.lists, max_leaves=5))
def test_any_text_is_written_as_utf_8_and_read_again(value: Any) -> None:
    for indent in (None, 2):
        assert parsed(as_text({"text": value}, indent=indent).encode()) == {"text": value}
    for ensure_ascii in (True, False):
        line = checked_line({"text": value}, ensure_ascii=ensure_ascii)
        assert line.count("\n") == 1 and parsed(line.encode())["text"] == value


def test_a_killed_replacement_is_cleared_away_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "file.json"

    def work() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_atomically(path, "new")

    assert forked.ended(forked.start(work)) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".file.json.1234", ".other.json" + left.name.removeprefix(".file.json"))]
    for other in others:
        other.write_text("the user's")
    write_atomically(path, "new")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
