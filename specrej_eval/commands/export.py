"""`specrej-eval export`: the answers of runs in the format another program reads.

For alpaca_eval: a list of ``{instruction, output, generator, score}``, one run after another, which is what it takes as
model outputs and as reference outputs; ``score`` is the reward. Beside it, in ``NAME.specrej.json``, what made each
generator: a judge that is the very reward model the answers were chosen with can say so.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError
from specrej_eval.records.jsonl import as_text, write_atomically
from specrej_eval.records.outputs import RecordedRun
from specrej_eval.wording import counted, inert, start_of

SUMMARY = "write the answers of runs as alpaca_eval's model outputs or reference outputs"
EXAMPLES = (
    "specrej-eval export alpaca results/spr results/bo16 --output outputs.json",
    "specrej-eval export alpaca results/bo120 --name Bo120 --output reference.json",
)

FORMATS = ("alpaca",)


def alpaca_rows(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """The rows of all runs, outputs stripped as alpaca_eval strips those it decodes (``is_strip_output``)."""
    return [
        {
            "instruction": answer.instruction,
            "output": answer.output.strip(),
            "generator": run.name,
            "score": answer.reward,
        }
        for run in runs
        for answer in run.answers
    ]


def sidecar(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What made each generator; ``n`` is a list where prompts had different numbers of rows (``n=max``)."""
    generators = {}
    for run in runs:
        fingerprint = run.record.fingerprint
        generators[run.name] = {
            "reward_model": fingerprint.get("reward_model"),
            "reward_files": fingerprint.get("reward_files"),
            "n": run.rows[0] if len(run.rows) == 1 else run.rows,
            "embedded_demo_pair": run.record.embedded_demo_pair,
            "fingerprint": fingerprint,
        }
    return {"generators": generators}


def sidecar_path(output: Path) -> Path:
    """``X.specrej.json`` beside ``X.json``."""
    return output.with_name(f"{output.stem}.specrej.json")


def remarks(runs: Sequence[RecordedRun]) -> list[str]:
    """What a reader of the comparison has to know: prompts that differ, runs cut short, scores that are missing."""
    found = []
    first, expected = runs[0].name, Counter(answer.instruction for answer in runs[0].answers)
    for run in runs:
        name, answers = run.name, run.answers
        prompts = Counter(answer.instruction for answer in answers)
        if not run.record.complete:
            found.append(f"{name} is not finished: it has {counted(len(answers), 'answer')} so far")
        if len(prompts) < len(answers):
            again = next(text for text, count in prompts.items() if count > 1)
            found.append(
                f"{name} has answers to {_some(prompts - Counter(set(prompts)))} asked before ({start_of(again)}); "
                "alpaca_eval pairs equal instructions in every combination"
            )
        lacks, adds = expected - prompts, prompts - expected
        if lacks:
            found.append(f"{name} has no answer to {_some(lacks)} of {first} ({start_of(next(iter(lacks)))})")
        if adds:
            found.append(f"{name} has answers to {_some(adds)} that {first} lacks ({start_of(next(iter(adds)))})")
        unscored = sum(answer.reward is None for answer in answers)
        if unscored:
            found.append(f"{name}: no finite reward for {counted(unscored, 'answer')}, whose score is null")
        if run.record.embedded_demo_pair:
            found.append(f"{name} was made with embedded demo models, which say nothing about large ones")
    return found


def _some(prompts: Counter[str]) -> str:
    return counted(prompts.total(), "prompt")


def _checked_runs(paths: Sequence[str], name: str | None) -> list[RecordedRun]:
    if name is not None and len(paths) > 1:
        raise ConfigError(
            f"--name {name!r} would give {counted(len(paths), 'run')} the same name.",
            hint="export them one by one, or leave out --name.",
        )
    runs: list[RecordedRun] = []
    seen: dict[str, str] = {}
    for path in paths:
        run = RecordedRun.read(path)
        if name is not None:
            run = replace(run, record=replace(run.record, name=name))
        if run.name in seen:
            raise ConfigError(
                f"{seen[run.name]!r} and {path!r} are both called {run.name!r}.",
                hint="one file needs one name for each run: merge runs of several seeds with `specrej-eval gather`, or "
                "export one of them by itself with --name.",
            )
        seen[run.name] = path
        runs.append(run)
    return runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to export")
    read.add_argument("format", choices=FORMATS, help="the program that will read the file")
    read.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (`specrej-eval run` or `gather`)")
    written = parser.add_argument_group("what to write")
    written.add_argument("--output", required=True, metavar="FILE.json", help="the file to write")
    written.add_argument("--name", help="name of the generator in the file, for a single run (default: the run's own)")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.suffix.lower() != ".json":
        raise ConfigError(f"--output must end with .json, got {args.output!r}.")
    runs = _checked_runs(args.runs, args.name)
    rows = alpaca_rows(runs)
    write_atomically(sidecar_path(output), _json(sidecar(runs)))  # first: no outputs without it
    write_atomically(output, _json(rows))
    for remark in remarks(runs):
        print(f"specrej-eval export: {inert(remark)}", file=sys.stderr)
    print(f"{counted(len(rows), 'answer')} of {inert(', '.join(run.name for run in runs))}\n{output}")
    return 0


def _json(content: Any) -> str:
    return as_text(content, indent=2) + "\n"
