"""A chat template may fail or never end: that is one error, and whatever renders next is not hit by it."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import forked
from support.tiny_models import tiny_tokenizer

from specrej_eval import chat_templates
from specrej_eval.core import RowView
from specrej_eval.engines.prompts import encode_prompt
from specrej_eval.errors import PromptError, RewardError, SpecRejError
from specrej_eval.rewards.checkpoints.renderer import Renderer
from specrej_eval.special_tokens import ENCODE_AS_TEXT, Tokeniser

MESSAGES = [{"role": "user", "content": "Hello"}]
FAILING = {
    "it refuses": "{{ raise_exception('no system role') }}",
    "it divides by zero": "{{ 1 / 0 }}",
    "it asks for what is not there": "{{ messages[0].nothing.at.all }}",
    "it is no template": "{% for message in messages %}",
    "it wants another type": "{{ messages[0]['content'] + 1 }}",
    "it asks for too much": "{% for i in range(10 ** 9) %}x{% endfor %}",
}
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "with output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "a macro": "{% macro m(n) %}{% for a in range(99999) %}{% for b in range(9999) %}{{ n * a }}{% endfor %}"
    "{% endfor %}{% endmacro %}{{ m(0) }}",
}


ONE_CALL = {
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x ** 9 %}{% endfor %}",
    "squares of squares": "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x*ns.x %}{% endfor %}",
    "a text many times": "{{ 'x' * 10 ** 11 }}",
    "many times a text": "{{ 10 ** 11 * 'x' }}",
    "a list many times": "{{ ([1] * 10 ** 11) | length }}",
    "texts of texts": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "padding": "{{ 'x'.ljust(10 ** 11) }}",
    "padding with zeros": "{{ '1'.zfill(10 ** 11) }}",
    "the middle": "{{ 'x' | center(10 ** 11) }}",
    "an indent": "{{ 'x\ny' | indent(10 ** 11) }}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "a width by number": "{{ '%*d' % (10 ** 11, 1) }}",
    "a width by filter": "{{ '%99999999999d' | format(1) }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "a format by number": "{{ '{:>{w}}'.format(1, w=10 ** 11) }}",
    "a format by a mapping": "{{ '{:>{w}}{x}'.format_map({'': 1, 'w': 10 ** 11, 'x': 1}) }}",
    "replacing": "{% set x = 'x' * 10 ** 6 %}{{ x.replace('x', x) }}",
    "replacing by filter": "{% set x = 'x' * 10 ** 6 %}{{ x | replace('x', x) }}",
    "joining": "{% set x = 'x' * 10 ** 6 %}{{ x.join([x] * 10 ** 6) }}",
    "joining by filter": "{% set x = 'x' * 10 ** 6 %}{{ ([1] * 10 ** 6) | join(x) }}",
}
"""Each would keep C code busy for minutes, or fill the memory, with no Python in between."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)


def encoded(template: str) -> Any:
    return encode_prompt(Tokeniser(tiny_tokenizer(chat_template=template), ENCODE_AS_TEXT), MESSAGES)


def scored(template: str) -> Any:
    renderer = Renderer(tiny_tokenizer(chat_template=template), name="judge", vocab_size=10_000)
    row = RowView(row=3, text="Hi", token_ids=[1], finish_reason="eos")
    return renderer.inputs(MESSAGES, [row])


@pytest.mark.parametrize("kind", FAILING)
def test_a_template_that_fails_is_one_error(kind: str) -> None:
    with pytest.raises(PromptError, match=r"the chat template of the language model failed: \w+: ") as refused:
        encoded(FAILING[kind])
    assert refused.value.hint and len(str(refused.value)) < 600
    with pytest.raises(RewardError, match=r"the chat template of reward_model='judge' failed: \w+: (.|\n)*row 3"):
        scored(FAILING[kind])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ONE_CALL)
def test_a_template_that_asks_one_call_for_too_much_is_refused_before_it_begins(kind: str) -> None:
    with pytest.raises(PromptError, match=r"the chat template of the language model failed: .* would give more than"):
        encoded(ONE_CALL[kind])
    with pytest.raises(RewardError, match=r"the chat template of reward_model='judge' failed: TooMuchError"):
        scored(ONE_CALL[kind])


