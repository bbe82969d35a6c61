"""The language model's forward passes: the only file that knows transformers' model classes.

Three paths, the best that gives right numbers is taken (a probe at start compares logits with a plain forward):

- ``shared_prefix``: our attention, the prompt's KV shared by all rows;
- ``replicated``: the model's own attention and cache, the prompt's KV copied for every row (linear-attention hybrids,
  alibi, models without an attention interface);
- ``recompute``: no cache at all, every step reads the whole sequence (models whose cache cannot be copied).

On a CPU a row's bits depend on how many rows a matmul has, so every path pads its rows, and so do experts. Whether that
is enough for the model at hand is measured at start: ``ModelRunner.promises``.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from specrej_eval.config.engines import CPP
from specrej_eval.engines.base import Promise
from specrej_eval.engines.transformers.groups import Group, padded
from specrej_eval.kv import shared_prefix
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.experts import expert_configs, padded_experts
from specrej_eval.kv.graphs import WORTH, DecodeGraphs
from specrej_eval.kv.models import (
    has_hooks,
    has_odd_widths,
    obstacle,
    our_attention,
    reset_rotary,
    rope_limit,
    windows_missing,
)
from specrej_eval.kv.native.fused import FusedOperators
from specrej_eval.kv.native.layers import FusedLayers
from specrej_eval.kv.packed import PackedWeights
from specrej_eval.kv.prefill import PromptReader, drained
from specrej_eval.kv.probe import difference, may_be_bits, probe_ids, tried
from specrej_eval.kv.shared_prefix import ROW_ALIGN
from specrej_eval.kv.steps import SDPA, DecodeStep, Step

logger = logging.getLogger(__name__)

Path = Literal["shared_prefix", "replicated", "recompute"]
PATHS: tuple[Path, ...] = ("shared_prefix", "replicated", "recompute")
_PROBE_TOKENS = 12
HALF_ALIGN = 8
_MANY_ROWS = 33
"""Rows that the probe of promises decodes together, and some of them alone: 48 after padding, and 16."""
_FEW_ROWS = ([0], [_MANY_ROWS - 1, 5, 17, 9, 26, 12, 3, 30, 21])


class ModelRunner:
    """Prefill and decode steps of one causal language model.

    Args:
        model: a transformers causal LM in eval mode. Its attention implementation is changed only inside ``active``.
        path: force a path; None = the first that the probe finds right.
        attention: who computes attention on the ``shared_prefix`` path; None = ``sdpa``, which also stands in where
            the probe finds that its logits are not the model's.
        graphs: replay decode steps as CUDA graphs, where the model and its attention can (``kv/graphs.py``).
    """

    def __init__(
        self,
        model: Any,
        *,
        path: Path | None = None,
        attention: AttentionBackend | None = None,
        graphs: bool = False,
    ) -> None:
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        text_config = model.config.get_text_config(decoder=True)
        self._text_config = text_config
        self._num_layers = int(text_config.num_hidden_layers)
        self._vocab = int(text_config.vocab_size)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self._cache_argument = shared_prefix.cache_argument(model)
        self._exchanged: Any = None
        """What the model's attention was, while ours is in its place."""
        self._row_align = _row_align(model, self.dtype) if self.device.type == "cpu" else 1
        self._graphs: DecodeGraphs | None = None
        kernels = attention is not None and attention.name == CPP
        self._packed = PackedWeights(model, kernels=kernels)
        self._fused = FusedOperators(model, wanted=kernels)
        self._layers = FusedLayers(model, wanted=kernels)
        self._expert_configs = expert_configs(model) if self.device.type == "cpu" else []
        self.reader = PromptReader(
            self._prompt_logits,
            self.device,
            last_only=True,
            align=self._row_align,
            packs=False,
            shares=rope_limit(text_config) is None,
        )
        if attention is not None and attention.name != SDPA.name:
            self.reader.attention = self._fitting(attention)
        self.path: Path = path or self._probe()
        self.promises: Promise = self._probe_promise()
        """What holds for this model on this device, dtype and number of threads."""
        self.reader.packs = self.path == "shared_prefix" and self._takes_positions and tried(self._packed_error) is None
        if graphs:
            self._probe_graphs()

    # which path, and what it promises

    def _probe(self) -> Path:
        reasons: list[str] = []
        for path in PATHS:
            reason = obstacle(self.model) if path == "shared_prefix" else None
            if reason is None:
                reason = tried(partial(self._probe_error, path))
                if reason is not None:
                    reason = self._without_kernels(path, reason)
            if reason is None:
                if path != "shared_prefix":
                    logger.warning(
                        "%s is decoded on the slower %s path, with the same results (%s).",
                        type(self.model).__name__,
                        path,
                        "; ".join(reasons),
                    )
                return path
            reasons.append(f"{path}: {reason}")
        raise RuntimeError(f"cannot decode {type(self.model).__name__}: {'; '.join(reasons)}")

    def _probe_graphs(self) -> None:
        """Replay steps of this model from here on, if that gives its logits; says so if it cannot be done."""
        positions = getattr(self._text_config, "max_position_embeddings", None) or 0
        name = type(self.model).__name__
        self._graphs = DecodeGraphs(self._within, self._unrecordable, name=name, positions=positions)
        reason = self._unrecordable()
        if reason is None:
            reason = tried(partial(self._probe_error, "shared_prefix", ahead=WORTH))
            if reason is None and not self._graphs.taken:
                reason = "none was replayed when the model was tried"
        self._graphs.refuse(reason)

    def _unrecordable(self) -> str | None:
        """Why a decode step cannot be done again without its Python, as far as that can be seen from outside."""
        if self.path != "shared_prefix":
            return f"it is decoded on the {self.path} path"
        if self.attention.name != SDPA.name:
            return f"its attention is computed by {self.attention.name}"
        if not self._takes_positions:
            return "it takes no position_ids"
        if {each.device for each in self.model.parameters()} != {self.device}:
            return "it does not lie on one device as a whole"
        if has_hooks(self.model):
            return "somebody's hooks wait for its forward passes"
        return None

    @property
    def replays(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs where that pays."""
        return self._graphs is not None and self._graphs.off is None

    @property
    def packed_bytes(self) -> int:
        """Memory that copies of the weights take, for a CPU's kernels; 0 = there are none."""
        return self._packed.nbytes

    @property
    def products(self) -> str:
        """Whose kernels multiply with the weights of linear layers: ``cpp`` (ours), ``onednn`` or ``torch``."""
        return self._packed.by or "torch"

    @property
    def attention(self) -> AttentionBackend:
        """Who computes attention on the ``shared_prefix`` path."""
        return self.reader.attention

    def _without_kernels(self, path: Path, reason: str) -> str | None:
        """The reason against a path if torch computes all of it; says so if that is none, and stays with it."""
        failed, fused, packed = self.attention, self._fused, self._packed
        if failed.name == SDPA.name and not len(fused) and packed.by != CPP:
            return reason
        self.reader.attention, self._fused = SDPA, FusedOperators(self.model, wanted=False)
        self._packed = PackedWeights(self.model)
        again = tried(partial(self._probe_error, path))
        if again is None and path == "shared_prefix":
            self._say_unused(failed, reason)
        elif again is None:
            logger.warning("C++ kernels are not used for %s (%s).", type(self.model).__name__, reason)
        else:  # it was not for them: another path may have use for them
            self.reader.attention, self._fused, self._packed = failed, fused, packed
        return again

    def _fitting(self, attention: AttentionBackend) -> AttentionBackend:
        """``attention``, or ``sdpa`` where it would be left all the work."""
        width = getattr(self._text_config, "head_dim", None)
        if width is None:
            width = self._text_config.hidden_size // self._text_config.num_attention_heads
        reason = attention.why_not(self.device, self.dtype, width)
        if reason is None:
            return attention
        if attention.name != CPP:  # which auto takes everywhere, and whose absence costs little
            self._say_unused(attention, reason)
        return SDPA

    def _say_unused(self, attention: AttentionBackend, reason: str) -> None:
        told = "attention_backend=%s is not used for %s (%s): sdpa computes its attention."
        logger.warning(told, attention.name, type(self.model).__name__, reason)

    def _probe_error(self, path: Path, *, ahead: int = 0) -> str | None:
        """Decode a few forced tokens on ``path`` with a row dropped on the way; None if the logits are the model's.

        Args:
            ahead: tokens that seem to lie ahead.
        """
        rows, steps = 3, 4
        ids = torch.tensor(probe_ids(_PROBE_TOKENS + rows * steps, self._vocab), device=self.device)
        head, forced = ids[:_PROBE_TOKENS], ids[_PROBE_TOKENS:].reshape(rows, steps)
        whole = torch.cat([head.expand(rows, -1), forced], 1)
        want = self.model(whole, use_cache=False).logits[:, _PROBE_TOKENS - 1 :]
        self.path = path
        with self.active():
            prefix = self.prefill(head.tolist())
            assert prefix.logits is not None
            group = Group(prefix, list(range(rows)), capacity=steps + ahead, device=self.device)
            group.target = ahead
            error = (prefix.logits - want[:1, 0]).abs().max()
            for step in range(steps):
                if step == 2:
                    group.drop([0])
                live = torch.tensor(group.row_ids, device=self.device)
                logits = self._forced_step(group, forced[live, step])
                error = torch.maximum(error, (logits - want[live, step + 1]).abs().max())
        reason = difference(float(error), float(want.abs().max()), self.dtype, "logits")
        if reason is None and path == "shared_prefix" and windows_missing(self._text_config, self.reader.windows):
            return "its sliding window never reaches the attention function"
        return reason

    def _forced_step(self, group: Group, tokens: Tensor) -> Tensor:
        """Feed tokens that nobody drew, (rows,); (rows, vocab) logits."""
        group.rows.tokens[:, group.length] = tokens.to(torch.int32)
        logits = self.step([group], tokens)
        group.advance()
        return logits

    def _probe_promise(self) -> Promise:
        """Decode the same rows in large and in small company. Only float32 on a CPU has a chance, or is tried.

        On two threads some CPUs compute torch's own attention with other bits on the second thread: the plain paths
        then show it here, and only the shared-prefix path keeps the promise.
        """
        if not may_be_bits(self.device, self.dtype):
            return "uniforms"
        return "bits" if tried(self._rows_differ) is None else "uniforms"

    def _rows_differ(self) -> str | None:
        together = self._probe_rows(range(_MANY_ROWS))
        same = all(
            torch.equal(mine, together[:, row])
            for rows in _FEW_ROWS
            for row, mine in zip(rows, self._probe_rows(rows).unbind(1), strict=True)
        )
        return None if same else "a row's bits depend on its company"

    def _probe_rows(self, rows: Sequence[int], steps: int = 2) -> Tensor:
        """(steps, rows, vocab) logits of forced tokens, which differ from row to row."""
        forced = (
            torch.tensor(list(rows))[:, None] * 31 + torch.arange(steps) * 7919 + 5
        ) % self._vocab  # (rows, steps)
        with self.active():
            prefix = self.prefill(probe_ids(_PROBE_TOKENS, self._vocab))
            group = Group(prefix, list(rows), capacity=steps, device=self.device)
            return torch.stack([self._forced_step(group, forced[:, step]) for step in range(steps)])

    def _packed_error(self) -> str | None:
        """What is wrong with reading prompts together: their numbers, or their bits where those are promised."""
        ids = probe_ids(4 * _PROBE_TOKENS, self._vocab)
        prompts = [ids[:_PROBE_TOKENS], ids[5:8], ids[_PROBE_TOKENS:]]
        self.reader.packs = True
        with self.active():
            together = self._read(prompts, share=False)
            alone = [self.prefill(prompt, "shared_prefix") for prompt in prompts]
        for mine, other in zip(together, alone, strict=True):
            assert mine.logits is not None and other.logits is not None
            pairs = [(mine.logits, other.logits), *zip(mine.keys.values(), other.keys.values(), strict=True)]
            if self.promises == "bits":
                if not all(torch.equal(one, two) for one, two in pairs):
                    return "a prompt's bits depend on its company"
            elif reason := difference(
                float((mine.logits - other.logits).abs().max()), float(other.logits.abs().max()), self.dtype, "logits"
            ):
                return reason
        return None

    def path_for(self, prompt_tokens: int, max_gen_toks: int) -> Path:
        """The path for one prompt: those that may outgrow ``rope_limit`` are recomputed."""
        original = rope_limit(self._text_config)
        if original is not None and prompt_tokens + max_gen_toks > original and self.path != "recompute":
            return "recompute"
        return self.path

    # forward passes

    @contextmanager
    def active(self, *, unchanged: bool = False) -> Iterator[None]:
        """Our attention is the model's only in here, so the same object still serves log-likelihood requests.

        Args:
            unchanged: the weights are those of the last time (see ``PackedWeights.active``).
        """
        reset_rotary(self.model, self.device)
        packed = self._packed.active(unchanged=unchanged)
        layers = self._layers.active(self._packed, self._fused)
        graphs = nullcontext() if self._graphs is None else self._graphs.active()
        with padded_experts(self._expert_configs), packed, self._fused.active(), layers, graphs:
            if self.path != "shared_prefix":
                yield
                return
            with our_attention(self.model) as self._exchanged:
                try:
                    yield
                finally:
                    self._exchanged = None

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """The model's own attention inside ``active``: for prompts that are recomputed beside others that share."""
        if self._exchanged is None:
            yield
            return
        self.model.set_attn_implementation(self._exchanged)
        try:
            yield
        finally:
            self.model.set_attn_implementation(shared_prefix.NAME)

    def _recompute(self, ids: Tensor) -> Tensor:
        """Logits of the last of ``ids`` (rows, tokens), by a plain forward pass of the whole sequence."""
        with self._own_attention():
            reset_rotary(self.model, self.device)
            try:
                return self._forward(ids, None, torch.arange(ids.shape[1], device=self.device)[None])
            finally:
                reset_rotary(self.model, self.device)

    def prefill(self, token_ids: Sequence[int], path: Path | None = None) -> Prefix:
        """Read a prompt once, by itself. The prefix holds its KV and the logits of its last token."""
        path = path or self.path
        if path == "shared_prefix":
            return self._read([token_ids], share=False)[0]
        ids = torch.tensor([list(token_ids)], device=self.device)  # (1, tokens)
        prefix = Prefix(length=ids.shape[1], row_align=self._row_align, token_ids=ids[0])
        if path == "recompute":
            logits = self._recompute(ids)
        else:
            prefix.cache = DynamicCache(config=self.model.config)
            positions = torch.arange(ids.shape[1], device=self.device)[None]
            logits = self._forward(ids, prefix.cache, positions)
        prefix.logits = logits.clone()  # (1, vocab); a view would keep the whole prompt's logits alive
        return prefix

    def prefill_all(self, prompts: Sequence[tuple[Sequence[int], Path]]) -> list[Prefix]:
        """Read prompts, each on its path; those that share read what they have in common once. See ``prefill``."""
        return drained(self.prefill_turns(prompts))

    def prefill_turns(self, prompts: Sequence[tuple[Sequence[int], Path]]) -> Generator[int, None, list[Prefix]]:
        """``prefill_all`` in parts (see ``PromptReader.turns``). Prompts on the plain paths are read whole: their
        attention is the model's own, whose bits depend on how much is read at once.

        Yields:
            Tokens that went through the model; outside of ``next``, it need not be ``active``.
        """
        read = yield from self.reader.turns([ids for ids, path in prompts if path == "shared_prefix"])
        shared = iter(_with_logits(read))
        prefixes = []
        for ids, path in prompts:
            if path == "shared_prefix":
                prefixes.append(next(shared))
                continue
            prefixes.append(self.prefill(ids, path))
            yield len(ids)
        return prefixes

    def _read(self, prompts: Sequence[Sequence[int]], *, share: bool) -> list[Prefix]:
        return _with_logits(self.reader.read(prompts, share=share))

    def _prompt_logits(self, ids: Tensor, positions: Tensor, wanted: Tensor | None) -> Tensor:
        """See ``prefill.Forward``."""
        return self._forward(ids, shared_prefix.SharedPrefixCache(self._num_layers), positions, wanted)

    def step(self, groups: Sequence[Group], tokens: Tensor) -> Tensor:
        """Feed every row its last token.

        Args:
            groups: rows in batch order; their pools get this position's KV (``Group.advance`` makes it count).
            tokens: (rows of all groups,), int64.

        Returns:
            (rows, vocab) logits in the model's dtype.
        """
        if all(group.pool is not None for group in groups):
            return self._step_together(groups, tokens)
        if self._graphs is not None:
            self._graphs.forget()  # a prompt that is recomputed has its rotary embedding made anew
        parts = []
        first = 0
        for group in groups:
            mine = tokens[first : first + group.num_rows]
            parts.append(self._step_shared([group], mine) if group.pool is not None else self._step_plain(group, mine))
            first += group.num_rows
        return torch.cat(parts)

    def _step_together(self, groups: Sequence[Group], tokens: Tensor) -> Tensor:
        """All that decodes is in one step, which may be replayed."""
        if self._graphs is None:
            return self._step_shared(groups, tokens)
        pools = [(group.prefix, group.pool) for group in groups if group.pool is not None]
        ahead = min(group.target - group.num_sampled for group in groups)
        return self._graphs.step(pools, tokens, ahead, lambda: self._step_shared(groups, tokens))

    def _step_shared(self, groups: Sequence[Group], tokens: Tensor) -> Tensor:
        rows = tokens.shape[0]
        positions = padded(torch.cat([group.positions() for group in groups]), self._row_align)
        tokens = padded(tokens, self._row_align)
        pools = [(group.prefix, group.pool) for group in groups if group.pool is not None]
        return self._within(DecodeStep(pools, self.attention), tokens[:, None], positions[:, None])[:rows]

    def _within(self, step: Step, tokens: Tensor, positions: Tensor) -> Tensor:
        """(rows, vocab) logits of a step; tokens and positions are (rows, 1)."""
        with shared_prefix.running(step):
            return self._forward(tokens, shared_prefix.SharedPrefixCache(self._num_layers), positions)

    def _step_plain(self, group: Group, tokens: Tensor) -> Tensor:
        rows, tokens = tokens.shape[0], padded(tokens, self._row_align)
        if group.prefix.cache is not None:
            # a step that fails half way leaves a cache that holds it in some layers: nobody may find that one
            cache, group.cache = group.cache or self._replicated(group), None
            logits = self._forward(tokens[:, None], cache, padded(group.positions(), self._row_align)[:, None])
            group.cache = cache
            return logits[:rows]
        assert group.prefix.token_ids is not None
        head = group.prefix.token_ids.expand(tokens.shape[0], -1)
        own = padded(group.rows.tokens[:, : group.length], self._row_align).to(head.dtype)
        return self._recompute(torch.cat([head, own, tokens[:, None]], dim=1))[:rows]

    def _replicated(self, group: Group) -> Any:
        """The prompt's cache for every row. The rows' own tokens are fed again, should an earlier cache be lost."""
        cache = copy.deepcopy(group.prefix.cache)
        own = padded(group.rows.tokens[:, : group.length], self._row_align)
        positions = padded(group.positions(), self._row_align)[:, None]
        # not batch_repeat_interleave, which layers with a recurrent state lack
        cache.reorder_cache(torch.zeros(own.shape[0], dtype=torch.int64, device=self.device))
        for place in range(group.length):
            self._forward(own[:, place : place + 1].to(torch.int64), cache, positions - group.length + place)
        return cache

    def _forward(self, ids: Tensor, cache: Any, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits of each row's last token, (rows, vocab); or of one row at the places ``wanted``, (places, vocab)."""
        kwargs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            kwargs[self._cache_argument] = cache
        if self._takes_positions:
            kwargs["position_ids"] = positions
        if self._takes_logits_to_keep:
            kwargs["logits_to_keep"] = 1 if wanted is None else wanted
        logits: Tensor = self.model(ids, **kwargs).logits
        if wanted is None:
            return logits[:, -1]
        return logits[0] if self._takes_logits_to_keep else logits[0, wanted]


def _with_logits(found: Sequence[tuple[Prefix, Tensor]]) -> list[Prefix]:
    for prefix, logits in found:
        prefix.logits = logits.clone()  # (1, vocab); a view would keep those of all prompts alive
    return [prefix for prefix, _ in found]


def _row_align(model: Any, dtype: torch.dtype) -> int:
    """What batches are padded to on a CPU. (An odd vocabulary is no matter: nothing of that kind comes behind it.)

    In half precision no bits are promised; there are only so many sizes, as each has kernels of its own to be made.
    """
    if dtype != torch.float32:
        return HALF_ALIGN
    return 2 * ROW_ALIGN if has_odd_widths(model, apart_from=model.get_output_embeddings()) else ROW_ALIGN
