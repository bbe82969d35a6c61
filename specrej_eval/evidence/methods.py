"""A grid of methods: strategies x alpha x n, as a command line or YAML names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specrej_eval.config import ARGUMENTS
from specrej_eval.errors import ConfigError

BEST_OF_N, SPECULATIVE_REJECTION = "best_of_n", "speculative_rejection"


@dataclass(frozen=True, slots=True, order=True)
class Method:
    """One way to answer, models and sampling apart."""

    strategy: str
    n: int
    alpha: float | None = None
    """None for a strategy that rejects nothing."""

    @property
    def name(self) -> str:
        """For folders and columns: ``bo16``, ``spr_n16_a0.5``."""
        if self.strategy == BEST_OF_N:
            return f"bo{self.n}"
        short = "spr" if self.strategy == SPECULATIVE_REJECTION else self.strategy
        return f"{short}_n{self.n}" + ("" if self.alpha is None else f"_a{self.alpha}")

    @property
    def label(self) -> str:
        """For people."""
        if self.strategy == BEST_OF_N:
            return "Sampling" if self.n == 1 else f"Best-of-{self.n}"
        name = "SpecRej" if self.strategy == SPECULATIVE_REJECTION else self.strategy
        return f"{name} n={self.n}" + ("" if self.alpha is None else f" alpha={self.alpha}")

    @property
    def arguments(self) -> dict[str, Any]:
        """By the names of ``--model_args``."""
        return {"strategy": self.strategy, "n": self.n, **({} if self.alpha is None else {"alpha": self.alpha})}


def grid(strategies: Sequence[str], alphas: Sequence[float], rows: Sequence[int]) -> list[Method]:
    """All methods, Best-of-N first; alpha=0 is Best-of-N, and is called so.

    Raises:
        ConfigError: it is empty.
    """
    for name, values, example in (("strategy", strategies, BEST_OF_N), ("n", rows, 16)):
        if not values:
            raise ConfigError(f"the grid is empty: no {name}.", hint=f"give at least one: --{name} {example}")
    if not alphas and any(name != BEST_OF_N for name in strategies):
        raise ConfigError("the grid is empty: no alpha.", hint="give at least one: --alpha 0.5")
    found: dict[Method, None] = {}
    for name in strategies:
        for n in rows:
            for alpha in (None,) if name == BEST_OF_N else alphas:
                best_of_n = not alpha and name in (BEST_OF_N, SPECULATIVE_REJECTION)
                found[Method(BEST_OF_N, n) if best_of_n else Method(name, n, alpha)] = None
    return sorted(found, key=lambda method: (method.strategy != BEST_OF_N, method))


def named(methods: Sequence[Method], name: str) -> Method:
    """The method that is called so, in short or in full.

    Raises:
        ConfigError: there is none.
    """
    for method in methods:
        if name in (method.name, method.label):
            return method
    raise ConfigError(
        f"no method is called {name!r}.", hint=f"there are {', '.join(method.name for method in methods)}."
    )


def listed(name: str, text: Any, *, of: str | None = None) -> list[Any]:
    """Values with commas between them, each as the argument's own rule reads it; none twice.

    Args:
        of: the argument's name, where the option has another.

    Raises:
        ConfigError: one of them breaks the rule, or there is none.
    """
    made = ARGUMENTS[of or name]
    found = [made.read(word) for word in _words(str(text))]
    if not found:
        raise ConfigError(
            f"--{name} is empty.", hint=f"for example --{name} {16 if made.default is None else made.default}"
        )
    return list(dict.fromkeys(found))


def _words(text: str) -> Iterator[str]:
    return (word.strip() for word in text.split(",") if word.strip())
