"""What every engine must do, as checks that any of them can be held to: plans, looks, streams, stops, budgets, ledgers,
distributions and log-probs. Nothing in here knows how an engine works; what one promises decides how much is asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from scipy.stats import chisquare

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt, RowView
from specrej_eval.engines.base import Engine, Opening
from specrej_eval.errors import ConfigError, KVBudgetExceededError
from support.toy import distribution, log_softmax

TEXTS = ("abc", "The rain in Spain.\n", "x" * 40)
LEAST_P = 1e-4
"""Of a chi-square test that an engine without fault may fail: runs are deterministic, so it is met once or never."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine and what its model is."""

    engine: Engine
    logits: Callable[[Sequence[int]], Sequence[float]]
    """Token ids -> logits of the next one, by a way that has nothing to do with the engine."""
    tolerance: float = 1e-6
    """Of log-probs."""
    is_open: Callable[[Any], bool] = lambda session: False
    """Whether an engine still works for a session."""
    decoded: Callable[[], int] | None = None
    """Tokens decoded so far, by the word of what decodes them."""
    draws: int = 2000
    """Rows of a chi-square test."""
    refused: Sequence[Mapping[str, Any]] = ()
    """Of ``SAMPLINGS``, those that it cannot draw by, and says so."""

    @property
    def exact(self) -> bool:
        """Whether a row's tokens depend on nothing but the row."""
        return self.engine.promises in ("bits", "uniforms")


class Run:
    """A prompt being decoded the way the generator does it."""

    def __init__(
        self,
        subject: Subject,
        text: str = TEXTS[0],
        *,
        most: int | None = None,
        until: tuple[str, ...] = (),
        stats: Any = (),
        repeat: int = 0,
        rows: int = 64,
        max_gen_toks: int = 24,
        **arguments: Any,
    ) -> None:
        self.engine = subject.engine
        self.config = RunConfig(**{"n": rows, "max_gen_toks": max_gen_toks, "top_k": 0, **arguments}).checked()
        self.prompt: Prompt = replace(self.engine.encode(text), task="contract", repeat=repeat)
        held = rows * max_gen_toks if most is None else most
        self.budget = Budget(
            prompt_tokens=self.prompt.num_tokens,
            kv_budget_tokens=self.prompt.num_tokens + held,
            n=rows,
            first_look=max_gen_toks,
            max_gen_toks=max_gen_toks,
        )
        self.session = self.engine.open(self.prompt, self.config, self.budget, until=until, token_stats=stats)

    def follow(self, keep: Sequence[int] = (), fresh: int = 0, num_tokens: int = 5) -> Run:
        self.engine.follow(self.session, Plan(tuple(keep), fresh, num_tokens))
        return self

    def decode(self, num_tokens: int) -> list[RowView]:
        """To the look after so many tokens."""
        decode_all([self], num_tokens)
        return self.pool()

    def pool(self) -> list[RowView]:
        return self.engine.pool(self.session)

    def rows(self) -> list[RowView]:
        return self.engine.rows(self.session)

    def to_the_end(self, fresh: int, looks: Sequence[int] = (24,)) -> list[RowView]:
        """All rows, none rejected, looked at after so many tokens each."""
        self.follow(fresh=fresh, num_tokens=looks[0])
        for place, look in enumerate(looks):
            pool = self.decode(look)
            if place + 1 < len(looks):
                self.follow([row.row for row in pool if not row.finished], num_tokens=looks[place + 1])
        rows = self.rows()
        self.engine.close(self.session)
        return rows


def decode_all(runs: Sequence[Run], num_tokens: int) -> None:
    """All to the look after so many tokens, as the generator's loop does."""
    engine = runs[0].engine
    while True:
        left = [(run.session, num_tokens - run.session.tokens_since_look) for run in runs if run.session.num_live]
        waiting = [(session, tokens) for session, tokens in left if tokens > 0]
        if not waiting:
            return
        before = sum(session.decode_tokens for session, _ in waiting)
        engine.decode([session for session, _ in waiting], min(tokens for _, tokens in waiting))
        assert sum(session.decode_tokens for session, _ in waiting) > before, "decoding makes progress"


