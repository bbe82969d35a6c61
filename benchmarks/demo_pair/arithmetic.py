"""Step-by-step sums: problems, their worked solutions, plausible mistakes, and the split that keeps problem sets apart.

    Q: 12 + 45 + 33 = ?
    A: 12+45=57; 57+33=90. Answer: 90

Standard library only, so that tests can use it without torch.
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

Split = Literal["train", "select", "test"]
Operands = tuple[int, ...]

LOWEST, HIGHEST = 10, 99
"""Every operand has two digits, so that all prompts with the same number of operands have the same length."""

NUM_OPERANDS = 8
"""Operands of a benchmark problem; training also sees shorter sums."""

_NUM_BUCKETS = 64
_HELD_OUT_BUCKETS: dict[int, Split] = {0: "test", 1: "select"}
_ANSWER = re.compile(r"Answer: ?(-?\d+)")


def split_of(operands: Sequence[int]) -> Split:
    """The split a problem belongs to: a hash of its *sorted* operands.

    The splits are therefore disjoint by construction, and no reordering of a held-out sum can be trained on either.
    """
    key = ",".join(map(str, sorted(operands))).encode()
    return _HELD_OUT_BUCKETS.get(zlib.crc32(key) % _NUM_BUCKETS, "train")


def problems(split: Split, rng: random.Random, num_operands: int = NUM_OPERANDS) -> Iterator[Operands]:
    """An endless stream of problems of one split."""
    while True:
        operands = tuple(rng.randint(LOWEST, HIGHEST) for _ in range(num_operands))
        if split_of(operands) == split:
            yield operands


def training_batches(rng: random.Random, batch_size: int, short_share: float) -> Iterator[list[Operands]]:
    """Batches of training problems, equally long within a batch; a share of the batches has shorter sums."""
    while True:
        short = rng.random() < short_share
        num_operands = rng.randint(2, NUM_OPERANDS - 1) if short else NUM_OPERANDS
        yield list(islice(problems("train", rng, num_operands), batch_size))


def distinct_problems(split: Split, count: int, seed: int) -> list[Operands]:
    """`count` problems of a split, no two of them reorderings of one another."""
    seen: set[Operands] = set()
    chosen: list[Operands] = []
    for operands in problems(split, random.Random(seed)):
        key = tuple(sorted(operands))
        if key not in seen:
            seen.add(key)
            chosen.append(operands)
        if len(chosen) == count:
            break
    return chosen


def question(operands: Sequence[int]) -> str:
    """Spaced, so that the last operand is followed by the same character as the others (it is learnt far sooner so)."""
    return " + ".join(map(str, operands)) + " = ?"


def prompt(operands: Sequence[int]) -> str:
    """The text the policy continues; the same as the chat template's rendering of `question` as a user turn."""
    return f"Q: {question(operands)}\nA:"


def solution(operands: Sequence[int]) -> str:
    """The one worked solution that counts as correct, with its leading space."""
    return _chain(operands, [])


def answer_of(text: str) -> int | None:
    """The number after the first "Answer:", if the text gets that far."""
    found = _ANSWER.search(text)
    return int(found.group(1)) if found else None


def num_correct_chars(operands: Sequence[int], text: str) -> int:
    """How many leading characters of `text` agree with the worked solution."""
    for index, (got, want) in enumerate(zip(text, solution(operands), strict=False)):
        if got != want:
            return index
    return min(len(text), len(solution(operands)))


def right_chars(operands: Sequence[int], text: str) -> list[bool]:
    """For every character of `text`, whether it is right *given what was written before it*.

    A step is measured against the running sum that the step before it arrived at, right or wrong, and a sum against
    the two numbers as written. So a slip is marked where it happens, and consistent steps after it are right again.
    """
    marks: list[bool] = []
    total: int | None = operands[0]
    steps, final, answer = text.partition(".")
    for index, step in enumerate(steps.split(";"), start=1):
        if index > 1:
            marks.append(index < len(operands) + 1 and total is not None)  # the semicolon
        right = operands[index] if index < len(operands) else None
        want = "" if total is None or right is None else f" {total}+{right}"
        addition, equals, result = step.partition("=")
        marks += _agreement(addition, want)
        left_written, _, right_written = addition.strip().partition("+")
        total = None
        if left_written.isdigit() and right_written.isdigit():
            total = int(left_written) + int(right_written)
        if equals:
            marks.append(addition == want or (total is not None and len(addition) == len(want)))
            marks += _agreement(result, "" if total is None else str(total))
            total = int(result) if result.isdigit() else None
    if final:
        complete = steps.count(";") == len(operands) - 2
        marks.append(complete)
        marks += _agreement(answer, f" Answer: {total}")
    return marks


def _agreement(written: str, want: str) -> list[bool]:
    return [place < len(want) and char == want[place] for place, char in enumerate(written)]


def slip(operands: Sequence[int], rng: random.Random) -> str:
    """A solution with one plausible slip, everything after it consistent with the slip.

    The slips: a wrong digit or a lost or gratuitous carry in a running sum, a wrongly copied or skipped or repeated
    operand, a running sum wrongly carried over to the next step or to the answer.
    """
    step = rng.randrange(1, len(operands))
    kind = rng.choice(("digit", "carry", "carry", "operand", "other operand", "carry over", "answer"))
    return _chain(operands, [(kind, step)], rng)


def noise(operands: Sequence[int], rng: random.Random) -> str:
    """The worked solution with a quarter of its digits drawn anew."""
    return "".join(
        rng.choice("0123456789") if char.isdigit() and rng.random() < 0.25 else char for char in solution(operands)
    )


def _wrong_digit(number: int, rng: random.Random) -> int:
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place] and not (place == 0 and d == "0")])
    return int("".join(digits))


def _near(number: int, rng: random.Random) -> int:
    return max(1, number + rng.choice((-100, -11, -10, -10, -9, -2, -1, -1, 1, 1, 2, 9, 10, 10, 11, 100)))


def _chain(operands: Sequence[int], slips: Sequence[tuple[str, int]], rng: random.Random | None = None) -> str:
    """The worked solution with the given (kind, step) slips; the last step's number is len(operands) - 1."""
    parts: list[str] = []
    total = operands[0]
    for step in range(1, len(operands)):
        kinds = {kind for kind, at in slips if at == step}
        left, right = total, operands[step]
        if rng is not None:
            if "operand" in kinds:
                right = _wrong_digit(right, rng)
            if "other operand" in kinds:
                right = rng.choice(operands)
            if "carry over" in kinds:
                left = rng.choice((_wrong_digit, _near))(left, rng)
        total = left + right
        if rng is not None:
            if "digit" in kinds:
                total = _wrong_digit(total, rng)
            if "carry" in kinds:
                total = _near(total, rng)
        parts.append(f" {left}+{right}={total}")
    if rng is not None and any(kind == "answer" for kind, _ in slips):
        total = rng.choice((_wrong_digit, _near))(total, rng)
    return ";".join(parts) + f". Answer: {total}"
