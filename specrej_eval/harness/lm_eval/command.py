# torch-free
"""The command ``lm_eval`` while a model of ours is meant: what its words say, and how it ends.

Errors raised on purpose, signals, and names that lm-eval does not know end in one message instead of a traceback.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval import stopping
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.harness.lm_eval import LM_EVAL_MODELS
from specrej_eval.harness.lm_eval.sealing import sealed_configs
from specrej_eval.harness.patching import patch
from specrej_eval.paths import folder, is_folder
from specrej_eval.yaml_files import read_yaml

_SHORT = {"-C": "config", "-M": "model"}
_INCLUDE = '--include_path "$(specrej-eval path tasks)"'


def wrap_command(main: ModuleType) -> None:
    """After ``lm_eval.__main__``: our runs end in one message."""

    def make(original: Callable[[], Any]) -> Callable[[], Any]:
        def cli_evaluate() -> Any:
            options = options_of(sys.argv)
            ours = options.get("model") in LM_EVAL_MODELS
            meant = ours or stopping.is_command() or nearest(str(options.get("model")), LM_EVAL_MODELS) is not None
            with stopping.command():
                try:
                    if not ours:
                        return original()
                    with stopping.signals(), sealed_configs():
                        return original()
                except (SpecRejError, stopping.Stopped) as error:
                    if isinstance(error, SpecRejError) and _wants_traceback(sys.argv):
                        raise
                    code = stopping.leave("lm_eval", error)
                except ValueError as error:
                    told = unknown_name(str(error), options) if meant else None
                    if told is None or _wants_traceback(sys.argv):
                        raise
                    code = stopping.leave("lm_eval", told)
            sys.exit(code)

        return cli_evaluate

    patch(main, "cli_evaluate", make)


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """Options of the command by name, from its line or from the file of ``--config``; the line's win."""
    given: dict[str, Any] = {}
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        name, equals, joined = flag.partition("=")
        if name.startswith("--") or name in _SHORT:
            given[_SHORT.get(name, name[2:])] = joined if equals else value
    if "config" in given:
        try:
            told = read_yaml(Path(given["config"]), what="--config")
            given = {**dict.fromkeys(told or ()), **(told if isinstance(told, dict) else {}), **given}
        except (ConfigError, TypeError):
            pass  # lm-eval says what is wrong with it
    return given


def unknown_name(message: str, options: dict[str, Any]) -> ConfigError | None:
    """What lm-eval says of a task or model it does not know, as an error of ours; None if it says something else."""
    if found := re.match(r"Attempted to load model '(.*?)', but .*Supported model names: (.*)", message, re.DOTALL):
        name, known = found[1], found[2].split(", ")
        best = nearest(name, LM_EVAL_MODELS) or nearest(name, known)
        meant = f"did you mean --model {best}? " if best else ""
        others = ", ".join(name for name in known if name not in LM_EVAL_MODELS)
        hint = f"{meant}Ours are {', '.join(LM_EVAL_MODELS)}; lm-eval's own: {others}."
        return ConfigError(f"lm-eval has no model {name!r}.", hint=hint)
    if found := re.match(r"Tasks not found: (.*)", message, re.DOTALL):
        missing = found[1].split(", ")
        included = options.get("include_path")
        known = task_names(included)
        hints = [_hint_for(name, known) for name in missing]
        if included and not any(map(is_folder, str(included).split(os.pathsep))):
            hints.insert(0, f"--include_path {included} is no folder.")
        hints.append("`lm-eval ls tasks` lists lm-eval's own, --include_path DIR adds those of a folder.")
        what = "no task" if len(missing) == 1 else "no tasks"
        named = ", ".join(map(repr, missing))
        return ConfigError(f"lm-eval has {what} {named}.", hint=" ".join(dict.fromkeys(filter(None, hints))))
    return None


def _hint_for(name: str, known: Sequence[str]) -> str:
    ours = our_tasks()
    best = nearest(name, [*known, *ours])
    if best in ours and best not in known:
        meant = "" if best == name else f"Did you mean {best!r}? "
        return f"{meant}{best} is a task of specrej-eval: add {_INCLUDE}, or copy it with `specrej-eval init`."
    return f"Did you mean {best!r}?" if best else ""


def our_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    texts = (path.read_text(encoding="utf-8") for path in folder("tasks").rglob("*.yaml"))
    return [name for text in texts for name in re.findall(r"^task:\s*(\w+)", text, re.MULTILINE)]


def task_names(include_path: str | None) -> list[str]:
    """All names that ``--tasks`` takes."""
    from lm_eval.tasks import TaskManager

    return list(TaskManager(include_path=include_path).all_tasks)


def _wants_traceback(words: Sequence[str]) -> bool:
    level = os.environ.get("LMEVAL_LOG_LEVEL", "")
    return level.upper() == "DEBUG" or os.environ.get("SPECREJ_DEBUG", "0") not in ("", "0") or "DEBUG" in words
