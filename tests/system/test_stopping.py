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
from support import FULL, ROOT

from specrej_eval import stopping
from specrej_eval.demo.arithmetic import distinct_problems, question
from specrej_eval.records.outputs import OutputsFolder

PROMPTS = [question(operands) for operands in distinct_problems("test", 60, seed=3)]
LIMIT = 5.0
SLACK = 3.0  # two cores are shared with other tests

Counted = Callable[[str, int], None]


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
    """What it says on stderr, and the seconds it takes."""
    began = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    return errors, time.monotonic() - began


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def run_words(folder: Path) -> list[str]:
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    words = ["--prompts", str(prompts), "--output", str(folder / "out"), "--n", "16", "--until", "\n"]
    return ["-m", "specrej_eval", "run", *words, "--batch_size", "1"]


def lm_eval_words(model: str = "specrej", args: str = "n=16,journal=run.jsonl,batch_size=1") -> list[str]:
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "60"]
    return ["-m", "lm_eval", "--model", model, "--model_args", args, *tasks, "--output_path", "out"]


def test_sigterm_ends_a_run_with_its_answers_kept_and_told(tmp_path: Path, counted: Counted) -> None:
    words = run_words(tmp_path)
    outputs = OutputsFolder(tmp_path / "out").outputs_file
    process = start(*words, cwd=tmp_path, ready=lambda: lines(outputs) >= 3)
    errors, seconds = stop(process, signal.SIGTERM)
    counted("signals sent", 1)
    assert process.returncode == 128 + signal.SIGTERM
    assert seconds < LIMIT + SLACK
    assert "Traceback" not in errors
    assert f"stopped by SIGTERM: {lines(outputs)} of 60 answers are kept in {tmp_path / 'out'}" in errors
    assert "python -m specrej_eval run --prompts" in errors


def test_ctrl_c_under_lm_eval_is_one_message(tmp_path: Path, counted: Counted) -> None:
    journal = tmp_path / "run.jsonl"
    process = start(*lm_eval_words(), cwd=tmp_path, ready=lambda: lines(journal) >= 4)
    errors, seconds = stop(process, signal.SIGINT)
    counted("signals sent", 1)
    assert process.returncode == 130
    assert seconds < LIMIT + SLACK
    assert "Traceback" not in errors
    assert f"stopped by Ctrl-C: {lines(journal) - 1} of 60 answers are kept in run.jsonl" in errors
    assert "python -m lm_eval" in errors


def test_an_error_of_ours_under_lm_eval_is_one_message_and_a_traceback_only_on_demand(tmp_path: Path) -> None:
    words = lm_eval_words(args="alhpa=0.5")
    for debug in ("0", "1") if FULL else ("0",):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}", "SPECREJ_DEBUG": debug},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "unknown argument 'alhpa'" in done.stderr and "did you mean 'alpha'" in done.stderr
        assert ("Traceback" in done.stderr) is (debug == "1")


@pytest.mark.full
@pytest.mark.parametrize("command", ["run", "lm_eval"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_at_any_moment(tmp_path: Path, counted: Counted, command: str, signum: signal.Signals) -> None:
    draw = random.Random(f"{command}{signum}")
    words = run_words(tmp_path) if command == "run" else lm_eval_words()
    kept_in = OutputsFolder(tmp_path / "out").outputs_file if command == "run" else tmp_path / "run.jsonl"
    last = 0
    for place in range(6):
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
        assert seconds < LIMIT + SLACK, (place, seconds)
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
    monkeypatch.setattr(sys, "argv", ["/bin/lm_eval", *words, "reward_model=http://me:hush@host:1"])
    shown = stopping.command_line()
    assert shown.startswith("lm_eval --model_args 'pretrained=a,token=***,n=4,think_end_token_id=7'")
    assert "hf_abc" not in shown and "hush" not in shown and "'y z'" in shown


def test_main_blocked_in_c_ends_all_the_same(tmp_path: Path, counted: Counted) -> None:
    """A lock taken twice never gives Python's handler its turn: the thread that waits beside it ends the process."""
    program = tmp_path / "blocked.py"
    program.write_text(
        "import ctypes, pathlib\n"
        "from specrej_eval import stopping\n"
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
    assert stopping.PATIENCE - 1 < seconds < LIMIT + SLACK
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
