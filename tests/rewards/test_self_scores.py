"""Self-certainty and DeepConf against a plain forward pass over the finished text's token ids, and the floor."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_runs import PROMPTS, SMALL, limit_rows, make_engine
from support.rewards import make_reward
from support.tiny_models import tiny_causal_lm

from specrej_eval.config import RunConfig
from specrej_eval.core import CONFIDENCE_TOKENS, GenerationResult, RowView
from specrej_eval.engines.transformers import token_stats
from specrej_eval.engines.transformers.groups import Group
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.rewards.kinds.self_scores import (
    FLOOR_PENALTY,
    DeepConf,
    Floor,
    Likelihood,
    SelfCertainty,
    lowest_window,
    repetition,
)

NAMES = ["likelihood", "self_certainty", "deepconf"]
ARGUMENTS: dict[str, Any] = {"deepconf_window": 5, "temperature": 0.7, "top_k": 12, "floor_toks": 1}


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # hundreds of failures in here, and there is nothing to free


def run(name: str, *, engine: Any = None, **arguments: Any) -> list[GenerationResult]:
    config, _ = RunConfig.from_args({**SMALL, **ARGUMENTS, "reward_model": name, **arguments})
    generator = Generator(
        engine=engine or make_engine(tiny_causal_lm()), reward=make_reward(config, device="cpu"), config=config
    )
    return generator.generate(PROMPTS, until=["\n\n"])


def recomputed(name: str, prompt: Sequence[int], answer: Sequence[int], window: int = 5) -> float:
    """From the definitions, in float64, over one unpadded sequence read at once."""
    model = tiny_causal_lm()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
    p = logits.softmax(-1)
    if name == "likelihood":
        return float(p.gather(-1, torch.tensor(answer)[:, None]).log().mean())
    if name == "self_certainty":  # -(1/nV) sum_i sum_v log(V p_i(v))
        return float(-(p.shape[-1] * p).log().mean())
    confidence = -p.sort(descending=True).values[:, :20].log().mean(-1)
    if len(answer) <= window:
        return float(confidence.mean())
    return min(float(confidence[start : start + window].mean()) for start in range(len(answer) - window + 1))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_a_plain_forward_pass(name: str) -> None:
    engine = make_engine(tiny_causal_lm())
    results = run(name, engine=engine)
    prompts = [engine.encode(prompt).token_ids for prompt in PROMPTS]
    reasons, spread = set(), []
    for prompt, result in zip(prompts, results, strict=True):
        for row in result.trajectories:
            assert row.reward == pytest.approx(recomputed(name, prompt, row.token_ids), abs=2e-4)
            reasons.add(row.finish_reason)
            spread.append(row.reward)
        finished = [row for row in result.trajectories if row.finish_reason != "rejected"]
        assert result.best.reward == max(row.reward for row in finished)
        assert (result.ledger.reward_tokens, result.ledger.reward_calls) == (0, 0)
    assert {"rejected", "length"} <= reasons
    assert max(spread) - min(spread) > 0.05  # else the comparison says nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most_rows", [1, 3])
def test_numbers_travel_with_their_rows_through_splits(name: str, most_rows: int) -> None:
    want = [result.to_dict()["trajectories"] for result in run(name)]
    engine = make_engine(tiny_causal_lm())
    limit_rows(engine, most_rows)
    got = [result.to_dict()["trajectories"] for result in run(name, engine=engine)]
    assert engine.oom_splits > 0
    for mine, theirs in zip(got, want, strict=True):
        assert [row["token_ids"] for row in mine] == [row["token_ids"] for row in theirs]
        assert [row["reward"] for row in mine] == pytest.approx([row["reward"] for row in theirs], abs=1e-5)


def test_numbers_travel_with_their_rows_through_forks_moves_and_drops() -> None:
    model = tiny_causal_lm()
    engine = make_engine(model)
    prefix = engine.runner.prefill([5, 6, 7], "shared_prefix")
    group = Group(prefix, [0, 1, 2, 3], capacity=4, device=torch.device("cpu"), recorded=1)

    def step(number: int) -> None:
        group.write(torch.arange(group.num_rows), torch.tensor(group.row_ids)[:, None] * 10.0 + number)
        group.num_sampled += 1

    step(0)
    group.select([2, 0, 2], [2, 0, 4], capacity=6)  # row 4 forks row 2; row 1 and 3 are dropped
    step(1)
    assert group.rows.stats[:, :2, 0].tolist() == [[20, 21], [0, 1], [20, 41]]
    group.drop([0])  # the hole takes a row from the end
    step(2)
    rest = group.split()
    found = {
        row: part.rows.stats[place, :3, 0].tolist() for part in (group, rest) for place, row in enumerate(part.row_ids)
    }
    assert found == {0: [0, 1, 2], 4: [20, 41, 42]}


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name, function in list(token_stats._STATS.items()):

        def counted(*given: Any, name: str = name, function: Any = function) -> Any:
            asked.append(name)
            return function(*given)

        monkeypatch.setitem(token_stats._STATS, name, counted)
    run("self_certainty")
    assert set(asked) == {"self_certainty"}
    asked.clear()
    run("deepconf", logprobs=True)
    assert set(asked) == {"confidence", "logprob"}


def test_prompts_with_and_without_recorded_numbers_share_a_batch() -> None:
    # one generator, two requests that differ in what they record
    config, _ = RunConfig.from_args({**SMALL, **ARGUMENTS, "reward_model": "deepconf"})
    engine = make_engine(tiny_causal_lm())
    generator = Generator(engine=engine, reward=make_reward(config, device="cpu"), config=config)
    requests = [
        Request(prompt=engine.encode(prompt), config=config.replace(logprobs=bool(number % 2)))
        for number, prompt in enumerate(PROMPTS)
    ]
    for index, result in generator.run(requests, progress=False):
        for row in result.trajectories:
            assert (row.logprobs is not None) == bool(index % 2)
            want = recomputed("deepconf", requests[index].prompt.token_ids, row.token_ids)
            assert row.reward == pytest.approx(want, abs=2e-4)


# ---- the statistics themselves -------------------------------------------------------------------------------------


def test_known_distributions() -> None:
    def self_certainty(scores: torch.Tensor) -> float:
        return token_stats.self_certainty(scores, scores.logsumexp(-1)).item()

    def confidence(scores: torch.Tensor, top_k: int = CONFIDENCE_TOKENS) -> float:
        return token_stats.confidence(scores, scores.logsumexp(-1), top_k=top_k).item()

    uniform = torch.zeros(1, 100)
    assert self_certainty(uniform) == pytest.approx(0, abs=1e-5)
    assert confidence(uniform) == pytest.approx(math.log(100), abs=1e-5)
    half = torch.full((1, 100), -math.inf)
    half[0, :50] = 3.0  # half of the vocabulary is ruled out: it is the vocabulary no longer
    assert self_certainty(half) == pytest.approx(0, abs=1e-5)
    assert confidence(half) == pytest.approx(math.log(50), abs=1e-5)
    few = torch.full((1, 100), -math.inf)
    few[0, 7] = few[0, 9] = 1.0
    assert confidence(few) == pytest.approx(math.log(2), abs=1e-5)
    skewed = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert self_certainty(skewed) == pytest.approx(0.25 * math.log(2), abs=1e-5)
    assert confidence(skewed, top_k=2) == pytest.approx(1.5 * math.log(2), abs=1e-5)


def test_many_rows_and_one_shared_row() -> None:
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0))  # more than a chunk
    tokens = torch.arange(600) % 50
    all_at_once = token_stats.stats_of(logits, tokens, ["confidence", "self_certainty"])
    for name, values in zip(("confidence", "self_certainty"), all_at_once.unbind(1), strict=True):
        assert values.shape == (600,)
        for place in (0, 255, 256, 599):
            alone = token_stats.stats_of(logits[place : place + 1], tokens[:3], [name])[:, 0]
            assert alone.tolist() == pytest.approx([values[place].item()] * 3, abs=1e-6)


# ---- scores of rows ------------------------------------------------------------------------------------------------


def row(ids: Sequence[int], finish: Any = "eos", **more: Any) -> RowView:
    return RowView(3, "text", tuple(ids), finish, **more)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_lowest_window_against_its_definition(values: list[float], window: int) -> None:
    windows = [values[start : start + window] for start in range(max(1, len(values) - window + 1))]
    assert lowest_window(values, window) == pytest.approx(min(sum(part) / len(part) for part in windows), abs=1e-9)


@pytest.mark.parametrize(
    ("reward", "stat"), [(SelfCertainty(), "self_certainty"), (DeepConf(), "confidence")], ids=["certainty", "deepconf"]
)
def test_missing_numbers_are_an_error_that_names_the_row(reward: Any, stat: str) -> None:
    with pytest.raises(RewardError, match=rf"{reward.name} needs {stat} .*row 3.*nothing"):
        reward.score([], [row([1, 2])])
    with pytest.raises(RewardError, match="2 tokens, but the engine recorded 1 numbers"):
        reward.score([], [row([1, 2], token_stats={stat: [0.5]})])


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        (range(100), 0),
        ([7] * 100, 96 / 97),
        ([1, 2, 3, 4] * 10, 1 - 4 / 37),
        ([7] * 18, 0),  # too short to say
        ([], 0),
        ([*range(50), *range(50)], 47 / 97),
    ],
)
def test_repetition(ids: Sequence[int], share: float) -> None:
    assert repetition(list(ids)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("case", "floored"),
    [
        (row([1]), True),
        (row([1], finish=None), False),  # only begun
        (row([1, 2]), False),
        (row([7] * 40), True),
        (row([7] * 40, finish=None), True),
        (row(range(40)), False),
    ],
)
def test_the_floor(case: RowView, floored: bool, caplog: pytest.LogCaptureFixture) -> None:
    case = RowView(case.row, case.text, case.token_ids, case.finish_reason, mean_logprob=-0.5)
    reward = Likelihood(Floor())
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        scores = reward.score([], [case, case])
    assert scores == [-0.5 - FLOOR_PENALTY * floored] * 2
    assert reward.scores_floored == 2 * floored
    assert len(caplog.records) == int(floored)  # said once
    assert Likelihood().score([], [case]) == [-0.5]


def test_a_row_that_repeats_itself_is_not_returned_and_the_ledger_says_so() -> None:
    repeating = {"floor_repetition": 0.0, "max_gen_toks": 40, "first_look": 10}
    results = run("self_certainty", **repeating)
    rewards = [row.reward for result in results for row in result.trajectories]
    assert any(reward < -50 for reward in rewards)
    assert sum(result.ledger.scores_floored for result in results) > 0
    for result in results:
        finished = [row for row in result.trajectories if row.finish_reason != "rejected"]
        if any(row.reward > -50 for row in finished):
            assert result.best.reward > -50
    off = run("self_certainty", **{**repeating, "floor_repetition": 1})
    assert all(row.reward >= 0 for result in off for row in result.trajectories)
    assert sum(result.ledger.scores_floored for result in off) == 0


def test_a_single_row_is_never_floored() -> None:
    config, _ = RunConfig.from_args({"n": 1, "reward_model": "likelihood"})
    case = RowView(0, "", (1,), "eos", mean_logprob=-0.5)
    assert make_reward(config, device="cpu").score([], [case]) == [-0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deepconf_window": 0}, "deepconf_window must be at least 1"),
        ({"floor_toks": -1}, "floor_toks must be at least 0"),
        ({"floor_repetition": 1.5}, r"floor_repetition must be in \[0, 1\]"),
        ({"deepconf_window": "many"}, "deepconf_window must be a whole number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_args(arguments)
