"""Any file of prompts as a task of lm-eval, scored by the reward that chose the answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specrej_eval.errors import ConfigError
from specrej_eval.records.prompt_files import read_prompts

VARIABLE = "SPECREJ_PROMPTS"


def load(*, prompts: str | None = None, prompt_column: str | None = None, **_: Any) -> dict[str, Any]:
    """The task's one split. lm-eval passes its --metadata, and all --model_args, which are not meant for us.

    Raises:
        ConfigError: no file is named, there is none, or a row of it is wrong.
    """
    from datasets import Dataset

    path = prompts if prompts is not None else os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(
            "the task specrej_prompts does not know which prompts to read.",
            hint=f"--metadata prompts=FILE names a JSON, JSONL, CSV or TSV file; so does {VARIABLE}=FILE.",
        )
    records = read_prompts(path, prompt_column=prompt_column)
    return {"test": Dataset.from_list([{"index": item.index, "instruction": item.instruction} for item in records])}


def all_draws(answers: Iterable[Sequence[str]], docs: Any) -> list[list[str]]:
    """Every answer to each prompt (`repeats`), where lm-eval's default would look at the first alone."""
    return [list(draws) for draws in answers]


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean reward and length of a prompt's answers. A prompt whose answers have no finite reward has no reward.

    Raises:
        ConfigError: the answers are another model's, which has no rewards.
    """
    from specrej_eval.harness.lm_eval.requests import ScoredText

    answers = [answer for draws in results for answer in draws]
    scored = [answer for answer in answers if isinstance(answer, ScoredText)]
    if len(scored) < len(answers):
        raise ConfigError(
            "the task specrej_prompts reports the reward of each answer, and this model's answers have none.",
            hint="plain sampling of the same checkpoint is --model best_of_n --model_args n=1,pretrained=...,"
            "reward_model=...",
        )
    rewards = [answer.reward for answer in scored if answer.reward is not None]
    found = {"answer_tokens": sum(answer.num_tokens for answer in scored) / len(scored)}
    return {"reward": sum(rewards) / len(rewards), **found} if rewards else found
