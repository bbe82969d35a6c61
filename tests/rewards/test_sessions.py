"""Scores of sessions against one unpadded forward pass per row: the same over any history, with fewer tokens read."""

from __future__ import annotations

import math
from contextlib import closing
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reward_sessions import BODIES, CONVERSATION, PAIRS, PIECES, Row, drawn, make_reward, plain_score, tokenizer
from support.tiny_models import tiny_reward_model, tiny_tokenizer

import specrej_eval
from specrej_eval.core import RowView
from specrej_eval.errors import RewardError
from specrej_eval.rewards.base import RewardSession
from specrej_eval.rewards.checkpoints.memory import Allowance
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.shared_body import SharedBody
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier

TOLERANCE = 1e-4
BFLOAT16_BOUND = 0.05
"""Of the largest score: bfloat16 has 8 bits, and the order of a sum's terms depends on the batch."""


@pytest.fixture(scope="module")
def rewards() -> dict[Any, SequenceClassifier]:
    """Made once per kind: sessions must not leave a trace in the model."""
    return {}


def run_history(data: st.DataObject, reward: SequenceClassifier, generator: Any, *, prefix: str = "") -> int:
    """Look, drop, fork, start and finish rows at random; every score is checked. Returns the scores checked."""
    texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14)
    rows = [Row(row, drawn(generator, data.draw(texts))) for row in range(data.draw(st.integers(1, 5), label="rows"))]
    started = len(rows)
    checked = 0
    with closing(reward.open(CONVERSATION, prefix)) as session:
        for _ in range(data.draw(st.integers(1, 4), label="looks")):
            for row in rows:
                row.shown += data.draw(st.integers(0, 9))
                row.finished = row.shown >= len(row.ids)
            views = [row.view(generator) for row in rows]
            scores = session.score(views)
            assert scores == pytest.approx([plain_score(reward, view, prefix) for view in views], abs=TOLERANCE)
            checked += len(views)
            kept = [row for row in rows if not row.finished and data.draw(st.booleans(), label="kept")]
            forks = [data.draw(st.sampled_from(kept)) for _ in range(data.draw(st.integers(0, 2)))] if kept else []
            session.keep([row.row for row in [*kept, *forks]])
            rows = list(kept)
            for parent in forks:  # the tokens so far are the parent's, those to come are its own
                ids = parent.ids[: parent.shown] + drawn(generator, data.draw(texts))
                rows.append(Row(started, ids, parent.shown))
                started += 1
            for _ in range(data.draw(st.integers(0 if rows else 1, 2), label="fresh")):
                rows.append(Row(started, drawn(generator, data.draw(texts))))
                started += 1
    return checked


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=settings.default.max_examples // 10)
@given(data=st.data())
def test_over_any_history_a_session_scores_as_full_forwards_do(
    rewards: dict[Any, SequenceClassifier], body: str, pair: tuple[str, str], data: st.DataObject
) -> None:
    reward = rewards.setdefault((body, pair[1]), make_reward(body, pair[1]))
    assert run_history(data, reward, tokenizer(pair[0])) > 0
    assert reward.shared_body is not None
    assert reward.allowance.held == 0


@pytest.mark.parametrize("cache", ["off", "prompt", "full"])
@settings(max_examples=settings.default.max_examples // 10)
@given(data=st.data())
def test_whatever_is_cached_scores_are_the_same(
    rewards: dict[Any, SequenceClassifier], cache: str, data: st.DataObject
) -> None:
    reward = rewards.setdefault(("setting", cache), make_reward("llama", "merges", cache=cache, partial_turn="open"))
    assert run_history(data, reward, tokenizer("bytes"), prefix=data.draw(st.sampled_from(["", "So: ", "\n"]))) > 0
    assert (reward.shared_body is None) == (cache == "off")


@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data(), limit=st.integers(1, 400), most=st.sampled_from([4, 40, 16_384]))
def test_a_small_allowance_is_never_exceeded_and_changes_no_score(
    rewards: dict[Any, SequenceClassifier], data: st.DataObject, limit: int, most: int
) -> None:
    reward = rewards.setdefault("allowance", make_reward("llama", "bytes"))
    reward.max_padded_tokens = most
    reward.allowance = _Watched(limit)
    assert run_history(data, reward, tokenizer("bytes")) > 0
    assert reward.allowance.held == 0


