"""`specrej-eval gather`: the best answers of several runs as one run again.

Two things at once, told apart by the seeds. Runs of one seed are shards: each has answered prompts of its own, and they
are laid one after another. Runs that differ in nothing but the seed have drawn other rows for the same prompts: of each
prompt the answer with the highest reward stays, and N is the sum, so that four runs of Best-of-960 are one of
Best-of-3840. What comes out is a folder as `specrej-eval run` writes it, and may be gathered again.

Rows that two runs share would make N a lie: the same seed and prompt twice is refused, and so is a prompt that only
some of the seeds have answered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError
from specrej_eval.records.answers import GATHERED, Answer, RunRecord, audited, total_cost
from specrej_eval.records.fingerprint import BETWEEN, differences
from specrej_eval.records.outputs import OutputsFolder, RecordedRun
from specrej_eval.records.run_names import default_name
from specrej_eval.wording import counted, inert

SUMMARY = "put runs together: shards one after another, of several seeds the best answer to each prompt"
EXAMPLES = (
    "specrej-eval gather results/shard0 results/shard1 --output results/whole",
    "specrej-eval gather results/bo960-seed* --output results/bo3840",
)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What became of the runs."""

    record: RunRecord
    answers: list[Answer]
    left_out: int
    """Prompts without an answer from every seed (``incomplete``)."""

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for answer in self.answers for seed in answer.seeds})


def gather(sources: Sequence[RecordedRun], *, name: str | None = None, incomplete: bool = False) -> Gathered:
    """The best answer to each prompt, over all runs.

    Args:
        name: of the gathered run; by default that of its parts, or one that says the merged N.
        incomplete: take unfinished runs, and leave out prompts that not every seed has answered with a finite reward.

    Raises:
        ConfigError: the runs differ in more than the seed; a seed has drawn the same prompt twice; a run is not
            finished, a prompt is missing from one, or an answer has no finite reward, and ``incomplete`` is not set.
    """
    _check_same_but_seed(sources)
    if not incomplete:
        for source in sources:
            _check_whole(source)
    found = _by_prompt(sources)
    seeds = sorted({seed for source in sources for seed in source.seeds})
    lacking = {place: missing for place, parts in found.items() if (missing := _missing(parts, seeds))}
    if lacking and not incomplete:
        raise _missing_prompts(found, lacking, sources)
    kept = [parts for place, parts in found.items() if place not in lacking]
    if not kept:
        raise ConfigError(f"no prompt was answered by all of the seeds {_listed(seeds)}.")
    answers = _in_order([_best([answer for _, answer in parts]) for parts in kept])
    whole = not lacking and all(source.record.complete for source in sources)
    return Gathered(_record(sources, seeds, answers, name, whole), answers, len(lacking))


# what may be gathered


def _check_same_but_seed(sources: Sequence[RecordedRun]) -> None:
    first = sources[0]
    ours = {**first.record.fingerprint, "seed": None}
    for other in sources[1:]:
        theirs = {**other.record.fingerprint, "seed": None}
        older, newer = (theirs, ours) if "numbers_version" in ours else (ours, theirs)
        if details := differences(older, newer, told=BETWEEN):
            raise ConfigError(
                f"{first.path!r} and {other.path!r} differ in more than the seed ({details}).",
                hint="gather one method and one pair of models at a time.",
            )


def _check_whole(source: RecordedRun) -> None:
    if not source.record.complete:
        raise ConfigError(
            f"the run in {source.path!r} is not finished: it has {counted(len(source.answers), 'answer')} so far.",
            hint="run its command again to finish it, or gather what there is with --incomplete.",
        )
    if without := [answer for answer in source.answers if not _has_reward(answer)]:
        raise ConfigError(
            f"{without[0].called} has no finite reward in {source.path!r}, so nothing can be compared with it.",
            hint="--incomplete leaves such prompts out.",
        )


def _has_reward(answer: Answer) -> bool:
    return answer.reward is not None and math.isfinite(answer.reward)


