"""Decode steps that are replayed as CUDA graphs, on a CPU with a stand-in that has a graph's semantics
(``support/recorded_graphs.py``); on a GPU with CUDA graphs themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.engine_models import build, forced_token, prompt_of, shared_model
from support.engine_runs import generate, make_engine, outcome
from support.recorded_graphs import Replay, as_on_a_gpu, record
from torch import Tensor

from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import choose, graphs
from specrej_eval.kv.cache import SuffixPool

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "stablelm")
"""Plain; norms of queries; windows; windows and softcap; two rotary embeddings; one weight for all; and others."""
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
    wanted = script(ModelRunner(shared_model(name), path="shared_prefix"))
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
    wanted = script(ModelRunner(shared_model("mistral"), path="shared_prefix"))
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