class _Watched(Allowance):
    """Fails where more is held than allowed."""

    @property
    def held(self) -> int:
        return self._now

    @held.setter
    def held(self, tokens: int) -> None:
        assert self.limit is None or 0 <= tokens <= self.limit
        self._now = tokens


# -- what is read


def views(*texts: str, first: int = 0) -> list[RowView]:
    return [RowView(first + place, text, [5], None) for place, text in enumerate(texts)]


def length(reward: SequenceClassifier, text: str) -> int:
    return len(reward.renderer.inputs(CONVERSATION, views(text))[0].ids)


def read(reward: CheckpointReward, session: RewardSession, rows: list[RowView]) -> int:
    """Tokens fed for one look."""
    before = reward.tokens_scored
    scores = session.score(rows)
    fed = reward.tokens_scored - before
    assert scores == pytest.approx([plain_score(reward, row) for row in rows], abs=TOLERANCE)
    return fed


def test_a_look_reads_what_is_new_and_the_closing_tokens() -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(CONVERSATION)
    assert reward.tokens_scored == 0  # nothing is read before there is a row
    prompt = length(reward, "") - 1  # the turn's end
    assert read(reward, session, views("one", "three", "fourteen")) == prompt + (3 + 1) + (5 + 1) + (8 + 1)
    session.keep([0, 2])
    rows = [RowView(0, "one two", [5], None), RowView(2, "fourteen", [5], None)]
    assert read(reward, session, rows) == len(" two") + 1  # the other row has not changed
    session.keep([0])
    # row 0 goes on with other text, as at a seam; 7 and 8 are its forks; 9 is fresh
    rows = [RowView(0, "one twelve", [5], None), *views("one two, too", "one two", first=7), *views("x", first=9)]
    fed = read(reward, session, rows)
    assert fed == (len("elve") + 1) + (len(", too") + 1) + 0 + (len("x") + 1)
    session.close()


def test_equal_answers_are_exact_ties_and_are_read_once() -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(CONVERSATION)
    prompt = length(reward, "") - 1
    assert read(reward, session, views("same", "same", "other")) == prompt + 5 + 6
    scores = session.score(views("same!", "same!", "other"))
    assert scores[0] == scores[1] != scores[2]
    assert (
        read(reward, session, views("same!", "same?", "other")) == 2
    )  # they part: one goes on, one is read from there


def test_rows_that_do_not_go_on_are_freed_at_once() -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(CONVERSATION)
    session.score(views("one", "three", "fourteen"))
    prompt = length(reward, "") - 1
    assert reward.allowance.held == prompt + 3 * 16  # capacities are multiples of 16
    session.keep([2, 2])
    assert reward.allowance.held == prompt + 16
    session.keep([])
    assert reward.allowance.held == prompt
    session.close()
    session.close()
    assert reward.allowance.held == 0


def test_the_prompt_alone_is_kept_where_that_is_asked_for_or_all_there_is_room_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for limit, cache in ((None, "prompt"), (100, "full")):
        reward = make_reward("llama", "bytes", cache=cache)
        reward.allowance = Allowance(limit)
        session = reward.open(CONVERSATION)
        prompt = length(reward, "") - 1
        assert prompt + 3 * 16 > 100 > prompt
        assert read(reward, session, views("one", "three", "fourteen")) == prompt + 4 + 6 + 9
        assert read(reward, session, views("one!", "three!", "fourteen!")) == 5 + 7 + 10
        assert reward.allowance.held == prompt
    assert [record.message for record in caplog.records if "its caches" in record.message] == [
        "reward_model=reward model: its caches may hold 100 tokens, too few for every row, so only the prompt is kept "
        "(reported once). Raise reward_kv_budget_tokens to cache more."
    ]


