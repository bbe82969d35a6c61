"""The KV budget of one prompt, in tokens: known before the first token and written into the result.

``kv_budget_tokens = prompt + n * first_look``. Given two of the three the third follows; all three must agree.
Integers only, no torch: results never depend on the machine, the batch or a restart (the reference cuts when *memory*
is full, so its results depend on the GPU; we differ here on purpose). ``n=max`` is the paper's way, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from specrej_eval.config import DEFAULT_N, MAX, N_MAX, RunConfig
from specrej_eval.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The resolved numbers for one prompt."""

    prompt_tokens: int
    kv_budget_tokens: int
    n: int
    first_look: int
    max_gen_toks: int

    @property
    def suffix_tokens(self) -> int:
        """Tokens left for the rows' own suffixes once the shared prompt is held."""
        return self.kv_budget_tokens - self.prompt_tokens

    @property
    def rows_to_the_end(self) -> int:
        """Rows that can all reach max_gen_toks within the budget: the size of a wave."""
        return self.max_rows(self.max_gen_toks)

    def max_rows(self, tokens_per_row: int) -> int:
        """Most rows that may hold ``tokens_per_row`` tokens each."""
        return self.suffix_tokens // tokens_per_row

    def next_look(self, rows: int) -> int:
        """Tokens per row at which ``rows`` live rows have filled the budget, or reached max_gen_toks."""
        return min(self.max_gen_toks, self.suffix_tokens // rows)

    def most_decoded(self, alpha: Fraction) -> int:
        """Tokens decoded if no row ends before max_gen_toks and every look rejects ``alpha`` of the rows."""
        if not alpha:
            return self.n * self.max_gen_toks
        rows, length, decoded = self.n, 0, 0
        while length < self.max_gen_toks:
            rows = min(rows, self.max_rows(length + 1))
            look = self.next_look(rows)
            decoded += rows * (look - length)
            rows, length = rows - floor(alpha * rows), look
        return decoded

    def kv_tokens(self, rows: int, tokens_per_row: int) -> int:
        """Tokens held by the shared prompt and ``rows`` suffixes."""
        return self.prompt_tokens + rows * tokens_per_row


def default_first_look(n: int, max_gen_toks: int) -> int:
    """max(8, max_gen_toks // 8), and for few rows enough that the budget still holds one row to the end."""
    return min(max_gen_toks, max(8, max_gen_toks // 8, -(-max_gen_toks // n)))


def _check_join(config: RunConfig) -> None:
    if config.join and config.n == MAX and config.kv_budget_tokens is None:
        raise ConfigError(
            "n=max with join=True: each process would start as many rows as its own memory holds.",
            hint="give n or kv_budget_tokens as a number.",
        )


def check_arguments(config: RunConfig, *, max_gen_toks_known: bool = True) -> None:
    """What can be said of the budget before any prompt is seen (a prompt holds at least one token).

    Args:
        max_gen_toks_known: False where a task may still set its own ``max_gen_toks``.

    Raises:
        ConfigError: the arguments disagree, or cannot hold one row of max_gen_toks.
    """
    n, first_look, budget = config.n, config.first_look, config.kv_budget_tokens
    _check_join(config)
    if n is None and budget is None:
        n = DEFAULT_N
    if isinstance(n, int) and budget is not None:
        # rows that are never cut run in waves, so their first_look may be the least there is although n rows do not fit
        if first_look is not None and n * first_look >= budget and (config.rejects or first_look > 1):
            raise _disagree(n, first_look, budget, prompt_tokens=None)
        if config.rejects and n >= budget:
            raise ConfigError(
                f"kv_budget_tokens={budget} cannot hold n={n} rows of one token next to the prompt.",
                hint="raise kv_budget_tokens, or start fewer rows.",
            )
    if max_gen_toks_known:
        suffix = budget - 1 if budget is not None else None
        if suffix is None and isinstance(n, int) and first_look is not None:
            suffix = n * first_look
        if suffix is not None and suffix < config.max_gen_toks:
            raise _too_small(suffix, config.max_gen_toks)


def resolve(config: RunConfig, prompt_tokens: int, *, capacity_tokens: int | None = None, n_max: int = N_MAX) -> Budget:
    """The numbers for a prompt of ``prompt_tokens`` tokens.

    Args:
        capacity_tokens: tokens that free memory holds; needed for ``n=max`` without kv_budget_tokens only.
        n_max: most rows of ``n=max`` where the argument of that name is not given. Where it is fewer than memory or
            kv_budget_tokens hold, the budget is what so many rows fill.

    Raises:
        ConfigError: the arguments disagree for this prompt, or cannot hold one row of max_gen_toks.
    """
    n, first_look, kv_tokens = config.n, config.first_look, config.kv_budget_tokens
    longest = config.max_gen_toks
    _check_join(config)  # a task's own arguments may ask for n=max
    if n == MAX:
        if kv_tokens is None:
            if capacity_tokens is None:
                raise ConfigError(
                    "n=max needs to know how much memory is free, which this engine cannot tell.",
                    hint="give n as a number, or give kv_budget_tokens.",
                )
            kv_tokens = capacity_tokens
        most = config.n_max or n_max
        if first_look is None:
            first_look = default_first_look(min(DEFAULT_N, most), longest) if config.rejects else longest
        kv_tokens = min(kv_tokens, prompt_tokens + most * min(first_look, longest))
        n = None
    if n is None and (first_look is None or kv_tokens is None):
        n = DEFAULT_N
    assert not isinstance(n, str)  # "max" was resolved above
    if n is None:
        assert first_look is not None and kv_tokens is not None
        first_look = min(first_look, longest)
        n = max(0, kv_tokens - prompt_tokens) // first_look
        if n < 1:
            raise ConfigError(
                f"kv_budget_tokens={kv_tokens} holds the prompt of {prompt_tokens:,} tokens, but not even one row of "
                f"first_look={first_look}.",
                hint="raise kv_budget_tokens, or lower first_look.",
            )
    elif kv_tokens is None:
        if first_look is None:
            # rows that are never cut have no use for an early look: their budget holds them all to the end
            first_look = default_first_look(n, longest) if config.rejects else longest
        first_look = min(first_look, longest)
        kv_tokens = prompt_tokens + n * first_look
    else:
        suffix = max(0, kv_tokens - prompt_tokens)
        look = suffix // n
        if look < 1 and config.rejects:
            raise ConfigError(
                f"kv_budget_tokens={kv_tokens} cannot hold the prompt of {prompt_tokens:,} tokens and n={n} rows.",
                hint="raise kv_budget_tokens, or start fewer rows.",
            )
        look = max(1, look)
        if first_look is None:
            first_look = min(look, longest)
        # whole tokens: n may follow from first_look or first_look from n, and what was resolved once is taken back
        elif first_look not in (look, min(look, longest)) and n != suffix // first_look:
            raise _disagree(n, first_look, kv_tokens, prompt_tokens=prompt_tokens)
        first_look = min(first_look, longest)
    budget = Budget(
        prompt_tokens=prompt_tokens,
        kv_budget_tokens=kv_tokens,
        n=n,
        first_look=first_look,
        max_gen_toks=longest,
    )
    if budget.rows_to_the_end < 1:
        raise _too_small(budget.suffix_tokens, longest)
    return budget


def _disagree(n: int, first_look: int, kv_tokens: int, *, prompt_tokens: int | None) -> ConfigError:
    prompt = "the prompt" if prompt_tokens is None else f"a prompt of {prompt_tokens}"
    return ConfigError(
        f"n={n}, first_look={first_look} and kv_budget_tokens={kv_tokens} contradict each other: "
        f"{prompt} + {n} * {first_look} must equal kv_budget_tokens.",
        hint="give two of the three; the third follows for each prompt.",
    )


def _too_small(suffix_tokens: int, max_gen_toks: int) -> ConfigError:
    return ConfigError(
        f"the KV budget leaves {max(0, suffix_tokens):,} tokens next to the prompt, "
        f"too few for one row of max_gen_toks={max_gen_toks}.",
        hint="raise kv_budget_tokens (or n, or first_look), or lower max_gen_toks.",
    )
