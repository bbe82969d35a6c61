"""`specrej-eval status`: how far a run is, from another terminal or after it was killed. Reads files, loads no model.

Answers are counted in the records themselves. Whether a process still writes there is told by its lock, which the
kernel takes away however it ends; the pace comes from a small file that it keeps up to date (``records.state``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrej_eval.errors import SpecRejError
from specrej_eval.forecast import duration
from specrej_eval.records import journal, lock
from specrej_eval.records.outputs import PREFIX, RUN_FILES, OutputsFolder
from specrej_eval.records.parts import are_of, beside, kind
from specrej_eval.records.state import STATE, RunState, state_file
from specrej_eval.wording import counted, inert

SUMMARY = "say how far a run is, whether it still runs, and how long it will take"
EXAMPLES = (
    "specrej-eval status results/spr",
    "specrej-eval status run.jsonl",
    "watch -n 5 specrej-eval status results/spr",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="the folder of a `specrej-eval run` or of alpaca_eval, or a journal (journal=FILE of lm-eval or Python)",
    )


def run(args: argparse.Namespace) -> int:
    """Raises:
    SpecRejError: no run lies there.
    """
    for line in lines(Path(args.run)):
        print(inert(line))
    return 0


@dataclass(frozen=True, slots=True)
class Process:
    """One of those that write a run's records."""

    file: Path
    state: RunState | None
    holder: dict[str, Any] | None
    """Who holds its lock; None = it has ended."""

    @classmethod
    def of(cls, file: Path) -> Process:
        try:
            holder = lock.holder(file)
        except OSError:
            holder = None
        return cls(file, RunState.read(state_file(file)), holder)

    @property
    def kind(self) -> str:
        """See ``parts.kind``."""
        return kind(self.file)

    @property
    def name(self) -> str:
        pid = (self.holder or {}).get("pid") or (self.state.pid if self.state else "?")
        host = (self.holder or {}).get("host") or (self.state.host if self.state else "")
        return f"process {pid}" + (f" on {host}" if host else "")


def lines(path: Path) -> Iterator[str]:
    """What there is to say of a run.

    Raises:
        SpecRejError: no run lies there.
    """
    folder = path if path.is_dir() else path.parent
    runs = [prefix for name, prefix in RUN_FILES.items() if (folder / name).is_file()]
    if path.is_dir() or path.name.startswith(PREFIX):
        if not runs:
            # of several seeds, or the cells of a comparison
            below = sorted(found.parent for found in path.rglob("specrej_run.json")) if path.is_dir() else []
            for each in below:
                yield from lines(each)
            if below:
                return
            raise SpecRejError(
                f"no run lies in {str(path)!r}.",
                hint="name the folder of `specrej-eval run --output DIR`, or the file of journal=FILE.",
            )
        for prefix in runs:
            yield from _of_folder(folder, prefix)
    elif path.is_file() or state_file(path).is_file() or [*beside(path)]:
        yield from _of_journal(path)
    else:
        raise SpecRejError(
            f"there is no run or journal {str(path)!r}.",
            hint="name the folder of `specrej-eval run --output DIR`, or the file of journal=FILE.",
        )


def _of_folder(folder: Path, prefix: str) -> Iterator[str]:
    store = OutputsFolder(folder, prefix=prefix)
    record = store.record()
    assert record is not None, "its file was there a moment ago"
    where = str(folder) if prefix == PREFIX else f"{folder} ({prefix})"
    if record.complete:
        yield f"{where}: complete, {counted(record.num_prompts or 0, 'answer')}"
        return
    done, damaged = store.count()
    by = f"stopped by {record.stopped}" if record.stopped else ""
    yield from _told(where, _processes(store.outputs_file, beside(store.outputs_file)), done, by)
    if damaged:
        yield f"  {counted(damaged, 'damaged line')}: the next start sets it aside and decodes that answer again"


def _of_journal(path: Path) -> Iterator[str]:
    files = [*beside(path), *([path] if path.is_file() else [])]
    found = [journal.read(file) for file in files if file.stat().st_size]
    done = len({key for each in found for key in each.entries})
    yield from _told(str(path), _processes(path, files), done, "")


def _processes(records: Path, files: Iterable[Path] = ()) -> list[Process]:
    """Those whose files or states lie beside the records, and whoever writes the records alone."""
    states = [found.name[1 : -len(STATE)] for found in records.parent.glob(f".*{STATE}")]
    names = {records.name, *(file.name for file in files), *are_of(records, states)}
    return [Process.of(records.with_name(name)) for name in sorted(names)]


def _whole(processes: list[Process]) -> int:
    """How many answers the last start is to come to; 0 where its states do not say."""
    told = [(each.state, each.kind) for each in processes if each.state is not None]
    if not told:
        return 0
    _, last = max(told, key=lambda each: each[0].started)  # other kinds of processes are of earlier starts
    asked = [state.total + state.earlier for state, kind in told if kind == last]
    if last == "joined":
        return max(asked)  # each of them is asked for all answers, and a rank for its share
    if last == "rank" and any(each.kind == "rank" and each.state is None for each in processes):
        return 0  # a rank that is done has no state any more
    return sum(asked)


def _told(where: str, processes: list[Process], done: int, by: str) -> Iterator[str]:
    alive = [each for each in processes if each.holder is not None]
    states = [each.state for each in processes if each.state is not None]
    whole = _whole(processes)
    share = f"{done:,} of {counted(whole, 'answer')} ({done / whole:.0%})" if whole else counted(done, "answer")
    if alive:
        yield f"{where}: running, {share}"
        live = [each.state for each in alive if each.state is not None]
        now = sum(state.in_flight for state in live)
        speed = sum(state.tokens_per_second for state in live)
        left = [state.seconds_left for state in live]
        if all(each.kind == "joined" for each in alive) and (pace := sum(state.decoded_per_second for state in live)):
            left = [(whole - done) / pace]
        ends = [seconds for seconds in left if seconds is not None]
        eta = f"about {duration(max(ends))} left" if len(ends) == len(left) and ends else "too early to say how long"
        yield f"  {counted(now, 'prompt')} in flight, {speed:,.0f} tokens/s, {eta}"
    elif by:
        yield f"{where}: {by}, {share}; the same command goes on from there"
    elif states and (done < whole or not whole):
        yield f"{where}: ended before it was complete, {share}; the same command goes on from there"
    else:
        yield f"{where}: no process is writing, {share}"
    for each in processes:
        if each.state is not None and (len(processes) > 1 or each.holder is None or alive):
            state = each.state
            ago = duration(max(0.0, time.time() - state.updated))
            what = "alive" if each.holder is not None else "dead"
            yield f"  {each.name}: {what}, {state.done:,} of {state.total:,}, last heard of {ago} ago"
