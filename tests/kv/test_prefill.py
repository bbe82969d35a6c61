"""Prompts that begin alike share what is read of them, and their ends are read together: nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_models import ARCHITECTURES, build, prompt_of, shared_model, skip_unless_known
from support.engine_runs import PROMPTS, Recorder, generate, make_engine, outcome
from support.reward_sessions import BODIES, CONVERSATION, make_reward
from support.tiny_models import tiny_causal_lm
from torch import Tensor

from specrej_eval.core import RowView
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import prefill, ragged
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.memory import release_memory
from specrej_eval.kv.prefill import Chunk, ChunkStore
from specrej_eval.rewards.checkpoints.shared_body import SharedBody

Counted = Callable[..., None]
CHUNK = 16
SHARED = [arch for arch in ARCHITECTURES if arch.path == "shared_prefix"]
SHOTS = prompt_of(3 * CHUNK + 5)
COMPANY = [
    SHOTS + prompt_of(9, salt=1),
    SHOTS,
    prompt_of(7, salt=2),
    SHOTS[: 2 * CHUNK] + prompt_of(40, salt=3),
    SHOTS[: 2 * CHUNK],  # the last token ends a chunk: it is no whole chunk of this prompt
    prompt_of(1, salt=4),
    SHOTS + prompt_of(3, salt=5),
]
"""Prompts with up to three chunks in common, and some with none."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CPU_CHUNK", CHUNK)


