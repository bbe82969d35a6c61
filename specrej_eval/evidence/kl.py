"""How far a method can have moved from the language model: upper bounds of KL(answers || model), in nats.

Best-of-n of n rows drawn alike: log n - (n - 1) / n (an upper bound: Beirami et al. 2401.01879). Whatever returns one
of n rows drawn alike, Speculative Rejection included: its density is at most n times the model's, so log n. Neither
holds where rows are forked.
"""

from __future__ import annotations

from math import log


def best_of_n(n: int) -> float:
    return log(n) - (n - 1) / n


def one_of(n: int) -> float:
    return log(n)
