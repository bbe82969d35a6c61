"""Reward models against independent computations: a plain forward pass of one unpadded sequence, and arithmetic."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rewards import check_reward, make_reward
from support.tiny_models import (
    BOS,
    END,
    EOS,
    NO_SYSTEM_TEMPLATE,
    PAD,
    save,
    tiny_causal_lm,
    tiny_reward_model,
    tiny_tokenizer,
)

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.errors import CheckpointError, ConfigError, OutOfMemoryError, RewardError
from specrej_eval.rewards.checkpoints.family import family_names, load_family
from specrej_eval.rewards.checkpoints.renderer import Renderer
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.families.sequence_classifier import SequenceClassifier
from specrej_eval.rewards.kinds.function import CallableReward
from specrej_eval.rewards.kinds.self_scores import Likelihood

HELLO = [{"role": "user", "content": "Say hello."}]
TEXTS = ["Hello!", "Good morning to you, dear reader.", "", "¡Buenos días!", "Hi"]
DECODERS = ["llama", "mistral", "qwen2", "gpt2"]


def rows(*texts: str, finish: str | None = "eos") -> list[RowView]:
    return [RowView(i, text, [5], finish) for i, text in enumerate(texts)]  # type: ignore[arg-type]


def scorer(arch: str = "llama", *, tokenizer: Any = None, model: Any = None, **options: Any) -> SequenceClassifier:
    return SequenceClassifier(model or tiny_reward_model(arch), tokenizer or tiny_tokenizer(), **options)


def chat_ids(
    tokenizer: Any, conversation: Sequence[dict[str, str]], response: str, *, closed: bool = True
) -> list[int]:
    """What the tiny template must give, written out by hand."""
    text = "<bos>" + "".join(f"<|turn|>{turn['role']}\n{turn['content']}<|end|>" for turn in conversation)
    text += f"<|turn|>assistant\n{response}" + ("<|end|>" if closed else "")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def plain_score(model: Any, ids: Sequence[int]) -> float:
    """Full forward of one unpadded sequence; all positions through the head, the last one taken."""
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(torch.tensor([list(ids)])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])


@pytest.mark.parametrize("arch", DECODERS)
def test_a_batch_scores_as_single_unpadded_forwards_do(arch: str) -> None:
    reward = scorer(arch)
    expected = [plain_score(reward.model, chat_ids(reward.tokenizer, HELLO, text)) for text in TEXTS]
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)
    single = [reward.score(HELLO, rows(text))[0] for text in TEXTS]
    assert single == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01  # else the comparison says nothing


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_changes_nothing(arch: str, side: str) -> None:
    reward = scorer(arch, tokenizer=tiny_tokenizer(padding_side=side))
    expected = [plain_score(reward.model, chat_ids(reward.tokenizer, HELLO, text)) for text in TEXTS]
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
def test_the_last_token_counts_though_it_is_the_padding_token(arch: str) -> None:
    model = tiny_reward_model(arch, pad_token_id=END)
    reward = scorer(model=model, tokenizer=tiny_tokenizer(pad_is_eos=True))
    ids = [chat_ids(reward.tokenizer, HELLO, text) for text in TEXTS]
    expected = [plain_score(model, entry) for entry in ids]
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():  # the trap is there: transformers' own pooling reads one token too early
        trapped = float(model(torch.tensor([ids[0]])).logits[0, 0])
    assert trapped != pytest.approx(expected[0], abs=1e-3)
    assert trapped == pytest.approx(plain_score(model, ids[0][:-1]), abs=1e-5)


def test_a_model_without_a_padding_token_scores_batches() -> None:
    reward = scorer(model=tiny_reward_model(pad_token_id=None))
    expected = [plain_score(reward.model, chat_ids(reward.tokenizer, HELLO, text)) for text in TEXTS]
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)


def test_the_head_is_applied_in_float32() -> None:
    model = tiny_reward_model().to(torch.bfloat16)
    reward = scorer(model=model)
    ids = torch.tensor([chat_ids(reward.tokenizer, HELLO, "Hello!")])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
        exact = float(hidden.double() @ model.score.weight[0].double())
    (score,) = reward.score(HELLO, rows("Hello!"))
    assert score == pytest.approx(exact, abs=1e-5)
    assert score != float(torch.tensor(score).bfloat16())  # a bfloat16 head could not say it


def inputs_of(reward: SequenceClassifier, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every sequence the model reads from now on."""
    seen: list[tuple[int, ...]] = []
    forward = reward._forward

    def spy(batch: list[Any]) -> list[float]:
        seen.extend(entry.ids for entry in batch)
        return forward(batch)

    monkeypatch.setattr(reward, "_forward", spy)
    return seen


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_there_as_the_template_has_it(adds_bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    if not adds_bos:
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    assert tokenizer("x")["input_ids"][0] == BOS  # tokenising the rendered text once more would add another
    reward = scorer(tokenizer=tokenizer)
    seen = inputs_of(reward, monkeypatch)
    reward.score(HELLO, rows("Hello!"))
    assert seen[0].count(BOS) == int(adds_bos)


def test_system_messages_reach_a_template_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer()
    conversation = [{"role": "system", "content": "Be brief."}, *HELLO]
    seen = inputs_of(reward, monkeypatch)
    reward.score(conversation, rows("Hello!"))
    assert seen == [tuple(chat_ids(reward.tokenizer, conversation, "Hello!"))]


def test_a_refused_system_message_goes_before_the_first_user_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reward = scorer(tokenizer=tiny_tokenizer(chat_template=NO_SYSTEM_TEMPLATE))
    seen = inputs_of(reward, monkeypatch)
    conversation = [{"role": "system", "content": "Be brief."}, *HELLO]
    for _ in range(2):
        reward.score(conversation, rows("Hello!", "Hi"))
    merged = [{"role": "user", "content": "Be brief.\n\nSay hello."}]
    assert set(seen) == {tuple(chat_ids(reward.tokenizer, merged, text)) for text in ("Hello!", "Hi")}
    assert [record.message for record in caplog.records if "system" in record.message] == [
        "reward_model=reward model: its chat template takes no system message; the system message goes before "
        "the first user message."
    ]
    assert conversation[0] == {"role": "system", "content": "Be brief."}  # the caller's own is left alone


def test_a_template_that_fails_is_a_reward_error_with_row_and_cause() -> None:
    broken = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RewardError, match=r"roles must alternate(.|\n)*row 0: 'Hello!'") as caught:
        scorer(tokenizer=tiny_tokenizer(chat_template=broken)).score(HELLO, rows("Hello!"))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("partial_turn", ["closed", "open"])
