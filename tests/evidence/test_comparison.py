"""Methods held against each other, from results made up for it: what cannot be paired, what has no number, and what the
last line says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.page_runs import a_result

from specrej_eval.core import GenerationResult
from specrej_eval.errors import ConfigError
from specrej_eval.evidence.comparison import Cell, compare
from specrej_eval.evidence.methods import Method
from specrej_eval.evidence.tables import as_text, conclusion

QUESTIONS = [f"question {number}" for number in range(12)]
BO, HALF, QUARTER = (
    Method("best_of_n", 6),
    Method("speculative_rejection", 6, 0.5),
    Method("speculative_rejection", 6, 0.25),
)


def cell(method: Method, seed: int = 0, asked: Sequence[str] = QUESTIONS, **more: Any) -> Cell:
    rejects = method.strategy != "best_of_n"
    results = [a_result(question, rejects=rejects, seed=seed) for question in asked]
    return Cell(method=method, seed=seed, results=results, **more)


def with_results(of: Cell, change: Callable[[GenerationResult], GenerationResult], places: Sequence[int]) -> Cell:
    return replace(of, results=[change(r) if place in places else r for place, r in enumerate(of.results)])


def compared(*cells: Cell, **more: Any) -> dict[str, Any]:
    prompts = [{"instruction": question} for question in QUESTIONS]
    return compare(cells, prompts=prompts, resamples=200, **more)


def method_of(report: dict[str, Any], method: Method) -> dict[str, Any]:
    return next(each for each in report["methods"] if each["name"] == method.name)


# what cannot be paired


def test_what_cannot_be_paired_is_refused() -> None:
    for cells, told in (
        ([], "nothing to compare"),
        ([cell(BO), cell(HALF, 1)], "run with seeds"),
        ([cell(BO), cell(BO, 1), cell(HALF)], "SpecRej n=6 alpha=0.5 was run with seeds 0, and others with 0, 1"),
        ([cell(BO), cell(HALF), cell(HALF)], "run with seeds 0, 0"),
        ([cell(BO), cell(HALF, asked=[*QUESTIONS[:-1], "another"])], "answered different prompts"),
        ([cell(BO), cell(HALF, asked=QUESTIONS[::-1])], "answered different prompts"),
        ([cell(BO), cell(HALF, asked=QUESTIONS[:-1])], "answered different prompts"),
    ):
        with pytest.raises(ConfigError, match=told):
            compared(*cells)
    with pytest.raises(ConfigError, match="no method is called 'bo7'"):
        compared(cell(BO), cell(HALF), baseline="bo7")


# what has no number


def test_a_method_without_a_reward_for_a_prompt_has_no_mean_and_no_interval() -> None:
    unscored = with_results(cell(HALF), lambda r: replace(r, best=replace(r.best, reward=None)), [3])
    report = compared(cell(BO), unscored)
    told = method_of(report, HALF)
    assert told["reward"] == {"value": None, "low": None, "high": None} and told["equivalent_n"] is None
    assert told["against"][0]["scores"] == {} and conclusion(report) is None
    assert "-" in as_text(report, [])


def test_a_pool_that_lacks_a_row_or_a_reward_is_none() -> None:
    def less(result: GenerationResult) -> GenerationResult:
        return replace(result, trajectories=result.trajectories[:-1])

    def unscored(result: GenerationResult) -> GenerationResult:
        return replace(result, trajectories=[replace(row, reward=None) for row in result.trajectories])

    for change in (less, unscored):
        report = compared(with_results(cell(BO), change, [5]), cell(HALF))
        assert report["curve"] is None and "equivalent_n" not in method_of(report, HALF)
        assert "improvement_score" not in method_of(report, HALF)["paper"]


def test_off_the_curve_there_is_no_efficiency() -> None:
    whole = compared(cell(BO), cell(HALF))
    assert method_of(whole, HALF)["efficiency"]["decode_tokens"]["value"] > 0
    for reward, equivalent in ((-99.0, {"below": 1}), (99.0, {"at_least": 6})):
        moved = with_results(cell(HALF), lambda r, to=reward: replace(r, best=replace(r.best, reward=to)), range(12))
        told = method_of(compared(cell(BO), moved), HALF)
        assert told["equivalent_n"]["value"] == equivalent
        assert told["efficiency"] == {"decode_tokens": {"value": None, "low": None, "high": None}, "seconds": None}


def test_rows_that_say_the_same_are_one_answer_to_what_was_lost() -> None:
    def same(result: GenerationResult) -> GenerationResult:
        rows = [replace(row, text="7") for row in result.trajectories]
        return replace(result, best=next(row for row in rows if row.row == result.best.row), trajectories=rows)

    def scored(result: GenerationResult) -> GenerationResult:
        rows = [replace(row, reward=1 + 1e-7 * row.row) for row in result.trajectories]
        return replace(result, best=rows[-1], trajectories=rows)

    pool = with_results(with_results(cell(BO), same, range(12)), scored, range(12))
    told = method_of(compared(pool, with_results(cell(HALF), same, range(12))), HALF)
    assert told["best_survived"]["value"] == 1.0 and told["regret"]["value"] == 0.0


def test_seconds_are_compared_on_the_prompts_that_were_decoded_for_both() -> None:
    def borrowed(result: GenerationResult) -> GenerationResult:
        return replace(result, resolved={**result.resolved, "rows_from": "records"})

    def slow(result: GenerationResult) -> GenerationResult:
        return replace(result, ledger=replace(result.ledger, seconds={"decode": 9.0}))

    timed = with_results(cell(HALF), slow, [1, 7])
    report = compared(cell(BO), with_results(timed, borrowed, range(4, 12)))
    ratio = method_of(report, HALF)["against"][0]["cost_ratios"]["seconds"]
    ours, theirs = (sum(result.ledger.total_seconds for result in each.results[:4]) for each in (timed, cell(BO)))
    assert ours > theirs and ratio["prompts"] == 4 and ratio["value"] == pytest.approx(ours / theirs)
    assert method_of(report, HALF)["paper"]["speedup"]["value"] == pytest.approx(theirs / ours)
    none = compared(cell(BO), with_results(timed, borrowed, range(12)))
    assert "seconds" not in method_of(none, HALF)["against"][0]["cost_ratios"]
    assert method_of(none, HALF)["time"] is None


# the last line


def test_methods_are_ranked_by_one_score_that_all_of_them_have() -> None:
    right = {"acc": [1.0, 0.0] * 6}
    report = compared(cell(BO, metrics=right), cell(HALF, metrics=right), cell(QUARTER))
    told = conclusion(report)
    assert told is not None and "of reward (" in told and "points" not in told, "one lacks the metric"
    whole = compared(cell(BO, metrics=right), cell(HALF, metrics=right), cell(QUARTER, metrics=right))
    told = conclusion(whole)
    assert told is not None and "points of acc (" in told and ", the best of 2 that reject rows," in told
    lower = {**whole, "task": {"name": "t", "higher_is_better": {"acc": False}}}
    assert "of reward (" in str(conclusion(lower)), "a metric of which less is better ranks nothing"


@pytest.mark.parametrize(
    "low, high, p_holm, told",
    [
        (-1.0, 3.0, 0.5, "(95 % interval -1 to +3, which includes 0: it may be chance)"),
        (0.5, 3.0, 0.21, "(95 % interval +0.5 to +3, but p is 0.21 after Holm's correction: it may be chance)"),
        (0.5, 3.0, 0.01, "(95 % interval +0.5 to +3)"),
        (None, None, 1.0, "(too few prompts for an interval)"),
    ],
)
def test_the_best_of_several_is_not_taken_for_sure_by_its_own_interval(
    low: float | None, high: float | None, p_holm: float, told: str
) -> None:
    against = {"method": "bo6", "scores": {"reward": {"value": 1.0, "low": low, "high": high, "p_holm": p_holm}}}
    method = {"metrics": {}, "reward": {"value": 2.0}, "costs": {"decode_tokens": {"value": 9.0}}, "cells": []}
    bo = {**method, "name": "bo6", "label": "Best-of-6", "strategy": "best_of_n", "n": 6, "against": []}
    spr = {**method, "name": "s", "label": "S", "strategy": "speculative_rejection", "n": 6}
    spr["against"] = [{**against, "cost_ratios": {}}]
    assert conclusion({"methods": [bo, spr]}) == f"S against Best-of-6: +1 of reward {told}."
