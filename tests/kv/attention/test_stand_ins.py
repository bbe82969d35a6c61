"""The stand-ins of ``support.attention_kernels`` against the packages themselves, where they are installed: the same
parameters with the same defaults, and the numbers of FlashInfer's own PyTorch references."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import attention_kernels


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Name -> default, of a function that may be wrapped."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    found = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in found if each.kind is not each.VAR_POSITIONAL}


def assert_as_in(package: Any, *names: str) -> None:
    """What a stand-in takes, the package's function takes too, in the same places and with the same defaults.

    The package may have grown more since: ours are called by name, or with as many positions as the stand-in has.
    """
    for name in names:
        real: Any = package
        ours: Any = attention_kernels
        for part in name.split("."):
            real, ours = getattr(real, part), getattr(ours, part)
        theirs, mine = parameters(real), parameters(ours)
        assert mine.items() <= theirs.items(), name
        required = [each for each, default in mine.items() if default is inspect.Parameter.empty]
        assert list(theirs)[: len(required)] == required, name
        assert not [each for each in theirs if theirs[each] is inspect.Parameter.empty and each not in mine], name


def test_flash_attn_has_the_functions_that_are_called() -> None:
    package = pytest.importorskip("flash_attn", exc_type=ImportError)
    assert_as_in(package, "flash_attn_func", "flash_attn_with_kvcache")


def flashinfer() -> Any:
    return pytest.importorskip("flashinfer", exc_type=ImportError)


def test_flashinfer_has_the_functions_that_are_called() -> None:
    package = flashinfer()
    assert_as_in(package, "single_prefill_with_kv_cache", "merge_state", "BatchDecodeWithPagedKVCacheWrapper.__init__")
    run = parameters(package.BatchDecodeWithPagedKVCacheWrapper.run)
    assert parameters(attention_kernels.BatchDecodeWithPagedKVCacheWrapper.run).items() <= run.items()
    # releases since 0.7 take what follows page_size by name, through **kwargs
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper
    plan = parameters(getattr(wrapper, "_plan_impl", wrapper.plan))
    mine = parameters(attention_kernels.BatchDecodeWithPagedKVCacheWrapper.plan)
    assert mine.items() <= plan.items() and list(plan)[:8] == list(mine)[:8]
    assert isinstance(wrapper.use_tensor_cores, property)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def test_the_decode_stand_in_is_flashinfers_reference() -> None:
    flashinfer()
    from flashinfer.trace.templates.attention import _gqa_paged_decode_reference

    rows, heads, kv_heads, width, tokens = 5, 6, 2, 64, 9
    query, keys, values = (
        draw(rows, heads, width),
        draw(rows, kv_heads, tokens, width),
        draw(rows, kv_heads, tokens, width),
    )
    indptr, indices = torch.arange(rows + 1, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    want, want_lse = _gqa_paged_decode_reference(
        query, keys.transpose(1, 2), values.transpose(1, 2), indptr, indices, 0.2
    )  # its pages are (pages, tokens, kv_heads, head_dim)
    wrapper = attention_kernels.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(1), "HND")
    last = torch.full((rows,), tokens, dtype=torch.int32)
    wrapper.plan(indptr, indices, last, heads, kv_heads, width, tokens, q_data_type=torch.bfloat16, sm_scale=0.2)
    got, got_lse = wrapper.run(query, (keys, values), return_lse=True)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0.01)
    torch.testing.assert_close(got_lse, want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_the_prefill_stand_in_is_flashinfers_reference(causal: bool) -> None:
    flashinfer()
    from flashinfer.trace.templates.attention import _single_prefill_reference

    query, key, value = draw(7, 6, 64), draw(19, 2, 64), draw(19, 2, 64)
    want = _single_prefill_reference(query, key, value, causal=causal, sm_scale=0.2)
    got = attention_kernels.single_prefill_with_kv_cache(query, key, value, causal=causal, sm_scale=0.2)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0.01)


def test_the_log_sum_exp_of_a_prefix_is_in_base_2_as_in_flashinfers_reference() -> None:
    """Each row of a prefix that all share is a request of its own whose only page is that prefix."""
    flashinfer()
    from flashinfer.trace.templates.attention import _gqa_paged_decode_reference

    query, key, value = draw(7, 6, 64), draw(19, 2, 64), draw(19, 2, 64)
    shared = torch.zeros(7, dtype=torch.int32)
    _, want = _gqa_paged_decode_reference(
        query, key[None], value[None], torch.arange(8, dtype=torch.int32), shared, 0.2
    )
    _, got = attention_kernels.single_prefill_with_kv_cache(query, key, value, sm_scale=0.2, return_lse=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - want * math.log(2)).abs().max() > 0.1, "natural logarithms would be seen"


def test_the_merge_stand_in_is_flashinfers_reference() -> None:
    flashinfer()
    from flashinfer.trace.templates import cascade

    template = cascade.merge_state_trace
    parts = draw(5, 6, 64), draw(5, 6).float(), draw(5, 6, 64).roll(1, 0), draw(6, 5).T.float()
    want, want_lse = template.reference(*parts)
    got, got_lse = attention_kernels.merge_state(*parts)
    torch.testing.assert_close(got.float(), want.float(), atol=0.01, rtol=0.01)
    torch.testing.assert_close(got_lse, want_lse, atol=1e-4, rtol=1e-4)
