"""Stand-ins for the packages flash_attn and flashinfer, in PyTorch, written from what they document: the functions our
backends call, under their own signatures, that compute on a CPU and refuse what the kernels refuse.

``tests/kv/attention/test_stand_ins.py`` holds them to the packages themselves where these are installed: signatures,
and FlashInfer's own PyTorch references.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.attention.triton import interpreted

TAKEN: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, seen: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """(queries, heads, d), (keys, kv_heads, d) twice, (queries, keys) -> output in the query's dtype, log-sum-exp
    (queries, heads) in natural logarithms."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (each.float().repeat_interleave(groups, 1) for each in (key, value))
    scores = torch.einsum("qhd,khd->qhk", query.float(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)
    return out.to(query.dtype), scores.logsumexp(-1)


def visible(queries: int, keys: int, *, causal: bool, left: int, right: int) -> Tensor:
    """(queries, keys): the last query is at the last key; -1 is no limit."""
    own = torch.arange(queries)[:, None] + keys - queries
    other = torch.arange(keys)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if left >= 0:
        seen &= other >= own - left
    if right >= 0:
        seen &= other <= own + right
    return seen


def _refuse(condition: bool, rule: str) -> None:
    if not condition:
        raise RuntimeError(rule)


# flash_attn 2


def _check_flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    _refuse(q.dtype in TAKEN, "FlashAttention only support fp16 and bf16 data type")
    _refuse(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    _refuse(k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _refuse(q.shape[-1] == k.shape[-1] == v.shape[-1], "head dims must be equal")
    _refuse(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head dim must be a multiple of 8, at most 256")
    _refuse(q.shape[2] % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """(batch, tokens, heads, d); the log-sum-exp is (batch, heads, tokens)."""
    _check_flash(q, k, v)
    assert not dropout_p and alibi_slopes is None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seen = visible(q.shape[1], k.shape[1], causal=causal, left=window_size[0], right=window_size[1])
    found = [
        attend(*parts, scale=scale, seen=seen, softcap=softcap) for parts in zip(q, k, v, strict=True)
    ]  # of each sequence
    out = torch.stack([each[0] for each in found])
    lse = torch.stack([each[1].T for each in found])
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Over caches (batch, capacity, kv_heads, d); the log-sum-exp is (batch, heads, tokens)."""
    _check_flash(q, k_cache, v_cache)
    assert all(each is None for each in (k, v, rotary_cos, cache_batch_idx, cache_leftpad, block_table, alibi_slopes))
    _refuse(isinstance(cache_seqlens, Tensor) and cache_seqlens.dtype == torch.int32, "seqlens_k must be int32")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    found = []
    for row, length in enumerate(cache_seqlens.tolist()):
        seen = visible(q.shape[1], length, causal=causal, left=window_size[0], right=window_size[1])
        found.append(
            attend(q[row], k_cache[row, :length], v_cache[row, :length], scale=scale, seen=seen, softcap=softcap)
        )
    out, lse = torch.stack([each[0] for each in found]), torch.stack([each[1].T for each in found])
    return (out, lse) if return_softmax_lse else out


# flashinfer


def _check_flashinfer(q: Tensor, k: Tensor, v: Tensor) -> None:
    _refuse(q.dtype in TAKEN and q.dtype == k.dtype == v.dtype, "no kernel is generated for this dtype")
    _refuse(q.shape[-1] in (64, 128, 256), f"Unsupported head_dim: {q.shape[-1]}")
    _refuse(k.stride(-1) == v.stride(-1) == 1, "the last dimension must be contiguous")


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """(queries, heads, d) over keys and values in NHD or HND; the log-sum-exp is (queries, heads) in base 2."""
    _check_flashinfer(q, k, v)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    seen = visible(q.shape[0], k.shape[0], causal=causal, left=window_left, right=-1)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out, lse = attend(q, k, v, scale=scale, seen=seen, softcap=logits_soft_cap or 0.0)
    return (out, lse / math.log(2)) if return_lse else out


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, heads, d) and (rows, heads) in base 2, twice."""
    _refuse(s_a.dtype == s_b.dtype == torch.float32, "s must be float32")
    most = torch.maximum(s_a, s_b)
    a, b = torch.exp2(s_a - most), torch.exp2(s_b - most)
    out = (v_a.float() * a[..., None] + v_b.float() * b[..., None]) / (a + b)[..., None]
    return out.to(v_a.dtype), most + torch.log2(a + b)


class BatchDecodeWithPagedKVCacheWrapper:
    """One token a request over a paged cache."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        assert kv_layout == "HND" and not use_cuda_graph
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        sm_scale: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        _refuse(all(each.device.type == "cpu" for each in (indptr, indices, last_page_len)), "a device is waited for")
        _refuse(all(each.dtype == torch.int32 for each in (indptr, indices, last_page_len)), "int32")
        groups = num_qo_heads // num_kv_heads
        _refuse(self.use_tensor_cores or groups in (1, 2, 3, 4, 6, 8, 16), f"Unsupported group_size: {groups}")
        self.planned = (num_qo_heads, num_kv_heads, head_dim)
        self.pages = (indptr.clone(), indices.clone(), last_page_len.clone(), page_size)
        self.dtype = torch.float16 if q_data_type == "float16" else q_data_type
        self.scale = head_dim**-0.5 if sm_scale is None else sm_scale
        self.softcap = logits_soft_cap or 0.0

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> Any:
        """(batch, heads, d) over pages (pages, kv_heads, page_size, d); the log-sum-exp is (batch, heads) in base 2."""
        keys, values = paged_kv_cache
        _check_flashinfer(q, keys, values)
        _refuse(q.dtype == self.dtype, f"The dtype of q {q.dtype} does not match the q_data_type {self.dtype}")
        _refuse(keys.stride() == values.stride(), "K/V strides differ")
        indptr, indices, last, page_size = self.pages
        _refuse(self.planned == (q.shape[1], keys.shape[1], q.shape[2]), "planned for other heads")
        _refuse(q.shape[0] == len(last) and keys.shape[2] == page_size, "planned for another batch or page size")
        found = []
        for row in range(q.shape[0]):
            pages = indices[indptr[row] : indptr[row + 1]].tolist()
            key, value = (
                torch.cat([each[page].transpose(0, 1) for page in pages])[: (len(pages) - 1) * page_size + last[row]]
                for each in (keys, values)
            )
            seen = torch.ones(1, key.shape[0], dtype=torch.bool)
            found.append(attend(q[row][None], key, value, scale=self.scale, seen=seen, softcap=self.softcap))
        out, lse = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
        return (out, lse / math.log(2)) if return_lse else out


def on_the_cpu(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...] = ()
) -> AttentionBackend:
    """The backend with a stand-in for its package; skips where there is none.

    Args:
        dtypes: what the stand-in computes besides half precision.
    """
    if backend.name == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        if not interpreted():
            pytest.skip("triton compiles for the GPU that is here")
    for name, module in packages().items():
        if name == backend.package:
            monkeypatch.setitem(sys.modules, name, module)
            monkeypatch.setattr(type(backend), "devices", ("cpu", "cuda"))
            if dtypes:
                monkeypatch.setattr(sys.modules[__name__], "TAKEN", (*TAKEN, *dtypes))
                monkeypatch.setattr(type(backend), "dtypes", (*backend.dtypes, *dtypes))
    return backend


def packages() -> dict[str, ModuleType]:
    """What stands in ``sys.modules`` for the packages."""
    contents: dict[str, tuple[Any, ...]] = {
        "flash_attn": (flash_attn_func, flash_attn_with_kvcache),
        "flashinfer": (single_prefill_with_kv_cache, merge_state, BatchDecodeWithPagedKVCacheWrapper),
    }
    made = {}
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for member in members:
            setattr(module, member.__name__, member)
        made[name] = module
    return made
