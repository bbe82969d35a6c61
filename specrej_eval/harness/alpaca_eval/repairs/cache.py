# torch-free
"""The annotation cache: in the user's output folder, one file for each way of judging.

Upstream keeps it beside the judge's configuration, inside the installed package, and looks an annotation up by its
texts and the judge's name alone. So a judge with another model behind it was given the old one's judgments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval import temporary
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.patching import patch, takes

_NOT_JUDGING = ("base_dir", "completion_column", "annotation_column", "prfx_to_completion_cols")
_logger = logging.getLogger(__name__)


def cache_in_output_folder(base: ModuleType) -> None:
    """``caching_path="auto"`` of ``BaseAnnotatorJSON``. A path that the user names is left to the user."""
    annotator, with_file = base.BaseAnnotator, base.BaseAnnotatorJSON
    if not (takes(with_file._initialize_cache, "caching_path") and takes(annotator.__call__, "to_annotate")):
        return
    patch(with_file, "_initialize_cache", _initialize_cache)
    patch(annotator, "__call__", _call)
    patch(with_file, "save", _save)
    patch(with_file, "load_", _load)


def _initialize_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_cache(self: Any, caching_path: Any) -> Any:
        if caching_path != "auto":
            return original(self, caching_path)
        self._specrej_cache = ""  # which file it is, is known once the decoding arguments are
        return None

    return initialize_cache


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, to_annotate: Any, chunksize: int | None = 128, **decoding_kwargs: Any) -> Any:
        if hasattr(self, "_specrej_cache"):
            digest = digest_of(self, decoding_kwargs)
            if digest != self._specrej_cache:
                self._specrej_cache = digest
                self.df_annotations = None
                self.caching_path = _file(self, digest)
                self.load_()
        return original(self, to_annotate, chunksize=chunksize, **decoding_kwargs)

    return __call__


def _file(annotator: Any, digest: str) -> Path | None:
    run = alpaca_eval_runs.current()
    if run is None or run.output_path is None:
        _logger.info("Annotations are kept in memory only; caching_path=FILE keeps them.")
        return None
    return run.output_path / f"annotations_cache_seed{annotator.seed}_{digest}.json"


def _save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save(self: Any, path: Any = None) -> None:
        path = path or self.caching_path
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = temporary.partial(path)
        original(self, unfinished)
        os.replace(unfinished, path)  # a run that is killed leaves a whole file

    return save


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_(self: Any, path: Any = None) -> None:
        try:
            original(self, path)
        except ValueError as error:
            _logger.warning("Annotations start from scratch: %s cannot be read: %s", path or self.caching_path, error)

    return load_


def digest_of(annotator: Any, decoding_kwargs: Mapping[str, Any]) -> str:
    """Of everything that decides an annotation but the texts themselves."""
    import alpaca_eval

    identity = {
        "alpaca_eval": getattr(alpaca_eval, "__version__", None),
        "annotators": {name: _identity(single, decoding_kwargs) for name, single in annotator.annotators.items()},
        "decoding_kwargs": _plain(decoding_kwargs),
        "position_swap": getattr(annotator, "position_swap", False),
        "seed": annotator.seed,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _identity(single: Any, decoding_kwargs: Mapping[str, Any]) -> Any:
    settings = {name: value for name, value in vars(single).items() if name not in _NOT_JUDGING}
    # a judge of ours knows which files are behind its arguments
    stamp = getattr(single.fn_completions, "stamp", None)
    source = _endpoint() if stamp is None else stamp({**single.completions_kwargs, **decoding_kwargs})
    return {"settings": _plain(settings), "source": source}


def _endpoint() -> dict[str, Any]:
    """Where an API's judgments come from: the same model name may mean another model at another address."""
    return {name: os.environ.get(name) for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH")}


def _plain(value: Any) -> Any:
    """JSON with no memory address in it, so that it is the same in the next process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, re.Pattern):  # regex_parser compiles its patterns in place: the same before and after
        return value.pattern
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    members = getattr(value, "__dict__", {})
    return [type(value).__qualname__, _plain({name: _sorted(item) for name, item in members.items()})]


def _sorted(value: Any) -> Any:
    """A processor makes its list of columns from a set, in another order in each process."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


AFTER = {"alpaca_eval.annotators.base": (cache_in_output_folder,)}
