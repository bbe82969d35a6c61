"""A server that decodes: it is found and asked what it can do; then the tokenizer is loaded here."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.config.engines import OPENAI_SERVER, SGLANG_SERVER, VLLM_SERVER
from specrej_eval.engines import base
from specrej_eval.engines.servers.engine import Looks, ServerEngine
from specrej_eval.engines.servers.protocols.base import SAMPLE, EngineProtocol
from specrej_eval.engines.tokenizers import (
    hub_arguments,
    load_tokenizer,
    max_length_of,
    template_args_of,
    text_arguments,
)
from specrej_eval.errors import ConfigError
from specrej_eval.http import JsonServer, Names
from specrej_eval.kv.models import context_length, stop_ids

logger = logging.getLogger(__name__)

KEY_VARIABLES = ("SPECREJ_ENGINE_API_KEY",)
PROTOCOLS = {VLLM_SERVER: "vllm", SGLANG_SERVER: "sglang", OPENAI_SERVER: "completions"}
"""``engine`` -> the file in ``protocols``."""
_NAMES = Names(
    server="engine server",
    address="engine_url",
    timeout="engine_timeout",
    retries="engine_retries",
    key_over_http="engine_key_over_http",
)
_PATHS = ("/v1", "/v1/completions", "/generate")
"""Ends of addresses that people copy; what we ask lies beside and below."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan(base.EnginePlan):
    """A server that was asked. ``name`` is the checkpoint whose tokenizer is ours, and should be the server's model."""

    protocol: EngineProtocol
    looks: Looks

    def load(self, *, content_rule: str) -> ServerEngine:
        """Load the tokenizer, and compare it with the server's. See ``base.EnginePlan``.

        Raises:
            ConfigError: the server has another tokenizer, or a thinking part cannot be told from the text it gives.
        """
        host, config, protocol = self.host, self.config, self.protocol
        hub = hub_arguments(config, host)
        tokenizer = load_tokenizer(self.name, hub, host)
        _same_tokenizer(protocol, tokenizer, self.name)
        if not protocol.gives_ids and host.get("think_end_token") is not None:
            raise ConfigError(
                f"think_end_token: the server at {protocol.server.shown_url} gives text and no token ids.",
                hint="leave it out, or use vLLM 0.10.2 or newer, or SGLang.",
            )
        about = _about(self.name, hub, tokenizer)
        length = max_length_of(host) or protocol.max_length or context_length(about, tokenizer)
        engine = ServerEngine(
            protocol,
            tokenizer,
            max_length=length,
            looks=self.looks,
            stop_ids=stop_ids(about, tokenizer),
            name=config.engine,
            device=self.device,
            **text_arguments(config, host, content_rule=content_rule),
        )
        logger.warning("%s", engine.told())
        return engine

    def environment(self) -> dict[str, Any]:
        """The server's version, and how looks are come to. See ``base.EnginePlan``."""
        return {"engine_version": self.protocol.version, "engine_looks": self.looks}

    def deciding(self) -> dict[str, Any]:
        """What the server says it holds. See ``base.EnginePlan``."""
        return {"served_model": self.protocol.served_model}


def resolve_engine(config: RunConfig, host: Mapping[str, Any], *, check: bool = True) -> EnginePlan:
    """Find the server, and ask what it holds and can do.

    Raises:
        ConfigError: no ``engine_url`` or ``pretrained``, a bad address or key, a pause or context that the server does
            not have.
        CheckpointError: a folder without a tokenizer.
        ServerError: the server does not answer as it should.
    """
    del check
    name = config.engine
    if config.engine_url is None:
        raise ConfigError(
            f"engine={name} needs engine_url=, the address of the server that decodes.",
            hint="engine_url=http://localhost:8000, for example.",
        )
    if config.pretrained is None:
        raise ConfigError(
            f"engine={name} needs pretrained=: the model that the server holds, whose tokenizer is loaded here.",
            hint="a hub name or a folder; no weights are loaded from it.",
        )
    given = host.get("tokenizer")
    if given is None or isinstance(given, str):
        argument, where = ("pretrained", config.pretrained) if given is None else ("tokenizer", given)
        folder = checkpoint.check_folder(argument, where)
        if folder is not None:
            checkpoint.check_tokenizer_files(argument, folder)
    template_args_of(host)
    asked = max_length_of(host)
    server = JsonServer(
        _without_path(config.engine_url),
        key_variables=KEY_VARIABLES,
        timeout=config.engine_timeout,
        retries=config.engine_retries,
        key_over_http=config.engine_key_over_http,
        names=_NAMES,
    )
    found = importlib.import_module(f"specrej_eval.engines.servers.protocols.{PROTOCOLS[name]}")
    protocol = cast("EngineProtocol", found.Protocol(server, config.pretrained))
    protocol.connect()
    if asked is not None and protocol.max_length is not None and asked > protocol.max_length:
        raise ConfigError(
            f"max_length={asked}, and the context of {server.shown_url} is {protocol.max_length} tokens.",
            hint="leave max_length= out, or start the server with a longer one.",
        )
    looks = config.engine_looks
    if looks == "pause" and not (protocol.can_pause and protocol.gives_ids):
        needs = protocol.HOW_TO_PAUSE
        raise ConfigError(
            f"engine_looks=pause: {protocol.KIND} at {server.shown_url} cannot be paused.",
            hint=f"it needs {needs}; engine_looks=auto does without." if needs else "engine_looks=auto does without.",
        )
    if looks == "auto":
        looks = "pause" if protocol.can_pause else "resubmit"
    return EnginePlan(
        name=config.pretrained,
        dtype=config.dtype,
        device=checkpoint.device_of(config.device),
        config=config,
        host=host,
        protocol=protocol,
        looks=cast("Looks", looks),
    )


def _without_path(url: str) -> str:
    bare = url.rstrip("/")
    for path in sorted(_PATHS, key=len, reverse=True):
        if bare.endswith(path):
            return bare.removesuffix(path)
    return bare


def _same_tokenizer(protocol: EngineProtocol, tokenizer: Any, name: str) -> None:
    """Raises:
    ConfigError: the server tokenises a sample differently.
    """
    theirs = protocol.token_ids_of(SAMPLE)
    ours = list(tokenizer.encode(SAMPLE, add_special_tokens=False))
    if theirs is not None and theirs != ours:
        raise ConfigError(
            f"pretrained={name!r} has another tokenizer than {protocol.served_model!r}, which "
            f"{protocol.server.shown_url} holds: {ours[:4]}... and {theirs[:4]}... for the same text.",
            hint="give the server's own model as pretrained=, or its tokenizer as tokenizer=.",
        )


def _about(name: str, hub: Mapping[str, Any], tokenizer: Any) -> Any:
    """What a checkpoint's configs say of its context and of how answers end; empty where there are none here."""
    found = SimpleNamespace(config=PretrainedConfig(), generation_config=None)
    try:
        found.config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        logger.info("pretrained=%r: no config.json can be read (%s)", name, error)
    try:
        found.generation_config = GenerationConfig.from_pretrained(name, **hub)
    except (OSError, ValueError):  # it is no must
        pass
    return found
