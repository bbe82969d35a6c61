"""Tokenizers as every engine loads them: by the host's arguments, with one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig, as_bool, as_dict, as_int
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError
from specrej_eval.paths import is_folder


def template_args_of(host: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template.

    Raises:
        ConfigError: ``chat_template_args`` are no dict.
    """
    found = as_dict("chat_template_args", host.get("chat_template_args") or {})
    if host.get("enable_thinking") is not None:
        found["enable_thinking"] = host["enable_thinking"]
    return found


def max_length_of(host: Mapping[str, Any]) -> int | None:
    """``max_length``, the model's context in tokens; None if it is not given.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if host.get("max_length") is None:
        return None
    found = as_int("max_length", host["max_length"])
    if found < 1:
        raise ConfigError(f"max_length must be at least 1, got {found}.")
    return found


def text_arguments(config: RunConfig, host: Mapping[str, Any], *, content_rule: str) -> dict[str, Any]:
    """The arguments of ``base.Engine`` that say how prompts are made and answers cut.

    Args:
        content_rule: what ``special_tokens_in_content=None`` means.
    """
    return {
        "think_end_token": host.get("think_end_token"),
        "add_bos_token": host.get("add_bos_token"),
        "chat_template_args": template_args_of(host),
        "special_tokens_in_content": config.special_tokens_in_content or content_rule,
    }


def hub_arguments(config: RunConfig, host: Mapping[str, Any]) -> dict[str, Any]:
    """Where a checkpoint's files are taken from, of loaders that know no ``subfolder``."""
    return {
        "revision": host.get("revision") or "main",
        "subfolder": "",
        "token": host.get("token"),
        "trust_remote_code": config.trust_remote_code,
    }


def load_tokenizer(name: str, shared: Mapping[str, Any], host: Mapping[str, Any]) -> Any:
    """The tokenizer of a checkpoint, or the one that ``tokenizer=`` names or is.

    Args:
        shared: revision, subfolder, token and trust_remote_code of the model's checkpoint.

    Raises:
        CheckpointError, MissingDependencyError: it cannot be loaded (the original error is chained).
    """
    given = host.get("tokenizer")
    if given is not None and not isinstance(given, str):
        return given  # already one
    arguments: dict[str, Any] = {"token": shared["token"], "trust_remote_code": shared["trust_remote_code"]}
    if given is None:  # revision and subfolder are the model's; another repository has its own
        arguments |= {"revision": shared["revision"], "subfolder": shared["subfolder"]}
    if given is None and host.get("gguf_file"):
        arguments["gguf_file"] = host["gguf_file"]
    else:
        arguments["use_fast"] = as_bool("use_fast_tokenizer", host.get("use_fast_tokenizer", True))
    if host.get("add_bos_token") is not None:
        arguments["add_bos_token"] = as_bool("add_bos_token", host["add_bos_token"])
    try:
        return AutoTokenizer.from_pretrained(given or name, **arguments)
    except Exception as error:  # files, formats and remote code fail in many ways
        raise load_error("tokenizer" if given else "pretrained", given or name, error, what="tokenizer") from error


def load_error(argument: str, name: str, error: Exception, *, what: str) -> CheckpointError | MissingDependencyError:
    """What a failure to load becomes."""
    text = f"{argument}={name!r}: the {what} cannot be loaded: {type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        return MissingDependencyError(text, hint="install the package that the message names.")
    hint = None
    if not is_folder(name):
        hint = f"it was looked for on the hub. If a folder was meant: {checkpoint.folder_hint(name)}"
    return CheckpointError(text, hint=hint)
