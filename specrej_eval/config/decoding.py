"""Arguments about how rows are drawn and which of them go on."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval import registry
from specrej_eval.config.argument import Decides, Takes, argument, as_bool, choice, number, whole

DEFAULT_N = 16
MAX = "max"
"""``n=max``: as many rows as free memory holds, and no more than ``n_max``."""
N_MAX = 1024
"""The default of ``n_max``. Of normally distributed rewards, the best of 1,024 is 3.25 standard deviations above the
mean, and of twice as many 3.44."""

_TAKES = (Takes.RUN, Takes.REQUEST)


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """How a token is drawn: what a task that samples brings along itself."""

    temperature: float = argument(
        1.0,
        number("at least 0 (0 decodes greedily)", lambda value: value >= 0),
        "0 decodes greedily (and needs n=1). Any other draws from softmax(logits / temperature), a tiny one the "
        "likeliest token.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
    )
    top_p: float = argument(
        1.0,
        number("in (0, 1]", lambda value: 0 < value <= 1),
        "Nucleus: the smallest set of tokens with this much probability; 1 switches the filter off.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    top_k: int = argument(
        50,
        whole(0, told="0 switches it off"),
        "Only this many of the likeliest tokens; 0 switches the filter off.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    min_p: float = argument(
        0.0,
        number("in [0, 1]", lambda value: 0 <= value <= 1),
        "Least probability of a token, as a fraction of the likeliest one's; 0 switches the filter off.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )


@dataclass(frozen=True, kw_only=True)
class DecodingArguments(SamplingArguments):
    strategy: str = argument(
        "speculative_rejection",
        choice(among=lambda: registry.names("specrej_eval.strategies")),
        "``speculative_rejection`` or ``best_of_n`` (``--model best_of_n`` presets it).",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    alpha: float = argument(
        0.5,
        # 50 or "50%" is a usual slip
        number("in [0, 1)", lambda value: 0 <= value < 1, "alpha=0.5 rejects half of the rows at each look."),
        "Fraction of the pool rejected at each look, in [0, 1); 0 is Best-of-N, token for token.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    n: int | str | None = argument(
        None,
        whole(1, also=MAX),
        "Rows started; ``max`` = as many as free memory holds (the number is recorded).",
        none=f"{DEFAULT_N}, or what the budget and first_look give",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        synonyms=("n_samples", "num_samples", "num_return_sequences", "best_of"),
        idle_when_greedy=True,
    )
    n_max: int | None = argument(
        None,
        whole(),
        "Most rows that ``n=max`` starts for a prompt, whatever memory holds.",
        none=f"{N_MAX:,}; on a CPU more than 256 are refused unless this is given",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
        later=True,
    )
    first_look: int | None = argument(
        None,
        whole(),
        "Tokens per row before the first look.",
        none="max(8, max_gen_toks // 8), or what n and the budget give",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    kv_budget_tokens: int | None = argument(
        None,
        whole(),
        "Tokens (shared prompt + suffixes of all rows) one prompt may hold.",
        none="prompt + n * first_look; of these three any two give the third",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
    )
    max_gen_toks: int = argument(
        256,
        whole(),
        "Largest number of tokens in an answer; a task's own value wins.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        elsewhere=("max_completion_tokens", "max_gen_tokens", "max_new_tokens"),
    )
    seed: int = argument(
        0,
        whole(None),
        "Seed of all draws; a row's tokens depend on (seed, task, prompt, repeat, row) and on nothing else. Inside "
        "lm-eval, its own ``--seed`` if none is given here.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
    )
    variance_reduce: bool = argument(
        False,
        as_bool,
        "True: a prompt's n rows draw their tokens from n different strata of the random numbers, so that they are "
        "less alike. Each row alone is drawn as before.",
        decides=Decides.ANSWERS,
        takes=_TAKES,
        idle_when_greedy=True,
        later=True,
    )
