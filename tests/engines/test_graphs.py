"""Decode steps that are replayed as CUDA graphs, on a CPU with a stand-in that has a graph's semantics
(``support/recorded_graphs.py``); on a GPU with CUDA graphs themselves."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from support.engine_models import build, forced_token, prompt_of, shared_model
from support.engine_runs import generate, make_engine, outcome
from support.failing_allocations import MemoryRunsOut
from support.recorded_graphs import Replay, as_on_a_gpu, record
from torch import Tensor

from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose, graphs, memory
from specrej_eval.kv.cache import SuffixPool
from specrej_eval.kv.probe import difference

FAMILIES = [
    *("llama", "qwen3", "mistral", "gemma2"),
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in ("gemma3_text", "phi3", "cohere2", "stablelm", "gpt_neox")
    ),
]
"""Plain; norms of queries; windows; windows and softcap; and others."""
Counted = Callable[..., None]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replay]]:
    """Graphs can be had, and are short. What was recorded."""
    monkeypatch.setattr(graphs, "HORIZON", 12)
    monkeypatch.setattr(graphs, "WORTH", 4)
    with as_on_a_gpu(monkeypatch) as made:
        yield made


def with_graphs(name: str) -> ModelRunner:
    runner = ModelRunner(shared_model(name), path="shared_prefix", graphs=True)
    assert runner.replays, name
    return runner


# ---- forced tokens ---------------------------------------------------------------------------------------------------


def script(runner: ModelRunner) -> list[Tensor]:
    """Logits of every step, in all the situations in which a graph could be another's, or too old."""
    found: list[Tensor] = []

    def start(length: int, rows: int, salt: int) -> Group:
        group = Group(runner.prefill(prompt_of(length, salt)), list(range(rows)), capacity=60, device=runner.device)
        group.target = 60
        return group

    def steps(count: int, *members: Group) -> None:
        for _ in range(count):
            tokens = []
            for group in members:
                mine = [forced_token(row, group.num_sampled) for row in group.row_ids]
                group.rows.tokens[:, group.num_sampled] = torch.tensor(mine, dtype=torch.int32)
                group.num_sampled += 1
                tokens += mine
            found.append(runner.step(members, torch.tensor(tokens, device=runner.device)).clone())
            for group in members:
                group.advance()

    with torch.inference_mode(), runner.active():
        one, other = start(21, 6, 1), start(5, 3, 2)
        steps(6, one)
        steps(5, one, other)
        one.drop([0, 3])  # the last row moves into a hole
        steps(3, one, other)
        other.drop([0])
        steps(14, one, other)  # beyond a horizon
        one.select([2, 0, 3, 0], [2, 0, 3, 9], 60)  # a cut, with a fork
        steps(5, one, other)
        one.select([3, 2, 1, 0], [9, 3, 0, 2], 60)  # all rows stay, and their memory moves
        steps(6, one, other)

        alike, stranger = start(9, 4, 3), start(9, 4, 4)  # the same sizes, another prompt
        steps(2, stranger)
        steps(6, alike)
        steps(5, stranger)
        alike.park()
        alike.unpark()
        steps(6, alike)
        steps(6, alike.split(), alike)
    return found


@cache
def plain(name: str) -> list[Tensor]:
    """What the script must give."""
    return script(ModelRunner(shared_model(name), path="shared_prefix"))


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    assert len(found) == len(wanted)
    largest = max(float(each.abs().max()) for each in wanted)
    return all(
        one.shape == two.shape and bool(((one - two).abs() <= 1e-4 * largest).all())  # a NaN is not
        for one, two in zip(found, wanted, strict=True)
    )


def replays(recorded: list[Replay]) -> int:
    return sum(each.replays for each in recorded)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_plain_steps(name: str, recorded: list[Replay], counted: Counted) -> None:
    wanted = plain(name)
    runner = with_graphs(name)
    recorded.clear()
    assert equal(script(runner), wanted)
    assert runner.replays
    assert replays(recorded) > len(wanted) / 3, "else it was not about graphs"
    counted("decode steps replayed by a stand-in for CUDA graphs", replays(recorded))


# ---- planted faults --------------------------------------------------------------------------------------------------


def _filled(monkeypatch: pytest.MonkeyPatch, kept: Callable[[Any], list[Tensor]]) -> None:
    """What is filled before a replay stays as it was recorded."""
    whole = graphs._Recorded._fill

    def fill(self: Any, *given: Any) -> None:
        stale = [each.clone() for each in kept(self)] if self._graph is not None else []
        whole(self, *given)
        for each, was in zip(kept(self), stale, strict=False):
            each.copy_(was)

    monkeypatch.setattr(graphs._Recorded, "_fill", fill)


