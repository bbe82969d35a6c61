# torch-free
"""The length-controlled win rate, by a model that fits the data, and by none where there is too little of it.

Upstream's ``length_controlled_v1`` takes the difficulty of each instruction by its row number among the 805 prompts of
AlpacaEval. For any other prompts these are difficulties of something else, and beyond row 805 there are none.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from specrej_eval.errors import ConfigError, suggest
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.patching import patch, takes
from specrej_eval.wording import counted

CANONICAL_ROWS = 805
STANDARD = "length_controlled_v1"
MINIMAL = "length_controlled_minimal"
NONE = "none"
"""In the column ``glm_name``: no model was fitted, the number is the plain win rate."""

_FOLDS = 5
_logger = logging.getLogger(__name__)
_reference: dict[Any, tuple[str, ...] | None] = {}


class _Choice(NamedTuple):
    glm: str
    note: str = ""
    named: bool = False  # whether the leaderboard says which model it was


def control_length_where_valid(metrics: ModuleType) -> None:
    """``metrics.get_length_controlled_winrate`` and, for the mean lengths, ``get_winrate``."""
    glm: Any = getattr(metrics, "glm_winrate", None)
    if glm is None or not takes(glm.get_length_controlled_winrate, "annotations", "glm_name", "save_weights_dir"):
        return
    patch(glm, "hf_hub_download", _named_in_errors)
    patch(glm, "_get_featurized_data", lambda original: _featurized_without_hub(original, glm))
    patch(glm, "get_length_controlled_winrate", lambda original: _length_controlled(original, glm), own_signature=True)
    metrics.__dict__["get_length_controlled_winrate"] = glm.get_length_controlled_winrate
    patch(metrics, "get_winrate", lambda original: _with_lengths(original, glm))


def _named_in_errors(original: Callable[..., str]) -> Callable[..., str]:
    """The hub's client does not say which file it did not find."""

    def hf_hub_download(repo_id: str, filename: str, **options: Any) -> str:
        try:
            return original(repo_id=repo_id, filename=filename, **options)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"could not download {filename} of {repo_id} from the hub: {reason}") from error

    return hf_hub_download


def _with_lengths(original: Callable[..., Any], glm: ModuleType) -> Callable[..., Any]:
    def get_winrate(annotations: Any) -> Any:
        _remember_lengths(_complete(glm.utils.convert_to_dataframe(annotations)))
        return original(annotations)

    return get_winrate


