# torch-free
"""alpaca_eval's data as it was written: the hub's data set without its script, and texts that stay texts."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

from specrej_eval.errors import ConfigError
from specrej_eval.harness.patching import ModuleView

REPO = "tatsu-lab/alpaca_eval"
SPLITS = {
    "alpaca_eval": "eval",
    "alpaca_eval_all_outputs": "eval",
    "alpaca_eval_gpt4_baseline": "eval",
    "alpaca_farm_human_annotations": "validation",
    "alpaca_farm_human_crossannotations": "validation",
}
"""The configurations alpaca_eval asks for; each is one JSON file of the hub repository, and has this one split."""

TEXTS = ("instruction", "input", "output", "output_1", "output_2", "generator", "generator_1", "generator_2")
"""Columns that hold text whatever it looks like."""


def serve_datasets_as_json(constants: ModuleType) -> None:
    """The hub repository holds a loading script, which datasets 4 and later refuse, and JSON files, which they do not.

    Only the name ``datasets`` inside ``alpaca_eval.constants`` is replaced: alpaca_eval compares the functions that
    load the data by identity.
    """
    datasets = getattr(constants, "datasets", None)
    if datasets is None or isinstance(datasets, ModuleView) or int(datasets.__version__.partition(".")[0]) < 4:
        return

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path != REPO or name not in SPLITS:
            return datasets.load_dataset(path, name, **options)
        return datasets.DatasetDict({SPLITS[name]: _load_json(datasets, name, options)})

    constants.__dict__["datasets"] = ModuleView(datasets, load_dataset=load_dataset)


def _load_json(datasets: ModuleType, name: str, options: dict[str, Any]) -> Any:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            repo_id=REPO,
            filename=f"{name}.json",
            repo_type="dataset",
            token=options.get("token"),
            cache_dir=options.get("cache_dir"),
            force_download=options.get("download_mode") == "force_redownload",
        )
    except Exception as error:  # the hub's client has many kinds of failure; all of them mean the same here
        raise ConfigError(
            f"could not download the data set {name!r} of {REPO} from the hub: {type(error).__name__}: {error}",
            hint="check network and HF_HUB_OFFLINE, or name files of your own: --evaluation_dataset FILE.json with "
            "evaluate_from_model, --reference_outputs FILE.json with evaluate and make_leaderboard.",
        ) from error
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    columns = dict.fromkeys(key for row in rows for key in row)  # in order; a row may lack one
    return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})


def keep_text_text(module: ModuleType) -> None:
    """``pd.read_json`` and ``read_csv`` make numbers of texts that look like numbers ("17"): then a resumed run does
    not find its instructions again, and lengths cannot be taken. Only this module's view of pandas is replaced."""
    pandas = getattr(module, "pd", None)
    if pandas is None or isinstance(pandas, ModuleView):
        return

    def read_json(path: Any, *, dtype: Any = None, **options: Any) -> Any:
        if options:
            return pandas.read_json(path, dtype=dtype, **options)
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        if not isinstance(rows, list):
            return pandas.read_json(path, dtype=dtype)
        frame = pandas.DataFrame(rows)
        if isinstance(dtype, dict):
            frame = frame.astype({name: kind for name, kind in dtype.items() if name in frame.columns})
        return frame

    def with_texts(read: Any) -> Any:
        def read_table(path: Any, **options: Any) -> Any:
            frame = read(path, **options)
            texts = [name for name in TEXTS if name in frame.columns]
            if texts:  # once more, as written: an answer "NA" is no missing value either
                written = read(path, dtype=str, keep_default_na=False, **options)
                frame[texts] = written[texts]
            return frame

        return read_table

    view = ModuleView(
        pandas,
        read_json=read_json,
        read_csv=with_texts(pandas.read_csv),
        read_table=with_texts(pandas.read_table),
    )
    module.__dict__["pd"] = view


AFTER = {
    "alpaca_eval.constants": (serve_datasets_as_json,),
    "alpaca_eval.utils": (keep_text_text,),
    "alpaca_eval.annotators.base": (keep_text_text,),
    "alpaca_eval.main": (keep_text_text,),
}
