"""A decode step's time over its floor, with the machine's ceilings measured in the same run.

    python benchmarks/roofline.py --output roofline.json     # SmolLM2 on a CPU, the shape of Llama-3-8B on a GPU
    python benchmarks/roofline.py --model qwen3-0.6b --shapes 311x64

Ceilings: the best rate of a plain product (torch's linear, weights as they lie in the model, nothing packed) over the
model's own shapes with the rows of the step, the best over other rows and square ones too, and the bandwidth of a large
copy. Floors of a step of `rows` rows, t tokens after a prompt of P:

- products alone: no floor, but all linear layers called one after the other, nothing packed and nothing in between;
- products: 2 x weights x rows / best rate of one of them, or reading the weights once, whichever is longer;
- whole: the same at the best rate of any product, the prompt's KV read once (or its products with all rows' queries),
  the rows' own KV read once, and three passes over float32 logits. t is that of the middle of what was timed.

The step is timed through the engine (sampler, end-of-sequence checks and everything else included), over --steps steps
of one call; rows do not end. On a CPU the target is stated over the products' floor, on a GPU over the whole.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench import finish, header, load_model, parser, prompt_of, seconds_of, spread, table
from torch import Tensor
from torch.nn import functional

from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.kv import choose
from specrej_eval.kv.native import build

SHAPES = {
    "cpu": ("311x64", "900x24", "40x200", "1900x64"),
    "cuda": ("128x128", "128x512", "128x1024", "128x2048", "1024x128", "1024x512", "1024x1024", "1024x2048"),
}
WARM_UP = 8
"""Steps before those that are timed."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the copy that bandwidth is measured with; far more than a cache holds."""
SQUARE = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(model=None, device="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--shapes", nargs="+", metavar="PROMPTxROWS", help="default: those of the device")
    made.add_argument("--steps", type=int, default=32, help="timed in one go; default: %(default)s")
    made.add_argument(
        "--token_stats", nargs="*", default=["logprob"], help="timed apart: recording these of each token"
    )
    made.add_argument(
        "--compile", default="auto", choices=["auto", "on", "off"], help="on a GPU: CUDA graphs; default: %(default)s"
    )
    made.add_argument("--profile", action="store_true", help="for each shape, say which operations take the time")
    options = made.parse_args()
    kind = options.device.partition(":")[0]
    options.model = options.model or ("llama-3-8b" if kind == "cuda" else "smollm2")
    options.shapes = options.shapes or list(SHAPES[kind])
    torch.set_num_threads(options.threads)

    result: dict[str, Any] = {**header("roofline", options), "steps": options.steps, "shapes": {}}
    model, tokenizer = load_model(options.model, options.dtype, options.device, seed=options.seed)
    attention = choose.resolve("auto", options.device, options.compile)
    graphs = choose.replays(attention, options.device, options.compile)
    engine = TransformersEngine(model, tokenizer, attention=attention, graphs=graphs)
    engine.eos_ids = ()
    result["engine"] = engine.describe()
    ceilings = Ceilings(model, options)
    for words in options.shapes:
        prompt, rows = map(int, words.split("x"))
        print(f"{words}:", flush=True)
        result["shapes"][words] = one_shape(engine, tokenizer, prompt, rows, ceilings, options)
        result["ceilings"] = ceilings.to_dict()
        for found in result["shapes"].values():  # the best rate may have been seen only now
            found |= ratios(found, ceilings)
        finish(result, markdown(result), options.output)


