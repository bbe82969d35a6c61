"""``specrej_eval.load``: the Python entry, with the argument names of ``--model_args``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specrej_eval import budget
from specrej_eval.config import RunConfig, as_dict

if TYPE_CHECKING:
    from specrej_eval.generator import Generator


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
    budget.check_arguments(config)
    # torch and transformers are imported from here on
    from specrej_eval.engine.loading import check_checkpoint, load_model_and_tokenizer
    from specrej_eval.engine.transformers_engine import TransformersEngine
    from specrej_eval.generator import Generator
    from specrej_eval.rewards.base import check_reward, make_reward

    check_checkpoint(config, host)
    token = host.get("token")
    check_reward(config, token=token)
    model, tokenizer = load_model_and_tokenizer(config, host)
    template_args = as_dict("chat_template_args", host.get("chat_template_args") or {})
    if host.get("enable_thinking") is not None:
        template_args["enable_thinking"] = host["enable_thinking"]
    engine = TransformersEngine(
        model,
        tokenizer,
        max_length=host.get("max_length"),
        think_end_token=host.get("think_end_token"),
        add_bos_token=host.get("add_bos_token"),
        chat_template_args=template_args,
    )
    reward = make_reward(config, device=config.reward_device or str(engine.device), token=token)
    identity: dict[str, Any] = {
        name: host[name] for name in ("revision", "subfolder", "gguf_file", "peft", "tokenizer") if name in host
    }
    return Generator(engine=engine, reward=reward, config=config, identity=identity)
