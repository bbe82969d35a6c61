"""Tokenizer and weights of a reward checkpoint, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from specrej_eval.errors import CheckpointError
from specrej_eval.kv.models import with_softcap
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint


def load_checkpoint(
    source: RewardCheckpoint, load: Callable[..., Any], *, tokenizer_from: str | None = None
) -> tuple[Any, Any]:
    """Load from a folder or hub repository.

    Args:
        load: transformers' ``from_pretrained`` of a class whose weights must all be in the checkpoint.
        tokenizer_from: another checkpoint whose tokenizer this one was trained with.

    Returns:
        The model in eval mode on its device, and the tokenizer.

    Raises:
        CheckpointError: the files cannot be loaded, or lack weights (transformers would make them up).
    """
    access = {"trust_remote_code": source.config.trust_remote_code, "token": source.token}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or source.name, **access)
        model, info = load(source.name, dtype=source.dtype, output_loading_info=True, **access)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files, formats and remote code fail in many ways
        raise CheckpointError(
            f"reward_model={source.name!r} cannot be loaded: {type(error).__name__}: {error}",
            hint=None if source.config.trust_remote_code else "remote code runs only with trust_remote_code=True.",
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise no_weights(source.name, missing)
    return with_softcap(model.to(source.device).eval()), tokenizer


def no_weights(name: str, missing: Sequence[str]) -> CheckpointError:
    """The error of a checkpoint that lacks weights."""
    return CheckpointError(
        f"reward_model={name!r} has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
        "they would be random.",
        hint="is this the reward model, or the language model it was made from?",
    )
