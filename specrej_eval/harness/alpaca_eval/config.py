# torch-free
"""A model configuration of alpaca_eval: read, held against what was run, and written as its repository keeps them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specrej_eval import __version__
from specrej_eval.checkpoint import is_hub_name
from specrej_eval.config import ARGUMENTS, HOST, DecoderArguments, RunConfig, declared, in_our_names, names
from specrej_eval.config.argument import checkpoint, rewards
from specrej_eval.errors import ConfigError
from specrej_eval.paths import is_folder
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.fingerprint import differences, of_run
from specrej_eval.redaction import redacted, redacted_values
from specrej_eval.wording import inert
from specrej_eval.yaml_files import read_yaml

STRATEGIES = {"specrej_completions": "speculative_rejection", "specrej_best_of_n": "best_of_n"}
"""Our completion functions and the strategy each presets."""

_FOLDER = Path("model_configs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One configuration file."""

    path: Path
    generator: str
    entry: Mapping[str, Any]
    template: str
    """The prompt template's text, wherever it stands."""

    @property
    def function(self) -> str:
        return str(self.entry.get("fn_completions"))

    @property
    def completions_kwargs(self) -> dict[str, Any]:
        return in_our_names(self.entry.get("completions_kwargs") or {})

    def fingerprint(self) -> dict[str, Any]:
        """Everything written here that decides an answer. Nothing is loaded.

        Raises:
            ConfigError: an unknown argument or a bad value.
        """
        config, host, asked = arguments_of(self.function, self.completions_kwargs)
        if config.pretrained is None:
            raise ConfigError(
                f"{str(self.path)!r} names no model, so it is for the embedded demo pair.",
                hint="give the configuration that made the answers.",
            )
        return of_run(config, host, prompt_template=self.template, **asked.deciding())


def arguments_of(
    function: str, completions_kwargs: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Any], DecoderArguments]:
    """What ``completions_kwargs`` of one of our completion functions ask for: ours, the loader's, the decoder's own.

    Raises:
        ConfigError: an unknown argument or a bad value.
    """
    arguments = {"strategy": STRATEGIES[function], **completions_kwargs}
    asked = DecoderArguments.of(arguments)
    config, host = RunConfig.from_args(arguments, also=declared(DecoderArguments))
    return config, host, asked


def find(path: str | None, name: str) -> ModelConfig:
    """The configuration in a file, or the one for ``name`` in ``model_configs/``.

    Raises:
        ConfigError: there is none, it is not one of ours, or it is another generator's.
    """
    if path is not None:
        config = read(Path(path))
    else:
        found = [file for file in sorted(_FOLDER.glob("*.yaml")) if _generator(file) == name]
        if not found:
            raise ConfigError(
                f"no configuration of {name!r} in {str(_FOLDER)!r}.",
                hint="give the one that made the answers: --model_config FILE.yaml",
            )
        config = read(found[0])
    if config.generator != name:
        raise ConfigError(
            f"{str(config.path)!r} is the configuration of {config.generator!r}, not of {name!r}.",
            hint="--name must be its top-level key.",
        )
    return config


def read(path: Path) -> ModelConfig:
    """Raises:
    ConfigError: the file is missing, is no YAML, or is not a configuration for one of our completion functions.
    """
    path = path / "configs.yaml" if path.is_dir() else path
    loaded = read_yaml(path, what=f"--model_config {str(path)!r}")
    if not (isinstance(loaded, dict) and len(loaded) == 1 and isinstance(next(iter(loaded.values())), dict)):
        raise ConfigError(f"{str(path)!r} must have one top-level key, the generator's name, with a mapping below it.")
    ((generator, entry),) = loaded.items()
    if str(entry.get("fn_completions")) not in STRATEGIES:
        raise ConfigError(
            f"{str(path)!r}: fn_completions is {entry.get('fn_completions')!r}, but must be one of ours.",
            hint=f"ours: {', '.join(STRATEGIES)}.",
        )
    if not isinstance(entry.get("completions_kwargs") or {}, dict):
        raise ConfigError(f"{str(path)!r}: completions_kwargs must be a mapping.")
    template = _template(path, entry.get("prompt_template"))
    return ModelConfig(path=path, generator=str(generator), entry=entry, template=template)


