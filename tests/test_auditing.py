"""The audit: rejected rows of some prompts decoded to their end, off the books, and what that says of rejection."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from support import FULL
from support.engine_runs import PROMPTS, SMALL, HashReward, limit_rows, make_engine
from support.properties import Case, cases
from support.simulated import (
    Process,
    SimulatedEngine,
    SimulatedReward,
    make_generator,
    request,
    run_generator,
)
from support.tiny_models import tiny_causal_lm

import specrej_eval
from specrej_eval import auditing, registry
from specrej_eval.auditing import AuditSample
from specrej_eval.config import RunConfig
from specrej_eval.core import Audit, GenerationResult, RowView
from specrej_eval.engines.transformers.groups import Group, as_given
from specrej_eval.errors import ConfigError, OutOfMemoryError, RewardError
from specrej_eval.generator import Generator
from specrej_eval.kv.cache import Prefix

UNTIL = ["e", "7", "q"]
SUMS = [f"Q: {a} + {a * 7 % 50} + {a * 3 % 41} = ?\nA:" for a in range(10, 16)]


def books(result: GenerationResult) -> dict[str, Any]:
    """Everything but the audit, and the seconds."""
    told = result.to_dict()
    told.pop("audit", None)
    told["resolved"] = {name: value for name, value in told["resolved"].items() if name != "audit"}
    told["ledger"] = {
        name: value
        for name, value in told["ledger"].items()
        if not name.startswith("audit_") and name not in ("seconds", "peak_bytes")
    }
    return told


def generate(engine: Any, prompts: Sequence[str] = PROMPTS, *, reward: Any = None, **arguments: Any) -> Any:
    config, _ = RunConfig.from_args({**SMALL, **arguments})
    generator = Generator(engine=engine, reward=reward or HashReward(), config=config)
    return generator.generate(list(prompts), until=UNTIL)


@pytest.mark.parametrize("name", registry.names("specrej_eval.strategies"))
@given(case=cases())
def test_an_audit_changes_no_answer_no_cost_and_no_row_whatever_the_strategy_alpha_or_budget(
    name: str, case: Case
) -> None:
    config = case.config(strategy=name)
    plain = run_generator(config, case.process())  # the engine refuses what the budget does not hold
    audited = run_generator(config.replace(audit=1.0), case.process())
    assert books(audited) == books(plain)
    rejected = [row for row in plain.trajectories if row.finish_reason == "rejected"]
    audit = audited.audit
    assert audit is not None and plain.audit is None
    assert [row.row for row in audit.rows] == [row.row for row in rejected]
    best = plain.best.reward or 0.0
    assert audit.regret == max([case.finals[row.row] - best for row in rejected] + [0.0])
    assert audit.better == sum(case.finals[row.row] > best for row in rejected)
    ledger = audited.ledger
    assert (ledger.audit_rows, ledger.audit_tokens) == (len(rejected), sum(row.num_tokens for row in audit.rows))


@pytest.mark.parametrize(
    ("alpha", "path"),
    [
        pytest.param(alpha, path, marks=[] if path == "shared_prefix" or alpha == 0.5 else [pytest.mark.full])
        for alpha in (0.25, 0.5, 0.9)
        for path in ("shared_prefix", "replicated", "recompute")
    ],
)
def test_with_audit_1_each_rejected_row_is_the_row_of_best_of_n_and_the_regret_is_exact(
    alpha: float, path: Any
) -> None:
    engine = make_engine(tiny_causal_lm("llama"), path=path)
    plain, audited = (generate(engine, alpha=alpha, audit=audit, logprobs=True) for audit in (0, 1.0))
    whole = generate(engine, alpha=0, logprobs=True)
    assert list(map(books, audited)) == list(map(books, plain))
    for result, all_rows in zip(audited, whole, strict=True):
        assert result.audit.num_rows == result.ledger.rows_rejected > 0
        for row in result.audit.rows:
            theirs = all_rows.trajectories[row.row]
            assert (row.token_ids, row.text, row.reward) == (theirs.token_ids, theirs.text, theirs.reward)
            assert (row.finish_reason, row.logprobs) == (theirs.finish_reason, theirs.logprobs)
        assert result.audit.regret == all_rows.best.reward - result.best.reward
    estimate = AuditSample.of(audited).estimate()
    regrets = [theirs.best.reward - ours.best.reward for ours, theirs in zip(audited, whole, strict=True)]
    assert estimate is not None and estimate.regret == pytest.approx(sum(regrets) / len(regrets))
    assert estimate.regret_interval == (estimate.regret, estimate.regret)
    assert estimate.best_rejected == sum(regret > 0 for regret in regrets) / len(regrets)
    assert estimate.best_rejected_interval == (estimate.best_rejected, estimate.best_rejected)


def test_on_the_demo_pair_the_estimate_is_that_of_finishing_every_row() -> None:
    def answers(**arguments: Any) -> list[GenerationResult]:
        return specrej_eval.load(device="cpu", max_gen_toks=32, **arguments).generate(SUMS, until="\n")

    plain, audited, whole = answers(), answers(audit=1.0), answers(strategy="best_of_n")
    assert list(map(books, audited)) == list(map(books, plain))
    for ours, theirs in zip(audited, whole, strict=True):
        assert ours.audit is not None and ours.audit.regret is not None
        assert ours.audit.regret == pytest.approx((theirs.best.reward or 0) - (ours.best.reward or 0), abs=1e-4)


class InOtherCompany(SimulatedReward):
    """Each call's rewards differ from those of the one before in their last bits."""

    def score(self, *args: Any, **kwargs: Any) -> list[float]:
        return [reward + 1e-6 * self.num_calls for reward in super().score(*args, **kwargs)]


