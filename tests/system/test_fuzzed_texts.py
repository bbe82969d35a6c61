"""Prompts, files of prompts and servers' answers as anybody may write them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import strategies as st
from rewards.test_servers import FUZZED, HELLO, hashed, rows
from support import reward_servers as servers
from support.fuzzing import Surface, altered, command, damaged, examples, json_of, texts, values
from support.rewards import make_reward
from support.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

from specrej_eval import connections, http, load
from specrej_eval.answering import encode, requests_for
from specrej_eval.config import PromptArguments, RunConfig
from specrej_eval.core import Question
from specrej_eval.engines.prompts import encode_prompt
from specrej_eval.errors import PromptError, SpecRejError
from specrej_eval.generator import Generator
from specrej_eval.harness.alpaca_eval.judge import specrej_reward_judge
from specrej_eval.harness.alpaca_eval.prompts import RenderedPrompt
from specrej_eval.records.prompt_files import read_prompts
from specrej_eval.special_tokens import RULES, SpecialTokenError, Tokeniser

Counted = Callable[[str, int], None]

MARKS = (
    *SPECIAL_TOKENS,
    "<|im_start|>",
    "<think>",
    "[INST]",
    "<0x0A>",
    "\u0120",
    "▁",
    "\ufffd",
    "\u200b",
    "\U0001f338",
)
content = st.lists(texts | st.sampled_from(MARKS) | st.text(st.characters(), max_size=40), max_size=6).map("".join)
roles = st.sampled_from(("system", "user", "assistant", "tool", "", "User", "<|end|>"))
turn = st.fixed_dictionaries({"role": roles, "content": content})
conversations = st.lists(turn, max_size=4) | altered([{"role": "user", "content": "a"}] * 2) | values


# prompts


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load(n=2, max_gen_toks=2, first_look=1)


def test_prompts_are_encoded_or_refused(tmp_path: Path, counted: Counted) -> None:
    surface = Surface("prompts, encoded", counted, tmp_path)
    known = [
        Tokeniser(tiny_tokenizer(chat_template=template), rule) for template in (CHAT_TEMPLATE, None) for rule in RULES
    ]

    def work(given: tuple[Tokeniser, Any]) -> None:
        tokeniser, asked = given
        try:
            found = encode_prompt(tokeniser, asked)
        except SpecialTokenError as error:  # what knows whose text it is says so
            raise PromptError(str(error)) from error
        assert found.num_tokens and len(found.prompt_hash) == 64

    surface.fuzz(st.tuples(st.sampled_from(known), content | conversations), work, examples(8000))
    surface.done()


def test_prompts_are_answered_or_refused(generator: Generator, tmp_path: Path, counted: Counted) -> None:
    """By the demo pair: what was asked is answered, and nothing that was refused was decoded."""
    surface = Surface("prompts, answered", counted, tmp_path)

    def work(asked: Any) -> None:
        before = generator.totals.decode_tokens
        try:
            found = generator.generate(asked)
        except SpecRejError:
            assert generator.totals.decode_tokens == before
            raise
        assert all(result.text is not None and math.isfinite(result.best.reward or 0.0) for result in found)

    surface.fuzz(content, work, examples(300, 30))
    surface.fuzz(conversations | st.lists(content, max_size=3), work, examples(300, 30))
    surface.done()


def test_questions_become_requests_or_are_refused(generator: Generator, tmp_path: Path, counted: Counted) -> None:
    surface = Surface("questions", counted, tmp_path)
    asked = PromptArguments()

    def work(given: list[tuple[str, str | None]]) -> None:
        questions = [Question(instruction=text, text=around, index=place) for place, (text, around) in enumerate(given)]
        for question in questions:
            encode(generator.engine, question)
        found = requests_for(generator.engine, questions, generator.config, asked, task="fuzz")
        assert len({request.key for request in found}) == len(questions)

    pair = st.tuples(content, st.none() | content)
    surface.fuzz(st.lists(pair, min_size=1, max_size=3), work, examples(3000, 100))
    surface.done()


# files of prompts

ROWS: list[Any] = [
    {"instruction": "Say hello.", "input": "", "dataset": "koala"},
    {"instruction": "Say bye.", "input": "to Kyōto", "dataset": "koala"},
]
FILES = {
    ".json": json.dumps(ROWS).encode(),
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    ".csv": 'instruction,input,dataset\nSay hello.,,koala\n"Say ""bye"".\nNow","to Kyōto",koala\n'.encode(),
    ".tsv": b"sep=\t\nprompt\tdataset\nSay hello.\tkoala\nSay bye.\tkoala\n",
}
PAIRS = [{"prompt": "a", "response": "b"}, {"messages": [{"role": "user", "content": "c"}], "completion": "d"}]


def test_files_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    surface = Surface("files of prompts", counted, tmp_path)
    monkeypatch.chdir(tmp_path)

    def work(given: tuple[str, bytes]) -> None:
        suffix, raw = given
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(raw)
        found = read_prompts(file)
        assert found and all(question.instruction.strip() for question in found)
        json.dumps([question.fields for question in found])

    suffixes = st.sampled_from(sorted(FILES))
    surface.fuzz(suffixes.flatmap(lambda s: st.tuples(st.just(s), damaged(FILES[s]))), work, examples(4000))
    surface.fuzz(altered(ROWS).map(lambda d: (".json", json_of(d))), work, examples(2000, 100))
    surface.done()


def test_files_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    """`score`, by a function that scores any text."""
    surface = Surface("files of pairs", counted, tmp_path)
    monkeypatch.chdir(tmp_path)
    reward = f"{__name__}:length"
    raw = json.dumps(PAIRS).encode()

    def work(changed: bytes) -> None:
        (tmp_path / "pairs.json").write_bytes(changed)
        code, _ = command(["score", "--input", "pairs.json", "--reward_model", reward, "--force"])
        surface.refused += bool(code)
        assert (tmp_path / "pairs.json").read_bytes() == changed

    surface.fuzz(altered(PAIRS).map(json_of) | damaged(raw), work, examples(2500, 100))
    surface.done()


def length(conversation: Any, responses: Any) -> list[float]:
    return [float(len(text)) for text in responses]


# servers' answers


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What each path answers, in the place of HTTP: status, headers, body."""
    given: dict[str, Any] = {}

    def send(self: Any, request: Any, **options: Any) -> Any:
        body = json.loads(request.body) if request.body else None
        status, headers, raw = given["answer"](request.method, request.path_url, body)
        reply = requests.Response()
        reply.status_code, reply.reason, reply.url = status, "of some kind", request.url
        reply.headers.update(headers)
        reply.raw = io.BytesIO(raw)
        return reply

    monkeypatch.setattr(connections.Adapter, "send", send)
    monkeypatch.setattr(http, "sleep", lambda seconds: None)
    # a thread that watches the clock for each request costs more than all the rest
    monkeypatch.setattr(connections.Deadline, "__enter__", lambda self: self)
    for name in ("SPECREJ_REWARD_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield given


headers = st.dictionaries(
    st.sampled_from(("Content-Type", "Retry-After", "Location", "X-A")),
    st.sampled_from(
        ("text/html", "-1", "1e99", "Thu, 99 Foo 20260 25:61:61 GMT", "http://[", "\x1b[2J", "9" * 400, "")
    ),
    max_size=2,
)
statuses = st.sampled_from((200, 200, 200, 200, 201, 204, 301, 400, 401, 413, 429, 500, 503))


@pytest.mark.parametrize("name", FUZZED)
def test_answers_of_servers(
    name: str, wire: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    surface = Surface("answers of servers", counted, tmp_path)
    made, where, paths = FUZZED[name]
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr("specrej_eval.rewards.kinds.server.load_tokenizer", lambda config, token: tokenizer)
    with made() as server:
        routes = dict(server.routes)
        url = where + server.url if where.endswith("@") else server.url + where

    def good(method: str, path: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        route = routes.get((method, path))
        try:
            return (404, {}, b"{}") if route is None else (200, {}, json.dumps(route(body)).encode())
        except servers.Refused as refused:
            return refused.status, {}, json.dumps(refused.body).encode()

    seen: dict[str, tuple[str, Any, bytes]] = {}

    def noted(method: str, path: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        found = good(method, path, body)
        seen[path] = (method, body, found[2])
        return found

    given = {} if name.startswith(("tei", "judge")) else {"reward_tokenizer": "org/tokenizer"}
    config, _ = RunConfig.from_args({"reward_model": url, "reward_retries": 1, "on_nan": "drop", **given})
    wire["answer"] = noted
    reward = make_reward(config, device="cpu")
    plain = reward.score(HELLO, rows("a", "b"))

    def work(asked: tuple[str, int, dict[str, str], bytes]) -> None:
        changed, status, headers, raw = asked
        wire["answer"] = lambda method, path, body: (
            (status, headers, raw) if path == changed else good(method, path, body)
        )
        try:
            found = reward if routes.get(("POST", changed)) else make_reward(config, device="cpu")
            scores = found.score(HELLO, rows("a", "b"))
            assert len(scores) == 2 and all(isinstance(score, float) for score in scores)
        finally:
            wire["answer"] = good
        assert reward.score(HELLO, rows("a", "b")) == plain, "what came before stays in it"

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, int, dict[str, str], bytes]:
        path = draw(st.sampled_from(paths))
        raw = seen[path][2] if path in seen else good("GET", path, None)[2]
        changed = json_of(draw(altered(json.loads(raw)))) if draw(st.integers(0, 2)) else draw(damaged(raw))
        return path, draw(statuses), draw(headers), changed

    surface.fuzz(inputs(), work, examples(1700, 60))
    surface.done()


def test_pairs_given_to_the_judge_of_alpaca_eval(wire: dict[str, Any], tmp_path: Path, counted: Counted) -> None:
    """`specrej_reward_judge` over a server: fields of rows and answers of the server, both of them anything."""
    surface = Surface("pairs and answers, alpaca_eval's judge", counted, tmp_path)
    with servers.tei(hashed) as server:
        routes, url = dict(server.routes), server.url
    row = {"instruction": "a", "output_1": "b", "output_2": "c"}

    def work(given: tuple[Any, bytes | None]) -> None:
        fields, raw = given

        def answer(method: str, path: str, body: Any) -> tuple[int, dict[str, str], bytes]:
            route = routes.get((method, path))
            if raw is not None and method == "POST":
                return 200, {}, raw
            return (404, {}, b"{}") if route is None else (200, {}, json.dumps(route(body)).encode())

        wire["answer"] = answer
        found = specrej_reward_judge([RenderedPrompt("x", [fields])], reward_model=url, reward_retries=0)
        assert all(1 <= float(text) <= 2 for text in found["completions"])

    fields = altered(row, whole=False).filter(lambda d: isinstance(d, dict))
    raw = st.none() | altered([[{"score": 0.5, "label": "LABEL_0"}], [{"score": -1.5, "label": "LABEL_0"}]]).map(
        json_of
    )
    surface.fuzz(st.tuples(fields, raw), work, examples(2000, 80))
    surface.done()
