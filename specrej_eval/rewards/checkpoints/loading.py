"""Tokenizer and weights of a reward checkpoint, with errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from specrej_eval.config import RunConfig
from specrej_eval.errors import CheckpointError


def load_checkpoint(
    name: str,
    config: RunConfig,
    model_class: Any,
    *,
    dtype: str,
    device: str,
    token: str | bool | None,
    tokenizer_from: str | None = None,
    **more: Any,
) -> tuple[Any, Any]:
    """Load from a folder or hub repository.

    Args:
        model_class: anything with transformers' ``from_pretrained``; its weights must all be in the checkpoint.
        tokenizer_from: another checkpoint whose tokenizer this one was trained with.
        more: further arguments of ``from_pretrained``.

    Returns:
        The model in eval mode on its device, and the tokenizer.

    Raises:
        CheckpointError: the files cannot be loaded, or lack weights (transformers would make them up).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_from or name, trust_remote_code=config.trust_remote_code, token=token
        )
        model, info = model_class.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            token=token,
            output_loading_info=True,
            **more,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files, formats and remote code fail in many ways
        raise CheckpointError(
            f"reward_model={name!r} cannot be loaded: {type(error).__name__}: {error}",
            hint=None if config.trust_remote_code else "remote code runs only with trust_remote_code=True.",
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"reward_model={name!r} has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
            "they would be random.",
            hint="is this the reward model, or the language model it was made from?",
        )
    return model.to(device).eval(), tokenizer


def named(known: tuple[str, ...], name: str) -> bool:
    """Whether a hub name or folder is one of the ``known`` checkpoints, whoever's copy it is.

    For checkpoints whose ``config.json`` does not tell them from a plain language model.
    """
    own = Path(name).name.lower()
    return any(own == entry.rpartition("/")[2].lower() for entry in known)
