"""Names that stand in data never lead out of the folder they are meant for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specrej_eval.errors import ConfigError
from specrej_eval.paths import LONGEST, below, file_name, lies_in
from specrej_eval.records.run_names import default_name

HOSTILE = (
    "..",
    ".",
    "",
    "/etc/passwd",
    "../../../x",
    "a/../../x",
    "..\\..\\x",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "\u202egnp",
    "\ud800",
    "x" * 300,
    "~",
    "~root/.ssh",
    "-rf",
    "a/b",
    "COM1:",
)
names = st.one_of(
    st.sampled_from(HOSTILE), st.text(), st.lists(st.sampled_from(["..", ".", "/", "\\", "a"])).map("".join)
)


@given(names)
def test_a_file_name_is_one_name_of_harmless_characters(text: str) -> None:
    name = file_name(text)
    assert name.isascii() and 0 < len(name) <= LONGEST
    assert Path(name).name == name and not set(name) & set("/\\:*?\"<>| '\n\0") and name[0] not in ".-"


@given(names)
def test_what_lies_below_a_folder_by_a_name_that_was_read_cannot_leave_it(text: str) -> None:
    try:
        path = below("/base/folder", text, what="the name")
    except ConfigError as error:
        assert str(error).isprintable() or "\n  hint: " in str(error)
        return
    assert Path(os.path.normpath(path)).is_relative_to("/base/folder")
    assert os.path.normpath(path) != "/base/folder"


@given(st.dictionaries(st.sampled_from(("strategy", "n", "alpha", "pretrained", "reward_model", "seed")), names))
def test_a_runs_name_is_a_file_name_whatever_its_record_says(record: dict[str, str]) -> None:
    name = default_name(record)
    assert file_name(name) == name


def test_many_rewards_make_no_name_that_is_too_long_and_two_such_names_differ() -> None:
    first = "+".join(f"org/reward-model-number-{number}" for number in range(30))
    name, other = (
        default_name({"strategy": "best_of_n", "n": 4, "reward_model": text}) for text in (first, first + "0")
    )
    assert name != other and max(map(len, (name, other))) <= LONGEST


def test_a_link_out_of_a_folder_does_not_lie_in_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "file").write_text("ours")
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    told = {name: lies_in(inside / name, inside) for name in ("file", "link", "loop", "missing", "../out.txt", "a\0b")}
    assert [name for name, lies in told.items() if lies] == ["file"]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_message_on_a_name_that_is_no_path_says_what_to_do(name: str) -> None:
    try:
        below("results", name, what="the run's name")
    except ConfigError as error:
        assert "the run's name" in str(error) and error.hint is not None
        assert len(str(error)) < 500
