"""Collects finished runs of lm-eval for publication, each under a name of its own.

lm-eval calls every run by its `pretrained`, so results of Best-of-N and Speculative Rejection pass for the bare
model's. The copies made here say in their folder's name, and as `model_name`, what was run: method, rows, model and
reward model. Refused are runs of the embedded demo pair, parts of tasks, and samples that are not those behind the
results file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specrej_eval import __version__
from specrej_eval.checked import object_or_empty
from specrej_eval.commands.submission.tree import Tree
from specrej_eval.errors import ConfigError
from specrej_eval.paths import lies_in
from specrej_eval.records import journal, parts, trace
from specrej_eval.records.fingerprint import BETWEEN, differences
from specrej_eval.records.jsonl import as_text
from specrej_eval.records.lm_eval_files import MARK, Results, check_samples, check_whole, find_results, remarks
from specrej_eval.records.run_names import default_name
from specrej_eval.wording import inert, shortened, start_of

SIDE_FILES = {"trace_path": "specrej_trace", "journal": "specrej_journal"}
"""Arguments that name files of ours, and what their copies are called."""
_MOST_RANKS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to check")
    read.add_argument("results", metavar="RESULTS_DIR", help="where lm-eval's --output_path pointed")
    read.add_argument("--name", help="of the run (default: made of method, rows, model and reward model)")
    read.add_argument("--allow_empty", action="store_true", help="take samples with empty answers")


def run(args: argparse.Namespace) -> int:
    tree, notes = build(args)
    tree.write()
    print(f"checked; collected in {tree.root}:")
    print("\n".join(f"  {inert(path)}" for path in tree.paths))
    print("\n".join(f"note: {inert(note)}" for note in notes), end="\n" if notes else "")
    names = sorted({Path(path).parts[0] for path in tree.paths})
    print(f"next: publish each folder as it is, under its name ({', '.join(names)}), not under the bare model's.")
    return 0


def build(args: argparse.Namespace) -> tuple[Tree, list[str]]:
    """Check everything and plan the files; nothing is written. Returns the files and what their user has to know.

    Raises:
        SpecRejError: the first thing that is wrong, with file and line.
    """
    tree, notes = Tree(args.output, force=args.force, lookalikes=args.allow_lookalikes), []
    chosen, replaced = newest(find_results(Path(args.results)))
    notes += [f"{old.path} is an older run of the same: left out" for old in replaced]
    named: dict[str, Results] = {}
    for results in chosen:
        check_whole(results)
        name = name_of(results, args.name)
        other = named.setdefault(name, results)
        if found := differences(other.arguments, results.arguments, told=BETWEEN):
            raise ConfigError(
                f"{str(other.path)!r} and {str(results.path)!r} would both be called {name!r} ({found}).",
                hint="give RESULTS_DIR the folder of one run, and --name.",
            )
        add_results(tree, results, name)
        for task in results.tasks:
            file = check_samples(results, task, allow_empty=args.allow_empty)
            tree.copy(f"{name}/{file.name}", file)
        notes += add_side_files(tree, results, name, Path(args.results))
        notes += remarks(results)
        notes += [f"the run warned: {warning}" for warning in results.warnings]
    return tree, notes


def newest(found: Sequence[Results]) -> tuple[list[Results], list[Results]]:
    """Of runs with equal arguments and tasks the newest one, and the others."""
    by_run: dict[str, list[Results]] = {}
    for results in sorted(found, key=lambda results: results.date):
        key = json.dumps([results.arguments, sorted(results.tasks)], sort_keys=True, default=str)
        by_run.setdefault(key, []).append(results)
    return [runs[-1] for runs in by_run.values()], [old for runs in by_run.values() for old in runs[:-1]]


def name_of(results: Results, given: str | None) -> str:
    """What the run is called.

    Raises:
        ConfigError: the given name is the bare model's, or is not a valid folder name.
    """
    arguments = dict(results.arguments)
    pretrained = str(arguments["pretrained"])
    if given is None:
        if arguments.get("strategy") == "best_of_n" or not arguments.get("alpha"):
            arguments["alpha"] = None  # as in a fingerprint: nothing is rejected
        arguments["reward_model"] = arguments.get("reward_model") or results.block.get("reward_model") or "likelihood"
        return default_name(arguments)
    if given.casefold() in (pretrained.casefold(), Path(pretrained).name.casefold()):
        raise ConfigError(
            f"--name {given!r} is the bare model's name; these are not its results.",
            hint="leave --name out for a name that says what was run.",
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", given, flags=re.ASCII):
        raise ConfigError(
            f"--name {given!r} is not a valid folder name.", hint="use letters and digits, with . _ + - in between."
        )
    return given


def add_results(tree: Tree, results: Results, name: str) -> None:
    """The results file, with the run's name in the place of the model's."""
    content: dict[str, Any] = {
        **results.content,
        "model_name": name,
        "model_name_sanitized": name,
        MARK: {
            "pretrained": results.arguments["pretrained"],
            "lm_eval_model_name": results.content.get("model_name"),
            "specrej_eval": __version__,
        },
    }
    tree.add(f"{name}/results_{results.date_id}.json", as_text(content, indent=2, strict=False) + "\n")


def add_side_files(tree: Tree, results: Results, name: str, folder: Path) -> list[str]:
    """Our own records, if they are still there; returns notes of those that are not."""
    notes = []
    arguments = object_or_empty(results.block.get("arguments"))
    ranks = results.block.get("world_size") or 1
    if not isinstance(ranks, int) or not 1 <= ranks <= _MOST_RANKS:
        raise ConfigError(
            f"{str(results.path)!r}: world_size is {start_of(ranks)}, which is no number of processes.",
            hint="the file was changed after the run; run the task again.",
        )
    for argument, copy in SIDE_FILES.items():
        if not arguments.get(argument):
            continue
        # each rank wrote a file of its own; the results file names the first one's
        first = Path(str(arguments[argument]))
        named = f"{copy}_{results.date_id}.jsonl"
        both = {
            first.name.replace("_rank0", f"_rank{rank}"): parts.rank_path(named, rank, ranks) for rank in range(ranks)
        }
        if argument == "journal" and arguments.get("join"):  # how many processes there were, nobody wrote down
            places = (first, folder / first, folder / first.name)
            known = sorted({file.name for place in places for file in parts.files(place)})
            both = {file: parts.alike(named, file) for file in known} or both
        for own, copied in both.items():
            written = first.with_name(own)
            # what a file names is not all its reader's to publish: taken is a record of ours in the run's own folder
            there = [place for place in (written, folder / written, folder / written.name) if _is_file(place)]
            source = next((place for place in there if lies_in(place, folder)), None)
            told = f"{argument}={shortened(str(written), 300)} of {results.path.name}"
            if source is None:
                where = f"does not lie in {folder}: left out (copy it there if it belongs to the run)"
                notes.append(f"{told} {where if there else 'is not there: left out'}")
                continue
            if (wrong := _not_ours(argument, source)) is not None:
                notes.append(f"{told} {wrong}: left out")
                continue
            tree.copy(f"{name}/{copied}", source)
    return notes


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):  # too long for a path, NUL in it
        return False


def _not_ours(argument: str, file: Path) -> str | None:
    """What a file is not, in words; None for a trace or a journal of ours."""
    try:
        if argument == "journal":
            journal.read(file)
        elif not trace.is_trace(file):
            return "is no trace of ours"
    except ConfigError:
        return "is no journal of ours"
    return None
