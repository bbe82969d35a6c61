"""Writes specrej_eval/demo/probes.json: what `specrej-eval doctor` asks the embedded reward model."""

import json
import random
from typing import Any

from arithmetic import Operands, distinct_problems, noise, question, slip, solution

from specrej_eval.demo import PROBES


def probes() -> dict[str, Any]:
    """Worked sums beside sums with a slip. Of mixed answers the first alone is right."""
    rng = random.Random(4)

    def slipped(operands: Operands) -> str:
        while (text := slip(operands, rng)) == solution(operands):
            pass
        return text

    pairs = [
        (question(operands), solution(operands), slipped(operands))
        for operands in distinct_problems("select", 6, seed=4)
    ]
    answers = []
    for operands in distinct_problems("select", 4, seed=5):
        mixed = [solution(operands), *(slipped(operands) for _ in range(7)), noise(operands, rng)]
        answers.append((question(operands), mixed))
    return {"pairs": pairs, "answers": answers, "in_order": [(0, 1)]}


if __name__ == "__main__":
    PROBES.write_text(json.dumps(probes(), indent=1) + "\n")