def tokens_of(rows: Sequence[RowView]) -> dict[int, tuple[int, ...]]:
    return {row.row: tuple(row.token_ids) for row in rows}


def live_of(pool: Sequence[RowView]) -> list[int]:
    return [row.row for row in pool if not row.finished]


# plans


def plans_are_obeyed(subject: Subject) -> None:
    run = Run(subject)
    first = run.follow(fresh=8).decode(5)
    assert [row.row for row in first] == list(range(8)), "fresh rows are numbered from 0, and come in that order"
    live = live_of(first)
    assert len(live) >= 4, "too few rows go on for this check"
    kept, gone = live[::2], live[1::2]
    before = tokens_of(first)
    run.follow(kept, fresh=2, num_tokens=4)
    assert run.session.num_live == len(kept) + 2
    second = run.decode(4)
    assert [row.row for row in second] == [*kept, 8, 9], "the pool: rows that were kept, and the fresh ones"
    for row in second:
        if row.row in before:
            assert tuple(row.token_ids[:5]) == before[row.row], "survivors go on from their own tokens"
    ended = {row.row: row for row in run.rows()}
    assert list(ended) == list(range(10)), "all rows ever started, in row order"
    for name in gone:
        assert ended[name].finish_reason == "rejected" and tuple(ended[name].token_ids) == before[name]
    for row in first:
        if row.finished:
            assert ended[row.row] == row, "a row that finished stays as it ended"
    run.follow((), num_tokens=1)
    assert run.session.num_live == 0 and all(row.finished for row in run.rows())
    run.engine.close(run.session)


def forks_go_their_own_way(subject: Subject) -> None:
    run = Run(subject, max_gen_toks=40)
    first = run.follow(fresh=4, num_tokens=6).decode(6)
    parent = live_of(first)[0]
    past = tokens_of(first)[parent]
    decoded = run.session.decode_tokens
    run.follow([parent] * 4, num_tokens=20)
    second = run.decode(20)
    assert [row.row for row in second] == [parent, 4, 5, 6], "a fork gets a number of its own"
    assert all(tuple(row.token_ids[: len(past)]) == past for row in second), "and its parent's tokens"
    continued = {tuple(row.token_ids[len(past) :]) for row in second}
    assert len(continued) == 4, "no two of them go on alike"
    assert run.session.decode_tokens - decoded == sum(row.num_tokens - len(past) for row in second)
    run.engine.close(run.session)


def looks_see_every_row_at_the_same_token(subject: Subject) -> None:
    early = Run(subject, TEXTS[0])
    early.follow(fresh=6, num_tokens=3)
    decode_all([early], 3)
    late = Run(subject, TEXTS[2])
    late.follow(fresh=6, num_tokens=7)
    seen = {early: 3, late: 0}  # tokens of a live row
    early.follow(live_of(early.pool()), num_tokens=7)
    for tokens, following in ((7, 1), (1, 2), (2, 5), (5, 1)):
        decode_all([early, late], tokens)
        for run in (early, late):
            seen[run] += tokens
            for row in run.pool():
                assert row.num_tokens <= seen[run] and (row.finished or row.num_tokens == seen[run])
            run.follow(live_of(run.pool()), num_tokens=following)
    for run in (early, late):
        run.engine.close(run.session)


def decoding_returns_when_a_session_has_ended(subject: Subject) -> None:
    short, long = Run(subject, TEXTS[0], max_gen_toks=4), Run(subject, TEXTS[1], max_gen_toks=24)
    short.follow(fresh=3, num_tokens=4)
    long.follow(fresh=8, num_tokens=24)
    subject.engine.decode([short.session, long.session], 20)
    assert short.session.num_live == 0 and long.session.tokens_since_look <= 4, "others wait no longer than they must"
    for run in (short, long):
        run.engine.close(run.session)


