"""Where a row ends and what the benchmark sees of it: stop strings, EOS lists, reasoning parts, half characters."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from support import FULL
from support.engine_runs import generate, make_engine
from support.tiny_models import END, EOS, TURN, tiny_causal_lm, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specrej_eval import budget as budgets
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Plan, Prompt, RowView
from specrej_eval.engines.text import REPLACEMENT, Detokenizer
from specrej_eval.engines.transformers.engine import TransformersEngine

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
        prefill_all, step = runner.prefill_all, runner.step

        def scripted_prefill(prompts: Any) -> Any:
            prefixes = prefill_all(prompts)
            for prefix in prefixes:
                prefix.logits = self._logits([scripts[0][0]])
            return prefixes

        def scripted_step(groups: Any, tokens: Any) -> Any:
            step(groups, tokens)
            return self._logits([scripts[row][group.num_sampled] for group in groups for row in group.row_ids])

        runner.prefill_all, runner.step = scripted_prefill, scripted_step  # type: ignore[method-assign]

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits = torch.full((len(tokens), VOCAB), -50.0)
        logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 50.0
        return logits

    def rows(self, until: Sequence[str] = (), max_gen_toks: int = 64, prompt: str = "p") -> list[RowView]:
        n = len(self.scripts)
        config = RunConfig(strategy="best_of_n", n=n, max_gen_toks=max_gen_toks)
        encoded = Prompt(token_ids=tuple(ids_of(prompt)), conversation=())
        session = self.engine.open(encoded, config, budgets.resolve(config, encoded.num_tokens), until=tuple(until))
        self.engine.follow(session, Plan(keep=(), fresh=n, num_tokens=max_gen_toks))
        while session.num_live:
            self.engine.decode([session], max_gen_toks - session.tokens_since_look)
        return self.engine.rows(session)


def run(text_or_ids: str | list[int], until: Sequence[str] = (), **arguments: Any) -> RowView:
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
    # stops count only behind it, and behind the space that follows it
    assert (row.finish_reason, row.text) == ("stop", "the answer")
    assert row.token_ids == ids_of("so\n\nhm</think>\n\nthe answer\nm")
    row = run("so. hm</think> the answer. more", ["."], think_end_token="</think>")
    assert (row.finish_reason, row.text) == ("stop", "the answer")
    assert row.token_ids == ids_of("so. hm</think> the answer.")


@pytest.mark.parametrize("token", [TURN, str(TURN), "<|turn|>"])
def test_think_end_token_as_special_token(token: int | str) -> None:
    ids = [*ids_of("so. hm"), TURN, *ids_of(" the answer.")]
    row = run(ids, ["."], think_end_token=token)
    assert (row.finish_reason, row.text, row.token_ids) == ("stop", "the answer", ids)


@pytest.mark.parametrize("token", [TURN, "<|turn|>", "</think>"])
@pytest.mark.parametrize("until", ["\n\n", "\n", " ", "\r\n"])
@pytest.mark.parametrize("between", ["", "\n\n", "\n\n\n\n", "\r\n\r\n", " \n\n\t", "\n\n<|end|>\n\n", "<|end|>\n\n "])
def test_space_behind_the_thinking_stops_nothing(token: int | str, until: str, between: str) -> None:
    marker = "</think>" if token == "</think>" else "<|turn|>"
    ids = ids_of(f"hm.{until}so{marker}{between}4{until}")
    row = run(ids, [until], think_end_token=token)
    assert (row.finish_reason, row.text, row.token_ids) == ("stop", "4", ids)


def test_a_special_token_stops_the_answer_at_its_very_beginning() -> None:
    ids = ids_of("hm</think>\n<|end|>")
    row = run(ids, ["<|end|>"], think_end_token="</think>")
    assert (row.finish_reason, row.text, row.token_ids) == ("stop", "", ids)


@pytest.mark.parametrize("token", [TURN, "</think>"])
def test_reasoning_that_never_ends(token: int | str) -> None:
    # at the cap it is what lm-eval makes of it: stripped and cut, as if it were the answer
    row = run("\nso. hm. well. ", ["."], think_end_token=token, max_gen_toks=14)
    assert (row.finish_reason, row.text, len(row.token_ids)) == ("length", "so", 14)
    row = run([*ids_of("\nso. hm"), EOS], ["."], think_end_token=token)
    assert (row.finish_reason, row.text) == ("eos", "so")
    # until then a reward model sees all of it
    detokenizer = Detokenizer(TOKENIZER, think_end_token=token)
    assert detokenizer.visible(ids_of("\nso. hm. well. "), None, (".",)) == "so. hm. well. "


def test_thinking_that_begins_again_drops_what_came_before() -> None:
    row = run("a</think>\nb</think>\n\nc.", ["."], think_end_token="</think>")
    assert (row.finish_reason, row.text) == ("stop", "c")
    # a row ends at the first stop of its answer, whatever it would have gone on to think
    row = run("a</think>b. so</think>c.", ["."], think_end_token="</think>")
    assert (row.finish_reason, row.text, row.token_ids) == ("stop", "b", ids_of("a</think>b."))


@pytest.mark.parametrize("token", [EOS, TURN, "</think>"])
def test_a_marker_at_the_very_end_leaves_no_answer(token: int | str) -> None:
    marker = {EOS: "<eos>", TURN: "<|turn|>"}.get(token, token)  # type: ignore[call-overload]
    row = run(ids_of(f"so. hm{marker}"), ["."], think_end_token=token, max_gen_toks=len(ids_of(f"so. hm{marker}")))
    assert row.text == ""


# ---- reasoning, against lm-eval's own post-processing --------------------------------------------------------------

ANSWERS = (
    "The answer is 4",
    "x",
    "STOP",
    "Q:",
    "\n\n",
    "\n",
    "\r\n",
    ". ",
    "é",
    "日本",
    " ",
    "\u3000",
    "ab",
    "</s",
    "<",
)
MARKERS: tuple[tuple[int | str, str], ...] = (
    ("</think>", "</think>"),
    ("\n\nAnswer:", "\n\nAnswer:"),
    (TURN, "<|turn|>"),
    ("<|turn|>", "<|turn|>"),
)


def apart(stops: Sequence[str]) -> bool:
    """Whether no two can share a character of a text: else lm-eval's cut depends on their order."""
    return not any(
        one in other or any(one.endswith(other[:k]) for k in range(1, len(other)))
        for one in stops
        for other in stops
        if one != other
    )


