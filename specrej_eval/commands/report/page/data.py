"""What a page shows, read from records: methods, the prompts they answered, and every row behind each answer.

Rows come from journals: the ``specrej_trajectories.jsonl`` of a `specrej-eval run`, or what ``journal=`` named. One may
hold several runs; only the entries that were made with a run's own arguments are its rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from specrej_eval.checked import object_or_empty
from specrej_eval.commands.report.runs import WIN_RATE, Run
from specrej_eval.config import MAX
from specrej_eval.core import ROWS_FROM, GenerationResult, Ledger, Round, Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.evidence.flops import Sizes, flops
from specrej_eval.records import alpaca_eval_files, journal, lm_eval_files
from specrej_eval.records.answers import Answer
from specrej_eval.records.outputs import RUN_FILES, OutputsFolder
from specrej_eval.records.parts import files
from specrej_eval.wording import counted

_OF_ONE_PROMPT = ("kv_budget_tokens", "first_look")
"""Resolved arguments that may differ between two prompts of one run."""


class Key(NamedTuple):
    """One prompt of one task: what two runs are paired by."""

    task: str
    prompt_hash: str
    repeat: int


class Metric(NamedTuple):
    """One thing that is measured of every answer."""

    task: str
    name: str
    filter: str

    @property
    def label(self) -> str:
        return self.name + (f" ({self.filter})" if self.filter not in ("", "none") else "")


REWARD = "reward"


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt as one method answered it."""

    text: str
    """The answer."""
    reward: float | None
    num_tokens: int
    """Of the answer."""
    rows: Sequence[Trajectory]
    """In row order; empty where they were not recorded."""
    best: int | None
    """The row that is the answer; None where rows were not recorded."""
    rounds: Sequence[Round]
    ledger: Ledger
    scores: Mapping[Metric, float] = field(default_factory=dict)
    """What the benchmark says of the answer."""
    measured: bool = True
    """Whether its seconds and memory were: not so where its rows are another run's (`specrej-eval compare`)."""

    @classmethod
    def of_result(cls, result: GenerationResult, scores: Mapping[Metric, float]) -> Answered:
        return cls(
            text=result.text,
            reward=result.best.reward,
            num_tokens=result.best.num_tokens,
            rows=sorted(result.trajectories, key=lambda row: row.row),
            best=result.best.row,
            rounds=result.rounds,
            ledger=result.ledger,
            scores=scores,
            measured=ROWS_FROM not in result.resolved,
        )

    @classmethod
    def of_answer(cls, answer: Answer, scores: Mapping[Metric, float]) -> Answered:
        return cls(
            text=answer.output,
            reward=answer.reward,
            num_tokens=answer.num_tokens,
            rows=(),
            best=None,
            rounds=answer.rounds,
            ledger=answer.ledger,
            scores=scores,
            measured=ROWS_FROM not in answer.resolved,
        )


@dataclass(frozen=True, eq=False)
class Method:
    """One run, as the page shows it. Itself alone is equal to it, so that measures of it can be remembered."""

    run: Run
    short: str
    """Its name in charts."""
    family: str
    """``best_of_n``, ``rejecting`` or ``other``: its colour and mark."""
    answers: Mapping[Key, Answered]
    """In the order of its prompts; empty where no answers are recorded."""
    sizes: Sizes | None
    """Of its models; None where the records do not say."""

    @property
    def seed(self) -> str:
        return str(self.run.arguments.get("seed"))

    @property
    def reward_scale(self) -> str:
        """Rewards compare where it is equal: one reward model gave them."""
        told = next((score.scale for score in self.run.scores if score.metric == REWARD and score.scale), "")
        return told or str(self.run.models.get("reward_model"))

    @cached_property
    def metrics(self) -> list[Metric]:
        """What each of its answers has, the reward of a task first."""
        found: dict[Metric, None] = {}
        for key, answer in self.answers.items():
            if answer.reward is not None:
                found.setdefault(Metric(key.task, REWARD, ""), None)
            for metric in answer.scores:
                found.setdefault(metric, None)
        return sorted(found, key=lambda metric: (metric.task, metric.name != REWARD))

    def each(self, metric: Metric) -> dict[Key, float]:
        """Prompt -> its score."""
        if metric.name == REWARD:
            found = {key: answer.reward for key, answer in self.of_task(metric.task)}
        else:
            found = {key: answer.scores.get(metric) for key, answer in self.of_task(metric.task)}
        return {key: value for key, value in found.items() if value is not None}

    def of_task(self, task: str) -> Iterator[tuple[Key, Answered]]:
        return ((key, answer) for key, answer in self.answers.items() if key.task == task)

    def measured(self, task: str) -> list[Ledger]:
        """Ledgers of the answers whose seconds and memory were measured."""
        return [answer.ledger for _, answer in self.of_task(task) if answer.measured]

    def cost(self, answer: Answered) -> Cost:
        ledger = answer.ledger
        operations = None
        if self.sizes is not None and answer.rows:
            operations = flops(
                self.sizes,
                prompt_tokens=ledger.prompt_tokens,
                rows=[row.num_tokens for row in answer.rows],
                reward_tokens=ledger.reward_tokens,
            )
        return Cost(ledger.prompt_tokens, ledger.decode_tokens, ledger.reward_tokens, operations)


