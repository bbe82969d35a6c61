"""Records on disk: nothing paid for is dropped, and what was damaged is told, set aside and decoded anew."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import FULL, forked
from support.journals import FINGERPRINT, a_journal, a_prompt, a_result, key_of

from specrej_eval import cli
from specrej_eval.core import GenerationResult
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.records.journal import Journal
from specrej_eval.records.jsonl import checked_line, checksum
from specrej_eval.records.outputs import OutputsFolder, open_run


def opened(path: Path) -> dict[int, GenerationResult]:
    """What a run finds in a journal, by prompt; the rest it would decode anew."""
    journal = Journal(str(path), FINGERPRINT)
    journal.close()
    found = {number: journal.get(key_of(number), a_prompt(number)) for number in range(6)}
    return {number: result for number, result in found.items() if result is not None}


def changed(line: bytes, change: Callable[[dict[str, Any]], Any], *, sign: bool) -> bytes:
    """A line with another content; ``sign`` = with a checksum that fits, as a defect of ours would write it."""
    record = json.loads(line)
    change(record)
    if sign:
        return checked_line(record).encode()
    return json.dumps(record).encode() + b"\n"


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another text": lambda r: r["result"]["trajectories"][2].update(text="42"),
    "another reward": lambda r: r["result"]["trajectories"][2].update(reward=99.0),
    "another key": lambda r: r.update(key=key_of(77)),
    "no checksum": lambda r: r.pop("checksum"),
    "another run": lambda r: r.update(run="0" * 16),
    "an extra field": lambda r: r.update(extra=1),
    "a missing field": lambda r: r["result"].pop("rounds"),
}
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "best is no row": lambda r: r["result"].update(best=99),
    "best was rejected": lambda r: r["result"].update(best=0),
    "token_ids not whole": lambda r: r["result"]["trajectories"][0].update(token_ids=[1, "x", 2]),
    "a negative row": lambda r: r["result"]["trajectories"][0].update(row=-1),
    "a reward in words": lambda r: r["result"]["trajectories"][0].update(reward="x"),
    "trajectories no list": lambda r: r["result"].update(trajectories={"a": 1}),
    "num_tokens wrong": lambda r: r["result"]["trajectories"][0].update(num_tokens=5),
    "an unknown finish reason": lambda r: r["result"]["trajectories"][0].update(finish_reason="tired"),
    "a round with a list": lambda r: r["result"]["rounds"][0].update(rows=[]),
    "seconds in words": lambda r: r["result"]["ledger"].update(seconds={"decode": "long"}),
    "result is a number": lambda r: r.update(result=3),
    "key is a list": lambda r: r.update(key=[]),
    "run is a list": lambda r: r.update(run=[]),
}
BYTES = {
    "a torn middle": lambda line: line[: len(line) // 2] + b"\n",
    "NULs": lambda line: b"\0" * 40 + b"\n",
    "NULs within": lambda line: line[:50] + b"\0" * 9 + line[59:],
    "not UTF-8": lambda line: b"\xff\xfe" + line,
    "half a surrogate pair": lambda line: line.replace(b"answer 2", b"answer \\ud800", 1),
    "deep brackets": lambda line: b"[" * 3000 + b"]" * 3000 + b"\n",
    "a deep record": lambda line: b'{"key": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    "a huge number": lambda line: line.replace(b'"repeat": 0', b'"repeat": ' + b"9" * 5000, 1),
    "NaN": lambda line: line.replace(b'"reward": 1.0', b'"reward": NaN', 1),
    "infinity": lambda line: line.replace(b'"reward": 1.0', b'"reward": 1e999', 1),
    "another kind of JSON": lambda line: b'"hello"\n',
    "an empty line": lambda line: b"\n",
}


@pytest.mark.parametrize("kind", [*EDITS, *WRONG, *BYTES])
def test_a_damaged_line_is_set_aside_and_the_rest_stays_usable(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, counted: Callable[[str, int], None]
) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    before = lines[3]
    if kind in EDITS:
        lines[3] = changed(before, EDITS[kind], sign=False)
    elif kind in WRONG:
        lines[3] = changed(before, WRONG[kind], sign=True)
    else:
        lines[3] = BYTES[kind](before)
    assert lines[3] != before
    path.write_bytes(b"".join(lines))
    found = opened(path)
    assert found == {number: a_result(number) for number in (0, 1, 3, 4, 5)}
    assert "line 4 of run.jsonl is damaged" in caplog.text and "run.jsonl.damaged" in caplog.text
    assert path.read_bytes() == b"".join(lines[:3] + lines[4:]), "intact lines stay as they were"
    (aside,) = (tmp_path / "run.jsonl.damaged").read_text().splitlines()
    assert json.loads(aside)["line"] == 4
    assert opened(path) == found
    counted("journals damaged", 1)


def test_the_content_of_one_record_under_the_key_of_another(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    first, second = json.loads(lines[1]), json.loads(lines[2])
    first["key"], second["key"] = second["key"], first["key"]
    path.write_bytes(b"".join([lines[0], *(json.dumps(r).encode() + b"\n" for r in (first, second)), *lines[3:]]))
    assert sorted(opened(path)) == [2, 3, 4, 5]


def test_swapped_content_is_noticed_without_checksums_too(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    header = json.dumps({"journal": 1, "fingerprint": FINGERPRINT})
    records = [{"key": key_of(number), "result": a_result(1 - number).to_dict()} for number in (0, 1)]
    records.append({"key": key_of(2), "result": a_result(2).to_dict()})
    path.write_text("\n".join([header, *map(json.dumps, records)]) + "\n")
    assert sorted(opened(path)) == [2]


def test_what_was_decoded_in_the_place_of_swapped_content_is_found_by_the_next_run(tmp_path: Path) -> None:
    """The first of two answers to a request counts; but not where it is one to another prompt."""
    path = tmp_path / "old.jsonl"
    header = json.dumps({"journal": 1, "fingerprint": FINGERPRINT})
    records = [{"key": key_of(number), "result": a_result(1 - number).to_dict()} for number in (0, 1)]
    path.write_text("\n".join([header, *map(json.dumps, records)]) + "\n")
    decoded = []
    for _ in range(2):
        journal = Journal(str(path), FINGERPRINT)
        for number in range(2):
            if journal.get(key_of(number), a_prompt(number)) is None:
                decoded.append(number)
                journal.put(key_of(number), a_result(number))
        journal.close()
    assert decoded == [0, 1], "each of them once"


def test_what_is_used_of_a_journal_with_a_damaged_header_is_used_by_the_next_run_too(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    lines[0] = b"{" + lines[0]
    lines[2] = changed(lines[2], lambda record: record.pop("checksum"), sign=False)
    path.write_bytes(b"".join(lines))
    first = sorted(opened(path))
    assert sorted(opened(path)) == first


def test_an_old_journal_is_read_said_so_once_and_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.jsonl"
    result = a_result(0).to_dict()
    del result["ledger"]["scores_floored"]
    old = json.dumps({"journal": 1, "fingerprint": FINGERPRINT}) + "\n"
    old += json.dumps({"key": key_of(0), "result": result}) + "\n"
    path.write_text(old)
    journal = Journal(str(path), FINGERPRINT)
    assert caplog.text.count("older version") == 1 and "ledger.scores_floored" in caplog.text
    assert journal.get(key_of(0), a_prompt(0)) == a_result(0)
    journal.put(key_of(1), a_result(1))
    journal.close()
    assert path.read_text().startswith(old) and '"checksum"' in path.read_text().splitlines()[2]
    assert sorted(opened(path)) == [0, 1]


def test_a_damaged_header_is_written_anew_where_the_records_say_whose_they_are(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    damaged = b"".join([lines[0].replace(b"policy", b"polity"), *lines[1:]])
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"6 intact entries.*another configuration"):
        Journal(str(path), {**FINGERPRINT, "pretrained": "org/polity"})
    assert path.read_bytes() == damaged
    assert len(opened(path)) == 6
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", [b"hello\nworld\n", b"hello", b'{"a": 1}\n', b"[]\n", b"\x00\x01\x02"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a journal"):
        opened(path)
    assert path.read_bytes() == content and not (tmp_path / "notes.txt.damaged").exists()


def test_a_newer_schema_is_named_and_nothing_touched(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    header = json.loads(lines[0]) | {"journal": 7}
    header["checksum"] = checksum(header)
    content = json.dumps(header).encode() + b"\n" + b"".join(lines[1:-1]) + b"damaged\n"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"its schema is 7.*reads 1 to 2"):
        opened(path)
    assert path.read_bytes() == content


def test_of_two_answers_to_one_request_the_first_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    a_journal(path)
    journal = Journal(str(path), FINGERPRINT)
    journal.put(key_of(1), a_result(1))
    journal.put(key_of(2), a_result(5))
    journal.close()
    assert opened(path) == {number: a_result(number) for number in range(6)}
    assert "answers 1 request more than once and differently (lines 4 and 9)" in caplog.text


def test_a_record_that_lacks_only_its_line_break_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    path.write_bytes(b"".join(lines)[:-1])
    assert len(opened(path)) == 6
    assert path.read_bytes() == b"".join(lines)


def mutated(lines: list[bytes], draw: random.Random) -> tuple[list[bytes], set[int]]:
    """A journal with some damage, and the lines that were not touched."""
    touched = {draw.randrange(len(lines)) for _ in range(draw.randint(1, 3))}
    result = list(lines)
    for place in touched:
        line = bytearray(lines[place][:-1])
        match draw.randrange(4):
            case 0:
                for _ in range(draw.randint(1, 5)):
                    line[draw.randrange(len(line))] = draw.randrange(256)
            case 1:
                start = draw.randrange(len(line))
                del line[start : start + draw.randint(1, 80)]
            case 2:
                start = draw.randrange(len(line))
                line[start:start] = bytes(draw.choices(b'{}[]",:0123456789\\\0e-x', k=draw.randint(1, 40)))
            case _:
                record = json.loads(line)
                shaken(record, draw)
                line = bytearray(json.dumps(record).encode())
        result[place] = bytes(line) + b"\n"
    return result, set(range(len(lines))) - touched


def shaken(value: Any, draw: random.Random) -> None:
    """Some value within a JSON object, put to another."""
    while True:
        name = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[name], (dict, list)) and value[name] and draw.random() < 0.8:
            value = value[name]
            continue
        values: list[Any] = [None, True, -1, 99, 1e308, 10**400, "x", "", [], {}, [[]], {"a": []}]
        value[name] = copy.deepcopy(draw.choice(values))
        return


def test_any_damage_is_borne(tmp_path: Path, counted: Callable[[str, int], None]) -> None:
    path = tmp_path / "run.jsonl"
    lines = a_journal(path)
    draw = random.Random(0)
    number = 2500 if FULL else 100
    for _ in range(number):
        content, untouched = mutated(lines, draw)
        path.write_bytes(b"".join(content))
        try:
            found = opened(path)
        except SpecRejError as error:
            # a whole header of a newer version cannot be told from damage without reading it
            assert 0 not in untouched, error
            assert path.read_bytes() == b"".join(content)
            continue
        assert {place - 1 for place in untouched if place} <= found.keys(), "an intact record was lost"
        assert all(result == a_result(place) for place, result in found.items())
    counted("journals damaged", number)


# folders of answers

COMMON = ["--n", "2", "--max_gen_toks", "24", "--until", '["\\n"]']
TEXTS = [f"Q: {a} + {a + 3} = ?\nA:" for a in range(11, 17)]


def prompts(folder: Path, texts: list[str], name: str) -> str:
    path = folder / name
    path.write_text(json.dumps(texts))
    return str(path)


def run(*words: str) -> int:
    return cli.main(["run", *words, *COMMON])


def everything(out: Path) -> dict[str, str]:
    store = OutputsFolder(out)
    return {item.key: item.output for item in (*store.answers(), *store.kept())}


def test_no_second_command_removes_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: Callable[[str, int], None]
) -> None:
    out = tmp_path / "out"
    whole = prompts(tmp_path, TEXTS, "all.json")
    assert run("--prompts", whole, "--output", str(out), "--limit", "5") == 0
    known = everything(out)
    assert len(known) == 5
    shuffled = prompts(tmp_path, TEXTS[2::-1], "turned.json")
    others = prompts(tmp_path, ["Q: 1 + 1 = ?\nA:"], "others.json")
    twice = prompts(tmp_path, [TEXTS[0], TEXTS[0], TEXTS[4]], "twice.json")
    for words, asked in (
        ([whole, "--limit", "2"], TEXTS[:2]),
        ([shuffled], TEXTS[2::-1]),
        ([others, "--keep_trajectories", "false"], ["Q: 1 + 1 = ?\nA:"]),
        ([twice], [TEXTS[0], TEXTS[0], TEXTS[4]]),
        ([whole], TEXTS),
    ):
        assert run("--prompts", words[0], "--output", str(out), *words[1:]) == 0
        assert [item.instruction for item in open_run(out)[1]] == asked
        now = everything(out)
        assert known.items() <= now.items(), f"{words} removed or changed answers"
        known = now
        counted("second commands", 1)
    said = capsys.readouterr().err
    assert "3 answers to other prompts are kept in specrej_outputs_kept.jsonl" in said
    assert run("--prompts", whole, "--output", str(out), "--name", "another") == 1
    (out / "specrej_run.json").rename(tmp_path / "aside.json")
    lines = (out / "specrej_outputs.jsonl").read_bytes()
    assert run("--prompts", whole, "--output", str(out), "--seed", "1") == 1
    assert "nothing says what made them" in capsys.readouterr().err
    assert (out / "specrej_outputs.jsonl").read_bytes() == lines


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are decoded from now on."""
    found: list[str] = []
    opened = TransformersEngine.open_all
    monkeypatch.setattr(
        TransformersEngine,
        "open_all",
        lambda self, openings: (
            found.extend(each.prompt.conversation[-1]["content"] for each in openings) or opened(self, openings)
        ),
    )
    return found


