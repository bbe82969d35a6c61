"""Many prompts with a few rows each and a long beginning in common, as lm-eval's few-shot tasks have: ours and others.

    python benchmarks/many_prompts.py --vllm_python ~/venv-vllm/bin/python --output many_prompts.json

64 word problems behind the same five worked ones, 16 rows of 64 tokens each, EOS ignored. What is timed goes from all
prompts' ids to all rows' ids:

- ours: the loop of the library with batch_size=auto, Best-of-16 by the rows' own likelihood (so the scheduler, the
  statistics of every token and the choice of the best are in the time; a reward model's forward pass is not);
- vllm: n=16, prefix caching on and empty at the start, token ids only, no log-probabilities;
- generate: num_return_sequences=16, prompts padded on the left, --batch_rows rows at a time. Its batches are alike and
  know nothing of each other, so only the first --generate_prompts are run, and the time is scaled up to all;
- before: as ours, with an older checkout (--baseline_path).

Each peer is a process of its own; runs alternate, and the median of the pairs' ratios is the result.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from bench import SMOLLM2, alternating, byte_tokenizer, finish, header, parser, spread, table, write_checkpoint
from peers import SMALL_BLOCKS, add_options, started, warmed_up

SHOTS = (
    (
        "A baker makes 24 rolls in each tray and fills 7 trays before noon. In the afternoon she makes 3 more "
        "trays, but drops one of them on the floor and has to throw all of its rolls away. She sells every roll "
        "that is left for 2 dollars. How many dollars does she take in that day?",
        "Before noon the baker makes 24 * 7 = 168 rolls. In the afternoon she makes 24 * 3 = 72 rolls and loses "
        "24 of them, so 72 - 24 = 48 are left. Together that is 168 + 48 = 216 rolls. At 2 dollars each she takes"
        " in 216 * 2 = 432 dollars. The answer is 432.",
    ),
    (
        "Tom reads 15 pages of his book on every weekday and 40 pages on each day of the weekend. His book has "
        "460 pages. After three whole weeks, how many pages has he still to read?",
        "On the five weekdays Tom reads 15 * 5 = 75 pages, and on the weekend he reads 40 * 2 = 80 pages. In a "
        "week that is 75 + 80 = 155 pages. In three weeks he reads 155 * 3 = 465 pages, which is more than the "
        "460 pages of the book, so he has finished it and nothing is left to read. The answer is 0.",
    ),
    (
        "A school orders 12 boxes of pencils with 36 pencils in each box. The 18 teachers get 10 pencils each, "
        "and what remains is shared equally among 6 classrooms. How many pencils does each classroom get?",
        "The school orders 12 * 36 = 432 pencils. The teachers get 18 * 10 = 180 pencils. What remains is 432 - "
        "180 = 252 pencils. Each of the 6 classrooms gets 252 / 6 = 42 pencils. The answer is 42.",
    ),
    (
        "Maria saves 35 dollars a month. Her brother saves twice as much, but every third month he spends 50 "
        "dollars on a new game. How many dollars have the two of them together after a year?",
        "In a year Maria saves 35 * 12 = 420 dollars. Her brother puts aside 2 * 35 = 70 dollars a month, which "
        "makes 70 * 12 = 840 dollars. He buys 12 / 3 = 4 games for 4 * 50 = 200 dollars, so he has 840 - 200 = "
        "640 dollars. Together they have 420 + 640 = 1060 dollars. The answer is 1060.",
    ),
    (
        "A train leaves with 180 passengers. At the first stop 45 get off and 30 get on. At the second stop a "
        "third of the passengers get off and nobody gets on. At the last stop before the end 25 get on. How many "
        "passengers are on the train when it arrives?",
        "After the first stop there are 180 - 45 + 30 = 165 passengers. At the second stop 165 / 3 = 55 get off, "
        "so 165 - 55 = 110 are left. At the last stop 25 get on, which makes 110 + 25 = 135. The answer is 135.",
    ),
)
QUESTIONS = (
    "{name} has {a} {thing} and buys {b} bags with {c} {thing} in each. {name} gives {d} of them to friends and shares "
    "the rest equally among {e} jars. How many {thing} are in each jar, and how many are left over?",
    "A farmer packs {a} crates with {b} {thing} each. On the way to the market {c} of them go bad. He sells the others "
    "for {d} cents each and pays {e} dollars for his place. How many dollars does he bring home?",
    "{name} walks {a} minutes to school and {b} minutes back, on {c} days a week. {name} counts {thing} on the way, "
    "about {d} in a minute. How many has {name} counted after {e} weeks?",
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
THINGS = ("apples", "marbles", "stickers", "pears", "buttons", "shells")


def texts(count: int, seed: int) -> list[str]:
    """Few-shot prompts: the same five shots, and a question of its own."""
    draw = random.Random(seed)
    head = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in SHOTS)
    found = []
    for place in range(count):
        numbers = {letter: draw.randint(3, 60) for letter in "abcde"}
        question = QUESTIONS[place % len(QUESTIONS)].format(
            name=draw.choice(NAMES), thing=draw.choice(THINGS), **numbers
        )
        found.append(f"{head}Question: {question}\nAnswer:")
    return found


def main() -> None:
    made = parser(__doc__)
    add_options(made, ["ours", "vllm", SMALL_BLOCKS, "generate", "before"])
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--rows", type=int, default=16, help="of each prompt; default: %(default)s")
    made.add_argument("--tokens", type=int, default=64, help="of each row; default: %(default)s")
    made.add_argument(
        "--batch_rows",
        type=int,
        default=128,
        help="rows of a batch of generate, as memory allows; default: %(default)s",
    )
    made.add_argument(
        "--generate_prompts", type=int, default=8, help="prompts that generate runs, 0 = all; default: %(default)s"
    )
    measure(made.parse_args())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = header("many_prompts", options)
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "model")
        if options.model == SMOLLM2 or options.vllm_python:
            tokenizer = write_checkpoint(options.model, options.dtype, Path(folder), seed=options.seed)
        else:
            folder, tokenizer = options.model, byte_tokenizer()
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts(options.prompts, options.seed)]
        common = (
            next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1) if len(prompts) > 1 else 0
        )
        result |= {
            "prompts": len(prompts),
            "rows": options.rows,
            "tokens": options.tokens,
            "prompt_tokens": spread(map(len, prompts)),
            "tokens_in_common": common,
        }
        print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {common} in common")
        job = {"prompts": prompts, "rows": options.rows, "tokens": options.tokens, "seed": options.seed}
        few = prompts[: options.generate_prompts or None]
        jobs = dict.fromkeys(options.peers, job)
        jobs["generate"] = {**job, "prompts": few, "batch_rows": options.batch_rows}
        with started(options, folder) as workers:
            result["peer_versions"] = {peer: worker.versions for peer, worker in workers.items()}
            ready = warmed_up(workers, jobs)

            def run(peer: str) -> dict[str, Any]:
                measured = ready[peer].run(jobs[peer])
                asked = len(jobs[peer]["prompts"])
                assert measured["tokens"] == asked * options.rows * options.tokens, (peer, measured)
                return {**measured, "seconds": measured["seconds"] * len(prompts) / asked, "prompts_run": asked}

            for pairs in range(options.pairs):
                found = alternating({peer: lambda _, p=peer: run(p) for peer in ready}, 1, first=pairs)
                result.setdefault("runs", []).extend(found)
                result["peers"] = compared(result)
                finish(result, markdown(result), options.output)
    return result


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all prompts, tokens per second, and how many times as fast ours is."""
    total = result["prompts"] * result["rows"] * result["tokens"]
    found = {}
    for peer in result["runs"][0]:
        mine = [pair[peer] for pair in result["runs"]]
        found[peer] = {
            "seconds": spread(one["seconds"] for one in mine),
            "tokens_per_second": spread(total / one["seconds"] for one in mine),
            "prompts_run": mine[0]["prompts_run"],
            "peak_mib": max(one["peak_mib"] for one in mine),
        }
        if peer != "ours" and "ours" in result["runs"][0]:
            ratios = [pair[peer]["seconds"] / pair["ours"]["seconds"] for pair in result["runs"]]
            found[peer]["ours_over_this"] = spread(ratios)
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for peer, measured in result["peers"].items():
        ratio = measured.get("ours_over_this")
        told = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else None
        scaled = "" if measured["prompts_run"] == result["prompts"] else f" (run on {measured['prompts_run']} prompts)"
        lines.append(
            [
                peer + scaled,
                measured["seconds"]["median"],
                measured["tokens_per_second"]["median"],
                told,
                measured["peak_mib"],
            ]
        )
    about = f"{result['prompts']} prompts x {result['rows']} rows x {result['tokens']} tokens, "
    about += f"{result['prompt_tokens']['median']:.0f} tokens a prompt, {result['tokens_in_common']} in common"
    headers = ["peer", "seconds", "tokens/s", "ours is so many times as fast", "MiB held"]
    return f"{about}\n\n{table(headers, lines)}"


if __name__ == "__main__":
    main()