def _mask(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    whole = graphs._Member.seen
    monkeypatch.setattr(graphs._Member, "seen", lambda self, window: change(self, lambda w=window: whole(self, w)))


def stale_length(monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(monkeypatch, lambda held: [member.length for member in held.members])


def stale_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(monkeypatch, lambda held: [held._tokens])


def stale_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    _filled(monkeypatch, lambda held: [held._positions])


def forgotten_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_seen(member: Any, seen: Any) -> Any:
        first, prefix, own = seen()
        return first, prefix, torch.ones_like(own)

    _mask(monkeypatch, all_seen)


def mask_from_a_number_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(member: Any, seen: Any) -> Any:
        first, prefix, own = seen()
        return first, prefix, member._places[: len(own)] <= member.pool.length

    _mask(monkeypatch, fixed)


def own_token_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_less(member: Any, seen: Any) -> Any:
        first, prefix, own = seen()
        return first, prefix, own & (member._places[: len(own)] != member.length)

    _mask(monkeypatch, one_less)


def one_token_too_many_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(member: Any, seen: Any) -> Any:
        first, prefix, own = seen()
        return first, prefix, own | (member._places[: len(own)] == member.length + 1)

    _mask(monkeypatch, one_more)


def forgotten_window(monkeypatch: pytest.MonkeyPatch) -> None:
    _mask(monkeypatch, lambda member, seen: seen(None))


def window_of_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graphs._Member.seen

    def wider(self: Any, window: int | None) -> Any:
        return whole(self, None if window is None else window + 1)

    monkeypatch.setattr(graphs._Member, "seen", wider)


def memory_behind_the_tokens_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuffixPool, "clear", lambda self, first, end: None)


def nothing_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "index_copy_", lambda self, *given: self)


def logits_of_rows_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(self: Any, groups: Any, tokens: Tensor) -> Tensor:
        self._fill(groups, tokens)
        self._graph.replay()
        return self._logits[: len(tokens)]

    monkeypatch.setattr(graphs._Recorded, "replay", replay)


def _serves(monkeypatch: pytest.MonkeyPatch, rule: Callable[[Any, Any, Any], bool]) -> None:
    monkeypatch.setattr(graphs._Member, "serves", rule)


def _in_range(member: Any, pool: SuffixPool) -> bool:
    return pool.rows <= member.rows and member.start <= pool.length < member.end


def another_prompt_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _serves(monkeypatch, lambda member, prefix, pool: _in_range(member, pool))


def memory_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    _serves(
        monkeypatch,
        lambda member, prefix, pool: member.prefix is prefix and member.pool is pool and _in_range(member, pool),
    )


def suffix_longer_than_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graphs._Member.serves

    def serves(self: Any, prefix: Any, pool: Any) -> bool:
        end, self.end = self.end, 10**9
        try:
            return whole(self, prefix, pool)
        finally:
            self.end = end

    _serves(monkeypatch, serves)


def what_a_wrong_replay_overwrites_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stale_length(monkeypatch)
    monkeypatch.setattr(graphs._Recorded, "earlier", lambda self: [])


def nobody_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    stale_tokens(monkeypatch)
    monkeypatch.setattr(graphs, "_differs", lambda found, wanted: None)


SAID = (
    stale_length,
    stale_tokens,
    stale_positions,
    forgotten_mask,
    mask_from_a_number_of_python,
    own_token_not_seen,
    one_token_too_many_seen,
    forgotten_window,
    window_of_one_more,
    memory_behind_the_tokens_left_as_it_is,
    nothing_stored,
)
"""In the first replay; the run goes on without graphs."""
SEEN = (
    logits_of_rows_that_are_gone,
    another_prompt_of_the_same_size,
    memory_that_has_moved,
    suffix_longer_than_recorded,
    what_a_wrong_replay_overwrites_is_lost,
    nobody_compares,
)
"""In the numbers: nothing else would find these, so ``test_logits_are_those_of_plain_steps`` has to."""


def _with_fault(fault: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelRunner, bool]:
    """The runner, and whether logits are right all the same."""
    wanted = plain("mistral")
    runner = with_graphs("mistral")
    fault(monkeypatch)  # only now: the probe would have found it
    try:
        return runner, equal(script(runner), wanted)
    except (RuntimeError, IndexError):
        return runner, False


