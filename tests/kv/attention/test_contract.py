"""The contract of attention backends, for every one there is: on a CPU with stand-ins for packages that need a GPU and
Triton's interpreter, on a GPU with what is installed. And that it fails for backends that are wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_kernels import on_the_cpu
from torch import Tensor

from specrej_eval import registry
from specrej_eval.kv import choose, contract
from specrej_eval.kv.attention.base import AttentionBackend, AttentionParams
from specrej_eval.kv.contract import CASES, Case
from specrej_eval.kv.native import build
from specrej_eval.kv.steps import DecodeStep, PrefillStep

BACKENDS = registry.names("specrej_eval.kv.attention")
CPU = torch.device("cpu")
Counted = Callable[[str], None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
    return on_the_cpu(choose.build(request.param), monkeypatch)


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_backend_computes_attention(backend: AttentionBackend, case: Case, counted: Counted) -> None:
    for dtype in contract.TOLERANCES:
        found = contract.outcome(backend, case, dtype, CPU)
        assert found.kept, found
        counted(f"attention cases by {'sdpa' if found.left_to else backend.name}")


def test_a_backend_leaves_to_sdpa_what_it_says_and_no_more(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.name == "sdpa":
        pytest.skip("sdpa leaves nothing")
    sdpa = backend._fallback()
    asked: list[str] = []
    for name in ("_prefill", "_decode"):
        whole = getattr(type(sdpa), name)

        def noted(self: Any, *args: Any, _whole: Any = whole, **kwargs: Any) -> Tensor:
            asked.append(self.name)
            return _whole(self, *args, **kwargs)

        monkeypatch.setattr(type(sdpa), name, noted)
    for dtype, case in itertools.product(contract.TOLERANCES, CASES):
        asked.clear()
        found = contract.outcome(backend, case, dtype, CPU)
        assert bool(asked) == (found.left_to is not None), found
    kept = [contract.outcome(backend, case, half(backend), CPU).left_to is None for case in CASES if not case.prompt]
    assert sum(kept) > 20, "the cases are there for the backend, not for sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_computes_attention_on_the_gpu(name: str, counted: Counted) -> None:
    backend = choose.build(name)
    device = torch.device("cuda")
    if reason := backend.why_not_on(device):
        pytest.skip(reason)
    wrong = []
    for found in contract.check(backend, device):
        counted(f"attention cases by {name} on {choose.device_name(device)}")
        if not found.kept or found.waits:
            wrong.append(found)
    assert not wrong


# ---- faults of what a backend is given: any backend would make the same error ----------------------------------------

Decode = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, AttentionParams]


def _with(params: AttentionParams, **changes: Any) -> AttentionParams:
    return dataclasses.replace(params, **changes)


def _heads_in_groups(query: Tensor) -> Tensor:
    """As if the heads of all kv heads took turns."""
    rows, kv_heads, groups, width = query.shape
    return query.reshape(rows, groups, kv_heads, width).transpose(1, 2).contiguous()


def _one_more(stored: Tensor) -> Tensor:
    """What lies behind the suffix."""
    return stored.as_strided((*stored.shape[:2], stored.shape[2] + 1, stored.shape[3]), stored.stride())


DECODE_FAULTS: dict[str, Callable[..., Decode]] = {
    "sinks ignored": lambda q, pk, pv, sk, sv, p: (q, pk, pv, sk, sv, _with(p, sinks=None)),
    "sinks of other heads": lambda q, pk, pv, sk, sv, p: (
        *(q, pk, pv, sk, sv),
        _with(p, sinks=None if p.sinks is None else p.sinks.flip(0)),
    ),
    "softcap ignored": lambda q, pk, pv, sk, sv, p: (q, pk, pv, sk, sv, _with(p, softcap=None)),
    "scale from the head dim": lambda q, pk, pv, sk, sv, p: (q, pk, pv, sk, sv, _with(p, scale=q.shape[-1] ** -0.5)),
    "heads in the wrong order": lambda q, pk, pv, sk, sv, p: (_heads_in_groups(q), pk, pv, sk, sv, p),
    "rows in the wrong order": lambda q, pk, pv, sk, sv, p: (q.flip(0), pk, pv, sk, sv, p),
    "keys of another kv head": lambda q, pk, pv, sk, sv, p: (q, pk.flip(0), pv, sk, sv, p),
    "values of another row": lambda q, pk, pv, sk, sv, p: (q, pk, pv, sk, sv.roll(1, 0), p),
    "prefix ignored": lambda q, pk, pv, sk, sv, p: (q, pk[:, :0], pv[:, :0], sk, sv, p),
    "first token of the prefix ignored": lambda q, pk, pv, sk, sv, p: (q, pk[:, 1:], pv[:, 1:], sk, sv, p),
    "last token of the prefix ignored": lambda q, pk, pv, sk, sv, p: (q, pk[:, :-1], pv[:, :-1], sk, sv, p),
    "own token ignored": lambda q, pk, pv, sk, sv, p: (
        *(q, pk, pv),
        *((sk[:, :, :-1], sv[:, :, :-1]) if sk.shape[2] > 1 else (sk, sv)),
        p,
    ),
    "first token of the suffix ignored": lambda q, pk, pv, sk, sv, p: (
        *(q, pk, pv),
        *((sk[:, :, 1:], sv[:, :, 1:]) if sk.shape[2] > 1 else (sk, sv)),
        p,
    ),
    "memory behind the suffix read": lambda q, pk, pv, sk, sv, p: (q, pk, pv, _one_more(sk), _one_more(sv), p),
}
PROMPT_FAULTS: dict[str, Callable[[AttentionParams, int], tuple[AttentionParams, int]]] = {
    "sinks ignored": lambda p, start: (_with(p, sinks=None), start),
    "softcap ignored": lambda p, start: (_with(p, softcap=None), start),
    "window one longer": lambda p, start: (_with(p, window=p.window and p.window + 1), start),
    "window one shorter": lambda p, start: (_with(p, window=p.window and max(1, p.window - 1)), start),
    "window ignored": lambda p, start: (_with(p, window=None), start),
    "scale doubled": lambda p, start: (_with(p, scale=2 * p.scale), start),
}


def is_found(backend: AttentionBackend) -> bool:
    """Whether the contract finds a fault, in half precision: each backend computes one of the two dtypes."""
    return any(not found.kept for found in contract.check(backend, CPU, dtypes=(half(backend),)))


def half(backend: AttentionBackend) -> torch.dtype:
    return torch.float16 if torch.float16 in backend.dtypes else torch.bfloat16


@pytest.mark.parametrize("fault", DECODE_FAULTS)
def test_a_fault_in_decoding_is_found(
    backend: AttentionBackend, fault: str, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    whole = backend._decode

    def faulty(
        query: Tensor, pk: Tensor, pv: Tensor, sk: Tensor, sv: Tensor, params: AttentionParams, tokens: int
    ) -> Tensor:
        changed = DECODE_FAULTS[fault](query, pk, pv, sk[:, :, :tokens], sv[:, :, :tokens], params)
        return whole(*changed, changed[3].shape[2])

    monkeypatch.setattr(backend, "_decode", faulty)
    monkeypatch.setattr(backend, "_decode_groups", lambda *_: None)  # the same bits by another way, says test_cpp.py
    assert is_found(backend)
    counted("faults of attention planted and found")


@pytest.mark.parametrize("fault", PROMPT_FAULTS)
def test_a_fault_in_reading_prompts_is_found(
    backend: AttentionBackend, fault: str, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    whole = backend._prefill

    def faulty(query: Tensor, key: Tensor, value: Tensor, *, start: int, params: AttentionParams) -> Tensor:
        params, start = PROMPT_FAULTS[fault](params, start)
        return whole(query, key, value, start=start, params=params)

    monkeypatch.setattr(backend, "_prefill", faulty)
    assert is_found(backend)
    counted("faults of attention planted and found")


def test_counting_what_lies_behind_the_tokens_is_found(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    whole = AttentionBackend.decode
    monkeypatch.setattr(AttentionBackend, "decode", lambda self, *given, tokens: whole(self, *given))
    assert is_found(backend)
    counted("faults of attention planted and found")


@pytest.mark.parametrize("longer", [1, -1])
@pytest.mark.parametrize("step", [DecodeStep, PrefillStep])
def test_a_window_that_is_off_by_one_is_found(
    step: type[Any], longer: int, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    whole = step.attend

    def faulty(self: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        window = params.window and max(1, params.window + longer)
        return whole(self, layer, query, key, value, _with(params, window=window))

    monkeypatch.setattr(step, "attend", faulty)
    assert is_found(choose.build("sdpa"))
    counted("faults of attention planted and found")


def test_an_answer_of_another_dtype_or_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = choose.build("sdpa")
    whole = backend._decode
    for change in (Tensor.float, lambda out: out[..., :-1], lambda out: out * math.nan):
        monkeypatch.setattr(backend, "_decode", lambda *given, _change=change: _change(whole(*given)))
        assert is_found(backend)


# ---- faults in a backend's own file ----------------------------------------------------------------------------------

OWN_FAULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "flash_attn": (
        ("params.window - 1, 0", "params.window, 0"),
        ("causal=True", "causal=False"),
        ('"softcap": params.softcap or 0.0', '"softcap": 0.0'),
        ("softcap=params.softcap or 0.0", "softcap=0.0"),
        ("softmax_scale=params.scale", "softmax_scale=None"),
        ("out, lse = merge(out, lse, shared, shared_lse)", "out, lse = merge(out, 2 * lse, shared, 2 * shared_lse)"),
        ("out, lse = merge(out, lse, shared, shared_lse)", "out, lse = merge(out, shared_lse, shared, lse)"),
        ("out, lse = merge(out, lse, shared, shared_lse)", "out = (out + shared) / 2"),
        ("shared_lse.reshape(kv_heads, rows, groups).transpose(0, 1)", "shared_lse.reshape(rows, kv_heads, groups)"),
        ("query.transpose(1, 2).reshape(1, rows * groups", "query.reshape(1, rows * groups"),
        (
            "shared.reshape(rows, groups, kv_heads, width).transpose(1, 2)",
            "shared.reshape(rows, kv_heads, groups, width)",
        ),
        ("torch.full((rows,), tokens,", "torch.full((rows,), tokens - 1,"),
        ("out = with_sinks(out, lse, params.sinks.view(kv_heads, groups))", "pass"),
        ("params.sinks.view(kv_heads, groups)", "params.sinks.view(groups, kv_heads).T"),
        ("return out.to(suffix_value.dtype)", "return out.float()"),
    ),
    "flashinfer": (
        ("params.window - 1", "params.window"),
        ("causal=True", "causal=False"),
        ("causal=False", "causal=True"),
        ("out = with_sinks(out, lse * math.log(2), params.sinks)\n", "out = with_sinks(out, lse, params.sinks)\n"),
        ("lse * math.log(2), params.sinks).to(", "lse, params.sinks).to("),
        ("merge_state(out, lse, shared, shared_lse)", "merge_state(out, lse, shared, shared_lse * math.log(2))"),
        ("merge_state(out, lse, shared, shared_lse)", "merge_state(out, shared_lse, shared, lse)"),
        ("q_data_type=queries.dtype", "q_data_type='bfloat16'"),
        ("            q_data_type=queries.dtype,  # else float16\n", "            q_data_type=torch.bfloat16,\n"),
        ("torch.full((rows,), tokens, dtype", "torch.full((rows,), max(1, tokens - 1), dtype"),
        ("torch.arange(rows, dtype", "torch.zeros(rows, dtype"),
        ("            logits_soft_cap=params.softcap,\n            q_data", "            q_data"),
        ("wanted = (kind, rows, tokens)", "wanted = (kind, 0, 0)"),
        ("heads, kv_heads, width, params.scale, params.softcap)", "heads, kv_heads, width, 0, 0)"),
        ("suffix_key.stride() != suffix_value.stride() or ", ""),
    ),
    "cpp": (
        ("*prefix_key.stride()[:2]", "*prefix_key.stride()[1:]"),
        ("*own_value.stride()[:3]", "*own_key.stride()[:3]"),
        ("suffix=own_key.shape[2]", "suffix=0"),
        ("pool.length + 1 for", "pool.length for"),
        ("params.window or 0,", "0,"),
        ("0 if start < 0 else params.window or 0", "0"),
        ("params.softcap or 0", "0"),
        ("None if sinks is None else sinks.data_ptr()", "None"),
        ("params, start=start)", "params)"),
    ),
    "triton": (
        ("weight = tl.exp(lse - higher)", "weight = tl.exp2(lse - higher)"),
        ("most + tl.log(total)", "most + tl.log2(total)"),
        ("most + tl.log(total)", "most"),
        ("(row * KV_HEADS + head) * GROUPS + group", "(row * GROUPS + group) * KV_HEADS + head"),
        ("% KV_HEADS)", "% 1)"),
        ("tl.minimum(first + part_tokens, tokens)", "tokens"),
        ("seen = token < last", "seen = token < last - 1"),
        ('scores = tl.where(seen[None, :], scores, float("-inf"))', "pass"),
        ("if SOFTCAP:", "if False:"),
        ("2.0 * tl.sigmoid(2.0 *", "2.0 * tl.sigmoid("),
        ("if SINKS:", "if False:"),
        ("tl.load(sinks + head * GROUPS + group", "tl.load(sinks + group"),
        ("out = out * shrunk[:, None] + tl.dot", "out = out + tl.dot"),
        ("total = total * shrunk + tl.sum", "total = total + tl.sum"),
        ("key + batch * key_batch_stride + head", "key + head"),
        ("value + batch * value_batch_stride + head", "value + head"),
        ("[:, :, cut:], suffix_value[:, :, cut:]", "[:, :, cut // 2 :], suffix_value[:, :, cut // 2 :]"),
        ("map(last_dim_contiguous, (query, key, value))", "query, key, value"),
        ("mine = out_parts[shared:], lse_parts[shared:]", "mine = out_parts, lse_parts"),
    ),
}


def mutant(name: str, old: str, new: str, folder: Path) -> AttentionBackend:
    """A backend of its file with one place changed."""
    source = Path(inspect.getfile(type(choose.build(name)))).read_text(encoding="utf-8")
    assert old in source, f"{name}.py has no {old!r} any more: change the fault with it"
    file = folder / f"{name}_with_a_fault.py"
    file.write_text(source.replace(old, new, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    made: AttentionBackend = module.Backend(choose.build("sdpa"))
    return made


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.endswith("_with_a_fault")]:
        del sys.modules[name]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("name", "old", "new"), [(name, *fault) for name, faults in OWN_FAULTS.items() for fault in faults]
)
def test_a_fault_in_a_backends_file_is_found(
    name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    assert is_found(on_the_cpu(mutant(name, old, new, tmp_path), monkeypatch)), f"{old!r} -> {new!r}"
    counted("faults of attention planted and found")


KERNEL_FAULTS = (
    ("a.prefix - first < BLOCK ? a.prefix - first : BLOCK", "BLOCK"),
    ("scores[i] = lowest;", "scores[i] = 0;"),
    ("store(sums + i, load(sums + i) * less)", "store(sums + i, load(sums + i))"),
    ("work.mass[q] *= less;", ""),
    ("a.sinks[head * groups + group] * LOG2E", "a.sinks[head * groups + group]"),
    ("work.mass[q] = a.sinks ? 1.0f : 0.0f;", "work.mass[q] = 0.0f;"),
    ("nearest + q / groups - first", "nearest + q / groups - first + 1"),
    ("start = a.window ? end - a.window : 0", "start = a.window ? end - a.window + 1 : 0"),
    ("if (first + keys <= oldest) continue;", "if (first + keys <= oldest + BLOCK) continue;"),
    ("block * BLOCK < furthest", "block * BLOCK < furthest - BLOCK"),
    ("work.mass[q] += sum_of(mass);", "work.mass[q] = sum_of(mass);"),
    ("most * ((1.0f - e) / (1.0f + e))", "most * ((1.0f - e) / (2.0f + e))"),
    ("head * a.suffix_value_head", "head * a.suffix_key_head"),
    ("at(d.query, row * d.query_row)", "at(d.query, 0)"),
    ("row += a.rows;", ""),
    ("(a.suffix - 1) * a.suffix_value_token", "(a.suffix - 1) * a.suffix_key_token"),
    ("hidden < a.prefix ? hidden : a.prefix", "hidden"),
    ("task - place.first_task", "task"),
)


@pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")
@pytest.mark.parametrize(
    ("old", "new"),
    [pytest.param(*fault, marks=[pytest.mark.full] if place % 6 else []) for place, fault in enumerate(KERNEL_FAULTS)],
)
def test_a_fault_in_the_cpp_kernels_is_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    source = build.SOURCE.read_text(encoding="utf-8")
    assert old in source, f"kernels.cpp has no {old!r} any more: change the fault with it"
    (tmp_path / "kernels.cpp").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "kernels.cpp")
    monkeypatch.setattr(build, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build._FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._found.cache_clear()
    try:
        backend = choose.build("cpp")
        assert build.why_not() is None
        assert any(not found.kept for found in contract.check(backend, CPU, dtypes=backend.dtypes)), f"{old} -> {new}"
    finally:
        build._found.cache_clear()
    counted("faults of attention planted and found")


def test_every_backend_has_faults_of_its_own() -> None:
    assert {*OWN_FAULTS, "sdpa"} == {*BACKENDS}


# ---- FlashInfer's plans ----------------------------------------------------------------------------------------------


def test_flashinfer_plans_once_a_step_and_keeps_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of different lengths in one batch, four layers of two kinds, rows that finish on the way."""
    backend: Any = on_the_cpu(choose.build("flashinfer"), monkeypatch)
    planned: list[tuple[int, int]] = []
    wrapper = sys.modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper
    whole = wrapper.plan

    def noted(self: Any, indptr: Tensor, indices: Tensor, last: Tensor, *shape: Any, **kwargs: Any) -> None:
        planned.append((len(last), int(last[0])))
        whole(self, indptr, indices, last, *shape, **kwargs)

    monkeypatch.setattr(wrapper, "plan", noted)
    query, prefix = torch.randn(5, 2, 3, 64).half(), torch.randn(2, 7, 64).half()
    pool = torch.randn(5, 2, 40, 64).half()
    for step in range(30):
        planned.clear()
        rows = 5 if step < 20 else 3
        for _ in range(2):
            for params in (AttentionParams(0.1), AttentionParams(0.1, softcap=9.0)):
                for tokens in (step + 1, step + 8):
                    suffix = pool[:rows, :, :tokens]
                    backend.decode(query[:rows], prefix, prefix, suffix, suffix, params)
        assert len(planned) <= 2 * 2 + 2, planned
    assert len(backend._plans) <= 2 * 2 * 3