# streams


def rows_draw_for_themselves(subject: Subject) -> None:
    drawn = [tuple(row.token_ids) for row in Run(subject, max_gen_toks=24).to_the_end(16)]
    drawn += [tuple(row.token_ids) for row in Run(subject, max_gen_toks=24, seed=1).to_the_end(16)]
    drawn += [tuple(row.token_ids) for row in Run(subject, max_gen_toks=24, repeat=1).to_the_end(16)]
    run = Run(subject, max_gen_toks=24, seed=2)
    pool = run.follow(fresh=8).decode(5)
    run.follow(live_of(pool)[:2], fresh=8, num_tokens=19)
    run.decode(19)
    starts = [tuple(row.token_ids[:5]) for row in run.rows() if row.num_tokens >= 5]
    assert len(set(starts)) == len(starts), "a fresh row draws no earlier row's tokens"
    drawn += [tuple(row.token_ids) for row in run.rows()]
    run.engine.close(run.session)
    long = [tokens for tokens in drawn if len(tokens) >= 8]
    assert len(long) > 20 and len(set(long)) == len(long), (
        "no row, seed, repeat or later fresh row draws another's tokens"
    )


def prompts_draw_for_themselves(subject: Subject) -> None:
    """Prompts that end alike: by the same stream they would go on alike where a model looks back one token."""
    texts = ("one abc", "two abc", "abc")
    starts = [[tuple(row.token_ids[:3]) for row in Run(subject, text).to_the_end(12)] for text in texts]
    assert len({tuple(start) for start in starts}) == len(texts)
    same = sum(a == b for a, b in zip(starts[0], starts[1], strict=True))
    assert same <= 8, "another prompt has another stream"


def neither_looks_nor_company_change_a_row(subject: Subject) -> None:
    if not subject.exact:
        return
    alone = tokens_of(Run(subject).to_the_end(6))
    assert tokens_of(Run(subject).to_the_end(6, looks=(3, 1, 7, 13))) == alone, "looks change nothing"
    run, other = Run(subject), Run(subject, TEXTS[1])
    run.follow(fresh=6, num_tokens=24)
    other.follow(fresh=5, num_tokens=24)
    decode_all([other, run], 24)
    assert tokens_of(run.rows()) == alone, "other prompts change nothing"
    for each in (run, other):
        each.engine.close(each.session)
    assert {row: tokens for row, tokens in tokens_of(Run(subject).to_the_end(9)).items() if row < 6} == alone, (
        "nor do rows"
    )


# ends


def rows_end_where_they_should(subject: Subject) -> None:
    eos = set(getattr(subject.engine, "eos_ids", ())) or {2}
    rows = Run(subject, max_gen_toks=12).to_the_end(48, looks=(5, 7))
    for row in rows:
        inside, last = row.token_ids[:-1], row.token_ids[-1]
        assert not eos & set(inside), "nothing comes behind an end of sequence"
        assert (row.finish_reason == "eos") == (last in eos)
        assert row.num_tokens <= 12 and (row.finish_reason != "length" or row.num_tokens == 12)
        assert row.finish_reason in ("eos", "length")
    assert any(row.finish_reason == "length" for row in rows)


