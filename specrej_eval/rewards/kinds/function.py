"""``reward_model=pkg.module:function``: any Python function as the reward; in Python, ``CallableReward(function)``.

Contract: ``function(conversation, responses) -> one number per response``, higher is better. ``conversation`` is a
list of ``{"role", "content"}`` dicts, ``responses`` a list of str (the prompt's response prefix included).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from specrej_eval.config import reward_names
from specrej_eval.core import Message, RowView
from specrej_eval.errors import ConfigError, RewardError, nearest
from specrej_eval.rewards.base import RewardModel, RewardPlan
from specrej_eval.rewards.kinds.base import Asked, RewardKind
from specrej_eval.wording import counted

RULE = "a reward callable must return one number per response"

_logger = logging.getLogger(__name__)


def import_callable(name: str) -> Callable[..., Any]:
    """The object behind ``pkg.module:function``.

    The working directory is put on ``sys.path`` only if the module is found nowhere else: console scripts
    (``lm-eval``, ``alpaca_eval``) do not have it there, ``python -m`` does.

    Raises:
        ConfigError: the module cannot be imported, lacks the attribute (nearest one suggested), or it is not callable.
    """
    module_name, _, attribute = name.partition(":")
    module = _import_module(name, module_name)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            where = getattr(module, "__file__", None) or "memory"
            best = nearest(part, [entry for entry in dir(target) if not entry.startswith("__")])
            raise ConfigError(
                f"reward_model={name!r}: {module_name} has no attribute {attribute!r}.",
                hint=f"did you mean {best!r}?" if best else f"the module was imported from {where}.",
            )
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"reward_model={name!r} must name a callable, got {type(target).__name__}.",
            hint="it is called as function(conversation, responses) and returns one number per response.",
        )
    function: Callable[..., Any] = target
    return function


def _import_module(name: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        ours = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")  # else: a module it imports
        if not ours or here in sys.path or "" in sys.path:
            raise _cannot_import(name, error) from error
    except Exception as error:  # whatever the user's module raises while it is imported
        raise _cannot_import(name, error) from error
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        sys.path.remove(here)
        raise _cannot_import(name, error) from error
    _logger.info("reward_model=%s: put the working directory on sys.path to import it.", name)
    return module


def _cannot_import(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"reward_model={name!r} cannot be imported: {type(error).__name__}: {error}.",
        hint=f"it must be importable from the working directory ({os.getcwd()}) or PYTHONPATH.",
    )


class CallableReward(RewardModel):
    """Calls the user's function once per look with all rows of one prompt. What it reads, only the function knows.

    Args:
        function: a function or any callable, or where it is: ``pkg.module:function``.

    Raises:
        ConfigError: as ``import_callable``.
    """

    num_calls = 0

    def __init__(self, function: str | Callable[..., Any]) -> None:
        if isinstance(function, str):
            self.name, self.function = function, import_callable(function)
        else:
            self.name, self.function = str(getattr(function, "__qualname__", type(function).__name__)), function

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One float per row; numpy and torch numbers are accepted, NaN is passed on.

        Raises:
            RewardError: the function raised (chained), or did not return one number per row.
        """
        if not rows:
            return []
        messages = [dict(message) for message in conversation]  # its own copy: the function may change it
        responses = [response_prefix + row.text for row in rows]
        self.num_calls += 1
        try:
            returned = self.function(messages, responses)
        except Exception as error:
            raise RewardError(
                f"reward_model={self.name!r} raised {type(error).__name__}: {error}\n"
                f"  it was called with {counted(len(rows), 'response')}; the first, {_shown(rows[0])}",
                hint=f"{RULE}; it is called as function(conversation, responses).",
            ) from error
        return self._checked(returned, rows)

    def _checked(self, returned: Any, rows: Sequence[RowView]) -> list[float]:
        if hasattr(returned, "tolist"):  # numpy array, torch tensor
            returned = returned.tolist()
        if isinstance(returned, (str, bytes, dict)) or not isinstance(returned, Iterable):
            raise RewardError(
                f"reward_model={self.name!r} returned {_named(returned)} for {counted(len(rows), 'response')}; "
                f"the first, {_shown(rows[0])}",
                hint=f"{RULE}: a list, a tuple, an array or a tensor.",
            )
        values = list(returned)
        if len(values) != len(rows):
            raise RewardError(
                f"reward_model={self.name!r} returned {counted(len(values), 'value')} for "
                f"{counted(len(rows), 'response')}; "
                f"the first, {_shown(rows[0])}",
                hint=f"{RULE}, in the same order.",
            )
        return [self._number(value, row) for value, row in zip(values, rows, strict=True)]

    def _number(self, value: Any, row: RowView) -> float:
        try:
            number = value
            if hasattr(value, "item"):  # numpy and torch scalars, arrays of one element
                number = value.item()
            elif isinstance(value, (list, tuple)) and len(value) == 1:  # a column (n, 1) of an array or tensor
                number = value[0]
            if isinstance(number, (str, bytes)):
                raise TypeError("text")
            return float(number)
        except Exception as error:
            raise RewardError(
                f"reward_model={self.name!r} returned {_named(value)} in place of a number for {_shown(row)}",
                hint=f"{RULE}; return NaN for a response that cannot be scored and set on_nan=drop.",
            ) from error


class Kind(RewardKind):
    ORDER = 2  # judge:MODEL has this form as well
    FORMS: ClassVar[Mapping[str, str]] = {
        "pkg.module:function": "function(conversation, responses) -> one number per response"
    }

    def claims(self, name: str) -> bool:
        return reward_names.is_callable(name)

    def resolve(self, asked: Asked) -> RewardPlan:
        """Raises:
        ConfigError: as ``import_callable``.
        """
        reward = CallableReward(asked.name)
        return RewardPlan(asked.name, lambda device: reward)


def _named(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}" if value is not None else "None"


def _shown(row: RowView) -> str:
    text = row.text if len(row.text) <= 80 else row.text[:80] + "..."
    return f"row {row.row}: {text!r}"
