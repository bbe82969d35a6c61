"""Tokens per second of our engine and of other ways to decode many rows of one prompt, paired in one run.

    python benchmarks/decode_throughput.py --vllm_python ~/venv-vllm/bin/python --output decode_throughput.json

Peers: ours, transformers' generate(num_return_sequences=rows), its continuous batching (generate_batch), vLLM (n=rows;
its rows share whole blocks of a prompt, so it runs with its default blocks and with small ones), and with
--baseline_path an older checkout of ours ("before"). Each is a process of its own with the same weights, number of
threads, temperature 1 and top_k 50; EOS is ignored. What is timed goes from the prompt's ids to all rows' ids, prefill
included. Runs alternate; the ratio of each pair is taken, and the median of the ratios is the result. A peer that is
absent is skipped by name.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench import (
    SMOLLM2,
    alternating,
    byte_tokenizer,
    finish,
    header,
    parser,
    prompt_of,
    spread,
    table,
    write_checkpoint,
)
from peers import SMALL_BLOCKS, Worker, add_options, started, warmed_up

SHAPES = ("311x64", "900x24", "40x200", "1900x64")


def shape(text: str) -> tuple[int, int]:
    prompt, rows = text.split("x")
    return int(prompt), int(rows)


def main() -> None:
    made = parser(__doc__)
    add_options(made, ["ours", "generate", "continuous", "vllm", SMALL_BLOCKS, "before"])
    made.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), type=str, metavar="PROMPTxROWS", help="default: %(default)s"
    )
    made.add_argument("--tokens", type=int, default=64, help="of each row; default: %(default)s")
    made.add_argument(
        "--token_stats", nargs="*", default=[], help="what ours records of each token (logprob); default: nothing"
    )
    made.add_argument(
        "--generate_shapes", nargs="*", default=None, metavar="PROMPTxROWS",
        help="the shapes that generate and continuous run, minutes each; default: all",
    )  # fmt: skip
    options = made.parse_args()
    measure(options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {**header("decode_throughput", options), "tokens": options.tokens, "shapes": {}}
    result["token_stats"] = options.token_stats
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "model")
        if options.model == SMOLLM2 or options.vllm_python:
            tokenizer = write_checkpoint(options.model, options.dtype, Path(folder), seed=options.seed)
        else:
            folder, tokenizer = options.model, byte_tokenizer()  # random weights: each makes the same
        with started(options, folder) as workers:
            result["peers"] = {peer: worker.versions for peer, worker in workers.items()}
            for words in options.shapes:
                result["shapes"][words] = one_shape(words, tokenizer, workers, options)
                finish(result, markdown(result), options.output)
    return result


def one_shape(words: str, tokenizer: Any, workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Paired runs of one prompt length and number of rows."""
    prompt_tokens, rows = shape(words)
    print(f"{words}:", flush=True)
    job = {
        "prompts": [prompt_of(tokenizer, prompt_tokens)],
        "rows": rows,
        "tokens": options.tokens,
        "seed": options.seed,
        "token_stats": options.token_stats,
    }
    slow = words in (options.generate_shapes or [words])
    wanted = warmed_up(workers, {peer: job for peer in workers if slow or peer not in ("generate", "continuous")})
    pairs = alternating({peer: lambda _, w=worker: w.run(job) for peer, worker in wanted.items()}, options.pairs)
    for pair in pairs:
        for peer, measured in pair.items():
            assert measured["tokens"] == rows * options.tokens, (peer, measured)
    found: dict[str, Any] = {"prompt_tokens": prompt_tokens, "rows": rows, "peers": {}}
    for peer in wanted:
        mine = [pair[peer] for pair in pairs]
        found["peers"][peer] = {
            "tokens_per_second": spread(one["tokens"] / one["seconds"] for one in mine),
            "seconds": [one["seconds"] for one in mine],
            "peak_mib": max(one["peak_mib"] for one in mine),
        }
        if "prefill_seconds" in mine[0]:
            found["peers"][peer]["prefill_seconds"] = spread(one["prefill_seconds"] for one in mine)
        if peer != "ours" and "ours" in wanted:
            ratios = [pair[peer]["seconds"] / pair["ours"]["seconds"] for pair in pairs]
            found["peers"][peer]["ours_over_this"] = spread(ratios)
    return found


def markdown(result: dict[str, Any]) -> str:
    """One line for each shape and peer."""
    lines = []
    for words, found in result["shapes"].items():
        for peer, measured in found["peers"].items():
            ratio = measured.get("ours_over_this")
            told = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else None
            lines.append([words, peer, measured["tokens_per_second"]["median"], told, measured["peak_mib"]])
    headers = ["prompt x rows", "peer", "tokens/s", "ours is so many times as fast", "MiB held"]
    return table(headers, lines)


if __name__ == "__main__":
    main()
