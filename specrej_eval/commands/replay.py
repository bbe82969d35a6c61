"""`specrej-eval replay`: what other strategies, alphas, n and selectors would have answered with the rows of a run of
Best-of-N, in seconds and without a model.

The run is a folder of `specrej-eval run` (or a journal) made with ``score_every``, so that each row carries its scores
on the way. Every number is marked as simulated: rows and scores are real, and what would have become of them is worked
out by the real strategies; nothing was decoded, so there are no seconds and no memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specrej_eval.commands.journal import journals_of
from specrej_eval.config import SAMPLING, RunConfig, as_int
from specrej_eval.core import GenerationResult, Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.evidence.methods import BEST_OF_N, Method, grid, listed
from specrej_eval.evidence.replay import replay
from specrej_eval.evidence.selectors import KNOWN, make_selector
from specrej_eval.evidence.tables import as_markdown, print_tables
from specrej_eval.options import add_grid
from specrej_eval.records import journal
from specrej_eval.records.cell_scores import CellMetrics
from specrej_eval.records.fingerprint.comparing import BETWEEN, differences
from specrej_eval.records.jsonl import as_text, write_atomically
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.wording import counted

SUMMARY = "simulate other strategies, alphas, n or selectors on the stored rows of a Best-of-N run, without a model"
EXAMPLES = (
    "specrej-eval replay results/bo32 --alpha 0.25,0.5,0.75 --n 8,16,32",
    "specrej-eval replay results/seed0 results/seed1 --alpha 0.5 --n 32 --output replay.json",
    "specrej-eval replay results/bo32 --strategy best_of_n --n 4,8 --selector majority --answer 'Answer: ?(-?[0-9]+)'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to read")
    read.add_argument(
        "run",
        nargs="+",
        metavar="RUN",
        help="folder of a `specrej-eval run` of Best-of-N, or its journal; several are taken for seeds of one run",
    )
    what = parser.add_argument_group("what to simulate (lists with commas)")
    add_grid(what, alpha="0.25,0.5,0.75", n="that of the run")
    what.add_argument("--first_look", metavar="TOKENS", help="tokens per row before the first look, as in a run")
    what.add_argument("--kv_budget_tokens", metavar="TOKENS", help="tokens one prompt may hold, as in a run")
    told = "; ".join(f"{name}: {text}" for name, text in KNOWN.items())
    what.add_argument("--selector", default="max", metavar="NAME", help=f"which finished row is the answer. {told}")
    what.add_argument("--answer", metavar="REGEX", help="what of a text is its answer (its first group), for votes")
    shown = parser.add_argument_group("how to show it")
    shown.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="format of the table")
    shown.add_argument("--output", metavar="FILE.json", help="write everything there, the prompts' numbers included")
    shown.add_argument("--baseline", metavar="NAME", help="method to hold the others against, such as bo16")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run, as its records have it."""

    path: str
    results: list[GenerationResult]
    fingerprint: Mapping[str, Any]
    instructions: Mapping[tuple[str, int], str]
    metrics: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Name -> scores of all rows of each prompt by a task, where `specrej-eval compare` has left them."""

    def in_order(self, places: Sequence[int]) -> Recorded:
        """With its prompts in another order."""
        metrics = {name: [values[place] for place in places] for name, values in self.metrics.items()}
        return replace(self, results=[self.results[place] for place in places], metrics=metrics)

    def metrics_of(self, results: Sequence[GenerationResult]) -> dict[str, list[float]]:
        """Of answers that are rows of this run, one to each of its prompts."""
        return {
            name: [of_rows[result.best.row] for of_rows, result in zip(values, results, strict=True)]
            for name, values in self.metrics.items()
        }

    @property
    def seed(self) -> int:
        return int(self.results[0].resolved["seed"])

    @property
    def rows(self) -> int:
        """Of the prompt with the fewest."""
        return min(len(result.trajectories) for result in self.results)


def read_run(path: str) -> Recorded:
    """All finished requests of a run, rows included; those of the folder's prompts, in their order.

    Raises:
        ConfigError, SpecRejError: there is none, it is of a newer version, or damaged.
    """
    folder = OutputsFolder(path)
    record = folder.record() if Path(path).is_dir() else None
    found: dict[str, GenerationResult] = {}
    fingerprint: Mapping[str, Any] = {}
    try:
        files = journals_of(path)
    except ConfigError:
        if record is None:
            raise
        files = []  # what is missing is told below
    for file in files:
        contents = journal.read(file, argument="run")
        if contents.scan.damaged:
            damage = contents.scan.damaged[0]
            raise ConfigError(
                f"line {damage.number} of {file} is damaged ({damage.reason}).",
                hint="run the command that made it again: it decodes that answer again.",
            )
        fingerprint = contents.fingerprint or fingerprint
        found |= {key: entry.result for key, entry in contents.entries.items()}
    instructions = {}
    if record is not None:
        answers = folder.answers()
        missing = [answer for answer in answers if answer.key not in found]
        if missing:
            raise ConfigError(
                f"{path!r} has no rows for {missing[0].called}: the run kept answers alone (keep_trajectories=false).",
                hint="run it again with --keep_trajectories true.",
            )
        found = {answer.key: found[answer.key] for answer in answers}
        instructions = {(answer.prompt_hash, answer.repeat): answer.instruction for answer in answers}
        fingerprint = record.fingerprint
    if not found:
        raise ConfigError(f"{path!r} holds no finished answer.", hint="finish the run first.")
    seeds = sorted({int(result.resolved["seed"]) for result in found.values()})
    if len(seeds) > 1:
        raise ConfigError(
            f"{path!r} holds answers of seeds {', '.join(map(str, seeds))}.", hint="name runs of one seed each."
        )
    results = list(found.values())
    if len(set(_asked(results))) < len(results):
        raise ConfigError(
            f"{path!r} holds the answers of several runs: there are two to one prompt.",
            hint="name the folder of one `specrej-eval run`, or a journal of one run.",
        )
    texts = [result.text for result in results]
    scored = CellMetrics.read(Path(path), texts, results=results) if record is not None else None
    metrics = {} if scored is None else scored.of_rows()
    return Recorded(path, results, fingerprint, instructions, metrics)


def _asked(results: Sequence[GenerationResult]) -> list[tuple[str, str, int]]:
    return [(result.task, result.prompt_hash, result.repeat) for result in results]


def check_runs(runs: Sequence[Recorded]) -> None:
    """Whether runs are seeds of one run over the same prompts.

    Raises:
        ConfigError: they differ in more than the seed.
    """
    first = runs[0]
    for run in runs:
        strategy = run.results[0].resolved.get("strategy")
        if any(row.finish_reason == "rejected" for result in run.results for row in result.trajectories):
            raise ConfigError(
                f"{run.path!r} is a run of {strategy} that rejected rows: how they would have gone on is on no record.",
                hint="name a run of Best-of-N (strategy=best_of_n, or alpha=0), made with score_every=8.",
            )
        apart = {"seed", "environment"}
        models, of_first = ({k: v for k, v in each.fingerprint.items() if k not in apart} for each in (run, first))
        if told := differences(of_first, models, told=BETWEEN):
            raise ConfigError(
                f"{run.path!r} and {first.path!r} cannot be paired: they differ in more than the seed ({told}).",
                hint="replay them one by one.",
            )
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"two of the runs have seed {next(s for s in seeds if seeds.count(s) > 1)}.", hint="name each run once."
        )


def simulated_config(run: Recorded, method: Method, options: Mapping[str, Any]) -> RunConfig:
    """The arguments of a run with a method's in place of its own."""
    resolved = run.results[0].resolved
    if resolved.get("variance_reduce") and method.n != resolved.get("n"):
        raise ConfigError(
            f"{run.path!r} was made with variance_reduce=True, so that its rows depend on n={resolved.get('n')}: a run "
            f"with n={method.n} would have others.",
            hint=f"--n {resolved.get('n')}",
        )
    own = {name: resolved[name] for name in (*SAMPLING, "max_gen_toks", "seed")}
    given = {name: value for name in ("first_look", "kv_budget_tokens") if (value := options.get(name)) is not None}
    if method.strategy == BEST_OF_N:  # rows that are never cut have no use for a look
        given.pop("first_look", None)
    on_nan = str(resolved.get("on_nan", run.fingerprint.get("on_nan", "error")))
    config, _ = RunConfig.from_args({**own, **given, **method.arguments, "on_nan": on_nan, "batch_size": 64})
    return config


