"""Memory that runs out at any operation of a run: a step happens or it does not.

Every operation that torch dispatches is a point where memory may run out, in prefill, decoding, rows leaving a batch,
survivors being gathered, rows forked, copies to the host and scoring. What the C++ kernels write to is allocated
through torch too, so no allocation of a tensor escapes the count.

The runs are as small as they can be and still hold every kind of step; one engine answers all runs of a case, so what
a failure leaves behind would show in the next run as well.

What is left out. A run of two layers and a handful of tokens has thousands of operations, most of them the same line of
ours in another layer, at another token, for another row. So operations are put into classes (``classes``): the same
operation, called from the same line of the package, in the same step of the loop (reading, decoding, a look, ...). Of
each class the first, the last and one between are made to fail, the one between drawn by a seed; and of each way of our
lines that leads to an operation, its last time, so that a helper is swept for each of its callers. Of two failures in a
row there is one pair for each class, drawn by the seed; of failures in what is done after failures (taking turns, going
to the host, reading again) one for each site that no undisturbed run goes through. Lines of transformers and torch are
no sites of their own: a model's whole forward pass is one line of ours, with one site for each operation in it.
Not seen is therefore what a failure does in some layer, row or token alone, neither the first nor the last. Operations
that allocate nothing (views) are swept like others. Each case of a path, reward or backend is swept for itself, though
most lines are the same ones.

``SPECREJ_TEST_FULL=1 pytest -n 2 --dist load tests/system/test_out_of_memory_anywhere.py`` runs all of it, in items of
a minute or so. Without SPECREJ_TEST_FULL one operation of each function of ours fails, in the shortest run with it.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from support import FULL
from support.engine_models import build as build_model
from support.engine_runs import HashReward, make_engine, outcome
from support.failing_allocations import MemoryRunsOut, Operation, classes, first_middle_last, one_of_each
from support.tiny_models import VOCAB_SIZE, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

from specrej_eval import in_flight, scheduler
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, RowView
from specrej_eval.engines.transformers import decoding, groups
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.session import Session
from specrej_eval.errors import OutOfMemoryError
from specrej_eval.generator import Generator
from specrej_eval.in_flight import Request
from specrej_eval.kv import choose, experts, packed, prefill, shared_prefix
from specrej_eval.kv.memory import droppable
from specrej_eval.kv.native import build, products
from specrej_eval.kv.prefill import PromptReader
from specrej_eval.rewards.checkpoints.shared_body import SharedBody
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier
from specrej_eval.rewards.kinds.self_scores import DeepConf, Likelihood, SelfCertainty
from specrej_eval.strategies.base import State, make_strategy

SEED = 10
"""Of what is drawn among operations that are alike."""
PARTS = 3 if FULL else 1
"""Items that a case's points are dealt out to, so that a stop loses little."""
MOST_AFTER = None if FULL else 3
"""Of the sites that are gone through only after two failures, so many are tried for each pair."""
CHUNK = 8
"""Tokens of a prompt read at once: prompts of two chunks and more."""
GROWTH = 2
"""Tokens by which pools of rows grow, so that they do."""
REWARD_COSTS = ("reward_tokens", "reward_calls")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
FORKS = 100
"""Seeds from here on stand for the strategy below: none of ours forks rows."""
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


class Forks:
    """Three rows; at the first look the best is forked, the worst goes and a fresh one starts; then a second look."""

    def init(self, budget: Any) -> tuple[State, Plan]:
        return State(), Plan(keep=(), fresh=3, num_tokens=2)

    def step(
        self, state: State, rows: Sequence[RowView], scores: Sequence[float], budget: Any
    ) -> tuple[State, Plan | None]:
        live = [
            row.row for _, row in sorted(zip(scores, rows, strict=True), key=lambda pair: pair[0]) if not row.finished
        ]
        if state.rows_started == 2 or not live:
            return state, None
        keep = tuple(sorted([live[-1], *live[1:]])) if not state.rows_started else tuple(sorted(live))
        fresh = int(not state.rows_started)
        return State(state.rows_started + 1), Plan(keep=keep, fresh=fresh, num_tokens=1)