def stop_strings_are_exact(subject: Subject) -> None:
    engine = subject.engine
    special = set(engine.tokenizer.all_special_ids)
    free = Run(subject, TEXTS[1]).to_the_end(48)
    texts = [engine.detokenizer.raw([token for token in row.token_ids if token not in special]) for row in free]
    pairs = Counter(text[at : at + 2] for text in texts for at in range(2, len(text) - 2))
    pair = next(each for each, _ in pairs.most_common() if "\ufffd" not in each and each.strip() == each)
    single = next(letter for letter, _ in Counter("".join(texts)).most_common() if letter not in "\ufffd" + pair)
    for until in ((pair,), (pair, single)):
        rows = Run(subject, TEXTS[1], until=until).to_the_end(48, looks=(3, 4, 17))
        stopped = [row for row in rows if row.finish_reason == "stop"]
        assert stopped, "no row met a stop string"
        for row in rows:
            found = engine.detokenizer.stop_position(row.token_ids, until)
            assert (found is not None) == (row.finish_reason == "stop"), "a row ends with its first stop string"
            assert engine.detokenizer.stop_position(row.token_ids[:-1], until) is None, "and at once"
            assert not any(stop in row.text for stop in until), "which is not part of the answer"
            if found is not None and not special & set(row.token_ids):
                assert row.text == engine.detokenizer.raw(row.token_ids)[:found]
    stop = engine.detokenizer.raw(engine.encode(TEXTS[1]).token_ids)[-2:]
    assert any(row.num_tokens > 1 for row in Run(subject, TEXTS[1], until=(stop,)).to_the_end(8)), (
        "the prompt stops nothing"
    )


# budgets and ledgers


def budgets_are_held(subject: Subject) -> None:
    run = Run(subject, rows=4, max_gen_toks=24, most=4 * 6)
    pool = run.follow(fresh=4, num_tokens=6).decode(6)
    lengths = [row.num_tokens for row in pool]
    peak = max(sum(step for length in lengths if length >= step) for step in range(1, 7))
    assert run.session.kv_tokens_peak == run.prompt.num_tokens + peak, (
        "the peak of a round, prompt included, to the token"
    )
    live = live_of(pool)
    run.follow(live[:1], num_tokens=9)
    grown = run.decode(9)[0].num_tokens
    assert run.session.kv_tokens_peak == run.prompt.num_tokens + grown, "rows that are gone are not held"
    run.engine.close(run.session)
    run = Run(subject, rows=8, max_gen_toks=24, most=8 * 3)
    run.follow(fresh=8, num_tokens=24)
    with pytest.raises(KVBudgetExceededError):
        run.decode(20)
    run.engine.close(run.session)
    run = Run(subject, rows=8, max_gen_toks=24, most=20)
    pool = run.follow(fresh=3, num_tokens=6).decode(6)
    with pytest.raises(KVBudgetExceededError):
        run.follow([live_of(pool)[0]] * 9, num_tokens=1)
    run.engine.close(run.session)


def ledgers_add_up(subject: Subject) -> None:
    before = None if subject.decoded is None else subject.decoded()
    run = Run(subject)
    pool = run.follow(fresh=12).decode(5)
    live = live_of(pool)
    run.follow([*live[:3], live[0]], fresh=3, num_tokens=6)
    run.decode(6)
    run.follow((), num_tokens=1)
    rows = run.rows()
    session = run.session
    inherited = 5  # of the one fork
    assert session.decode_tokens == sum(row.num_tokens for row in rows) - inherited
    assert session.prompt_tokens == run.prompt.num_tokens
    assert 0 <= session.discarded_tokens <= session.overshoot_tokens + len(rows)
    if before is not None:
        assert subject.decoded is not None
        assert session.decode_tokens + session.discarded_tokens == subject.decoded() - before, "all that was decoded"
    run.engine.close(session)


def a_prompt_may_be_opened_by_turns(subject: Subject) -> None:
    """As it is opened at once, however few tokens are read in a turn."""
    want = tokens_of(Run(subject, TEXTS[2]).to_the_end(3))
    run = Run(subject, TEXTS[2])
    subject.engine.close(run.session)
    asked = Opening(prompt=run.prompt, config=run.config, budget=run.budget)
    turns = subject.engine.open_by_turns([asked], tokens=1)
    while True:
        try:
            next(turns)
        except StopIteration as done:
            [run.session] = done.value
            break
    rows = run.to_the_end(3)
    assert len(rows) == len(want)
    if subject.exact:
        assert tokens_of(rows) == want
    abandoned = subject.engine.open_by_turns([asked], tokens=1)
    abandoned.close()


