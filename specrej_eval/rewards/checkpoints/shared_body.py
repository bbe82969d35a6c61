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

from specrej_eval.config.engines import CPP
from specrej_eval.kv import shared_prefix
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.experts import expert_configs, padded_experts
from specrej_eval.kv.models import has_odd_widths, obstacle, our_attention, reset_rotary, rope_limit, windows_missing
from specrej_eval.kv.native.fused import FusedOperators
from specrej_eval.kv.packed import PackedWeights
from specrej_eval.kv.prefill import PromptReader
from specrej_eval.kv.probe import difference, may_be_bits, probe_ids, tried
from specrej_eval.kv.ragged import ExtendStep, NewTokens, RaggedPool
from specrej_eval.kv.shared_prefix import ROW_ALIGN
from specrej_eval.kv.steps import SDPA


class SharedBody:
    """A decoder without its head, read through our attention.

    Args:
        body: a transformers model whose first output are hidden states, on its device.
        attention: who computes attention.
    """

    def __init__(self, body: Any, attention: AttentionBackend = SDPA) -> None:
        self.body = body
        parameter = next(body.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self._text_config = body.config.get_text_config(decoder=True)
        self._num_layers = int(self._text_config.num_hidden_layers)
        self._cache_argument = shared_prefix.cache_argument(body)
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self._windows: dict[int, int | None] = {}
        on_cpu = self.device.type == "cpu"
        self.align = ROW_ALIGN if on_cpu else 1
        """What pools' capacities and padded lengths are multiples of."""
        self.limit: int | None = rope_limit(self._text_config)
        """Longer inputs cannot be cached: their rotary angles depend on their length."""
        self._row_align = self.align * (1 + (on_cpu and has_odd_widths(body)))
        """What forward passes are padded to a multiple of, in tokens."""
        self._expert_configs = expert_configs(body) if on_cpu else []
        self._packed = PackedWeights(body, kernels=attention.name == CPP)
        self._fused = FusedOperators(body, wanted=attention.name == CPP)
        self.exact = False
        """Whether what is read of a prompt is the same bits whatever is read with it; tried out by ``probe``."""
        self.reader = PromptReader(
            lambda ids, positions, wanted: self._forward(ids, positions[0]),
            self.device,
            last_only=False,
            align=self._row_align,
            shares=self.limit is None,
        )
        self.reader.attention = self._attention = attention

    @contextmanager
    def active(self, *, unchanged: bool = False) -> Iterator[None]:
        """Our attention is the body's only in here.

        Args:
            unchanged: the weights are those of the last time (see ``PackedWeights.active``).
        """
        reset_rotary(self.body, self.device)
        with (
            padded_experts(self._expert_configs),
            self._packed.active(unchanged=unchanged),
            self._fused.active(),
            our_attention(self.body),
        ):
            yield

    def prefill(self, prompts: Sequence[Sequence[int]], *, share: bool = True) -> list[tuple[Prefix, Tensor]]:
        """Read what all rows of a prompt share, once; what prompts have in common as well. Inside ``active`` only.

        Args:
            share: see ``PromptReader.read``.

        Returns:
            Of each its KV, and its hidden states (tokens, hidden size).
        """
        return self.reader.read(prompts, share=share)

    def new_tokens(
        self,
        prefix: Prefix,
        rows: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        *,
        pool: RaggedPool | None,
        first: int = 0,
    ) -> NewTokens:
        """What ``extend`` is to read of one prompt. See ``NewTokens`` for the arguments."""
        kwargs: dict[str, Any] = {"align": self.align, "device": self.device, "attention": self._attention}
        return NewTokens(prefix, rows, starts, pool=pool, first=first, **kwargs)

    def extend(self, parts: Sequence[NewTokens]) -> list[tuple[Tensor, ...]]:
        """Read new tokens of rows of some prompts. Inside ``active`` only.

        Returns:
            For each prompt, of each row its hidden states (new tokens, hidden size).
        """
        packed = [token for part in parts for token in part.ids]
        missing = -len(packed) % self._row_align
        ids = torch.tensor([[*packed, *[packed[-1]] * missing]], device=self.device)  # (1, tokens padded)
        positions = torch.cat([*(part.positions for part in parts), parts[-1].positions[-1:].expand(missing)])
        with shared_prefix.running(ExtendStep(parts)) as step:
            hidden = self._forward(ids, positions)
        self._windows = step.windows
        split = hidden[: len(packed)].split([len(part.ids) for part in parts])
        return [part.split(mine) for part, mine in zip(parts, split, strict=True)]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        cache = shared_prefix.SharedPrefixCache(self._num_layers)
        kwargs: dict[str, Any] = {self._cache_argument: cache, "use_cache": True}
        if self._takes_positions:
            kwargs["position_ids"] = positions[None]
        hidden: Tensor = self.body(input_ids=ids, **kwargs)[0]  # (1, tokens, hidden size)
        return hidden[0]

    def probe(self) -> str | None:
        """Why this body cannot be cached: what went wrong when it was tried; None if it can."""
        reason = obstacle(self.body) or tried(self._mismatch)
        if reason is None and may_be_bits(self.device, self.dtype):
            self.exact = tried(self._company) is None
        return reason

    def _mismatch(self) -> str | None:
        error, largest = self._try_out()
        reason = difference(error, largest, self.dtype, "hidden states")
        if reason is None and windows_missing(self._text_config, self._windows):
            return "its sliding window never reaches the attention function"
        return reason

    def _try_out(self) -> tuple[float, float]:
        """Two looks at rows of unequal lengths, the second over other tokens at the end of the first; two prompts.

        Returns:
            Largest error and largest value of the last hidden states.
        """
        prompts = self._probe_prompts()
        error = largest = torch.zeros((), device=self.device)
        found = self._probe_looks(prompts)
        for place, (shared, first, stay, second) in enumerate(prompts):
            for row, (got_first, got_second) in enumerate(zip(*found[place], strict=True)):
                whole = [*shared, *first[row]], [*shared, *first[row][: stay[row]], *second[row]]
                for got, ids in zip((got_first, got_second), whole, strict=True):
                    want = self.body(input_ids=torch.tensor([ids], device=self.device), use_cache=False)[0][0, -1]
                    error = torch.maximum(error, (got[-1] - want).abs().max())  # unlike ``max``, it keeps a NaN
                    largest = torch.maximum(largest, want.abs().max())
        return float(error), float(largest)

    def _company(self) -> str | None:
        prompts = self._probe_prompts()
        together = self._probe_looks(prompts)
        for prompt, mine in zip(prompts, together, strict=True):
            [alone] = self._probe_looks([prompt])
            for look, other in zip(mine, alone, strict=True):
                if not all(torch.equal(one, two) for one, two in zip(look, other, strict=True)):
                    return "a prompt's bits depend on its company"
        return None

    def _probe_prompts(self) -> list[_Probe]:
        ids = tuple(probe_ids(64, int(self._text_config.vocab_size)))
        return [
            (list(ids[:12]), [ids[12:16], ids[16:22], ids[22:23]], [3, 5, 1], [ids[30:37], ids[40:42], ids[50:54]]),
            (list(ids[3:8]), [ids[9:30]], [7], [ids[40:43]]),
        ]

    def _probe_looks(self, prompts: Sequence[_Probe]) -> list[list[tuple[Tensor, ...]]]:
        """Each prompt's two looks: of each row its hidden states."""
        with self.active():
            read = self.prefill([shared for shared, *_ in prompts], share=False)
            pools = [RaggedPool(len(first), capacity=32, align=self.align) for _, first, *_ in prompts]
            looks = []
            for place in (0, 1):
                parts = []
                for (prefix, _), (_, first, stay, second), pool in zip(read, prompts, pools, strict=True):
                    starts = [count if place else 0 for count in stay]
                    rows = [old[:count] + new for old, count, new in zip(first, stay, second, strict=True)]
                    parts.append(self.new_tokens(prefix, rows if place else first, starts, pool=pool))
                looks.append(self.extend(parts))
        return [list(both) for both in zip(*looks, strict=True)]


_Probe = tuple[list[int], list[tuple[int, ...]], list[int], list[tuple[int, ...]]]
"""A prompt, its rows' first tokens, how many of them stay, and what comes behind these."""
