"""A reward model with weights of its own: what a family's ``load`` returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from specrej_eval.core import Message, RowView
from specrej_eval.kv import choose
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.memory import clear_error, twice
from specrej_eval.kv.models import parameters_per_token
from specrej_eval.kv.steps import SDPA
from specrej_eval.rewards.base import Pair, RewardModel, RewardSession
from specrej_eval.rewards.checkpoints.forward import SMALLER, Forward, Head
from specrej_eval.rewards.checkpoints.renderer import Renderer
from specrej_eval.rewards.checkpoints.session import CachedSession, read_together
from specrej_eval.rewards.checkpoints.shared_body import SharedBody


class CheckpointReward(Forward, RewardModel):
    """Scores rows with forward passes; its sessions read only what is new at each look. See ``Forward``."""

    def __init__(self, body: Any, head: Head | None, renderer: Renderer, **options: Any) -> None:
        super().__init__(body, head, renderer, **options)
        self.name = renderer.name
        self.devices = frozenset(parameter.device for parameter in body.parameters())

    def parameters_per_token(self) -> int:
        """Those of the body; the head reads few tokens."""
        return parameters_per_token(self.body)

    @cached_property
    def shared_body(self) -> SharedBody | None:
        """Reads new tokens only; None for bodies that cannot (encoders never do), and where nothing is to be cached.

        Tried out when the first session is opened.
        """
        if self.cache == "off" or self.head is None:
            return None
        attention = choose.of_rewards(self.device, self.compile)
        with clear_error(f"reward_model={self.name!r} was tried out", SMALLER):
            shared, reason = twice(lambda: self._tried_out(attention))
            if reason is not None and attention.name != SDPA.name:
                plain, still = twice(lambda: self._tried_out(SDPA))
                if still is None:
                    self.renderer.warn("kernels", f"C++ kernels are not used for it ({reason}).")
                    shared, reason = plain, None
        if reason is not None:
            self.renderer.warn("cache", f"every look is read in full, which is slower ({reason}).")
        return shared if reason is None else None

    def _tried_out(self, attention: AttentionBackend) -> tuple[SharedBody, str | None]:
        """The body, and why it cannot be cached; None if it can."""
        shared = SharedBody(self.body, attention)
        return shared, shared.probe()

    def open(self, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
        """A session that reads only what is new at each look, where the body allows it."""
        if self.shared_body is None:
            return super().open(conversation, response_prefix)
        return CachedSession(self, self.shared_body, conversation, response_prefix)

    def read_ahead(self, looks: Sequence[tuple[RewardSession, Sequence[RowView]]], *, exact: bool) -> None:
        """Rows of several prompts in the same forward passes. See ``RewardModel.read_ahead``."""
        cached = [(session, rows) for session, rows in looks if isinstance(session, CachedSession) and rows]
        if len(cached) > 1 and (cached[0][0].body.exact or not exact):
            read_together(cached)

    @torch.inference_mode()
    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """The head's raw output for each row; no sigmoid.

        Rows that read the same are scored once, so equal answers are exact ties. How rows are split into forward
        passes depends on the rows given, nothing else.

        Raises:
            RewardError: the chat template refuses the conversation, or a token is beyond the model's vocabulary.
            OutOfMemoryError: not even one row at a time fits.
        """
        inputs = self.renderer.inputs(conversation, rows, response_prefix)
        scores = self.score_inputs(inputs)
        return [scores[entry] for entry in inputs]

    @torch.inference_mode()
    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Finished answers of any conversations in the same batches. Raises as ``score``."""
        inputs = [self.renderer.inputs(pair.conversation, [pair.row])[0] for pair in pairs]
        scores = self.score_inputs(inputs)
        return [scores[entry] for entry in inputs]