def test_where_not_even_the_prompt_has_room_every_look_is_read_in_full(caplog: pytest.LogCaptureFixture) -> None:
    reward = make_reward("llama", "bytes")
    reward.allowance = Allowance(20)
    session = reward.open(CONVERSATION)
    for _ in range(2):
        assert read(reward, session, views("one", "three")) == length(reward, "one") + length(reward, "three")
    assert sum("read in full" in record.message for record in caplog.records) == 1


def test_the_allowance_is_a_share_of_free_memory_unless_given() -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(CONVERSATION)
    assert reward.allowance.limit is None
    session.score(views("one"))
    assert reward.allowance.limit is not None
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head dim, bytes
    free = psutil.virtual_memory().available
    assert 0.1 * free < reward.allowance.limit * per_token < 0.4 * free


@pytest.mark.parametrize("rows_that_fit", [0, 1, 2])
def test_out_of_memory_costs_reading_and_no_score(
    rows_that_fit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(CONVERSATION)
    body = reward.shared_body
    assert body is not None
    extend = body.extend

    def tight(parts: Any) -> Any:
        if sum(part.num_rows for part in parts) > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return extend(parts)

    monkeypatch.setattr(body, "extend", tight)
    for texts in (("one", "three", "fourteen"), ("one!", "three!", "fourteen!")):
        assert read(reward, session, views(*texts)) >= 3
    assert sum("memory is running low" in record.message for record in caplog.records) == (rows_that_fit == 0)
    if rows_that_fit == 0:
        assert reward.allowance.held == 0


def test_inputs_cut_on_the_left_are_scored_as_they_read(caplog: pytest.LogCaptureFixture) -> None:
    reward = make_reward("llama", "bytes")
    prompt = length(reward, "") - 1
    reward.renderer.max_length = prompt + 8
    session = reward.open(CONVERSATION)
    for texts in (("one", "short"), ("one two", "short but growing"), ("one two three", "short but growing on")):
        read(reward, session, views(*texts))
    assert sum("cut on the left" in record.message for record in caplog.records) == 1


# -- heads that read elsewhere


class _Sum:
    """One number per position read, added up."""

    weight = torch.randn(32, generator=torch.Generator().manual_seed(5))

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(hidden @ self.weight) * mask).sum(-1)


def every_ninth(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(3, len(ids), 9))


def prompt_and_last(ids: tuple[int, ...]) -> tuple[int, ...]:
    return 5, len(ids) - 1


