"""Out of memory: the batch is split and decoded in turns; tokens, rounds and finish reasons stay as they are."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from support.engine_runs import PROMPTS, generate, limit_rows, make_engine, outcome
from support.tiny_models import tiny_causal_lm

from specrej_eval.config import MAX
from specrej_eval.engines.transformers import decoding
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.transformers.groups import Group
from specrej_eval.errors import OutOfMemoryError
from specrej_eval.kv.memory import or_else

UNTIL = ["e", "7", "q", "X"]
PATHS = ["shared_prefix", "replicated", "recompute"]


@cache
def model(arch: str = "llama") -> Any:
    return tiny_causal_lm(arch)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # hundreds of failures in here, and there is nothing to free


@cache
def undisturbed(path: str, alpha: float) -> Any:
    results = generate(make_engine(model(), path=path), until=UNTIL, alpha=alpha)
    return [outcome(result) for result in results]


def run(engine: TransformersEngine, alpha: float = 0.5) -> list[dict[str, Any]]:
    return [outcome(result) for result in generate(engine, until=UNTIL, alpha=alpha)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("most", [1, 5])
def test_results_stay_the_same_with_few_rows_at_a_time(path: Any, alpha: float, most: int) -> None:
    engine = make_engine(model(), path=path)
    limit_rows(engine, most)
    assert run(engine, alpha) == undisturbed(path, alpha)
    assert engine.oom_splits > 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_failures_anywhere_in_a_step(path: Any, seed: int) -> None:
    # the failure comes from inside the model: some layers have stored this position and others have not
    engine = make_engine(model(), path=path)
    random_ = random.Random(seed)
    rows_before: list[int] = []
    step, rows = engine.runner.step, 0  # not the model's batch: that one is padded

    def counted(groups: Any, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows = len(tokens)
        return step(groups, tokens)

    engine.runner.step = counted  # type: ignore[method-assign]

    def fail(module: Any, arguments: Any) -> None:
        if rows > 1 and len(rows_before) < 12 and random_.random() < 0.1:
            rows_before.append(rows)
            raise torch.OutOfMemoryError

    hooks = [layer.mlp.register_forward_pre_hook(fail) for layer in model().model.layers]
    try:
        got = run(engine)
    finally:
        for hook in hooks:
            hook.remove()
    assert got == undisturbed(path, 0.5)
    assert len(rows_before) >= 3


@pytest.mark.parametrize("seed", range(2))
def test_failures_after_the_forward_pass(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, random_, failed = decoding.sample, random.Random(seed), []

    def failing(logits: Any, uniforms: Any, params: Any) -> Any:
        if len(uniforms) > 1 and random_.random() < 0.2:
            failed.append(len(uniforms))
            raise torch.OutOfMemoryError
        return sample(logits, uniforms, params)

    monkeypatch.setattr(decoding, "sample", failing)
    for path in PATHS[:2]:
        assert run(make_engine(model(), path=path)) == undisturbed(path, 0.5)  # type: ignore[arg-type]
    assert len(failed) > 3


@pytest.mark.parametrize("path", PATHS)
def test_failures_while_survivors_are_gathered(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = undisturbed(path, 0.5)
    selection, calls = Group.selection, iter(range(10**6))

    def failing(self: Group, *arguments: Any) -> Any:
        if next(calls) % 2 == 0:
            raise torch.OutOfMemoryError
        return selection(self, *arguments)

    monkeypatch.setattr(Group, "selection", failing)
    assert run(make_engine(model(), path=path)) == want


def test_with_logprobs_and_several_groups() -> None:
    # log-probs travel with their rows through splits
    arguments = {"until": UNTIL, "logprobs": True, "alpha": 0.5}
    want = [outcome(result) for result in generate(make_engine(model()), **arguments)]
    engine = make_engine(model())
    limit_rows(engine, 3)
    got = [outcome(result) for result in generate(engine, **arguments)]
    assert got == want
    assert all(len(t["logprobs"]) == t["num_tokens"] for result in got for t in result["trajectories"])


# ---- when even one row does not fit ------------------------------------------------------------------------------


def fail_when(engine: TransformersEngine, hopeless: Any) -> None:
    """Steps that hold a row of which ``hopeless(row, tokens)`` is true run out of memory."""
    step = engine.runner.step

    def limited(groups: Any, tokens: torch.Tensor) -> torch.Tensor:
        if any(hopeless(row, group.num_sampled) for group in groups for row in group.row_ids):
            raise torch.OutOfMemoryError
        return step(groups, tokens)

    engine.runner.step = limited  # type: ignore[method-assign]


def test_rows_are_given_up_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(model())
    whole = undisturbed("shared_prefix", 0.0)[1]
    fail_when(engine, lambda row, tokens: row in (2, 5))
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        [result] = generate(engine, PROMPTS[1:2], until=UNTIL, alpha=0)
    assert result.degraded
    assert [t.row for t in result.trajectories if t.finish_reason == "rejected"] == [2, 5]
    for row, trajectory in enumerate(result.trajectories):
        want = whole["trajectories"][row]["token_ids"]
        assert trajectory.token_ids == (want[:1] if row in (2, 5) else want)
    assert sum("given up" in record.getMessage() for record in caplog.records) == 2


def test_only_the_prompt_concerned_is_degraded() -> None:
    engine = make_engine(model())
    fail_when(engine, lambda row, tokens: row == 7 and tokens > 8)
    want = undisturbed("shared_prefix", 0.0)
    results = generate(engine, until=UNTIL, alpha=0)
    lost = [result.trajectories[7].finish_reason == "rejected" for result in results]
    assert any(lost)
    assert [result.degraded for result in results] == lost
    for result, whole, degraded in zip(results, want, lost, strict=True):
        assert degraded or outcome(result) == whole


def test_an_error_only_when_nothing_is_left() -> None:
    engine = make_engine(model())
    fail_when(engine, lambda row, tokens: True)
    with pytest.raises(OutOfMemoryError, match="single row"):
        generate(engine, PROMPTS[:1], alpha=0)


def test_finished_rows_are_enough_for_an_answer() -> None:
    engine = make_engine(model())
    whole = undisturbed("shared_prefix", 0.0)[1]["trajectories"]
    shortest = min(len(row["token_ids"]) for row in whole)
    assert shortest < max(len(row["token_ids"]) for row in whole)
    fail_when(engine, lambda row, tokens: tokens >= shortest)
    [result] = generate(engine, PROMPTS[1:2], until=UNTIL, alpha=0)
    assert result.degraded
    finished = [t for t in result.trajectories if t.finish_reason != "rejected"]
    assert finished and all(t.num_tokens == shortest for t in finished)
    assert result.best.finish_reason != "rejected"


def test_the_model_is_left_as_it_was_after_failures() -> None:
    engine = make_engine(model())
    before = model().config._attn_implementation
    fail_when(engine, lambda row, tokens: True)
    with pytest.raises(OutOfMemoryError):
        generate(engine, PROMPTS[:1], alpha=0)
    assert model().config._attn_implementation == before


# ---- outside the steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS[1:])
def test_paths_that_show_no_kv_say_that_n_max_needs_a_number(path: Any) -> None:
    engine = make_engine(model(), path=path)
    assert engine.capacity_tokens(12) == engine.bytes_per_token() == 0
    with pytest.raises(OutOfMemoryError, match="n=max"):
        generate(engine, PROMPTS[:1], n=MAX)


@pytest.mark.parametrize("failures", [1, 2])
def test_memory_that_runs_out_while_memory_is_measured_is_one_clear_error(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model())
    want = engine.bytes_per_token()
    prefill, left = engine.runner.prefill, [None] * failures

    def failing(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise torch.OutOfMemoryError
        return prefill(*arguments)

    monkeypatch.setattr(engine.runner, "prefill", failing)
    if failures == 2:
        with pytest.raises(OutOfMemoryError, match="a prompt of 12 tokens, to find out what its KV cache takes"):
            engine.capacity_tokens(12)
    assert engine.bytes_per_token() == want > 0


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_what_failed_is_let_go_before_another_way_is_tried(message: str) -> None:
    class Held:
        """A tensor of the failed try, as it were."""

    alive: list[weakref.ref[Held]] = []

    def fails() -> bool:
        held = Held()
        alive.append(weakref.ref(held))
        raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    assert or_else(fails, lambda: alive[0]() is None)
    assert len(alive) == 1


def test_other_errors_are_not_taken_for_memory_that_ran_out() -> None:
    def fails() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        or_else(fails, lambda: pytest.fail("another way was tried"))
