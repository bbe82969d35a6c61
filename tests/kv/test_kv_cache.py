"""KV storage against lists of tensors, the token account, and what the model is fed: nothing twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_models import build, shared_model
from support.engine_runs import PROMPTS, Recorder, generate, make_engine
from support.tiny_models import tiny_causal_lm

from specrej_eval import budget as budgets
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan
from specrej_eval.engines.transformers import model as model_module
from specrej_eval.engines.transformers.groups import CPU_TOKEN_ALIGN, Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.engines.transformers.sampling import row_stream
from specrej_eval.errors import KVBudgetExceededError
from specrej_eval.kv import prefill
from specrej_eval.kv.cache import Prefix, SuffixPool, TokenAccount, bytes_per_token

LAYERS, HEADS, WIDTH = 2, 3, 4


def entry(row: int, place: int, layer: int, kind: int) -> torch.Tensor:
    """(HEADS, WIDTH), another value for every row, place, layer, head and for keys and values."""
    base = torch.arange(HEADS * WIDTH, dtype=torch.float32).reshape(HEADS, WIDTH)
    return base + 1000 * row + 50 * place + 20_000 * layer + 40_000 * kind


class Naive:
    """Rows as lists: what each one has stored, in order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rows = {row: list[tuple[int, int]]() for row in group.row_ids}  # (row that wrote it, place)

    def step(self) -> None:
        group = self.group
        assert group.pool is not None
        place = group.length
        for layer in range(LAYERS):
            key, value = (
                torch.stack([entry(row, place, layer, kind) for row in group.row_ids])[:, :, None] for kind in (0, 1)
            )
            group.pool.append(layer, key, value)
        group.rows.tokens[:, place] = torch.tensor(group.row_ids, dtype=torch.int32)
        group.num_sampled += 1
        for row in group.row_ids:
            self.rows[row].append((row, place))
        self.check(extra=1)
        group.advance()

    def check(self, extra: int = 0) -> None:
        group = self.group
        assert group.pool is not None
        assert group.pool.rows == group.num_rows == len(self.rows)
        assert torch.equal(group.rows.streams, row_stream(torch.tensor(0), torch.tensor(group.row_ids)))
        assert group.positions().tolist() == [group.prefix.length + group.length] * group.num_rows
        if not group.length + extra:
            return
        if not extra:
            group.pool.length -= 1  # ``layer`` shows the position just appended, too
        for layer in range(LAYERS):
            for kind, got in enumerate(group.pool.layer(layer)):
                want = [[entry(row, p, layer, kind) for row, p in self.rows[mine]] for mine in group.row_ids]
                count = group.pool.length + 1
                assert torch.equal(got[:, :, :count], torch.stack([torch.stack(row, 1) for row in want]))
                assert got[:, :, count:].isfinite().all()
        if not extra:
            group.pool.advance()
        writers = [[row for row, _ in self.rows[mine]] for mine in group.row_ids]
        assert group.rows.tokens[:, : group.num_sampled].tolist() == writers


@given(st.data())
def test_groups_equal_lists_of_rows(data: st.DataObject) -> None:
    prefix = Prefix(length=2, keys={0: torch.zeros(HEADS, 2, WIDTH)}, values={0: torch.zeros(HEADS, 2, WIDTH)})
    rows = data.draw(st.integers(1, 6))
    capacity = data.draw(st.integers(1, 5))
    group = Group(prefix, list(range(rows)), capacity=capacity, device=torch.device("cpu"))
    everything = [Naive(group)]
    next_row = rows
    for action in data.draw(st.lists(st.sampled_from(["step", "step", "step", "drop", "select", "split", "park"]))):
        naive = data.draw(st.sampled_from(everything))
        group = naive.group
        places = list(range(group.num_rows))
        if action == "step" and group.length < group.capacity:
            naive.step()
        elif action == "drop" and len(places) > 1:
            gone = data.draw(st.lists(st.sampled_from(places), unique=True, max_size=len(places) - 1))
            kept_order = [row for place, row in enumerate(group.row_ids) if place not in gone]
            naive.rows = {row: naive.rows[row] for row in kept_order}
            group.drop(gone)
        elif action == "select":
            chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=7))
            ids = list(range(next_row, next_row + len(chosen)))
            next_row += len(chosen)
            parents = [group.row_ids[place] for place in chosen]
            naive.rows = {new: list(naive.rows[parent]) for parent, new in zip(parents, ids, strict=True)}
            group.select(chosen, ids, group.length + data.draw(st.integers(1, 20)))
        elif action == "split" and len(places) > 1:
            rest = group.split()
            other = Naive(rest)
            other.rows = {row: naive.rows.pop(row) for row in rest.row_ids}
            everything.append(other)
        elif action == "park":
            group.park()
            group.unpark()
        for each in everything:
            each.check()


def test_pool_capacities_are_aligned_and_never_shrink() -> None:
    pool = SuffixPool(3, capacity=5, align=CPU_TOKEN_ALIGN)
    assert pool.capacity == CPU_TOKEN_ALIGN
    pool.append(0, torch.ones(3, 1, 1, 2), torch.full((3, 1, 1, 2), 2.0))
    pool.advance()
    pool.select(torch.arange(3), CPU_TOKEN_ALIGN + 1)
    pool.select(torch.arange(3), 1)
    assert pool.capacity == 2 * CPU_TOKEN_ALIGN
    pool.append(0, torch.full((3, 1, 1, 2), 3.0), torch.full((3, 1, 1, 2), 4.0))
    key, value = pool.layer(0)
    assert key[2, 0].tolist() == [[1, 1], [3, 3]] and value[0, 0].tolist() == [[2, 2], [4, 4]]


