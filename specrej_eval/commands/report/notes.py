"""What a reader of the table has to know before comparing."""

from __future__ import annotations

from collections.abc import Sequence

from specrej_eval.commands.report.runs import Run
from specrej_eval.commands.report.table import letters
from specrej_eval.records.fingerprint import EMBEDDED
from specrej_eval.wording import counted


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing: models, machines, partial tasks, warnings."""
    found: list[str] = []
    models = {tuple(run.models.items()) for run in runs if run.arguments}
    if len(models) == 1:
        pair = {name: value for name, value in next(iter(models)) if value}
        told = ", ".join(f"{name}={value}" for name, value in pair.items())
        demo = " (the demo pair, which knows nothing but small sums)" if EMBEDDED in pair.values() else ""
        found += [f"models: {told}{demo}"] if told else []
    machines = letters([run.hardware for run in runs])
    found += [f"machine {letter}: {machine}" for machine, letter in machines.items()]
    if len(machines) > 1:
        found.append("not all runs used the same hardware: their seconds do not compare")
    found += [f"audit of {run.name}: {run.audit}" for run in runs if run.audit and run.audit.prompts_rejecting]
    limits = [f"{run.limit:g}" for run in runs if run.limit is not None]
    if limits:
        told = f"--limit was {', '.join(dict.fromkeys(limits))} in {len(limits)} of {counted(len(runs), 'run')}"
        found.append(f"{told}: these are not scores of the whole task")
    by_warning: dict[str, list[str]] = {}
    for run in runs:
        for warning in run.warnings:
            by_warning.setdefault(str(warning), []).append(run.name)
    found += [
        f"warning: {text}" + ("" if len(who) == len(runs) else f" ({'; '.join(who)})")
        for text, who in by_warning.items()
    ]
    return found