def tensors(prefix: Prefix, outputs: Tensor | None) -> list[Tensor]:
    assert outputs is not None
    return [outputs, *prefix.keys.values(), *prefix.values.values()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


# ---- bits ------------------------------------------------------------------------------------------------------------


def ways(read: Callable[[Sequence[Sequence[int]]], list[list[Tensor]]]) -> list[list[list[Tensor]]]:
    """What comes of COMPANY, read together, one by one, and in another order."""
    backwards = read(COMPANY[::-1])[::-1]
    return [read(COMPANY), [read([prompt])[0] for prompt in COMPANY], backwards]


@pytest.mark.parametrize("arch", SHARED, ids=lambda arch: arch.name)
def test_a_prompt_has_the_same_bits_in_any_company(arch: Any, counted: Counted) -> None:
    skip_unless_known(arch)
    runner = ModelRunner(shared_model(arch.name), path="shared_prefix")
    assert runner.promises == "bits" and runner.reader.packs

    def read(prompts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        found = runner.prefill_all([(prompt, "shared_prefix") for prompt in prompts])
        return [tensors(prefix, prefix.logits) for prefix in found]

    with torch.inference_mode(), runner.active():
        alone = [tensors(prefix, prefix.logits) for prefix in map(runner.prefill, COMPANY)]
        before = runner.reader.tokens_read
        for found in ways(read):
            assert [
                place for place, (one, other) in enumerate(zip(alone, found, strict=True)) if not same(one, other)
            ] == []
            counted("prompts compared bitwise", len(COMPANY))
    assert runner.reader.tokens_read - before < 2.2 * sum(map(len, COMPANY)), "three times, with chunks in common"


@pytest.mark.parametrize("name", BODIES)
def test_a_rewards_prompt_has_the_same_bits_in_any_company(name: str, counted: Counted) -> None:
    body = SharedBody(make_reward(name).body)
    assert body.probe() is None

    def read(prompts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        return [tensors(*found) for found in body.prefill(prompts)]

    with torch.inference_mode(), body.active():
        alone = [tensors(*body.prefill([prompt], share=False)[0]) for prompt in COMPANY]
        assert [len(found[0]) for found in alone] == list(map(len, COMPANY))
        for found in ways(read):
            assert all(same(one, other) for one, other in zip(alone, found, strict=True))
            counted("prompts compared bitwise", len(COMPANY))


def test_a_change_of_one_bit_would_show() -> None:
    runner = ModelRunner(shared_model("llama"), path="shared_prefix")
    with torch.inference_mode(), runner.active():
        one, other = (tensors(prefix, prefix.logits) for prefix in map(runner.prefill, [COMPANY[0]] * 2))
        assert same(one, other)
        other[1][0, 3, 2] = torch.nextafter(other[1][0, 3, 2], torch.tensor(torch.inf))
    assert not same(one, other)


def test_heads_that_are_no_cache_lines_apart_change_no_bits() -> None:
    """A head dimension of 20, and prompts of every length: where keys lie must not show."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 54, "head_dim": 20}
    runner = ModelRunner(tiny_causal_lm("llama", **sizes), path="shared_prefix")
    assert runner.reader.packs
    with torch.inference_mode(), runner.active():
        want = runner.prefill(SHOTS)
        for extra in range(1, 18):
            longer = runner.prefill(SHOTS + prompt_of(extra, salt=extra))
            for layer, keys in want.keys.items():
                whole = 3 * CHUNK
                assert torch.equal(longer.keys[layer][:, :whole], keys[:, :whole])
                assert torch.equal(longer.values[layer][:, :whole], want.values[layer][:, :whole])


def test_models_that_read_prompts_together_wrongly_read_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ModelRunner._forward

    def wrong(self: ModelRunner, ids: Tensor, cache: Any, positions: Tensor, wanted: Any = None) -> Tensor:
        logits = forward(self, ids, cache, positions, wanted)
        packed = wanted is not None and (positions[0].diff() < 0).any()
        return torch.nextafter(logits, logits + 1) if packed else logits

    monkeypatch.setattr(ModelRunner, "_forward", wrong)
    runner = ModelRunner(shared_model("llama"))
    assert (runner.path, runner.promises, runner.reader.packs) == ("shared_prefix", "bits", False)


def test_rotary_angles_that_change_with_the_length_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    runner = ModelRunner(build("llama", rope_parameters=rope, max_position_embeddings=200))
    assert runner.path == "shared_prefix"
    with torch.inference_mode(), runner.active():
        runner.prefill_all([(COMPANY[0], "shared_prefix"), (COMPANY[1], "shared_prefix")])
    assert runner.reader.store.held == 0


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_do_not_depend_on_what_prompts_have_in_common(batch_size: int) -> None:
    shots = "Q: one? A: 1. Q: two? A: 2. Q: three? A: 3. "
    prompts = [*(f"{shots}{end}" for end in ("Q: four?", "Q: five? " * 4, "", "x")), *PROMPTS]
    alone = [outcome(generate(make_engine(tiny_causal_lm("llama")), [prompt])[0]) for prompt in prompts]
    engine = make_engine(tiny_causal_lm("llama"))
    before = engine.runner.reader.tokens_read
    with Recorder(engine) as seen:
        results = generate(engine, prompts, batch_size=batch_size)
    assert [outcome(result) for result in results] == alone
    lengths = [len(prompt) for prompt in seen.prompts_read]
    assert [result.ledger.prompt_tokens for result in results] == lengths
    assert engine.runner.reader.tokens_read - before < sum(lengths)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_what_prompts_have_in_common_is_read_once_together_and_twice_one_by_one() -> None:
    prompts = [SHOTS + prompt_of(5, salt=salt) for salt in range(1, 6)]
    tails = 5 * (len(prompts[0]) - 3 * CHUNK)
    for together, times in ((True, 1), (False, 2)):
        runner = ModelRunner(shared_model("llama"), path="shared_prefix")
        before = runner.reader.tokens_read
        asked: list[tuple[Any, Any]] = [(prompt, "shared_prefix") for prompt in prompts]
        with torch.inference_mode(), runner.active():
            for batch in [asked] if together else [[one] for one in asked]:
                runner.prefill_all(batch)
        assert runner.reader.tokens_read - before == tails + times * 3 * CHUNK


def test_nothing_is_held_of_prompts_that_have_nothing_in_common() -> None:
    runner = ModelRunner(shared_model("llama"), path="shared_prefix")
    with torch.inference_mode(), runner.active():
        runner.prefill_all([(prompt_of(50, salt), "shared_prefix") for salt in range(5)])
        runner.prefill_all([(prompt_of(50, salt), "shared_prefix") for salt in range(5, 9)])
    assert runner.reader.store.held == 0


def test_a_rewards_hidden_states_are_there_for_heads_that_read_the_prompt() -> None:
    def scores(*ends: str) -> list[float]:
        reward = make_reward("llama", "bytes")
        reward.positions_of = lambda ids: (3, len(ids) // 2, len(ids) - 1)
        reward.head = lambda hidden, mask: (hidden.tanh().sum(-1) * mask).sum(-1)
        rows = [RowView(0, "one", (), "eos"), RowView(1, "and two", (), "eos")]
        found = []
        for end in ends:
            conversation = [*CONVERSATION[:1], {"role": "user", "content": "a question that all share, then " + end}]
            found += reward.open(conversation).score(rows)
        return found

    ends = ("x", "y and z", "w")
    assert scores(*ends) == [score for end in ends for score in scores(end)]


# ---- what rows have in common ----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 5)), min_size=1, max_size=8)
)
def test_a_token_is_fed_once_for_all_rows_that_have_it_behind_the_same_tokens(
    drawn: list[tuple[list[int], int]],
) -> None:
    rows = [tuple(ids) for ids, _ in drawn]
    starts = [min(start, len(ids) - 1) for ids, start in drawn]
    fed, owners, ids = ragged._in_common(rows, starts)
    paths = [row[: place + 1] for row, start in zip(rows, starts, strict=True) for place in range(start, len(row))]
    assert len(fed) == len(paths)
    assert len(ids) == len(owners) == len(set(paths)), "each once"
    for number, path in zip(fed, paths, strict=True):
        assert paths[owners[number]] == path
        assert ids[number] == path[-1]


# ---- the store -------------------------------------------------------------------------------------------------------


def chunk(tokens: int = 4) -> Chunk:
    tensor = torch.zeros(1, tokens, 2)
    return Chunk({0: tensor}, {0: tensor}, torch.zeros(0))  # 16 bytes a token


def read(store: ChunkStore, *prompts: str) -> str:
    """Each letter is a chunk; those that had to be read, in order."""
    missed = ""
    with store.reading([letter.encode() for prompt in prompts for letter in prompt]):
        for letter in "".join(prompts):
            key = letter.encode()
            if store.get(key) is None:
                missed += letter
                if store.wants(key):
                    store.put(key, chunk())
    return missed


def held(store: ChunkStore) -> str:
    return "".join(sorted(key.decode() for key in store._chunks))


def test_the_store_holds_what_two_prompts_have_and_lets_the_oldest_go() -> None:
    store = ChunkStore(torch.device("cpu"), limit=3 * chunk().nbytes)
    assert read(store, "abx") == "abx"
    assert (store.held, held(store)) == (0, "")
    assert read(store, "aby") == "aby"
    assert read(store, "abz") == "z"
    assert (store.held, held(store)) == (2 * chunk().nbytes, "ab")
    read(store, "cd", "cd")
    assert held(store) == "bcd"
    assert store.held == 3 * chunk().nbytes


def test_a_chain_that_does_not_fit_shares_its_beginning() -> None:
    store = ChunkStore(torch.device("cpu"), limit=3 * chunk().nbytes)
    read(store, "abcdef", "abcdef")
    for _ in range(3):
        assert read(store, "abcdef") == "def"
    assert read(ChunkStore(torch.device("cpu"), limit=chunk().nbytes - 1), "ab", "ab", "ab") == "ababab"


def test_the_store_goes_first_when_memory_runs_out() -> None:
    store = ChunkStore(torch.device("cpu"))
    read(store, "ab", "ab")
    assert 0 < store.held <= store.limit  # type: ignore[operator]
    release_memory()
    assert (store.held, held(store)) == (0, "")
    assert read(store, "ab") == "ab"
    assert read(store, "ab") == ""


def test_another_thread_may_drop_the_store_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model that reads in a thread of its own may run out of memory while a prompt is read here."""
    size, store = chunk().nbytes, ChunkStore(torch.device("cpu"), limit=3 * chunk().nbytes)
    read(store, "abc", "abc")
    threads: list[threading.Thread] = []

    def nbytes(_: Chunk) -> int:  # asked for in the middle of ``put``
        threads.append(threading.Thread(target=store.drop))
        threads[-1].start()
        threads[-1].join(0.05)
        return size

    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "nbytes", property(nbytes))
        store.put(b"d", chunk())
        for thread in threads:
            thread.join()
    assert len(threads) >= 2
    assert store.held == size * len(store._chunks)


def test_what_is_remembered_of_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_NOTED", 5)
    store = ChunkStore(torch.device("cpu"))
    read(store, "abcdefgh")
    assert len(store._noted) == 5
    assert read(store, "ah") == "ah"
    assert held(store) == "h"


def test_a_read_that_failed_does_not_count() -> None:
    store = ChunkStore(torch.device("cpu"))
    with pytest.raises(KeyError), store.reading([b"a"]):
        raise KeyError
    assert read(store, "a") == "a"
    assert store.held == 0


def test_prompts_that_are_read_between_two_parts_of_others_count_as_read_together() -> None:
    store = ChunkStore(torch.device("cpu"), limit=2 * chunk().nbytes)
    with store.reading([b"a", b"b"]):
        assert read(store, "ac") == "ac"
        assert held(store) == "a"
        assert read(store, "d", "d") == "d"
        assert held(store) == "ad", "what is being read is not let go"
    assert read(store, "ab") == "b"
    assert not store._in_use
