"""The cells of a comparison: each a folder as `specrej-eval run` writes it, decoded once, gone on from where it ended.

The cell of Best-of-N with most rows is decoded whole. Of every other cell the first prompts are (they alone say what it
takes in seconds and memory); the rest takes its rows from that first cell, since a row's tokens are a function of
(seed, prompt, row). The loop, the strategy and the reward model are the real ones all the same. That the rows are the
same is checked on the prompts that were decoded for real; where one differs, or an engine does not promise the same
bits, the whole cell is decoded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrej_eval.answering import answer
from specrej_eval.api import RunPlan
from specrej_eval.checked import a_list, an_object, as_number
from specrej_eval.commands.compare.sources import Source
from specrej_eval.core import GenerationResult, Question, Spent
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.evidence.comparison import Cell, begins_as
from specrej_eval.evidence.methods import BEST_OF_N, Method
from specrej_eval.generator import Generator, Request
from specrej_eval.records import journal, parts
from specrej_eval.records.fingerprint import same
from specrej_eval.records.jsonl import as_text, digest, parsed, write_atomically
from specrej_eval.records.outputs import Answer, OutputsFolder, RunRecord
from specrej_eval.records.run_names import default_name

if TYPE_CHECKING:
    from specrej_eval.engines.base import Engine
    from specrej_eval.rewards.base import RewardModel

logger = logging.getLogger(__name__)

METRICS = "specrej_metrics.json"
METRICS_VERSION = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where one method on one seed lies."""

    method: Method
    seed: int
    root: Path

    @property
    def below(self) -> str:
        return f"cells/{self.method.name}/seed{self.seed}"

    @property
    def store(self) -> OutputsFolder:
        return OutputsFolder(self.root / self.below)

    @property
    def told(self) -> str:
        return f"{self.method.label}, seed {self.seed}"


