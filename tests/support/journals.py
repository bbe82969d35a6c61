"""Journals of made-up answers, for the tests of what becomes of them."""

from __future__ import annotations

from pathlib import Path

from specrej_eval.core import GenerationResult, Ledger, Prompt, Round, Trajectory
from specrej_eval.records.journal import Journal, request_key

FINGERPRINT = {"pretrained": "org/policy", "reward_model": "org/judge"}


def a_result(number: int) -> GenerationResult:
    rows = [
        Trajectory(row, f"answer {number}.{row}", [number, row, 7], 0.5 * row, "eos" if row else "rejected", row)
        for row in range(3)
    ]
    return GenerationResult(
        best=rows[2],
        trajectories=rows,
        rounds=[Round(rows=3, tokens=3, cut=0.5, kept=2, finished=0, rejected=1, kv_tokens=20)],
        ledger=Ledger(decode_tokens=9, rows_started=3, rows_finished=2, rows_rejected=1),
        prompt_hash=f"{number:064x}",
        task="task",
        resolved={"seed": 0, "n": 3},
    )


def a_prompt(number: int) -> Prompt:
    return Prompt(token_ids=(number,), conversation=(), prompt_hash=f"{number:064x}", task="task")


def key_of(number: int) -> str:
    return request_key(a_prompt(number), {"alpha": 0.5}, ())


def a_journal(path: Path, answers: int = 6) -> list[bytes]:
    journal = Journal(str(path), FINGERPRINT)
    for number in range(answers):
        journal.put(key_of(number), a_result(number))
    journal.close()
    return path.read_bytes().splitlines(keepends=True)