@dataclass(frozen=True)
class Case:
    """One run to disturb."""

    name: str
    path: Any = "shared_prefix"
    reward: str = "hash"
    """A reward cache (``full``, ``prompt``, ``off``), a self-score, or ``hash``: no operation of its own."""
    prompts: tuple[str, ...] = ("Tell",)
    policy: str = "llama"
    layers: int = 2
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    reward_is_new: bool = False
    """The reward model is tried out in each run."""
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    """Of the language model."""
    compile: str = "auto"
    """Of the reward model: its kernels are C++ where there is a compiler, or are not."""
    ends: tuple[int, ...] = ()
    """``max_gen_toks`` of each prompt, where they differ."""
    turn: int = scheduler.READ_A_TURN
    """Tokens of prompts read between two turns of those that decode."""

    @property
    def runs_here(self) -> bool:
        if self.dtype == products.DTYPE:  # by others' products a row's bits may depend on its company
            return products.why_not() is None
        return self.attention != "cpp" or build.why_not() is None


WAVES = {"n": 4, "max_gen_toks": 3, "kv_budget_tokens": 11, "alpha": 0, "top_k": 0}
FEW = {"n": 2, "max_gen_toks": 2, "first_look": 1, "alpha": 0.5}
REJECTING = {"n": 4, "max_gen_toks": 4, "first_look": 2, "alpha": 0.5}
# each seed: rows that leave from the middle of a batch, at a stop string and at the cap, and rows that are rejected
CASES = [
    Case("incremental scoring", reward="full", arguments=REJECTING, seed=9),
    Case("two prompts in waves", reward="likelihood", prompts=("a", "Tell"), layers=1, arguments=WAVES, seed=3),
    Case("forks and late rows", reward="full", layers=1, arguments={"n": 5, "max_gen_toks": 4}, seed=FORKS + 12),
    Case("reward tried out", reward="prompt", layers=1, arguments=FEW, seed=1, reward_is_new=True),
    Case(
        "prompts in common",
        reward="full",
        prompts=("Tell us so", "Tell us of", "Tell"),
        layers=1,
        arguments=FEW,
        seed=1,
    ),
    Case("replicated", path="replicated", reward="off", arguments=REJECTING, seed=6, turn=4),
    Case("recurrent", path="replicated", policy="mamba", layers=1, arguments=REJECTING, seed=12),
    Case("recompute", path="recompute", reward="off", layers=1, arguments=REJECTING, seed=4),
    Case(
        "recomputed beside shared",
        prompts=("a", "Tell"),
        layers=1,
        options={"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
        arguments=REJECTING,
        seed=5,
    ),
    Case("experts", policy="mixtral", layers=1, arguments=REJECTING, seed=1),
    Case(
        "a long prompt read beside rows",
        reward="full",
        compile="off",
        prompts=("a", "Tell", "Tell us of it, and the river"),
        layers=1,
        arguments=REJECTING,
        ends=(1, 6, 2),
        turn=6,
        seed=1,
    ),
    Case("cpp", reward="full", attention="cpp", arguments=REJECTING, seed=9),
    Case("bfloat16 by cpp", attention="cpp", dtype=torch.bfloat16, layers=1, arguments=REJECTING, seed=9),
    Case(
        "forks by cpp",
        reward="full",
        attention="cpp",
        layers=1,
        arguments={"n": 5, "max_gen_toks": 4},
        seed=FORKS + 12,
    ),
    Case(
        "chunks in common by turns and by cpp",
        reward="full",
        attention="cpp",
        prompts=("Tell us all", "Tell us a lot", "a", "Tell us it"),
        layers=1,
        arguments={**FEW, "batch_size": 3, "top_k": 0, "min_p": 0.01},
        turn=6,
        seed=1,
    ),
    Case(
        "audited",
        reward="prompt",
        layers=1,
        arguments={**REJECTING, "audit": 1, "score_every": 3, "variance_reduce": True},
        seed=9,
    ),
    Case(
        "n=max",
        reward="self_certainty",
        layers=1,
        arguments={"n": "max", "n_max": 3, "max_gen_toks": 3, "first_look": 1, "top_p": 0.9, "temperature": 0.7},
        seed=2,
    ),
    Case(
        "batch_size=auto",
        reward="deepconf",
        prompts=("a", "Tell"),
        layers=1,
        arguments={**FEW, "batch_size": "auto", "top_p": 0.9, "top_k": 0, "min_p": 0.01},
        seed=3,
    ),
    Case("windows and sinks", policy="gpt_oss", prompts=("Tell us all",), arguments=FEW, seed=1),
]
UNTIL = tuple("abcdefghijklmnopqrstuvwxyz")
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
PART = pytest.mark.parametrize("part", range(PARTS))
_collected = gc.collect


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # thousands of failures in here, and there is nothing to free
    monkeypatch.setattr(prefill, "CPU_CHUNK", CHUNK)
    monkeypatch.setattr(groups, "CPU_TOKEN_ALIGN", GROWTH)
    monkeypatch.setattr(
        in_flight, "make_strategy", lambda config: Forks() if config.seed >= FORKS else make_strategy(config)
    )


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


@cache
def scorer() -> Any:
    return tiny_reward_model("llama", num_hidden_layers=1, **TINY)


@cache
def tried_out(compiled: str) -> SharedBody:
    """A reward model's body that has been tried out."""
    reward = SequenceClassifier(scorer(), tokenizer(), compile=compiled)
    assert reward.shared_body is not None
    return reward.shared_body


@cache
def parts(case: Case) -> tuple[TransformersEngine, list[Request], RunConfig]:
    arguments = {"logprobs": True, "batch_size": 2, "seed": case.seed, **case.arguments}
    config, _ = RunConfig.from_args(arguments)
    if case.policy == "llama":
        model = tiny_causal_lm("llama", num_hidden_layers=case.layers, **TINY, **case.options)
    else:
        model = build_model(case.policy, num_hidden_layers=case.layers, vocab_size=VOCAB_SIZE, **case.options)
    length = {"max_length": 64} if case.options else {}
    engine = make_engine(model.to(case.dtype), path=case.path, attention=choose.build(case.attention), **length)
    if case.path == "shared_prefix":
        assert engine.runner.attention.name == case.attention
        assert (engine.describe()["products"] == "cpp") == (case.dtype == products.DTYPE)
    ends = case.ends or (config.max_gen_toks,) * len(case.prompts)
    requests = [
        Request(prompt=engine.encode(prompt), config=config.replace(max_gen_toks=end), until=UNTIL)
        for prompt, end in zip(case.prompts, ends, strict=True)
    ]
    return engine, requests, config


SELF_SCORES = {"likelihood": Likelihood, "self_certainty": SelfCertainty, "deepconf": DeepConf, "hash": HashReward}


def reward_of(case: Case) -> Any:
    if case.reward in SELF_SCORES:
        return SELF_SCORES[case.reward]()
    reward = SequenceClassifier(scorer(), tokenizer(), name="tiny", cache=case.reward, compile=case.compile)
    if not case.reward_is_new and case.reward != "off":
        reward.shared_body = tried_out(case.compile)
    return reward


def run(case: Case, mode: MemoryRunsOut) -> list[dict[str, Any]]:
    """All that comes out but times and peaks. Whatever happens, models and engine are as they were after it."""
    engine, requests, config = parts(case)
    engine._codes.clear()  # made by the first run that needs them
    body = tried_out(case.compile)
    for reader in (engine.runner.reader, body.reader):
        reader.store = prefill.ChunkStore(torch.device("cpu"))  # else a run would find what the one before has read
    if case.reward_is_new:
        packed._supported.cache_clear()  # it is found out once in a process
    generator = Generator(engine=engine, reward=reward_of(case), config=config)
    with pytest.MonkeyPatch.context() as patch:
        for room in (in_flight, scheduler):
            patch.setattr(room, "READ_A_TURN", case.turn)
        try:
            with mode:
                found = dict(generator.run(requests, progress=False))
        finally:
            check_nothing_is_left(engine, body)
    results = [found[index] for index in range(len(requests))]
    return [told(result) for result in results]


def told(result: Any) -> dict[str, Any]:
    cost = result.ledger.to_dict()
    for name in ("seconds", "peak_bytes", "audit_seconds"):
        cost.pop(name, None)
    audit = None if result.audit is None else result.audit.to_dict()
    return outcome(result) | {"ledger": cost, "audit": audit}


def check_nothing_is_left(engine: TransformersEngine, body: SharedBody) -> None:
    """Nobody else who uses the models would notice, and no prompt's memory is held."""
    for model in (engine.model, body.body):
        assert model.config._attn_implementation != shared_prefix.NAME
        assert getattr(model.config, "_experts_implementation", None) != experts.NAME
        assert not any("forward" in vars(module) for module in model.modules())
    for active in (engine.runner._packed, engine.runner._fused, body._packed, body._fused):
        assert active._depth == 0
    assert build.in_use() is None and shared_prefix._here.step is None
    for reader in (engine.runner.reader, body.reader):
        assert not reader.store._in_use
    assert not any(session.groups or session._prefix for session in engine._open_sessions)


def live_bytes() -> int:
    """Memory of all tensors there are."""
    _collected()
    stores = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            if each.is_mkldnn:  # packed weights show no storage
                stores[id(each)] = each.numel() * each.element_size()
            else:
                store = each.untyped_storage()
                stores[store.data_ptr()] = store.nbytes()
    return sum(stores.values())


@contextmanager
def as_it_was(case: Case, *, weighed: bool = FULL) -> Iterator[list[dict[str, Any]]]:
    """What comes out without a failure; behind the body it does so again, and no memory is held that was not before.

    Args:
        weighed: whether memory is looked at, which takes longer than a run.
    """
    want, _ = undisturbed(case)
    for store in droppable:
        store.drop()  # as failures do: chunks that the runs of other cases hold are none of this one's
    if weighed:
        run(case, MemoryRunsOut())
    before = live_bytes() if weighed else 0
    yield want
    assert run(case, MemoryRunsOut()) == want
    assert not weighed or live_bytes() == before


@cache
def undisturbed(case: Case) -> tuple[list[dict[str, Any]], list[Operation]]:
    """What comes out, and all operations. Under the same mode: it changes some kernels."""
    mode = MemoryRunsOut(traced=True)
    results = run(case, mode)
    assert mode.operations is not None
    return results, mode.operations


def runnable() -> list[Case]:
    return [case for case in CASES if case.runs_here]


def skip_unless_it_runs(case: Case) -> None:
    if not case.runs_here:
        pytest.skip(f"C++ kernels cannot be had: {build.why_not()}")


@cache
def points(case: Case) -> list[int]:
    """What is made to fail: see the top."""
    return first_middle_last(undisturbed(case)[1], seed=SEED) if FULL else in_short()[case]


@cache
def pairs(case: Case) -> list[int]:
    """Where two failures in a row begin."""
    return one_of_each(undisturbed(case)[1], seed=SEED) if FULL else points(case)[::6]


@cache
def after(case: Case) -> list[int]:
    """Where the two failures begin that others follow: one of each function of ours, in each step of the loop; or one
    while rows decode."""
    operations = undisturbed(case)[1]
    if FULL:
        return sorted({(each.function, each.step()): number for number, each in enumerate(operations)}.values())
    decoding = [number for number, each in enumerate(operations) if each.step().startswith("generator.py:run")]
    return [decoding[len(decoding) // 2]] if case is CASES[0] else []


@cache
def in_short() -> dict[Case, list[int]]:
    """Of each function of ours the last operation, as by then there is state to spoil, in the shortest run with it."""
    seen: set[str] = set()
    found = {}
    for case in sorted(runnable(), key=lambda case: len(undisturbed(case)[1])):
        last = {operation.function: number for number, operation in enumerate(undisturbed(case)[1])}
        found[case] = sorted(number for function, number in last.items() if function not in seen)
        seen.update(last)
    return found


STEPS = ["prefill", "_commit", "records_of", "moved", "move", "selection", "_gathered", "_streams", "write"]
STEPS += [
    "_sample_chunk",
    "extend",
    "head_scores",
    "_try_out",
    "reordered",
    "_replicated",
    "_read_chunk",
    "_read_tails",
    "of_chunk",
    "_refresh",
    "_grow",
    "_read_on",
    "stratified",
    "again",
    "measured",
    "_draw_from_all",
    "_nucleus",
]
CPP_STEPS = ["_decode_groups", "_attend", "largest", "logsumexp"]


def test_the_runs_go_through_everything(counted: Callable[..., None]) -> None:
    cases = runnable()
    by_name = {case.name: undisturbed(case)[0] for case in cases}
    assert {row["finish_reason"] for results in by_name.values() for one in results for row in one["trajectories"]} == {
        "rejected",
        "stop",
        "eos",
        "length",
    }
    forked = by_name["forks and late rows"][0]["trajectories"]
    assert len(forked) == 5
    assert forked[3]["token_ids"][:2] in [row["token_ids"][:2] for row in forked[:3]]
    assert all(len(result["rounds"]) == 2 for result in by_name["two prompts in waves"])
    [audited] = by_name["audited"]
    assert audited["audit"]["num_rows"] > 0 and not audited["audit"]["error"]
    operations = {case: undisturbed(case)[1] for case in cases}
    called = {place.split(":")[1] for found in operations.values() for each in found for place in each.path}
    wanted = STEPS if build.why_not() else STEPS + CPP_STEPS
    assert [name for name in wanted if name not in called] == []
    # a long prompt is read by turns: rows of others decode in between
    steps = [each.step() for each in operations[next(case for case in cases if case.ends)]]
    of_two = [step.split(":")[1] for step in steps if step.startswith(("in_flight.py:_opened:", "generator.py:run:"))]
    assert [step for step, _ in groupby(of_two)] == ["_opened", "run"] * 4
    # of every site, or without SPECREJ_TEST_FULL of every function of ours, an operation fails
    traced = [each for found in operations.values() for each in found]
    failing = [operations[case][number] for case in cases for number in points(case)]
    if FULL:
        assert {each.site for each in failing} == {each.site for each in traced}
    assert {each.function for each in failing} == {each.function for each in traced}
    counted("operations of the runs in which allocations fail", len(traced))
    counted("operations of these runs: sites, each a line of ours and an operation", len({e.site for e in traced}))
    counted("operations of these runs: ways of our lines to them", len({(e.name, e.path) for e in traced}))


@pytest.mark.timeout(1200)
@PART
@EACH
def test_one_failure_anywhere_changes_nothing(case: Case, part: int, counted: Callable[..., None]) -> None:
    skip_unless_it_runs(case)
    if not (tried := points(case)[part::PARTS]):
        return
    with as_it_was(case, weighed=FULL or "cpp" in case.name) as want:
        for number in tried:
            mode = MemoryRunsOut([number])
            got = run(case, mode)
            if case.path == "replicated":  # a cache that is made again is fed in other batches: other last bits
                assert differences(got, want) == [], mode.failed
            else:
                assert got == want, mode.failed
            assert len(mode.failed) == 1
    counted("allocations failed, one at a time", len(tried))


@pytest.mark.timeout(1200)
@PART
@EACH
def test_two_failures_in_a_row_change_no_answer_or_are_one_clear_error(
    case: Case, part: int, counted: Callable[..., None]
) -> None:
    skip_unless_it_runs(case)
    if not (tried := pairs(case)[part::PARTS]):
        return
    with as_it_was(case):
        found = Counter(survived(case, MemoryRunsOut([number, number + 1])) for number in tried)
    assert found["recovered"] or not FULL
    counted("allocations failed, two in a row", len(tried))
    counted("allocations failed, two in a row: of these recovered", found["recovered"] + found["degraded"])
    counted("allocations failed, two in a row: answers degraded, and say so", found["degraded"])


@pytest.mark.timeout(1200)
@PART
@EACH
def test_failures_in_what_is_done_after_failures_are_survived_alike(
    case: Case, part: int, counted: Callable[..., None]
) -> None:
    """Taking turns, parking, splitting, reading again: sites that no undisturbed run goes through."""
    skip_unless_it_runs(case)
    if not (tried := after(case)[part::PARTS]):
        return
    seen = {each.site for each in undisturbed(case)[1]}
    found: Counter[str] = Counter()
    with as_it_was(case):
        for first in tried:
            twice = [first, first + 1]
            mode = MemoryRunsOut(twice, traced=True)
            survived(case, mode)
            assert mode.operations is not None
            new = {each.site: number for number, each in enumerate(mode.operations) if each.site not in seen}
            seen.update(new)
            found.update(survived(case, MemoryRunsOut([*twice, number])) for number in list(new.values())[:MOST_AFTER])
    counted("allocations failed after two in a row", found.total())
    counted("allocations failed after two in a row: of these recovered", found["recovered"] + found["degraded"])


def survived(case: Case, mode: MemoryRunsOut) -> str:
    """What becomes of a run some of whose operations fail: ``recovered``, ``degraded``, or one clear ``error``."""
    want, _ = undisturbed(case)
    try:
        got = run(case, mode)
    except OutOfMemoryError as error:
        assert (error.hint and "out of memory" in str(error)) or "does not fit" in str(error), mode.failed
        return "error"
    degraded = False
    for mine, theirs in zip(got, want, strict=True):
        if mine["degraded"]:
            degraded = True
            check_degraded(case, mine, theirs, mode.failed)
            continue
        # after two failures a reward model forgets its caches and reads again: then it has really read more
        for name in REWARD_COSTS:
            assert mine["ledger"][name] >= theirs["ledger"][name], mode.failed
        if mine["audit"] is not None and mine["audit"]["error"]:
            assert "out of memory" in mine["audit"]["error"] or "does not fit" in mine["audit"]["error"]
            mine, theirs = without_audit(mine), without_audit(theirs)
        assert differences(without_reward_costs(mine), without_reward_costs(theirs)) == [], mode.failed
    return "degraded" if degraded else "recovered"


def check_degraded(case: Case, mine: dict[str, Any], theirs: dict[str, Any], failed: Sequence[str]) -> None:
    """Rows were given up, so others may have gone on: but what a row has drawn is what it draws at all times."""
    rows, others = ({row["row"]: row for row in each["trajectories"]} for each in (mine, theirs))
    assert rows[mine["best"]]["finish_reason"] != "rejected", failed
    for row in rows.keys() & others.keys():
        if case.seed < FORKS:  # which rows are forked, and so what stands behind an id, hangs on their scores
            one, other = rows[row]["token_ids"], others[row]["token_ids"]
            both = min(len(one), len(other))
            assert one[:both] == other[:both], failed


def without_audit(result: dict[str, Any]) -> dict[str, Any]:
    """Of an audit that failed, which no answer depends on, there is nothing but that it did."""
    ledger = {name: value for name, value in result["ledger"].items() if not name.startswith("audit")}
    return {**result, "ledger": ledger, "audit": None}


def without_reward_costs(result: dict[str, Any]) -> dict[str, Any]:
    costs = (*REWARD_COSTS, "audit_reward_tokens")
    ledger = {name: value for name, value in result["ledger"].items() if name not in costs}
    return {**result, "ledger": ledger}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two results are not the same; numbers may differ in the last bits, as what is read in other batches does.
    (Rounding both to some places would not do: two numbers next to each other may be rounded apart.)"""
    if isinstance(one, float) and isinstance(other, float):
        return [] if math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) else [f"{place}: {one} and {other}"]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for name in one for found in differences(one[name], other[name], f"{place}/{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        numbered = enumerate(zip(one, other, strict=True))
        return [found for number, both in numbered for found in differences(*both, f"{place}/{number}")]
    return [] if one == other and type(one) is type(other) else [f"{place}: {one!r} and {other!r}"]


def test_what_differs_in_more_than_the_last_bits_is_seen() -> None:
    want, _ = undisturbed(CASES[0])
    assert differences(want, want) == []
    near = {"reward": 0.91275, "rows": [1, None], "text": "a"}
    assert differences(near, {**near, "reward": 0.912749}) == []
    for name, wrong in (("reward", 0.913), ("reward", None), ("rows", [1]), ("rows", [2, None]), ("text", "b")):
        assert len(differences(near, {**near, name: wrong})) == 1
    assert differences(near, {}) and differences([near], [near, near])


@EACH
def test_of_what_is_alike_the_first_the_last_and_one_between_fail_and_every_way_is_gone(case: Case) -> None:
    skip_unless_it_runs(case)
    operations = undisturbed(case)[1]
    alike = classes(operations)
    chosen = set(first_middle_last(operations, seed=SEED))
    assert sorted(number for numbers in alike for number in numbers) == list(range(len(operations)))
    for numbers in alike:
        assert {numbers[0], numbers[-1]} <= chosen
        assert len(numbers) < 3 or chosen & set(numbers[1:-1])
    assert {(each.name, each.path) for each in operations} == {
        (operations[number].name, operations[number].path) for number in chosen
    }
    assert len(one_of_each(operations, seed=SEED)) == len(alike)


def test_a_drop_within_the_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect that was: rows left as part of a step that had counted already and was then taken again."""
    want, operations = undisturbed(CASES[0])
    monkeypatch.setattr(decoding, "let_go", Group.drop)
    changed = 0
    for number in first_middle_last(operations, seed=SEED):
        if ":moved:" in operations[number].line or ":move:" in operations[number].line:
            try:
                changed += run(CASES[0], MemoryRunsOut([number])) != want
            except Exception:  # what comes of it may be anything
                changed += 1
        if changed:
            break
    assert changed


def test_memory_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = PromptReader._run

    def keeping(reader: PromptReader, *given: Any) -> Any:
        found = original(reader, *given)
        kept.append(found)
        return found

    with monkeypatch.context() as patch, pytest.raises(AssertionError), as_it_was(CASES[0], weighed=True):
        patch.setattr(PromptReader, "_run", keeping)
    assert kept


def test_a_prompt_that_stays_open_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "close", lambda session: None)
        patch.setattr(TransformersEngine, "close", lambda engine, session: kept.append(session))
        kept: list[Session] = []
        with pytest.raises(AssertionError, match="check_nothing_is_left"):
            run(CASES[0], MemoryRunsOut())
        kept.clear()
    run(CASES[0], MemoryRunsOut())


# while an engine is made

MAKING = ("engines/transformers/model.py:__init__",)
"""Whose lines are the steps of making an engine."""
BY_BACKEND = pytest.mark.parametrize("attention", ["sdpa", "cpp"])


def made(attention: str, mode: MemoryRunsOut) -> dict[str, Any]:
    """What an engine promises and does, once it is made."""
    packed._supported.cache_clear()  # it is found out once in a process
    with mode:
        engine = make_engine(policy(), attention=choose.build(attention))
    runner = engine.runner
    assert not any("forward" in vars(module) for module in engine.model.modules())
    kernels = {"packed": runner.packed_bytes, "fused": len(runner._fused)}
    return engine.describe() | kernels | {"packs": runner.reader.packs}


@cache
def policy() -> Any:
    return tiny_causal_lm("llama", num_hidden_layers=1, **TINY)


@cache
def making(attention: str) -> tuple[dict[str, Any], list[Operation]]:
    mode = MemoryRunsOut(traced=True)
    want = made(attention, mode)
    assert (want["attention"], want["attention_backend"], want["promises"]) == ("shared_prefix", attention, "bits")
    assert mode.operations is not None
    return want, mode.operations


@pytest.fixture
def supported_again() -> Iterator[None]:
    """Whatever a failure has left behind of what is found out once in a process is found out anew."""
    yield
    packed._supported.cache_clear()


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("supported_again")
@PART
@BY_BACKEND
def test_memory_that_runs_out_while_an_engine_is_made_changes_no_promise(
    attention: str, part: int, counted: Callable[..., None]
) -> None:
    if attention == "cpp" and (reason := build.why_not()):
        pytest.skip(f"C++ kernels cannot be had: {reason}")
    want, operations = making(attention)
    tried = first_middle_last(operations, MAKING, seed=SEED)
    tried = tried[part::PARTS] if FULL else tried[:: len(tried) // 3]
    for number in tried:
        mode = MemoryRunsOut([number])
        assert made(attention, mode) == want, mode.failed
    counted("allocations failed while an engine is made", len(tried))
    if not part:
        counted("operations while an engine is made", len(operations))
        counted("operations while an engine is made: sites", len({each.site for each in operations}))


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("supported_again")
@PART
@BY_BACKEND
def test_two_failures_while_an_engine_is_made_change_no_promise_or_are_one_clear_error(
    attention: str, part: int, counted: Callable[..., None]
) -> None:
    if attention == "cpp" and (reason := build.why_not()):
        pytest.skip(f"C++ kernels cannot be had: {reason}")
    want, operations = making(attention)
    tried = one_of_each(operations, MAKING, seed=SEED)
    tried = tried[part::PARTS] if FULL else tried[len(tried) // 2 :][:1]
    for number in tried:
        mode = MemoryRunsOut([number, number + 1])
        try:
            assert made(attention, mode) == want, mode.failed
        except OutOfMemoryError as error:
            assert error.hint and "out of memory" in str(error), mode.failed
    counted("allocations failed while an engine is made, two in a row", len(tried))
