"""What every attention backend must do, as cases with answers: the tests run them, and `doctor --attention` does on the
user's device.

A case goes the way a run goes: prompt and pools are filled token by token, ``PrefillStep`` or ``DecodeStep`` attends,
and the answer is computed in float64, one row and one head at a time, from nothing but the definition of attention.
Memory of a pool that holds no token is NaN, so that a kernel that reads it is found out.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams
from specrej_eval.kv.cache import Prefix, SuffixPool
from specrej_eval.kv.memory import is_out_of_memory
from specrej_eval.kv.steps import DecodeStep, PrefillStep, PromptPart

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest error a backend may make, as a share of the largest value of the answer: a few roundings of the dtype. A
wrong kernel (a log-sum-exp in the wrong base, a window off by one) is off by much more."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention, with its shape and what its layer asks for."""

    name: str
    rows: int = 5
    """Of each group; decoding only."""
    kv_heads: int = 2
    groups: int = 3
    head_dim: int = 64
    value_dim: int | None = None
    prefix: int = 37
    """Tokens; of a prompt that is read, those of the chunks before."""
    suffix: int = 9
    """Tokens of each row, the new one included; of a prompt that is read, those of the chunk."""
    prompt: bool = False
    """A chunk of a prompt is read; else a token is decoded."""
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    moved: bool = False
    """The pool was larger once: it lies in memory with holes, and its rows are not in the order they came in."""
    scattered: bool = False
    """Keys lie token by token, values dimension by dimension."""
    grows: bool = False
    """The pool's memory follows its length in steps, as on a CPU, and shows a little of what is behind the tokens."""
    in_company: bool = False
    """Another group with another prompt is in the batch, and padding behind it."""


CASES = (
    Case("plain"),
    Case("first step: the suffix is the new token", suffix=1),
    Case("no prefix", prefix=0),
    Case("no prefix and one token", prefix=0, suffix=1),
    Case("prefix of one token", prefix=1),
    Case("one row", rows=1),
    Case("one row, one token, one head", rows=1, kv_heads=1, groups=1, prefix=1, suffix=1),
    Case("many rows", rows=67, kv_heads=1, prefix=130, suffix=4),
    Case("long prefix", rows=3, prefix=700),
    Case("long suffix", rows=2, prefix=20, suffix=700),
    Case("prefix and suffix of whole tiles", prefix=128, suffix=64),
    Case("one token more than whole tiles", prefix=129, suffix=65, groups=4, head_dim=128),
    Case("one query head a kv head", kv_heads=4, groups=1),
    Case("eight query heads a kv head", groups=8),
    Case("one kv head for all", kv_heads=1, groups=7),
    Case("pool that was cut", moved=True),
    Case("pool that was cut, in company", moved=True, in_company=True, groups=4),
    Case("keys and values in other layouts", scattered=True),
    Case("pool that grows", grows=True),
    Case("pool that grows, first step", grows=True, suffix=1, prefix=0),
    Case("pool that grows, just full", grows=True, suffix=16),
    Case("pool that grows and was cut, with a window", grows=True, suffix=19, window=25, moved=True, in_company=True),
    Case("pool that grows, window in the suffix", grows=True, suffix=19, window=11, softcap=1.5, sinks=True),
    Case("other scale", scale=0.3),
    Case("window ends in the prefix", window=17),
    Case("window ends before the prefix", window=46),
    Case("window is prefix and suffix", window=9 + 36),
    Case("window is the suffix", window=9),
    Case("window ends in the suffix", window=4),
    Case("window of one token", window=1),
    Case("softcap", softcap=1.5),
    Case("sinks", sinks=True),
    Case("sinks without prefix", sinks=True, prefix=0),
    Case("window, softcap and sinks", window=17, softcap=1.5, sinks=True, in_company=True, moved=True),
    Case("head dim 80", head_dim=80),
    Case("head dim 96", head_dim=96),
    Case("head dim 128", head_dim=128, groups=4),
    Case("head dim 256", head_dim=256, groups=2),
    Case("odd head dim", head_dim=20),
    Case("values narrower than keys", head_dim=96, value_dim=64),
    Case("prompt", prompt=True, prefix=0, suffix=50),
    Case("prompt of one token", prompt=True, prefix=0, suffix=1),
    Case("second chunk of a prompt", prompt=True, suffix=21),
    Case("second chunk, one token", prompt=True, suffix=1),
    Case("long prompt", prompt=True, prefix=0, suffix=190),
    Case("second chunk of a long prompt, window", prompt=True, prefix=150, suffix=140, window=90, groups=1),
    Case("prompt, other scale", prompt=True, scale=0.3),
    Case("prompt, window", prompt=True, prefix=12, suffix=30, window=8),
    Case("prompt, softcap", prompt=True, softcap=1.5),
    Case("prompt, sinks", prompt=True, sinks=True),
    Case("prompt, window, softcap and sinks", prompt=True, window=8, softcap=1.5, sinks=True, groups=4, head_dim=128),
    Case("prompt, values narrower than keys", prompt=True, head_dim=96, value_dim=64),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a backend made of a case."""

    case: Case
    dtype: torch.dtype
    error: float
    """Largest error as a share of the answer's largest value; infinite if it is no number or has a wrong shape."""
    left_to: str | None = None
    """Why the backend left the case to ``sdpa``; None: it did not."""
    failure: str | None = None
    """What it raised, or what is wrong besides numbers."""
    waits: bool = False
    """The host waits for the device in every step. No wrong number, but a slow one."""

    @property
    def kept(self) -> bool:
        return self.failure is None and self.error <= TOLERANCES[self.dtype]


def check(
    backend: AttentionBackend,
    device: torch.device,
    *,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCES),
    cases: Iterable[Case] = CASES,
) -> Iterator[Outcome]:
    """Every case in every dtype."""
    for dtype, case in itertools.product(dtypes, cases):
        yield outcome(backend, case, dtype, device)


