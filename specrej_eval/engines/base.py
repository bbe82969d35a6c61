"""What an engine is to the loop: sessions that start, follow plans, decode, and show their rows.

An engine is a subclass of ``Engine`` with a session of its own kind. Text is not its affair: prompts are tokenised, and
answers are cut and shown, by what the base class holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Message, Plan, Prompt, RowView, TokenStat
from specrej_eval.engines.prompts import encode_prompt
from specrej_eval.engines.text import Detokenizer
from specrej_eval.errors import PromptError
from specrej_eval.special_tokens import ENCODE_AS_TEXT, SpecialTokenError, Tokeniser

Promise = Literal["bits", "uniforms", "distribution"]
"""How far a row is independent of the other rows and prompts in its batch: its logits are the same bits; they are the
same up to rounding, and its uniforms are the same (a token differs where a uniform falls in between); or its tokens are
drawn from the same distribution, and that is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What ``Engine.open`` is asked for."""

    prompt: Prompt
    config: RunConfig
    budget: Budget
    until: tuple[str, ...] = ()
    token_stats: Collection[TokenStat] = ()


@dataclass(kw_only=True, eq=False)
class EngineSession(ABC):
    """One prompt being decoded. The engine fills it in; the loop reads it."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    """Tokens sampled so far, over all rows."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    degraded: bool = False
    """True once rows had to be given up for want of memory."""
    overshoot_tokens: int = 0
    discarded_tokens: int = 0
    cached_tokens: int = 0
    """See ``core.Ledger``: of engines whose rows run ahead of a look, or read a prompt once for each row."""

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Rows still decoding."""

    @property
    @abstractmethod
    def tokens_since_look(self) -> int:
        """Tokens each live row has decoded since the last ``follow``. Rows that started late are shorter than others,
        so it is this that they have in common."""

    @property
    @abstractmethod
    def kv_tokens_peak(self) -> int:
        """Most tokens held since the last look."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan(ABC):
    """A language model that was named and checked, and is not loaded yet: what an engine's ``resolve_engine`` gives."""

    name: str
    """Folder or hub name; that of the embedded model if none is given."""
    dtype: str
    """``auto`` = the checkpoint's."""
    device: str
    """Where rows are decoded, and a reward model lies unless ``reward_device`` says otherwise."""
    config: RunConfig
    host: Mapping[str, Any]
    """Arguments of the loader (``config.HOST``)."""

    @abstractmethod
    def load(self, *, content_rule: str) -> Engine:
        """Load weights and tokenizer.

        Args:
            content_rule: what ``special_tokens_in_content=None`` means.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError, OutOfMemoryError: what only loading finds.
        """

    def deciding(self) -> dict[str, Any]:
        """What decides answers and no argument says: in a fingerprint, beside what the arguments are."""
        return {}

    def environment(self) -> dict[str, Any]:
        """What this machine makes of the arguments, and versions: in a fingerprint's ``environment``."""
        return {}