def test_what_templates_do_with_texts_and_numbers_gives_what_it_gave() -> None:
    template = (
        "{% set ns = namespace(x=3) %}{% set ns.x = ns.x * 2 ** 5 + 1 %}{{ ns.x }}{{ 'a' * 3 }}{{ [1] * 2 }}"
        "{{ 'b'.ljust(4) }}{{ 'c' | center(5) }}{{ '%03d' % 7 }}{{ '%s-%s' | format('x', 1) }}{{ '{:>4}'.format(1) }}"
        "{{ ['d', 'e'] | join(', ') }}{{ 'f g'.replace('g', 'h') | replace('f', 'i') }}{{ 'j\nk' | indent(2) }}"
        "{{ messages[0].content + '!' }}{{ ', '.join(['l', 'm']) }}{{ [1, 2] + [3] }}{{ 7 % 4 }}{{ 'n' ~ 2 }}"
    )
    text = tiny_tokenizer(chat_template=template).apply_chat_template(MESSAGES, tokenize=False)
    tokenizer = tiny_tokenizer(chat_template=template)
    found = chat_templates.in_time(lambda: tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    want = "97aaa[1, 1]b     c  007x-1   1d, ei hj\n  kHello!l, m[1, 2, 3]3n2"
    assert found == text == want


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_never_ends_is_one_error(kind: str) -> None:
    with pytest.raises(PromptError, match=r"the chat template of the language model: .* not ended after 0.2 seconds"):
        encoded(ENDLESS[kind])
    with pytest.raises(RewardError, match=r"the chat template of reward_model='judge' failed: EndlessTemplateError"):
        scored(ENDLESS[kind])


def test_it_is_told_in_whichever_thread_and_process_and_in_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)  # the good ones share a core with the endless one
    ended: list[str] = []

    def in_thread(template: str) -> None:
        try:
            encoded(template)
            ended.append("well")
        except SpecRejError:
            ended.append("late")

    fine = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    threads = [threading.Thread(target=in_thread, args=(t,)) for t in (ENDLESS["loops in loops"], fine, fine)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(ended) == ["late", "well", "well"]

    def in_process() -> int:
        try:
            encoded(ENDLESS["loops in loops"])
        except PromptError:
            return 0
        return 1

    assert forked.ended(forked.start(in_process)) == 0


@pytest.mark.usefixtures("short")
def test_what_is_rendered_in_time_is_not_hit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.04)
    ended: list[str] = []
    for time_taken in range(100):  # ends around the moment the watch looks
        began = time.monotonic()
        try:
            chat_templates.in_time(functools.partial(busy, began + 0.035 + 0.015 * (time_taken % 8) / 8))
            ended.append("well")
        except chat_templates.EndlessTemplateError:
            ended.append("late")
        busy(time.monotonic() + 0.02)  # nothing arrives here
    assert set(ended) == {"well", "late"}


def busy(until: float) -> None:
    while time.monotonic() < until:
        pass


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("place", ["begin", "end"])
def test_the_exception_may_come_while_the_watch_is_told_of_begin_and_end(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(chat_templates._Watch, place)

    def slow(watch: Any, thread: int) -> None:
        if place == "begin":
            original(watch, thread)
        if thread in watch.deadlines:  # the first call of two
            busy(time.monotonic() + 60)  # the exception ends it
        if place == "end":
            original(watch, thread)

    monkeypatch.setattr(chat_templates._Watch, place, slow)
    with pytest.raises(chat_templates.EndlessTemplateError):
        chat_templates.in_time(lambda: None)
    busy(time.monotonic() + 0.1)


def test_lm_evals_way_of_rendering_is_guarded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    model = SpecRejLM(n=2, max_gen_toks=8, device="cpu")
    monkeypatch.setattr(model.tokenizer, "chat_template", FAILING["it divides by zero"])
    with pytest.raises(PromptError, match="the chat template of the language model failed: ZeroDivisionError"):
        model.apply_chat_template(MESSAGES)
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    monkeypatch.setattr(model.tokenizer, "chat_template", ENDLESS["loops in loops"])
    with pytest.raises(PromptError, match="has not ended"):
        model.apply_chat_template(MESSAGES)
