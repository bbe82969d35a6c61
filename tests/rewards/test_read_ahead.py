"""Looks of several prompts read together: the same bits and counts as one by one; what goes wrong stays where it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.reward_sessions import BODIES, PIECES, make_reward
from support.tiny_models import tiny_reward_model, tiny_tokenizer

import specrej_eval
from specrej_eval.core import RowView
from specrej_eval.errors import RewardError
from specrej_eval.in_flight import Request
from specrej_eval.rewards.base import RewardModel, RewardSession
from specrej_eval.rewards.checkpoints import session as session_module
from specrej_eval.rewards.checkpoints.memory import Allowance
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier
from specrej_eval.rewards.kinds.ensemble import Ensemble

Counted = Callable[..., None]
SHOTS = "a question that all of them share, up to here: "
ASKED = ["one?", "", "two and three?", "what is 12 + 123?", "京都"]


def conversation(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": (SHOTS if number % 3 else "") + ASKED[number]}]


@dataclass
class Prompt:
    """One prompt's session and rows, of a history that a seed decides."""

    session: RewardSession
    random: random.Random
    texts: dict[int, str] = field(default_factory=dict)
    started: int = 0

    def grow(self, final: bool) -> list[RowView]:
        for _ in range(self.random.randint(0 if self.texts else 1, 3)):
            self.texts[self.started] = ""
            self.started += 1
        for row in self.texts:
            self.texts[row] += "".join(self.random.choices(PIECES, k=self.random.randint(0, 5)))
        return [RowView(row, text, [5], "eos" if final else None) for row, text in self.texts.items()]

    def cut(self) -> None:
        """Some rows go, and one that stays may be forked."""
        staying = [row for row in self.texts if self.random.random() < 0.6]
        forks = staying[:1] * self.random.randint(0, 1)
        self.session.keep([*staying, *forks])
        texts = {row: self.texts[row] for row in staying}
        for parent in forks:
            texts[self.started] = self.texts[parent]
            self.started += 1
        self.texts = texts


def history(
    reward: RewardModel, together: bool, *, seed: int, looks: int = 4, exact: bool = True
) -> tuple[list[list[float]], list[tuple[int, int]]]:
    """Scores of all looks of all prompts, and what the reward counted for each."""
    prompts = [
        Prompt(reward.open(conversation(place)), random.Random(seed * 10 + place)) for place in range(len(ASKED))
    ]
    scores, counts = [], []
    for look in range(looks):
        due = [prompt for place, prompt in enumerate(prompts) if (look + place) % 4]  # never all of them
        pools = [prompt.grow(look == looks - 1) for prompt in due]
        if together:
            reward.read_ahead([(prompt.session, pool) for prompt, pool in zip(due, pools, strict=True)], exact=exact)
        for prompt, pool in zip(due, pools, strict=True):
            before = reward.tokens_scored, reward.num_calls
            scores.append(prompt.session.score(pool))
            counts.append((reward.tokens_scored - before[0], reward.num_calls - before[1]))
            prompt.cut()
    for prompt in prompts:
        prompt.session.close()
    return scores, counts


