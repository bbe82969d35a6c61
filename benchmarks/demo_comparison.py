"""Speculative Rejection against Best-of-N on the demo task, all problems, paired.

    python benchmarks/demo_comparison.py --output benchmarks/results/demo_comparison.json

One Best-of-N run with as many rows as the largest setting gives every baseline: a row's tokens do not depend on n, so
Best-of-k is its first k rows. For each setting of Speculative Rejection two questions are answered, with 95 % intervals
of a paired bootstrap over problems (10,000 resamples):

(a) against Best-of-n with the same initial rows: difference in accuracy, and the share of its tokens that were decoded;
(b) against Best-of-k at equal decoded tokens, where k is the smallest number of rows that decodes at least as many.

Every number comes from ``Generator.generate`` on the embedded demo pair; nothing is re-implemented here.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import specrej_eval
from specrej_eval import paths
from specrej_eval.core import GenerationResult

TASK = "specrej_arithmetic"
ANSWER = re.compile(r"Answer: ?(-?[0-9]+)")  # the task's own filter
DEFAULT_SETTINGS = (
    {"n": 16, "alpha": 0.5},
    {"n": 32, "alpha": 0.5},
    {"n": 64, "alpha": 0.5},
)
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=None, help='JSON list, e.g. \'[{"n": 16, "alpha": 0.5}]\'')
    parser.add_argument("--limit", type=int, default=None, help="first problems only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in flight; changes no result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--journals", type=Path, help="folder of journals: an interrupted comparison goes on from there"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings: list[dict[str, Any]] = json.loads(options.settings) if options.settings else list(DEFAULT_SETTINGS)

    folder = paths.folder("tasks") / TASK
    problems = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][: options.limit]
    max_gen_toks = int(re.findall(r"max_gen_toks: (\d+)", (folder / f"{TASK}.yaml").read_text())[0])
    common = {"max_gen_toks": max_gen_toks, "seed": options.seed, "batch_size": options.batch_size}

    def answer(name: str, **arguments: Any) -> list[GenerationResult]:
        started = time.perf_counter()
        if options.journals:
            arguments["journal"] = str(options.journals / f"{re.sub(r'[^a-z0-9.]+', '_', name)}.jsonl")
        generator = specrej_eval.load(**common, **arguments)
        results = generator.generate([problem["prompt"] for problem in problems], until=["\n"])
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return results

    truth = np.array([int(problem["answer"]) for problem in problems])
    rows = max(int(setting["n"]) for setting in settings)
    bon = answer(f"best_of_{rows}", strategy="best_of_n", n=rows)
    values = np.array([[extracted(row.text) for row in result.trajectories] for result in bon])  # (problems, rows)
    rewards = np.array([[row.reward for row in result.trajectories] for result in bon])  # (problems, rows)
    tokens = np.array([[row.num_tokens for row in result.trajectories] for result in bon])  # (problems, rows)
    correct = values == truth[:, None]

    def best_of(k: int) -> np.ndarray:
        """Whether Best-of-k is right, per problem."""
        return correct[np.arange(len(truth)), rewards[:, :k].argmax(1)]

    def majority(k: int) -> np.ndarray:
        votes = [Counter(value for value in line[:k] if value >= 0).most_common(1) for line in values]
        return np.array([bool(vote) and vote[0][0] == right for vote, right in zip(votes, truth, strict=True)])

    greedy = answer("greedy", strategy="best_of_n", n=1, temperature=0.0, reward_model="likelihood")
    greedy_correct = np.array([extracted(result.text) for result in greedy]) == truth
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= rows]
    report: dict[str, Any] = {
        "benchmark": "demo_comparison",
        "problems": len(problems),
        "seed": options.seed,
        "pass_at_1": mean_se(correct.mean(1)),
        "greedy": mean_se(greedy_correct),
        "majority": {str(k): mean_se(majority(k)) for k in ks},
        "best_of_n": {str(k): {**mean_se(best_of(k)), "decode_tokens": int(tokens[:, :k].sum())} for k in ks},
        "oracle": {str(k): mean_se(correct[:, :k].any(1)) for k in ks},
        "speculative_rejection": [],
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for setting in settings:
        results = answer(str(setting), strategy="speculative_rejection", **setting)
        mine = np.array([extracted(result.text) for result in results]) == truth
        spent = np.array([result.ledger.decode_tokens for result in results])
        n = int(setting["n"])
        equal = next((k for k in range(1, rows + 1) if tokens[:, :k].sum() >= spent.sum()), rows)
        entry = {
            "setting": setting,
            "first_look": results[0].resolved["first_look"],
            "kv_budget_tokens": results[0].resolved["kv_budget_tokens"],
            "accuracy": mean_se(mine),
            "mean_reward": float(np.mean([result.best.reward for result in results])),
            "decode_tokens": int(spent.sum()),
            "reward_tokens": sum(result.ledger.reward_tokens for result in results),
            "rejected": sum(r.ledger.rows_rejected for r in results) / sum(r.ledger.rows_started for r in results),
            "rounds": float(np.mean([len(result.rounds) for result in results])),
            "same_rows": {"n": n, **paired(mine, best_of(n)), "token_share": float(spent.sum() / tokens[:, :n].sum())},
            "equal_tokens": {
                "k": equal,
                **paired(mine, best_of(equal)),
                "token_share": float(spent.sum() / tokens[:, :equal].sum()),
            },
        }
        report["speculative_rejection"].append(entry)
        print(json.dumps(entry), flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def extracted(text: str) -> int:
    """The number after "Answer:", or -1."""
    found = ANSWER.search(text)
    return int(found[1]) if found and len(found[1]) < 10 else -1


def mean_se(values: np.ndarray) -> dict[str, float]:
    """Mean over problems and its standard error."""
    data = np.asarray(values, dtype=float)
    return {"mean": float(data.mean()), "se": float(data.std(ddof=1) / len(data) ** 0.5)}


def paired(mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Mean difference over problems with the 95 % percentile interval of a paired bootstrap."""
    differences = mine.astype(float) - theirs.astype(float)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
    return {"theirs": float(theirs.mean()), "difference": float(differences.mean()), "ci95": [float(low), float(high)]}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""

    def percent(entry: dict[str, float]) -> str:
        return f"{100 * entry['mean']:.1f} ± {100 * entry['se']:.1f}"

    lines = [
        f"{report['problems']} problems, seed {report['seed']}; accuracy in % ± standard error",
        "",
        "| method | accuracy | decoded tokens |",
        "|---|---|---|",
        f"| sampling, n=1 | {percent(report['pass_at_1'])} | {report['best_of_n']['1']['decode_tokens']:,} |",
        f"| greedy | {percent(report['greedy'])} | |",
    ]
    for k, entry in report["best_of_n"].items():
        if k != "1":
            lines.append(f"| Best-of-{k} | {percent(entry)} | {entry['decode_tokens']:,} |")
            lines.append(f"| majority of {k} | {percent(report['majority'][k])} | {entry['decode_tokens']:,} |")
    for entry in report["speculative_rejection"]:
        name = ", ".join(f"{key}={value}" for key, value in entry["setting"].items())
        lines.append(f"| Speculative Rejection, {name} | {percent(entry['accuracy'])} | {entry['decode_tokens']:,} |")
    lines += [
        "",
        "| Speculative Rejection | against | difference in points [95 %] | share of its tokens |",
        "|---|---|---|---|",
    ]
    for entry in report["speculative_rejection"]:
        name = ", ".join(f"{key}={value}" for key, value in entry["setting"].items())
        for key, rival in (
            ("same_rows", f"Best-of-{entry['same_rows']['n']}"),
            ("equal_tokens", f"Best-of-{entry['equal_tokens']['k']}"),
        ):
            row = entry[key]
            low, high = (100 * bound for bound in row["ci95"])
            interval = f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            lines.append(f"| {name} | {rival} | {interval} | {100 * row['token_share']:.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
