"""The attention function transformers calls while we run a model, and the cache object handed to the model.

Registered as ``specrej_shared_prefix``. A model reaches it in every layer with rotary position already applied. What
it attends to is the step in progress, which is handed over in a variable of the thread: keyword arguments of a
model's ``forward`` would be the way, but some models drop them between decoder layer and attention (stablelm,
nemotron), and a cache is shown keys and values only.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from specrej_eval.kv.attention.base import AttentionParams
from specrej_eval.kv.steps import Step

AnyStep = TypeVar("AnyStep", bound=Step)

NAME = "specrej_shared_prefix"
ROW_ALIGN = 16
"""On CPU a batch is padded to a multiple of this many rows, so that every thread's share of a matmul has at least 4
rows: with fewer, MKL takes another kernel and a row's bits would depend on its company."""


class _Here(threading.local):
    step: Step | None = None


_here = _Here()
"""Of each thread: a reward model on a device of its own reads in another (``overlap``)."""


@contextmanager
def running(step: AnyStep) -> Iterator[AnyStep]:
    """Make ``step`` the one the attention function and the cache see."""
    previous, _here.step = _here.step, step
    try:
        yield step
    finally:
        _here.step = previous


def in_progress() -> Step | None:
    """The step that runs now, in this thread."""
    return _here.step


def _current() -> Step:
    if _here.step is None:
        raise RuntimeError(f"attention implementation {NAME!r} was called outside a step of ours.")
    return _here.step


class _Layer(CacheLayerMixin):
    """Tells the model where it is; holds nothing. Some models cache other things than they attend to (MLA: latents)."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: prefixes and pools allocate themselves."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # what is stored are the keys and values that reach the attention function
        return key_states, value_states

    def get_seq_length(self) -> int:
        return _current().length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def cache_argument(model: torch.nn.Module) -> str:
    """The name under which ``model.forward`` takes its cache.

    A name that it does not know would be swallowed by its ``**kwargs``, and each pass would begin anew. The model is
    asked, not transformers' version: code that came with a checkpoint keeps the names of its day.
    """
    accepted = inspect.signature(model.forward).parameters
    # the name since transformers 5.24, the one before, and Mamba's before
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in accepted), "past_key_values")


class SharedPrefixCache(Cache):
    """The cache of every forward pass of ours."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])  # type: ignore[no-untyped-call]  # an untyped base


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by the step in progress (``Step.attend``).

    Returns:
        (batch, tokens, heads, head_dim), contiguous, and None for the weights.
    """
    # no mask, no dropout: our engine pads nothing and never trains
    step = _current()
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of transformers carries an int
    step.windows[layer] = sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return step.attend(layer, query, key, value, AttentionParams(scale, sliding_window, softcap, s_aux)), None


AttentionInterface.register(NAME, attention_forward)