@dataclass(slots=True)
class Decoder:
    """Decodes cells with models that are loaded once.

    Args:
        plan: with the arguments that all cells have.
        timed: prompts of each cell that are decoded for it alone.
        for_pool: arguments of the cell of Best-of-N with most rows alone (``score_every``, ``logprobs``).
    """

    source: Source
    plan: RunPlan
    questions: Sequence[Question]
    timed: int
    arguments: Mapping[str, Any]
    anew: bool = False
    for_pool: Mapping[str, Any] = field(default_factory=dict)
    pool: Method | None = None
    _models: tuple[Engine, RewardModel] | None = None
    _of_models: Mapping[str, Any] | None = None
    _pools: dict[int, dict[tuple[str, str, int], GenerationResult]] = field(default_factory=dict)

    def plan_of(self, place: Place) -> RunPlan:
        own = self.for_pool if place.method == self.pool else {}
        journal_file = str(place.store.trajectories_file)
        return self.plan.replace(**place.method.arguments, **own, seed=place.seed, journal=journal_file)

    def record_of(self, place: Place) -> RunRecord:
        plan = self.plan_of(place)
        fingerprint = plan.fingerprint(**self.source.deciding)
        arguments = {**plan.config.to_dict(), "prompts": self.source.name, **self.arguments}
        return RunRecord(name=default_name(fingerprint), fingerprint=fingerprint, arguments=arguments)

    def check(self, place: Place) -> bool:
        """Whether a cell is complete already.

        Raises:
            ConfigError: its folder belongs to another configuration or prompts, or to a newer version.
        """
        store = place.store
        before = store.record()
        if before is None or self.anew:
            return False
        record = self.record_of(place)
        if not same(before.fingerprint, record.fingerprint):
            from specrej_eval.records.fingerprint import differences

            raise ConfigError(
                f"{str(store.path)!r} holds answers of another configuration: "
                f"{differences(before.fingerprint, record.fingerprint)}. They cannot be paired with these.",
                hint="give this comparison another --output, or delete what is there with --force.",
            )
        if not before.complete:
            return False
        try:
            answers = store.answers()
        except ConfigError:
            raise
        except SpecRejError:  # a line is damaged: to be decoded anew
            return False
        return [item.instruction for item in answers] == [question.instruction for question in self.questions]

    def decode(self, place: Place) -> str:
        """Decode what a cell lacks; says what was done.

        Raises:
            ConfigError, PromptError, RewardError, OutOfMemoryError: answers finished before are kept.
        """
        store, record = place.store, self.record_of(place)
        store.begin(record, going_on=not self.anew, delete=self.anew, to_start_over="add --force")
        if self.anew:
            for path in parts.files(store.trajectories_file):
                path.unlink()
        with store.unless_refused():
            if self._models is None:
                self._models = self.source.load(self.plan)
                self._of_models = self.plan.of_models()
            engine, reward = self._models
            generator = self.plan_of(place).generator(engine, reward, models=self._of_models)
            requests = self.source.requests(engine, self.questions, generator.config)
            record.described = {**generator.describe(), "world_size": 1}
            store.write_record(record)
            keys = {request.key for request in requests}
            store.set_apart(lambda item: item.key in keys)
            spent = Spent()
            with_rows = self._decode(place, generator, requests, store, spent)
        store.close()
        self._finish(place, record, requests, spent, with_rows)
        return f"{len(requests) - with_rows} decoded" + (
            f", {with_rows} from the rows of {self.pool_name}" if with_rows else ""
        )

    @property
    def pool_name(self) -> str:
        return "" if self.pool is None else self.pool.label

    @property
    def models(self) -> tuple[Engine, RewardModel] | None:
        """Once a cell was decoded."""
        return self._models

    def _decode(
        self, place: Place, generator: Generator, requests: Sequence[Request], store: OutputsFolder, spent: Spent
    ) -> int:
        """How many answers were made from another cell's rows."""
        engine = generator.engine
        engine.reset_peak()
        first = slice(0, min(self.timed, len(requests)))
        rest = slice(first.stop, len(requests))

        def answered(by: Generator, part: slice) -> None:
            shown = place.method == self.pool
            answer(by, self.questions[part], requests[part], store=store, spent=spent, progress=shown, summary=False)

        answered(generator, first)
        pool = self._usable_pool(place, generator, requests[first])
        if pool is None:
            answered(generator, rest)
            return 0
        from specrej_eval.engines.recorded import RecordedEngine

        again = copy.copy(generator)
        again.engine = RecordedEngine(
            pool, text=engine.detokenizer, promises=engine.promises, max_length=engine.max_length
        )
        answered(again, rest)
        return len(requests[rest])

    def _usable_pool(
        self, place: Place, generator: Generator, done: Sequence[Request]
    ) -> dict[tuple[str, str, int], GenerationResult] | None:
        """Rows that stand for those the cell would decode; None where there are none, or they would not be the same."""
        reward = generator.reward
        pool = self._pools.get(place.seed)
        if pool is None or place.method == self.pool or place.method.n > self.pool_rows:
            return None
        if generator.engine.promises != "bits" or reward.needs_logprobs or reward.needs_token_stats:
            return None
        if generator.config.logprobs or generator.config.score_every:
            return None
        if generator.config.audit or generator.config.variance_reduce:  # rows go on that were cut; rows depend on n
            return None
        for result in results_of(place.store, [request.key for request in done]):
            whole = pool[(result.task, result.prompt_hash, result.repeat)]
            rows = zip(result.trajectories, whole.trajectories, strict=False)
            if not all(begins_as(row, other) for row, other in rows):
                logger.warning(
                    "%s: rows decoded for it differ from those of %s, so all of it is decoded.",
                    place.told,
                    self.pool_name,
                )
                return None
        return pool

    @property
    def pool_rows(self) -> int:
        return 0 if self.pool is None else self.pool.n

    def use_as_pool(self, place: Place) -> None:
        """The rows of a complete cell may stand for those of others on its seed, from now on; those of other seeds are
        let go."""
        results = results_of(place.store)
        self._pools.clear()
        self._pools[place.seed] = {(result.task, result.prompt_hash, result.repeat): result for result in results}

    def _finish(
        self, place: Place, record: RunRecord, requests: Sequence[Request], spent: Spent, with_rows: int
    ) -> None:
        store = place.store
        answers: list[Answer] = []
        for question, request in zip(self.questions, requests, strict=True):
            found = store.get(request.key)
            assert found is not None, f"{question.name} was not recorded"
            answers.append(replace(found, index=question.index, fields=dict(question.fields)))
        store.merge_parts(answers)
        store.mark_complete(record, answers, spent)
        if with_rows:  # a sum over answers of which most were not decoded is nobody's
            record.totals |= {"seconds": None, "peak_bytes": None}
            store.write_record(record)


