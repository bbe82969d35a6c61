"""Golden numbers: what the same arguments and models give. Run this file to write them anew; see ``WHEN``.

``PYTHONPATH=tests python tests/system/test_numbers.py`` writes them, and refuses while
``NUMBERS_VERSION`` is still that of other numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from support import GOLDEN

from specrej_eval import load
from specrej_eval.engines.transformers import sampling
from specrej_eval.records.fingerprint import NUMBERS_VERSION

NUMBERS = GOLDEN / "numbers.json"
WHEN = (
    "numbers have changed: if that is meant, raise NUMBERS_VERSION in specrej_eval/records/fingerprint.py (journals, "
    "caches and folders of before are then refused) and regenerate by "
    "`PYTHONPATH=tests python tests/system/test_numbers.py`"
)
PROMPTS = ["Q: 3+14=?\nA:", "Q: 27+5=?\nA:", [{"role": "user", "content": "What is 8+9?"}]]
RUNS: dict[str, dict[str, Any]] = {
    "speculative rejection": {"alpha": 0.5, "n": 8, "first_look": 2},
    "a tight budget": {"alpha": 0.3, "n": 12, "kv_budget_tokens": 80},
    "best of n": {"strategy": "best_of_n", "n": 6, "seed": 7},
    "filters": {"alpha": 0.5, "n": 6, "temperature": 1.5, "top_p": 0.9, "top_k": 7, "min_p": 0.02},
    "likelihood": {"alpha": 0.5, "n": 6, "reward_model": "likelihood"},
}
"""Small, and on the embedded pair; sums are float32 and rewards rounded, so that they hold on every CPU."""


def numbers() -> dict[str, Any]:
    found: dict[str, Any] = {"draws": draws()}
    for name, arguments in RUNS.items():
        generator = load(**{"max_gen_toks": 12, "device": "cpu", **arguments})
        results = generator.generate(PROMPTS, until="\n")
        found[name] = [
            {
                "rows": [
                    [row.token_ids, row.text, row.finish_reason, rounded(row.reward)] for row in result.trajectories
                ],
                "best": result.best.row,
                "rounds": [[round_.rows, round_.tokens, round_.kept, round_.finished] for round_ in result.rounds],
            }
            for result in results
        ]
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def draws() -> dict[str, Any]:
    """The uniforms of the first steps of four rows, to the last bit, and the tokens they draw from fixed logits."""
    streams = sampling.row_stream(torch.tensor([1, 1, 1, -5]), torch.tensor([0, 1, 2, 0]))
    uniforms = sampling.uniform(streams[:, None], torch.arange(8)[None, :])  # (rows, steps)
    logits = (torch.arange(40) * 7 % 11).float()[None]
    kinds = [sampling.SamplingParams(), sampling.SamplingParams(0.7, 5, 0.8, 0.05), sampling.SamplingParams(2.0, 0)]
    tokens = [[sampling.sample(logits, row, kind).tolist() for row in uniforms] for kind in kinds]
    return {"uniforms": [[value.hex() for value in row] for row in uniforms.tolist()], "tokens": tokens}


def rounded(reward: float | None) -> float | None:
    return None if reward is None else round(reward, 3)


def agree(one: Any, other: Any) -> bool:
    """Equal, but for a reward that falls on the other side of a rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 2e-3
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in one)
    return bool(one == other)


def test_the_numbers_are_those_of_this_version(counted: Callable[..., None]) -> None:
    golden = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert golden["numbers_version"] == NUMBERS_VERSION, f"{NUMBERS.name} is of another version: {WHEN}"
    found = numbers()
    changed = [name for name in found if not agree(found[name], golden["numbers"].get(name))]
    assert not changed, f"{', '.join(changed)}: {WHEN}"
    counted("golden rows compared", sum(len(result["rows"]) for name in RUNS for result in found[name]))


def test_a_changed_number_is_noticed() -> None:
    golden = json.loads(NUMBERS.read_text(encoding="utf-8"))["numbers"]
    for name in RUNS:
        other = json.loads(json.dumps(golden))
        other[name][0]["rows"][0][0][-1] += 1
        assert not agree(golden, other)
        other = json.loads(json.dumps(golden))
        other[name][0]["rows"][0][3] += 0.01
        assert not agree(golden, other)


if __name__ == "__main__":
    made = numbers()
    if NUMBERS.is_file():
        before = json.loads(NUMBERS.read_text(encoding="utf-8"))
        if before["numbers_version"] == NUMBERS_VERSION and not agree(before["numbers"], made):
            sys.exit(WHEN)
    NUMBERS.write_text(json.dumps({"numbers_version": NUMBERS_VERSION, "numbers": made}, indent=None) + "\n")
    print(f"wrote {NUMBERS}")
