"""What was run: read from whatever wrote it down, and given a name that no other run has.

A run of lm-eval is known by its resolved arguments, not by its folder: of two results files with equal ones the newer
counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specrej_eval.auditing import AuditEstimate, of_totals
from specrej_eval.checked import number_or, object_or_empty
from specrej_eval.config import DECIDING, NEUTRAL, RecordArguments, declared
from specrej_eval.core import ROWS_FROM
from specrej_eval.errors import SpecRejError
from specrej_eval.records import alpaca_eval_files, lm_eval_files
from specrej_eval.records.answers import Answer, RunRecord, audit_sample, total_cost
from specrej_eval.records.cell_scores import CellMetrics, CellPreferences
from specrej_eval.records.fingerprint import EMBEDDED
from specrej_eval.records.outputs import RUN_FILES, OutputsFolder
from specrej_eval.records.run_names import model_name
from specrej_eval.records.scores import Score, mean_score
from specrej_eval.redaction import redacted_values
from specrej_eval.wording import counted

RECORDS = (*declared(RecordArguments), "prompts", "limit")
"""Arguments that say where records went, and what was asked; not what answered."""
WIN_RATE = "win_rate"
MODELS = ("pretrained", "reward_model")
MACHINE = ("device", "device_name", "cpu_threads", "dtype", "memory_gib")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, whatever wrote it down."""

    kind: str
    """``lm-eval``, ``run`` or ``alpaca_eval``."""
    path: Path
    date: float
    """Seconds since the epoch."""
    model: str
    """What it is called where no argument of ours says what was run."""
    scores: Sequence[Score]
    name: str = ""
    """Its own among the runs of a report."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The resolved arguments that say what was run; empty for another model's run."""
    models: Mapping[str, str | None] = field(default_factory=dict)
    limit: float | None = None
    hardware: Any = None
    warnings: Sequence[str] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    """A ``Ledger``'s counts."""
    mean_reward: float | None = None
    audit: AuditEstimate | None = None
    """What rejection cost, where the run says so."""

    @property
    def tasks(self) -> set[str]:
        return {score.task for score in self.scores}

    @property
    def pair(self) -> str:
        """Its models in a word or two; empty where no argument of ours says what was run."""
        known = [model_name(name) for name in self.models.values() if name and self.arguments]
        return " by ".join(known)

    @property
    def identity(self) -> str:
        """Equal for two runs of the same thing."""
        what = [self.model, self.arguments, _limit(self), sorted(self.tasks)]
        return json.dumps([*what, None if self.kind == "lm-eval" else str(self.path)], default=str)

    @property
    def label(self) -> str:
        strategy, n = self.arguments.get("strategy"), self.arguments.get("n")
        name = f"{self.model}: " if self.kind == "alpaca_eval" else ""
        if strategy and n is None:
            return f"{name}{self.model}, log-likelihood requests alone"
        if strategy == "speculative_rejection":
            return f"{name}Speculative Rejection, alpha={self.arguments.get('alpha')}, n={n}"
        if strategy == "best_of_n":
            return name + ("Sampling, n=1" if n == 1 else f"Best-of-N, n={n}")
        return f"{name}{strategy}, n={n}" if strategy else self.model


def find_runs(*folders: Path) -> list[Run]:
    """The runs under some folders, oldest first and named; of equal ones the newest.

    Raises:
        SpecRejError: there is no such folder, or no run in it; a record is damaged.
    """
    newest: dict[str, Run] = {}
    for folder in folders:
        if not folder.exists():
            raise SpecRejError(f"no such folder: {folder}", hint="give the --output_path of your lm_eval runs")
        for run in _runs_in(folder):
            if run.identity not in newest or newest[run.identity].date < run.date:
                newest[run.identity] = run
    if not newest:
        raise SpecRejError(
            f"no runs under {', '.join(map(str, folders))}",
            hint="name what was given to lm_eval as --output_path (it writes results_*.json when a run is complete), "
            "the folder of a `specrej-eval run`, or alpaca_eval's results",
        )
    return named(sorted(newest.values(), key=lambda run: run.date))


