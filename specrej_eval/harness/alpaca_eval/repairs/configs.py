# torch-free
"""Model and judge configurations that do not lie inside the installed alpaca_eval: found, checked, made absolute."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval import temporary
from specrej_eval.errors import ConfigError, nearest
from specrej_eval.harness.patching import patch, takes
from specrej_eval.paths import expanded
from specrej_eval.yaml_files import read_yaml

OUR_ANNOTATORS = Path(__file__).resolve().parents[1] / "annotators_configs"
"""Judges that come with this package."""

_FILE = "configs.yaml"


def find_configs_outside_the_package(utils: ModuleType) -> None:
    """``utils.load_configs``: upstream looks into its own folder only, and reads templates from there.

    A bundled configuration still wins over one of the same name in the working directory.
    """
    if not takes(utils.load_configs, "configs", "relative_to"):
        return
    constants = utils.constants
    bundled = (Path(constants.MODELS_CONFIG_DIR), Path(constants.EVALUATORS_CONFIG_DIR))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_configs(configs: Any, relative_to: Any = None) -> Any:
            is_model = relative_to is not None
            if isinstance(configs, dict):
                return _with_absolute_templates(configs, (Path.cwd(), *bundled), is_model=is_model)
            folders = (Path(relative_to), Path.cwd(), *bundled[:1]) if is_model else (Path.cwd(),)
            file = _find_file(configs, folders)
            if file is None:
                raise _not_found(configs, (*folders, *bundled[1:], OUR_ANNOTATORS) if not is_model else folders)
            searched = (file.parent, file.parent.parent, Path.cwd(), *bundled)
            if any(file.is_relative_to(folder) for folder in bundled):
                configs = original(file)
                if is_model and Path(relative_to) not in bundled:  # else upstream finds the templates itself
                    configs = _with_absolute_templates(configs, (*bundled, *searched), is_model=True, file=file)
                return configs
            return _with_absolute_templates(_read(file), searched, is_model=is_model, file=file)

        return load_configs

    patch(utils, "load_configs", make)


def find_annotators_outside_the_package(base: ModuleType) -> None:
    """``annotators_config`` is looked for in a given ``base_dir``, then among the bundled judges, ours, and the
    working directory. (``evaluate_from_model`` forwards its ``base_dir``, meant for models, to the annotator.)"""
    annotator = base.BaseAnnotator
    if not takes(annotator.__init__, "base_dir"):
        return
    bundled = annotator.DEFAULT_BASE_DIR
    if not isinstance(bundled, list):
        annotator.DEFAULT_BASE_DIR = [bundled, OUR_ANNOTATORS, Path()]

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, base_dir: Any = None, **kwargs: Any) -> None:
            default = self.DEFAULT_BASE_DIR
            folders = [base_dir, *(default if isinstance(default, (list, tuple)) else [default])]
            flat = [entry for item in folders for entry in (item if isinstance(item, (list, tuple)) else [item])]
            # absolute: the judge's name and its templates are taken from the path
            original(self, *args, base_dir=[Path(folder).absolute() for folder in flat if folder], **kwargs)

        return __init__

    patch(annotator, "__init__", make)


def _find_file(name: Any, folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        path = (folder / expanded(name)).absolute()
        if path.is_file():
            return path
        if (path / _FILE).is_file():
            return path / _FILE
    return None


def _not_found(name: Any, folders: Sequence[Path]) -> ConfigError:
    path = Path(name)
    if path.is_absolute():  # an annotator's path has been joined with the last folder by now
        path = Path(path.parent.name if path.name == _FILE else path.name)
    near: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        parent = (folder / path).parent
        for entry in parent.iterdir() if parent.is_dir() else ():
            if entry.suffix in (".yaml", ".yml") or (entry / _FILE).is_file():
                near.setdefault(entry.name, str(path.parent / entry.name))
                near.setdefault(entry.stem, str(path.parent / entry.name))
    best = nearest(path.name, near)
    places = ", ".join(dict.fromkeys(map(str, folders)))
    return ConfigError(
        f"there is no configuration {str(path)!r}: neither a YAML file, nor a folder with {_FILE}.",
        hint=f"{f'did you mean {near[best]!r}? ' if best else ''}Looked in {places}.",
    )


def _read(file: Path) -> dict[str, Any]:
    configs = read_yaml(file, what=str(file))
    if not isinstance(configs, dict) or not all(isinstance(value, dict) for value in configs.values()) or not configs:
        raise ConfigError(
            f"{file} must hold a name with a mapping below it, got {configs!r}.",
            hint="NAME:\n    prompt_template: ...\n    fn_completions: ...\n    completions_kwargs: {...}",
        )
    return configs


def _with_absolute_templates(
    configs: dict[str, Any], folders: Sequence[Path], *, is_model: bool, file: Path | None = None
) -> dict[str, Any]:
    where = str(file) if file else "the configuration"
    if is_model and len(configs) != 1:
        raise ConfigError(f"{where} must hold exactly one model, got {len(configs)}: {', '.join(map(str, configs))}.")
    found = {}
    for name, config in configs.items():
        if not isinstance(config, dict):
            raise ConfigError(f"{where}: {name} must be a mapping, got {config!r}.")
        if "prompt_template" not in config or (is_model and "fn_completions" not in config):
            missing = "fn_completions" if "prompt_template" in config else "prompt_template"
            close = nearest(missing, [str(key) for key in config])
            raise ConfigError(
                f"{where}: {name} needs {missing}.", hint=f"did you misspell it as {close!r}?" if close else None
            )
        if not isinstance(config.get("completions_kwargs") or {}, dict):
            raise ConfigError(f"{where}: completions_kwargs of {name} must be a mapping.")
        template = _absolute_template(config["prompt_template"], folders, where)
        # an empty `completions_kwargs:` is None in YAML, and leaving it out is as clear
        found[name] = {
            **config,
            "prompt_template": template,
            "completions_kwargs": config.get("completions_kwargs") or {},
        }
    return found


def _absolute_template(template: Any, folders: Sequence[Path], where: str) -> str:
    text = str(template)
    if any("\ud800" <= mark <= "\udfff" for mark in text):
        raise ConfigError(f"{where}: prompt_template has half of a surrogate pair in it, which is no text.")
    if "\n" not in text:
        for folder in folders:
            path = folder / expanded(text)
            try:
                if path.is_file():
                    return str(path.absolute())
            except (OSError, ValueError):  # longer than a file name may be, ...
                break
    if "\n" in text or ("{" in text and "}" in text):
        return str(_materialised(text))
    near = {str(entry.name): entry for folder in folders[:3] if folder.is_dir() for entry in folder.glob("*.txt")}
    best = nearest(Path(text).name, near)
    raise ConfigError(
        f"{where}: there is no prompt_template {text!r}.",
        hint=f"{f'did you mean {str(near[best])!r}? ' if best else ''}Give a file, or the text itself with at least "
        "one {column} in it.",
    )


@functools.cache
def _folder() -> Path:
    return temporary.folder("templates")


def _materialised(text: str) -> Path:
    """Upstream reads templates from files only."""
    path = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    path.write_text(text, encoding="utf-8")
    return path


AFTER = {
    "alpaca_eval.utils": (find_configs_outside_the_package,),
    "alpaca_eval.annotators.base": (find_annotators_outside_the_package,),
}
