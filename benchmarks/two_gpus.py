"""Language model and reward model each on a GPU of its own: scores made while other prompts decode, against one thing
after the other, paired in one process.

    python benchmarks/two_gpus.py --output two_gpus.json

Random weights of one shape for both (on a CPU SmolLM2's, where it is only tried out), Speculative Rejection, no answer
ends early. Told beside the seconds: how many answers are the same. In half precision and on a GPU a row's last bits
depend on what decodes with it, so not all of them need be.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from bench import alternating, finish, header, load_model, parser, prompt_of, seconds_of, spread, table
from torch import nn

from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.generator import Generator
from specrej_eval.in_flight import InFlight, Request
from specrej_eval.rewards.checkpoints.native import LastToken
from specrej_eval.rewards.checkpoints.renderer import Renderer
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WAYS = {"overlapped": True, "in turns": False}


def reward_of(options: argparse.Namespace) -> CheckpointReward:
    """The same shape with other weights, and a head at the last token."""
    model, tokenizer = load_model(options.model, options.dtype, options.reward_device, seed=options.seed + 1)
    body = model.model
    torch.manual_seed(options.seed)
    head = LastToken(nn.Linear(body.config.hidden_size, 1)).to(options.reward_device).requires_grad_(False)
    vocab = int(body.get_input_embeddings().weight.shape[0])
    return CheckpointReward(body, head, Renderer(tokenizer, name="reward", vocab_size=vocab, template=PLAIN))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(options.model, options.dtype, options.device, seed=options.seed)
    engine = TransformersEngine(model, tokenizer)
    engine.eos_ids = ()
    config = RunConfig(n=options.rows, max_gen_toks=options.tokens, batch_size=options.batch_size).checked()
    texts = [tokenizer.decode(prompt_of(tokenizer, options.prompt, start=place)) for place in range(options.prompts)]
    requests = [Request(prompt=engine.encode(text), config=config) for text in texts]
    generator = Generator(engine=engine, reward=reward_of(options), config=config)
    answers: dict[str, dict[int, GenerationResult]] = {}

    def run(way: str) -> dict[str, Any]:
        before = dict(generator.totals.seconds)
        with mock.patch.object(InFlight, "overlaps", WAYS[way]):
            seconds = seconds_of(lambda: answers.update({way: dict(generator.run(requests, progress=False))}))
        phases = {phase: value - before[phase] for phase, value in generator.totals.seconds.items()}
        return {"seconds": seconds, "phases": phases}

    for way in WAYS:
        run(way)  # warm-up, not timed
    pairs = alternating({way: lambda _, way=way: run(way) for way in WAYS}, options.pairs)
    same = sum(answers["overlapped"][place].text == answers["in turns"][place].text for place in range(len(requests)))
    return {
        **header("two_gpus", options),
        **{name: getattr(options, name) for name in ("reward_device", "prompts", "prompt", "rows", "tokens")},
        "prompts_in_flight": generator.prompts_in_flight,
        "runs": pairs,
        "speedup": spread(pair["in turns"]["seconds"] / pair["overlapped"]["seconds"] for pair in pairs),
        "same_answers": same,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for way in WAYS:
        runs = [pair[way] for pair in result["runs"]]
        phases = [spread(run["phases"][phase] for run in runs)["median"] for phase in ("decode", "reward")]
        lines.append((way, spread(run["seconds"] for run in runs)["median"], *phases))
    ratio = result["speedup"]
    return "\n\n".join(
        (
            table(("way", "seconds", "decoding", "waiting for scores"), lines),
            f"In turns / overlapped: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}); "
            f"{result['same_answers']} of {result['prompts']} answers are the same.",
        )
    )


def main() -> None:
    made = parser(__doc__)
    gpus = torch.cuda.device_count()
    made.set_defaults(**({"model": "llama-3-8b", "device": "cuda:0"} if gpus else {}))
    made.add_argument("--reward-device", default="cuda:1" if gpus > 1 else "cpu", help="default: %(default)s")
    made.add_argument("--prompts", type=int, default=16)
    made.add_argument("--prompt", type=int, default=300, help="tokens of a prompt; default: %(default)s")
    made.add_argument("--rows", type=int, default=64, help="of a prompt; default: %(default)s")
    made.add_argument("--tokens", type=int, default=256, help="of a row; default: %(default)s")
    made.add_argument("--batch-size", default="auto", help="prompts in flight; default: %(default)s")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    finish(result, markdown(result), options.output)


if __name__ == "__main__":
    main()