def _runs_in(folder: Path) -> Iterable[Run]:
    paths = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
    for path in paths:
        prefix = RUN_FILES.get(path.name)
        if prefix is not None:
            yield _recorded(path, prefix)
        elif (results := lm_eval_files.read_results(path)) is not None:
            yield _of_lm_eval(results)


def _of_lm_eval(results: lm_eval_files.Results) -> Run:
    block, arguments = results.block, redacted_values(results.arguments, put="")
    given = object_or_empty(results.config.get("model_args"))
    embedded = bool(block.get("embedded_demo_pair"))
    return Run(
        kind="lm-eval",
        path=results.path,
        date=results.date,
        model=str(results.config.get("model", results.path.parent.name)),
        scores=list(results.scores()),
        arguments={name: value for name, value in arguments.items() if name not in RECORDS} if block else {},
        models={
            "pretrained": EMBEDDED if embedded else arguments.get("pretrained") or given.get("pretrained"),
            "reward_model": redacted_values(block.get("reward_model") or arguments.get("reward_model"), put=""),
        },
        limit=number_or(results.config.get("limit"), None),
        hardware=block.get("hardware"),
        warnings=[*results.warnings, *lm_eval_files.remarks(results)],
        totals=_numbers(block.get("totals")),
        mean_reward=number_or(block.get("mean_reward"), None),
        audit=of_totals(block.get("audit")),
    )


def _recorded(path: Path, prefix: str) -> Run:
    """A folder of `run` or of alpaca_eval."""
    store = OutputsFolder(path.parent, prefix=prefix)
    record = store.record()
    assert record is not None, f"{path} was there a moment ago"
    answers = store.answers()
    judged = alpaca_eval_files.scores(path.parent, record.name)
    prompts = record.arguments.get("prompts")
    task = Path(str(prompts)).name if prompts else "alpaca_eval"
    scores = [_reward_score(task, answers, record.fingerprint), *_cell_scores(path.parent, task, answers), *judged]
    decided = {name: record.fingerprint[name] for name in DECIDING if name in record.fingerprint}
    asked = {name: value for name, value in {**record.arguments, **decided}.items() if name not in RECORDS}
    rows = sorted({answer.n for answer in answers})
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    return Run(
        kind="run" if prompts else "alpaca_eval",
        path=path.parent,
        date=path.stat().st_mtime,
        model=record.name,
        scores=scores,
        arguments=asked if len(rows) != 1 else {**asked, "n": rows[0]},
        models={name: record.fingerprint.get(name) for name in MODELS},
        limit=number_or(record.arguments.get("limit"), None),
        hardware=_one_machine(record.machines),
        warnings=_remarks(answers, record),
        totals=_numbers(record.totals) or total_cost(answers).to_dict(),
        mean_reward=statistics.fmean(rewards) if rewards else None,
        audit=audit_sample(answers).estimate(),
    )


def _numbers(totals: Any) -> dict[str, Any]:
    """What is a number in a record's costs, by name and by phase."""
    found: dict[str, Any] = {name: number_or(value, None) for name, value in object_or_empty(totals).items()}
    phases = object_or_empty(object_or_empty(totals).get("seconds"))
    seconds = {name: number for name, value in phases.items() if (number := number_or(value, None)) is not None}
    found |= {"seconds": seconds} if phases else {}
    return {name: value for name, value in found.items() if value is not None}


def _one_machine(machines: Sequence[Mapping[str, Any]]) -> Any:
    """The machine of a run; of one put together on several, all of them in words."""
    told = list(dict.fromkeys(map(describe, machines)))
    return machines[0] if len(told) == 1 else " and ".join(told) or None


