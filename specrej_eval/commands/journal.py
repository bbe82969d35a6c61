"""`specrej-eval journal`: look into a journal, check it, put several of one run together. No model is loaded.

A journal is the file of ``journal=FILE``, with those that several processes wrote for it (``run_rank0.jsonl``,
``run_joined0.jsonl``), or ``specrej_trajectories.jsonl`` of `specrej-eval run`, whose folder may be named in its place;
``verify`` then looks at all files there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path

from specrej_eval.core import GenerationResult, Ledger
from specrej_eval.errors import ConfigError
from specrej_eval.records.fingerprint import check_same
from specrej_eval.records.journal import CAPACITY, SCHEMA_VERSION, Contents, lacking_fields, read
from specrej_eval.records.jsonl import CHECKSUM, RUN, checked_line, write_atomically
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.records.parts import files, kind
from specrej_eval.wording import counted, inert

_DIGEST = re.compile(r"\b([0-9a-f]{12})(?:[0-9a-f]{28}|[0-9a-f]{52})\b")

_FILE = "a journal, or the folder of a `specrej-eval run`"

SUMMARY = "look into a journal of finished requests, check it for damage, or put several of one run together"
EXAMPLES = (
    "specrej-eval journal show run.jsonl",
    "specrej-eval journal show results/spr --key 3f9a",
    "specrej-eval journal verify run.jsonl results/spr",
    "specrej-eval journal merge run_rank0.jsonl run_rank1.jsonl --output whole.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|verify|merge")
    show = actions.add_parser("show", help="show which run it belongs to, how many answers it holds and what they cost")
    show.add_argument("journal", metavar="FILE", help=_FILE)
    show.add_argument("--key", help="print the answers whose key or prompt hash begins with this")
    verify = actions.add_parser("verify", help="list every problem with its line number; exit code 1 if there is any")
    verify.add_argument("journal", nargs="+", metavar="FILE", help=_FILE)
    merge = actions.add_parser("merge", help="merge journals of one run into a new file")
    merge.add_argument("journal", nargs="+", metavar="FILE", help=_FILE)
    merge.add_argument("--output", required=True, metavar="FILE", help="the journal to write")
    merge.add_argument("--force", action="store_true", help="replace the file of --output")


def run(args: argparse.Namespace) -> int:
    match args.action:
        case "show":
            return show(args.journal, args.key)
        case "verify":
            paths = _each(args.journal, folders=False)
            problems = [problem for path in paths for problem in verify(Path(path))]
            print("\n".join(problems) if problems else "no problems found")
            return 1 if problems else 0
        case _:
            return merge(_each(args.journal), args.output, force=args.force)


def _each(given: Iterable[str], *, folders: bool = True) -> list[str]:
    """The files of some journals, each once.

    Args:
        folders: a run's folder is one for its journal; False = it stays a folder.
    """
    found = ([path] if Path(path).is_dir() and not folders else journals_of(path) for path in given)
    return list(dict.fromkeys(path for paths in found for path in paths))


def journals_of(path: str) -> list[str]:
    """The files of a journal, or of that in the folder of a run: one of each process that wrote there. A file that is
    named as one process's is taken alone.

    Raises:
        ConfigError: a folder without any.
    """
    if not Path(path).is_dir():
        return [*map(str, [] if kind(path) else files(path))] or [path]
    found = [*map(str, files(OutputsFolder(path).trajectories_file))]
    if not found:
        raise ConfigError(
            f"{path!r} is a folder without the journal of a `specrej-eval run`.",
            hint="name a journal: the file given as journal=FILE.",
        )
    return found


def show(path: str, key: str | None = None) -> int:
    """Print what a journal holds, or the answers a key names.

    Raises:
        ConfigError: no journal of ours, or no answer has such a key.
    """
    paths = journals_of(path)
    contents = [read(file) for file in paths]
    if key is not None:
        every = [(name, entry.result) for found in contents for name, entry in found.entries.items()]
        chosen = [(n, r) for n, r in every if n.startswith(key) or r.prompt_hash.startswith(key)]
        if not chosen:
            raise ConfigError(f"{path!r} has no answer whose key or prompt hash begins with {key!r}.")
        for name, result in chosen:
            _print_answer(name, result)
        return 0
    for place, (file, found) in enumerate(zip(paths, contents, strict=True)):
        if len(paths) > 1:
            print(f"{'' if place == 0 else chr(10)}{inert(file)}\n")
        _print_contents(file, found)
    return 0


def _print_contents(path: str, found: Contents) -> None:
    _print_settings(found.fingerprint or {"first line": "damaged"})
    results = {name: entry.result for name, entry in found.entries.items()}
    total = reduce(Ledger.add, (result.ledger for result in results.values()), Ledger())
    print(
        f"{counted(len(results), 'answer')}; they cost {counted(total.decode_tokens, 'token')} and "
        f"{total.total_seconds:.1f} s"
    )
    for task, number in sorted(Counter(result.task for result in results.values()).items()):
        print(f"  {inert(task) or '(no task)'}: {number}")
    if found.capacity_tokens is not None:
        print(f"n=max was resolved with {counted(found.capacity_tokens, 'token')}")
    if found.unchecked:
        lacking = f" and lack {', '.join(fields)}" if (fields := lacking_fields(found)) else ""
        print(f"written by an older version, without a checksum{lacking}: {found.unchecked} of them")
    if found.scan.damaged:
        number = len(found.scan.damaged)
        print(f"{counted(number, 'line is', 'lines are')} damaged: see `specrej-eval journal verify {inert(path)}`")


def _print_settings(fingerprint: Mapping[str, object]) -> None:
    """In columns: first what stands by itself, then each group, such as the digests of files, under its name."""
    groups = {name: value for name, value in fingerprint.items() if isinstance(value, Mapping)}
    alone = {name: value for name, value in fingerprint.items() if name not in groups}
    for title, values in (("settings", alone), *groups.items()):
        width = max((len(inert(str(name))) for name in values), default=0)
        print(f"{inert(title)}:")
        for name, value in values.items():
            print(f"  {inert(str(name)):<{width}}  {_short(value)}")
        print()


def _short(value: object) -> str:
    """A value for the eye: digests and commits by their first 12 digits, None and empty lists as ``none``."""
    if value is None or value == []:
        return "none"
    return inert(_DIGEST.sub(r"\1", str(value)))


def _print_answer(key: str, result: GenerationResult) -> None:
    print(f"{key[:12]}: task {inert(result.task)}, prompt {inert(result.prompt_hash[:12])}, repeat {result.repeat}")
    for row in result.trajectories:
        mark = "*" if row is result.best else " "
        reward = "none" if row.reward is None else f"{row.reward:.4f}"
        print(
            f"{mark} row {row.row}: {row.finish_reason}, {counted(row.num_tokens, 'token')}, reward {reward}: "
            f"{inert(row.text)}"
        )


def verify(path: Path) -> Iterator[str]:
    """What is wrong with a journal or a run's folder, one line each; nothing is written."""
    if path.is_dir():
        store = OutputsFolder(path)
        if store.record() is None:
            raise ConfigError(f"{str(path)!r} is not a run of specrej-eval: there is no {store.run_file.name}.")
        for file, damage in store.problems():
            yield f"{inert(str(file))}, line {damage.number}: {damage.reason}"
        for file in files(store.trajectories_file):
            yield from verify(file)
        return
    found = read(path)
    name = inert(str(path))
    for damage in sorted(found.scan.damaged, key=lambda item: item.number):
        yield f"{name}, line {damage.number}: {inert(damage.reason)}"
    if found.header is None and found.scan.lines:
        yield f"{name}: no intact first line, which says what run it is of"
    if found.scan.torn:
        yield f"{name}: the last line is cut short"
    for first, later in found.contradicting:
        yield f"{name}, line {later}: answers the request of line {first} differently; the first counts"
    for number in found.repeated:
        yield f"{name}, line {number}: appears twice"