def results_of(store: OutputsFolder, keys: Sequence[str] | None = None) -> list[GenerationResult]:
    """Finished requests of a cell, with their rows, in the order of its answers (or of ``keys``).

    Raises:
        SpecRejError: one is not there, or damaged.
    """
    contents = journal.read(str(store.trajectories_file))
    wanted = [item.key for item in store.answers()] if keys is None else keys
    if lost := [key for key in wanted if key not in contents.entries]:
        raise SpecRejError(
            f"{store.trajectories_file} lacks the rows of {len(lost)} of {len(wanted)} answers.",
            hint="run the command again with --force: the cell is decoded anew.",
        )
    return [contents.entries[key].result for key in wanted]


def read_cell(place: Place, source: Source, *, is_pool: bool) -> Cell:
    """A complete cell, with what its task says of its answers.

    Args:
        is_pool: metrics of all rows are wanted.
    """
    results = results_of(place.store)
    wanted = [[result.best for result in results]]
    if is_pool and all(len(result.trajectories) == place.method.n for result in results):
        wanted += [[result.trajectories[row] for result in results] for row in range(place.method.n)]
    path = place.store.path / METRICS
    texts = digest({"texts": [[row.text for row in rows] for rows in wanted]})
    known, better = _known_metrics(path, texts)
    source.higher_is_better.update(better)
    if known is None:
        known = [source.metrics(rows) for rows in wanted]
        told = {"schema_version": METRICS_VERSION, "of": texts, "higher_is_better": dict(source.higher_is_better)}
        write_atomically(path, as_text({**told, "best": known[0], "rows": known[1:]}) + "\n")
    of_rows: dict[str, list[list[float]]] = {}
    if len(known) > 1:
        for name in known[1]:
            of_rows[name] = [list(of_prompt) for of_prompt in zip(*(row[name] for row in known[1:]), strict=True)]
    return Cell(
        method=place.method,
        seed=place.seed,
        results=results,
        metrics=known[0],
        row_metrics=of_rows,
        path=place.below,
    )


def _known_metrics(path: Path, texts: str) -> tuple[list[dict[str, list[float]]] | None, Mapping[str, bool]]:
    """Those on file, if they are of these very texts, and whether more is better."""
    try:
        told = an_object(parsed(path.read_bytes()), "metrics")
        if told.get("of") != texts or told.get("schema_version") != METRICS_VERSION:
            return None, {}
        better = {name: bool(more) for name, more in an_object(told["higher_is_better"], "higher_is_better").items()}
        known = [
            {name: [as_number(value, name) for value in values] for name, values in an_object(each, "metrics").items()}
            for each in (told["best"], *a_list(told, "rows"))
        ]
        return known, better
    except (OSError, ValueError, KeyError):
        return None, {}


def pool_of(methods: Sequence[Method]) -> Method | None:
    """Best-of-N with most rows, where no method of the grid has more."""
    of_best = [method for method in methods if method.strategy == BEST_OF_N]
    return max(of_best, key=lambda method: method.n, default=None)