class Ceilings:
    """The best rates seen so far; measured again beside every timed run, since a machine's best varies."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.device, self.dtype = options.device, getattr(torch, options.dtype)
        kind = options.device.partition(":")[0]
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.weights = sum(module.weight.numel() for module in linears)
        self.itemsize = linears[0].weight.element_size()
        config = model.config.get_text_config(decoder=True)
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.vocab = config.vocab_size
        self._linears = linears
        self._own = sorted({tuple(module.weight.shape) for module in linears})
        self._square = [(size, size) for size in SQUARE[kind]]
        self._copied = torch.empty(COPIED[kind], dtype=torch.uint8, device=self.device)
        self.sweep: dict[int, float] = {}
        """Seconds of all linear layers one after the other, by the rows of the step."""
        self.own_flops: dict[int, float] = {}
        """FLOP/s of the best of the model's own products, by their rows."""
        self.flops = self.bandwidth = 0.0
        self.flops_of = ""
        """FLOP/s and bytes/s, and the product that gave the best rate of all."""

    def measure(self, rows: int, seconds: float = 0.02) -> None:
        """Each product for so many seconds, and a few copies."""
        torch.manual_seed(0)
        padded = -(-rows // 16) * 16  # what our engine feeds on a CPU: the rate may be better for it
        with torch.inference_mode():
            for shape in self._own:
                rate = max(self._rate(shape, count, seconds) for count in {rows, padded})
                self.own_flops[rows] = max(rate, self.own_flops.get(rows, 0.0))
            inputs = {width: torch.randn(padded, width, device=self.device, dtype=self.dtype) for _, width in self._own}
            for _ in range(4):
                took = seconds_of(lambda: self._sweep(inputs), self.device)
                self.sweep[rows] = min(took, self.sweep.get(rows, took))
            for shape in self._square:
                self._rate(shape, 512, seconds)
            half = len(self._copied) // 2
            for _ in range(4):
                took = seconds_of(lambda: self._copied[:half].copy_(self._copied[half:]), self.device)
                self.bandwidth = max(self.bandwidth, 2 * half / took)

    def _sweep(self, inputs: dict[int, Tensor]) -> None:
        for module in self._linears:
            functional.linear(inputs[module.in_features], module.weight)

    def _rate(self, shape: tuple[int, int], rows: int, seconds: float) -> float:
        """FLOP/s of a product of ``rows`` with weights (outputs, inputs)."""
        weight = torch.randn(shape, device=self.device, dtype=self.dtype)
        x = torch.randn(rows, shape[1], device=self.device, dtype=self.dtype)
        rate = 2 * rows * weight.numel() / self._fastest(x, weight, seconds)
        if rate > self.flops:
            self.flops, self.flops_of = rate, f"{rows} x {shape[1]} x {shape[0]}"
        return rate

    def _fastest(self, x: Tensor, weight: Tensor, seconds: float) -> float:
        once = seconds_of(lambda: functional.linear(x, weight), self.device)
        calls = max(1, int(seconds / 4 / max(once, 1e-6)))

        def several() -> None:
            for _ in range(calls):
                functional.linear(x, weight)

        return min(seconds_of(several, self.device) / calls for _ in range(4))

    def to_dict(self) -> dict[str, Any]:
        return {
            "own_gflops": {str(rows): flops / 1e9 for rows, flops in self.own_flops.items()},
            "gflops": self.flops / 1e9,
            "gflops_of": self.flops_of,
            "gigabytes_per_second": self.bandwidth / 1e9,
            "weights_of_products": self.weights,
        }

    def floors(self, prompt: int, rows: int, tokens: float) -> dict[str, float]:
        """Milliseconds."""
        kv = 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize  # bytes of one token
        attention = 4 * self.layers * self.heads * self.head_dim  # FLOP of one query and key
        read = self.weights * self.itemsize / self.bandwidth
        own = max(read, 2 * self.weights * rows / self.own_flops[rows])
        products = max(read, 2 * self.weights * rows / self.flops)
        prefix = max(prompt * kv / self.bandwidth, rows * prompt * attention / self.flops)
        suffix = max(rows * tokens * kv / self.bandwidth, rows * tokens * attention / self.flops)
        logits = 3 * rows * self.vocab * 4 / self.bandwidth
        return {
            "products_alone_ms": 1000 * self.sweep[rows],
            "floor_products_ms": 1000 * own,
            "floor_products_best_ms": 1000 * products,
            "floor_attention_ms": 1000 * (prefix + suffix),
            "floor_ms": 1000 * (products + prefix + suffix + logits),
        }


def one_shape(
    engine: TransformersEngine, tokenizer: Any, prompt: int, rows: int, ceilings: Ceilings, options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a step, bare and with statistics of tokens, with the ceilings measured in between."""
    ids = prompt_of(tokenizer, prompt)
    longest = WARM_UP + options.steps + 8
    config = RunConfig(
        dtype=options.dtype,
        device=options.device,
        strategy="best_of_n",
        n=rows,
        max_gen_toks=longest,
        seed=options.seed,
    ).checked()

    def milliseconds(stats: tuple[Any, ...], profiler: Any = None) -> float:
        session = engine.open(
            Prompt(token_ids=tuple(ids), conversation=(), prompt_hash="roofline"),
            config,
            resolve(config, prompt),
            token_stats=stats,
        )
        engine.follow(session, Plan(keep=(), fresh=rows, num_tokens=longest))
        engine.decode([session], WARM_UP)
        if profiler is not None:
            profiler.start()
        took = seconds_of(lambda: engine.decode([session], options.steps), options.device)
        if profiler is not None:
            profiler.stop()
        assert session.decode_tokens == rows * (WARM_UP + options.steps), session.decode_tokens
        engine.close(session)
        return 1000 * took / options.steps

    stats = tuple(options.token_stats)
    milliseconds(())  # warm-up of allocators and compilers
    bare, recorded = [], []
    for pair in range(options.pairs):
        ceilings.measure(rows)
        bare.append(milliseconds(()))
        if stats:
            recorded.append(milliseconds(stats))
        print(f"  pair {pair}: {bare[-1]:.1f} ms a step", flush=True)
        time.sleep(0.1)
    found: dict[str, Any] = {"prompt": prompt, "rows": rows, "tokens": WARM_UP + options.steps / 2}
    found["step_ms"] = spread(bare)
    if recorded:
        found["step_with_stats_ms"] = spread(recorded)
    if options.profile:
        found["profile"] = profiled(milliseconds, options)
    return found


def profiled(milliseconds: Any, options: argparse.Namespace) -> list[list[object]]:
    """Operations of a step by their own time: name, milliseconds a step, calls a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    with kernels_seen():
        milliseconds((), profiler)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))[:20]
    lines = [[event.key, getattr(event, own) / 1000 / options.steps, event.count / options.steps] for event in events]
    print(table(["operation", "ms a step", "calls a step"], lines), flush=True)
    return lines


