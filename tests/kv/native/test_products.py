"""Products of our own: exact where numbers are, as near as torch's elsewhere, the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_causal_lm
from torch import Tensor
from torch.nn import functional

from specrej_eval.config import RunConfig
from specrej_eval.engines.transformers.loading import resolve_engine
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose
from specrej_eval.kv.native import build, products
from specrej_eval.kv.packed import PackedWeights

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([47, 48, 49, 63, 64, 65, 95, 96, 97, 112, 130, 200]))
LARGE = (1536, 576)
"""Inputs and outputs that several threads share."""
DTYPE = products.DTYPE
Counted = Callable[..., None]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def whole_numbers(seed: int, *shape: int, most: int = 100) -> Tensor:
    """Whose sums of products are exact in float32."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def packed(weight: Tensor) -> products.Packed:
    return products.Packed(weight, build.library())


@given(rows=st.integers(0, 70), inputs=SIZES, outputs=SIZES, biased=st.booleans(), seed=st.integers(0, 10**6))
def test_whole_numbers_are_multiplied_exactly_and_rounded_as_torch_rounds(
    rows: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    x, weight, bias = (
        whole_numbers(seed + i, *shape) for i, shape in enumerate(((rows, inputs), (outputs, inputs), (outputs,)))
    )
    bias = bias if biased else None
    want = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.equal(packed(weight).product(x, bias), want.to(DTYPE))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_that_threads_share_is_exact_too(threads: int, biased: bool) -> None:
    inputs, outputs = LARGE
    x, weight = whole_numbers(0, 27, inputs), whole_numbers(1, outputs, inputs)
    bias = whole_numbers(2, outputs) if biased else None
    want = functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(DTYPE)
    with on_threads(threads):
        assert torch.equal(packed(weight).product(x, bias), want)


@pytest.mark.parametrize("rows", [3, 256, 257, 600])
@pytest.mark.parametrize("inputs", [2048, 2049, 2050, 4100, 6001])
def test_products_that_are_cut_into_parts_are_exact_and_do_not_depend_on_company(rows: int, inputs: int) -> None:
    """Weights that a cache does not hold, and rows that it does not."""
    x, weight, bias = (
        whole_numbers(i, *shape, most=50) for i, shape in enumerate(((rows, inputs), (70, inputs), (70,)))
    )
    want = functional.linear(x.float(), weight.float(), bias.float()).to(DTYPE)
    assert torch.equal(packed(weight).product(x, bias), want)
    x, mine = drawn(0, rows, inputs), packed(drawn(1, 70, inputs))
    together = mine.product(x, None)
    for few in (slice(0, 1), slice(rows // 2, rows), slice(rows - 2, rows)):
        assert torch.equal(mine.product(x[few], None), together[few])


@given(rows=st.integers(1, 70), inputs=SIZES, outputs=SIZES, biased=st.booleans(), seed=st.integers(0, 10**6))
def test_numbers_are_as_near_to_the_truth_as_torchs(
    rows: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    x, weight, bias = (
        drawn(seed + i, *shape) for i, shape in enumerate(((rows, inputs), (outputs, inputs), (outputs,)))
    )
    bias = bias if biased else None
    truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    sizes = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    summing = (inputs + 1) * 2**-24 * sizes
    mine, theirs = (
        (each.double() - truth).abs() for each in (packed(weight).product(x, bias), functional.linear(x, weight, bias))
    )
    assert bool((mine <= 2**-8 * truth.abs() + 2 * summing).all()), "more than one rounding"
    assert float(mine.square().mean().sqrt()) <= 1.02 * float(theirs.square().mean().sqrt()) + float(summing.max())


@given(
    rows=st.integers(1, 70),
    inputs=SIZES,
    outputs=SIZES,
    chosen=st.lists(st.integers(0, 69), min_size=1, max_size=40),
    seed=st.integers(0, 10**6),
)
def test_a_rows_bits_do_not_depend_on_its_company(
    rows: int, inputs: int, outputs: int, chosen: list[int], seed: int
) -> None:
    x, weight = drawn(seed, rows, inputs), packed(drawn(seed + 1, outputs, inputs))
    together = weight.product(x, None)
    places = [place % rows for place in chosen]
    assert torch.equal(weight.product(x[places], None), together[places])


def test_nor_do_they_depend_on_the_number_of_threads(counted: Counted) -> None:
    inputs, outputs = LARGE
    x, weight = drawn(0, 70, inputs), packed(drawn(1, outputs, inputs))
    want = weight.product(x, None)
    for threads in (1, 2, 3, 7):
        with on_threads(threads):
            for rows in range(1, 71, 1 if threads < 3 else 9):
                assert torch.equal(weight.product(x[:rows], None), want[:rows]), (threads, rows)
                counted("products compared bitwise in other company")


@pytest.mark.parametrize("inputs", [64, 33, 1])
def test_inputs_may_lie_in_memory_as_they_like(inputs: int) -> None:
    weight = packed(drawn(0, 40, inputs))
    wide = drawn(1, 12, 3, 2 * inputs + 1)
    for x in (
        wide[:, 0, :inputs],
        wide[:, 1, 1 : inputs + 1],
        wide[::3, 2, :inputs],
        wide[:, :, :inputs],
        wide[:, :, 1::2],
        wide[:, :1, :inputs].expand(12, 5, inputs),
        wide.transpose(0, 1)[:, :, :inputs],
        wide.transpose(1, 2)[:, 1 : 1 + inputs].transpose(1, 2),
        wide[4, 1, :inputs],
        wide[:0, :, :inputs],
    ):
        found = weight.product(x, None)
        assert found.shape == (*x.shape[:-1], 40) and found.is_contiguous()
        assert torch.equal(found, weight.product(x.clone(memory_format=torch.contiguous_format), None))


NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf")])


@given(
    inputs=SIZES,
    outputs=SIZES,
    bad=st.lists(st.tuples(st.sampled_from("xwb"), st.integers(0, 10**6), NUMBERS), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_what_is_no_number_is_kept_and_touches_nobody_else(
    inputs: int, outputs: int, bad: list[tuple[str, int, float]], seed: int
) -> None:
    x, weight, bias = (whole_numbers(seed, *shape) for shape in ((11, inputs), (outputs, inputs), (outputs,)))
    for where, place, number in bad:
        numbers = {"x": x, "w": weight, "b": bias}[where].view(-1)
        numbers[place % numbers.numel()] = number
    want = ((x.float()[:, None] * weight.float()[None]).sum(-1) + bias.float()).to(DTYPE)  # 0 * inf is NaN here too
    found = packed(weight).product(x, bias)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.nan_to_num(), want.nan_to_num())


def test_what_is_too_large_is_infinite() -> None:
    most = float(torch.finfo(DTYPE).max)
    half_a_step = 2.0**119
    numbers = [[most, 0.0], [most, half_a_step / 2], [most, half_a_step], [most, most], [-most, -most], [-most, most]]
    weight = torch.tensor(numbers).to(DTYPE)
    found = packed(weight).product(torch.ones(9, 2, dtype=DTYPE), None)
    assert found[4].tolist() == [most, most, *[float("inf")] * 2, float("-inf"), 0.0]


@pytest.mark.parametrize("sizes", [(33, 22), (66, 40), (33, 21), (7, 8), (1, 3), (3, 1), (576, 64)])
def test_memory_is_counted_and_nothing_around_an_answer_is_written(sizes: tuple[int, int]) -> None:
    inputs, outputs = sizes
    memory = whole_numbers(0, outputs * inputs + 1)  # as in a file of weights: at any place
    weight = memory[1:].view(outputs, inputs)
    mine = packed(weight)
    assert products.nbytes(weight) == mine._numbers.nbytes
    assert products.nbytes(weight) == 2 * (-(-outputs // 16) * 16) * (-(-inputs // 2) * 2)
    x, out = whole_numbers(1, 5, inputs), torch.full((7, outputs), 7.0, dtype=DTYPE)
    given_rows = functional.pad(x, (0, inputs % 2))
    build.library().product(
        *(given_rows.data_ptr(), given_rows.stride(0), mine.told, None, out[1].data_ptr(), 5),
    )
    assert torch.equal(out[1:6], mine.product(x, None))
    assert bool((out[[0, 6]] == 7).all())


# ---- where they are used ---------------------------------------------------------------------------------------------

needs_pairs = pytest.mark.skipif(products.why_not() is not None, reason=f"no products here: {products.why_not()}")


@needs_pairs
def test_copies_are_ours_in_bfloat16_where_kernels_are_wanted_only() -> None:
    half, single = torch.nn.Linear(33, 21).bfloat16(), torch.nn.Linear(33, 21)
    assert (PackedWeights(half).by, PackedWeights(half, kernels=True).by) == ("onednn", "cpp")
    assert PackedWeights(single, kernels=True).by == "onednn"
    assert PackedWeights(torch.nn.Linear(8, 8).half(), kernels=True).by is None
    assert PackedWeights(half, kernels=True).nbytes == 2 * 32 * 34
    both = torch.nn.Sequential(half, torch.nn.Linear(33, 21))
    x = drawn(0, 6, 33)
    want = torch.nn.Linear.forward(both[1], x.float())
    with PackedWeights(both, kernels=True).active():
        assert torch.equal(half(x), packed(half.weight).product(x, half.bias))
        assert torch.allclose(both[1](x.float()), want, atol=1e-5)


@needs_pairs
def test_weights_that_are_one_have_one_copy() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False).bfloat16() for _ in range(2)])
    model[1].weight = model[0].weight
    weights = PackedWeights(model, kernels=True)
    assert weights.nbytes == 2 * 64 * 64
    with weights.active():
        assert weights._packed[model[0]][1] is weights._packed[model[1]][1]


@needs_pairs
def test_what_is_not_for_them_is_torchs() -> None:
    class Kept(Tensor):
        """Its numbers need not lie where it says."""

        def data_ptr(self) -> int:
            raise AssertionError

    layer = torch.nn.Linear(33, 21).bfloat16()
    x = drawn(0, 6, 33)
    want = layer(x)
    weights = PackedWeights(layer, kernels=True)
    with weights.active():
        assert torch.equal(layer(x.as_subclass(Kept)).as_subclass(Tensor), want)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            layer(drawn(0, 6, 32))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.float())
        with torch.inference_mode(False), torch.enable_grad():
            given_x = drawn(0, 6, 33)
            found = layer(given_x)
            assert found.requires_grad and torch.equal(found, want)


@needs_pairs
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (5, 4)])
def test_what_is_empty_is_torchs(sizes: tuple[int, int]) -> None:
    layer = torch.nn.Linear(*sizes).bfloat16()
    for rows in (0, 2) if 0 in sizes else (0,):
        x = drawn(0, rows, sizes[0])
        want = layer(x)
        with PackedWeights(layer, kernels=True).active():
            assert torch.equal(layer(x), want)


@needs_pairs
def test_wrong_products_are_never_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    whole = products.Packed.product
    layer = torch.nn.Linear(8, 8).bfloat16()

    def of_many(self: products.Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        found = whole(self, x, bias)
        return torch.nextafter(found, found + 1) if len(x) % 8 == 0 else found

    wrong: list[Callable[..., Tensor]] = [
        lambda self, x, bias: whole(self, x, bias) * 1.01,
        lambda self, x, bias: whole(self, x, None),
        of_many,
    ]
    try:
        for each in wrong:
            monkeypatch.setattr(products.Packed, "product", each)
            products.why_not.cache_clear()
            caplog.clear()
            assert PackedWeights(layer, kernels=True).by == "onednn"
            assert "are wrong on this machine and are not used" in caplog.text
    finally:
        products.why_not.cache_clear()


@needs_pairs
def test_a_models_rows_are_the_same_bits_in_any_company() -> None:
    """Of every layer, with the kernels' attention and norms; torch's products in bfloat16 do not promise it."""
    runner = ModelRunner(tiny_causal_lm().to(DTYPE), attention=choose.build("cpp"))
    assert (runner.path, runner.products) == ("shared_prefix", "cpp")
    assert runner._rows_differ() is None
    assert ModelRunner(tiny_causal_lm(), attention=choose.build("cpp")).products == "onednn"


@needs_pairs
def test_products_that_are_wrong_for_a_model_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = products.Packed.product
    monkeypatch.setattr(products.Packed, "product", lambda self, x, bias: whole(self, x, bias).flip(-1))
    model = tiny_causal_lm().to(DTYPE)
    runner = ModelRunner(model, attention=choose.build("cpp"))
    assert (runner.path, runner.products, runner.attention.name) == ("shared_prefix", "onednn", "sdpa")
    assert "attention_backend=cpp is not used for LlamaForCausalLM" in caplog.text
    caplog.clear()
    monkeypatch.setattr("specrej_eval.engines.transformers.model.obstacle", lambda model: "attention of its own")
    runner = ModelRunner(model, attention=choose.build("cpp"))
    assert (runner.path, runner.products) == ("replicated", "onednn")
    assert "C++ kernels are not used for LlamaForCausalLM" in caplog.text


@needs_pairs
def test_records_say_who_multiplied_where_that_changes_bits() -> None:
    def environment(**arguments: Any) -> dict[str, Any]:
        return resolve_engine(*RunConfig.from_args({"device": "cpu", **arguments})).environment()

    assert environment(dtype="bfloat16") == {"attention_backend": "cpp", "compile": "on", "products": "cpp"}
    assert environment(dtype="bfloat16", compile="off")["products"] == "torch"
    assert environment(dtype="bfloat16", attention_backend="sdpa")["products"] == "torch"
    assert "products" not in environment(dtype="float32")
    assert "products" not in environment(), "the embedded model is float32"


def test_a_processor_without_products_of_pairs_keeps_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def multiplies(self) -> int:
            return 0

    monkeypatch.setattr(build, "library", Kernels)
    products.why_not.cache_clear()
    try:
        assert "AVX512-BF16" in str(products.why_not())
        layer = torch.nn.Linear(8, 8).bfloat16()
        assert PackedWeights(layer, kernels=True).by == PackedWeights(layer).by != "cpp"
    finally:
        products.why_not.cache_clear()


@pytest.mark.full
def test_kernels_compiled_for_such_a_processor_say_so_and_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-mno-avx512bf16"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._found.cache_clear()
    try:
        kernels = build.library()
        assert not kernels.multiplies()
        assert products.mistake(kernels) is None
    finally:
        build._found.cache_clear()


# ---- faults of the kernels' text -------------------------------------------------------------------------------------

FAULTS = (
    ("(inputs + 1) / 2, vectors", "inputs / 2, vectors"),
    ("inputs % 2 == 0 && at + LANES", "at + LANES"),
    ("2 * at + 1 < inputs ? 2 : 1", "1"),
    ("(const uint32_t *)from + at", "(const uint32_t *)from"),
    ("weights + (v * words + at) * LANES", "weights + (at * VECTORS + v) * LANES"),
    ("x + row * x_row + 2 * at", "x + 2 * at"),
    ("round_to<Half>(sums[row][v] + tile.bias[v])", "sums[row][v] + tile.bias[v]"),
    ("round_to<Half>(sums[row][v] + tile.bias[v])", "round_to<Half>(round_to<Half>(sums[row][v]) + tile.bias[v])"),
    ("2 * (tile.outputs - v * LANES)", "0"),
    ("biases, bias + first * LANES, 2 * count", "biases, bias, 2 * count"),
    ("row += tall;", "if (tall < 7) out[row * w.outputs] ^= 1;\n            row += tall;"),
    ("begin > 0 && row < ROWS", "false && row < ROWS"),
    ("w.words * (part + 1) / parts", "w.words * (part + 1) / parts - (part + 1 < parts)"),
    ("multiply_tiles(x + row * x_row", "multiply_tiles(x"),
    ("int64_t at = begin;", "int64_t at = begin + 1;"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [pytest.param(*fault, marks=[pytest.mark.full] if place else []) for place, fault in enumerate(FAULTS)],
)
def test_a_fault_in_the_kernels_text_is_found_before_they_are_used(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    source = build.SOURCE.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"kernels.cpp has {old!r} {source.count(old)} times: change the fault with it"
    (tmp_path / "kernels.cpp").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "kernels.cpp")
    monkeypatch.setattr(build, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build._FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._found.cache_clear()
    try:
        assert products.mistake(build.library()) is not None, f"{old} -> {new}"
    finally:
        build._found.cache_clear()
    counted("faults of products planted and found")
