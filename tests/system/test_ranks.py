"""A rank that dies: the others stop within seconds and name it; what they have answered is kept."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT

from specrej_eval.demo.arithmetic import distinct_problems, question
from specrej_eval.errors import ConfigError
from specrej_eval.ranks import GRACE, POLL, Peer, RankError, Watch

PROMPTS = [question(operands) for operands in distinct_problems("test", 120, seed=3)]
SECONDS = GRACE + 3 * POLL + 6  # two cores are shared with other tests

Counted = Callable[[str, int], None]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(words: list[str], *, ranks: int, cwd: Path) -> list[subprocess.Popen[str]]:
    """Processes that find each other by their environment: nothing but they themselves watches them."""
    port, processes = free_port(), []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}",
            "HF_HOME": str(cwd / f"hf{rank}"),
        }
        # to files: a full pipe would stop a process that nobody reads from
        with (cwd / f"errors{rank}").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *words], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=errors, text=True
                )
            )
    return processes


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def run_words(folder: Path) -> tuple[list[str], Callable[[int], Path]]:
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    words = ["--prompts", "prompts.json", "--output", "out", "--n", "16", "--until", "\n", "--batch_size", "1"]
    return ["-m", "specrej_eval", "run", *words], lambda rank: folder / "out" / f"specrej_outputs_rank{rank}.jsonl"


def lm_eval_words(folder: Path) -> tuple[list[str], Callable[[int], Path]]:
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "120"]
    words = ["--model", "specrej", "--model_args", "n=16,batch_size=1,journal=run.jsonl", *tasks]
    return ["-m", "lm_eval", *words], lambda rank: folder / f"run_rank{rank}.jsonl"


def kill_one(
    words: list[str], kept: Callable[[int], Path], *, victim: int, ranks: int, after: int, cwd: Path
) -> list[str]:
    """Start ranks, kill one with SIGKILL; what the others say. They must end in time, and not with 0."""
    processes = start(words, ranks=ranks, cwd=cwd)
    try:
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and not all(lines(kept(rank)) >= after for rank in range(ranks)):
            assert all(process.poll() is None for process in processes), (cwd / "errors0").read_text()[-3000:]
            time.sleep(0.01)
        processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        said = []
        for rank, process in enumerate(processes):
            process.wait(timeout=60)
            if rank == victim:
                continue
            assert time.monotonic() - began < SECONDS
            assert process.returncode not in (0, -signal.SIGKILL, -signal.SIGABRT)
            said.append((cwd / f"errors{rank}").read_text())
            assert lines(kept(rank)) >= after
        return said
    finally:
        for process in processes:
            process.kill()


def check(said: list[str], victim: int) -> None:
    for text in said:
        # killed before it had said where it runs, it has no process id that the others could know
        named = f"rank {victim} (pid " in text or (victim == 0 and "rank 0, which holds the run's store" in text)
        assert named, text[-3000:]
        assert "has died" in text
        assert "Traceback" not in text, text[-3000:]
        # torch's C++ says once that the store is gone, if it is asked at the very moment its holder dies
        assert text.count("frame #0") <= 1, text[-3000:]
        assert "answers" in text and "run the same command again" in text


def test_a_dead_rank_is_named_by_the_other(tmp_path: Path, counted: Counted) -> None:
    words, kept = run_words(tmp_path)
    check(kill_one(words, kept, victim=1, ranks=2, after=2, cwd=tmp_path), 1)
    counted("ranks killed", 1)


@pytest.mark.full
@pytest.mark.parametrize("command", [run_words, lm_eval_words])
@pytest.mark.parametrize("ranks", [2, 3])
def test_whichever_rank_dies_whenever_the_others_name_it(
    tmp_path: Path, counted: Counted, command: Callable[[Path], tuple[list[str], Callable[[int], Path]]], ranks: int
) -> None:
    draw = random.Random(ranks)
    for victim in range(ranks):
        folder = tmp_path / str(victim)
        folder.mkdir()
        words, kept = command(folder)
        check(kill_one(words, kept, victim=victim, ranks=ranks, after=draw.randrange(1, 12), cwd=folder), victim)
        counted("ranks killed", 1)


def test_a_process_is_told_from_another_with_its_id() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Peer.of_this_process(0)
    assert me.alive
    other = Peer(1, me.host, process.pid, me.started + "0")
    assert not other.alive  # the id has been given out again
    process.kill()
    assert not Peer(1, me.host, process.pid, "1").alive  # a zombie
    process.wait()
    assert not Peer(1, me.host, process.pid, "1").alive


class DeadStore:
    """The store of a rank 0 that is killed before anybody has heard of it."""

    def __init__(self) -> None:
        self.calls = 0

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("Broken pipe")

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Broken pipe")


def test_rank_0_dead_before_anybody_has_heard_of_it_is_named_all_the_same() -> None:
    watch = Watch(1, 2, DeadStore())
    with pytest.raises(RankError, match="rank 0, which holds the run's store, has died"), watch.guard():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(ConfigError, match="own"), watch.guard():
        raise ConfigError("own")
