"""Slips in an ``evaluate_from_model`` command that alpaca_eval would notice late, or never, told before it starts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError, nearest

ENTRY = ("prompt_template", "fn_completions", "completions_kwargs", "pretty_name", "link")
"""What a generator's configuration holds. Anything beside these alpaca_eval passes over in silence."""
SUFFIXES = (".json", ".csv", ".tsv")


def check_entry(name: str, entry: Mapping[str, Any], template: str) -> None:
    """Raises:
    ConfigError: an argument stands beside ``completions_kwargs`` instead of below it, or the prompt template does not
        quote the instruction.
    """
    for key in entry:
        if key not in ENTRY:
            best = nearest(str(key), ENTRY)
            raise ConfigError(
                f"the configuration of {name!r} has {key!r} next to fn_completions, where it has no effect.",
                hint=f"did you mean {best!r}?" if best else "move it below completions_kwargs.",
            )
    if "{instruction}" not in template:
        raise ConfigError(
            f"the prompt template of {name!r} does not hold {{instruction}}, so all instructions would get "
            f"the same prompt: {template[:80]!r}.",
            hint='prompt_template: "{instruction}" asks the instruction itself.',
        )


def check_options(arguments: Mapping[str, Any]) -> None:
    """Options that ``evaluate_from_model`` hands on: upstream meets an unknown one when all answers are decoded.

    Raises:
        ConfigError: nothing behind it takes this option.
    """
    from alpaca_eval import annotators, main
    from alpaca_eval.annotators import base, pairwise_evaluator

    takers = (
        main.evaluate,
        annotators.PairwiseAnnotator.__init__,
        pairwise_evaluator.PairwiseAnnotatorLocal.__init__,
        pairwise_evaluator.SinglePairwiseAnnotator.__init__,
        base.BaseAnnotatorJSON.__init__,
        base.BaseAnnotator.__init__,
        base.SingleAnnotator.__init__,
    )
    known = {"base_dir", "position_swap", *arguments} - {"kwargs"}
    for taker in takers:
        while taker is not None:
            known |= set(inspect.signature(taker, follow_wrapped=False).parameters)
            taker = getattr(taker, "__wrapped__", None)
    for option in arguments.get("kwargs", {}):
        if option not in known:
            best = nearest(option, known)
            raise ConfigError(
                f"unknown option --{option}.", hint=f"did you mean --{best}?" if best else "see alpaca_eval's help."
            )


def check_judge(arguments: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the judge asks OpenAI and no key is set: it would fail once all answers are decoded.
    """
    from alpaca_eval import constants, utils

    name = arguments["annotators_config"]
    file = Path(constants.EVALUATORS_CONFIG_DIR) / str(name) / "configs.yaml"
    if not isinstance(name, str) or not file.is_file():
        return  # a judge of the user's own
    judges = utils.load_configs(file).values()
    asks_openai = any(judge.get("fn_completions", "openai_completions") == "openai_completions" for judge in judges)
    keys = ("OPENAI_API_KEY", "OPENAI_API_KEYS")
    if (
        not asks_openai
        or any(os.environ.get(key) for key in keys)
        or Path(constants.OPENAI_CLIENT_CONFIG_PATH).is_file()
    ):
        return
    raise ConfigError(
        f"the judge {name!r} asks OpenAI, and OPENAI_API_KEY is not set.",
        hint="set it (OPENAI_BASE_URL too, for a server of your own), or judge with a reward model: "
        "--annotators_config specrej_reward_judge.",
    )


def instructions_of(dataset: Any, *, needs_outputs: bool) -> list[str]:
    """The instructions of ``evaluation_dataset``, in order.

    Raises:
        ConfigError: the file is missing, of another kind, broken or empty, or has no column that is needed.
    """
    from alpaca_eval import utils

    if isinstance(dataset, (str, Path)) and "*" not in str(dataset):
        _check_file(Path(dataset))
    try:
        frame = utils.load_or_convert_to_dataframe(dataset)
    except ValueError as error:
        if not isinstance(dataset, (str, Path)):
            raise
        raise ConfigError(f"evaluation_dataset={str(dataset)!r} cannot be read: {error}.") from error
    needed = ("instruction", "output") if needs_outputs else ("instruction",)
    missing = [column for column in needed if column not in frame.columns]
    if not len(frame) or missing:
        columns = ", ".join(map(str, frame.columns)) or "none"
        what = f"no column {missing[0]!r} (it has: {columns})" if len(frame) else "no rows"
        raise ConfigError(
            f"evaluation_dataset has {what}.",
            hint="it needs the columns instruction, output (the reference's answer) and generator.",
        )
    return [str(instruction) for instruction in frame["instruction"]]


def _check_file(path: Path) -> None:
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        best = nearest(path.name, siblings)
        raise ConfigError(
            f"evaluation_dataset: there is no file {str(path)!r}.",
            hint=f"did you mean {str(path.parent / best)!r}?" if best else "JSON, CSV and TSV files are read.",
        )
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"evaluation_dataset={str(path)!r}: alpaca_eval reads {', '.join(SUFFIXES)}, not {path.suffix or 'this'}.",
            hint="`specrej-eval run --prompts` reads JSONL too.",
        )
