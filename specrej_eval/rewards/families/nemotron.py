"""Nemotron reward models saved as language models: the reward is the logit of vocabulary id 0 after the answer.

Source: the model card of nvidia/Llama-3.1-Nemotron-70B-Reward-HF, which generates one token and takes
``scores[0][0][0]``: the first logit at the position behind the template's last token. Only row 0 of the language-model
head is read here. The card's -3.28125 is that ``scores`` value; if the checkpoint's generation settings scale logits
(a temperature), the raw logit differs from it by that factor.
"""

from __future__ import annotations

from specrej_eval.rewards.checkpoints.family import RewardCheckpoint, RewardFamily
from specrej_eval.rewards.checkpoints.native import LastToken, assemble, lm_head, load_body
from specrej_eval.rewards.checkpoints.reward import CheckpointReward


class Family(RewardFamily):
    READS = "the logit of vocabulary id 0 behind the last token of a language model"
    EXAMPLES = ("nvidia/Llama-3.1-Nemotron-70B-Reward-HF",)
    NEEDS = "about 140 GB of memory in bfloat16; reward_family=nemotron for a copy under another name"
    BY_NAME = True  # its config is a plain language model's, and any of those has a logit 0

    def load(self, source: RewardCheckpoint) -> CheckpointReward:
        body, tokenizer = load_body(source)
        return assemble(source, body, tokenizer, LastToken(lm_head(source, body, [0])))