def outcome(backend: AttentionBackend, case: Case, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Run one case. A backend that raises is an outcome too.

    Raises:
        RuntimeError: memory ran out, which says nothing of the backend.
    """
    left_to = backend.why_not(device, dtype, case.head_dim, case.value_dim)
    if left_to is None and case.prompt and not backend.reads_prompts:
        left_to = "it has no kernel for prompts"
    try:
        drawn = _draw(case, dtype, device)
        with torch.inference_mode():
            got = _attended(backend, drawn)
            asked = device.type == "cuda" and not case.prompt and not backend.prepares
            waits = asked and _waits(backend, drawn)
        want = _expected(drawn)
    except Exception as raised:  # kernels fail in many ways
        if is_out_of_memory(raised):
            raise
        return Outcome(case, dtype, math.inf, left_to, f"{type(raised).__name__}: {raised}")
    if got.shape != want.shape or got.dtype != dtype:
        wrong = f"{tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {dtype}"
        return Outcome(case, dtype, math.inf, left_to, wrong, waits)
    error = float((got.double() - want).abs().max() / want.abs().max())
    return Outcome(case, dtype, error if math.isfinite(error) else math.inf, left_to, None, waits)


# a case's numbers


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of one prompt; the last token of each is the one that attends."""

    prefix_key: Tensor
    """(kv_heads, prefix, head_dim)."""
    prefix_value: Tensor
    suffix_key: Tensor
    """(rows, kv_heads, suffix, head_dim)."""
    suffix_value: Tensor


@dataclass(frozen=True, slots=True)
class _Drawn:
    case: Case
    query: Tensor
    """(rows of all groups and padding, heads, 1, head_dim); of a prompt (1, heads, chunk, head_dim)."""
    groups: tuple[_Group, ...]
    params: AttentionParams
    padding: int = 0


def _draw(case: Case, dtype: torch.dtype, device: torch.device) -> _Drawn:
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    value_dim = case.value_dim or case.head_dim
    heads = case.kv_heads * case.groups

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def group(case: Case) -> _Group:
        rows, suffix = (1 if case.prompt else case.rows), case.suffix
        return _Group(
            draw(case.kv_heads, case.prefix, case.head_dim),
            draw(case.kv_heads, case.prefix, value_dim),
            draw(rows, case.kv_heads, suffix, case.head_dim),
            draw(rows, case.kv_heads, suffix, value_dim),
        )

    groups = [group(case)]
    padding = 0
    if case.in_company:
        groups.append(group(replace(case, rows=case.rows + 2, prefix=case.prefix + 5, suffix=case.suffix + 3)))
        padding = 3
    rows = 1 if case.prompt else sum(each.suffix_key.shape[0] for each in groups) + padding
    params = AttentionParams(
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        window=case.window,
        softcap=case.softcap,
        sinks=draw(heads) if case.sinks else None,
    )
    # twice as long as keys: weights then differ enough to tell one key from another
    query = 2 * draw(rows, heads, case.suffix if case.prompt else 1, case.head_dim)
    return _Drawn(case, query, tuple(groups), params, padding)


# the way of a run


class _HauntedPool(SuffixPool):
    """What holds no token is NaN; in a pool that grows it has to be a number, and is a wrong one."""

    def _allocate(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_full(shape, 5.0 if self._grows else math.nan)


class _ScatteredPool(_HauntedPool):
    """Keys lie token by token, values dimension by dimension."""

    _allocated = 0

    def _allocate(self, like: Tensor, *shape: int) -> Tensor:
        self._allocated += 1
        order = (2, 0, 1, 3) if self._allocated % 2 else (0, 1, 3, 2)
        return _laid_out(super()._allocate(like, *shape), order)


def _laid_out(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers in a memory of which ``order`` are the dims, the outermost first."""
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def _attended(backend: AttentionBackend, drawn: _Drawn) -> Tensor:
    """(batch, tokens, heads, head_dim of the values), padding left out."""
    case = drawn.case
    if case.prompt:
        group = drawn.groups[0]
        prefix = Prefix(length=case.prefix + case.suffix)
        if case.prefix:
            prefix.store(0, group.prefix_key[None], group.prefix_value[None], 0)
        step = PrefillStep([PromptPart(prefix, case.prefix, drawn.query.shape[2])], attention=backend)
        return step.attend(0, drawn.query, group.suffix_key, group.suffix_value, drawn.params)
    decoding = DecodeStep([_filled(group, case) for group in drawn.groups], attention=backend)
    keys, values = _new_tokens(drawn)
    out = decoding.attend(0, drawn.query, keys, values, drawn.params)
    if out[out.shape[0] - drawn.padding :].any():
        raise ValueError("what is computed for padding is not zero")
    return out[: out.shape[0] - drawn.padding]


def _new_tokens(drawn: _Drawn) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens that attend, (rows of all groups and padding, kv_heads, 1, head_dim)."""
    found = []
    for name in ("suffix_key", "suffix_value"):
        new = [getattr(group, name)[:, :, -1:] for group in drawn.groups]
        found.append(torch.cat([*new, new[0].new_zeros(drawn.padding, *new[0].shape[1:])]))
    return found[0], found[1]


def _filled(group: _Group, case: Case) -> tuple[Prefix, SuffixPool]:
    """Prefix and pool with all tokens but the last. A moved pool was filled with more rows in another order."""
    moved = case.moved
    prefix = Prefix(length=group.prefix_key.shape[1])
    prefix.store(0, group.prefix_key[None], group.prefix_value[None], 0)
    if case.scattered:
        prefix.keys[0] = _laid_out(prefix.keys[0], (1, 0, 2))
        prefix.values[0] = _laid_out(prefix.values[0], (0, 2, 1))
    rows, _, tokens, _ = group.suffix_key.shape
    strangers = 3 if moved else 0
    places = torch.arange(rows + strangers)
    if moved:  # the wanted rows lie behind some, in front of others, and backwards
        places = torch.cat([places[rows:], places[:rows].flip(0)]).roll(-1)
    kind = _ScatteredPool if case.scattered else _HauntedPool
    pool = kind(rows + strangers, capacity=tokens + 5, align=16 if case.grows else 1, grows=case.grows)
    lying = places.clamp(max=rows - 1).to(group.suffix_key.device)
    for token in range(tokens - 1):
        new = slice(token, token + 1)
        pool.append(0, group.suffix_key[lying][:, :, new], group.suffix_value[lying][:, :, new])
        pool.advance()
    if moved:
        if tokens == 1:  # so that there is something to move
            pool.append(0, group.suffix_key[lying], group.suffix_value[lying])
        order = [places.tolist().index(row) for row in range(rows)]
        pool.select(torch.tensor(order, device=group.suffix_key.device), tokens + 20)
        pool.select(torch.arange(rows, device=group.suffix_key.device).repeat(2), tokens + 20)
        pool.split(rows)  # what is left is the first half of a larger memory
    return prefix, pool


def _waits(backend: AttentionBackend, drawn: _Drawn) -> bool:
    """Whether the host waits for the device in a decode that is not the first of its kind."""
    decoding = DecodeStep([_filled(group, drawn.case) for group in drawn.groups], attention=backend)
    keys, values = _new_tokens(drawn)
    decoding.attend(0, drawn.query, keys, values, drawn.params)
    try:
        with no_waiting():
            decoding.attend(0, drawn.query, keys, values, drawn.params)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    return False


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a CUDA device: what makes the host wait for it is an error in here, for every thread.

    Raises:
        RuntimeError: something did.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# the answer


def _expected(drawn: _Drawn) -> Tensor:
    """(batch, tokens, heads, head_dim of the values), float64: softmax of scores times values, nothing else."""
    if drawn.case.prompt:
        group = drawn.groups[0]
        whole = [
            _sequence(drawn, group, 0, drawn.query[0, :, token], drawn.case.suffix - 1 - token)
            for token in range(drawn.case.suffix)
        ]
        return torch.stack(whole)[None]
    rows: list[Tensor] = []
    for group in drawn.groups:
        for row in range(group.suffix_key.shape[0]):
            rows.append(_sequence(drawn, group, row, drawn.query[len(rows), :, 0], 0))
    return torch.stack(rows)[:, None]


def _sequence(drawn: _Drawn, group: _Group, row: int, query: Tensor, later: int) -> Tensor:
    """One query over one row's whole sequence, (heads, head_dim of the values).

    Args:
        query: (heads, head_dim).
        later: tokens at the end that it does not see.
    """
    params, case = drawn.params, drawn.case
    end = case.prefix + case.suffix - later if case.prompt else None
    keys = torch.cat([group.prefix_key, group.suffix_key[row]], 1)[:, :end].double()
    values = torch.cat([group.prefix_value, group.suffix_value[row]], 1)[:, :end].double()
    if params.window is not None:
        keys, values = keys[:, -params.window :], values[:, -params.window :]
    out = []
    for head in range(query.shape[0]):
        kv_head = head // case.groups
        scores = keys[kv_head] @ query[head].double() * params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        if params.sinks is not None:
            scores = torch.cat([scores, params.sinks[head].double()[None]])
        out.append(scores.softmax(0)[: keys.shape[1]] @ values[kv_head])
    return torch.stack(out)
