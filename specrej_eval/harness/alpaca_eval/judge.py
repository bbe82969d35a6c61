# torch-free
"""``specrej_reward_judge``: a reward model as alpaca_eval's pairwise judge.

It scores the bare fields of each pair (``RenderedPrompt.row``), never the prompt's text, so the template of a judge's
configuration has no influence on it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig, Takes, as_float, names, suggest_argument
from specrej_eval.core import RowView
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.alpaca_eval.prompts import RenderedPrompt
from specrej_eval.harness.patching import patch, takes
from specrej_eval.paths import expanded, is_folder
from specrej_eval.records import fingerprint
from specrej_eval.rewards.base import RewardModel, RewardPlan

NAME = "specrej_reward_judge"
ARGUMENTS = names(Takes.ALONE)
"""Of ``RunConfig``, with its rules; ``preference_temperature`` is the judge's own."""

_logger = logging.getLogger(__name__)


def specrej_reward_judge(
    prompts: Sequence[str], preference_temperature: Any = 1.0, **arguments: Any
) -> dict[str, list[Any]]:
    """Preferences as text, for ``eval_parser``: ``1 + sigmoid((reward_2 - reward_1) / preference_temperature)``.

    Args:
        prompts: what ``utils.make_prompts`` gives, one pair in each.
        preference_temperature: reward difference at which the better answer wins 73 times in 100.
        arguments: see ``ARGUMENTS``.

    Raises:
        ConfigError, CheckpointError: an argument or a model that cannot be used; before any weights are loaded.
        RewardError: a reward that is not finite; names the instruction.
    """
    config, temperature = _checked({"preference_temperature": preference_temperature, **arguments})
    pairs = [_fields(prompt) for prompt in prompts]
    scorer = _scorer(config)
    completions, seconds = [], []
    for instruction, output_1, output_2 in pairs:
        start = time.perf_counter()
        reward_1, reward_2 = scorer.score(instruction, (output_1, output_2))
        completions.append(repr(1 + _sigmoid((reward_2 - reward_1) / temperature)))
        seconds.append(time.perf_counter() - start)
    return {
        "completions": completions,
        "price_per_example": [0.0] * len(pairs),
        "time_per_example": seconds,
        "completions_all": list(completions),
    }


def identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Which reward model judges: ``reward_model`` and ``reward_files``, as our decoders write them down for theirs.

    Raises:
        ConfigError: as the judge itself.
    """
    from specrej_eval.config import reward_names
    from specrej_eval.rewards.kinds.function import import_callable

    config, _ = _checked(arguments)
    name = config.reward_model
    if name is not None and reward_names.is_callable(name):
        import_callable(name)  # finds it in the working directory, too; its file is looked at next
    models = fingerprint.of_models(config, {})
    embedded = name is None or _same_folder(name, checkpoint.DEMO_REWARD)
    told = fingerprint.EMBEDDED if embedded else models["reward_model"]
    return {"reward_model": told, "reward_files": models["reward_files"]}


def _stamp(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the annotation cache must know of the files; for a hub repository, its commit."""
    from specrej_eval.config import reward_names
    from specrej_eval.rewards.choose import resolve_reward

    found = identity(arguments)
    name = found["reward_model"]
    config, _ = _checked(arguments)
    asked = reward_names.parts(config.reward_model) if config.reward_model is not None else []
    if any(reward_names.is_address(part["reward_model"]) for part in asked):
        found.update(resolve_reward(config).deciding)  # the model that a server holds now
    elsewhere = (reward_names.is_address, reward_names.is_judge, reward_names.is_ensemble)
    if found["reward_files"] is None and "/" in name and not any(claims(name) for claims in elsewhere):
        from huggingface_hub import try_to_load_from_cache

        checkpoint.read_config("reward_model", name)  # fetched now, or as it was last time
        file = try_to_load_from_cache(name, "config.json")
        found["commit"] = Path(file).parent.name if isinstance(file, str) else None
    return found


specrej_reward_judge.stamp = _stamp  # type: ignore[attr-defined]


def note_judges(pairwise: ModuleType) -> None:
    """``annotate_head2head``: say it when the judge is the reward model that chose the answers, or only a demo."""
    annotator = pairwise.PairwiseAnnotatorLocal
    if not takes(annotator.annotate_head2head, "outputs_1", "outputs_2"):
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def annotate_head2head(self: Any, outputs_1: Any, outputs_2: Any, *args: Any, **kwargs: Any) -> Any:
            generators = [*_generators(pairwise, outputs_1), *_generators(pairwise, outputs_2)]
            given = inspect.signature(original).bind(self, outputs_1, outputs_2, *args, **kwargs)
            decoding_kwargs = dict(given.arguments.get("decoding_kwargs", {}))
            decoding_kwargs.pop("chunksize", None)  # the annotator's own
            for single in self.annotators.values():
                if single.fn_completions is specrej_reward_judge:
                    _note(identity({**single.completions_kwargs, **decoding_kwargs}), generators)
            return original(self, outputs_1, outputs_2, *args, **kwargs)

        return annotate_head2head

    patch(annotator, "annotate_head2head", make)


