"""What ``variance_reduce=True`` gains on the demo pair: the spread over many seeds of a prompt's mean reward and of its
best-of-n, with it and without.

    python benchmarks/variance_reduce.py --prompts 12 --seeds 60 --n 4 8 16

For each prompt and n, all rows are decoded to their end under each seed (Best-of-N). Variances are over seeds, averaged
over prompts; the ratio has a 95 % interval by bootstrap over prompts and seeds. Below 1 is a gain.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import specrej_eval
from specrej_eval.config import RunConfig
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request

RESULTS = Path(__file__).parent / "results" / "variance_reduce.json"
MAX_GEN_TOKS = 64


def sums(count: int) -> list[str]:
    """Prompts of the demo pair's kind."""
    rng = random.Random(3)
    numbers = ([rng.randint(10, 99) for _ in range(rng.randint(2, 4))] for _ in range(count))
    return [f"Q: {' + '.join(map(str, each))} = ?\nA:" for each in numbers]


def rewards(generator: Generator, prompts: list[str], seeds: int, n: int, reduced: bool) -> np.ndarray:
    """(prompts, seeds, n): the reward of every row."""
    config = RunConfig.from_args(
        {"strategy": "best_of_n", "n": n, "max_gen_toks": MAX_GEN_TOKS, "variance_reduce": reduced}
    )[0]
    requests = [
        Request(prompt=generator.engine.encode(prompt), config=config.replace(seed=seed), until=("\n",))
        for prompt in prompts
        for seed in range(seeds)
    ]
    found: dict[int, list[float]] = defaultdict(list)
    for index, result in generator.run(requests, progress=False):
        found[index] = [row.reward or 0.0 for row in result.trajectories]
    return np.array([found[index] for index in range(len(requests))]).reshape(len(prompts), seeds, n)


def spread(values: np.ndarray) -> float:
    """Variance over seeds, averaged over prompts; (prompts, seeds) -> one number."""
    return float(values.var(axis=1, ddof=1).mean())


def ratio(reduced: np.ndarray, plain: np.ndarray, draws: int = 2000) -> dict[str, Any]:
    """Of two spreads, with its interval."""
    rng = np.random.default_rng(0)
    prompts, seeds = plain.shape
    found = []
    for _ in range(draws):
        which = rng.integers(prompts, size=prompts)
        ours, theirs = (each[which][:, rng.integers(seeds, size=seeds)] for each in (reduced, plain))
        found.append(spread(ours) / spread(theirs))
    low, high = np.quantile(found, [0.025, 0.975])
    return {"ratio": spread(reduced) / spread(plain), "low": float(low), "high": float(high)}


def compare(plain: np.ndarray, reduced: np.ndarray) -> dict[str, Any]:
    """Mean over rows and best of them, (prompts, seeds, n) each."""
    told: dict[str, Any] = {}
    for name, reduce in (("mean", np.mean), ("best", np.max)):
        ours, theirs = reduce(reduced, axis=2), reduce(plain, axis=2)
        told[name] = {
            "plain": float(theirs.mean()),
            "reduced": float(ours.mean()),
            "plain_variance": spread(theirs),
            "reduced_variance": spread(ours),
            **ratio(ours, theirs),
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--n", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    generator = specrej_eval.load(device="cpu", batch_size=32)
    prompts = sums(args.prompts)
    table = {}
    for n in args.n:
        plain, reduced = (rewards(generator, prompts, args.seeds, n, on) for on in (False, True))
        table[str(n)] = found = compare(plain, reduced)
        for name, each in found.items():
            print(
                f"n={n:3d} {name}: {each['plain']:.3f} -> {each['reduced']:.3f}, "
                f"variance {each['plain_variance']:.4f} -> {each['reduced_variance']:.4f}, "
                f"ratio {each['ratio']:.3f} ({each['low']:.3f} to {each['high']:.3f})",
                flush=True,
            )
    record = {
        "command": "python benchmarks/variance_reduce.py "
        + " ".join(["--prompts", str(args.prompts), "--seeds", str(args.seeds), "--n", *map(str, args.n)]),
        "models": "the demo pair",
        "max_gen_toks": MAX_GEN_TOKS,
        "described": generator.describe(),
        "by_n": table,
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
