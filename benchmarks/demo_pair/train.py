"""Trains, checks and saves the demo pair, from nothing: `python benchmarks/demo_pair/train.py`.

Deterministic on one machine and one torch version: fixed seeds, one thread, stops counted in steps.
Problem sets (see `arithmetic.split_of`): "train" for both models, "select" to choose the policy's snapshot and to look
at the reward model while developing it, "test" (the task's file) only for the numbers of the last stage.
"""

import argparse
import json
import platform
import random
import resource
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from arithmetic import (
    NUM_OPERANDS,
    Operands,
    distinct_problems,
    problems,
    prompt,
    question,
    solution,
)
from language_model import (
    LanguageModelArgs,
    Snapshot,
    StateDict,
    train_further,
    train_language_model,
    with_weights,
)
from measure import Samples, sample, score_samples, simulated_rejection, summary
from reward_model import RewardModelArgs, new_reward_model, train_reward_model
from tokenizer import EOS_ID, PAD_ID, build_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification

from specrej_eval.demo import POLICY_DIR, REWARD_DIR

T = TypeVar("T")

SEED = 0
TARGET_PASS_AT_1 = 0.33
NUM_SELECTION, SELECTION_SAMPLES = 256, 2
NUM_TEST, TEST_SEED = 1200, 2
NUM_POLICY_ANSWERS = 9600
QUARTERS = (0.25, 0.5, 0.75)
METRICS_FILE = Path(__file__).resolve().parent / "metrics.json"


def selection_problems() -> list[Operands]:
    """The problems on which the policy's snapshot is chosen."""
    return distinct_problems("select", NUM_SELECTION, seed=1)


def test_problems() -> list[Operands]:
    """The problems of `tasks/specrej_arithmetic/test.jsonl`, in order."""
    return distinct_problems("test", NUM_TEST, seed=TEST_SEED)


def reward_training_problems() -> list[Operands]:
    """The problems whose answers, sampled from the policy's snapshots, the reward model learns from."""
    return list(islice(problems("train", random.Random(3)), NUM_POLICY_ANSWERS))