def test_a_pool_that_grows_is_one_block_whatever_capacity_was_asked_for() -> None:
    pool = SuffixPool(2, capacity=100, align=4, grows=True)
    for place in range(10):
        new = torch.full((2, 1, 1, 3), float(place))
        pool.append(0, new, -new)
        key, value = pool.layer(0)
        assert key.shape[2] == value.shape[2] == 4 * (place // 4 + 1)
        assert key.is_contiguous() and value.is_contiguous()
        assert key[1, 0, : place + 1, 0].tolist() == list(range(place + 1)) and not key[:, :, place + 1 :].any()
        pool.advance()
    pool.select(torch.tensor([1, 1]), 50)
    assert pool.layer(0)[0].shape[2] == 12


@pytest.mark.parametrize("fails_at", range(4))
def test_select_survives_running_out_of_memory_half_way(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = Prefix(length=1, keys={0: torch.zeros(HEADS, 1, WIDTH)}, values={0: torch.zeros(HEADS, 1, WIDTH)})
    naive = Naive(Group(prefix, [0, 1, 2], capacity=3, device=torch.device("cpu")))
    naive.step()
    gathered, calls = SuffixPool._gathered, iter(range(99))

    def failing(self: SuffixPool, old: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError
        return gathered(self, old, index)

    monkeypatch.setattr(SuffixPool, "_gathered", failing)
    naive.group.select([2, 0, 2], [2, 0, 5], 9)
    naive.rows = {2: naive.rows[2], 0: naive.rows[0], 5: list(naive.rows[2])}
    naive.group.unpark()
    naive.check()


# ---- the account -------------------------------------------------------------------------------------------------


def test_account_never_passes_its_limit() -> None:
    account = TokenAccount(limit=10, held=4)
    account.hold(6)
    with pytest.raises(KVBudgetExceededError, match=r"10 \+ 1 .* 10"):
        account.hold(1)
    assert account.held == 10
    account.hold(-3)
    account.hold(2)
    assert account.held == 9


def test_decoding_past_the_budget_is_an_error() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    config = RunConfig(n=4, max_gen_toks=20, first_look=5)
    prompt = engine.encode("hello")
    session = engine.open(prompt, config, budgets.resolve(config, prompt.num_tokens))
    engine.follow(session, Plan(keep=(), fresh=4, num_tokens=6))
    engine.decode([session], 5)
    assert session.account.held == session.account.limit
    with pytest.raises(KVBudgetExceededError):
        engine.decode([session], 1)


def test_forks_are_paid_for_by_what_is_dropped() -> None:
    # two groups: the fork in the first one needs the room that the second one gives up
    engine = make_engine(tiny_causal_lm("llama"))
    config = RunConfig(n=4, max_gen_toks=20, first_look=5)
    prompt = engine.encode("hello")
    session = engine.open(prompt, config, budgets.resolve(config, prompt.num_tokens))
    engine.follow(session, Plan(keep=(), fresh=2, num_tokens=5))
    engine.follow(session, Plan(keep=(0, 1), fresh=2, num_tokens=5))
    engine.decode([session], 5)
    engine.follow(session, Plan(keep=(0, 0, 1, 1), fresh=0, num_tokens=1))
    assert session.account.held == session.account.limit
    assert [record.finish_reason for record in session.records] == [None, None, "rejected", "rejected", None, None]


def test_bytes_per_token_is_two_layers_heads_dim_itemsize() -> None:
    model = shared_model("llama")
    runner = ModelRunner(model, path="shared_prefix")
    with torch.inference_mode(), runner.active():
        prefix = runner.prefill([5, 6, 7])
    config = model.config
    want = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert bytes_per_token(prefix) == want


# ---- what the model is fed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared_prefix", "replicated"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_each_token_is_fed_once(name: str, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CPU_CHUNK", 16)
    monkeypatch.setattr(model_module, "ROW_ALIGN", 1)  # count rows, not padding
    engine = make_engine(tiny_causal_lm("llama"), path=name)
    with Recorder(engine) as seen:
        results = generate(engine, alpha=alpha, until=["e", "7"], batch_size=3)
    lengths = [len(t.token_ids) for result in results for t in result.trajectories]
    assert len(set(lengths)) > 3  # rows did finish early, by their stop strings
    assert seen.prompts_read == [engine.encode(prompt).token_ids for prompt in PROMPTS]
    assert sum(seen.rows_per_step) == sum(length - 1 for length in lengths)
    assert seen.tokens_fed == sum(map(len, seen.prompts_read)) + sum(length - 1 for length in lengths)
    assert [result.ledger.decode_tokens for result in results] == [
        sum(len(t.token_ids) for t in result.trajectories) for result in results
    ]
    assert [result.ledger.prompt_tokens for result in results] == list(map(len, seen.prompts_read))


def test_finished_rows_leave_in_the_same_step() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    with Recorder(engine) as seen:
        [result] = generate(engine, PROMPTS[1:2], until=["e", "7", "q"], strategy="best_of_n", n=8, first_look=None)
    lengths = [t.num_tokens for t in result.trajectories]
    # the row of k tokens is fed k - 1 of them; the first step draws from the prompt's logits
    want = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert seen.rows_per_step == want
    assert want[0] > want[-1]


def test_peak_stays_within_the_budget() -> None:
    engine = make_engine(build("llama", vocab_size=261))
    for result in generate(engine, alpha=0.5, n=8):
        budget = result.resolved["kv_budget_tokens"]
        assert all(0 < round_.kv_tokens <= budget for round_ in result.rounds)
        for round_ in result.rounds:
            if not round_.finished:
                assert round_.kv_tokens == result.ledger.prompt_tokens + round_.rows * round_.tokens
