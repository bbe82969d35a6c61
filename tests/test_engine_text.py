"""Where a row ends and what the benchmark sees of it: stop strings, EOS lists, reasoning parts, half characters."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import END, EOS, TURN, tiny_causal_lm, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specrej_eval import budget as budgets
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Plan, Prompt
from specrej_eval.engine.base import FinishedRow
from specrej_eval.engine.text import REPLACEMENT, Detokenizer
from specrej_eval.engine.transformers_engine import TransformersEngine

TOKENIZER = tiny_tokenizer()
VOCAB = 300  # a little more than both tokenizers have
PIECES = ("ab", "abc", "</s", "</s>", "\n\n", "Q:", "\nQ", " the", "STOP", "é", "日本", "</think>", "zz.")


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


@cache
def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few longer tokens behind them, so that stop strings begin and end inside tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    longer = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in PIECES]
    vocab = {token: place for place, token in enumerate([*alphabet, *dict.fromkeys(longer)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def piece(text: str) -> int:
    """The one token for a text of PIECES, or for a single byte."""
    tokenizer = piece_tokenizer()
    [(part, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    found: int = tokenizer.convert_tokens_to_ids(part)
    return found


@cache
def model() -> Any:
    return tiny_causal_lm("llama", vocab_size=VOCAB)


class Scripted:
    """A real engine whose logits are replaced: row r's tokens are those of script r. All scripts begin alike."""

    def __init__(self, scripts: Sequence[Sequence[int]], *, tokenizer: Any = None, **engine_arguments: Any) -> None:
        assert len({script[0] for script in scripts}) == 1  # the first token is drawn from the prompt's shared logits
        self.scripts = scripts
        self.engine = TransformersEngine(model(), tokenizer or TOKENIZER, path="shared_prefix", **engine_arguments)
        runner = self.engine.runner
        prefill, step = runner.prefill, runner.step

        def scripted_prefill(*args: Any) -> Any:
            prefix = prefill(*args)
            prefix.logits = self._logits([scripts[0][0]])
            return prefix

        def scripted_step(groups: Any, tokens: Any) -> Any:
            step(groups, tokens)
            return self._logits([scripts[row][group.num_sampled] for group in groups for row in group.row_ids])

        runner.prefill, runner.step = scripted_prefill, scripted_step  # type: ignore[method-assign]

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.full((len(tokens), VOCAB), -50.0)
        logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 50.0
        return logits

    def rows(self, until: Sequence[str] = (), max_gen_toks: int = 64, prompt: str = "p") -> list[FinishedRow]:
        n = len(self.scripts)
        config = RunConfig(strategy="best_of_n", n=n, max_gen_toks=max_gen_toks)
        encoded = Prompt(token_ids=tuple(ids_of(prompt)), conversation=())
        session = self.engine.open(encoded, config, budgets.resolve(config, encoded.num_tokens), until=tuple(until))
        self.engine.follow(session, Plan(keep=(), fresh=n, num_tokens=max_gen_toks))
        while session.num_live:
            self.engine.decode([session], max_gen_toks - session.num_tokens)
        return self.engine.rows(session)