def merge(paths: list[str], output: str, *, force: bool = False) -> int:
    """Write the intact answers of several journals into one; of two to one request the first counts.

    Raises:
        ConfigError: they are of different runs, none of them says of which, or the output is there already.
    """
    target = Path(output)
    if target.exists() and not force:
        raise ConfigError(
            f"{output!r} already exists.", hint="give another --output, or replace the file with --force."
        )
    read_all = [(path, read(path)) for path in paths]
    headed = [(path, found) for path, found in read_all if found.fingerprint is not None]
    if not headed:
        raise ConfigError(
            "none of these journals has an intact first line, which says which models its entries come from.",
            hint="add another journal of the same run, such as one that the same command has just started.",
        )
    fingerprint = headed[0][1].fingerprint or {}
    for path, found in headed[1:]:
        check_same(fingerprint, found.fingerprint or {}, what=repr(path), remedy="merge only journals of one run.")
    run_digest = headed[0][1].run
    for path, found in read_all:
        if found.fingerprint is None and found.run not in (None, run_digest):
            raise ConfigError(f"the entries of {path!r} belong to another run.", hint="leave it out.")
    lines, contradicting, damaged = _together(read_all)
    capacities = {found.capacity_tokens for _, found in read_all} - {None}
    if len(capacities) > 1:
        raise ConfigError(f"n=max was resolved with different memory: {sorted(map(str, capacities))} tokens.")
    head = [checked_line({"journal": SCHEMA_VERSION, "fingerprint": fingerprint})]
    head += [checked_line({"key": CAPACITY, "result": tokens, RUN: run_digest}) for tokens in capacities]
    write_atomically(target, "".join([*head, *(checked_line({**line, RUN: run_digest}) for line in lines)]))
    print(f"{counted(len(lines), 'answer')} of {counted(len(paths), 'journal')} in {output}")
    if contradicting:
        print(f"{counted(contradicting, 'request')} with different answers: the first counts", file=sys.stderr)
    if damaged:
        print(f"{counted(damaged, 'damaged line')} left out, and still in the original files", file=sys.stderr)
    return 0


def _together(read_all: list[tuple[str, Contents]]) -> tuple[list[dict[str, object]], int, int]:
    lines: dict[str, dict[str, object]] = {}
    contradicting = damaged = 0
    for _, found in read_all:
        damaged += len(found.scan.damaged)
        contradicting += len(found.contradicting)
        for key, entry in found.entries.items():
            record = {name: value for name, value in entry.line.record.items() if name not in (CHECKSUM, RUN)}
            first = lines.setdefault(key, record)
            contradicting += json.dumps(first["result"]) != json.dumps(record["result"])
    return list(lines.values()), contradicting, damaged
