"""Token ids to the text a benchmark sees, and where a stop string cuts it.

Stop strings are matched on text decoded *with* special tokens kept (HFLM strips them first, so that a stop such as
``<|im_end|>`` leaks: lm-eval 0.4.13, utils_hf), char-exact inside a token, never in the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from specrej_eval.core import FinishReason

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"  # half of a UTF-8 character decodes to this


class Detokenizer:
    """A tokenizer's decoding side, with the end of a reasoning part if the model has one.

    Args:
        tokenizer: a transformers tokenizer.
        think_end_token: text or id that ends the reasoning; stop strings count only after it, and the benchmark sees
            only what follows it (as in HFLM). While a row still reasons, its reasoning is its text.
    """

    def __init__(self, tokenizer: Any, *, think_end_token: str | int | None = None) -> None:
        self.tokenizer = tokenizer
        if isinstance(think_end_token, str) and think_end_token in tokenizer.all_special_tokens:
            think_end_token = int(tokenizer.convert_tokens_to_ids(think_end_token))  # it is stripped from clean text
        self.think_end_token = think_end_token
        self._pieces: list[str] | None = None

    def raw(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens kept."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def clean(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens stripped."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def stop_position(self, token_ids: Sequence[int], until: Sequence[str]) -> int | None:
        """Where the earliest stop string begins in ``raw(answer part of token_ids)``; None if there is none."""
        answer = self._answer_start(token_ids)
        if answer is None:
            return None
        text = self.raw(token_ids[answer:])
        start = 0
        if isinstance(self.think_end_token, str):
            found = text.rfind(self.think_end_token)
            if found < 0:
                return None
            start = found + len(self.think_end_token)
        positions = [position for position in (text.find(stop, start) for stop in until) if position >= 0]
        return min(positions, default=None)

    def visible(self, token_ids: Sequence[int], finish_reason: FinishReason | None, until: Sequence[str]) -> str:
        """What the benchmark sees of a row: no EOS, cut at the stop string, special tokens stripped."""
        ids = list(token_ids)
        if finish_reason == "eos":
            ids = ids[:-1]
        cut = self.stop_position(ids, until) if finish_reason == "stop" else None
        answer = self._answer_start(ids) or 0
        ids = ids[answer:]
        text = self.clean(ids) if cut is None else self._clean_before(ids, cut)
        if isinstance(self.think_end_token, str):
            text = text.split(self.think_end_token)[-1]
        if self.think_end_token is not None and (answer or isinstance(self.think_end_token, str)):
            text = text.lstrip()
        if finish_reason is None:
            text = text.rstrip(REPLACEMENT)
        return text

    def _answer_start(self, token_ids: Sequence[int]) -> int | None:
        """Index of the first token after an integer think_end_token; 0 without one; None while still reasoning."""
        if not isinstance(self.think_end_token, int):
            return 0
        for index in range(len(token_ids) - 1, -1, -1):
            if token_ids[index] == self.think_end_token:
                return index + 1
        return None

    def _clean_before(self, ids: list[int], cut: int) -> str:
        """``raw(ids)[:cut]`` with special tokens stripped; the cut may lie inside a token."""
        raw = self.raw(ids)
        whole = len(ids)
        while whole > 0:
            head = self.raw(ids[:whole])
            if len(head) <= cut and raw.startswith(head):
                break
            whole -= 1
        head = self.raw(ids[:whole])
        return self.clean(ids[:whole]) + raw[len(head) : cut]

    def may_complete(self, until: Sequence[str], vocab_size: int) -> list[bool]:
        """For each token id: can it be the one that completes a stop string?

        A token can only do so if its own text holds the last character of a stop string, or is part of a character.
        """
        last = {stop[-1] for stop in until}
        pieces = self._piece_texts(vocab_size)
        return [not piece or REPLACEMENT in piece or not last.isdisjoint(piece) for piece in pieces]

    def _piece_texts(self, vocab_size: int) -> list[str]:
        """Text each token adds after another one (a tokenizer may strip the space before a first token)."""
        if self._pieces is None or len(self._pieces) != vocab_size:
            known = min(vocab_size, len(self.tokenizer))
            anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
            before = self.raw(anchor)
            texts = self.tokenizer.batch_decode([[*anchor, token] for token in range(known)], skip_special_tokens=False)
            pieces = [text[len(before) :] if text.startswith(before) else "" for text in texts]
            self._pieces = pieces + [""] * (vocab_size - known)
        return self._pieces


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All ids that end an answer: the generation config's list, the model config's and the tokenizer's own."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return tuple(sorted(found))