@pytest.mark.parametrize("fault", SAID, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_in_the_first_replay_and_no_number_is_wrong(
    fault: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, counted: Counted
) -> None:
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        runner, right = _with_fault(fault, monkeypatch)
    assert right and not runner.replays
    [said] = [record.getMessage() for record in caplog.records]
    assert "MistralForCausalLM are not replayed as CUDA graphs (its " in said
    counted("planted faults of CUDA graphs found")


@pytest.mark.parametrize("fault", SEEN, ids=lambda fault: fault.__name__)
def test_the_numbers_show_the_other_faults(fault: Any, monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    _, right = _with_fault(fault, monkeypatch)
    assert not right
    counted("planted faults of CUDA graphs found")


# ---- whole runs ------------------------------------------------------------------------------------------------------

LONG = {"n": 6, "max_gen_toks": 60, "first_look": 20}


@cache
def undisturbed(name: str) -> list[Any]:
    return list(map(outcome, generate(make_engine(build(name, vocab_size=261)), **LONG)))


def run(engine: Any) -> list[Any]:
    return list(map(outcome, generate(engine, **LONG)))


def engine_of(name: str) -> Any:
    return make_engine(build(name, vocab_size=261), graphs=True)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_answers_are_those_without_graphs(name: str, recorded: list[Replay]) -> None:
    wanted = undisturbed(name)
    engine = engine_of(name)
    assert engine.describe()["cuda_graphs"] is True
    recorded.clear()
    assert run(engine) == wanted
    assert len(recorded) > 2 and replays(recorded) > 10 and engine.describe()["cuda_graphs"] is True
    assert make_engine(build(name, vocab_size=261)).describe()["cuda_graphs"] is False


def test_no_graph_outlives_the_call_it_was_made_in(recorded: list[Replay]) -> None:
    engine = engine_of("llama")
    run(engine)
    assert recorded and engine.runner._graphs._held is None


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "bloom"])
def test_what_cannot_be_recorded_runs_as_before_and_is_said_once(
    name: str, recorded: list[Replay], caplog: pytest.LogCaptureFixture
) -> None:
    """Experts that ask the host, a model that looks at its tokens, and one on another path."""
    with caplog.at_level(logging.WARNING, "specrej_eval.kv"):
        engine = engine_of(name)
        assert run(engine) == undisturbed(name)
    [said] = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    assert "are not replayed as CUDA graphs" in said
    assert engine.describe()["cuda_graphs"] is False and not recorded


def test_a_model_that_asks_the_cache_where_it_is_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    whole = model.forward

    def forward(input_ids: Tensor, position_ids: Any = None, **given: Any) -> Any:
        cache = given.get("past_key_values") or given.get("cache")
        if cache is not None and input_ids.shape[1] == 1:  # right in plain steps
            position_ids = torch.full_like(input_ids, cache.get_seq_length())
        return whole(input_ids, position_ids=position_ids, **given)

    forward.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]  # what the runner asks it for
    monkeypatch.setattr(model, "forward", forward)
    with caplog.at_level(logging.WARNING, "specrej_eval.kv"):
        runner = ModelRunner(model, path="shared_prefix", graphs=True)
    assert not runner.replays and "takes its place in the text from a number" in caplog.text


def test_hooks_of_somebody_are_called_in_every_step(caplog: pytest.LogCaptureFixture) -> None:
    """What they do may depend on anything: here every third pass has a token forbidden."""

    def answers(graphs: bool) -> tuple[list[Any], int]:
        engine = make_engine(build("llama", vocab_size=261), graphs=graphs)
        assert engine.runner.replays is graphs
        calls: list[int] = []

        def hook(module: Any, given: Any, logits: Tensor) -> Tensor | None:
            calls.append(1)
            return None if len(calls) % 3 else logits.index_fill(-1, torch.tensor([97]), -1e9)

        engine.model.lm_head.register_forward_hook(hook)
        return run(engine), len(calls)

    assert answers(graphs=True) == answers(graphs=False)
    assert caplog.text.count("somebody's hooks wait") == 1


def test_attention_of_another_backend_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    other = choose.build("flash_attn")
    other.why_not = lambda *given: None  # type: ignore[method-assign]
    other._of = lambda query, value: other._fallback()  # type: ignore[method-assign]
    runner = ModelRunner(shared_model("llama"), attention=other, graphs=True)
    assert runner.attention is other and not runner.replays
    assert "its attention is computed by flash_attn" in caplog.text