ASKED_AGAIN: dict[str, list[str]] = {
    "the same": TEXTS,
    "fewer": TEXTS[:2],
    "fewer, turned": TEXTS[4:1:-1],
    "others": ["Q: 1 + 1 = ?\nA:", "Q: 2 + 1 = ?\nA:"],
    "some, and another": [TEXTS[3], "Q: 1 + 1 = ?\nA:", TEXTS[0]],
}
PLACES = range(2, 46, 3) if FULL else (24,)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("asked", ASKED_AGAIN)
def test_no_second_command_after_a_kill_removes_an_answer(
    asked: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[str, int], None]
) -> None:
    out = tmp_path / "out"
    words = ["--output", str(out), "--batch_size", "1", "--prompts"]
    whole = prompts(tmp_path, TEXTS, "all.json")
    assert forked.killed(lambda: run(*words, whole), place)
    counted("kills -9: run", 1)
    known = everything(out)
    assert known or FULL
    drawn = decoded(monkeypatch)
    wanted = ASKED_AGAIN[asked]
    assert run(*words, prompts(tmp_path, wanted, "again.json")) == 0
    assert [item.instruction for item in open_run(out)[1]] == wanted
    now = everything(out)
    assert known.items() <= now.items(), "answers are gone or changed"
    assert run(*words, whole) == 0
    assert now.items() <= everything(out).items()
    assert len(drawn) == len(set(drawn)), "decoded twice"
    assert not set(drawn) & {item.instruction for item in OutputsFolder(out).answers() if item.key in known}
    counted("second commands", 2)


