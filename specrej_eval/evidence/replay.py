"""What another strategy, alpha, n or selector would have answered with the rows of a recorded run: no model is loaded.

The run is one of Best-of-N (every row to its end), with ``score_every``: each row carries its scores on the way. The
real loop and the real strategies go over them; only rows and scores come from records. Where a strategy looks between
two recorded scores, the last one before counts, and ``Replayed.looks_between`` says how often: with ``score_every=1``
never, and then everything but seconds is what a run would have given. With no score before at all, the row's first one
counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, Message, Prompt, RowView, Trajectory
from specrej_eval.engines.base import Promise
from specrej_eval.errors import ConfigError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.rewards.base import RewardModel

OWN = "own"
"""Role of the only message of a replayed prompt: its content names the record."""


@dataclass(slots=True)
class Replayed:
    """Answers of a simulated run, in the order of its source."""

    results: list[GenerationResult]
    scores_between: int = 0
    """Scores asked for where none was recorded: the last one before was taken."""
    scores_asked: int = 0
    """Scores of unfinished rows that were asked for in all."""


class RecordedReward(RewardModel):
    """Scores out of records, by the tokens a row has."""

    name = "recorded"

    def __init__(self, recorded: Mapping[str, GenerationResult]) -> None:
        self._recorded = recorded
        self.between = 0
        self.asked = 0

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        source = self._recorded[conversation[-1]["content"]].trajectories
        return [self._score(source[row.row], row) for row in rows]

    def _score(self, source: Trajectory, row: RowView) -> float:
        if row.finished:
            return float("nan") if source.reward is None else source.reward
        self.asked += 1
        known = source.look_scores or []
        tokens = [each for each, _ in known]
        place = bisect_right(tokens, row.num_tokens) - 1
        if place < 0 or tokens[place] != row.num_tokens:
            self.between += 1
        score = known[max(place, 0)][1]
        return float("nan") if score is None else score


def check_scores(results: Sequence[GenerationResult]) -> None:
    """Whether rows carry scores on the way.

    Raises:
        ConfigError: they do not.
    """
    for result in results:
        for row in result.trajectories:
            if not row.look_scores:
                raise ConfigError(
                    "the rows of this run carry no scores on the way: it was made by an older version.",
                    hint="decode it again, with score_every=8 (or 1, for looks at any place).",
                )
            if result.resolved.get("score_every") is None and len(row.look_scores) < 2:
                raise ConfigError(
                    "the rows of this run were scored at their end alone, and a strategy that rejects looks before.",
                    hint="decode it again with score_every=8 (or 1, for looks at any place): same rows, same answers.",
                )


def replay(results: Sequence[GenerationResult], config: RunConfig, *, promises: Promise = "bits") -> Replayed:
    """Answer recorded prompts anew.

    Args:
        results: finished requests of one run.
        config: what to simulate; sampling, seed and ``max_gen_toks`` as in the records.
        promises: of the engine that decoded the rows.

    Raises:
        ConfigError: rows or scores that would be needed are on no record.
    """
    from specrej_eval.engines.recorded import RecordedEngine, place_of

    if config.rejects:
        check_scores(results)
    by_name = {str(number): result for number, result in enumerate(results)}
    reward = RecordedReward(by_name)
    engine = RecordedEngine({place_of(result): result for result in results}, promises=promises)
    generator = Generator(engine=engine, reward=reward, config=config.replace(journal=None, trace_path=None))
    requests = [
        Request(
            prompt=Prompt(
                token_ids=(0,) * result.ledger.prompt_tokens,
                conversation=({"role": OWN, "content": name},),
                prompt_hash=result.prompt_hash,
                task=result.task,
                repeat=result.repeat,
            ),
            config=config.replace(max_gen_toks=result.resolved["max_gen_toks"], seed=result.resolved["seed"]),
            until=tuple(result.resolved.get("until", ())),
        )
        for name, result in by_name.items()
    ]
    found = dict(generator.run(requests, progress=False))
    return Replayed([found[number] for number in range(len(requests))], reward.between, reward.asked)