def _generators(pairwise: ModuleType, outputs: Any) -> list[str]:
    frame = pairwise.utils.convert_to_dataframe(outputs)
    return [str(name) for name in frame["generator"].unique()] if "generator" in frame.columns else []


def _note(judge: Mapping[str, Any], generators: Sequence[str]) -> None:
    name = judge["reward_model"]
    if name == fingerprint.EMBEDDED:
        alpaca_eval_runs.note(
            "DEMO judge: the embedded reward model knows nothing but small sums. Its win rates say nothing "
            "about any other answers."
        )
    run = alpaca_eval_runs.current()
    for generator, reward in (run.decoding_rewards if run else {}).items():
        if generator in generators and _same_reward(judge, reward):
            alpaca_eval_runs.note(
                f"CIRCULAR: the judge ({name}) is the reward model that chose the answers of {generator!r}. The win "
                "rate shows how well they were chosen for it, not how good they are; judge with another model."
            )


def _same_reward(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = one.get("reward_model"), other.get("reward_model")
    same_files = fingerprint.same_reward_files(one, other)
    if same_files is not None:
        return same_files
    return names[0] == names[1] or (None not in names and _same_folder(str(names[0]), Path(str(names[1]))))


def _same_folder(name: str, folder: Path) -> bool:
    return is_folder(name) and is_folder(folder) and expanded(name).samefile(folder)


def _checked(arguments: Mapping[str, Any]) -> tuple[RunConfig, float]:
    own = {name: value for name, value in arguments.items() if name != "preference_temperature"}
    for name in own:
        if name not in ARGUMENTS:
            hint = suggest_argument(name, (*ARGUMENTS, "preference_temperature"))
            raise ConfigError(f"{NAME}: unknown argument {name!r}.", hint=hint)
    temperature = as_float("preference_temperature", arguments.get("preference_temperature", 1.0))
    if temperature <= 0:
        raise ConfigError(f"preference_temperature must be above 0, got {temperature!r}.")
    config = RunConfig().replace(**own)
    if config.reward_model == "likelihood":
        raise ConfigError(
            "reward_model=likelihood cannot judge: it is the log-prob of the language model that wrote an answer.",
            hint="name a reward model's folder, a hub name or pkg.module:function.",
        )
    return config, temperature


def _fields(prompt: str) -> tuple[str, str, str]:
    rows = prompt.rows if isinstance(prompt, RenderedPrompt) else ()
    if len(rows) != 1:
        raise ConfigError(
            f"{NAME} judges one pair per prompt, got {'a plain text' if not rows else f'{len(rows)} pairs'}.",
            hint="use it as an annotator's fn_completions, with batch_size: 1.",
        )
    missing = [name for name in ("instruction", "output_1", "output_2") if name not in rows[0]]
    if missing:
        raise ConfigError(f"{NAME} needs the fields instruction, output_1 and output_2; {missing[0]} is missing.")
    return str(rows[0]["instruction"]), str(rows[0]["output_1"]), str(rows[0]["output_2"])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class _Scorer:
    """A loaded reward model, and the scores it has given: a reference's answers are judged against many models."""

    def __init__(self, config: RunConfig) -> None:
        from specrej_eval.rewards.choose import resolve_reward

        plan = resolve_reward(config)
        self._reward = self._loaded(plan, checkpoint.device_of(config.device))
        self._scores: dict[tuple[str, str], float] = {}

    @staticmethod
    def _loaded(plan: RewardPlan, device: str) -> RewardModel:
        """On a small GPU the models that wrote the answers, loaded still, may leave no room for the judge."""
        import torch

        from specrej_eval.harness.alpaca_eval.decoder import release_models

        try:
            return plan.load(device)
        except torch.OutOfMemoryError:
            if not release_models():
                raise
        # outside the except block: the traceback would keep what was loaded alive
        _logger.warning("The judge did not fit in memory next to the models that answered, so these were unloaded.")
        return plan.load(device)

    def score(self, instruction: str, outputs: Sequence[str]) -> list[float]:
        new = [text for text in dict.fromkeys(outputs) if (instruction, text) not in self._scores]
        if new:
            rows = [RowView(row=row, text=text, token_ids=(), finish_reason="eos") for row, text in enumerate(new)]
            scores = self._reward.score(({"role": "user", "content": instruction},), rows)
            for place, (text, score) in enumerate(zip(new, scores, strict=True)):
                if not math.isfinite(score):
                    raise RewardError(
                        f"{self._reward.name} gave a reward that is not finite ({score}"
                        f"{self._reward.why_nan(place)}) to an answer of {_shortened(text)!r} to the instruction "
                        f"{_shortened(instruction)!r}."
                    )
                self._scores[instruction, text] = float(score)
        return [self._scores[instruction, text] for text in outputs]


@functools.lru_cache(maxsize=1)  # alpaca_eval calls once for every 128 pairs; two models might not fit into memory
def _scorer(config: RunConfig) -> _Scorer:
    return _Scorer(config)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


AFTER = {"alpaca_eval.annotators.pairwise_evaluator": (note_judges,)}
