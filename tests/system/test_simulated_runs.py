"""The real generator on simulated processes: many prompts in flight, resumes, memory-sized runs, bad rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.properties import PROMPT_TOKENS, cases
from support.simulated import (
    Process,
    SimulatedEngine,
    SimulatedReward,
    make_generator,
    request,
    run_directly,
    run_generator,
)

from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.generator import Generator
from specrej_eval.records.journal import Journal
from specrej_eval.records.parts import rank_path


def config(**args) -> RunConfig:
    return RunConfig.from_args(args)[0]


def told(result: GenerationResult) -> dict[str, Any]:
    """A result without the clock."""
    data = result.to_dict()
    del data["ledger"]["seconds"]
    return data


@pytest.mark.parametrize("strategy", ["speculative_rejection", "best_of_n"])
@given(case=cases(alphas=st.sampled_from(["0", "0.1", "0.5", "0.75", "0.9"])))
def test_the_generator_does_what_the_strategy_says_and_nothing_else(strategy, case):
    settings = case.config(strategy=strategy)
    alone, whole = run_directly(settings, case.process()), run_generator(settings, case.process())
    assert whole.trajectories == alone.trajectories
    assert (whole.best, whole.rounds) == (alone.best, alone.rounds)
    counts = ["prompt_tokens", "decode_tokens", "reward_tokens", "reward_calls", "rows_started", "rows_finished"]
    assert [getattr(whole.ledger, name) for name in counts] == [getattr(alone.ledger, name) for name in counts]


@given(
    several=st.lists(cases(alphas=st.sampled_from(["0", "0.25", "0.5", "0.9"])), min_size=2, max_size=5),
    batch_size=st.integers(1, 6),
    data=st.data(),
)
def test_a_prompts_result_depends_on_no_other_prompt_nor_on_order_nor_on_batch_size(several, batch_size, data):
    processes = {f"prompt {number}": case.process() for number, case in enumerate(several)}
    requests = [request(case.config(), says) for case, says in zip(several, processes, strict=True)]
    alone = [
        told(result)
        for item, says in zip(requests, processes, strict=True)
        for _, result in make_generator({says: processes[says]}, item.config).run([item], progress=False)
    ]
    order = data.draw(st.permutations(range(len(several))))
    generator = make_generator(processes, config(batch_size=batch_size))
    together = dict(generator.run([requests[place] for place in order], progress=False))
    assert sorted(together) == list(range(len(several))), "each request is answered once"
    for position, place in enumerate(order):
        assert told(together[position]) == alone[place], (
            f"prompt {place}, answered in position {position} with up to {batch_size} in flight, got another result "
            f"than alone; rows, ends and rewards are the same by construction"
        )
    assert generator.engine.most_in_flight <= batch_size, "batch_size bounds the prompts in flight"
    assert generator.totals.decode_tokens == sum(result["ledger"]["decode_tokens"] for result in alone)


def twenty_prompts() -> dict[str, Process]:
    """Deterministic, each with other ends and rewards."""

    def process(number: int) -> Process:
        return Process(
            length=lambda row: 3 + (row * 7 + number * 5) % 40,
            partial=lambda row, tokens: float((row * 31 + tokens * 17 + number * 13) % 101),
            final=lambda row: float((row * 37 + number * 11) % 103),
        )

    return {f"prompt {number}": process(number) for number in range(20)}


def test_a_run_killed_half_way_and_resumed_gives_the_results_of_an_unbroken_run(tmp_path):
    processes = twenty_prompts()
    settings = config(n=8, max_gen_toks=32, batch_size=3)
    requests = [request(settings, says) for says in processes]
    unbroken = {index: told(result) for index, result in make_generator(processes, settings).run(requests)}

    journalled = settings.replace(journal=str(tmp_path / "journal.jsonl"))
    first = make_generator(processes, journalled)
    answers = first.run(requests, progress=False)
    done = [next(answers)[0] for _ in range(7)]
    answers.close()  # the kill: generators in flight are dropped
    assert all(session.closed for session in first.engine.sessions), "what was in flight gives its memory back"

    second = make_generator(processes, journalled)
    resumed = {index: told(result) for index, result in second.run(requests, progress=False)}
    assert resumed == unbroken
    assert len(second.engine.sessions) == len(requests) - len(done), "what was finished is not decoded again"


def answered_by(
    path: Path, says: Sequence[str], *, ranks: int, killed_after: int | None = None
) -> tuple[dict[str, Any], int]:
    """A run of several processes, one after another, each with a journal of its own: answers, and how many it drew.

    Args:
        killed_after: so many answers of each.
    """
    processes = twenty_prompts()
    answers: dict[str, Any] = {}
    drawn = 0
    for rank in range(ranks):
        share = says[rank::ranks]
        settings = config(n=8, max_gen_toks=32, batch_size=1, journal=rank_path(str(path), rank, ranks))
        generator = make_generator(processes, settings)
        running = generator.run([request(settings, text) for text in share], progress=False)
        for index, result in itertools.islice(running, killed_after):
            answers[share[index]] = told(result)
        running.close()
        drawn += len(generator.engine.sessions)
    return answers, drawn


ASKED = {"the same": slice(None), "fewer": slice(3), "turned": slice(None, None, -1), "others": slice(8, None)}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (4, 1), (2, 2)])
@pytest.mark.parametrize("killed_after", [None, 2])
def test_another_number_of_processes_draws_nothing_again(ranks, asked, killed_after, tmp_path, caplog, counted):
    names = list(twenty_prompts())
    path = tmp_path / "run.jsonl"
    first, drawn = answered_by(path, names[:12], ranks=ranks[0], killed_after=killed_after)
    assert drawn == len(first)
    files = {file: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    wanted = names[ASKED[asked]]
    second, drawn = answered_by(path, wanted, ranks=ranks[1])
    assert drawn == len(set(wanted) - first.keys()), "what another process had finished is decoded again"
    assert {name: second[name] for name in set(wanted) & first.keys()} == {
        name: first[name] for name in set(wanted) & first.keys()
    }
    assert all(file.read_bytes().startswith(content) for file, content in files.items())
    third, drawn = answered_by(path, names, ranks=ranks[0])
    assert drawn == len(set(names) - first.keys() - second.keys())
    assert {**first, **second}.items() <= third.items()
    if ranks[0] != ranks[1]:
        assert "written by a run with a different number of processes" in caplog.text
    counted("second commands", 2)


def test_a_file_beside_a_journal_that_is_of_another_run_is_refused_and_one_that_is_none_left_out(tmp_path, caplog):
    names = list(twenty_prompts())[:4]
    path = tmp_path / "run.jsonl"
    (tmp_path / "run_rank0.jsonl").write_text("notes of mine\n")
    (tmp_path / "run_ranking.jsonl").write_text("notes of mine\n")
    _, drawn = answered_by(path, names, ranks=1)
    assert drawn == 4 and caplog.text.count("notes") == 0 and "run_rank0.jsonl is not used" in caplog.text
    (tmp_path / "elsewhere").mkdir()
    Journal(str(tmp_path / "elsewhere" / "run.jsonl"), {"pretrained": "org/another"}).close()
    (tmp_path / "elsewhere" / "run.jsonl").rename(tmp_path / "run_rank1.jsonl")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"run_rank1.jsonl' was started with a different configuration"):
        answered_by(path, names, ranks=1)
    assert path.read_bytes() == before


def test_what_memory_held_is_taken_from_another_process_that_has_answered(tmp_path):
    settings = config(n="max", max_gen_toks=32)
    prompts = twenty_prompts()
    requests = [request(settings, says) for says in list(prompts)[:2]]
    rows = []
    for rank, capacity in ((0, 150), (1, 400)):
        journalled = settings.replace(journal=rank_path(str(tmp_path / "run.jsonl"), 0, 2 - rank))
        generator = make_generator(prompts, journalled)
        generator.engine.capacity = capacity
        rows.append([len(result.trajectories) for _, result in generator.run(requests[rank:][:1], progress=False)])
    assert rows[0] == rows[1]


def test_another_seed_gives_another_run_and_the_same_seed_the_same():
    def process_of(says: str, seed: int) -> Process:
        return Process(
            length=lambda row: 5 + (row * 13 + seed * 7) % 29,
            partial=lambda row, tokens: float(row),
            final=lambda row: float(row),
        )

    def run(seed: int) -> dict[str, Any]:
        settings = config(n=8, max_gen_toks=32, seed=seed)
        engine = SimulatedEngine(process_of)
        generator = Generator(
            engine=engine, reward=SimulatedReward(lambda says: process_of(says, seed)), config=settings
        )
        ((_, result),) = generator.run([request(settings)], progress=False)
        return told(result)

    assert run(1) == run(1)
    assert run(1)["trajectories"] != run(2)["trajectories"]


def test_n_max_takes_what_memory_holds_and_records_it():
    process = Process.of([float(row) for row in range(200)])
    settings = config(n="max", max_gen_toks=64)
    engine = SimulatedEngine(lambda says, seed: process, capacity=PROMPT_TOKENS + 800)
    generator = Generator(engine=engine, reward=SimulatedReward(lambda says: process), config=settings)
    ((_, result),) = generator.run([request(settings)], progress=False)
    assert result.resolved["n"] == result.ledger.rows_started == 100
    assert (result.resolved["first_look"], result.resolved["kv_budget_tokens"]) == (8, PROMPT_TOKENS + 800)


def test_the_recorded_numbers_repeat_the_run():
    process = twenty_prompts()["prompt 3"]
    for settings in (
        config(max_gen_toks=48),
        config(n=6, kv_budget_tokens=PROMPT_TOKENS + 100, max_gen_toks=48),
        config(first_look=7, kv_budget_tokens=PROMPT_TOKENS + 100, max_gen_toks=48),
        config(max_gen_toks=3),
    ):
        first = run_generator(settings, process)
        numbers = {name: first.resolved[name] for name in ("n", "first_look", "kv_budget_tokens")}
        assert first.rounds[0].tokens == numbers["first_look"] or first.rounds[0].kept == 0
        assert told(run_generator(settings.replace(**numbers), process)) == told(first)


def test_a_budget_no_prompt_fits_is_refused_before_anything_is_decoded():
    processes = twenty_prompts()
    fine, bad = config(max_gen_toks=32), config(kv_budget_tokens=PROMPT_TOKENS + 31, max_gen_toks=32)
    generator = make_generator(processes, fine)
    with pytest.raises(ConfigError, match="too few for one row of max_gen_toks=32"):
        list(generator.run([request(fine, "prompt 0"), request(bad, "prompt 1")], progress=False))
    assert not generator.engine.sessions


def with_bad_scores(process: Process, bad: dict[int, float]) -> Process:
    return replace(
        process,
        partial=lambda row, tokens: bad.get(row, process.partial(row, tokens)),
        final=lambda row: bad.get(row, process.final(row)),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_the_row(value):
    process = with_bad_scores(Process.of([1.0, 2.0, 3.0, 4.0]), {2: value})
    with pytest.raises(RewardError, match="row 2") as caught:
        run_generator(config(n=4, max_gen_toks=16), process)
    assert "on_nan=drop" in caught.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_on_nan_drop_ranks_the_row_last_and_counts_it(value, alpha):
    process = with_bad_scores(Process.of([1.0, 2.0, 3.0, 4.0]), {3: value})
    result = run_generator(config(n=4, max_gen_toks=16, alpha=alpha, on_nan="drop"), process)
    assert result.best.row == 2
    assert result.trajectories[3].reward is None
    assert result.nan_rewards == 1


def test_when_no_reward_is_finite_the_first_finished_row_is_returned():
    process = with_bad_scores(Process.of([1.0] * 4), dict.fromkeys(range(4), math.nan))
    result = run_generator(config(n=4, max_gen_toks=16, on_nan="drop"), process)
    assert (result.best.row, result.best.reward, result.best.finish_reason) == (0, None, "length")
