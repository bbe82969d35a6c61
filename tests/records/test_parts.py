"""One name of a record and the files of several processes: which belong to it, and which are somebody's own."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from specrej_eval.records import parts

OURS = ["run.jsonl", "run_joined0.jsonl", "run_joined12.jsonl", "run_rank0.jsonl", "run_rank3.jsonl"]
NOT_OURS = [
    *("run_rank.jsonl", "run_ranking.jsonl", "run_joined.jsonl", "run_joined0_backup.jsonl", "run_rank0.jsonl.damaged"),
    *(
        "run_copy.jsonl",
        "run copy.jsonl",
        "run2.jsonl",
        "my_run.jsonl",
        "run.json",
        "runXjsonl",
        ".run.jsonl.lock",
    ),
]


@pytest.mark.parametrize("name", OURS)
def test_of_each_file_the_others_are_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    for file in (*OURS, *NOT_OURS):
        (tmp_path / file).touch()
    (tmp_path / "run_rank7.jsonl").mkdir()
    path = tmp_path / name
    assert parts.whole(path) == tmp_path / "run.jsonl"
    assert [file.name for file in parts.files(path)] == OURS
    assert [file.name for file in parts.beside(path)] == [file for file in OURS if file != name]
    assert parts.are_of(path, [*OURS, *NOT_OURS]) == OURS


def test_names_of_processes() -> None:
    assert [parts.kind(name) for name in OURS] == ["", "joined", "joined", "rank", "rank"]
    assert not any(map(parts.kind, NOT_OURS))
    assert [path.name for path in islice(parts.joined_paths("a/run.jsonl"), 2)] == [*OURS[1:2], "run_joined1.jsonl"]
    assert [path.name for path in islice(parts.joined_paths("a/run_rank5.jsonl"), 1)] == OURS[1:2]
    assert parts.rank_path("a/run.jsonl", 3, 4) == "a/run_rank3.jsonl" and parts.rank_path("run", 0, 1) == "run"
    assert parts.alike("copy_1.jsonl", "a/run_joined12.jsonl") == "copy_1_joined12.jsonl"
    assert parts.alike("copy_1.jsonl", "run.jsonl") == "copy_1.jsonl"


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a\0b", "x" * 5000, "no/such/folder/run.jsonl", "run", ".jsonl"])
def test_any_text_may_be_asked(path: str) -> None:
    assert parts.kind(path) == "" and parts.whole(path) == Path(path)
    assert parts.files(path) == [*parts.beside(path)] == []