def _length_controlled(original: Callable[..., Any], glm: ModuleType) -> Callable[..., Any]:
    def get_length_controlled_winrate(
        annotations: Any,
        glm_name: str | None = None,
        save_weights_dir: Any = "auto",
        baseline: str | None = None,
        is_add_glm_preference_inplace: bool = True,
        is_warn_extreme_changes: bool = True,
        glm_info: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As upstream's, but ``glm_name`` is by default ``length_controlled_v1`` only for AlpacaEval's own 805 prompts
        in their order, else ``length_controlled_minimal``; and weights are saved in the output folder.

        Raises:
            ConfigError: an unknown ``glm_name``, or one that has no difficulties for so many prompts.
        """
        frame = _complete(glm.utils.convert_to_dataframe(annotations))
        _remember_lengths(frame)
        model = str(frame["generator_2"].iloc[0]) if len(frame) else None
        is_baseline = bool((frame["generator_1"] == frame["generator_2"]).all())
        choice = _Choice(glm_name or STANDARD) if glm_info else _choose(frame, glm_name, glm, is_fitted=not is_baseline)
        if choice.note:
            alpaca_eval_runs.note(choice.note, of=model)
        found = None
        while found is None and choice.glm != NONE:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, on upstream's arguments
                    found = original(
                        frame,
                        glm_name=choice.glm,
                        save_weights_dir=_weights_folder(frame, save_weights_dir),
                        baseline=baseline,
                        is_warn_extreme_changes=is_warn_extreme_changes,
                        glm_info=dict(glm_info) if glm_info else None,
                    )
            except Exception as error:  # no difficulties from the hub, a fit that fails: the judgments are paid for
                if baseline is not None:  # asked for the win rate against another model: no other number will do
                    raise
                _logger.debug("fit of %s", choice.glm, exc_info=True)
                choice = _instead(choice, asked=glm_name or ("glm_info" if glm_info else None), error=error)
                alpaca_eval_runs.note(choice.note, of=model)
        if found is None:
            found = glm.get_winrate(frame)
            found["length_controlled_winrate"] = found["win_rate"]
            found["lc_standard_error"] = found["standard_error"]
            frame["glm_preference"] = frame["preference"] - 1
        if choice.glm == MINIMAL and not is_baseline:
            found["lc_standard_error"] = _standard_error(frame, found["length_controlled_winrate"] / 100, glm)
        if is_add_glm_preference_inplace and type(annotations).__name__ == "DataFrame":
            annotations["glm_preference"] = frame["glm_preference"].to_numpy()
        return {**found, "glm_name": choice.glm} if choice.named else dict(found)

    return get_length_controlled_winrate


def _choose(frame: Any, asked: str | None, glm: ModuleType, *, is_fitted: bool) -> _Choice:
    """The model for these rows, and what must be said about it. The reference's own row (50.0) needs no fit.

    Raises:
        ConfigError: the user's choice is unknown or impossible.
    """
    if asked is not None and asked not in glm.GLM_INFO:
        raise ConfigError(f"unknown glm_name {asked!r}.", hint=suggest(asked, glm.GLM_INFO))
    preferences = frame["preference"].dropna()
    if is_fitted and len(preferences) < _FOLDS:
        few = f"{counted(len(preferences), 'judged pair is', 'judged pairs are')} too few to fit a model of length"
        return _Choice(NONE, _no_fit(few), named=True)
    if is_fitted and preferences.nunique() == 1:
        return _Choice(NONE, _no_fit("all preferences are the same"), named=True)
    with_difficulty = asked is None or "instruction_difficulty" in glm.GLM_INFO[asked]["formula"]
    if not with_difficulty:
        return _Choice(str(asked), named=True)
    unlike = _why_not_canonical(frame, glm)
    if not unlike:
        return _Choice(asked or STANDARD, named=asked not in (None, STANDARD))
    if asked is None:
        return _Choice(
            MINIMAL,
            f"length_controlled_winrate is by {MINIMAL} (lengths, no instruction difficulties): {unlike}. It cannot be "
            "compared with the public leaderboard; with few pairs, or answers all longer (or all shorter) than the "
            "reference's, it is a guess.",
            named=True,
        )
    if len(frame) > CANONICAL_ROWS:
        raise ConfigError(
            f"glm_name={asked} has instruction difficulties for {CANONICAL_ROWS} prompts, got {len(frame)} rows.",
            hint=f"leave glm_name out, or take {MINIMAL}.",
        )
    return _Choice(asked, f"glm_name={asked} was asked for, but its difficulties do not fit: {unlike}.", named=True)


def _instead(failed: _Choice, *, asked: str | None, error: Exception) -> _Choice:
    reason = f"{failed.glm} cannot be fitted ({type(error).__name__}: {error})"
    if asked is None and failed.glm != MINIMAL:
        return _Choice(MINIMAL, f"length_controlled_winrate is by {MINIMAL}: {reason}.", named=True)
    return _Choice(NONE, _no_fit(reason), named=True)


def _why_not_canonical(frame: Any, glm: ModuleType) -> str:
    """Empty if these are AlpacaEval's prompts in their order (one row each, none missing)."""
    if len(frame) != CANONICAL_ROWS:
        return f"AlpacaEval has {CANONICAL_ROWS} prompts, these are {len(frame)}"
    reference = _canonical_instructions(glm.constants)
    if reference is None:
        return "AlpacaEval's own prompts could not be loaded, so these could not be compared with them"
    if tuple(frame["instruction"]) == reference:
        return ""
    same = sorted(frame["instruction"]) == sorted(reference)
    return "the prompts are AlpacaEval's, but in another order" if same else "the prompts are not AlpacaEval's"


def _canonical_instructions(constants: ModuleType) -> tuple[str, ...] | None:
    load = constants.ALPACAEVAL_REFERENCE_OUTPUTS
    if load not in _reference:
        try:
            _reference[load] = tuple(load()["instruction"])
        except Exception as error:  # no network, no cache, ...
            _logger.info("AlpacaEval's prompts cannot be loaded: %s", error)
            _reference[load] = None
    return _reference[load]


def _standard_error(frame: Any, winrate: float, glm: ModuleType) -> float:
    """Of the fitted win rate, in percent. Upstream takes the spread of the predictions, which without difficulties are
    all the same: 0.00, however few the pairs. This is the sandwich estimator of the logistic model."""
    import numpy as np

    info = glm.GLM_INFO[MINIMAL]
    design, at_equal_length, _ = glm._get_featurized_data(frame, info["formula"], info["regularize_to_baseline_lambda"])
    design = design[design["preference"].notna()]
    wins = design.pop("preference").to_numpy()
    features = design.to_numpy()
    target = at_equal_length.to_numpy()[0]
    coefficients = np.zeros(features.shape[1])
    for _ in range(25):  # Newton's method, without upstream's penalty
        fitted = 1 / (1 + np.exp(-np.clip(features @ coefficients, -30, 30)))
        bread = np.linalg.pinv((features * (fitted * (1 - fitted))[:, None]).T @ features)
        coefficients = coefficients + bread @ features.T @ (wins - fitted)
    meat = (features * ((wins - fitted) ** 2)[:, None]).T @ features
    correction = len(features) / max(1, len(features) - features.shape[1])
    variance = correction * float(target @ bread @ meat @ bread @ target)
    return winrate * (1 - winrate) * float(np.sqrt(variance)) * 100


def _no_fit(reason: str) -> str:
    return f"length_controlled_winrate is the plain win rate: {reason}."


def _weights_folder(frame: Any, save_weights_dir: Any) -> Any:
    """Upstream's ``auto`` is inside the package."""
    if save_weights_dir != "auto":
        return save_weights_dir
    run = alpaca_eval_runs.current()
    # upstream makes a file name of the reference's name, as it is
    if (
        run is None
        or run.output_path is None
        or Path(str(frame["generator_1"].iloc[0])).name != frame["generator_1"].iloc[0]
    ):
        return None
    return run.output_path / "glm_weights"


def _complete(frame: Any) -> Any:
    """A copy with all columns upstream relies on: references need no generator, and texts may have become numbers."""
    frame = frame.copy()
    for side, name in (("1", "reference"), ("2", "Current model")):
        if f"generator_{side}" not in frame.columns:
            known = frame["generator"] if side == "2" and "generator" in frame.columns else name
            frame[f"generator_{side}"] = known
        if f"output_{side}" in frame.columns:
            frame[f"output_{side}"] = frame[f"output_{side}"].astype(str)
    if "instruction" in frame.columns:
        frame["instruction"] = frame["instruction"].astype(str)
    frame["preference"] = frame["preference"].astype(float)
    return frame


def _remember_lengths(frame: Any) -> None:
    run = alpaca_eval_runs.current()
    if run is None or frame.empty or "output_1" not in frame.columns:
        return
    model, reference = frame["generator_2"].iloc[0], frame["generator_1"].iloc[0]
    mean_1, mean_2 = (frame[f"output_{side}"].str.len().mean() for side in ("1", "2"))
    run.lengths[str(model)] = f"Mean length in characters: {model} {mean_2:.1f}, reference {reference} {mean_1:.1f}"


def _featurized_without_hub(original: Callable[..., Any], glm: ModuleType) -> Callable[..., Any]:
    """Upstream downloads ``df_gamed.csv`` whatever the formula needs, and takes difficulties even where it has none."""

    def _get_featurized_data(df_annotations: Any, formula: str, regularize_to_baseline_lambda: float | None) -> Any:
        if "instruction_difficulty" in formula or regularize_to_baseline_lambda:
            return original(df_annotations, formula, regularize_to_baseline_lambda)
        frame = df_annotations.reset_index(drop=True)
        longer_by = frame["output_1"].str.len() - frame["output_2"].str.len()
        spread = longer_by.std()
        train = frame[["preference"]].astype(float).replace({0.0: 1.5}) - 1
        # without any difference in length between the pairs there is nothing to control
        train["std_delta_len"] = longer_by / spread if spread else 0.0
        train["not_gamed_baseline"] = True
        test = train[["not_gamed_baseline"]].copy()
        test["std_delta_len"] = 0.0
        return (*glm.make_dmatrix_for_model(train, test, formula=formula), None)

    return _get_featurized_data


AFTER = {"alpaca_eval.metrics": (control_length_where_valid,)}
