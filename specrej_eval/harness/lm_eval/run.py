# torch-free
"""What ``lm_eval`` is asked for and never hands to a model: its seed, and which of the gen_kwargs the user gave.

lm-eval seeds global generators (torch's with 1234 unless told otherwise) and merges ``--gen_kwargs`` into the tasks'
own after the model is made. So ``simple_evaluate`` is wrapped: what it was called with can be read while it runs, from
the command line and from Python alike.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from specrej_eval import budget, stopping
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval import LM_EVAL_MODELS
from specrej_eval.harness.lm_eval.command import options_of
from specrej_eval.harness.lm_eval.sealing import sealed_call
from specrej_eval.harness.patching import is_patched, patch, takes

logger = logging.getLogger("lm_eval.models.specrej")

FROM_MODEL_ARGS = "model_args"
FROM_LM_EVAL = "lm_eval --seed"
FROM_GEN_KWARGS = "--gen_kwargs"
FROM_TASK = "the task"
FROM_DEFAULT = "the default"

_READ = ("model", "model_args", "tasks", "gen_kwargs", "task_manager", "torch_random_seed", "device")


@dataclass(frozen=True, slots=True)
class HostRun:
    """One call of ``simple_evaluate``."""

    torch_seed: int | None
    """lm-eval's seed for torch if it was given: differs from lm-eval's default, and is not None."""
    gen_kwargs: Mapping[str, Any]
    """Those of the user alone, without the tasks' own."""
    tasks: Mapping[str, Mapping[str, Any]]
    """generation_kwargs of the tasks whose configuration is known before they are loaded."""
    use_cache: bool = False
    """Answers go to a cache of lm-eval's own."""
    device_given: bool = False
    """The user named a device: what the command passes may be its default."""

    def seed(self, arguments: Mapping[str, Any]) -> tuple[Any, str]:
        """The seed, and where it comes from: gen_kwargs, model_args, lm-eval's own, 0; the first that is given."""
        if self.gen_kwargs.get("seed") is not None:
            return arguments.get("seed", 0), FROM_GEN_KWARGS
        if arguments.get("seed") is not None:
            return arguments["seed"], FROM_MODEL_ARGS
        if self.torch_seed is not None:
            return self.torch_seed, FROM_LM_EVAL
        return 0, FROM_DEFAULT


_current: contextvars.ContextVar[HostRun | None] = contextvars.ContextVar("specrej_lm_eval_run", default=None)


def current() -> HostRun | None:
    """The call of ``simple_evaluate`` that we are in; None outside of one."""
    return _current.get()


def is_blind() -> bool:
    """lm-eval's evaluator runs without our wrap: its seed and gen_kwargs cannot be told apart."""
    evaluator = sys.modules.get("lm_eval.evaluator")
    return evaluator is not None and not is_patched(evaluator, "simple_evaluate")


def wrap_simple_evaluate(evaluator: ModuleType) -> None:
    """After ``lm_eval.evaluator``. A ``simple_evaluate`` of another signature is left alone."""
    original = evaluator.simple_evaluate
    if not takes(original, *_READ):
        return
    signature = inspect.signature(original)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
            try:
                call = signature.bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)  # its own message
            call.apply_defaults()
            model = call.arguments["model"]
            ours = model in LM_EVAL_MODELS if isinstance(model, str) else hasattr(model, "run_config")
            token = _current.set(_host_run(call.arguments, signature) if ours else None)
            try:
                if not ours:
                    return original(*args, **kwargs)
                positional, named = sealed_call(args, kwargs, signature)
                with stopping.signals():
                    return original(*positional, **named)
            finally:
                _current.reset(token)

        return simple_evaluate

    patch(evaluator, "simple_evaluate", make)


def _host_run(arguments: Mapping[str, Any], signature: inspect.Signature) -> HostRun:
    seed = arguments["torch_random_seed"]
    given = arguments["gen_kwargs"]
    if isinstance(given, str):
        from lm_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(given)
    default = signature.parameters["torch_random_seed"].default
    return HostRun(
        torch_seed=None if seed is None or seed == default else seed,
        gen_kwargs=dict(given or {}),
        tasks=dict(_known_tasks(arguments["tasks"] or (), arguments["task_manager"])),
        use_cache=arguments.get("use_cache") is not None,
        device_given=not stopping.is_command() or "device" in options_of(sys.argv),
    )


def _known_tasks(tasks: Iterable[Any], task_manager: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    index = getattr(task_manager, "task_index", None)
    for item in [tasks] if isinstance(tasks, (str, dict)) else tasks:
        config = item
        if isinstance(item, str):
            config = getattr(index.get(item) if isinstance(index, Mapping) else None, "cfg", None)
        elif not isinstance(item, Mapping):
            config = getattr(getattr(item, "config", None), "__dict__", None)  # a Task
        if isinstance(config, Mapping) and config.get("output_type") == "generate_until":
            own = config.get("generation_kwargs")
            yield str(config.get("task", item)), own if isinstance(own, Mapping) else {}


def checked_against(run: HostRun, translate: Callable[..., Any], config: Any) -> None:
    """Try the user's gen_kwargs on every task known by now, before a model is loaded.

    Raises:
        ConfigError: names the task if it is the task's own arguments that make the difference.
    """
    if not run.gen_kwargs:
        return
    translate(run.gen_kwargs, config, explicit=run.gen_kwargs)
    for task, own in run.tasks.items():
        try:
            translated = translate({**own, **run.gen_kwargs}, config, explicit=run.gen_kwargs)
            budget.check_arguments(translated.config)
        except ConfigError as error:
            raise ConfigError(f"task {task!r}: {error.args[0]}", hint=error.hint) from None
