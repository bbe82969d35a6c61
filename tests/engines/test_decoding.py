"""The decode loop's own accounts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_runs import PROMPTS, generate, make_engine
from support.tiny_models import tiny_causal_lm

from specrej_eval.engines.transformers import decoding


@pytest.mark.parametrize("ends", ["together", "apart"])
@pytest.mark.parametrize("arguments", [{"strategy": "best_of_n"}, {}, {"batch_size": 1}])
def test_the_seconds_of_a_step_are_told_once(
    ends: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_causal_lm())
    if ends == "together":
        engine.eos_ids = ()
    ticks = itertools.count()
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    results = generate(engine, PROMPTS, n=4, max_gen_toks=12, **arguments)
    steps = next(ticks) / 2
    assert steps > 8
    assert sum(result.ledger.seconds["decode"] for result in results) == pytest.approx(steps)
    assert all(result.ledger.seconds["decode"] > 0 for result in results)