@pytest.mark.parametrize("asked", ["some, and another", *(["fewer, turned"] if FULL else [])])
@pytest.mark.parametrize(
    "ranks, place",
    itertools.product([(1, 2), (2, 1), (2, 3), (3, 2)], [None, 8, 12, 15, 18])
    if FULL
    else [((1, 2), None), ((2, 1), 12)],
)
def test_no_second_command_of_another_number_of_processes_removes_an_answer(
    asked: str,
    ranks: tuple[int, int],
    place: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: Callable[[str, int], None],
) -> None:
    out = tmp_path / "out"
    words = ["--output", str(out), "--batch_size", "1", "--prompts"]
    whole = prompts(tmp_path, TEXTS, "all.json")
    codes = forked.together(lambda: run(*words, whole), ranks[0], killed_at=place)
    assert codes[0] == (0 if place is None else -signal.SIGKILL)
    known = everything(out)
    assert known or place is not None
    wanted = ASKED_AGAIN[asked]
    again = prompts(tmp_path, wanted, "again.json")
    assert set(forked.together(lambda: run(*words, again), ranks[1])) == {0}
    assert [item.instruction for item in open_run(out)[1]] == wanted
    now = everything(out)
    assert known.items() <= now.items(), "answers are gone or changed"
    drawn = decoded(monkeypatch)
    assert run(*words, whole) == 0
    assert now.items() <= everything(out).items()
    told = {item.instruction for item in OutputsFolder(out).answers() if item.key in now}
    # some that a kill kept from the answers are found in the rows behind them
    assert not set(drawn) & told and len(drawn) == len(set(drawn))
    counted("second commands", 2)


