"""What must not be shown or kept: passwords in addresses, access tokens, keys. The one place that knows them.

A secret is known by where it stands (``http://name:password@host``, ``token=...``), by its looks (``hf_...``,
``sk-...``), or because it is one of this run's own (``own_secrets``). Text that a model or a data set wrote is never
changed: what is found in it is told, by ``Search``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

PUT = "***"
"""Stands where a secret was."""
KEY_VARIABLES = (
    *("SPECREJ_REWARD_API_KEY", "SPECREJ_ENGINE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"),
)
"""Environment variables that hold a secret of the user's."""

_ADDRESS = r"(https?://)(?:(?!judge:)[^/\s\"])*@"
_PASSWORD = re.compile(_ADDRESS)
"""``judge:`` begins another name of an ensemble, whose ``@`` separates model and server."""
_NAME = r"(?:[\w-]*(?:api[_-]?key|password|passwd|secret|auth_token|access_token|hf_token|hub_token)|-*token)"
_IS_NAME = re.compile(rf"(?i){_NAME}")
_VALUE = r"(?![*\s\[{]|None\b|null\b|true\b|false\b)[^,\s\"'}]+"
_ASSIGNED = re.compile(rf"(?i)(?<![\w-])((?:{_NAME}=|[\"']{_NAME}[\"']\s*:\s*)[\"']?){_VALUE}")
"""``token=...``, ``"token": "..."``."""
_WRITTEN = re.compile(rf"(?i)(?<![\w-])[\"']?{_NAME}[\"']?\s*[:=]\s*[\"']?{_VALUE}")
"""The same in a file of arguments, which may be YAML."""
_LOOKS = {
    "a token of the Hugging Face hub": re.compile(r"(?<!\w)hf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"(?<![\w-])sk-(?=[\w-]*\d)(?:[A-Za-z0-9]+-){0,3}[A-Za-z0-9_]{16,}[\w-]*"),
    "a bearer token": re.compile(r"(?i)(?<=bearer )(?=\S*\d)[A-Za-z0-9._~+/-]{16,}"),
}
_WITH_PASSWORD = re.compile(r"(?i)(?<=://)[^/\s\"'<>@:]*:(?!\*+@)(?:(?!judge:)[^/\s\"'<>])+(?=@[\w\[])")
_COMMON = re.compile(r".{0,7}|[A-Za-z _-]{0,15}")
"""Secrets that no text is searched for: a placeholder such as ``EMPTY`` or ``not-needed`` stands in many."""


def without_passwords(text: str, put: str = "") -> str:
    """``http://name:password@host`` becomes ``http://host`` wherever it stands: alone, in an ensemble, in a command."""
    return _PASSWORD.sub(rf"\1{put}", text)


def is_secret_name(name: object) -> bool:
    """Whether an argument, or a field, of this name holds a secret (``token``; not ``think_end_token``)."""
    return isinstance(name, str) and _IS_NAME.fullmatch(name.lstrip("-")) is not None


def redacted(text: str, known: Iterable[str] = (), *, put: str = f"{PUT}@") -> str:
    """A message, a command or an argument without secrets.

    Args:
        known: secrets to look for beside those that are known by place or looks.
        put: stands before the host where an address had a name and a password.
    """
    for secret in sorted({one for one in known if len(one) > 3}, key=len, reverse=True):  # "x" stands in any message
        text = text.replace(secret, PUT)
    text = _ASSIGNED.sub(rf"\1{PUT}", without_passwords(text, put))
    for pattern in _LOOKS.values():
        text = pattern.sub(PUT, text)
    return text


def redacted_values(value: Any, *, put: str = f"{PUT}@") -> Any:
    """Arguments without secrets: of a dict, at any depth, what stands under a secret's name, and all texts redacted."""
    if isinstance(value, Mapping):
        return {
            name: PUT if is_secret_name(name) and isinstance(inner, str) and inner else redacted_values(inner, put=put)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        inside = [redacted_values(inner, put=put) for inner in value]
        return tuple(inside) if isinstance(value, tuple) else inside
    return redacted(value, put=put) if isinstance(value, str) else value


class Sealed(str):
    """A text that shows itself redacted to whoever has it, and is whole to who asks: ``opened``.

    For arguments that pass through a harness, which logs and keeps them. Pickled, it is the redacted text.
    """

    __slots__ = ("_whole",)
    _whole: str

    @classmethod
    def of(cls, whole: str, shown: str) -> Self:
        made = cls(shown)
        made._whole = whole
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


def sealed(value: Any) -> Any:
    """Arguments, or the text of them, with what ``redacted_values`` would change ``Sealed``; all else as it was."""
    if isinstance(value, Sealed):
        return value
    if isinstance(value, str):
        shown = redacted(value)
        return Sealed.of(value, shown) if shown != value else value
    if isinstance(value, Mapping):
        return {
            name: Sealed.of(inner, PUT) if is_secret_name(name) and type(inner) is str and inner else sealed(inner)
            for name, inner in value.items()
        }
    return [sealed(inner) for inner in value] if isinstance(value, list) else value


def opened(value: Any) -> Any:
    """What was given to ``sealed``."""
    if isinstance(value, Sealed):
        return value._whole
    if isinstance(value, Mapping):
        return {name: opened(inner) for name, inner in value.items()}
    return [opened(inner) for inner in value] if isinstance(value, list) else value


def own_secrets() -> dict[str, str]:
    """Secret -> what it is, of this user's environment and of the hub's login on this machine."""
    found = {value.strip(): f"the key in {name}" for name in KEY_VARIABLES if (value := os.environ.get(name))}
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    for path in (os.environ.get("HF_TOKEN_PATH", ""), Path(home, "token")):
        try:
            found.setdefault(Path(path).read_text(encoding="utf-8").strip(), "the hub's token of this machine")
        except (OSError, ValueError):  # there is none
            continue
    return found


def secrets_of(arguments: Any) -> dict[str, str]:
    """Secret -> what it is: in arguments, at any depth, values under a secret's name and passwords in addresses."""
    found: dict[str, str] = {}
    if isinstance(arguments, Mapping):
        for name, inner in arguments.items():
            if is_secret_name(name) and isinstance(inner, str):
                found[inner] = f"the value of {name}="
            else:
                found |= secrets_of(inner)
    elif isinstance(arguments, list | tuple):
        for inner in arguments:
            found |= secrets_of(inner)
    elif isinstance(arguments, str):
        passwords = (match[0].partition(":")[2] for match in _WITH_PASSWORD.finditer(arguments))
        found = dict.fromkeys(passwords, "the password of an address")
    return found


class Search:
    """Looks for secrets in the lines of files.

    Args:
        known: secret -> what it is.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = {
            form: what
            for secret, what in known.items()
            if not _COMMON.fullmatch(secret)
            for form in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
        }

    def __call__(self, line: str, *, arguments: bool = False) -> tuple[str, bool] | None:
        """The first secret of a line, in words that do not show it, and whether it is a known one; None = none.

        Args:
            arguments: the line is of a file of arguments, where a value of ``token`` is a secret whatever it is.
        """
        for form, what in self._known.items():
            if form in line:
                return what, True
        for what, pattern in {"an address with a password": _WITH_PASSWORD, **_LOOKS}.items():
            if pattern.search(line):
                return what, False
        if arguments and _WRITTEN.search(line):
            return "a value under the name of a token, key or password", False
        return None
