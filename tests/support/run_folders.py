"""Folders of answers for the tests of what reads them, written by the class that writes them for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrej_eval.core import Ledger, prompt_hash
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.outputs import OutputsFolder

FINGERPRINT: dict[str, Any] = {
    "pretrained": "org/policy",
    "pretrained_files": None,
    "reward_model": "org/judge",
    "reward_files": "abc",
    "strategy": "best_of_n",
    "alpha": None,
    "n": 4,
    "temperature": 1.0,
    "seed": 0,
}


def an_answer(
    instruction: str,
    *,
    reward: float | None = 0.0,
    seed: int = 0,
    index: int | None = None,
    repeat: int = 0,
    n: int = 4,
    **changes: Any,
) -> Answer:
    """One answer with a ledger of ``n`` rows of ten tokens, that says in its text where it comes from."""
    values: dict[str, Any] = {
        "instruction": instruction,
        "output": f"{instruction} answered with seed {seed} for {reward}",
        "reward": reward,
        "finish_reason": "eos",
        "num_tokens": 10,
        "n": n,
        "seeds": [seed],
        "index": index,
        "finished_rewards": [] if reward is None else [reward, reward - 1],
        "ledger": Ledger(prompt_tokens=3, decode_tokens=10 * n, rows_started=n, seconds={"decode": 0.5}),
        "seconds": 0.5,
        "resolved": {"n": n, "seed": seed},
        "prompt_hash": prompt_hash(instruction),
        "repeat": repeat,
        "key": f"{seed}/{instruction}/{repeat}",
    }
    return Answer(**{**values, **changes})


def a_run(
    folder: Path, answers: list[Answer], *, name: str = "a run", complete: bool = True, **fingerprint: Any
) -> str:
    """Write a run as `specrej-eval run` does; its path."""
    store = OutputsFolder(folder)
    record = RunRecord(name=name, fingerprint={**FINGERPRINT, **fingerprint}, arguments={"prompts": "p.csv"})
    store.begin(record)
    if complete:
        store.merge_parts(answers)
        store.mark_complete(record, answers)
    else:
        for answer in answers:
            store.put(answer)
        store.close()
    return str(folder)
