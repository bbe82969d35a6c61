"""A small lm-eval task made in Python."""

from __future__ import annotations

from typing import Any

import datasets

QUESTIONS = ["Name a fruit.", "Count to three, please.", "What is the capital of France?", "Say hello.", "1 + 1 = ?"]


def task(name: str = "toy", *, questions: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    rows = [{"question": question, "answer": "yes"} for question in questions or QUESTIONS]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
