"""Token ids -> scores: a body (hidden states), positions to read, and a head in float32.

What every checkpoint family shares: batches without waste, halved where memory does not suffice; right padding; hidden
states read at the positions the family names. bfloat16 logits between 16 and 32 are 0.125 apart, so best-of-n would be
full of ties: heads get float32 and return float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specrej_eval.errors import OutOfMemoryError
from specrej_eval.kv.models import reset_rotary, rope_limit
from specrej_eval.rewards.checkpoints.memory import Allowance, in_batches, in_halves
from specrej_eval.rewards.checkpoints.renderer import Input, Renderer

SMALLER = "reward_dtype=bfloat16, or another reward_device."
MAX_PADDED_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(hidden, mask) -> scores``: (rows, positions, hidden size) float32, (rows, positions) bool -> (rows,).

Rows with fewer positions than others are padded behind with zeros, where the mask is False. A family that reads one
position takes ``hidden[:, 0]``; a process reward model reduces over the positions that the mask allows.
"""

PositionsOf = Callable[[tuple[int, ...]], tuple[int, ...]]
"""``positions_of(ids) -> positions``: ascending, at least one. Called with whole inputs, after truncation."""


class Forward:
    """Forward passes of one reward model, counted.

    Args:
        body: a transformers model whose forward pass gives hidden states first (no language-model head), on its device.
        head: see ``Head``; its weights in float32 on the body's device. None: ``body`` is a whole model that pools in
            its own way, and ``body(...).logits[:, 0]`` is the score.
        renderer: makes the inputs.
        positions_of: which hidden states the head gets; None = the renderer's.
        max_padded_tokens: most tokens of one forward pass, padding included.
        cache: what sessions keep from look to look: ``off``, ``prompt`` or ``full`` (``RunConfig.reward_cache``).
        allowance: how much of it; None = a share of the memory that is free.
        compile: C++ kernels on a CPU (``RunConfig.compile``).
    """

    tokens_scored = 0
    num_calls = 0

    def __init__(
        self,
        body: Any,
        head: Head | None,
        renderer: Renderer,
        *,
        positions_of: PositionsOf | None = None,
        max_padded_tokens: int = MAX_PADDED_TOKENS,
        cache: str = "full",
        allowance: Allowance | None = None,
        compile: str = "auto",
    ) -> None:
        self.body = body.eval()
        self.head = head
        self.renderer = renderer
        self.positions_of = positions_of or renderer.positions_of
        self.max_padded_tokens = max_padded_tokens
        self.device: torch.device = next(body.parameters()).device
        self.cache = cache
        self.allowance = allowance or Allowance()
        self.compile = compile
        self._rope_limit = rope_limit(body.config.get_text_config(decoder=True))

    def score_inputs(self, inputs: Sequence[Input]) -> dict[Input, float]:
        """Scores of whole inputs, each read once from its first token on."""
        # sorted by length, ids second: least padding, and the split does not hang on which row came first
        unique = sorted(set(inputs), key=lambda entry: (len(entry.ids), entry))
        scores: dict[Input, float] = {}
        for batch in self._batches(unique):
            found = in_halves(batch, self._forward, lambda entry: self.out_of_memory(len(entry.ids)))
            scores.update(zip(batch, found, strict=True))
        return scores

    def _batches(self, unique: Sequence[Input]) -> Iterator[list[Input]]:
        """Batches by length; beyond the rope limit each row alone, as its angles hang on the longest of its batch."""
        limit = self._rope_limit
        short = [entry for entry in unique if limit is None or len(entry.ids) <= limit]
        yield from in_batches(short, lambda entry: len(entry.ids), self.max_padded_tokens)
        yield from ([entry] for entry in unique[len(short) :])

    def _forward(self, batch: list[Input]) -> list[float]:
        """Scores of one padded batch.

        Padding is always on the right, whatever the tokenizer prefers: there positions 0, 1, ... are right as they
        are, for models with learned, rotary and recurrent positions alike, and no real token ever attends to padding.
        """
        lengths = torch.tensor([len(entry.ids) for entry in batch])
        longest = int(lengths.max())
        filler = self.renderer.filler
        ids = torch.tensor([[*entry.ids, *[filler] * (longest - len(entry.ids))] for entry in batch])
        mask = torch.arange(longest) < lengths[:, None]  # (rows, longest)
        arguments = {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}
        if self.head is None:
            if batch[0].types:
                types = torch.tensor([[*entry.types, *[0] * (longest - len(entry.types))] for entry in batch])
                arguments["token_type_ids"] = types.to(self.device)
            values = self.body(**arguments).logits[:, 0].float()
        else:
            reset_rotary(self.body, self.device)
            hidden = self.body(**arguments, use_cache=False)[0]  # (rows, longest, hidden size)
            places = [self.positions_of(entry.ids) for entry in batch]
            values = self.head_scores([row[list(wanted)] for row, wanted in zip(hidden, places, strict=True)])
        scores: list[float] = values.tolist()
        self.count(sum(len(entry.ids) for entry in batch))  # nothing can fail behind it: what is done again counts once
        return scores

    def count(self, num_tokens: int) -> None:
        """One more forward pass has read so many tokens."""
        self.num_calls += 1
        self.tokens_scored += num_tokens

    def head_scores(self, hidden: Sequence[Tensor]) -> Tensor:
        """The head on ragged rows: each (positions, hidden size) -> (rows,) float32."""
        assert self.head is not None
        counts = torch.tensor([len(row) for row in hidden])
        mask = (torch.arange(int(counts.max())) < counts[:, None]).to(self.device)  # (rows, positions)
        padded = torch.nn.utils.rnn.pad_sequence([row.float() for row in hidden], batch_first=True)
        return self.head(padded, mask).float()

    def out_of_memory(self, num_tokens: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"reward_model={self.renderer.name!r}: one sequence of {num_tokens:,} tokens does not fit in memory.",
            hint=SMALLER,
        )


def float32(module: torch.nn.Module) -> torch.nn.Module:
    """A float32 copy of a (small) module in eval mode: the weights of a head."""
    return copy.deepcopy(module).float().eval().requires_grad_(False)
