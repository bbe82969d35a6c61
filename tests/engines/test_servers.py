"""Engines that are servers: looks, rows and ledgers on a loopback server that behaves, and on one that does not."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from support import decoding_servers as servers
from support import forked, toy
from support.decoding_servers import draws
from support.engine_contract import CHECKS, Subject, log_probs_are_the_models_own
from support.engine_runs import HashReward
from support.tiny_models import EOS, save, tiny_causal_lm, tiny_tokenizer
from urllib3.connection import HTTPConnection

from specrej_eval import cli, stopping
from specrej_eval import http as _http
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, RowView, TokenStat
from specrej_eval.engines.choose import resolve_engine
from specrej_eval.engines.servers.engine import ServerEngine
from specrej_eval.errors import ConfigError, ModelError, SpecRejError
from specrej_eval.generator import Generator
from specrej_eval.http import JsonServer, Names, ServerError
from specrej_eval.in_flight import Request
from specrej_eval.rewards.base import RewardModel

PROMPTS = ["a", "Tell me about rivers.", "One, two, three: " * 3]
SMALL: dict[str, Any] = {"n": 8, "max_gen_toks": 24, "first_look": 6, "reward_model": "likelihood"}
NAMES = {"vllm": "vllm-server", "sglang": "sglang-server", "completions": "openai-server"}
LOOKS = [("vllm", "pause"), ("vllm", "resubmit"), ("sglang", "pause"), ("sglang", "resubmit")]
MOST_LOOKS = [LOOKS[0], *(pytest.param(*each, marks=pytest.mark.full) for each in LOOKS[1:3]), LOOKS[3]]
"""Each kind and each way is there in a short run too."""
REFUSED = {"vllm": ({"top_p": 0.8, "min_p": 0.1},), "sglang": ({"top_k": 6, "top_p": 0.8},)}
"""What the sampler of each does in another order, or by another measure."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(_http, "LONGEST_WAIT", 0.05)
    for name in ("SPECREJ_ENGINE_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nothing but a tokenizer."""
    return save(None, tiny_tokenizer(), tmp_path_factory.mktemp("lm"))


@contextmanager
def running(kind: str, **settings: Any) -> Iterator[servers.Server]:
    with servers.serve(kind, tiny_tokenizer(), **settings) as server:
        yield server


def arguments(server: servers.Server, folder: Path, **others: Any) -> dict[str, Any]:
    found = {**SMALL, "pretrained": str(folder), "engine": NAMES[server.kind], "engine_url": server.url}
    return {**found, "engine_timeout": 30, "engine_retries": 3, **others}


def make(server: servers.Server, folder: Path, *, reward: RewardModel | None = None, **others: Any) -> Generator:
    config, host = RunConfig.from_args(arguments(server, folder, **others))
    engine = resolve_engine(config, host).load(content_rule="encode_as_text")
    return Generator(engine=engine, reward=reward or HashReward(), config=config)


def answered(generator: Generator, prompts: Sequence[str] = PROMPTS, **others: Any) -> list[GenerationResult]:
    results = generator.generate(list(prompts), **others)
    for result in results:
        check_sums(result)
    return results


def check_sums(result: GenerationResult) -> None:
    """What holds of every answer, whatever the server did."""
    ledger, rows = result.ledger, result.trajectories
    assert ledger.decode_tokens == sum(row.num_tokens for row in rows)
    assert ledger.rows_started == len(rows) == result.resolved["n"]
    for round_ in result.rounds:
        assert round_.kv_tokens <= result.resolved["kv_budget_tokens"]
    for row in rows:
        assert row.num_tokens <= result.resolved["max_gen_toks"]
        assert EOS not in row.token_ids[:-1]
        assert (row.finish_reason == "eos") == (row.token_ids[-1:] == [EOS])


def rows_of(server: servers.Server) -> list[list[int]]:
    """Prompt and tokens of every request, as the server draws them."""
    return [[*(body.get("prompt") or body["input_ids"]), *draws(body, server.logits)] for body in server.requests]


def prompt_ids(text: str) -> list[int]:
    return list(tiny_tokenizer().encode(text))


# ---- looks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
@pytest.mark.parametrize("stagger", [0, 5], ids=["together", "staggered"])
def test_rows_are_what_the_server_drew_and_looks_see_their_first_tokens(
    kind: str, looks: str, stagger: int, folder: Path, counted: Callable[..., None]
) -> None:
    with running(kind, stagger=stagger) as server:
        results = answered(make(server, folder, engine_looks=looks))
        drawn = rows_of(server)
    assert any(result.ledger.rows_rejected for result in results)
    for prompt, result in zip(PROMPTS, results, strict=True):
        first = prompt_ids(prompt)
        for row in result.trajectories:
            whole = [*first, *row.token_ids]
            assert any(known[: len(whole)] == whole for known in drawn), "a row is a beginning of what was drawn"
        # the first look is at 6 tokens for every row that is there
        assert result.rounds[0].tokens == 6
        assert result.rounds[0].rows == 8
    counted("rows of servers compared with what was drawn", sum(len(result.trajectories) for result in results))


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_every_token_the_server_decodes_is_counted_or_discarded(kind: str, looks: str, folder: Path) -> None:
    with running(kind, stagger=3) as server:
        results = answered(make(server, folder, engine_looks=looks, batch_size=1))
        total = sum(result.ledger.decode_tokens + result.ledger.discarded_tokens for result in results)
        assert total == server.decoded
    if looks == "resubmit":
        assert not any(result.ledger.overshoot_tokens for result in results)
    else:
        assert any(result.ledger.overshoot_tokens for result in results)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_pause_keeps_requests_and_ends_with_the_run(kind: str, folder: Path) -> None:
    asked = []

    class Watching(HashReward):
        def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
            asked.append((server.paused, any(not row.finished for row in rows)))
            return super().score(conversation, rows, response_prefix)

    with running(kind) as server:
        answered(make(server, folder, reward=Watching(), batch_size=1))
        assert not server.paused
        told = [told for told in server.told if "pause" in told and "is_paused" not in told]
    assert told
    assert all(paused for paused, unfinished in asked if unfinished), "unfinished rows are scored while it stands still"
    if kind == "vllm":
        assert set(told) == {"POST /pause?mode=keep"}
    assert len(server.requests) == len(PROMPTS) * SMALL["n"], "each row is one request"


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_alpha_0_is_best_of_n_token_for_token(kind: str, looks: str, folder: Path) -> None:
    found = []
    asked = {**SMALL, "kv_budget_tokens": 300, "first_look": None, "engine_looks": looks}
    for strategy in ({"strategy": "best_of_n"}, {"alpha": 0.0}):
        with running(kind) as server:
            results = answered(make(server, folder, **asked, **strategy))
            found.append([[row.token_ids for row in result.trajectories] for result in results])
            if looks == "pause":
                assert not any("/pause" in told or "pause_gen" in told for told in server.told if "POST" in told)
    assert found[0] == found[1]


def test_resubmitted_rows_do_not_depend_on_company_or_on_stagger(folder: Path) -> None:
    found = []
    for stagger, batch_size in ((0, 1), (4, 3)):
        with running("vllm", stagger=stagger) as server:
            results = answered(make(server, folder, engine_looks="resubmit", batch_size=batch_size))
        found.append([(result.best.to_dict(), [row.token_ids for row in result.trajectories]) for result in results])
    assert found[0] == found[1]


def test_no_two_requests_draw_the_same_noise(folder: Path) -> None:
    with running("vllm") as server:
        answered(make(server, folder, engine_looks="resubmit"), [*PROMPTS, *PROMPTS])
        seeds = [body["seed"] for body in server.requests]
    assert len(seeds) > 6 * SMALL["n"]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_a_stop_string_cuts_at_its_very_character(kind: str, looks: str, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    stop = tokenizer.decode([servers.LETTERS[3]])
    with running(kind) as server:
        results = answered(make(server, folder, engine_looks=looks), until=stop)
    stopped = [row for result in results for row in result.trajectories if row.finish_reason == "stop"]
    assert stopped
    for row in stopped:
        assert stop in tokenizer.decode(row.token_ids)
        assert stop not in tokenizer.decode(row.token_ids[:-1])
        assert row.text == tokenizer.decode(row.token_ids).partition(stop)[0]


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_first_tokens_have_the_models_distribution(kind: str, looks: str, folder: Path) -> None:
    asked = {"strategy": "best_of_n", "n": 400, "max_gen_toks": 2, "first_look": None}
    with running(kind, step_seconds=0.002) as server:
        sampling = {"temperature": 0.8, "top_k": 0, "top_p": 0.9}
        [result] = answered(make(server, folder, engine_looks=looks, **sampling, **asked), ["a"])
    expected = servers.probabilities(servers.toy_logits(prompt_ids("a")), sampling)
    found = Counter(row.token_ids[0] for row in result.trajectories)
    assert set(found) <= set(expected)
    statistic = sum((found[token] - 400 * p) ** 2 / (400 * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_numbers_of_tokens_are_those_of_the_untempered_model(kind: str, looks: str, folder: Path) -> None:
    class Reading(HashReward):
        needs_token_stats: ClassVar[frozenset[TokenStat]] = frozenset({"confidence"}) if kind == "vllm" else frozenset()
        seen: ClassVar[list[RowView]] = []

        def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
            self.seen += rows
            return super().score(conversation, rows, response_prefix)

    with running(kind, stagger=2) as server:
        reward = Reading()
        asked = {"logprobs": True, "temperature": 0.7 if kind == "vllm" else 1.0, "engine_looks": looks}
        generator = make(server, folder, reward=reward, **asked)
        [result] = answered(generator, ["a"])
    prompt = prompt_ids("a")
    for row in result.trajectories:
        ids = [*prompt, *row.token_ids]
        expected = []
        for place in range(len(prompt), len(ids)):
            logits = servers.toy_logits(ids[:place])
            expected.append(logits[ids[place]] - math.log(sum(map(math.exp, logits.values()))))
        assert row.logprobs == pytest.approx(expected)
    for view in reward.seen if kind == "vllm" else ():
        assert len(view.token_stats["confidence"]) == view.num_tokens
        logits = servers.toy_logits(prompt)
        norm = math.log(sum(map(math.exp, logits.values())))
        top = sorted((value - norm for value in logits.values()), reverse=True)[:20]
        assert view.token_stats["confidence"][0] == pytest.approx(-sum(top) / 20)


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_an_end_that_only_the_server_knows_is_an_end(kind: str, looks: str, folder: Path) -> None:
    """As of a chat model whose turns end with a token that its tokenizer does not call EOS."""
    end = servers.LETTERS[5]
    with running(kind, ends_at=end) as server:
        generator = make(server, folder, engine_looks=looks)
        results = generator.generate(PROMPTS)
    rows = [row for result in results for row in result.trajectories]
    assert any(row.finish_reason == "eos" and row.token_ids[-1] == end for row in rows)
    for row in rows:
        assert end not in row.token_ids[:-1]
        assert (row.token_ids[-1] in (end, EOS)) == (row.finish_reason == "eos")
        if row.finish_reason == "eos":
            assert row.text == tiny_tokenizer().decode(row.token_ids[:-1])


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_what_the_prefix_cache_spared_is_told(kind: str, looks: str, folder: Path) -> None:
    with running(kind) as server:
        [result] = answered(make(server, folder, engine_looks=looks), ["Tell me about rivers."])
    prompt, rows = result.ledger.prompt_tokens, result.ledger.rows_started
    least = sum(row.finish_reason != "rejected" for row in result.trajectories) * (prompt - 1)
    assert result.ledger.cached_tokens >= least - prompt
    if looks == "resubmit":
        assert result.ledger.cached_tokens > rows * (prompt - 1), "rows that are asked for anew have been read already"


@pytest.mark.parametrize("way", ["incremental", "trims_end"])
@pytest.mark.parametrize("looks", ["pause", "resubmit"])
def test_events_of_sglang_are_read_in_all_their_forms(looks: str, way: str, folder: Path) -> None:
    asked = {"engine_looks": looks, "logprobs": way == "incremental", "engine_retries": 0, "engine_timeout": 30}
    with running("sglang", stagger=3, **{way: True}) as server:
        results = answered(make(server, folder, **asked))
        drawn = rows_of(server)
    ended = [row for result in results for row in result.trajectories if row.finish_reason == "eos"]
    assert ended
    for prompt, result in zip(PROMPTS, results, strict=True):
        for row in result.trajectories:
            whole = [*prompt_ids(prompt), *row.token_ids]
            assert any(known[: len(whole)] == whole for known in drawn)
            assert row.logprobs is None or len(row.logprobs) == row.num_tokens


# ---- the contract of all engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_engines_that_are_servers_keep_the_contract(
    check: Callable[[Subject], None], kind: str, looks: str, folder: Path
) -> None:
    def logits(ids: Sequence[int]) -> dict[int, float]:
        return dict(enumerate(toy.logits_of(ids)))

    with running(kind, logits=logits, stagger=2, step_seconds=0.001) as server:
        engine = cast("ServerEngine", make(server, folder, engine_looks=looks, engine_timeout=30).engine)
        subject = Subject(
            engine=engine,
            logits=toy.logits_of,
            is_open=lambda session: bool(session.streams),
            decoded=lambda: server.decoded,
            draws=150,
            refused=REFUSED[kind],
        )
        if kind == "sglang" and check is log_probs_are_the_models_own:  # at another temperature than 1
            with pytest.raises(ConfigError, match="after the temperature"):
                check(subject)
        else:
            check(subject)


# ---- servers that fail -------------------------------------------------------------------------------------------

FAULTS: dict[str, servers.Fault] = {
    "dies in mid-stream": servers.hang_up(4),
    "dies before the first token": servers.hang_up(0),
    "drops a token": servers.lose(3),
    "repeats an event": servers.repeat(4),
    "repeats an old event": servers.repeat_late(2, 5),
    "sends what is no JSON": servers.send(b"{oops", 2),
    "sends an error": servers.send(b'{"error": {"message": "CUDA error"}}', 5),
    "sends a list": servers.send(b"[1, 2]", 2),
    "sends ids that are none": servers.send(b'{"choices": [{"token_ids": ["x"], "finish_reason": null}]}', 2),
    "falls silent": servers.silent(3),
}


@pytest.mark.parametrize(
    ("kind", "looks", "fault"),
    [
        pytest.param(*each, fault, marks=[] if each == LOOKS[3 * (place % 2)] else [pytest.mark.full])
        for place, fault in enumerate(FAULTS)
        for each in LOOKS
    ],
)
def test_a_request_that_fails_is_asked_for_again_from_where_it_was(
    kind: str, looks: str, fault: str, folder: Path, counted: Callable[..., None]
) -> None:
    with running(kind, faults={1: FAULTS[fault], 5: FAULTS[fault]}) as server:
        seconds = 0.5 if fault == "falls silent" else 30
        [result] = answered(make(server, folder, engine_looks=looks, engine_timeout=seconds), ["a"])
        drawn = rows_of(server)
        assert not server.paused
    first = prompt_ids("a")
    for row in result.trajectories:
        whole = [*first, *row.token_ids]
        assert any(known[: len(whole)] == whole for known in drawn)
    counted("faults planted in servers that decode", 2)


def test_an_event_that_is_none_is_told_for_what_it_is(folder: Path) -> None:
    with running("vllm", faults={0: servers.send(b"{oops", 2)}) as server:
        generator = make(server, folder, engine_retries=0)
        with pytest.raises(ServerError, match=r"status 200, but an event is bad: Expecting property name"):
            answered(generator, ["a"])


def test_a_request_that_is_cut_while_it_connects_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its thread would wait as long as a silent server keeps the connection."""
    connecting, go_on, connect = threading.Event(), threading.Event(), HTTPConnection.connect

    def slowly(self: HTTPConnection) -> None:
        connecting.set()
        go_on.wait(10)
        connect(self)

    monkeypatch.setattr(HTTPConnection, "connect", slowly)
    names = Names(server="s", address="a", timeout="t", retries="r", key_over_http="k")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # who connects is never answered
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = JsonServer(url, key_variables=(), timeout=60, retries=0, key_over_http=False, names=names)
        stream = server.stream("/v1/completions", {})
        reader = threading.Thread(target=lambda: list(stream), daemon=True)
        reader.start()
        assert connecting.wait(10)
        stream.cut()
        go_on.set()
        reader.join(10)
        assert not reader.is_alive()


@pytest.mark.parametrize("looks", ["pause", "resubmit"])
def test_a_server_that_dies_and_comes_back_loses_nothing(looks: str, folder: Path) -> None:
    with running("vllm", dies_after=60) as server:
        generator = make(server, folder, engine_looks=looks, engine_retries=300)
        server_thread = _revives(server)
        results = answered(generator)
        server_thread.join(5)
        drawn = rows_of(server)
    for prompt, result in zip(PROMPTS, results, strict=True):
        for row in result.trajectories:
            whole = [*prompt_ids(prompt), *row.token_ids]
            assert any(known[: len(whole)] == whole for known in drawn)


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_a_server_that_comes_back_with_another_model_is_refused_and_no_token_of_its_counts(
    kind: str, looks: str, folder: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    with running(kind, step_seconds=0.005) as server:
        generator = make(server, folder, engine_looks=looks, engine_retries=300, journal=str(journal), batch_size=1)
        server.dies_when = lambda: answers_in(journal) > 0
        server_thread = _revives(server, model="another")
        with pytest.raises(ServerError, match=r"another model: 'org/another', .* are of 'org/the-lm'"):
            answered(generator)
        server_thread.join(5)
        assert not server.paused
        kept = answers_in(journal)
        assert 1 <= kept < len(PROMPTS)
        server.model = "the-lm"
        again = make(server, folder, engine_looks=looks, journal=str(journal), batch_size=1)
        assert [result.taken for result in answered(again)].count(True) == kept


@pytest.mark.parametrize(("kind", "looks"), MOST_LOOKS)
def test_a_server_that_holds_another_model_between_two_calls_is_refused_too(
    kind: str, looks: str, folder: Path
) -> None:
    with running(kind) as server:
        generator = make(server, folder, engine_looks=looks)
        first = answered(generator, ["a"])
        server.model = "another"  # nothing failed, and nobody was asked meanwhile
        with pytest.raises(ServerError, match=r"another model: 'org/another', .* are of 'org/the-lm'"):
            answered(generator, ["b"])
        server.model = "the-lm"
        again = answered(generator, ["a"])
    assert [row.token_ids for row in again[0].trajectories] == [row.token_ids for row in first[0].trajectories]


def answers_in(journal: Path) -> int:
    return sum('"trajectories"' in line for line in journal.read_text().splitlines()) if journal.exists() else 0


def _revives(server: servers.Server, *, model: str = "the-lm") -> threading.Thread:
    """Brings a server back that has died."""

    def wait() -> None:
        while not server.dead:
            time.sleep(0.01)
        time.sleep(0.2)
        server.model = model
        server.revive()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("looks", ["pause", "resubmit"])
def test_a_server_that_stays_away_is_one_error_and_the_journal_goes_on(
    looks: str, folder: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    with running("vllm") as server:
        once = answered(make(server, folder, engine_looks=looks, batch_size=1), PROMPTS[:1])
        server.dies_after = server.decoded * 3 // 2
    with running("vllm") as server:
        generator = make(server, folder, engine_looks=looks, batch_size=1, journal=str(journal))
        [before] = answered(generator, PROMPTS[:1])
        server.dies_after = server.decoded + 30
        with pytest.raises(SpecRejError, match="engine server") as caught:
            generator.generate(PROMPTS)
        assert server.url in str(caught.value)
        assert "after" in str(caught.value)
        server.revive()
        asked = len(server.requests)
        results = answered(make(server, folder, engine_looks=looks, batch_size=1, journal=str(journal)))
        firsts = {tuple(body["prompt"][: len(prompt_ids(PROMPTS[0])) + 1]) for body in server.requests[asked:]}
    assert results[0].taken
    assert results[0].to_dict() == before.to_dict()
    assert [row.token_ids for row in once[0].trajectories]
    assert tuple(prompt_ids(PROMPTS[0])) not in firsts
    assert not any(result.taken for result in results[1:])


def test_a_scoring_that_fails_leaves_no_pause(folder: Path) -> None:
    class Failing(HashReward):
        def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
            assert server.paused
            raise KeyboardInterrupt

    with running("vllm") as server:
        generator = make(server, folder, reward=Failing())
        with pytest.raises(KeyboardInterrupt):
            generator.generate(PROMPTS)
        assert not server.paused


def test_an_abandoned_run_leaves_no_pause_and_no_request(folder: Path) -> None:
    with running("vllm") as server:
        generator = make(server, folder, batch_size=1)
        requests = [Request(prompt=generator.engine.encode(prompt), config=generator.config) for prompt in PROMPTS]
        run = generator.run(requests, progress=False)
        next(run)
        run.close()
        assert not server.paused
        until = time.monotonic() + 30
        while server.jobs and time.monotonic() < until:
            time.sleep(0.01)
        assert not server.jobs


SLOW = """
import time
def score(prompt, response):
    print("scoring", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            if {ends}:
                raise
"""


@pytest.mark.usefixtures("ctrl_c_is_not_ignored")
@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGTERM, True), (signal.SIGINT, False)],
    ids=["in Python", "lost in a library for good"],
)
def test_a_signal_leaves_no_pause(number: signal.Signals, ends: bool, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(ends=ends))
    (tmp_path / "prompts.json").write_text('[{"instruction": "a"}]')
    with running("vllm") as server:
        given = {**arguments(server, folder), "reward_model": "slow:score", "batch_size": 1}
        command = ["run", "--prompts", "prompts.json", "--output", "out"]
        command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
        reader, writer = os.pipe()

        def work() -> int:
            os.dup2(writer, 1)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            os.chdir(tmp_path)
            sys.path.insert(0, str(tmp_path))
            sys.argv = ["specrej-eval", *command]
            stopping.PATIENCE = 0.5
            return cli.main()

        pid = forked.start(work)
        os.close(writer)
        try:
            lines = []
            with os.fdopen(reader) as said:
                for line in said:
                    lines.append(line)
                    if "scoring" in line and server.paused:
                        break
                assert server.paused, "".join(lines)
                os.kill(pid, number)
                assert forked.ended(pid) == 128 + number
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not server.paused


def test_a_pause_that_a_killed_run_left_is_ended_by_the_next(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running("vllm") as server:
        server.pause()
        answered(make(server, folder), ["a"])
    assert "left paused" in caplog.text


def test_a_pause_of_another_client_is_waited_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running("vllm") as server:
        generator = make(server, folder, engine_looks="resubmit", engine_timeout=0.3, engine_retries=20)
        server.pause()
        threading.Timer(1.0, server.resume).start()
        answered(generator, ["a"])
        assert len(server.requests) < 60, "nothing is asked for twice meanwhile"
    assert "is paused by another client" in caplog.text


def test_requests_that_somebody_aborts_go_on(folder: Path) -> None:
    with running("vllm", step_seconds=0.01) as server:
        generator = make(server, folder, engine_looks="resubmit")
        threading.Timer(0.1, lambda: server.abort(None)).start()
        answered(generator, ["a"])


def test_a_server_that_forgets_its_pause_is_asked_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running("vllm") as server:
        generator = make(server, folder, batch_size=1)
        assert generator.describe()["engine_looks"] == "pause"
        server.can_pause = False
        answered(generator)
        assert generator.describe()["engine_looks"] == "resubmit"
    assert "cannot be paused any more" in caplog.text


def test_a_context_too_small_is_said_before_anything_is_decoded(folder: Path) -> None:
    with running("vllm", max_model_len=20) as server:
        generator = make(server, folder)
        with pytest.raises(SpecRejError, match="context of 20 tokens"):
            generator.generate("a")
        assert not server.requests
    with running("vllm", max_model_len=20) as server:
        generator = make(server, folder)
        generator.engine.max_length = 400  # as of a server that does not tell
        with pytest.raises(ModelError, match=r"ended a row after \d+ of the"):
            generator.generate("a")


# ---- what a server can do ----------------------------------------------------------------------------------------


def test_a_server_without_pause_is_asked_anew_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("vllm", "sglang"):
        with running(kind, can_pause=False) as server:
            generator = make(server, folder)
            answered(generator)
            assert generator.describe()["engine_looks"] == "resubmit"
            assert len(server.requests) > len(PROMPTS) * SMALL["n"]
    assert "For each look rows are asked for anew" in caplog.text
    assert "VLLM_SERVER_DEV_MODE=1" in caplog.text


def test_a_server_of_texts_serves_best_of_n_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    stop = tokenizer.decode([servers.LETTERS[3]])
    plain = {"strategy": "best_of_n", "first_look": None, "top_k": 0}
    for kind, settings in (("completions", {}), ("vllm", {"token_ids": False})):
        with running(kind, **settings) as server:
            with pytest.raises(ConfigError, match="can only be decoded to their end"):
                make(server, folder, top_k=0).generate("a")
            assert not server.requests
            generator = make(server, folder, **plain)
            results = generator.generate(PROMPTS, until=stop)
            drawn = [draws(body) for body in server.requests]
        assert "Best-of-N only" in caplog.text
        for result in results:
            assert len(result.trajectories) == 8
            for row in result.trajectories:
                assert stop not in row.text
                texts = [tokenizer.decode([token for token in ids if token != EOS]) for ids in drawn]
                assert any(text.partition(stop)[0] == row.text for text in texts)


def test_a_server_of_unknown_make_is_not_trusted_with_what_it_may_ignore(folder: Path) -> None:
    with running("completions") as server:
        for given in ({"top_k": 5}, {"top_k": 0, "min_p": 0.1}):
            with pytest.raises(ConfigError, match=r"top_k=0,min_p=0"):
                make(server, folder, strategy="best_of_n", first_look=None, **given).generate("a")


def test_numbers_that_a_server_cannot_give_are_refused(folder: Path) -> None:
    class Wanting(HashReward):
        needs_token_stats = frozenset({"self_certainty"})

    for kind in ("vllm", "sglang"):
        with running(kind) as server:
            with pytest.raises(ConfigError, match="does not give self_certainty"):
                make(server, folder, reward=Wanting()).generate("a")
            if kind == "vllm":
                with pytest.raises(ConfigError, match=r"give 0, or 0.01 to 2"):
                    make(server, folder, temperature=2.5).generate("a")
            if kind == "sglang":
                with pytest.raises(ConfigError, match="after the temperature"):
                    make(server, folder, logprobs=True, temperature=0.5).generate("a")
            assert not server.requests


@pytest.mark.parametrize(
    ("kind", "sampling", "told"),
    [
        ("vllm", {"top_p": 0.9, "min_p": 0.1}, r"min_p=0\.1 and top_p=0\.9 together: vLLM applies min_p first"),
        ("sglang", {"top_p": 0.9}, r"top_k=50 and top_p=0\.9 together: SGLang measures top_p by all tokens"),
    ],
)
def test_arguments_that_a_server_would_take_otherwise_than_we_do_are_refused(
    kind: str, sampling: dict[str, float], told: str, folder: Path
) -> None:
    with running(kind) as server:
        with pytest.raises(ConfigError, match=told):
            make(server, folder, **sampling).generate("a")
        assert not server.requests
        make(server, folder, temperature=0.0, n=1, first_look=24, **sampling).generate("a")  # no filter counts then


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"engine_url": None}, "needs engine_url="),
    ({"pretrained": None}, "needs pretrained="),
    ({"engine_url": "localhost:8000"}, "is not the address of a server"),
    ({"engine_looks": "never"}, "unknown engine_looks 'never'"),
    ({"engine_timeout": 0}, "engine_timeout must be above 0"),
    ({"max_length": "many"}, "max_length must be a whole number"),
    ({"max_length": 0}, "max_length must be at least 1"),
    ({"max_length": 513}, r"max_length=513, and the context of .* is 512 tokens"),
    ({"engine": "transformers"}, "is for engine="),
    ({"tensor_parallel_size": 2}, "is for engine=vllm"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_one_clear_error(given: dict[str, Any], message: str, folder: Path) -> None:
    with running("vllm") as server, pytest.raises(ConfigError, match=message):
        make(server, folder, **given)


def test_another_tokenizer_than_the_servers_is_refused(folder: Path, tmp_path: Path) -> None:
    with running("vllm") as server:
        server.tokenizer = tiny_tokenizer()
        server.tokenizer.encode = lambda *_, **__: [1, 2, 3]
        with pytest.raises(ConfigError, match="another tokenizer"):
            make(server, folder)


def test_a_pause_that_is_asked_for_must_be_there(folder: Path) -> None:
    with running("vllm", can_pause=False) as server, pytest.raises(ConfigError, match="cannot be paused") as caught:
        make(server, folder, engine_looks="pause")
    assert "VLLM_SERVER_DEV_MODE=1" in str(caught.value)


def test_a_key_comes_from_the_environment_and_is_never_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running("vllm", key="open-sesame-77") as server:
        with pytest.raises(SpecRejError, match="SPECREJ_ENGINE_API_KEY"):
            make(server, folder)
        monkeypatch.setenv("SPECREJ_ENGINE_API_KEY", "open-sesame-77")
        generator = make(server, folder)
        answered(generator, ["a"])
        address = server.url.replace("http://", "http://user:hunter2@")
        with pytest.raises(SpecRejError) as caught:
            make(server, folder, engine_url=address)
    shown = f"{caplog.text} {generator.describe()} {caught.value} {generator.config.to_dict()}"
    assert "sesame" not in shown
    assert "hunter2" not in shown


def test_addresses_that_people_copy_are_understood(folder: Path) -> None:
    with running("vllm") as server:
        for path in ("/", "/v1", "/v1/", "/v1/completions"):
            answered(make(server, folder, engine_url=server.url + path), ["a"])


def test_records_tell_models_of_servers_apart_and_not_their_addresses(folder: Path) -> None:
    from specrej_eval.api import resolve
    from specrej_eval.records import fingerprint

    found = []
    for _ in range(2):
        with running("vllm") as server:
            found.append(resolve(*RunConfig.from_args(arguments(server, folder))).of_models())
    with running("sglang") as server:
        found.append(resolve(*RunConfig.from_args(arguments(server, folder))).of_models())
    assert fingerprint.same(found[0], found[1])
    assert not fingerprint.same(found[0], found[2])
    assert found[0]["served_model"] == "org/the-lm"
    assert not fingerprint.same(found[0], {**found[0], "served_model": "org/another"})


# ---- in a harness ------------------------------------------------------------------------------------------------


def test_lm_eval_runs_it_under_the_same_names(folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from specrej_eval.harness.lm_eval.model import SpecRejLM

    model = save(tiny_causal_lm(), tiny_tokenizer(), tmp_path / "model")  # lm-eval reads its config.json
    with running("vllm") as server:
        given = {**arguments(server, model), "reward_model": "likelihood", "journal": str(tmp_path / "journal.jsonl")}
        lm = SpecRejLM(**given)
        asked: dict[str, Any] = {"until": [tiny_tokenizer().decode([servers.LETTERS[3]])], "max_gen_toks": 24}
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(prompt, asked), idx=0) for prompt in PROMPTS
        ]
        answers = lm.generate_until(requests)
        assert len(server.requests) == len(PROMPTS) * SMALL["n"]
        assert SpecRejLM(**given).generate_until(requests) == answers
        assert len(server.requests) == len(PROMPTS) * SMALL["n"], "the journal has them"
        assert not server.paused
    assert not any(asked["until"][0] in answer for answer in answers)
