"""Packed weights: torch's bits or our kernels', and nobody who is not our engine can tell that there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engine_runs import make_engine, outcome
from support.failing_allocations import MemoryRunsOut
from support.reward_sessions import make_reward
from support.tiny_models import tiny_causal_lm

from specrej_eval.config import RunConfig
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.generator import Generator
from specrej_eval.kv import choose, packed
from specrej_eval.kv.native import products
from specrej_eval.kv.packed import PackedWeights

pytestmark = pytest.mark.skipif(
    not all(map(packed._supported, packed._DTYPES)), reason="this torch or CPU has no packed products"
)
OURS = pytest.param(
    True, marks=pytest.mark.skipif(products.why_not() is not None, reason=f"no products here: {products.why_not()}")
)
KERNELS = pytest.mark.parametrize("kernels", [False, OURS])
"""Whether the C++ kernels multiply."""


def model_in(dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny_causal_lm().to(dtype)


def layers(model: Any) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if type(module) is torch.nn.Linear]


def logits(model: Any, rows: int = 5) -> torch.Tensor:
    ids = torch.arange(rows * 7).reshape(rows, 7) % 50
    with torch.inference_mode():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def expected(model: Any, kernels: bool) -> torch.Tensor:
    """Logits with the model's weights as they are now: torch's bits, or those of copies that are new."""
    plain = logits(model)
    if not kernels:
        return plain
    with PackedWeights(model, kernels=True).active():
        found = logits(model)
    assert torch.allclose(found.float(), plain.float(), rtol=0.05, atol=0.05 * float(plain.abs().max()))
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 24, 64, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_bits_are_those_of_the_plain_layer(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = torch.nn.Linear(96, 40, bias=bias).bfloat16()
    for shape in ((rows, 96), (rows, 1, 96), (2, rows, 96)):
        given = torch.randn(*shape).bfloat16()
        with torch.inference_mode():
            want = layer(given)
            with PackedWeights(layer).active():
                assert "forward" in vars(layer)
                assert torch.equal(layer(given), want)


@pytest.mark.parametrize("sizes", [(64, 64), (96, 40), (33, 21), (128, 513), (1536, 576)])
def test_in_float32_a_row_does_not_depend_on_its_company(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(*sizes)
    given = torch.randn(200, sizes[0])
    with torch.inference_mode():
        want = layer(given)
        with PackedWeights(layer).active():
            together = layer(given)
            assert torch.allclose(together, want, atol=1e-4)
            for rows in (16, 32, 48, 112, 176):
                assert torch.equal(layer(given[16 : 16 + rows]), together[16 : 16 + rows])


@KERNELS
def test_a_model_gives_the_same_bits_and_is_as_it_was(kernels: bool) -> None:
    model = model_in()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model)
    want = expected(model, kernels)
    weights = PackedWeights(model, kernels=kernels)
    assert weights.by == ("cpp" if kernels else "onednn")
    assert weights.nbytes > 0
    with weights.active():
        assert all("forward" in vars(layer) for layer in layers(model))
        assert torch.equal(logits(model), want)
        with weights.active():  # an engine call inside another
            pass
        assert all("forward" in vars(layer) for layer in layers(model))
    assert not any("forward" in vars(layer) for layer in layers(model))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), plain)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(33, 22), (66, 40), (33, 21), (7, 8), (1, 3), (3, 1)])
def test_sizes_need_not_be_round(sizes: tuple[int, int], dtype: torch.dtype, kernels: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(*sizes).to(dtype)
    memory = torch.zeros(layer.weight.numel() + 1, dtype=dtype)  # as in a file of weights: at any place
    memory[1:] = layer.weight.detach().flatten()
    layer.weight.data = memory[1:].view(layer.weight.shape)
    given = torch.randn(16, sizes[0]).to(dtype)
    weights = PackedWeights(layer, kernels=kernels)
    for _ in range(2):
        with torch.inference_mode():
            want = layer(given)
            with weights.active():
                last_bit = 2**-7 if kernels and dtype == torch.bfloat16 else 1e-5
                assert torch.allclose(layer(given), want, rtol=last_bit, atol=1e-4)
        layer.weight.data[0, 0] += 2


def test_two_of_the_same_model_do_not_take_back_what_is_the_others() -> None:
    model = model_in()
    outer, inner = PackedWeights(model), PackedWeights(model)
    with outer.active():
        with inner.active():
            pass
        assert all("forward" in vars(layer) for layer in layers(model))
    assert not any("forward" in vars(layer) for layer in layers(model))


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = model_in()
    with pytest.raises(KeyError), PackedWeights(model).active():
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers(model))


def through_data(weight: torch.nn.Parameter) -> None:
    weight.data += 0.25  # how adapters are merged: torch's version counter does not see it


def in_place(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def one_number(weight: torch.nn.Parameter) -> None:
    weight.data[0, 0] = 3.0


def another(weight: torch.nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


@KERNELS
@pytest.mark.parametrize("change", [through_data, in_place, one_number, another])
def test_changed_weights_are_seen(change: Callable[[torch.nn.Parameter], None], kernels: bool) -> None:
    model = model_in()
    weights = PackedWeights(model, kernels=kernels)
    with weights.active():
        old = logits(model)
    for layer in layers(model):
        change(layer.weight)  # type: ignore[arg-type]  # a Parameter
    want = expected(model, kernels)
    assert not torch.equal(want, old)
    with weights.active():
        assert torch.equal(logits(model), want)


@KERNELS
@pytest.mark.parametrize("change", [through_data, in_place, one_number, another])
def test_each_prompt_is_read_and_decoded_with_the_weights_of_its_time(
    change: Callable[[torch.nn.Parameter], None], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are compared where prompts are opened, and not in every call that decodes or scores."""
    source, compared = packed._source, []

    def counted(weight: torch.Tensor) -> packed.Source:
        compared.append(weight)
        return source(weight)

    monkeypatch.setattr(packed, "_source", counted)
    attention = choose.build("cpp" if kernels else "sdpa")
    engine, reward = make_engine(model_in(), path="shared_prefix", attention=attention), make_reward()
    assert engine.describe()["products"] == ("cpp" if kernels else "onednn")

    def answers() -> list[Any]:
        config, _ = RunConfig.from_args({"n": 8, "max_gen_toks": 24, "first_look": 3, "batch_size": 2})
        return [outcome(each) for each in Generator(engine=engine, reward=reward, config=config).generate(["a", "bc"])]

    answers()
    compared.clear()
    before = answers()
    each_layer = [layer.weight for model in (engine.model, reward.body) for layer in layers(model)]
    assert len(compared) == len(each_layer), "two prompts that are opened together, by each model"
    for weight in each_layer:
        change(weight)  # type: ignore[arg-type]  # a Parameter
    after = answers()
    assert after != before
    fresh = make_engine(engine.model, path="shared_prefix", attention=attention), make_reward()
    fresh[1].body.load_state_dict(reward.body.state_dict())
    engine, reward = fresh
    assert answers() == after