class Passes:
    """Counts forward passes over rows, and the prompts in each."""

    def __init__(self, reward: SequenceClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
        assert reward.shared_body is not None
        self.prompts: list[int] = []
        extend = reward.shared_body.extend

        def counted(parts: Sequence[Any]) -> Any:
            self.prompts.append(len(parts))
            return extend(parts)

        monkeypatch.setattr(reward.shared_body, "extend", counted)


# ---- bits and counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["full", "prompt"])
@pytest.mark.parametrize("body", BODIES)
def test_scores_and_counts_are_those_of_prompts_one_by_one(
    body: str, cache: str, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    reward = make_reward(body, "merges", cache=cache)
    assert reward.shared_body is not None and reward.shared_body.exact
    passes = Passes(reward, monkeypatch)
    for seed in range(6):
        alone = history(reward, False, seed=seed)
        assert set(passes.prompts) == {1}
        assert history(reward, True, seed=seed) == alone
        assert max(passes.prompts) > 2
        passes.prompts.clear()
        assert getattr(reward, "allowance").held == 0  # noqa: B009  # not part of the protocol
        counted("scores compared bitwise, together and alone", sum(map(len, alone[0])))


@pytest.mark.parametrize("most", [8, 40])
def test_forward_passes_stay_within_their_size(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make_reward("llama", "merges", max_padded_tokens=most)
    seen: list[int] = []
    assert reward.shared_body is not None
    extend = reward.shared_body.extend

    def watched(parts: Sequence[Any]) -> Any:
        seen.append(sum(part.num_rows * max(part.counts) for part in parts))
        assert seen[-1] <= most or (len(parts) == 1 and parts[0].num_rows == 1)
        return extend(parts)

    monkeypatch.setattr(reward.shared_body, "extend", watched)
    assert history(reward, True, seed=1) == history(reward, False, seed=1)
    assert len(seen) > 8


def test_a_change_of_one_bit_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make_reward("llama", "merges")
    alone = history(reward, False, seed=0)
    extend = reward.shared_body.extend  # type: ignore[union-attr]

    def wrong(parts: Sequence[Any]) -> Any:
        found = extend(parts)
        if len(parts) > 1:
            found[1] = tuple(torch.nextafter(hidden, hidden + 1) for hidden in found[1])
        return found

    monkeypatch.setattr(reward.shared_body, "extend", wrong)
    assert history(reward, True, seed=0) != alone


def test_where_bits_depend_on_company_prompts_are_read_one_by_one_unless_that_is_no_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reward = SequenceClassifier(tiny_reward_model("llama").to(torch.bfloat16), tiny_tokenizer())
    passes = Passes(reward, monkeypatch)
    assert reward.shared_body is not None and not reward.shared_body.exact
    alone = history(reward, True, seed=0)
    assert set(passes.prompts) == {1}
    scores, counts = history(reward, True, seed=0, exact=False)
    assert max(passes.prompts) > 2
    assert counts == alone[1]
    for mine, theirs in zip(scores, alone[0], strict=True):
        assert mine == pytest.approx(theirs, abs=0.1)


def test_threads_that_change_bits_are_not_trusted() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        reward = make_reward("llama", "bytes")
        assert reward.shared_body is not None and not reward.shared_body.exact
    finally:
        torch.set_num_threads(threads)


def test_members_of_an_ensemble_read_ahead_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [make_reward("llama", "merges"), make_reward("qwen3", "bytes")]
    passes = [Passes(member, monkeypatch) for member in members]
    ensemble = Ensemble(members, [1.0, -0.5])
    alone = history(ensemble, False, seed=2)
    assert history(ensemble, True, seed=2) == alone
    assert all(max(each.prompts) > 2 for each in passes)


def test_a_reward_that_reads_everything_anew_is_left_alone() -> None:
    reward = make_reward("llama", "merges", cache="off")
    assert history(reward, True, seed=3) == history(reward, False, seed=3)


# ---- what rows have in common ----------------------------------------------------------------------------------------


def rows(*texts: str) -> list[RowView]:
    return [RowView(row, text, [5], None) for row, text in enumerate(texts)]


def test_what_rows_begin_with_is_read_once() -> None:
    reward = make_reward("llama", "bytes")
    session = reward.open(conversation(0))
    prompt = len(reward.renderer.inputs(conversation(0), rows(""))[0].ids) - 1

    def tokens(*texts: str) -> int:
        before = reward.tokens_scored
        scores = session.score(rows(*texts))
        fed = reward.tokens_scored - before
        assert scores == pytest.approx(reward.score(conversation(0), rows(*texts)), abs=1e-4)
        return fed

    assert tokens("the cat", "the dog", "the cat") == prompt + len("the cat" + "dog") + 2  # and an end for each
    assert tokens("the cat sat", "the dog", "the cat sits") == len(" sat" + "its") + 2


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def looks_of(reward: RewardModel, *texts: str) -> list[tuple[RewardSession, list[RowView]]]:
    return [(reward.open(conversation(place)), rows(text, text + "!")) for place, text in enumerate(texts)]


def test_a_row_that_cannot_be_rendered_is_told_by_its_own_prompt() -> None:
    reward = make_reward("llama", "bytes")
    reward.renderer.template = (
        "{% for m in messages %}{% if 'BAD' in m['content'] %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}"
        "{% endfor %}"
    )
    want = [session.score(pool) for session, pool in looks_of(reward, "one", "two")]
    looks = looks_of(reward, "one", "two", "a BAD one")
    reward.read_ahead(looks, exact=True)
    assert [session.score(pool) for session, pool in looks[:2]] == want
    with pytest.raises(RewardError, match="a BAD one"):
        looks[2][0].score(looks[2][1])


@pytest.mark.parametrize(
    "rows_that_fit",
    [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(3, marks=pytest.mark.full), 5],
)
def test_memory_that_runs_out_is_everyones_own_affair(
    rows_that_fit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = history(make_reward("llama", "merges"), False, seed=4)[0]
    reward = make_reward("llama", "merges")
    assert reward.shared_body is not None
    extend = reward.shared_body.extend

    def tight(parts: Sequence[Any]) -> Any:
        if sum(part.num_rows for part in parts) > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return extend(parts)

    monkeypatch.setattr(reward.shared_body, "extend", tight)
    scores = history(reward, True, seed=4)[0]
    for mine, theirs in zip(scores, want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert ("memory is running low" in caplog.text) == (rows_that_fit == 0)
    assert reward.allowance.held == 0


@pytest.mark.parametrize("where", ["prefill", "extend", "head"])
def test_memory_that_runs_out_while_all_are_read_leaves_nothing_behind(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [session.score(pool) for session, pool in looks_of(make_reward("llama", "merges"), "one", "two", "three")]
    reward = make_reward("llama", "merges")
    assert reward.shared_body is not None
    for failures in (1, 2, 3):
        left = [failures]

        def fails(work: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def failing(*arguments: Any, **options: Any) -> Any:
                if left[0]:
                    left[0] -= 1
                    raise torch.OutOfMemoryError
                return work(*arguments, **options)

            return failing

        looks = looks_of(reward, "one", "two", "three")
        with monkeypatch.context() as patched:
            owner, name = (reward, "head_scores") if where == "head" else (reward.shared_body, where)
            patched.setattr(owner, name, fails(getattr(owner, name)))
            reward.read_ahead(looks, exact=True)
            scores = [session.score(pool) for session, pool in looks]
        assert left == [0]
        for mine, theirs in zip(scores, want, strict=True):
            assert mine == (theirs if failures == 1 else pytest.approx(theirs, abs=1e-4))
        for session, _ in looks:
            session.close()
        assert reward.allowance.held == 0


def test_rows_other_than_those_read_ahead_are_read_then() -> None:
    reward = make_reward("llama", "merges")
    looks = looks_of(reward, "one", "two")
    reward.read_ahead(looks, exact=True)
    other = rows("another", "one")
    assert looks[0][0].score(other) == pytest.approx(reward.score(conversation(0), other), abs=1e-4)
    assert looks[1][0].score(looks[1][1]) == pytest.approx(reward.score(conversation(1), looks[1][1]), abs=1e-4)


@pytest.mark.parametrize("limit", [1, 60, 100, 160, 300])
def test_the_allowance_holds_for_all_of_them(limit: int) -> None:
    reward = make_reward("llama", "merges")
    want = history(reward, False, seed=5)[0]

    class Watched(Allowance):
        most = 0

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "held":
                assert 0 <= value <= limit
                Watched.most = max(Watched.most, value)

    reward.allowance = Watched(limit)
    scores = history(reward, True, seed=5)[0]
    for mine, theirs in zip(scores, want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert reward.allowance.held == 0
    assert limit == 1 or Watched.most > 0


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_do_not_depend_on_how_many_prompts_are_scored_together(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"Add: {number} + {97 - number} =" for number in range(20, 32)]
    together: list[int] = []
    read = session_module.read_together

    def recorded(looks: Any) -> None:
        together.append(len(looks))
        read(looks)

    monkeypatch.setattr("specrej_eval.rewards.checkpoints.reward.read_together", recorded)
    found = {}
    for batch_size in (1, 5, 12):
        results = specrej_eval.load(n=8, max_gen_toks=48, batch_size=batch_size).generate(prompts)
        whole = [result.to_dict() for result in results]
        for each in whole:
            assert each["ledger"]["seconds"].pop("reward") > 0
            del each["ledger"]["seconds"], each["ledger"]["peak_bytes"]
        found[batch_size] = whole
        assert (max(together, default=0) > 4) == (batch_size > 4)
        together.clear()
    assert found[1] == found[5] == found[12]


def test_an_error_of_one_prompt_comes_after_the_answers_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = specrej_eval.load(n=2, max_gen_toks=4, batch_size=3, strategy="best_of_n")
    requests = [
        Request(prompt=generator.engine.encode(f"Add: {number} + 96 ="), config=generator.config)
        for number in (21, 22, 23)
    ]
    inputs = generator.reward.renderer.inputs

    def failing(conversation: Any, *arguments: Any) -> Any:
        if "22" in conversation[0]["content"]:
            raise RewardError("no such luck")
        return inputs(conversation, *arguments)

    monkeypatch.setattr(generator.reward.renderer, "inputs", failing)
    done = []
    with pytest.raises(RewardError, match="no such luck"):
        for index, _ in generator.run(requests, progress=False):
            done.append(index)
    assert done == [0]
