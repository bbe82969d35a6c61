"""Every engine is held to one contract; an engine with a fault is found out by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FULL, vllm_stand_in
from support.engine_contract import CHECKS, Subject
from support.tiny_models import save, tiny_causal_lm, tiny_tokenizer
from support.toy import FAULTS, ToyEngine, logits_of

from specrej_eval import vllm_adapter as adapter
from specrej_eval.config import RunConfig
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.vllm.engine import VLLMEngine
from specrej_eval.engines.vllm.loading import EnginePlan

Counted = Callable[..., None]
DRAWS = 4000 if FULL else 1000
REFUSED_BY_VLLM = ({"top_p": 0.8, "min_p": 0.1},)
IDS = [check.__name__ for check in CHECKS]


def toy(fault: str = "") -> Subject:
    engine = ToyEngine(fault)
    return Subject(
        engine=engine, logits=logits_of, is_open=lambda session: session in engine.open_sessions, draws=DRAWS
    )


@pytest.mark.parametrize("check", CHECKS, ids=IDS)
def test_a_toy_engine_without_fault_keeps_the_contract(check: Callable[[Subject], None]) -> None:
    check(toy())


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_finds_the_fault(fault: str, counted: Counted) -> None:
    for check in CHECKS:
        try:
            check(toy(fault))
        except (Exception, pytest.fail.Exception):  # which one a fault meets first, and how, is its own affair
            counted("faults of engines, found by the contract")
            return
    pytest.fail("no check has found it")


# our own


def forward(model: Any) -> Callable[[Sequence[int]], list[float]]:
    def logits(ids: Sequence[int]) -> list[float]:
        with torch.inference_mode():
            found: list[float] = model(torch.tensor([list(ids)])).logits[0, -1].double().tolist()
        return found

    return logits


@pytest.fixture(scope="module")
def ours() -> Subject:
    model = tiny_causal_lm()
    engine = TransformersEngine(model, tiny_tokenizer())
    return Subject(
        engine=engine,
        logits=forward(model),
        tolerance=1e-4,
        is_open=lambda session: bool(session.groups),
        draws=DRAWS,
    )


@pytest.mark.parametrize("check", CHECKS, ids=IDS)
def test_the_engine_over_transformers_keeps_the_contract(check: Callable[[Subject], None], ours: Subject) -> None:
    check(ours)


# vLLM, whose rows run ahead: on the stand-in, in step and far from it

WAYS: dict[str, dict[str, Any]] = {
    "in step": {},
    "rows are put off": {"put_off": 0.4},
    "prompts are read in pieces": {"read_per_step": 5},
    "few rows at a time": {"most_running": 3, "put_off": 0.2},
}


def plan_for(pretrained: str, **arguments: Any) -> EnginePlan:
    return EnginePlan(
        name=pretrained,
        dtype="float32",
        device="cpu",
        config=RunConfig(pretrained=pretrained, engine="vllm", n=64, enforce_eager=True).replace(**arguments),
        host={},
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("check", CHECKS, ids=IDS)
def test_the_engine_over_a_stand_in_of_vllm_keeps_the_contract(
    check: Callable[[Subject], None], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour = vllm_stand_in.install(monkeypatch)
    for name, value in WAYS[way].items():
        setattr(behaviour, name, value)
    requests = adapter.Requests(plan_for("toy").arguments(), name="toy")
    engine = VLLMEngine(requests, tiny_tokenizer(), versions={})
    [made] = behaviour.made
    check(
        Subject(
            engine=engine,
            logits=logits_of,
            is_open=lambda session: bool(made.requests),
            decoded=lambda: made.decoded,
            draws=DRAWS if way == "in step" else 200,
            refused=REFUSED_BY_VLLM,
        )
    )


# vLLM itself


@pytest.fixture(scope="module")
def the_real_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = tiny_causal_lm(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    folder = save(model, tiny_tokenizer(), Path(tmp_path_factory.mktemp("vllm")) / "tiny")
    engine = plan_for(str(folder)).load(content_rule="encode_as_text")
    decoded = [0]
    step = engine.requests.step

    def counting() -> list[adapter.Decoded]:
        found = step()
        decoded[0] += sum(len(each.token_ids) for each in found)
        return found

    engine.requests.step = counting  # type: ignore[method-assign]
    yield Subject(
        engine=engine,
        logits=forward(model),
        tolerance=2e-3,
        is_open=lambda session: engine.requests.waiting,
        decoded=lambda: decoded[0],
        draws=DRAWS,
        refused=REFUSED_BY_VLLM,
    )


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS, ids=IDS)
def test_the_engine_over_vllm_keeps_the_contract(check: Callable[[Subject], None], the_real_one: Subject) -> None:
    check(the_real_one)
