"""SECURITY.md and docs/survives.md name tests that are there; the table is what `.ci/survives.py` writes."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re

import pytest
from support import ROOT, TESTS
from support.survival import TABLE, WAYS

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py(?:::\w+)+)`")
PROMISED = NAMED.findall(SECURITY)
IN_THE_TABLE = sorted({test for _, cells in TABLE for _, test in cells.values()})

spec = importlib.util.spec_from_file_location("table_of_survival", ROOT / ".ci" / "survives.py")
assert spec is not None and spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """``test_name`` and ``TestClass::test_name`` of a file."""
    found = set()
    for node in ast.parse((TESTS / path).read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + each.name for each in inner if isinstance(each, ast.FunctionDef)}
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


@pytest.mark.parametrize("test", sorted({*PROMISED, *IN_THE_TABLE}))
def test_each_named_test_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert name in names_in(path), f"{test}: nearest are {[each for each in names_in(path) if each[:20] == name[:20]]}"


def test_each_promise_names_its_test() -> None:
    promised = SECURITY.partition("## What is promised")[2].partition("## What is not")[0]
    lines = re.findall(r"^- (.*?)(?=^- |^$)", promised, re.MULTILINE | re.DOTALL)
    assert len(lines) > 20
    for line in lines:
        assert NAMED.search(line), line


def test_the_table_is_the_lists() -> None:
    text = made.FILE.read_text(encoding="utf-8")
    assert made.rewritten(text) == text, "run `python .ci/survives.py`"


def test_each_column_is_filled() -> None:
    for fault, cells in TABLE:
        assert cells and set(cells) <= set(WAYS), fault
    for way in WAYS:
        assert sum(way in cells for _, cells in TABLE) > len(TABLE) // 2, way