def run(text_or_ids: str | list[int], until: Sequence[str] = (), **arguments: Any) -> FinishedRow:
    """One row; the script goes on with question marks, so a missed stop shows."""
    script = ids_of(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    engine_arguments = {key: arguments.pop(key) for key in ("think_end_token", "tokenizer") if key in arguments}
    filler = engine_arguments.get("tokenizer", TOKENIZER).convert_tokens_to_ids("?")
    [row] = Scripted([script + [filler] * 64], **engine_arguments).rows(until, **arguments)
    return row


# ---- stop strings ------------------------------------------------------------------------------------------------


def test_cut_per_row_and_nothing_after_it() -> None:
    texts = ["the one\n\nmore", "the\n\n", "there is no stop in this one, it runs on", "thanks.\n\nQ"]
    rows = Scripted([ids_of(text + "?" * 64) for text in texts]).rows(["\n\n"], max_gen_toks=30)
    assert [row.text for row in rows] == ["the one", "the", texts[2][:30], "thanks."]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length", "stop"]
    # token_ids end with the token that completes the stop string
    assert [row.token_ids for row in rows] == [
        ids_of("the one\n\n"),
        ids_of("the\n\n"),
        ids_of(texts[2])[:30],
        ids_of("thanks.\n\n"),
    ]


def test_cut_is_exact_inside_a_token() -> None:
    ids = [piece("a"), piece("abc"), piece(" the"), piece("zz.")]
    # " the" ends and "zz." begins around the stop "ez": cut inside both tokens
    row = run(ids, ["ez"], tokenizer=piece_tokenizer())
    assert (row.text, row.finish_reason, row.token_ids) == ("aabc th", "stop", ids)
    row = run(ids, ["b"], tokenizer=piece_tokenizer())
    assert (row.text, row.token_ids) == ("aa", ids[:2])


def test_earliest_of_several_wins() -> None:
    # one token completes both; the one that begins first cuts
    ids = [piece("a"), piece("\n\n"), piece("Q:")]
    assert run(ids, ["Q:", "\n\nQ"], tokenizer=piece_tokenizer()).text == "a"
    assert run("x one. two; three", [";", "."]).text == "x one"
    assert run("x one. two; three", [".", ";"]).text == "x one"


def test_stop_in_the_prompt_does_not_count() -> None:
    assert run("answer\nQ: next", ["Q:"], prompt="Q: what?\nA:Q").text == "answer\n"
    # a stop that begins in the prompt and ends in the answer is none either
    assert run(": answer.", ["Q:", "."], prompt="Q").text == ": answer"


def test_stop_at_the_very_first_token() -> None:
    row = run("\nmore", ["\n"])
    assert (row.text, row.token_ids, row.finish_reason) == ("", ids_of("\n"), "stop")


def test_special_token_as_stop_in_a_mixed_batch() -> None:
    scripts = [
        [*ids_of("yes"), END, *ids_of("?" * 40)],
        [*ids_of("yes it is"), TURN, *ids_of("?" * 40)],
        [*ids_of("yes"), EOS, *ids_of("?" * 40)],
        [*ids_of("yes"), TURN, *ids_of(" no<|end|>" + "?" * 40)],
    ]
    rows = Scripted(scripts).rows(["<|end|>", "it"], max_gen_toks=30)
    assert [row.finish_reason for row in rows] == ["stop", "stop", "eos", "stop"]
    assert [row.text for row in rows] == ["yes", "yes ", "yes", "yes no"]  # other special tokens are stripped
    assert rows[0].token_ids == scripts[0][:4]
    assert rows[2].token_ids == scripts[2][:4]


def test_stop_completed_by_the_last_token_allowed() -> None:
    row = run("abc\n", ["\n"], max_gen_toks=4)
    assert (row.finish_reason, row.text) == ("stop", "abc")
    assert run("abcd\n", ["\n"], max_gen_toks=4).finish_reason == "length"


# ---- EOS ---------------------------------------------------------------------------------------------------------


def test_eos_lists_of_generation_config_model_and_tokenizer() -> None:
    scripted = Scripted([[*ids_of("ab"), last, *ids_of("?" * 9)] for last in (EOS, END, TURN, 20)])
    changed = tiny_causal_lm("llama", eos_token_id=TURN)
    changed.generation_config.eos_token_id = [END, 20]
    scripted.engine.eos_ids = TransformersEngine(changed, TOKENIZER, path="shared_prefix").eos_ids
    rows = scripted.rows(max_gen_toks=8)
    assert [row.finish_reason for row in rows] == ["eos"] * 4
    assert [row.text for row in rows] == ["ab"] * 4
    assert [len(row.token_ids) for row in rows] == [3] * 4


def test_the_text_of_an_eos_token_ends_nothing() -> None:
    row = run("a <eos> </s> b", ["\n"], max_gen_toks=14)
    # the tokenizer would read "<eos>" as the special token: spelt out byte by byte it is plain text
    spelt = [token for char in "a <eos> </s> b" for token in ids_of(char)]
    row = run(spelt, ["\n"], max_gen_toks=14)
    assert (row.text, row.finish_reason) == ("a <eos> </s> b", "length")


def test_eos_wins_over_stop_and_stop_over_length() -> None:
    row = run([*ids_of("ab"), EOS], ["<eos>"], max_gen_toks=3)
    assert (row.finish_reason, row.text) == ("eos", "ab")
    assert run("abc", ["c"], max_gen_toks=3).finish_reason == "stop"


# ---- reasoning ---------------------------------------------------------------------------------------------------


def test_think_end_token_as_text() -> None:
    row = run("so\n\nhm</think>\n\nthe answer\nmore", ["\n\n", "\nm"], think_end_token="</think>")
    # stops count only behind it: the first blank line is reasoning, the second one is the answer's beginning
    assert (row.finish_reason, row.text) == ("stop", "")
    row = run("so. hm</think> the answer. more", ["."], think_end_token="</think>")
    assert (row.finish_reason, row.text) == ("stop", "the answer")
    assert row.token_ids == ids_of("so. hm</think> the answer.")


@pytest.mark.parametrize("token", [TURN, "<|turn|>"])
def test_think_end_token_as_special_token(token: int | str) -> None:
    ids = [*ids_of("so. hm"), TURN, *ids_of(" the answer.")]
    row = run(ids, ["."], think_end_token=token)
    assert (row.finish_reason, row.text, row.token_ids) == ("stop", "the answer", ids)


@pytest.mark.parametrize("token", [TURN, "</think>"])
def test_reasoning_that_never_ends(token: int | str) -> None:
    row = run("so. hm. well. ", ["."], think_end_token=token, max_gen_toks=14)
    assert (row.finish_reason, row.text) == ("length", "so. hm. well. ")


# ---- characters of several bytes ---------------------------------------------------------------------------------


def test_half_a_character_is_not_shown() -> None:
    ids = ids_of("naïve 日本")
    detokenizer = Detokenizer(TOKENIZER)
    shown = [detokenizer.visible(ids[:end], None, ()) for end in range(len(ids) + 1)]
    assert not any(REPLACEMENT in text for text in shown)
    assert shown[-1] == "naïve 日本"
    assert all(whole.startswith(part) for part, whole in pairwise(shown))


def test_stop_of_several_bytes() -> None:
    row = run("in 日本 now", ["本"])
    assert (row.text, row.finish_reason) == ("in 日", "stop")
    assert row.token_ids == ids_of("in 日本")


# ---- against checking the whole text at every step ---------------------------------------------------------------


def first_stop(tokenizer: Any, ids: Sequence[int], until: Sequence[str]) -> tuple[int, str] | None:
    """Tokens up to the first that completes a stop string, and the text before it; by brute force."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        places = [text.find(stop) for stop in until if stop in text]
        if places:
            return end, text[: min(places)]
    return None


NUM_PIECES = len(piece_tokenizer())
_TOKENS = st.one_of(
    st.integers(0, NUM_PIECES - 1),
    st.sampled_from([piece(text) for text in PIECES]),
    st.sampled_from([*"abcQ:\n.z /s<>"]).map(piece),
)
_STOPS = st.one_of(
    st.sampled_from([*PIECES, "abab", "c</s", "bQ", "本", "本a", "é\n", ">\n", "b\n", ": ", "STOPS", "the"]),
    st.text(alphabet=string.ascii_lowercase[:3] + "Q:\n<>/s é本", min_size=1, max_size=3),
)


@settings(max_examples=400)
@given(ids=st.lists(_TOKENS, min_size=1, max_size=24), until=st.lists(_STOPS, min_size=1, max_size=3))
def test_no_stop_is_missed(ids: list[int], until: list[str]) -> None:
    tokenizer = piece_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    may = detokenizer.may_complete(until, NUM_PIECES)
    want = first_stop(tokenizer, ids, until)
    found = None
    for end in range(1, len(ids) + 1):
        if may[ids[end - 1]] and detokenizer.stop_position(ids[:end], until) is not None:
            found = end, detokenizer.visible(ids[:end], "stop", until)
            break
    assert found == want


def test_few_tokens_are_looked_at() -> None:
    # else every step would decode every row's text
    may = Detokenizer(piece_tokenizer()).may_complete(["STOP"], NUM_PIECES)
    plain = [piece(char) for char in string.printable if char not in "P"]
    assert not any(may[token] for token in plain)
    assert may[piece("P")] and may[piece("STOP")]


def test_ids_beyond_the_tokenizer_may_complete_anything() -> None:
    may = Detokenizer(piece_tokenizer()).may_complete(["x"], NUM_PIECES + 5)
    assert len(may) == NUM_PIECES + 5
    assert all(may[NUM_PIECES:])


REASONS: tuple[FinishReason | None, ...] = ("eos", "stop", "length", None)


@given(ids=st.lists(_TOKENS, min_size=1, max_size=12), reason=st.sampled_from(REASONS))
def test_visible_never_fails(ids: list[int], reason: FinishReason | None) -> None:
    text = Detokenizer(piece_tokenizer()).visible(ids, reason, ("ab",))
    assert piece_tokenizer().decode(ids).startswith(text)
