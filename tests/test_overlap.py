"""A reward model with devices of its own scores in a thread while rows of other prompts decode, and nobody can tell but
by the clock.

There is one device here, so that it happens is forced: on one thread of the CPU both models compute the same bits.
"""

from __future__ import annotations

import gc
import json
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FULL, forked

import specrej_eval
from specrej_eval import in_flight, scheduler
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult
from specrej_eval.errors import OutOfMemoryError, RewardError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import InFlight
from specrej_eval.kv import shared_prefix
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.native import build
from specrej_eval.kv.steps import PrefillStep, PromptPart
from specrej_eval.overlap import overlapped
from specrej_eval.rewards.checkpoints.forward import Forward
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.checkpoints.shared_body import SharedBody
from specrej_eval.rewards.kinds.ensemble import Ensemble

PROMPTS = [f"Q: {a} + {b} = ?\nA:" for a, b in ((39, 16), (15, 53), (27, 72), (8, 91), (64, 5), (33, 48))]
HERE = "specrej-overlap"


SMALL = {"max_gen_toks": 24, "first_look": 4, "n": 6, "batch_size": 3, "device": "cpu"}
LOADED = ("reward_model", "reward_ensemble", "reward_cache", "compile")
"""Arguments that other models are loaded for."""


@cache
def loaded(**args: Any) -> Generator:
    return specrej_eval.load(device="cpu", **args)


def load(**args: Any) -> Generator:
    """A generator with models of its own kind, which are loaded once."""
    models = loaded(**{name: args[name] for name in LOADED if name in args})
    config, _ = RunConfig.from_args(SMALL | args)
    return Generator(engine=models.engine, reward=models.reward, config=config)


class Forced:
    """Overlap is on; what goes on beside what, by the prompts' places."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.turns: list[tuple[list[int], list[int], int]] = []
        """(those that are scored, those that decode meanwhile, how many tokens)."""
        looks, beside = InFlight.looks, InFlight._scored_beside
        due: list[int] = []

        def noted(self_: InFlight, waiting: Any, others: Any) -> Any:
            due[:] = [work.index for work in waiting]
            return looks(self_, waiting, others)

        def seen(self_: InFlight, scored: Any, others: Any, num_tokens: int) -> Any:
            self.turns.append((list(due), [work.index for work in others], num_tokens))
            return beside(self_, scored, others, num_tokens)

        patch.setattr(InFlight, "overlaps", True)
        patch.setattr(InFlight, "looks", noted)
        patch.setattr(InFlight, "_scored_beside", seen)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Forced:
    return Forced(monkeypatch)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == HERE]
    assert shared_prefix._here.step is None and build.in_use() is None


def told(result: GenerationResult) -> dict[str, Any]:
    """Everything but seconds and memory."""
    whole = result.to_dict()
    ledger = {name: value for name, value in whole["ledger"].items() if "seconds" not in name and name != "peak_bytes"}
    return {**whole, "ledger": ledger}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_cost(record: Any) -> Any:
    """A record of any depth, without seconds and memory."""
    if isinstance(record, dict):
        kept = {k: without_cost(v) for k, v in record.items() if "seconds" not in k and k not in ("peak_bytes", "time")}
        return {name: value for name, value in kept.items() if name != "checksum"}
    return [without_cost(each) for each in record] if isinstance(record, list) else record


def by_prompt(records: Sequence[Any]) -> dict[str, list[str]]:
    """Each prompt's records, in order: prompts may take turns in any order."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(json.dumps([record.get("prompt_hash"), record.get("key")]), []).append(
            json.dumps(without_cost(record), sort_keys=True)
        )
    return found


