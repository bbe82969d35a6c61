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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrej_eval.answering import answer
from specrej_eval.api import RunPlan
from specrej_eval.commands.compare.sources import Source
from specrej_eval.core import GenerationResult, Ledger, Question, Spent
from specrej_eval.errors import ConfigError, LimitReached, SpecRejError
from specrej_eval.evidence.comparison import Cell, begins_as
from specrej_eval.evidence.methods import BEST_OF_N, Method
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.records import journal, parts
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.cell_scores import METRICS, PREFERENCES, CellMetrics, versioned
from specrej_eval.records.fingerprint import differences, same
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.records.run_names import default_name

if TYPE_CHECKING:
    from specrej_eval.engines.base import Engine
    from specrej_eval.rewards.base import RewardModel

logger = logging.getLogger(__name__)


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
    _started: float = 0.0
    """When the first cell began (``time.perf_counter``), as ``max_seconds`` counts."""
    _tokens: int = 0
    """Decoded by now, as ``max_decode_tokens`` counts."""
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
        for name in (METRICS, PREFERENCES):
            versioned(store.path / name)
        if before is None or self.anew:
            return False
        record = self.record_of(place)
        if not same(before.fingerprint, record.fingerprint):
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
            ConfigError, PromptError, RewardError, OutOfMemoryError, LimitReached: answers finished before are kept.
        """
        store, record = place.store, self.record_of(place)
        store.begin(record, going_on=not self.anew, delete=self.anew, to_start_over="add --force")
        if self.anew:
            for path in (*parts.files(store.trajectories_file), *_scores_of(store)):
                path.unlink()
        with store.unless_refused():
            new = self._models is None
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
            if new:
                _warm_up(generator, requests[0])
                self._started = time.perf_counter()
            spent = Spent()
            generator.started = self._started  # limits are of the whole comparison
            generator.spent_before = self._tokens
            try:
                with_rows = self._decode(place, generator, requests, store, spent)
            except LimitReached as error:
                record.stopped = error.limit
                store.write_record(record)
                store.close()
                raise
            self._tokens += generator.totals.decode_tokens + generator.totals.audit_tokens
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

        def answered(by: Generator, part: slice) -> None:
            asked, work = self.questions[part], requests[part]
            shown = place.method == self.pool
            before = part.start or 0
            answer(by, asked, work, store=store, spent=spent, progress=shown, summary=False, before=before)

        # in every cell these prompts are in flight together, and no others: else their seconds would not compare
        first, rest = slice(0, self.timed), slice(self.timed, None)
        answered(generator, first)
        pool = self._pools.get(place.seed) if self._may_take_rows(place, generator) else None
        if pool is None or not self._same_rows(place, pool, requests[first]):
            answered(generator, rest)
            return 0
        from specrej_eval.engines.recorded import RecordedEngine

        again = copy.copy(generator)
        again.totals = Ledger()  # nothing is decoded: of these tokens there is no limit
        again.config = generator.config.replace(max_decode_tokens=None)
        again.engine = RecordedEngine(
            pool, text=engine.detokenizer, promises=engine.promises, max_length=engine.max_length
        )
        answered(again, rest)
        return len(requests[rest])

    def _may_take_rows(self, place: Place, generator: Generator) -> bool:
        """Whether rows of the pool can be those that a cell would decode."""
        config, reward = generator.config, generator.reward
        if place.method == self.pool or place.method.n > self.pool_rows or generator.engine.promises != "bits":
            return False
        if reward.needs_logprobs or reward.needs_token_stats or config.logprobs or config.score_every:
            return False
        return not config.audit and not config.variance_reduce  # rows go on that were cut; rows depend on n

    def _same_rows(self, place: Place, pool: Mapping[Any, GenerationResult], done: Sequence[Request]) -> bool:
        """Whether the rows that were decoded for a cell are those of the pool."""
        for result in results_of(place.store, [request.key for request in done]):
            whole = pool[(result.task, result.prompt_hash, result.repeat)]
            rows = zip(result.trajectories, whole.trajectories, strict=False)
            if not all(begins_as(row, other) for row, other in rows):
                logger.warning(
                    "%s: rows decoded for it differ from those of %s, so all of it is decoded.",
                    place.told,
                    self.pool_name,
                )
                return False
        return True

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


def _warm_up(generator: Generator, request: Request) -> None:
    """Answer a prompt and forget it: the first steps take longer than any other, and are to be in no cell's seconds."""
    config = generator.config.replace(journal=None, trace_path=None, max_seconds=None, max_decode_tokens=None)
    for _ in Generator(engine=generator.engine, reward=generator.reward, config=config).run([request], progress=False):
        pass


def _scores_of(store: OutputsFolder) -> list[Path]:
    """What was said of answers that are deleted."""
    return [path for name in (METRICS, PREFERENCES) if (path := store.path / name).is_file()]


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
    results, path = results_of(place.store), place.store.path
    rows = place.method.n if is_pool and all(len(each.trajectories) == place.method.n for each in results) else 0
    scored_by = source.scored_by()
    answers = [result.text for result in results]
    found = CellMetrics.read(path, answers, results=results, scored_by=scored_by)
    if found is None or len(found.rows) < rows:
        best = source.metrics([result.best for result in results])
        of_rows = [source.metrics([result.trajectories[row] for result in results]) for row in range(rows)]
        found = CellMetrics(best, of_rows, dict(source.higher_is_better))
        found.write(path, results, scored_by=scored_by)
    source.higher_is_better.update(found.higher_is_better or {})
    return Cell(
        method=place.method,
        seed=place.seed,
        results=results,
        metrics=found.best,
        row_metrics=found.of_rows(),
        path=place.below,
    )


def pool_of(methods: Sequence[Method]) -> Method | None:
    """Best-of-N with most rows; None where the grid has none."""
    of_best = [method for method in methods if method.strategy == BEST_OF_N]
    return max(of_best, key=lambda method: method.n, default=None)
