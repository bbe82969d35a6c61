"""Both engines side by side: the whole library with engine=transformers and with engine=vllm.

    python benchmarks/engines.py --vllm_python .venv-vllm/bin/python --output engines.json
    python benchmarks/engines.py --vllm_python .venv-vllm/bin/python --quality 200 --output engines_quality.json

The same checkpoint, prompts, strategy, budget and reward (distinct words, a function). For the speed EOS is ignored, so
that both decode the same work; tokens past a look that vLLM's rows have decoded and lost are in its time. Each engine
is a process of its own, in its own environment; runs alternate, and the median of the pairs' ratios is the result.

With --quality rows end where the model ends them, and the rewards of the best rows are compared, prompt by prompt: the
two engines draw from one distribution, so the mean difference should be none. Its 90 % interval is given in standard
deviations of the rewards within a prompt; the bar is +-0.25.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import alternating, finish, header, parser, spread, table, write_checkpoint
from many_prompts import texts
from peers import add_options, started, warmed_up

STRATEGIES = {"speculative_rejection": 0.5, "best_of_n": 0.0}
"""With their alpha."""
ENGINES = ("engine_transformers", "engine_vllm")
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
    measure(made.parse_args())


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
            first = {**work, "prompts": prompts[:1], "strategy": "best_of_n", "alpha": 0.0}
            ready = warmed_up(workers, {peer: first for peer in workers})
            markdown = []
            for strategy, alpha in STRATEGIES.items():
                job = {**work, "strategy": strategy, "alpha": alpha}
                if options.quality:
                    markdown.append(compare(result, strategy, ready, {**job, "prompts": prompts[: options.quality]}))
                else:
                    markdown.append(race(result, strategy, ready, {**job, "prompts": prompts}, options.pairs))
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


def compare(result: dict[str, Any], strategy: str, workers: Any, job: dict[str, Any]) -> str:
    """The best rows' rewards of both, prompt by prompt."""
    told = {peer: worker.run({**job, "eos": True}) for peer, worker in workers.items()}
    if len(told) < 2:
        return f"**{strategy}**: nothing to compare with"
    one, other = (told[name] for name in ENGINES)
    # every row of a Best-of-N run is finished; under rejection only the survivors are, which differ less
    within = result.setdefault("within_prompt_sd", {})
    within[strategy] = within_prompt_sd(one["finished"])
    unit = max(within.values())
    found = interval([b - a for a, b in zip(one["best"], other["best"], strict=True)], unit)
    found |= {"mean_reward": {name: statistics.fmean(told[name]["best"]) for name in ENGINES}, "unit": unit}
    result.setdefault("quality", {})[strategy] = found
    low, high = found["interval_90"]
    lines = [[strategy, len(one["best"]), *found["mean_reward"].values(), unit, found["difference"], low, high]]
    head = ["strategy", "prompts", "transformers", "vllm", "sd within", "difference (sd)", "90 % from", "to"]
    verdict = "inside" if found["inside"] else "NOT inside"
    return f"{table(head, lines)}\n\nThe interval lies {verdict} +-{BAR}."


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