def test_an_unfinished_row_is_open_only_if_asked_and_a_finished_one_never(
    partial_turn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = scorer(partial_turn=partial_turn)
    seen = inputs_of(reward, monkeypatch)
    live, done = reward.score(HELLO, [*rows("Hello", finish=None), RowView(1, "Hello", [5], "eos")])
    assert (live == done) == (partial_turn == "closed")
    expected = {tuple(chat_ids(reward.tokenizer, HELLO, "Hello"))}
    if partial_turn == "open":
        expected.add(tuple(chat_ids(reward.tokenizer, HELLO, "Hello", closed=False)))
    assert set(seen) == expected


def test_an_open_turn_without_text_is_a_turn_just_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer(partial_turn="open")
    seen = inputs_of(reward, monkeypatch)
    reward.score(HELLO, rows("\ufffd", finish=None))
    assert seen == [tuple(chat_ids(reward.tokenizer, HELLO, "", closed=False))]


def test_half_a_character_at_the_end_is_not_scored_unless_the_row_has_finished() -> None:
    reward = scorer()
    clean, half, finished = reward.score(
        HELLO, [*rows("caf", "caf\ufffd\ufffd", finish=None), RowView(2, "caf\ufffd", [5], "eos")]
    )
    assert half == clean
    assert finished != clean


def test_the_response_prefix_is_part_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer()
    seen = inputs_of(reward, monkeypatch)
    reward.score(HELLO, rows("llo!"), "He")
    assert seen == [tuple(chat_ids(reward.tokenizer, HELLO, "Hello!"))]


def test_too_long_inputs_are_cut_on_the_left_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reward = scorer(model=tiny_reward_model(max_position_embeddings=64))
    seen = inputs_of(reward, monkeypatch)
    long = [{"role": "user", "content": "x" * 100}]
    full = chat_ids(reward.tokenizer, long, "Hello!")
    for _ in range(2):
        (score,) = reward.score(long, rows("Hello!"))
    assert seen[0] == (BOS, *full[-63:])
    assert score == pytest.approx(plain_score(reward.model, seen[0]), abs=1e-5)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "rows longer than its 64 tokens: 1 of 1;" in warnings[0]
    assert f"up to {len(full) - 64:,} tokens" in warnings[0]


def test_the_tokenizers_maximum_counts_too_and_its_nonsense_does_not() -> None:
    assert scorer(tokenizer=tiny_tokenizer(model_max_length=100)).renderer.max_length == 100
    assert scorer(tokenizer=tiny_tokenizer(model_max_length=int(1e30))).renderer.max_length == 512


def test_equal_texts_are_read_once_and_are_exact_ties() -> None:
    reward = scorer()
    scores = reward.score(HELLO, rows("Hello!", "Good morning", "Hello!", "Hello!"))
    assert scores[0] == scores[2] == scores[3] != scores[1]
    assert reward.tokens_scored == sum(
        len(chat_ids(reward.tokenizer, HELLO, text)) for text in ("Hello!", "Good morning")
    )
    assert reward.num_calls == 1


def test_micro_batches_hold_few_enough_tokens_and_keep_row_order() -> None:
    texts = [f"{'very ' * (i % 7)}good {i}" for i in range(20)]
    whole, split = scorer(), scorer(max_padded_tokens=200)
    batches: list[list[Any]] = []
    forward = split._forward
    split._forward = lambda batch: (batches.append(batch), forward(batch))[1]  # type: ignore[method-assign]
    assert split.score(HELLO, rows(*texts)) == pytest.approx(whole.score(HELLO, rows(*texts)), abs=1e-5)
    assert split.num_calls == len(batches) > 1 == whole.num_calls
    assert split.tokens_scored == whole.tokens_scored
    assert all(len(batch) * max(len(entry.ids) for entry in batch) <= 200 for batch in batches)


def test_the_split_does_not_hang_on_row_order() -> None:
    texts = [f"{'very ' * (i % 2)}good {i}" for i in range(10, 50)]  # many of one length
    reward = scorer(max_padded_tokens=200)
    forward = reward._forward
    batches: list[list[Any]] = []
    reward._forward = lambda batch: (batches.append(batch), forward(batch))[1]  # type: ignore[method-assign]
    scores = reward.score(HELLO, rows(*texts))
    first = batches[:]
    batches.clear()
    assert reward.score(HELLO, rows(*texts[::-1]))[::-1] == scores  # bit for bit
    assert batches == first


def test_a_sequence_longer_than_a_micro_batch_is_still_scored() -> None:
    assert len(scorer(max_padded_tokens=4).score(HELLO, rows("Hello!", "Hi"))) == 2


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer()
    expected = reward.score(HELLO, rows(*TEXTS))
    forward = reward._forward

    def tight(batch: list[Any]) -> list[float]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(batch)

    monkeypatch.setattr(reward, "_forward", tight)
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)
    assert reward.num_calls == 1 + 3  # 5 rows: 2, then 3 = 1 + 2


