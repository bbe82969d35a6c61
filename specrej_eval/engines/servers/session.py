# torch-free
"""One prompt whose rows a server decodes: rows that run ahead of a look, and the request that each is in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specrej_eval.core import FinishReason, RowView
from specrej_eval.engines.ahead import AheadSession, Row
from specrej_eval.engines.servers.protocols.base import Delta
from specrej_eval.engines.servers.streams import RowStream
from specrej_eval.errors import ModelError
from specrej_eval.http import BadAnswerError


@dataclass(eq=False, slots=True)
class Asking:
    """How far a row has come in asking for its tokens."""

    fruitful: int = 0
    """Requests so far that brought tokens."""
    stream: RowStream | None = None
    """The one in flight."""
    at_first: int = 0
    """Tokens the row had when that was sent."""
    asked_for: int = 0
    """Most tokens of it."""
    received: int = 0
    """Tokens that it brought, those behind the row's end included."""
    failures: int = 0
    """Requests in a row that brought nothing."""
    not_before: float = 0.0
    """When to ask again."""


class Session(AheadSession):
    """A prompt, its rows, and what was asked for each of them.

    Args:
        gives_ids: whether the server gives token ids; else rows come as text, and are known once they are at their end.
    """

    def __init__(self, *args: Any, gives_ids: bool, **others: Any) -> None:
        super().__init__(*args, **others)
        self.gives_ids = gives_ids
        self.look_in = 0
        """Tokens that each live row takes until the next look, counted from the last."""
        self.asking: dict[int, Asking] = {}
        """By row."""
        self._texts: dict[int, str] = {}

    @property
    def max_gen_toks(self) -> int:
        return self._budget.max_gen_toks

    @property
    def streams(self) -> list[RowStream]:
        """Requests in flight, of rows that are given up too."""
        return [asking.stream for asking in self.asking.values() if asking.stream is not None]

    def of(self, row: Row) -> Asking:
        """How far a row has come in asking."""
        return self.asking.setdefault(row.row, Asking())

    def next_seed(self, row: Row) -> int:
        """The noise of a row's next request: 63 bits of its own. One that brought nothing is asked for again with the
        same; else it is never the same again, since a row that repeats its noise repeats itself."""
        asking = self.of(row)
        text = f"{row.seed}\x1f{asking.fruitful + (asking.received > 0)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def asks(self, row: Row, most: int) -> None:
        """The row's next request is sent, for ``most`` tokens."""
        asking = self.of(row)
        asking.fruitful += asking.received > 0
        asking.at_first, asking.asked_for, asking.received = len(row.tokens), most, 0
        self._texts[row.row] = ""  # a text that broke off cannot be gone on from

    def take_in(self, row: Row, delta: Delta) -> bool:
        """What a row's request brought; whether that was something.

        Raises:
            BadAnswerError: tokens are missing, differ from what was sent before, or are more than were asked for.
            ModelError: the server ended the row before it was at its end.
        """
        self.cached_tokens += delta.cached
        if not self.gives_ids:
            return self._take_in_text(row, delta)
        asking, ids = self.of(row), list(delta.token_ids)
        start = asking.received if delta.total is None else delta.total - len(ids)
        again = asking.received - start  # tokens that came before
        if start < 0 or again < 0:
            raise BadAnswerError(f"row {row.row}: tokens are missing before token {start + 1}")
        known = row.tokens[asking.at_first + start :][: min(again, len(ids))]  # none is kept behind a row's end
        if ids[: len(known)] != known:
            raise BadAnswerError(f"row {row.row}: other tokens than were sent before")
        new = ids[again:]
        if asking.received + len(new) > asking.asked_for:
            raise BadAnswerError(f"row {row.row}: more than the {asking.asked_for} tokens asked for")
        for name in self.recorded:
            if new and len(delta.stats.get(name, ())) != len(ids):
                raise BadAnswerError(f"row {row.row}: not one {name} for each token")
        asking.received += len(new)
        if row.rejected:  # they were on their way when it was
            self.overshoot_tokens += len(new)
        self.receive(row, new, {name: delta.stats[name][again:] for name in self.recorded} if new else {})
        if row.end in (None, "length") and not row.rejected:
            self._hear(row, delta, asking)
        return bool(new)

    def _hear(self, row: Row, delta: Delta, asking: Asking) -> None:
        """Why the server has ended a row whose end we do not see, or take for that of its length."""
        if delta.finish == "stop" and row.tokens:
            row.end = "eos"  # by a token that it knows to end answers, and we do not: it stands last
        if row.end is None and delta.finish == "length" and asking.received < asking.asked_for:
            raise ModelError(
                f"the server ended a row after {asking.received} of the {asking.asked_for} tokens asked for.",
                hint="does its context hold prompt and answer? max_length= says how many tokens it holds.",
            )

    # text alone

    def _take_in_text(self, row: Row, delta: Delta) -> bool:
        """Of a server that gives none, a row's ids are those of its text, tokenised here."""
        if row.end is not None or row.rejected:
            return False
        text = self._texts[row.row] = self._texts[row.row] + delta.text
        stopped = any(stop in text for stop in self._until)
        if stopped or delta.finish in ("stop", "length"):
            ids = self._detokenizer.tokenizer.encode(text, add_special_tokens=False)
            row.tokens = list(ids)[: self.max_gen_toks]  # tokenised anew, a text may be a token longer
            row.end = "stop" if stopped else "eos" if delta.finish == "stop" else "length"
        return bool(delta.text)

    def _view(self, row: Row) -> RowView:
        if self.gives_ids:
            return super()._view(row)
        reason: FinishReason | None = row.finish_reason
        text = self._texts.get(row.row, "") if reason is not None else ""
        cuts = [at for at in (text.find(stop) for stop in self._until) if at >= 0]
        ids: Sequence[int] = row.tokens[: row.counted]
        return RowView(row=row.row, text=text[: min(cuts, default=len(text))], token_ids=ids, finish_reason=reason)
