"""Both engines side by side: the whole library with engine=transformers and with engine=vllm.

    python benchmarks/engines.py --vllm_python .venv-vllm/bin/python --output engines.json
    python benchmarks/engines.py --vllm_python .venv-vllm/bin/python --quality 200 --rows 8 --tokens 64 \\
        --output engines_quality.json

The same checkpoint, prompts, strategy, budget and reward (distinct words, a function). For the speed EOS is ignored, so
that both decode the same work; tokens past a look that vLLM's rows have decoded and lost are in its time. Each engine
is a process of its own, in its own environment; runs alternate, and the median of the pairs' ratios is the result.

With --quality rows end where the model ends them, and rewards are compared, prompt by prompt: of the answers that each
strategy returns, and of all rows of Best-of-N. Both engines draw from one distribution, so the mean difference should
be none. Its 90 % interval is given in standard deviations of the rewards of a prompt's rows (Best-of-N's, with our
engine, pooled over the prompts); the bar is +-0.25. What is measured is written after every few prompts, and the same
command with the same --output goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import alternating, finish, header, parser, spread, table, write_checkpoint
from many_prompts import texts
from peers import add_options, started, warmed_up

BEST_OF_N = "best_of_n"
STRATEGIES = {"speculative_rejection": 0.5, BEST_OF_N: 0.0}
"""With their alpha."""
ENGINES = ("engine_transformers", "engine_vllm")
PART = 25
"""Prompts after which rewards are written."""
BAR = 0.25
Z_90 = 1.6449
"""Of a normal distribution: a two-sided interval of 90 %."""


def main() -> None:
    made = parser(__doc__)
    add_options(made, ENGINES)
    made.add_argument("--prompts", type=int, default=8)
    made.add_argument("--rows", type=int, default=32, help="of each prompt; default: %(default)s")
    made.add_argument("--tokens", type=int, default=128, help="of each row; default: %(default)s")
    made.add_argument("--quality", type=int, default=0, metavar="PROMPTS", help="compare rewards on so many prompts")
    options = made.parse_args()
    if options.quality and (options.quality < 2 or options.rows < 2):
        made.error("--quality needs two prompts, and two --rows of each, to tell how much rewards differ")
    measure(options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = header("engines", options)
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "model")
        tokenizer = write_checkpoint(options.model, options.dtype, Path(folder), seed=options.seed)
        count = max(options.prompts, options.quality)
        asked = [text.rpartition("\n\n")[2] for text in texts(count, options.seed)]  # the questions without the shots
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in asked]
        work = {"rows": options.rows, "tokens": options.tokens, "seed": options.seed, "task": "engines"}
        with started(options, folder) as workers:
            result["versions"] = {peer: worker.versions for peer, worker in workers.items()}
            first = {**work, "prompts": prompts[:1], "strategy": BEST_OF_N, "alpha": STRATEGIES[BEST_OF_N]}
            ready = warmed_up(workers, {peer: first for peer in workers})
            if options.quality:
                if missing := sorted(set(ENGINES) - set(ready)):
                    sys.exit(f"--quality compares two engines, and {missing[0]} is not here")
                result["work"] = work
                compare(result, ready, prompts[: options.quality], options.output)
                return result
            markdown = []
            for strategy, alpha in STRATEGIES.items():
                job = {**work, "strategy": strategy, "alpha": alpha, "prompts": prompts}
                markdown.append(race(result, strategy, ready, job, options.pairs))
                finish(result, "\n\n".join(markdown), options.output)
    return result


def race(result: dict[str, Any], strategy: str, workers: Any, job: dict[str, Any], pairs: int) -> str:
    """Time both on the same work."""
    print(f"{strategy}: {len(job['prompts'])} prompts x {job['rows']} rows x {job['tokens']} tokens", flush=True)
    runs = alternating(
        {
            peer: (lambda pair, worker=worker: worker.run({**job, "seed": job["seed"] + pair}))
            for peer, worker in workers.items()
        },
        pairs,
    )
    base = ENGINES[0] if ENGINES[0] in workers else next(iter(workers))
    found: dict[str, Any] = {}
    for peer in workers:
        found[peer] = {
            "seconds": spread(run[peer]["seconds"] for run in runs),
            "tokens_per_second": spread(run[peer]["tokens"] / run[peer]["seconds"] for run in runs),
            "tokens": spread(run[peer]["tokens"] for run in runs),
            "discarded": spread(run[peer]["discarded"] for run in runs),
            "speed_ratio": spread(
                run[peer]["tokens"] / run[peer]["seconds"] / (run[base]["tokens"] / run[base]["seconds"])
                for run in runs
            ),
            "peak_mib": max(run[peer]["peak_mib"] for run in runs),
        }
    result.setdefault("speed", {})[strategy] = found
    lines = [
        [
            peer.removeprefix("engine_"),
            told["seconds"]["median"],
            told["tokens_per_second"]["median"],
            told["speed_ratio"]["median"],
            f"{told['speed_ratio']['min']:.3g} to {told['speed_ratio']['max']:.3g}",
            told["tokens"]["median"],
            told["discarded"]["median"],
            told["peak_mib"],
        ]
        for peer, told in found.items()
    ]
    head = ["engine", "s", "tokens/s", f"x {base.removeprefix('engine_')}", "pairs", "tokens", "lost", "peak MiB"]
    return f"**{strategy}**\n\n{table(head, lines)}"


def compare(
    result: dict[str, Any], workers: Mapping[str, Any], prompts: Sequence[Sequence[int]], output: Path | None
) -> None:
    """Rewards of both engines on the same prompts, some prompts at a time; what an earlier run has is not run again."""
    fresh: Any = {strategy: {engine: {"best": [], "finished": []} for engine in ENGINES} for strategy in STRATEGIES}
    rewards = result["rewards"] = earlier(result, output) or fresh

    def done(strategy: str) -> int:
        return len(rewards[strategy][ENGINES[0]]["best"])

    while behind := [strategy for strategy in STRATEGIES if done(strategy) < len(prompts)]:
        strategy = min(behind, key=done)
        first = done(strategy)
        job = {
            **result["work"],
            "strategy": strategy,
            "alpha": STRATEGIES[strategy],
            "prompts": prompts[first : first + PART],
            "first": first,
            "eos": True,
        }
        told = {engine: workers[engine].run(job) for engine in ENGINES}
        shown = ", ".join(f"{engine.removeprefix('engine_')} {told[engine]['seconds']:.1f} s" for engine in ENGINES)
        for engine, one in told.items():
            rewards[strategy][engine]["best"] += one["best"]
            if strategy == BEST_OF_N:  # under rejection only the survivors are finished, which differ less
                rewards[strategy][engine]["finished"] += one["finished"]
        print(f"{strategy}: {done(strategy)} of {len(prompts)} prompts ({shown})", flush=True)
        if min(map(done, STRATEGIES)) >= 2:
            finish(result, judged(result), output)
    finish(result, judged(result), output)


def earlier(result: dict[str, Any], output: Path | None) -> Any:
    """Rewards that a run of the same work has left in its file; None if there is none."""
    if output is None or not output.exists():
        return None
    found = json.loads(output.read_text())
    for name in ("benchmark", "model", "dtype", "device", "work", "versions"):
        if found.get(name) != result[name]:
            sys.exit(f"{output} is of a run with another {name}: {found.get(name)!r}, here {result[name]!r}")
    return found.get("rewards")


def judged(result: dict[str, Any]) -> str:
    """The intervals of the differences, into ``result`` and as a table."""
    rewards = result["rewards"]
    unit = result["within_prompt_sd"] = within_prompt_sd(rewards[BEST_OF_N][ENGINES[0]]["finished"])
    compared = {
        f"{strategy}: answers": [rewards[strategy][engine]["best"] for engine in ENGINES] for strategy in STRATEGIES
    }
    compared[f"{BEST_OF_N}: all rows"] = [
        [statistics.fmean(rows) for rows in rewards[BEST_OF_N][engine]["finished"]] for engine in ENGINES
    ]
    quality = result["quality"] = {}
    for name, (ours, theirs) in compared.items():
        found = interval([b - a for a, b in zip(ours, theirs, strict=True)], unit)
        means = dict(zip(ENGINES, map(statistics.fmean, (ours, theirs)), strict=True))
        quality[name] = {"prompts": len(ours), "mean_reward": means, **found}
    head = ["rewards of", "prompts", "transformers", "vllm", "difference (sd)", "90 % from", "to", f"inside +-{BAR}"]
    lines = [
        [name, one["prompts"], *one["mean_reward"].values(), one["difference"], *one["interval_90"], one["inside"]]
        for name, one in quality.items()
    ]
    return f"{table(head, lines)}\n\nThe standard deviation of the rewards of a prompt's rows is {unit:.3g}."


def within_prompt_sd(rewards: Sequence[Sequence[float]]) -> float:
    """Of rows of one prompt, pooled over the prompts that have several."""
    several = [row for row in rewards if len(row) > 1]
    return math.sqrt(statistics.fmean(statistics.variance(row) for row in several)) if several else 0.0


def interval(differences: Sequence[float], unit: float) -> dict[str, Any]:
    """Mean difference and its 90 % interval, in ``unit``."""
    mean = statistics.fmean(differences) / unit
    error = statistics.stdev(differences) / math.sqrt(len(differences)) / unit
    low, high = mean - Z_90 * error, mean + Z_90 * error
    return {"difference": mean, "interval_90": [low, high], "inside": low >= -BAR and high <= BAR}


if __name__ == "__main__":
    main()