def test_out_of_memory_with_one_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer()

    def hopeless(batch: list[Any]) -> list[float]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(reward, "_forward", hopeless)
    with pytest.raises(OutOfMemoryError, match="one sequence of"):
        reward.score(HELLO, rows("Hello!", "Hi"))


def test_other_errors_of_the_model_are_not_taken_for_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = scorer()
    calls = []

    def broken(batch: list[Any]) -> list[float]:
        calls.append(batch)
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(reward, "_forward", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        reward.score(HELLO, rows("Hello!", "Hi"))
    assert len(calls) == 1


def test_no_rows_no_scores() -> None:
    reward = scorer()
    assert reward.score(HELLO, []) == []
    assert reward.num_calls == 0


def test_nan_is_passed_on() -> None:
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    assert all(math.isnan(score) for score in scorer(model=model).score(HELLO, rows("Hello!", "Hi")))


def test_dropout_is_off_and_gradients_are_not_recorded() -> None:
    model = tiny_reward_model(attention_dropout=0.5).train()
    reward = scorer(model=model)
    assert not model.training
    assert reward.score(HELLO, rows("Hello!")) == reward.score(HELLO, rows("Hello!"))


def test_a_vocabulary_too_small_for_the_tokenizer_names_the_row() -> None:
    with pytest.raises(RewardError, match=r"row 0 has token id \d+, but the model's vocabulary ends at 100: 'Hello!'"):
        scorer(model=tiny_reward_model(vocab_size=100)).score(HELLO, rows("Hello!"))


PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_a_decoder_without_a_template_asks_for_one() -> None:
    with pytest.raises(ConfigError, match=r"no chat template(.|\n)*reward_template="):
        scorer(tokenizer=tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize("own", [None, NO_SYSTEM_TEMPLATE], ids=["no template of its own", "another of its own"])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_template_given_is_the_one_that_is_used(
    own: str | None, as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_reward_model(), tiny_tokenizer(chat_template=own), tmp_path / "reward")
    (tmp_path / "plain.jinja").write_text(PLAIN)
    given = str(tmp_path / "plain.jinja") if as_file else PLAIN
    reward = make_reward(config_for(folder, reward_template=given), device="cpu")
    assert isinstance(reward, SequenceClassifier)
    seen = inputs_of(reward, monkeypatch)
    reward.score([{"role": "user", "content": "Q: hello?\nA:"}], rows(" Hi"))
    assert seen == [tuple(reward.tokenizer("Q: hello?\nA: Hi")["input_ids"])]
    assert seen[0].count(BOS) == 1


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_template_file_that_is_not_there_is_found_before_weights(reward_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_template='templates/mine.jinja' is neither"):
        make_reward(config_for(reward_folder, reward_template="templates/mine.jinja"), device="cpu")


def plain_renderer(tokenizer: Any, **options: Any) -> Renderer:
    return Renderer(tokenizer, name="reward model", vocab_size=300, without_template="text", **options)


def test_a_family_may_read_plain_text_with_one_bos(caplog: pytest.LogCaptureFixture) -> None:
    renderer = plain_renderer(tiny_tokenizer(chat_template=None))
    seen = []
    for start in ("", "<bos>"):  # a context that already begins with BOS gets no second one
        seen += renderer.inputs([{"role": "user", "content": f"{start}Q: hello?\nA:"}], rows(" Hi"))
    assert [entry.ids for entry in seen] == [tuple(renderer.tokenizer("Q: hello?\nA: Hi")["input_ids"])] * 2
    assert seen[0].ids.count(BOS) == 1
    assert sum("no chat template" in record.message for record in caplog.records) == 1


def test_nothing_to_read_at_all_is_a_padding_token() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = tiny_tokenizer().backend_tokenizer.post_processor.__class__(
        single="$A", pair=None, special_tokens=[]
    )
    assert plain_renderer(tokenizer).inputs([], rows("")) == [((PAD,), ())]


@pytest.mark.parametrize("max_length", [None, 20])
def test_trailing_ids_end_every_input(max_length: int | None) -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(
        tokenizer, name="r", vocab_size=300, trailing_ids=(7, 8), partial_turn="open", max_length=max_length
    )
    texts = [*rows("Hello", finish=None), RowView(1, "Hello", [5], "eos")]
    opened, closed = (entry.ids for entry in renderer.inputs(HELLO, texts))
    full = [chat_ids(tokenizer, HELLO, "Hello", closed=end) for end in (False, True)]
    if max_length is None:
        assert [opened, closed] == [(*ids, 7, 8) for ids in full]
    else:
        assert [opened, closed] == [(BOS, *[*ids, 7, 8][-19:]) for ids in full]


# -- what families build on


class _Positions:
    """Adds up one number per position: which ones is visible in the score."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(size, generator=generator)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert hidden.dtype == torch.float32
        assert mask.dtype == torch.bool
        assert not hidden[~mask].any()
        self.shapes.append(tuple(hidden.shape))
        return (torch.tanh(hidden @ self.weight) * mask).sum(-1)


def every_ninth(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(3, len(ids), 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_gets_the_positions_it_asked_for_ragged(dtype: torch.dtype) -> None:
    model = tiny_reward_model().to(dtype)
    head = _Positions(32)
    reward = CheckpointReward(
        model.model, head, Renderer(tiny_tokenizer(), name="r", vocab_size=300), positions_of=every_ninth
    )
    expected = []
    for text in TEXTS:
        ids = chat_ids(tiny_tokenizer(), HELLO, text)
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0].float()
        expected.append(float(torch.tanh(hidden[list(every_ninth(tuple(ids)))] @ head.weight).sum()))
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 0.1)
    counts = {len(every_ninth(tuple(chat_ids(tiny_tokenizer(), HELLO, text)))) for text in TEXTS}
    assert len(counts) > 1  # ragged
    assert head.shapes == [(len(TEXTS), max(counts), 32)]


@pytest.mark.usefixtures("user_module")
def test_a_reward_without_memory_has_sessions_that_score_in_full(user_module: str) -> None:
    session = CallableReward(f"{user_module}:lengths").open(HELLO, "<p>")
    assert session.score(rows("a", "bcd")) == [4.0, 6.0]
    session.keep([1, 1])
    assert session.score(rows("bcde")) == [7.0]
    session.close()
    session.close()


# -- encoders


def encoder(**overrides: Any) -> SequenceClassifier:
    return scorer(model=tiny_reward_model("bert", **overrides), tokenizer=tiny_tokenizer(chat_template=None, pair=True))


def test_an_encoder_reads_a_text_pair_and_pools_in_its_own_way() -> None:
    reward = encoder()
    expected = []
    for text in TEXTS:
        pair = reward.tokenizer("Say hello.", text, return_tensors="pt")
        assert set(pair["token_type_ids"][0].tolist()) == ({0, 1} if text else {0})
        with torch.no_grad():
            expected.append(float(reward.model(**pair).logits[0, 0]))
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("answer", ["short", "y" * 90])
def test_of_a_too_long_pair_the_prompt_goes_first(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = encoder(max_position_embeddings=64)
    seen = inputs_of(reward, monkeypatch)
    reward.score([{"role": "user", "content": "x" * 80}], rows(answer))
    y = reward.tokenizer(answer, add_special_tokens=False)["input_ids"]
    x = reward.tokenizer("x" * 80, add_special_tokens=False)["input_ids"]
    room = 64 - 3
    kept_y = y[-room:]
    kept_x = x[len(x) - (room - len(kept_y)) :]
    assert seen == [(BOS, *kept_x, EOS, *kept_y, EOS)]


# -- likelihood


def test_likelihood_is_the_mean_logprob_and_costs_nothing() -> None:
    reward = Likelihood()
    assert reward.needs_logprobs
    scores = reward.score(HELLO, [RowView(0, "a", [1], None, -0.5), RowView(1, "b", [1, 2], "eos", -2.0)])
    assert scores == [-0.5, -2.0]
    assert (reward.tokens_scored, reward.num_calls) == (0, 0)


def test_likelihood_without_logprobs_is_an_error_that_names_the_row() -> None:
    with pytest.raises(RewardError, match="row 3"):
        Likelihood().score(HELLO, [RowView(3, "a", [1], None)])


# -- callables


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, on the path; returns its name."""
    (tmp_path / "my_rewards_on_path.py").write_text(
        "import numpy, torch\n"
        "calls = []\n"
        "def lengths(conversation, responses):\n"
        "    calls.append((conversation, list(responses)))\n"
        "    conversation[0]['content'] = 'changed'\n"
        "    return [float(len(r)) for r in responses]\n"
        "def raises(conversation, responses): raise KeyError('boom')\n"
        "def array(conversation, responses): return numpy.arange(len(responses), dtype='float32')\n"
        "def tensor(conversation, responses): return torch.arange(len(responses))[:, None].to(torch.bfloat16)\n"
        "def scalars(conversation, responses): return [numpy.float64(1), torch.tensor(2.0)][:len(responses)]\n"
        "def integers(conversation, responses): return tuple(range(len(responses)))\n"
        "def nan(conversation, responses): return [float('nan')] * len(responses)\n"
        "def short(conversation, responses): return [1.0]\n"
        "def text(conversation, responses): return 'ab'\n"
        "def texts(conversation, responses): return [1.0, '2.0']\n"
        "def number(conversation, responses): return 1.0\n"
        "def nothing(conversation, responses): return None\n"
        "def nones(conversation, responses): return [1.0, None]\n"
        "def objects(conversation, responses): return [1.0, object()]\n"
        "def columns(conversation, responses): return numpy.ones((len(responses), 2))\n"
        "def dictionary(conversation, responses): return {r: 1.0 for r in responses}\n"
        "class Scorer:\n"
        "    def score(self, conversation, responses): return [1.0] * len(responses)\n"
        "scorer = Scorer()\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards_on_path"


def test_a_callable_gets_conversation_and_responses(user_module: str) -> None:
    reward = CallableReward(f"{user_module}:lengths")
    conversation = [dict(HELLO[0])]
    assert reward.score(conversation, rows("a", "bcd"), "<prefix>") == [9.0, 11.0]
    import my_rewards_on_path  # type: ignore[import-not-found]  # written by the fixture

    assert my_rewards_on_path.calls[-1][1] == ["<prefix>a", "<prefix>bcd"]
    assert conversation == HELLO  # what the callable does to its arguments stays with it
    assert (reward.num_calls, reward.tokens_scored, reward.needs_logprobs) == (1, 0, False)
    assert reward.score(conversation, []) == []
    assert reward.num_calls == 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [("array", [0.0, 1.0]), ("tensor", [0.0, 1.0]), ("scalars", [1.0, 2.0]), ("integers", [0.0, 1.0])],
)
def test_numbers_of_many_kinds_are_numbers(user_module: str, function: str, expected: list[float]) -> None:
    scores = CallableReward(f"{user_module}:{function}").score(HELLO, rows("a", "b"))
    assert scores == expected
    assert all(type(score) is float for score in scores)


def test_a_method_of_an_object_is_a_callable(user_module: str) -> None:
    assert CallableReward(f"{user_module}:scorer.score").score(HELLO, rows("a")) == [1.0]


def test_a_function_at_hand_needs_no_name() -> None:
    class Shorter:
        def __call__(self, conversation: Any, responses: Sequence[str]) -> list[float]:
            return [-float(len(response)) for response in responses]

    reward = CallableReward(Shorter())
    assert (reward.name, reward.score(HELLO, rows("a", "bcd"))) == ("Shorter", [-1, -3])
    assert CallableReward(len).name == "len"


def test_a_callables_nan_is_passed_on(user_module: str) -> None:
    assert np.isnan(CallableReward(f"{user_module}:nan").score(HELLO, rows("a", "b"))).all()


@pytest.mark.parametrize(
    ("function", "said", "row"),
    [
        ("raises", "raised KeyError: 'boom'", 0),
        ("short", "returned 1 value for 2 responses", 0),
        ("text", "returned str 'ab'", 0),
        ("number", "returned float '1.0'", 0),
        ("nothing", "returned None", 0),
        ("dictionary", "returned dict", 0),
        ("texts", "returned str '2.0' in place of a number", 1),
        ("nones", "returned None in place of a number", 1),
        ("objects", "returned object", 1),
        ("columns", "returned list", 0),
    ],
)
def test_a_callable_that_breaks_the_rule(user_module: str, function: str, said: str, row: int) -> None:
    reward = CallableReward(f"{user_module}:{function}")
    with pytest.raises(RewardError) as caught:
        reward.score(HELLO, rows("first " + "x" * 500, "second"))
    message = str(caught.value)
    assert said in message
    assert f"reward_model='{user_module}:{function}'" in message
    assert f"row {row}: {'first' if row == 0 else 'second'!r}"[:-1] in message
    assert "one number per response" in message
    assert len(message) < 600  # the start of the text, not all of it
    if function == "raises":
        assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_package_here:f", "No module named 'no_such_package_here'"),
        ("my_rewards_on_path:lenghts", "did you mean 'lengths'"),
        ("my_rewards_on_path:constant", "must name a callable, got int"),
        ("broken_rewards:f", "ZeroDivisionError"),
        ("needs_rewards:f", "No module named 'something_not_installed'"),
    ],
)
def test_a_callable_that_cannot_be_had_is_found_before_weights(
    user_module: str, tmp_path: Path, name: str, said: str
) -> None:
    del user_module
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "needs_rewards.py").write_text("import something_not_installed\n")
    with pytest.raises(ConfigError) as caught:
        check_reward(RunConfig(pretrained="x", reward_model=name))
    assert said in str(caught.value)


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_in_cwd.py").write_text("def f(conversation, responses): return [0.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry not in ("", str(tmp_path))])
    reward = make_reward(RunConfig(pretrained="x", reward_model="rewards_in_cwd:f"), device="cpu")
    assert reward.score(HELLO, rows("a")) == [0.0]


