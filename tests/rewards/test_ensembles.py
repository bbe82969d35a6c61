"""Several rewards as one: how they are named, how scores are joined, and what the loop makes of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import reward_servers as servers
from support.engine_runs import PROMPTS, SMALL, make_engine
from support.rewards import check_reward, make_reward
from support.tiny_models import save, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

from specrej_eval.config import RunConfig, reward_names
from specrej_eval.core import GenerationResult, RowView
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.generator import Generator
from specrej_eval.records.fingerprint import of_models
from specrej_eval.rewards.base import RewardModel
from specrej_eval.rewards.kinds import ensemble
from specrej_eval.rewards.kinds.ensemble import Ensemble, ranks

HELLO = [{"role": "user", "content": "Say hello."}]
finite = st.floats(-1e6, 1e6, allow_nan=False)
few_values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])  # ties


def length(conversation: Any, responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def vowels(conversation: Any, responses: Sequence[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


class Given(RewardModel):
    """Scores as told, by row id."""

    tokens_scored = 3
    num_calls = 2

    def __init__(self, scores: Sequence[float], name: str = "given") -> None:
        self.scores, self.name = scores, name

    def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        return [self.scores[row.row] for row in rows]


def views(count: int, finish: Any = "eos") -> list[RowView]:
    return [RowView(row, "x" * row, (row,), finish) for row in range(count)]


def joined(table: Sequence[Sequence[float]], weights: Sequence[float], *, by_rank: bool) -> list[float]:
    return Ensemble([Given(scores) for scores in table], weights, by_rank=by_rank).score(HELLO, views(len(table[0])))


def config_of(**arguments: Any) -> RunConfig:
    return RunConfig.from_args(arguments)[0]


# ---- names -----------------------------------------------------------------------------------------------------------

A, B = f"{__name__}:length", f"{__name__}:vowels"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (f"{A}+{B}", [(1, A), (1, B)]),
        (f"{A}+0.5*{B}", [(1, A), (0.5, B)]),
        (f" 2 * {A} + -1e-1*{B}", [(2, A), (-0.1, B)]),
        (f"1e+2*{A}+.5*likelihood", [(100, A), (0.5, "likelihood")]),
        (f"2*{A}", [(2, A)]),
        ([A, f"0.5*{B}"], [(1, A), (0.5, B)]),
        ([A, {"reward_model": B, "weight": 3}], [(1, A), (3, B)]),
        (json.dumps([A, B]), [(1, A), (1, B)]),
    ],
)
def test_names_of_ensembles(name: Any, want: list[tuple[float, str]]) -> None:
    config = config_of(reward_model=name)
    assert config.reward_model is not None
    assert reward_names.is_ensemble(config.reward_model)
    assert [(part.weight, part.config.reward_model) for part in ensemble.parse(config.reward_model, config)] == want
    check_reward(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("likelihood+", "part without a name"),
        ("+likelihood", "part without a name"),
        ("0*likelihood+deepconf", "is not a part of an ensemble"),
        ("2*3*likelihood+deepconf", "is not a part of an ensemble"),
        ("[]", "names no reward"),
        ("[1, 2]", "part without a name"),
        ('["likelihood"', "is not a JSON list"),
        (["likelihood", ["deepconf"]], "part without a name"),
        (["likelihood+deepconf"], "is not a part of an ensemble"),
        ([{"weight": 1}], "part without a name"),
        ([{"reward_model": "likelihood", "weight": "heavy"}], "the weight of 'likelihood' must be a number"),
        ([{"reward_model": "likelihood", "weight": math.inf}], "must be finite"),
        ([{"reward_model": "likelihood", "alpha": 0.5}], "a part has no argument 'alpha'"),
        ("likelihood+likelyhood", "did you mean 'likelihood'"),
        (f"{A}+{__name__}:lenght", "did you mean 'length'"),
    ],
)
def test_bad_ensembles_are_named(name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_reward(config_of(reward_model=name))


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    folder = save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "a+b")
    reward = make_reward(config_of(reward_model=str(folder)), device="cpu")
    assert not isinstance(reward, Ensemble)
    assert reward_names.is_ensemble(str(tmp_path / "c+d"))


def test_an_unknown_way_of_joining() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'rank'"):
        config_of(reward_ensemble="ranks")


def test_parts_may_have_arguments_of_their_own(tmp_path: Path) -> None:
    tokenizer = str(save(None, tiny_tokenizer(), tmp_path / "t"))
    with servers.openrlhf(lambda text: float(text.count("e"))) as server, servers.tei(lambda pair: 1.0) as other:
        name = [{"reward_model": server.url, "reward_tokenizer": tokenizer, "weight": 2}, other.url, A]
        reward = make_reward(config_of(reward_model=name), device="cpu")
        scores = reward.score(HELLO, [RowView(0, "eee", (1,), "eos"), RowView(1, "", (1,), "eos")])
        assert server.requests
        assert other.requests
    assert scores[0] - scores[1] == 2 * 3 + 3


# ---- joining ---------------------------------------------------------------------------------------------------------

tables = st.integers(1, 8).flatmap(
    lambda rows: st.lists(st.lists(few_values | finite, min_size=rows, max_size=rows), min_size=1, max_size=4)
)
weights_of = st.lists(st.sampled_from([1.0, 0.5, 2.0, -1.0]), min_size=4, max_size=4)


@given(tables, weights_of)
def test_sum_is_the_weighted_sum(table: list[list[float]], weights: list[float]) -> None:
    weights = weights[: len(table)]
    want = [sum(w * scores[row] for w, scores in zip(weights, table, strict=True)) for row in range(len(table[0]))]
    assert joined(table, weights, by_rank=False) == pytest.approx(want, rel=1e-9, abs=1e-6)


@given(st.lists(few_values | finite, min_size=2, max_size=12))
def test_ranks_against_their_definition(scores: list[float]) -> None:
    for value, rank in zip(scores, ranks(scores), strict=True):
        below = sum(other < value for other in scores)
        equal = sum(other == value for other in scores) - 1
        assert rank == pytest.approx((below + equal / 2) / (len(scores) - 1))


@given(tables, weights_of, st.sampled_from([0.001, 7.0, 1e3]), st.floats(-100, 100))
def test_ranks_need_no_common_scale(
    table: list[list[float]], weights: list[float], factor: float, shift: float
) -> None:
    weights = weights[: len(table)]
    stretched = [[math.copysign(abs(score) ** (1 / 3), score) for score in table[0]], *table[1:]]
    if len(set(stretched[0])) == len(set(table[0])):  # rounding may join two
        assert joined(stretched, weights, by_rank=True) == joined(table, weights, by_rank=True)
    scores = joined(table, weights, by_rank=True)
    assert all(-1 <= score <= 1 for score in scores)


@given(tables, weights_of, st.booleans(), st.randoms())
def test_the_order_of_rows_does_not_matter(
    table: list[list[float]], weights: list[float], by_rank: bool, random: Any
) -> None:
    weights = weights[: len(table)]
    order = list(range(len(table[0])))
    random.shuffle(order)
    scores = joined(table, weights, by_rank=by_rank)
    shuffled = joined([[member[place] for place in order] for member in table], weights, by_rank=by_rank)
    assert shuffled == [scores[place] for place in order]


@given(tables, st.booleans())
def test_a_row_that_all_find_better_is_better(table: list[list[float]], by_rank: bool) -> None:
    scores = joined(table, [1.0] * len(table), by_rank=by_rank)
    for one in range(len(scores)):
        for other in range(len(scores)):
            if all(member[one] > member[other] for member in table) and by_rank:
                assert scores[one] > scores[other]
            if all(member[one] >= member[other] for member in table):
                assert scores[one] >= scores[other] or scores[one] == pytest.approx(scores[other])


@given(st.lists(few_values, min_size=3, max_size=6), st.booleans())
def test_nan_of_one_is_nan_of_all_and_moves_no_other_row(scores: list[float], by_rank: bool) -> None:
    broken = [*scores[:1], math.nan, *scores[1:]]
    found = joined([broken, [*scores[:1], 9.0, *scores[1:]]], [1.0, 1.0], by_rank=by_rank)
    assert math.isnan(found[1])
    assert [*found[:1], *found[2:]] == joined([scores, scores], [1.0, 1.0], by_rank=by_rank)


def test_costs_and_needs_add_up() -> None:
    config = config_of(reward_model="likelihood+self_certainty+deepconf+self_certainty", n=4)
    reward = make_reward(config, device="cpu")
    assert reward.needs_logprobs
    assert set(reward.needs_token_stats) == {"self_certainty", "confidence"}
    both = Ensemble([Given([0.0]), Given([1.0])], [1, 1])
    assert (both.tokens_scored, both.num_calls, both.needs_logprobs, both.scores_floored) == (6, 4, False, 0)


# ---- in the loop -----------------------------------------------------------------------------------------------------


def generate(**arguments: Any) -> Any:
    config = config_of(**{**SMALL, **arguments})
    reward = make_reward(config, device="cpu")
    return Generator(engine=make_engine(tiny_causal_lm()), reward=reward, config=config).generate(
        PROMPTS, until=["e", "q"]
    )


def test_a_run_by_sum_and_what_each_part_said() -> None:
    for result in generate(reward_model=f"{A}+-3*{B}"):
        for row in result.trajectories:
            assert row.reward_parts is not None
            parts = dict(row.reward_parts)
            assert row.reward == parts[A] - 3 * parts[B]
            if row.finish_reason != "rejected":
                assert parts == {A: length([], [row.text])[0], B: vowels([], [row.text])[0]}
        again = GenerationResult.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again.trajectories == result.trajectories


def test_ranks_of_rows_that_finished_at_different_looks_are_made_comparable() -> None:
    looks = 0
    for result in generate(reward_model=f"{A}+2*{B}", reward_ensemble="rank", first_look=4):
        finished = [row for row in result.trajectories if row.finish_reason != "rejected"]
        looks = max(looks, sum(round_.finished > 0 for round_ in result.rounds))
        texts = [row.text for row in finished]
        want = joined([length([], texts), vowels([], texts)], [1.0, 2.0], by_rank=True)
        assert [row.reward for row in finished] == pytest.approx(want)
        assert result.best.reward == max(want)
    assert looks > 1  # else there was nothing to make comparable


def test_an_ensemble_with_a_checkpoint_and_a_self_score(tmp_path: Path) -> None:
    folder = str(save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "rm"))
    alone = {result.prompt_hash: result for result in generate(reward_model=folder, strategy="best_of_n")}
    for result in generate(reward_model=f"{folder}+2*self_certainty", strategy="best_of_n"):
        for row, other in zip(result.trajectories, alone[result.prompt_hash].trajectories, strict=True):
            assert row.token_ids == other.token_ids
            assert row.reward_parts is not None
            assert row.reward_parts[folder] == pytest.approx(other.reward, abs=1e-4)
            certainty = row.reward_parts["self_certainty"]
            assert certainty is not None
            assert row.reward == pytest.approx(row.reward_parts[folder] + 2 * certainty)
        assert result.ledger.reward_tokens > 0


def test_a_part_that_fails_is_named() -> None:
    with pytest.raises(RewardError, match=f"{__name__}:fails.*raised ZeroDivisionError"):
        generate(reward_model=f"{A}+{__name__}:fails")


def fails(conversation: Any, responses: Sequence[str]) -> list[float]:
    return [1 / 0 for _ in responses]


def test_an_edited_part_is_another_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_part.py"
    module.write_text("def f(c, r): return [0.0] * len(r)\n")
    config = config_of(reward_model="my_part:f+likelihood")
    before = of_models(config, {})["reward_files"]
    module.write_text("def f(c, r): return [1.0] * len(r)\n")
    assert before is not None
    assert of_models(config, {})["reward_files"] != before
