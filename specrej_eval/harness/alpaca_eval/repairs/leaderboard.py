# torch-free
"""Leaderboards: printed whole, and never written into the installed alpaca_eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.patching import patch, takes
from specrej_eval.wording import inert

COLUMNS = (
    "length_controlled_winrate",
    "lc_standard_error",
    "win_rate",
    "standard_error",
    "n_total",
    "avg_length",
    "glm_name",
)
"""Always printed, where they are there."""


def print_whole_leaderboard(utils: ModuleType) -> None:
    """``utils.print_leaderboard``: ``make_leaderboard`` calls it with a name it does not have (``leaderboard_mode``),
    so every run of it ended in a TypeError; a leaderboard without the column ``mode`` was another."""
    if takes(utils.print_leaderboard, "leaderboard_mode") and not takes(
        utils.print_leaderboard, "leaderboard_mode_or_models"
    ):
        return
    modes = list(utils.constants.ORDERED_LEADERBOARD_MODES)

    def print_leaderboard(
        df_leaderboard: Any,
        leaderboard_mode_or_models: str | Sequence[str] | None = None,
        cols_to_print: Sequence[str] = (),
        current_name: str | None = None,
        leaderboard_mode: str | Sequence[str] | None = None,
    ) -> None:
        chosen = leaderboard_mode_or_models if leaderboard_mode is None else leaderboard_mode
        columns = _columns(df_leaderboard, cols_to_print, with_mode=chosen is None)
        rows = _rows(df_leaderboard, chosen, modes) | (df_leaderboard.index == current_name)
        shown = df_leaderboard.loc[rows, columns].rename(index=lambda name: inert(str(name)))
        print(shown.to_string(float_format="%.2f"))
        for line in alpaca_eval_runs.epilogue():
            print(inert(line))

    patch(utils, "print_leaderboard", lambda original: print_leaderboard, own_signature=True)


def _columns(leaderboard: Any, asked: Sequence[str], *, with_mode: bool) -> list[str]:
    known = [name for name in COLUMNS if name in leaderboard.columns]
    others = [name for name in asked if name in leaderboard.columns and name not in known]
    if with_mode and "mode" in leaderboard.columns and leaderboard["mode"].notna().any():
        others.append("mode")
    return list(dict.fromkeys([*known, *others]))


def _rows(leaderboard: Any, chosen: str | Sequence[str] | None, modes: list[str]) -> Any:
    """Rows of a mode and of the stricter ones before it; rows that have no mode are always among them."""
    everything = leaderboard.index == leaderboard.index
    if chosen is None:
        return everything
    if not isinstance(chosen, str):
        return leaderboard.index.isin(list(chosen))
    if "mode" not in leaderboard.columns:
        return everything
    allowed = modes[: modes.index(chosen) + 1]
    return (leaderboard["mode"].isin(allowed) | leaderboard["mode"].isna()).to_numpy()


def leave_bundled_leaderboards_alone(utils: ModuleType) -> None:
    """``evaluate`` appends its row to the leaderboard that came with the package, and skips the generator next time.
    Upstream writes only where it is given a path, so it is given none."""
    if not takes(utils.get_precomputed_leaderboard, "precomputed_leaderboard"):
        return
    package = Path(str(utils.__file__)).parent

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_precomputed_leaderboard(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            leaderboard, source = original(*args, **kwargs)
            run = alpaca_eval_runs.current()
            if run is not None and run.recompute_only and run.output_path is not None:
                own = run.output_path / "leaderboard.csv"  # upstream looks for the row where it no longer is
                if own.is_file():
                    leaderboard = {**utils.load_or_convert_to_dataframe(own).to_dict(orient="index"), **leaderboard}
            inside = isinstance(source, (str, Path)) and Path(source).absolute().is_relative_to(package)
            return leaderboard, None if inside else source

        return get_precomputed_leaderboard

    patch(utils, "get_precomputed_leaderboard", make)


AFTER = {"alpaca_eval.utils": (print_whole_leaderboard, leave_bundled_leaderboards_alone)}
