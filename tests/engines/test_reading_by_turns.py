"""A long prompt is read chunk by chunk while rows of other prompts decode: nobody waits, and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.engine_models import prompt_of, shared_model
from support.engine_runs import HashReward, make_engine, outcome
from support.tiny_models import tiny_causal_lm

from specrej_eval import in_flight, scheduler
from specrej_eval.budget import resolve
from specrej_eval.config import RunConfig
from specrej_eval.engines.base import Opening
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.errors import LimitReached, OutOfMemoryError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.kv import prefill
from specrej_eval.kv.cache import Prefix

CHUNK = 16
TURN = 32
LONG = 200
"""Tokens of the long prompt: seven turns, and what is left of it."""
ENDS = (4, 48, 8)
"""``max_gen_toks`` of three prompts, two at a time: the last is let in when the first is done, beside the second."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CPU_CHUNK", CHUNK)
    monkeypatch.setattr(in_flight, "READ_A_TURN", TURN)
    monkeypatch.setattr(scheduler, "READ_A_TURN", TURN)


class Watched:
    """A run of three prompts, with what the engine did in order, and all keys that were ever stored of prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Any = None, **arguments: Any) -> None:
        config, _ = RunConfig.from_args(
            {"n": 24, "first_look": 2, "batch_size": 2, "top_k": 0, "score_every": 2, **arguments}
        )
        self.engine = make_engine(tiny_causal_lm(), path=path)
        self.generator = Generator(engine=self.engine, reward=HashReward(), config=config)
        texts = ("a short one", "another that is short", "x, y and z; " * (LONG // 12) + "?" * (LONG % 12 - 1))
        self.requests = [
            Request(prompt=self.engine.encode(text), config=config.replace(max_gen_toks=end))
            for text, end in zip(texts, ENDS, strict=True)
        ]
        assert self.requests[-1].prompt.num_tokens == LONG
        self.events: list[tuple[str, int]] = []
        self.on_event: Callable[[], None] = lambda: None
        self.keys: list[weakref.ref[torch.Tensor]] = []
        forward, decode, store = self.engine.runner._forward, self.engine.decode, Prefix.store

        def seen_forward(ids: Any, cache: Any, positions: Any, wanted: Any = None) -> Any:
            if int(positions.max()) > 60 and ids.shape[0] == 1:  # no row of a short prompt comes so far
                self._note("read", int(positions.max()) + 1)
            return forward(ids, cache, positions, wanted)

        def seen_decode(sessions: Sequence[Any], num_tokens: int) -> None:
            self._note("decode", sum(session.num_live for session in sessions))
            decode(sessions, num_tokens)

        def seen_store(prefix: Prefix, layer: int, *given: Any) -> Any:
            found = store(prefix, layer, *given)
            self.keys.append(weakref.ref(prefix.keys[layer]))
            return found

        self.engine.runner._forward = seen_forward  # type: ignore[method-assign]
        self.engine.decode = seen_decode  # type: ignore[method-assign]
        monkeypatch.setattr(Prefix, "store", seen_store)

    def _note(self, what: str, number: int) -> None:
        self.events.append((what, number))
        self.on_event()

    @property
    def chunks_read(self) -> int:
        return sum(what == "read" for what, _ in self.events)

    def run(self) -> Iterator[tuple[int, Any]]:
        return self.generator.run(self.requests, progress=False)

    def nothing_is_held(self) -> bool:
        self.engine.runner._forward = self.on_event = None  # type: ignore[method-assign,assignment]
        gc.collect()
        assert self.keys
        return all(key() is None for key in self.keys) and not any(
            session.groups or session._prefix for session in self.engine._open_sessions
        )


def alone(watched: Watched) -> list[Any]:
    """What comes of the prompts one by one, each read at once."""
    found = []
    for request in watched.requests:
        made = Generator(
            engine=make_engine(tiny_causal_lm(), path=watched.engine.runner.path),
            reward=HashReward(),
            config=watched.generator.config.replace(batch_size=1),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_flight, "READ_A_TURN", 10**6)
            found += [outcome(result) for _, result in made.run([request], progress=False)]
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_decode_between_two_chunks_and_no_bit_changes(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, alpha=alpha)
    results = dict(watched.run())
    assert [outcome(results[index]) for index in range(3)] == alone(watched)
    first = watched.events.index(("read", CHUNK * 4))  # the first that lies behind 60
    reading = watched.events[first:]
    turns = [number for what, number in reading if what == "read"]
    assert turns == [*range(CHUNK * 4, LONG, CHUNK), LONG], "each chunk once, and the end"
    pairs = [(before, then) for (before, _), (then, _) in pairwise(reading)]
    assert pairs.count(("read", "decode")) >= 5, "rows of the other prompt decode after each turn"
    assert all(rows > 0 for what, rows in watched.events if what == "decode")
    assert results[2].ledger.seconds["prefill"] > 0
    assert watched.nothing_is_held()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_is_read_by_turns_is_what_is_read_at_once(name: str) -> None:
    runner = ModelRunner(shared_model(name))
    prompts: list[tuple[Any, Any]] = [(prompt_of(70), runner.path), (prompt_of(70) + prompt_of(33, 1), runner.path)]
    with torch.inference_mode(), runner.active():
        want = runner.prefill_all(prompts)
    turns = runner.prefill_turns(prompts)
    read: list[int] = []
    while True:
        with torch.inference_mode(), runner.active():
            try:
                read.append(next(turns))
            except StopIteration as done:
                got = done.value
                break
        if len(read) % 2:  # somebody else reads in between
            with torch.inference_mode(), runner.active():
                runner.prefill_all([(prompt_of(70)[: 5 * len(read)] + prompt_of(5, 2), runner.path)])
    assert len(read) > 4
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one.logits, other.logits)
        for layer, keys in one.keys.items():
            assert torch.equal(keys, other.keys[layer]) and torch.equal(one.values[layer], other.values[layer])
    assert not runner.reader.store._in_use


@pytest.mark.parametrize("chunk", [0, 3, 8])
def test_memory_that_runs_out_in_a_chunk_costs_nothing_but_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    failed: list[int] = []

    def fail() -> None:
        if watched.events[-1][0] == "read" and watched.chunks_read == chunk + 1 and not failed:
            failed.append(len(watched.events))
            raise torch.OutOfMemoryError

    watched.on_event = fail
    results = dict(watched.run())
    assert failed
    assert [outcome(results[index]) for index in range(3)] == alone(watched)
    assert not results[1].degraded and watched.nothing_is_held()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError, KeyboardInterrupt])
def test_what_ends_a_run_in_the_middle_of_a_prompt_frees_everything(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)

    def fail() -> None:
        if watched.chunks_read > 3 and watched.events[-1][0] == "read":
            raise error

    watched.on_event = fail
    before = watched.engine.model.config._attn_implementation
    with pytest.raises(OutOfMemoryError if error is torch.OutOfMemoryError else error):
        list(watched.run())
    assert watched.nothing_is_held()
    assert watched.engine.model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in watched.engine.model.modules())


def test_an_error_of_others_while_a_prompt_is_read_frees_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)

    def fail() -> None:
        if watched.chunks_read > 3 and watched.events[-1][0] == "decode":
            raise KeyboardInterrupt  # Ctrl-C while the other prompt decodes

    watched.on_event = fail
    with pytest.raises(KeyboardInterrupt):
        list(watched.run())
    assert 3 < watched.chunks_read < LONG // CHUNK - 4
    assert watched.nothing_is_held()


def test_a_limit_leaves_a_prompt_that_is_being_read_to_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, max_seconds=10**5)
    found: dict[int, Any] = {}

    def hurry() -> None:
        if watched.chunks_read == 4:
            watched.generator.started -= 10**6

    watched.on_event = hurry
    with pytest.raises(LimitReached, match="2 of 3 prompts"):
        found.update(watched.run())
    assert watched.chunks_read < 4 + TURN // CHUNK, "nothing more is read"
    assert watched.nothing_is_held()


def test_a_start_that_fails_leaves_no_session_open(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    follow, calls = watched.engine.follow, iter(range(100))

    def failing(session: Any, plan: Any) -> None:
        if next(calls) == 1:
            raise ValueError
        follow(session, plan)

    watched.engine.follow = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError):
        list(watched.run())
    assert watched.nothing_is_held()


def test_models_that_read_prompts_whole_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, path="replicated")
    results = dict(watched.run())
    assert [outcome(results[index]) for index in range(3)] == alone(watched)
    assert next(number for what, number in watched.events if what == "read") == LONG


def test_a_turn_reads_about_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: TransformersEngine = make_engine(tiny_causal_lm())
    config, _ = RunConfig.from_args({"n": 2, "max_gen_toks": 4})
    asked = ((TURN, 6), (CHUNK, 12), (1, 12), (LONG - 1, 1), (LONG, 0), (10**6, 0))
    for letter, (tokens, turns) in zip("abcdef", asked, strict=True):
        prompt = engine.encode(letter * (LONG - 1))  # nothing in common: what is held need not be read
        opening = Opening(prompt=prompt, config=config, budget=resolve(config, LONG))
        reading = engine.open_by_turns([opening], tokens=tokens)
        found = 0
        while True:
            try:
                next(reading)
            except StopIteration as done:
                [session] = done.value
                break
            found += 1
        assert found in (turns, turns + 1), (tokens, found)
        assert session.prompt_tokens == LONG
        engine.close(session)