def run(args: argparse.Namespace) -> int:
    """Raises:
    SpecRejError: a run cannot be read, or not be replayed. Nothing is written then.
    """
    from specrej_eval.evidence.comparison import Cell, compare

    options = vars(args)
    strategies = listed("strategy", args.strategy)
    alphas = listed("alpha", args.alpha)
    select = make_selector(args.selector, answer=args.answer)
    rows = listed("n", options["n"]) if "n" in options else []
    first_look = None if args.first_look is None else as_int("first_look", args.first_look)
    budget = None if args.kv_budget_tokens is None else as_int("kv_budget_tokens", args.kv_budget_tokens)
    runs = [read_run(path) for path in args.run]
    check_runs(runs)
    runs = _as_the_first(runs)
    for each in runs:
        if each.fingerprint.get("reward_ensemble") == "rank":
            raise ConfigError(
                f"{each.path!r} was chosen by ranks among the rows of one look: with other rows they would be others.",
                hint="such a run cannot be replayed; reward_ensemble=mean gives scores that can.",
            )
    most = min(each.rows for each in runs)
    methods = grid(strategies, alphas, rows or [most])
    if too_many := [method for method in methods if not isinstance(method.n, int) or method.n > most]:
        raise ConfigError(
            f"n={too_many[0].n} rows are needed, and the runs have {most}.", hint=f"ask for n={most} or fewer."
        )
    given = {"first_look": first_look, "kv_budget_tokens": budget}
    cells = []
    asked = between = 0
    # the run itself is the pool that regret and equivalent N are told from
    whole = Method(BEST_OF_N, most)
    for method in dict.fromkeys([whole, *methods]):
        for each in runs:
            found = replay(each.results, simulated_config(each, method, given))
            asked, between = asked + found.scores_asked, between + found.scores_between
            results = found.results
            if args.selector != "max":  # which is what runs do
                results = [replace(r, best=select(_finished(r), r.prompt_hash)) for r in results]
            cells.append(
                Cell(
                    method=method,
                    seed=each.seed,
                    results=results,
                    metrics=each.metrics_of(results),
                    row_metrics=each.metrics if method == whole and each.rows == most else {},
                    simulated=True,
                    path=each.path,
                )
            )
    prompts = [
        {
            "prompt_hash": r.prompt_hash,
            "repeat": r.repeat,
            "instruction": runs[0].instructions.get((r.prompt_hash, r.repeat)),
        }
        for r in runs[0].results
    ]
    report = compare(cells, prompts=prompts, baseline=args.baseline)
    report |= {
        "made_by": "replay",
        "selector": args.selector,
        "sources": [each.path for each in runs],
        "scores": {"asked": asked, "between": between},
    }
    if args.output is not None:
        write_atomically(Path(args.output), as_text(report, indent=1) + "\n")
    _show(report, args.format)
    return 0