def test_a_resumed_run_counts_only_its_own_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    whole = prompts(tmp_path, TEXTS, "all.json")
    assert run("--prompts", whole, "--output", str(out), "--limit", "2") == 0
    first = open_run(out)[0]
    assert first.spent["decoded"] == 2 and first.spent["decode_tokens"] == first.totals["decode_tokens"]
    capsys.readouterr()
    assert run("--prompts", whole, "--output", str(out), "--limit", "5") == 0
    record, answers = open_run(out)
    assert "5 answers, 2 of them taken from the records" in capsys.readouterr().err
    assert run("--prompts", whole, "--output", str(out), "--limit", "3") == 0
    assert "3 answers, all of them taken from the records; all answers cost" in (told := capsys.readouterr().err)
    assert "0 rows" not in told
    assert (record.spent["decoded"], record.spent["taken_from_records"]) == (3, 2)
    assert record.totals["decode_tokens"] == first.totals["decode_tokens"] + record.spent["decode_tokens"]
    assert record.totals["decode_tokens"] == sum(item.ledger.decode_tokens for item in answers)


def test_an_edited_answer_of_a_folder_is_refused_by_readers_and_drawn_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    whole = prompts(tmp_path, TEXTS, "all.json")
    words = ["--prompts", whole, "--output", str(out), "--limit", "3"]
    assert run(*words) == 0
    before = everything(out)
    path = out / "specrej_outputs.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[1]) | {"output": "42"}
    path.write_text("\n".join([lines[0], json.dumps(record), lines[2]]) + "\n")
    with pytest.raises(SpecRejError, match=r"line 2 of specrej_outputs.jsonl is damaged \(its checksum is wrong\)"):
        open_run(out)
    assert run(*words) == 0
    assert everything(out) == before
    assert json.loads((out / "specrej_outputs.jsonl.damaged").read_text())["line"] == 2