def decoded(detokenizer: Detokenizer, ids: Sequence[int], until: Sequence[str], ends: FinishReason) -> tuple[str, int]:
    """What is seen of a row, and after how many tokens it ended; as the engine asks for it."""
    may = detokenizer.may_complete(until, VOCAB)
    for end in range(1, len(ids) + 1):
        if may[ids[end - 1]] and detokenizer.stop_position(ids[:end], until) is not None:
            return detokenizer.visible(ids[:end], "stop", until), end
    if ends == "eos":
        return detokenizer.visible([*ids, EOS], "eos", until), len(ids)
    return detokenizer.visible(ids, "length", until), len(ids)


@pytest.mark.parametrize(("token", "marker"), MARKERS)
def test_texts_with_thinking_are_what_lm_eval_makes_of_them(
    token: int | str, marker: str, counted: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hflm = HFLM(pretrained=model(), tokenizer=TOKENIZER, backend="causal", batch_size=64)
    hflm.think_end_token = TURN if marker == "<|turn|>" else token
    detokenizer = Detokenizer(TOKENIZER, think_end_token=token)
    rng = random.Random(marker)
    texts_of_one_until = 16
    for _ in range(300 if FULL else 12):
        until = [rng.choice((*PIECES, *ANSWERS, " the", "\n\nQ", "b\n")) for _ in range(rng.randint(0, 3))]
        if not apart(until):
            until = until[:1]
        rows, ends, cases = [], [], []
        for _ in range(texts_of_one_until):
            parts = rng.choices((*ANSWERS, *until), k=rng.randint(0, 9))
            markers = rng.choice((0, 1, 1, 1, 1, 2, 3))
            for _ in range(markers):
                # a stop string that is part of a special token's text stops at that token; lm-eval strips it first
                special = () if any(stop in "<|end|>" for stop in until) else ("<|end|>", "<|end|>\n\n")
                behind = rng.choice(("", "\n\n", "\r\n", " ", *special, *until))
                parts.insert(rng.randint(0, len(parts)), marker + behind)
            ids = ids_of("".join(parts))
            markers = TOKENIZER.decode(ids).count(marker)
            ends.append(rng.choice(("eos", "length")))
            if ids:
                cases.append((ids, markers, decoded(detokenizer, ids, until, ends[-1])))
                rows += [ids, ids[: cases[-1][2][1]]]
        longest = max(map(len, rows)) + 1

        def generated(context: torch.Tensor, rows: Any = rows, longest: int = longest, **_: Any) -> torch.Tensor:
            ids = [rows[int(TOKENIZER.decode(mine, skip_special_tokens=True))] for mine in context]
            padded = [[*mine, *[EOS] * (longest - len(mine))] for mine in ids]
            return torch.cat([context, torch.tensor(padded)], dim=1)

        monkeypatch.setattr(hflm, "_model_generate", generated)
        arguments = {"until": until, "max_gen_toks": 64}
        requests = [
            Instance("generate_until", {}, (str(place), arguments), 0, metadata=("t", place, 1))
            for place in range(len(rows))
        ]
        wanted = hflm.generate_until(requests, disable_tqdm=True)
        for place, (ids, markers, (text, end)) in enumerate(cases):
            assert text == wanted[2 * place + 1], (TOKENIZER.decode(ids[:end]), until)
            if markers <= 1:  # else what lm-eval would have generated on may hold one more
                assert text == wanted[2 * place], (TOKENIZER.decode(ids), until)
        counted("texts with thinking compared with lm-eval", len(cases))


@settings(max_examples=2000 if FULL else 300)
@given(
    parts=st.lists(st.sampled_from([*PIECES, "</think>", "\n\n", " ", "a", "b", "c", "\r\n", "é"]), max_size=14),
    until=st.lists(st.sampled_from([*PIECES, "b", "bc", "k>", "\n", " ", "ab\n"]), min_size=1, max_size=3),
)
def test_stops_that_overlap_cut_as_lm_eval_does_in_some_order(parts: list[str], until: list[str]) -> None:
    ids = piece_tokenizer().encode("".join(parts))
    detokenizer = Detokenizer(piece_tokenizer(), think_end_token="</think>")
    text, end = decoded(detokenizer, ids, until, "length")
    raw = piece_tokenizer().decode(ids[:end])
    assert text in {postprocess_generated_text(raw, list(order), "</think>") for order in permutations(until)}


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


@pytest.mark.parametrize("until", [None, ["e", "7"]])
def test_a_row_is_detokenised_once_at_each_look_and_not_again_when_it_is_rejected(
    until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible, calls = Detokenizer.visible, []

    def counted(self: Detokenizer, *given: Any) -> str:
        calls.append(given)
        return visible(self, *given)

    monkeypatch.setattr(Detokenizer, "visible", counted)
    results = generate(make_engine(tiny_causal_lm()), until=until, alpha=0.5, logprobs=True)
    assert len(calls) == sum(look.rows for result in results for look in result.rounds)
    for result in results:
        for row in result.trajectories:
            assert row.logprobs is not None and len(row.logprobs) == row.num_tokens
