"""The engine over each attention backend: logits of whole models, what it says it uses, and what it does with one that
is wrong. On a CPU with stand-ins and Triton's interpreter, on a GPU with what is installed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.attention_kernels import on_the_cpu
from support.engine_models import (
    ARCHITECTURES,
    BY_NAME,
    TOLERANCE,
    Architecture,
    Reference,
    build,
    decode_script,
    shared_model,
    shared_reference,
    skip_unless_known,
    worst_error,
)
from support.engine_runs import PROMPTS, generate, make_engine
from support.tiny_models import tiny_causal_lm

from specrej_eval import registry
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose, prefill
from specrej_eval.kv.attention.base import AttentionBackend

OTHERS = [name for name in registry.names("specrej_eval.kv.attention") if name != "sdpa"]
SHARED = [arch for arch in ARCHITECTURES if arch.path == "shared_prefix"]
KINDS = ("llama", "mistral", "gemma2", "gpt_oss")
"""Plain; windows; windows, softcap and another scale; windows and sinks."""


@pytest.fixture(params=OTHERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
    monkeypatch.setattr(prefill, "CPU_CHUNK", 6)
    return on_the_cpu(choose.build(request.param), monkeypatch, dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("backend", "arch"),
    [
        *(("flash_attn", arch) for arch in SHARED),
        *(("triton", BY_NAME[name]) for name in (*KINDS, "deepseek_v3")),  # no more: interpreted, and slow
    ],
    indirect=["backend"],
    ids=lambda value: getattr(value, "name", value),
)
def test_logits_equal_a_plain_forward(backend: AttentionBackend, arch: Architecture) -> None:
    skip_unless_known(arch)
    runner = ModelRunner(shared_model(arch.name), path="shared_prefix", attention=backend)
    assert runner.attention is backend
    assert worst_error(decode_script(runner), shared_reference(arch.name)) < TOLERANCE


@pytest.mark.parametrize("backend", ["flash_attn", "flashinfer"], indirect=True)
@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_a_plain_forward_with_heads_of_64(backend: AttentionBackend, name: str) -> None:
    model = build(name, head_dim=64)
    runner = ModelRunner(model, path="shared_prefix", attention=backend)
    assert worst_error(decode_script(runner), Reference(model)) < TOLERANCE


def test_the_engine_says_which_backend_it_uses(backend: AttentionBackend) -> None:
    engine = make_engine(build("llama", head_dim=64, vocab_size=261), attention=backend)
    assert engine.describe()["attention_backend"] == backend.name
    [result] = generate(engine, PROMPTS[:1], n=2, max_gen_toks=4, first_look=2)
    assert result.best.num_tokens


def test_sdpa_is_what_is_used_where_nothing_is_said() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    assert engine.describe()["attention_backend"] == "sdpa"
    assert make_engine(shared_model("bloom")).describe()["attention_backend"] is None, "the model's own attention"


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_a_backend_that_is_wrong_for_a_model_is_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = on_the_cpu(choose.build(name), monkeypatch, dtypes=(torch.float32,))
    whole: Any = backend._decode
    monkeypatch.setattr(backend, "_decode", lambda query, *given: whole(query.flip(0), *given))
    model = build("llama", head_dim=64)
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        runner = ModelRunner(model, attention=backend)
    assert runner.path == "shared_prefix" and runner.attention.name == "sdpa"
    [said] = [record.getMessage() for record in caplog.records]
    assert f"attention_backend={name} is not used for LlamaForCausalLM" in said and "logits" in said
    assert worst_error(decode_script(runner), Reference(model)) < TOLERANCE


def test_a_model_that_is_left_to_sdpa_altogether_is_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = on_the_cpu(choose.build("flash_attn"), monkeypatch)
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        runner = ModelRunner(shared_model("llama"), attention=backend)
    assert runner.attention.name == "sdpa"
    assert "it computes float16 and bfloat16 only, not float32" in caplog.text


# ---- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_the_gpu(name: str, arch: str, dtype: torch.dtype) -> ModelRunner:
    backend = choose.build(name)
    device = torch.device("cuda")
    if reason := backend.why_not(device, dtype, 64):
        pytest.skip(reason)
    model = build(arch, head_dim=64).to(device, dtype)
    return ModelRunner(model, attention=backend)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("name", registry.names("specrej_eval.kv.attention"))
def test_the_probe_finds_the_models_own_logits_on_the_gpu(name: str, arch: str, dtype: torch.dtype) -> None:
    runner = on_the_gpu(name, arch, dtype)
    assert runner.path == "shared_prefix" and runner.attention.name == name


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_draws_on_the_gpu_are_those_of_the_cpu_but_for_a_few(name: str, arch: str) -> None:
    """Both have the same random numbers; in float32 last bits differ, and with them a draw in some thousand."""
    attention = on_the_gpu(name, arch, torch.float32).attention
    here = make_engine(build(arch, head_dim=64, vocab_size=261))
    there = make_engine(build(arch, head_dim=64, vocab_size=261).cuda(), attention=attention)
    pairs = [
        (ours.token_ids, theirs.token_ids)
        for mine, other in zip(generate(here), generate(there), strict=True)
        for ours, theirs in zip(mine.trajectories, other.trajectories, strict=True)
    ]
    assert sum(ours == theirs for ours, theirs in pairs) >= 0.9 * len(pairs)
