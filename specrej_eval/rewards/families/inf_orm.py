"""INF-ORM: a two-layer head at the last token.

Source: the model card of infly/INF-ORM-Llama3.1-70B and reward-bench's ``inform.py``. We differ in the last token: the
original looks for the first padding token; here it is the last one read.
"""

from __future__ import annotations

from torch import nn

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, load_body, load_head
from specrej_eval.rewards.checkpoints.reward import CheckpointReward


class Family(RewardFamily):
    READS = "a two-layer head at the last token"
    EXAMPLES = ("infly/INF-ORM-Llama3.1-70B",)
    NEEDS = "about 140 GB of memory in bfloat16"
    ARCHITECTURES = ("INFORMForSequenceClassification",)

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        size = body.config.hidden_size
        layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))
        return assemble(source, body, tokenizer, LastToken(load_head(source, layers, "score.")))