def parity(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Positions that were of no interest before come to be wanted later."""
    return tuple(range(len(ids) % 2, len(ids), 2))


@pytest.mark.parametrize("positions_of", [every_ninth, prompt_and_last, parity])
@settings(max_examples=settings.default.max_examples // 10)
@given(data=st.data())
def test_hidden_states_of_earlier_looks_are_there_for_the_head(
    rewards: dict[Any, SequenceClassifier], positions_of: Any, data: st.DataObject
) -> None:
    classifier = rewards.setdefault("body", make_reward("llama", "merges"))
    reward = CheckpointReward(classifier.body, _Sum(), classifier.renderer, positions_of=positions_of)
    reward.shared_body = SharedBody(classifier.body)
    texts = data.draw(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), min_size=1, max_size=4))
    session = reward.open(CONVERSATION)
    for look in range(1, 4):
        rows = views(*("".join(pieces[: 2 * look]) for pieces in texts))
        scores = session.score(rows)
        assert scores == pytest.approx(reward.score(CONVERSATION, rows), abs=TOLERANCE)


# -- company


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, TOLERANCE), (torch.bfloat16, BFLOAT16_BOUND)])
@pytest.mark.parametrize("body", BODIES)
def test_company_batch_size_and_padding_side_change_no_score(body: str, dtype: torch.dtype, bound: float) -> None:
    texts = ["one", "three, and more of it", "fourteen", "", "京都 " * 9, "x"]
    seen = []
    for side in ("left", "right"):
        for most in (16_384, 8):
            reward = make_reward(body, "bytes", max_padded_tokens=most)
            reward.body.to(dtype)
            reward.renderer.tokenizer.padding_side = side
            for cache in ("off", "prompt", "full"):
                reward.cache = cache
                seen.append(reward.open(CONVERSATION).score(views(*texts)))
                alone = [reward.open(CONVERSATION).score(views(text))[0] for text in texts]
                seen.append(alone)
    table = torch.tensor(seen)
    assert table.std(1).min() > 0.1, "the rows' scores must differ for this to say anything"
    worst = (table.max(0).values - table.min(0).values).max().item()
    assert worst <= bound * (1 if dtype == torch.float32 else table.abs().max().item())


# -- bodies that cannot, and errors


def test_an_encoder_is_scored_in_full_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    tokens = tiny_tokenizer(chat_template=None, pair=True)
    reward = SequenceClassifier(tiny_reward_model("bert"), tokens)
    session = reward.open(CONVERSATION)
    caplog.clear()
    rows = views("one", "three")
    assert session.score(rows) == reward.score(CONVERSATION, rows)
    assert not [record for record in caplog.records if "in full" in record.message]


@pytest.mark.parametrize("arch", ["falcon", "bloom"])
def test_a_body_whose_attention_cannot_be_exchanged_is_scored_in_full_and_says_so(
    arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"n_head": 4, "n_layer": 2} if arch == "bloom" else {}
    reward = SequenceClassifier(tiny_reward_model(arch, **sizes), tiny_tokenizer())
    rows = views("one", "three")
    for _ in range(2):
        assert reward.open(CONVERSATION).score(rows) == reward.score(CONVERSATION, rows)
    assert sum("every look is read in full" in record.message for record in caplog.records) == 1


def test_a_probe_that_differs_is_not_trusted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reward = make_reward("llama", "bytes")
    monkeypatch.setattr(SharedBody, "_try_out", lambda self: (0.5, 1.0))
    session = reward.open(CONVERSATION)
    assert read(reward, session, views("one")) == length(reward, "one")
    assert "hidden states differ by 5.0e-01" in caplog.text


def test_hidden_states_that_are_no_numbers_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    body = SharedBody(make_reward("llama", "bytes").body)
    extend = SharedBody.extend

    def broken(self: SharedBody, parts: Any) -> list[tuple[torch.Tensor, ...]]:
        return [(*rows[:-1], rows[-1] * math.nan) for rows in extend(self, parts)]

    assert body.probe() is None
    monkeypatch.setattr(SharedBody, "extend", broken)
    assert body.probe() == "hidden states differ by nan"


def test_a_window_that_never_arrives_is_not_trusted() -> None:
    sizes = {**BODIES["gemma2"][1], "sliding_window": 64}  # longer than the probe: in its numbers nothing shows
    model = tiny_reward_model("gemma2", **sizes)
    assert SharedBody(model.model).probe() is None
    model.model.layers[0].self_attn.sliding_window = None
    assert SharedBody(model.model).probe() == "its sliding window never reaches the attention function"


def test_beyond_the_rope_limit_a_row_is_read_alone_and_in_full() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    long = "many words " * 8
    model = tiny_reward_model("llama", max_position_embeddings=96, rope_parameters=rope)
    reward = SequenceClassifier(model, tokenizer("bytes"))
    reward.renderer.max_length = None
    rows = views("one", long, long + "!")
    assert length(reward, "one") < 96 < length(reward, long)

    def fresh(row: RowView) -> float:  # a model that has seen no other sequence
        other = tiny_reward_model("llama", max_position_embeddings=96, rope_parameters=rope)
        scorer = SequenceClassifier(other, tokenizer("bytes"))
        scorer.renderer.max_length = None
        return plain_score(scorer, row)

    want = [fresh(row) for row in rows]
    for _ in range(2):
        assert reward.open(CONVERSATION).score(rows) == pytest.approx(want, abs=TOLERANCE)
        assert reward.score(CONVERSATION, rows) == pytest.approx(want, abs=TOLERANCE)


def test_the_models_own_attention_is_back_after_a_look_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make_reward("llama", "bytes")
    own = reward.body.config._attn_implementation
    session = reward.open(CONVERSATION)
    session.score(views("one"))
    assert reward.body.config._attn_implementation == own
    assert reward.shared_body is not None

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(reward.shared_body, "extend", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        session.score(views("one two"))
    assert reward.body.config._attn_implementation == own
    session.close()
    assert reward.allowance.held == 0


# -- the loop


def test_the_loop_gives_the_same_rounds_cuts_and_texts_for_every_setting() -> None:
    prompts = ["Add: 21 + 96 + 85 =", "Add: 30 + 44 + 18 + 7 ="]
    results = {}
    for cache, budget in (("off", None), ("prompt", None), ("full", None), ("full", 200)):
        generator = specrej_eval.load(n=16, max_gen_toks=64, reward_cache=cache, reward_kv_budget_tokens=budget)
        results[cache, budget] = generator.generate(prompts)
        assert getattr(generator.reward, "allowance").held == 0  # noqa: B009  # not part of the protocol
    off = results.pop(("off", None))
    for setting, found in results.items():
        for mine, theirs in zip(found, off, strict=True):
            assert [row.token_ids for row in mine.trajectories] == [row.token_ids for row in theirs.trajectories]
            assert [row.finish_reason for row in mine.trajectories] == [r.finish_reason for r in theirs.trajectories]
            assert mine.best.row == theirs.best.row
            assert [round_.kept for round_ in mine.rounds] == [round_.kept for round_ in theirs.rounds]
            cuts = [(a.cut, b.cut) for a, b in zip(mine.rounds, theirs.rounds, strict=True) if a.cut is not None]
            assert all(a == pytest.approx(b, abs=TOLERANCE) for a, b in cuts)
            assert mine.ledger.reward_tokens < theirs.ledger.reward_tokens, setting
    full, prompt = results["full", None], results["prompt", None]
    assert sum(r.ledger.reward_tokens for r in full) < 0.85 * sum(r.ledger.reward_tokens for r in prompt)


def test_sessions_are_closed_when_a_run_ends_in_an_error() -> None:
    generator = specrej_eval.load(n=4, max_gen_toks=64, batch_size=2)
    opened: list[Any] = []
    real = generator.reward.open

    def recording(*args: Any) -> Any:
        session = real(*args)
        opened.append(session)
        if len(opened) == 2:
            session.score = lambda rows: (_ for _ in ()).throw(RewardError("no such luck"))
        return session

    generator.reward.open = recording  # type: ignore[method-assign]
    with pytest.raises(RewardError, match="no such luck"):
        generator.generate(["Add: 21 + 96 =", "Add: 30 + 44 ="])
    assert len(opened) == 2
    assert generator.reward.allowance.held == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["bytes", "merges", "unigram"])
@given(
    texts=st.lists(
        st.tuples(
            st.lists(st.sampled_from([*PIECES, "<|end|>", "<eos>", "\ufffd", ""]), max_size=5).map("".join),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    turn=st.sampled_from(["closed", "open"]),
)
def test_inputs_that_are_made_together_are_those_of_each_row_by_itself(
    kind: str, texts: list[tuple[str, bool]], turn: str
) -> None:
    renderer = make_reward("llama", kind, partial_turn=turn).renderer
    if kind == "unigram":  # its special tokens cannot be told from content: an error of its own
        texts = [(text.replace("<|end|>", "").replace("<eos>", ""), finished) for text, finished in texts]
    rows = [RowView(row, text, (), "eos" if finished else None) for row, (text, finished) in enumerate(texts)]
    together = renderer.inputs(CONVERSATION, rows, "so: ")
    assert together == [renderer.inputs(CONVERSATION, [row], "so: ")[0] for row in rows]


def test_a_text_that_no_tokenizer_takes_is_named_among_others() -> None:
    rows = [RowView(0, "a", (), "eos"), RowView(1, "half \ud83d of a character", (), "eos")]
    with pytest.raises(RewardError, match="row 1"):
        make_reward().renderer.inputs(CONVERSATION, rows)
