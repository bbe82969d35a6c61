"""What an engine is to the loop: sessions that start, follow plans, decode, and show their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Message, Plan, Prompt, RowView, TokenStat


@dataclass(slots=True)
class FinishedRow:
    """A row's tokens once it is known what became of it."""

    row: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None


class EngineSession(Protocol):
    """One prompt being decoded. The engine fills it in; the loop reads it."""

    num_live: int
    """Rows still decoding."""
    tokens_since_look: int
    """Tokens each live row has decoded since the last ``follow``. Rows that started late are shorter than others, so
    it is this that they have in common."""
    prompt_tokens: int
    decode_tokens: int
    """Tokens sampled so far, over all rows."""
    kv_tokens_peak: int
    """Most tokens held since the last look."""
    prefill_seconds: float
    decode_seconds: float
    degraded: bool
    """True once rows had to be given up for want of memory."""


class Engine(Protocol):
    """Decodes rows. Engines differ in how, never in which rows: (prompt, seed, sampling) decide the tokens."""

    max_length: int
    """Context length in tokens: prompt and answer together."""
    has_chat_template: bool
    """Whether ``encode`` takes chat messages."""

    def encode(self, prompt: str | Sequence[Message], *, repeat: int = 0) -> Prompt:
        """Tokenise a raw context or chat messages.

        Raises:
            PromptError: empty, malformed, or messages without a chat template.
        """
        ...

    def check(self, prompt: Prompt, config: RunConfig) -> None:
        """Whether a prompt can be decoded at all.

        Raises:
            PromptError: it is empty, or leaves no room for max_gen_toks in the context.
        """
        ...

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        with_logprobs: bool = False,
        token_stats: Sequence[TokenStat] = (),
    ) -> Any:
        """Prefill the prompt once and return its session. No row is started.

        Args:
            with_logprobs: ``RowView.mean_logprob`` must be filled in.
            token_stats: what else ``RowView.token_stats`` must hold. Costs no forward pass.

        Raises:
            OutOfMemoryError: the prompt alone does not fit.
        """
        ...

    def follow(self, session: Any, plan: Plan) -> None:
        """Keep the rows a plan names (live rows it does not name are dropped), and start its fresh rows."""
        ...

    def decode(self, sessions: Sequence[Any], num_tokens: int) -> None:
        """Decode ``num_tokens`` tokens on every live row of all sessions in one batch.

        Finished rows leave in the same step. Returns early once a session has no live row left.

        Raises:
            KVBudgetExceededError: a session would hold more tokens than its budget.
            OutOfMemoryError: not even one row at a time could be decoded.
        """
        ...

    def pool(self, session: Any) -> list[RowView]:
        """Rows live at the last ``follow``, those that finished since included, in row order."""
        ...

    def rows(self, session: Any) -> list[FinishedRow]:
        """All rows ever started, in row order; rows that were dropped have finish reason ``rejected``."""
        ...

    def close(self, session: Any) -> None:
        """Free what the session holds on the device."""
        ...

    def capacity_tokens(self, config: RunConfig, prompt_tokens: int) -> int:
        """Tokens of KV that free memory holds, measured after a warm-up (``n=max``)."""
        ...

    def peak_bytes(self) -> int:
        """Peak memory so far: allocated by torch on a GPU, resident set of the process on a CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """Device, dtype, attention path and versions, for results.

        ``batch_invariance`` says what is promised of a row's logits whatever else is in the batch: the same ``bits``,
        or the same up to ``rounding`` (uniforms and rules stay; a token differs where a uniform falls in between).
        """
        ...
