"""Scores of sessions against one unpadded forward pass per row: the same over any history, and far fewer tokens read."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_sessions import BODIES, CONVERSATION, PAIRS, PIECES, Row, drawn, make_reward, plain_score, tokenizer

from specrej_eval.rewards.sequence_classifier import SequenceClassifier

TOLERANCE = 1e-4


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