def test_hooks_run_and_a_forward_of_others_stays() -> None:
    model = model_in()
    first, second = layers(model)[:2]
    calls = []
    first.register_forward_hook(lambda *_: calls.append("hook"))
    own = second.forward

    def theirs(input: torch.Tensor) -> torch.Tensor:
        calls.append("theirs")
        return own(input)

    second.forward = theirs  # type: ignore[method-assign]  # as accelerate does
    want = logits(model)
    calls.clear()
    with PackedWeights(model).active():
        assert torch.equal(logits(model), want)
    assert sorted(calls) == ["hook", "theirs"]
    assert vars(second)["forward"] is theirs


def test_layers_of_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(torch.nn.Linear):
        pass

    assert not PackedWeights(model_in(torch.float16)).nbytes
    assert not PackedWeights(model_in(torch.float64)).nbytes
    assert not PackedWeights(Mine(8, 8).bfloat16()).nbytes
    assert PackedWeights(torch.nn.Linear(8, 8).bfloat16()).nbytes == 128
    monkeypatch.setattr(packed, "free_bytes", lambda device: 500)
    assert not PackedWeights(torch.nn.Linear(8, 8).bfloat16()).nbytes  # more than a quarter of the memory


@KERNELS
def test_a_runner_packs_inside_its_calls_only(kernels: bool) -> None:
    model = model_in()
    runner = ModelRunner(model, attention=choose.build("cpp" if kernels else "sdpa"))
    want = logits(model)
    with torch.inference_mode(), runner.active():
        assert any("forward" in vars(layer) for layer in layers(model))
    assert torch.equal(logits(model), want)
    assert not any("forward" in vars(layer) for layer in layers(model))


@pytest.mark.parametrize("dtype", packed._DTYPES)
def test_memory_that_runs_out_while_packing_is_tried_out_is_no_verdict_on_it(dtype: torch.dtype) -> None:
    """In float32 it decides bits, and holds for the whole process."""
    layer = torch.nn.Linear(16, 16).to(dtype)
    packed._supported.cache_clear()
    with MemoryRunsOut() as whole:
        want = PackedWeights(layer).nbytes
    assert want
    for number in range(whole.num_ops):
        packed._supported.cache_clear()
        with pytest.raises(torch.OutOfMemoryError), MemoryRunsOut([number]):
            PackedWeights(layer)
        assert PackedWeights(layer).nbytes == want
    assert whole.num_ops > 3