def check_same_run(config: ModelConfig, record: RunRecord) -> None:
    """Hold a configuration to what was run.

    Raises:
        ConfigError: they differ; says in what.
    """
    ours = config.fingerprint()
    # digests of local files are the machine's; what one side does not know cannot be compared
    shared = [name for name in ours if name in record.fingerprint and not name.endswith("_files")]
    shared = [name for name in shared if name not in ("hub_commits", "numbers_version")]  # of the time, not of the text
    if isinstance(record.fingerprint.get("seed"), list):  # several runs merged: no configuration has all their seeds
        shared.remove("seed")
    found = differences({name: record.fingerprint[name] for name in shared}, {name: ours[name] for name in shared})
    if found:
        raise ConfigError(
            f"{str(config.path)!r} is not the configuration that was run ({found}).",
            hint="give the configuration that made the answers.",
        )


def render(config: ModelConfig, record: RunRecord | None, answers: Sequence[Answer]) -> str:
    """``configs.yaml`` for AlpacaEval's repository, which knows no completion function of ours."""
    name = config.generator
    method = STRATEGIES[config.function].replace("_", " ")
    version = record.described.get("specrej_eval", __version__) if record is not None else __version__
    remarks = [
        f"Decoded by {method} with the package specrej-eval {version}, whose completion function",
        f"{config.function} is not part of alpaca_eval: hence null, as for Storm-7B-best-of-64. To make the outputs",
        f"again: pip install specrej-eval, put {config.function} in the place of null, and",
        f"run `alpaca_eval evaluate_from_model {name}`.",
    ]
    rows = sorted({answer.n for answer in answers})
    if rows and config.completions_kwargs.get("n") == "max":
        span = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
        remarks.append(f"n: max was {span} rows for each instruction.")
    if record is not None and isinstance(record.fingerprint.get("seed"), list):
        seeds = ", ".join(map(str, record.fingerprint["seed"]))
        remarks.append(f"The best answers of several runs, with the seeds {seeds}.")
    if record is None:
        remarks.append("Submitted without the record of the run.")
    private = {name for name, made in {**ARGUMENTS, **HOST}.items() if made.private}
    kwargs = {key: value for key, value in config.completions_kwargs.items() if key not in private}
    kwargs = redacted_values(kwargs, put="")
    entry = {
        "prompt_template": f"{name}/prompt.txt",
        "fn_completions": None,
        "completions_kwargs": kwargs,
        "pretty_name": config.entry.get("pretty_name", name),
    }
    link = config.entry.get("link") or _link(kwargs.get("pretrained"))
    if link:
        entry["link"] = link
    text = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1000)
    text = text.replace("fn_completions: null", f"fn_completions: null  # {config.function} of specrej-eval", 1)
    return "".join(f"# {inert(line)}\n" for line in remarks) + text


def local_paths(config: ModelConfig) -> list[str]:
    """Arguments that name a folder, which nobody else has."""
    named = (*names(checkpoint, rewards), *names(checkpoint, among=HOST))
    return [
        f"{name}={redacted(value)}"
        for name, value in config.completions_kwargs.items()
        if name in named and isinstance(value, str) and "/" in value and (not is_hub_name(value) or is_folder(value))
    ]


def _template(path: Path, written: Any) -> str:
    """The text of a prompt template that is written out, or that lies in a file."""
    if not isinstance(written, str) or not written:
        raise ConfigError(f"{str(path)!r}: prompt_template is missing.", hint='for example: "{instruction}"')
    if "{" in written:
        return written
    places = [path.parent, path.parent.parent, Path(), *_bundled()]
    for place in places:
        try:
            if (place / written).is_file():
                return (place / written).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # longer than a file name may be, no UTF-8, ...
            raise ConfigError(f"{str(path)!r}: the prompt template {written!r} cannot be read: {error}.") from error
    raise ConfigError(
        f"{str(path)!r}: there is no prompt template {written!r} in {', '.join(repr(str(place)) for place in places)}.",
        hint='give a file, or the text itself, such as "{instruction}".',
    )


def _bundled() -> list[Path]:
    """alpaca_eval's own configurations, found without importing it."""
    spec = importlib.util.find_spec("alpaca_eval")
    return [Path(spec.origin).parent / "models_configs"] if spec is not None and spec.origin else []


def _generator(path: Path) -> str | None:
    try:
        loaded = read_yaml(path, what=str(path))
    except ConfigError:
        return None
    return str(next(iter(loaded))) if isinstance(loaded, dict) and loaded else None


def _link(pretrained: Any) -> str | None:
    return f"https://huggingface.co/{pretrained}" if isinstance(pretrained, str) and is_hub_name(pretrained) else None
