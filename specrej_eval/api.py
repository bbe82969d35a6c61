"""``specrej_eval.load``: the Python entry, with the argument names of ``--model_args``.

Every way in is this one, a command's and a harness's too: arguments -> ``resolve``, which says all that can be said of
them -> ``RunPlan.load``, which loads the weights.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from specrej_eval import budget
from specrej_eval.config import RunConfig
from specrej_eval.config.engines import SDPA, TRANSFORMERS, engine_of
from specrej_eval.errors import ConfigError
from specrej_eval.ranks import started
from specrej_eval.records import fingerprint, journal, jsonl, lock
from specrej_eval.records.parts import rank_path
from specrej_eval.special_tokens import ENCODE_AS_TEXT

if TYPE_CHECKING:
    from specrej_eval.engines.base import Engine, EnginePlan
    from specrej_eval.generator import Generator
    from specrej_eval.rewards.base import RewardModel, RewardPlan

_logger = logging.getLogger(__name__)


def load(**args: Any) -> Generator:
    """Load a language model and a reward model, and return what answers prompts with them.

    With neither ``pretrained`` nor ``reward_model`` the embedded demo pair is used. All argument names are those of
    ``--model_args`` (see ``specrej_eval.config.RunConfig`` for ours and their defaults).

    >>> generator = load(alpha=0.5, n=16)  # doctest: +SKIP
    >>> generator.generate("Q: 3+14=?\\nA:")[0].text  # doctest: +SKIP

    Raises:
        ConfigError: an unknown argument (nearest name suggested) or a bad value; before any weight is loaded.
        CheckpointError: a model folder is missing, broken, or not of a kind that can be decoded.
        MissingDependencyError: an optional package is needed.
    """
    plan = resolve(*RunConfig.from_args(args))
    if plan.config.pretrained is None:
        _logger.warning("No pretrained= is given: the embedded demo model is used, which knows nothing but small sums.")
    engine, reward = plan.load()
    return plan.generator(engine, reward)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run whose arguments and models are checked, and of which no weight is loaded yet."""

    config: RunConfig
    host: Mapping[str, Any]
    """Arguments of the language model's loader."""
    engine: EnginePlan
    reward: RewardPlan
    objects: tuple[str, ...] = ()
    """Arguments given as objects, not by name (``pretrained``)."""

    @classmethod
    def of(cls, config: RunConfig, host: Mapping[str, Any], *, objects: tuple[str, ...] = ()) -> Self:
        """Check the two models, whoever loads them, and the run's files. A judge or a server is asked here alone.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError, RewardError: as ``load``.
        """
        from specrej_eval.engines.choose import resolve_engine
        from specrej_eval.rewards.choose import resolve_reward

        config = config.replace(**_as_begun(config, config.journal))
        engine = resolve_engine(config, host, check="pretrained" not in objects)
        reward = resolve_reward(config, token=host.get("token"))
        plan = cls(config=config, host=host, engine=engine, reward=reward, objects=objects)
        plan._check_records()
        return plan

    def as_begun(self, path: str) -> Self:
        """With the kernels that ``auto`` came to when a journal was begun, if it comes to others now."""
        changes = _as_begun(self.config, path)
        return self if not changes else type(self).of(self.config.replace(**changes), self.host, objects=self.objects)

    def _check_records(self) -> None:
        """Whether the run's files can be written, and a journal be gone on from; of several ranks the first asks."""
        if self.config.join:
            self.check_join()
        if os.environ.get("RANK", "0") != "0":
            return
        if self.config.trace_path is not None:
            jsonl.check_writable(self.config.trace_path, argument="trace_path")
            lock.check(self.config.trace_path, argument="trace_path")
        if self.config.journal is not None:
            journal.check(self.config.journal, self.of_models, join=self.config.join)

    def check_join(self) -> None:
        """Whether processes can share the prompts of such a run.

        Raises:
            ConfigError: not with these arguments, or not under a launcher.
        """
        if self.config.journal is None:
            raise ConfigError(
                "join=True needs journal=FILE, by which processes share their prompts.",
                hint="give each of them the same journal=FILE.",
            )
        if started() > 1:
            raise ConfigError(
                f"join=True with {started()} processes of a launcher (WORLD_SIZE): these share the prompts already.",
                hint="leave join out; or start processes one by one, each with join=True.",
            )
        if self.config.max_decode_tokens is not None:
            raise ConfigError(
                "max_decode_tokens counts the tokens of all processes, and with join=True none knows those of the "
                "others.",
                hint="max_seconds ends one process; the others go on.",
            )

    def replace(self, **changes: Any) -> Self:
        """The same models with other arguments, none of them about the models.

        Raises:
            ConfigError: as ``RunConfig.replace``.
        """
        return dataclasses.replace(self, config=self.config.replace(**changes))

    def of_rank(self, rank: int, world_size: int, **changes: Any) -> Self:
        """As ``replace``, with files of its own for one of several processes."""
        plan = self.replace(**changes)
        files = {name: getattr(plan.config, name) for name in ("trace_path", "journal")}
        return plan.replace(**{name: file and rank_path(file, rank, world_size) for name, file in files.items()})

    def fingerprint(self, **others: Any) -> dict[str, Any]:
        """Everything that decides a run's answers; ``others`` = what the caller adds. Files are read in full."""
        return self._placed(fingerprint.of_run(self.config, self.host, loaded=self.objects, **others))

    def of_models(self) -> dict[str, Any]:
        """The same of the models alone."""
        return self._placed(fingerprint.of_models(self.config, self.host, loaded=self.objects))

    def _placed(self, found: dict[str, Any]) -> dict[str, Any]:
        """With what engine and reward know: which model a server holds, and of this machine what ``auto`` came to."""
        placed = {**found["environment"], **self.engine.environment()}
        return {**found, **self.engine.deciding(), **self.reward.deciding, "environment": placed}

    def load(self, *, content_rule: str = ENCODE_AS_TEXT) -> tuple[Engine, RewardModel]:
        """Load the engine, then the reward model beside it.

        Args:
            content_rule: what ``special_tokens_in_content=None`` means to the engine.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: what only loading finds.
        """
        engine = self.engine.load(content_rule=content_rule)
        return engine, self.reward.load(str(engine.device))

    def generator(self, engine: Engine, reward: RewardModel, *, models: Mapping[str, Any] | None = None) -> Generator:
        """What answers prompts with models that were loaded by a plan like this one.

        Args:
            models: ``of_models``, for the journal, where it is known already.
        """
        from specrej_eval.generator import Generator

        if models is None and self.config.journal is not None:
            # of the files as they were loaded: an edit from now on must not pass for what answers
            models = self.of_models()
        return Generator(engine=engine, reward=reward, config=self.config, fingerprint=models)


def _as_begun(config: RunConfig, path: str | None) -> dict[str, Any]:
    """Arguments that are to be what ``auto`` came to when a journal was begun, so that its answers are of one kind to
    the last bit. Of one that is given, or that cannot be had here, a warning says that the run began with another."""
    began = {} if path is None else journal.environment(path)
    # which of the two was the reason; without compiled kernels auto comes to sdpa on a CPU
    name, value = ("compile", "off") if began.get("compile") == "off" else ("attention_backend", SDPA)
    given = config.compile == "on" or getattr(config, name) != "auto"
    found = {name: value} if not given and began.get(name) == value else {}
    if found:
        told = "journal=%r was begun with %s=%s, and goes on with it, so that its answers are of one kind."
        _logger.warning(told, path, name, value)
    return found


def resolve(config: RunConfig, host: Mapping[str, Any]) -> RunPlan:
    """Everything that can be said of the arguments before a weight is loaded.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError, RewardError: as ``load``.
    """
    budget.check_arguments(config)
    if engine_of(config.engine) == TRANSFORMERS:
        from specrej_eval.engines.transformers.loading import check_host_arguments

        check_host_arguments(host)
    return RunPlan.of(config, host)
