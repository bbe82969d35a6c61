"""A whole layer in one C++ call: the bits of its operators one by one, only where its code is known, and gone after."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.failing_allocations import MemoryRunsOut
from support.tiny_models import tiny_causal_lm
from torch.nn.modules import module as torch_modules
from transformers.models.llama import modeling_llama

from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose
from specrej_eval.kv.native import build, layers, products
from specrej_eval.kv.native.layers import FusedLayers

pytestmark = pytest.mark.skipif(products.why_not() is not None, reason=f"no products here: {products.why_not()}")

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with one kv head of another size": {"num_key_value_heads": 1, "head_dim": 18},
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [0, 1]},
}
"""By the model's type, what is not as in the tiny models."""


def model_of(form: str, **others: Any) -> Any:
    """In bfloat16, with numbers of its own in every parameter."""
    model = tiny_causal_lm(form.split()[0], **{**FORMS.get(form, {}), **others})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(torch.bfloat16)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that one call computed."""
    found: list[int] = []
    own = layers._Layer._decoded

    def counted(self: Any, *args: Any) -> Any:
        out = own(self, *args)
        if out is not None:
            found.append(self.module.self_attn.layer_idx)
        return out

    monkeypatch.setattr(layers._Layer, "_decoded", counted)
    return found


def runner_of(model: Any) -> ModelRunner:
    return ModelRunner(model, attention=choose.resolve("auto", "cpu"))


@contextmanager
def one_by_one(runner: ModelRunner) -> Iterator[None]:
    kept, runner._layers = runner._layers, FusedLayers(runner.model, wanted=False)
    try:
        yield
    finally:
        runner._layers = kept


def decoded(runner: ModelRunner, steps: int = 40) -> list[torch.Tensor]:
    """Logits of each step of two prompts' rows, of which some leave, and all keys and values in the end."""
    found = []
    with runner.active():
        groups = [
            Group(runner.prefill(list(range(9, 9 + length))), list(range(rows)), capacity=steps, device=runner.device)
            for length, rows in ((30, 5), (11, 6))
        ]
        for step in range(steps):
            if step == steps // 2:
                groups[0].drop([1, 2])
            rows = [torch.tensor(group.row_ids) for group in groups]
            tokens = (torch.cat(rows) * 31 + step * 7) % 200 + 5
            for group, mine in zip(groups, tokens.split([len(each) for each in rows]), strict=True):
                group.rows.tokens[:, group.length] = mine.to(torch.int32)
            found.append(runner.step(groups, tokens))
            for group in groups:
                group.advance()
        for group in groups:
            assert group.pool is not None
            found += [each[:, :, :steps] for layer in (0, 1) for each in group.pool.layer(layer)]
    return found


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))


@pytest.mark.parametrize("form", FORMS)
def test_a_call_gives_the_bits_of_its_parts(form: str, calls: list[int]) -> None:
    runner = runner_of(model_of(form))
    assert [layer.bits for layer in runner._layers._layers] == ["same", "same"], "found out by the probe"
    calls.clear()
    together = decoded(runner)
    assert len(calls) >= 2 * 36, "but for the first step and those in which memory grows"
    with one_by_one(runner):
        calls.clear()
        assert same(decoded(runner), together)
    assert not calls


def test_a_rows_bits_do_not_depend_on_its_company(calls: list[int]) -> None:
    runner = runner_of(model_of("qwen3"))
    many, one = runner._probe_rows(range(19), 6), runner._probe_rows([13], 6)
    assert calls and torch.equal(many[:, 13], one[:, 0])


@pytest.mark.parametrize("type_", ["gemma2", "mixtral", "olmo2", "granite", "phi3", "stablelm", "gpt2"])
def test_code_that_is_not_known_is_left_alone(type_: str) -> None:
    assert not FusedLayers(tiny_causal_lm(type_).to(torch.bfloat16))


