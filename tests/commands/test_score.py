"""`specrej-eval score`: files in, files out, stopped and gone on, and rows that cannot be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import reward_servers as servers
from support.rewards import make_reward
from support.tiny_models import NO_SYSTEM_TEMPLATE, save, tiny_reward_model, tiny_tokenizer

from specrej_eval import http as _http
from specrej_eval import stopping
from specrej_eval.cli import main
from specrej_eval.commands import score
from specrej_eval.core import RowView
from specrej_eval.rewards.base import Pair, in_groups
from specrej_eval.rewards.kinds.ensemble import ranks

ROWS: list[dict[str, Any]] = [
    {"prompt": "Say hello.", "response": "Hello!", "id": 7},
    {"instruction": "Say hello.", "output": "Go away."},
    {"messages": [{"role": "user", "content": "Say bye."}, {"role": "assistant", "content": "Bye, née à Kyōto 🌸"}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "completion": ""},
    {"question": "Say hello.", "answer": "Hello there, my friend."},
]
PAIRS = [
    ("Say hello.", "Hello!"),
    ("Say hello.", "Go away."),
    ("Say bye.", "Bye, née à Kyōto 🌸"),
    (None, ""),
    ("Say hello.", "Hello there, my friend."),
]
CALLS: list[int] = []
BREAK_AT: list[int] = []


def length(conversation: Sequence[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """Breaks at the texts whose lengths stand in BREAK_AT."""
    CALLS.append(len(responses))
    if any(len(text) in BREAK_AT for text in responses):
        raise ValueError("that text")
    return [len(text) + 100.0 * len(conversation) for text in responses]


def nan_for_empty(conversation: Any, responses: Sequence[str]) -> list[float]:
    return [math.nan if not text else 1.0 for text in responses]


REWARD = f"{__name__}:length"
WANT = [106.0, 108.0, 100.0 + len(PAIRS[2][1]), 200.0, 123.0]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    BREAK_AT.clear()
    monkeypatch.setattr(_http, "sleep", lambda seconds: None)
    yield


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    return file


def run(file: Path, *options: str) -> int:
    return main(["score", "--input", str(file), "--reward_model", REWARD, *options])


def output(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_row_comes_back_with_its_reward(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pairs) == 0
    assert output(pairs.with_suffix(".scored.jsonl")) == [
        {**row, "reward": reward} for row, reward in zip(ROWS, WANT, strict=True)
    ]
    said = capsys.readouterr()
    assert f"5 rows scored: mean {sum(WANT) / 5:.4f}, min 106.0000, max 200.0000" in said.out
    assert "5/5" in said.err  # the bar
    assert sum(CALLS) == 5


def test_it_says_so_where_the_demo_reward_scores(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pairs) == 0
    assert "DEMO" not in capsys.readouterr().err
    assert main(["score", "--input", str(pairs), "--force"]) == 0
    assert "DEMO: the embedded demo reward scores; it knows nothing but small sums." in capsys.readouterr().err


def test_tables_and_lists_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,response\nSay hello.,"Hello, you!"\n', encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:2]), encoding="utf-8")
    assert run(tmp_path / "a.csv", "--output", str(tmp_path / "o" / "x.jsonl"), "--column", "rm") == 0
    assert output(tmp_path / "o" / "x.jsonl") == [{"prompt": "Say hello.", "response": "Hello, you!", "rm": 111.0}]
    assert run(tmp_path / "b.json") == 0
    assert [row["reward"] for row in output(tmp_path / "b.scored.jsonl")] == WANT[:2]


def test_a_stopped_command_goes_on(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "CHUNK", 2)
    BREAK_AT.append(0)  # the fourth row
    assert run(pairs) == 1
    target = pairs.with_suffix(".scored.jsonl")
    assert [row["reward"] for row in output(target)] == WANT[:3]
    with open(target, "a", encoding="utf-8") as file:
        file.write('{"torn')  # as a kill leaves it
    BREAK_AT.clear()
    CALLS.clear()
    assert run(pairs) == 0
    assert sum(CALLS) == 2
    assert [row["reward"] for row in output(target)] == WANT
    CALLS.clear()
    assert run(pairs) == 0
    assert CALLS == []  # nothing is left to do


def test_a_failing_row_is_named_or_skipped(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BREAK_AT.append(0)
    assert run(pairs) == 1
    said = capsys.readouterr().err
    assert "line 4: reward_model" in said
    assert "raised ValueError: that text" in said
    assert run(pairs, "--on_error", "skip", "--force") == 1
    found = output(pairs.with_suffix(".scored.jsonl"))
    assert [row["reward"] for row in found] == [*WANT[:3], None, WANT[4]]
    assert "that text" in found[3]["error"]
    assert "1 row could not be scored" in capsys.readouterr().err


def test_nan_is_named_or_skipped(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:nan_for_empty"
    assert main(["score", "--input", str(pairs), "--reward_model", name]) == 1
    assert "line 4: " in capsys.readouterr().err
    target = pairs.with_suffix(".scored.jsonl")
    assert len(output(target)) == 3
    assert main(["score", "--input", str(pairs), "--reward_model", name, "--on_error", "skip"]) == 1
    assert [row["reward"] for row in output(target)] == [1, 1, 1, None, 1]
    assert output(target)[3]["error"] == "NaN"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "x"}, r"line 6: has no messages, prompt, instruction or question"),
        ({"prompt": "x"}, "line 6: has no response, output, completion or answer"),
        ({"prompt": "x", "response": None}, "line 6: has no response"),
        ({"prompt": 3, "response": "x"}, "line 6: 'prompt' must be a text, got '3'"),
        ({"prompt": "x", "response": ["x"]}, "line 6: 'response' must be a text"),
        ({"messages": [], "response": "x"}, "line 6: 'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}], "response": "x"}, "line 6: 'messages' must be a list of messages"),
        ({"messages": "Hi", "response": "x"}, "line 6: 'messages' must be a list of messages"),
        ({"prompt": "x", "response": "y", "reward": 1}, "line 6: already has a field 'reward'"),
        (["x", "y"], "line 6: must be an object"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_scored(
    row: Any, message: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(pairs, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    assert run(pairs) == 1
    assert message in capsys.readouterr().err
    assert CALLS == []


def test_another_reward_or_another_file_is_never_mixed_in(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pairs) == 0
    name = f"{__name__}:nan_for_empty"
    assert main(["score", "--input", str(pairs), "--reward_model", name, "--on_error", "skip"]) == 1
    assert f"reward_model was '{__name__}:length', is now '{name}'" in capsys.readouterr().err
    with open(pairs, "a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert run(pairs) == 1
    assert "input:" in capsys.readouterr().err
    assert run(pairs, "--force") == 0
    assert len(output(pairs.with_suffix(".scored.jsonl"))) == 6


def test_files_that_are_not_ours_to_write(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pairs, "--output", str(pairs)) == 1
    assert "is the input itself" in capsys.readouterr().err
    other = pairs.with_name("other.jsonl")
    other.write_text("{}\n")
    assert run(pairs, "--output", str(other)) == 1
    assert "nothing says which reward model wrote it" in capsys.readouterr().err
    assert other.read_text() == "{}\n"


def test_self_scores_need_an_engine(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--input", str(pairs), "--reward_model", "deepconf"]) == 1
    assert "recorded while decoding" in capsys.readouterr().err


def test_ranks_are_among_all_answers_to_a_prompt(pairs: Path) -> None:
    name = f"{REWARD}+{REWARD}"
    options = ["score", "--input", str(pairs), "--reward_model", name, "--reward_ensemble", "rank"]
    assert main(options) == 0
    found = [row["reward"] for row in output(pairs.with_suffix(".scored.jsonl"))]
    assert found == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert ranks([106, 108, 123]) == [0.0, 0.5, 1.0]
    target = pairs.with_suffix(".scored.jsonl")
    target.write_text("".join(target.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert main(options) == 0  # of a part, ranks say nothing: it is done over
    assert [row["reward"] for row in output(target)] == found


def test_a_server_that_goes_away_is_one_error_and_nothing_is_lost(
    pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "CHUNK", 2)
    with servers.tei(lambda pair: float(len(pair[1])), most=2) as server:
        options = ["score", "--input", str(pairs), "--reward_model", server.url, "--reward_retries", "1"]
        plain = server.routes["POST", "/predict"]
        left = iter(range(2))  # one is the check

        def breaks(body: Any) -> Any:
            if next(left, None) is None:
                raise servers.Refused(503, "gone")
            return plain(body)

        server.routes["POST", "/predict"] = breaks
        before = len(server.requests)
        assert main(options) == 1
        said = capsys.readouterr().err
        assert said.count("status 503") == 1
        assert "line 3" not in said  # it is no row's fault, and no row is tried alone
        assert len(server.requests) - before == 4
        assert len(output(pairs.with_suffix(".scored.jsonl"))) == 2
        server.routes["POST", "/predict"] = plain
        assert main(options) == 0
        assert [row["reward"] for row in output(pairs.with_suffix(".scored.jsonl"))] == [
            float(len(text) or 1) for _, text in PAIRS
        ]


def test_a_row_that_a_server_refuses_is_named(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def picky(pair: tuple[str, ...]) -> float:
        if "Go away" in pair[1]:
            raise servers.Refused(422, {"error": "inputs must have less than 5 tokens"})
        return 1.0

    with servers.tei(picky) as server:
        options = ["score", "--input", str(pairs), "--reward_model", server.url, "--on_error", "skip"]
        assert main(options) == 1
    found = output(pairs.with_suffix(".scored.jsonl"))
    assert [row["reward"] for row in found] == [1, None, 1, 1, 1]
    assert "less than 5 tokens" in found[1]["error"]


# ---- many conversations at a time ------------------------------------------------------------------------------------


def test_a_checkpoint_scores_pairs_of_many_conversations_in_one_batch(tmp_path: Path) -> None:
    from specrej_eval.config import RunConfig

    tokenizer = tiny_tokenizer(chat_template=NO_SYSTEM_TEMPLATE)
    folder = str(save(tiny_reward_model(), tokenizer, tmp_path / "rm"))
    reward = make_reward(RunConfig(reward_model=folder), device="cpu")
    listed = [Pair(tuple(entry.pair.conversation), entry.pair.response) for entry in score.read_pairs(_file(tmp_path))]
    want = [reward.score(pair.conversation, [RowView(0, pair.response, (), "eos")])[0] for pair in listed]
    calls = reward.num_calls
    assert reward.score_pairs(listed) == pytest.approx(want, abs=1e-5)
    assert reward.num_calls == calls + 1
    assert len(set(want)) == len(want)


def test_a_judge_and_a_server_score_pairs_of_many_conversations(tmp_path: Path) -> None:
    from specrej_eval.config import RunConfig

    listed = [entry.pair for entry in score.read_pairs(_file(tmp_path))]
    with servers.chat(lambda text: {str(text.count("e") % 10): 1.0}) as server:
        judge = make_reward(RunConfig(reward_model=f"judge:m@{server.url}"), device="cpu")
        want = [judge.score(pair.conversation, [pair.row])[0] for pair in listed]
        assert judge.score_pairs(listed) == want
        assert len(set(want)) > 1
    with servers.tei(lambda pair: float(len("|".join(pair))), most=9) as server:
        for path in ("", "/rerank"):
            reward = make_reward(RunConfig(reward_model=server.url + path), device="cpu")
            want = [reward.score(pair.conversation, [pair.row])[0] for pair in listed]
            asked = len(server.requests)
            assert reward.score_pairs(listed) == want
            assert len(server.requests) - asked == (3 if path else 1)  # a query each


def test_conversations_are_told_apart_by_all_they_hold() -> None:
    one = ({"role": "user", "content": "a"},)
    two = ({"role": "system", "content": "a"},)
    keys = [pair.key for pair in (Pair(one, "x"), Pair(two, "x"), Pair(one, "y"))]
    assert in_groups(keys, lambda places: [sum(places) + place / 10 for place in places]) == [2.0, 1.1, 2.2]


def _file(folder: Path) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    return file


def test_a_stopped_command_says_how_many_rows_are_on_disk(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each row, what is counted is what another program could read by then."""
    target = pairs.with_suffix(".scored.jsonl")
    monkeypatch.setattr(stopping._state, "kept", None)
    monkeypatch.setattr(score, "CHUNK", 2)
    count = stopping.Kept.add

    def add(kept: stopping.Kept) -> None:
        count(kept)
        assert len(output(target)) == kept.answers
        if kept.answers in (3, 4):
            raise stopping.Stopped

    monkeypatch.setattr(stopping.Kept, "add", add)
    for rows in (3, 4):  # the second start counts what the first one wrote
        monkeypatch.setattr(stopping._state, "told", False)
        assert run(pairs) == 130
        assert f"{rows} of 5 rows are kept in {target}" in capsys.readouterr().err
    assert run(pairs) == 0
    assert [row["reward"] for row in output(target)] == WANT


def test_rows_scored_by_another_model_are_not_gone_on_with(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with servers.tei(lambda pair: float(len(pair[1]))) as server:
        options = ["score", "--input", str(pairs), "--reward_model", server.url]
        assert main(options) == 0
        told = server.routes["GET", "/info"](None)
        server.routes["GET", "/info"] = lambda _: {**told, "model_id": "org/another"}
        capsys.readouterr()
        assert main(options) == 1
    assert "reward_served_model was 'org/the-rm', is now 'org/another'" in capsys.readouterr().err