class OneText(SimulatedEngine):
    """All rows but the last say the same."""

    def rows(self, session: Any) -> list[RowView]:
        return [replace(row, text="7" if row.row < 7 else "8") for row in super().rows(session)]


@pytest.mark.parametrize("last, better", [(0.5, 0), (2.0, 1)])
def test_a_rejected_row_with_the_answers_own_text_is_no_loss_however_it_was_scored(last: float, better: int) -> None:
    process = Process.of([1.0] * 7 + [last], partials=lambda row, tokens: float(-row))
    config = RunConfig.from_args({"n": 8, "max_gen_toks": 12, "first_look": 3, "alpha": 0.5, "audit": 1.0})[0]
    generator = Generator(engine=OneText(lambda *_: process), reward=InOtherCompany(lambda _: process), config=config)
    ((_, result),) = generator.run([request(config)], progress=False)
    assert result.text == "7" and result.audit is not None and result.audit.num_rows == 6
    assert any((row.reward or 0) > (result.best.reward or 0) for row in result.audit.rows if row.text == "7")
    assert result.audit.better == better
    assert result.audit.regret == (pytest.approx(1.0, abs=1e-4) if better else 0.0)


def test_a_row_keeps_the_tokens_it_had_where_company_may_change_the_last_bits() -> None:
    group = Group(Prefix(length=3), [4, 7], capacity=8, device=torch.device("cpu"))
    plain = Group(Prefix(length=3), [0], capacity=8, device=torch.device("cpu"))
    drawn = torch.tensor([11, 12, 13])
    assert as_given([plain, group], drawn).tolist() == [11, 12, 13]
    group.given = {4: [5, 6], 7: [8]}
    assert as_given([plain, group], drawn).tolist() == [11, 5, 8]
    group.num_sampled = 1
    assert as_given([plain, group], drawn).tolist() == [11, 6, 13]
    group.num_sampled = 2
    assert as_given([plain, group], drawn).tolist() == [11, 12, 13]


