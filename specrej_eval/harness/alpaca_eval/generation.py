"""What ``alpaca_eval evaluate_from_model`` needs around it when one of our decoders does the work.

alpaca_eval goes on from any ``model_outputs.json`` it finds under the generator's name, whoever wrote it and with
whatever arguments. So before it starts, the arguments are checked, compared with those of the answers found there, and
what it would take over is held against the data set.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specrej_eval import temporary
from specrej_eval.errors import ConfigError
from specrej_eval.harness.alpaca_eval import slips as alpaca_eval_slips
from specrej_eval.paths import below, check_path
from specrej_eval.records.answers import RunRecord
from specrej_eval.records.fingerprint import warn_of_uncovered
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.wording import counted

logger = logging.getLogger(__name__)

# argument of evaluate_from_model -> the file alpaca_eval writes, the prefix of ours beside it
SIDES = {
    "model_configs": ("model_outputs.json", "specrej"),
    "reference_model_configs": ("reference_outputs.json", "specrej_reference"),
}

_ANEW = "add `--is_load_outputs False --chunksize None`: the answers there are set aside"


def wrap_evaluate_from_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """``evaluate_from_model`` for our decoders too; other decoders' configurations pass through untouched."""
    signature = inspect.signature(original)

    def evaluate_from_model(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        prepare(call.arguments)
        return original(*call.args, **call.kwargs)

    return evaluate_from_model


def prepare(arguments: dict[str, Any]) -> None:
    """Check and complete the arguments of ``evaluate_from_model`` in place.

    Raises:
        ConfigError, CheckpointError: a wrong argument, or answers of another configuration in the output folder;
            before a model is loaded.
    """
    from alpaca_eval import constants, utils

    from specrej_eval.harness.alpaca_eval.config import STRATEGIES

    base_dir = Path(arguments.get("kwargs", {}).get("base_dir", constants.MODELS_CONFIG_DIR))
    configs = {}
    for side in SIDES:
        if arguments.get(side) is not None:
            configs[side] = arguments[side] = utils.load_configs(arguments[side], relative_to=base_dir)
    ours = {side for side, config in configs.items() if _entry(config).get("fn_completions") in STRATEGIES}
    if not ours:
        return
    temporary.remove_abandoned()
    alpaca_eval_slips.check_options(arguments)
    alpaca_eval_slips.check_judge(arguments)

    folder = arguments["output_path"]
    if folder == "auto":
        name = str(next(iter(configs["model_configs"])))
        folder = below("results", name, what="the configuration's top-level key")
    elif folder is not None:
        check_path(folder, argument="output_path")
    instructions = alpaca_eval_slips.instructions_of(
        arguments["evaluation_dataset"], needs_outputs=arguments.get("reference_model_configs") is None
    )
    if arguments["max_instances"] is not None:
        # alpaca_eval would take the *next* max_instances on a second run; our own records make it cheap to start over
        arguments["is_load_outputs"], arguments["chunksize"] = False, None
        instructions = instructions[: arguments["max_instances"]]
        going_on = True
    else:
        going_on = arguments["is_load_outputs"] or arguments["chunksize"] is not None
    for side in ours:
        arguments[side] = _begin(
            side, configs[side], None if folder is None else Path(folder), instructions, going_on, arguments, base_dir
        )


def _begin(
    side: str,
    config: dict[str, Any],
    folder: Path | None,
    instructions: list[str],
    going_on: bool,
    arguments: Mapping[str, Any],
    base_dir: Path,
) -> dict[str, Any]:
    """The configuration with its completion function bound to where its answers are recorded."""
    from alpaca_eval import utils

    from specrej_eval.harness.alpaca_eval import decoder as decoder

    name, entry = next(iter(config)), _entry(config)
    function = entry["fn_completions"]
    template = utils.read_or_return(entry["prompt_template"], relative_to=base_dir)
    alpaca_eval_slips.check_entry(name, entry, template)
    generation = decoder.Generation.of(function, entry.get("completions_kwargs") or {})
    limits = [name for name in ("max_seconds", "max_decode_tokens") if getattr(generation.plan.config, name)]
    if limits and folder is None:
        raise ConfigError(
            f"{limits[0]} needs a folder: with --output_path null, what is answered by then would be lost.",
            hint="leave --output_path out, or name a folder; the same command then goes on from there.",
        )
    if generation.plan.config.join:
        raise ConfigError(
            f"{name}: one process writes the folder of evaluate_from_model; join=True is for lm_eval, Python and "
            "`specrej-eval run`.",
            hint="leave it out.",
        )
    generation.instructions = tuple(instructions)
    for place, instruction in enumerate(instructions):
        generation.places.setdefault(instruction, place)
    fingerprint = generation.fingerprint(
        prompt_template=template,
        is_strip_output=arguments["is_strip_output"],
    )
    decided = {**generation.plan.config.to_dict(), "limit": arguments["max_instances"]}
    generation.record = RunRecord(name=name, fingerprint=fingerprint, arguments=decided)
    warn_of_uncovered(fingerprint)
    if generation.record.embedded_demo_pair:
        logger.warning(
            "DEMO: %s uses the embedded demo models, which know nothing but small sums. Name `pretrained` and "
            "`reward_model` in its completions_kwargs for real answers.",
            name,
        )
    if folder is not None:
        outputs, prefix = SIDES[side]
        generation.store = OutputsFolder(folder, prefix=prefix)
        _check_owner(folder / outputs, generation.store, going_on)
        anew = "delete the folder" if arguments["max_instances"] is not None else _ANEW
        generation.store.begin(generation.record, going_on=going_on, to_start_over=anew)
        if kept := generation.store.set_apart(lambda item: item.instruction in generation.places):
            told = counted(kept, "answer to another prompt is", "answers to other prompts are")
            logger.warning("%s kept in %s.", told, generation.store.kept_file.name)
        generation.mark_complete()  # a run that is over stays so, whatever becomes of the judge
        if going_on and arguments["is_load_outputs"]:
            _keep_only_a_prefix(folder / outputs, instructions)
    entry["fn_completions"] = functools.partial(getattr(decoder, function), generation=generation)
    entry["completions_kwargs"] = {}  # checked, and bound with the function
    return {name: entry}


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    return dict(next(iter(config.values())))


def _check_owner(outputs: Path, store: OutputsFolder, going_on: bool) -> None:
    """Raises:
    ConfigError: alpaca_eval would take over outputs of which nobody can say how they were made.
    """
    if going_on and outputs.is_file() and not store.run_file.is_file():
        raise ConfigError(
            f"{str(outputs)!r} was written by another decoder: there is no {store.run_file.name} next to it. Its "
            "outputs would be passed off as ours.",
            hint="give another --output_path or another generator name, or delete the file.",
        )


def _keep_only_a_prefix(outputs: Path, instructions: list[str]) -> None:
    """Set aside outputs that are not the beginning of this data set, in order: cut short by a kill, or of another set.

    Nothing is lost: the answers are in our own records too, and alpaca_eval gets them from there.
    """
    if not outputs.is_file():
        return
    try:
        rows = json.loads(outputs.read_text(encoding="utf-8"))
        found = [row["instruction"] for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found is not None and found == instructions[: len(found)]:
        return
    aside = outputs.with_name(f"{outputs.stem}.previous.json")
    os.replace(outputs, aside)
    reason = "was cut short" if found is None else "does not begin this data set"
    logger.warning("%s %s: moved to %s, and built again from the recorded answers.", outputs.name, reason, aside.name)