class Cost(NamedTuple):
    """Of one answer."""

    prompt_tokens: int
    decode_tokens: int
    reward_tokens: int
    flops: float | None


@dataclass(frozen=True)
class PageData:
    """All that is on a page."""

    methods: Sequence[Method]
    prompts: Mapping[Key, str]
    """Prompt -> its text (empty where no record has it), in the order of the first run that answered it."""
    remarks: Sequence[str]
    """What is missing from it, and why."""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(key.task for key in self.prompts))

    @property
    def metrics(self) -> list[Metric]:
        found = dict.fromkeys(metric for method in self.methods for metric in method.metrics)
        return sorted(found, key=lambda metric: (self.tasks.index(metric.task), metric.name != REWARD))


def read(runs: Sequence[Run]) -> PageData:
    """Raises:
    ConfigError: no rows are recorded; no two of several runs answered a common prompt; a journal is damaged or newer.
    """
    shorts = short_names(runs)
    methods: list[Method] = []
    prompts: dict[Key, str] = {}
    remarks: list[str] = []
    for run, short in zip(runs, shorts, strict=True):
        texts, answers, told = _answers_of(run)
        remarks += [f"{run.name}: {text}" for text in told]
        methods.append(Method(run, short, _family(run), answers, _sizes(run)))
        for key in answers:
            prompts[key] = prompts.get(key) or texts.get(key, "")
    if not any(answer.rows for method in methods for answer in method.answers.values()):
        raise ConfigError(
            "no rows are recorded in these runs, and a page shows rows.",
            hint="`specrej-eval run` keeps them; for lm_eval, add journal=FILE.jsonl to --model_args and run it again "
            "(without --html, `report` needs none).",
        )
    with_answers = [method for method in methods if method.answers]
    if len(with_answers) > 1 and not _some_pair(with_answers):
        names = "; ".join(f"{method.run.name} (task {next(iter(method.answers)).task})" for method in with_answers)
        raise ConfigError(
            f"no two of these runs answered a common prompt, so nothing can be held against anything: {names}.",
            hint="make a page for each, or name runs of the same task and prompts.",
        )
    return PageData(methods, prompts, remarks)


def _some_pair(methods: Sequence[Method]) -> bool:
    times = Counter(key for method in methods for key in method.answers)
    return max(times.values(), default=0) > 1


def _family(run: Run) -> str:
    strategy = run.arguments.get("strategy")
    return "best_of_n" if strategy == "best_of_n" else "rejecting" if strategy else "other"


def short_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run that is short enough for a chart, and that no other has."""
    found = []
    for run in runs:
        strategy, n, alpha = (run.arguments.get(name) for name in ("strategy", "n", "alpha"))
        if strategy == "best_of_n":
            name = "sampling" if n == 1 else f"Best-of-{n}"
        elif strategy == "speculative_rejection":
            name = f"SpecRej \N{GREEK SMALL LETTER ALPHA}={alpha} n={n}"
        else:
            name = run.label
        rest = run.name.removeprefix(run.label)
        found.append(f"{name}{rest}" if run.name.startswith(run.label) else run.name)
    twice = Counter(found)
    return [run.name if twice[name] > 1 else name for run, name in zip(runs, found, strict=True)]


def _sizes(run: Run) -> Sizes | None:
    """What the run's description says of its models (``Engine.describe``)."""
    told = object_or_empty(run.hardware)
    names = ("parameters", "layers", "attention_width", "reward_parameters")
    known = {name: told[name] for name in names if isinstance(told.get(name), int)}
    return Sizes(**known) if known.get("parameters") and known.get("reward_parameters") is not None else None


Found = tuple[dict[Key, str], dict[Key, Answered], list[str]]
"""Texts of prompts, answers, remarks."""


def _answers_of(run: Run) -> Found:
    if run.kind == "lm-eval":
        return _of_lm_eval(run)
    return _of_folder(run)


def _of_folder(run: Run) -> Found:
    """A folder of `specrej-eval run` or of alpaca_eval."""
    prefix = next(prefix for name, prefix in RUN_FILES.items() if (run.path / name).is_file())
    store = OutputsFolder(run.path, prefix=prefix)
    record = store.record()
    assert record is not None, f"{run.path} was read a moment ago"
    given = record.arguments.get("journal")
    places = [store.trajectories_file, *([Path(given)] if isinstance(given, str) else [])]
    entries = _entries(places)
    task = run.scores[0].task if run.scores else ""
    texts, answers = {}, {}
    known = store.answers()
    scores = _scores_of(run, task, known)
    for answer in known:
        key = Key(task, answer.prompt_hash, answer.repeat)
        texts[key] = answer.instruction
        if (entry := entries.get(answer.key)) is None:
            answers[key] = Answered.of_answer(answer, scores[answer.key])
        else:
            answers[key] = Answered.of_result(entry.result, scores[answer.key])
    return texts, answers, _lacking(sum(answer.key in entries for answer in known), len(answers))


