"""The scores that authors publish, from their own checkpoints. Downloads 8 to 140 GB a model:

    HF_HUB_OFFLINE=0 pytest tests/hub -k Skywork-Reward-V2

Skipped where the hub is switched off, which is everywhere else in these tests (conftest.py).
"""

from __future__ import annotations

import os

import pytest
import torch
from support.published import PUBLISHED, Published
from support.rewards import make_reward

from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("HF_HUB_OFFLINE") != "0",
        reason="downloads the authors' checkpoints; HF_HUB_OFFLINE=0 pytest tests/hub -k MODEL",
    ),
    pytest.mark.timeout(7200),
]


def loaded(checkpoint: str, **options: object) -> CheckpointReward:
    config = RunConfig(pretrained="x").replace(reward_model=checkpoint, **{"reward_dtype": "bfloat16", **options})
    reward = make_reward(config, device="cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(reward, CheckpointReward)
    return reward


def rows(*answers: str) -> list[RowView]:
    return [RowView(i, answer, [], "eos") for i, answer in enumerate(answers)]


@pytest.mark.parametrize("example", PUBLISHED, ids=lambda example: example.title)
def test_published_scores_come_out(example: Published) -> None:
    reward = loaded(example.checkpoint, **example.options)
    scores = reward.score([{"role": "user", "content": example.prompt}], rows(*example.answers))
    if example.differences:
        scores = [scores[0] - scores[1]]
    note = example.where if example.seen else f"{example.where} (not seen in print)"
    assert scores == pytest.approx(list(example.scores), abs=example.within), note


def test_armorms_ratings_are_those_of_its_card() -> None:
    """The card prints no score but HelpSteer's five ratings: rewards * 5 - 0.5."""
    reward = loaded("RLHFlow/ArmoRM-Llama3-8B-v0.1")
    prompt = 'What are some synonyms for the word "beautiful"?'
    answer = "Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant"
    (entry,) = reward.renderer.inputs([{"role": "user", "content": prompt}], rows(answer))
    with torch.inference_mode():
        last = reward.body(torch.tensor([entry.ids], device=reward.device))[0][0, -1].float()
        ratings = reward.head.regression_layer(last)[:5] * 5 - 0.5  # type: ignore[union-attr]
    assert ratings.tolist() == pytest.approx([2.78125, 2.859375, 3.484375, 1.3847656, 1.296875], abs=0.1)
