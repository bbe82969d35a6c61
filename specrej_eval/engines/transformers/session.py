"""One prompt being decoded, as the engine keeps it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Prompt, TokenStat, stream_key
from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.sampling import SamplingParams
from specrej_eval.kv.cache import Prefix, TokenAccount


@dataclass(slots=True)
class Record:
    """A row on the host: filled in when it finishes, and at each look."""

    row: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[float] | None = None
    mean_logprob: float | None = None
    token_stats: dict[TokenStat, list[float]] = field(default_factory=dict)
    text: str = ""


class Session:
    """One prompt being decoded: its prefix, its groups of rows, and the records of all rows ever started."""

    def __init__(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...],
        recorded: tuple[TokenStat, ...],
        prefix: Prefix,
        codes: Tensor,
    ) -> None:
        self.prompt = prompt
        self.until = until
        self.budget = budget
        self.recorded = recorded
        """What is kept of every token drawn, besides its id."""
        self.keep_logprobs = config.logprobs
        self.prefix: Prefix | None = prefix
        self.codes = codes
        """(vocab,), uint8: what each token id means (EOS, may complete a stop string)."""
        self.sampling = SamplingParams(config.temperature, config.top_k, config.top_p, config.min_p)
        self.key = torch.tensor(stream_key(config.seed, prompt.task, prompt.prompt_hash, prompt.repeat))
        self.account = TokenAccount(limit=budget.kv_budget_tokens, held=prompt.num_tokens)
        self.held_at: Counter[int] = Counter()
        """Suffix tokens held, by tokens decoded since the last look. As if all rows decoded together: a batch that is
        split for want of memory takes turns, and must not show in results."""
        self.groups: list[Group] = []
        self.records: list[Record] = []
        self.in_pool: list[int] = []
        """Rows live at the last ``follow``."""
        self.prompt_tokens = prompt.num_tokens
        self.decode_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.degraded = False

    @property
    def num_live(self) -> int:
        return sum(group.num_rows for group in self.groups)

    @property
    def tokens_since_look(self) -> int:
        return max((group.num_sampled - group.sampled_at_look for group in self.groups), default=0)

    @property
    def kv_tokens_peak(self) -> int:
        return self.prompt_tokens + max(self.held_at.values(), default=0)
