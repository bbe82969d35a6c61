"""What others say of the answers: a judge of alpaca_eval (win rate), and the language model itself (perplexity)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from specrej_eval.config import as_bool
from specrej_eval.core import Question
from specrej_eval.errors import ConfigError
from specrej_eval.evidence.methods import BEST_OF_N, Method
from specrej_eval.records.cell_scores import CellPreferences

if TYPE_CHECKING:
    from specrej_eval.evidence.comparison import Cell

CACHE = "annotations.json"
"""Beside the comparison: what a judge has said already."""


def add_arguments(group: Any) -> None:
    group.add_argument(
        "--annotators",
        metavar="NAME",
        help="a judge of alpaca_eval for win rates against the baseline, or its folder; specrej_reward_judge is ours",
    )
    group.add_argument(
        "--perplexity",
        metavar="BOOL",
        help="also the language model's perplexity of each method's answers, given their prompts (default: false)",
    )


@dataclass(frozen=True, slots=True)
class Judge:
    perplexity: bool = False
    annotators: Any = None
    """A ``harness.alpaca_eval.preferences.Judge``."""

    @classmethod
    def of(cls, options: dict[str, Any], pool: Method | None) -> Self:
        """Take its options out of all.

        Args:
            pool: the method whose rows all others have.

        Raises:
            ConfigError: a bad value; no such annotator; perplexity without Best-of-N.
        """
        perplexity = as_bool("perplexity", options.pop("perplexity", False))
        if perplexity and pool is None:
            raise ConfigError(
                "--perplexity needs best_of_n in the grid: log-probs are those of its rows.",
                hint="--strategy best_of_n,speculative_rejection",
            )
        name = options.pop("annotators", None)
        annotators = None
        if name is not None:
            from specrej_eval.harness.alpaca_eval.preferences import Judge as Annotators

            annotators = Annotators(str(name))
        return cls(perplexity=perplexity, annotators=annotators)

    @property
    def for_pool(self) -> dict[str, Any]:
        """Arguments of the cell whose rows all others share."""
        return {"logprobs": True} if self.perplexity else {}

    def add(self, report: dict[str, Any], cells: Sequence[Cell], questions: Sequence[Question], root: Path) -> None:
        """To each method of the report, what was asked for."""
        if self.perplexity:
            _add_perplexity(report, cells)
        if self.annotators is not None:
            self._add_win_rate(report, cells, questions, root)

    def _add_win_rate(
        self, report: dict[str, Any], cells: Sequence[Cell], questions: Sequence[Question], root: Path
    ) -> None:
        """Mean chance that a method's answer is preferred to the baseline's on the same prompt and seed.

        Each pair in both orders; 0.5 for equal answers. Not length-controlled: alpaca_eval's own control looks prompts
        up by their row in its 805; mean lengths stand beside the win rates instead.
        """
        import numpy as np

        from specrej_eval.evidence.bootstrap import Bootstrap

        instructions = [question.instruction for question in questions]
        judge = self.annotators.name
        baseline = {cell.seed: cell for cell in cells if cell.method.name == report["baseline"]}
        known = {method["name"]: method for method in report["methods"]}
        preferred: dict[str, dict[int, list[float | None]]] = {}
        for cell in cells:
            if cell.method.name == report["baseline"]:
                continue
            theirs, ours = ([r.text for r in each.results] for each in (baseline[cell.seed], cell))
            told = self.annotators.preferences(instructions, theirs, ours, caching_path=root / CACHE)
            preferred.setdefault(cell.method.name, {})[cell.seed] = told
            if cell.path is not None:  # for the page of `report --html`
                CellPreferences(Path(judge).name, report["baseline"], told).write(root / cell.path, ours)
        for name, by_seed in preferred.items():
            values = np.array([by_seed[seed] for seed in report["seeds"]], dtype=float).T  # None becomes NaN
            judged = ~np.isnan(values).any(axis=1)
            if not judged.any():
                continue
            bootstrap = Bootstrap(int(judged.sum()), values.shape[1], resamples=report["bootstrap"]["resamples"])
            known[name]["win_rate"] = {
                **bootstrap.interval(values[judged]).to_dict(),
                "against": report["baseline"],
                "annotators": judge,
                "prompts": int(judged.sum()),
            }
            for cell in known[name]["cells"]:
                cell["preferred"] = by_seed[cell["seed"]]


def _add_perplexity(report: dict[str, Any], cells: Sequence[Cell]) -> None:
    """exp(sum of -log p over all tokens of all answers / number of tokens), for all methods by the same rule.

    The log-probs are those of the very ids that were decoded, given the prompt they were decoded from, under the
    untempered model; the paper's code re-tokenised text, wrapped prompt and answer into a user's turn for one method
    and not for the other, and took the lowest of all rows. Every answer is a row of Best-of-N
    with most rows, whose log-probs are on record.
    """
    import numpy as np

    from specrej_eval.evidence.bootstrap import Bootstrap

    of_best = [cell for cell in cells if cell.method.strategy == BEST_OF_N]
    most = max(cell.method.n for cell in of_best)
    pools = {cell.seed: cell for cell in of_best if cell.method.n == most}
    for method in report["methods"]:
        own = [cell for cell in cells if cell.method.name == method["name"]]
        sums = [
            [_negative_log_likelihood(cell, pools[cell.seed], place) for place in range(len(cell.results))]
            for cell in own
        ]
        if any(value is None for of_cell in sums for value in of_cell):
            continue
        values = np.array(sums, dtype=float).transpose(1, 0, 2)  # (prompts, seeds, 2)
        bootstrap = Bootstrap(values.shape[0], values.shape[1], resamples=report["bootstrap"]["resamples"])
        found = bootstrap.interval(values, lambda means: np.exp(means[..., 0] / means[..., 1]))
        method["perplexity"] = found.to_dict()


def _negative_log_likelihood(cell: Cell, pool: Cell, place: int) -> tuple[float, int] | None:
    """Of one answer, and its tokens; None where the pool has no such row."""
    from specrej_eval.evidence.comparison import begins_as

    best = cell.results[place].best
    rows = pool.results[place].trajectories
    if best.row >= len(rows) or not begins_as(best, rows[best.row]):
        return None
    logprobs = rows[best.row].logprobs
    if logprobs is None or any(value is None for value in logprobs) or not logprobs:
        return None
    return -math.fsum(logprobs), len(logprobs)