def a_closed_session_is_over(subject: Subject) -> None:
    run = Run(subject)
    run.follow(fresh=4).decode(3)
    run.engine.close(run.session)
    run.engine.close(run.session)
    assert not subject.is_open(run.session)
    assert len(Run(subject).to_the_end(2)) == 2, "and others go on"


# numbers


SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 6, "top_p": 0.8},
    {"top_k": 6, "min_p": 0.1},
    {"top_p": 0.8, "min_p": 0.1},
)


def first_tokens_are_of_the_distribution(subject: Subject) -> None:
    for place, sampling in enumerate(SAMPLINGS):
        if sampling in subject.refused:
            with pytest.raises(ConfigError, match=r"top_p=.* together"):
                Run(subject, **sampling)
            continue
        run = Run(subject, rows=subject.draws, max_gen_toks=1, seed=place, **sampling)
        drawn = Counter(row.token_ids[0] for row in run.to_the_end(subject.draws, looks=(1,)))
        expected = distribution(subject.logits(run.prompt.token_ids), run.config)
        assert all(expected[token] > 1e-9 for token in drawn), f"{sampling}: a token that was filtered out"
        often = [token for token, p in enumerate(expected) if p * subject.draws >= 5]
        rest = subject.draws - sum(drawn[token] for token in often)
        observed = [drawn[token] for token in often]
        wanted = [expected[token] * subject.draws for token in often]
        if subject.draws - sum(wanted) >= 5:
            observed.append(rest)
            wanted.append(subject.draws - sum(wanted))
        scale = sum(observed) / sum(wanted)
        if len(observed) > 1:
            assert chisquare(observed, [value * scale for value in wanted]).pvalue > LEAST_P, f"{sampling}"


def log_probs_are_the_models_own(subject: Subject) -> None:
    run = Run(subject, TEXTS[1], stats=("logprob",), temperature=0.7, top_k=12)
    run.follow(fresh=6, num_tokens=5)
    run.follow(live_of(run.decode(5)), num_tokens=4)
    run.decode(4)
    for row in run.rows():
        told = row.token_stats["logprob"]
        assert len(told) == row.num_tokens
        ids = list(run.prompt.token_ids)
        for token, mine in zip(row.token_ids, told, strict=True):
            assert mine == pytest.approx(log_softmax(subject.logits(ids))[token], abs=subject.tolerance)
            ids.append(token)
        assert row.mean_logprob == pytest.approx(math.fsum(told) / row.num_tokens)
    run.engine.close(run.session)
    [row] = Run(subject, max_gen_toks=2).to_the_end(1, looks=(2,))
    assert not row.token_stats and row.mean_logprob is None, "nothing is told that was not asked for"


def greedy_rows_take_the_largest(subject: Subject) -> None:
    run = Run(subject, TEXTS[1], temperature=0.0, rows=1, max_gen_toks=10)
    ids = list(run.prompt.token_ids)
    [row] = run.to_the_end(1, looks=(4, 6))
    for token in row.token_ids:
        logits = subject.logits(ids)
        assert logits[token] >= max(logits) - 10 * subject.tolerance
        ids.append(token)


CHECKS: tuple[Callable[[Subject], None], ...] = (
    plans_are_obeyed,
    forks_go_their_own_way,
    looks_see_every_row_at_the_same_token,
    decoding_returns_when_a_session_has_ended,
    rows_draw_for_themselves,
    prompts_draw_for_themselves,
    neither_looks_nor_company_change_a_row,
    rows_end_where_they_should,
    stop_strings_are_exact,
    budgets_are_held,
    ledgers_add_up,
    a_prompt_may_be_opened_by_turns,
    a_closed_session_is_over,
    first_tokens_are_of_the_distribution,
    log_probs_are_the_models_own,
    greedy_rows_take_the_largest,
)
