"""Logits of the decoding core, token for token, against a plain forward of the whole sequence, per architecture.

Prefill in chunks, two prompts of different lengths in one batch, rows rejected, forked and started late. Each test is
then repeated with an error planted on purpose, which it has to notice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from support.engine_models import (
    ARCHITECTURES,
    BY_NAME,
    TOLERANCE,
    WINDOW,
    Architecture,
    Reference,
    build,
    decode_script,
    shared_model,
    shared_reference,
    skip_unless_known,
    worst_error,
)
from transformers import AttentionInterface

from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import prefill, shared_prefix

EACH = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
WITH_WINDOW = [arch for arch in ARCHITECTURES if arch.window and arch.path == "shared_prefix"]
NO_POSITIONS = {"bloom", "mpt", "mamba", "falcon_alibi"}
"""Position comes from alibi or from the recurrence, not from position ids."""


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CPU_CHUNK", 6)  # the longer prompt is read in four chunks


def check(arch: Architecture) -> float:
    """The error of the whole script on the path of the table."""
    skip_unless_known(arch)
    runner = ModelRunner(shared_model(arch.name), path=arch.path)  # type: ignore[arg-type]
    return worst_error(decode_script(runner), shared_reference(arch.name))


@EACH
def test_logits_equal_a_plain_forward(arch: Architecture) -> None:
    assert check(arch) < TOLERANCE


@EACH
def test_logits_of_the_reference_vary(arch: Architecture) -> None:
    # a saturated or constant model would agree with anything
    skip_unless_known(arch)
    logits = shared_reference(arch.name)(tuple(range(3, 43)))
    assert float(logits.std(0).mean() / logits.abs().max()) > 0.05
    assert logits.argmax(-1).unique().numel() > 5


@EACH
def test_path_and_one_warning(arch: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    skip_unless_known(arch)
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        runner = ModelRunner(shared_model(arch.name))
    assert runner.path == arch.path
    ours = [record for record in caplog.records if record.name.startswith("specrej_eval")]
    assert len(ours) == (arch.path != "shared_prefix")
    assert all(arch.path in record.getMessage() for record in ours)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss", "falcon_alibi", "qwen3_next"])
@pytest.mark.parametrize("path", ["replicated", "recompute"])
def test_slower_paths_give_the_same_numbers(name: str, path: Any) -> None:
    runner = ModelRunner(shared_model(name), path=path)
    assert worst_error(decode_script(runner), shared_reference(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(1, 2), (WINDOW - 1, WINDOW), (WINDOW + 1, 30)], ids=str)
def test_prompt_lengths_at_the_edges(name: str, lengths: tuple[int, int]) -> None:
    runner = ModelRunner(shared_model(name), path="shared_prefix")
    assert worst_error(decode_script(runner, lengths=lengths), shared_reference(name)) < TOLERANCE


# ---- planted errors ----------------------------------------------------------------------------------------------


def _position_plus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ModelRunner._forward

    def wrong(self: ModelRunner, ids: Any, cache: Any, positions: Any, *wanted: Any) -> Any:
        return forward(self, ids, cache, positions + (ids.shape[1] == 1), *wanted)

    monkeypatch.setattr(ModelRunner, "_forward", wrong)


def _rows_reversed_by_select(monkeypatch: pytest.MonkeyPatch) -> None:
    select = Group.select
    monkeypatch.setattr(
        Group, "select", lambda self, places, rows, capacity: select(self, list(places)[::-1], rows, capacity)
    )


def _rows_swapped_by_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Group.drop

    def wrong(self: Group, places: Any) -> None:
        drop(self, places)
        self.row_ids[:2] = self.row_ids[1::-1]

    monkeypatch.setattr(Group, "drop", wrong)


def _windows_off_by(difference: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
            window = None if sliding_window is None else sliding_window + difference
            return shared_prefix.attention_forward(*args, sliding_window=window, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, shared_prefix.NAME, wrong)

    return plant


def _last_chunk_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = ModelRunner.prefill

    def wrong(self: ModelRunner, token_ids: Any, path: Any = None) -> Any:
        prefix = prefill(self, token_ids, path)
        for values in prefix.values.values():
            values[:, -1] = 0
        return prefix

    monkeypatch.setattr(ModelRunner, "prefill", wrong)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a.name not in NO_POSITIONS], ids=lambda arch: arch.name)
def test_notices_a_wrong_position(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    _position_plus_one(monkeypatch)
    assert check(arch) > 10 * TOLERANCE


@EACH
def test_notices_swapped_survivors(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    _rows_swapped_by_drop(monkeypatch)
    assert check(arch) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom"])
def test_notices_swapped_forks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _rows_reversed_by_select(monkeypatch)
    assert check(BY_NAME[name]) > 10 * TOLERANCE


@pytest.mark.parametrize("arch", WITH_WINDOW, ids=lambda arch: arch.name)
@pytest.mark.parametrize("difference", [-1, 1])
def test_notices_a_window_off_by_one(arch: Architecture, difference: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _windows_off_by(difference)(monkeypatch)
    assert check(arch) > 10 * TOLERANCE


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a.path == "shared_prefix"], ids=lambda arch: arch.name)
def test_notices_a_lost_prompt_token(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    _last_chunk_forgotten(monkeypatch)
    assert check(arch) > 10 * TOLERANCE


# ---- what the probe must not believe -----------------------------------------------------------------------------


def test_a_window_longer_than_the_probe_is_still_checked() -> None:
    # qwen2_moe keeps its windows from the attention function; the probe's few tokens could not show that
    model = build("qwen2_moe", sliding_window=100)
    assert ModelRunner(model).path == "replicated"


def test_probe_turns_down_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        return shared_prefix.attention_forward(*args, scaling=0.9 * (scaling or 1.0), **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, shared_prefix.NAME, wrong)
    assert ModelRunner(shared_model("llama")).path == "replicated"


# ---- rotary scaling that depends on the sequence's length ---------------------------------------------------------

ORIGINAL = 32
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "rope_theta": 10000.0,
}
SCALED = {
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "longrope": (
        "phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": ORIGINAL,
            "max_position_embeddings": 4 * ORIGINAL,
        },
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_past_the_original_context(kind: str) -> None:
    name, extra = SCALED[kind]
    runner = ModelRunner(build(name, **extra))
    assert runner.path == "shared_prefix"
    assert runner.path_for(ORIGINAL - 10, 10) == "shared_prefix"
    assert runner.path_for(ORIGINAL - 10, 11) == "recompute"

    # dynamic scaling remembers the longest sequence it has seen: a new model for every sequence
    reference = Reference(build(name, attention="eager", **extra), fresh=True)
    long = decode_script(runner, path="recompute", lengths=(40, 25))
    assert worst_error(long, reference, causal=False) < TOLERANCE
    # within the original context KV is shared, whatever was decoded before
    short = decode_script(runner, lengths=(9, 5))
    assert worst_error(short, reference) < TOLERANCE


@pytest.mark.parametrize("kind", SCALED)
def test_sharing_past_the_original_context_would_be_wrong(kind: str) -> None:
    name, extra = SCALED[kind]
    runner = ModelRunner(build(name, **extra), path="shared_prefix")
    wrong = decode_script(runner, lengths=(25, 5))
    reference = Reference(build(name, attention="eager", **extra), fresh=True)
    assert worst_error(wrong, reference, causal=False) > 10 * TOLERANCE
