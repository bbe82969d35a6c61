"""`make docs-check`: what varies from run to run does not count, and what a reader would copy does."""

from __future__ import annotations

import importlib.util

import pytest
from support import ROOT

spec = importlib.util.spec_from_file_location("walkthrough_of_the_docs", ROOT / ".ci" / "walkthrough.py")
assert spec is not None and spec.loader is not None
walkthrough = importlib.util.module_from_spec(spec)
spec.loader.exec_module(walkthrough)

PAGE = walkthrough.PAGE.read_text(encoding="utf-8")


def outputs(page: str) -> list[str | None]:
    return [None if step["note"] else step["output"] or "" for step in walkthrough.STEP.finditer(page)]


def test_every_command_of_the_page_has_its_output() -> None:
    found = outputs(PAGE)
    assert len(found) >= 6 and found[0] is None, "the first step installs"
    assert all(found[1:]), "run `python .ci/walkthrough.py --write`"
    assert walkthrough.rewritten(PAGE, found) == PAGE, "writing what stands there changes nothing"


@pytest.mark.parametrize(
    ("stands", "printed", "same"),
    [
        ("86.7%     39.0      25%        A", "86.7%    7.1       9%        A", True),
        ("86.7% |    39.0 |     25% |       A |", "86.7% |    139.0 |     5% |       A |", True),
        ("86.7%     39.0      25%        A", "86.6%     39.0      25%        A", False),
        ("  time     about 72 s, or less", "  time     about 1.5 h, or less", True),
        ("KV cache up to 52 MiB", "KV cache up to 1,024 MiB", True),
        ("device_name=AMD EPYC, cpu_threads=1, dtype=float32", "device_name=Xeon, cpu_threads=8, dtype=float32", True),
        ("dtype=float32", "dtype=bfloat16", False),
        ("|exact_match|↑  | 0.75|±  |0.0693|", "|exact_match|↑  | 0.76|±  |0.0693|", False),
        ("mean regret 1.436", "mean regret 1.437", False),
        ("26,613 decoded", "26,614 decoded", False),
        ("----  -----", "---  --------", True),
        ("A  60%  1,000  9.10  61%  2.1  70%  345  0.65", "A  60%  1,000  9.10  61%  31  9%  345  1.75", True),
        ("A  -  1,000  9.10  -  2.1  -  345  0.65", "A  -  1,000  9.10  -  31.4  -  345  1.75", True),
        ("A  60%  1,000  9.10  61%  2.1  70%  345  0.65", "A  60%  1,000  9.10  61%  2.1  70%  346  0.65", False),
        ("A  60%  1,000  9.10  61%  2.1  70%  345  0.65", "A  60%  1,000  9.11  61%  2.1  70%  345  0.65", False),
        (
            "A  [8.0, 9.9]  0.50 [0.40, 0.60]  2.00 [1.90, 2.10]",
            "A  [8.0, 9.9]  1.50 [1.0, 2]  3.00 [2, 4]",
            True,
        ),
        (
            "A  [8.0, 9.9]  0.50 [0.40, 0.60]  2.00 [1.90, 2.10]",
            "A  [8.1, 9.9]  0.50 [0, 1]  2.00 [1, 2]",
            False,
        ),
    ],
)
def test_what_varies_is_masked_and_nothing_else(stands: str, printed: str, same: bool) -> None:
    assert (walkthrough.masked(stands) == walkthrough.masked(printed)) is same


def test_a_changed_output_is_written_where_the_old_one_stood() -> None:
    found = outputs(PAGE)
    found[2] = "another\x20line  \n\n"
    page = walkthrough.rewritten(PAGE, found)
    assert "```text\nanother line\n```" in page and page != PAGE
    assert walkthrough.masked(page) != walkthrough.masked(PAGE)