def test_the_same_prompts_are_drawn_whatever_the_company_and_more_of_them_with_a_larger_audit() -> None:
    finals = [float(-row) for row in range(8)]
    process = Process.of(finals, partials=lambda row, tokens: -finals[row])
    processes = {f"p{number}": process for number in range(40)}
    config = RunConfig.from_args({"n": 8, "max_gen_toks": 12, "first_look": 3})[0]

    def drawn(audit: float, names: Sequence[str], **changes: Any) -> set[str]:
        generator = make_generator(processes, config.replace(audit=audit, **changes))
        asked = [request(generator.config, name) for name in names]
        return {names[i] for i, result in generator.run(asked, progress=False) if result.audit is not None}

    names = list(processes)
    some = drawn(0.3, names)
    assert 4 <= len(some) <= 20
    assert drawn(0.3, names, batch_size=1) == some
    assert drawn(0.3, names[::-1], batch_size=7) == some
    assert drawn(0.3, names[::2]) | drawn(0.3, names[1::2]) == some, "as two ranks, or a run that was stopped"
    assert some < drawn(0.6, names)
    assert drawn(0.3, names, seed=1) != some
    assert drawn(1.0, names) == set(names) and not drawn(0.0, names)


def test_an_audit_stands_in_a_journal_and_a_run_without_one_is_not_taken_for_it(tmp_path: Path) -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    path = str(tmp_path / "run.jsonl")
    first = generate(engine, audit=1.0, journal=path)
    again = generate(engine, audit=1.0, journal=path)
    assert again == first and all(result.taken for result in again)
    assert [result.audit for result in again] == [result.audit for result in first]
    assert not any(result.taken for result in generate(engine, journal=path))
    assert AuditSample.of(again).estimate() == AuditSample.of(first).estimate()


class _Failing(HashReward):
    """Cannot score the rejected rows once they are finished."""

    fails = False

    def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        if self.fails:
            self.fails = False
            raise RewardError("the server is gone.")
        return super().score(conversation, rows, response_prefix)