@contextmanager
def kernels_seen() -> Iterator[None]:
    """Inside, torch's profiler sees calls of our C++ kernels, which are no operations of torch's: ``cpp::NAME``."""
    kernels = None if build.why_not() else build.library()
    own = {name: getattr(kernels, name) for name in build.KERNELS} if kernels is not None else {}

    def seen(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with torch.profiler.record_function(f"cpp::{name}"):
                return own[name](*arguments)

        return call

    for name in own:
        setattr(kernels, name, seen(name))
    try:
        yield
    finally:
        for name, kernel in own.items():
            setattr(kernels, name, kernel)


def ratios(found: dict[str, Any], ceilings: Ceilings) -> dict[str, float]:
    """A shape's floors and what its step is of them."""
    floors = ceilings.floors(found["prompt"], found["rows"], found["tokens"])
    step = found["step_ms"]["median"]
    return {
        **floors,
        "over_products_alone": step / floors["products_alone_ms"],
        "over_products": step / floors["floor_products_ms"],
        "over_products_best": step / floors["floor_products_best_ms"],
        "over_floor": step / floors["floor_ms"],
        "tokens_per_second": 1000 * found["rows"] / step,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        [
            words,
            found["step_ms"]["median"],
            found.get("step_with_stats_ms", {}).get("median"),
            found["products_alone_ms"],
            f"{found['over_products_alone']:.2f}",
            found["floor_products_ms"],
            f"{found['over_products']:.2f}",
            found["floor_ms"],
            f"{found['over_floor']:.2f}",
            found["tokens_per_second"],
        ]
        for words, found in result["shapes"].items()
    ]
    headers = [
        "prompt x rows", "step, ms", "with statistics, ms", "products alone, ms", "step over it", "their floor, ms",
        "step over it", "whole floor, ms", "step over it", "tokens/s",
    ]  # fmt: skip
    seen = result["ceilings"]
    rates = ", ".join(f"{rows} rows {rate:,.0f}" for rows, rate in seen["own_gflops"].items())
    told = f"GFLOP/s of the model's products: {rates}; of any: {seen['gflops']:,.0f} ({seen['gflops_of']})"
    told += f"; copy {seen['gigabytes_per_second']:,.1f} GB/s"
    return f"{result['model']} {result['dtype']}. {told}.\n\n{table(headers, lines)}"


if __name__ == "__main__":
    main()
