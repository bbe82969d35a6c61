"""FlashInfer: its paged decode kernel over the rows' pool, its prefill kernel over the shared prefix.

A pool is a paged cache already: one page a row, as long as the suffix. ``plan`` is computed on the host from numbers
that are there, once for all layers of a step that are alike. Log-sum-exps are in base 2 here, as FlashInfer's own merge
wants them. Kernels are compiled on first use (``ninja`` and ``nvcc``), half a minute for each dtype and head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous, with_sinks

_WORKSPACE_BYTES = 128 * 2**20
"""What FlashInfer recommends, for parts of long suffixes."""
_MOST_PLANS = 64
"""Plans that are kept, each with 8 MiB on the device and 8 MiB of pinned memory. A step needs one for each group of
rows and kind of layer; those of the step before last serve again."""
_KERNELS = "fa2"
"""Those that take any strides, page sizes, soft caps and give log-sum-exps, on every GPU since Ampere."""
_TENSOR_CORE_GROUPS = 4
"""Query heads a kv head from which the kernel that uses tensor cores is the faster one, by FlashInfer's own advice."""


@dataclass(slots=True)
class _Plan:
    wrapper: Any
    copied: torch.cuda.Event | None = None
    """Passed once the device holds the plan, which it copies from pinned memory when it comes to it."""


class Backend(AttentionBackend):
    """``BatchDecodeWithPagedKVCacheWrapper`` for suffixes, ``single_prefill_with_kv_cache`` for prefix and prompt."""

    name = "flashinfer"
    package = "flashinfer"
    distribution = "flashinfer-python"
    install = "pip install 'specrej-eval[flashinfer]'"
    preference = 1

    def __init__(self, otherwise: AttentionBackend | None = None) -> None:
        super().__init__(otherwise)
        self._plans: dict[tuple[tuple[Any, ...], int, int], _Plan] = {}
        """By kind of layer, rows and tokens of each; the oldest first."""
        self._workspaces: dict[torch.device, Tensor] = {}

    def _why_not_dims(self, head_dim: int, value_dim: int) -> str | None:
        if head_dim != value_dim:
            return f"its decode kernel wants keys ({head_dim}) and values ({value_dim}) of one head dim"
        if head_dim not in (64, 128, 256):
            return f"its head dims are 64, 128 and 256, not {head_dim}"
        return None

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        from flashinfer import single_prefill_with_kv_cache

        del start  # its causal mask is aligned to the last key
        attended, lse = single_prefill_with_kv_cache(
            query[0].transpose(0, 1),  # (chunk, heads, head_dim)
            last_dim_contiguous(key),
            last_dim_contiguous(value),
            causal=True,
            kv_layout="HND",
            sm_scale=params.scale,
            window_left=-1 if params.window is None else params.window - 1,  # keys before the query's own position
            logits_soft_cap=params.softcap,
            backend=_KERNELS,
            return_lse=True,
        )
        out: Tensor = attended  # (chunk, heads, head_dim)
        if params.sinks is not None:
            out = with_sinks(out, lse * math.log(2), params.sinks).to(value.dtype)
        return out.transpose(0, 1)[None]

    def _decode(
        self,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        params: AttentionParams,
        tokens: int,
    ) -> Tensor:
        from flashinfer import merge_state, single_prefill_with_kv_cache

        rows, kv_heads, groups, width = query.shape
        queries = query.reshape(rows, kv_heads * groups, width)
        if suffix_key.stride() != suffix_value.stride() or suffix_key.stride(-1) != 1:  # its kernel takes one for both
            suffix_key, suffix_value = suffix_key.contiguous(), suffix_value.contiguous()
        wrapper = self._planned(queries, suffix_key, params)
        out, lse = wrapper.run(queries, (suffix_key, suffix_value), return_lse=True)  # lse: (rows, heads), base 2
        if prefix_key.shape[1]:
            shared, shared_lse = single_prefill_with_kv_cache(
                queries,
                last_dim_contiguous(prefix_key),
                last_dim_contiguous(prefix_value),
                causal=False,
                kv_layout="HND",
                sm_scale=params.scale,
                logits_soft_cap=params.softcap,
                backend=_KERNELS,
                return_lse=True,
            )
            out, lse = merge_state(out, lse, shared, shared_lse)
        if params.sinks is not None:
            out = with_sinks(out, lse * math.log(2), params.sinks)
        whole: Tensor = out.reshape(rows, kv_heads, groups, width).to(suffix_value.dtype)
        return whole

    def _planned(self, queries: Tensor, key: Tensor, params: AttentionParams) -> Any:
        """The decode wrapper for rows of this many tokens, planned."""
        rows, heads, width = queries.shape
        kv_heads, tokens = key.shape[1], key.shape[2]
        kind = (queries.device, queries.dtype, heads, kv_heads, width, params.scale, params.softcap)
        wanted = (kind, rows, tokens)
        if wanted in self._plans:
            return self._plans[wanted].wrapper
        plan = self._free_plan(kind, tokens) or self._new_plan(
            queries.device, tensor_cores=heads // kv_heads >= _TENSOR_CORE_GROUPS
        )
        plan.wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32),  # on the host: a device's would be waited for
            torch.arange(rows, dtype=torch.int32),
            torch.full((rows,), tokens, dtype=torch.int32),
            heads,
            kv_heads,
            width,
            tokens,  # a page is a row's suffix
            pos_encoding_mode="NONE",
            logits_soft_cap=params.softcap,
            q_data_type=queries.dtype,  # else float16
            kv_data_type=key.dtype,
            sm_scale=params.scale,
            non_blocking=True,
        )
        if queries.is_cuda:
            plan.copied = torch.cuda.Event()
            plan.copied.record(torch.cuda.current_stream(queries.device))
        self._plans[wanted] = plan
        return plan.wrapper

    def _free_plan(self, kind: tuple[Any, ...], tokens: int) -> _Plan | None:
        """The oldest plan that no step will need: suffixes grow by one token a step."""
        mine = [key for key in self._plans if key[0] == kind]
        old = [key for key in mine if key[2] <= tokens - 2] or (mine if len(self._plans) >= _MOST_PLANS else [])
        if not old:
            return None
        plan = self._plans.pop(old[0])
        if plan.copied is not None:
            plan.copied.synchronize()  # passed long ago, unless the host is two steps ahead of the device
        return plan

    def _new_plan(self, device: torch.device, *, tensor_cores: bool) -> _Plan:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        if device not in self._workspaces:  # zeros: FlashInfer wants them for the first use
            self._workspaces[device] = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return _Plan(
            BatchDecodeWithPagedKVCacheWrapper(
                self._workspaces[device],
                "HND",
                use_tensor_cores=tensor_cores,
                backend=_KERNELS,
            )
        )
