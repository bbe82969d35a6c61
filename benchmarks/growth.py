"""How time and memory grow with rows, with the prompt and with the length of rows; and if memory is what was promised.

    python benchmarks/growth.py --output growth.json

One of the three is varied at a time, the other two stay as in the middle. Memory is what the process (on a GPU: torch)
holds more once all rows are decoded than before the prompt was read, as the operating system counts it. It is held
against the formula of the KV budget: 2 x layers x kv heads x head dim x itemsize bytes a token, for the prompt once and
every row's own tokens. More than --tolerance away from it anywhere, and the exit code is 1. Where the formula gives
less than 16 MiB, nothing is judged: that is the size of what else a process may come to hold.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import finish, header, load_model, parser, prompt_of, seconds_of, spread, table

from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.kv import choose

JUDGED_FROM = 16 * 2**20
"""Bytes."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""So that glibc gives back what was freed: else it would be counted as held."""


def main() -> None:
    made = parser(__doc__, pairs=3)
    made.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="default: %(default)s")
    made.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], help="default: %(default)s")
    made.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 256], help="default: %(default)s")
    made.add_argument("--tolerance", type=float, default=0.1, help="share of the formula; default: %(default)s")
    options = made.parse_args()
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    sys.exit(0 if measure(options) else 1)


def measure(options: argparse.Namespace) -> bool:
    """True if memory was within the tolerance everywhere."""
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, options.dtype, options.device, seed=options.seed)
    attention = choose.resolve("auto", options.device)
    graphs = choose.replays(attention, options.device)
    engine = TransformersEngine(model, tokenizer, attention=attention, graphs=graphs)
    engine.eos_ids = ()
    result: dict[str, Any] = header("growth", options)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    result |= {"bytes_per_token": per_token, "engine_bytes_per_token": engine.bytes_per_token(), "points": []}
    if per_token != result["engine_bytes_per_token"]:
        print(f"the engine counts {result['engine_bytes_per_token']} bytes a token, the formula {per_token}")
    middle = {name: values[len(values) // 2] for name, values in series(options).items()}
    for name, values in series(options).items():
        for value in values:
            sizes = {**middle, name: value}
            print(f"{name} {value}:", end="", flush=True)
            found = point(engine, tokenizer, sizes, per_token, options)
            print(f" {found['step_ms']['median']:.1f} ms a step, memory {found['over_formula']}", flush=True)
            result["points"].append({"varied": name, **sizes, **found})
    finish(result, markdown(result), options.output)
    judged = [one for one in result["points"] if one["judged"]]
    beyond = [one for one in judged if abs(one["over_formula"] - 1) > options.tolerance]
    for one in beyond:
        print(f"memory is {one['over_formula']:.2f} times the formula: {one}", file=sys.stderr)
    print(f"{len(judged)} of {len(result['points'])} points judged, {len(beyond)} beyond {options.tolerance:.0%}")
    return not beyond and per_token == result["engine_bytes_per_token"]


def series(options: argparse.Namespace) -> dict[str, list[int]]:
    return {"rows": options.rows, "prompts": options.prompts, "lengths": options.lengths}


def point(
    engine: TransformersEngine, tokenizer: Any, sizes: dict[str, int], per_token: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Time and memory of one combination of rows, prompt and length."""
    run(engine, tokenizer, sizes, options)  # what libraries keep for good of a size they have not met before
    runs = [run(engine, tokenizer, sizes, options) for _ in range(options.pairs)]
    formula = per_token * (sizes["prompts"] + sizes["rows"] * sizes["lengths"])
    held = sorted(one["bytes_held"] for one in runs)[len(runs) // 2]
    return {
        "prefill_seconds": spread(one["prefill_seconds"] for one in runs),
        "step_ms": spread(1000 * one["decode_seconds"] / sizes["lengths"] for one in runs),
        "mib_held": held / 2**20,
        "mib_of_formula": formula / 2**20,
        "over_formula": round(held / formula, 3),
        "judged": formula >= JUDGED_FROM and held > 0,
    }


def run(
    engine: TransformersEngine, tokenizer: Any, sizes: dict[str, int], options: argparse.Namespace
) -> dict[str, float]:
    """Prefill, decode to the end, and see what is held while the session is still there."""
    rows, length = sizes["rows"], sizes["lengths"]
    config = RunConfig(
        dtype=options.dtype, device=options.device, strategy="best_of_n", n=rows, max_gen_toks=length + 1,
        seed=options.seed,
    ).checked()  # fmt: skip
    ids = prompt_of(tokenizer, sizes["prompts"])
    before = bytes_held(options.device)
    prompt = Prompt(token_ids=tuple(ids), conversation=(), prompt_hash="growth")
    session = engine.open(prompt, config, resolve(config, len(ids)))
    engine.follow(session, Plan(keep=(), fresh=rows, num_tokens=length))
    # one token less than a row may have: a row that ends leaves, and its KV with it
    seconds = seconds_of(lambda: engine.decode([session], length), options.device)
    assert session.decode_tokens == rows * length, session.decode_tokens
    held = bytes_held(options.device) - before
    prefill = session.prefill_seconds
    engine.close(session)
    return {"prefill_seconds": prefill, "decode_seconds": seconds, "bytes_held": held}


def bytes_held(device: str) -> int:
    """Of memory, by torch's count on a GPU, by the operating system's on a CPU (0 where it does not say)."""
    gc.collect()
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024  # weights may be mapped from their file: they are not counted


def markdown(result: dict[str, Any]) -> str:
    lines = [
        [
            one["varied"],
            one["rows"],
            one["prompts"],
            one["lengths"],
            one["prefill_seconds"]["median"],
            one["step_ms"]["median"],
            1000 * one["rows"] / one["step_ms"]["median"],
            one["mib_held"],
            one["mib_of_formula"],
            f"{one['over_formula']:.3f}" + ("" if one["judged"] else " (not judged)"),
        ]
        for one in result["points"]
    ]
    headers = [
        "varied", "rows", "prompt", "length", "prefill, s", "step, ms", "tokens/s", "MiB held", "MiB of the formula",
        "held over formula",
    ]  # fmt: skip
    about = f"{result['model']} {result['dtype']}, {result['bytes_per_token']:,} bytes a token"
    return f"{about}\n\n{table(headers, lines)}"


if __name__ == "__main__":
    main()
