"""Token ids to the text a benchmark sees, and where a stop string cuts it.

Stop strings are matched on text decoded *with* special tokens kept (HFLM strips them first, so that a stop such as
``<|im_end|>`` leaks: lm-eval 0.4.13, utils_hf), char-exact inside a token, never in the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from specrej_eval.core import FinishReason

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"  # half of a UTF-8 character decodes to this


class _Answer(NamedTuple):
    """The part of a row that is its answer. Without a ``think_end_token`` all of it is."""

    ids: list[int]
    """Ids after an integer marker."""
    raw: str
    """Their text, special tokens kept."""
    start: int
    """Where in ``raw`` the answer begins: behind a marker that is text."""
    first: int
    """Where its first character stands that is shown and no space: all before it is stripped."""
    special: list[tuple[int, int]]
    """Spans of ``raw`` that are special tokens. Known only where thinking is dropped."""


class Detokenizer:
    """A tokenizer's decoding side, with the end of a reasoning part if the model has one.

    As lm-eval's ``postprocess_generated_text`` and its HF backend's handling of ids: what comes up to the last marker
    is dropped, then leading space is stripped, and only then stop strings count. So the line breaks that follow
    ``</think>`` stop nothing, nor does anything in the thinking. A row that ends without a marker (still thinking at
    the cap, or EOS) is treated the same: all of it is stripped and cut.

    We differ in this: a row ends at the first stop string of its answer, as a text without thinking does. lm-eval's
    HF backend ends its rows at stop strings in the thinking too, which its vLLM backend does not; neither ends a row
    at one in the answer if other rows of the batch go on, so that a second marker after it would start the answer anew.

    Args:
        tokenizer: a transformers tokenizer.
        think_end_token: text or id that ends the reasoning; digits are an id, as in HFLM. While a row still reasons,
            all of its reasoning is its text: no stop string cuts what a reward model sees of it.
    """

    def __init__(self, tokenizer: Any, *, think_end_token: str | int | None = None) -> None:
        self.tokenizer = tokenizer
        if isinstance(think_end_token, str):
            if think_end_token.isdigit():
                think_end_token = int(think_end_token)
            elif think_end_token in tokenizer.all_special_tokens:
                think_end_token = int(tokenizer.convert_tokens_to_ids(think_end_token))  # stripped from clean text
        self.think_end_token = None if think_end_token == "" else think_end_token
        self._pieces: list[str] | None = None
        self._special = _special_ids(tokenizer) if self.think_end_token is not None else frozenset()

    def raw(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens kept."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def clean(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens stripped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stop_position(self, token_ids: Sequence[int], until: Sequence[str]) -> int | None:
        """Where the earliest stop string begins in ``raw(answer part of token_ids)``; None if there is none.

        None while the row is still thinking.
        """
        answer = self._answer(token_ids)
        return None if answer is None else _cut(answer, until)

    def visible(self, token_ids: Sequence[int], finish_reason: FinishReason | None, until: Sequence[str]) -> str:
        """What the benchmark sees of a row: no EOS, no thinking, cut at the stop string, special tokens stripped."""
        ids = list(token_ids)
        end = len(ids) - (finish_reason == "eos")
        if self.think_end_token is None and (finish_reason is None or not until):  # nothing is looked for in it
            text = self.clean(ids[:end])
            return text if finish_reason is not None else text.rstrip(REPLACEMENT)
        answer = self._answer(ids, end) or self._from(ids[:end])
        cut = None if finish_reason is None else _cut(answer, until)
        if self.think_end_token is not None:
            text = _without(answer, cut)
        else:
            text = self.clean(answer.ids) if cut is None else self._clean_before(answer.ids, cut)
        if finish_reason is None:
            text = text.rstrip(REPLACEMENT)
        return text

    def _answer(self, token_ids: Sequence[int], end: int | None = None) -> _Answer | None:
        """The answer in ``token_ids[:end]``; None while still thinking."""
        ids = list(token_ids)
        marker = self.think_end_token
        if marker is None:
            return _Answer(ids[:end], self.raw(ids[:end]), 0, 0, [])
        if isinstance(marker, str):
            found = self.raw(ids[:end]).rfind(marker)
            return None if found < 0 else self._from(ids[:end], found + len(marker))
        if marker not in ids:
            return None
        after = len(ids) - ids[::-1].index(marker)
        return self._from(ids[after:end])

    def _from(self, ids: list[int], start: int = 0) -> _Answer:
        """The answer that begins at character ``start`` of the text of ``ids``."""
        raw = self.raw(ids)
        special = self._special_spans(ids)
        first = start
        while first < len(raw):
            behind = next((end for begin, end in special if begin <= first < end), None)
            if behind is None and not raw[first].isspace():
                break
            first = behind or first + 1
        return _Answer(ids, raw, start, first, special)

    def _special_spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """Where runs of special tokens stand in ``raw(ids)``."""
        if self._special.isdisjoint(ids):
            return []
        spans: list[tuple[int, int]] = []
        at = 0
        for hidden, run in groupby(ids, key=self._special.__contains__):
            end = at + len(list(run))
            if hidden:
                spans.append((len(self.raw(ids[:at])), len(self.raw(ids[:end]))))
            at = end
        return spans

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


def _cut(answer: _Answer, until: Sequence[str]) -> int | None:
    """Where in ``answer.raw`` the earliest stop string begins; the space before the answer holds none."""
    positions = []
    for stop in until:
        at = answer.raw.find(stop, answer.start)
        while 0 <= at < answer.first and answer.raw[at].isspace():
            at = answer.raw.find(stop, at + 1)
        if at >= 0:
            positions.append(at)
    return min(positions, default=None)


def _without(answer: _Answer, cut: int | None) -> str:
    """The answer up to ``cut``, without its special tokens and leading space."""
    last = len(answer.raw) if cut is None else cut
    kept, at = [], answer.start
    for begin, end in answer.special:
        kept.append(answer.raw[at : min(begin, last)])  # empty where the span lies before the answer
        at = max(at, end)
    kept.append(answer.raw[at:last])
    return "".join(kept).lstrip()


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that ``skip_special_tokens`` skips."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return frozenset(added | set(tokenizer.all_special_ids))
