"""lm-eval's tasks as prompts with metrics, for commands of ours that decode by themselves: no evaluator runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrej_eval.config import RunConfig
from specrej_eval.core import Question, Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval.command import our_tasks, unknown_name
from specrej_eval.harness.lm_eval.requests import ChatPrompt, ScoredText, conversation_of
from specrej_eval.in_flight import Request
from specrej_eval.paths import folder

GENERATES = "generate_until"


@dataclass(slots=True)
class TaskPrompts:
    """The documents of some tasks. Made by ``load``.

    Args:
        tasks: name -> lm-eval's task.
        limit: documents of each.
    """

    tasks: Mapping[str, Any]
    limit: int | None = None
    system_instruction: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    """Of metrics, by the names that ``metrics`` gives them; known once they were asked for."""
    _made_by: Any = field(default=None, repr=False)
    """What rendered the instances that the tasks hold."""

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        **options: Any,
    ) -> TaskPrompts:
        """Read tasks, ours among them; no model is needed.

        Raises:
            ConfigError: a task is not known, does not generate, or wants several draws of a prompt.
        """
        from lm_eval.tasks import TaskManager

        ours = our_tasks()
        paths = [*(include_path.split(os.pathsep) if include_path else []), str(folder("tasks"))]
        logger = logging.getLogger("lm_eval")
        before = logger.level
        logger.setLevel(logging.WARNING)  # what it tells of each task it reads is of no use here
        try:
            manager = TaskManager(include_path=paths, include_defaults=not set(names) <= set(ours))
            missing = [name for name in names if name not in manager.all_tasks]
            if missing:
                error = unknown_name(f"Tasks not found: {', '.join(missing)}", {"include_path": include_path})
                assert error is not None, "it names tasks that were not found"
                raise error
            loaded = manager.load(list(names))["tasks"]
        finally:
            logger.setLevel(before)
        for name, task in loaded.items():
            _check(name, task)
            given = task.get_config("num_fewshot")
            if num_fewshot is not None and given != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif given is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # as lm-eval's own default
        return cls(tasks=loaded, limit=limit, **options)

    @property
    def name(self) -> str:
        return ",".join(self.tasks)

    def instances(self, lm: Any = None) -> list[Any]:
        """lm-eval's requests, a new one for each document.

        Args:
            lm: renders chat messages; None = they stay messages.
        """
        render = _MESSAGES if lm is None else lm
        if self._made_by is render:
            return [instance for task in self.tasks.values() for instance in task.instances]
        found = []
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        for task in self.tasks.values():
            task.build_all_requests(
                limit=self.limit,
                rank=0,
                world_size=1,
                system_instruction=self.system_instruction,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                chat_template=render.apply_chat_template if self.apply_chat_template else None,
                tokenizer_name=render.tokenizer_name if self.apply_chat_template else "",
            )
            found += task.instances
        self._made_by = render
        return found

    def questions(self) -> list[Question]:
        """What is asked, in the order of ``instances``; no model is needed."""
        told = []
        for place, instance in enumerate(self.instances()):
            messages, _ = conversation_of(instance.args[0])
            doc = {"task": instance.task_name, "doc_id": instance.doc_id}
            told.append(Question(instruction=messages[-1]["content"] if messages else "", index=place, fields=doc))
        return told

    def requests(self, lm: Any, config: RunConfig) -> list[Request]:
        """What is to be decoded, as `lm_eval --model specrej` would with the same arguments: the same rows.

        Raises:
            ConfigError, PromptError: as ``SpecRejLM.generate_until``.
        """
        found: list[Request] = lm.requests_of(self.instances(lm), config)
        return found

    def metrics(self, rows: Sequence[Trajectory]) -> dict[str, list[float]]:
        """What each task's own filters and metrics say of one answer to each prompt.

        Metrics without a number for each prompt (of a whole corpus) are left out, and so are those that not every task
        has.

        Args:
            rows: in the order of ``questions``.
        """
        found: list[dict[str, list[float]]] = []
        start = 0
        for task in self.tasks.values():
            own = task.instances
            texts = [ScoredText(row.text, row.reward, row.num_tokens) for row in rows[start : start + len(own)]]
            start += len(own)
            found.append(self._of_task(task, own, texts))
        common = [name for name in found[0] if all(name in other for other in found)]
        return {name: [value for of_task in found for value in of_task[name]] for name in common}

    def scored_by(self) -> str:
        """Digest of the tasks' configurations and documents: what decides ``metrics`` beside the answers."""
        told = {name: [task.dump_config(), [i.doc for i in task.instances]] for name, task in self.tasks.items()}
        return hashlib.sha256(json.dumps(told, skipkeys=True, default=str).encode()).hexdigest()

    def _of_task(self, task: Any, instances: Sequence[Any], texts: Sequence[str]) -> dict[str, list[float]]:
        for instance, text in zip(instances, texts, strict=True):
            instance.resps = [text]
            instance.filtered_resps = {}
        task.apply_filters()
        filters = list(instances[0].filtered_resps)
        better = task.higher_is_better()
        found: dict[str, list[float]] = {}
        for chosen in filters:
            for instance in instances:
                for metric, value in task.process_results(instance.doc, [instance.filtered_resps[chosen]]).items():
                    if not _is_number(value):
                        continue
                    name = metric if len(filters) == 1 else f"{metric},{chosen}"
                    found.setdefault(name, []).append(float(value))
                    self.higher_is_better[name] = bool(better.get(metric, True))
        return {name: values for name, values in found.items() if len(values) == len(instances)}


class _Messages:
    """In the place of a model where only what is asked is wanted."""

    tokenizer_name = "messages"

    @staticmethod
    def apply_chat_template(
        chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> ChatPrompt:
        return ChatPrompt("", [dict(message) for message in chat_history], add_generation_prompt)


_MESSAGES = _Messages()


def _check(name: str, task: Any) -> None:
    kind = task.get_config("output_type")
    if kind != GENERATES:
        raise ConfigError(
            f"task {name!r} has no answers to choose between: its output_type is {kind}, and methods differ in what "
            "they generate.",
            hint="compare on a task of output_type generate_until.",
        )
    if (repeats := task.get_config("repeats") or 1) > 1:
        raise ConfigError(
            f"task {name!r} wants {repeats} answers to each prompt; a comparison pairs one with one.",
            hint="use --seeds for several draws, and a task with repeats: 1.",
        )


def _is_number(value: Any) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return not isinstance(value, (str, bytes, list, tuple)) and math.isfinite(float(value))
    return False
