# torch-free
"""``position_swap=True``: every pair is judged in both orders, which takes a judge's liking for a position out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from specrej_eval.config import as_bool
from specrej_eval.errors import ConfigError
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.patching import patch, takes
from specrej_eval.wording import counted

_ADDED_UP = ("price_per_example", "time_per_example")


def add_position_swap(pairwise: ModuleType) -> None:
    """One more argument of ``PairwiseAnnotator``, so one of ``evaluate``, ``evaluate_from_model`` and
    ``make_leaderboard``, which hand over what they do not know. An alpaca_eval that has it keeps its own."""
    annotator = pairwise.PairwiseAnnotatorLocal
    if takes(annotator.__init__, "position_swap") or not takes(annotator.__init__, "input_keys", "output_keys"):
        return

    def make_init(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, position_swap: Any = False, **kwargs: Any) -> None:
            self.position_swap = as_bool("position_swap", position_swap)
            if self.position_swap and kwargs.get("p_label_flip"):
                raise ConfigError(
                    "position_swap and p_label_flip cannot be combined: the swap would average the noise away."
                )
            original(self, *args, **kwargs)

        return __init__

    def make_call(original: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, to_annotate: Any, **kwargs: Any) -> list[dict[str, Any]]:
            # looked up again, so that a replacement in a base class is seen
            annotate: Callable[..., list[dict[str, Any]]] = super(annotator, self).__call__
            if not self.position_swap:
                return annotate(to_annotate, **kwargs)
            first, second = self.output_keys
            frame = pairwise.utils.convert_to_dataframe(to_annotate).reset_index(drop=True)
            in_order = annotate(frame, **kwargs)
            swapped = annotate(frame.rename(columns={first: second, second: first}), **kwargs)
            return _combined(in_order, swapped, self.annotation_key, (first, second))

        return __call__

    patch(annotator, "__init__", make_init)
    patch(annotator, "__call__", make_call)


def _combined(
    in_order: list[dict[str, Any]], swapped: list[dict[str, Any]], key: str, sides: tuple[str, str]
) -> list[dict[str, Any]]:
    first, second = sides
    undecided = 0
    found = []
    for one, other in zip(in_order, swapped, strict=True):
        if (one[first], one[second]) != (other[second], other[first]):
            raise RuntimeError("the annotator changed the order of its rows: position_swap cannot pair them.")
        merged = dict(one)
        turned = None if _missing(other[key]) else 3 - other[key]
        merged[f"{key}_in_order"], merged[f"{key}_swapped"] = one[key], turned
        merged[key] = None if turned is None or _missing(one[key]) else (one[key] + turned) / 2
        if turned is not None and not _missing(one[key]):
            undecided += (one[key] - 1.5) * (turned - 1.5) < 0
        for name in (f"{key}_{part}" for part in _ADDED_UP):
            if name in merged:
                merged[name] = _sum(one, other, name)
        found.append(merged)
    if undecided:
        alpaca_eval_runs.note(
            f"the judge preferred the same position, not the same answer, in {counted(undecided, 'pair')}.",
            of=in_order[0].get("generator_2"),
        )
    return found


def _missing(value: Any) -> bool:
    return value is None or value != value


def _sum(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Any:
    values = [row[name] for row in (one, other) if not _missing(row.get(name))]
    return sum(values) if values else None


AFTER = {"alpaca_eval.annotators.pairwise_evaluator": (add_position_swap,)}