def _scores_of(run: Run, task: str, answers: Sequence[Answer]) -> dict[str, dict[Metric, float]]:
    """Key of an answer -> what is said of it: by the task and the judge of a comparison, by alpaca_eval's judges."""
    found: dict[str, dict[Metric, float]] = {answer.key: {} for answer in answers}
    for score in run.scores:
        if score.task == task and score.metric != REWARD:
            for answer in answers:
                if (value := score.each.get(f"{answer.prompt_hash} {answer.repeat}")) is not None:
                    found[answer.key][Metric(task, score.metric, score.filter)] = value
    for judge, preferred in alpaca_eval_files.preferred(run.path, run.model).items():
        for answer in answers:
            if (value := preferred.get((answer.instruction, answer.output.strip()))) is not None:
                found[answer.key][Metric(task, WIN_RATE, judge)] = value
    return found


def _lacking(recorded: int, answers: int) -> list[str]:
    if recorded == answers:
        return []
    if not recorded:
        return ["its rows are not recorded, only its answers"]
    return [f"rows are recorded of {recorded:,} of {counted(answers, 'answer')}"]


def _entries(places: Sequence[Path]) -> dict[str, journal.Entry]:
    """Everything in some journals and in those that other processes wrote beside them, by key; the first counts."""
    found: dict[str, journal.Entry] = {}
    for place in places:
        for path in files(place):
            contents = journal.read(path)
            if contents.scan.damaged:
                raise ConfigError(
                    f"{str(path)!r} has {counted(len(contents.scan.damaged), 'damaged line')}.",
                    hint="run the command that made it again: it sets them aside and decodes those answers again.",
                )
            for key, entry in contents.entries.items():
                found.setdefault(key, entry)
    return found


def _of_lm_eval(run: Run) -> Found:
    results = lm_eval_files.read_results(run.path)
    assert results is not None, f"{run.path} was read a moment ago"
    documents = {task: list(results.documents(task)) for task in sorted(run.tasks)}
    place = object_or_empty(results.block.get("arguments")).get("journal")
    if not isinstance(place, str):
        return {}, {}, ["its rows are not recorded (no journal=)"] if results.block else []
    entries = _entries(_journals(place, run.path))
    if not entries:
        return {}, {}, ["the journal with its rows is not where it was written, nor beside the results"]
    wanted = {task: told.get("resolved") for task, told in object_or_empty(results.block.get("per_task")).items()}
    asked = object_or_empty(results.block.get("arguments"))
    found: dict[Key, GenerationResult] = {}
    for entry in entries.values():
        result = entry.result
        if result.task in wanted and _same(result.resolved, object_or_empty(wanted[result.task]), asked):
            found.setdefault(Key(result.task, result.prompt_hash, result.repeat), result)
    texts: dict[Key, str] = {}
    answers: dict[Key, Answered] = {}
    for task, asked_for in documents.items():
        seen: Counter[str] = Counter()
        times = Counter(document.prompt_hash for document in asked_for)
        drawn = Counter(key.prompt_hash for key in found if key.task == task)
        for document in asked_for:
            key = Key(task, document.prompt_hash, seen[document.prompt_hash])
            seen[document.prompt_hash] += 1
            if key in found:
                texts[key] = document.prompt or ""
                # scores belong to documents: where one has several draws, nothing says which of them they are of
                told = document.scores if times[document.prompt_hash] == drawn[document.prompt_hash] else {}
                scores = {Metric(task, name, filter_name): value for (name, filter_name), value in told.items()}
                answers[key] = Answered.of_result(found[key], scores)
        if not asked_for:  # no samples were logged
            ours = {key: result for key, result in found.items() if key.task == task}
            answers |= {key: Answered.of_result(ours[key], {}) for key in sorted(ours)}
    in_all = sum(len(asked_for) for asked_for in documents.values())
    return texts, answers, _lacking(len(answers), max(in_all, len(answers)))


def _same(ours: Mapping[str, Any], wanted: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a row was drawn with a run's arguments, as they came to be for its task."""
    skipped = {*_OF_ONE_PROMPT, *(["n"] if asked.get("n") == MAX else [])}
    return bool(wanted) and all(ours.get(name) == value for name, value in wanted.items() if name not in skipped)


def _journals(place: str, results: Path) -> list[Path]:
    """Where a journal may be: where it was written, or beside its results (of a folder that was moved)."""
    return list(dict.fromkeys([Path(place), *(folder / Path(place).name for folder in results.parents[:3])]))