def write_task_file(path: Path) -> None:
    rows = (
        {
            "id": index,
            "question": question(operands),
            "prompt": prompt(operands),
            "answer": str(sum(operands)),
            "solution": solution(operands).strip(),
        }
        for index, operands in enumerate(test_problems())
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def policy_answers(args: LanguageModelArgs, snapshots: list[Snapshot]) -> list[tuple[Operands, str]]:
    """One sampled answer to each training problem, in equal parts from every snapshot."""
    chosen = reward_training_problems()
    torch.manual_seed(SEED + 1)
    answers: list[tuple[Operands, str]] = []
    for place, snapshot in enumerate(snapshots):
        part = chosen[place :: len(snapshots)]
        drawn = sample(with_weights(args, snapshot.weights), part, 1)
        answers += [(xs, row[0]) for xs, row in zip(part, drawn.texts, strict=True) if row[0] and row[0].isascii()]
    return answers


def nearest_snapshots(snapshots: list[Snapshot], count: int = 3) -> list[Snapshot]:
    """The snapshots nearest to the target pass@1; the first one is the policy."""
    return sorted(snapshots, key=lambda snapshot: abs(snapshot.pass_at_1 - TARGET_PASS_AT_1))[:count]


def draw(policy: LlamaForCausalLM, chosen: list[Operands], num_samples: int) -> tuple[Samples, Samples]:
    """Greedy answers, and sampled ones."""
    torch.manual_seed(SEED + 2)
    return sample(policy, chosen, 1, greedy=True), sample(policy, chosen, num_samples)


def evaluate_pair(
    reward: LlamaForSequenceClassification, greedy: Samples, samples: Samples, num_rows: tuple[int, ...]
) -> dict[str, Any]:
    """Summary of the pair, and simulated rejection with looks at quarters of a mean answer and every 20 tokens."""
    quarters, twenties = [round(share * float(samples.num_tokens.mean())) for share in QUARTERS], [20, 40, 60, 80]
    scored = score_samples(reward, samples, sorted({*quarters, *twenties}))
    return {
        **summary(scored, greedy),
        "simulated_rejection": [
            simulated_rejection(scored.at_looks(looks), rows) for looks in (quarters, twenties) for rows in num_rows
        ],
    }


def cached(folder: Path | None, name: str, compute: Callable[[], T], times: dict[str, float]) -> T:
    """A stage's outcome, read from the folder if it is there; `times` gets the CPU seconds that the stage took."""
    path = folder / f"{name}.pt" if folder else None
    outcome: T
    if path and path.exists():
        times[name], outcome = torch.load(path, weights_only=False)
        return outcome
    start = cpu_seconds()
    outcome = compute()
    times[name] = cpu_seconds() - start
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((times[name], outcome), path)
    return outcome


def save(model: LlamaForCausalLM | LlamaForSequenceClassification, folder: Path) -> None:
    """fp16 safetensors, the tokenizer and its chat template."""
    if isinstance(model, LlamaForCausalLM):
        model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    weights: Any = model  # `half` is not annotated
    weights.half().save_pretrained(folder)
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise OverflowError(f"{folder}: a weight does not fit into half precision")
    if isinstance(model, LlamaForSequenceClassification):
        # stored in half precision, but its residual stream outgrows float16: it is to be computed in float32
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    build_tokenizer().save_pretrained(folder)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy-dir", type=Path, default=POLICY_DIR)
    parser.add_argument("--reward-dir", type=Path, default=REWARD_DIR)
    parser.add_argument("--metrics-file", type=Path, default=METRICS_FILE)
    parser.add_argument("--task-file", type=Path, help="also write the task's problems to this file")
    parser.add_argument("--cache", type=Path, help="folder that keeps each stage's outcome, for a later run to reuse")
    parser.add_argument("--on", choices=("test", "select"), default="test", help="problems for the reported numbers")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.task_file:
        write_task_file(args.task_file)
    lm_args, rm_args = LanguageModelArgs(), RewardModelArgs()
    times: dict[str, float] = {}

    def policy_run() -> tuple[StateDict, list[Snapshot]]:
        model, taken = train_language_model(lm_args, selection_problems(), SELECTION_SAMPLES, SEED)
        return model.state_dict(), taken

    def further_run() -> StateDict:
        model = with_weights(lm_args, trained)
        train_further(lm_args, model, SEED + 4)
        return model.state_dict()

    def reward_run() -> StateDict:
        return train_reward_model(rm_args, language_model, answers, SEED).state_dict()

    trained, snapshots = cached(args.cache, "language_model", policy_run, times)
    nearest = nearest_snapshots(snapshots)
    save(with_weights(lm_args, nearest[0].weights), args.policy_dir)
    answers = cached(args.cache, "policy_answers", lambda: policy_answers(lm_args, nearest), times)
    language_model = with_weights(lm_args, cached(args.cache, "language_model_further", further_run, times))
    reward = new_reward_model(language_model, rm_args)
    reward.load_state_dict(cached(args.cache, "reward_model", reward_run, times))
    save(reward, args.reward_dir)

    # What is measured is what was saved: fp16 weights, read back, computed in fp32.
    policy = LlamaForCausalLM.from_pretrained(args.policy_dir, dtype=torch.float32).eval()
    reward = LlamaForSequenceClassification.from_pretrained(args.reward_dir, dtype=torch.float32).eval()
    parts = [(test_problems(), 16, (8, 16)), (test_problems()[:300], 32, (32,))]
    if args.on == "select":
        parts = [(selection_problems(), 32, (8, 16, 32))]
    reports = []
    for chosen, num_samples, num_rows in parts:
        name = f"evaluation_answers_{args.on}_{len(chosen)}_{num_samples}"
        greedy, samples = cached(args.cache, name, partial(draw, policy, chosen, num_samples), times)
        start = cpu_seconds()
        reports.append(evaluate_pair(reward, greedy, samples, num_rows))
        times[f"evaluation_{len(chosen)}_{num_samples}"] = cpu_seconds() - start

    metrics = {
        "problems": args.on,
        "reports": reports,
        "selection": {
            "policy_step": nearest[0].step,
            "pass@1_on_selection_problems": nearest[0].pass_at_1,
            "snapshots": {snapshot.step: snapshot.pass_at_1 for snapshot in snapshots},
            "answers_from_steps": [snapshot.step for snapshot in nearest],
        },
        "parameters": {"policy": policy.num_parameters(), "reward": reward.num_parameters()},
        "bytes": {
            name: sum(file.stat().st_size for file in folder.iterdir())
            for name, folder in (("policy", args.policy_dir), ("reward", args.reward_dir))
        },
        "cpu_seconds": {name: round(seconds) for name, seconds in times.items()},
        "arguments": {"language_model": asdict(lm_args), "reward_model": asdict(rm_args), "seed": SEED},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "num_operands": NUM_OPERANDS,
    }
    args.metrics_file.write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
