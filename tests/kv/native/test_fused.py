"""Small operators as C++ kernels: what torch computes, only where the model's code is known, and gone afterwards."""

from __future__ import annotations

import linecache
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.reward_sessions import make_reward
from support.tiny_models import tiny_causal_lm
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose
from specrej_eval.kv.native import build, fused
from specrej_eval.kv.native.fused import FusedOperators

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([2, 8, 16, 30, 32, 64, 80, 576])


def drawn(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


@given(rows=st.integers(1, 70), width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 10**6))
def test_a_norm_is_torchs(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    module = torch.nn.ModuleList([modeling_llama.LlamaRMSNorm(width, eps=1e-5)])
    module[0].weight.copy_(drawn(seed + 1, torch.float32, width))
    module.to(dtype)
    x = drawn(seed, dtype, rows, 1, width)
    want = module[0](x)
    with FusedOperators(module).active():
        assert "forward" in vars(module[0])
        got = module[0](x)
        alone = module[0](x[-1:])
    assert torch.allclose(got.float(), want.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(alone, got[-1:]), "a row's bits depend on its company"


@given(rows=st.integers(1, 70), dtype=DTYPES, seed=st.integers(0, 10**6), width=st.sampled_from([1, 15, 16, 33, 300]))
def test_a_gate_is_torchs(rows: int, dtype: torch.dtype, seed: int, width: int) -> None:
    config = modeling_llama.LlamaConfig(hidden_size=8, intermediate_size=width, num_attention_heads=1)
    module = torch.nn.ModuleList([modeling_llama.LlamaMLP(config)]).to(dtype)
    torch.manual_seed(seed)
    x = drawn(seed, dtype, rows, 1, 8)
    want = module[0](x)
    with FusedOperators(module).active():
        got = module[0](x)
    assert torch.allclose(got.float(), want.float(), rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


@given(x=st.lists(st.floats(width=32), min_size=1, max_size=40), dtype=DTYPES)
def test_a_gate_takes_every_number(x: list[float], dtype: torch.dtype) -> None:
    gate, up = torch.tensor(x).to(dtype), torch.ones(len(x)).to(dtype)
    out = torch.empty_like(gate)
    addresses = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    build.library().gate(*addresses, gate.numel(), dtype == torch.float32)
    want = torch.nn.functional.silu(gate)
    known = gate.isfinite()
    assert torch.allclose(
        out[known].float(), want[known].float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-30
    )
    assert torch.equal(out[~known].isnan(), want[~known].isnan())


@given(
    batch=st.integers(1, 20),
    heads=st.integers(1, 5),
    tokens=st.integers(1, 9),
    width=st.sampled_from([2, 6, 16, 32, 36, 64, 128]),
    one_table=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 10**6),
)
def test_rotary_embeddings_are_torchs_bits(
    batch: int, heads: int, tokens: int, width: int, one_table: bool, dtype: torch.dtype, seed: int
) -> None:
    q, k = (
        drawn(seed + place, dtype, batch, tokens, count, width).transpose(1, 2)
        for place, count in enumerate((heads, 1))
    )
    cos, sin = (drawn(seed + place, dtype, 1 if one_table else batch, tokens, width) for place in (2, 3))
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    operators = FusedOperators(tiny_causal_lm())
    with operators.active():
        got = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


def test_only_code_that_is_llamas_word_for_word_is_taken() -> None:
    llama, other = modeling_llama.LlamaRMSNorm(8), modeling_gemma2.Gemma2RMSNorm(8)  # Gemma's adds 1 to its weight
    operators = FusedOperators(torch.nn.ModuleList([llama, other]))
    with operators.active():
        assert "forward" in vars(llama)
        assert "forward" not in vars(other)
    config = modeling_llama.LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, hidden_act="gelu")
    assert not FusedOperators(torch.nn.ModuleList([modeling_llama.LlamaMLP(config)]))._forwards
    copied = modeling_qwen3.Qwen3RMSNorm(8)
    assert list(FusedOperators(torch.nn.ModuleList([copied]))._forwards) == [copied]


def test_an_activation_that_somebody_listens_to_or_exchanges_is_called() -> None:
    config = modeling_llama.LlamaConfig(hidden_size=8, intermediate_size=32, num_attention_heads=1)
    mlp = modeling_llama.LlamaMLP(config)
    x = drawn(0, torch.float32, 4, 8)
    operators = FusedOperators(torch.nn.ModuleList([mlp]))
    assert list(operators._forwards) == [mlp]
    heard: list[torch.Tensor] = []
    hook = mlp.act_fn.register_forward_hook(lambda module, given, out: heard.append(out))
    with operators.active():
        mlp(x)
    assert len(heard) == 1
    hook.remove()
    mlp.act_fn = torch.nn.ReLU()
    want = mlp(x)
    with operators.active():
        assert torch.equal(mlp(x), want)

    class Mine(torch.nn.SiLU):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given + 1

    mlp.act_fn = Mine()
    assert not FusedOperators(torch.nn.ModuleList([mlp]))._forwards


def test_a_function_with_another_default_is_another() -> None:
    space: dict[str, Any] = {}
    source = "def apply(q, k, unsqueeze_dim={}):\n    return q, k\n"
    codes = []
    for default in (1, 2):
        linecache.cache[f"<{default}>"] = (0, None, source.format(default).splitlines(keepends=True), f"<{default}>")
        exec(compile(source.format(default), f"<{default}>", "exec"), space)
        codes.append(fused.code_of(space["apply"]))
    assert None not in codes and codes[0] != codes[1]


def test_tensors_of_other_kinds_are_left_to_torch() -> None:
    class Kept(torch.Tensor):
        """As quantised and sharded weights are: its numbers need not lie where it says."""

        def data_ptr(self) -> int:
            raise AssertionError

    norm = modeling_llama.LlamaRMSNorm(8)
    x = drawn(0, torch.float32, 4, 8)
    want = norm(x)
    with FusedOperators(torch.nn.ModuleList([norm])).active():
        assert torch.equal(norm(x.as_subclass(Kept)).as_subclass(torch.Tensor), want)


def test_nothing_is_left_behind_whatever_happens() -> None:
    model = tiny_causal_lm()
    operators = FusedOperators(model)
    assert len(operators) > 1
    rotary = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(KeyError), operators.active():
        assert modeling_llama.apply_rotary_pos_emb is not rotary
        with operators.active():
            pass
        assert modeling_llama.apply_rotary_pos_emb is not rotary, "the inner one does not end the outer one"
        raise KeyError
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not any("forward" in vars(module) for module in model.modules())
    assert build.in_use() is None


@pytest.mark.parametrize("ours_ends_first", [True, False])
def test_two_models_of_one_kind_may_compute_in_two_threads(ours_ends_first: bool) -> None:
    """A thread in which no kernels are in use finds the module's own function, whatever goes on in the other."""
    ours, theirs = FusedOperators(tiny_causal_lm()), FusedOperators(tiny_causal_lm(seed=1))
    rotary = modeling_llama.apply_rotary_pos_emb
    given = [drawn(seed, torch.float32, 1, 2, 3, 8) for seed in (0, 1)] + [drawn(2, torch.float32, 1, 3, 8)] * 2
    plain: set[int] = set()

    def original(*args: Any, **kwargs: Any) -> Any:
        plain.add(threading.get_ident())
        return rotary(*args, **kwargs)

    for operators in (ours, theirs):
        for function in operators._rotary.values():
            function._original = original

    def by_kernels() -> bool:
        plain.clear()
        with torch.inference_mode():
            found, want = modeling_llama.apply_rotary_pos_emb(*given), rotary(*given)
        assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))
        return not plain

    with ThreadPoolExecutor(1) as pool:
        here, there = ExitStack(), ExitStack()
        here.enter_context(ours.active())
        assert by_kernels() and not pool.submit(by_kernels).result()
        pool.submit(there.enter_context, theirs.active()).result()
        assert by_kernels() and pool.submit(by_kernels).result()
        if ours_ends_first:
            here.close()
            assert not by_kernels() and pool.submit(by_kernels).result()
        pool.submit(there.close).result()
        if not ours_ends_first:
            assert by_kernels() and not pool.submit(by_kernels).result()
            here.close()
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_a_module_that_somebody_else_changed_is_left_alone() -> None:
    norm = modeling_llama.LlamaRMSNorm(8)
    mine: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # noqa: E731  # as a hook of accelerate would
    operators = FusedOperators(torch.nn.ModuleList([norm]))
    norm.forward = mine
    with operators.active():
        assert norm.forward is mine
    assert norm.forward is mine
    assert not FusedOperators(torch.nn.ModuleList([norm]))._forwards