class Engine(ABC):
    """Decodes rows. Engines differ in how, never in which rows: (prompt, seed, sampling) decide the tokens.

    Args:
        tokenizer: the model's, of transformers.
        max_length: context length in tokens: prompt and answer together.
        think_end_token: text or id that ends a reasoning part (see ``text.Detokenizer``).
        add_bos_token: None = the tokenizer's own way.
        chat_template_args: passed to the tokenizer's chat template.
        special_tokens_in_content: what becomes of special tokens that a message spells (see ``special_tokens``).
    """

    device: Any = "cpu"
    """Where rows are decoded; a reward model lies there unless ``reward_device`` says otherwise."""
    devices: frozenset[Any] = frozenset()
    """All those that ``decode`` computes on, and rows of no other session go on while it does; empty = unknown."""
    promises: Promise = "distribution"
    finishes_rejected: bool = False
    """Whether ``again`` is there."""
    stratifies: bool = False
    """Whether ``variance_reduce`` is."""
    decodes: bool = True
    """False: rows come from records, and seconds and memory are nobody's."""
    most_rows_unasked: int | None = None
    """Rows of one prompt beyond which ``n=max`` needs ``n_max``, since they would take very long; None = no such
    number."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        think_end_token: str | int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        special_tokens_in_content: str = ENCODE_AS_TEXT,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.tokeniser = Tokeniser(tokenizer, special_tokens_in_content)
        self.detokenizer = Detokenizer(tokenizer, think_end_token=think_end_token)
        self._add_bos_token = add_bos_token
        self._chat_template_args = chat_template_args

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode`` takes chat messages."""
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: str | Sequence[Message]) -> Prompt:
        """Tokenise a raw context or chat messages.

        Raises:
            PromptError: empty, malformed, messages without a chat template, or special tokens in them that are not
                allowed or cannot be told from the template's.
        """
        try:
            return encode_prompt(
                self.tokeniser,
                prompt,
                add_bos_token=self._add_bos_token,
                chat_template_args=self._chat_template_args,
            )
        except SpecialTokenError as error:
            raise PromptError(
                f"{error}.",
                hint="special_tokens_in_content=allow reads special tokens in prompts as control tokens, "
                "encode_as_text as text.",
            ) from error

    def check(self, prompt: Prompt, config: RunConfig) -> None:
        """Whether a prompt can be decoded at all.

        Raises:
            PromptError: it is empty, or leaves no room for max_gen_toks in the context.
        """
        if not prompt.num_tokens:
            raise PromptError("the prompt has no tokens.", hint="give a non-empty string or at least one message.")
        if prompt.num_tokens + config.max_gen_toks > self.max_length:
            raise PromptError(
                f"the prompt has {prompt.num_tokens:,} tokens; with max_gen_toks={config.max_gen_toks} that exceeds "
                f"the model's context of {self.max_length:,} tokens.",
                hint="shorten the prompt or lower max_gen_toks. (lm-eval's prompts are cut on the left instead.)",
            )

    @abstractmethod
    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> Any:
        """Prefill the prompt once and return its session. No row is started.

        Args:
            until: stop strings.
            token_stats: what ``RowView.token_stats`` must hold. Costs no forward pass.

        Raises:
            PromptError: as ``check``.
            OutOfMemoryError: the prompt alone does not fit.
        """

    def open_all(self, openings: Sequence[Opening]) -> list[Any]:
        """``open`` of several prompts; an engine may read them together, and once what they have in common.

        Nothing that is decoded depends on which prompts are opened together, as far as ``promises`` goes.

        Raises:
            PromptError, OutOfMemoryError: as ``open``; then none of them is open.
        """
        sessions: list[Any] = []
        try:
            for each in openings:
                asked = (each.prompt, each.config, each.budget)
                sessions.append(self.open(*asked, until=each.until, token_stats=each.token_stats))
        except Exception:
            for session in sessions:
                self.close(session)
            raise
        return sessions

    def open_by_turns(self, openings: Sequence[Opening], *, tokens: int) -> Generator[None, None, list[Any]]:
        """``open_all`` in parts, so that rows of other prompts need not wait until a long prompt is read.

        Each ``next`` reads about so many tokens; what it returns in the end is what ``open_all`` returns, bit for bit.
        Between two parts every other method may be called. Closing it frees what has been read. An engine that cannot
        read in parts does it all in one.

        Args:
            tokens: of prompts, in each part.

        Raises:
            PromptError, OutOfMemoryError: as ``open_all``; then nothing is open, and it cannot go on.
        """
        yield from ()
        return self.open_all(openings)

    @abstractmethod
    def follow(self, session: Any, plan: Plan) -> None:
        """Keep the rows a plan names (live rows it does not name are dropped), and start its fresh rows.

        Raises:
            OutOfMemoryError: there is no room for the rows that go on.
        """

    @abstractmethod
    def decode(self, sessions: Sequence[Any], num_tokens: int) -> None:
        """Decode ``num_tokens`` tokens on every live row of all sessions in one batch.

        Finished rows leave in the same step. Returns early once a session has no live row left.

        Raises:
            KVBudgetExceededError: a session would hold more tokens than its budget.
            OutOfMemoryError: not even one row at a time could be decoded.
        """

    @abstractmethod
    def pool(self, session: Any) -> list[RowView]:
        """Rows live at the last ``follow``, those that finished since included, in row order."""

    @abstractmethod
    def rows(self, session: Any) -> list[RowView]:
        """All rows ever started, in row order, as they were when they ended or at the last ``pool``."""

    def again(self, session: Any, rows: Mapping[int, Sequence[int]]) -> None:
        """Start rejected rows of a session that has no live row again, as they were: ``decode`` gives them the tokens
        they had, and then those they would have taken, each from its own stream.

        Args:
            rows: row id -> the tokens it had when it was rejected.

        Raises:
            OutOfMemoryError: there is no room for them.
            NotImplementedError: ``finishes_rejected`` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} does not go on with rejected rows")

    @abstractmethod
    def close(self, session: Any) -> None:
        """Free what the session holds on the device."""

    def capacity_tokens(self, prompt_tokens: int) -> int:
        """Tokens of KV that free memory holds for all prompts in flight, measured after a warm-up; 0 = unknown.

        Args:
            prompt_tokens: of the longest prompt.
        """
        del prompt_tokens
        return 0

    def bytes_per_token(self) -> int:
        """Memory that a token of KV takes; 0 = unknown."""
        return 0

    def parameters_per_token(self) -> int:
        """Parameters that take part in reading or decoding a token; 0 = unknown."""
        return 0

    def attention_size(self) -> tuple[int, int]:
        """Layers, and attention heads times the size of one; 0 = unknown."""
        return 0, 0

    def reset_peak(self) -> None:  # noqa: B027 - where it cannot be done, peaks are those of the whole process
        """``peak_bytes`` begins anew."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak memory so far: allocated by torch on a GPU, resident set of the process on a CPU."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Device, dtype, attention path, versions and ``promises``, for results."""