def test_answers_of_an_older_version_get_their_checksums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    whole = prompts(tmp_path, TEXTS, "all.json")
    assert run("--prompts", whole, "--output", str(out), "--limit", "2") == 0
    before = everything(out)
    path = out / "specrej_outputs.jsonl"
    plain = [json.loads(line) for line in path.read_text().splitlines()]
    for record in plain:
        del record["checksum"], record["run"]
    path.write_text("".join(json.dumps(record) + "\n" for record in plain))
    record = json.loads((out / "specrej_run.json").read_text()) | {"schema_version": 1}
    (out / "specrej_run.json").write_text(json.dumps(record))
    assert everything(out) == before
    assert run("--prompts", whole, "--output", str(out), "--limit", "3") == 0
    assert caplog.text.count("older version") == 1
    assert before.items() <= everything(out).items()
    assert all("checksum" in json.loads(line) for line in path.read_text().splitlines())


# the command


def test_journals_are_shown_verified_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, half = tmp_path / "run.jsonl", tmp_path / "half.jsonl"
    lines = a_journal(path)
    assert cli.main(["journal", "show", str(path)]) == 0
    assert "org/policy" in (shown := capsys.readouterr().out) and "6 answers; they cost 54 tokens" in shown
    assert cli.main(["journal", "verify", str(path)]) == 0
    half.write_bytes(b"".join([lines[0], *lines[4:]]))
    path.write_bytes(b"".join([lines[0].replace(b"policy", b"polity"), *lines[1:3], b"damaged\n", lines[3]]))
    before = path.read_bytes()
    assert cli.main(["journal", "verify", str(path)]) == 1
    told = capsys.readouterr().out
    assert "line 1: its checksum is wrong" in told and "line 4: not JSON" in told
    words = ["journal", "merge", str(path), str(half), "--output", str(tmp_path / "whole.jsonl")]
    assert cli.main(words) == 0
    assert cli.main(words) == 1
    assert path.read_bytes() == before
    assert opened(tmp_path / "whole.jsonl") == {number: a_result(number) for number in range(6)}
    other = tmp_path / "other.jsonl"
    Journal(str(other), {**FINGERPRINT, "reward_model": "org/other"}).close()
    assert cli.main([*words[:4], str(other), "--output", str(tmp_path / "no.jsonl")]) == 1
    assert "reward_model" in capsys.readouterr().err


