"""`specrej-eval run`: prompts in, one archive out; the same with several processes, after a kill, and after a rerun."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arithmetic import distinct_problems, question
from support import FULL, forked
from support import reward_servers as servers
from support.rank_runs import free_port, numbers, records

from specrej_eval import cli
from specrej_eval.commands.run import split
from specrej_eval.core import GenerationResult
from specrej_eval.errors import ConfigError
from specrej_eval.generator import Generator
from specrej_eval.records.answers import Answer
from specrej_eval.records.outputs import OutputsFolder, open_run

PROMPTS = [question(operands) for operands in distinct_problems("test", 6, seed=3)]
COMMON = ["--n", "4", "--max_gen_toks", "96", "--until", '["\\n"]']


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "topic"])
        writer.writerows([text, f"sum {index}"] for index, text in enumerate(PROMPTS))
    return str(path)


def run(*words: str) -> int:
    return cli.main(["run", *words])


def given(*words: str) -> dict[str, Any]:
    options = vars(cli.parse("run", words))
    del options["hints"]
    return options


def without_costs(answers: list[Answer]) -> list[dict[str, Any]]:
    """Answers without what differs from run to run: seconds and memory."""
    plain = [item.to_dict() for item in answers]
    for item in plain:
        item.pop("seconds")
        for name in ("seconds", "peak_bytes"):
            item["ledger"].pop(name)
    return plain


def test_an_archive_holds_the_answers_in_order_and_every_row_behind_them(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--prompts", prompts, "--output", str(out), *COMMON, "--batch_size", "3") == 0
    shown = capsys.readouterr()
    assert "DEMO" in shown.err and "tokens decoded" in shown.err and "peak memory" in shown.err
    record, answers = open_run(out)
    assert record.complete and record.embedded_demo_pair and record.name.startswith("DEMO")
    assert [item.instruction for item in answers] == PROMPTS
    assert [item.fields for item in answers] == [{"topic": f"sum {index}"} for index in range(6)]
    lines = (out / "specrej_trajectories.jsonl").read_text().splitlines()[1:]
    made = [GenerationResult.from_dict(json.loads(line)["result"]) for line in lines]
    results = {result.prompt_hash: result for result in made}
    for item in answers:
        behind = results[item.prompt_hash]
        assert item.n == len(behind.trajectories) == 4
        ended = [row for row in behind.trajectories if row.finish_reason != "rejected"]
        best = max(ended, key=lambda row: row.reward if row.reward is not None else float("-inf"))
        assert (item.output, item.reward) == (best.text, best.reward)
        assert item.finished_rewards == [row.reward for row in ended]
        assert item.ledger.decode_tokens == sum(row.num_tokens for row in behind.trajectories)
    assert record.totals["decode_tokens"] == sum(item.ledger.decode_tokens for item in answers)


def test_no_file_and_no_message_holds_a_secret(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    password, token, out = "Tr0ub4dor3", "hf_" + "aB3" * 11, tmp_path / "out"
    with servers.chat(lambda text: {"7": 0.5, "3": 0.5}) as server, caplog.at_level(logging.DEBUG, "specrej_eval"):
        name = f"likelihood+judge:m@{server.url.replace('http://', f'http://me:{password}@')}"
        words = ["--prompts", prompts, "--output", str(out), "--n", "2", "--max_gen_toks", "8", "--reward_retries", "0"]
        words += ["--reward_model", name, "--token", token]
        assert run(*words, "--limit", "2") == 0
        server.faults += [servers.status(401, f"{password} is wrong")] * 9
        assert run(*words) == 1
    told = capsys.readouterr()
    assert server.headers[-1]["Authorization"].startswith("Basic ") and "*** is wrong" in told.err
    files = [path.read_text() for path in out.rglob("*") if path.is_file()]
    for text in (told.out, told.err, caplog.text, *files):
        assert password not in text and token not in text


def test_speculative_rejection_and_best_of_n_see_the_same_rows(prompts: str, tmp_path: Path) -> None:
    bon = [*COMMON, "--strategy", "best_of_n"]
    assert run("--prompts", prompts, "--output", str(tmp_path / "bon"), *bon) == 0
    assert run("--prompts", prompts, "--output", str(tmp_path / "spr"), *COMMON, "--alpha", "0") == 0
    (bon_record, bon_answers), (spr_record, spr_answers) = open_run(tmp_path / "bon"), open_run(tmp_path / "spr")
    assert bon_record.fingerprint != spr_record.fingerprint
    assert [item.output for item in bon_answers] == [item.output for item in spr_answers]


def test_a_rerun_does_nothing_and_another_configuration_is_refused(
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = str(tmp_path / "out")
    assert run("--prompts", prompts, "--output", out, *COMMON, "--limit", "2") == 0
    before = {path.name: path.read_bytes() for path in Path(out).iterdir()}
    monkeypatch.setattr(Generator, "run", lambda *_, **__: pytest.fail("decoded again"))
    capsys.readouterr()
    assert run("--prompts", prompts, "--output", out, *COMMON, "--limit", "2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("--prompts", prompts, "--output", out, *COMMON, "--limit", "2", "--seed", "1") == 1
    assert "seed was 0, is now 1" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path(out).iterdir()} == before
    monkeypatch.undo()
    assert run("--prompts", prompts, "--output", out, *COMMON) == 0  # two answers are there already
    assert "2 of 6 answers are already recorded" in caplog.text
    copies = [tmp_path / "out" / f"{name}_backup.jsonl" for name in ("specrej_trajectories", "specrej_outputs_rank0")]
    for copy in copies:
        copy.write_text("of the user's own\n")
    assert run("--prompts", prompts, "--output", out, *COMMON, "--seed", "1", "--force") == 0
    assert [copy.read_text() for copy in copies] == ["of the user's own\n"] * 2
    assert {seed for item in open_run(out)[1] for seed in item.seeds} == {1}


@pytest.mark.parametrize("wrong", [("--max_gen_toks", "5000"), ("--kv_budget_tokens", "20")], ids=lambda it: it[0])
def test_arguments_that_were_refused_before_the_first_answer_do_not_hold_the_folder(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    words = ("--prompts", prompts, "--output", str(out), "--n", "4", "--until", "\n", "--limit", "1")
    assert run(*words, *wrong) == 1
    assert not list(out.rglob("specrej_run.json"))
    capsys.readouterr()
    assert run(*words, "--max_gen_toks", "40") == 0, capsys.readouterr().err
    # of a run that has answers nothing is taken away
    assert run(*words, *wrong) == 1
    assert len(open_run(out)[1]) == 1


def test_prompts_moved_in_their_file_keep_their_answers(prompts: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("--prompts", prompts, "--output", out, *COMMON) == 0
    before = {item.instruction: item.output for item in open_run(out)[1]}
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in reversed(PROMPTS)))
    assert run("--prompts", str(turned), "--output", out, *COMMON) == 0
    after = open_run(out)[1]
    assert [item.instruction for item in after] == PROMPTS[::-1]
    assert [item.index for item in after] == list(range(6))
    assert {item.instruction: item.output for item in after} == before


def test_a_prompt_asked_twice_is_drawn_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    out = str(tmp_path / "out")
    assert run("--prompts", str(path), "--output", out, *COMMON, "--temperature", "3", "--top_k", "0") == 0
    first, _, again = open_run(out)[1]
    assert first.instruction == again.instruction and (first.repeat, again.repeat) == (0, 1)
    assert first.output != again.output


def test_max_tokens_is_of_prompt_and_answer_together(prompts: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = ["--prompts", prompts, "--output", out, "--n", "2", "--limit", "1", "--max_gen_toks", "96"]
    assert run(*words, "--max_tokens", "60") == 0
    item = open_run(out)[1][0]
    assert item.resolved["max_gen_toks"] == 60 - item.ledger.prompt_tokens == item.num_tokens
    assert item.finish_reason == "length"
    assert run(*words[:3], str(tmp_path / "none"), *words[4:], "--max_tokens", "10") == 1


@pytest.mark.parametrize(
    "words, told",
    [
        (["--alhpa", "0.5"], "did you mean --alpha"),
        (["--llm_name", "x"], "did you mean --pretrained"),
        (["--reward_model_name", "x"], "did you mean --reward_model"),
        (["--data_filename", "x"], "did you mean --prompts"),
        (["--max_gen_tokens", "5"], "did you mean --max_gen_toks"),
        (["--speculative_rejection"], "it is --strategy speculative_rejection"),
        (["--journal", "x"], "keeps its own journal"),
        (["--join", "true", "--force"], "--force with --join"),
        (["--join", "true", "--keep_trajectories", "false"], "--join needs the rows"),
        (["--join", "true", "--n", "max"], "n=max with join=True"),
        (["--join", "true", "--max_decode_tokens", "9"], "max_decode_tokens counts"),
        (["0.5"], "unexpected '0.5'"),
        (["--alpha", "2"], "alpha must be in"),
        (["--limit", "some"], "limit must be a whole number"),
        (["--prompts", "no_such_file.csv"], "no_such_file.csv"),
        (["--pretrained", "./no/such"], "there is no folder"),
    ],
)
def test_bad_words_are_told_before_anything_is_loaded(
    words: list[str],
    told: str,
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from specrej_eval import api

    monkeypatch.setattr(api.RunPlan, "load", lambda *_: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    assert run("--prompts", prompts, "--output", str(out), *words) == 1
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_the_prompts_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--alpha", "0.5") == 1
    assert "--prompts is missing" in capsys.readouterr().err
    assert run("--data_filename", "prompts.json") == 1
    assert "did you mean --prompts" in capsys.readouterr().err


def test_options_are_the_names_of_model_args() -> None:
    words = ["--prompts", "p", "--top-k=7", "--n", "max", "--chat_template_args", '{"a": 1}', "--revision", "main"]
    own, config, host = split(given(*words, "--first_look", "none", "--trust_remote_code", "true"))
    assert own == {"prompts": "p"}
    assert (config.top_k, config.n, config.first_look, config.trust_remote_code) == (7, "max", None, True)
    assert host == {"chat_template_args": {"a": 1}, "revision": "main"}
    with pytest.raises(ConfigError):
        split(given("--prompts", "p", "--n", "0"))


def test_reading_a_run_that_is_being_written_leaves_its_files_alone(prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--prompts", prompts, "--output", str(out), *COMMON, "--limit", "2") == 0
    with (out / "specrej_outputs.jsonl").open("ab") as file:
        file.write(b'{"instruction": "half a li')
    before = (out / "specrej_outputs.jsonl").read_bytes()
    assert len(open_run(out)[1]) == 2
    assert (out / "specrej_outputs.jsonl").read_bytes() == before
    assert run("--prompts", prompts, "--output", str(out), *COMMON, "--limit", "3") == 0
    assert len(open_run(out)[1]) == 3


def test_several_seeds_are_runs_of_their_own_with_models_loaded_once(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from specrej_eval import api

    loads = []
    real = api.RunPlan.load
    monkeypatch.setattr(api.RunPlan, "load", lambda *given, **more: loads.append(1) or real(*given, **more))
    words = ["--prompts", prompts, "--n", "2", "--max_gen_toks", "24", "--limit", "2"]
    out = tmp_path / "out"
    assert run(*words, "--output", str(out), "--seeds", "3, 5") == 0
    assert "specrej-eval gather" in capsys.readouterr().out
    assert len(loads) == 1 and sorted(path.name for path in out.iterdir()) == ["seed3", "seed5"]
    assert run(*words, "--output", str(tmp_path / "alone"), "--seed", "5") == 0
    assert without_costs(open_run(out / "seed5")[1]) == without_costs(open_run(tmp_path / "alone")[1])
    assert [item.output for item in open_run(out / "seed3")[1]] != [item.output for item in open_run(out / "seed5")[1]]
    assert run(*words, "--output", str(out), "--seeds", "3,5,7") == 0
    assert len(loads) == 3 and (out / "seed7").is_dir(), "what is there is not decoded again"
    gathered = str(tmp_path / "gathered")
    assert cli.main(["gather", *(str(out / f"seed{seed}") for seed in (3, 5, 7)), "--output", gathered]) == 0
    assert [item.n for item in open_run(gathered)[1]] == [6, 6]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0,one"], "--seeds must be whole numbers with commas between them, got '0,one'"),
        (["--seeds", "0-2"], "did you mean --seeds 0,1,2"),
        (["--seeds", "3..5"], "did you mean --seeds 3,4,5"),
        (["--seeds", ","], "for example --seeds 0,1,2"),
        (["--seeds", "1,1"], "names one seed twice"),
        (["--seeds", "0,1", "--seed", "2"], "each seed is a run of its own"),
    ],
)
def test_bad_seeds_are_told_before_anything_is_loaded(
    words: list[str], told: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompts", prompts, "--output", str(tmp_path / "out"), *words) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_n_max_is_measured_by_the_first_start_alone(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval.engines.transformers.engine import TransformersEngine

    words = ["--prompts", prompts, "--output", str(tmp_path / "out"), "--n", "max", "--max_gen_toks", "32"]
    monkeypatch.setattr(TransformersEngine, "capacity_tokens", lambda *_: 150)
    assert run(*words, "--limit", "1") == 0
    monkeypatch.setattr(TransformersEngine, "capacity_tokens", lambda *_: 300)
    assert run(*words, "--limit", "2") == 0
    record, answers = open_run(tmp_path / "out")
    assert record.capacity_tokens == 150
    assert {item.resolved["kv_budget_tokens"] for item in answers} == {150}
    lines = (tmp_path / "out" / "specrej_trajectories.jsonl").read_text().splitlines()
    assert {json.loads(line).get("capacity_tokens") for line in lines[2:]} == {150}, "and the journal says so too"


# processes


def specrej_eval(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "specrej_eval", "run", *words] if launcher else [sys.executable, "-m", "specrej_eval"]
    command += [] if launcher else ["run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_write_the_archive_of_one(
    prompts: str, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    """Bit by bit, in full under accelerate's own launcher; what one process had answered before stays its."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    words = [*COMMON, "--logprobs", "true"]
    assert run("--prompts", prompts, "--output", one, *words) == 0
    assert run("--prompts", prompts, "--output", two, *words, "--limit", "2") == 0
    if FULL:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        # with --cpu, accelerate starts one process whatever num_processes says; --multi_gpu starts them without a GPU
        # too; its older releases do not look for a port of their own where they are given 0
        port = ("--main_process_port", str(free_port()))
        launcher = (accelerate, "launch", "--multi_gpu", "--num_processes", "2", *port)
        done = specrej_eval("--prompts", prompts, "--output", two, *words, launcher=launcher)
        assert done.returncode == 0, done.stderr
    else:
        assert forked.together(lambda: run("--prompts", prompts, "--output", two, *words), 2) == [0, 0]
    assert without_costs(open_run(two)[1]) == without_costs(open_run(one)[1])
    assert not list(Path(two).glob("specrej_outputs_rank*"))
    rows = [len(path.read_text().splitlines()) - 1 for path in sorted(Path(two).glob("specrej_trajectories_rank*"))]
    assert rows == [2, 2]
    assert records(Path(two)) == records(Path(one))
    counted("numbers of several processes compared bitwise with one's", numbers(records(Path(two))))


@pytest.mark.full
def test_a_killed_run_goes_on_and_ends_with_the_same_answers(prompts: str, tmp_path: Path) -> None:
    """As a process of its own; system/test_kills.py has the same at chosen moments, in `make test` too."""
    words = ["--prompts", prompts, *COMMON, "--batch_size", "1", "--n", "16"]
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    assert run(*words, "--output", whole) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "specrej_eval", "run", *words, "--output", killed],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path = OutputsFolder(killed).outputs_file
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 2:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    with path.open("ab") as file:
        file.write(b'{"instruction": "half a li')  # what a kill within a write leaves
    done = specrej_eval(*words, "--output", killed)
    assert done.returncode == 0, done.stderr
    assert "of 6 answers are already recorded" in done.stderr
    assert without_costs(open_run(killed)[1]) == without_costs(open_run(whole)[1])