@pytest.mark.parametrize("type_", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_this_transformers_has_the_code_that_is_known(type_: str) -> None:
    """If not: read what has changed, and if the kernel still computes it, note its digest in layers.py."""
    module = tiny_causal_lm(type_).model.layers[0]
    of_layer, of_attention = (layers._digest(type(each).forward) for each in (module, module.self_attn))
    assert of_layer in layers._LAYERS and of_attention in layers._ATTENTION


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    class Mine(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = model_of("llama")
    model.model.layers[1].self_attn.__class__ = Mine
    assert len(FusedLayers(model)) == 1


def test_parts_that_are_not_known_are_left_alone() -> None:
    model = model_of("llama")
    model.model.layers[0].self_attn.adapter = torch.nn.Linear(2, 2)
    assert len(FusedLayers(model)) == 1


def test_a_linear_layer_of_another_class_is_computed_by_itself(calls: list[int]) -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.__class__ = type("Mine", (torch.nn.Linear,), {})
    runner_of(model)
    assert set(calls) == {0}


Change = Callable[[Any], Any]


def hooked(path: str) -> Change:
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda module, given, out: None)


def exchanged(path: str) -> Change:
    def change(layer: Any) -> None:
        part = layer.get_submodule(path)
        part.forward = type(part).forward.__get__(part)

    return change


class Adapted(torch.nn.Module):
    """As adapters are put around a linear layer, which stays what it was."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2 * self.base_layer(x)
        return out


CHANGES: dict[str, Change] = {
    "an adapter around a linear layer": lambda layer: setattr(
        layer.self_attn, "v_proj", Adapted(layer.self_attn.v_proj)
    ),
    "an adapter beside one": lambda layer: setattr(layer.mlp.up_proj, "adapter", torch.nn.Linear(2, 2)),
    "a class with another forward": lambda layer: setattr(
        layer.self_attn,
        "__class__",
        type("Mine", (type(layer.self_attn),), {"forward": lambda self, *args, **kwargs: None}),
    ),
    **{f"a hook on {path}": hooked(path) for path in ("self_attn", "self_attn.k_proj", "mlp", "mlp.act_fn")},
    **{
        f"another forward of {path or 'the layer'}": exchanged(path)
        for path in ("", "self_attn", "mlp", "mlp.down_proj", "input_layernorm", "mlp.act_fn")
    },
    "another activation": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()),
    "a weight in float32": lambda layer: layer.input_layernorm.to(torch.float32),
    "a bias in float32": lambda layer: setattr(
        layer.self_attn.q_proj, "bias", torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_special_about_a_layer_is_computed_as_before(name: str, calls: list[int]) -> None:
    model = model_of("llama")
    runner = runner_of(model)
    CHANGES[name](model.model.layers[1])
    calls.clear()
    if "float32" not in name and "class" not in name:  # of which some do not run at all
        with runner.active():
            runner._probe_rows(range(4), 4)
        assert set(calls) == {0}
    with runner._packed.active(), runner._fused.active(), runner._layers.active(runner._packed, runner._fused):
        taken = [isinstance(vars(each).get("forward"), layers._Layer) for each in model.model.layers]
    assert taken == [True, False]
    assert not any(isinstance(vars(each).get("forward"), layers._Layer) for each in model.modules())


def test_hooks_on_every_module_are_called(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    runner = runner_of(model_of("llama"))
    calls.clear()
    heard = []
    handle = torch_modules.register_module_forward_hook(lambda module, given, out: heard.append(type(module)))
    try:
        runner._probe_rows(range(4), 4)
    finally:
        handle.remove()
    assert not calls and modeling_llama.LlamaRMSNorm in heard


@pytest.mark.parametrize("how", ["float32", "gradients", "an argument that is not known", "positions of other numbers"])
def test_a_step_that_is_not_known_is_computed_as_before(how: str, calls: list[int]) -> None:
    with torch.inference_mode(mode=False):
        model = model_of("llama")
        runner = runner_of(model.to(torch.float32) if how == "float32" else model)
    calls.clear()
    of_layers = type(model.model.layers[0])
    own = of_layers.__call__

    def changed(self: Any, hidden: torch.Tensor, **kwargs: Any) -> Any:
        if how == "an argument that is not known":
            kwargs["softcap"] = None
        if how == "positions of other numbers":
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos.transpose(0, 2).contiguous().transpose(0, 2), sin
        return own(self, hidden, **kwargs)

    with torch.inference_mode(mode=how != "gradients"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_layers, "__call__", changed)
        runner._probe_rows(range(4), 4)
    assert not calls


@pytest.mark.parametrize("name", [*layers._LINEAR.values(), *layers._NORMS.values()])
@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_weights_are_those_of_now(name: str, where: str, calls: list[int]) -> None:
    model = model_of("qwen3", attention_bias=True)
    runner = runner_of(model)
    before = runner._probe_rows(range(4), 4)
    for layer in model.model.layers:
        part = layer.get_submodule(name)
        for kind, parameter in list(part.named_parameters()):
            if where == "in place":
                parameter.data.mul_(1.5)
            else:
                setattr(part, kind, torch.nn.Parameter(parameter.detach() * 1.5, requires_grad=False))
    calls.clear()
    after = runner._probe_rows(range(4), 4)
    assert calls and not torch.equal(before, after)
    with one_by_one(runner):
        assert torch.equal(runner._probe_rows(range(4), 4), after)


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("llama", lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5)),
        ("llama", lambda layer: setattr(layer.self_attn, "scaling", 0.9)),
        ("mistral", lambda layer: setattr(layer.self_attn.config, "sliding_window", 3)),
        ("qwen2", lambda layer: setattr(layer.self_attn, "sliding_window", 3)),
        ("smollm3", lambda layer: setattr(layer.self_attn, "use_rope", not layer.self_attn.use_rope)),
    ],
)
def test_numbers_of_a_layer_are_those_of_now(form: str, change: Change, calls: list[int]) -> None:
    model = model_of(form)
    runner = runner_of(model)
    before = runner._probe_rows(range(4), 4)
    for layer in model.model.layers:
        change(layer)
    calls.clear()
    after = runner._probe_rows(range(4), 4)
    assert calls and not torch.equal(before, after)
    with one_by_one(runner):
        assert torch.equal(runner._probe_rows(range(4), 4), after)


def test_a_call_that_gives_other_bits_is_found_out_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, calls: list[int]
) -> None:
    model = model_of("llama")
    with one_by_one(runner := runner_of(model)):
        want = decoded(runner)
    library = build.library()

    def wrong(told: Any, decode: Any, *rest: Any) -> int:
        needed: int = library.layer(told, decode, *rest)
        if not needed:
            ctypes.c_uint16.from_address(rest[5]).value ^= 1
        return needed

    names = {name: getattr(library, name) for name in (*build.KERNELS, "_name")}
    monkeypatch.setattr(build, "library", lambda: SimpleNamespace(**{**names, "layer": wrong}))
    with caplog.at_level(logging.WARNING):
        runner = runner_of(model)
        assert not len(runner._layers)
        calls.clear()
        assert same(decoded(runner), want)
    assert not calls
    assert caplog.text.count("give other bits than their parts") == 1


def test_memory_that_runs_out_in_a_call_leaves_nothing_half_done() -> None:
    runner = runner_of(model_of("llama"))
    want = runner._probe_rows(range(9), 6)
    with MemoryRunsOut(traced=True) as all_of_them:
        runner._probe_rows(range(9), 6)
    assert all_of_them.operations is not None
    mine = [at for at, operation in enumerate(all_of_them.operations) if "native/layers.py" in operation.line]
    assert len(mine) > 2 * len(runner._layers)
    for at in mine:
        with MemoryRunsOut([at]), pytest.raises(torch.OutOfMemoryError):
            runner._probe_rows(range(9), 6)
        assert torch.equal(runner._probe_rows(range(9), 6), want)