def letters(conversation: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [sum(map(ord, response)) % 97 + len(response) / 100 for response in responses]


CASES: dict[str, dict[str, Any]] = {
    "every score, every audit": {"score_every": 3, "audit": 1.0, "logprobs": True},
    "waves of best of n": {"strategy": "best_of_n", "n": 7, "kv_budget_tokens": 110, "first_look": None},
    "speculative rejection": {},
    "uniforms in strata": {"variance_reduce": True, "alpha": 0.25},
    "ranks of two": {"reward_model": f"{DEMO_REWARD}+0.5*{__name__}:letters", "reward_ensemble": "rank", "audit": 0.5},
    "nothing is cached": {"reward_cache": "off"},
    "no kernels": {"compile": "off", "batch_size": 6},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if place < 2 else pytest.mark.full) for place, case in enumerate(CASES)]
)
def test_results_records_and_counts_are_those_of_one_thing_after_the_other(
    case: str, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    def run(folder: str) -> tuple[list[Any], Any, Any]:
        paths = {name: tmp_path / folder / f"{name}.jsonl" for name in ("journal", "trace_path")}
        args = {**CASES[case], **{name: str(path) for name, path in paths.items()}}
        results = load(**args).generate(PROMPTS, until="\n")
        events = [event for event in lines(paths["trace_path"]) if event["event"] != "run"]
        return [told(result) for result in results], by_prompt(lines(paths["journal"])[1:]), by_prompt(events)

    alone = run("alone")
    with pytest.MonkeyPatch.context() as patch:
        forced = Forced(patch)
        beside = run("beside")
    assert len(forced.turns) > 5, "nothing was done at the same time, so nothing was tested"
    assert beside[0] == alone[0]
    assert beside[1:] == alone[1:]
    counted("turns of the loop in which scores were made while others decoded", len(forced.turns))


def test_what_decodes_together_does_not_depend_on_the_clock(forced: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    score, drawn = Forward.head_scores, random.Random(5)

    def late(self_: Forward, hidden: Any) -> Any:
        time.sleep(drawn.choice((0.0, 0.0, 0.02)))
        return score(self_, hidden)

    found = []
    for _ in range(2):
        batches: list[tuple[list[int], int]] = []
        generator = load()
        decode = generator.engine.decode

        def seen(sessions: Any, num_tokens: int, batches: Any = batches, decode: Any = decode) -> None:
            batches.append(([session.num_live for session in sessions], num_tokens))
            decode(sessions, num_tokens)

        with monkeypatch.context() as patch:
            patch.setattr(generator.engine, "decode", seen)
            generator.generate(PROMPTS)
        found.append((batches, list(forced.turns)))
        forced.turns.clear()
        monkeypatch.setattr(Forward, "head_scores", late)
    assert found[0] == found[1] and len(found[0][1]) > 5


def test_another_prompt_decodes_while_one_is_scored(forced: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward waits until it has: one after the other, it would wait for ever."""
    generator = load(reward_model=f"{__name__}:letters", batch_size=2)
    decoded = threading.Event()
    threads: set[str] = set()
    decode, score = generator.engine.decode, generator.reward.score
    beside: list[bool] = []

    def seen_decode(sessions: Any, num_tokens: int) -> None:
        decode(sessions, num_tokens)
        decoded.set()

    def waiting(*args: Any) -> list[float]:
        threads.add(threading.current_thread().name)
        if threading.current_thread().name == HERE:
            beside.append(decoded.wait(60))
        return score(*args)

    def cleared(self_: InFlight, *args: Any) -> Any:
        decoded.clear()
        return scored_beside(self_, *args)

    scored_beside = InFlight._scored_beside
    monkeypatch.setattr(InFlight, "_scored_beside", cleared)
    monkeypatch.setattr(generator.engine, "decode", seen_decode)
    monkeypatch.setattr(generator.reward, "score", waiting)
    generator.generate(PROMPTS[:3])
    assert len(beside) > 2 and all(beside)
    assert threads == {HERE, "MainThread"}


def test_prompts_that_are_always_due_together_take_turns(forced: Forced) -> None:
    """Without answers that end early all prompts come to their looks at the same token."""
    generator = load(reward_model=f"{__name__}:letters", batch_size=4, max_gen_toks=16)
    generator.engine.eos_ids = ()  # type: ignore[attr-defined]
    generator.generate(PROMPTS[:4])
    assert forced.turns[0] == ([2, 3], [0, 1], 1)
    assert len(forced.turns) > 4


def test_one_prompt_at_a_time_is_scored_in_the_same_thread(forced: Forced) -> None:
    load(batch_size=1, score_every=3).generate(PROMPTS[:2])
    load().generate(PROMPTS[0])
    assert not forced.turns


def test_no_more_prompts_are_in_flight_and_none_holds_more_than_its_budget(
    forced: Forced, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(batch_size=2, score_every=3)
    decode, most = generator.engine.decode, []

    def seen(sessions: Any, num_tokens: int) -> None:
        decode(sessions, num_tokens)
        alive = [session for session in generator.engine._open_sessions if session._prefix is not None]  # type: ignore[attr-defined]
        most.append(len(alive))
        assert all(session.account.held <= session.account.limit for session in alive)

    monkeypatch.setattr(generator.engine, "decode", seen)
    results = generator.generate(PROMPTS)
    assert max(most) == 2 and len(forced.turns) > 5
    for result in results:
        assert max(round_.kv_tokens for round_ in result.rounds) <= result.resolved["kv_budget_tokens"]


def test_no_second_is_counted_twice(forced: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Forward.head_scores

    def slow(self_: Forward, hidden: Any) -> Any:
        time.sleep(0.01)
        return score(self_, hidden)

    monkeypatch.setattr(Forward, "head_scores", slow)
    generator = load()
    started = time.perf_counter()
    results = generator.generate(PROMPTS)
    passed = time.perf_counter() - started
    assert sum(result.ledger.total_seconds for result in results) < passed
    assert all(result.ledger.seconds["reward"] > 0 for result in results)


# what fails


class Lost(Exception):
    pass


ERRORS = [RewardError("no."), OutOfMemoryError("too long."), torch.OutOfMemoryError("full"), Lost(), SystemExit(3)]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("place", [0, 5])
def test_an_error_of_scoring_is_raised_as_it_is_and_costs_no_answer(
    error: BaseException, place: int, forced: Forced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"reward_model": f"{__name__}:letters", "journal": str(tmp_path / "journal.jsonl"), "batch_size": 2}
    generator = load(**args)
    score = generator.reward.score
    requests = [in_flight.Request(prompt=generator.engine.encode(p), config=generator.config) for p in PROMPTS]

    def fail(conversation: Any, rows: Any, prefix: str = "") -> list[float]:
        if conversation[0]["content"] == PROMPTS[place] and threading.current_thread().name == HERE:
            raise error
        return score(conversation, rows, prefix)

    given: dict[int, Any] = {}
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(generator.reward, "score", fail)
        for index, result in generator.run(requests, progress=False):
            given[index] = told(result)
    assert raised.value is error
    assert place not in given and len(given) >= place - 1
    assert len(lines(tmp_path / "journal.jsonl")) == 1 + len(given)
    whole = {index: told(result) for index, result in load(**args | {"journal": None}).run(requests, progress=False)}
    assert given == {index: whole[index] for index in given}


@pytest.mark.parametrize("times", [2, pytest.param(1, marks=pytest.mark.full), pytest.param(5, marks=pytest.mark.full)])
def test_a_reward_model_that_runs_out_of_memory_in_its_thread_reads_again(
    times: int, forced: Forced, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [told(result) for result in load().generate(PROMPTS)]
    extend, left = SharedBody.extend, times

    def full(self_: SharedBody, parts: Any) -> Any:
        nonlocal left
        if left and threading.current_thread().name == HERE:
            left -= 1
            raise torch.OutOfMemoryError("full")
        return extend(self_, parts)

    monkeypatch.setattr(SharedBody, "extend", full)
    generator = load()
    found = [told(result) for result in generator.generate(PROMPTS)]
    assert not left
    for mine, theirs in zip(found, want, strict=True):
        assert mine["rounds"] == theirs["rounds"] and mine["best"] == theirs["best"]
        assert mine["trajectories"] == theirs["trajectories"]
    monkeypatch.setattr(Forward, "_forward", full)  # and nothing helps
    left = 1_000
    with pytest.raises(OutOfMemoryError, match="does not fit in memory"):
        load().generate(PROMPTS)


def test_an_error_of_decoding_comes_behind_the_answers_scored_meanwhile(
    forced: Forced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those two that are scored while the third can be decoded no further have come to their ends."""
    args = {"strategy": "best_of_n", "first_look": None, "reward_model": f"{__name__}:letters"}
    args["journal"] = str(tmp_path / "journal.jsonl")
    generator = load(**args)
    requests = [
        in_flight.Request(prompt=generator.engine.encode(text), config=generator.config.replace(max_gen_toks=end))
        for text, end in zip(PROMPTS, (8, 8, 24), strict=False)
    ]
    want = [told(result) for _, result in sorted(load(**args | {"journal": None}).run(requests), key=lambda it: it[0])]
    decode = generator.engine.decode

    def full(sessions: Any, num_tokens: int) -> None:
        if HERE in {thread.name for thread in threading.enumerate()}:
            raise OutOfMemoryError("full.")
        decode(sessions, num_tokens)

    given = []
    with monkeypatch.context() as patch:
        patch.setattr(InFlight, "_scored", _slowly(InFlight._scored))
        patch.setattr(generator.engine, "decode", full)
        with pytest.raises(OutOfMemoryError, match="full"):
            given.extend(result for _, result in generator.run(requests))
    assert [told(result) for result in given] == want[:2]
    assert len(lines(tmp_path / "journal.jsonl")) == 1 + 2
    assert [told(result) for _, result in sorted(load(**args).run(requests), key=lambda it: it[0])] == want


def _slowly(scored: Any) -> Any:
    def later(*args: Any) -> Any:
        if threading.current_thread().name == HERE:
            time.sleep(0.2)
        yield from scored(*args)

    return later


@pytest.mark.usefixtures("ctrl_c_is_not_ignored")
@pytest.mark.parametrize("beside", [True, False], ids=["while decoding", "while waiting"])
def test_an_interrupt_waits_for_the_thread_and_a_rerun_goes_on(
    beside: bool, forced: Forced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"journal": str(tmp_path / "journal.jsonl")}
    want = [told(result) for result in load().generate(PROMPTS)]
    generator = load(**args)
    decode, turns = generator.engine.decode, 0
    main = threading.main_thread().ident
    assert main is not None
    scored: list[str] = []
    score = Forward.head_scores

    def counted(items: Any, work: Any) -> Any:
        nonlocal turns
        turns += 1
        return overlapped(items, work)

    def stopping(sessions: Any, num_tokens: int) -> None:
        if turns == 4 and beside:
            raise KeyboardInterrupt
        decode(sessions, num_tokens)

    def slow(self_: Forward, hidden: Any) -> Any:
        if threading.current_thread().name == HERE:
            if turns >= 4 and not beside and not scored:
                scored.append("sent")
                time.sleep(0.2)
                signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        return score(self_, hidden)

    monkeypatch.setattr(in_flight, "overlapped", counted)
    monkeypatch.setattr(generator.engine, "decode", stopping)
    monkeypatch.setattr(Forward, "head_scores", slow)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS)
    monkeypatch.undo()
    assert HERE not in {thread.name for thread in threading.enumerate()}
    assert generator.reward.allowance.held == 0  # type: ignore[attr-defined]
    assert generator.engine.model.config._attn_implementation != shared_prefix.NAME  # type: ignore[attr-defined]
    assert [told(result) for result in load(**args).generate(PROMPTS)] == want


def test_a_killed_run_goes_on(forced: Forced, tmp_path: Path) -> None:
    args = {"journal": str(tmp_path / "journal.jsonl")}
    want = [told(result) for result in load().generate(PROMPTS)]
    for place in range(2, 40, 3 if FULL else 9):

        def work(place: int = place) -> None:
            forked.Moments(place).install()
            load(**args).generate(PROMPTS)

        forked.ended(forked.start(work))
    assert [told(result) for result in load(**args).generate(PROMPTS)] == want


# the thread


def test_items_come_first_then_what_failed() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise Lost

    def broken() -> None:
        raise RewardError("beside.")

    for source, work, want in (
        (items(), lambda: None, Lost),
        (iter([1, 2]), broken, RewardError),
        (items(), broken, Lost),
    ):
        found = []
        with pytest.raises(want):
            for item in overlapped(source, work):
                found.append(item)
        assert found == [1, 2]
    assert list(overlapped(iter([1, 2]), lambda: None)) == [1, 2]


def test_nothing_is_begun_behind_a_signal() -> None:
    begun, going = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            begun.append(number)
            going.set()
            time.sleep(0.5)
            yield number

    def stop() -> None:
        going.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlapped(items(), stop)
    assert begun == [0]


def test_what_failed_keeps_nothing_alive() -> None:
    class Big:
        pass

    kept: list[weakref.ref[Big]] = []

    def items() -> Iterator[int]:
        big = Big()
        kept.append(weakref.ref(big))
        raise Lost
        yield 1

    gc.disable()
    try:
        try:
            list(overlapped(items(), lambda: None))
        except Lost:
            pass
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_step_of_attention_is_seen_in_its_own_thread_alone() -> None:
    step = PrefillStep([PromptPart(Prefix(length=3), 0, 3)])
    with shared_prefix.running(step):

        def there() -> Iterator[Any]:
            yield shared_prefix._here.step
            with shared_prefix.running(step):
                yield shared_prefix._here.step

        assert overlapped(there(), lambda: None).items == [None, step]
        assert shared_prefix._current() is step


# when


def test_it_is_on_where_each_has_devices_of_its_own_and_off_here(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load()
    prompts = InFlight(generator.engine, generator.reward)
    cpu, one, two = (frozenset([torch.device(name)]) for name in ("cpu", "cuda:0", "cuda:1"))
    assert generator.engine.devices == generator.reward.devices == cpu
    assert not prompts.overlaps
    for engine, reward, on in (
        (one, two, True),
        (one, one, False),
        (one | two, two, False),
        (one, cpu, True),
        (frozenset(), two, False),
        (one, frozenset(), False),
    ):
        monkeypatch.setattr(generator.engine, "devices", engine)
        monkeypatch.setattr(generator.reward, "devices", reward)
        assert prompts.overlaps == on
    for name in ("likelihood", f"{__name__}:letters"):
        assert not load(reward_model=name, max_gen_toks=4).reward.devices
    reward = generator.reward
    assert isinstance(reward, CheckpointReward)
    assert Ensemble([reward], [1.0]).devices == reward.devices
    assert not Ensemble([reward, load(reward_model="likelihood").reward], [1.0, 1.0]).devices


@given(st.integers(0, 10**6), st.integers(0, 10**10), st.integers(0, 10**10))
def test_at_least_one_step_and_as_many_more_as_there_is_more_to_read(tokens: int, reward: int, engine: int) -> None:
    def steps(tokens: int) -> int:
        return scheduler.steps_beside(tokens, reward_parameters=reward, parameters=engine)

    assert 1 <= steps(tokens) <= steps(2 * tokens)
    if reward == engine:
        assert steps(128 * tokens) == max(1, tokens)
