"""Methods held against each other: every number of `specrej-eval compare` and `replay`, from finished requests alone.

What comes in are results as records hold them; what goes out is plain data (``SCHEMA``, docs/compare.md). No model, no
file, no harness. Means are over prompts and seeds, intervals 95 % of a two-level bootstrap (``bootstrap``), one set of
resamples for all, so that whatever is compared is paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrej_eval.core import ROWS_FROM, GenerationResult, Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.evidence import RESAMPLES, best_of_k, kl, paper, partial_scores, regret
from specrej_eval.evidence.bootstrap import Bootstrap
from specrej_eval.evidence.equivalent_n import at, equivalent_n
from specrej_eval.evidence.flops import Sizes, flops
from specrej_eval.evidence.methods import BEST_OF_N, Method, named
from specrej_eval.evidence.significance import holm, sign_flip

Array = NDArray[np.float64]

SCHEMA = "specrej_comparison"
SCHEMA_VERSION = 1
FEWER = 1_000
"""Resamples for seconds, which machines do not measure to the third digit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method on one seed."""

    method: Method
    seed: int
    results: Sequence[GenerationResult]
    """In the prompts' order."""
    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name -> score of each answer, by a task."""
    row_metrics: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Name -> scores of all rows of each prompt; of Best-of-N with most rows alone."""
    simulated: bool = False
    path: str | None = None
    """Its folder, below that of the comparison."""

    @property
    def timed(self) -> list[int]:
        """Places of the prompts that were decoded for this cell alone."""
        return [place for place, result in enumerate(self.results) if ROWS_FROM not in result.resolved]


@dataclass(slots=True)
class _Measured:
    """A method on all seeds, as arrays (prompts, seeds)."""

    method: Method
    cells: list[Cell]
    rewards: Array
    metrics: dict[str, Array]
    costs: dict[str, Array]
    seconds: Array
    """NaN where rows came from records."""


