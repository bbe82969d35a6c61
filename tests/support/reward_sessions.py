"""What tests of reward sessions are made of: tokenizers that disagree, bodies, and rejection histories.

A history is what the loop does to a session: looks at rows whose texts grow token by token of the *generator's*
tokenizer, rows dropped, forked and started late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specrej_eval.core import RowView
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier
from support.tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_reward_model, tiny_tokenizer

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is 京都? \n"}]
WINDOW = 8
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8}),
}
# what tokenises in another way once more text follows: merges across the seam, characters of several bytes and of
# several code points, spaces and blank lines at the end
PIECES = [
    "the ",
    "there ",
    "  ",
    " ",
    "\n",
    "\n\n",
    "京都",
    "東",
    "👩‍🚀",
    "👍🏽",
    "é",
    "ing",
    "in",
    "g",
    "1",
    "12",
    "!",
    "<",
    "a b  c ",
]
_CORPUS = [
    "there is nothing in the thing  ",
    "the  others\n\n there",
    "京都 東京 は",
    "12 123 1234 !! ing inging",
    "👍🏽 👩‍🚀",
] * 4
TEMPLATES = {
    "turns": "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
    "trimmed": "<bos>{% for m in messages %}<|turn|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n\n{% endif %}",
}
PAIRS = [("bytes", "bytes"), ("bytes", "merges"), ("merges", "unigram")]
"""Generator's and reward model's tokenizer."""


@cache
def tokenizer(kind: str) -> Any:
    """``bytes``: one token per byte; ``merges``: byte-level BPE; ``unigram``: like SentencePiece's."""
    if kind == "bytes":
        return tiny_tokenizer(chat_template=TEMPLATES["turns"])
    special = list(SPECIAL_TOKENS)
    if kind == "merges":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        template = TEMPLATES["turns"]
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Replace("▁", " ")
        trainer = trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=[*special, "<unk>"],
            unk_token="<unk>",
            initial_alphabet=list("▁abcdehginorst"),
        )
        template = TEMPLATES["trimmed"]
    made.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_reward(body: str = "llama", kind: str = "bytes", **options: Any) -> SequenceClassifier:
    arch, overrides = BODIES[body]
    words = max(VOCAB_SIZE, len(tokenizer(kind)))
    model = tiny_reward_model(arch, vocab_size=words, **overrides)
    return SequenceClassifier(model, tokenizer(kind), **options)


def plain_score(reward: SequenceClassifier, row: RowView, prefix: str = "") -> float:
    """One unpadded forward pass of the whole input, eager, every position through the head."""
    (entry,) = reward.renderer.inputs(CONVERSATION, [row], prefix)
    with torch.no_grad():
        hidden = reward.body(torch.tensor([list(entry.ids)]), use_cache=False)[0]
        return float(reward.model.score(hidden)[0, -1, 0])


@dataclass
class Row:
    """One row of a history: what the generator has drawn so far."""

    row: int
    ids: list[int]
    """Of the generator's tokenizer; of ``upcoming``, the first ``shown``."""
    shown: int = 0
    finished: bool = False

    def view(self, generator: Any) -> RowView:
        ids = self.ids[: self.shown]
        return RowView(self.row, generator.decode(ids), ids, "eos" if self.finished else None)


def drawn(generator: Any, pieces: Sequence[str]) -> list[int]:
    ids: list[int] = generator("".join(pieces), add_special_tokens=False)["input_ids"]
    return ids
