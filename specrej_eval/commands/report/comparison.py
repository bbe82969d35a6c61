"""Runs held against each other prompt by prompt, where they have answered the same ones.

The mean of the differences, and its 95 % interval by Student's t (a paired t-test's; binary scores make it
approximate).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from specrej_eval.checked import object_or_empty
from specrej_eval.commands.report.runs import Run
from specrej_eval.errors import ConfigError, nearest
from specrej_eval.records.scores import Score
from specrej_eval.wording import counted

FEWEST = 5
"""Prompts below which an interval would say nothing."""
PAIRED = ("baseline", "difference", "low", "high", "prompts")
"""What a row says of its score beside that of another run on the same prompts."""


def rows(runs: Sequence[Run], baseline: str | None = None) -> list[dict[str, Any]]:
    """One row for each score of each run; plain values, None where a run does not have one.

    Args:
        baseline: a part of the name of the run that the others are held against; None = the first.

    Raises:
        ConfigError: no run is called so, or several are.
    """
    first = chosen(runs, baseline)
    table = []
    for run in runs:
        strategy = run.arguments.get("strategy")
        for score in run.scores:
            table.append(
                {
                    "run": run.name,
                    "task": score.task,
                    "metric": score.metric,
                    "filter": score.filter,
                    "value": score.value,
                    "stderr": score.stderr,
                    "prompts": score.prompts,
                    "prompts_in_all": score.prompts_in_all,
                    "limit": run.limit,
                    "strategy": strategy,
                    "alpha": run.arguments.get("alpha") if strategy != "best_of_n" else None,
                    "n": run.arguments.get("n"),
                    "seed": run.arguments.get("seed"),
                    "models": dict(run.models),
                    "hardware": run.hardware,
                    "warnings": list(run.warnings),
                    **costs(run),
                    "audit": None if run.audit is None else run.audit.to_dict(),
                    "paired": _paired(score, run, [first, *runs]),
                    "kind": run.kind,
                    "path": str(run.path),
                }
            )
    return table


def chosen(runs: Sequence[Run], baseline: str | None) -> Run:
    if baseline is None:
        return runs[0]
    wanted = baseline.casefold()
    found = [run for run in runs if wanted in run.name.casefold()]
    found = [run for run in found if wanted == run.name.casefold()] or found
    if not found:
        names = [run.name for run in runs]
        close = nearest(baseline, names)
        hint = f"did you mean {close!r}?" if close else f"there are {'; '.join(names)}."
        raise ConfigError(f"no run is called {baseline!r}.", hint=hint)
    if len(found) > 1:
        raise ConfigError(
            f"--baseline {baseline!r} is part of the names of {counted(len(found), 'run')}.",
            hint=f"give more of one: {'; '.join(run.name for run in found)}.",
        )
    return found[0]


def _paired(score: Score, run: Run, against: Sequence[Run]) -> dict[str, Any] | None:
    """This score against the first of those on the same prompts, which is the run's own for a baseline."""
    for other, theirs in ((each, one) for each in against for one in each.scores):
        if theirs.comparable == score.comparable and theirs.each.keys() & score.each.keys():
            return None if other is run else {"baseline": other.name, **paired_difference(score.each, theirs.each)}
    return None


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    """Mean difference over the prompts that both have, and its 95 % interval (None below FEWEST prompts)."""
    both = sorted(ours.keys() & theirs.keys())
    gaps = [ours[key] - theirs[key] for key in both]
    mean = statistics.fmean(gaps)
    low = high = None
    if len(gaps) >= FEWEST and (spread := statistics.stdev(gaps)):
        from scipy.special import stdtrit

        width = float(stdtrit(len(gaps) - 1, 0.975)) * spread / math.sqrt(len(gaps))
        low, high = mean - width, mean + width
    return {"difference": mean, "low": low, "high": high, "prompts": len(both)}


def costs(run: Run) -> dict[str, Any]:
    """What the whole run cost (all its tasks together)."""
    seconds = run.totals.get("seconds")
    phases = object_or_empty(seconds)
    total = sum(phases.values())
    started, rejected = run.totals.get("rows_started"), run.totals.get("rows_rejected")
    return {
        "mean_reward": run.mean_reward,
        "decode_tokens": run.totals.get("decode_tokens"),
        "reward_tokens": run.totals.get("reward_tokens"),
        "rejected_share": rejected / started if started and rejected is not None else None,
        "seconds": total if phases else seconds,
        "scoring_share": phases.get("reward", 0.0) / total if total else None,
    }


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What the numbers mean, a line for each task where Speculative Rejection meets Best-of-N on the same prompts.

    The best run of the first is held against the best of the second (plain sampling aside), both by their means.
    """
    best: dict[tuple[Any, ...], dict[str, tuple[Score, Run]]] = {}
    for score, run in ((one, each) for each in runs for one in each.scores if one.each):
        strategy = str(run.arguments.get("strategy"))
        if strategy == "best_of_n" and run.arguments.get("n") == 1:
            continue
        # the same prompts, not merely common ones: means and tokens of other prompts do not compare
        of_strategy = best.setdefault((score.comparable, frozenset(score.each)), {})
        if strategy not in of_strategy or (of_strategy[strategy][0].value or 0.0) < (score.value or 0.0):
            of_strategy[strategy] = score, run
    wanted = ("speculative_rejection", "best_of_n")
    pairs = [[found[name] for name in wanted] for found in best.values() if found.keys() >= set(wanted)]
    return [_conclusion(*ours, *theirs, task=len(pairs) > 1) for ours, theirs in pairs]


def _conclusion(score: Score, run: Run, other: Score, rival: Run, *, task: bool) -> str:
    gap = paired_difference(score.each, other.each)
    shares = all(0 <= value <= 1 for each in (score.each, other.each) for value in each.values())
    scale, digits, unit = (100, 1, " points") if shares else (1, 3, "")
    size = f"{abs(gap['difference']) * scale:.{digits}f}{unit} {'more' if gap['difference'] > 0 else 'less'} than"
    text = f"{run.name}: {size} {rival.name}" if gap["difference"] else f"{run.name}: the same score as {rival.name}"
    if gap["low"] is None:
        text += " (too few prompts for an interval)"
    else:
        chance = ", which includes 0: it may be chance" if gap["low"] <= 0 <= gap["high"] else ""
        low, high = (f"{round(gap[end] * scale, digits) + 0.0:+.{digits}f}" for end in ("low", "high"))  # never -0.0
        text += f" (95 % interval {low} to {high}{chance})"
    tokens, its_tokens = run.totals.get("decode_tokens"), rival.totals.get("decode_tokens")
    # a run's total is of all its tasks
    if tokens and its_tokens and len(run.tasks) == len(rival.tasks) == 1:
        text += f", for {tokens / its_tokens:.0%} of its decoded tokens"
    where = f" on {score.task} ({score.metric})" if task else f" ({score.metric})"
    return f"{text}{where}."
