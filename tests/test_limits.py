"""Runs that end at a limit, plans of runs, and the live state of one."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import forked
from support.simulated import Process, make_generator, request
from test_auditing import SUMS

import specrej_eval
from specrej_eval import cli
from specrej_eval.commands import status
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError, LimitReached
from specrej_eval.records import lock
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.records.state import RunState, StateFile, state_file

PROCESS = Process.of([float(row) for row in range(8)])


def generator(prompts: int = 12, **arguments: Any) -> Any:
    config = RunConfig.from_args({"n": 8, "max_gen_toks": 12, "first_look": 3, "batch_size": 2, **arguments})[0]
    return make_generator({f"p{number}": PROCESS for number in range(prompts)}, config)


def requests(made: Any, prompts: int = 12) -> list[Any]:
    return [request(made.config, f"p{number}") for number in range(prompts)]


def test_a_run_stops_between_two_requests_and_what_was_in_flight_is_finished(tmp_path: Path) -> None:
    whole = dict(generator().run(requests(generator()), progress=False))
    path = str(tmp_path / "run.jsonl")
    per_prompt = whole[0].ledger.decode_tokens
    found: dict[int, Any] = {}
    starts = 0
    while len(found) < 12:
        starts += 1
        made = generator(journal=path, max_decode_tokens=int(per_prompt * 2.5))
        part: dict[int, Any] = {}
        try:
            part.update(made.run(requests(made), progress=False))
        except LimitReached as error:
            assert "max_decode_tokens=" in str(error) and "same command" in str(error) and path in str(error)
            assert error.exit_code == 75
        else:
            assert len(part) == 12
        for index, result in made.run([], progress=False):
            part[index] = result
        made._journal.close()
        decoded = sum(not result.taken for result in part.values())
        assert decoded in (0, 2, 4), "two at a time; the second two were begun below the limit"
        found.update(part)
        assert starts < 8
    assert starts >= 3
    assert {index: result.trajectories for index, result in found.items()} == {
        index: result.trajectories for index, result in whole.items()
    }


def test_a_limit_of_time_starts_nothing_after_it() -> None:
    made = generator(max_seconds=60)
    made.started -= 61
    with pytest.raises(LimitReached, match="0 of 12 prompts"):
        list(made.run(requests(made), progress=False))
    assert not made.engine.sessions
    made.started += 61
    assert len(dict(made.run(requests(made), progress=False))) == 12


def test_a_limit_that_is_reached_with_the_last_prompt_is_none() -> None:
    made = generator(prompts=2, max_decode_tokens=1)
    assert len(dict(made.run(requests(made, 2), progress=False))) == 2


def test_in_python_the_error_holds_what_was_answered() -> None:
    made = specrej_eval.load(device="cpu", n=4, max_gen_toks=16, batch_size=1, max_decode_tokens=20)
    with pytest.raises(LimitReached) as caught:
        made.generate(SUMS[:4])
    assert 1 <= len(caught.value.results) < 4
    assert all(result.text is not None for result in caught.value.results.values())
    with pytest.raises(ConfigError, match="forecast"):
        specrej_eval.load(device="cpu", plan="only").generate("x")


def test_inside_lm_eval_a_limit_needs_a_journal() -> None:
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    with pytest.raises(ConfigError, match="max_seconds needs journal=FILE"):
        SpecRejLM(max_seconds=5)


def words(folder: Path, *more: str) -> list[str]:
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": text} for text in SUMS]))
    common = ["--apply_chat_template", "false", "--n", "4", "--max_gen_toks", "16", "--batch_size", "1"]
    return ["run", "--prompts", str(prompts), "--output", str(folder / "out"), *common, *more]


def test_a_run_that_a_limit_ended_is_marked_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(words(tmp_path, "--max_decode_tokens", "100")) == 75
    assert "this is not the result of the whole run" in " ".join(capsys.readouterr().err.split())
    record = OutputsFolder(tmp_path / "out").record()
    assert record is not None and not record.complete and record.stopped == "max_decode_tokens=100"
    some = len(OutputsFolder(tmp_path / "out").answers())
    assert 0 < some < len(SUMS)
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert f"not finished: {some} answers so far, stopped by max_decode_tokens=100" in capsys.readouterr().out
    gc.collect()  # in a process of its own, the run would have given its lock up by now
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    assert f"stopped by max_decode_tokens=100, {some} of {len(SUMS)} answers" in capsys.readouterr().out
    assert cli.main(words(tmp_path)) == 0
    record = OutputsFolder(tmp_path / "out").record()
    assert record is not None and record.complete and not record.stopped
    assert not list((tmp_path / "out").glob(".*.state"))
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    assert f"complete, {len(SUMS)} answers" in capsys.readouterr().out


def test_limits_hold_for_all_seeds_of_a_command_together(tmp_path: Path) -> None:
    assert cli.main([*words(tmp_path, "--max_decode_tokens", "500"), "--seeds", "0,1,2"]) == 75
    complete = [OutputsFolder(tmp_path / "out" / f"seed{seed}").record() for seed in range(3)]
    assert complete[0] is not None and complete[0].complete
    assert not all(record is not None and record.complete for record in complete)


def test_a_plan_says_what_the_run_takes_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(tmp_path, "--plan", "only")) == 0
    told = capsys.readouterr().out
    for part in ("plan of 6 prompts, from a probe of 3", "rows     4 a prompt, 24 in all", "rounds", "KV", "time"):
        assert part in told
    assert not (tmp_path / "out").exists()
    # a folder with other answers is none of its business
    assert cli.main(words(tmp_path)) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert cli.main(words(tmp_path, "--plan", "only", "--force", "--alpha", "0.25")) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_forecast_of_equal_prompts_is_exact_in_all_but_time() -> None:
    made = generator()
    asked = requests(made)
    whole = [result.ledger for _, result in made.run(asked, progress=False)]
    forecast = made.forecast(asked)
    assert forecast.decode_tokens == sum(ledger.decode_tokens for ledger in whole) == forecast.most_decoded
    assert forecast.prompts == 12 and forecast.in_flight == 2 and len(forecast.results) == 3
    assert "rows     8 a prompt, 96 in all" in str(forecast)


# the live state


def test_status_of_a_run_that_runs_and_of_one_that_was_killed(tmp_path: Path) -> None:
    run = words(tmp_path, "--n", "64", "--max_gen_toks", "250")
    prompts = [*SUMS] * 10  # more than are answered before it is stopped, whatever the machine does
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    out = tmp_path / "out"
    pid = forked.start(lambda: cli.main(run))
    try:
        state = state_file(out / "specrej_outputs.jsonl")
        while (RunState.read(state) or RunState()).done < 1:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it was to be killed before its end"
            time.sleep(0.05)
        os.kill(pid, signal.SIGSTOP)
        told = "\n".join(status.lines(out))
        assert "running" in told and f"of {len(prompts)} answers" in told and f"process {pid}" in told
        assert "tokens/s" in told and "alive" in told
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    told = "\n".join(status.lines(out))
    assert "ended before it was complete" in told and "dead" in told and "same command" in told
    again = OutputsFolder(out)
    assert f"{len(again.answers())} of {len(prompts)} answers" in told


def test_status_of_a_journal_counts_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    made = generator(journal=str(path), max_decode_tokens=1)
    with pytest.raises(LimitReached):
        list(made.run(requests(made), progress=False))
    told = "\n".join(status.lines(path))
    assert "2 of 12 answers (17%)" in told and "running" in told, "this very process has not let go of it"
    made._journal.close()
    told = "\n".join(status.lines(path))
    assert "ended before it was complete, 2 of 12 answers" in told
    made = generator(journal=str(path))
    assert len(dict(made.run(requests(made), progress=False))) == 12
    made._journal.close()
    assert "no process is writing, 12 answers" in "\n".join(status.lines(path))


def a_state(path: Path, *, total: int, earlier: int = 0, started: float = 100.0) -> None:
    state = StateFile(str(state_file(path)), total=total, earlier=earlier)
    state.state.started = started
    state._write()


def answered(path: Path, prompts: range) -> None:
    """A journal of some of twelve prompts, as one process writes it."""
    made = generator(journal=str(path))
    list(made.run([request(made.config, f"p{number}") for number in prompts], progress=False))
    made._journal.close()


def test_status_knows_the_whole_of_ranks_until_one_is_done_and_never_tells_more_than_all(tmp_path: Path) -> None:
    path, ranks = tmp_path / "run.jsonl", [tmp_path / f"run_rank{rank}.jsonl" for rank in range(2)]
    answered(ranks[0], range(6))
    answered(ranks[1], range(6, 8))
    for rank in ranks:
        a_state(rank, total=6)
    assert "8 of 12 answers" in "\n".join(status.lines(path))
    state_file(ranks[0]).unlink()  # as at its regular end
    told = "\n".join(status.lines(path))
    assert "ended before it was complete, 8 answers" in told and "of 6 answers" not in told
    # one process goes on from the journals of both
    a_state(ranks[0], total=6)
    answered(path, range(8, 9))
    a_state(path, total=12, started=200.0)
    assert "9 of 12 answers" in "\n".join(status.lines(path))


def test_status_of_nothing_says_what_to_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["status", str(where)]) == 1
        assert "specrej-eval run --output DIR" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe", b"[" * 5000])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / ".run.jsonl.state"
    path.write_bytes(damaged)
    assert RunState.read(path) is None


def test_a_state_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    made = generator()
    (tmp_path / "file").write_text("")
    made.state_path = str(tmp_path / "file" / "state")
    assert len(dict(made.run(requests(made), progress=False))) == 12


def test_a_state_says_how_long_it_will_take(tmp_path: Path) -> None:
    state = RunState(started=100.0, updated=160.0, total=40, done=10, decoded=6, decode_tokens=1200)
    assert state.tokens_per_second == 20 and state.seconds_left == 300
    assert RunState(total=4).seconds_left is None
    path = tmp_path / "a" / ".x.state"
    with StateFile(str(path), total=3):
        assert RunState.read(path) is not None
    assert lock.holder(tmp_path / "a" / "x") is None
