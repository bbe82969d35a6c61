# torch-free
"""What is known of the run in progress: where its files go, which rewards decoded its outputs, what there is to say.

alpaca_eval passes none of this on to its annotators and metrics, so it is kept beside the call, in a context variable.
"""

from __future__ import annotations

import glob
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval.harness.patching import patch, takes
from specrej_eval.paths import below

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Evaluation:
    """One call of ``evaluate`` (several of them in ``make_leaderboard`` share all but ``output_path``)."""

    output_path: Path | None = None
    """Where annotations and weights are kept; None = the user asked for no files."""
    decoding_rewards: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Generator -> ``{"reward_model": ..., "reward_files": ...}`` of the reward that chose among its answers (see
    ``fingerprint.of_models``)."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What must not be missed -> the generators it is said of; none = of all. Printed below the leaderboard; logged at
    the end of a run that prints none."""
    lengths: dict[str, str] = field(default_factory=dict)
    """Generator -> a sentence on the mean lengths of both sides."""
    recompute_only: bool = False

    def told(self) -> Iterator[str]:
        """The notes; where several generators were judged, with the names of those meant."""
        for text, generators in self.notes.items():
            yield f"{', '.join(generators)}: {text}" if generators and len(self.lengths) > 1 else text


_current: ContextVar[Evaluation | None] = ContextVar("specrej_eval_alpaca_run", default=None)


def current() -> Evaluation | None:
    """The run in progress; None where an annotator is used by itself."""
    return _current.get()


@contextmanager
def run_in(output_path: Path | None, rewards: Mapping[str, Mapping[str, Any]], **more: Any) -> Iterator[Evaluation]:
    """A run, or one inside another: then it says what it has to say together with the outer one."""
    outer = _current.get()
    run = Evaluation(output_path, dict(rewards), **more)
    if outer is not None:
        run.decoding_rewards = {**outer.decoding_rewards, **run.decoding_rewards}
        run.notes, run.lengths = outer.notes, outer.lengths
    token = _current.set(run)
    try:
        yield run
    finally:
        _current.reset(token)
        for text in run.told() if outer is None else ():
            _logger.warning(text)


def note(text: str, *, of: str | None = None) -> None:
    """Say something that must not be missed: below the leaderboard; in the log where there is none.

    Args:
        of: the generator it is said of; None = of all.
    """
    run = _current.get()
    if run is None:
        _logger.warning(text)
        return
    generators = run.notes.setdefault(text, [])
    if of is not None and of not in generators:
        generators.append(of)


def epilogue() -> list[str]:
    """What is printed below a leaderboard, once."""
    run = _current.get()
    if run is None:
        return []
    lines = [*run.lengths.values(), *(f"NOTE: {text}" for text in run.told())]
    run.notes.clear()
    return lines


def decoding_rewards(places: Iterable[Any]) -> dict[str, Mapping[str, Any]]:
    """What our decoders wrote down beside outputs: ``specrej_run.json`` (``specrej_reference_run.json``) in their
    folder, and ``<stem>.specrej.json`` of exported outputs."""
    found: dict[str, Mapping[str, Any]] = {}
    for place in places:
        if not isinstance(place, (str, Path)):
            continue
        for name in glob.glob(str(place)) if "*" in str(place) else [str(place)]:
            path = Path(name)
            folder = path if path.is_dir() else path.parent
            for file in sorted(folder.glob("specrej*_run.json")):
                run = _read_object(file)
                if isinstance(run.get("fingerprint"), dict) and "generator" in run:
                    found[str(run["generator"])] = run["fingerprint"]
            generators = {} if path.is_dir() else _read_object(path.with_name(f"{path.stem}.specrej.json"))
            for generator, reward in (generators.get("generators") or {}).items():
                found[str(generator)] = reward
    return found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        _logger.warning("%s cannot be read, so the reward behind these outputs is not known: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def announce_runs(main: ModuleType) -> None:
    """The commands ``evaluate``, ``make_leaderboard`` and ``analyze_evaluators`` run inside an ``Evaluation``."""
    if takes(main.evaluate, "model_outputs", "output_path", "annotators_config", "name"):
        patch(main, "evaluate", lambda original: _evaluate(original, main))
    if takes(main.make_leaderboard, "leaderboard_path", "all_model_outputs", "annotators_config"):
        patch(main, "make_leaderboard", lambda original: _make_leaderboard(original, main))
    if takes(main.analyze_evaluators, "precomputed_leaderboard", "output_path", "annotators_config"):
        patch(main, "analyze_evaluators", lambda original: _analyze_evaluators(original, main))


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults filled in, and those of ``**kwargs`` among them."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    extra = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    values = dict(bound.arguments)
    values.update(values.pop(extra, {}))
    return values


def _evaluate(original: Callable[..., Any], main: ModuleType) -> Callable[..., Any]:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        values = _arguments(original, args, kwargs)
        if values["fn_metric"] == "get_winrate" and values["sort_by"] == "length_controlled_winrate":
            values["sort_by"] = "win_rate"  # the default is a column that this metric does not give: a KeyError
        outputs, output_path = values["model_outputs"], values["output_path"]
        rewards = decoding_rewards(outputs if isinstance(outputs, (list, tuple)) else [outputs])
        if output_path not in (None, "auto"):
            rewards |= decoding_rewards([Path(output_path)])
        if outputs is not None and not isinstance(outputs, (str, Path)):
            # loaded here, since the folder takes its name from the generator; upstream would call a function again
            outputs = values["model_outputs"] = main.utils.load_or_convert_to_dataframe(outputs)
        pair = str(values["reference_outputs"]), str(values["annotators_config"])
        if values["precomputed_leaderboard"] == "auto" and pair not in main.constants.PRECOMPUTED_LEADERBOARDS:
            values["precomputed_leaderboard"] = None  # as upstream, but without a warning that nobody can act on
        folder = None
        if outputs is not None:
            frame = outputs
            if values["name"] is None and output_path == "auto" and isinstance(outputs, (str, Path)):
                frame = main.utils.load_or_convert_to_dataframe(outputs)
            name = main.utils.get_generator_name(values["name"], frame)
            config = values["annotators_config"]
            if name is not None and output_path == "auto":
                below("results", str(name), what="the generator's name")  # upstream makes a folder of it
            folder = main.utils.get_output_path(output_path, values["model_outputs"], name, annotators_config=config)
        with run_in(folder, rewards, recompute_only=bool(values["is_recompute_metrics_only"])):
            return original(**values)

    return evaluate


def _make_leaderboard(original: Callable[..., Any], main: ModuleType) -> Callable[..., Any]:
    def make_leaderboard(*args: Any, **kwargs: Any) -> Any:
        values = _arguments(original, args, kwargs)
        if values["leaderboard_path"] is None:
            values["leaderboard_path"] = _own_leaderboard(values, main)
            # upstream skips a generator it finds in the file: here only because of an earlier run
            values.setdefault("is_overwrite_leaderboard", True)
        outputs = values["all_model_outputs"]
        rewards = decoding_rewards(outputs if isinstance(outputs, (list, tuple)) else [outputs])
        with run_in(None, rewards):
            return original(**values)

    return make_leaderboard


def _own_leaderboard(values: Mapping[str, Any], main: ModuleType) -> Path:
    """Upstream's default place is inside the package. Here: the output folder, begun with the bundled entries."""
    folder = values.get("output_path")
    judge = Path(str(values["annotators_config"])).name
    path = Path("results" if folder in (None, "auto") else folder) / f"{judge}_leaderboard.csv"
    bundled = Path(main.constants.ALPACAEVAL_LEADERBOARD_PATHS) / path.name
    return _begun_with(bundled, path)


def _begun_with(bundled: Path, path: Path) -> Path:
    if bundled.is_file() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bundled.read_bytes())
    return path


def _analyze_evaluators(original: Callable[..., Any], main: ModuleType) -> Callable[..., Any]:
    def analyze_evaluators(*args: Any, **kwargs: Any) -> Any:
        values = _arguments(original, args, kwargs)
        folder = Path("results_evaluators") if values["output_path"] in (None, "auto") else Path(values["output_path"])
        board = values["precomputed_leaderboard"]
        bundled = isinstance(board, (str, Path)) and Path(board).is_relative_to(main.CUR_DIR)
        if values["is_save_leaderboard"] and bundled:
            values["precomputed_leaderboard"] = _begun_with(Path(board), folder / Path(board).name)
        with run_in(None if values["output_path"] is None else folder, {}):
            return original(**values)

    return analyze_evaluators


AFTER = {"alpaca_eval.main": (announce_runs,)}