def _by_prompt(sources: Sequence[RecordedRun]) -> dict[Hashable, list[tuple[RecordedRun, Answer]]]:
    """All answers of each prompt: one prompt is the same text at the same place, or the same repeat of a text."""
    indexed = all(answer.index is not None for source in sources for answer in source.answers)
    found: dict[Hashable, list[tuple[RecordedRun, Answer]]] = defaultdict(list)
    drawn: dict[Hashable, RecordedRun] = {}
    for source in sources:
        for answer in source.answers:
            place = (answer.prompt_hash, answer.index if indexed else answer.repeat)
            for seed in answer.seeds:
                before = drawn.setdefault((place, seed), source)
                if before is not source:
                    raise _drawn_twice(answer, seed, before, source)
            if found[place] and found[place][-1][0] is source:
                raise _drawn_twice(answer, answer.seeds[0], source, source)
            found[place].append((source, answer))
    return dict(found)


def _drawn_twice(answer: Answer, seed: int, first: RecordedRun, second: RecordedRun) -> ConfigError:
    where = f"{first.path!r} and {second.path!r}" if first is not second else f"{first.path!r}, twice"
    return ConfigError(
        f"{answer.called} was answered with seed={seed} in {where}: these are the same rows and would "
        "be counted twice in N.",
        hint="leave one of the runs out, or draw it again with another seed.",
    )


def _missing(parts: Sequence[tuple[RecordedRun, Answer]], seeds: Sequence[int]) -> list[int]:
    """The seeds that gave no answer worth counting."""
    drawn = {seed for _, answer in parts if _has_reward(answer) for seed in answer.seeds}
    return [seed for seed in seeds if seed not in drawn]


def _missing_prompts(
    found: Mapping[Hashable, Sequence[tuple[RecordedRun, Answer]]],
    lacking: Mapping[Hashable, Sequence[int]],
    sources: Sequence[RecordedRun],
) -> ConfigError:
    by_seed: dict[int, list[Answer]] = defaultdict(list)
    for place, seeds in lacking.items():
        for seed in seeds:
            by_seed[seed].append(found[place][0][1])
    details = []
    for seed, answers in sorted(by_seed.items()):
        runs = ", ".join(repr(source.path) for source in sources if seed in source.seeds)
        named = "; ".join(answer.called for answer in answers[:3]) + ("; ..." if len(answers) > 3 else "")
        details.append(f"seed={seed} ({runs}) lacks {len(answers)} of {counted(len(found), 'prompt')}: {named}")
    return ConfigError(
        "not every seed has answered every prompt, so N would differ between prompts. " + ". ".join(details) + ".",
        hint="answer them with the missing seeds, or keep the prompts that all have with --incomplete.",
    )


# what comes out


def _best(answers: Sequence[Answer]) -> Answer:
    """Several draws of one prompt as one answer."""
    if len(answers) == 1:
        return answers[0]
    answers = sorted(answers, key=lambda answer: sorted(answer.seeds))  # whatever the order on the command line
    best = max(answers, key=lambda answer: -math.inf if answer.reward is None else answer.reward)  # ties: the first
    return replace(
        best,
        n=sum(answer.n for answer in answers),
        seeds=sorted(seed for answer in answers for seed in answer.seeds),
        finished_rewards=[reward for answer in answers for reward in answer.finished_rewards],
        ledger=total_cost(answers),
        seconds=sum(answer.seconds for answer in answers),
        degraded=any(answer.degraded for answer in answers),
        nan_rewards=sum(answer.nan_rewards for answer in answers),
        # what an audit said of one seed's answer is not true of the best of several
        audit=None,
        resolved={name: value for name, value in best.resolved.items() if name != "audit"},
        key=_digest(sorted(answer.key for answer in answers)),
    )


def _in_order(answers: Sequence[Answer]) -> list[Answer]:
    """In the order of the prompts' file; shards that were files of their own stay one after another."""
    places = Counter(answer.index for answer in answers)
    if any(index is not None and count > 1 for index, count in places.items()):
        answers = [replace(answer, index=None) for answer in answers]  # each counted from the start of its own file
    ordered = sorted(answers, key=lambda answer: (answer.index is None, answer.index or 0))
    seen: set[str] = set()
    for number, answer in enumerate(ordered):
        if answer.key in seen:  # one prompt in two shards, each its first: a folder tells answers apart by their keys
            ordered[number] = replace(answer, key=_digest([answer.key, number]))
        seen.add(answer.key)
    return ordered


