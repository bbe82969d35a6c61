"""Forward passes of a reward model's body behind a shared prefix: hidden states of new tokens only.

Our attention stands in for the model's own, as in the engine (``specrej_eval.kv``). Whether a body gives the same
hidden states that way is not assumed but tried out: ``probe`` compares them with plain forward passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv import shared_prefix
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.models import obstacle, our_attention, reset_rotary, rope_limit, windows_missing
from specrej_eval.kv.prefill import PromptReader
from specrej_eval.kv.probe import difference, probe_ids, tried
from specrej_eval.kv.ragged import ExtendStep, RaggedPool
from specrej_eval.kv.shared_prefix import ROW_ALIGN


class SharedBody:
    """A decoder without its head, read through our attention.

    Args:
        body: a transformers model whose first output are hidden states, on its device.
    """

    def __init__(self, body: Any) -> None:
        self.body = body
        parameter = next(body.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self._text_config = body.config.get_text_config(decoder=True)
        self._num_layers = int(self._text_config.num_hidden_layers)
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self._windows: dict[int, int | None] = {}
        self._on_cpu = self.device.type == "cpu"
        self.align = ROW_ALIGN if self._on_cpu else 1
        """What pools' capacities and padded lengths are multiples of."""
        self.limit: int | None = rope_limit(self._text_config)
        """Longer inputs cannot be cached: their rotary angles depend on their length."""
        self.reader = PromptReader(
            lambda ids, positions, wanted: self._forward(ids, positions[0]),
            self.device,
            last_only=False,
            align=self.align,
            packs=False,
            shares=self.limit is None,
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Our attention is the body's only in here."""
        reset_rotary(self.body, self.device)
        with our_attention(self.body):
            yield

    def prefill(self, prompts: Sequence[Sequence[int]], *, share: bool = True) -> list[tuple[Prefix, Tensor]]:
        """Read what all rows of a prompt share, once; what prompts have in common as well. Inside ``active`` only.

        Args:
            share: see ``PromptReader.read``.

        Returns:
            Of each its KV, and its hidden states (tokens, hidden size).
        """
        return self.reader.read(prompts, share=share)

    def extend(
        self,
        prefix: Prefix,
        starts: Sequence[int],
        new: Sequence[Sequence[int]],
        *,
        pool: RaggedPool | None,
        first: int = 0,
    ) -> tuple[Tensor, ...]:
        """Read new tokens of rows of unequal lengths. Inside ``active`` only. See ``ExtendStep`` for the arguments.

        Returns:
            Each row's hidden states, (new tokens, hidden size).
        """
        counts = [len(ids) for ids in new]
        step = ExtendStep(prefix, starts, counts, pool=pool, first=first, align=self.align, device=self.device)
        packed = [token for ids in new for token in ids]
        missing = -len(packed) % ROW_ALIGN if self._on_cpu else 0
        ids = torch.tensor([[*packed, *[packed[-1]] * missing]], device=self.device)  # (1, tokens padded)
        positions = torch.cat([step.positions, step.positions[-1:].expand(missing)])
        with shared_prefix.running(step):
            hidden = self._forward(ids, positions)
        self._windows = step.windows
        split: tuple[Tensor, ...] = hidden[: len(packed)].split(counts)
        return split

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        cache = shared_prefix.SharedPrefixCache(self._num_layers)
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self._takes_positions:
            kwargs["position_ids"] = positions[None]
        hidden: Tensor = self.body(input_ids=ids, **kwargs)[0]  # (1, tokens, hidden size)
        return hidden[0]

    def probe(self) -> str | None:
        """Why this body cannot be cached: what went wrong when it was tried; None if it can."""
        return obstacle(self.body) or tried(self._mismatch)

    def _mismatch(self) -> str | None:
        error, largest = self._try_out()
        reason = difference(error, largest, self.dtype, "hidden states")
        if reason is None and windows_missing(self._text_config, self._windows):
            return "its sliding window never reaches the attention function"
        return reason

    def _try_out(self) -> tuple[float, float]:
        """Two looks at rows of unequal lengths, the second over other tokens at the end of the first.

        Returns:
            Largest error and largest value of the last hidden states.
        """
        vocab = int(self._text_config.vocab_size)
        ids = probe_ids(64, vocab)
        shared, first, second = ids[:12], [ids[12:16], ids[16:22], ids[22:23]], [ids[30:37], ids[40:42], ids[50:54]]
        again = [3, 5, 1]  # tokens of the first look that stay
        error = largest = 0.0
        wanted = []
        for index in range(3):
            wanted += [[*shared, *first[index]], [*shared, *first[index][: again[index]], *second[index]]]
        want = [
            self.body(input_ids=torch.tensor([row], device=self.device), use_cache=False)[0][0, -1] for row in wanted
        ]
        with self.active():
            [(prefix, _)] = self.prefill([shared], share=False)
            pool = RaggedPool(3, capacity=16, align=self.align)
            got_first = self.extend(prefix, [0, 0, 0], first, pool=pool)
            got_second = self.extend(prefix, again, second, pool=pool)
        for index in range(3):
            for got, expected in ((got_first[index], want[2 * index]), (got_second[index], want[2 * index + 1])):
                error = max(error, float((got[-1] - expected).abs().max()))
                largest = max(largest, float(expected.abs().max()))
        return error, largest
