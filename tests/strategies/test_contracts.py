"""What holds for every strategy in the folder, and is held against a new one without an edit here."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from support import properties
from support.properties import Case, cases
from support.simulated import Process, run_directly, run_generator

from specrej_eval import registry
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult

PACKAGE = "specrej_eval.strategies"


def every_look_decodes_something(run: Any, case: Case) -> None:
    result = run(case.config(), case.process())
    assert len(result.rounds) <= result.ledger.decode_tokens, "a look that decodes nothing may be followed by others"


ANY_STRATEGY = (
    every_look_decodes_something,
    properties.no_finished_row_is_lost,
    properties.the_budget_is_never_exceeded,
    properties.the_ledger_counts_every_token_once,
)


@pytest.mark.parametrize("run", [run_directly, run_generator], ids=["strategy alone", "whole generator"])
@pytest.mark.parametrize("property_", ANY_STRATEGY, ids=lambda property_: property_.__name__)
@pytest.mark.parametrize("name", registry.names(PACKAGE))
@given(case=cases())
def test_every_strategy_has(name: str, property_: Any, run: Any, case: Case) -> None:
    def by_that_name(config: RunConfig, process: Process) -> GenerationResult:
        return run(config.replace(strategy=name), process)

    property_(by_that_name, case)


@pytest.mark.parametrize("name", registry.names(PACKAGE))
def test_a_strategy_is_arithmetic_and_says_its_source(name: str) -> None:
    file = Path(registry.load_module(PACKAGE, name, argument="strategy").__file__ or "")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"open", "print"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.While | ast.AsyncFor)], (
        "the loop is not its own"
    )
