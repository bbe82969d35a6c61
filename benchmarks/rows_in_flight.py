"""Tokens per second of decoding against the rows that decode together, on the demo pair's language model.

    python benchmarks/rows_in_flight.py

What ``batch_size=auto`` takes as a sensible number of rows comes from here. Prompts of the demo task with 16 rows each,
EOS ignored, so that all rows stay to the end. Each thread count has a process of its own; the medians of some runs are
shown, by the clock and by the processor (user and system time of all threads, which other programs disturb less).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS_PER_PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the thread count of a child process
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measured(options.one, options.rows, options.tokens, options.runs)))
        return
    words = ["--rows", *map(str, options.rows), "--tokens", str(options.tokens), "--runs", str(options.runs)]
    found = []
    for threads in options.threads:
        child = [sys.executable, __file__, *words, "--one", str(threads)]
        found += json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print("threads   rows   tokens/s   tokens per processor second   MiB of KV")
    for line in found:
        print(
            f"{line['threads']:7d} {line['rows']:6d} {line['tokens_per_second']:10,.0f} "
            f"{line['tokens_per_cpu_second']:29,.0f} {line['kv_mib']:11.1f}"
        )
    if options.output:
        options.output.write_text(json.dumps({"benchmark": "rows_in_flight", "lines": found}, indent=1) + "\n")


def measured(threads: int, rows: list[int], tokens: int, runs: int) -> list[dict[str, Any]]:
    import torch

    from specrej_eval import api, paths
    from specrej_eval.budget import resolve
    from specrej_eval.config import RunConfig
    from specrej_eval.core import Plan

    torch.set_num_threads(threads)
    config = RunConfig(strategy="best_of_n", n=ROWS_PER_PROMPT, max_gen_toks=tokens, device="cpu").checked()
    engine = api.load_engine(config, {})
    engine.eos_ids = ()
    lines = (paths.folder("tasks") / "specrej_arithmetic" / "test.jsonl").read_text().splitlines()
    prompts = [engine.encode(json.loads(line)["prompt"]) for line in lines[: -(-max(rows) // ROWS_PER_PROMPT)]]

    def once(count: int) -> tuple[float, float]:
        """Tokens by second of the clock and of the processor."""
        sessions = []
        for prompt in prompts[: count // ROWS_PER_PROMPT]:
            session = engine.open(prompt, config, resolve(config, prompt.num_tokens))
            engine.follow(session, Plan(keep=(), fresh=ROWS_PER_PROMPT, num_tokens=tokens))
            sessions.append(session)
        clock, processor = time.perf_counter(), time.process_time()
        engine.decode(sessions, tokens)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        done = sum(session.decode_tokens for session in sessions)
        assert done == count * tokens, done
        for session in sessions:
            engine.close(session)
        return done / clock, done / processor

    found = []
    for count in rows:
        once(count)  # warm-up, not counted
        pairs = [once(count) for _ in range(runs)]
        found.append(
            {
                "threads": threads,
                "rows": count,
                "tokens_per_second": statistics.median(by_clock for by_clock, _ in pairs),
                "tokens_per_cpu_second": statistics.median(by_processor for _, by_processor in pairs),
                "kv_mib": count * tokens * engine.bytes_per_token() / 2**20,
                "torch": torch.__version__,
            }
        )
    return found


if __name__ == "__main__":
    main()