def _finished(result: GenerationResult) -> list[Trajectory]:
    return [row for row in result.trajectories if row.finish_reason != "rejected"]


def _as_the_first(runs: Sequence[Recorded]) -> list[Recorded]:
    """Runs in the first one's order of prompts, where they have the same ones in another.

    Raises:
        ConfigError: they answered other prompts.
    """
    asked = [_asked(run.results) for run in runs]
    ordered = []
    for run, own in zip(runs, asked, strict=True):
        if sorted(own) != sorted(asked[0]):
            raise ConfigError(
                f"{run.path!r} and {runs[0].path!r} answered different prompts: they cannot be paired.",
                hint="name runs over the same prompts.",
            )
        place = {key: number for number, key in enumerate(own)}
        ordered.append(run.in_order([place[key] for key in asked[0]]))
    return ordered


def _show(report: Mapping[str, Any], form: str) -> None:
    if form == "json":
        print(json.dumps(report, indent=1))
        return
    notes = ["simulated: the real strategies on stored rows and scores; nothing was decoded."]
    scores = report["scores"]
    if scores["between"]:
        notes.append(
            f"{counted(scores['between'], 'partial score')} of {scores['asked']:,} fell between two recorded ones: the "
            "last one before was taken. With score_every=1 a replay is what a run would give."
        )
    if report["selector"] != "max":
        notes.append(f"answers were chosen by the selector {report['selector']}, not by the highest reward.")
    if form == "markdown":
        print(as_markdown(report, notes))
    else:
        print_tables(report, notes, file=sys.stdout)