@pytest.mark.parametrize("what", ["memory", "reward"])
def test_an_audit_that_fails_costs_no_answer(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    plain = generate(engine)
    again, reward = engine.again, _Failing()

    def in_vain(session: Any, rows: Any) -> None:
        if what == "memory":
            raise OutOfMemoryError("no room.")
        reward.fails = True
        again(session, rows)

    monkeypatch.setattr(engine, "again", in_vain)
    failing = generate(engine, audit=1.0, batch_size=1, reward=reward)
    assert list(map(books, failing)) == list(map(books, plain))
    assert all(result.audit.regret is None and result.audit.error for result in failing)
    assert "which its answer does not depend on" in caplog.text
    assert AuditSample.of(failing).estimate() is None


def test_an_audit_decodes_in_turns_where_memory_holds_few_rows() -> None:
    engine, prompts = make_engine(tiny_causal_lm("llama")), PROMPTS if FULL else PROMPTS[:1]
    plenty = generate(engine, prompts, audit=1.0)
    limit_rows(engine, 3)
    assert [result.audit for result in generate(engine, prompts, audit=1.0)] == [result.audit for result in plenty]


def test_ranks_of_an_ensemble_are_made_anew_among_all_rows() -> None:
    results = specrej_eval.load(
        device="cpu", max_gen_toks=24, n=8, audit=1.0, reward_model="likelihood+self_certainty", reward_ensemble="rank"
    ).generate(SUMS[:3], until="\n")
    for result in results:
        assert result.audit is not None and result.audit.num_rows > 0
        assert all(row.reward is not None and row.reward_parts for row in result.audit.rows)


def test_an_engine_that_cannot_go_on_with_rejected_rows_says_so_before_anything_is_decoded() -> None:
    generator = make_generator({"?": Process.of([0.0] * 4)}, RunConfig(n=4, audit=0.5).checked())
    generator.engine.finishes_rejected = False
    with pytest.raises(ConfigError, match=r"audit=0\.5 needs an engine"):
        list(generator.run([request(generator.config)], progress=False))
    assert not generator.engine.sessions


@pytest.mark.parametrize("value", [-0.1, 1.5, "2%"])
def test_a_share_is_between_0_and_1(value: Any) -> None:
    with pytest.raises(ConfigError, match="audit"):
        RunConfig.from_args({"audit": value})


# the estimate


def sample(regrets: Sequence[float], drawn: Sequence[bool], *, without: int = 0) -> AuditSample:
    found = AuditSample()
    for regret, audited in zip(regrets, drawn, strict=True):
        found.count(10, Audit(rows=[], num_rows=10, regret=regret, better=int(regret > 0)) if audited else None)
    for _ in range(without):
        found.count(0, None)
    return found


def test_prompts_without_rejected_rows_count_as_no_regret() -> None:
    estimate = sample([1.0, 0.0, 3.0], [True] * 3, without=1).estimate()
    assert estimate is not None
    assert (estimate.regret, estimate.best_rejected) == (1.0, 0.5)
    nothing_rejected = sample([], [], without=4).estimate()
    assert nothing_rejected is not None and nothing_rejected.regret == nothing_rejected.best_rejected == 0
    assert sample([1.0], [False]).estimate() is None
    assert AuditSample().estimate() is None


def test_samples_of_ranks_add_up_and_an_estimate_is_read_back() -> None:
    regrets, drawn = [0.0, 1.0, 0.5, 2.0, 3.0, 0.25, 4.0, 0.0], [True] * 7 + [False]
    whole = sample(regrets, drawn)
    parts = sample(regrets[:3], drawn[:3]).add(sample(regrets[3:], drawn[3:]))
    assert parts == whole
    estimate = whole.estimate()
    assert estimate is not None
    assert auditing.of_totals(estimate.to_dict()) == estimate
    assert auditing.of_totals(None) is None and auditing.of_totals({"regret": 1}) is None
    assert "95 % interval" in str(estimate) and "7 prompts among 8" in str(estimate)


POPULATIONS = {
    "rare and exponential": (0.1, lambda rng: rng.expovariate(1)),
    "frequent and exponential": (0.5, lambda rng: rng.expovariate(1)),
    "half-normal": (0.3, lambda rng: abs(rng.gauss(0, 1))),
    "lognormal": (0.3, lambda rng: rng.lognormvariate(0, 1)),
    "always": (1.0, lambda rng: rng.expovariate(1)),
}


@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize("audit", [0.1, 0.3])
def test_estimates_are_unbiased_and_intervals_cover(kind: str, audit: float) -> None:
    share, draw = POPULATIONS[kind]
    rng = random.Random(f"{kind} {audit}")
    runs, covered, covered_probability, with_interval = 300, 0, 0, 0
    errors, errors_probability = [], []
    for _ in range(runs):
        regrets = [draw(rng) if rng.random() < share else 0.0 for _ in range(300)]
        truth = sum(regrets) / len(regrets)
        probability = sum(regret > 0 for regret in regrets) / len(regrets)
        estimate = sample(regrets, [rng.random() < audit for _ in regrets]).estimate()
        assert estimate is not None
        errors.append(estimate.regret - truth)
        errors_probability.append(estimate.best_rejected - probability)
        low, high = estimate.best_rejected_interval
        covered_probability += low - 1e-12 <= probability <= high + 1e-12
        if estimate.regret_interval is not None:
            with_interval += 1
            covered += estimate.regret_interval[0] <= truth <= estimate.regret_interval[1]
    for found in (errors, errors_probability):
        deviation = (sum(error**2 for error in found) / runs) ** 0.5
        assert abs(sum(found) / runs) <= 4 * deviation / runs**0.5
    assert covered_probability / runs >= 0.95 - 3 * (0.05 * 0.95 / runs) ** 0.5
    # Hall's interval: between 91 and 99 % in samples of thirty with half of them zeros
    assert with_interval > 20 and covered / with_interval >= 0.9
