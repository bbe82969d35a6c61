"""Dao's flash-attn 2: its decode kernel over the rows' pool, its forward kernel over the shared prefix.

The prefix is read once: all rows and all query heads of a kv head are packed as the tokens of one sequence. Suffixes
are read where they lie (any strides, the last dim's apart). The two parts are merged by their log-sum-exp, which
flash-attn gives in natural logarithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams, last_dim_contiguous, merge, with_sinks

_NO_WINDOW = (-1, -1)


class Backend(AttentionBackend):
    """``flash_attn_with_kvcache`` for suffixes, ``flash_attn_func`` for prefix and prompt."""

    name = "flash_attn"
    package = "flash_attn"
    distribution = "flash-attn"
    install = "pip install 'specrej-eval[flash-attn]'"
    preference = 3

    def __init__(self, otherwise: AttentionBackend | None = None) -> None:
        super().__init__(otherwise)
        self._lengths: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def _why_not_dims(self, head_dim: int, value_dim: int) -> str | None:
        if head_dim != value_dim:
            return f"its keys ({head_dim}) and values ({value_dim}) have one head dim"
        if head_dim > 256 or head_dim % 8:
            return f"its head dims are multiples of 8 up to 256, not {head_dim}"
        return None

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        from flash_attn import flash_attn_func

        del start  # its causal mask is aligned to the last key
        attended, lse, _ = flash_attn_func(
            query.transpose(1, 2),  # (1, chunk, heads, head_dim)
            last_dim_contiguous(key).transpose(0, 1)[None],  # (1, start + chunk, kv_heads, head_dim)
            last_dim_contiguous(value).transpose(0, 1)[None],
            softmax_scale=params.scale,
            causal=True,
            # both ends of its window are keys besides the query's own position
            window_size=_NO_WINDOW if params.window is None else (params.window - 1, 0),
            softcap=params.softcap or 0.0,
            return_attn_probs=True,
        )
        out: Tensor = attended.transpose(1, 2)  # (1, heads, chunk, head_dim)
        if params.sinks is not None:
            out = with_sinks(out, lse, params.sinks[None, :, None]).to(value.dtype)
        return out

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
        from flash_attn import flash_attn_with_kvcache

        rows, kv_heads, groups, width = query.shape
        how: dict[str, Any] = {"softmax_scale": params.scale, "causal": False, "softcap": params.softcap or 0.0}
        attended, lse = flash_attn_with_kvcache(
            query.reshape(rows, 1, kv_heads * groups, width),
            last_dim_contiguous(suffix_key).transpose(1, 2),  # (rows, suffix, kv_heads, head_dim)
            last_dim_contiguous(suffix_value).transpose(1, 2),
            cache_seqlens=self._suffix_lengths(rows, tokens, query.device),
            return_softmax_lse=True,
            **how,
        )
        out: Tensor = attended.reshape(rows, kv_heads, groups, width)
        lse = lse.reshape(rows, kv_heads, groups)
        if prefix_key.shape[1]:
            from flash_attn import flash_attn_func

            shared, shared_lse, _ = flash_attn_func(
                query.transpose(1, 2).reshape(1, rows * groups, kv_heads, width),
                last_dim_contiguous(prefix_key).transpose(0, 1)[None],
                last_dim_contiguous(prefix_value).transpose(0, 1)[None],
                return_attn_probs=True,
                **how,
            )
            shared = shared.reshape(rows, groups, kv_heads, width).transpose(1, 2)
            # (1, kv_heads, rows * groups) -> (rows, kv_heads, groups)
            shared_lse = shared_lse.reshape(kv_heads, rows, groups).transpose(0, 1)
            out, lse = merge(out, lse, shared, shared_lse)
        if params.sinks is not None:
            out = with_sinks(out, lse, params.sinks.view(kv_heads, groups))
        return out.to(suffix_value.dtype)

    def _suffix_lengths(self, rows: int, tokens: int, device: torch.device) -> Tensor:
        """(rows,) int32, the same for all layers of a step."""
        key = (rows, tokens, device)
        if self._lengths is None or self._lengths[0] != key:
            self._lengths = key, torch.full((rows,), tokens, dtype=torch.int32, device=device)
        return self._lengths[1]