def _cell_scores(cell: Path, task: str, answers: Sequence[Answer]) -> Iterable[Score]:
    """What a task and a judge said of the answers of a cell of `specrej-eval compare`; win rates in per cent."""
    texts = [answer.output for answer in answers]
    names = [f"{answer.prompt_hash} {answer.repeat}" for answer in answers]
    if (scored := CellMetrics.read(cell, texts)) is not None:
        for metric, values in scored.best.items():
            yield mean_score(dict(zip(names, values, strict=True)), task=task, metric=metric, answered=len(answers))
    if (judged := CellPreferences.read(cell, texts)) is not None:
        given = zip(names, judged.preferred, strict=True)
        each = {name: 100 * value for name, value in given if value is not None}
        score = mean_score(each, task=task, metric=WIN_RATE, answered=len(answers))
        yield replace(score, filter=f"{judged.annotators}, against {judged.against}")


def _reward_score(task: str, answers: Sequence[Answer], fingerprint: Mapping[str, Any]) -> Score:
    """Rewards compare where one reward model gave them."""
    scale = json.dumps([fingerprint.get("reward_model"), fingerprint.get("reward_files")], sort_keys=True)
    found = {f"{a.prompt_hash} {a.repeat}": a.reward for a in answers if a.reward is not None}
    return mean_score(found, task=task, metric="reward", scale=scale, answered=len(answers))


def _remarks(answers: Sequence[Answer], record: RunRecord) -> list[str]:
    borrowed = sum(ROWS_FROM in answer.resolved for answer in answers)
    counts = [
        (sum(answer.degraded for answer in answers), "gave up rows for want of memory (degraded)", "answer", ""),
        (borrowed, "made of another run's rows: no seconds", "answer was", "answers were"),
        (sum(answer.nan_rewards for answer in answers), "not finite", "reward was", "rewards were"),
        (sum(not answer.output.strip() for answer in answers), "empty", "answer is", "answers are"),
    ]
    by = f", stopped by {record.stopped}" if record.stopped else ""
    found = [] if record.complete else [f"not finished: {counted(len(answers), 'answer')} so far{by}"]
    return found + [f"{counted(count, one, more)} {what}" for count, what, one, more in counts if count]


def named(runs: Sequence[Run]) -> list[Run]:
    """Short names; runs that would share one get the arguments they differ in, or their folders."""
    models = {str(run.models) for run in runs if run.arguments}
    names = [run.label for run in runs]
    if len(models) > 1:
        names = [", ".join(filter(None, (name, run.pair))) for name, run in zip(names, runs, strict=True)]
    told = list(zip(names, runs, strict=True))
    alike = [
        [other for called, other in told if called == name and (other is run or other.tasks & run.tasks)]
        for name, run in told
    ]
    names = [", ".join([name, *_differing(run, same)]) for (name, run), same in zip(told, alike, strict=True)]
    own = dict(zip(map(id, runs), names, strict=True))
    found = []
    for run, name, same in zip(runs, names, alike, strict=True):
        twins = [other for other in same if own[id(other)] == name]
        apart = len({other.path.parent for other in twins}) == len(twins)
        place = run.path.parent if apart else run.path
        found.append(replace(run, name=f"{name} ({place})" if len(twins) > 1 else name))
    return found


def _differing(run: Run, alike: Sequence[Run]) -> list[str]:
    """The arguments of a run that set it apart from those of its name."""
    settings = [{**other.arguments, "limit": _limit(other)} for other in alike]
    # what an older version did not write down is no difference
    known = set.intersection(*map(set, settings)).difference(NEUTRAL, MODELS)
    keys = [key for key in sorted(known) if len({str(values.get(key)) for values in settings}) > 1]
    return [f"{key}={({**run.arguments, 'limit': _limit(run)}).get(key)}" for key in keys]


def _limit(run: Run) -> str | None:
    """As a number is written, whether YAML or a command line gave it."""
    return f"{run.limit:g}" if lm_eval_files.is_number(run.limit) else None


def describe(hardware: Any) -> str:
    """A machine in words."""
    if not isinstance(hardware, Mapping):
        return str(hardware)
    shown = {name: hardware[name] for name in MACHINE if hardware.get(name) is not None} or hardware
    return ", ".join(f"{key}={value}" for key, value in shown.items())