def compare(
    cells: Sequence[Cell],
    *,
    prompts: Sequence[Mapping[str, Any]],
    sizes: Sizes | None = None,
    bytes_per_token: int = 0,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of a grid.

    Args:
        cells: every method on the same seeds.
        prompts: what is told of each prompt, in the order of the cells' results.
        sizes: of the models; None = no FLOPs.
        bytes_per_token: of KV; 0 = not known.
        baseline: name of the method that others are held against; None = Best-of-N with most rows, else the first.
        resamples, seed: of the bootstrap.

    Raises:
        ConfigError: the cells cannot be paired; no method is called as ``baseline`` says.
    """
    grid = _paired(cells)
    seeds = sorted({cell.seed for cell in cells})
    bootstrap = Bootstrap(len(prompts), len(seeds), resamples=resamples, seed=seed)
    measured = {method: _measure(method, grid[method], sizes) for method in grid}
    first = _baseline(list(measured), baseline)
    of_best = [method for method in measured if method.strategy == BEST_OF_N]
    largest = max(of_best, key=lambda method: method.n, default=None)
    smallest = min(of_best, key=lambda method: method.n, default=None)
    pool = None if largest is None else _Pool.of(measured[largest])
    told = [
        _told(
            each,
            bootstrap,
            pool=pool,
            smallest=measured[smallest] if smallest else None,
            largest=measured[largest] if largest else None,
            bytes_per_token=bytes_per_token,
        )
        for each in measured.values()
    ]
    _add_differences(told, list(measured.values()), measured[first], bootstrap)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "simulated": any(cell.simulated for cell in cells),
        "seeds": seeds,
        "baseline": first.name,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "levels": ["prompts", "seeds"]},
        "sizes": None if sizes is None else sizes.to_dict(),
        "curve": None if pool is None else _curve(pool, bootstrap),
        "methods": told,
        "prompts": [dict(prompt) for prompt in prompts],
    }


def _paired(cells: Sequence[Cell]) -> dict[Method, list[Cell]]:
    """Method -> its cells in the seeds' order."""
    if not cells:
        raise ConfigError("there is nothing to compare.", hint="give at least one method.")
    grid: dict[Method, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        grid.setdefault(cell.method, []).append(cell)
    of_first = cells[0]
    seeds = sorted({cell.seed for cell in cells})
    for method, own in grid.items():
        if [cell.seed for cell in own] != seeds:
            have = ", ".join(str(cell.seed) for cell in own)
            raise ConfigError(
                f"{method.label} was run with seeds {have}, and others with {', '.join(map(str, seeds))}: they cannot "
                "be paired.",
                hint="give each method the same seeds, each once.",
            )
        for cell in own:
            if _asked(cell) != _asked(of_first):
                raise ConfigError(
                    f"{method.label} (seed {cell.seed}) and {of_first.method.label} (seed {of_first.seed}) answered "
                    "different prompts: they cannot be paired.",
                    hint="compare runs over the same prompts, in the same order.",
                )
    return grid


def _asked(cell: Cell) -> list[tuple[str, int]]:
    return [(result.prompt_hash, result.repeat) for result in cell.results]


def _baseline(methods: Sequence[Method], name: str | None) -> Method:
    if name is not None:
        return named(methods, name)
    of_best = [method for method in methods if method.strategy == BEST_OF_N]
    return max(of_best, key=lambda method: method.n) if of_best else methods[0]


COSTS = ("decode_tokens", "prompt_tokens", "reward_tokens", "reward_calls", "kv_tokens", "looks", "answer_tokens")
"""What each answer cost, exact whether its rows were decoded for it or not."""


def _measure(method: Method, cells: list[Cell], sizes: Sizes | None) -> _Measured:
    def of(read: Any) -> Array:
        return np.array([[float(read(result)) for result in cell.results] for cell in cells]).T

    costs = {
        "decode_tokens": of(lambda result: result.ledger.decode_tokens),
        "prompt_tokens": of(lambda result: result.ledger.prompt_tokens),
        "reward_tokens": of(lambda result: result.ledger.reward_tokens),
        "reward_calls": of(lambda result: result.ledger.reward_calls),
        "kv_tokens": of(lambda result: max((round_.kv_tokens for round_ in result.rounds), default=0)),
        "looks": of(lambda result: len(result.rounds)),
        "answer_tokens": of(lambda result: result.best.num_tokens),
        "rejected": of(lambda result: result.ledger.rows_rejected / max(1, result.ledger.rows_started)),
    }
    if any(cell.simulated for cell in cells):
        for name in ("reward_tokens", "reward_calls"):  # of the reward's tokeniser and cache, which were not there
            del costs[name]
    if sizes is not None and "reward_tokens" in costs:
        costs["flops"] = of(lambda result: _flops(result, sizes))
    names = set.intersection(*(set(cell.metrics) for cell in cells))
    return _Measured(
        method,
        cells,
        rewards=of(lambda result: math.nan if result.best.reward is None else result.best.reward),
        metrics={name: np.array([cell.metrics[name] for cell in cells], dtype=float).T for name in sorted(names)},
        costs=costs,
        seconds=of(lambda result: math.nan if ROWS_FROM in result.resolved else result.ledger.total_seconds),
    )


def _flops(result: GenerationResult, sizes: Sizes) -> float:
    ledger = result.ledger
    rows = [row.num_tokens for row in result.trajectories]
    return flops(sizes, prompt_tokens=ledger.prompt_tokens, rows=rows, reward_tokens=ledger.reward_tokens)


@dataclass(slots=True)
class _Pool:
    """All rows of Best-of-N with most rows: what every other method's rows would have come to."""

    measured: _Measured
    finals: Array
    """(prompts, seeds, rows): rewards at the rows' ends."""
    metrics: dict[str, Array]
    """Name -> (prompts, seeds, rows)."""
    curves: Array
    """(prompts, seeds, rows): E_k of the reward."""

    @property
    def method(self) -> Method:
        return self.measured.method

    @classmethod
    def of(cls, measured: _Measured) -> _Pool | None:
        """None where a prompt lacks rows (``degraded``) or has a row without a finite reward."""
        finals, cells = _rewards_of_rows(measured), measured.cells
        if finals is None:
            return None
        names = set.intersection(*(set(cell.row_metrics) for cell in cells))
        metrics = {
            name: np.array([cell.row_metrics[name] for cell in cells], dtype=float).transpose(1, 0, 2)
            for name in sorted(names)
        }
        return cls(measured, finals, metrics, best_of_k.curve(finals))


def _curve(pool: _Pool, bootstrap: Bootstrap) -> dict[str, Any]:
    """Best-of-k for each k, from all subsets of the pool's rows."""
    n = pool.method.n
    ks = sorted({*range(1, min(n, 16) + 1), *(2**power for power in range(n.bit_length())), n})
    tokens = np.array(
        [[[row.num_tokens for row in result.trajectories] for result in cell.results] for cell in pool.measured.cells],
        dtype=float,
    )

    def estimates(values: Array) -> list[dict[str, Any]]:
        return [bootstrap.interval(values[..., place]).to_dict() for place in range(len(ks))]

    chosen = [k - 1 for k in ks]
    return {
        "pool": pool.method.name,
        "ks": ks,
        "steady": best_of_k.steady(n),
        "reward": estimates(pool.curves[..., chosen]),
        "metrics": {
            name: estimates(best_of_k.curve(values, ks, selected_by=pool.finals))
            for name, values in pool.metrics.items()
        },
        "decode_tokens": [float(tokens.mean() * k) for k in ks],
    }


def _told(
    each: _Measured,
    bootstrap: Bootstrap,
    *,
    pool: _Pool | None,
    smallest: _Measured | None,
    largest: _Measured | None,
    bytes_per_token: int,
) -> dict[str, Any]:
    method = each.method
    told: dict[str, Any] = {
        "name": method.name,
        "label": method.label,
        **{"strategy": method.strategy, "alpha": method.alpha, "n": method.n},
        "simulated": any(cell.simulated for cell in each.cells),
        "reward": _interval(bootstrap, each.rewards),
        "metrics": {name: _interval(bootstrap, values) for name, values in each.metrics.items()},
        "costs": {name: _interval(bootstrap, values) for name, values in each.costs.items()},
        "time": _time(each),
        "kl_bound": kl.best_of_n(method.n) if method.strategy == BEST_OF_N else kl.one_of(method.n),
        "paper": _of_paper(each, bootstrap, smallest, largest),
    }
    if bytes_per_token:
        told["costs"]["kv_bytes"] = {
            "value": float(each.costs["kv_tokens"].max()) * bytes_per_token,
            "of": "the largest",
        }
    if pool is not None:
        told |= _against_pool(each, pool, bootstrap)
    told["cells"] = [_cell(cell) for cell in each.cells]
    return told


def _interval(bootstrap: Bootstrap, values: Array) -> dict[str, Any]:
    """A mean; None where an answer has no finite reward, since leaving its prompt out would flatter the method."""
    return bootstrap.interval(values).to_dict()


def _of_prompts(bootstrap: Bootstrap, chosen: NDArray[Any]) -> Bootstrap:
    """Resamples of some of the prompts."""
    if chosen.all():
        return bootstrap
    return Bootstrap(int(chosen.sum()), bootstrap.seeds, resamples=bootstrap.resamples, seed=bootstrap.seed)


def _time(each: _Measured) -> dict[str, Any] | None:
    """Of prompts that were decoded for this method; None where there are none."""
    timed = each.seconds[~np.isnan(each.seconds).any(axis=1)]
    if each.cells[0].simulated or not len(timed):
        return None
    ledgers = [cell.results[place].ledger for cell in each.cells for place in cell.timed]
    phases = sorted({phase for ledger in ledgers for phase in ledger.seconds})
    bootstrap = Bootstrap(len(timed), timed.shape[1], resamples=FEWER)
    return {
        "seconds": bootstrap.interval(timed).to_dict(),
        "phases": {phase: float(np.mean([ledger.seconds.get(phase, 0.0) for ledger in ledgers])) for phase in phases},
        "peak_bytes": max(ledger.peak_bytes for ledger in ledgers),
        "prompts": len(timed),
        "of": "real decodes",
    }


def _of_paper(
    each: _Measured, bootstrap: Bootstrap, smallest: _Measured | None, largest: _Measured | None
) -> dict[str, Any] | None:
    if smallest is None or largest is None:
        return None
    told: dict[str, Any] = {"smallest": smallest.method.name, "largest": largest.method.name}
    rows = _rewards_of_rows(smallest)
    if rows is not None:
        scores = paper.improvement_score(each.rewards, rows)
        whole = np.asarray(~np.isnan(scores).any(axis=1))  # prompts whose rows all score alike have no such score
        if whole.any():
            found = _of_prompts(bootstrap, whole).interval(scores[whole])
            told["improvement_score"] = {**found.to_dict(), "prompts": int(whole.sum())}
    for name, over, under in (("relative_compute", each, smallest), ("speedup", largest, each)):
        if (ratio := _ratio_of_seconds(over, under)) is not None:
            told[name] = ratio
    return told


def _timed_for_both(one: _Measured, other: _Measured) -> NDArray[Any] | None:
    """(prompts,) of truth values: decoded for each of the two alone. None where no prompt was."""
    both = np.asarray(~np.isnan(one.seconds + other.seconds).any(axis=1))
    return both if both.any() and one.seconds[both].sum() > 0 and other.seconds[both].sum() > 0 else None


def _ratio_of_seconds(over: _Measured, under: _Measured) -> dict[str, Any] | None:
    """Of the prompts that were decoded for both; None where there are none."""
    both = _timed_for_both(over, under)
    if both is None:
        return None
    prompts = int(both.sum())
    bootstrap = Bootstrap(prompts, over.seconds.shape[1], resamples=FEWER)
    return {**bootstrap.ratio(over.seconds[both], under.seconds[both]).to_dict(), "prompts": prompts}


def _rewards_of_rows(measured: _Measured) -> Array | None:
    """(prompts, seeds, rows); None where a prompt lacks rows, or has a row without a finite reward."""
    rows = [[result.trajectories for result in cell.results] for cell in measured.cells]
    n = measured.method.n
    if any(len(each) != n or any(row.reward is None for row in each) for cell in rows for each in cell):
        return None
    return np.array([[[row.reward for row in each] for each in cell] for cell in rows], dtype=float).transpose(1, 0, 2)


def _against_pool(each: _Measured, pool: _Pool, bootstrap: Bootstrap) -> dict[str, Any]:
    told: dict[str, Any] = {"equivalent_n": None}
    n = each.method.n
    if not np.isnan(each.rewards).any():
        told["equivalent_n"] = equivalent_n(each.rewards, pool.curves, bootstrap).to_dict()
        told["efficiency"] = _efficiency(each, pool, bootstrap)
        z = regret.z_score(each.rewards, pool.finals)
        whole = np.asarray(~np.isnan(z).any(axis=1))
        if whole.any():
            told["z_score"] = _of_prompts(bootstrap, whole).interval(z[whole]).to_dict()
    if n <= pool.method.n and each.method.strategy != BEST_OF_N and _same_rows(each, pool):
        finals = _by_text(pool, n)
        ended = np.array(
            [
                [[row.finish_reason != "rejected" for row in result.trajectories] for result in cell.results]
                for cell in each.cells
            ]
        ).transpose(1, 0, 2)
        # as the pool scored the row chosen: in two batches a reward may differ in its last bits
        rows = np.array([[result.best.row for result in cell.results] for cell in each.cells]).T
        chosen = np.take_along_axis(finals, rows[..., None], -1)[..., 0]
        told["regret"] = bootstrap.interval(regret.regret(chosen, finals)).to_dict()
        told["best_survived"] = bootstrap.interval(regret.best_survived(ended, finals)).to_dict()
        told["partial_scores"] = _looks(each, pool)
    return told


def _by_text(pool: _Pool, n: int) -> Array:
    """(prompts, seeds, n): rewards at the rows' ends, the highest of each text: rows that say the same are one answer,
    whatever the last bits of their rewards."""
    found = pool.finals[..., :n].copy()
    for seed, cell in enumerate(pool.measured.cells):
        for prompt, result in enumerate(cell.results):
            highest: dict[str, float] = {}
            rows = list(zip((row.text for row in result.trajectories[:n]), found[prompt, seed], strict=True))
            for text, reward in rows:
                highest[text] = max(reward, highest.get(text, -math.inf))
            found[prompt, seed] = [highest[text] for text, _ in rows]
    return found


def _same_rows(each: _Measured, pool: _Pool) -> bool:
    """Whether every row began as the pool's row of its number: else nothing is known of how it would have ended."""
    return all(
        begins_as(row, whole)
        for cell, whole_cell in zip(each.cells, pool.measured.cells, strict=True)
        for result, whole_result in zip(cell.results, whole_cell.results, strict=True)
        for row, whole in zip(result.trajectories, whole_result.trajectories, strict=False)
    ) and all(len(result.trajectories) == each.method.n for cell in each.cells for result in cell.results)


def begins_as(row: Trajectory, whole: Trajectory) -> bool:
    """Whether a row is the beginning of another, or all of it."""
    ids = row.token_ids
    if row.finish_reason == "rejected":
        return row.row == whole.row and ids == whole.token_ids[: len(ids)]
    return (row.row, ids, row.text, row.finish_reason) == (whole.row, whole.token_ids, whole.text, whole.finish_reason)


def _efficiency(each: _Measured, pool: _Pool, bootstrap: Bootstrap) -> dict[str, Any]:
    """N_eq * cost of a row of Best-of-N / cost of the method: at equal reward, by each cost. None off the curve."""
    told: dict[str, Any] = {}
    for name in ("decode_tokens", "flops"):
        if name not in each.costs or name not in pool.measured.costs:
            continue
        a_row = pool.measured.costs[name] / pool.method.n
        together = np.concatenate(
            [each.rewards[..., None], each.costs[name][..., None], a_row[..., None], pool.curves], axis=-1
        )
        told[name] = bootstrap.interval(together, _worth).to_dict()  # in which what is infinite is None
    told["seconds"] = None
    both = _timed_for_both(each, pool.measured)
    rows = float(at(each.rewards.mean(), pool.curves.mean(axis=(0, 1))))
    if both is not None and 0 < rows < math.inf:
        of_a_row = float(pool.measured.seconds[both].mean()) / pool.method.n
        told["seconds"] = {"value": rows * of_a_row / float(each.seconds[both].mean()), "prompts": int(both.sum())}
    return told


def _worth(means: Array) -> Array:
    """Reward, cost, cost of a row and curve -> efficiency; minus infinity below the curve, infinity beyond it."""
    rows = at(means[..., 0], means[..., 3:])
    found: Array = np.where(rows > 0, rows * means[..., 2] / means[..., 1], -np.inf)
    return found


def _looks(each: _Measured, pool: _Pool) -> list[dict[str, Any]]:
    """Of each look: how well scores of unfinished rows told their final ones, over prompts (and seeds)."""
    by_look: dict[int, list[partial_scores.Agreement]] = {}
    tokens: dict[int, list[int]] = {}
    for cell, whole in zip(each.cells, pool.measured.cells, strict=True):
        for result, all_rows in zip(cell.results, whole.results, strict=True):
            for look, round_ in enumerate(result.rounds):
                pairs = [
                    (row.look_scores[look], all_rows.trajectories[row.row].reward)
                    for row in result.trajectories
                    if row.look_scores and _unfinished_at(row, look)
                ]
                known = [(at_look, final) for at_look, final in pairs if at_look[1] is not None and final is not None]
                if len(known) < 2:
                    continue
                partial = [at_look[1] for at_look, _ in known]
                final = [final for _, final in known]
                by_look.setdefault(look, []).append(partial_scores.agreement(partial, final, keep=round_.kept))  # type: ignore[arg-type]  # None was left out above
                tokens.setdefault(look, []).append(known[0][0][0])
    return [
        {"look": look + 1, "tokens": float(np.mean(tokens[look])), **partial_scores.over_prompts(found)}
        for look, found in sorted(by_look.items())
    ]


def _unfinished_at(row: Trajectory, look: int) -> bool:
    assert row.look_scores is not None
    last = len(row.look_scores) - 1
    return look < last or (look == last and row.finish_reason == "rejected")


def _cell(cell: Cell) -> dict[str, Any]:
    """Every prompt's numbers, for whoever plots or recomputes."""
    ledgers = [result.ledger for result in cell.results]
    return {
        "seed": cell.seed,
        "path": cell.path,
        "reward": [result.best.reward for result in cell.results],
        "metrics": {name: [float(value) for value in values] for name, values in cell.metrics.items()},
        "decode_tokens": [ledger.decode_tokens for ledger in ledgers],
        "reward_tokens": [None if cell.simulated else ledger.reward_tokens for ledger in ledgers],
        "answer_tokens": [result.best.num_tokens for result in cell.results],
        "looks": [len(result.rounds) for result in cell.results],
        "best_row": [result.best.row for result in cell.results],
        "seconds": [
            None if cell.simulated or ROWS_FROM in result.resolved else result.ledger.total_seconds
            for result in cell.results
        ],
    }


def _add_differences(
    told: list[dict[str, Any]], measured: Sequence[_Measured], baseline: _Measured, bootstrap: Bootstrap
) -> None:
    """To each method, what it is more than the baseline and than Best-of-N with as many rows; p values after Holm."""
    by_rows = {each.method.n: each for each in measured if each.method.strategy == BEST_OF_N}
    p_values: list[tuple[dict[str, Any], float]] = []
    for entry, each in zip(told, measured, strict=True):
        entry["against"] = []
        others = {"baseline": baseline, "same_n": by_rows.get(each.method.n)}
        for kind, other in others.items():
            if other is None or other is each or any(other.method.name == a["method"] for a in entry["against"]):
                continue
            found: dict[str, Any] = {"method": other.method.name, "is": kind, "scores": {}, "cost_ratios": {}}
            pairs = {"reward": (each.rewards, other.rewards)}
            pairs |= {name: (each.metrics[name], other.metrics[name]) for name in each.metrics if name in other.metrics}
            for name, (ours, theirs) in pairs.items():
                gap = ours - theirs
                if np.isnan(gap).any():
                    continue
                p = sign_flip(gap)
                found["scores"][name] = {**bootstrap.interval(gap).to_dict(), "p": p}
                p_values.append((found["scores"][name], p))
            for name in ("decode_tokens", "reward_tokens", "flops", "kv_tokens"):
                if name in each.costs and name in other.costs and other.costs[name].sum() > 0:
                    found["cost_ratios"][name] = bootstrap.ratio(each.costs[name], other.costs[name]).to_dict()
            if (ratio := _ratio_of_seconds(each, other)) is not None:
                found["cost_ratios"]["seconds"] = ratio
            entry["against"].append(found)
    for (score, _), corrected in zip(p_values, holm([p for _, p in p_values]), strict=True):
        score["p_holm"] = corrected
