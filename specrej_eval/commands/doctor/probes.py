"""What `specrej-eval doctor --reward` asks a reward model: pairs of which one answer is plainly better, and answers of
mixed worth of which the first half is scored too."""

from __future__ import annotations

import json
from typing import NamedTuple

from specrej_eval import demo


class Probes(NamedTuple):
    pairs: tuple[tuple[str, str, str], ...]
    """(prompt, better answer, worse answer)."""
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    """(prompt, answers of mixed worth)."""
    in_order: tuple[tuple[int, int], ...] = ((0, 3), (1, 4), (2, 5))
    """Places in ``answers`` of (better, worse)."""


PROBES = Probes(
    pairs=(
        ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is Oslo."),
        (
            "Jane has 12 apples. She eats 5 and buys 8 more. How many apples does she have now?",
            "She starts with 12, eats 5 and has 7 left, then buys 8 more: 7 + 8 = 15. Jane has 15 apples.",
            "She starts with 12, eats 5 and has 6 left, then buys 8 more: 6 + 8 = 20. Jane has 20 apples.",
        ),
        (
            "Explain in one or two sentences why the sky is blue.",
            "Air scatters the short wavelengths of sunlight more strongly than the long ones, so blue light reaches "
            "our eyes from every part of the sky.",
            "sky sky sky sky sky sky sky blue blue blue blue sky sky sky blue sky sky sky sky",
        ),
        (
            "Write a short, polite e-mail that declines an invitation to a meeting on Friday.",
            "Dear Ms Lee,\n\nThank you for the invitation. Unfortunately I already have an appointment on Friday and "
            "cannot attend. I would be glad to meet early next week instead.\n\nKind regards,\nSam",
            "No. I won't come, your meetings are a waste of everybody's time and you should know that by now.",
        ),
        (
            "Write a Python function that returns the larger of two numbers.",
            "```python\ndef larger(a, b):\n    return a if a >= b else b\n```",
            "```python\ndef larger(a, b):\n    print(a + b)\n```",
        ),
        (
            "How do I boil an egg so that the yolk stays soft?",
            "Bring water to a boil, lower the egg in with a spoon, and cook it for six minutes. Then put it into cold "
            "water for a minute so that it stops cooking.",
            "The stock market closed slightly higher yesterday, led by technology and energy shares.",
        ),
    ),
    answers=(
        (
            "Name three benefits of regular exercise.",
            (
                "1. A stronger heart: regular exercise lowers blood pressure.\n2. A better mood: it releases "
                "endorphins and lowers stress.\n3. Better sleep: people who move fall asleep sooner and sleep deeper.",
                "It strengthens your heart, it helps you sleep better, and it is good for your mood.",
                "Exercise is good. It is good for the body and it is also good because it is healthy and good.",
                "exercise exercise exercise exercise exercise exercise exercise exercise exercise exercise",
                "Bananas are yellow because they contain carotenoids, and they are mostly grown near the equator.",
                "I don't want to talk about that. Ask somebody else, this is a stupid question anyway.",
            ),
        ),
        (
            "What is 17 times 6? Show how you get there.",
            (
                "Split 17 into 10 and 7. 10 times 6 is 60 and 7 times 6 is 42. 60 + 42 = 102, so 17 times 6 is 102.",
                "17 times 6 is the same as 6 times 17. 6 times 17 = 102.",
                "Split 17 into 10 and 7. 10 times 6 is 66 and 7 times 6 is 40. 66 + 40 = 108, so the answer is 108.",
                "It is a number. Numbers can be multiplied, and 17 times 6 is a multiplication of two numbers.",
                "17 17 17 17 17 17 6 6 6 6 6 6 17 17 17 6 6 6",
                "Paris is the capital of France and has about two million inhabitants in the city itself.",
            ),
        ),
        (
            "Summarise in one sentence: The town library will close for repairs from June to August. Books can be "
            "returned to the town hall, and all loans are extended until September.",
            (
                "The town library closes for repairs from June to August; returns go to the town hall and all loans "
                "run until September.",
                "The library is closed in summer, but books can be returned to the town hall.",
                "The library will close for ever and all books have to be paid for at the town hall by June.",
                "Libraries are places where people can read and borrow books, and many towns have one of them.",
                "library library library library closes closes closes June June June June August library library",
                "lol who still reads books, just watch a video about it like everybody else does these days",
            ),
        ),
        (
            "My flight was cancelled. What should I do first?",
            (
                "First contact the airline, by its app, phone or desk, and ask for the next free seat or a refund. "
                "Keep your receipts, since meals and a hotel are often paid for.",
                "Ask the airline to rebook you, and find out whether you can get your money back.",
                "Flights are sometimes cancelled. That can have many reasons, for example the weather or a strike.",
                "Walk to the plane and get in anyway; nobody will stop you if you look as if you belonged there.",
                "flight flight cancelled cancelled what what do do first first flight flight cancelled",
                "To bake bread you need flour, water, yeast and a little salt, and above all some patience.",
            ),
        ),
    ),
)


def demo_probes() -> Probes:
    """The same for the embedded reward model, which knows nothing but worked sums."""
    told = json.loads(demo.PROBES.read_text(encoding="utf-8"))
    return Probes(
        pairs=tuple(map(tuple, told["pairs"])),
        answers=tuple((prompt, tuple(answers)) for prompt, answers in told["answers"]),
        in_order=tuple(map(tuple, told["in_order"])),
    )
