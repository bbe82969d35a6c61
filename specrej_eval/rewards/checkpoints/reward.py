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

from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import OutOfMemoryError
from specrej_eval.kv.memory import clear_error, twice
from specrej_eval.kv.models import reset_rotary, rope_limit
from specrej_eval.rewards.base import Pair, RewardSession, Stateless
from specrej_eval.rewards.checkpoints.memory import Allowance, in_batches, in_halves
from specrej_eval.rewards.checkpoints.renderer import Input, Renderer
from specrej_eval.rewards.checkpoints.session import CachedSession
from specrej_eval.rewards.checkpoints.shared_body import SharedBody

_SMALLER = "reward_dtype=bfloat16, or another reward_device."
MAX_PADDED_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""

Head = Callable[[Tensor, Tensor], Tensor]
"""``head(hidden, mask) -> scores``: (rows, positions, hidden size) float32, (rows, positions) bool -> (rows,).

Rows with fewer positions than others are padded behind with zeros, where the mask is False. A family that reads one
position takes ``hidden[:, 0]``; a process reward model reduces over the positions that the mask allows.
"""

PositionsOf = Callable[[tuple[int, ...]], tuple[int, ...]]
"""``positions_of(ids) -> positions``: ascending, at least one. Called with whole inputs, after truncation."""


def last_position(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The last token: what most reward models are read at."""
    return (len(ids) - 1,)


class CheckpointReward(Stateless):
    """Scores with weights of its own. What a family's ``load`` returns (``rewards.base.RewardModel``).

    Args:
        body: a transformers model whose forward pass gives hidden states first (no language-model head), on its device.
        head: see ``Head``; its weights in float32 on the body's device. None: ``body`` is a whole model that pools in
            its own way, and ``body(...).logits[:, 0]`` is the score.
        renderer: makes the inputs.
        positions_of: which hidden states the head gets.
        max_padded_tokens: most tokens of one forward pass, padding included.
        cache: what sessions keep from look to look: ``off``, ``prompt`` or ``full`` (``RunConfig.reward_cache``).
    """

    needs_logprobs = False

    def __init__(
        self,
        body: Any,
        head: Head | None,
        renderer: Renderer,
        *,
        positions_of: PositionsOf = last_position,
        max_padded_tokens: int = MAX_PADDED_TOKENS,
        cache: str = "full",
    ) -> None:
        self.name = renderer.name
        self.body = body.eval()
        self.head = head
        self.renderer = renderer
        self.positions_of = positions_of
        self.max_padded_tokens = max_padded_tokens
        self.device: torch.device = next(body.parameters()).device
        self.cache = cache
        self.allowance = Allowance()
        self.shared_body: SharedBody | None = None
        """Reads new tokens only; None until the first session is opened, and for bodies that cannot."""
        self._probed = False
        self._rope_limit = rope_limit(body.config.get_text_config(decoder=True))
        self.tokens_scored = 0
        self.num_calls = 0

    def use(self, config: RunConfig) -> None:
        """Take what the arguments say of caches; ``rewards.base.make_reward`` calls it for every family."""
        self.cache = config.reward_cache
        self.allowance = Allowance.of(config)

    def open(self, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
        """A session that reads only what is new at each look, where the body allows it (encoders never do)."""
        if self.cache == "off" or self.head is None:
            return super().open(conversation, response_prefix)
        if not self._probed:
            shared = SharedBody(self.body)
            with clear_error(f"reward_model={self.name!r} was tried out", _SMALLER):
                reason = twice(shared.probe)
            self._probed = True
            if reason is None:
                self.shared_body = shared
            else:
                self.renderer.warn("cache", f"every look is read in full, which is slower ({reason}).")
        if self.shared_body is None:
            return super().open(conversation, response_prefix)
        return CachedSession(self, conversation, response_prefix)

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

    def score_inputs(self, inputs: Sequence[Input]) -> dict[Input, float]:
        """Scores of whole inputs, each read once from its first token on."""
        # sorted by length, ids second: least padding, and the split does not hang on which row came first
        unique = sorted(set(inputs), key=lambda entry: (len(entry.ids), entry))
        scores: dict[Input, float] = {}
        for batch in self._batches(unique):
            scores.update(zip(batch, self._forward_or_halves(batch), strict=True))
        return scores

    def _batches(self, unique: Sequence[Input]) -> Iterator[list[Input]]:
        """Batches by length; beyond the rope limit each row alone, as its angles hang on the longest of its batch."""
        limit = self._rope_limit
        short = [entry for entry in unique if limit is None or len(entry.ids) <= limit]
        yield from in_batches(short, lambda entry: len(entry.ids), self.max_padded_tokens)
        yield from ([entry] for entry in unique[len(short) :])

    def _forward_or_halves(self, batch: list[Input]) -> list[float]:
        return in_halves(batch, self._forward, lambda entry: self.out_of_memory(len(entry.ids)))

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
            f"reward_model={self.name!r}: one sequence of {num_tokens} tokens does not fit in memory.",
            hint=_SMALLER,
        )


def linear_head(linear: torch.nn.Linear) -> Head:
    """A linear layer with one output, in float32, at the only position read."""
    exact = float32(linear)

    def score(hidden: Tensor, mask: Tensor) -> Tensor:
        del mask  # one position in every row
        scores: Tensor = exact(hidden[:, 0])[:, 0]
        return scores

    return score


def float32(module: torch.nn.Module) -> torch.nn.Module:
    """A float32 copy of a (small) module in eval mode: the weights of a head."""
    return copy.deepcopy(module).float().eval().requires_grad_(False)
