"""``specrej_eval.load``: the Python entry, with the argument names of ``--model_args``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specrej_eval import budget
from specrej_eval.config import HOST, RunConfig, as_dict
from specrej_eval.special_tokens import ENCODE_AS_TEXT

if TYPE_CHECKING:
    from specrej_eval.engines.transformers.engine import TransformersEngine
    from specrej_eval.generator import Generator
    from specrej_eval.rewards.base import RewardModel

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
    config, host = RunConfig.from_args(args)
    check(config, host)
    if config.pretrained is None:
        _logger.warning("No pretrained= is given: the embedded demo model is used, which knows nothing but small sums.")
    from specrej_eval.generator import Generator

    engine, reward = load_models(config, host)
    return Generator(engine=engine, reward=reward, config=config, identity=identity_of(host))


def check(config: RunConfig, host: Mapping[str, Any]) -> None:
    """Everything that can be said of the arguments before a weight is loaded.

    Raises:
        ConfigError, CheckpointError: as ``load``.
    """
    budget.check_arguments(config)
    from specrej_eval.engines.transformers.loading import check_checkpoint
    from specrej_eval.rewards.choose import resolve_reward

    check_checkpoint(config, host)
    resolve_reward(config, token=host.get("token"))


def load_models(
    config: RunConfig, host: Mapping[str, Any], *, content_rule: str = ENCODE_AS_TEXT
) -> tuple[TransformersEngine, RewardModel]:
    """The engine and the reward model; none of the strategy's and sampler's arguments is looked at.

    Args:
        content_rule: what ``special_tokens_in_content=None`` means to the engine.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: as ``load``.
    """
    from specrej_eval.rewards.choose import resolve_reward

    engine = load_engine(config, host, content_rule=content_rule)
    return engine, resolve_reward(config, token=host.get("token")).load(str(engine.device))


def load_engine(
    config: RunConfig, host: Mapping[str, Any], *, content_rule: str = ENCODE_AS_TEXT
) -> TransformersEngine:
    """The language model alone. Arguments and errors as ``load_models``."""
    from specrej_eval.engines.transformers.engine import TransformersEngine
    from specrej_eval.engines.transformers.loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(config, host)
    template_args = as_dict("chat_template_args", host.get("chat_template_args") or {})
    if host.get("enable_thinking") is not None:
        template_args["enable_thinking"] = host["enable_thinking"]
    return TransformersEngine(
        model,
        tokenizer,
        max_length=host.get("max_length"),
        think_end_token=host.get("think_end_token"),
        add_bos_token=host.get("add_bos_token"),
        chat_template_args=template_args,
        special_tokens_in_content=config.special_tokens_in_content or content_rule,
    )


def identity_of(host: Mapping[str, Any]) -> dict[str, Any]:
    """The host's arguments for a journal's fingerprint, which leaves out those that decide no answer."""
    return {name: value for name, value in host.items() if not HOST[name].private}