# -- make_reward and check_reward


def config_for(reward_model: object, **changes: Any) -> RunConfig:
    return RunConfig(pretrained="x").replace(reward_model=str(reward_model), **changes)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_reward_model(), tiny_tokenizer(), tmp_path_factory.mktemp("rewards") / "tiny-reward")


def broken_copy(folder: Path, target: Path, **config_changes: Any) -> Path:
    """A copy with some keys of config.json changed."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **config_changes}))
    return target


def test_a_saved_checkpoint_scores_as_the_model_it_was_saved_from(reward_folder: Path) -> None:
    reward = make_reward(config_for(reward_folder), device="cpu")
    assert isinstance(reward, SequenceClassifier)
    assert reward.name == str(reward_folder)
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(scorer().score(HELLO, rows(*TEXTS)), abs=1e-6)


@pytest.mark.parametrize(("reward_dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_the_checkpoints_unless_given(tmp_path: Path, reward_dtype: str, expected: torch.dtype) -> None:
    folder = save(tiny_reward_model().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "bf16")
    reward = make_reward(config_for(folder, reward_dtype=reward_dtype), device="cpu")
    assert isinstance(reward, SequenceClassifier)
    assert reward.model.dtype == expected


def test_partial_turn_reaches_the_scorer(reward_folder: Path) -> None:
    texts = rows("Hello", finish=None)
    closed = make_reward(config_for(reward_folder), device="cpu").score(HELLO, texts)
    opened = make_reward(config_for(reward_folder, partial_turn="open"), device="cpu").score(HELLO, texts)
    assert closed != opened


def test_the_embedded_reward_stands_in_only_beside_the_embedded_language_model(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_reward_model().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "demo")
    monkeypatch.setattr(checkpoint, "DEMO_REWARD", folder)
    reward = make_reward(RunConfig(), device="cpu")
    assert isinstance(reward, SequenceClassifier)
    assert reward.name == str(folder)
    assert reward.model.dtype == torch.float32  # whatever the checkpoint says
    with pytest.raises(ConfigError, match=r"a reward model is needed to rank(.|\n)*likelihood, or pkg.module:function"):
        check_reward(RunConfig(pretrained="some/model"))


def test_the_demo_folders_are_the_demo_packages() -> None:
    from specrej_eval import demo

    assert (checkpoint.DEMO_POLICY, checkpoint.DEMO_REWARD) == (demo.POLICY_DIR, demo.REWARD_DIR)


def test_one_row_needs_no_reward() -> None:
    reward = make_reward(RunConfig(pretrained="some/model", strategy="best_of_n", n=1), device="cpu")
    assert isinstance(reward, Likelihood)
    assert isinstance(make_reward(config_for("likelihood"), device="cpu"), Likelihood)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("likelyhood", ConfigError, "did you mean 'likelihood'"),
        ("some-reward", ConfigError, "unknown reward_model 'some-reward'"),
        ("/no/such/folder", CheckpointError, "there is no folder '/no/such/folder'"),
    ],
)
def test_an_unknown_reward_is_named(name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        check_reward(config_for(name))
    assert said in str(caught.value)


def test_a_missing_folder_names_its_nearest_neighbour(reward_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean '.*tiny-reward'"):
        check_reward(config_for(reward_folder.parent / "tiny-rewrad"))


def test_a_hub_name_that_cannot_be_fetched_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(CheckpointError, match="couldn't connect"):
        check_reward(config_for("someone/reward"))


@pytest.fixture
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSequenceClassification

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_several_labels_are_refused_before_weights_load(tmp_path: Path) -> None:
    folder = save(tiny_reward_model(num_labels=3), tiny_tokenizer(), tmp_path / "three")
    with pytest.raises(ConfigError, match=r"several labels \(3\) and no rule"):
        make_reward(config_for(folder), device="cpu")
    # a config.json that says nothing means two labels, as in transformers
    silent = json.loads((folder / "config.json").read_text())
    del silent["id2label"]
    (folder / "config.json").write_text(json.dumps(silent))
    with pytest.raises(ConfigError, match=r"several labels \(2\) and no rule"):
        make_reward(config_for(folder), device="cpu")


@pytest.mark.usefixtures("no_weights_are_loaded")
def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    folder = save(tiny_causal_lm(), tiny_tokenizer(), tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"no reward family reads its architectures \(LlamaForCausalLM\)"):
        make_reward(config_for(folder), device="cpu")


def test_a_head_without_weights_is_an_error_not_random_numbers(tmp_path: Path) -> None:
    folder = save(tiny_causal_lm(), tiny_tokenizer(), tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}}))
    with pytest.raises(CheckpointError, match=r"no weights for score\.weight"):
        make_reward(config_for(folder, reward_family="sequence_classifier"), device="cpu")


def test_an_unknown_family_is_named(reward_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown reward_family 'sequence_clasifier'(.|\n)*'sequence_classifier'"):
        check_reward(config_for(reward_folder, reward_family="sequence_clasifier"))
    assert "likelihood" not in family_names()


def test_two_families_that_claim_a_checkpoint_are_both_named(
    reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("armorm", "qrm"):
        monkeypatch.setattr(sys.modules[type(load_family(name)).__module__].Family, "matches", lambda *_: True)
    with pytest.raises(ConfigError, match="claimed by several families: armorm, qrm"):
        check_reward(config_for(reward_folder))
    check_reward(config_for(reward_folder, reward_family="sequence_classifier"))  # naming one decides


@pytest.mark.usefixtures("no_weights_are_loaded")
@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer"])
def test_a_broken_folder_names_the_file(reward_folder: Path, tmp_path: Path, broken: str) -> None:
    folder = broken_copy(reward_folder, tmp_path / "broken")
    if broken == "tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif broken == "config.json":
        (folder / broken).write_text("{")
    else:
        (folder / broken).write_bytes((folder / broken).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=broken):
        make_reward(config_for(folder), device="cpu")


def test_a_device_that_is_not_there(reward_folder: Path) -> None:
    with pytest.raises(ConfigError, match="reward_device"):
        check_reward(config_for(reward_folder, reward_device="cuda:99"))
    with pytest.raises(ConfigError, match="reward_device must be a torch device, got 'gpu'"):
        check_reward(config_for(reward_folder, reward_device="gpu"))


def test_warnings_say_which_reward_model(reward_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = make_reward(config_for(reward_folder), device="cpu")
    with caplog.at_level(logging.WARNING):
        reward.score([{"role": "user", "content": "x" * 600}], rows("Hi"))
    assert [
        str(reward_folder) in record.message for record in caplog.records if "cut on the left" in record.message
    ] == [True]
