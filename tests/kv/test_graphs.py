"""Attention of decode steps that are recorded and replayed: the contract of attention backends, on a CPU with a
stand-in for CUDA graphs, on a GPU with CUDA graphs themselves. And that the stand-in is as strict as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.recorded_graphs import ERROR, record
from torch import Tensor

from specrej_eval.kv import choose, contract, graphs
from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.cache import SuffixPool
from specrej_eval.kv.contract import CASES, Case

CPU = torch.device("cpu")
DECODING = [case for case in CASES if not case.prompt]
Counted = Callable[[str], None]


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> graphs.RecordedAttention:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", record)
    made = choose.graphs()
    monkeypatch.setattr(made, "devices", ("cpu",), raising=False)
    return made


@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_what_is_replayed_computes_attention(
    attention: graphs.RecordedAttention, case: Case, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    for dtype in contract.TOLERANCES:
        found = contract.outcome(attention, case, dtype, CPU)
        assert found.kept and found.left_to is None, found
        counted("attention cases by graphs")
    if (case.value_dim or case.head_dim) != case.head_dim:
        return
    monkeypatch.setattr(sdpa, "_way", lambda query, value: "flash")  # as on a GPU in half precision
    found = contract.outcome(attention, case, torch.float32, CPU)
    assert found.kept and found.left_to is None, found
    counted("attention cases by graphs")


@pytest.mark.parametrize("rounded", [False, True], ids=["", "rounded"])
def test_scores_are_not_rounded_to_half_precision(
    attention: graphs.RecordedAttention, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are not in fused kernels: of scores in the hundreds, half precision keeps no digit behind the point."""
    if rounded:
        monkeypatch.setattr(sdpa, "_wide_products", lambda query, key: torch.bmm(query, key.transpose(1, 2)).float())
    found = contract.outcome(attention, Case("large scores", rows=30, scale=4.0), torch.bfloat16, CPU)
    assert found.kept is not rounded, found


def _changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any, Tensor], Tensor]) -> None:
    """The mask of the suffix, after all."""
    whole = graphs._Member.seen

    def seen(self: Any, window: int | None) -> Any:
        first, prefix, own = whole(self, window)
        return first, prefix, change(self, window, own)

    monkeypatch.setattr(graphs._Member, "seen", seen)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch, lambda member, window, own: torch.ones_like(own))


def length_of_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch, lambda member, window, own: torch.arange(len(own)) <= member.start + 1)


def window_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graphs._Member.seen
    monkeypatch.setattr(graphs._Member, "seen", lambda self, window: whole(self, None))


def window_of_one_less(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graphs._Member.seen
    monkeypatch.setattr(graphs._Member, "seen", lambda self, window: whole(self, window and max(1, window - 1)))


def memory_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuffixPool, "clear", lambda self, first, end: None)


def not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "index_copy_", lambda self, *given: self)


def prefix_and_suffix_not_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "merge", lambda one, lse, two, other: ((one + two) / 2, torch.logaddexp(lse, other)))


def no_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_capped", lambda scores, params: scores)


def no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "with_sinks", lambda out, lse, sinks: out)


@pytest.mark.parametrize(
    "fault",
    [
        no_mask,
        length_of_the_recording,
        window_forgotten,
        window_of_one_less,
        memory_not_cleared,
        not_stored,
        prefix_and_suffix_not_weighed,
        no_softcap,
        no_sinks,
    ],
    ids=lambda fault: fault.__name__,
)
def test_the_contract_finds_faults(
    attention: graphs.RecordedAttention, fault: Any, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    fault(monkeypatch)
    outcomes = contract.check(attention, CPU, dtypes=(torch.float32,), cases=DECODING)
    assert not all(found.kept for found in outcomes)
    counted("planted faults of CUDA graphs found")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_what_is_replayed_computes_attention_on_the_gpu(case: Case) -> None:
    for dtype in contract.TOLERANCES:
        found = contract.outcome(choose.graphs(), case, dtype, torch.device("cuda"))
        assert found.kept and found.left_to is None, found


# ---- how torch is asked ----------------------------------------------------------------------------------------------


class Cuda:
    """The names of ``torch.cuda`` that a recording uses, as torch's source has them: who ran on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
        self.told: list[str] = []
        self.now = self.Stream(name="main")
        self.fails = fails
        for name in ("current_stream", "Stream", "stream", "device", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(graphs, "_streams", {})

    def Stream(self, device: Any = None, *, name: str = "side") -> Any:
        def wait_stream(other: Any) -> None:
            self.told.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    def current_stream(self, device: Any) -> Any:
        return self.now

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def device(self, device: Any) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> str:
        return "the graph"

    @contextmanager
    def graph(self, graph: str, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.now = self.now, stream
        self.told.append(f"recording, {capture_error_mode}")
        try:
            yield
        finally:
            self.told.append("recorded")
            if self.fails:  # torch leaves its stream in place then
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.now = before


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_a_region_is_run_and_then_recorded_on_one_stream_beside(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, fails=fails)
    main = cuda.now

    def region() -> Tensor:
        cuda.told.append(f"run on {cuda.now.name}")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="during capture") if fails else nullcontext():
        assert graphs.on_cuda(region, torch.device("cuda"))[0] == "the graph"
    assert cuda.now is main
    recording = ["recording, thread_local", "run on side", "recorded"]
    assert cuda.told == ["side waits for main", "run on side", "main waits for side", *recording]


def test_the_main_stream_waits_for_a_first_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, fails=False)

    def region() -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        graphs.on_cuda(region, torch.device("cuda"))
    assert cuda.told == ["side waits for main", "main waits for side"]


def test_torch_has_what_is_asked_of_it() -> None:
    assert {"stream", "capture_error_mode"} <= inspect.signature(torch.cuda.graph.__init__).parameters.keys()
    assert callable(torch.cuda.CUDAGraph.replay) and callable(torch.cuda.set_sync_debug_mode)


# ---- the stand-in ----------------------------------------------------------------------------------------------------


def test_a_recording_leaves_memory_as_it_was_and_a_replay_takes_what_is_there_then() -> None:
    given, stored = torch.tensor([1.0, 2.0]), torch.zeros(4)

    def region() -> Tensor:
        doubled = given * 2
        stored[:2].add_(doubled)
        return doubled.view(1, 2) + stored[:2]

    before = stored.clone()
    graph, out = record(lambda: region(), CPU)
    assert torch.equal(stored, before + torch.tensor([2.0, 4.0, 0.0, 0.0])), "the first run is a real one"
    assert out.isnan().all()
    given.fill_(5)
    stored.zero_()
    graph.replay()
    assert out.tolist() == [[20.0, 20.0]] and stored.tolist() == [10.0, 10.0, 0.0, 0.0]
    address = out.data_ptr()
    graph.replay()
    assert out.tolist() == [[30.0, 30.0]] and out.data_ptr() == address


def test_numbers_of_python_are_those_of_the_recording() -> None:
    given, number = torch.tensor([1.0]), [1]
    graph, out = record(lambda: given + number[0], CPU)
    number[0] = 7
    graph.replay()
    assert out.tolist() == [2.0]


@pytest.mark.parametrize(
    "region",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.int64)),
    ],
)
def test_what_makes_the_host_wait_cannot_be_recorded(region: Any) -> None:
    given = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match=ERROR):
        record(lambda: region(given), CPU)