@pytest.mark.parametrize("when", ["recording", "comparing"])
def test_memory_that_runs_out_costs_the_graph_and_nothing_else(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of("llama")
    failed: list[int] = []

    def fails(whole: Any, *given: Any) -> Any:
        out = whole(*given)  # so late that all it does is done
        failed.append(1)
        if len(failed) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    if when == "recording":
        recorder = graphs.RECORDERS["cpu"]
        monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda *given: fails(recorder, *given))
    else:
        replay = graphs._Recorded.replay
        monkeypatch.setattr(graphs._Recorded, "replay", lambda *given: fails(replay, *given))
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        assert run(engine) == undisturbed("llama")
    assert len(failed) > 2, "graphs are made again later"
    assert not engine.oom_splits and engine.runner.replays and not caplog.records


def test_another_threads_memory_may_run_out_at_any_time(
    monkeypatch: pytest.MonkeyPatch, recorded: list[Replay]
) -> None:
    engine = engine_of("llama")
    whole = graphs._Recorded.serves

    def serves(self: Any, groups: Any) -> bool:
        found = whole(self, groups)
        engine.runner._graphs.drop()  # as ``release_memory`` does there
        return found

    monkeypatch.setattr(graphs._Recorded, "serves", serves)
    recorded.clear()
    assert run(engine) == undisturbed("llama")
    assert recorded and engine.runner.replays


@pytest.mark.full
def test_memory_may_run_out_in_every_line_of_a_graph(monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)  # takes longer than the run
    wanted = undisturbed("mistral")
    engine = engine_of("mistral")
    with MemoryRunsOut(traced=True) as traced:
        assert run(engine) == wanted
    assert traced.operations is not None
    last: dict[tuple[str, ...], int] = {}
    for number, operation in enumerate(traced.operations):
        ours = tuple(line for line in operation.path if line.startswith("kv/graphs.py"))
        if ours:
            last[ours] = number
    assert len(last) > 20
    for number in last.values():
        engine = engine_of("mistral")
        with MemoryRunsOut(at=(number, number + 1)) as failing:
            assert run(engine) == wanted, failing.failed
        assert failing.failed and engine.runner.replays
        counted("failed allocations in CUDA graphs")


def test_a_wrong_replay_is_not_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of("llama")

    def wrong(region: Any, device: torch.device) -> tuple[Replay, Tensor]:
        graph, out = record(region, device)
        whole = graph.replay

        def replay() -> None:
            whole()
            out[-1, 0] += 0.05 * out.abs().max()

        monkeypatch.setattr(graph, "replay", replay)
        return graph, out

    monkeypatch.setitem(graphs.RECORDERS, "cpu", wrong)
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        assert run(engine) == undisturbed("llama")
    [said] = [record.getMessage() for record in caplog.records]
    assert "LlamaForCausalLM are not replayed as CUDA graphs (its logits differ by" in said
    assert engine.describe()["cuda_graphs"] is False


def test_a_replay_that_fails_is_a_plain_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of("llama")

    def replay(self: Replay) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(Replay, "replay", replay)
    assert run(engine) == undisturbed("llama")
    assert caplog.text.count("(RuntimeError: CUDA error: invalid argument)") == 1


def test_few_tokens_ahead_are_not_worth_a_graph(monkeypatch: pytest.MonkeyPatch, recorded: list[Replay]) -> None:
    engine = engine_of("llama")
    recorded.clear()
    monkeypatch.setattr(graphs, "WORTH", 61)
    assert run(engine) == undisturbed("llama")
    assert not recorded


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_logits_are_those_of_plain_steps_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    model = build(name, head_dim=64).to("cuda", dtype)
    wanted = script(ModelRunner(model, path="shared_prefix"))
    runner = ModelRunner(model, path="shared_prefix", graphs=True)
    assert runner.replays
    found = script(runner)
    assert runner.replays
    assert runner._graphs is not None and runner._graphs.taken > len(wanted) / 3
    for one, two in zip(found, wanted, strict=True):
        error, largest = float((one - two).abs().max()), float(two.abs().max())
        assert difference(error, largest, dtype, "logits") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_experts_on_the_gpu_are_replayed_or_left_alone() -> None:
    engine = make_engine(build("mixtral", vocab_size=261).cuda(), graphs=True)
    assert generate(engine, **LONG)