def test_gradients_are_the_models_own() -> None:
    norm = modeling_llama.LlamaRMSNorm(8)
    operators = FusedOperators(torch.nn.ModuleList([norm]))
    with torch.inference_mode(False), torch.enable_grad(), operators.active():
        norm(torch.ones(2, 8)).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_decodes_with_them_and_calls_without_them_are_as_before(dtype: torch.dtype) -> None:
    model = tiny_causal_lm().to(dtype)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    runner = ModelRunner(model, attention=choose.build("cpp"))
    assert len(runner._fused) and runner.attention.name == "cpp" and runner.path == "shared_prefix"
    assert torch.equal(model(ids).logits, before)
    plain = ModelRunner(model)
    assert not len(plain._fused)


@pytest.mark.parametrize("part", ["norm", "gate", "rotary"])
def test_kernels_that_are_wrong_for_a_model_are_left_out(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with them: a model that torch decodes is decoded, on its best path."""
    of = {"norm": fused._Norm, "gate": fused._Gated, "rotary": fused._Rotated}[part]
    whole: Any = of.__call__

    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        found = whole(self, *given, **named)
        return tuple(each * 1.5 for each in found) if isinstance(found, tuple) else found.flip(-1)

    monkeypatch.setattr(of, "__call__", wrong)
    model = tiny_causal_lm()
    ids = torch.arange(12)[None]
    before = model(ids).logits
    with caplog.at_level("WARNING", "specrej_eval"):
        runner = ModelRunner(model, attention=choose.build("cpp"))
    assert (runner.path, runner.attention.name, len(runner._fused)) == ("shared_prefix", "sdpa", 0)
    assert "attention_backend=cpp is not used for LlamaForCausalLM" in caplog.text
    with runner.active():
        prefix = runner.prefill(ids[0].tolist())
    assert prefix.logits is not None and torch.allclose(prefix.logits[0], before[0, -1], atol=1e-4)

    caplog.clear()
    reward = make_reward()
    monkeypatch.setattr(choose, "of_rewards", lambda *_: choose.build("cpp"))
    with caplog.at_level("WARNING", "specrej_eval"):
        body = reward.shared_body
    assert body is not None and not len(body._fused)
    assert "C++ kernels are not used for it" in caplog.text


def test_a_model_without_our_attention_is_decoded_without_wrong_kernels_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fused._Norm.__call__
    monkeypatch.setattr(fused._Norm, "__call__", lambda self, x: whole(self, x) * 1.5)
    monkeypatch.setattr("specrej_eval.engines.transformers.model.obstacle", lambda model: "attention of its own")
    with caplog.at_level("WARNING", "specrej_eval"):
        runner = ModelRunner(tiny_causal_lm(), attention=choose.build("cpp"))
    assert (runner.path, len(runner._fused)) == ("replicated", 0)
    assert "C++ kernels are not used for LlamaForCausalLM" in caplog.text