def _record(
    sources: Sequence[RecordedRun], seeds: Sequence[int], answers: Sequence[Answer], name: str | None, complete: bool
) -> RunRecord:
    first = sources[0].record
    fingerprint = {**first.fingerprint, "seed": list(seeds) if len(seeds) > 1 else seeds[0]}
    rows = {answer.n for answer in answers}
    names = {source.name for source in sources}
    if name is None:
        merged = default_name(fingerprint, n=rows.pop() if len(rows) == 1 else None)
        name = names.pop() if len(names) == 1 and len({tuple(source.seeds) for source in sources}) == 1 else merged
    arguments = [source.record.arguments.items() for source in sources]
    alike = {key: value for key, value in first.arguments.items() if all((key, value) in own for own in arguments)}
    capacities = {source.record.capacity_tokens for source in sources}
    return RunRecord(
        name=name,
        fingerprint=fingerprint,
        arguments={**alike, "seed": fingerprint["seed"]},
        described={GATHERED: [part for source in sources for part in _parts(source)]},
        capacity_tokens=capacities.pop() if len(capacities) == 1 else None,
        totals=total_cost(answers).to_dict(),
        audit=audited(answers),
        complete=complete,
        num_prompts=len(answers),
    )


def _parts(source: RecordedRun) -> list[dict[str, Any]]:
    """What a run was made of: itself, or the runs that were gathered into it."""
    parts = source.record.described.get(GATHERED)
    if isinstance(parts, list):
        return parts
    return [
        {
            "path": source.path,
            "generator": source.name,
            "seeds": source.seeds,
            "num_prompts": len(source.answers),
            "complete": source.record.complete,
            "described": source.record.described,
        }
    ]


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# the command


def write(gathered: Gathered, folder: str | Path) -> OutputsFolder:
    """Write a gathered run; an older gathered one in the same folder is replaced.

    Raises:
        ConfigError: the folder holds a run that was decoded, not gathered; or cannot be written.
    """
    store = OutputsFolder(folder)
    before = store.record()
    if before is not None and GATHERED not in before.described:
        raise ConfigError(
            f"{str(folder)!r} holds another run ({before.name!r}), which this would overwrite.",
            hint="give --output another folder.",
        )
    complete = gathered.record.complete
    store.begin(replace(gathered.record, complete=False), going_on=False)
    store.merge_parts(gathered.answers)
    store.write_record(replace(gathered.record, complete=complete))
    return store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to gather")
    read.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, as `specrej-eval run` writes it")
    read.add_argument(
        "--incomplete",
        action="store_true",
        help="take runs that are not finished, and leave out prompts that not every seed has answered",
    )
    written = parser.add_argument_group("what to write")
    written.add_argument("--output", required=True, metavar="DIR", help="folder of the gathered run")
    written.add_argument(
        "--name", help="name of the gathered run in leaderboards (default: made from N and the models)"
    )


def run(args: argparse.Namespace) -> int:
    output = Path(args.output).resolve()
    for path in args.runs:
        if _folder(path) == output:
            raise ConfigError(f"--output {args.output!r} is one of the runs to gather.", hint="give it another folder.")
    gathered = gather([RecordedRun.read(path) for path in args.runs], name=args.name, incomplete=args.incomplete)
    store = write(gathered, args.output)
    if gathered.left_out:
        why = "not every seed has answered them with a finite reward"
        print(f"specrej-eval gather: {counted(gathered.left_out, 'prompt')} left out: {why}", file=sys.stderr)
    gaps = _gaps(gathered.answers)
    if gaps:
        print(f"specrej-eval gather: prompts {gaps} are in none of the runs", file=sys.stderr)
    rows = sorted({answer.n for answer in gathered.answers})
    n = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    rewards = [answer.reward for answer in gathered.answers if answer.reward is not None]
    print(
        f"{inert(gathered.record.name)}: {counted(len(gathered.answers), 'answer')} of "
        f"{counted(len(args.runs), 'run')}, "
        f"seeds {_listed(gathered.seeds)}, n={n}, mean reward {sum(rewards) / len(rewards):.3f}\n{store.outputs_file}"
    )
    return 0


def _folder(path: str) -> Path:
    given = Path(path).resolve()
    return given if given.is_dir() else given.parent


def _gaps(answers: Iterable[Answer]) -> str:
    """Places between 0 and the last that no answer has, such as ``50-99, 120``."""
    indices = sorted(answer.index for answer in answers if answer.index is not None)
    ranges = []
    expected = 0
    for index in indices:
        if index > expected:
            ranges.append(str(expected) if index == expected + 1 else f"{expected}-{index - 1}")
        expected = index + 1
    return ", ".join(ranges)


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))
