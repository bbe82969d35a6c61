"""Milliseconds of one layer's decode attention, by every backend that can be used on the device, beside its floor.

    python benchmarks/attention_backends.py --output attention_backends.json

The heads of Llama-3-8B (8 kv heads x 4 query heads x 128) in bfloat16. Backends take turns; the median of their runs is
the result. The floor reads each key and value once: the shared prompt's once for all rows, a row's own once, at the
bandwidth of a large copy that is measured beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv import choose
from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams

KV_HEADS, GROUPS, HEAD_DIM = 8, 4, 128
SHAPES = {
    "cpu": ((24, 900, 32), (64, 311, 32)),
    "cuda": tuple(itertools.product((128, 512, 2048), (128, 1024), (16, 256, 1024))),
}
"""Rows, tokens of the shared prompt, tokens of each row."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the copy that bandwidth is measured with; far more than a cache holds."""


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() / (best / 1e3)


def drawn(rows: int, prefix: int, suffix: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, keys and values of the prompt, keys and values of rows; as ``AttentionBackend.decode`` takes them."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    capacity = -(-suffix // 256) * 256  # as pools are: longer than what they hold
    return (
        draw(rows, KV_HEADS, GROUPS, HEAD_DIM),
        draw(KV_HEADS, prefix, HEAD_DIM),
        draw(KV_HEADS, prefix, HEAD_DIM),
        draw(rows, KV_HEADS, capacity, HEAD_DIM)[:, :, :suffix],
        draw(rows, KV_HEADS, capacity, HEAD_DIM)[:, :, :suffix],
    )


def measured(
    backends: list[AttentionBackend], shape: tuple[int, int, int], device: torch.device, runs: int
) -> dict[str, Any]:
    """Milliseconds by backend: median, least and most."""
    given = drawn(*shape, device)
    params = AttentionParams(HEAD_DIM**-0.5)
    times: dict[str, list[float]] = {backend.name: [] for backend in backends}
    with torch.inference_mode():
        for run in range(runs + 3):  # kernels are compiled and caches warm by the fourth
            for backend in backends:
                spent = milliseconds(partial(backend.decode, *given, params), device)
                if run >= 3:
                    times[backend.name].append(spent)
    return {
        name: {"median": statistics.median(spent), "least": min(spent), "most": max(spent)}
        for name, spent in times.items()
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--runs", type=int, default=20)
    made.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    options = made.parse_args()
    device = torch.device(options.device)
    backends = []
    why_not = {}
    for backend in choose.all_backends():
        if reason := backend.why_not(device, torch.bfloat16, HEAD_DIM):
            why_not[backend.name] = reason
            print(f"{backend.name}: left out, {reason}")
        else:
            backends.append(backend)
    rate = bandwidth(device)
    result: dict[str, Any] = {
        "device": choose.device_name(device),
        "machine": platform.platform(),
        "torch": torch.__version__,
        "backends": {backend.name: choose.stamp(backend, device) for backend in backends},
        "left_out": why_not,
        "gigabytes_per_second": rate / 1e9,
        "milliseconds": {},
    }
    print(f"| rows x prompt + own | floor | {' | '.join(backend.name for backend in backends)} |")
    print(f"|---|---|{'---|' * len(backends)}")
    for shape in SHAPES[device.type]:
        rows, prefix, suffix = shape
        floor = 2 * 2 * KV_HEADS * HEAD_DIM * (prefix + rows * suffix) / rate * 1e3  # keys and values of two bytes
        found = measured(backends, shape, device, options.runs)
        name = f"{rows} x {prefix} + {suffix}"
        result["milliseconds"][name] = {"floor": floor, **found}
        medians = [f"{found[backend.name]['median']:.3f}" for backend in backends]
        print(f"| {name} | {floor:.3f} | {' | '.join(medians)} |")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
