"""Numbers in messages: one of a thing is never several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specrej_eval import cli
from specrej_eval.wording import counted, shortened

ONE_OF_SEVERAL = re.compile(
    r"(?<![\d.,])1 (?:\w+ )?(?:answers|rows|prompts|runs|tokens|calls|requests|files|lines|entries|journals|pairs)\b"
)


def test_one_is_one_and_all_else_several() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    assert [counted(number, "entry is", "entries are") for number in (1, 2)] == ["1 entry is", "2 entries are"]


@pytest.mark.parametrize("length", [0, 1, 59, 60, 61, 200])
def test_what_is_left_out_is_marked(length: int) -> None:
    text = shortened("a" * length)
    assert len(text) == min(length, 60) and text.endswith("...") == (length > 60)


def test_no_command_tells_of_one_thing_as_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one prompt with one row and one token, through all that reads it."""
    (tmp_path / "prompts.csv").write_text("instruction,response\nQ: 1 + 1 = ?,2\n")
    asked = ["run", "--prompts", str(tmp_path / "prompts.csv"), "--n", "1", "--max_gen_toks", "1", "--device", "cpu"]
    runs = [str(tmp_path / "runs" / f"seed{seed}") for seed in (0, 1)]
    commands = [
        [*asked, "--output", str(tmp_path / "runs"), "--seeds", "0,1"],
        [*asked, "--output", runs[0], "--seed", "0"],
        ["report", *runs],
        ["journal", "show", runs[0]],
        ["journal", "merge", runs[0], "--output", str(tmp_path / "merged.jsonl")],
        ["gather", *runs, "--output", str(tmp_path / "gathered")],
        ["export", "alpaca", runs[0], "--output", str(tmp_path / "out.json")],
        ["score", "--input", str(tmp_path / "prompts.csv")],
        ["init", str(tmp_path / "new")],
    ]
    told = []
    for words in commands:
        assert cli.main(words) == 0
        told.append("\n".join(capsys.readouterr()))
    assert "1 answer" in told[0] and "1 row scored" in told[7]
    assert not [found[0] for text in told for found in ONE_OF_SEVERAL.finditer(text)], "\n".join(told)
