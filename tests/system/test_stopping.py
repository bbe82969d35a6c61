"""Ctrl-C and SIGTERM at any moment: within seconds, with everything finished saved, and one message that says so."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from arithmetic import distinct_problems, question
from support import ROOT, forked, lm_eval_command
from support.rank_runs import HANG, lines

from specrej_eval import stopping
from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.records.outputs import OutputsFolder

PROMPTS = [question(operands) for operands in distinct_problems("test", 60, seed=3)]

Counted = Callable[[str, int], None]
Measured = Callable[[str, float], None]
pytestmark = pytest.mark.usefixtures("ctrl_c_is_not_ignored")


def start(*words: str, cwd: Path, ready: Callable[[], bool]) -> subprocess.Popen[str]:
    """A process, once it is ready to be stopped."""
    # the checkout's own startup module, whatever is installed
    path = f"{ROOT}{os.pathsep}{ROOT / 'autoload'}"
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


def stop(process: subprocess.Popen[str], signum: signal.Signals) -> tuple[str, float]:
    """What it says on stderr, and the seconds it takes; they are told, and bounded by ``HANG`` alone."""
    began = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=HANG)  # benchmarks/stopping_time.py says what it takes on a quiet machine
    return errors, time.monotonic() - began


def run_words(folder: Path) -> list[str]:
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    words = ["--prompts", str(prompts), "--output", str(folder / "out"), "--n", "16", "--until", "\n"]
    return ["-m", "specrej_eval", "run", *words, "--batch_size", "1"]


def lm_eval_words(model: str = "specrej", args: str = "n=16,journal=run.jsonl,batch_size=1") -> list[str]:
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "60"]
    return ["-m", "lm_eval", "--model", model, "--model_args", args, *tasks, "--output_path", "out"]


ROWS = 6000


def score_words(folder: Path) -> tuple[list[str], Path]:
    rows = [{"prompt": question((a, b)), "response": f" {a}+{b}={a + b}"} for a in range(10, 70) for b in range(100)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", str(folder / "pairs.jsonl"), "--output", str(folder / "scored.jsonl")]
    words += ["--reward_model", str(DEMO_REWARD)]
    return ["-m", "specrej_eval", "score", *words], folder / "scored.jsonl"


def test_sigterm_ends_a_run_with_its_answers_kept_and_told(
    tmp_path: Path, counted: Counted, measured: Measured
) -> None:
    words = run_words(tmp_path)
    outputs = OutputsFolder(tmp_path / "out").outputs_file
    process = start(*words, cwd=tmp_path, ready=lambda: lines(outputs) >= 3)
    errors, seconds = stop(process, signal.SIGTERM)
    counted("signals sent", 1)
    assert process.returncode == 128 + signal.SIGTERM
    measured("seconds from SIGTERM to the end: run", seconds)
    assert "Traceback" not in errors
    assert f"stopped by SIGTERM: {lines(outputs)} of 60 answers are kept in {tmp_path / 'out'}" in errors
    assert "python -m specrej_eval run --prompts" in errors


def test_ctrl_c_under_lm_eval_is_one_message(
    tmp_path: Path, few_tasks: Path, counted: Counted, measured: Measured
) -> None:
    """In a forked process; test_at_any_moment has it in one of its own."""
    journal, argv = tmp_path / "run.jsonl", [*lm_eval_command.ARGV, *lm_eval_words()[2:]]
    pid = forked.speaking(lambda: lm_eval_command.work(few_tasks), said=tmp_path, folder=tmp_path, argv=argv)
    while lines(journal) < 4:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (tmp_path / "stderr").read_text()[-3000:]
        time.sleep(0.005)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forked.ended(pid) == 130
    measured("seconds from SIGINT to the end: lm_eval", time.monotonic() - began)
    counted("signals sent", 1)
    errors = (tmp_path / "stderr").read_text()
    assert "Traceback" not in errors
    assert f"stopped by Ctrl-C: {lines(journal) - 1} of 60 answers are kept in run.jsonl" in errors
    assert "python -m lm_eval" in errors


@pytest.mark.full
@pytest.mark.parametrize("debug", ["0", "1"])
def test_an_error_of_ours_under_lm_eval_is_one_message_and_a_traceback_only_on_demand(
    tmp_path: Path, debug: str
) -> None:
    """In a process of its own; test_lm_eval_run has the same in this one."""
    done = subprocess.run(
        [sys.executable, *lm_eval_words(args="alhpa=0.5")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}", "SPECREJ_DEBUG": debug},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "unknown argument 'alhpa'" in done.stderr and "did you mean 'alpha'" in done.stderr
    assert ("Traceback" in done.stderr) is (debug == "1")


@pytest.mark.full
def test_ctrl_c_while_rows_of_a_file_are_scored_tells_how_many(
    tmp_path: Path, counted: Counted, measured: Measured
) -> None:
    words, target = score_words(tmp_path)
    process = start(*words, cwd=tmp_path, ready=lambda: lines(target) >= 128)
    errors, seconds = stop(process, signal.SIGINT)
    counted("signals sent", 1)
    measured("seconds from SIGINT to the end: score", seconds)
    assert process.returncode == 130, errors[-2000:]
    assert "Traceback" not in errors
    assert f"stopped by Ctrl-C: {lines(target):,} of {ROWS:,} rows are kept in {target}" in errors


@pytest.mark.full
@pytest.mark.parametrize("command", ["run", "lm_eval"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_at_any_moment(
    tmp_path: Path, counted: Counted, measured: Measured, command: str, signum: signal.Signals
) -> None:
    draw = random.Random(f"{command}{signum}")
    words = run_words(tmp_path) if command == "run" else lm_eval_words()
    kept_in = OutputsFolder(tmp_path / "out").outputs_file if command == "run" else tmp_path / "run.jsonl"
    last = 0
    for _ in range(6):
        began = time.monotonic()
        # the first moments that a handler can be there, then anywhere
        wait = 2.5 + draw.random() * 9
        process = start(*words, cwd=tmp_path, ready=lambda began=began, wait=wait: time.monotonic() - began > wait)
        if process.poll() is not None:
            process.communicate()
            assert process.returncode == 0  # all is answered
            break
        errors, seconds = stop(process, signum)
        counted("signals sent", 1)
        if process.returncode == 0:
            break
        assert process.returncode == 128 + signum, errors[-2000:]
        measured(f"seconds from {signum.name} to the end: {command}", seconds)
        assert "Traceback" not in errors, errors[-2000:]
        now = max(0, lines(kept_in) - (command == "lm_eval"))
        if found := re.search(r"(\d+) of 60 answers are kept", errors):
            assert int(found[1]) == now
        assert now >= last
        last = now


# inside one process


def test_outside_a_command_python_keeps_its_ways() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stopping.signals():
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_are_put_back_and_those_of_others_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping.command(), stopping.signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, lambda *_: None)
    theirs = signal.getsignal(signal.SIGTERM)
    try:
        with stopping.command(), stopping.signals():
            assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


SET = {"default": signal.SIG_DFL, "ignored": signal.SIG_IGN, "somebody's": lambda *_: None}


@pytest.mark.parametrize("terminate", SET)
@pytest.mark.parametrize("interrupt", SET)
def test_ignored_signals_stay_ignored_and_the_others_are_still_told(interrupt: str, terminate: str) -> None:
    """`nohup specrej-eval run ... &` in a script ignores Ctrl-C; SIGTERM must end it with its message all the same."""
    numbers = {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
    saved = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, name in numbers.items():
            default = name == "default" and number == signal.SIGINT  # as Python itself starts
            signal.signal(number, signal.default_int_handler if default else SET[name])
        before = {number: signal.getsignal(number) for number in numbers}
        with stopping.command(), stopping.signals():
            for number, name in numbers.items():
                ours = name == "default" and "somebody's" not in numbers.values()
                assert signal.getsignal(number) is (stopping._on_signal if ours else before[number])
        assert {number: signal.getsignal(number) for number in numbers} == before
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


@pytest.mark.full
def test_sigterm_in_the_background_is_told(tmp_path: Path, counted: Counted, measured: Measured) -> None:
    words = run_words(tmp_path)
    outputs = OutputsFolder(tmp_path / "out").outputs_file
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process that is started inherits
    try:
        process = start(*words, cwd=tmp_path, ready=lambda: lines(outputs) >= 3)
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    errors, seconds = stop(process, signal.SIGTERM)
    counted("signals sent", 2)
    measured("seconds from SIGTERM to the end: run in the background", seconds)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM: {lines(outputs)} of 60 answers are kept" in errors


def test_another_thread_installs_nothing() -> None:
    seen = []

    def work() -> None:
        with stopping.command(), stopping.signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_the_command_is_shown_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model_args", "pretrained=a,token=hf_abc,n=4,think_end_token_id=7", "--token", "hf_abc", "--x", "y z"]
    words += ["--hf_token=hush-hush", "think_end_token=</think>"]
    monkeypatch.setattr(sys, "argv", ["/bin/lm_eval", *words, "reward_model=http://me:hush@host:1"])
    shown = stopping.command_line()
    assert shown.startswith("lm_eval --model_args 'pretrained=a,token=***,n=4,think_end_token_id=7'")
    assert "hf_abc" not in shown and "hush" not in shown and "'y z'" in shown
    assert "think_end_token=</think>" in shown, "a command to run again needs it"


def test_main_blocked_in_c_ends_all_the_same(tmp_path: Path, counted: Counted, measured: Measured) -> None:
    """A lock taken twice never gives Python's handler its turn: the thread that waits beside it ends the process."""
    program = tmp_path / "blocked.py"
    program.write_text(
        "import ctypes, pathlib\n"
        "from specrej_eval import stopping\n"
        "stopping.PATIENCE = 0.5\n"
        "with stopping.command(), stopping.signals():\n"
        "    pathlib.Path('ready').touch()\n"
        "    lock = ctypes.create_string_buffer(64)\n"  # a pthread_mutex_t
        "    libc = ctypes.CDLL(None)\n"
        "    libc.pthread_mutex_lock(lock)\n"
        "    libc.pthread_mutex_lock(lock)\n"
    )
    process = start(str(program), cwd=tmp_path, ready=(tmp_path / "ready").exists)
    time.sleep(0.3)
    errors, seconds = stop(process, signal.SIGTERM)
    counted("signals sent", 1)
    assert process.returncode == 128 + signal.SIGTERM
    measured("seconds from SIGTERM to the end: blocked in C, with 0.5 seconds of patience", seconds)
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
