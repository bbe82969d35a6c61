"""The embedded demo pair: a tiny policy and a tiny reward model, made by `benchmarks/demo_pair/train.py`.

Importing this package never imports torch.
"""

from pathlib import Path

POLICY_DIR: Path = Path(__file__).resolve().parent / "policy"
"""Directory of the policy (`AutoModelForCausalLM`), with its tokenizer and chat template."""

REWARD_DIR: Path = Path(__file__).resolve().parent / "reward"
"""Directory of the reward model (`AutoModelForSequenceClassification`, one label), with its tokenizer and template."""

PROBES: Path = Path(__file__).resolve().parent / "probes.json"
"""What `specrej-eval doctor` asks the reward model; made by `benchmarks/demo_pair/probes.py`."""

__all__ = ["POLICY_DIR", "PROBES", "REWARD_DIR"]