def test_digests_are_shown_by_their_first_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    files = {"config.json": "0123456789abcdef" * 4, "model.safetensors": "f" * 64}
    commits = {"org/policy": "0123456789" * 4}
    fingerprint = {**FINGERPRINT, "policy_files": files, "hub_commits": commits, "template": "e" * 64, "peft": None}
    journal = Journal(str(path), fingerprint)
    journal.put(key_of(0), a_result(0))
    journal.close()
    assert cli.main(["journal", "show", str(path)]) == 0
    assert cli.main(["journal", "show", str(path), "--key", key_of(0)[:12]]) == 0
    shown = capsys.readouterr().out
    assert not re.search("[0-9a-f]{13}", shown)
    words = [line.split() for line in shown.splitlines()]
    for line in ("config.json 0123456789ab", "org/policy 012345678901", f"template {'e' * 12}", "peft none"):
        assert line.split() in words
    settings = shown[: shown.index("\n\n")].splitlines()
    assert settings[0] == "settings:" and len({line.index(line.split()[1], 3) for line in settings[1:]}) == 1, "columns"
    assert f"{key_of(0)[:12]}: task task, prompt 000000000000, repeat 0" in shown


def test_all_actions_take_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for action in (["show"], ["show", "--key", "0"], ["verify"], ["merge", "--output", str(tmp_path / "no.jsonl")]):
        assert cli.main(["journal", action[0], str(folder), *action[1:]]) == 1
        told = capsys.readouterr().err
        assert "is a folder without the journal" in told or "is not a run of specrej-eval" in told
    lines = a_journal(folder / "specrej_trajectories_rank0.jsonl")
    whole = ["journal", "show", str(folder)]
    assert cli.main(whole) == 0
    assert "6 answers" in (shown := capsys.readouterr().out) and "rank0" not in shown
    (folder / "specrej_trajectories_rank1.jsonl").write_bytes(b"".join(lines[:3]))
    assert cli.main(whole) == 0
    shown = capsys.readouterr().out
    assert "6 answers" in shown and "2 answers" in shown and "rank0.jsonl\n" in shown and "rank1.jsonl\n" in shown
    assert cli.main([*whole, "--key", key_of(0)[:12]]) == 0
    assert "row 0" in capsys.readouterr().out
    (folder / "specrej_trajectories_rank1.jsonl").unlink()
    assert cli.main(["journal", "merge", str(folder), "--output", str(tmp_path / "whole.jsonl")]) == 0
    assert opened(tmp_path / "whole.jsonl") == {number: a_result(number) for number in range(6)}


def test_what_is_shown_does_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(str(path), FINGERPRINT)
    result = a_result(0)
    result.best.text = "a\x1b[2Jb\nc\x9b1m\u202e"
    journal.put(key_of(0), result)
    journal.close()
    assert cli.main(["journal", "show", str(path), "--key", key_of(0)[:8]]) == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(shown) and "a\\x1b[2Jb\\nc" in shown
